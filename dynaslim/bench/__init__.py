"""What is timed and how: ratios of interleaved runs within one process."""
