"""The inputs that the sub-layers are dispatched with, kept in bounded memory while images run."""

from __future__ import annotations

import zlib
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from adavit.calibration.linear import unit
from adavit.runtime.dispatcher import of_engines
from adavit.runtime.policy import Policy
from adavit.runtime.session import Runtime
from adavit.statistics import Statistics

__all__ = ["Recorder", "Reservoir"]

Float = npt.NDArray[np.float32]
Sample = dict[str, Float]


class Reservoir:
    """A uniform choice of at most `capacity` of the samples offered, the same for the same seed and name.

    Attributes:
        samples: those chosen.
        offered: how many were seen.
    """

    def __init__(self, capacity: int, seed: int, name: str) -> None:
        self.samples: list[Sample] = []
        self.offered = 0
        self._capacity = capacity
        self._random = np.random.default_rng([seed, zlib.crc32(name.encode())])

    def offer(self, make: Callable[[], Sample]) -> None:
        """Shows the reservoir a sample, made only if it is taken."""
        self.offered += 1
        if len(self.samples) < self._capacity:
            self.samples.append(make())
        elif (place := int(self._random.integers(self.offered))) < self._capacity:
            self.samples[place] = make()


@dataclass
class Seen:
    """How often an engine was dispatched, and with how many tokens in all."""

    samples: int = 0
    tokens: int = 0


@dataclass
class Recorder:
    """Runs images through the dispatcher, one by one, and keeps what each sub-layer was given.

    A sub-layer's two engines, with all heads or with gathered ones, share their samples: which of them runs is
    the backend's choice, and they compute the same.

    Attributes:
        runtime: the fp32 bundle.
        capacity: samples kept for a sub-layer.
        seed: of their choice.
        naive: give the sub-layers all tokens and heads, whatever the policy says; to measure what that costs.
        images: how many ran.
        seen: by engine.
        reservoirs: by sub-layer; "dense" keeps whole images. A sub-layer's sample is its tokens x [K, D] and,
            where heads are decided on, the channels [D] of the kept ones.
        tokens, heads: for each block, kept tokens (heads) to images that run the block.
    """

    runtime: Runtime
    capacity: int
    seed: int = 0
    naive: bool = False
    images: int = 0
    seen: dict[str, Seen] = field(default_factory=lambda: defaultdict(Seen))
    reservoirs: dict[str, Reservoir] = field(default_factory=dict)
    tokens: list[Counter[int]] = field(default_factory=list)
    heads: list[Counter[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        depth = self.runtime.architecture.depth
        dispatcher = self.runtime.adaptive_dispatcher("calibrate")
        dispatcher.specialise(())  # engines of whole blocks show nothing between their sub-layers
        names = [f"blocks.{block}.{kind}" for block in range(depth) for kind in ("attention", "mlp")]
        self.reservoirs = {name: Reservoir(self.capacity, self.seed, name) for name in (*names, "dense")}
        self.tokens, self.heads = [Counter() for _ in range(depth)], [Counter() for _ in range(depth)]

    def run(self, image: Float) -> None:
        """Runs one image, float32 [3, S, S], and keeps what it shows."""
        arch = self.runtime.architecture
        states: list[tuple[str, Float]] = []

        replayed = Policy.dense(arch, 1) if self.naive else None
        observe = of_engines(lambda _, name, x: states.append((name, x.copy())))
        result = self.runtime.run(image[None], replayed, observe)
        used = result.policy
        self.images += 1
        self.reservoirs["dense"].offer(lambda: {"images": image[None]})
        for block in np.flatnonzero(used.sublayers[0].any(1)):
            self.tokens[block][int(used.tokens[0, block].sum())] += 1
            self.heads[block][int(used.heads[0, block].sum())] += 1
        for (_, before), (engine, _) in pairwise(states[:-1]):
            self._keep(engine, before, used)

    def statistics(self) -> Statistics:
        """What the images that ran kept."""
        return Statistics(tuple(self.tokens), tuple(self.heads), {1: self.images})

    def _keep(self, engine: str, x: Float, used: Policy) -> None:
        """Notes that an engine ran behind the tokens x [N, D]."""
        block = int(engine.split(".")[1])
        kept, heads = used.tokens[0, block], used.heads[0, block]
        if not heads.any():  # one vector for all tokens: no engine ran
            return
        seen = self.seen[engine]
        seen.samples += 1
        seen.tokens += int(kept.sum())
        arch = self.runtime.architecture

        def sample() -> Sample:
            rows = {"x": x[kept]}
            if arch.adapts_heads(block):
                rows["channels"] = np.repeat(heads.astype(np.float32), arch.head_width)
            return rows

        self.reservoirs[unit(engine)].offer(sample)
