"""What a forked child makes of what its parent loaded: threads are gone in it, and so is whoever held a lock.

Native code waits for its threads when it is destroyed, which in a child is for ever. So nothing that is registered here
is destroyed in one.
"""

from __future__ import annotations

import os
from threading import RLock
from typing import Any, Protocol
from weakref import WeakSet

__all__ = ["keep_in_fork", "renew_in_fork", "undisturbed"]


class Renewable(Protocol):
    """What has threads or locks of its own."""

    def after_fork(self) -> None:
        """Makes them anew, in a child that was just forked."""
        ...


undisturbed = RLock()
"""Who holds it is not forked meanwhile: native code that makes something may hold locks, which in a child stay so."""

_renewed: WeakSet[Renewable] = WeakSet()
_native: WeakSet[Any] = WeakSet()
_kept: list[Any] = []


def renew_in_fork(thing: Renewable) -> None:
    """Calls `thing.after_fork()` in every child that is forked while it lives, and keeps it there."""
    _renewed.add(thing)


def keep_in_fork(thing: Any) -> None:
    """Keeps what has native threads in every child that is forked while it lives."""
    _native.add(thing)


def _after_fork() -> None:
    undisturbed.release()
    renewed = list(_renewed)
    _kept.extend([*renewed, *_native])
    for thing in renewed:
        thing.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=undisturbed.acquire, after_in_parent=undisturbed.release, after_in_child=_after_fork)
