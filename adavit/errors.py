"""Errors a user can act on: every message is one line that says what is wrong and what to do."""

from __future__ import annotations

import os
import reprlib
from numbers import Number
from typing import Any

__all__ = [
    "AdaViTError",
    "BackendError",
    "BundleError",
    "CheckpointError",
    "InputError",
    "OptionError",
    "VerificationError",
    "bounded",
    "install_hint",
    "missing_package",
    "one_line",
    "printable",
    "raise_interrupt",
    "shown",
]

EXTRAS = {
    "torch": "export",
    "onnx": "export",
    "safetensors": "export",
    "onnxruntime": "cpu",
    "matplotlib": "train",
}
"""Optional packages, and the extra that brings each."""
LONGEST_MESSAGE = 500
LONGEST_QUOTE = 300
LONGEST_VALUE = 80
ELIDED = " ... "


def printable(text: str) -> str:
    """Text that cannot command a terminal and that any encoding of Unicode takes: the rest is escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def bounded(text: str, most: int = LONGEST_MESSAGE) -> str:
    """Text as one printable line of at most so many characters; of a longer one the middle is left out."""
    line = printable(" ".join(part for part in text.splitlines() if part))
    if len(line) <= most:
        return line
    end = (most - len(ELIDED)) // 2
    return line[: most - len(ELIDED) - end] + ELIDED + line[-end:]


class _Short(reprlib.Repr):
    """The repr of values that may hold one another a million times over: a few of each, some levels deep."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxstring = self.maxlong = LONGEST_MESSAGE  # what is longer than a value, `bounded` shortens

    def repr_instance(self, x: Any, level: int) -> str:
        """Of any other type: its repr where that is of one value, else the type alone, which may hold anything."""
        if isinstance(x, bytes | bytearray):
            return repr(x[:LONGEST_MESSAGE])
        if isinstance(x, BaseException):
            return f"{type(x).__name__}({', '.join(self.repr1(part, level - 1) for part in x.args[: self.maxother])})"
        single = isinstance(x, str | Number | os.PathLike | type) or type(x).__repr__ in (object.__repr__, _NONE)
        return repr(x) if single else _typed(x)


_NONE = type(None).__repr__
_SHORT = _Short()


def _typed(value: object) -> str:
    return f"a value of the type {type(value).__name__}"


def shown(value: object) -> str:
    """A value that may be anything, as messages show it: its repr, bounded in length and in time."""
    try:
        return bounded(_SHORT.repr(value), LONGEST_VALUE)
    except Exception:  # of a whole number of thousands of digits, or of a foreign class
        return bounded(_typed(value), LONGEST_VALUE)


def one_line(error: Exception) -> str:
    """What another library's exception says, without line breaks and not too long."""
    return bounded(" ".join(str(error).split()), LONGEST_QUOTE)


def install_hint(extra: str) -> str:
    """How to install an extra of this package, from an index or from a clone of the repository."""
    found = f"pip install 'adavit[{extra}]' (in a clone: pip install '.[{extra}]')"
    if extra == "tensorrt":
        return f"{found}, with NVIDIA's index https://pypi.nvidia.com; JetPack brings it along, see docs/tensorrt.md"
    return found


def missing_package(error: ModuleNotFoundError, extra: str | None = None) -> str | None:
    """What to do where an optional package is not installed; None for any other module.

    Args:
        error: of its import.
        extra: what to install, by default the least that brings the package.
    """
    package = (error.name or "").split(".")[0]
    return f"{package} is not installed; run: {install_hint(extra or EXTRAS[package])}" if package in EXTRAS else None


class AdaViTError(Exception):
    """Base of every error this package raises on purpose; the command line prints it without a traceback.

    Its message is one line of bounded length; see `bounded`.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(bounded(str(message)))


class CheckpointError(AdaViTError):
    """A checkpoint cannot be read, or is no complete AdaViT."""


class BundleError(AdaViTError):
    """A bundle is missing, incomplete, altered or of an unknown version, or cannot be written."""


class BackendError(AdaViTError):
    """A backend is unknown, not installed, or failed to load or run an engine."""


class InputError(AdaViTError):
    """Images, labels, a policy, a budget, options or paths cannot be used as given."""


class OptionError(InputError):
    """Options are wrong, whatever the files hold; the command line ends with exit code 2."""


class VerificationError(AdaViTError):
    """A bundle does not compute what its checkpoint computes."""


def raise_interrupt(error: ImportError) -> None:
    """Raises the Ctrl-C behind a failed import, where there is one: compiled extensions turn it into an ImportError."""
    if isinstance(error.__cause__, KeyboardInterrupt):
        raise error.__cause__ from None
