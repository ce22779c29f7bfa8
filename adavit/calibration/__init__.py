"""Calibration: the numbers a bundle runs with. Operating points, from images."""
