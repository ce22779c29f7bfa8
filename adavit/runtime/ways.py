"""Which way a batch goes on a device: the one that was asked for, or the fastest, measured once for each batch size."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any

from adavit.bundle.bundle import Bundle
from adavit.errors import BackendError, OptionError, one_line
from adavit.runtime.backend import Options
from adavit.runtime.batch import CAPACITY, CONDITIONAL, EXACT, WAYS, BatchBackend
from adavit.runtime.cache import facts, kept_at, recall, remember

__all__ = ["AUTO", "Ways", "without_capacity"]

log = logging.getLogger(__name__)

AUTO = "auto"
KIND = "dispatch"
WARM, ROUNDS = 3, 5
"""Runs of a way before it is timed, and while it is."""


class Ways:
    """Chooses a way for every batch.

    Args:
        bundle: what runs.
        precision: of its graphs.
        options: what was asked for.
        backend: runs it.
        planned: whether the bundle tells how much room batches take.

    Raises:
        OptionError: capacity is asked for, and the bundle does not tell.
    """

    def __init__(self, bundle: Bundle, precision: str, options: Options, backend: BatchBackend, planned: bool) -> None:
        self._bundle, self._options, self._backend, self._planned = bundle, options, backend, planned
        self._precision = precision
        self._chosen: dict[int, str] = {}
        self._measuring = threading.Lock()
        if options.dispatch == CAPACITY and not planned:
            raise OptionError(f"{bundle.path}: capacity dispatch needs statistics; {_how(bundle)}")
        if left_out := without_capacity(bundle, options):
            log.info(left_out)
        if options.dispatch == CONDITIONAL and (why := backend.why_not(CONDITIONAL)):
            log.warning("no conditional dispatch (%s); %s takes over", why, self._without_conditions())

    def possible(self) -> list[str]:
        """The ways that can be gone here."""
        ways = [way for way in WAYS if self._backend.why_not(way) is None]
        return [way for way in ways if way != CAPACITY or self._planned]

    def choose(self, batch: int, run: Callable[[str], object]) -> str:
        """The way for a batch of some size.

        Args:
            batch: images.
            run: runs the batch, some way; to measure.
        """
        if (asked := self._options.dispatch) != AUTO:
            return asked if asked in self.possible() else self._without_conditions()
        size = 1 << (batch - 1).bit_length()
        found = self._chosen.get(size)
        if found in (possible := self.possible()):
            return str(found)
        if len(possible) == 1 or not self._measuring.acquire(blocking=False):
            return EXACT
        try:
            found = self._chosen[size] = self._recalled(size, possible) or self._measured(size, possible, run)
        finally:
            self._measuring.release()
        return found

    def _without_conditions(self) -> str:
        return CAPACITY if self._planned else EXACT

    def _facts(self, size: int) -> dict[str, Any]:
        known = facts(self._bundle, self._options) | self._backend.versions()
        return known | {"backend": self._backend.name, "precision": self._precision, "images": size}

    def _recalled(self, size: int, possible: list[str]) -> str | None:
        known = self._facts(size)
        found = recall(KIND, known)
        if found is None:
            return None
        try:
            times = dict(found["milliseconds"])
            if set(times) != set(possible):
                return None
            measured = {way: float(time) for way, time in times.items() if time is not None}
            return str(min(measured, key=measured.__getitem__))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            log.warning("%s is of no use (%s); it is replaced", kept_at(KIND, known), one_line(error))
            return None

    def _measured(self, size: int, possible: list[str], run: Callable[[str], object]) -> str:
        """Runs a batch all ways, in turns, and takes the one with the least median; a way that fails is left out."""
        times: dict[str, list[float]] = {way: [] for way in possible}
        for number in range(WARM + ROUNDS):
            for way in list(times):
                began = perf_counter()
                try:
                    run(way)
                except BackendError as error:
                    del times[way]
                    if not times:
                        raise
                    log.warning("no %s dispatch for batches of %d: %s", way, size, one_line(error))
                    continue
                if number >= WARM:
                    times[way].append(1e3 * (perf_counter() - began))
        medians = {way: median(found) for way, found in times.items() if self._backend.why_not(way) is None}
        if not medians:
            raise BackendError("no way of dispatch is left; load the bundle again")
        fastest = min(medians, key=medians.__getitem__)
        if len(times) == len(possible):  # what failed may work another time
            remember(KIND, self._facts(size), {"milliseconds": {way: medians.get(way) for way in possible}})
        log.info("batches of %d: %s dispatch, of %s ms", size, fastest, medians)
        return fastest


def without_capacity(bundle: Bundle, options: Options) -> str | None:
    """Why "auto" leaves out capacity dispatch, and what helps; None where it does not."""
    if options.dispatch != AUTO or bundle.statistics is not None:
        return None
    return f"{bundle.path} has no statistics, so capacity dispatch is left out; {_how(bundle)}"


def _how(bundle: Bundle) -> str:
    """The command that adds statistics."""
    return f"add them with adavit-export {bundle.path} --calibration-images FOLDER"
