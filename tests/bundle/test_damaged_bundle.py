"""Bundles that were cut, swapped, altered or made up: refused before anything of them is used."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import (
    random_images,
    read_config,
    read_whole,
    rewrite_stored,
    rewrite_text,
    stored_files,
    tiny,
    write_config,
)

import adavit
from adavit.errors import BundleError


def fault(bundle: Path) -> str:
    """The one line that loading, or running the dense twin, is refused with."""
    with pytest.raises(BundleError) as caught:
        read_whole(bundle)
    message = str(caught.value)
    assert "\n" not in message
    return message


def stored(bundle: Path, name: str) -> Path:
    return bundle / stored_files(bundle)[name]


def for_each_file(bundle: Path, damage: Callable[[Path], None], message: str) -> None:
    for file in map(bundle.joinpath, stored_files(bundle).values()):
        intact = file.read_bytes()
        damage(file)
        found = fault(bundle)
        assert message in found
        assert f"{file.relative_to(bundle)}" in found
        file.unlink(missing_ok=True)
        file.write_bytes(intact)
    read_whole(bundle)


def test_a_missing_file(bundle: Path) -> None:
    for_each_file(bundle, Path.unlink, "missing; copy the bundle whole or export again")


def test_a_truncated_file(bundle: Path) -> None:
    for_each_file(bundle, lambda file: file.write_bytes(file.read_bytes()[:-1]), "bytes instead of")


def test_an_altered_file(bundle: Path) -> None:
    def flip(file: Path) -> None:
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)

    for_each_file(bundle, flip, "altered since export")


def test_swapped_graphs(bundle: Path) -> None:
    """The blocks' graphs are of one form, and of one size where their weights lie at offsets of as many digits."""
    files = [file for name, file in stored_files(bundle).items() if name.startswith("blocks.1.")]
    for number, file in enumerate(files):
        rewrite_stored(bundle, file, (bundle / files[number - 1]).read_bytes())
        assert "than its architecture says" in fault(bundle)


def test_a_file_that_is_a_folder_or_a_pipe(bundle: Path) -> None:
    for name in ("weights", "stem", "blocks.0.both", "dense"):
        file = stored(bundle, name)
        intact = file.read_bytes()
        file.unlink()
        file.mkdir()
        assert f"{file.name}: is not a regular file" in fault(bundle)
        file.rmdir()
        os.mkfifo(file)
        assert f"{file.name}: is not a regular file" in fault(bundle)
        file.unlink()
        file.write_bytes(intact)


def test_a_graph_that_is_none(bundle: Path) -> None:
    rewrite_stored(bundle, stored_files(bundle)["stem"], b"not a graph")
    assert "stem.onnx: is not a graph that adavit exports" in fault(bundle)


PATHS = [
    "../stem.onnx",
    "fp32/../../stem.onnx",
    "{outside}",
    "..\\stem.onnx",
    "C:/x",
    "",
    "stem.onnx",
    "fp32/./dense.onnx",
]


@pytest.mark.parametrize("path", PATHS)
def test_a_path_to_another_file(path: str, bundle: Path) -> None:
    outside = shutil.copy(stored(bundle, "stem"), bundle.parent / "stem.onnx")
    config = read_config(bundle)
    config["precisions"]["fp32"]["stem"]["file"] = path.format(outside=outside)
    write_config(bundle, config)
    assert "are not each a file in that folder" in fault(bundle)


@pytest.mark.parametrize("value", [0.49, 1.01, True, "0.9", None, [0.9]])
def test_a_quantile_that_is_none(value: object, bundle: Path) -> None:
    write_config(bundle, read_config(bundle) | {"capacity_quantile": value})
    assert "capacity_quantile" in (message := fault(bundle)) and "from 0.5 to 1" in message


@pytest.mark.parametrize("name", ["config.json", "labels.txt", "preprocessor_config.json"])
def test_a_description_that_is_a_pipe_a_folder_or_a_link_to_nothing(name: str, bundle: Path) -> None:
    (bundle / name).unlink()
    os.mkfifo(bundle / name)
    assert "is not a regular file" in fault(bundle)
    (bundle / name).unlink()
    (bundle / name).mkdir()
    assert name in fault(bundle)
    (bundle / name).rmdir()
    (bundle / name).symlink_to(bundle / "nothing")
    assert f"{name}: missing" in fault(bundle)


def linked(bundle: Path) -> Path:
    """The bundle as a hub's cache holds it: links to files that are named by what they hold."""
    snapshot = bundle.with_name("snapshots") / "main"
    blobs = bundle.with_name("blobs")
    blobs.mkdir()
    for number, file in enumerate(file for file in sorted(bundle.rglob("*")) if file.is_file()):
        link = snapshot / file.relative_to(bundle)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(shutil.copy(file, blobs / str(number)), link.parent))
    return snapshot


