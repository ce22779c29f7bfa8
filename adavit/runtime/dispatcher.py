"""Conditional dispatch: for every image and block, decide, then run only the engines that the policy keeps.

Per image x [N, D] and block i:

    blocks.i.decide     x -> norm1(x), decision logits
    blocks.i.full       both sub-layers with every head, on the kept tokens
    blocks.i.attention  the attention sub-layer with the kept heads, on the kept tokens
    blocks.i.mlp        the MLP sub-layer with the kept heads' channels, on the kept tokens

Kept tokens are gathered before an engine and scattered after it. A sub-layer without any kept head is one
vector for all tokens, which the engine `empty` holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from adavit.architecture import TOKEN_THRESHOLD
from adavit.macs import attention_macs, block_macs, mlp_macs, outside_macs
from adavit.runtime.backend import Array, Backend, Engine
from adavit.runtime.bundle import Bundle
from adavit.runtime.policy import Policy

__all__ = ["Dispatcher", "Observer"]

Float = npt.NDArray[np.float32]
Index = npt.NDArray[np.intp]
Observer = Callable[[int, str, Float], None]
"""Told, after every engine: the image's position, the engine's name, and what it made of the tokens [N, D]."""

TOKEN_LOGIT = np.float32(math.log(TOKEN_THRESHOLD / (1 - TOKEN_THRESHOLD)))
"""sigmoid(logit) > 0.6 is logit > 0.405..."""


@dataclass(frozen=True)
class BlockEngines:
    """One block's engines; those its policies never need are absent."""

    index: int
    decide: Engine
    outputs: tuple[str, ...]
    full: Engine
    attention: Engine | None
    mlp: Engine | None
    gathers_heads: bool


class Dispatcher:
    """Runs images through a bundle's engines.

    Args:
        bundle: what to run.
        backend: loads and runs engines.
        workers: images of a batch that run at once.
    """

    def __init__(self, bundle: Bundle, backend: Backend, workers: int) -> None:
        self._arch = bundle.architecture
        self._load = partial(_load, bundle, backend)
        self._stem = self._load("stem", alone=True)
        self._head = self._load("head", alone=True)
        self._blocks = [self._block(bundle, index) for index in range(self._arch.depth)]
        self._empty = self._load("empty").run([]) if "empty" in bundle.engines else []
        self._pool = ThreadPoolExecutor(workers, "adavit") if workers > 1 else None
        self._outside = outside_macs(self._arch)

    def _block(self, bundle: Bundle, index: int) -> BlockEngines:
        name = f"blocks.{index}"
        part = {
            kind: self._load(f"{name}.{kind}") if f"{name}.{kind}" in bundle.engines else None
            for kind in ("attention", "mlp")
        }
        return BlockEngines(
            index,
            self._load(f"{name}.decide"),
            tuple(tensor.name for tensor in bundle.engines[f"{name}.decide"].outputs),
            self._load(f"{name}.full"),
            part["attention"],
            part["mlp"],
            self._arch.adapts_heads(index),
        )

    def run(
        self, images: Float, replay: Policy | None = None, observe: Observer | None = None
    ) -> tuple[Float, Policy, npt.NDArray[np.int64]]:
        """Runs images float32 [B, 3, S, S].

        Args:
            images: normalised pixels.
            replay: a policy to follow instead of deciding.
            observe: sees what every engine computes.

        Returns:
            Logits [B, C], the policy, and the MACs of every image, int64 [B].
        """
        batch = len(images)
        tokens = self._stem.run([images])[0]
        used = Policy.dense(self._arch, batch) if replay is None else replay
        classes = np.empty((batch, self._arch.width), np.float32)
        macs = np.empty(batch, np.int64)

        def run_image(position: int) -> None:
            run = ImageRun(self, used[position : position + 1], replay is None, observe, position)
            classes[position], macs[position] = run(tokens[position])

        if self._pool is None or batch == 1:
            for position in range(batch):
                run_image(position)
        else:
            list(self._pool.map(run_image, range(batch)))
        logits = self._head.run([classes])[0]
        if observe:
            for position in range(batch):
                observe(position, "head", logits[position])
        return logits, used, macs


