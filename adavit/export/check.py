"""Checking a bundle against the checkpoint that it was made of."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from adavit.bundle.bundle import Bundle
from adavit.errors import InputError, VerificationError
from adavit.export.sources import checkpoint_file
from adavit.export.verify import verify
from adavit.model import load_checkpoint, resize
from adavit.runtime.loading import load

__all__ = ["check_bundle"]

Progress = Callable[[str, float], None]


def check_bundle(
    bundle: Path, checkpoint: Path, heads: int | None, threads: int | None, progress: Progress
) -> dict[str, Any]:
    """Verifies an existing bundle against a checkpoint; raises VerificationError where they differ."""
    start = time.perf_counter()
    progress("loading the bundle", 0.0)
    precisions = Bundle.open(bundle).graphs
    if "fp32" not in precisions:
        raise InputError(f"{bundle} is {', '.join(precisions)}: compare it with fp32 by adavit-run --compare")
    runtime = load(bundle, threads=threads, precision="fp32", specialise=False)
    progress("loading the checkpoint", 0.0)
    model = resize(load_checkpoint(checkpoint_file(checkpoint), heads), runtime.architecture.image_size)
    if model.arch != runtime.architecture:
        ours, theirs = runtime.architecture.to_dict(), model.arch.to_dict()
        differing = ", ".join(f"{key} {ours[key]} and {theirs[key]}" for key in ours if ours[key] != theirs[key])
        raise VerificationError(f"{bundle} and {checkpoint} are of different architectures: {differing}")
    verified = verify(model, runtime, progress)
    return {"bundle": str(bundle), "verified": verified, "seconds": time.perf_counter() - start}
