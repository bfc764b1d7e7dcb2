"""Timing, and the one small library of it: `python -m tools.bench`."""
