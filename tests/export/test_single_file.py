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
    DENSE,
    GOLDEN,
    GOLDEN_FILES,
    WIDE,
    assert_same_policy,
    export,
    golden,
    invoke,
    pictures_in,
    random_images,
    random_model,
    read_config,
    refusal,
    save,
    tiny,
    write_config,
)

import adavit
from adavit import cli
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


@pytest.fixture(scope="module")
def budgeted(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny bundle with operating points."""
    return with_budgets(shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("budgeted") / "bundle"))


@pytest.fixture(scope="module")
def choosing(budgeted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its file, which takes a budget and tells its policy."""
    path = tmp_path_factory.mktemp("choosing") / "model.onnx"
    write(budgeted, path, budget_input=True, with_policy=True)
    return path


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


def test_one_operating_point(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    only = Budgets((OperatingPoint(0.5, Offsets(), {}),), {})
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
    onnx.checker.check_model(onnx.load(tmp_path / "model.onnx"), full_check=True)
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


def test_weights_in_fp16(budgeted: Path, choosing: Path, tmp_path: Path) -> None:
    report = write(budgeted, tmp_path / "half.onnx", weights="fp16", budget_input=True, with_policy=True)
    assert report["weights"] == "fp16"
    assert report["bytes"] < 0.75 * choosing.stat().st_size
    images = random_images(tiny(), 8)
    found, wanted = (run(path, images, [0] * 8) for path in (tmp_path / "half.onnx", choosing))
    same = (found["tokens"] == wanted["tokens"]).all((1, 2)) & (found["heads"] == wanted["heads"]).all((1, 2))
    assert same.mean() > 0.5
    np.testing.assert_allclose(found["logits"][same], wanted["logits"][same], atol=0.05)


def test_int8(busy: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    pictures, bundle = pictures_in(tmp_path / "photos", 20), tmp_path / "bundle"
    adavit.export_bundle(
        busy, bundle, precision="fp32,int8", calibration_images=pictures, threads=1, samples=16, verify=False
    )
    report = write(bundle, tmp_path / "int8.onnx", precision="int8", with_policy=True)
    assert (report["precision"], report["weights"]) == ("int8", "int8")
    assert report["verified"]["decisions"] > 0
    assert report["bytes"] < 0.6 * write(bundle, tmp_path / "fp32.onnx")["bytes"]
    images = random_images(WIDE, 8)
    wanted = adavit.load(bundle, threads=1, precision="int8", specialise=False).run(images)
    found = run(tmp_path / "int8.onnx", images)
    same = np.mean([(found[kind] == getattr(wanted.policy, kind)).mean() for kind in ("tokens", "heads", "sublayers")])
    assert same > 0.98
    kinds = {node.op_type for node in nodes_of(onnx.load(tmp_path / "int8.onnx").graph)}
    assert {"QuantizeLinear", "DequantizeLinear"} <= kinds


def nodes_of(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """All nodes of a graph, and of those inside it."""
    inside = [one.g for node in graph.node for one in node.attribute if one.type == onnx.AttributeProto.GRAPH]
    return [*graph.node, *(node for one in inside for node in nodes_of(one))]


def test_onnx_runtimes_own_operators(budgeted: Path, tmp_path: Path) -> None:
    pictures = pictures_in(tmp_path, 3)
    for qkv_bias in (True, False):
        folder = tmp_path / str(qkv_bias)
        folder.mkdir()
        bundle = export(random_model(tiny(qkv_bias=qkv_bias), heads=50.0), folder, verify=False)
        report = write(
            bundle, folder / "model.onnx", domain="onnxruntime", with_policy=True, calibration_images=pictures
        )
        assert report["blocks"] == {"masked": 2, "gathered": 0, "constant_head_sets": 0}
        images = random_images(tiny(), 4)
        found = run(folder / "model.onnx", images)
        assert_same(found, adavit.load(bundle, threads=1, specialise=False).run(images))
        kinds = {opset.domain for opset in onnx.load(folder / "model.onnx").opset_import}
        assert kinds == {"", "com.microsoft"}


def test_frequent_head_sets_become_constants(tmp_path: Path) -> None:
    bundle = export(random_model(tiny(), sublayers=1.5), tmp_path, verify=False)
    pictures, images = pictures_in(tmp_path, 8), random_images(tiny(), 12)
    wanted = adavit.load(bundle, threads=1, specialise=False).run(images)
    sizes = []
    for domain, factor in (("standard", 1.0), ("standard", 1.05), ("standard", 2.0), ("onnxruntime", 2.0)):
        path = tmp_path / f"{domain}.{factor}.onnx"
        report = write(bundle, path, domain=domain, max_size=factor, calibration_images=pictures, with_policy=True)
        assert_same(run(path, images), wanted)
        sizes.append(report["bytes"])
        assert (report["blocks"]["constant_head_sets"] > 0) == (factor > 1)
    assert sizes[0] < sizes[1] < sizes[2]
    assert sizes[1] < 1.05 * sizes[0]


def test_onnx_runtimes_own_format(budgeted: Path, tmp_path: Path) -> None:
    report = write(budgeted, tmp_path / "model.onnx", ort_format=True, weights="fp16", with_policy=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.json", "model.onnx", "model.ort"]
    assert report["ort"] == str(tmp_path / "model.ort")
    images = random_images(tiny(), 4)
    first, second = (run(tmp_path / f"model.{kind}", images) for kind in ("onnx", "ort"))
    for name, value in first.items():
        np.testing.assert_allclose(second[name], value, atol=1e-4)
    write(budgeted, tmp_path / "full.onnx", ort_format=True, with_policy=True)
    assert (tmp_path / "model.ort").stat().st_size < 0.8 * (tmp_path / "full.ort").stat().st_size


def test_openvino_runs_it(choosing: Path) -> None:
    images, budgets = random_images(tiny(), 5), np.array([0, 0.3, 0.9, 0.45, 0], np.float32)
    model = openvino.Core().compile_model(choosing, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    made = model({"images": images, "budget": budgets})
    for name, value in run(choosing, images, budgets).items():
        np.testing.assert_allclose(made[name], value, atol=1e-4, err_msg=name)


def test_a_model_without_policies_is_its_dense_graph(plain: tuple[Path, Path], tmp_path: Path) -> None:
    bundle, _ = plain
    for source in plain:
        write(source, tmp_path / "model.onnx", force=True)
        images = random_images(DENSE, 3)
        found = run(tmp_path / "model.onnx", images)
        np.testing.assert_allclose(found["logits"], adavit.load(bundle, threads=1).run(images).logits, atol=1e-4)
    for options in ({"budget": 0.5}, {"budget_input": True}, {"with_policy": True}):
        with pytest.raises(adavit.InputError, match=f"has no policies.*leave out `{next(iter(options))}`"):
            write(bundle, tmp_path / "other.onnx", **options)
    assert not (tmp_path / "other.onnx").exists()


def test_a_checkpoint_with_budgets(busy: Path, tmp_path: Path) -> None:
    pictures = tmp_path / "photos"
    pictures.mkdir()
    path = tmp_path / "model.onnx"
    write(
        busy, path, budget_input=True, budgets=0.75, calibration_images=pictures_in(pictures, 20), budget_images=20,
        labels=None,
    )  # fmt: skip
    assert json.loads(path.with_suffix(".json").read_text())["budget"]["input"]
    assert sorted(one.name for one in tmp_path.iterdir()) == ["model.json", "model.onnx", "photos"]


def test_the_file_is_as_small_as_the_dense_twin(tmp_path: Path) -> None:
    arch = tiny(image_size=64, width=192, hidden=768, depth=4, heads=6)
    bundle = export(random_model(arch), tmp_path, with_dense=True, verify=False)
    report = write(bundle, tmp_path / "model.onnx")
    dense = sum((bundle / "fp32" / name).stat().st_size for name in ("model.safetensors", "dense.onnx"))
    assert report["bytes"] <= 1.02 * dense


@pytest.mark.parametrize(
    ("fault", "value", "message"),
    [
        ("adavit.graphs.single.TOKEN_LOGIT", 0.5, r"model\.onnx: \d+ of block 0's decisions on tokens differ"),
        ("adavit.graphs.single_policy.outside_macs", lambda _: 1, r"model\.onnx: its MACs differ"),
        ("adavit.graphs.nested.NestedBuilder.gelu", lambda self, x: x, r"model\.onnx: .*differ"),
        ("adavit.graphs.single.add_macs", lambda *_: "nothing", r"model\.onnx: ONNX Runtime does not run the file"),
    ],
)
def test_a_wrong_file_is_not_kept(
    fault: str, value: Any, message: str, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fault, value)
    with pytest.raises(adavit.VerificationError, match=message):
        write(tiny_bundle, tmp_path / "model.onnx", with_policy=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 2}, "budget is 2: expected a number above 0 to 1"),
        ({"budget": "0.4"}, "budget is '0.4'"),
        ({"budget": 0.1}, "out of range: this bundle's go from 0.3 to 0.9"),
        ({"budget": 0.4, "budget_input": True}, "not both"),
        ({"budget_input": 1}, "budget_input is 1: expected True or False"),
        ({"domain": "cuda"}, "domain is 'cuda': choose from standard, onnxruntime"),
        ({"weights": "int8"}, "weights is 'int8': choose from fp32, fp16"),
        ({"max_size": 0.5}, "max_size is 0.5: expected a number from 1 to 4"),
        ({"precision": "fp16"}, "precision is 'fp16': choose from fp32, int8"),
        ({"precision": "int8"}, "is not in precision 'int8'"),
        ({"precision": "int8", "weights": "fp16"}, "leave out `weights`"),
        ({"precision": "int8", "max_size": 2}, "leave out `max_size`"),
        ({"threads": 0}, "threads is 0"),
        ({"progress": 3}, "progress is 3"),
    ],
    ids=str,
)
def test_options_that_cannot_be(options: dict[str, Any], message: str, budgeted: Path, tmp_path: Path) -> None:
    with pytest.raises(adavit.InputError) as caught:
        adavit.export_single_file(budgeted, tmp_path / "model.onnx", **options)
    assert message in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_targets_that_cannot_be(budgeted: Path, tmp_path: Path) -> None:
    (tmp_path / "model.json").write_text("mine")
    (tmp_path / "folder.onnx").mkdir()
    for name, message in (
        ("model.onnx", r"model\.json: already there; give `force=True`"),
        ("model.bin", r"ends in \.onnx"),
        ("folder.onnx", "is a folder"),
        ("nowhere/model.onnx", "no such folder"),
    ):
        with pytest.raises(adavit.InputError, match=message):
            write(budgeted, tmp_path / name)
    assert (tmp_path / "model.json").read_text() == "mine"
    write(budgeted, tmp_path / "model.onnx", force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.onnx", "model.json", "model.onnx"]


def test_budgets_need_points(tiny_bundle: Path, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(adavit.InputError, match="is a checkpoint, which has no operating points; give `budgets`"):
        write(checkpoint, tmp_path / "model.onnx", budget_input=True)
    for options in ({"budget": 0.4}, {"budget_input": True}):
        with pytest.raises(adavit.InputError, match="has no operating points; add them with adavit-export"):
            write(tiny_bundle, tmp_path / "model.onnx", **options)


def test_the_command(budgeted: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    done = invoke(cli.export, budgeted, "--single-file", path, "--budget-input", "--threads", 1)
    assert (done.exit_code, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"file        {path}: ")
    assert "budgets     0.3 to 0.9; 0 is the trained policy" in lines
    assert any(line.startswith("verified    5 images: ") for line in lines)
    done = invoke(cli.export, budgeted, "--single-file", path, "--force", "--threads", 1, "--json", "-", "--no-verify")
    report = json.loads(done.stdout)
    assert report["verified"] is None
    assert set(report) == {
        "file", "json", "bytes", "precision", "weights", "domain", "opset", "budget", "blocks", "macs", "verified",
        "seconds",
    }  # fmt: skip


def test_the_command_exports_a_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("a\nb\nc\nd\ne\n")
    path = tmp_path / "model.onnx"
    done = invoke(
        cli.export, checkpoint, "--single-file", path, "--labels", labels, "--crop-ratio", 0.5, "--threads", 1
    )
    assert (done.exit_code, done.stderr) == (0, "")
    beside = json.loads(path.with_suffix(".json").read_text())
    assert (beside["labels"], beside["preprocessing"]["crop_ratio"]) == (list("abcde"), 0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget-input"], "without --single-file, leave out --budget-input"),
        (["--with-policy"], "without --single-file, leave out --with-policy"),
        (["--domain", "standard"], "without --single-file, leave out --domain"),
        (["--max-size", "2"], "without --single-file, leave out --max-size"),
        (["--weights", "fp16"], "without --single-file, leave out --weights"),
        (["--ort-format"], "without --single-file, leave out --ort-format"),
        (["--budget", "0.5"], "without --single-file, leave out --budget"),
        (["--single-file", "m.onnx", "--output", "b"], "to write a single file, leave out --output"),
        (["--single-file", "m.onnx", "--target", "tensorrt"], "to write a single file, leave out --target"),
        (["--single-file", "m.onnx", "--opset", "20"], "to write a single file, leave out --opset"),
        (["--single-file", "m.onnx", "--labels", "l"], "of a BUNDLE, leave out --labels"),
        (["--single-file", "m.onnx", "--budgets", "0.5"], "of a BUNDLE, leave out --budgets"),
        (["--single-file", "m.onnx", "--precision", "fp32,int8"], "has one --precision"),
        (["--single-file", "m.onnx", "--precision", "int8", "--weights", "fp16"], "leave out --weights"),
        (["--single-file", "m.onnx", "--max-size", "9"], "is not in the range"),
        (["--single-file", "m.onnx", "--budget", "0.3", "--budget-input"], "not both"),
        (["--single-file", "m.txt"], "ends in .onnx"),
    ],
    ids=" ".join,
)
def test_usage(arguments: list[str], message: str, budgeted: Path) -> None:
    assert message in refusal(invoke(cli.export, budgeted, *arguments), code=2)


def test_a_source_is_needed() -> None:
    assert "give a BUNDLE or a CHECKPOINT" in refusal(invoke(cli.export, "--single-file", "m.onnx"), code=2)


def test_a_missing_source(tmp_path: Path) -> None:
    message = refusal(invoke(cli.export, tmp_path / "nothing.pth", "--single-file", tmp_path / "m.onnx"))
    assert "no such file" in message
    assert not list(tmp_path.iterdir())


def test_other_weights_make_another_file(tmp_path: Path) -> None:
    for seed in (0, 1):
        write(save(random_model(tiny(), seed), tmp_path / f"{seed}.safetensors"), tmp_path / f"{seed}.onnx")
        write(tmp_path / f"{seed}.safetensors", tmp_path / f"again{seed}.onnx")
        assert (tmp_path / f"{seed}.onnx").read_bytes() == (tmp_path / f"again{seed}.onnx").read_bytes()
    assert (tmp_path / "0.onnx").read_bytes() != (tmp_path / "1.onnx").read_bytes()
