"""Conditional dispatch: for every image and block, decide, then run only what the policy keeps.

This file is how a block is run. The graph of the stem, and that of each block, makes the logits of the next block's
decisions. What exceeds its threshold is kept: tokens, heads and sub-layers. Of a block's graphs, the one for its
sub-layers runs, on the kept tokens, with the weights of the kept heads. Whether these are handed to it or constants
in it is the backend's affair. The last block's graph makes the logits of the classes.

A batch's images go through block after block side by side: a block's weights are then still in the cache for the next
image. Workers take the image that waits longest and run one block of it, so that none of them idles.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import lru_cache, partial
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from adavit.architecture import TOKEN_LOGIT, Architecture
from adavit.bundle.graphs import Graphs
from adavit.bundle.keys import NONE, BlockKey, Sublayers
from adavit.bundle.operating_points import Offsets
from adavit.bundle.policy import Policy
from adavit.runtime.backend import Backend, Options, Slot
from adavit.runtime.finite import check_decisions, check_image
from adavit.runtime.forks import renew_in_fork
from adavit.runtime.worker import worker_pool

__all__ = ["Dispatcher", "Observer", "Step", "deciding_columns", "thresholds"]

Float = npt.NDArray[np.float32]
T = TypeVar("T")

SIDE_BY_SIDE = 16
"""Images that go through the blocks together: more tokens than these hold would push the weights from the cache."""
MOST_KEYS = 65536
"""Keys that are kept, by what a block decided."""


class Step(NamedTuple):
    """What an observer is shown of an image, before each block, and behind the last.

    Attributes:
        image: its position in the batch.
        block: the block that comes next; the model's depth behind the last.
        tokens: what the block is given, or the last one made, float32 [N, D]; valid until the observer returns.
        decisions: the logits of the block's decisions [M]: its tokens [N], heads [H] and sub-layers [2], as far as it
            has policies for them; None behind the last block.
        kept: which of them exceed this run's thresholds, bool [M].
    """

    image: int
    block: int
    tokens: Float
    decisions: Float | None
    kept: npt.NDArray[np.bool_] | None


Observer = Callable[[Step], None]


@lru_cache(64)
def thresholds(offsets: Offsets, arch: Architecture) -> list[Float]:
    """For each block, what the logits of its decisions have to exceed; the class token always does."""
    sizes, found = (1, arch.tokens - 1, arch.heads, 2), []
    for block, (tokens, heads, sublayers) in enumerate(zip(*offsets.by_block(arch.depth), strict=True)):
        every = np.array([-np.inf, TOKEN_LOGIT - tokens, -heads, -sublayers], np.float32).repeat(sizes)
        found.append(every[deciding_columns(arch, block)])
    return found


@lru_cache(512)
def deciding_columns(arch: Architecture, block: int) -> slice | npt.NDArray[np.int64]:
    """Which of a row of tokens, heads and sub-layers [N + H + 2] a block decides; it keeps all others."""
    heads, end = arch.tokens, arch.tokens + arch.heads
    parts = [range(arch.tokens)] * arch.token_policy
    parts += [range(heads, end)] * arch.adapts_heads(block) + [range(end, end + 2)] * arch.adapts_sublayers(block)
    found = np.array([number for part in parts for number in part], np.int64)
    if len(found) and found[-1] - found[0] == len(found) - 1:
        return slice(int(found[0]), int(found[-1]) + 1)  # copying is faster
    return found


class Dispatcher:
    """Runs images through a bundle's graphs.

    Args:
        graphs: what to run.
        backend: runs them.
        options: threads, and how images share them.

    Attributes:
        arch: the model's shapes.
    """

    def __init__(self, graphs: Graphs, backend: Backend, options: Options) -> None:
        self.arch = graphs.architecture
        self.backend = backend
        self._options = options
        self._slots: dict[int, list[Slot]] = {1: [], options.threads: []}
        self._keys: dict[tuple[int, bytes], BlockKey] = {}
        self.after_fork()
        renew_in_fork(self)

    def after_fork(self) -> None:
        """Forgets the threads, which a forked child does not have."""
        self._pool: ThreadPoolExecutor | None = None

    def run(
        self,
        images: Float,
        offsets: Offsets | Sequence[Offsets],
        replay: Policy | None = None,
        observe: Observer | None = None,
    ) -> tuple[Float, Policy]:
        """Runs images float32 [B, 3, S, S].

        Args:
            images: normalised pixels.
            offsets: of the decision logits, of all images or of each [B].
            replay: a policy to follow instead of deciding.
            observe: is shown every image before each block.

        Returns:
            Logits [B, C], and the policy.
        """
        batch = len(images)
        logits = np.empty((batch, self.arch.classes), np.float32)
        used = Policy.empty(self.arch, batch) if replay is None else replay
        each = [offsets] * batch if isinstance(offsets, Offsets) else offsets
        limits = [thresholds(one, self.arch) for one in each]
        workers, threads = self._options.workers(batch), self._options.threads_of(batch)
        run = partial(ImageRun, self, images, used, replay is not None, limits, logits, observe, threads)
        together = max(SIDE_BY_SIDE, workers)
        for start in range(0, batch, together):
            waiting = deque(map(run, range(start, min(start + together, batch))))
            if workers == 1 or len(waiting) == 1:
                self._work(waiting)
                continue
            if self._pool is None:
                self._pool = worker_pool(self._options.threads)
            working = [self._pool.submit(self._work, waiting) for _ in range(min(workers, len(waiting)))]
            wait(working)
            for worker in working:
                worker.result()
        return logits, used

    def _work(self, waiting: deque[ImageRun]) -> None:
        """Runs a block of the image that waits longest, until none waits; after a failure, none does."""
        run = pop_or_none(waiting.popleft)
        try:
            while run is not None:
                if run.step(alone=not waiting):
                    waiting.append(run)
                run = pop_or_none(waiting.popleft)
        finally:
            while run is not None:
                run.abandon()
                run = pop_or_none(waiting.popleft)

    def acquire_slot(self, threads: int) -> Slot:
        """What holds an image on its way, to be given back."""
        return pop_or_none(self._slots[threads].pop) or self.backend.slot(threads)

    def release_slot(self, threads: int, slot: Slot) -> None:
        """Takes it back, for other images."""
        self._slots[threads].append(slot)

    def key_of(self, block: int, kept: bytes) -> BlockKey:
        """What a block runs that keeps these heads and sub-layers, bool [H + 2]."""
        name = block, kept
        found = self._keys.get(name)
        if found is None:
            *heads, attention, mlp = map(bool, kept)
            runs = Sublayers(attention, mlp)
            if len(self._keys) >= MOST_KEYS:
                self._keys.clear()
            which = tuple(head for head, keeps in enumerate(heads) if keeps) if runs != NONE else ()
            found = self._keys[name] = BlockKey(block, runs, which)
        return found


def pop_or_none(pop: Callable[[], T]) -> T | None:
    """What it takes from a list or queue, or None where none is left; from any thread."""
    try:
        return pop()
    except IndexError:
        return None


class ImageRun:
    """One image on its way through the blocks.

    Args:
        dispatcher: what runs it.
        images: the batch, [B, 3, S, S].
        policy: the batch's, to be filled or followed.
        follows: whether to follow it.
        limits: for each image of the batch, the thresholds of each block's decisions.
        logits: the batch's, to be filled, [B, C].
        observe: is shown the image before each block.
        threads: that run it.
        position: its own in the batch.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        images: Float,
        policy: Policy,
        follows: bool,
        limits: list[list[Float]],
        logits: Float,
        observe: Observer | None,
        threads: int,
        position: int,
    ) -> None:
        self._dispatcher, self._arch = dispatcher, dispatcher.arch
        self._images, self._position, self._threads = images, position, threads
        self._follows, self._limits, self._logits, self._observe = follows, limits[position], logits, observe
        self._policy = [mask[position] for mask in policy.masks()]
        arch = self._arch
        self._kept = (
            np.concatenate(self._policy, 1) if follows else np.ones((arch.depth, arch.tokens + arch.heads + 2), bool)
        )
        self._decided: list[Float] = []
        self._slot: Slot | None = None
        self._block = 0

    def step(self, alone: bool) -> bool:
        """Runs the stem, or then the next block; where no other image waits, everything to the end.

        Returns whether there is more to do.
        """
        if self._slot is None:
            self._slot = self._dispatcher.acquire_slot(self._threads)
            self._slot.stem(self._images[self._position : self._position + 1])
            if not alone:
                return True
        while self._block < self._arch.depth:
            self._decide(self._block, self._slot)
            self._run(self._block, self._slot)
            self._block += 1
            if not alone and self._block < self._arch.depth:
                return True
        self._finish(self._slot)
        return False

    def abandon(self) -> None:
        """Gives back what it holds, where it is not done."""
        if self._slot is not None:
            self._dispatcher.release_slot(self._threads, self._slot)
            self._slot = None

    def _decide(self, block: int, slot: Slot) -> None:
        """Makes a block's row of the policy: what is strictly above its threshold is kept."""
        limits, row = self._limits[block], self._kept[block]
        if self._follows and self._observe is None:
            return
        logits = slot.decisions()[: len(limits)] if len(limits) else limits
        self._decided.append(logits)
        kept = np.greater(logits, limits)
        if self._observe is not None:
            self._observe(Step(self._position, block, slot.tokens(), logits, kept))
        if not self._follows:
            row[deciding_columns(self._arch, block)] = kept
            row[0] = True

    def _run(self, block: int, slot: Slot) -> None:
        """Runs what the policy keeps of a block."""
        row, tokens = self._kept[block], self._arch.tokens
        slot.block(self._dispatcher.key_of(block, row[tokens:].tobytes()), row[:tokens].nonzero()[0])

    def _finish(self, slot: Slot) -> None:
        """Takes the logits, and gives the slot back."""
        logits = slot.logits()
        self._logits[self._position] = logits
        if self._observe is not None:
            self._observe(Step(self._position, self._arch.depth, slot.tokens(), None, None))
        check_decisions(self._position, self._decided)
        check_image(self._position, logits, slot.tokens())
        if not self._follows:
            ends = self._arch.tokens, self._arch.tokens + self._arch.heads
            for mask, part in zip(self._policy, np.split(self._kept, ends, 1), strict=True):
                mask[:] = part
        self._dispatcher.release_slot(self._threads, slot)
        self._slot = None
