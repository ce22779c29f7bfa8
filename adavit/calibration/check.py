"""What another precision changes: it runs beside the fp32 graphs that it was made from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from adavit.datasets.image_files import ImageFile, read_images
from adavit.datasets.random_images import random_images
from adavit.errors import AdaViTError, InputError, VerificationError
from adavit.measure.compare import BATCH, ObservedRuntime, Parity
from adavit.runtime.loading import load
from adavit.runtime.session import Runtime

__all__ = ["FEWEST_AGREE", "MOST_FLIPPED", "check_converted", "checked_images", "differs"]

MOST_IMAGES = 64
RANDOM_IMAGES = 16
"""Where no images are given, because the ranges come from a cache."""
MOST_FLIPPED = 0.1
"""Share of decisions; a precision that flips more decides differently."""
FEWEST_AGREE = 0.9
"""Share of images of the same class; a precision that keeps fewer decides differently."""

Float = npt.NDArray[np.float32]


def check_converted(
    runtime: Runtime, precision: str, files: Sequence[ImageFile], progress: Callable[[str, float], None]
) -> dict[str, Any]:
    """Runs a precision of a bundle beside fp32, on some of the calibration images.

    Args:
        runtime: the bundle in fp32.
        precision: another one of the same bundle.
        files: what was calibrated on; without any, random images are run.
        progress: told the stage and the share done.

    Returns:
        The numbers of `Parity`, on which images, and whether it decides differently than fp32.

    Raises:
        VerificationError: it does not load or run, or computes what is not finite.
        InputError: none of the images can be read.
    """
    try:
        source, pixels, labels = checked_images(runtime, files)
        threads = runtime.options.threads
        converted = load(runtime.bundle.path, "onnxruntime", threads, precision=precision, specialise=False)
        first, parity = ObservedRuntime(runtime), Parity(ObservedRuntime(converted))
        for start in range(0, len(pixels), BATCH):
            some = pixels[start : start + BATCH]
            parity.add(some, labels[start : start + BATCH], first.run(some))
            if converted.graphs.files.dense is not None:
                converted.run_dense(some)
            progress("checking the precision", min(1.0, (start + BATCH) / len(pixels)))
    except InputError:
        raise
    except AdaViTError as error:
        raise VerificationError(f"the bundle does not run as it should in {precision}: {error}") from None
    report = parity.report()
    return {"input": source, "differs": differs(report), **report}


def checked_images(runtime: Runtime, files: Sequence[ImageFile]) -> tuple[str, Float, list[int | None]]:
    """What to compare precisions on: some of the calibration images, or random ones where there are none.

    Returns:
        Which of the two, the pixels [B, 3, S, S] and their labels.

    Raises:
        InputError: none of the images can be read.
    """
    if files:
        return "calibration images", *read_images(files, runtime.preprocess, MOST_IMAGES)
    pixels = np.stack(list(islice(random_images(runtime.architecture.image_size), RANDOM_IMAGES)))
    return "random images", pixels, [None] * RANDOM_IMAGES


def differs(report: Mapping[str, Any]) -> bool:
    """Whether a precision decides differently than fp32, by the report of an `Agreement`."""
    free = report["free"]
    return bool(free["flipped"] > MOST_FLIPPED or free["top1_agreement"] < FEWEST_AGREE)
