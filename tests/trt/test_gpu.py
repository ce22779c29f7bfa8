"""On a machine with an NVIDIA GPU: `pytest -m gpu`. Builds engines for it, and runs them."""

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import (
    GOLDEN,
    GOLDEN_FILES,
    assert_same_policy,
    export,
    golden,
    quiet,
    random_images,
    random_policy,
    read_config,
)
from double import add_statistics

import adavit
from adavit.bundle.demo import demo_bundle
from adavit.bundle.engine_set import FLAVOURS
from adavit.bundle.operating_points import Offsets
from adavit.calibration.options import CalibrationOptions
from adavit.errors import BackendError
from adavit.measure.benchmark import Plan, latency, measure
from adavit.runtime import Runtime
from adavit.runtime.backends.cuda.bindings import Cuda
from adavit.runtime.batch import WAYS
from adavit.tensorrt.build import add_engines
from adavit.tensorrt.options import BuildOptions

pytestmark = pytest.mark.gpu

Build = Callable[..., Path]


@pytest.fixture(scope="module", params=FLAVOURS)
def flavour(request: pytest.FixtureRequest) -> str:
    try:
        Cuda()
    except BackendError as error:
        pytest.skip(str(error))
    pytest.importorskip(FLAVOURS[request.param], reason=f"{request.param} is not installed")
    pytest.importorskip("polygraphy", reason="polygraphy is not installed")
    return str(request.param)


@pytest.fixture(scope="module")
def build(flavour: str, golden_bundles: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Bundles with engines for this GPU, by name and precision, each built once."""
    made: dict[tuple[str, str], Path] = {}

    def bundle(name: str, precision: str = "fp32") -> Path:
        if (name, precision) not in made:
            folder = tmp_path_factory.mktemp(name)
            if precision == "fp32":
                source = demo_bundle() if name == "demo" else golden_bundles(name)
                shutil.copytree(source, folder / "bundle")
            else:
                calibration = CalibrationOptions((precision,), (demo_bundle().with_name("images"),))
                export(GOLDEN / GOLDEN_FILES[name], folder, verify=False, calibration=calibration)
            if "statistics" not in read_config(folder / "bundle"):
                add_statistics(folder / "bundle", golden(name)[2])
            add_engines(folder / "bundle", BuildOptions(target=(flavour,), jobs=4, conditional=True), quiet)
            made[name, precision] = folder / "bundle"
        return made[name, precision]

    return bundle


WAY = pytest.mark.parametrize("way", WAYS)


def went(runtime: Runtime) -> set[str]:
    """The ways that batches went."""
    dispatcher: Any = runtime.dispatcher
    return {ran.way for ran in dispatcher.ran}


@WAY
@pytest.mark.parametrize("name", GOLDEN_FILES)
def test_golden_vectors(build: Build, flavour: str, name: str, way: str) -> None:
    images, logits, policy = golden(name)
    runtime = adavit.load(build(name), flavour, dispatch=way)
    for some in (slice(None), slice(None), slice(None), slice(1), slice(1), slice(1)):
        found = runtime.run(images[some])
        assert_same_policy(found.policy, policy[some])
        np.testing.assert_allclose(found.logits, logits[some], atol=1e-3)


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_other_precisions_compute_what_onnx_runtime_does(build: Build, flavour: str, precision: str) -> None:
    images, _, policy = golden("deit_small")
    bundle = build("deit_small", precision)
    wanted = adavit.load(bundle, threads=2).run(images, policy).logits
    found = adavit.load(bundle, flavour, dispatch="exact").run(images, policy).logits
    np.testing.assert_allclose(found, wanted, atol=0.05 * np.abs(wanted).max())


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_every_way_decides_and_computes_alike(build: Build, flavour: str, precision: str) -> None:
    """Engines of a whole block and of its parts may round otherwise: decisions next to a threshold may differ."""
    images, _, _ = golden("deit_small")
    bundle = build("deit_small", precision)
    wanted = adavit.load(bundle, flavour, dispatch="exact").run(images)
    for way in ("capacity", "conditional", "auto"):
        runtime = adavit.load(bundle, flavour, dispatch=way)
        for _ in range(3):
            found = runtime.run(images)
        same = (found.policy.tokens == wanted.policy.tokens).all((1, 2))
        assert same.mean() >= (1 if precision == "fp32" else 0.75)
        most = np.abs(wanted.logits).max()
        np.testing.assert_allclose(found.logits[same], wanted.logits[same], atol=0.05 * most)


@WAY
def test_everything_on_is_the_dense_twin(build: Build, flavour: str, way: str) -> None:
    runtime = adavit.load(build("demo"), flavour, dispatch=way)
    images, everything = random_images(runtime.architecture, 8), Offsets(500.0, 500.0, 500.0)
    for _ in range(3):
        found = runtime.run(images, budget=everything)
    assert found.policy.tokens.all() and found.policy.heads.all() and found.policy.sublayers.all()
    np.testing.assert_allclose(found.logits, runtime.run_dense(images), atol=1e-2)


def test_any_policy_is_replayed(build: Build, flavour: str) -> None:
    on_gpu, on_cpu = adavit.load(build("demo"), flavour), adavit.load(build("demo"), threads=2)
    for seed in range(4):
        images, policy = random_images(on_cpu.architecture, 4, seed), random_policy(on_cpu.architecture, 4, seed)
        np.testing.assert_allclose(on_gpu.run(images, policy).logits, on_cpu.run(images, policy).logits, atol=1e-2)


@WAY
def test_from_many_threads(build: Build, flavour: str, way: str) -> None:
    runtime = adavit.load(build("demo"), flavour, threads=4, dispatch=way)
    batches = [random_images(runtime.architecture, 1 + seed % 5, seed) for seed in range(24)]
    wanted = [runtime.run(images) for images in batches]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            for result, alone in zip(pool.map(runtime.run, batches), wanted, strict=True):
                assert_same_policy(result.policy, alone.policy)
                np.testing.assert_allclose(result.logits, alone.logits, atol=1e-3)


def test_conditional_dispatch_is_recorded(build: Build, flavour: str, caplog: pytest.LogCaptureFixture) -> None:
    """Says why, where the driver or the engines don't allow it."""
    runtime = adavit.load(build("demo"), flavour, dispatch="conditional")
    for _ in range(3):
        runtime.run(random_images(runtime.architecture, 1))
    if "conditional" not in went(runtime) or caplog.records:
        pytest.skip("; ".join(record.message for record in caplog.records))
    assert went(runtime) == {"conditional"}


@pytest.mark.parametrize("batch", [1, 8, 32])
def test_benchmark_against_the_dense_engine(
    build: Build, flavour: str, batch: int, capsys: pytest.CaptureFixture[str]
) -> None:
    for way in WAYS:
        runtime = adavit.load(build("demo"), flavour, dispatch=way)
        found = measure(runtime, random_images(runtime.architecture, 32), Plan(batch=batch, seconds=1.0, warmup=20))
        adaptive, dense = latency(found.adaptive_ms)["p50"], latency(found.dense_ms)["p50"]
        parts = {kind: float(np.median(values)) for kind, values in found.device_ms.items()}
        with capsys.disabled():
            print(f"\n{flavour} batch {batch} {way}: adaptive {adaptive:.3f} ms, dense {dense:.3f} ms, {parts}")
        assert parts["gpu_ms"] > 0
