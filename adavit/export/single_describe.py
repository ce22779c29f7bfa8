"""What a single file tells of itself: in its metadata, and as JSON beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from adavit.bundle.bundle import Bundle
from adavit.bundle.operating_points import Budgets
from adavit.export.single_options import SingleFileOptions
from adavit.version import __version__

__all__ = ["OPSET", "describe", "metadata_of"]

OPSET = 20
FORMAT_VERSION = 1


def describe(bundle: Bundle, options: SingleFileOptions, budgets: Budgets | None) -> dict[str, Any]:
    """The description of a single file; `budgets` are its operating points, where it takes a budget."""
    arch = bundle.architecture
    inputs = {"images": _value("float32", "B", 3, arch.image_size, arch.image_size)}
    outputs = {"logits": _value("float32", "B", arch.classes)}
    budget: dict[str, Any] = {"input": False, "baked": options.budget}
    if budgets:
        inputs["budget"] = _value("float32", "B")
        ends = budgets.points[0].budget, budgets.points[-1].budget
        budget = {"input": True, "least": ends[0], "most": ends[1], "trained": budgets.trained.budget}
    if options.with_policy:
        for kind, size in (("tokens", arch.tokens), ("heads", arch.heads), ("sublayers", 2)):
            outputs[kind] = _value("bool", "B", arch.depth, size)
        outputs["macs"] = _value("int64", "B")
    return {
        "format": "adavit.single_file",
        "format_version": FORMAT_VERSION,
        "name": bundle.name,
        "labels": list(bundle.labels),
        "preprocessing": bundle.preprocessor.to_dict(),
        "architecture": arch.to_dict(),
        "macs": dict(bundle.config["macs"]),
        "precision": options.precision,
        "weights": "int8" if options.precision == "int8" else options.weights or "fp32",
        "domain": options.domain,
        "opset": OPSET,
        "inputs": inputs,
        "outputs": outputs,
        "budget": budget,
        "checkpoint": dict(bundle.config.get("checkpoint", {})),
        "made_by": {**bundle.config.get("made_by", {}), "adavit": __version__},
    }


def metadata_of(description: Mapping[str, Any]) -> dict[str, str]:
    """The description as texts by name: JSON, but for what is text anyway."""
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in description.items()}


def _value(dtype: str, *shape: int | str) -> dict[str, Any]:
    return {"type": dtype, "shape": list(shape)}
