"""Records the policies that gpu_model.py reads: python benchmarks/gpu_policies.py

Of each model and profile of models.py, on random images. Takes some minutes.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from pathlib import Path

import numpy as np
from models import ARCHITECTURES, BIASES, random_model

import adavit
from adavit.architecture import Architecture
from adavit.bundle.policy import Policy
from adavit.datasets.random_images import random_images

STORED = Path(__file__).parent / "gpu_policies.npz"
BATCH = 16


def packed(policy: Policy) -> np.ndarray:
    """Of each image and block, kept tokens and the bits of heads and sub-layers, uint8 [n, L, 3]."""
    bits = [np.packbits(mask, -1)[..., 0] for mask in (policy.heads, policy.sublayers)]
    return np.stack([policy.tokens.sum(2).astype(np.uint8), *bits], -1)


def unpacked(arch: Architecture, values: np.ndarray) -> Policy:
    """A policy with as many tokens, and the same heads and sub-layers."""
    heads, sublayers = (
        np.unpackbits(values[..., i : i + 1], -1, count=n).astype(bool) for i, n in ((1, arch.heads), (2, 2))
    )
    return Policy(np.arange(arch.tokens) < values[..., :1], heads, sublayers)


def recorded(model: str, profile: str, path: Path = STORED) -> Policy:
    """The policies of a model and profile."""
    with np.load(path) as arrays:
        return unpacked(ARCHITECTURES[model], arrays[f"{model}/{profile}"])


def record(model: str, profile: str, images: int, seed: int, folder: Path) -> Policy:
    """Exports a random model, and runs it."""
    import torch  # reading what is recorded needs neither

    from adavit.export import ExportOptions, export_bundle

    checkpoint, bundle = folder / f"{model}-{profile}.pth", folder / f"{model}-{profile}"
    torch.save(random_model(model, profile, seed).state_dict(), checkpoint)
    export_bundle(checkpoint, bundle, ExportOptions(with_dense=False), lambda *_: None)
    runtime = adavit.load(bundle, backend="onnxruntime", parallel="samples", specialise=False)
    pixels = np.stack(list(itertools.islice(random_images(runtime.architecture.image_size), images)))
    parts = [runtime.run(pixels[start : start + BATCH]).policy for start in range(0, images, BATCH)]
    return Policy.concatenate(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=STORED)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = {
            f"{model}/{profile}": packed(record(model, profile, arguments.images, arguments.seed, Path(folder)))
            for model, profile in BIASES
        }
    np.savez_compressed(arguments.output, **found)


if __name__ == "__main__":
    main()
