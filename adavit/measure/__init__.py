"""Measuring: speed against the dense twin, where time goes, how good and how different bundles are."""
