"""The sample for Node.js prints what the runtime finds."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from example_cases import EXAMPLES

import adavit
from adavit.bundle.demo import demo_bundle

pytestmark = pytest.mark.slow
Run = Callable[..., subprocess.CompletedProcess[str]]
USAGE = "give a model and a picture: node classify.js MODEL.onnx PICTURE [--budget 0.35]"
SHARE = "give a share of the dense MACs, above 0 and at most 1"
PICTURE = demo_bundle().parent / "images" / "shirt" / "00004.png"


@pytest.fixture(scope="module")
def sample(npm: Callable[..., Path], node: str) -> Run:
    folder = npm("node", copied=EXAMPLES)

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [node, "node/classify.js", *map(str, arguments)]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)

    return run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "demo.onnx"
    adavit.export_single_file(demo_bundle(), path, budget_input=True, with_policy=True)
    return path


@pytest.mark.parametrize("budget", [None, 0.35])
def test_the_sample_prints_what_the_runtime_finds(sample: Run, model: Path, budget: float | None) -> None:
    runtime = adavit.load("demo", threads=1, specialise=False)
    result = runtime.run(runtime.preprocess(PICTURE)[None], budget=budget)
    done = sample(model, PICTURE, *([] if budget is None else ["--budget", budget]))
    assert done.returncode == 0, done.stderr
    *classes, macs = done.stdout.splitlines()
    shares = np.exp(result.logits[0], dtype=np.float64)
    shares /= shares.sum()
    best = shares.argsort()[::-1][:3]
    assert runtime.labels and [line.split()[0] for line in classes] == [runtime.labels[index] for index in best]
    np.testing.assert_allclose([float(line.split()[1]) for line in classes], 100 * shares[best], atol=0.01)
    assert macs.startswith(f"{result.macs[0]} MACs, ") and macs.endswith(f" of the dense {runtime.dense_macs}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), f"error: {USAGE}"),
        (("none.onnx",), f"error: {USAGE}"),
        (("none.onnx", PICTURE, "more"), f"error: {USAGE}"),
        (("none", PICTURE), f"error: {USAGE}"),
        (("none.onnx", PICTURE), "error: ENOENT: no such file or directory, open 'none.json'"),
        *(
            (("none.onnx", PICTURE, f"--budget={text}"), f'error: the budget is "{text}"; {SHARE}')
            for text in ("much", "", "35", "0", "NaN")
        ),
    ],
)
def test_what_is_wrong_is_one_line(sample: Run, arguments: tuple[object, ...], message: str) -> None:
    done = sample(*arguments)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"{message}\n")
