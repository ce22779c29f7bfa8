"""Bundles in fp16 and int8: what they hold, that every backend takes them, and that they compute nearly the same."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from cases import WIDE, python, quiet, random_images, random_model, read_config, save, tiny
from onnx import TensorProto, numpy_helper

import adavit
from adavit.calibration.cache import load_ranges
from adavit.calibration.linear import unit
from adavit.export import ExportOptions, export_bundle
from adavit.precision_options import CalibrationOptions
from adavit.bundle.bundle import Bundle
from adavit.tensorrt.build import add_engines
from adavit.tensorrt.options import BuildOptions

pytest.importorskip("modelopt", reason="pip install 'adavit[int8]' to convert engines")

Calibrated = Callable[[str], tuple[Path, dict]]
SIZES = {"K": 5, "h": 2, "c": 2 * WIDE.head_width, "B": 2}
TYPES = {"float32": np.float32, "float16": np.float16}

precisions = pytest.mark.parametrize("precision", ["fp16", "int8"])


def graphs(bundle: Path) -> dict[str, onnx.ModelProto]:
    return {name: onnx.load(bundle / engine["file"]) for name, engine in read_config(bundle)["engines"].items()}


def inputs(engine: dict) -> dict[str, np.ndarray]:
    """Any input an engine may be given."""
    source = np.random.default_rng(0)
    found = {}
    for tensor in engine["inputs"]:
        shape = [SIZES.get(size, size) for size in tensor["shape"]]
        if tensor["dtype"] == "int64":
            found[tensor["name"]] = np.array([1, 4])
        else:
            found[tensor["name"]] = (source.standard_normal(shape) * 0.3).astype(TYPES[tensor["dtype"]])
    return found


@precisions
def test_decisions_and_classes_stay_close(calibrated: Calibrated, precision: str) -> None:
    images = random_images(WIDE, 16, seed=9)
    wanted = adavit.load(calibrated("fp32")[0], threads=1).run(images)
    found = adavit.load(calibrated(precision)[0], threads=1).run(images, policy=wanted.policy)
    allowed = {"fp16": 0.01, "int8": 0.35}[precision]
    assert np.abs(found.logits - wanted.logits).max() < allowed * np.abs(wanted.logits).max()
    own = adavit.load(calibrated(precision)[0], threads=1).run(images).policy
    same = np.mean([(getattr(own, kind) == getattr(wanted.policy, kind)).mean() for kind in ("tokens", "heads")])
    assert same > {"fp16": 0.999, "int8": 0.97}[precision]


@precisions
def test_other_precisions_run_without_engines_for_sets_of_heads(calibrated: Calibrated, precision: str) -> None:
    runtime, images = adavit.load(calibrated(precision)[0], threads=1), random_images(WIDE, 2)
    before = runtime.run(images)
    assert runtime.specialise(before.policy) == 0
    np.testing.assert_array_equal(runtime.run(images).logits, before.logits)


@precisions
def test_the_bundle_is_smaller_and_says_what_it_is(calibrated: Calibrated, precision: str) -> None:
    bundle, report = calibrated(precision)
    config = read_config(bundle)
    size, full = (sum(e["bytes"] for e in read_config(b)["engines"].values()) for b in (bundle, calibrated("fp32")[0]))
    assert size < {"fp16": 0.65, "int8": 0.55}[precision] * full  # tiny engines are half descriptions
    assert config["precision"] == report["precision"] == precision
    assert sum(config["statistics"]["batch"].values()) == 32
    kinds = {name: engine["precision"] for name, engine in config["engines"].items()}
    assert all(kinds[name] == "fp32" for name in kinds if name in ("stem", "head", "empty") or "decide" in name)
    converted = {name for name in kinds if name.startswith("blocks.") and "decide" not in name}
    converted -= {name for name in converted if "attention_gather" in name and precision == "int8"}
    assert {kinds[name] for name in converted} == {precision}
    gathering = {kinds[name] for name in kinds if name.endswith("attention_gather")}
    assert gathering == {"fp32" if precision == "int8" else "fp16"}  # whose weights are all handed to it
    assert report["calibration"]["engines"]["blocks.0.attention"]["samples"] == 32


def test_sums_normalisations_and_softmax_stay_in_fp32(calibrated: Calibrated) -> None:
    for name, model in graphs(calibrated("fp16")[0]).items():
        inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
        kinds = {
            v.name: v.type.tensor_type.elem_type for v in (*inferred.value_info, *inferred.input, *inferred.output)
        }
        kinds |= {value.name: value.data_type for value in inferred.initializer}
        makers = {value: node for node in inferred.node for value in node.output}
        if name.endswith((".attention", ".mlp", ".attention_gather", ".mlp_gather")):
            assert makers["y"].op_type == "Add", name  # and not a cast of a sum in fp16
        if name.startswith("blocks.") and "decide" not in name and not name.endswith("_set"):
            matrices = [value for value in inferred.initializer if len(value.dims) > 1]
            assert {kinds[value.name] for value in matrices} <= {TensorProto.FLOAT16}, name
        for node in inferred.node:
            if node.op_type in ("LayerNormalization", "Softmax"):
                assert {kinds[value] for value in (*node.input, *node.output)} == {TensorProto.FLOAT}, name
            if node.op_type == "LayerNormalization":
                assert "Cast" not in {makers[value].op_type for value in node.input if value in makers}, name
            if node.op_type == "MatMul" and name.startswith("blocks.") and "decide" not in name:
                assert {kinds[value] for value in node.input} == {TensorProto.FLOAT16}, name
            if node.output[0] == "y" and node.op_type == "Add":
                assert {kinds[value] for value in node.input} == {TensorProto.FLOAT}, name


def test_tokens_may_be_larger_than_fp16_holds(pictures: Path, tmp_path: Path) -> None:
    arch = tiny(depth=2, head_policy=False)
    model = random_model(arch, sublayers=2.0)
    with torch.no_grad():
        model.pos_embed[..., 0] += 7e4  # which no sub-layer takes away again
    source, images = save(model, tmp_path / "model.safetensors"), random_images(arch, 4)
    calibration = CalibrationOptions("fp16", (pictures,), tmp_path / "ranges.npz")
    loaded = []
    for precision in ("fp32", "fp16"):
        options = ExportOptions(
            with_dense=True, verify=False, threads=1, calibration=replace(calibration, precision=precision)
        )
        export_bundle(source, tmp_path / precision, options, quiet)
        loaded.append(adavit.load(tmp_path / precision, threads=1))
    wanted, found = (runtime.run(images) for runtime in loaded)
    np.testing.assert_allclose(found.logits, wanted.logits, atol=0.01)
    np.testing.assert_allclose(loaded[1].run_dense(images), loaded[0].run_dense(images), atol=0.01)


def test_linear_layers_take_codes_of_seven_bits(calibrated: Calibrated) -> None:
    for name, model in graphs(calibrated("int8")[0]).items():
        makers = {node.output[0]: node.op_type for node in model.graph.node}
        codes = [
            numpy_helper.to_array(v) for v in model.graph.initializer if v.data_type == TensorProto.INT8 and v.dims
        ]
        largest = max((int(np.abs(code.astype(int)).max()) for code in codes), default=0)
        assert largest in (0, 64), name
        if not name.endswith("_weights"):  # one scale for each output channel
            assert all((np.abs(code.astype(int)).max(0) == 64).all() for code in codes), name
        weighted = [
            n for n in model.graph.node if n.op_type == "MatMul" and makers.get(n.input[1]) == "DequantizeLinear"
        ]
        expected = {"attention": 4, "mlp": 2, "mlp_gather": 1, "dense": 6 * WIDE.depth}
        assert len(weighted) == expected.get(name.rsplit(".", 1)[-1], 0), name
        assert all(makers[node.input[0]] == "DequantizeLinear" for node in weighted), name
        # ONNX Runtime fuses no product that shares what it reads with another, and is slow with zero points.
        assert len({node.input[0] for node in weighted}) == len(weighted), name
        weights = {node.input[1] for node in weighted}
        assert all(len(node.input) == 2 for node in model.graph.node if node.output[0] in weights), name
        assert {opset.domain for opset in model.opset_import} == {""}


def test_gathered_weights_are_the_nearest_codes(calibrated: Calibrated) -> None:
    runtimes = [adavit.load(calibrated(precision)[0], threads=1) for precision in ("fp32", "int8")]
    heads = np.arange(WIDE.heads)
    for kind in ("attention", "mlp"):
        gathered = (getattr(runtime.dispatcher.head_weights, kind)(1, heads) for runtime in runtimes)
        for wanted, found in zip(*([rows.numpy() for rows in one] for one in gathered), strict=True):
            step = np.abs(wanted).max() / 64
            assert np.abs(found - wanted).max() <= 0.5 * step * (1 + 1e-5)


def test_the_largest_code_is_the_largest_input_of_calibration(calibrated: Calibrated) -> None:
    bundle = calibrated("int8")[0]
    ranges, _ = load_ranges(bundle.parent / "calibration.npz")
    for name, model in graphs(bundle).items():
        makers = {node.output[0]: node for node in model.graph.node}
        constants = {value.name: numpy_helper.to_array(value) for value in model.graph.initializer}
        read = [makers.get(node.input[0]) for node in model.graph.node if node.op_type == "MatMul"]
        steps = {float(constants[node.input[1]]) for node in read if node and node.op_type == "DequantizeLinear"}
        largest = [found.peak / 127 for found in ranges.histograms.get(unit(name), {}).values()]
        assert all(min(abs(step / one - 1) for one in largest) < 1e-5 for step in steps), name
        assert len(steps) == {"attention": 2, "mlp": 2, "mlp_gather": 1, "dense": 12}.get(name.rsplit(".", 1)[-1], 0)


@precisions
def test_openvino_computes_the_same(calibrated: Calibrated, precision: str) -> None:
    openvino = pytest.importorskip("openvino")
    ort = pytest.importorskip("onnxruntime")
    bundle, core = Bundle.open(calibrated(precision)[0]), openvino.Core()
    options = ort.SessionOptions()
    options.use_per_session_threads = False
    adavit.load(bundle.path, threads=1)  # sets the pool that the sessions here use
    for name, engine in read_config(bundle.path)["engines"].items():
        if engine["precision"] == "fp32":
            continue
        data, given = bundle.read(name), inputs(engine)
        wanted = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"]).run(None, given)
        model = core.compile_model(core.read_model(data), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        found = model(list(given.values()))
        for position, value in enumerate(wanted):
            scale = max(1.0, float(np.abs(value.astype(np.float32)).max()))
            difference = np.abs(found[position].astype(np.float32) - value.astype(np.float32)).max()
            assert difference < {"fp16": 0.01, "int8": 0.02}[precision] * scale, name


@precisions
def test_tensorrt_builds_every_engine(calibrated: Calibrated, precision: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    bundle = shutil.copytree(calibrated(precision)[0], tmp_path / "bundle")
    built = add_engines(bundle, BuildOptions(target=("tensorrt-rtx",), compute_capability=(89,)), quiet)
    (engines,) = built.values()
    assert set(engines["engines"]) == set(read_config(bundle)["engines"])


def test_the_same_seed_gives_the_same_bytes(calibrated: Calibrated, busy: Path, pictures: Path, tmp_path: Path) -> None:
    code = "import sys\nfrom adavit.cli import export\nexport(sys.argv[1:], standalone_mode=False)"
    done = python(
        code, busy, "--output", tmp_path / "again", "--with-dense", "--no-verify", "--threads", 1,
        "--precision", "int8", "--calibration-images", pictures,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    again, before = (read_config(bundle)["engines"] for bundle in (tmp_path / "again", calibrated("int8")[0]))
    assert {name: engine["sha256"] for name, engine in again.items()} == {
        name: engine["sha256"] for name, engine in before.items()
    }
    assert (tmp_path / "again.calibration.npz").is_file()
