"""The calibration cache: what was measured, with the hash of what it came from."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from adavit.calibration.histogram import BINS, Histogram
from adavit.calibration.ranges import Ranges
from adavit.calibration.recording import DispatchCount
from adavit.errors import InputError
from adavit.files import write_beside
from adavit.reading import read_arrays

__all__ = ["Origin", "load_ranges", "save_ranges"]

VERSION = 2
MAX_BYTES = 256 << 20
Origin = dict[str, Any]
"""What ranges came from: "model" (a hash of weights and preprocessing), "images" (of the files), "samples", "seed".

Also "points", the offsets of the operating points, where these are not the trained policy alone.
"""


def save_ranges(path: Path, ranges: Ranges, origin: Origin) -> None:
    """Writes ranges to `path` (npz), beside it first, then renamed."""
    sites = [(unit, site, found) for unit, part in ranges.histograms.items() for site, found in part.items()]
    about = {
        "version": VERSION,
        "origin": origin,
        "images": ranges.images,
        "seen": {name: asdict(seen) for name, seen in ranges.seen.items()},
        "sites": [[unit, site, found.width, found.peak] for unit, site, found in sites],
        "peaks": ranges.peaks,
    }
    counts = np.stack([found.counts for _, _, found in sites]) if sites else np.zeros((0, BINS), np.int64)
    with write_beside(path) as file:
        np.savez_compressed(file, counts=counts, about=np.asarray(json.dumps(about)))


def load_ranges(path: Path) -> tuple[Ranges, Origin]:
    """Reads what `save_ranges` wrote.

    Raises:
        InputError: no such file, or not a calibration cache.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such calibration cache; give `calibration_images` to make one")
    try:
        counts, described = read_arrays(path, ("counts", "about"), MAX_BYTES)
        about = json.loads(str(described))
        if about["version"] != VERSION:
            raise ValueError(f"its version is {about['version']!r}")
        if counts.dtype != np.int64 or counts.shape != (len(about["sites"]), BINS):
            raise ValueError("its histograms are damaged")
        seen = {name: DispatchCount(**values) for name, values in about["seen"].items()}
        ranges = Ranges(int(about["images"]), seen, {}, dict(about["peaks"]))
        for row, (unit, site, width, peak) in zip(counts, about["sites"], strict=True):
            found = ranges.histograms.setdefault(unit, {})[site] = Histogram()
            found.counts, found.width, found.peak = row, float(width), float(peak)
        return ranges, dict(about["origin"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not a calibration cache ({error}); delete it and calibrate again") from None
