"""Conditional dispatch: for every image and block, decide, then run only the engines that the policy keeps.

Per image x [N, D] and block i:

    blocks.i.decide            x -> norm1(x), decision logits
    blocks.i.attention         the attention sub-layer on the kept tokens, dropped heads masked
    blocks.i.attention_gather  the same with the kept heads' weights only, which
    blocks.i.attention_weights gathers
    blocks.i.mlp, .mlp_gather, .mlp_weights  likewise the MLP sub-layer

Kept tokens are gathered before a sub-layer and scattered after it. A sub-layer without any kept head is one
vector for all tokens, which the engine `empty` holds.

A batch's images go through block after block side by side: a block's weights are then still in the cache for the next
image. Workers take the image that waits longest and run one block of it, so that none of them idles.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from adavit.architecture import TOKEN_LOGIT, Architecture
from adavit.macs import block_macs, outside_macs
from adavit.runtime.backend import Backend, Buffer
from adavit.runtime.budget import Offsets
from adavit.runtime.bundle import Bundle
from adavit.runtime.engines import BlockEngines, Engines
from adavit.runtime.heads import HeadWeights
from adavit.runtime.plan import EnginePlan
from adavit.runtime.policy import Policy
from adavit.runtime.specialise import Specialised

__all__ = ["Dispatcher", "Observer"]

Float = npt.NDArray[np.float32]
Index = npt.NDArray[np.intp]
Observer = Callable[[int, str, Float], None]
"""Told, after every engine: the image's position, the engine's name, and what it made of the tokens [N, D]."""

CLASS_TOKEN = np.zeros(1, np.intp)
KEPT_WEIGHTS = 128 << 20
"""Bytes of gathered weights that a runtime keeps."""
SIDE_BY_SIDE = 16
"""Images that go through the blocks together: more tokens than these hold would push the weights from the cache."""


class Thresholds(NamedTuple):
    """What logits have to exceed, each [L]."""

    tokens: Float
    heads: Float
    sublayers: Float

    @staticmethod
    @lru_cache(64)
    def of(offsets: Offsets, depth: int) -> Thresholds:
        """The model's own, less the offsets."""
        tokens, heads, sublayers = np.asarray(offsets.by_block(depth))
        return Thresholds(*(kind.astype(np.float32) for kind in (TOKEN_LOGIT - tokens, -heads, -sublayers)))


class Tokens(NamedTuple):
    """One image's tokens: as the stem makes them, [1, N, D], and the same memory as [N, D]."""

    image: Buffer
    rows: Buffer

    @classmethod
    def empty(cls, arch: Architecture, backend: Backend) -> Tokens:
        """New memory."""
        image = backend.buffer((1, arch.tokens, arch.width))
        return cls(image, image.part(0))


class Scratch:
    """A worker's buffers; what they hold is of use within one block of one image.

    Attributes:
        first, second: the tokens behind a sub-layer; may change places with an image's.
        normed: norm1 of the tokens [N, D].
        rows, normed_rows: the kept rows of the tokens and of normed.
        decided: for each block, the buffers that hold its decisions' logits: those of tokens [N, 1] where they are
            decided on, and those of heads and sub-layers [1, H + 2] where these are.
        decide: for each block, the rows that its engine `decide` fills: those of normed, then the decisions'.
    """

    def __init__(self, arch: Architecture, backend: Backend) -> None:
        self.first, self.second = (Tokens.empty(arch, backend) for _ in range(2))
        self.normed, self.rows, self.normed_rows = (backend.buffer((arch.tokens, arch.width)) for _ in range(3))
        tokens = [backend.buffer((arch.tokens, 1))] if arch.token_policy else []
        choices = backend.buffer((1, arch.head_policy * arch.heads + arch.sublayer_policy * 2))
        normed, logits = self.normed.rows(arch.tokens), [buffer.rows(arch.tokens) for buffer in tokens]
        self.decided: list[list[Buffer]] = []
        self.decide: list[list[Any]] = []
        for block in range(arch.depth):
            chooses = arch.adapts_heads(block) or arch.adapts_sublayers(block)
            self.decided.append([*tokens, choices] if chooses else tokens)
            self.decide.append([normed, *logits, choices.rows(1)] if chooses else [normed, *logits])


