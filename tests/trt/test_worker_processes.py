"""A builder's workers end with the process that started them, however that ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

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


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds children in /proc")
def test_ctrl_c_reaches_the_command_alone(bundle: Path) -> None:
    """A terminal sends it to the workers too, which import packages at first and build for seconds then."""
    before = (bundle / "config.json").read_bytes()
    command = [sys.executable, "-c", "from adavit.cli import export; export(prog_name='adavit-export')", str(bundle)]
    command += ["--target", "tensorrt-rtx", "--compute-capability", "86", "--jobs", "2"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as parent:
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
        while parent.poll() is None and len(children.read_text().split()) < 2:  # what tracks resources, and a worker
            time.sleep(0.01)
        os.killpg(parent.pid, signal.SIGINT)
        assert parent.communicate(timeout=60)[1] == "adavit-export: interrupted\n"
    assert parent.returncode == 130
    assert (bundle / "config.json").read_bytes() == before
    assert not (bundle / "tensorrt").exists()
