"""An image's memory, and the bindings of ONNX Runtime's sessions to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from adavit.bundle.keys import BlockKey, Sublayers
from adavit.errors import BackendError, one_line
from adavit.runtime.backend import Float, Index
from adavit.runtime.backends.host import HostSlot, Prepared

if TYPE_CHECKING:
    from adavit.runtime.backends.onnxruntime.backend import OnnxRuntimeBackend

__all__ = ["OnnxRuntimeSlot"]


class Bound(NamedTuple):
    """A session with what it reads and fills.

    Attributes:
        session: it.
        binding: to its values.
        takes_tokens: whether it takes the kept tokens, which change with every run.
        values: what lives as long as the binding.
    """

    session: Any
    binding: Any
    takes_tokens: bool
    values: Mapping[str, Any]


class OnnxRuntimeSlot(HostSlot):
    """An image's tokens, decisions and logits, and bindings of sessions to them; see `Slot`.

    Args:
        backend: makes the sessions.
        threads: that run the image.
    """

    def __init__(self, backend: OnnxRuntimeBackend, threads: int) -> None:
        super().__init__(backend.graphs, backend.ort.OrtValue.ortvalue_from_numpy)
        self._backend, self._threads = backend, threads
        self._blank = self._handle(np.zeros(1, np.float32))
        self._bound: dict[tuple[int, Sublayers], Bound] = {}
        self._prepared: dict[BlockKey, Bound] = {}
        self._stem = self._bind(backend.stem(threads), {}, 0)

    def stem(self, image: Float) -> None:
        """See `Slot.stem`."""
        binding = self._stem.binding
        binding.bind_ortvalue_input("images", self._handle(image))
        try:
            self._run(self._stem)
        finally:
            binding.clear_binding_inputs()  # a batch is not to live as long as the slot
        self._coming = 0

    def block(self, key: BlockKey, tokens: Index) -> None:
        """See `Slot.block`."""
        session = self._backend.constant.get(Prepared(self._threads, key))
        bound = self._shared(key) if session is None else self._constant(key, session)
        if bound.takes_tokens:
            self._kept[: len(tokens)] = tokens
            bound.binding.bind_ortvalue_input("tokens", self._indices(len(tokens)))
        if session is None:
            self._run_with_heads(bound, key)
        else:
            self._run(bound)
        self._coming = key.block + 1

    def _run_with_heads(self, bound: Bound, key: BlockKey) -> None:
        """Runs a session that takes the weights of heads."""
        lease = self._backend.heads.acquire(key)
        for name, value in lease.values.items():
            bound.binding.bind_ortvalue_input(name, value)
        try:
            self._run(bound)
        finally:
            for name in lease.values:  # bindings would keep more weights than the cache does
                bound.binding.bind_ortvalue_input(name, self._blank)
            self._backend.heads.release(lease)

    def _shared(self, key: BlockKey) -> Bound:
        """The session that takes all weights as inputs, bound to those that all heads share."""
        name = key.block, key.sublayers
        found = self._bound.get(name)
        if found is None:
            given = self._backend.weights(*name)
            session = self._backend.shared(*name, self._threads)
            found = self._bound[name] = self._bind(session, given, key.block + 1)
        return found

    def _constant(self, key: BlockKey, session: Any) -> Bound:
        """A session with the weights of its heads as constants."""
        found = self._prepared.get(key)
        if found is None or found.session is not session:
            found = self._prepared[key] = self._bind(session, {}, key.block + 1)
        return found

    def drop_unprepared(self) -> None:
        """Drops what holds sessions that are no longer prepared; any thread may ask for it."""
        prepared_keys = {prepared.key for prepared in self._backend.constant if prepared.threads == self._threads}
        self._prepared = {key: bound for key, bound in list(self._prepared.items()) if key in prepared_keys}

    def _run(self, bound: Bound) -> None:
        try:
            bound.session.run_with_iobinding(bound.binding)
        except Exception as error:
            raise BackendError(f"a graph failed: {one_line(error)}") from error

    def _bind(self, session: Any, given: Mapping[str, Any], deciding: int) -> Bound:
        """Binds what a session that decides for a block takes but for images and kept tokens, and what it makes."""
        memory = self._values(given, deciding)
        binding, inputs = session.io_binding(), [value.name for value in session.get_inputs()]
        for name in inputs:
            if name in memory:
                binding.bind_ortvalue_input(name, memory[name])
        for value in session.get_outputs():
            binding.bind_ortvalue_output(value.name, memory[value.name])
        return Bound(session, binding, "tokens" in inputs, given)
