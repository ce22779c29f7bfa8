"""Engines for what images use most, made in the background while images run, and remembered for the next start.

A backend can run some blocks faster that it knows beforehand: with the weights of a set of heads as constants, say. So
what each image used is noted. From time to time the backend is asked what to prepare for it, which one thread then
makes, one after the other. No request waits for it. Results are the same to rounding.
"""

from __future__ import annotations

import atexit
import logging
import threading
import weakref
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Hashable, Sequence
from functools import cached_property
from typing import Any

from adavit.architecture import Architecture
from adavit.bundle.bundle import Bundle
from adavit.bundle.keys import BlockKey, Sublayers
from adavit.bundle.policy import Policy
from adavit.errors import AdaViTError, one_line
from adavit.runtime.backend import Backend, Options, Usage, Use
from adavit.runtime.cache import facts, kept_any, kept_at, recall, remember
from adavit.runtime.forks import renew_in_fork, undisturbed

__all__ = ["KeptUsage", "Specialiser", "usage_from", "usage_of", "usage_to"]

log = logging.getLogger(__name__)

FIRST, MOST_WAIT = 16, 256
"""Images after which usage is looked at first, and at most how many more each time; the number doubles until then."""
HELD = 1024
"""Images that wait to be counted at most, and after how many all that was counted before counts half."""
KEPT = "usage"
"""Of what is kept in the cache folder: what images used."""
MOST_USES = 2048
"""That are kept there."""


def usage_of(policy: Policy, threads: int) -> Usage:
    """What images used, as `Backend.choose` takes it."""
    counted: Counter[Use] = Counter()
    tokens = policy.tokens.sum(2)
    for image, heads, sublayers in zip(range(len(policy)), policy.heads, policy.sublayers, strict=True):
        for block in sublayers.any(1).nonzero()[0].tolist():
            kept = tuple(heads[block].nonzero()[0].tolist())
            key = BlockKey(block, Sublayers(*sublayers[block].tolist()), kept)
            counted[Use(threads, key, int(tokens[image, block]))] += 1
    return {use: count / len(policy) for use, count in counted.items()}


def usage_to(usage: Usage) -> list[list[Any]]:
    """As plain JSON values."""
    return [
        [use.threads, use.key.block, *map(int, use.key.sublayers), list(use.key.heads), use.tokens, often]
        for use, often in usage.items()
    ]


def usage_from(values: Any, arch: Architecture) -> Usage:
    """Reads what `usage_to` wrote; raises ValueError where it is not of this architecture."""
    found: dict[Use, float] = {}
    try:
        for threads, block, attention, mlp, heads, tokens, often in values:
            fewest = 1 if arch.token_policy else arch.tokens
            numbers = (threads, 1, 1024), (block, 0, arch.depth - 1), (tokens, fewest, arch.tokens)
            fits = all(type(n) is int and low <= n <= high for n, low, high in numbers)
            fits = fits and {attention, mlp} <= {0, 1} and (attention + mlp == 2 or arch.adapts_sublayers(block))
            all_heads = list(range(arch.heads))
            fits = fits and heads == (sorted(set(heads) & set(all_heads)) if arch.adapts_heads(block) else all_heads)
            if not fits or type(often) not in (int, float) or not 0 < often <= 1:
                raise ValueError("it is of another model")
            found[Use(threads, BlockKey(block, Sublayers(bool(attention), bool(mlp)), tuple(heads)), tokens)] = often
    except TypeError:
        raise ValueError("it is no list of uses") from None
    return found


def condensed(usage: Usage) -> Usage:
    """The most frequent uses, few enough to be kept; where there are more, those of a block and heads become one."""
    if len(usage) > MOST_USES:
        sums: dict[tuple[int, BlockKey], list[float]] = defaultdict(lambda: [0.0, 0.0])
        for use, often in usage.items():
            of = sums[use.threads, use.key]
            of[0] += often
            of[1] += often * use.tokens
        usage = {Use(*name, round(tokens / often)): min(1.0, often) for name, (often, tokens) in sums.items()}
    return dict(sorted(usage.items(), key=lambda item: -item[1])[:MOST_USES])


class KeptUsage:
    """What images used on this machine, in the user's cache folder.

    Args:
        bundle: that runs.
        options: how it runs.
        backend: the name of what runs it.
        precision: of its graphs.
    """

    def __init__(self, bundle: Bundle, options: Options, backend: str, precision: str) -> None:
        self._bundle, self._options = bundle, options
        self._how = {"backend": backend, "precision": precision}

    @cached_property
    def _known(self) -> dict[str, Any]:
        """What it depends on; it takes a while to find out."""
        return facts(self._bundle, self._options) | self._how

    def remember(self, usage: Usage) -> None:
        """Keeps a usage for the next start."""
        remember(KEPT, self._known, {"usage": usage_to(condensed(usage))})

    def recall(self) -> Usage:
        """What was kept; empty where there is nothing of use."""
        found = recall(KEPT, self._known) if kept_any(KEPT) else None
        try:
            return {} if found is None else usage_from(found.get("usage"), self._bundle.architecture)
        except ValueError as error:
            log.warning("%s is of no use (%s)", kept_at(KEPT, self._known), one_line(error))
            return {}


