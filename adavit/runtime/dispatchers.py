"""What runs a bundle's graphs: images one by one on the host, batches on a device, or a model without policies."""

from __future__ import annotations

from adavit.bundle.graphs import Graphs
from adavit.runtime.backend import Backend, Options
from adavit.runtime.batch import BatchBackend
from adavit.runtime.batch_dispatcher import BatchDispatcher
from adavit.runtime.capacity_tables import CapacityTables
from adavit.runtime.dense import DenseDispatcher
from adavit.runtime.dispatcher import Dispatcher
from adavit.runtime.ways import Ways

__all__ = ["dispatcher_of"]


def dispatcher_of(
    graphs: Graphs, backend: Backend | BatchBackend, options: Options
) -> Dispatcher | BatchDispatcher | DenseDispatcher:
    """The dispatcher for a backend and the graphs that it runs."""
    bundle, arch = graphs.bundle, graphs.architecture
    if not arch.adapts:
        return DenseDispatcher(graphs, backend)
    if backend.on_host:
        return Dispatcher(graphs, backend, options)
    tables = CapacityTables(bundle)
    return BatchDispatcher(arch, backend, Ways(bundle, graphs.precision, options, backend, tables.planned), tables)
