"""On a machine with an NVIDIA GPU: `pytest -m gpu`. Builds engines for it, and runs them."""

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from cases import GOLDEN, GOLDEN_FILES, assert_same_policy, export, golden, quiet, random_images, random_policy

import adavit
from adavit.bundle.demo import demo_bundle
from adavit.bundle.engine_sets import FLAVOURS
from adavit.calibration.options import CalibrationOptions
from adavit.errors import BackendError
from adavit.measure.benchmark import Plan, latency, measure
from adavit.runtime import Policy, Runtime
from adavit.runtime.backends.cuda.bindings import Cuda
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
            add_engines(folder / "bundle", BuildOptions(target=(flavour,), jobs=4), quiet)
            made[name, precision] = folder / "bundle"
        return made[name, precision]

    return bundle


@pytest.mark.parametrize("name", GOLDEN_FILES)
@pytest.mark.parametrize("graphs", [False, True])
def test_golden_vectors(build: Build, flavour: str, name: str, graphs: bool) -> None:
    images, logits, policy = golden(name)
    runtime = adavit.load(build(name), flavour, cuda_graphs=graphs)
    for _ in range(5):
        found = runtime.run(images)
        assert_same_policy(found.policy, policy)
        np.testing.assert_allclose(found.logits, logits, atol=1e-3)


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_other_precisions_compute_what_onnx_runtime_does(build: Build, flavour: str, precision: str) -> None:
    images, _, policy = golden("deit_small")
    bundle = build("deit_small", precision)
    wanted = adavit.load(bundle, threads=2).run(images, policy).logits
    found = adavit.load(bundle, flavour).run(images, policy).logits
    np.testing.assert_allclose(found, wanted, atol=0.05 * np.abs(wanted).max())


def test_any_policy_is_replayed(build: Build, flavour: str) -> None:
    on_gpu, on_cpu = adavit.load(build("demo"), flavour), adavit.load(build("demo"), threads=2)
    for seed in range(4):
        images, policy = random_images(on_cpu.architecture, 4, seed), random_policy(on_cpu.architecture, 4, seed)
        np.testing.assert_allclose(on_gpu.run(images, policy).logits, on_cpu.run(images, policy).logits, atol=1e-2)


@pytest.mark.parametrize("parallel", ["operators", "samples"])
def test_from_many_threads(build: Build, flavour: str, parallel: str) -> None:
    runtime = adavit.load(build("demo"), flavour, threads=4, parallel=parallel)
    batches = [random_images(runtime.architecture, 3, seed) for seed in range(24)]
    policies = [Policy.dense(runtime.architecture, 3)] * len(batches)
    wanted = [runtime.run(images, policy).logits for images, policy in zip(batches, policies, strict=True)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda pair: runtime.run(*pair).logits, zip(batches, policies, strict=True)))
    np.testing.assert_allclose(np.stack(found), np.stack(wanted), atol=1e-5)


@pytest.mark.parametrize("batch", [1, 8, 32])
def test_benchmark_against_the_dense_engine(
    build: Build, flavour: str, batch: int, capsys: pytest.CaptureFixture[str]
) -> None:
    for graphs in (False, True):
        runtime: Runtime = adavit.load(build("demo"), flavour, cuda_graphs=graphs)
        found = measure(runtime, random_images(runtime.architecture, 32), Plan(batch=batch, seconds=2.0, warmup=20))
        adaptive, dense = latency(found.adaptive_ms)["p50"], latency(found.dense_ms)["p50"]
        parts = {kind: float(np.median(values)) for kind, values in found.device_ms.items()}
        with capsys.disabled():
            print(
                f"\n{flavour} batch {batch} graphs {graphs}: adaptive {adaptive:.3f} ms, dense {dense:.3f} ms, {parts}"
            )
        assert parts["gpu_ms"] > 0
