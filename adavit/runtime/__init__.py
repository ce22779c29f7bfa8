"""The runtime: a bundle runs, without torch and without onnx."""

from adavit.bundle.policy import Policy
from adavit.results import Prediction, Result
from adavit.runtime.loading import load
from adavit.runtime.session import Runtime

__all__ = ["Policy", "Prediction", "Result", "Runtime", "load"]
