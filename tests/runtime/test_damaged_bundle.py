"""Bundles that were cut, swapped, altered or made up: refused before anything of them is used."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import random_images, read_config, rewrite_text, tiny, write_config

import adavit
from adavit.errors import BundleError
from adavit.runtime.plan import SETS, HeadSet


def fault(bundle: Path) -> str:
    """The one line that loading, or running the dense twin or engines for sets of heads, is refused with."""
    with pytest.raises(BundleError) as caught:
        runtime = adavit.load(bundle, threads=1)
        runtime.run_dense(random_images(tiny(), 1))
        sets = [HeadSet(0, "both", (0, 1, 2)), *(HeadSet(block, kind, (0,)) for block in (1, 2) for kind in SETS)]
        runtime.dispatcher.specialise(tuple(sets))
    message = str(caught.value)
    assert "\n" not in message
    return message


def engine_names(bundle: Path) -> list[str]:
    return list(read_config(bundle)["engines"])


def engine_file(bundle: Path, name: str) -> Path:
    return bundle / read_config(bundle)["engines"][name]["file"]


def for_each_engine(bundle: Path, damage: Callable[[Path], None], message: str, but: str = " ") -> None:
    for name in (name for name in engine_names(bundle) if not name.startswith(but)):
        file = engine_file(bundle, name)
        intact = file.read_bytes()
        damage(file)
        found = fault(bundle)
        assert message in found
        assert f"{file.relative_to(bundle)}" in found
        file.unlink(missing_ok=True)
        file.write_bytes(intact)
    adavit.load(bundle, threads=1).run_dense(random_images(tiny(), 1))  # whole again, it loads


def test_a_missing_engine(bundle: Path) -> None:
    for_each_engine(bundle, Path.unlink, "missing; copy the bundle whole or export again")


def test_a_truncated_engine(bundle: Path) -> None:
    for_each_engine(bundle, lambda file: file.write_bytes(file.read_bytes()[:-1]), "bytes instead of")


def test_an_altered_engine(bundle: Path) -> None:
    def flip(file: Path) -> None:
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)

    for_each_engine(bundle, flip, "altered since export", but="rows.")  # which a CPU does not read


def test_swapped_engines(bundle: Path) -> None:
    names = [name for name in engine_names(bundle) if name.startswith(("blocks.1.", "blocks.2."))]
    files = [engine_file(bundle, name) for name in names]
    first = next(file for file, name in zip(files, names, strict=True) if name.startswith("blocks.1."))
    twin = next(file for file in files if file != first and file.stat().st_size == first.stat().st_size)
    intact = first.read_bytes()
    first.write_bytes(twin.read_bytes())
    twin.write_bytes(intact)
    assert "altered since export" in fault(bundle)


def test_an_engine_that_is_a_folder(bundle: Path) -> None:
    file = engine_file(bundle, "stem")
    file.unlink()
    file.mkdir()
    assert "is not a regular file" in fault(bundle)


def test_an_engine_that_no_backend_reads(bundle: Path) -> None:
    from cases import rewrite_engine

    rewrite_engine(bundle, "head", b"not a graph")
    with pytest.raises(adavit.BackendError, match="refuses engine head"):
        adavit.load(bundle, threads=1)


@pytest.mark.parametrize("path", ["../stem.onnx", "onnx/../../stem.onnx", "{outside}", "..\\stem.onnx", "C:/x", ""])
def test_a_path_that_leaves_the_folder(path: str, bundle: Path) -> None:
    outside = shutil.copy(engine_file(bundle, "stem"), bundle.parent / "stem.onnx")
    config = read_config(bundle)
    config["engines"]["stem"]["file"] = path.format(outside=outside)
    write_config(bundle, config)
    assert "leaves the bundle" in fault(bundle)


@pytest.mark.parametrize("name", ["stem", "head", "dense"])
def test_an_engine_that_is_a_pipe(name: str, bundle: Path) -> None:
    file = engine_file(bundle, name)
    file.unlink()
    os.mkfifo(file)
    assert f"{file.name}: is not a regular file" in fault(bundle)


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
    np.testing.assert_array_equal(found.run(images).logits, runtime.run(images).logits)
    assert found.labels == runtime.labels


def test_a_link_to_another_file_is_as_bad_as_that_file(bundle: Path, tmp_path: Path) -> None:
    file = engine_file(bundle, "stem")
    (tmp_path / "other").write_bytes(b"x" * file.stat().st_size)
    file.unlink()
    file.symlink_to(tmp_path / "other")
    assert "onnx/stem.onnx: altered since export" in fault(bundle)


def test_what_the_runtime_does_not_read_may_be_anything(bundle: Path) -> None:
    (bundle / "README.md").write_bytes(b"\xff")
    (bundle / ".gitattributes").write_text("*.onnx filter=lfs")
    os.mkfifo(bundle / "unknown")
    adavit.load(bundle, threads=1)


@pytest.mark.openvino
@pytest.mark.parametrize("name", ["blocks.1.attention_weights", "blocks.2.mlp_weights", "stem"])
def test_an_engine_that_is_not_described_for_openvino(name: str, bundle: Path) -> None:
    config = read_config(bundle)
    del config["engines"][name]
    write_config(bundle, config)
    with pytest.raises(BundleError, match=f"has no engine '{name}'"):
        adavit.load(bundle, "openvino", threads=1)


@pytest.mark.parametrize("name", ["stem", "head", "blocks.1"])
def test_an_engine_that_is_not_described(name: str, bundle: Path) -> None:
    for engine in [engine for engine in engine_names(bundle) if engine.startswith(name)]:
        config = read_config(bundle)
        removed = config["engines"].pop(engine)
        write_config(bundle, config)
        assert engine in fault(bundle)
        config["engines"][engine] = removed
        write_config(bundle, config)


def test_a_bundle_without_its_dense_twin(bundle: Path) -> None:
    config = read_config(bundle)
    del config["engines"]["dense"]
    write_config(bundle, config)
    assert "has no engine 'dense'; export again, without --no-dense" in fault(bundle)


def changed(config: Any, path: str, value: Any) -> None:
    *parents, last = path.split("/")
    for key in parents:
        config = config[int(key) if isinstance(config, list) else key]
    config[last] = value


CHANGES: list[tuple[str, Any, str]] = [
    *(("schema_version", version, "bundle schema version") for version in (1, 3, 0, "2", None, 2.5)),
    *(("engines/stem/bytes", size, "is said to have") for size in (0, -1, 1 << 62, "12", 1.5, True, None)),
    ("engines/stem/inputs/0/shape", [1 << 40], "has a dimension"),
    ("engines/stem/inputs/0/shape", [-1], "has a dimension"),
    ("engines/stem/inputs/0/shape", [[1]], "has a dimension"),
    ("engines/stem/inputs/0/dtype", "float1", "has the type"),
    ("engines/stem/inputs/0/dtype", ["float32"], "damaged"),
    ("engines/stem/inputs", 3, "damaged"),
    ("engines/stem/sha256", None, "no file or hash"),
    ("engines/stem/sha256", "0" * 64, "altered since export"),
    ("engines/stem", [], "damaged"),
    *((f"engines/{name}", {}, f"an engine is named {name!r}") for name in ("..", "a..b", "\\evil", "a b", "")),
    ("engines", [], "damaged"),
    ("engines", {}, "has no engine"),
    ("architecture", None, "damaged"),
    ("architecture/depth", 10**9, "depth is 1000000000"),
    ("architecture/width", 0, "width is 0"),
    ("architecture/heads", 5, "not a multiple of 5 heads"),
    ("architecture/depth", 4, "its MACs"),
    ("architecture/hidden", 81, "its MACs"),
    ("architecture/keep", 3, "blocks.1.decide has 1 inputs and 3 outputs"),
    ("architecture/token_policy", False, "blocks.0.decide has 1 inputs and 2 outputs"),
    ("architecture/image_size", 8192, "GiB an image"),
    ("macs/dense", 1, "its MACs"),
    ("macs", None, "its MACs"),
    ("files", None, "damaged"),
    ("files/labels.txt", None, "damaged"),
    ("files/labels.txt/bytes", True, "no size up to"),
    ("files/labels.txt/sha256", "0" * 64, "labels.txt: altered since export"),
    ("files/preprocessor_config.json/sha256", 3, "or no hash"),
    ("engines/stem/file", "onnx/stem.onnx\0", "leaves the bundle"),
    ("engines/stem/file", "\udcff", "leaves the bundle"),
    ("architecture/image_size", 10**6, "image_size is 1000000"),
    ("architecture/classes", 6, "its MACs"),
]


@pytest.mark.parametrize(("path", "value", "message"), CHANGES)
def test_a_description_that_cannot_be(path: str, value: Any, message: str, bundle: Path) -> None:
    config = read_config(bundle)
    changed(config, path, value)
    write_config(bundle, config)
    found = fault(bundle)
    assert message in found
    assert str(bundle) in found


NOT_JSON = ["", "{", "[]", "null", "[" * 100_000, '{"schema_version": ' + "1" * 5000 + "}"]


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
    np.testing.assert_array_equal(moved.run(images).logits, runtime.run(images).logits)
