"""AdaViT Deploy: adaptive vision transformers whose saved multiply-accumulates are saved milliseconds."""

__version__ = "0.1.0"

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
    "load",
]