def test_a_folder_of_symbolic_links_runs_the_same(bundle: Path, runtime: adavit.Runtime) -> None:
    images = random_images(tiny(), 2)
    found = adavit.load(linked(bundle), threads=1)
    np.testing.assert_allclose(found.run(images).logits, runtime.run(images).logits, atol=1e-5)
    assert found.labels == runtime.labels


def test_a_link_to_another_file_is_as_bad_as_that_file(bundle: Path, tmp_path: Path) -> None:
    file = stored(bundle, "stem")
    (tmp_path / "other").write_bytes(b"x" * file.stat().st_size)
    file.unlink()
    file.symlink_to(tmp_path / "other")
    assert "fp32/stem.onnx: altered since export" in fault(bundle)


def test_what_the_runtime_does_not_read_may_be_anything(bundle: Path) -> None:
    (bundle / "README.md").write_bytes(b"\xff")
    (bundle / ".gitattributes").write_text("*.onnx filter=lfs")
    os.mkfifo(bundle / "unknown")
    adavit.load(bundle, threads=1)


@pytest.mark.parametrize("name", ["weights", "stem", "blocks"])
def test_a_file_that_is_not_described(name: str, bundle: Path) -> None:
    config = read_config(bundle)
    del config["precisions"]["fp32"][name]
    write_config(bundle, config)
    assert "config.json is damaged" in fault(bundle)


@pytest.mark.parametrize("kind", ["both", "attention", "mlp", "none"])
def test_a_graph_of_a_block_that_is_not_described(kind: str, bundle: Path) -> None:
    config = read_config(bundle)
    del config["precisions"]["fp32"]["blocks"][1][kind]
    write_config(bundle, config)
    assert "block 1 has graphs for" in fault(bundle)


def test_a_bundle_without_its_dense_twin(bundle: Path) -> None:
    config = read_config(bundle)
    del config["precisions"]["fp32"]["dense"]
    write_config(bundle, config)
    assert "has no dense twin; export again, without `with_dense=False`" in fault(bundle)


def changed(config: Any, path: str, value: Any) -> None:
    *parents, last = path.split("/")
    for key in parents:
        config = config[int(key) if isinstance(config, list) else key]
    config[int(last) if isinstance(config, list) else last] = value


FP32 = "precisions/fp32"
CHANGES: list[tuple[str, Any, str]] = [
    *(("schema_version", version, "bundle schema version") for version in (1, 2, 4, 0, "3", None, 3.5, True)),
    *((f"{FP32}/stem/bytes", size, "or a size of") for size in (0, -1, 1 << 62, "12", 1.5, True, None)),
    (f"{FP32}/stem/sha256", None, "has no file, no hash"),
    (f"{FP32}/stem/sha256", "0" * 64, "altered since export"),
    (f"{FP32}/stem/file", ["fp32/stem.onnx"], "has no file"),
    (f"{FP32}/stem/file", "fp32/stem.onnx\0", "leaves the bundle"),
    (f"{FP32}/stem/file", "fp32/\udcff", "leaves the bundle"),
    (f"{FP32}/stem", [], "damaged"),
    (f"{FP32}/stem", None, "damaged"),
    (f"{FP32}/blocks", {}, "are not those of its architecture"),
    (f"{FP32}/blocks", 3, "damaged"),
    (f"{FP32}/blocks/0", {}, "block 0 has graphs for []"),
    (f"{FP32}/blocks/0", ["both"], "damaged"),
    (f"{FP32}/weights/file", "fp32/stem.onnx", "are not each a file in that folder"),
    *((f"{FP32}/opset", opset, "or an unknown opset") for opset in (16, 24, "20", None, True, 1 << 70)),
    (f"{FP32}/opset", 17, "than version 17 of the standard one"),
    (FP32, None, "damaged"),
    ("precisions", [], "damaged"),
    ("precisions", {}, "has no graphs"),
    ("precisions/int4", {"opset": 20}, "a precision 'int4'"),
    ("model_type", "bert", "or another model_type"),
    ("architecture", None, "damaged"),
    ("architecture/depth", 10**9, "depth is 1000000000"),
    ("architecture/width", 0, "width is 0"),
    ("architecture/heads", 5, "not a multiple of 5 heads"),
    ("architecture/depth", 4, "are not those of its architecture"),
    ("architecture/hidden", 81, "its MACs"),
    ("architecture/keep", 3, "block 1 has graphs for"),
    ("architecture/token_policy", False, "than its architecture says"),
    ("architecture/image_size", 8192, "GiB an image"),
    ("macs/dense", 1, "its MACs"),
    ("macs", None, "its MACs"),
    ("files", None, "damaged"),
    ("files/labels.txt", None, "damaged"),
    ("files/labels.txt/bytes", True, "or a size of True"),
    ("files/labels.txt/sha256", "0" * 64, "labels.txt: altered since export"),
    ("files/preprocessor_config.json/sha256", 3, "no hash"),
    ("architecture/image_size", 10**6, "image_size is 1000000"),
    ("architecture/classes", 6, "its MACs"),
    ("budgets", {}, "damaged"),
    ("budgets", {"points": [], "calibration": {}}, "budgets are not a list"),
]


