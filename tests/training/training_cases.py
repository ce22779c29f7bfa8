import struct
from pathlib import Path

import numpy as np

from adavit.architecture import Architecture

CLASSES, SIDE = 4, 8


def tiny(**changes: object) -> Architecture:
    values = dict(
        stem="patch", image_size=SIDE, patch_size=2, width=16, depth=3, heads=4, hidden=32, classes=CLASSES, keep=1,
        qkv_bias=True, token_policy=True, head_policy=True, sublayer_policy=True,
    )  # fmt: skip
    return Architecture(**{**values, **changes})  # type: ignore[arg-type]


def idx_bytes(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_idx_set(folder: Path, train: int = 96, test: int = 32) -> Path:
    """Images whose class is the quadrant that is bright, so that there is something to learn."""
    folder.mkdir(exist_ok=True)
    generator = np.random.default_rng(0)
    for part, count in (("train", train), ("t10k", test)):
        labels = np.arange(count, dtype=np.uint8) % CLASSES
        images = generator.integers(0, 60, (count, SIDE, SIDE), dtype=np.uint8)
        half = SIDE // 2
        for image, label in zip(images, labels, strict=True):
            image[label // 2 * half :, label % 2 * half :][:half, :half] += 150
        (folder / f"{part}-images-idx3-ubyte").write_bytes(idx_bytes(images))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx_bytes(labels))
    return folder
