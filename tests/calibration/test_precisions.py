"""A bundle in fp16 and int8 beside fp32: what it holds, and that its graphs compute nearly the same."""

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from cases import WIDE, python, random_images, random_model, read_config, save, stored_files, tiny
from onnx import TensorProto
from safetensors.numpy import load_file

import adavit
from adavit.architecture import Architecture
from adavit.bundle.bundle import Bundle
from adavit.bundle.graphs import Graphs
from adavit.bundle.keys import BOTH, BlockKey
from adavit.bundle.onnx_graph import OnnxGraph
from adavit.calibration.cache import load_ranges
from adavit.errors import InputError
from adavit.runtime import Runtime
from adavit.runtime.backends.onnxruntime.backend import HIDING_INT8
from adavit.runtime.specialise import usage_of

Exported = Callable[..., tuple[Path, dict]]

precisions = pytest.mark.parametrize("precision", ["fp16", "int8"])
LINEAR = ("attn.query", "attn.key", "attn.value", "attn.proj", "mlp.fc1", "mlp.fc2")


def loaded(bundle: Path, precision: str | None = None) -> Runtime:
    return adavit.load(bundle, threads=1, precision=precision, specialise=False)


def weights_of(bundle: Path, precision: str) -> dict[str, np.ndarray]:
    return load_file(bundle / stored_files(bundle, precision)["weights"])


def test_a_bundle_holds_the_precisions_asked_for(calibrated: tuple[Path, dict]) -> None:
    bundle, report = calibrated
    config = read_config(bundle)
    assert list(config["precisions"]) == list(report["precisions"]) == ["fp32", "fp16", "int8"]
    assert set(report["calibration"]) == {"fp16", "int8"}
    for precision in config["precisions"]:
        folder = bundle / precision
        files = stored_files(bundle, precision).values()
        assert {path.relative_to(bundle).as_posix() for path in folder.iterdir()} == set(files)
        assert [path.name for path in folder.iterdir() if path.suffix != ".onnx"] == ["model.safetensors"]
        assert loaded(bundle, precision).graphs.precision == precision
    assert loaded(bundle).graphs.precision == "fp32"
    weights = [(bundle / stored_files(bundle, p)["weights"]).stat().st_size for p in ("fp32", "fp16", "int8")]
    assert weights[1] < 0.65 * weights[0] and weights[2] < 0.5 * weights[0]
    with pytest.raises(InputError, match=r"mixed'?; it has fp32, fp16, int8"):
        loaded(bundle, "mixed")


def test_fp32_goes_where_it_is_not_asked_for_and_the_first_is_the_default(
    exported: Exported, busy: Path, cache: Path
) -> None:
    bundle, report = exported(busy, "int8", "fp16", calibration_cache=cache)
    assert list(read_config(bundle)["precisions"]) == list(report["precisions"]) == ["int8", "fp16"]
    assert {path.name for path in bundle.iterdir() if path.is_dir()} == {"int8", "fp16"}
    assert loaded(bundle).graphs.precision == "int8"


@precisions
def test_decisions_and_classes_stay_close(converted: Path, precision: str) -> None:
    images = random_images(WIDE, 16, seed=9)
    wanted, runtime = loaded(converted).run(images), loaded(converted, precision)
    found = runtime.run(images, policy=wanted.policy)
    allowed = {"fp16": 0.01, "int8": 0.35}[precision]
    assert np.abs(found.logits - wanted.logits).max() < allowed * np.abs(wanted.logits).max()
    own = runtime.run(images).policy
    same = np.mean([(getattr(own, kind) == getattr(wanted.policy, kind)).mean() for kind in ("tokens", "heads")])
    assert same > {"fp16": 0.999, "int8": 0.97}[precision]


@precisions
def test_the_dense_twin_stays_close(converted: Path, precision: str) -> None:
    images = random_images(WIDE, 4, seed=9)
    wanted, found = loaded(converted).run_dense(images), loaded(converted, precision).run_dense(images)
    assert np.abs(found - wanted).max() < {"fp16": 0.01, "int8": 0.35}[precision] * np.abs(wanted).max()


