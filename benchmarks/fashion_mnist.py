"""Pictures of Fashion-MNIST, as Debian's package dataset-fashion-mnist has them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from adavit.training.idx import read_idx

DATA = Path("/usr/share/datasets/fashion-mnist")


def pictures(data: Path, part: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """A random part of a set, uint8 [n, 28, 28], and its labels."""
    images, labels = (read_idx(data / f"{part}-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1"))
    chosen = np.random.default_rng(0).permutation(len(images))[:count]
    return images[chosen], labels[chosen].astype(int)


def write_pictures(data: Path, part: str, count: int, names: Sequence[str], folder: Path) -> Path:
    """Writes such a part as a folder of class-named folders."""
    for position, (image, label) in enumerate(zip(*pictures(data, part, count), strict=True)):
        path = folder / names[label] / f"{position}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return folder
