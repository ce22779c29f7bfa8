"""Conditional dispatch: for every image and block, decide, then run only the engines that the policy keeps.

Per image x [N, D] and block i:

    blocks.i.decide            x -> norm1(x), decision logits
    blocks.i.attention         the attention sub-layer on the kept tokens, dropped heads masked
    blocks.i.attention_gather  the same with the kept heads' weights only, which
    blocks.i.attention_weights gathers
    blocks.i.mlp, .mlp_gather, .mlp_weights  likewise the MLP sub-layer

Kept tokens are gathered before a sub-layer and scattered after it. A sub-layer without any kept head is one
vector for all tokens, which the engine `empty` holds.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from adavit.architecture import TOKEN_LOGIT, Architecture
from adavit.macs import image_macs
from adavit.runtime.backend import Backend, Buffer
from adavit.runtime.budget import Offsets
from adavit.runtime.bundle import Bundle
from adavit.runtime.engines import BlockEngines, Engines
from adavit.runtime.heads import HeadWeights
from adavit.runtime.plan import EnginePlan
from adavit.runtime.policy import Policy

__all__ = ["Dispatcher", "Observer"]

Float = npt.NDArray[np.float32]
Index = npt.NDArray[np.intp]
Observer = Callable[[int, str, Float], None]
"""Told, after every engine: the image's position, the engine's name, and what it made of the tokens [N, D]."""

CLASS_TOKEN = np.zeros(1, np.intp)
KEPT_WEIGHTS = 128 << 20
"""Bytes of gathered weights that a runtime keeps."""


class Scratch:
    """One image's buffers; reused from image to image.

    Attributes:
        first, second: the tokens behind a sub-layer [N, D], taking turns.
        normed: norm1 of the tokens.
        rows, normed_rows: the kept rows of the tokens and of normed.
        decided: for each block, the buffers that hold its decisions' logits: those of tokens [N, 1] where they are
            decided on, and those of heads and sub-layers [1, H + 2] where these are.
        decide: for each block, the rows that its engine `decide` fills: those of normed, then the decisions'.
    """

    def __init__(self, arch: Architecture, backend: Backend) -> None:
        buffers = [backend.buffer((arch.tokens, arch.width)) for _ in range(5)]
        self.first, self.second, self.normed, self.rows, self.normed_rows = buffers
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
        arch: the model's shapes; backend, engines, head_weights: what runs it.
    """

    def __init__(self, bundle: Bundle, backend: Backend, workers: int, plan: EnginePlan) -> None:
        self.arch = bundle.architecture
        self.engines = Engines(bundle, backend)
        self.head_weights = HeadWeights(bundle, backend, self.engines.blocks, KEPT_WEIGHTS)
        self.backend = backend
        self.plan = plan
        self._pool = ThreadPoolExecutor(workers, "adavit") if workers > 1 else None
        self._scratch: list[Scratch] = []

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
        tokens = backend.buffer((batch, arch.tokens, arch.width))
        self.engines.stem.run([images], [tokens.rows(batch)])
        used = Policy.dense(arch, batch) if replay is None else replay
        classes = backend.buffer((batch, arch.width))

        def run_image(position: int) -> None:
            scratch = self._spare_scratch()
            masks = used.tokens[position], used.heads[position], used.sublayers[position]
            see = None if observe is None else lambda engine, x: observe(position, engine, x)
            run = ImageRun(self, scratch, masks, offsets if replay is None else None, see)
            x = run(tokens.part(position))
            backend.gather(x, CLASS_TOKEN, classes, position)
            self._scratch.append(scratch)

        if self._pool is None or batch == 1:
            for position in range(batch):
                run_image(position)
        else:
            list(self._pool.map(run_image, range(batch)))
        output = backend.buffer((batch, arch.classes))
        self.engines.head.run([classes.rows(batch)], [output.rows(batch)])
        (logits,) = backend.fetch(output)
        if observe:
            for position in range(batch):
                observe(position, "head", logits[position])
        return logits, used, image_macs(arch, used.tokens, used.heads, used.sublayers)

    def _spare_scratch(self) -> Scratch:
        try:
            return self._scratch.pop()
        except IndexError:
            return Scratch(self.arch, self.backend)


