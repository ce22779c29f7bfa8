"""Single files of other precisions, operators, sizes and sources."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from cases import (
    DENSE,
    WIDE,
    export,
    pictures_in,
    random_images,
    random_model,
    save,
    tiny,
)
from single_cases import assert_same, run, write

import adavit


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


def test_a_model_without_policies_is_its_dense_graph(plain: tuple[Path, Path], tmp_path: Path) -> None:
    bundle, _ = plain
    for source in plain:
        write(source, tmp_path / "model.onnx", force=True)
        images = random_images(DENSE, 3)
        found = run(tmp_path / "model.onnx", images)
        np.testing.assert_allclose(found["logits"], adavit.load(bundle, threads=1).run(images).logits, atol=1e-4)
    for options in ({"budget": 0.5}, {"budget_input": True}, {"with_policy": True}, {"max_size": 2.0}):
        with pytest.raises(adavit.InputError, match=f"has no policies.*leave out `{next(iter(options))}`"):
            write(bundle, tmp_path / "other.onnx", **options)
    assert not (tmp_path / "other.onnx").exists()


def test_images_show_which_heads_a_checkpoint_keeps(tmp_path: Path) -> None:
    source = save(random_model(tiny(), heads=50.0), tmp_path / "weights.safetensors")
    (tmp_path / "photos").mkdir()
    pictures = pictures_in(tmp_path / "photos", 3)
    report = write(source, tmp_path / "model.onnx", calibration_images=pictures)
    assert report["blocks"] == {"masked": 2, "gathered": 0, "constant_head_sets": 0}


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


def test_other_weights_make_another_file(tmp_path: Path) -> None:
    for seed in (0, 1):
        write(save(random_model(tiny(), seed), tmp_path / f"{seed}.safetensors"), tmp_path / f"{seed}.onnx")
        write(tmp_path / f"{seed}.safetensors", tmp_path / f"again{seed}.onnx")
        assert (tmp_path / f"{seed}.onnx").read_bytes() == (tmp_path / f"again{seed}.onnx").read_bytes()
    assert (tmp_path / "0.onnx").read_bytes() != (tmp_path / "1.onnx").read_bytes()