@precisions
def test_batches_and_prepared_blocks_compute_the_same(converted: Path, precision: str) -> None:
    images, runtime = random_images(WIDE, 6), loaded(converted, precision)
    together = runtime.run(images)
    for image, logits in zip(images, together.logits, strict=True):
        np.testing.assert_allclose(runtime.run(image[None]).logits[0], logits, atol=1e-4)
    chosen = runtime.backend.choose(usage_of(together.policy, 1))
    assert chosen
    for one in chosen:
        runtime.backend.prepare(one)
    found = runtime.run(images, policy=together.policy).logits
    different = np.abs(found - together.logits).max(1)
    # A value may round to the next code, which changes an image's logits by far less than int8 does.
    assert np.median(different) < 1e-3
    assert different.max() < 0.05 * np.abs(together.logits).max()


def test_norms_softmax_and_sums_stay_float32_in_fp16(converted: Path) -> None:
    for name, file in stored_files(converted, "fp16").items():
        if name == "weights":
            continue
        graph = onnx.shape_inference.infer_shapes(onnx.load(converted / file), strict_mode=True).graph
        values = (*graph.value_info, *graph.input, *graph.output)
        kinds = {value.name: value.type.tensor_type.elem_type for value in values}
        kinds |= {value.name: value.data_type for value in graph.initializer}
        makers = {value: node for node in graph.node for value in node.output}
        kind = "batch" if name.startswith("batch.") and name != "batch.stem" else name.rpartition(".")[2]
        residual = kind in ("both", "attention", "mlp", "batch")
        assert not residual or makers["y"].op_type in ("Add", "ScatterND"), name  # and not a cast of a sum in fp16
        halved = 0
        for node in graph.node:
            read = {kinds[value] for value in node.input if kinds.get(value) != TensorProto.INT64}
            if node.op_type in ("LayerNormalization", "Softmax"):
                assert read == {kinds[node.output[0]]} == {TensorProto.FLOAT}, (name, node.name)
            elif node.op_type in ("Gemm", "MatMul", "Add", "Gelu") and read:
                assert len(read) == 1, (name, node.name)
                halved += read == {TensorProto.FLOAT16}
        linear = {"both": 4, "batch": 4, "attention": 2, "mlp": 2, "none": 0, "stem": 0, "dense": 6 * WIDE.depth}
        assert halved >= linear[kind], name


def test_weights_of_linear_layers_alone_are_converted(converted: Path) -> None:
    wanted, halves, codes = (weights_of(converted, precision) for precision in ("fp32", "fp16", "int8"))
    linear = {f"blocks.{block}.{name}" for block in range(WIDE.depth) for name in LINEAR}
    for name, value in wanted.items():
        layer, _, kind = name.rpartition(".")
        converted = layer in linear
        assert halves[name].dtype == (np.float16 if converted else np.float32), name
        assert codes[name].dtype == (np.int8 if converted and kind == "weight" else np.float32), name
        if codes[name].dtype == np.int8:  # 7 bits, a scale for each output channel, the nearest codes
            scale = codes[f"{name}.scale"]
            assert (np.abs(codes[name].astype(int)).max(1) == 64).all()
            assert not codes[f"{name}.zero"].any() and codes[f"{name}.zero"].shape == scale.shape == value.shape[:1]
            assert np.abs(codes[name] * scale[:, None] - value).max() <= 0.5 * scale.max() * (1 + 1e-5)


def test_the_largest_code_is_the_largest_value_of_calibration(converted: Path, cache: Path) -> None:
    (ranges, _), tensors = load_ranges(cache), weights_of(converted, "int8")
    found = {name for name in tensors if name.endswith(".input_scale")}
    wanted = {
        f"{'dense.' if unit == 'dense' else ''}{site}.input_scale": histogram.peak / 127
        for unit, part in ranges.histograms.items()
        for site, histogram in part.items()
    }
    assert found == set(wanted) and len(found) == 8 * WIDE.depth
    assert {name: float(tensors[name]) for name in found} == pytest.approx(wanted)


