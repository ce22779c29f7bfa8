"""Node.js, npm's packages and Chromium, which the examples' tests need; without them these skip, and say why."""

import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from example_cases import CHROMIUM, EXAMPLES, missing, program


@pytest.fixture(scope="session")
def node() -> str:
    return program("node")


@pytest.fixture(scope="session")
def chromium() -> str:
    return program(*CHROMIUM)


@pytest.fixture(scope="session")
def npm(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a folder with packages of npm, or with those that its package.json names."""

    def install(name: str, *packages: str, copied: Path | None = None) -> Path:
        folder = tmp_path_factory.mktemp(name)
        if copied:
            shutil.copytree(copied, folder, dirs_exist_ok=True)
        command = [
            program("npm"),
            "install",
            "--ignore-scripts",
            "--prefer-offline",
            "--no-audit",
            "--no-fund",
            *packages,
        ]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        return missing(f"npm cannot install: {done.stderr.strip()[:300]}") if done.returncode else folder

    return install


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """The page's folder, and its address, as `prepare.py --serve` makes and serves it."""
    program("npm")
    folder = tmp_path_factory.mktemp("page")
    command = [sys.executable, str(EXAMPLES / "browser" / "prepare.py"), str(folder), "--serve", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert server.stdout and server.stderr
    line = server.stdout.readline()
    if not line:
        reason = server.stderr.read()
        if "npm could not download" in reason:
            missing(reason)
        pytest.fail(reason)
    yield folder, line.split()[0]
    server.send_signal(signal.SIGINT)
    assert server.wait(30) == 0
