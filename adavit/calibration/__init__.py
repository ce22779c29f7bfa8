"""Calibration: the numbers a bundle runs with. Precisions and operating points, from images."""
