"""Reads AdaViT checkpoints and refuses, by name, everything that would leave a hole in the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adavit.bundle.tensors import DERIVED
from adavit.errors import CheckpointError, shown
from adavit.model.adavit import AdaViT
from adavit.model.checkpoint_file import is_safetensors, noted_arguments, opened, read_pickle
from adavit.model.foreign import refuse_foreign, refuse_lacking
from adavit.model.infer import infer_architecture
from adavit.model.names import find_weights, own_names
from adavit.reading import path_of

State = dict[str, Tensor]

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Types of weights; those of fewer bits mean nothing without their scales."""
SHOWN = 8


class Weights(NamedTuple):
    """What a file holds.

    Attributes:
        state: the weights by released name, float32.
        prefix: what was before all of their names in the file.
        heads: attention heads per block, where the file notes them.
    """

    state: State
    prefix: str
    heads: int | None


def load_checkpoint(path: str | Path, heads: int | None = None) -> AdaViT:
    """Loads a trained AdaViT, its architecture inferred from the shapes.

    Reads training checkpoints, bare state dicts and safetensors, told apart by their content; EMA weights first. The
    fp32 weights of a bundle are such a file too; the tensors that its stem adds are passed over.
    What DataParallel, torch.compile and FSDP put into names, and a prefix that all names share, is taken off. Never
    unpickles anything but tensors, plain containers and `argparse.Namespace`.

    Args:
        path: the file.
        heads: attention heads per block; needed only where nothing in the file tells it, that is without a
            head policy, a `num_heads` entry or a width that is a multiple of 64.

    Returns:
        The model in eval mode, float32, on the CPU.

    Raises:
        CheckpointError: the file cannot be read, or keys are missing, unexpected, mis-shaped or not finite.
        InputError: `path` is no path.
    """
    path = path_of(path, "checkpoint")
    state, prefix, noted = read_weights(path)
    try:
        refuse_lacking(state)
        arch = infer_architecture(state, heads if heads is not None else noted)
        with torch.device("meta"):
            model = AdaViT(arch)
        lint(state, model)
    except CheckpointError as error:
        under = f"under {shown(prefix)}: " if prefix else ""
        raise CheckpointError(f"{path}: {under}{error}") from None
    if noted not in (None, arch.heads):
        raise CheckpointError(f"{path}: {arch.heads} heads asked for, but it notes {shown(noted)}")
    model.load_state_dict(state, assign=True)
    return model.float().eval()


def read_weights(path: Path) -> Weights:
    """The file's weights.

    Raises:
        CheckpointError: it cannot be read, or holds no weights that can be used; the message names the path.
    """
    noted: Any
    content: Any
    if is_safetensors(path):
        with opened(path) as file:
            names = [name for name in file.keys() if not name.startswith(DERIVED)]  # noqa: SIM118 - not a dict
            content = {name: file.get_tensor(name) for name in names}
            noted = (file.metadata() or {}).get("num_heads", "")
        noted = int(noted) if noted.isdecimal() and len(noted) < 6 else None
    else:
        content = read_pickle(path)
        noted = noted_arguments(content).get("num_heads")
    try:
        return Weights(*normalise_state(content), noted if type(noted) is int else None)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def normalise_state(content: Any) -> tuple[State, str]:
    """The weights in a checkpoint by released name, fused `qkv` rows split into query, key and value, in float32.

    Returns:
        Them, and the prefix that all of their names had.

    Raises:
        CheckpointError: it holds something else than weights.
    """
    if not isinstance(content, dict):
        raise CheckpointError(f"holds a {type(content).__name__}, not weights; save a state dict")
    held = find_weights(content)
    names, prefix = own_names(held)
    refuse_foreign(prefix + name for _, name in names)
    result: State = {}
    for key, name in names:
        value = held[key]
        _check_weight(key, value)
        parts = {name: value}
        if ".attn.qkv." in name and value.ndim and value.shape[0] % 3 == 0:
            fused = [name.replace(".qkv.", f".{part}.") for part in ("query", "key", "value")]
            parts = dict(zip(fused, value.chunk(3), strict=True))
        for part, tensor in parts.items():
            if part in result:
                raise CheckpointError(f"{part} is there twice; keep one of the two")
            result[part] = tensor.detach().to(torch.float32).contiguous()
    if not result:
        raise CheckpointError("holds no weights; save model.state_dict()")
    return result, prefix


def _check_weight(key: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise CheckpointError(f"{shown(key)} is a {type(value).__name__}, not a tensor; save model.state_dict()")
    if value.is_nested:
        raise CheckpointError(f"{key} is a nested tensor; save model.state_dict() with a plain one")
    if value.dtype not in FLOATS or value.layout != torch.strided:
        raise CheckpointError(f"{key} is {value.dtype}; export needs floating-point weights of 16 to 64 bits")
    if value.is_meta or value.untyped_storage().nbytes() < value.numel() * value.element_size():
        raise CheckpointError(f"{key} has no weights of its own; save model.state_dict()")


def lint(state: State, model: AdaViT) -> None:
    """Raises a CheckpointError that names every missing, unexpected, mis-shaped or non-finite key."""
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    found = {key: tuple(value.shape) for key, value in state.items()}
    faults = []
    if missing := sorted(expected.keys() - found.keys()):
        faults.append(f"missing {_listed(missing)}")
    if unexpected := sorted(found.keys() - expected.keys()):
        faults.append(f"unexpected {_listed(unexpected)}")
    if wrong := [
        f"{key} {list(found[key])} instead of {list(expected[key])}"
        for key in sorted(expected.keys() & found.keys())
        if expected[key] != found[key]
    ]:
        faults.append(f"mis-shaped {_listed(wrong)}")
    if broken := sorted(key for key, value in state.items() if not torch.isfinite(value).all()):
        faults.append(f"NaN or infinite values in {_listed(broken)}")
    if faults:
        raise CheckpointError(f"not a complete AdaViT or ViT: {'; '.join(faults)}")


def _listed(names: list[str]) -> str:
    first = ", ".join(names[:SHOWN])
    return first if len(names) <= SHOWN else f"{first} and {len(names) - SHOWN} more"