@pytest.mark.parametrize(("path", "value", "message"), CHANGES)
def test_a_description_that_cannot_be(path: str, value: Any, message: str, bundle: Path) -> None:
    config = read_config(bundle)
    changed(config, path, value)
    write_config(bundle, config)
    found = fault(bundle)
    assert message in found
    assert str(bundle) in found


NOT_JSON = [
    "",
    "{",
    "[]",
    "null",
    "[" * 100_000,
    '{"schema_version": ' + "1" * 5000 + "}",
    '{"schema_version": NaN}',
    '{"schema_version": -Infinity}',
    '{"schema_version": 1e999}',
    '{"schema_version": 3, "schema_version": 3}',
    '{"deep": ' + "[" * 100 + "]" * 100 + "}",
]


@pytest.mark.parametrize("content", NOT_JSON)
def test_a_description_that_is_not_json(content: str, bundle: Path) -> None:
    (bundle / "config.json").write_text(content)
    assert "config.json: not " in fault(bundle)


@pytest.mark.parametrize("content", NOT_JSON[1:])
def test_preprocessing_that_is_not_json(content: str, bundle: Path) -> None:
    rewrite_text(bundle, "preprocessor_config.json", content.encode())
    assert "preprocessor_config.json: not " in fault(bundle)


def test_a_description_that_is_binary_endless_or_missing(bundle: Path) -> None:
    (bundle / "config.json").write_bytes(b"\xff\xfe\x00\x80")
    assert "config.json: cannot be read as text" in fault(bundle)
    with (bundle / "config.json").open("wb") as file:
        file.truncate(1 << 40)
    assert "config.json: larger than 16777216 bytes" in fault(bundle)
    (bundle / "config.json").unlink()
    assert "config.json: missing" in fault(bundle)


@pytest.mark.parametrize("name", ["preprocessor_config.json", "labels.txt"])
def test_a_text_that_is_altered_binary_endless_or_missing(name: str, bundle: Path) -> None:
    text = (bundle / name).read_text()
    (bundle / name).write_text(text.swapcase())
    assert f"{name}: altered since export" in fault(bundle)
    rewrite_text(bundle, name, b"\xff\xfe\x00\x80")
    assert f"{name}: cannot be read as text" in fault(bundle)
    with (bundle / name).open("wb") as file:
        file.truncate(1 << 40)
    assert f"{name}: {1 << 40} bytes instead of 4" in fault(bundle)
    (bundle / name).unlink()
    assert f"{name}: missing" in fault(bundle)


def test_labels_that_are_too_few(bundle: Path) -> None:
    rewrite_text(bundle, "labels.txt", b"ant\nbee\n")
    assert "labels.txt has 2 lines for 5 classes" in fault(bundle)


def test_preprocessing_for_another_size(bundle: Path) -> None:
    text = json.loads((bundle / "preprocessor_config.json").read_text())
    text["crop_size"]["height"] = 64
    rewrite_text(bundle, "preprocessor_config.json", json.dumps(text).encode())
    assert "preprocessor_config.json does not fit the model" in fault(bundle)


@pytest.mark.parametrize("path", [None, b"bundle", 3, "a\0b", ["bundle"]])
def test_what_is_no_path(path: Any) -> None:
    with pytest.raises(adavit.InputError, match=r"bundle is .*: (expected a path|no file can have this path)"):
        adavit.load(path, threads=1)


def test_no_such_bundle(tmp_path: Path) -> None:
    assert "no such bundle folder; make one with adavit-export" in fault(tmp_path / "nothing")
    assert "config.json: missing" in fault(tmp_path)


def test_a_bundle_that_was_moved_runs_the_same(bundle: Path, runtime: adavit.Runtime) -> None:
    images = random_images(tiny(), 2)
    moved = adavit.load(bundle.rename(bundle.with_name("moved here")), threads=1)
    np.testing.assert_allclose(moved.run(images).logits, runtime.run(images).logits, atol=1e-5)
