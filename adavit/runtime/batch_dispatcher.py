"""Batches on a device: a block of all images is one run, whatever each of them keeps.

Decisions are made on the device. After each block the host fetches how much room the next one takes, for the whole
batch at once: a batch waits as often as the model has blocks, and once more for the logits.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from adavit.architecture import TOKEN_LOGIT, Architecture
from adavit.bundle.operating_points import Offsets
from adavit.bundle.policy import Policy
from adavit.runtime.batch import NOT_FINITE, BatchBackend, Finished, Lane, rooms_of
from adavit.runtime.dispatcher import Observer, Step, deciding_columns
from adavit.runtime.finite import check_logits, not_finite

__all__ = ["BatchDispatcher", "limits_of"]

Float = npt.NDArray[np.float32]
Bool = npt.NDArray[np.bool_]


def limits_of(offsets: Sequence[Offsets], depth: int) -> Float:
    """What the logits of each block's decisions have to exceed: tokens, heads, sub-layers [L, B, 3]."""
    found = np.array([one.by_block(depth) for one in offsets], np.float32)  # [B, 3, L]
    return np.array([TOKEN_LOGIT, 0, 0], np.float32) - found.transpose(2, 0, 1)


class BatchDispatcher:
    """Runs batches of images through a bundle's graphs of batches; see `Dispatcher`.

    Args:
        arch: the model's shapes.
        backend: runs them.
    """

    def __init__(self, arch: Architecture, backend: BatchBackend) -> None:
        self.arch, self.backend = arch, backend

    def run(
        self,
        images: Float,
        offsets: Offsets | Sequence[Offsets],
        replay: Policy | None = None,
        observe: Observer | None = None,
    ) -> tuple[Float, Policy]:
        """Runs images; see `Dispatcher.run`. An observer is shown all images of a block, then those of the next."""
        batch, most = len(images), self.backend.most_images
        limits = limits_of([offsets] * batch if isinstance(offsets, Offsets) else offsets, self.arch.depth)
        logits = np.empty((batch, self.arch.classes), np.float32)
        used = Policy.empty(self.arch, batch) if replay is None else replay
        for start in range(0, batch, most):
            some = slice(start, min(start + most, batch))
            follow = None if replay is None else replay[some]
            finished = self._run(images[some], limits[:, some], follow, observe, start)
            self._check(finished, start)
            logits[some] = finished.logits
            if replay is None:
                ends = self.arch.tokens, self.arch.tokens + self.arch.heads
                for mask, part in zip(used.masks(), np.split(finished.kept.swapaxes(0, 1), ends, 2), strict=True):
                    mask[some] = part
        return logits, used

    def _run(
        self, images: Float, limits: Float, follow: Policy | None, observe: Observer | None, start: int
    ) -> Finished:
        """Runs as many images as a lane takes, exactly."""
        lane = self.backend.acquire(len(images))
        try:
            kept = None if follow is None else np.concatenate(follow.masks(), 2).swapaxes(0, 1)
            rooms = None if follow is None else rooms_of(follow)
            lane.start(images, limits, kept)
            for block in range(self.arch.depth):
                if observe is not None:
                    self._show(observe, lane, block, limits[block], start)
                lane.block(block, rooms[block] if rooms else lane.room(block))
            finished = lane.finish()
            if observe is not None:
                for image, tokens in enumerate(lane.tokens(), start):
                    observe(Step(image, self.arch.depth, tokens, None, None))
            return finished
        finally:
            self.backend.release(lane)

    def _show(self, observe: Observer, lane: Lane, block: int, limits: Float, start: int) -> None:
        """Shows every image before a block."""
        kinds = np.repeat([0, 1, 2], [self.arch.tokens, self.arch.heads, 2])[deciding_columns(self.arch, block)]
        decisions = lane.decisions(block)
        for image, (tokens, logits) in enumerate(zip(lane.tokens(), decisions, strict=True)):
            kept = logits > limits[image, kinds]
            if self.arch.token_policy:
                kept[0] = True
            observe(Step(start + image, block, tokens, logits, kept))

    def _check(self, finished: Finished, start: int) -> None:
        """Raises NotFiniteError where an image's decisions or logits are not finite."""
        if (bad := finished.state == NOT_FINITE).any():
            raise not_finite(f"the decisions on image {start + int(bad.argmax())} are")
        check_logits(finished.logits, "the logits", start)
