"""Which of the threads that run at once asks, for backends that hold something for each of them."""

from __future__ import annotations

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

__all__ = ["WORKER", "worker_pool"]


class Worker(threading.local):
    """The thread that asks.

    Attributes:
        number: of a pool's threads, 0 and so on; any other threads are numbered in turn.
    """

    _others = itertools.count()

    def __init__(self) -> None:
        self.number = next(self._others)


WORKER = Worker()


def worker_pool(workers: int) -> ThreadPoolExecutor:
    """A pool whose threads have different numbers below `workers`."""
    numbers = itertools.count()

    def enter() -> None:
        WORKER.number = next(numbers)

    return ThreadPoolExecutor(workers, "adavit", enter)
