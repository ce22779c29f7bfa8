"""The ways to drive a batch, on a device that puts everything off: what they make, and what takes over."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import (
    GOLDEN_FILES,
    assert_same_policy,
    export,
    forced,
    golden,
    invoke,
    oracle,
    random_images,
    random_model,
    random_policy,
    tiny,
)
from double import Gpu, add_double_engines, add_statistics
from driving import FLAVOURS, WAY, assert_all_freed, assert_same, counted, on_device, ran

from adavit.bundle.operating_points import Offsets
from adavit.cli import run
from adavit.errors import OptionError
from adavit.model import AdaViT
from adavit.runtime import Policy, Runtime
from adavit.runtime.batch import WAYS
from adavit.runtime.dispatcher import Step

OFFSETS = [Offsets(), Offsets(1.0, -0.5, 0.5), Offsets(-1.0, 0.5, 2.0), Offsets(8.0, 8.0, 8.0), Offsets(0.0, 0.0, -8.0)]
"""As trained, others, everything, and no sub-layers."""


# What they make.


@FLAVOURS
@pytest.mark.parametrize("way", [*WAYS, "auto"])
def test_every_way_makes_what_the_cpu_makes(
    roomy: Callable[..., Path], runtime: Runtime, gpu: Gpu, way: str, flavour: str
) -> None:
    """Also where sizes alternate, and where a batch is larger than engines are built for."""
    on_gpu = on_device(roomy(flavour), way, flavour)
    for batch in (1, 5, 5, 8, 5, 1, 8, 1, 5, 8, 40, 40):
        images = random_images(runtime.architecture, batch, batch)
        assert_same(on_gpu.run(images), runtime.run(images))
    assert way == "auto" or {batch.way for batch in ran(on_gpu)} == {way}
    assert ("launch" in gpu.names()) == (way != "exact")
    del on_gpu
    assert_all_freed(gpu)


@pytest.mark.parametrize("name", GOLDEN_FILES)
def test_golden_vectors(
    golden_bundles: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory, gpu: Gpu, name: str
) -> None:
    images, logits, policy = golden(name)
    bundle = tmp_path_factory.mktemp(name) / "bundle"
    bundle.mkdir()
    for path in golden_bundles(name).iterdir():
        if path.name != "config.json":
            (bundle / path.name).symlink_to(path)
    (bundle / "config.json").write_bytes((golden_bundles(name) / "config.json").read_bytes())
    add_double_engines(add_statistics(bundle, policy, capacity_quantile=0.8), max_batch=len(images))
    for way in WAYS:
        on_gpu = on_device(bundle, way)
        for some in (slice(None), slice(None), slice(1), slice(1, 2), slice(1)):
            found = on_gpu.run(images[some])
            assert_same_policy(found.policy, policy[some])
            np.testing.assert_allclose(found.logits, logits[some], atol=1e-4)
        np.testing.assert_allclose(on_gpu.run(images, policy).logits, logits, atol=1e-4)


MODELS: list[tuple[dict[str, Any], dict[str, float]]] = [
    ({"token_policy": False}, {}),
    ({"head_policy": False}, {}),
    ({"sublayer_policy": False}, {}),
    ({"qkv_bias": False, "keep": 0}, {"sublayers": -1.0}),
    ({"keep": 3}, {}),
    ({"depth": 1, "keep": 0}, {}),
    ({"keep": 0}, {"tokens": -50.0, "heads": -50.0, "sublayers": -50.0}),
    ({"stem": "t2t", "patch_size": 16, "image_size": 48, "width": 96, "heads": 6, "qkv_bias": False}, {}),
]


@pytest.mark.parametrize(("changes", "biases"), MODELS, ids=str)
def test_random_models(changes: dict[str, Any], biases: dict[str, float], tmp_path: Path, gpu: Gpu) -> None:
    model = random_model(tiny(**changes), 3, **biases)
    images = random_images(model.arch, 4)
    logits, policy, _ = oracle(model, images)
    bundle = add_statistics(export(model, tmp_path, verify=False), policy, capacity_quantile=0.5)
    add_double_engines(bundle)
    follow = random_policy(model.arch, 4, 0)
    for way in WAYS:
        on_gpu = on_device(bundle, way)
        for _ in range(2):
            found = on_gpu.run(images)
            assert_same_policy(found.policy, policy)
            np.testing.assert_allclose(found.logits, logits, atol=1e-4)
        np.testing.assert_allclose(on_gpu.run(images, follow).logits, forced(model, images, follow), atol=1e-4)


@WAY
def test_every_image_has_a_budget_of_its_own(roomy: Callable[..., Path], runtime: Runtime, gpu: Gpu, way: str) -> None:
    on_gpu, images = on_device(roomy(), way), random_images(runtime.architecture, 5)
    for turn in range(6):
        budgets = OFFSETS[turn % 3 :] + OFFSETS[: turn % 3]
        assert_same(on_gpu.run(images, budget=budgets), runtime.run(images, budget=budgets))
        offsets = budgets[0]
        assert_same(on_gpu.run(images[:2], budget=offsets), runtime.run(images[:2], budget=offsets))


@WAY
def test_any_policy_is_replayed(roomy: Callable[..., Path], runtime: Runtime, gpu: Gpu, way: str) -> None:
    on_gpu, arch = on_device(roomy(), way), runtime.architecture
    for seed in range(6):
        images, policy = random_images(arch, 3, seed), random_policy(arch, 3, seed)
        found = on_gpu.run(images, policy)
        assert_same(found, runtime.run(images, policy))
        images = random_images(arch, 3, seed + 9)
        assert_same(on_gpu.run(images), runtime.run(images))


@WAY
def test_observers_are_shown_every_step(roomy: Callable[..., Path], runtime: Runtime, gpu: Gpu, way: str) -> None:
    on_gpu, images = on_device(roomy(), way), random_images(runtime.architecture, 3)
    follow = random_policy(runtime.architecture, 3, 1)
    for policy in (None, follow):
        shown: list[Step] = []
        wanted: list[Step] = []
        assert_same(
            on_gpu.run(images, policy, observe=noting(shown)), runtime.run(images, policy, observe=noting(wanted))
        )
        assert len(shown) == 3 * (runtime.architecture.depth + 1)
        by_step = {(step.image, step.block): step for step in shown}
        for step in wanted:
            mine = by_step[step.image, step.block]
            np.testing.assert_allclose(mine.tokens, step.tokens, atol=1e-4)
            assert (mine.decisions is None) == (step.decisions is None)
            if step.decisions is not None:
                np.testing.assert_allclose(mine.decisions, step.decisions, atol=1e-4)
                np.testing.assert_array_equal(mine.kept, step.kept)


def noting(steps: list[Step]) -> Callable[[Step], None]:
    """An observer; tokens are valid until it returns."""
    return lambda step: steps.append(step._replace(tokens=step.tokens.copy()))


def test_an_observer_that_fails_leaves_the_device_usable(
    roomy: Callable[..., Path], runtime: Runtime, gpu: Gpu
) -> None:
    on_gpu, images = on_device(roomy(), "capacity"), random_images(runtime.architecture, 3)
    for _ in range(6):
        with pytest.raises(ZeroDivisionError):
            on_gpu.run(images, observe=lambda step: 1 // (2 - step.block))
    assert_same(on_gpu.run(images), runtime.run(images))
    del on_gpu
    assert_all_freed(gpu)


# Where a way cannot be gone.


def test_capacity_needs_statistics(built: Path, gpu: Gpu) -> None:
    with pytest.raises(OptionError, match=r"capacity dispatch needs statistics; add them with adavit-export .*images"):
        on_device(built, "capacity")


def test_auto_without_statistics_says_how_to_add_them(
    built: Path, runtime: Runtime, gpu: Gpu, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    on_gpu, images = on_device(built, "auto"), random_images(runtime.architecture, 2)
    for _ in range(3):
        assert_same(on_gpu.run(images), runtime.run(images))
    assert "has no statistics, so capacity dispatch is left out; add them with adavit-export" in caplog.text
    assert {batch.way for batch in ran(on_gpu)} <= {"exact", "conditional"}


def test_the_command_says_how_to_add_statistics(built: Path, roomy: Callable[..., Path], gpu: Gpu) -> None:
    how = ("--backend", "tensorrt", "--trust-engines", "--iterations", 1, "--warmup", 0, "--threads", 1)
    done = invoke(run, built, *how)
    assert done.exit_code == 0, done.output
    note = f"adavit-run: note: {built} has no statistics, so capacity dispatch is left out; add them with adavit-export"
    assert done.stderr.startswith(note)
    for silent in ((built, *how, "--dispatch", "exact"), (roomy(), *how)):
        assert "statistics" not in invoke(run, *silent).stderr


def refuse(gpu: Gpu, what: str) -> None:
    """Takes from the machine what conditions need."""
    if what == "driver":
        gpu.driver = 12030
    else:
        gpu.refuse.add(what)


REASONS = {
    "driver": "the driver is for CUDA 12.3",
    "nvrtc": "NVRTC is missing",
    "architecture": "compute capability 8.7",
    "parts": "the engine set has no parts of blocks; run: adavit-export",
    "capture": "no CUDA graph for conditional dispatch",
}


@pytest.mark.parametrize("statistics", [True, False])
@pytest.mark.parametrize("lacks", REASONS)
def test_where_there_are_no_conditions_another_way_takes_over(
    bundle: Path, runtime: Runtime, gpu: Gpu, lacks: str, statistics: bool, caplog: pytest.LogCaptureFixture
) -> None:
    if statistics:
        add_statistics(bundle, Policy.dense(runtime.architecture, 16))
    add_double_engines(bundle, parts=lacks != "parts")
    refuse(gpu, lacks)
    on_gpu, images = on_device(bundle, "conditional"), random_images(runtime.architecture, 3)
    for _ in range(5):
        assert_same(on_gpu.run(images), runtime.run(images))
    instead = "capacity" if statistics else "exact"
    assert [batch.way for batch in ran(on_gpu)][3:] == [instead] * 2
    warned = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert REASONS[lacks] in warned[0]
    assert lacks == "capture" or f"{instead} takes over" in warned[0]
    del on_gpu
    assert_all_freed(gpu)


def test_capacity_goes_without_graphs_where_there_are_none(
    roomy: Callable[..., Path], runtime: Runtime, gpu: Gpu, caplog: pytest.LogCaptureFixture
) -> None:
    gpu.refuse.add("capture")
    on_gpu, images = on_device(roomy(), "capacity"), random_images(runtime.architecture, 3)
    for _ in range(4):
        found = counted(gpu, lambda: assert_same(on_gpu.run(images), runtime.run(images)))
    assert (found["run"], found["launch"], found["synchronise"]) == (runtime.architecture.depth + 1, 0, 1)
    assert [batch.way for batch in ran(on_gpu)] == ["capacity"] * 4
    assert caplog.text.count("no CUDA graph for capacity dispatch") == 1


@pytest.mark.parametrize("refused", [None, "capture"])
def test_what_was_measured_is_not_measured_again(
    roomy: Callable[..., Path], runtime: Runtime, gpu: Gpu, cache: Path, refused: str | None
) -> None:
    """Also where a way turned out not to be possible."""
    gpu.refuse |= {refused} if refused else set()
    images = random_images(runtime.architecture, 3)
    runs = []
    for _ in range(2):
        on_gpu = on_device(roomy(), "auto")
        runs.append(counted(gpu, lambda: assert_same(on_gpu.run(images), runtime.run(images)))["run"])  # noqa: B023
        (went,) = ran(on_gpu)
        assert refused is None or went.way != "conditional"
    assert runs[0] > 5 * runs[1] > 0


@pytest.mark.parametrize("kept", ["{}", '{"milliseconds": 1}', '{"milliseconds": {"exact": "x"}}', "[]", "nothing"])
def test_measurements_that_are_of_no_use_are_made_again(
    roomy: Callable[..., Path], runtime: Runtime, gpu: Gpu, cache: Path, kept: str
) -> None:
    images = random_images(runtime.architecture, 3)
    for _ in range(2):
        assert_same(on_device(roomy(), "auto").run(images), runtime.run(images))
        (path,) = cache.glob("dispatch-*.json")
        assert '"exact"' in path.read_text() and '"conditional"' in path.read_text()
        path.write_text(kept)


def test_what_cannot_be_recorded_inside_a_condition(
    roomy: Callable[..., Path], runtime: Runtime, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batch that was to be recorded runs without a graph, on the stream of its own."""
    begin = gpu.begin

    def refused(handle: Any, graph: Any = None, after: Any = ()) -> None:
        begin(handle, graph, after)
        gpu.stream(handle).capture.valid = graph is None

    monkeypatch.setattr(gpu, "begin", refused)
    on_gpu, images = on_device(roomy(), "conditional"), random_images(runtime.architecture, 3)
    for _ in range(5):
        assert_same(on_gpu.run(images), runtime.run(images))
    assert [batch.way for batch in ran(on_gpu)] == ["conditional"] * 3 + ["capacity"] * 2
    del on_gpu
    assert_all_freed(gpu)


@pytest.mark.parametrize("bindings", [12, 13])
def test_both_versions_of_the_bindings(
    roomy: Callable[..., Path], model: AdaViT, runtime: Runtime, gpu: Gpu, bindings: int
) -> None:
    gpu.bindings, gpu.driver = bindings, 12040
    on_gpu, images = on_device(roomy(), "conditional"), random_images(runtime.architecture, 3)
    for _ in range(3):
        assert_same(on_gpu.run(images), runtime.run(images))
    assert "launch" in gpu.names()
