"""What a checkpoint notes beside its weights."""

from __future__ import annotations

import json
from math import nan
from pathlib import Path
from typing import Any

from adavit.errors import CheckpointError, shown
from adavit.model.checkpoint_file import is_safetensors, noted_arguments, read_metadata, read_pickle


def read_classes(path: Path) -> list[str]:
    """The class names noted in a safetensors file, in the order of the logits; none where there are none."""
    try:
        found = json.loads(read_metadata(path).get("classes", "[]"))
    except (ValueError, RecursionError):
        return []
    known = isinstance(found, list) and all(isinstance(name, str) and name.strip() for name in found)
    return [" ".join(name.split()) for name in found] if known else []


def read_crop(path: Path) -> float | None:
    """The share of the resized short side that evaluation keeps, where the file notes it.

    Raises:
        CheckpointError: what it notes is no share of 0.1 to 1.
    """
    if is_safetensors(path):
        noted: Any = read_metadata(path).get("crop_ratio")
    else:
        arguments = noted_arguments(read_pickle(path))
        settings = arguments.get("settings")  # of `adavit-train`; released checkpoints have timm's name for it
        noted = settings.get("crop") if isinstance(settings, dict) else arguments.get("crop_pct")
    if noted is None:
        return None
    try:
        crop = float(noted) if isinstance(noted, str | float | int) else nan
    except (ValueError, OverflowError):
        crop = nan
    if not 0.1 <= crop <= 1:
        raise CheckpointError(f"{path}: its crop ratio is {shown(noted)}; give one from 0.1 to 1")
    return crop
