"""AdaViT Deploy: adaptive vision transformers whose saved multiply-accumulates are saved milliseconds."""

from adavit.errors import (
    AdaViTError,
    BackendError,
    BundleError,
    CheckpointError,
    InputError,
    VerificationError,
)
from adavit.runtime import Policy, Prediction, Result, Runtime, load
from adavit.version import __version__ as __version__

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
