"""AdaViT Deploy: adaptive vision transformers whose saved multiply-accumulates are saved milliseconds."""

from __future__ import annotations

from importlib import import_module

from adavit.version import __version__ as __version__

TYPE_CHECKING = False  # as type checkers read it; typing would take a while to import
if TYPE_CHECKING:
    from typing import Any

    from adavit.api import compare, export_bundle, export_single_file
    from adavit.drawing import draw
    from adavit.errors import (
        AdaViTError,
        BackendError,
        BundleError,
        CheckpointError,
        InputError,
        VerificationError,
    )
    from adavit.runtime import Policy, Prediction, Result, Runtime, load

__all__ = [
    "AdaViTError",
    "BackendError",
    "BundleError",
    "CheckpointError",
    "InputError",
    "Policy",
    "Prediction",
    "Result",
    "Runtime",
    "VerificationError",
    "compare",
    "draw",
    "export_bundle",
    "export_single_file",
    "load",
]
MODULES = {"compare": "api", "draw": "drawing", "export_bundle": "api", "export_single_file": "api"}
"""Where a public name is, unless it is an error or of the runtime."""


def __getattr__(name: str) -> Any:
    """Imports a public name at its first use, so that the commands start before numpy is imported."""
    if name in ("errors", "runtime"):
        return import_module(f"adavit.{name}")
    if name not in __all__:
        raise AttributeError(f"module 'adavit' has no attribute {name!r}")
    module = MODULES.get(name, "errors" if name.endswith("Error") else "runtime")
    return getattr(import_module(f"adavit.{module}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
