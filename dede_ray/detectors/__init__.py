"""Detectors: one file per method, each readable beside its paper; contract.py says what they promise."""
