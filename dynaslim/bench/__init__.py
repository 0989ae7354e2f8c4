"""Benchmarks: time ratios of interleaved runs within one process."""
