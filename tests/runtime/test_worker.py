"""Threads of a pool have numbers of their own, whatever other threads there are."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

from adavit.runtime.worker import WORKER, worker_pool


def numbers(pool: ThreadPoolExecutor, threads: int) -> list[int]:
    together = Barrier(threads)

    def number(_: int) -> int:
        together.wait(60)
        return WORKER.number

    return sorted(pool.map(number, range(threads)))


def test_a_pools_threads_are_numbered_from_0() -> None:
    for threads in (2, 3):
        with worker_pool(threads) as pool, ThreadPoolExecutor(3) as others:
            assert len(set(numbers(others, 3))) == 3
            assert numbers(pool, threads) == numbers(pool, threads) == list(range(threads))
