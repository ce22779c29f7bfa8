"""A runtime leaves the process as it was: other code makes ONNX Runtime sessions of its own, before and after."""

from pathlib import Path

import pytest
from cases import python

SCRIPT = """
import logging, os, sys
import numpy as np
import onnx, onnxruntime
from onnx import helper

how, threads, when = sys.argv[2], int(sys.argv[3]), sys.argv[4]

def another():
    values = [helper.make_tensor_value_info(name, 1, ["n"]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "g", values[:1], values[1:])
    opset = helper.make_opsetid("", 20)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=10).SerializeToString()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    assert session.run(None, {"x": np.ones(2, np.float32)})[0].tolist() == [-1, -1]

def state():
    names = ("SessionOptions", "InferenceSession", "set_default_logger_severity", "set_global_thread_pool_sizes")
    loggers = [(name, logging.getLogger(name).level) for name in (None, "onnxruntime")]
    return dict(os.environ), [getattr(onnxruntime, name) for name in names], loggers, logging.root.handlers[:]

if when == "before":
    another()
before = state()
import adavit
runtime = adavit.load(sys.argv[1], threads=threads, parallel="auto", shared_pool=how == "shared")
images = np.random.default_rng(0).standard_normal((16, 3, 32, 32), dtype=np.float32)
for _ in range(2):
    runtime.run(images[:1])
    result = runtime.run(images)
runtime.specialise(result.policy)
runtime.run(images)
runtime.run_dense(images)
assert state() == before
another()
runtime.run(images)
print("done")
"""


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("threads", [1, 2])
def test_sessions_with_default_options_work(threads: int, when: str, tiny_bundle: Path) -> None:
    done = python(SCRIPT, tiny_bundle, "own", threads, when)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


def test_a_shared_pool_is_the_exception(tiny_bundle: Path) -> None:
    done = python(SCRIPT, tiny_bundle, "shared", 2, "after")
    assert done.returncode == 1
    assert "global thread pool" in done.stderr
    assert "in another\n" in done.stderr  # the application's own session, not the runtime's


def test_one_thread_needs_no_shared_pool(tiny_bundle: Path) -> None:
    done = python(SCRIPT, tiny_bundle, "shared", 1, "after")
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


APPLICATION = """
import sys
import numpy as np
import onnxruntime
onnxruntime.set_global_thread_pool_sizes(1, 1)
import adavit
runtime = adavit.load(sys.argv[1], threads=int(sys.argv[2]), specialise=False)
images = np.random.default_rng(0).standard_normal((6, 3, 32, 32), dtype=np.float32)
assert np.isfinite(runtime.run(images).logits).all()
assert np.isfinite(runtime.run(images[:1]).logits).all()
print("done")
"""


@pytest.mark.parametrize("threads", [1, 2])
def test_a_pool_that_the_application_set_is_used_and_told_of_once(threads: int, tiny_bundle: Path) -> None:
    done = python(APPLICATION, tiny_bundle, threads)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
    assert done.stderr == "this process has set ONNX Runtime's thread pool: sessions share its threads\n"
