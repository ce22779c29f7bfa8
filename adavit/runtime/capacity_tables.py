"""The room that batches get, by what their images are run with."""

from __future__ import annotations

import threading

import numpy as np
import numpy.typing as npt

from adavit.bundle.bundle import Bundle
from adavit.bundle.operating_points import Offsets
from adavit.runtime.batch import Room, Rooms, policy_of, rooms_of
from adavit.runtime.capacity import CapacityTable, capacity_table

__all__ = ["CapacityTables"]

MOST_TABLES = 256
"""That are kept: whoever asks for ever other budgets fills no memory."""


class CapacityTables:
    """The tables of a bundle, each made when it is first asked for; any thread may use them.

    Args:
        bundle: has statistics, or there is room for everything.

    Attributes:
        planned: whether it has.
    """

    def __init__(self, bundle: Bundle) -> None:
        self.planned = bundle.statistics is not None
        self._bundle, self._arch = bundle, bundle.architecture
        self._lock = threading.Lock()
        self._tables: dict[Offsets, CapacityTable] = {}
        self._rooms: dict[tuple[tuple[Offsets, ...], int], tuple[list[int], Rooms]] = {}

    def rooms(self, distinct: tuple[Offsets, ...], batch: int) -> Rooms:
        """The room for a batch of images that are run with these offsets, each named once."""
        if not self.planned:
            tokens = self._arch.tokens
            return (Room(batch * tokens, batch, tokens, batch * tokens),) * self._arch.depth
        tables = self._of(distinct)
        versions = [table.version(batch) for table in tables]
        known = self._rooms.get((distinct, batch))
        if known is None or known[0] != versions:
            each = np.array([table.rooms(batch) for table in tables])  # [n, L, 4]
            known = versions, tuple(map(Room.of, each.max(0)))
            if len(self._rooms) >= MOST_TABLES:
                self._rooms.clear()
            self._rooms[distinct, batch] = known
        return known[1]

    def note(self, distinct: tuple[Offsets, ...], batch: int, kept: npt.NDArray[np.bool_] | None) -> None:
        """Remembers that a batch had enough room, or else what its images kept, [L, B, N + H + 2]."""
        if not self.planned:
            return
        needed = None if kept is None else np.array(rooms_of(policy_of(self._arch, kept)))
        for table in self._of(distinct):
            table.note(batch, needed)

    def _of(self, offsets: tuple[Offsets, ...]) -> list[CapacityTable]:
        with self._lock:
            found = []
            for one in offsets:
                table = self._tables.get(one)
                if table is None:
                    table = capacity_table(self._bundle, one)
                    assert table is not None, "there are statistics"
                    if len(self._tables) >= MOST_TABLES:
                        self._tables.clear()
                    self._tables[one] = table
                found.append(table)
        return found
