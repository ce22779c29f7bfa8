"""What another precision changes: it runs beside the fp32 graphs that it was made from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

__all__ = ["FEWEST_AGREE", "MOST_FLIPPED", "check_converted"]

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
        pixels, labels = read_images(files, runtime.preprocess, MOST_IMAGES) if files else _random(runtime)
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
    free = report["free"]
    differs = free["flipped"] > MOST_FLIPPED or free["top1_agreement"] < FEWEST_AGREE
    return {"input": "calibration images" if files else "random images", "differs": differs, **report}


def _random(runtime: Runtime) -> tuple[Float, list[int | None]]:
    """Images as verification takes them, without labels."""
    return np.stack(list(islice(random_images(runtime.architecture.image_size), RANDOM_IMAGES))), [None] * RANDOM_IMAGES
