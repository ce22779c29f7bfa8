"""How far a command is: one bar with the time left on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple

import click

from adavit.errors import printable

__all__ = ["Estimate", "Progress", "Stage", "time_left"]

OFF = "ADAVIT_PROGRESS"
"""The environment variable that turns progress off, where it is 0."""
GAPS = (5.0, 10.0, 20.0, 30.0)
"""Seconds before the first line without a terminal, and between those that follow; the last is repeated."""
REDRAWN = 0.1
"""Seconds between two bars at least."""
TICK = 1.0
"""Seconds after which the time left is shown anew, whatever the work tells."""
TOLD = 0.02
"""The share of a stage from which on its own pace counts."""
OVERDUE = 1.5
"""How often as long as until now a stage takes that is overdue and tells nothing."""
WIDTH = 20


class Stage(NamedTuple):
    """A part of a command's work.

    Attributes:
        name: how a stage's text begins: "exporting" is that of "exporting blocks.0.mlp".
        seconds: about how long it takes for the demo, on two cores.
        fixed_duration: whether it takes as long for any model on any machine.
    """

    name: str
    seconds: float
    fixed_duration: bool = False


class Estimate:
    """How much of a command's work is done, and how long the rest takes.

    The stage that runs is judged by its own pace. Those to come are judged by their seconds, times what the stages
    before took of theirs. A stage that nobody expected has its own pace alone.

    Args:
        stages: those to be expected, in order; some may not come.
        now: the time, in seconds of any clock.
    """

    def __init__(self, stages: Sequence[Stage], now: float) -> None:
        self._stages = list(stages)
        self._next = 0  # the first of them that may come yet
        self._stage = Stage("", 0.0, fixed_duration=True)
        self._began = self._entered = self._updated = now
        self._part = self._share = 0.0
        self._taken = self._expected = 0.0  # by the stages before, as far as their lengths scale

    def update(self, text: str, part: float, now: float) -> None:
        """Notes that `part` of a stage is done; one that begins again is another stage."""
        if not text.startswith(self._stage.name) or not self._stage.name or part < self._part:
            self._enter(text, self._updated if part else now)  # one that is told of late began before
        self._part, self._updated = part, now

    def _enter(self, text: str, began: float) -> None:
        if self._stage.name:
            if not self._stage.fixed_duration:
                self._taken += began - self._entered
                self._expected += self._stage.seconds
            self._entered = began
        coming = range(self._next, len(self._stages))
        found = next((index for index in coming if text.startswith(self._stages[index].name)), None)
        if found is None:
            self._stage = Stage(text, 0.0, fixed_duration=True)
        else:
            self._stage, self._next = self._stages[found], found + 1

    def left(self, now: float) -> float:
        """Seconds to the end, as far as that can be told."""
        spent, scale = now - self._entered, self._scale(now)
        if self._part >= TOLD:
            total = (self._updated - self._entered) / self._part
        else:
            total = max(self._stage.seconds * (1.0 if self._stage.fixed_duration else scale), OVERDUE * spent)
        coming = (stage.seconds * (1.0 if stage.fixed_duration else scale) for stage in self._stages[self._next :])
        return max(0.0, total - spent) + sum(coming)

    def _scale(self, now: float) -> float:
        """Seconds that stages take, over those that are expected of them."""
        taken, expected = self._taken, self._expected
        if not self._stage.fixed_duration and self._part >= TOLD:
            taken, expected = taken + self._updated - self._entered, expected + self._part * self._stage.seconds
        elif not self._stage.fixed_duration and now - self._entered > self._stage.seconds:
            taken, expected = taken + now - self._entered, expected + self._stage.seconds
        return taken / expected if expected else 1.0

    def share(self, now: float) -> float:
        """The share of the time that has gone; never less than before."""
        gone = now - self._began
        self._share = max(self._share, min(0.99, gone / max(gone + self.left(now), 1e-9)))
        return self._share


class Progress:
    """Shows on standard error how far a command is. Call it with a stage and the share of it that is done.

    On a terminal it is a bar that vanishes at the end. Elsewhere it is a line after some seconds, and further ones at
    growing intervals. It may be called from any thread.

    Args:
        stages: what to expect; see `Estimate`.
        command: whose lines these are, by default those of the command that runs.
        clock: tells the time in seconds.
    """

    def __init__(
        self,
        stages: Sequence[Stage] = (),
        command: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        context = click.get_current_context(silent=True)
        running = context.find_root().info_name if context else None
        self._command, self._clock = command or running or "adavit", clock
        self._stream = None if os.environ.get(OFF) == "0" else sys.stderr
        self._terminal = self._stream is not None and self._stream.isatty()
        self._estimate = Estimate(stages, clock())
        self._text = ""
        self._gaps = iter(GAPS)
        self._due = clock() + (0.0 if self._terminal else next(self._gaps))
        self._drawn = False
        self._lock = threading.Lock()
        self._ended = threading.Event()

    def __enter__(self) -> Progress:
        if self._stream is not None:
            threading.Thread(target=self._run, name="progress", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self.clear()
        with self._lock:
            self._stream = None

    def expect(self, stages: Sequence[Stage]) -> None:
        """Takes stages that are known only now; call it before the first of them is told."""
        with self._lock:
            self._estimate = Estimate(stages, self._clock())

    def clear(self) -> None:
        """Takes the bar off the terminal, for a line to be printed there; the next call shows it again."""
        with self._lock:
            if self._drawn:
                self._write("\r\x1b[K")
                self._drawn = False

    def __call__(self, stage: str, share: float) -> None:
        """Shows that `share` of `stage` is done."""
        with self._lock:
            self._text = printable(stage)
            self._estimate.update(stage, share, self._clock())
            self._show()

    def tick(self) -> None:
        """Shows the time left anew, where that is due."""
        with self._lock:
            self._show()

    def _run(self) -> None:
        while not self._ended.wait(TICK):
            self.tick()

    def _show(self) -> None:
        now = self._clock()
        if self._stream is None or now < self._due or not self._text:
            return
        share, left = self._estimate.share(now), time_left(self._estimate.left(now))
        if self._terminal:
            bar = "#" * round(share * WIDTH)
            self._write(f"\r\x1b[K{self._text:<24.24} [{bar:<{WIDTH}}] {share:4.0%}  {left}")
            self._due, self._drawn = now + REDRAWN, True
        else:
            self._write(f"{self._command}: {self._text}, {100 * share:.0f} %, {left}\n")
            self._due = now + next(self._gaps, GAPS[-1])

    def _write(self, text: str) -> None:
        if self._stream is not None:
            with suppress(OSError, ValueError):  # nothing to write to is no reason to stop
                self._stream.write(text)
                self._stream.flush()


def time_left(seconds: float) -> str:
    """A time to wait, in words."""
    if seconds < 10:
        return "a few seconds left"
    if seconds < 60:
        return f"about {10 * round(seconds / 10)} s left"
    minutes = round(seconds / 60)
    return f"about {minutes} min left" if minutes < 60 else f"about {seconds / 3600:.1f} h left"
