"""Engines for sets of heads: which get one, that they run, and that results stay the same."""

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from cases import (
    WIDE,
    assert_same_policy,
    export,
    forced,
    invoke,
    quiet,
    random_images,
    random_model,
    random_policy,
    read_config,
    tiny,
    write_config,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from PIL import Image

import adavit
from adavit.cli import run
from adavit.errors import BackendError, BundleError, InputError
from adavit.runtime import Policy, Runtime, specialise, tune
from adavit.runtime.backends.fixed_inputs import with_fixed_inputs
from adavit.runtime.plan import EnginePlan, HeadSet, ruled, saved_macs
from adavit.runtime.profile import Profiler

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(scope="module", params=["operators", "samples"])
def loaded(request: pytest.FixtureRequest, wide: tuple[Path, Path]) -> Runtime:
    return adavit.load(wide[0], threads=1, parallel=request.param)


def keeping(heads: tuple[int, ...], images: int = 1) -> Policy:
    """All tokens and sub-layers, and some heads wherever heads are decided on."""
    policy = Policy.dense(WIDE, images)
    for block in range(WIDE.depth):
        if WIDE.adapts_heads(block):
            policy.heads[:, block] = np.isin(np.arange(WIDE.heads), heads)
    return policy


def sets_of(heads: tuple[int, ...]) -> set[HeadSet]:
    return {HeadSet(b, kind, heads) for b in range(WIDE.depth) if WIDE.adapts_heads(b) for kind in ("attention", "mlp")}


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_any_sets_compute_the_same(seed: int, loaded: Runtime) -> None:
    images, policy = random_images(WIDE, 2, seed=seed), random_policy(WIDE, 2, seed)
    loaded.specialise(policy[:1])
    wanted = forced(random_model(WIDE), images, policy)
    np.testing.assert_allclose(loaded.run(images, policy=policy).logits, wanted, atol=1e-4, rtol=1e-4)


def test_the_engines_run_and_no_weights_are_gathered(wide: tuple[Path, Path]) -> None:
    plain = adavit.load(wide[0], threads=1)
    profiler = Profiler(plain.bundle, plain.backend)
    timed = Runtime(plain.bundle, profiler, plain.options)
    timed.dispatcher.plan = EnginePlan.where(WIDE, lambda kind, k, h: h > 0)  # all others gather
    policy, image = keeping((1, 3, 4)), random_images(WIDE, 1)

    def gathered(policy: Policy) -> set[str]:
        with profiler.recording() as calls:
            timed.run(image, policy)
        assert all(call.sizes["h"] == 3 for call in calls if call.name.endswith("_gather"))
        return {call.name for call in calls if call.name.endswith("_weights")}

    assert timed.specialise(policy) == len(sets_of((1, 3, 4)))
    assert gathered(policy) == set()
    assert gathered(keeping((0, 3, 4))) == {f"blocks.{s.block}.{s.kind}_weights" for s in sets_of((0, 3, 4))}


def test_decisions_and_logits_stay(loaded: Runtime) -> None:
    images = random_images(WIDE, 4)
    loaded.dispatcher.specialised.make(())
    before = loaded.run(images)
    assert loaded.specialise(before.policy) > 0
    after = loaded.run(images)
    assert_same_policy(after.policy, before.policy)
    np.testing.assert_allclose(after.logits, before.logits, atol=1e-4, rtol=0)
    np.testing.assert_array_equal(after.macs, before.macs)


def test_a_later_call_replaces_the_engines(loaded: Runtime) -> None:
    loaded.specialise(keeping((0, 1)))
    loaded.specialise(keeping((4, 5)))
    assert set(loaded.dispatcher.specialised.sets) == sets_of((4, 5))
    loaded.specialise(Policy.dense(WIDE, 1))  # for all heads, the masked engines of MLPs are as good
    everything = sets_of(tuple(range(WIDE.heads)))
    assert set(loaded.dispatcher.specialised.sets) == {found for found in everything if found.kind == "attention"}


def test_the_sets_that_save_most_get_the_memory(loaded: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    choose = loaded.dispatcher.specialised.choose
    often, seldom = keeping((1, 3), 9), keeping((0, 2), 1)
    both = Policy.concatenate([seldom, often])
    everything = choose(both)
    assert set(everything) == sets_of((1, 3)) | sets_of((0, 2))
    half = sum(loaded.dispatcher.specialised._size(found) for found in sets_of((1, 3)))
    monkeypatch.setattr(specialise, "BYTES", half)
    assert set(choose(both)) == sets_of((1, 3))
    monkeypatch.setattr(specialise, "BYTES", 0)
    assert choose(both) == ()
    monkeypatch.setattr(specialise, "BYTES", 1 << 30)
    monkeypatch.setattr(specialise, "LEAST", 0.005)
    assert set(choose(both)) == sets_of((1, 3))


@settings(max_examples=50, deadline=None)
@given(
    kept=st.integers(1, WIDE.tokens), heads=st.integers(1, WIDE.heads - 1), kind=st.sampled_from(["attention", "mlp"])
)
def test_constants_always_save_something(kept: int, heads: int, kind: str) -> None:
    assert saved_macs(WIDE, kind, kept, heads) > 0


def test_a_bundle_of_an_earlier_version(wide: tuple[Path, Path], tmp_path: Path) -> None:
    bundle = shutil.copytree(wide[0], tmp_path / "bundle")
    config = read_config(bundle)
    config["engines"] = {name: spec for name, spec in config["engines"].items() if not name.endswith("_set")}
    write_config(bundle, config)
    done = invoke(run, bundle, "--iterations", "1")
    assert done.exit_code == 1
    assert done.stderr.splitlines()[-1].endswith(".attention_set'; export again")
    assert invoke(run, bundle, "--iterations", "1", "--no-specialise").exit_code == 0


def test_a_policy_of_another_model(loaded: Runtime) -> None:
    with pytest.raises(InputError, match=r"policy.tokens is bool \[1, 3, 17\]"):
        loaded.specialise(Policy.dense(tiny(), 1))


def test_only_where_it_can(wide: tuple[Path, Path]) -> None:
    other = adavit.load(wide[0], threads=1, backend="openvino", provider="fp32")
    assert other.specialise(keeping((0, 1))) == 0
    with pytest.raises(BackendError, match="makes no engines for sets of heads"):
        other.dispatcher.specialised.make((HeadSet(1, "mlp", (0,)),))


def test_a_model_without_head_policies(tmp_path: Path) -> None:
    arch = tiny(head_policy=False)
    plain = adavit.load(export(random_model(arch), tmp_path), threads=1)
    assert plain.specialise(plain.run(random_images(arch, 2)).policy) == 0


def test_tuning_with_images_keeps_sets(wide: tuple[Path, Path], cache: Path) -> None:
    first = adavit.load(wide[0], threads=1)
    report = tune.tune(first, quiet, keeping((1, 3)))
    kept = [[s.block, s.kind, list(s.heads)] for s in sorted(sets_of((1, 3)))]
    assert report["gathers"]["sets"] == kept
    again = adavit.load(wide[0], threads=1)
    assert set(again.dispatcher.plan.sets) == set(again.dispatcher.specialised.sets) == sets_of((1, 3))


@pytest.mark.parametrize(
    "sets",
    [
        1, [1], [[1, "mlp"]], [[1, "mlp", 3]], [[1, "mlp", []]], [[1, "mlp", [2, 1]]], [[1, "mlp", [1, 1]]],
        [[1, "mlp", [6]]], [[1, "mlp", [-1]]], [[1, "mlp", ["1"]]], [[1, "norm", [1]]], [[3, "mlp", [1]]],
        [[-1, "mlp", [1]]], [[0, "mlp", [1]]], [[True, "mlp", [1]]], [[1, ["mlp"], [1]]],
    ],
)  # fmt: skip
def test_what_are_no_sets(sets: Any) -> None:
    with pytest.raises(ValueError, match=r"sets? of heads"):
        EnginePlan.from_dict({**ruled(WIDE).to_dict(), "sets": sets}, WIDE, "a file")


def test_plans_with_sets_survive_being_written() -> None:
    plan = EnginePlan(ruled(WIDE).gathers, tuple(sorted(sets_of((1, 3)))))
    assert EnginePlan.from_dict(json.loads(json.dumps(plan.to_dict())), WIDE, "a file").sets == plan.sets


def test_the_command(wide: tuple[Path, Path], tmp_path: Path) -> None:
    how = wide[0], "--threads", 1, "--iterations", 1, "--warmup", 0, "--json", tmp_path / "ran.json"

    def specialised(*more: Any) -> int:
        done = invoke(run, *how, *more)
        assert done.exit_code == 0, done.output
        found: int = json.loads((tmp_path / "ran.json").read_text())["specialised"]
        assert (f"{found} for frequent sets of heads" in done.stdout) == (found > 0)
        return found

    (tmp_path / "images").mkdir()
    for number, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (3, 48, 48, 3), np.uint8)):
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
    assert specialised() > 0
    assert specialised("--images", tmp_path / "images") > 0
    assert specialised("--no-specialise") == 0


