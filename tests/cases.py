"""Builders that the tests share: small models, the oracle, bundles, images."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from click.testing import CliRunner, Result
from PIL import Image

import adavit
from adavit.architecture import TOKEN_THRESHOLD, Architecture
from adavit.bundle.graph_keys import graph_keys, read_graph
from adavit.bundle.tensors import TensorFile
from adavit.export import ExportOptions, export_bundle
from adavit.files import sha256
from adavit.model import AdaViT, save_safetensors
from adavit.model.policy import BlockPolicy
from adavit.runtime import Policy

GOLDEN = Path(__file__).parent / "golden"
GOLDEN_FILES = {
    "deit_small": "deit_small.safetensors",
    "deit_sparse": "deit_sparse.pth",
    "t2t_small": "t2t_small.safetensors",
}

KEEP_ALL, DROP_ALL = 50.0, -50.0
"""Decision biases that no weight of these models outweighs."""


def quiet(*_: object) -> None:
    """Progress that nobody sees."""


def tiny(**changes: Any) -> Architecture:
    """An architecture with every policy, small enough to export in a blink."""
    values: dict[str, Any] = dict(
        stem="patch", image_size=32, patch_size=8, width=48, depth=3, heads=3, hidden=80, classes=5, keep=1,
        qkv_bias=True, token_policy=True, head_policy=True, sublayer_policy=True,
    )  # fmt: skip
    return Architecture(**{**values, **changes})


DENSE = tiny(width=64, heads=1, token_policy=False, head_policy=False, sublayer_policy=False)
"""A plain ViT: it has no policies."""

WIDE = tiny(image_size=48, patch_size=4, width=96, heads=6)
"""Tokens enough that every engine of a block has counts at which it is the faster one."""


def random_model(arch: Architecture, seed: int = 0, **biases: float) -> AdaViT:
    """A model of random weights whose decisions differ between images, blocks, tokens and heads.

    Args:
        arch: its shapes.
        seed: of the weights.
        biases: `tokens`, `heads`, `sublayers`: what to add to the biases of that kind of decision.
    """
    generator = torch.Generator().manual_seed(seed)
    model = AdaViT(arch).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if name.endswith(("norm.weight", "norm1.weight", "norm2.weight")):
                value.copy_(1 + 0.2 * noise)
            elif "_select" in name:
                value.copy_(noise * (1.5 / math.sqrt(arch.width) if value.ndim == 2 else 0.3))
            elif name.endswith("bias"):
                value.copy_(0.2 * noise)
            elif name.endswith(("cls_token", "pos_embed")):
                value.copy_(noise)
            elif not name.endswith(".w"):  # the performer's own orthogonal features stay
                value.copy_(noise / math.sqrt(value[0].numel()))
        for block in model.blocks:
            for kind, part in (("tokens", block.attn), ("heads", block), ("sublayers", block)):
                select = getattr(part, {"tokens": "token_select", "heads": "head_select"}.get(kind, "layer_select"), 0)
                if select:
                    select.mlp_head.bias += biases.get(kind, 0.0)
    return model


def random_images(arch: Architecture, count: int, seed: int = 1) -> np.ndarray:
    """Normalised pixels, float32 [B, 3, S, S]."""
    shape = (count, 3, arch.image_size, arch.image_size)
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


@torch.no_grad()
def oracle(model: AdaViT, images: np.ndarray) -> tuple[np.ndarray, Policy, np.ndarray]:
    """The masked model: logits, its policy, and each image's smallest distance of a decision from its threshold."""
    output = model(torch.from_numpy(images))
    margin = np.full(len(images), np.inf)
    token_logit = math.log(TOKEN_THRESHOLD / (1 - TOKEN_THRESHOLD))
    for block in output.decisions:
        for logits, threshold in ((block.tokens, token_logit), (block.heads, 0.0), (block.sublayers, 0.0)):
            if logits is not None:
                margin = np.minimum(margin, (logits - threshold).abs().amin(1).numpy())
    return output.logits.numpy(), Policy(*(mask.numpy() for mask in output.stacked(model.arch))), margin


@torch.no_grad()
def forced(model: AdaViT, images: np.ndarray, policy: Policy) -> np.ndarray:
    """The masked model's logits under a given policy, whatever its own decisions."""
    x = model.embed(torch.from_numpy(images))
    masks = [torch.from_numpy(mask.astype(np.float32)) for mask in (policy.tokens, policy.heads, policy.sublayers)]
    for index, block in enumerate(model.blocks):
        under = BlockPolicy(*(mask[:, index] for mask in masks))
        x = block.mlp_step(block.attention_step(x, block.norm1(x), under), under)
    return model.classify(x).numpy()


def random_policy(arch: Architecture, batch: int, seed: int) -> Policy:
    """Any policy the model could have decided on, from empty to full head sets, and class tokens alone."""
    source = np.random.default_rng(seed)

    def mask(size: int) -> np.ndarray:
        share = source.choice([0.0, 0.3, 0.7, 1.0], (batch, arch.depth, 1))
        return source.random((batch, arch.depth, size)) < share

    tokens, heads, sublayers = mask(arch.tokens), mask(arch.heads), mask(2)
    tokens[..., 0] = True
    if not arch.token_policy:
        tokens[:] = True
    heads[:, : arch.keep if arch.head_policy else arch.depth] = True
    sublayers[:, : arch.keep if arch.sublayer_policy else arch.depth] = True
    return Policy(tokens, heads, sublayers)


def assert_same_policy(found: Policy, wanted: Policy) -> None:
    for kind in ("tokens", "heads", "sublayers"):
        np.testing.assert_array_equal(getattr(found, kind), getattr(wanted, kind), err_msg=kind)