class ImageRun:
    """One image on its way through the blocks, deciding with `offsets`, or following `masks` without them."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        scratch: Scratch,
        masks: tuple[npt.NDArray[np.bool_], ...],
        offsets: Offsets | None,
        see: Callable[[str, Float], None] | None,
    ) -> None:
        self._dispatcher, self._backend = dispatcher, dispatcher.backend
        self._arch = dispatcher.arch
        self._scratch = scratch
        self._tokens, self._heads, self._sublayers = masks
        self._offsets = offsets
        self._see = see
        self._spare = [scratch.first, scratch.second]

    def __call__(self, x: Buffer) -> Buffer:
        """Takes the stem's tokens [N, D], which it may write over, through the blocks."""
        self._show("stem", x)
        for index, block in enumerate(self._dispatcher.engines.blocks):
            self._decide(index, block, x)
            attention, mlp = self._sublayers[index].tolist()
            if attention or mlp:
                x = self._run_sublayers(index, block, x, attention, mlp)
        return x

    def _show(self, engine: str, x: Buffer) -> None:
        if self._see:
            self._see(engine, self._backend.fetch(x)[0])

    def _decide(self, index: int, block: BlockEngines, x: Buffer) -> None:
        """Computes norm1(x), and this block's row of the policy: kept is what is strictly above its threshold."""
        arch, scratch = self._arch, self._scratch
        block.decide.run([x.rows(arch.tokens)], scratch.decide[index])
        offsets = self._offsets
        if offsets is None or not scratch.decided[index]:
            return
        logits = self._backend.fetch(*scratch.decided[index])
        if arch.token_policy:
            np.greater(logits[0][1:, 0], np.float32(TOKEN_LOGIT - offsets.tokens), out=self._tokens[index, 1:])
        choices = logits[-1][0]
        if arch.adapts_heads(index):
            np.greater(choices[: arch.heads], np.float32(-offsets.heads), out=self._heads[index])
        if arch.adapts_sublayers(index):
            np.greater(choices[-2:], np.float32(-offsets.sublayers), out=self._sublayers[index])

    def _run_sublayers(self, index: int, block: BlockEngines, x: Buffer, attention: bool, mlp: bool) -> Buffer:
        """Runs the kept sub-layers on the kept tokens of x, and returns x with their rows changed."""
        backend, scratch, spare = self._backend, self._scratch, self._spare
        kept, heads = self._tokens[index].nonzero()[0], self._heads[index].nonzero()[0]
        count, all_kept = len(kept), len(kept) == self._arch.tokens
        rows, normed = x, scratch.normed
        if not all_kept:
            rows = scratch.rows
            backend.gather(x, kept, rows)
            if attention:
                normed = scratch.normed_rows
                backend.gather(scratch.normed, kept, normed)
        if attention:
            engine = self._attention(index, block, rows, normed, heads, count)
            rows = spare[0]
            if self._see:
                behind = backend.fetch(x)[0].copy()
                behind[kept] = backend.fetch(rows)[0][:count]
                self._see(f"blocks.{index}.{engine}", behind)
        if mlp:
            engine = self._mlp(index, block, rows, heads, count)
            rows = spare[1]
        if all_kept:
            x, spare[mlp] = rows, x
        else:
            backend.scatter(rows, kept, x)
        if mlp:
            self._show(f"blocks.{index}.{engine}", x)
        return x

    def _attention(self, index: int, block: BlockEngines, x: Buffer, normed: Buffer, heads: Index, count: int) -> str:
        """Runs attention on the first rows of x into the first spare buffer; returns the name of the engine."""
        out = self._spare[0]
        if not len(heads):
            self._backend.add(x, count, self._dispatcher.engines.empty[0], index, out)
            return "attention"
        inputs, outputs = [x.rows(count), normed.rows(count)], [out.rows(count)]
        if block.attention_gather is not None:
            if self._dispatcher.plan.gathers[count][len(heads)][0]:
                weights = self._dispatcher.head_weights.attention(index, heads)
                block.attention_gather.run([*inputs, *weights], outputs)
                return "attention_gather"
            inputs.append(self._channels(index))
        block.attention.run(inputs, outputs)
        return "attention"

    def _mlp(self, index: int, block: BlockEngines, x: Buffer, heads: Index, count: int) -> str:
        """Runs the MLP on the first rows of x into the second spare buffer; returns the name of the engine."""
        out = self._spare[1]
        if not len(heads):
            self._backend.add(x, count, self._dispatcher.engines.empty[1], index, out)
            return "mlp"
        inputs, outputs = [x.rows(count)], [out.rows(count)]
        if block.mlp_gather is not None:
            if self._dispatcher.plan.gathers[count][len(heads)][1]:
                weights = self._dispatcher.head_weights.mlp(index, heads)
                block.mlp_gather.run([*inputs, heads, *weights], outputs)
                return "mlp_gather"
            inputs.append(self._channels(index))
        block.mlp.run(inputs, outputs)
        return "mlp"

    def _channels(self, index: int) -> Float:
        """1 for the channels [D] of kept heads, 0 for the others."""
        return np.repeat(self._heads[index].astype(np.float32), self._arch.head_width)