class Dispatcher:
    """Runs images through a bundle's engines.

    Args:
        bundle: what to run.
        backend: loads and runs engines.
        workers: images of a batch that run at once.
        plan: which engines gather weights; may be replaced at any time.

    Attributes:
        arch: the model's shapes; backend, engines, head_weights, specialised: what runs it.
    """

    def __init__(self, bundle: Bundle, backend: Backend, workers: int, plan: EnginePlan) -> None:
        self.arch = bundle.architecture
        self.engines = Engines(bundle, backend)
        self.head_weights = HeadWeights(bundle, backend, self.engines.blocks, KEPT_WEIGHTS)
        self.specialised = Specialised(bundle, backend, self.head_weights)
        self.backend = backend
        self.plan = plan
        self._workers = workers
        self._pool = ThreadPoolExecutor(workers, "adavit") if workers > 1 else None
        self._scratch: list[Scratch] = []
        self._tokens: list[Tokens] = []

    def run(
        self, images: Float, offsets: Offsets, replay: Policy | None = None, observe: Observer | None = None
    ) -> tuple[Float, Policy, npt.NDArray[np.int64]]:
        """Runs images float32 [B, 3, S, S].

        Args:
            images: normalised pixels.
            offsets: of the decision logits.
            replay: a policy to follow instead of deciding.
            observe: sees what every engine computes.

        Returns:
            Logits [B, C], the policy, and the MACs of every image, int64 [B].
        """
        arch, batch, backend = self.arch, len(images), self.backend
        used = Policy.dense(arch, batch) if replay is None else replay
        classes, macs = backend.buffer((batch, arch.width)), np.full(batch, outside_macs(arch))
        thresholds = Thresholds.of(offsets, arch.depth) if replay is None else None
        for start in range(0, batch, SIDE_BY_SIDE):
            positions = range(start, min(start + SIDE_BY_SIDE, batch))
            self._run_side_by_side(
                ImageRun(self, images[position : position + 1], position, used, thresholds, classes, macs, observe)
                for position in positions
            )
        output = backend.buffer((batch, arch.classes))
        self.engines.head.run([classes.rows(batch)], [output.rows(batch)])
        (logits,) = backend.fetch(output)
        if observe:
            for position in range(batch):
                observe(position, "head", logits[position])
        return logits, used, macs

    def _run_side_by_side(self, runs: Iterable[ImageRun]) -> None:
        waiting = deque(runs)
        if self._pool is None or len(waiting) == 1:
            self._work(waiting)
        else:
            list(self._pool.map(self._work, [waiting] * min(self._workers, len(waiting))))

    def _work(self, waiting: deque[ImageRun]) -> None:
        """Runs a block of the image that waits longest, until none waits."""
        scratch = taken(self._scratch) or Scratch(self.arch, self.backend)
        while True:
            try:
                run = waiting.popleft()
            except IndexError:  # another worker may have taken the last one since
                break
            if run.step(scratch):
                waiting.append(run)
        self._scratch.append(scratch)

    def take_tokens(self) -> Tokens:
        """Memory for an image's tokens, to be given back."""
        return taken(self._tokens) or Tokens.empty(self.arch, self.backend)

    def give_tokens(self, tokens: Tokens) -> None:
        """Takes an image's memory back."""
        self._tokens.append(tokens)


def taken(spare: list[Any]) -> Any:
    """One of what is spare, or None; from any thread."""
    try:
        return spare.pop()
    except IndexError:
        return None


