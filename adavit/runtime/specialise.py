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
from collections import Counter, deque
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from adavit.architecture import Architecture
from adavit.bundle.keys import BlockKey, Sublayers
from adavit.errors import AdaViTError
from adavit.runtime.backend import Backend, Usage, Use
from adavit.runtime.forks import renew_in_fork
from adavit.runtime.policy import Policy

__all__ = ["Specialiser", "usage_from", "usage_of", "usage_to"]

log = logging.getLogger(__name__)

FIRST, MOST_WAIT = 16, 256
"""Images after which usage is looked at first, and at most how many more each time; the number doubles until then."""
HELD = 1024
"""Images that wait to be counted at most, and after how many all that was counted before counts half."""


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
            numbers = {"threads": (threads, 1, 1024), "block": (block, 0, arch.depth - 1)}
            numbers |= {"tokens": (tokens, 1, arch.tokens)}
            fits = all(type(n) is int and low <= n <= high for n, low, high in numbers.values())
            fits = fits and heads == sorted(set(heads) & set(range(arch.heads))) and {attention, mlp} <= {0, 1}
            if not fits or type(often) not in (int, float) or not 0 < often <= 1:
                raise ValueError("it is of another model")
            found[Use(threads, BlockKey(block, Sublayers(bool(attention), bool(mlp)), tuple(heads)), tokens)] = often
    except TypeError:
        raise ValueError("it is no list of uses") from None
    return found


class Specialiser:
    """Prepares what a backend runs faster.

    Args:
        backend: prepares it.
        in_background: whether to do so unasked.
        remember: keeps a usage for the next start.

    Attributes:
        closed: whether nothing more is prepared.
    """

    def __init__(self, backend: Backend, in_background: bool, remember: Callable[[Usage], None]) -> None:
        self._backend, self._remember = backend, remember
        self._in_background = in_background
        self._counts: dict[Use, float] = {}
        self._images = 0.0
        self._seen, self._next, self._wait = 0, FIRST, FIRST
        self._noted: deque[tuple[Policy, int]] = deque(maxlen=HELD)
        self.after_fork()
        renew_in_fork(self)

    def after_fork(self) -> None:
        """Makes lock and thread, in a forked child anew."""
        self._lock, self._due = threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None
        self.closed = False

    def note(self, policy: Policy, threads: int) -> None:
        """Notes what images used that ran on so many threads."""
        if not self._in_background or self.closed:
            return
        self._noted.append((policy, threads))
        self._seen += len(policy)
        if self._seen >= self._next:
            self._next = self._seen + self._wait
            self._wait = min(2 * self._wait, MOST_WAIT)
            self._start()

    def start(self, usage: Usage) -> None:
        """Begins with a usage that is known from before, which weighs as much as the first images."""
        if self._in_background and usage:
            self._count(usage, FIRST)
            self._start()

    def specialise(self, usage: Usage) -> int:
        """Prepares for a usage at once, in the place of what there is; returns how much is prepared."""
        with self._lock:
            wanted = self._backend.choose(usage)
            self._make(wanted)
            return len(self._backend.prepared())

    def close(self) -> None:
        """Ends the thread."""
        self.closed = True
        self._due.set()
        if self._thread is not None:
            self._thread.join()

    def _start(self) -> None:
        if self._thread is None:
            with self._lock:
                if self._thread is None and not self.closed:
                    arguments = weakref.ref(self), self._due
                    self._thread = threading.Thread(target=_work, args=arguments, name="adavit-prepare", daemon=True)
                    weakref.finalize(self, self._due.set)
                    self._thread.start()
                    _running.add(self)
        self._due.set()

    def update(self) -> None:
        """Prepares for what was noted."""
        while self._noted:
            policy, threads = self._noted.popleft()
            self._count(usage_of(policy, threads), len(policy))
        usage = {use: count / self._images for use, count in self._counts.items()}
        with self._lock:
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
        there = set(self._backend.prepared())
        if there == set(wanted):
            return False
        self._backend.keep([one for one in wanted if one in there])
        for one in wanted:
            if self.closed:
                return False
            if one not in there:
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
        except AdaViTError as error:
            log.warning("nothing is prepared for what images use most: %s", error)
            return
        del specialiser


@atexit.register
def _close_all() -> None:
    """Ends the threads before the interpreter does, which may be in native code."""
    for specialiser in list(_running):
        specialiser.close()
