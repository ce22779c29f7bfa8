"""The demo that comes with this package, by its name, wherever a bundle is asked for."""

from __future__ import annotations

import os
from pathlib import Path

from adavit.files import find_folder

__all__ = ["DEMO_NAME", "demo_bundle", "find_bundle", "names_demo"]

DEMO_NAME = "demo"


def demo_bundle() -> Path:
    """The bundle that comes with this package; its images and its checkpoint are beside it."""
    return Path(__file__).parent.parent / "demo" / "bundle"


def names_demo(path: Path) -> bool:
    """Whether a bundle's path means the demo: it is "demo", and no file or folder has that name."""
    return str(path) == DEMO_NAME and not os.path.lexists(find_folder(path))


def find_bundle(path: Path) -> Path:
    """Where a bundle belongs: the path, or the demo's bundle where the path means that."""
    return demo_bundle() if names_demo(path) else path