def golden(name: str) -> tuple[np.ndarray, np.ndarray, Policy]:
    """Recorded images, logits and policy."""
    data = dict(np.load(GOLDEN / f"{name}.npz"))
    images = data["images"] if "images" in data else golden("deit_small")[0]
    keep = data["token_select"].shape[1] - data["head_select"].shape[1]
    leading = ((0, 0), (keep, 0), (0, 0))
    heads, sublayers = (np.pad(data[f"{kind}_select"], leading, constant_values=1) > 0 for kind in ("head", "layer"))
    return images, data["logits"], Policy(data["token_select"] > 0, heads, sublayers)


def save(model: AdaViT, path: Path) -> Path:
    """Writes a model's weights."""
    save_safetensors(model, path)
    return path


def export(source: Path | AdaViT, folder: Path, **options: Any) -> Path:
    """Exports a checkpoint, or a model, into `folder` and returns the bundle."""
    if isinstance(source, AdaViT):
        source = save(source, folder / "model.safetensors")
    bundle = folder / "bundle"
    export_bundle(source, bundle, ExportOptions(threads=1, **options), quiet)
    return bundle


def read_config(bundle: Path) -> dict[str, Any]:
    return json.loads((bundle / "config.json").read_text())


def write_config(bundle: Path, config: Any) -> None:
    (bundle / "config.json").write_text(json.dumps(config))


def stored_files(bundle: Path, precision: str = "fp32") -> dict[str, str]:
    """The files of a precision's graphs and weights by name: "weights", "stem", "blocks.0.both", "batch.0", "dense"."""
    graphs = read_config(bundle)["precisions"][precision]
    found = {name: graphs[name]["file"] for name in ("weights", "stem", "dense") if name in graphs}
    for number, block in enumerate(graphs.get("blocks", [])):
        found |= {f"blocks.{number}.{kind}": entry["file"] for kind, entry in block.items()}
    batch = [entry["file"] for entry in graphs.get("batch", [])]
    return found | dict(zip(["batch.stem", *(f"batch.{number}" for number in range(len(batch)))], batch, strict=False))


def read_whole(bundle: Path) -> None:
    """Loads a bundle, runs its dense twin, and reads the graphs that devices run."""
    runtime = adavit.load(bundle, threads=1)
    runtime.run_dense(random_images(runtime.architecture, 1))
    for key in graph_keys(runtime.graphs.files):
        read_graph(runtime.graphs, key)


def rewrite_stored(bundle: Path, file: str, data: bytes) -> None:
    """Replaces a graph or weights together with their size and hash, so that only verification can tell."""
    config, found = read_config(bundle), 0
    (bundle / file).write_bytes(data)
    for graphs in config["precisions"].values():
        entries = [graphs[name] for name in ("weights", "stem", "dense") if name in graphs]
        entries += [entry for block in graphs.get("blocks", []) for entry in block.values()]
        for entry in [*entries, *graphs.get("batch", [])]:
            if entry["file"] == file:
                entry.update(bytes=len(data), sha256=sha256(data))
                found += 1
    assert found == 1
    write_config(bundle, config)


def with_weights(bundle: Path, tensor: str, value: float, precision: str = "fp32") -> None:
    """Puts a value into a bundle's weights, as the first of a tensor, or of each with this in its name."""

    def put(array: np.ndarray) -> np.ndarray:
        return np.concatenate([[np.asarray(value, array.dtype)], array.reshape(-1)[1:]])

    stored = bundle / stored_files(bundle, precision)["weights"]
    exact = tensor in TensorFile.parse(stored.read_bytes(), stored.name).tensors
    edit_weights(bundle, lambda name: name == tensor if exact else tensor in name, put, precision)


def edit_weights(
    bundle: Path, which: Callable[[str], bool], change: Callable[[np.ndarray], np.ndarray], precision: str = "fp32"
) -> None:
    """Changes the values of chosen tensors of floats, in place, described as if exported so."""
    file = stored_files(bundle, precision)["weights"]
    data = bytearray((bundle / file).read_bytes())
    parsed, found = TensorFile.parse(bytes(data), file), 0
    for name, place in parsed.tensors.items():
        if which(name) and place.dtype.startswith("float"):
            changed = change(parsed.array(name)).astype(place.dtype)
            data[place.offset : place.offset + place.bytes] = changed.tobytes()
            found += 1
    assert found
    rewrite_stored(bundle, file, bytes(data))


def rewrite_text(bundle: Path, name: str, data: bytes) -> None:
    """Replaces `labels.txt` or the preprocessing together with its size and hash."""
    config = read_config(bundle)
    (bundle / name).write_bytes(data)
    config["files"][name] = {"bytes": len(data), "sha256": sha256(data)}
    write_config(bundle, config)


def picture(seed: int = 0, size: tuple[int, int] = (40, 50)) -> Image.Image:
    """A smooth colourful picture."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def pictures_in(folder: Path, count: int) -> Path:
    """The folder, with so many pictures in it."""
    for seed in range(count):
        picture(seed).save(folder / f"{seed:02d}.png")
    return folder


def python(code: str, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs a script in an interpreter of its own."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


def invoke(command: click.Command, *arguments: object) -> Result:
    """Runs a command in this process."""
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def refusal(result: Result, code: int = 1) -> str:
    """The one line on stderr that a command ended with."""
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1, result.stderr
    return result.stderr


def shell(name: str, *arguments: object, before: str = "") -> subprocess.CompletedProcess[str]:
    """Runs `adavit-export` or `adavit-run` in a process of its own, after some lines of Python."""
    function = name.removeprefix("adavit-")
    return python(f"{before}\nfrom adavit.cli import {function}\n{function}(prog_name={name!r})", *arguments)