class Specialiser:
    """Prepares what a backend runs faster.

    Args:
        backend: prepares it.
        in_background: whether to do so unasked.
        remember: keeps a usage for the next start.

    Attributes:
        in_background: whether something is prepared unasked.
        closed: whether nothing more is prepared.
    """

    def __init__(self, backend: Backend, in_background: bool, remember: Callable[[Usage], None]) -> None:
        self._backend, self._remember = backend, remember
        self.in_background = in_background
        self._counts: dict[Use, float] = {}
        self._images = 0.0
        self._seen, self._taken, self._next, self._wait = 0, 0, FIRST, FIRST
        self._noted: deque[tuple[Policy, int]] = deque()
        self.after_fork()
        renew_in_fork(self)

    def after_fork(self) -> None:
        """Makes locks and thread, in a forked child anew."""
        self._preparing, self._starting, self._due = threading.Lock(), threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None
        self.closed = False

    def note(self, policy: Policy, threads: int) -> None:
        """Notes what images used that ran on so many threads."""
        if not self.in_background or self.closed:
            return
        if self._seen - self._taken < HELD:
            some = policy[:HELD]
            self._noted.append((Policy(*(mask.copy() for mask in some.masks())), threads))
            self._seen += len(some)
        if self._seen >= self._next:
            self._next = self._seen + self._wait
            self._wait = min(2 * self._wait, MOST_WAIT)
            self._start()

    def start(self, usage: Usage) -> None:
        """Begins with a usage that is known from before, which weighs as much as the first images."""
        if self.in_background and usage:
            self._count(usage, FIRST)
            self._start()

    def specialise(self, usage: Usage, images: int) -> int:
        """Prepares for what so many images used at once, in the place of what there is and of what was noted.

        Returns how much is prepared.
        """
        with self._preparing:
            self._counts.clear()
            self._images = 0.0
            self._count(usage, images)
            self._make(self._backend.choose(usage))
            return len(self._backend.prepared())

    def stop(self) -> None:
        """Prepares nothing more, but for what is under way."""
        self.closed = True
        self._due.set()

    def close(self) -> None:
        """Stops, and waits until the thread has ended."""
        self.stop()
        if self._thread is not None:
            self._thread.join()

    def _start(self) -> None:
        if self._thread is None:
            with self._starting:
                if self._thread is None and not self.closed:
                    arguments = weakref.ref(self), self._due
                    self._thread = threading.Thread(target=_work, args=arguments, name="adavit-prepare", daemon=True)
                    self._thread.start()
                    _running.add(self)
        self._due.set()

    def update(self) -> None:
        """Prepares for what was noted."""
        with self._preparing:
            while self._noted:
                policy, threads = self._noted.popleft()
                self._taken += len(policy)
                self._count(usage_of(policy, threads), len(policy))
            usage = {use: count / self._images for use, count in self._counts.items()}
            if self._make(self._backend.choose(usage)):
                self._remember(usage)

    def _count(self, usage: Usage, images: int) -> None:
        if self._images >= HELD:
            self._images /= 2
            self._counts = {use: count / 2 for use, count in self._counts.items() if count >= 1}
        self._images += images
        for use, often in usage.items():
            self._counts[use] = self._counts.get(use, 0.0) + often * images

    def _make(self, wanted: Sequence[Hashable]) -> bool:
        """Prepares all of these and lets go of others; returns whether anything changed."""
        prepared = set(self._backend.prepared())
        if prepared == set(wanted):
            return False
        self._backend.retain([one for one in wanted if one in prepared])
        for one in wanted:
            if self.closed:
                return False
            if one not in prepared:
                with undisturbed:
                    self._backend.prepare(one)
        return True


_running: weakref.WeakSet[Specialiser] = weakref.WeakSet()


def _work(of: weakref.ref[Specialiser], due: threading.Event) -> None:
    """What the thread does while its specialiser lives."""
    while True:
        due.wait()
        due.clear()
        specialiser = of()
        if specialiser is None or specialiser.closed:
            return
        try:
            specialiser.update()
        except Exception as error:  # also of another library, or of no memory: images run all the same
            why = error if isinstance(error, AdaViTError) else f"{type(error).__name__}: {one_line(error)}"
            log.warning("nothing more is prepared for what images use most: %s", why)
            specialiser.in_background = False
            return
        del specialiser


@atexit.register
def _close_all() -> None:
    """Ends the threads before the interpreter does, which may be in native code."""
    for specialiser in list(_running):
        specialiser.close()
