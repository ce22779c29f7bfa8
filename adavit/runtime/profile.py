"""A backend around another, which notes when every call of it began and ended."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from statistics import median
from threading import get_ident
from time import perf_counter_ns
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from adavit.runtime.backend import Backend, Buffer, Constants, Engine, FixedEngine, Sizes
from adavit.bundle.bundle import Bundle, EngineSpec

__all__ = ["Event", "Profiler"]

COSTED = 1000
"""Calls without work, to see what noting one costs."""

Index = npt.NDArray[np.intp]


class Event(NamedTuple):
    """One call of a backend.

    Attributes:
        name: of the engine, or of the backend's method.
        start, end: in nanoseconds.
        thread: that called.
        sizes: of the dimensions that vary, by the name the engine's description gives them.
    """

    name: str
    start: int
    end: int
    thread: int
    sizes: dict[str, int]


class Profiler:
    """Passes everything on to a backend, and notes calls while it is recording.

    Args:
        bundle: describes the engines.
        backend: does the work.
    """

    def __init__(self, bundle: Bundle, backend: Backend) -> None:
        self.name, self.always_gathers, self.on_host = backend.name, backend.always_gathers, backend.on_host
        self._events: list[Event] | None = None
        self._bundle = bundle
        self._backend = backend

    @contextmanager
    def recording(self) -> Iterator[list[Event]]:
        """The calls that are made until the block ends, by any thread."""
        events: list[Event] = []
        self._events = events
        try:
            yield events
        finally:
            self._events = None

    def timed(self, name: str, sizes: dict[str, int], call: Callable[..., Any], *arguments: Any) -> Any:
        """Makes a call of the backend, and notes it."""
        if (events := self._events) is None:
            return call(*arguments)
        start = perf_counter_ns()
        result = call(*arguments)
        events.append(Event(name, start, perf_counter_ns(), get_ident(), sizes))
        return result

    def load(self, name: str, alone: bool = False) -> Engine:
        """See `Backend.load`."""
        return ProfiledEngine(self, self._backend.load(name, alone))

    @property
    def fixed(self) -> Callable[[str, Constants], FixedEngine] | None:
        """See `Backend.fixed`."""
        if (fixed := self._backend.fixed) is None:
            return None

        def load(name: str, constants: Constants) -> FixedEngine:
            inputs = self._bundle.engine(name).inputs if constants else ()
            named = [(tensor.shape[0], tensor.name) for tensor in inputs]
            sizes = {size: len(constants[key]) for size, key in named if isinstance(size, str)}
            return ProfiledFixedEngine(self, name, fixed(name, constants), sizes)

        return load

    def buffer(self, shape: tuple[int, ...], dtype: str = "float32") -> Buffer:
        """See `Backend.buffer`."""
        return ProfiledBuffer(self._backend.buffer(shape, dtype))

    def upload(self, array: npt.NDArray[Any]) -> Buffer:
        """See `Backend.upload`."""
        return ProfiledBuffer(self._backend.upload(array))

    def gather(self, source: Any, kept: Index, into: Any) -> None:
        """See `Backend.gather`."""
        self.timed("gather", {"rows": len(kept)}, self._backend.gather, source.inner, kept, into.inner)

    def scatter(self, rows: Any, kept: Index, into: Any) -> None:
        """See `Backend.scatter`."""
        self.timed("scatter", {"rows": len(kept)}, self._backend.scatter, rows.inner, kept, into.inner)

    def add(self, source: Any, count: int, vectors: Any, index: int, into: Any) -> None:
        """See `Backend.add`."""
        arguments = source.inner, count, vectors.inner, index, into.inner
        self.timed("add", {"rows": count}, self._backend.add, *arguments)

    def fetch(self, *buffers: Any) -> tuple[npt.NDArray[Any], ...]:
        """See `Backend.fetch`."""
        inner = [buffer.inner for buffer in buffers]
        found: tuple[npt.NDArray[Any], ...] = self.timed("fetch", {}, self._backend.fetch, *inner)
        return found

    def cost(self) -> float:
        """Nanoseconds that it takes to note a call."""
        engine = ProfiledEngine(self, NoEngine(self._bundle.engines["stem"]))
        rows = [Rows(None, 1)]
        with self.recording() as events:
            for _ in range(COSTED):
                engine.run(rows, rows)
        return median(later.end - earlier.end for earlier, later in pairwise(events))

    def prepare(self, used: Mapping[Sizes, float]) -> Mapping[Sizes, float]:
        """See `Backend.prepare`."""
        return self._backend.prepare(used)

    def rounded(self, tokens: int) -> int:
        """See `Backend.rounded`."""
        return self._backend.rounded(tokens)

    def timings(self) -> dict[str, float]:
        """See `Backend.timings`."""
        return self._backend.timings()

    def versions(self) -> dict[str, str]:
        """See `Backend.versions`."""
        return self._backend.versions()


class Rows(NamedTuple):
    """The first rows of a buffer, and how many these are."""

    inner: Any
    number: int


class ProfiledBuffer:
    """A buffer whose rows know their number."""

    def __init__(self, buffer: Buffer) -> None:
        self.inner = buffer

    @property
    def nbytes(self) -> int:
        """See `Buffer.nbytes`."""
        return self.inner.nbytes

    def rows(self, count: int) -> Rows:
        """See `Buffer.rows`."""
        return Rows(self.inner.rows(count), count)

    def part(self, position: int) -> ProfiledBuffer:
        """See `Buffer.part`."""
        return ProfiledBuffer(self.inner.part(position))


class NoEngine:
    """Computes nothing."""

    def __init__(self, spec: EngineSpec) -> None:
        self.spec = spec

    def run(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        """See `Engine.run`."""


class ProfiledEngine:
    """An engine whose runs are noted.

    Args:
        profiler: notes them.
        engine: runs.
    """

    def __init__(self, profiler: Profiler, engine: Engine) -> None:
        self.spec = engine.spec
        self._profiler = profiler
        self._engine = engine
        self._leading = [tensor.shape[0] for tensor in engine.spec.inputs]

    def run(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        """See `Engine.run`."""
        given = [value if isinstance(value, Rows) else Rows(value, len(value)) for value in inputs]
        values, filled = [rows.inner for rows in given], [rows.inner for rows in outputs]
        named = zip(self._leading, given, strict=True)
        sizes = {name: rows.number for name, rows in named if isinstance(name, str)}
        if "K" in sizes:
            sizes["K"] = self._profiler.rounded(sizes["K"])
        self._profiler.timed(self.spec.name, sizes, self._engine.run, values, filled)


class ProfiledFixedEngine:
    """An engine of a set of heads, whose runs are noted with the number of tokens that they keep.

    Args:
        profiler: notes them.
        name: of the engine.
        engine: runs.
        sizes: of its constants.
    """

    def __init__(self, profiler: Profiler, name: str, engine: FixedEngine, sizes: dict[str, int]) -> None:
        self._profiler, self._name, self._engine, self._sizes = profiler, name, engine, sizes

    def bound(self, values: Mapping[str, Any]) -> Callable[..., None]:
        """See `FixedEngine.bound`."""
        inner = {name: value.inner if isinstance(value, Rows) else value for name, value in values.items()}
        run, kept = self._engine.bound(inner), values.get("kept")

        def noted(*given: Any) -> None:
            sizes = self._sizes if kept is None else self._sizes | {"K": self._profiler.rounded(int(kept.sum()))}
            weights = [rows for rows in given if isinstance(rows, Rows)]
            if weights:
                sizes = sizes | {"h": weights[0].number}
            values = [rows.inner for rows in weights] or given
            self._profiler.timed(self._name, sizes, run, *values)

        return noted