class ImageRun:
    """One image on its way through the blocks.

    Args:
        dispatcher: what runs it.
        image: [1, 3, S, S].
        position: its own in the batch.
        policy: the batch's, to be filled, or followed where there are no thresholds.
        thresholds: of its decisions.
        classes: where the last block's class token goes, [B, D].
        macs: where those of its blocks are added, [B].
        observe: sees what every engine computes.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        image: Float,
        position: int,
        policy: Policy,
        thresholds: Thresholds | None,
        classes: Buffer,
        macs: npt.NDArray[np.int64],
        observe: Observer | None,
    ) -> None:
        self._dispatcher, self._backend, self._arch = dispatcher, dispatcher.backend, dispatcher.arch
        self._image, self._position = image, position
        self._policy = policy.tokens[position], policy.heads[position], policy.sublayers[position]
        self._thresholds = thresholds
        self._classes, self._macs = classes, macs
        self._observe = observe
        self._x: Tokens | None = None
        self._block = 0

    def step(self, scratch: Scratch) -> bool:
        """Runs the stem, or then the next block; returns whether there is more to do."""
        if self._x is None:
            self._x = self._dispatcher.take_tokens()
            self._dispatcher.engines.stem.run([self._image], [self._x.image.rows(1)])
            self._show("stem", self._x.rows)
            return True
        index, self._block = self._block, self._block + 1
        block = self._dispatcher.engines.blocks[index]
        self._decide(index, block, self._x.rows, scratch)
        attention, mlp = self._policy[2][index].tolist()
        if attention or mlp:
            self._x = self._run_sublayers(index, block, self._x, scratch, attention, mlp)
        if self._block < self._arch.depth:
            return True
        self._backend.gather(self._x.rows, CLASS_TOKEN, self._classes, self._position)
        self._dispatcher.give_tokens(self._x)
        return False

    def _show(self, engine: str, x: Buffer) -> None:
        if self._observe:
            self._observe(self._position, engine, self._backend.fetch(x)[0])

    def _decide(self, index: int, block: BlockEngines, x: Buffer, scratch: Scratch) -> None:
        """Computes norm1(x), and this block's row of the policy: kept is what is strictly above its threshold."""
        arch, thresholds = self._arch, self._thresholds
        block.decide.run([x.rows(arch.tokens)], scratch.decide[index])
        if thresholds is None or not scratch.decided[index]:
            return
        tokens, heads, sublayers = self._policy
        logits = self._backend.fetch(*scratch.decided[index])
        if arch.token_policy:
            np.greater(logits[0][1:, 0], thresholds.tokens[index], out=tokens[index, 1:])
        choices = logits[-1][0]
        if arch.adapts_heads(index):
            np.greater(choices[: arch.heads], thresholds.heads[index], out=heads[index])
        if arch.adapts_sublayers(index):
            np.greater(choices[-2:], thresholds.sublayers[index], out=sublayers[index])

    def _run_sublayers(
        self, index: int, block: BlockEngines, x: Tokens, scratch: Scratch, attention: bool, mlp: bool
    ) -> Tokens:
        """Runs the kept sub-layers on the kept tokens of x, and returns x with their rows changed."""
        backend = self._backend
        kept, heads = (masks[index].nonzero()[0] for masks in self._policy[:2])
        count, all_kept = len(kept), len(kept) == self._arch.tokens
        self._macs[self._position] += block_macs(self._arch, count, len(heads), attention, mlp)
        rows, normed = x.rows, scratch.normed
        if not all_kept:
            rows = scratch.rows
            backend.gather(x.rows, kept, rows)
            if attention:
                normed = scratch.normed_rows
                backend.gather(scratch.normed, kept, normed)
        if attention:
            engine = self._attention(index, block, rows, normed, heads, count, scratch.first.rows)
            rows = scratch.first.rows
            if self._observe:
                behind = backend.fetch(x.rows)[0].copy()
                behind[kept] = backend.fetch(rows)[0][:count]
                self._observe(self._position, f"blocks.{index}.{engine}", behind)
        if mlp:
            engine = self._mlp(index, block, rows, heads, count, scratch.second.rows)
            rows = scratch.second.rows
        if not all_kept:
            backend.scatter(rows, kept, x.rows)
        elif mlp:
            x, scratch.second = scratch.second, x
        else:
            x, scratch.first = scratch.first, x
        if mlp:
            self._show(f"blocks.{index}.{engine}", x.rows)
        return x

    def _attention(
        self, index: int, block: BlockEngines, x: Buffer, normed: Buffer, heads: Index, count: int, out: Buffer
    ) -> str:
        """Runs attention on the first rows of x; returns the name of the engine."""
        if not len(heads):
            self._backend.add(x, count, self._dispatcher.engines.empty[0], index, out)
            return "attention"
        inputs, outputs = [x.rows(count), normed.rows(count)], [out.rows(count)]
        if block.attention_gather is not None:
            if own := self._dispatcher.specialised.engines.get((index, "attention", heads.tobytes())):
                own.run(inputs, outputs)
                return "attention_set"
            if self._dispatcher.plan.gathers[count][len(heads)][0]:
                weights = self._dispatcher.head_weights.attention(index, heads)
                block.attention_gather.run([*inputs, *weights], outputs)
                return "attention_gather"
            inputs.append(self._dispatcher.head_weights.named(heads)[1])
        block.attention.run(inputs, outputs)
        return "attention"

    def _mlp(self, index: int, block: BlockEngines, x: Buffer, heads: Index, count: int, out: Buffer) -> str:
        """Runs the MLP on the first rows of x; returns the name of the engine."""
        if not len(heads):
            self._backend.add(x, count, self._dispatcher.engines.empty[1], index, out)
            return "mlp"
        inputs, outputs = [x.rows(count)], [out.rows(count)]
        if block.mlp_gather is not None:
            if own := self._dispatcher.specialised.engines.get((index, "mlp", heads.tobytes())):
                own.run(inputs, outputs)
                return "mlp_gather"
            named = self._dispatcher.head_weights.named(heads)
            if self._dispatcher.plan.gathers[count][len(heads)][1]:
                weights = self._dispatcher.head_weights.mlp(index, heads)
                block.mlp_gather.run([*inputs, named[0], *weights], outputs)
                return "mlp_gather"
            inputs.append(named[1])
        block.mlp.run(inputs, outputs)
        return "mlp"
