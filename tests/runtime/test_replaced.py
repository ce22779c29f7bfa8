"""Loading while a bundle is replaced, and after the process has gone elsewhere."""

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from cases import random_images, read_config, tiny, write_config

import adavit
from adavit.bundle import bundle as reading
from adavit.files import folder_beside
from adavit.runtime.replaced import again_if_replaced


def replace(bundle: Path, name: str) -> None:
    """Replaces a bundle by one of another name, whose files are the old one's but for a label."""
    with folder_beside(bundle) as folder:
        shutil.copytree(bundle, folder, dirs_exist_ok=True)
        labels = f"{name}\n".encode() + (folder / "labels.txt").read_bytes().split(b"\n", 1)[1]
        (folder / "labels.txt").write_bytes(labels)
        config = read_config(folder)
        config["files"]["labels.txt"] = {"bytes": len(labels), "sha256": reading.sha256(labels)}
        write_config(folder, {**config, "name": name})


@pytest.mark.parametrize("times", [1, 3])
def test_a_bundle_that_is_replaced_while_it_is_read(times: int, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, names = reading.read_regular, [f"new{number}" for number in range(times)]

    def replaced_behind(path: Path, most: int) -> bytes:
        content = read(path, most)
        if names:
            replace(bundle, names.pop(0))
        return content

    monkeypatch.setattr(reading, "read_regular", replaced_behind)
    loaded = adavit.load(bundle, threads=1)
    assert (loaded.bundle.name, loaded.labels[0]) == (f"new{times - 1}", f"new{times - 1}")


def test_a_bundle_that_is_damaged_is_read_once(bundle: Path) -> None:
    (bundle / "labels.txt").write_text("?")
    calls = []

    def load() -> None:
        calls.append(1)
        adavit.load(bundle, threads=1)

    with pytest.raises(adavit.BundleError, match=r"labels.txt"):
        again_if_replaced(bundle, load)
    assert len(calls) == 1


def test_a_bundle_that_is_replaced_without_end(bundle: Path) -> None:
    calls = []

    def load() -> None:
        replace(bundle, f"new{len(calls)}")
        calls.append(1)
        raise adavit.BundleError("torn")

    with pytest.raises(adavit.BundleError, match="torn"):
        again_if_replaced(bundle, load)
    assert len(calls) < 50


def test_a_process_that_goes_elsewhere(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(bundle.parent)
    runtime, images = adavit.load(bundle.name, threads=1), random_images(tiny(), 2)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    runtime.run_dense(images)
    runtime.specialise(runtime.run(images).policy)
    again = pickle.loads(pickle.dumps(runtime))
    np.testing.assert_allclose(again.run(images).logits, runtime.run(images).logits, atol=1e-5)
