"""Where the examples are, the programs that they need, and what the page does to pictures."""

import functools
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NoReturn

import pytest
from PIL import Image, ImageOps

REPOSITORY = Path(__file__).parent.parent.parent
EXAMPLES = REPOSITORY / "examples"
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")


def missing(reason: str) -> NoReturn:
    """Skips a test; where ADAVIT_EXAMPLES is "required", as in .ci/run, it fails."""
    if os.environ.get("ADAVIT_EXAMPLES") == "required":
        pytest.fail(reason)
    pytest.skip(reason)


def program(*names: str) -> str:
    """The path of the first of these programs that there is."""
    found = next((path for path in map(shutil.which, names) if path), None)
    return found or missing(f"{names[0]} is not installed")


def toned(picture: Image.Image, tone: str) -> Image.Image:
    """A picture with its contrast as the README changes that."""
    if tone == "plain":
        return picture
    grey = picture.convert("L")
    return ImageOps.autocontrast(ImageOps.invert(grey) if tone == "inverted" else grey, cutoff=1)


@contextmanager
def plain_server(folder: Path) -> Iterator[str]:
    """A server that sends no headers of its own; its address."""
    handler = functools.partial(SimpleHTTPRequestHandler, directory=folder)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
