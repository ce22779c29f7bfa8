"""How long a sub-layer's engines take on this machine, by numbers of tokens and heads, and the plan that follows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from adavit.architecture import Architecture
from adavit.errors import InputError
from adavit.runtime.backend import Engine
from adavit.runtime.dispatcher import Dispatcher
from adavit.runtime.plan import SUBLAYERS, EnginePlan
from adavit.runtime.state import Scratch, State
from adavit.runtime.timing import median_times

__all__ = ["Staircase", "measure_staircase"]

STEPS = 9
"""Numbers of tokens that are measured, from one to all."""
ROUNDS = 7
NEW = 0.25
"""Share of the sets of heads whose weights are not kept from before."""

Run = Callable[[], object]
Key = tuple[str, int, int]
"""What is run ("attention", "attention_gather", "attention_weights", likewise for "mlp"), tokens, heads."""


@dataclass(frozen=True)
class Staircase:
    """Milliseconds of engines, medians of some rounds.

    Attributes:
        tokens: numbers of kept tokens.
        masked: by sub-layer, with all heads, for each number of tokens.
        gathered: by sub-layer and heads less one, for each number of tokens.
        weights: by sub-layer and heads less one, of gathering the heads' weights.
    """

    tokens: list[int]
    masked: dict[str, list[float]]
    gathered: dict[str, list[list[float]]]
    weights: dict[str, list[float]]

    def plan(self, arch: Architecture) -> EnginePlan:
        """Gathers where that is faster, times between those measured taken as straight lines."""
        counts = np.arange(arch.tokens + 1)

        def times(measured: list[float]) -> npt.NDArray[np.float64]:
            return np.interp(counts, self.tokens, measured)

        faster = {
            kind: [
                times(self.gathered[kind][heads]) + NEW * self.weights[kind][heads] < times(self.masked[kind])
                for heads in range(arch.heads)
            ]
            for kind in SUBLAYERS
        }
        return EnginePlan.where(arch, lambda kind, k, h: h > 0 and bool(faster[kind][h - 1][k]))


def measure_staircase(dispatcher: Dispatcher, progress: Callable[[str, float], None]) -> Staircase:
    """Measures the engines of one block: those of the others have the same shapes.

    Raises:
        InputError: no block decides on heads, so that there is nothing to choose from.
    """
    arch = dispatcher.arch
    block = next((index for index in reversed(range(arch.depth)) if arch.adapts_heads(index)), None)
    if block is None:
        raise InputError("the model decides on no heads, so that there are no engines to choose between")
    found = median_times(_runs(dispatcher, block), ROUNDS, "measuring engines", progress)
    tokens, heads = _counts(arch), range(1, arch.heads + 1)
    return Staircase(
        tokens,
        {kind: [found[kind, k, 0] for k in tokens] for kind in SUBLAYERS},
        {kind: [[found[f"{kind}_gather", k, h] for k in tokens] for h in heads] for kind in SUBLAYERS},
        {kind: [found[f"{kind}_weights", 0, h] for h in heads] for kind in SUBLAYERS},
    )


def _counts(arch: Architecture) -> list[int]:
    return sorted({int(count) for count in np.linspace(1, arch.tokens, STEPS)})


def _runs(dispatcher: Dispatcher, index: int) -> dict[Key, Run]:
    """Every run to be timed, of one block's engines on an image of noise."""
    arch, backend = dispatcher.arch, dispatcher.backend
    block, scratch = dispatcher.engines.blocks[index], Scratch(arch, backend)
    state, out = State(arch, backend), scratch.first
    image = np.random.default_rng(0).standard_normal((1, 3, arch.image_size, arch.image_size), dtype=np.float32)
    dispatcher.engines.stem.run([image], [state.image.rows(1)])
    x, normed_x = state.x, state.normed
    block.decide.run([x.rows(arch.tokens)], [normed_x.rows(arch.tokens), *scratch.logits[index]])
    channels = np.ones(arch.width, np.float32)
    unkept = dispatcher.head_weights.without_budget()

    def run(engine: Engine, inputs: list[Any], count: int) -> None:
        engine.run(inputs, [out.rows(count)])
        backend.fetch(out)

    runs: dict[Key, Run] = {}
    for heads in (np.arange(count) for count in range(1, arch.heads + 1)):
        runs["attention_weights", 0, len(heads)] = partial(unkept.attention, index, heads)
        runs["mlp_weights", 0, len(heads)] = partial(unkept.mlp, index, heads)
    for k in _counts(arch):
        rows, normed = x.rows(k), normed_x.rows(k)
        runs["attention", k, 0] = partial(run, block.attention, [rows, normed, channels], k)
        runs["mlp", k, 0] = partial(run, block.mlp, [rows, channels], k)
        for heads in (np.arange(count) for count in range(1, arch.heads + 1)):
            weights = dispatcher.head_weights.attention(index, heads), dispatcher.head_weights.mlp(index, heads)
            attention, mlp = cast(Engine, block.attention_gather), cast(Engine, block.mlp_gather)
            runs["attention_gather", k, len(heads)] = partial(run, attention, [rows, normed, *weights[0]], k)
            runs["mlp_gather", k, len(heads)] = partial(run, mlp, [rows, heads, *weights[1]], k)
    return runs
