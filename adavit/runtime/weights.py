"""The weights of a bundle's blocks, for backends that lay them out in their own way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from adavit.architecture import Architecture
from adavit.errors import BundleError
from adavit.runtime.bundle import Bundle
from adavit.runtime.onnx_file import weights_of
from adavit.runtime.plan import HeadSet

__all__ = ["attention_weights", "block_weights", "check_deciding", "engine_weights", "mlp_weights", "set_weights"]

Float = npt.NDArray[np.float32]

DECIDING = ("norm1.", "token_select.", "choices.")
"""Parts of the names of weights that decisions are made with."""
MOST_DECIDING = 1e15
"""The largest of these."""


def block_weights(bundle: Bundle, block: int, engine: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Float]:
    """Weights of a block by name, from one of its engines; as `engine_weights`."""
    return engine_weights(bundle, f"blocks.{block}.{engine}", f"blocks.{block}.", shapes)


def engine_weights(bundle: Bundle, source: str, prefix: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Float]:
    """Weights of an engine by name, with or without a prefix there; linear layers as [in, out].

    Raises:
        BundleError: the engine's file is not what was exported, or lacks one, or has it in another shape.
    """
    try:
        stored, found = weights_of(bundle.read(source)), {}
    except BundleError as error:
        raise BundleError(f"{bundle.path}: engine {source}: {error}") from None
    for name, shape in shapes.items():
        value = stored.get(prefix + name, stored.get(name))
        if value is None:
            raise BundleError(f"{bundle.path}: engine {source} has no weights {name}; export again")
        if value.shape != shape:
            raise BundleError(
                f"{bundle.path}: engine {source} has weights {name} of {list(value.shape)}, not of {list(shape)}; "
                "export again"
            )
        found[name] = value
    return found


def check_deciding(bundle: Bundle, engine: str) -> None:
    """Checks the weights that an engine decides with, where it compares the logits itself: NaN would keep nothing.

    Tokens are checked to be below 1e17; times weights of 1e15, a logit is far from what float32 holds.

    Raises:
        BundleError: some are not finite or beyond 1e15, or the engine's file is not what was exported.
    """
    for name, value in weights_of(bundle.read(engine)).items():
        decides = any(part in name for part in DECIDING)
        if decides and not -MOST_DECIDING <= value.min() <= value.max() <= MOST_DECIDING:  # NaN is both, where it is
            raise BundleError(
                f"{bundle.path}: engine {engine} has weights {name} that are NaN, infinite or beyond "
                f"{MOST_DECIDING:.0e}; export again"
            )


def attention_weights(bundle: Bundle, block: int) -> dict[str, Float]:
    """attn.query, key, value and proj of a block, .weight and .bias, the attention scale in the query's.

    A key's bias changes nothing, and is not there.

    Raises:
        BundleError: as `block_weights`.
    """
    arch = bundle.architecture
    biased = ("proj", *(("query", "value") if arch.qkv_bias else ()))
    shapes: dict[str, tuple[int, ...]] = {
        **{f"attn.{part}.weight": (arch.width, arch.width) for part in ("query", "key", "value", "proj")},
        **{f"attn.{part}.bias": (arch.width,) for part in biased},
    }
    return block_weights(bundle, block, "attention", shapes)


def mlp_weights(bundle: Bundle, block: int) -> dict[str, Float]:
    """norm2, mlp.fc1 and mlp.fc2 of a block, .weight and .bias.

    Raises:
        BundleError: as `block_weights`.
    """
    width, hidden = bundle.architecture.width, bundle.architecture.hidden
    shapes: dict[str, tuple[int, ...]] = {
        **{name: (width,) for name in ("norm2.weight", "norm2.bias", "mlp.fc2.bias")},
        **{"mlp.fc1.weight": (width, hidden), "mlp.fc1.bias": (hidden,), "mlp.fc2.weight": (hidden, width)},
    }
    return block_weights(bundle, block, "mlp", shapes)


def set_weights(
    arch: Architecture, found: HeadSet, attention: Mapping[str, Float], mlp: Mapping[str, Float]
) -> dict[str, npt.NDArray[Any]]:
    """What the engine of a set of heads takes of them, by the name of the input.

    Args:
        arch: the model's shapes.
        found: the set.
        attention: `attention_weights` of its block.
        mlp: `mlp_weights` of its block.
    """
    heads = np.array(found.heads, np.int64)
    channels = (heads[:, None] * arch.head_width + np.arange(arch.head_width)).ravel()
    taken: dict[str, npt.NDArray[Any]] = {}
    if found.kind != "mlp":
        without = np.zeros(arch.width, np.float32)
        parts = [f"attn.{part}" for part in ("query", "key", "value")]
        taken = {
            "qkv": np.concatenate([attention[f"{part}.weight"][:, channels] for part in parts], 1),
            "qkv_bias": np.concatenate([attention.get(f"{part}.bias", without)[channels] for part in parts]),
            "proj": attention["attn.proj.weight"][channels],
            "proj_bias": attention["attn.proj.bias"],
        }
    if found.kind != "attention":
        taken |= {"fc1": mlp["mlp.fc1.weight"][channels], "fc2": mlp["mlp.fc2.weight"]}
        if arch.adapts_heads(found.block):
            taken["heads"] = heads
    return taken
