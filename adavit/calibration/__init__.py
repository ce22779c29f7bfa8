"""Calibration: the numbers a bundle runs with. Bundles are float32 so far, with the trained thresholds."""
