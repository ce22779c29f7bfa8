"""The inputs that the sub-layers are dispatched with, kept in bounded memory while images run."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from adavit.bundle.keys import BlockKey, Sublayers
from adavit.bundle.operating_points import Offsets
from adavit.bundle.policy import Policy
from adavit.calibration.linear import Sublayer, sublayers_of
from adavit.runtime.dispatcher import Step
from adavit.runtime.session import Runtime

__all__ = ["DispatchCount", "Recorder", "Reservoir", "Sample"]

Float = npt.NDArray[np.float32]
T = TypeVar("T")


class Sample(NamedTuple):
    """What a block was dispatched with.

    Attributes:
        key: its sub-layers and heads.
        rows: the kept tokens before the block [K, D].
    """

    key: BlockKey
    rows: Float


class Reservoir(Generic[T]):
    """A uniform choice of at most `capacity` of the samples offered, the same for the same seed and name.

    Attributes:
        samples: those chosen.
        offered: how many were seen.
    """

    def __init__(self, capacity: int, seed: int, name: str) -> None:
        self.samples: list[T] = []
        self.offered = 0
        self._capacity = capacity
        self._random = np.random.default_rng([seed, zlib.crc32(name.encode())])

    def offer(self, make: Callable[[], T]) -> None:
        """Shows the reservoir a sample, made only if it is taken."""
        self.offered += 1
        if len(self.samples) < self._capacity:
            self.samples.append(make())
        elif (place := int(self._random.integers(self.offered))) < self._capacity:
            self.samples[place] = make()


@dataclass
class DispatchCount:
    """How many images reached a sub-layer, and with how many tokens in all, each time that it was dispatched."""

    samples: int = 0
    tokens: int = 0


@dataclass
class Recorder:
    """Runs images through the dispatcher, one by one, and keeps what each sub-layer was dispatched with.

    A sub-layer that runs with no head computes the same for all tokens; it does not count, and nothing is kept of it.

    Attributes:
        runtime: the bundle in fp32.
        capacity: samples kept for a sub-layer.
        seed: of their choice.
        naive: give the sub-layers all tokens and heads, whatever the policy says; to measure what that costs.
        images: how many ran.
        seen: by sub-layer.
        reservoirs: by sub-layer.
        whole: images [3, S, S], for the dense twin.
    """

    runtime: Runtime
    capacity: int
    seed: int = 0
    naive: bool = False
    images: int = 0
    seen: dict[Sublayer, DispatchCount] = field(init=False)
    reservoirs: dict[Sublayer, Reservoir[Sample]] = field(init=False)
    whole: Reservoir[Float] = field(init=False)

    def __post_init__(self) -> None:
        self.runtime.adaptive_dispatcher("calibrate")
        sublayers = sublayers_of(self.runtime.architecture)
        self.seen = {sublayer: DispatchCount() for sublayer in sublayers}
        self.reservoirs = {sublayer: Reservoir(self.capacity, self.seed, sublayer.name) for sublayer in sublayers}
        self.whole = Reservoir(self.capacity, self.seed, "dense")

    def run(self, image: Float, points: Sequence[Offsets | None] = (None,)) -> None:
        """Runs one image, float32 [3, S, S], at some operating points, and keeps what it shows.

        Args:
            image: normalised pixels.
            points: offsets of the decision logits; None for the runtime's own.
        """
        self.images += 1
        self.whole.offer(lambda: image)
        reached: set[Sublayer] = set()
        for offsets in points:
            reached |= self._run_at(image, offsets)
        for sublayer in reached:
            self.seen[sublayer].samples += 1

    def _run_at(self, image: Float, offsets: Offsets | None) -> set[Sublayer]:
        """Runs an image at one operating point, and returns the sub-layers that it reached."""
        arch = self.runtime.architecture
        before: list[Float] = []

        def observe(step: Step) -> None:
            if step.block < arch.depth:
                before.append(step.tokens.copy())

        replayed = Policy.dense(arch, 1) if self.naive else None
        used = self.runtime.run(image[None], replayed, observe, offsets).policy
        return {sublayer for block, tokens in enumerate(before) for sublayer in self._keep(block, tokens, used)}

    def _keep(self, block: int, x: Float, used: Policy) -> list[Sublayer]:
        """Notes what a block ran on the tokens x [N, D], and returns its sub-layers that ran."""
        heads = tuple(used.heads[0, block].nonzero()[0].tolist())
        runs, kept = Sublayers(*used.sublayers[0, block].tolist()), used.tokens[0, block]
        if not heads:
            return []

        @cache  # both sub-layers share it
        def sample() -> Sample:
            return Sample(BlockKey(block, runs, heads), x[kept])

        ran = [Sublayer(block, part) for part, runs_part in runs._asdict().items() if runs_part]
        for sublayer in ran:
            self.seen[sublayer].tokens += int(kept.sum())
            self.reservoirs[sublayer].offer(sample)
        return ran
