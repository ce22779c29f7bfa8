"""What a model card says of the weights beyond their shapes: licence, data sets and results, where they are known."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adavit.errors import OptionError, shown
from adavit.model import read_metadata

__all__ = ["check_published", "published", "published_notes", "without_results"]

log = logging.getLogger(__name__)

LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
DATASET = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
MEASURED = ("metrics", "model-index")
"""What a card has of results."""


def check_published(license: str | None, datasets: Sequence[str]) -> None:
    """Raises OptionError where a licence or a data set is none that the Hugging Face Hub could know."""
    if license is not None and not (isinstance(license, str) and LICENSE.fullmatch(license)):
        raise OptionError(
            f"{shown(license)} is no identifier of a licence; give one of the Hugging Face Hub's, such as apache-2.0, "
            "or other"
        )
    for dataset in datasets:
        if not DATASET.fullmatch(dataset):
            raise OptionError(
                f"{shown(dataset)} is no name of a data set; give the Hugging Face Hub's, such as imagenet-1k or "
                "zalando-datasets/fashion_mnist"
            )


def published(source: Path, license: str | None, datasets: Sequence[str]) -> dict[str, Any]:
    """The licence and the data sets of a checkpoint: as given, else as its file notes."""
    given = {"license": license, "datasets": list(datasets)}
    return _noted(source) | {key: value for key, value in given.items() if value}


def _noted(source: Path) -> dict[str, Any]:
    """The licence and the data sets that a safetensors file notes; what is not usable is left out with a warning."""
    notes = read_metadata(source)
    license, datasets = notes.get("license"), notes.get("datasets")
    found: dict[str, Any] = {}
    if license is not None:
        found["license"] = license.lower()
    if datasets is not None:
        try:
            found["datasets"] = json.loads(datasets)
        except (ValueError, RecursionError):
            found["datasets"] = [datasets]
    try:
        check_published(found.get("license"), _texts(found.get("datasets", [])))
    except OptionError as error:
        log.warning("%s notes a licence or data sets that the model card leaves out: %s", source, error)
        return {}
    return found


def without_results(card: Mapping[str, Any]) -> dict[str, Any]:
    """What a card says of the weights, whatever they run as."""
    return {key: value for key, value in card.items() if key not in MEASURED}


def published_notes(known: Mapping[str, Any]) -> dict[str, str]:
    """As the notes of a safetensors file, where `published` finds them again."""
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in known.items()}


def _texts(names: Any) -> list[str]:
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise OptionError(f"{shown(names)} is no list of names")
    return names
