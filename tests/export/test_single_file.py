"""A single file: one ONNX graph that decides and skips as the runtime does, in plain ONNX Runtime."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
from cases import (
    GOLDEN,
    GOLDEN_FILES,
    assert_same_policy,
    export,
    golden,
    random_images,
    random_model,
    read_config,
    tiny,
    write_config,
)
from single_cases import assert_same, policy_of, run, write

import adavit
from adavit.bundle.operating_points import Budgets, Offsets, OperatingPoint


@pytest.mark.parametrize("name", GOLDEN_FILES)
def test_recorded_images_are_decided_alike(name: str, tmp_path: Path) -> None:
    images, logits, policy = golden(name)
    report = write(GOLDEN / GOLDEN_FILES[name], tmp_path / "model.onnx", with_policy=True)
    found = run(tmp_path / "model.onnx", images)
    assert_same_policy(policy_of(found), policy)
    np.testing.assert_allclose(found["logits"], logits, atol=1e-4)
    assert report["verified"]["differing_decisions"] == 0
    assert report["verified"]["decisions"] > 0
    assert report["verified"]["max_checkpoint_difference"] < 1e-4


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"stem": "t2t", "image_size": 32, "patch_size": 16, "qkv_bias": False},
        {"image_size": 35, "patch_size": 7, "width": 30, "heads": 5, "hidden": 37, "depth": 2, "keep": 0},
        {"depth": 1, "heads": 1, "width": 32, "classes": 1},
        {"keep": 3},
        {"token_policy": False},
        {"head_policy": False},
        {"sublayer_policy": False, "qkv_bias": False},
        {"head_policy": False, "sublayer_policy": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("bias", [-1.0, 1.0])
def test_shapes_and_policies(changes: dict[str, Any], bias: float, tmp_path: Path) -> None:
    arch = tiny(**changes)
    bundle = export(random_model(arch, heads=bias, sublayers=-bias), tmp_path, verify=False)
    write(bundle, tmp_path / "model.onnx", with_policy=True)
    images = random_images(arch, 6)
    wanted = adavit.load(bundle, threads=1, specialise=False).run(images)
    assert_same(run(tmp_path / "model.onnx", images), wanted)


@pytest.mark.parametrize("biases", [{"heads": -50.0}, {"sublayers": -50.0}, {"tokens": -50.0}, {"tokens": 50.0}])
def test_nothing_kept_and_everything(biases: dict[str, float], tmp_path: Path) -> None:
    bundle = export(random_model(tiny(), **{"sublayers": 2.0, **biases}), tmp_path, verify=False)
    write(bundle, tmp_path / "model.onnx", with_policy=True)
    images = random_images(tiny(), 4)
    wanted = adavit.load(bundle, threads=1, specialise=False).run(images)
    assert_same(run(tmp_path / "model.onnx", images), wanted)


def test_a_batch_is_its_images(choosing: Path) -> None:
    images, budgets = random_images(tiny(), 9), [0, 0.3, 0.9, 0.45, 0, 0.6, 0.35, 0.8, 0.5]
    together = run(choosing, images, budgets)
    assert len(np.unique(together["tokens"].sum((1, 2)))) > 3
    for number, budget in enumerate(budgets):
        alone = run(choosing, images[number : number + 1], [budget])
        for name, value in together.items():
            np.testing.assert_allclose(alone[name][0], value[number], atol=1e-5, err_msg=name)


@pytest.mark.parametrize("budget", [0.3, 0.34, 0.5, 0.55, 0.6, 0.61, 0.75, 0.9])
def test_budgets_are_the_runtimes(budget: float, choosing: Path, budgeted: Path) -> None:
    images, asked = random_images(tiny(), 8), float(np.float32(budget))
    runtime = adavit.load(budgeted, threads=1, specialise=False)
    offsets = runtime.bundle.budgets.offsets(min(max(asked, 0.3), 0.9)) if runtime.bundle.budgets else None
    assert_same(run(choosing, images, [budget] * 8), runtime.run(images, budget=offsets))


def test_no_budget_and_budgets_beyond_the_points(choosing: Path, budgeted: Path) -> None:
    images, runtime = random_images(tiny(), 8), adavit.load(budgeted, threads=1, specialise=False)
    for nothing in (0.0, -1.0, np.nan):
        assert_same(run(choosing, images, [nothing] * 8), runtime.run(images))
    for beyond, nearest in ((0.001, 0.3), (0.95, 0.9), (7.0, 0.9), (np.inf, 0.9)):
        assert_same(run(choosing, images, [beyond] * 8), runtime.run(images, budget=nearest))


@pytest.mark.parametrize("budget", [0.5, 0.209071], ids=["exact", "rounds_down_in_float32"])
def test_one_operating_point(budget: float, tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    only = Budgets((OperatingPoint(budget, Offsets(), {}),), {})
    write_config(bundle, read_config(bundle) | {"budgets": only.to_dict()})
    write(bundle, tmp_path / "model.onnx", budget_input=True, with_policy=True)
    images, runtime = random_images(tiny(), 4), adavit.load(bundle, threads=1, specialise=False)
    assert_same(run(tmp_path / "model.onnx", images, [0, 0.2, 0.5, 0.9]), runtime.run(images))


@pytest.mark.parametrize("budget", [0.3, 0.4, 0.9])
def test_a_budget_is_baked_in(budget: float, budgeted: Path, tmp_path: Path) -> None:
    report = write(budgeted, tmp_path / "model.onnx", budget=budget, with_policy=True)
    images, runtime = random_images(tiny(), 8), adavit.load(budgeted, threads=1, specialise=False)
    assert_same(run(tmp_path / "model.onnx", images), runtime.run(images, budget=budget))
    assert report["budget"] == {"input": False, "baked": budget}


def test_only_what_was_asked_for_comes_in_and_out(budgeted: Path, choosing: Path, tmp_path: Path) -> None:
    write(budgeted, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    assert [(value.name, value.shape) for value in session.get_inputs()] == [("images", ["B", 3, 32, 32])]
    assert [(value.name, value.shape) for value in session.get_outputs()] == [("logits", ["B", 5])]
    model = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert (model.ir_version, model.opset_import[0].version) == (9, 20)  # which ONNX Runtime 1.17 reads
    session = onnxruntime.InferenceSession(choosing, providers=["CPUExecutionProvider"])
    assert [(value.name, value.type, value.shape) for value in session.get_inputs()] == [
        ("images", "tensor(float)", ["B", 3, 32, 32]),
        ("budget", "tensor(float)", ["B"]),
    ]
    assert [(value.name, value.type, value.shape) for value in session.get_outputs()] == [
        ("logits", "tensor(float)", ["B", 5]),
        ("tokens", "tensor(bool)", ["B", 3, 17]),
        ("heads", "tensor(bool)", ["B", 3, 3]),
        ("sublayers", "tensor(bool)", ["B", 3, 2]),
        ("macs", "tensor(int64)", ["B"]),
    ]


def test_wrong_inputs_are_refused(choosing: Path) -> None:
    images = random_images(tiny(), 2)
    for wrong, budgets in (
        (images[:, :, :16], [0, 0]),
        (images.astype(np.float64), [0, 0]),
        (images, None),
        (images, [0]),
        (images, [0, 0, 0]),
        (images[:0], []),
    ):
        with pytest.raises(Exception, match=r"(?i)invalid|missing|reshape|required"):
            run(choosing, wrong, budgets)


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
def test_values_that_are_not_finite_show_in_the_logits(value: float, choosing: Path) -> None:
    images = random_images(tiny(), 3)
    right = run(choosing, images, [0] * 3)["logits"]
    images[1, 0, 3, 3] = value
    found = run(choosing, images, [0] * 3)["logits"]
    assert not np.isfinite(found[1]).any()
    np.testing.assert_array_equal(found[[0, 2]], right[[0, 2]])


def test_it_tells_of_itself(choosing: Path, budgeted: Path) -> None:
    beside = json.loads(choosing.with_suffix(".json").read_text())
    session = onnxruntime.InferenceSession(choosing, providers=["CPUExecutionProvider"])
    inside = session.get_modelmeta().custom_metadata_map
    assert {
        key: value if isinstance(beside[key], str) else json.loads(value) for key, value in inside.items()
    } == beside
    bundle = adavit.load(budgeted, threads=1).bundle
    assert beside["labels"] == ["ant", "bee", "cat", "dog", "elk"]
    assert beside["preprocessing"] == bundle.preprocessor.to_dict()
    assert beside["architecture"] == bundle.architecture.to_dict()
    assert beside["checkpoint"] == bundle.config["checkpoint"]
    assert beside["budget"] == {"input": True, "least": 0.3, "most": 0.9, "trained": 0.6}
    assert beside["made_by"]["adavit"] == adavit.__version__
    assert list(beside["outputs"]) == ["logits", "tokens", "heads", "sublayers", "macs"]


def test_openvino_runs_it(choosing: Path) -> None:
    images, budgets = random_images(tiny(), 5), np.array([0, 0.3, 0.9, 0.45, 0], np.float32)
    model = openvino.Core().compile_model(choosing, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    made = model({"images": images, "budget": budgets})
    for name, value in run(choosing, images, budgets).items():
        np.testing.assert_allclose(made[name], value, atol=1e-4, err_msg=name)
