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
    "one_line",
    "raise_interrupt",
]

LONGEST_MESSAGE = 400


def one_line(error: Exception) -> str:
    """What another library's exception says, without line breaks and not too long."""
    return " ".join(str(error).split())[:LONGEST_MESSAGE]


class AdaViTError(Exception):
    """Base of every error this package raises on purpose; the command line prints it without a traceback."""


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
