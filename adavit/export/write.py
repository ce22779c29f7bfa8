"""Writes what a bundle has beside its graphs: their description, preprocessing, labels and a model card."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from adavit.architecture import Architecture
from adavit.bundle.bundle import LABELS, MODEL_TYPE, PREPROCESSING, SCHEMA_VERSION, GraphFiles, write_config
from adavit.bundle.card import CARD, front_matter
from adavit.bundle.preprocessing import Preprocessor
from adavit.files import sha256
from adavit.macs import dense_macs, outside_macs
from adavit.version import __version__

__all__ = ["describe_bundle"]

_PACKAGES = ("torch", "onnx", "numpy")
_ADAPTIVE = (
    ["image-classification", "vision-transformer", "adaptive-computation", "onnx"],
    "An adaptive vision transformer ([AdaViT](https://arxiv.org/abs/2111.15668)). For each image, its policies choose\n"
    "tokens, attention heads and sub-layers. What they drop is not computed.",
    "measures its speed, also against the dense twin, which computes everything.",
)
_DENSE = (
    ["image-classification", "vision-transformer", "onnx"],
    "A vision transformer as one ONNX graph. It has no policies, and computes everything for every image.",
    "measures its speed.",
)
"""Tags of the model card, what it says the model is, and what the command does."""


def describe_bundle(
    folder: Path,
    graphs: Sequence[GraphFiles],
    arch: Architecture,
    labels: Sequence[str],
    preprocessor: Preprocessor,
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """Writes everything but the graphs into a bundle's folder; `config.json`, which makes it a bundle, comes last.

    Args:
        folder: the bundle, with the graphs.
        graphs: of each precision, the default first.
        arch: the model's shapes.
        labels: one per class.
        preprocessor: what images go through.
        about: name, checkpoint and whatever else belongs into `config.json`, such as `card`, further metadata of the
            model card.

    Returns:
        `config.json`'s content.
    """
    texts = {
        LABELS: "".join(f"{label}\n" for label in labels).encode(),
        PREPROCESSING: (json.dumps(preprocessor.to_dict(), indent=2) + "\n").encode(),
    }
    for name, data in texts.items():
        (folder / name).write_bytes(data)
    config = {
        "schema_version": SCHEMA_VERSION,
        "model_type": MODEL_TYPE,
        **about,
        "architecture": arch.to_dict(),
        "macs": {"dense": dense_macs(arch), "outside_blocks": outside_macs(arch)},
        "id2label": {str(index): label for index, label in enumerate(labels)},
        "precisions": {files.precision: files.to_dict() for files in graphs},
        "files": {name: {"bytes": len(data), "sha256": sha256(data)} for name, data in texts.items()},
        "made_by": {
            "adavit": __version__,
            "python": platform.python_version(),
            **{package: metadata.version(package) for package in _PACKAGES},
        },
    }
    (folder / CARD).write_text(_card(config, graphs, labels), encoding="utf-8")
    write_config(folder, config)
    return config


def _card(config: dict[str, Any], graphs: Sequence[GraphFiles], labels: Sequence[str]) -> str:
    arch = config["architecture"]
    sizes = ", ".join(f"{files.precision} ({files.bytes / 1e6:.1f} MB)" for files in graphs)
    policies = [kind for kind in ("token", "head", "sublayer") if arch[f"{kind}_policy"]]
    tags, model, measures = _ADAPTIVE if policies else _DENSE
    metadata = {
        "library_name": "adavit",
        "pipeline_tag": "image-classification",
        "tags": tags,
        **config.get("card", {}),
    }
    return f"""{front_matter(metadata)}# {config["name"]}

{model}

This folder is a bundle: ONNX graphs and one safetensors file of weights for each precision. adavit
{config["made_by"]["adavit"]} exported it from `{config["checkpoint"]["file"]}`
(SHA-256 `{config["checkpoint"]["sha256"]}`).

| | |
| --- | --- |
| stem | {arch["stem"]}, {arch["image_size"]} x {arch["image_size"]} pixels |
| blocks | {arch["depth"]} of width {arch["width"]}, {arch["heads"]} heads, hidden width {arch["hidden"]} |
| policies | {", ".join(policies) or "none"} |
| classes | {len(labels)} |
| dense cost | {config["macs"]["dense"] / 1e9:.3f} GMACs |
| precisions | {sizes} |

```python
import adavit

runtime = adavit.load("this/folder")
for prediction in runtime.predict(["image.jpg"], top=5):
    print(prediction.top)
```

`adavit-run this/folder --images photos/` {measures}
"""
