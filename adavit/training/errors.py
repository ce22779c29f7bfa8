"""Errors of training; every message is one line that says what is wrong and what to do."""

from __future__ import annotations

from adavit.errors import AdaViTError

__all__ = ["DataError", "TrainingError"]


class DataError(AdaViTError):
    """Training or test images cannot be used."""


class TrainingError(AdaViTError):
    """A run cannot start, continue, or has diverged."""
