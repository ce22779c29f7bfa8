"""Single files of the golden checkpoints in JavaScript's two runtimes decide as the released code did."""

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from cases import GOLDEN_FILES, assert_same_policy, golden
from example_cases import plain_server

import adavit
from adavit.runtime import Policy

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def driver(npm: Callable[..., Path]) -> Path:
    folder = npm("engines", "puppeteer-core@24", "onnxruntime-node@~1.30.0")
    (folder / "package.json").write_text('{"type": "module"}')
    for name in ("engines.js", "outputs.js"):
        shutil.copy(HERE / name, folder)
    return folder


@pytest.fixture(scope="module")
def served(prepared: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A folder with onnxruntime-web, and its address."""
    folder = tmp_path_factory.mktemp("served")
    shutil.copytree(prepared[0] / "ort", folder / "ort")
    shutil.copy(HERE / "outputs.js", folder)
    with plain_server(folder) as url:
        yield folder, url


@pytest.fixture(scope="module", params=sorted(GOLDEN_FILES))
def model(request: pytest.FixtureRequest, golden_bundles: Callable[[str], Path], served: tuple[Path, str]) -> str:
    """The name of a golden checkpoint whose single file and images are in the folder."""
    name: str = request.param
    adavit.export_single_file(golden_bundles(name), served[0] / f"{name}.onnx", with_policy=True)
    golden(name)[0].astype("<f4").tofile(served[0] / f"{name}.raw")
    return name


@pytest.mark.parametrize("engine", ["node", "web"])
def test_golden_checkpoints_decide_alike(
    engine: str, model: str, driver: Path, served: tuple[Path, str], node: str, chromium: str
) -> None:
    images, logits, policy = golden(model)
    side = images.shape[-1]
    asked = {"folder": str(served[0]), "name": model, "side": side, "url": served[1], "chromium": chromium}
    command = [node, "engines.js", engine, json.dumps(asked)]
    done = subprocess.run(command, cwd=driver, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    wanted = {kind: getattr(policy, kind) for kind in ("tokens", "heads", "sublayers")}
    masks = {kind: np.array(found[kind], bool).reshape(mask.shape) for kind, mask in wanted.items()}
    assert_same_policy(Policy(**masks), policy)
    np.testing.assert_allclose(np.reshape(found["logits"], logits.shape), logits, atol=1e-4)
