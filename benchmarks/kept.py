"""Draws what the demo keeps of its own photographs: the ones that cost least, and the ones that cost most.

    python benchmarks/kept.py --output docs/kept.png

Only images that it classifies correctly count, one a class. It needs the extra cpu.
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np

import adavit
from adavit.bundle.demo import demo_bundle
from adavit.datasets.image_files import find_images


def chosen(macs: np.ndarray, classes: list[int], right: np.ndarray, count: int) -> np.ndarray:
    """Images with the fewest and the most MACs, half of each, by rising MACs.

    Args:
        macs: of each image.
        classes: of each image.
        right: whether each was classified correctly.
        count: how many to choose.
    """
    order = [int(image) for image in np.argsort(macs, kind="stable") if right[image]]
    low, high = list[int](), list[int]()
    for least, most in zip(order, reversed(order), strict=True):
        for found, image in ((low, least), (high, most)):
            if len(low) + len(high) < count and classes[image] not in {classes[i] for i in low + high}:
                found.append(image)
    return np.array(low + high[::-1])


@click.command(help=__doc__)
@click.option("--output", type=click.Path(path_type=Path), required=True, help="The picture.")
@click.option("--images", "count", type=click.IntRange(1, 10), default=6, show_default=True, help="How many.")
@click.option("--budget", type=float, help="Share of the dense MACs.  [default: as trained]")
def main(output: Path, count: int, budget: float | None) -> None:
    runtime = adavit.load(demo_bundle())
    files = find_images([demo_bundle().parent / "images"], runtime.labels)
    classes = [file.label for file in files if file.label is not None]
    images = np.stack([runtime.preprocess(file.path) for file in files])
    result = runtime.run(images, budget=budget)
    some = chosen(result.macs, classes, result.logits.argmax(1) == classes, count)
    adavit.draw(result[some], images[some], runtime.labels).save(output, optimize=True)


if __name__ == "__main__":
    main()
