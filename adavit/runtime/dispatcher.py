"""Conditional dispatch: for every image and block, decide, then run only the engines that the policy keeps.

Per image x [N, D] and block i:

    blocks.i.decide            x -> norm1(x), decision logits
    blocks.i.attention         the attention sub-layer on the kept tokens, dropped heads masked
    blocks.i.attention_gather  the same with the kept heads' weights only, which
    blocks.i.attention_weights gathers
    blocks.i.mlp, .mlp_gather, .mlp_weights  likewise the MLP sub-layer

Kept tokens are gathered before a sub-layer and scattered after it. A sub-layer without any kept head is one
vector for all tokens, which the engine `empty` holds. Where a block's choices have an engine of their own, that does
all of it, and decides for the next block:

    blocks.i.attention_set, .mlp_set, .both_set  x, norm1(x), kept tokens -> the same of the next block
    blocks.i.decide_set                          x -> norm1(x), kept tokens, where no block before did that

The stem's does that for the first block, and the last block's makes the logits. Engines of a backend that always
gathers have no norm1(x) between blocks: they compute it of the kept tokens.

A batch's images go through block after block side by side: a block's weights are then still in the cache for the next
image. Workers take the image that waits longest and run one block of it, so that none of them idles.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import wait
from functools import partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from adavit.runtime.backend import Backend, Buffer, Sizes
from adavit.runtime.budget import Offsets
from adavit.runtime.bundle import Bundle
from adavit.runtime.engines import Engines
from adavit.runtime.finite import check_image, not_finite
from adavit.runtime.forks import renew_in_fork
from adavit.runtime.heads import HeadWeights
from adavit.runtime.plan import EnginePlan, HeadSet, sizes_of, sublayers_run
from adavit.runtime.policy import Policy
from adavit.runtime.specialise import DECIDING, STEM, Specialised
from adavit.runtime.state import Scratch, State, Thresholds
from adavit.runtime.worker import worker_pool

__all__ = ["DECISIONS", "Dispatcher", "Observer", "of_engines"]

Float = npt.NDArray[np.float32]
Index = npt.NDArray[np.intp]
T = TypeVar("T")
Observer = Callable[[int, str, npt.NDArray[Any]], None]
"""Told, after every engine: the image's position, the engine's name, and what it made of the tokens [N, D]; before
every block: the position, "decisions." and the block's number, and which tokens, heads and sub-layers it would keep,
bool [N + H + 2]."""
DECISIONS = "decisions."

KEPT_WEIGHTS = 128 << 20
"""Bytes of gathered weights that a runtime keeps."""
SIDE_BY_SIDE = 16
"""Images that go through the blocks together: more tokens than these hold would push the weights from the cache."""


class Dispatcher:
    """Runs images through a bundle's engines.

    Args:
        bundle: what to run.
        backend: loads and runs engines.
        workers: images of a batch that run at once.
        plan: which engines gather weights; may be replaced at any time.

    Attributes:
        arch: the model's shapes; backend, engines, head_weights, specialised: what runs it.
        sizes: those that blocks have engines for, by how often an image has them.
    """

    def __init__(self, bundle: Bundle, backend: Backend, workers: int, plan: EnginePlan) -> None:
        self.arch = bundle.architecture
        self.engines = Engines(bundle, backend)
        self.head_weights = HeadWeights(bundle, backend, self.engines.weights, KEPT_WEIGHTS)
        self.specialised = Specialised(bundle, backend)
        self.sizes: Mapping[Sizes, float] = {}
        self.backend = backend
        self.plan = plan
        self._workers = workers
        self._scratch: list[Scratch] = []
        self._states: list[State] = []
        self.after_fork()
        renew_in_fork(self)

    def after_fork(self) -> None:
        """Makes the threads, in a forked child anew."""
        self._pool = worker_pool(self._workers) if self._workers > 1 else None

    def run(
        self, images: Float, offsets: Offsets, replay: Policy | None = None, observe: Observer | None = None
    ) -> tuple[Float, Policy]:
        """Runs images float32 [B, 3, S, S].

        Args:
            images: normalised pixels.
            offsets: of the decision logits.
            replay: a policy to follow instead of deciding.
            observe: sees what every engine computes.

        Returns:
            Logits [B, C], and the policy.
        """
        batch = len(images)
        logits = np.empty((batch, self.arch.classes), np.float32)
        used = Policy.empty(self.arch, batch) if replay is None else replay
        thresholds = Thresholds.of(offsets, self.arch)
        run = partial(ImageRun, self, images, used, replay is not None, thresholds, logits, observe)
        together = max(SIDE_BY_SIDE, self._workers)
        for start in range(0, batch, together):
            positions = range(start, min(start + together, batch))
            waiting = deque(map(run, positions))
            if self._pool is None or len(waiting) == 1:
                self._work(waiting)
            else:
                workers = [self._pool.submit(self._work, waiting) for _ in range(min(self._workers, len(waiting)))]
                wait(workers)
                for worker in workers:
                    worker.result()
        return logits, used

    def _work(self, waiting: deque[ImageRun]) -> None:
        """Runs a block of the image that waits longest, until none waits; after a failure, none does."""
        scratch = taken(self._scratch.pop) or Scratch(self.arch, self.backend)
        run = taken(waiting.popleft)
        try:
            while run is not None:
                if run.step(scratch, alone=not waiting):
                    waiting.append(run)
                run = taken(waiting.popleft)
        finally:
            while run is not None:
                run.abandon()
                run = taken(waiting.popleft)
            self._scratch.append(scratch)

    def specialise(self, sets: tuple[HeadSet, ...], sizes: Mapping[Sizes, float] | None = None) -> None:
        """Makes engines for sets of heads and frequent sizes in the place of those there are.

        Nothing idle holds the ones before any longer.

        Args:
            sets: of heads.
            sizes: what blocks run with, by how often an image has them; by default none. See `Backend.prepare`.

        Raises:
            BackendError, BundleError: as `Specialised.make`.
        """
        self.specialised.make(sets)
        self.sizes = self.backend.prepare(sizes or {})
        idle, self._states = self._states, []
        while state := taken(idle.pop):
            self.give_state(state)

    @property
    def specialises(self) -> bool:
        """Whether `specialise_for` can make engines."""
        return self.specialised.able

    def specialise_for(self, policy: Policy) -> int:
        """Makes engines for what some images kept most often; returns how many there are, 0 where it cannot."""
        if not self.specialises:
            return 0
        self.specialise(self.specialised.choose(policy), sizes_of(policy))
        return self.own_engines

    @property
    def own_engines(self) -> int:
        """How many engines there are for sets of heads and frequent sizes."""
        return len(self.specialised.sets) + len(self.sizes)

    def take_state(self) -> State:
        """What holds an image on its way, to be given back."""
        return taken(self._states.pop) or State(self.arch, self.backend)

    def give_state(self, state: State) -> None:
        """Takes it back, for other images; it holds no engines that were replaced."""
        state.keep(self.specialised.engines)
        self._states.append(state)


def of_engines(observe: Observer) -> Observer:
    """An observer that is told of engines alone."""

    def observe_engine(position: int, name: str, x: npt.NDArray[Any]) -> None:
        if not name.startswith(DECISIONS):
            observe(position, name, x)

    return observe_engine


def taken(pop: Callable[[], T]) -> T | None:
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
        thresholds: of its decisions.
        logits: the batch's, to be filled, [B, C].
        observe: sees what every engine computes.
        position: its own in the batch.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        images: Float,
        policy: Policy,
        follows: bool,
        thresholds: Thresholds,
        logits: Float,
        observe: Observer | None,
        position: int,
    ) -> None:
        self._dispatcher, self._backend, self._arch = dispatcher, dispatcher.backend, dispatcher.arch
        self._images, self._position = images, position
        self._policy, self._follows, self._thresholds = policy, follows, thresholds
        self._plan = dispatcher.plan  # to the end, whatever comes in its place
        self._logits = logits
        self._observe = observe
        self._state: State | None = None
        self._block = 0
        self._decided = False  # whether what comes behind is known: the block's decisions, or the logits

    def step(self, scratch: Scratch, alone: bool) -> bool:
        """Runs the stem, or then the next block; where no other image waits, everything to the end.

        Returns whether there is more to do.
        """
        state, depth = self._state, self._arch.depth
        if state is None:
            state = self._start()
            if not alone:
                return True
        while self._block < depth:
            index, self._block = self._block, self._block + 1
            if not self._decided:
                self._decide(index, state, scratch)
            if self._observe:
                self._observe(self._position, f"{DECISIONS}{index}", state.decisions(index))
            if self._follows:
                state.follow(self._policy, self._position, index)
            self._decided = self._run(index, state, scratch)
            if not alone and self._block < depth:
                return True
        self._finish(state)
        return False

    def abandon(self) -> None:
        """Gives back what it holds, where it is not done."""
        if self._state is not None:
            self._dispatcher.give_state(self._state)

    def _start(self) -> State:
        """Runs the stem, with the first block's decisions where one engine does both."""
        state = self._state = self._dispatcher.take_state()
        state.start(self._thresholds, self._dispatcher.specialised.engines)
        image = self._images[self._position : self._position + 1]
        if run := state.run_of(STEM, DECIDING):
            run(image)
            self._decided = True
        else:
            self._dispatcher.engines.stem.run([image], [state.image.rows(1)])
        self._show("stem_set" if self._decided else "stem", state)
        return state

    def _finish(self, state: State) -> None:
        """Runs the head on the class token, where the last block's engine has not, and gives the state back."""
        if not self._decided:
            self._dispatcher.engines.head.run([state.x.rows(1)], [state.logits.rows(1)])
        left = (state.logits, state.x) if self._backend.on_host else (state.logits,)
        logits, *tokens = self._backend.fetch(*left)
        self._logits[self._position] = logits[0]
        if self._observe:
            self._observe(self._position, "head", self._logits[self._position])
        check_image(self._position, logits, *tokens)
        if not self._follows:
            state.write(self._policy, self._position)
        self._dispatcher.give_state(state)

    def _show(self, engine: str, state: State) -> None:
        if self._observe:
            self._observe(self._position, engine, self._backend.fetch(state.x)[0])

    def _decide(self, index: int, state: State, scratch: Scratch) -> None:
        """Computes norm1(x), where the block's engines need it, and this block's row of the policy."""
        if run := state.run_of(index, DECIDING):
            run()
            return
        rows = self._arch.tokens
        outputs = [state.normed.rows(rows), *scratch.logits[index]]
        self._dispatcher.engines.blocks[index].decide.run([state.x.rows(rows)], outputs)
        if scratch.decided[index] and (self._observe or not self._follows):
            logits = self._backend.fetch(*scratch.decided[index])
            if not all(np.isfinite(part).all() for part in logits):
                raise not_finite(f"the decisions of block {index} on image {self._position} are")
            state.decide(index, logits)

    def _run(self, index: int, state: State, scratch: Scratch) -> bool:
        """Runs what the policy keeps of a block; returns whether what comes behind is known by it."""
        choices = state.choices[index]
        key = choices.tobytes()
        run = state.run_of(index, key) or self._run_of_any(index, state, key)
        if run is None:
            if choices[-2:].any():
                self._run_sublayers(index, state, scratch)
            return False
        run()
        if self._observe:
            attention, mlp = choices[-2:].tolist()
            self._show(f"blocks.{index}.{sublayers_run(attention, mlp)}_set", state)
        return True

    def _run_of_any(self, index: int, state: State, choices: bytes) -> Callable[[], None] | None:
        """What runs a block in one engine that is given its heads' weights; None where there is no such engine."""
        if (run := state.run_of(index, choices[-2:])) is None:
            return None
        weights = self._dispatcher.head_weights.of(index, choices)
        return None if weights is None else partial(run, *weights)

    def _run_sublayers(self, index: int, state: State, scratch: Scratch) -> None:
        """Runs the kept sub-layers one by one on the kept tokens of the state, whose rows they change."""
        attention, mlp = state.choices[index][-2:].tolist()
        backend = self._backend
        kept, heads = state.tokens[index].nonzero()[0], state.choices[index][:-2].nonzero()[0]
        count, all_kept = len(kept), len(kept) == self._arch.tokens
        rows, normed = state.x, state.normed
        if not all_kept:
            rows = scratch.rows
            backend.gather(state.x, kept, rows)
            if attention and len(heads):
                normed = scratch.normed_rows
                backend.gather(state.normed, kept, normed)
        if attention:
            engine = self._attention(index, rows, normed, heads, count, scratch.first)
            rows = scratch.first
            if self._observe:
                behind = backend.fetch(state.x)[0].copy()
                behind[kept] = backend.fetch(rows)[0][:count]
                self._observe(self._position, f"blocks.{index}.{engine}", behind)
        if mlp:
            into = state.x if all_kept and attention else scratch.second  # no engine fills what it reads
            engine = self._mlp(index, rows, heads, count, into)
            rows = into
        if rows is not state.x:
            backend.scatter(rows, kept, state.x)
        if mlp:
            self._show(f"blocks.{index}.{engine}", state)

    def _attention(self, index: int, x: Buffer, normed: Buffer, heads: Index, count: int, out: Buffer) -> str:
        """Runs attention on the first rows of x; returns the name of the engine."""
        if not len(heads):
            self._backend.add(x, count, self._dispatcher.engines.empty[0], index, out)
            return "attention"
        block = self._dispatcher.engines.blocks[index]
        inputs, outputs = [x.rows(count), normed.rows(count)], [out.rows(count)]
        if block.attention_gather is not None:
            if self._plan.gathers[count][len(heads)][0]:
                weights = self._dispatcher.head_weights.attention(index, heads)
                block.attention_gather.run([*inputs, *weights], outputs)
                return "attention_gather"
            inputs.append(self._dispatcher.head_weights.named(heads)[1])
        block.attention.run(inputs, outputs)
        return "attention"

    def _mlp(self, index: int, x: Buffer, heads: Index, count: int, out: Buffer) -> str:
        """Runs the MLP on the first rows of x; returns the name of the engine."""
        if not len(heads):
            self._backend.add(x, count, self._dispatcher.engines.empty[1], index, out)
            return "mlp"
        block = self._dispatcher.engines.blocks[index]
        inputs, outputs = [x.rows(count)], [out.rows(count)]
        if block.mlp_gather is not None:
            named = self._dispatcher.head_weights.named(heads)
            if self._plan.gathers[count][len(heads)][1]:
                weights = self._dispatcher.head_weights.mlp(index, heads)
                block.mlp_gather.run([*inputs, named[0], *weights], outputs)
                return "mlp_gather"
            inputs.append(named[1])
        block.mlp.run(inputs, outputs)
        return "mlp"
