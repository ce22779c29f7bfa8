"""Writes a bundle folder: engines, their description, preprocessing, labels and a model card."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import onnx

from adavit.architecture import Architecture
from adavit.export.graph import TYPES
from adavit.files import sha256
from adavit.macs import dense_macs, outside_macs
from adavit.runtime.bundle import LABELS, PREPROCESSING, SCHEMA_VERSION, write_config
from adavit.runtime.images import Preprocessor
from adavit.version import __version__

__all__ = ["write_bundle"]

_TYPE_NAMES: dict[int, str] = {number: name for name, number in TYPES.items()}
_PACKAGES = ("torch", "onnx", "numpy")
_ADAPTIVE = (
    "image-classification, vision-transformer, adaptive-computation, onnx",
    "An adaptive vision transformer ([AdaViT](https://arxiv.org/abs/2111.15668)) as engines that are dispatched per\n"
    "image: what its policies drop is not computed.",
    "measures it against its dense twin",
)
_DENSE = (
    "image-classification, vision-transformer, onnx",
    "A vision transformer as one ONNX graph. It has no policies, and computes everything for every image.",
    "measures it",
)
"""Tags of the model card, what it says the model is, and what the command does."""


def write_bundle(
    folder: Path,
    engines: Iterator[tuple[str, onnx.ModelProto]],
    count: int,
    arch: Architecture,
    labels: Sequence[str],
    preprocessor: Preprocessor,
    about: dict[str, Any],
    progress: Callable[[str, float], None],
    precisions: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Writes every file of a bundle into an empty `folder` and returns `config.json`'s content.

    Args:
        folder: where to write.
        engines: (name, model) pairs, made one at a time so that memory stays bounded.
        count: how many there are, for progress.
        arch: the model's shapes.
        labels: one per class.
        preprocessor: what images go through.
        about: name, opset, checkpoint and precision of the export, put into `config.json`.
        progress: told the stage and the share done.
        precisions: of engines that are not fp32.
    """
    (folder / "onnx").mkdir()
    described = {}
    for done, (name, model) in enumerate(engines, 1):
        described[name] = _write_engine(folder, name, model)
        described[name]["precision"] = (precisions or {}).get(name, "fp32")
        progress(f"exporting {name}", done / count)
    texts = {
        LABELS: "".join(f"{label}\n" for label in labels).encode(),
        PREPROCESSING: (json.dumps(preprocessor.to_dict(), indent=2) + "\n").encode(),
    }
    for name, data in texts.items():
        (folder / name).write_bytes(data)
    config = {
        "schema_version": SCHEMA_VERSION,
        **about,
        "architecture": arch.to_dict(),
        "macs": {"dense": dense_macs(arch), "outside_blocks": outside_macs(arch)},
        "engines": described,
        "files": {name: {"bytes": len(data), "sha256": sha256(data)} for name, data in texts.items()},
        "made_by": {
            "adavit": __version__,
            "python": platform.python_version(),
            **{package: metadata.version(package) for package in _PACKAGES},
        },
    }
    write_config(folder, config)
    (folder / "README.md").write_text(_card(config, labels), encoding="utf-8")
    return config


def _write_engine(folder: Path, name: str, model: onnx.ModelProto) -> dict[str, Any]:
    data = model.SerializeToString()
    file = f"onnx/{name}.onnx"
    (folder / file).write_bytes(data)
    return {
        "file": file,
        "inputs": [_tensor(value) for value in model.graph.input],
        "outputs": [_tensor(value) for value in model.graph.output],
        "bytes": len(data),
        "sha256": sha256(data),
    }


def _tensor(value: onnx.ValueInfoProto) -> dict[str, Any]:
    kind = value.type.tensor_type
    shape = [dim.dim_param or dim.dim_value for dim in kind.shape.dim]
    return {"name": value.name, "dtype": _TYPE_NAMES[kind.elem_type], "shape": shape}


def _card(config: dict[str, Any], labels: Sequence[str]) -> str:
    arch = config["architecture"]
    size = sum(engine["bytes"] for engine in config["engines"].values())
    policies = [kind for kind in ("token", "head", "sublayer") if arch[f"{kind}_policy"]]
    tags, model, measures = _ADAPTIVE if policies else _DENSE
    return f"""---
library_name: adavit
tags: [{tags}]
---
# {config["name"]}

{model} Exported by adavit {config["made_by"]["adavit"]} from
`{config["checkpoint"]["file"]}` (SHA-256 `{config["checkpoint"]["sha256"]}`).

| | |
| --- | --- |
| stem | {arch["stem"]}, {arch["image_size"]} x {arch["image_size"]} pixels |
| blocks | {arch["depth"]} of width {arch["width"]}, {arch["heads"]} heads, hidden width {arch["hidden"]} |
| policies | {", ".join(policies) or "none"} |
| classes | {len(labels)} |
| dense cost | {config["macs"]["dense"] / 1e9:.3f} GMACs |
| engines | {len(config["engines"])}, {size / 1e6:.1f} MB, {config["precision"]}, opset {config["opset"]} |

```python
import adavit

runtime = adavit.load("this/folder")
print(runtime.predict(["image.jpg"], top=5))
```

`adavit-run this/folder --images photos/` {measures}.
"""
