"""The bundle of a model without policies: its dense graph alone, which works wherever a bundle does."""

import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import (
    DENSE,
    oracle,
    picture,
    random_images,
    random_model,
    read_config,
    stored_files,
    tiny,
    with_weights,
    write_config,
)

import adavit
from adavit.bundle.operating_points import Offsets
from adavit.errors import BackendError, BundleError, InputError
from adavit.macs import dense_macs
from adavit.measure.compare import ObservedRuntime
from adavit.runtime import Policy
from adavit.runtime import dense as dense_module

both_backends = pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
IMAGES = random_images(DENSE, 5)
FP32 = {"onnxruntime": {}, "openvino": {"provider": "fp32"}}


@pytest.fixture(scope="module")
def wanted() -> np.ndarray:
    return oracle(random_model(DENSE), IMAGES)[0]


def test_the_bundle_has_one_graph(plain: tuple[Path, Path]) -> None:
    assert list(stored_files(plain[0])) == ["weights", "dense"]
    assert sorted(path.name for path in (plain[0] / "fp32").iterdir()) == ["dense.onnx", "model.safetensors"]
    card = (plain[0] / "README.md").read_text()
    assert "It has no policies" in card
    assert "adaptive" not in card


@both_backends
@pytest.mark.parametrize("parallel", ["operators", "samples"])
@pytest.mark.parametrize("at_once", [2, 16])
def test_it_computes_its_model(
    backend: str, parallel: str, at_once: int, plain: tuple[Path, Path], wanted: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(dense_module, "SIDE_BY_SIDE", at_once)
    runtime = adavit.load(plain[0], backend, threads=2, parallel=parallel, **FP32[backend])
    result = runtime.run(IMAGES)
    np.testing.assert_allclose(result.logits, wanted, atol=1e-4)
    np.testing.assert_allclose(runtime.run_dense(IMAGES), wanted, atol=1e-4)
    assert result.macs.tolist() == [dense_macs(DENSE)] * 5
    assert result.policy.usage() == {"tokens": 1, "heads": 1, "sublayers": 1}
    again = runtime.run(IMAGES, policy=result.policy)
    np.testing.assert_allclose(again.logits, wanted, atol=1e-4)
    assert runtime.specialise(result.policy) == 0
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: runtime.run(IMAGES).logits, range(8)):
            np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_predictions(plain: tuple[Path, Path]) -> None:
    runtime = adavit.load(plain[0], threads=1)
    pictures: list[Any] = [picture(seed) for seed in range(20)]
    found = runtime.predict([*pictures, "nothing.png"], top=2)
    logits = runtime.run(np.stack([runtime.preprocess(p) for p in pictures])).logits
    assert [prediction.classes[0] for prediction in found[:20]] == logits.argmax(1).tolist()
    assert found[0].macs == dense_macs(DENSE)
    assert "nothing.png" in (found[20].error or "")


def test_the_fastest_backend_is_found(plain: tuple[Path, Path], cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adavit.runtime.fastest_backend.SECONDS", 0.01)
    monkeypatch.setattr("adavit.runtime.fastest_backend.ROUNDS", 1)
    runtime = adavit.load(plain[0], "auto", threads=1)
    assert runtime.choice is not None
    assert {"onnxruntime"} <= set(runtime.choice.milliseconds)


def test_it_can_be_pickled(plain: tuple[Path, Path]) -> None:
    runtime = adavit.load(plain[0], threads=1)
    again = pickle.loads(pickle.dumps(runtime))
    np.testing.assert_array_equal(again.run(IMAGES).logits, runtime.run(IMAGES).logits)


def test_what_needs_policies_says_so(plain: tuple[Path, Path]) -> None:
    runtime = adavit.load(plain[0], threads=1)
    dropping = Policy.dense(DENSE, 5)
    dropping.sublayers[0, 1, 0] = False
    with pytest.raises(InputError, match="block 1, where this model always keeps all"):
        runtime.run(IMAGES, policy=dropping)
    with pytest.raises(InputError, match="no policies, so there is nothing to add offsets to"):
        runtime.run(IMAGES, budget=Offsets(heads=1.0))
    with pytest.raises(InputError, match="no policies, so there is nothing to add offsets to"):
        runtime.run(IMAGES, budget=[Offsets()] * 4 + [Offsets(heads=1.0)])
    with pytest.raises(InputError, match="no policies, so there is nothing to observe"):
        runtime.run(IMAGES, observe=print)
    with pytest.raises(InputError, match="nothing to compare; adavit-train adapt trains policies"):
        ObservedRuntime(runtime)


def test_what_is_damaged(plain: tuple[Path, Path], tmp_path: Path) -> None:
    bundle = shutil.copytree(plain[0], tmp_path / "bundle")
    with_weights(bundle, "head.bias", np.nan)
    with pytest.raises(BackendError, match="the logits of image 0 are NaN, infinite"):
        adavit.load(bundle, threads=1).run(IMAGES)
    config = read_config(bundle)
    files = {name: entry for name, entry in config["precisions"]["fp32"].items() if name != "dense"}
    write_config(bundle, {**config, "precisions": {"fp32": files}})
    with pytest.raises(BundleError, match="the graphs of fp32 are not those of its architecture"):
        adavit.load(bundle, threads=1)
    adaptive = tiny()
    macs = {"dense": dense_macs(adaptive), "outside_blocks": adavit.macs.outside_macs(adaptive)}
    write_config(bundle, {**config, "architecture": adaptive.to_dict(), "macs": macs})
    with pytest.raises(BundleError, match="the graphs of fp32 are not those of its architecture"):
        adavit.load(bundle, threads=1)


def test_the_folder_may_go_when_it_is_loaded(plain: tuple[Path, Path], tmp_path: Path, wanted: np.ndarray) -> None:
    bundle = shutil.copytree(plain[0], tmp_path / "bundle")
    runtime = adavit.load(bundle, threads=1)
    shutil.rmtree(bundle)
    np.testing.assert_allclose(runtime.run(IMAGES).logits, wanted, atol=1e-4)


def test_one_policy_alone_is_adaptive(tmp_path: Path) -> None:
    from cases import export

    arch = tiny(head_policy=False, sublayer_policy=False)
    runtime = adavit.load(export(random_model(arch), tmp_path), threads=1)
    assert len(runtime.graphs.files.blocks) == arch.depth
    assert 0 < runtime.run(random_images(arch, 4)).policy.usage()["tokens"] < 1