def session(model: bytes, optimised: Path | None = None) -> Any:
    ort = pytest.importorskip("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if optimised:
        options.optimized_model_filepath = str(optimised)
    return ort.InferenceSession(model, options, ["CPUExecutionProvider"], disabled_optimizers=HIDING_INT8)


def test_onnx_runtime_multiplies_codes_where_they_are_constants(converted: Path, tmp_path: Path) -> None:
    graphs = Graphs(Bundle.open(converted), "int8")
    block, dense = graphs.block(1, BOTH), graphs.dense()
    handed = graphs.quantised_head_weights(BlockKey(1, BOTH, (0, 2, 3)))
    for graph, constants, products in ((block, handed, 4), (dense, {}, 6 * WIDE.depth)):
        session(graph.model(graph.arrays(graphs.tensors) | dict(constants)), tmp_path / "optimised.onnx")
        nodes = onnx.load(tmp_path / "optimised.onnx").graph.node
        assert Counter(node.op_type for node in nodes)["QGemm"] == products, graph.name
        quantised = [node.input[0] for node in nodes if node.op_type == "QGemm"]
        assert len(set(quantised)) == len(quantised)  # products that share one are slow


def given(graph: OnnxGraph, arch: Architecture, constants: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Inputs for what is no constant of a graph."""
    source, found = np.random.default_rng(0), {}
    for value in graph.inputs:
        if value.name == "tokens":
            found["tokens"] = np.arange(0, arch.tokens, 2)
        elif value.name not in constants:
            shape = [2 if isinstance(size, str) else size for size in value.shape]
            found[value.name] = source.standard_normal(shape).astype(np.float32)
    return found


def assert_openvino_computes_the_same(bundle: Path, precision: str) -> None:
    """Runs the dense twin and some blocks, heads' weights as constants, in OpenVINO and in ONNX Runtime."""
    core = pytest.importorskip("openvino").Core()
    graphs = Graphs(Bundle.open(bundle), precision)
    arch = graphs.architecture
    keys = BlockKey(0, BOTH, tuple(range(arch.heads))), BlockKey(1, BOTH, (1, 2))
    cases = [(graphs.block(key.block, BOTH), graphs.quantised_head_weights(key)) for key in keys]
    for graph, handed in [(graphs.dense(), {}), *cases]:
        constants = graph.arrays(graphs.tensors) | dict(handed)
        data, inputs = graph.model(constants), given(graph, arch, constants)
        wanted = session(data).run(None, inputs)
        found = core.compile_model(core.read_model(data), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(inputs)
        for position, value in enumerate(wanted):
            scale = max(1.0, float(np.abs(value).max()))
            difference = np.abs(found[position] - value).max()
            assert difference < {"fp16": 0.01, "int8": 0.03}[precision] * scale, graph.name


@precisions
def test_openvino_computes_the_same(converted: Path, precision: str) -> None:
    assert_openvino_computes_the_same(converted, precision)


def test_openvino_takes_models_without_a_bias_of_queries(exported: Exported, pictures: Path, tmp_path: Path) -> None:
    model = random_model(tiny(qkv_bias=False), sublayers=2.0, heads=2.0)
    source = save(model, tmp_path / "model.safetensors")
    assert_openvino_computes_the_same(exported(source, "int8", calibration_images=(pictures,))[0], "int8")


def test_older_opsets_do(exported: Exported, busy: Path, cache: Path, converted: Path) -> None:
    older, _ = exported(busy, "fp16", "int8", opset=17, calibration_cache=cache)
    images = random_images(WIDE, 2)
    for precision in ("fp16", "int8"):
        wanted = loaded(converted, precision).run(images)
        found = loaded(older, precision).run(images, policy=wanted.policy)
        np.testing.assert_allclose(found.logits, wanted.logits, atol=0.05)


def test_tokens_may_be_larger_than_fp16_holds(exported: Exported, pictures: Path, tmp_path: Path) -> None:
    arch = tiny(depth=2, head_policy=False)
    model = random_model(arch, sublayers=2.0)
    with torch.no_grad():
        model.pos_embed[..., 0] += 7e4  # which no sub-layer takes away again
    images = random_images(arch, 4)
    bundle, _ = exported(save(model, tmp_path / "model.safetensors"), "fp32", "fp16", calibration_images=(pictures,))
    wide, half = loaded(bundle), loaded(bundle, "fp16")
    np.testing.assert_allclose(half.run(images).logits, wide.run(images).logits, atol=0.01)
    np.testing.assert_allclose(half.run_dense(images), wide.run_dense(images), atol=0.01)


def test_the_same_seed_gives_the_same_bytes(converted: Path, busy: Path, pictures: Path, tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from adavit.export import ExportOptions, export_bundle
from adavit.calibration.options import CalibrationOptions
source, output, images = map(Path, sys.argv[1:])
calibration = CalibrationOptions(("int8",), (images,))
export_bundle(source, output, ExportOptions(verify=False, threads=1, calibration=calibration), lambda *_: None)
"""
    done = python(code, busy, tmp_path / "again", pictures)
    assert done.returncode == 0, done.stderr
    again, before = (read_config(folder)["precisions"]["int8"] for folder in (tmp_path / "again", converted))
    assert again == before
    assert (tmp_path / "again.calibration.npz").is_file()
