"""Proves that a single file computes what the runtime computes, and what the checkpoint computes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from adavit.bundle.operating_points import Offsets
from adavit.bundle.policy import KINDS
from adavit.datasets.random_images import random_images
from adavit.errors import VerificationError, one_line
from adavit.export.verify import DRAWS, MARGIN, nothing_proves, reference
from adavit.model import AdaViT
from adavit.results import Result
from adavit.runtime.dispatcher import Step, thresholds
from adavit.runtime.session import Runtime

__all__ = ["FileSession", "RuntimeResults", "compare_with_checkpoint", "verify_file"]

IMAGES = 5
TOLERANCE = 1e-4
"""Largest difference of logits, relative to their largest magnitude where that is above 1."""
ROUGH_TOLERANCE = 0.1
"""The same for weights in fp16 and int8, of images whose decisions are all the same."""

Float = npt.NDArray[np.float32]
Progress = Callable[[str, float], None]


class RuntimeResults:
    """What the runtime makes of random images at some budgets, each with its own policy.

    Args:
        runtime: of the bundle, in fp32.
        offsets: of each image's decision logits, one after the other.
        budgets: the same as shares of the dense MACs, 0 where the policy is the trained one.
        progress: told the stage and the share done.

    Attributes:
        images: [n, 3, S, S].
        budgets: [n].
        result: what the runtime makes of them.
    """

    def __init__(
        self, runtime: Runtime, offsets: Sequence[Offsets], budgets: Sequence[float], progress: Progress
    ) -> None:
        chosen: list[tuple[Float, Offsets, float]] = []
        wanted = max(IMAGES, len(offsets))
        for image in itertools.islice(random_images(runtime.architecture.image_size), DRAWS):
            place = len(chosen) % len(offsets)
            if _margin(runtime, image, offsets[place]) > MARGIN:
                chosen.append((image, offsets[place], budgets[place]))
                progress("running images", len(chosen) / wanted)
            if len(chosen) == wanted:
                break
        if not chosen:
            raise nothing_proves()
        self.images = np.stack([image for image, _, _ in chosen])
        self.budgets = np.array([budget for _, _, budget in chosen], np.float32)
        self.result: Result = runtime.run(self.images, budget=[own for _, own, _ in chosen])


def _margin(runtime: Runtime, image: Float, offsets: Offsets) -> float:
    """How close an image's decisions come to their thresholds."""
    if not runtime.architecture.adapts:
        return np.inf
    limits, found = thresholds(offsets, runtime.architecture), [np.inf]

    def note(step: Step) -> None:
        if step.decisions is not None and len(step.decisions):
            found.append(float(np.abs(step.decisions - limits[step.block]).min()))

    runtime.run(image[None], budget=offsets, observe=note)
    return min(found)


class FileSession:
    """A file's bytes in ONNX Runtime, with the options that a session has by default.

    Args:
        data: the bytes.
        path: the file's, for messages.

    Raises:
        VerificationError: ONNX Runtime refuses it.
    """

    def __init__(self, data: bytes, path: str) -> None:
        self._path = path
        with self._told():
            self._session = ort.InferenceSession(data, providers=["CPUExecutionProvider"])

    def run(self, images: Float, budgets: Float) -> dict[str, npt.NDArray[Any]]:
        """Its outputs for images [B, 3, S, S], and for budgets [B] where it takes these.

        Raises:
            VerificationError: ONNX Runtime refuses to run it.
        """
        with self._told():
            names = [value.name for value in self._session.get_inputs()]
            given = {name: value for name, value in (("images", images), ("budget", budgets)) if name in names}
            made = self._session.run(None, given)
            return {value.name: array for value, array in zip(self._session.get_outputs(), made, strict=True)}

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of onnxruntime's own classes, which it does not export
            raise VerificationError(f"{self._path}: ONNX Runtime does not run the file: {one_line(error)}") from None


def verify_file(found: dict[str, npt.NDArray[Any]], wanted: RuntimeResults, path: str, exact: bool) -> dict[str, Any]:
    """Compares what a file made of some images with the runtime's results.

    Args:
        found: the file's outputs.
        wanted: the runtime's results.
        path: the file's, for messages.
        exact: whether every decision has to be the same, as in fp32.

    Returns:
        How many images and decisions were compared, how many of these differ, and the largest logit difference.

    Raises:
        VerificationError: decisions differ in fp32, or logits do; the message names the first block.
    """
    policy, differing, decisions = wanted.result.policy, 0, 0
    same = np.ones(len(wanted.images), bool)
    for kind in KINDS:
        mask = getattr(policy, kind)
        if kind not in found:
            continue
        flipped = found[kind] != mask
        decisions += mask.size
        differing += int(flipped.sum())
        same &= ~flipped.any((1, 2))
        if flipped.any() and exact:
            image, block, _ = (int(places[0]) for places in np.nonzero(flipped))
            raise VerificationError(
                f"{path}: {int(flipped[image, block].sum())} of block {block}'s decisions on {kind} differ from the "
                "runtime's"
            )
    if "macs" in found and not np.array_equal(found["macs"][same], wanted.result.macs[same]):
        raise VerificationError(f"{path}: its MACs differ from the runtime's")
    worst = difference(found["logits"][same], wanted.result.logits[same], path, TOLERANCE if exact else ROUGH_TOLERANCE)
    return {
        "images": len(wanted.images),
        "decisions": decisions,
        "differing_decisions": differing,
        "max_logit_difference": worst,
    }


def compare_with_checkpoint(model: AdaViT, found: Float, wanted: RuntimeResults, path: str) -> float:
    """Compares a file's logits with those of the masked PyTorch model under the same policies."""
    policy = wanted.result.policy
    replays = [policy[number : number + 1] for number in range(len(policy))]
    logits = [reference(model, image, replay).logits for image, replay in zip(wanted.images, replays, strict=True)]
    return difference(found, np.stack(logits), path, 10 * TOLERANCE, "the checkpoint's")


def difference(found: Float, wanted: Float, path: str, tolerance: float, whose: str = "the runtime's") -> float:
    """The largest difference of logits; raises VerificationError where it is too large."""
    worst = float(np.abs(found - wanted).max(initial=0.0))
    if not worst <= tolerance * max(1.0, float(np.abs(wanted).max(initial=0.0))):
        raise VerificationError(f"{path}: its logits differ from {whose} by up to {worst:.3g}")
    return worst
