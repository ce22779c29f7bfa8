"""The runtime: a bundle runs, without torch and without onnx."""

from adavit.bundle.policy import Policy
from adavit.runtime.session import Prediction, Result, Runtime, load

__all__ = ["Policy", "Prediction", "Result", "Runtime", "load"]
