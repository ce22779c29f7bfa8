"""What images and workers hold while the dispatcher runs: thresholds, an image's tokens and policy, a block's rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from adavit.architecture import TOKEN_LOGIT, Architecture
from adavit.runtime.backend import Backend, Buffer, FixedEngine
from adavit.runtime.budget import Offsets
from adavit.runtime.policy import Policy
from adavit.runtime.specialise import DECIDING, STEM, Key

__all__ = ["Scratch", "State", "Thresholds"]

Float = npt.NDArray[np.float32]


class Thresholds(NamedTuple):
    """What logits have to exceed.

    Attributes:
        tokens: [L, N]; the class token exceeds its own.
        choices: heads, then sub-layers, [L, H + 2].
    """

    tokens: Float
    choices: Float

    @staticmethod
    @lru_cache(64)
    def of(offsets: Offsets, arch: Architecture) -> Thresholds:
        """The model's own, less the offsets."""
        tokens, heads, sublayers = np.asarray(offsets.by_block(arch.depth))[:, :, None]
        of_tokens = np.broadcast_to(TOKEN_LOGIT - tokens, (arch.depth, arch.tokens)).astype(np.float32)
        of_tokens[:, 0] = -np.inf
        choices = np.concatenate([-heads.repeat(arch.heads, 1), -sublayers.repeat(2, 1)], 1)
        return Thresholds(of_tokens, choices.astype(np.float32))


class State:
    """One image on its way through the blocks; used again for other images, so that runs on it are prepared once.

    Attributes:
        image: its tokens as the stem makes them, [1, N, D].
        x: the same memory as [N, D].
        normed: norm1 of them, where a block has left it [N, D].
        logits: [1, C].
        tokens: its policy, bool [L, N].
        choices: for each block, whether it keeps each head, then each sub-layer: bool [H + 2].
    """

    def __init__(self, arch: Architecture, backend: Backend) -> None:
        self.image = backend.buffer((1, arch.tokens, arch.width))
        self.x = self.image.part(0)
        self.normed = backend.buffer((arch.tokens, arch.width))
        self.logits = backend.buffer((1, arch.classes))
        self.tokens = np.ones((arch.depth, arch.tokens), bool)
        self._choices = np.ones((arch.depth, arch.heads + 2), bool)
        self.choices = list(self._choices)
        self._arch = arch
        self._engines: Mapping[Key, FixedEngine] = {}
        self._runs: dict[Key, Callable[..., None]] = {}
        self._thresholds: Thresholds | None = None
        self._token_thresholds = np.zeros((arch.depth, arch.tokens), np.float32)
        self._choice_thresholds = np.zeros((arch.depth, arch.heads + 2), np.float32)

    def keep(self, engines: Mapping[Key, FixedEngine]) -> None:
        """Holds the blocks' own engines, and lets go of any others."""
        if engines is not self._engines:
            self._runs, self._engines = {}, engines

    def start(self, thresholds: Thresholds, engines: Mapping[Key, FixedEngine]) -> None:
        """Begins an image: what it decides by, and the blocks' own engines."""
        self.keep(engines)
        if thresholds is not self._thresholds:
            self._thresholds = thresholds
            self._token_thresholds[...] = thresholds.tokens
            self._choice_thresholds[...] = thresholds.choices

    def run_of(self, block: int, choices: bytes) -> Callable[..., None] | None:
        """What runs a block in one engine, or makes its decisions (`DECIDING`); None where there is no such engine."""
        key = block, choices
        run = self._runs.get(key)
        if run is None and (own := self._engines.get(key)):
            values = self._deciding(block) if choices == DECIDING else self._values(block)
            run = self._runs[key] = own.bound(values)
        return run

    def decide(self, block: int, logits: Sequence[Float]) -> None:
        """Keeps what is strictly above its threshold: logits of tokens [N, 1], then of choices [1, C], of a block."""
        if self._arch.token_policy:
            np.greater(logits[0][:, 0], self._token_thresholds[block], out=self.tokens[block])
            self.tokens[block, 0] = True
        if chosen := chosen_by(self._arch, block):
            np.greater(logits[-1][0], self._choice_thresholds[block, chosen], out=self.choices[block][chosen])

    def decisions(self, block: int) -> npt.NDArray[np.bool_]:
        """Whether each token, each head and each sub-layer of a block is kept, [N + H + 2]."""
        return np.concatenate([self.tokens[block], self.choices[block]])

    def follow(self, policy: Policy, position: int, block: int) -> None:
        """Takes a block's row of an image's policy."""
        self.tokens[block] = policy.tokens[position, block]
        self.choices[block][: self._arch.heads] = policy.heads[position, block]
        self.choices[block][self._arch.heads :] = policy.sublayers[position, block]

    def write(self, policy: Policy, position: int) -> None:
        """Makes its policy an image's in a batch's."""
        policy.tokens[position] = self.tokens
        policy.heads[position] = self._choices[:, :-2]
        policy.sublayers[position] = self._choices[:, -2:]

    def _values(self, block: int) -> dict[str, Any]:
        """What a block in one engine reads and fills, by its names; see `adavit.export.sets`."""
        rows = self._arch.tokens
        x = self.x.rows(rows)
        values = {"x": x, "y": x, "normed": self.normed.rows(rows), "kept": self.tokens[block]}
        if block + 1 == self._arch.depth:
            return values | {"logits": self.logits.rows(1)}
        return values | self._deciding(block + 1)

    def _deciding(self, block: int) -> dict[str, Any]:
        """What a block's decisions are made of, and where they go; with the stem, those of the first."""
        rows = self._arch.tokens
        x = self.x.rows(rows)
        if block == STEM:
            x, block = self.image.rows(1), 0
        values = {
            "x": x,
            "next_normed": self.normed.rows(rows),
            "token_thresholds": self._token_thresholds[block],
            "next_kept": self.tokens[block][None],
        }
        if chosen := chosen_by(self._arch, block):
            values["choice_thresholds"] = self._choice_thresholds[block, chosen]
            values["next_choices"] = self.choices[block][None, chosen]
        return values


def chosen_by(arch: Architecture, block: int) -> slice | None:
    """Which of heads and sub-layers a block decides on; None for none of them."""
    first = 0 if arch.adapts_heads(block) else arch.heads
    return slice(first, first + count) if (count := arch.choices(block)) else None


class Scratch:
    """A worker's buffers; what they hold is of use within one block of one image.

    Attributes:
        first, second: the rows behind a sub-layer.
        rows, normed_rows: the kept rows of the tokens, and of norm1 of them.
        decided: for each block, the buffers that hold its decisions' logits: those of tokens [N, 1] where they are
            decided on, and those of heads and sub-layers [1, C] where these are.
        logits: for each block, all rows of these.
    """

    def __init__(self, arch: Architecture, backend: Backend) -> None:
        size = arch.tokens, arch.width
        self.first, self.second, self.rows, self.normed_rows = (backend.buffer(size) for _ in range(4))
        tokens = [backend.buffer((arch.tokens, 1))] if arch.token_policy else []
        choices = {count: backend.buffer((1, count)) for count in map(arch.choices, range(arch.depth)) if count}
        self.decided: list[list[Buffer]] = []
        self.logits: list[list[Any]] = []
        for count in map(arch.choices, range(arch.depth)):
            self.decided.append([*tokens, choices[count]] if count else tokens)
            rows = [buffer.rows(arch.tokens) for buffer in tokens]
            self.logits.append([*rows, choices[count].rows(1)] if count else rows)