class ImageRun:
    """One image on its way through the blocks."""

    def __init__(
        self, dispatcher: Dispatcher, policy: Policy, decides: bool, observe: Observer | None, position: int
    ) -> None:
        self._engines = dispatcher
        self._arch = dispatcher._arch
        self._tokens, self._heads, self._sublayers = policy.tokens[0], policy.heads[0], policy.sublayers[0]
        self._decides = decides
        self._observe = observe
        self._position = position

    def __call__(self, x: Float) -> tuple[Float, int]:
        """Takes the stem's tokens [N, D] to the last block's class token [D], and counts MACs."""
        macs = self._engines._outside
        self._see("stem", x)
        for block in self._engines._blocks:
            x, executed = self._block(block, x)
            macs += executed
        return x[0], macs

    def _see(self, engine: str, x: Float) -> None:
        if self._observe:
            self._observe(self._position, engine, x)

    def _block(self, block: BlockEngines, x: Float) -> tuple[Float, int]:
        index = block.index
        outputs = block.decide.run([x])
        if self._decides:
            self._record(index, dict(zip(block.outputs, outputs, strict=True)))
        attention, mlp = self._sublayers[index].tolist()
        if not (attention or mlp):
            return x, 0
        kept = np.flatnonzero(self._tokens[index])
        heads = np.flatnonzero(self._heads[index])
        everything = len(kept) == self._arch.tokens
        rows = x if everything else x[kept]
        normed = outputs[0] if everything or not attention else outputs[0][kept]
        if attention and mlp and len(heads) == self._arch.heads:
            rows = block.full.run([rows, normed])[0]
            macs = block_macs(self._arch, len(kept), len(heads), 1, 1)
            name = "full"
        else:
            rows, macs = self._parts(block, x, rows, normed, kept, heads)
            name = "mlp" if mlp else "attention"
        x = self._scattered(x, rows, kept)
        self._see(f"blocks.{index}.{name}", x)
        return x, macs

    def _record(self, index: int, decided: dict[str, Array]) -> None:
        """Turns decision logits into this block's row of the policy; strictly above the threshold is kept."""
        if "tokens" in decided:
            self._tokens[index, 1:] = decided["tokens"] > TOKEN_LOGIT
        if "heads" in decided:
            self._heads[index] = decided["heads"] > 0
        if "sublayers" in decided:
            self._sublayers[index] = decided["sublayers"] > 0

    def _parts(
        self, block: BlockEngines, x: Float, rows: Float, normed: Float, kept: Index, heads: Index
    ) -> tuple[Float, int]:
        """Runs the sub-layers one by one on the kept rows [K, D]."""
        index, arch, macs = block.index, self._arch, 0
        attention, mlp = self._sublayers[index].tolist()
        chosen = [heads] if block.gathers_heads else []
        if attention:
            if len(heads):
                assert block.attention is not None
                rows = block.attention.run([rows, normed, *chosen])[0]
                macs += attention_macs(arch, len(kept), len(heads))
            else:
                rows = rows + self._engines._empty[0][index]
            if mlp and self._observe:
                self._see(f"blocks.{index}.attention", self._scattered(x.copy(), rows, kept))
        if mlp:
            if len(heads):
                assert block.mlp is not None
                rows = block.mlp.run([rows, *chosen])[0]
                macs += mlp_macs(arch, len(kept), len(heads))
            else:
                rows = rows + self._engines._empty[1][index]
        return rows, macs

    def _scattered(self, x: Float, rows: Float, kept: Index) -> Float:
        """Puts the kept rows back; x, which this image alone holds, changes in place."""
        if len(kept) == len(x):
            return rows
        x[kept] = rows
        return x


def _load(bundle: Bundle, backend: Backend, name: str, alone: bool = False) -> Engine:
    data = bundle.read(name)
    return backend.load(bundle.engines[name], data, alone)
