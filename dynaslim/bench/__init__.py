"""Timing: ratios of interleaved runs within one process."""
