"""Blocks in one engine for sets of heads: which get one, that they run, and that results stay the same."""

import gc
import json
import shutil
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
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
from PIL import Image

import adavit
from adavit.architecture import Architecture
from adavit.cli import run
from adavit.errors import BackendError, InputError
from adavit.macs import attention_macs, dense_macs
from adavit.runtime import Policy, Runtime, specialise, tune
from adavit.bundle.operating_points import Offsets
from adavit.runtime.plan import SETS, EnginePlan, HeadSet, ruled, saved_macs, sizes_of
from adavit.runtime.profile import Event, Profiler
from adavit.runtime.specialise import set_bytes
from adavit.runtime.weights import attention_weights, mlp_weights, set_weights

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


def sets_with(heads: tuple[int, ...]) -> set[HeadSet]:
    """What `keeping` runs with."""
    everything = tuple(range(WIDE.heads))
    return {HeadSet(b, "both", heads if WIDE.adapts_heads(b) else everything) for b in range(WIDE.depth)}


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), of=st.integers(1, 2))
def test_any_sets_compute_the_same(seed: int, of: int, loaded: Runtime) -> None:
    images, policy = random_images(WIDE, 2, seed=seed), random_policy(WIDE, 2, seed)
    loaded.specialise(policy[:of])
    wanted = forced(random_model(WIDE), images, policy)
    np.testing.assert_allclose(loaded.run(images, policy=policy).logits, wanted, atol=1e-4, rtol=1e-4)


ARCHITECTURES = {
    "everything": tiny(),
    "t2t": tiny(stem="t2t", patch_size=16, image_size=64, qkv_bias=False),
    "no tokens": tiny(token_policy=False),
    "no heads": tiny(head_policy=False),
    "no sub-layers": tiny(sublayer_policy=False, keep=0),
    "tokens alone": tiny(head_policy=False, sublayer_policy=False),
}


@pytest.mark.parametrize("arch", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_every_architecture(arch: Architecture, tmp_path: Path) -> None:
    model = random_model(arch)
    runtime = adavit.load(export(model, tmp_path), threads=1)
    images, policy = random_images(arch, 3), random_policy(arch, 3, 1)
    before = runtime.run(images)
    assert runtime.specialise(Policy.concatenate([policy, before.policy])) > 0
    found = runtime.run(images)
    assert_same_policy(found.policy, before.policy)
    np.testing.assert_allclose(found.logits, before.logits, atol=1e-4, rtol=0)
    replayed = runtime.run(images, policy=policy)
    np.testing.assert_allclose(replayed.logits, forced(model, images, policy), atol=1e-4, rtol=1e-4)


def test_blocks_run_in_one_engine_each(wide: tuple[Path, Path]) -> None:
    plain = adavit.load(wide[0], threads=1)
    profiler = Profiler(plain.bundle, plain.backend)
    timed = Runtime(plain.bundle, profiler, plain.options)
    policy, image = keeping((1, 3, 4)), random_images(WIDE, 1)
    policy.sublayers[0, 1, 0] = policy.sublayers[0, 2, :] = False
    policy.tokens[0, 1, 5:] = False

    def ran(policy: Policy) -> list[Event]:
        with profiler.recording() as calls:
            timed.run(image, policy)
        return [call for call in calls if "." in call.name or call.name.startswith(("stem", "head"))]

    assert timed.specialise(policy) == 2
    calls = ran(policy)
    assert [call.name for call in calls] == ["stem_set", "blocks.0.both_set", "blocks.1.mlp_set", "head"]
    assert calls[2].sizes == {"K": 5, "c": 3 * WIDE.head_width, "h": 3}
    names = [call.name for call in ran(keeping((0, 3, 4)))]
    assert names[:2] == ["stem_set", "blocks.0.both_set"]
    assert not any(name.endswith("both_set") for name in names[2:])
    assert names.count("blocks.2.decide_set") == 1


def test_thresholds_are_the_requests(loaded: Runtime) -> None:
    images = random_images(WIDE, 5)
    points = [Offsets(), Offsets(tokens=1.0, heads=-0.5), Offsets(sublayers=(-1.0, 0.0, 1.0))]
    loaded.dispatcher.specialise(())
    wanted = [loaded.run(images, budget=offsets).policy for offsets in points]
    loaded.specialise(Policy.concatenate(wanted))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda offsets: loaded.run(images, budget=offsets).policy, points * 8))
    for policy, same in zip(found, wanted * 8, strict=True):
        assert_same_policy(policy, same)
    assert not np.array_equal(wanted[0].tokens, wanted[1].tokens)


