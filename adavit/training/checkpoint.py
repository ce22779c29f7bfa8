"""Training checkpoints in the released layout, written so that a kill at any moment leaves a whole one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from adavit.files import write_beside
from adavit.model.checkpoint_file import load_safely
from adavit.training.errors import TrainingError

__all__ = ["VERSION", "read_checkpoint", "write_checkpoint"]

VERSION = 2
KEYS = ("state_dict", "state_dict_ema", "optimizer", "step", "metric", "args")


def write_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Writes a training checkpoint beside and renames it; `adavit.model.load_checkpoint` reads its weights.

    Raises:
        TrainingError: the disk is full or the folder cannot be written.
    """
    try:
        with write_beside(path) as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        raise TrainingError(f"{path}: cannot be written ({error}); free some space or choose another folder") from None


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Reads what `write_checkpoint` wrote; nothing but tensors, containers and a Namespace is unpickled.

    Raises:
        TrainingError: it is not such a file.
    """
    try:
        content = load_safely(path)
    except MemoryError:
        raise
    except Exception as error:
        raise TrainingError(f"{path}: not a training checkpoint ({type(error).__name__}); start anew") from None
    found: dict[str, Any] = content if isinstance(content, dict) else {}
    if missing := [key for key in KEYS if key not in found]:
        raise TrainingError(f"{path}: no run to resume in it (missing {', '.join(missing)}); start with --from instead")
    return found
