"""What backends on a device share: lanes, each with a batch on its way, and engines, made once for all of them."""

from __future__ import annotations

import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Literal

import numpy as np

from adavit.bundle.graph_keys import DENSE_GRAPH, GraphKey, graph_keys
from adavit.bundle.graphs import Graphs
from adavit.errors import BackendError
from adavit.runtime.backends.cuda.bindings import Cuda
from adavit.runtime.backends.cuda.captures import Captures
from adavit.runtime.backends.cuda.lane import DeviceLane
from adavit.runtime.backends.cuda.runners import DeviceEngine
from adavit.runtime.batch import EXACT, Float, Lane
from adavit.runtime.forks import renew_in_fork

__all__ = ["DeviceBackend"]

LANES = 4
"""Batches on their way at once; others wait for one to be done."""


class DeviceBackend(ABC):
    """What `BatchBackend` says; a backend adds its name, `versions`, `stream`, and how an engine is made.

    Once nothing refers to it, its lanes and engines are closed, and what they ran on is freed.

    Args:
        graphs: what to run.
        cuda: the CUDA runtime.
        captures: makes CUDA graphs, and knows why not.
        most_images: of a lane.

    Attributes:
        at_close: is called behind all else.
    """

    on_host: Literal[False] = False
    name: str
    usual_heads: tuple[tuple[int, ...], ...] | None = None

    def __init__(self, graphs: Graphs, cuda: Cuda, captures: Captures, most_images: int) -> None:
        self.graphs, self.cuda, self.captures, self.most_images = graphs, cuda, captures, most_images
        self._lock = threading.RLock()
        self._engines: dict[tuple[GraphKey, bool], DeviceEngine] = {}
        self._lanes = LanePool()
        self.at_close: list[Callable[[], object]] = [captures.close]
        self._finalizer = weakref.finalize(self, _close, self._lanes.spare, self._engines, self.at_close)
        self._times = {"enqueue_ms": 0.0, "gpu_ms": 0.0, "sync_ms": 0.0}
        renew_in_fork(self)

    def after_fork(self) -> None:
        """Leaves the device to the parent: a forked child may not call CUDA."""
        self._finalizer.detach()

    def open_engines(self) -> None:
        """Makes the engines of all graphs, but for a dense twin beside others: that is made when it is run."""
        if self.graphs.architecture.adapts:
            self.graphs.check_deciding()
        for key in graph_keys(self.graphs.files):
            if key != DENSE_GRAPH or not self.graphs.architecture.adapts:
                self.engine(key, False)

    @abstractmethod
    def stream(self) -> tuple[int, bool]:
        """The stream of a new lane, and whether it is the lane's own, to be destroyed with it."""

    @abstractmethod
    def open(self, key: GraphKey, every_head: bool) -> DeviceEngine:
        """Makes the engine of a graph.

        Raises:
            BundleError: it is not the one that was exported or built.
            BackendError: it does not run here.
        """

    def engine(self, key: GraphKey, every_head: bool) -> DeviceEngine:
        """The engine of a graph, made once; see `open`."""
        which = key, every_head and self.usual_heads is not None
        with self._lock:
            found = self._engines.get(which)
            if found is None:
                found = self._engines[which] = self.open(*which)
        return found

    def scratch(self, batch: int) -> int:
        """Bytes of memory that a lane's runs of so many images take at most, one after the other."""
        with self._lock:
            return max((engine.scratch(batch) for engine in self._engines.values()), default=0)

    @contextmanager
    def lane(self, batch: int) -> Iterator[Lane]:
        """See `BatchBackend.lane`."""
        with self._some_lane(batch) as lane:
            yield lane

    def dense(self, images: Float) -> Float:
        """See `Backend.dense`: as many images at once as the engine is for."""
        most = min(self.most_images, self.engine(DENSE_GRAPH, False).most_images)
        logits = np.empty((len(images), self.graphs.architecture.classes), np.float32)
        for start in range(0, len(images), most):
            some = images[start : start + most]
            with self._some_lane(len(some)) as lane:
                logits[start : start + len(some)] = lane.dense(some)
        return logits

    def why_not(self, way: str) -> str | None:
        """See `BatchBackend.why_not`."""
        return None if way == EXACT else self.captures.why_not(way)

    def add_times(self, enqueue_ms: float, gpu_ms: float, sync_ms: float) -> None:
        """Counts the times of a batch."""
        with self._lock:
            for name, value in (("enqueue_ms", enqueue_ms), ("gpu_ms", gpu_ms), ("sync_ms", sync_ms)):
                self._times[name] += value

    def timings(self) -> dict[str, float]:
        """See `BatchBackend.timings`."""
        with self._lock:
            found, self._times = self._times, dict.fromkeys(self._times, 0.0)
        return found

    @contextmanager
    def _some_lane(self, batch: int) -> Iterator[DeviceLane]:
        lane, too_many = self._lanes.take(batch)
        try:
            for other in too_many:
                other.close()
            if lane is None:
                size = min(self.most_images, 1 << (batch - 1).bit_length())
                lane = DeviceLane(weakref.proxy(self), size)
            yield lane
        except BaseException:
            failed, lane = lane, None
            if failed is not None:
                with suppress(BackendError):  # after some failures, nothing can be freed any more
                    failed.close()
            raise
        finally:
            self._lanes.give_back(lane)


class LanePool:
    """Lanes that nothing uses, and how many there are in all.

    Attributes:
        spare: the lanes.
    """

    def __init__(self) -> None:
        self.spare: list[DeviceLane] = []
        self._in_use = 0
        self._changed = threading.Condition()

    def take(self, batch: int) -> tuple[DeviceLane | None, list[DeviceLane]]:
        """The smallest spare lane for so many images; waits where all are in use.

        Returns:
            None in the place of a lane where one may be made, once lanes that are too many are closed.
        """
        with self._changed:
            while self._in_use >= LANES:
                self._changed.wait()
            self._in_use += 1
            fitting = [lane for lane in self.spare if lane.most >= batch]
            if fitting:
                found = min(fitting, key=lambda lane: lane.most)
                self.spare.remove(found)
                return found, []
            too_many = self.spare[: max(0, self._in_use + len(self.spare) - LANES)]
            del self.spare[: len(too_many)]
        return None, too_many

    def give_back(self, lane: DeviceLane | None) -> None:
        """Takes a lane back, or the place of one that failed."""
        with self._changed:
            self._in_use -= 1
            if lane is not None:
                self.spare.append(lane)
            self._changed.notify()


def _close(
    lanes: list[DeviceLane], engines: dict[tuple[GraphKey, bool], DeviceEngine], last: list[Callable[[], object]]
) -> None:
    """Frees lanes, then engines, then what they ran on."""
    for lane in lanes:
        lane.close()
    lanes.clear()
    for engine in engines.values():
        engine.close()
    engines.clear()
    for call in last:
        call()
