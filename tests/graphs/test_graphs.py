"""Graphs of a bundle in tools that know nothing of adavit, and what they take on disk."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
from cases import DENSE, export, random_images, random_model, stored_files, tiny

import adavit
from adavit.architecture import Architecture
from adavit.bundle.graphs import Graphs
from adavit.bundle.keys import BlockKey, Sublayers

MODELS = {
    "patch": tiny(),
    "t2t": tiny(stem="t2t", patch_size=16, qkv_bias=False),
    "heads alone": tiny(token_policy=False, sublayer_policy=False, keep=0),
    "dense": DENSE,
}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Bundles of small models by name."""
    made: dict[str, Path] = {}

    def bundle(name: str) -> Path:
        if name not in made:
            made[name] = export(random_model(MODELS[name]), tmp_path_factory.mktemp("bundle"))
        return made[name]

    return bundle


def graph_files(bundle: Path) -> dict[str, Path]:
    return {name: bundle / file for name, file in stored_files(bundle).items() if name != "weights"}


@pytest.mark.parametrize("name", MODELS)
def test_onnx_finds_every_graph_right(name: str, bundles: Callable[[str], Path]) -> None:
    for file in graph_files(bundles(name)).values():
        onnx.checker.check_model(file, full_check=True)
        graph = onnx.load(file)
        assert [opset.domain for opset in graph.opset_import] == [""]
        assert onnx.numpy_helper.to_array(graph.graph.initializer[0]).size


@pytest.mark.parametrize("name", MODELS)
def test_plain_onnx_runtime_opens_every_graph(
    name: str, bundles: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for file in graph_files(bundles(name)).values():
        onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])


@pytest.mark.openvino
@pytest.mark.parametrize("name", MODELS)
def test_plain_openvino_opens_every_graph(
    name: str, bundles: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for file in graph_files(bundles(name)).values():
        assert openvino.Core().read_model(file).outputs


def test_plain_onnx_runtime_computes_what_the_runtime_does(tiny_bundle: Path, runtime: adavit.Runtime) -> None:
    arch, graphs, files = runtime.architecture, Graphs(runtime.bundle), graph_files(tiny_bundle)
    image = random_images(arch, 1)

    def run(name: str, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        session = onnxruntime.InferenceSession(files[name], providers=["CPUExecutionProvider"])
        return dict(zip([value.name for value in session.get_outputs()], session.run(None, inputs), strict=True))

    policy = runtime.run(image).policy
    y = run("stem", images=image)["y"]
    for block in range(arch.depth):
        runs = Sublayers(*policy.sublayers[0, block].tolist())
        key = BlockKey(block, runs, tuple(policy.heads[0, block].nonzero()[0].tolist()))
        given = {"tokens": policy.tokens[0, block].nonzero()[0]} if any(runs) else {}
        found = run(f"blocks.{block}.{runs.name}", x=y, **given, **graphs.head_weights(key))
        y = found.get("y", y)
    np.testing.assert_allclose(found["logits"], runtime.run(image).logits, atol=1e-5)
    dense = run("dense", images=image)["logits"]
    np.testing.assert_allclose(dense, runtime.run_dense(image), atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_a_bundle_holds_each_weight_once(name: str, bundles: Callable[[str], Path]) -> None:
    bundle, arch = bundles(name), MODELS[name]
    model = random_model(arch)
    count = sum(value.numel() for value in model.state_dict().values())
    weights = (bundle / stored_files(bundle)["weights"]).stat().st_size
    tensors = len(model.state_dict()) + 12  # of the stem
    assert 0 < weights - 4 * (count + _derived(arch)) < 1000 + 200 * tensors
    graphs = [file.stat().st_size for file in graph_files(bundle).values()]
    nodes = sum(len(onnx.load(file, load_external_data=False).graph.node) for file in graph_files(bundle).values())
    assert sum(graphs) < 300 * nodes


def _derived(arch: Architecture) -> int:
    """Values of the tensors that a stem is made of beside the checkpoint's."""
    if arch.stem == "patch":
        return 0
    unfold = 147 * 147
    layers = [64 * 3 * unfolded + 64 * 64 + 64 * 6 for unfolded in (147, 64 * 9)]
    return unfold + sum(layers)


def test_the_same_export_has_the_same_bytes(tmp_path: Path, checkpoint: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    bundles = [export(checkpoint, folder, verify=False) for folder in (tmp_path / "a", tmp_path / "b")]
    for path in sorted(path for path in bundles[0].rglob("*") if path.is_file()):
        assert path.read_bytes() == (bundles[1] / path.relative_to(bundles[0])).read_bytes(), path
