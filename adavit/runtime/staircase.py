"""How long a block's engines take on this machine, by numbers of tokens and heads, and the plan that follows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from adavit.architecture import Architecture
from adavit.errors import InputError
from adavit.runtime.backend import Engine
from adavit.runtime.budget import TRAINED
from adavit.runtime.dispatcher import Dispatcher
from adavit.runtime.plan import SUBLAYERS, EnginePlan, set_kinds, sublayers_of
from adavit.runtime.state import Scratch, State, Thresholds
from adavit.runtime.timing import median_times

__all__ = ["BlockStaircase", "Staircase", "measure_blocks", "measure_staircase"]

STEPS = 9
"""Numbers of tokens that are measured, from one to all."""
ROUNDS = 7
NEW = 0.25
"""Share of the sets of heads whose weights are not kept from before."""

Run = Callable[[], object]
Key = tuple[str, int, int]
"""What is run ("attention", "attention_gather", "attention_weights", likewise for "mlp"; "both"), tokens, heads."""
Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class BlockStaircase:
    """Milliseconds of the engines of whole blocks, which are given their heads' weights; medians of some rounds.

    Attributes:
        tokens: numbers of kept tokens.
        heads: numbers of kept heads.
        blocks: by what runs ("attention", "mlp", "both") and number of heads, for each number of tokens.
        weights: by sub-layer, of gathering the heads' weights, for each number of heads; none where all are always
            kept.
    """

    tokens: list[int]
    heads: list[int]
    blocks: dict[str, list[list[float]]]
    weights: dict[str, list[float]]


@dataclass(frozen=True)
class Staircase:
    """Milliseconds of the engines of sub-layers, medians of some rounds.

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


def measure_blocks(dispatcher: Dispatcher, progress: Progress) -> BlockStaircase:
    """Measures one block, where the backend runs whole ones: the others have the same shapes."""
    arch = dispatcher.arch
    index = next((index for index in range(arch.depth) if arch.adapts_heads(index)), 0)
    chosen, kinds, tokens = arch.adapts_heads(index), set_kinds(arch, index), _counts(arch)
    heads = [*range(1, arch.heads + 1)] if chosen else [arch.heads]
    state = State(arch, dispatcher.backend)
    state.start(Thresholds.of(TRAINED, arch), dispatcher.specialised.engines)
    dispatcher.engines.stem.run([_noise(arch)], [state.image.rows(1)])

    def run(block: Callable[..., None], weights: Sequence[Any], count: int) -> None:
        state.tokens[index] = np.arange(arch.tokens) < count
        block(*weights)

    runs: dict[Key, Run] = _weighing(dispatcher, index, heads) if chosen else {}
    for kind, h in product(kinds, heads):
        choices = np.arange(arch.heads) < h, [part in sublayers_of(kind) for part in SUBLAYERS]
        key = np.concatenate(choices).tobytes()
        block, weights = state.run_of(index, key[-2:]), dispatcher.head_weights.of(index, key)
        for k in tokens:
            runs[kind, k, h] = partial(run, cast(Callable[..., None], block), cast(Sequence[Any], weights), k)
    found = median_times(runs, ROUNDS, "measuring engines", progress)
    return BlockStaircase(
        tokens,
        heads,
        {kind: [[found[kind, k, h] for k in tokens] for h in heads] for kind in kinds},
        {kind: [found[f"{kind}_weights", 0, h] for h in heads] for kind in SUBLAYERS if chosen},
    )


def measure_staircase(dispatcher: Dispatcher, progress: Progress) -> Staircase:
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
    """Numbers of tokens that are measured."""
    return sorted({int(count) for count in np.linspace(1 if arch.token_policy else arch.tokens, arch.tokens, STEPS)})


def _noise(arch: Architecture) -> npt.NDArray[np.float32]:
    """An image of it."""
    return np.random.default_rng(0).standard_normal((1, 3, arch.image_size, arch.image_size), dtype=np.float32)


def _weighing(dispatcher: Dispatcher, index: int, heads: Iterable[int]) -> dict[Key, Run]:
    """Runs that gather the weights of the first heads of a block, by sub-layer."""
    unkept = dispatcher.head_weights.without_budget()
    ways = {"attention_weights": unkept.attention, "mlp_weights": unkept.mlp}
    return {(name, 0, h): partial(gather, index, np.arange(h)) for name, gather in ways.items() for h in heads}


def _runs(dispatcher: Dispatcher, index: int) -> dict[Key, Run]:
    """Every run to be timed, of one block's engines on an image of noise."""
    arch, backend = dispatcher.arch, dispatcher.backend
    block, scratch = dispatcher.engines.blocks[index], Scratch(arch, backend)
    state, out = State(arch, backend), scratch.first
    dispatcher.engines.stem.run([_noise(arch)], [state.image.rows(1)])
    x, normed_x = state.x, state.normed
    block.decide.run([x.rows(arch.tokens)], [normed_x.rows(arch.tokens), *scratch.logits[index]])
    channels = np.ones(arch.width, np.float32)

    def run(engine: Engine, inputs: list[Any], count: int) -> None:
        engine.run(inputs, [out.rows(count)])
        backend.fetch(out)

    runs = _weighing(dispatcher, index, range(1, arch.heads + 1))
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
