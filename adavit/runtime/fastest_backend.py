"""backend="auto": every backend that is installed runs the bundle, and the fastest is taken."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

from adavit.bundle.bundle import Bundle
from adavit.errors import AdaViTError, BackendError, one_line
from adavit.runtime.backend import Options, names
from adavit.runtime.cache import facts, kept_at, recall, remember

__all__ = ["Choice", "fastest_backend"]

log = logging.getLogger(__name__)

KIND = "backend"
ROUNDS = 3
SECONDS = 0.25
"""Time of a round for each backend, or longer for RUNS runs."""
RUNS = 2

Prepare = Callable[[str], tuple[Callable[[], object], int]]


@dataclass(frozen=True)
class Choice:
    """Which backend was taken, and why.

    Attributes:
        backend: the fastest.
        milliseconds: an image takes, by backend.
        skipped: why others were not measured, by backend.
        cached: whether this was measured before.
        path: the file that keeps it, if any.
    """

    backend: str
    milliseconds: dict[str, float]
    skipped: dict[str, str]
    cached: bool = False
    path: str | None = None

    def __str__(self) -> str:
        times = sorted(self.milliseconds.items(), key=lambda item: item[1])
        listed = ", ".join(f"{name} {time:.2f} ms an image" for name, time in times)
        kept = f"kept in {self.path}" if self.path else "not kept"
        return f"{self.backend}, the fastest here: {listed} (measured {'before' if self.cached else 'now'}, {kept})"


def fastest_backend(bundle: Bundle, precision: str, options: Options, prepare: Prepare) -> Choice:
    """The fastest backend for a bundle on this machine, measured unless that has been done before.

    Args:
        bundle: what is to run.
        precision: of its graphs that are to run.
        options: how.
        prepare: loads the bundle on the backend of a name, and returns the run to be timed, and its number of images.

    Raises:
        BackendError: no backend runs the bundle.
    """
    known = facts(bundle, options) | {"trust_engines": options.trust_engines, "precision": precision}
    choice = _recalled(known) or _measured(known, prepare)
    log.info("backend %s", choice)
    return choice


def _recalled(known: dict[str, Any]) -> Choice | None:
    found = recall(KIND, known)
    if found is None:
        return None
    try:
        times = {str(name): float(time) for name, time in found["milliseconds"].items()}
        skipped = {str(name): str(reason) for name, reason in found["skipped"].items()}
        if min(times, key=times.__getitem__) != found["backend"] or found["backend"] not in names():
            raise ValueError("it does not name the fastest")
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        log.warning("%s is of no use (%s); it is replaced", kept_at(KIND, known), one_line(error))
        return None
    return Choice(found["backend"], times, skipped, True, str(kept_at(KIND, known)))


def _measured(known: dict[str, Any], prepare: Prepare) -> Choice:
    """Measures in rounds over all backends, and takes each one's best, so that other work of the machine tells less."""
    runs: dict[str, tuple[Callable[[], object], int]] = {}
    skipped: dict[str, str] = {}
    for name in names():
        try:
            runs[name] = prepare(name)
            _median_time(runs[name][0])
        except AdaViTError as error:
            runs.pop(name, None)
            skipped[name] = str(error)
    if not runs:
        raise BackendError("no backend runs this bundle: " + "; ".join(skipped.values()))
    rounds = [{name: _median_time(run) / images for name, (run, images) in runs.items()} for _ in range(ROUNDS)]
    times = {name: min(found[name] for found in rounds) for name in runs}
    fastest = min(times, key=times.__getitem__)
    path = remember(KIND, known, {"backend": fastest, "milliseconds": times, "skipped": skipped})
    return Choice(fastest, times, skipped, path=None if path is None else str(path))


def _median_time(run: Callable[[], object]) -> float:
    """Milliseconds of a run, the first of which is not counted."""
    run()
    taken: list[float] = []
    began = perf_counter()
    while perf_counter() - began < SECONDS or len(taken) < RUNS:
        start = perf_counter()
        run()
        taken.append((perf_counter() - start) * 1e3)
    return median(taken)
