"""Errors a user can act on: every message is one line that says what is wrong and what to do."""

from __future__ import annotations

__all__ = [
    "AdaViTError",
    "BackendError",
    "BundleError",
    "CheckpointError",
    "InputError",
    "OptionError",
    "VerificationError",
    "bounded",
    "one_line",
    "printable",
    "raise_interrupt",
    "shown",
]

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


def shown(value: object) -> str:
    """A value that may be anything, as messages show it: its repr, bounded."""
    try:
        return bounded(repr(value), LONGEST_VALUE)
    except Exception:  # of a whole number of thousands of digits, or of a foreign class
        return f"a value of the type {type(value).__name__}"


def one_line(error: Exception) -> str:
    """What another library's exception says, without line breaks and not too long."""
    return bounded(" ".join(str(error).split()), LONGEST_QUOTE)


class AdaViTError(Exception):
    """Base of every error this package raises on purpose; the command line prints it without a traceback.

    Its message is `bounded`, whatever values it tells.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(bounded(str(message)))


class CheckpointError(AdaViTError):
    """A checkpoint cannot be read, or does not describe an AdaViT completely."""


class BundleError(AdaViTError):
    """A bundle is missing, incomplete, altered or of an unknown version, or cannot be written."""


class BackendError(AdaViTError):
    """A backend is unknown, not installed, or failed to load or run an engine."""


class InputError(AdaViTError):
    """What a caller gave cannot be used: images, labels, a policy, a budget, options or paths."""


class OptionError(InputError):
    """Options make no sense, whatever the files hold; the command line takes it as a mistake in its usage."""


class VerificationError(AdaViTError):
    """A bundle does not compute what its checkpoint computes."""


def raise_interrupt(error: ImportError) -> None:
    """Raises the Ctrl-C behind a failed import, where there is one: compiled extensions turn it into an ImportError."""
    if isinstance(error.__cause__, KeyboardInterrupt):
        raise error.__cause__ from None
