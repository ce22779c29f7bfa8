"""A builder's workers end with the process that started them, however that ends."""

import signal
import subprocess
import sys

import pytest

SLEEPING = """
import multiprocessing, time
from concurrent.futures import ProcessPoolExecutor
from adavit.tensorrt import worker
pool = ProcessPoolExecutor(2, multiprocessing.get_context("spawn"), worker.start, ("tensorrt-rtx", None, None))
running = [pool.submit(time.sleep, 0.01) for _ in range(4)]
[future.result() for future in running]
running = [pool.submit(time.sleep, 600) for _ in range(2)]
print("sleeping", flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="has no SIGKILL")
def test_workers_end_with_a_parent_that_is_killed() -> None:
    """They hold its standard output, which ends when the last of them has."""
    with subprocess.Popen([sys.executable, "-c", SLEEPING], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "sleeping\n"
        parent.send_signal(signal.SIGKILL)
        assert parent.communicate(timeout=60) == ("", None)