def a_model() -> bytes:
    """y = x @ w + b, every one of them an input."""
    values = [onnx.helper.make_tensor_value_info(n, 1, s) for n, s in (("x", ["K", 3]), ("w", [3, "h"]), ("b", ["h"]))]
    nodes = [onnx.helper.make_node("MatMul", ["x", "w"], ["p"]), onnx.helper.make_node("Add", ["p", "b"], ["y"])]
    graph = onnx.helper.make_graph(nodes, "g", values, [onnx.helper.make_tensor_value_info("y", 1, ["K", "h"])])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    return bytes(model.SerializeToString())


@settings(max_examples=30, deadline=None)
@given(heads=st.integers(1, 300), order=st.booleans())
def test_inputs_become_constants(heads: int, order: bool) -> None:
    source = np.random.default_rng(heads)
    w = source.standard_normal((3, heads) if order else (heads, 3), np.float32)
    values = {"w": w if order else w.T, "b": source.standard_normal(heads, np.float32)}
    model = onnx.load_from_string(with_fixed_inputs(a_model(), values))
    onnx.checker.check_model(model, full_check=True)
    assert [value.name for value in model.graph.input] == ["x"]
    assert {tensor.name for tensor in model.graph.initializer} == {"w", "b"}
    for tensor in model.graph.initializer:
        np.testing.assert_array_equal(numpy_helper.to_array(tensor), values[tensor.name])


def test_all_else_of_a_model_stays() -> None:
    before, after = (onnx.load_from_string(data) for data in (a_model(), with_fixed_inputs(a_model(), {})))
    assert before == after


def test_an_input_that_is_not_there() -> None:
    with pytest.raises(BundleError, match="has no input nothing"):
        with_fixed_inputs(a_model(), {"nothing": np.zeros(1, np.float32)})


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=60), cut=st.integers(1, 200))
def test_damaged_models_are_refused(data: bytes, cut: int) -> None:
    values = {"w": np.zeros((3, 1), np.float32)}
    with pytest.raises(BundleError):
        with_fixed_inputs(data, values)
    with suppress(BundleError):  # what is cut between two fields is a message still
        with_fixed_inputs(a_model()[:-cut], values)
