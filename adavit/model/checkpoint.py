"""Reads AdaViT checkpoints and refuses, by name, everything that would leave a hole in the model."""

from __future__ import annotations

import argparse
import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from math import nan
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adavit.bundle.tensors import DERIVED
from adavit.errors import CheckpointError, one_line, shown
from adavit.files import write_beside
from adavit.model.adavit import AdaViT
from adavit.model.foreign import refuse_foreign, refuse_lacking
from adavit.model.infer import infer_architecture
from adavit.model.names import find_weights, own_names
from adavit.reading import open_regular, path_of

State = dict[str, Tensor]

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Types of weights; those of fewer bits mean nothing without their scales."""
SHOWN = 8
LENGTH = 8
"""Bytes at the start of a safetensors file: the length of the header that follows, little-endian."""
WANTED = "give the path of a trained AdaViT (.pth or .safetensors)"
MAX_HEADER = 100_000_000
"""Bytes of a header that the safetensors library reads at most."""


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


def load_safely(path: Path) -> Any:
    """What `torch.save` wrote, where it is tensors, plain containers and `argparse.Namespace`; torch's errors."""
    with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings(), open_regular(path) as file:
        warnings.simplefilter("ignore")  # torch's remarks on files that are about to be refused
        return torch.load(file, map_location="cpu", weights_only=True)


def read_weights(path: Path) -> Weights:
    """The file's weights.

    Raises:
        CheckpointError: it cannot be read, or holds no weights that can be used; the message names the path.
    """
    noted: Any
    content: Any
    if is_safetensors(path):
        with _opened(path) as file:
            names = [name for name in file.keys() if not name.startswith(DERIVED)]  # noqa: SIM118 - not a dict
            content = {name: file.get_tensor(name) for name in names}
            noted = (file.metadata() or {}).get("num_heads", "")
        noted = int(noted) if noted.isdecimal() and len(noted) < 6 else None
    else:
        content = _read_pickle(path)
        noted = _arguments(content).get("num_heads")
    try:
        return Weights(*normalise_state(content), noted if type(noted) is int else None)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def is_safetensors(path: Path) -> bool:
    """Whether a file begins as safetensors do, whatever it is called: a header's length, then the header's brace.

    Raises:
        CheckpointError: it is no file, or cannot be read.
    """
    try:
        with open_regular(path) as file:
            start = file.read(LENGTH + 1)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; {WANTED}") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); {WANTED}") from None
    return start[LENGTH:] == b"{" and int.from_bytes(start[:LENGTH], "little") <= MAX_HEADER


def _read_pickle(path: Path) -> Any:
    try:
        return load_safely(path)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"refused, it would run {refused[1]} while loading" if refused else "not a PyTorch checkpoint to trust"
        raise CheckpointError(
            f"{path}: {reason}; where it was made, save only the weights with torch.save(model.state_dict(), ...) "
            "or as safetensors"
        ) from None
    except zipfile.BadZipFile:
        raise CheckpointError(f"{path}: a truncated PyTorch checkpoint; copy it again") from None
    except MemoryError:
        raise
    except Exception:  # of a damaged file, torch raises anything
        raise CheckpointError(
            f"{path}: not a PyTorch checkpoint, or a truncated one, and no safetensors; save it again"
        ) from None


def read_metadata(path: Path) -> dict[str, str]:
    """The notes in a safetensors file; empty for other files."""
    if not is_safetensors(path):
        return {}
    with _opened(path) as file:
        return dict(file.metadata() or {})


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
        arguments = _arguments(_read_pickle(path))
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


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: a damaged safetensors file ({one_line(error)}); copy it again") from None


def _arguments(content: Any) -> dict[str, Any]:
    """The options that a training checkpoint notes; none where there are none."""
    noted = content.get("args") if isinstance(content, dict) else None
    return vars(noted) if isinstance(noted, argparse.Namespace) else {}


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


def save_safetensors(model: AdaViT, path: str | Path, metadata: dict[str, Any] | None = None) -> None:
    """Writes the weights for release, beside first, then renamed; `load_checkpoint` reads them back.

    The same weights and notes make the same bytes.
    """
    from safetensors.torch import save

    notes = {key: value if isinstance(value, str) else json.dumps(value) for key, value in (metadata or {}).items()}
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    data = save(state, {"format": "pt", "num_heads": str(model.arch.heads), **notes})
    with write_beside(Path(path)) as file:
        file.write(sort_header(data))


def sort_header(data: bytes) -> bytes:
    """A safetensors file with its header sorted by key, since the library puts notes in an order of chance."""
    end = LENGTH + int.from_bytes(data[:LENGTH], "little")
    header = json.dumps(json.loads(data[LENGTH:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % LENGTH)  # tensors stay aligned
    return len(header).to_bytes(LENGTH, "little") + header + data[end:]
