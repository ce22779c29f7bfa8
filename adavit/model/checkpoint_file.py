"""Opens checkpoint files, pickles and safetensors, and writes safetensors; no code of a file is ever run."""

from __future__ import annotations

import argparse
import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from adavit.errors import CheckpointError, one_line
from adavit.files import write_beside
from adavit.model.adavit import AdaViT
from adavit.reading import open_regular

LENGTH = 8
"""Bytes at the start of a safetensors file: the length of the header that follows, little-endian."""
WANTED = "give the path of a trained AdaViT (.pth or .safetensors)"
MAX_HEADER = 100_000_000
"""Bytes of a header that the safetensors library reads at most."""


def load_safely(path: Path) -> Any:
    """What `torch.save` wrote, where it is tensors, plain containers and `argparse.Namespace`; torch's errors."""
    with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings(), open_regular(path) as file:
        warnings.simplefilter("ignore")  # torch's remarks on files that are about to be refused
        return torch.load(file, map_location="cpu", weights_only=True)


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


def read_pickle(path: Path) -> Any:
    """What a file holds that `torch.save` wrote; raises CheckpointError where it is not to be trusted, or damaged."""
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
    with opened(path) as file:
        return dict(file.metadata() or {})


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """An open safetensors file; raises CheckpointError where it is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: a damaged safetensors file ({one_line(error)}); copy it again") from None


def noted_arguments(content: Any) -> dict[str, Any]:
    """The options that a training checkpoint notes; none where there are none."""
    noted = content.get("args") if isinstance(content, dict) else None
    return vars(noted) if isinstance(noted, argparse.Namespace) else {}


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