def test_many_images_at_once_from_many_threads(loaded: Runtime) -> None:
    images = random_images(WIDE, 20)
    loaded.specialise(loaded.run(images[:4]).policy)
    alone = [loaded.run(image[None]) for image in images]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(loaded.run, [images] * 8))
    for result in results:
        assert_same_policy(result.policy, Policy.concatenate([one.policy for one in alone]))
        np.testing.assert_array_equal(result.logits, np.concatenate([one.logits for one in alone]))


def test_decisions_and_logits_stay(loaded: Runtime) -> None:
    images = random_images(WIDE, 4)
    loaded.dispatcher.specialise(())
    before = loaded.run(images)
    assert loaded.specialise(before.policy) > 0
    after = loaded.run(images)
    assert_same_policy(after.policy, before.policy)
    np.testing.assert_allclose(after.logits, before.logits, atol=1e-4, rtol=0)
    np.testing.assert_array_equal(after.macs, before.macs)


def test_a_later_call_replaces_the_engines(loaded: Runtime) -> None:
    loaded.specialise(keeping((0, 1)))
    loaded.specialise(keeping((4, 5)))
    assert set(loaded.dispatcher.specialised.sets) == sets_with((4, 5))
    loaded.dispatcher.specialise(())
    assert not loaded.dispatcher.specialised.sets
    assert not loaded.dispatcher.specialised.engines


def test_engines_that_are_replaced_are_freed(loaded: Runtime) -> None:
    loaded.specialise(keeping((0, 1)))
    loaded.run(random_images(WIDE, 3), policy=keeping((0, 1), 3))
    before = [weakref.ref(engine) for engine in loaded.dispatcher.specialised.engines.values()]
    loaded.specialise(keeping((4, 5)))
    gc.collect()
    assert before
    assert not any(engine() for engine in before)


def test_an_image_under_way_frees_them_too_and_batches_are_not_held(loaded: Runtime) -> None:
    loaded.specialise(keeping((0, 1)))
    images = random_images(WIDE, 1)
    replaced: list[weakref.ref[Any]] = []

    def replace(*_: Any) -> None:
        if not replaced:
            replaced.extend(weakref.ref(engine) for engine in loaded.dispatcher.specialised.engines.values())
            loaded.specialise(keeping((4, 5)))

    loaded.run(images, policy=keeping((0, 1)), observe=replace)
    batch = weakref.ref(images)
    del images
    gc.collect()
    assert replaced
    assert not any(engine() for engine in replaced)
    loaded.run(random_images(WIDE, 1), policy=keeping((4, 5)))  # by its engine
    assert batch() is None
    for seed in range(3):
        images = random_images(WIDE, 1, seed=seed)
        batch = weakref.ref(images)
        loaded.run(images, policy=keeping((4, 5)))
        del images
        gc.collect()
        assert batch() is None


