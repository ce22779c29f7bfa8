import functools
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import openvino
import pytest
import torch
from cases import DENSE, GOLDEN, GOLDEN_FILES, WIDE, export, picture, random_model, save, tiny
from double import add_double_engines, add_statistics
from hypothesis import settings
from openvino import opset13

import adavit
from adavit.errors import one_line
from adavit.model import AdaViT
from adavit.runtime import Policy, Runtime

settings.register_profile("repeatable", derandomize=True, deadline=None)  # --hypothesis-profile=default looks further
settings.load_profile("repeatable")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what runs OpenVINO where it does not normalise: version 2026.4 does on no CPU without AVX."""
    named = [item for item in items if "openvino" in item.nodeid.lower() or item.get_closest_marker("openvino")]
    if named and (reason := _openvino_refuses()):
        for item in named:
            item.add_marker(pytest.mark.skip(reason=f"OpenVINO does not run a layer norm on this CPU: {reason}"))


def _openvino_refuses() -> str | None:
    """Why OpenVINO runs no layer norm on this CPU; None where it does."""
    x = opset13.parameter([1, 8], np.float32)
    norm = opset13.mvn(x, np.array([-1]), True, 1e-6, "inside_sqrt")
    try:
        openvino.compile_model(openvino.Model([norm], [x]), "CPU")
    except RuntimeError as error:
        return one_line(error)
    return None


@pytest.fixture(autouse=True, scope="session")
def _interruptible() -> None:
    """Ctrl-C reaches the processes of tests, also where a shell started these in the background, without it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Models this small only lose by sharing their work."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _no_progress() -> Iterator[None]:
    """What commands print does not depend on how long they take."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ADAVIT_PROGRESS", "0")
        yield


@pytest.fixture(autouse=True, scope="session")
def _no_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What was measured and built on this machine before is nothing to a test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "adavit"


@pytest.fixture(scope="session")
def golden_bundles(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Bundles of the golden checkpoints by name, each exported and verified once."""
    made: dict[str, Path] = {}

    def bundle(name: str) -> Path:
        if name not in made:
            made[name] = export(GOLDEN / GOLDEN_FILES[name], tmp_path_factory.mktemp(name), with_dense=True)
        return made[name]

    return bundle


@pytest.fixture(scope="session")
def model() -> AdaViT:
    """A tiny model with every policy."""
    return random_model(tiny())


@pytest.fixture(scope="session")
def checkpoint(model: AdaViT, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's weights."""
    return save(model, tmp_path_factory.mktemp("checkpoint") / "tiny.safetensors")


@pytest.fixture(scope="session")
def tiny_bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's bundle with its dense twin; copy it before changing it."""
    folder = tmp_path_factory.mktemp("tiny")
    labels = folder / "labels.txt"
    labels.write_text("ant\nbee\ncat\ndog\nelk\n")
    return export(checkpoint, folder, with_dense=True, labels=labels)


@pytest.fixture(scope="session")
def roomy(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The tiny bundle, not to be changed, with a flavour's engines, and statistics of images that keep everything."""

    @functools.cache
    def bundle(flavour: str = "tensorrt") -> Path:
        copied = shutil.copytree(tiny_bundle, tmp_path_factory.mktemp(flavour) / "bundle")
        add_statistics(copied, Policy.dense(tiny(), 16))
        return add_double_engines(copied, flavour, max_batch=32)

    return bundle


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The bundle of a model with tokens enough for every engine, and its checkpoint."""
    folder = tmp_path_factory.mktemp("wide")
    source = save(random_model(WIDE), folder / "wide.safetensors")
    return export(source, folder, with_dense=True), source


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The bundle of a model without policies, and its checkpoint."""
    folder = tmp_path_factory.mktemp("plain")
    source = save(random_model(DENSE), folder / "vit.safetensors")
    return export(source, folder), source


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the tiny bundle, to damage."""
    return shutil.copytree(tiny_bundle, tmp_path / "bundle")


@pytest.fixture(scope="session")
def runtime(tiny_bundle: Path) -> Runtime:
    """The tiny bundle, loaded; its results are the same from call to call."""
    return adavit.load(tiny_bundle, threads=1, specialise=False)


@pytest.fixture(scope="session")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pictures in folders that carry two of the tiny bundle's labels."""
    folder = tmp_path_factory.mktemp("labelled")
    for seed, name in enumerate(("bee/0.png", "bee/1.png", "dog/2.jpg")):
        (folder / name).parent.mkdir(exist_ok=True)
        picture(seed).save(folder / name)
    return folder


@pytest.fixture(scope="session")
def busy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a model whose policy runs most sub-layers, so that none is starved."""
    return save(random_model(WIDE, sublayers=2.0), tmp_path_factory.mktemp("busy") / "busy.safetensors")
