"""Single files that tests write and run."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from cases import (
    assert_same_policy,
    read_config,
    write_config,
)

import adavit
from adavit.bundle.operating_points import Budgets, Offsets, OperatingPoint
from adavit.runtime import Policy, Result

POINTS = (
    (0.3, Offsets(-0.6, -0.8, -1.0)),
    (0.5, Offsets((-0.2, -0.4, 0.1), -0.3, (0.0, -0.6, -0.2))),
    (0.6, Offsets()),
    (0.9, Offsets(0.7, 1.5, 2.0)),
)


def write(source: Path, output: Path, **options: Any) -> dict[str, Any]:
    return adavit.export_single_file(source, output, threads=1, **options)


def run(path: Path, images: np.ndarray, budget: Any = None) -> dict[str, np.ndarray]:
    """The file's outputs in ONNX Runtime, with the options that a session has by default."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    given = {"images": images} | ({} if budget is None else {"budget": np.asarray(budget, np.float32)})
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(None, given), strict=True))


def policy_of(found: dict[str, np.ndarray]) -> Policy:
    return Policy(found["tokens"], found["heads"], found["sublayers"])


def assert_same(found: dict[str, np.ndarray], wanted: Result) -> None:
    assert_same_policy(policy_of(found), wanted.policy)
    np.testing.assert_allclose(found["logits"], wanted.logits, atol=1e-4)
    np.testing.assert_array_equal(found["macs"], wanted.macs)
    assert found["macs"].dtype == np.int64


def with_budgets(bundle: Path) -> Path:
    """A bundle with operating points."""
    points = tuple(OperatingPoint(budget, offsets, {}) for budget, offsets in POINTS)
    write_config(bundle, read_config(bundle) | {"budgets": Budgets(points, {}).to_dict()})
    return bundle