def test_the_sets_that_save_most_get_the_memory(loaded: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    choose = loaded.dispatcher.specialised.choose
    often, seldom = keeping((1, 3), 9), keeping((0, 2), 1)
    both = Policy.concatenate([seldom, often])
    everything = choose(both)
    assert set(everything) == sets_with((1, 3)) | sets_with((0, 2))
    monkeypatch.setattr(specialise, "BYTES", sum(set_bytes(WIDE, found) for found in sets_with((1, 3))))
    assert set(choose(both)) == sets_with((1, 3))
    monkeypatch.setattr(specialise, "BYTES", 0)
    assert choose(both) == ()
    monkeypatch.setattr(specialise, "BYTES", 1 << 30)
    monkeypatch.setattr(specialise, "COPIES", 0.9)
    chosen = choose(Policy.concatenate([keeping(heads, 9) for heads in ((0, 1, 2, 3, 4), (1, 2, 3, 4, 5))]))
    model = WIDE.depth * set_bytes(WIDE, HeadSet(0, "both", tuple(range(WIDE.heads))))
    assert 0 < sum(set_bytes(WIDE, found) for found in chosen) <= 0.9 * model
    monkeypatch.setattr(specialise, "LEAST", 1e9)
    assert choose(both) == ()


def test_a_set_has_to_save_its_share_of_an_images_time(loaded: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    choose = loaded.dispatcher.specialised.choose
    saved = min(saved_macs(WIDE, "both", WIDE.tokens, heads) for heads in (2, WIDE.heads))
    policy = Policy.concatenate([keeping((0, 2), 1), keeping((1, 3), 9)])
    monkeypatch.setattr(specialise, "LEAST", 0.5 * saved / dense_macs(WIDE))
    assert set(choose(policy)) == sets_with((1, 3))  # and not what one image in ten has


def test_memory_goes_where_it_saves_most_by_the_byte(loaded: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = (0,), (0, 1, 2, 3, 4)
    policy = Policy.concatenate([keeping(few, 9), keeping(many, 10)])
    large, small = (HeadSet(1, "both", heads) for heads in (many, few))
    saves = [saved_macs(WIDE, "both", WIDE.tokens, len(heads)) for heads in (many, few)]
    assert 10 * saves[0] > 9 * saves[1]
    assert set_bytes(WIDE, large) > 2 * set_bytes(WIDE, small)
    of_all = set_bytes(WIDE, HeadSet(0, "both", tuple(range(WIDE.heads))))
    monkeypatch.setattr(specialise, "BYTES", of_all + 2 * set_bytes(WIDE, small) + set_bytes(WIDE, large) - 1)
    assert {found for found in loaded.dispatcher.specialised.choose(policy) if found.block} == {
        HeadSet(block, "both", few) for block in (1, 2)
    }


@pytest.mark.parametrize("kind", SETS)
def test_the_bytes_of_a_set_are_those_of_its_matrices(kind: str, loaded: Runtime) -> None:
    found = HeadSet(1, kind, (0, 2, 5))
    weights = set_weights(WIDE, found, attention_weights(loaded.bundle, 1), mlp_weights(loaded.bundle, 1))
    assert set_bytes(WIDE, found) == sum(value.nbytes for value in weights.values() if value.ndim == 2)


@settings(max_examples=50, deadline=None)
@given(
    kept=st.integers(1, WIDE.tokens),
    heads=st.integers(1, WIDE.heads),
    kind=st.sampled_from(["attention", "mlp", "both"]),
)
def test_constants_always_save_something(kept: int, heads: int, kind: str) -> None:
    assert saved_macs(WIDE, kind, kept, heads) > 0


@pytest.mark.parametrize("kept", [1, 40, WIDE.tokens])
def test_with_every_head_constants_save_no_more_than_calls_and_a_mask(kept: int) -> None:
    calls = saved_macs(WIDE, "mlp", kept, WIDE.heads)  # the MLP with all heads has constant weights anyway
    assert calls == saved_macs(WIDE, "mlp", 1, WIDE.heads)
    attention = saved_macs(WIDE, "attention", kept, WIDE.heads) - calls
    assert 0 < attention < 0.1 * attention_macs(WIDE, kept, WIDE.heads)
    for heads in range(1, WIDE.heads + 1):
        both = saved_macs(WIDE, "both", kept, heads)
        parts = saved_macs(WIDE, "attention", kept, heads), saved_macs(WIDE, "mlp", kept, heads)
        assert both == pytest.approx(sum(parts) - calls)


def test_sizes_are_counted_by_the_image() -> None:
    policy = random_policy(WIDE, 20, 4)
    found, tokens, heads = sizes_of(policy), policy.tokens.sum(2), policy.heads.sum(2)
    for block in range(WIDE.depth):
        for kind, kept in (("attention", [1, 0]), ("mlp", [0, 1]), ("both", [1, 1])):
            of = (policy.sublayers[:, block] == kept).all(1) & (heads[:, block] > 0)
            sizes = [(key, often) for key, often in found.items() if (key.block, key.kind) == (block, kind)]
            assert sum(often for _, often in sizes) == pytest.approx(of.mean())
            assert sum(key.tokens * often for key, often in sizes) == pytest.approx((tokens[:, block] * of).mean())
            assert sum(key.heads * often for key, often in sizes) == pytest.approx((heads[:, block] * of).mean())


def test_a_bundle_of_an_earlier_version(wide: tuple[Path, Path], tmp_path: Path) -> None:
    bundle = shutil.copytree(wide[0], tmp_path / "bundle")
    config = read_config(bundle)
    config["engines"] = {name: spec for name, spec in config["engines"].items() if not name.endswith("_set")}
    write_config(bundle, config)
    done = invoke(run, bundle, "--iterations", "1")
    assert done.exit_code == 1
    assert done.stderr.splitlines()[-1].endswith("'stem_set'; export again")
    assert invoke(run, bundle, "--iterations", "1", "--no-specialise").exit_code == 0


def test_a_policy_of_another_model(loaded: Runtime) -> None:
    with pytest.raises(InputError, match=r"policy.tokens is bool \[1, 3, 17\]"):
        loaded.specialise(Policy.dense(tiny(), 1))


@pytest.mark.openvino
def test_only_where_it_can(wide: tuple[Path, Path]) -> None:
    other = adavit.load(wide[0], threads=2, backend="openvino", provider="fp32", parallel="samples")
    with pytest.raises(BackendError, match="makes no engines for sets of heads"):
        other.dispatcher.specialise((HeadSet(1, "mlp", (0,)),))


def test_tuning_with_images_keeps_sets(wide: tuple[Path, Path], cache: Path) -> None:
    first = adavit.load(wide[0], threads=1)
    report = tune.tune(first, quiet, keeping((1, 3)))
    kept = [[s.block, s.kind, list(s.heads)] for s in sorted(sets_with((1, 3)))]
    assert report["gathers"]["sets"] == kept
    again = adavit.load(wide[0], threads=1)
    assert set(again.dispatcher.plan.sets) == set(again.dispatcher.specialised.sets) == sets_with((1, 3))


@pytest.mark.parametrize(
    "sets",
    [
        1, [1], [[1, "mlp"]], [[1, "mlp", 3]], [[1, "mlp", []]], [[1, "mlp", [2, 1]]], [[1, "mlp", [1, 1]]],
        [[1, "mlp", [6]]], [[1, "mlp", [-1]]], [[1, "mlp", ["1"]]], [[1, "norm", [1]]], [[3, "mlp", [1]]],
        [[0, "mlp", [0, 1, 2, 3, 4, 5]]], [[0, "both", [1]]],
        [[-1, "mlp", [1]]], [[0, "mlp", [1]]], [[True, "mlp", [1]]], [[1, ["mlp"], [1]]],
    ],
)  # fmt: skip
def test_what_are_no_sets(sets: Any) -> None:
    with pytest.raises(ValueError, match=r"sets? of heads"):
        EnginePlan.from_dict({**ruled(WIDE).to_dict(), "sets": sets}, WIDE, "a file")


def test_plans_with_sets_survive_being_written() -> None:
    plan = EnginePlan(ruled(WIDE).gathers, tuple(sorted(sets_with((1, 3)))))
    assert EnginePlan.from_dict(json.loads(json.dumps(plan.to_dict())), WIDE, "a file").sets == plan.sets


def test_the_command(wide: tuple[Path, Path], tmp_path: Path) -> None:
    how = wide[0], "--threads", 1, "--iterations", 1, "--warmup", 0, "--json", tmp_path / "ran.json"

    def specialised(*more: Any) -> int:
        done = invoke(run, *how, *more)
        assert done.exit_code == 0, done.output
        found: int = json.loads((tmp_path / "ran.json").read_text())["specialised"]
        assert (f"{found} more for frequent policies" in done.stdout) == (found > 0)
        return found

    (tmp_path / "images").mkdir()
    for number, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (3, 48, 48, 3), np.uint8)):
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
    assert specialised() > 0
    assert specialised("--images", tmp_path / "images") > 0
    assert specialised("--no-specialise") == 0
    keeping((1, 3), 8).save(tmp_path / "kept.npz")
    assert specialised("--replay-policy", tmp_path / "kept.npz") == len(sets_with((1, 3)))
