"""Benchmarks: what launchkit predicts, beside what happened."""
