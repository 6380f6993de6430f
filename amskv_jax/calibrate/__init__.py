"""Calibration: where a model's attention goes, and what every block of its cache is worth."""
