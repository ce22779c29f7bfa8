"""What is prepared for frequent use: that it computes the same, what gets the memory, and what happens unasked."""

import gc
import json
import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import numpy as np
import pytest
from cases import (
    WIDE,
    assert_same_policy,
    export,
    forced,
    python,
    random_images,
    random_model,
    random_policy,
    tiny,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import adavit
from adavit.architecture import Architecture
from adavit.bundle.keys import BOTH, BlockKey, Sublayers
from adavit.bundle.operating_points import Offsets
from adavit.errors import BackendError, InputError
from adavit.macs import dense_macs
from adavit.runtime import Policy, Runtime
from adavit.runtime.backend import Usage, Use
from adavit.runtime.backends.host import matrix_bytes
from adavit.runtime.backends.onnxruntime import choice
from adavit.runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from adavit.runtime.specialise import usage_from, usage_of, usage_to

pytestmark = pytest.mark.usefixtures("cache")

SECONDS = 60
"""More than any preparation takes that comes to an end."""


@pytest.fixture(scope="module", params=["operators", "samples"])
def loaded(request: pytest.FixtureRequest, wide: tuple[Path, Path]) -> Runtime:
    return adavit.load(wide[0], threads=1, parallel=request.param, specialise=False)


def keeping(heads: tuple[int, ...], images: int = 1) -> Policy:
    """All tokens and sub-layers, and some heads wherever heads are decided on."""
    policy = Policy.dense(WIDE, images)
    for block in range(WIDE.depth):
        if WIDE.adapts_heads(block):
            policy.heads[:, block] = np.isin(np.arange(WIDE.heads), heads)
    return policy


def keys_with(heads: tuple[int, ...]) -> set[BlockKey]:
    """What `keeping` runs."""
    every = tuple(range(WIDE.heads))
    return {BlockKey(b, BOTH, heads if WIDE.adapts_heads(b) else every) for b in range(WIDE.depth)}


def prepared(runtime: Runtime) -> set[BlockKey]:
    found: Any = runtime.backend.prepared()
    return {one.key for one in found}


def soon(what: Callable[[], object]) -> None:
    """Waits until something holds."""
    until = monotonic() + SECONDS
    while not what():
        assert monotonic() < until, "it never came"
        sleep(0.01)


# What is prepared computes the same.


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), of=st.integers(1, 2))
def test_any_policies_compute_the_same(seed: int, of: int, loaded: Runtime) -> None:
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
    "one head": tiny(width=16, heads=1),
}


@pytest.mark.parametrize("arch", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_every_architecture(arch: Architecture, tmp_path: Path) -> None:
    model = random_model(arch)
    runtime = adavit.load(export(model, tmp_path, verify=False), threads=1, specialise=False)
    images, policy = random_images(arch, 3), random_policy(arch, 3, 1)
    before = runtime.run(images)
    assert runtime.specialise(Policy.concatenate([policy, before.policy])) > 0
    found = runtime.run(images)
    assert_same_policy(found.policy, before.policy)
    np.testing.assert_allclose(found.logits, before.logits, atol=1e-4, rtol=0)
    replayed = runtime.run(images, policy=policy)
    np.testing.assert_allclose(replayed.logits, forced(model, images, policy), atol=1e-4, rtol=1e-4)


def test_decisions_and_logits_stay(loaded: Runtime) -> None:
    images = random_images(WIDE, 4)
    loaded.backend.retain(())
    before = loaded.run(images)
    assert loaded.specialise(before.policy) > 0
    after = loaded.run(images)
    assert_same_policy(after.policy, before.policy)
    np.testing.assert_allclose(after.logits, before.logits, atol=1e-4, rtol=0)
    np.testing.assert_array_equal(after.macs, before.macs)


def test_thresholds_are_the_requests(loaded: Runtime) -> None:
    images = random_images(WIDE, 5)
    points = [Offsets(), Offsets(tokens=1.0, heads=-0.5), Offsets(sublayers=(-1.0, 0.0, 1.0))]
    loaded.backend.retain(())
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


def test_images_run_while_what_they_use_is_replaced(loaded: Runtime) -> None:
    images = random_images(WIDE, 6)
    loaded.backend.retain(())
    wanted, done = loaded.run(images), threading.Event()

    def replace() -> None:
        for heads in ((0, 1), (2, 3), (4, 5), (0, 1)):
            loaded.specialise(Policy.concatenate([keeping(heads), wanted.policy]))
        done.set()

    def run(_: int) -> list[adavit.Result]:
        found = [loaded.run(images)]
        while not done.is_set():
            found.append(loaded.run(images))
        return found

    with ThreadPoolExecutor(3) as pool:
        replacing = pool.submit(replace)
        results = [result for found in pool.map(run, range(2)) for result in found]
        replacing.result()
    for result in results:
        assert_same_policy(result.policy, wanted.policy)
        np.testing.assert_allclose(result.logits, wanted.logits, atol=1e-4, rtol=0)


# What is asked for.


def test_a_later_call_replaces_what_was_prepared(loaded: Runtime) -> None:
    assert loaded.specialise(keeping((0, 1))) == WIDE.depth
    assert loaded.specialise(keeping((4, 5))) == WIDE.depth
    assert prepared(loaded) == keys_with((4, 5))
    loaded.backend.retain(())
    assert not loaded.backend.prepared()


def sessions(runtime: Runtime) -> list[weakref.ref[Any]]:
    """Of what is prepared for blocks that decide on heads."""
    backend: Any = runtime.backend
    return [weakref.ref(session) for one, session in backend.constant.items() if WIDE.adapts_heads(one.key.block)]


def test_what_is_replaced_is_freed(loaded: Runtime) -> None:
    loaded.specialise(keeping((0, 1)))
    loaded.run(random_images(WIDE, 3), policy=keeping((0, 1), 3))
    before = sessions(loaded)
    loaded.specialise(keeping((4, 5)))
    gc.collect()
    assert before
    assert not any(session() for session in before)


def test_an_image_under_way_frees_it_too_and_batches_are_not_held(loaded: Runtime) -> None:
    loaded.specialise(keeping((0, 1)))
    images = random_images(WIDE, 1)
    replaced: list[weakref.ref[Any]] = []

    def replace(*_: Any) -> None:
        if not replaced:
            replaced.extend(sessions(loaded))
            loaded.specialise(keeping((4, 5)))

    loaded.run(images, policy=keeping((0, 1)), observe=replace)
    batch = weakref.ref(images)
    del images
    gc.collect()
    assert replaced
    assert not any(session() for session in replaced)
    assert batch() is None
    for seed in range(3):
        images = random_images(WIDE, 1, seed=seed)
        batch = weakref.ref(images)
        loaded.run(images, policy=keeping((4, 5)))
        del images
        gc.collect()
        assert batch() is None


def test_both_single_images_and_batches_are_prepared_for(wide: tuple[Path, Path]) -> None:
    runtime = adavit.load(wide[0], threads=2, specialise=False)
    assert runtime.specialise(keeping((1, 3), 8)) > 0
    found: Any = runtime.backend.prepared()
    assert {one.threads for one in found} == {1, 2}
    assert prepared(runtime) <= keys_with((1, 3))


def test_a_policy_of_another_model(loaded: Runtime) -> None:
    with pytest.raises(InputError, match=r"policy.tokens is bool \[1, 3, 17\]"):
        loaded.specialise(Policy.dense(tiny(), 1))


# What gets the memory.


def usage(*policies: Policy) -> Usage:
    return usage_of(Policy.concatenate(list(policies)), 1)


def chosen(runtime: Runtime, *policies: Policy) -> set[BlockKey]:
    found: Any = runtime.backend.choose(usage(*policies))
    assert len(set(found)) == len(found)
    return {one.key for one in found}


def test_what_saves_most_gets_the_memory(loaded: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    often, seldom = keeping((1, 3), 9), keeping((0, 2), 1)
    assert chosen(loaded, seldom, often) == keys_with((1, 3)) | keys_with((0, 2))
    monkeypatch.setattr(choice, "BYTES", sum(matrix_bytes(WIDE, key) for key in keys_with((1, 3))))
    assert chosen(loaded, seldom, often) == keys_with((1, 3))
    monkeypatch.setattr(choice, "BYTES", 0)
    assert not chosen(loaded, seldom, often)
    monkeypatch.setattr(choice, "BYTES", 1 << 30)
    monkeypatch.setattr(choice, "COPIES", 0.9)
    found = chosen(loaded, *(keeping(heads, 9) for heads in ((0, 1, 2, 3, 4), (1, 2, 3, 4, 5))))
    model = WIDE.depth * matrix_bytes(WIDE, BlockKey(0, BOTH, tuple(range(WIDE.heads))))
    assert 0 < sum(matrix_bytes(WIDE, key) for key in found) <= 0.9 * model
    monkeypatch.setattr(choice, "LEAST", 1e9)
    assert not chosen(loaded, seldom, often)


def test_it_has_to_save_its_share_of_an_images_time(loaded: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    uses = usage(keeping((0, 2), 1), keeping((1, 3), 1))
    saved = min(choice.saved_macs(WIDE, use) for use in uses)
    monkeypatch.setattr(choice, "LEAST", 0.5 * saved / dense_macs(WIDE))
    assert chosen(loaded, keeping((0, 2), 1), keeping((1, 3), 9)) == keys_with((1, 3))  # not what one in ten has


def test_memory_goes_where_it_saves_most_by_the_byte(loaded: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = (0,), (0, 1, 2, 3, 4)
    large, small = (BlockKey(1, BOTH, heads) for heads in (many, few))
    saves = [choice.saved_macs(WIDE, Use(1, key, WIDE.tokens)) for key in (large, small)]
    sizes = [matrix_bytes(WIDE, key) for key in (large, small)]
    assert 10 * saves[0] > 9 * saves[1]
    assert sizes[0] > 2 * sizes[1]
    of_all = matrix_bytes(WIDE, BlockKey(0, BOTH, tuple(range(WIDE.heads))))
    monkeypatch.setattr(choice, "BYTES", of_all + 2 * sizes[1] + sizes[0] - 1)
    found = {key for key in chosen(loaded, keeping(few, 9), keeping(many, 10)) if key.block}
    assert found == {BlockKey(block, BOTH, few) for block in (1, 2)}


@pytest.mark.parametrize("sublayers", [BOTH, Sublayers(True, False), Sublayers(False, True)], ids=lambda s: s.name)
def test_its_bytes_are_those_of_its_matrices(sublayers: Sublayers, loaded: Runtime) -> None:
    key = BlockKey(1, sublayers, (0, 2, 5))
    weights = loaded.graphs.head_weights(key)
    assert matrix_bytes(WIDE, key) == sum(value.nbytes for value in weights.values() if value.ndim == 2)


@settings(max_examples=50, deadline=None)
@given(kept=st.integers(1, WIDE.tokens), heads=st.integers(1, WIDE.heads), attention=st.booleans(), mlp=st.booleans())
def test_constants_always_save_something(kept: int, heads: int, attention: bool, mlp: bool) -> None:
    key = BlockKey(1, Sublayers(attention, mlp), tuple(range(heads)))
    assert choice.saved_macs(WIDE, Use(1, key, kept)) > 0


def test_uses_are_counted_by_the_image() -> None:
    policy = random_policy(WIDE, 20, 4)
    found, tokens, heads = usage_of(policy, 3), policy.tokens.sum(2), policy.heads.sum(2)
    assert {use.threads for use in found} == {3}
    for block in range(WIDE.depth):
        for sublayers in (BOTH, Sublayers(True, False), Sublayers(False, True)):
            of = (policy.sublayers[:, block] == sublayers).all(1)
            uses = [(use, often) for use, often in found.items() if use.key[:2] == (block, sublayers)]
            assert sum(often for _, often in uses) == pytest.approx(of.mean())
            assert sum(use.tokens * often for use, often in uses) == pytest.approx((tokens[:, block] * of).mean())
            kept = sum(len(use.key.heads) * often for use, often in uses)
            assert kept == pytest.approx((heads[:, block] * of).mean())
    assert not any(use.key.sublayers == (False, False) for use in found)


# What happens unasked.


@pytest.fixture
def own_threads() -> Iterator[Callable[[], list[threading.Thread]]]:
    """The threads that came since, by which something is prepared."""
    gc.collect()
    before = set(threading.enumerate())

    def came() -> list[threading.Thread]:
        return [t for t in threading.enumerate() if t not in before and t.name == "adavit-prepare"]

    yield came


Threads = Callable[[], list[threading.Thread]]


def test_after_some_images_what_they_use_is_prepared(wide: tuple[Path, Path], own_threads: Threads) -> None:
    runtime, images, policy = adavit.load(wide[0], threads=1), random_images(WIDE, 32), keeping((1, 3), 32)
    assert not runtime.backend.prepared()
    assert not own_threads()
    wanted = runtime.run(images[:1])
    runtime.run(images, policy=policy)
    soon(lambda: prepared(runtime) >= keys_with((1, 3)))
    assert len(own_threads()) == 1
    found = runtime.run(images[:1])
    assert_same_policy(found.policy, wanted.policy)
    np.testing.assert_allclose(found.logits, wanted.logits, atol=1e-4)


def test_what_images_use_later_takes_its_place(wide: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "BYTES", sum(matrix_bytes(WIDE, key) for key in keys_with((1, 3))))
    runtime, images = adavit.load(wide[0], threads=1), random_images(WIDE, 32)
    runtime.run(images, policy=keeping((1, 3), 32))
    soon(lambda: prepared(runtime) == keys_with((1, 3)))

    def changed() -> bool:
        runtime.run(images, policy=keeping((0, 5), 32))
        return prepared(runtime) == keys_with((0, 5))

    soon(changed)


def test_batches_are_prepared_for_by_their_threads(wide: tuple[Path, Path]) -> None:
    runtime, images = adavit.load(wide[0], threads=2), random_images(WIDE, 32)
    for image in images:
        runtime.run(image[None], policy=keeping((1, 3)))
    soon(runtime.backend.prepared)

    def of_batches() -> bool:
        runtime.run(images, policy=keeping((1, 3), 32))
        found: Any = runtime.backend.prepared()
        return {one.threads for one in found} == {1, 2}

    soon(of_batches)


def test_without_it_results_are_the_same_to_the_bit(wide: tuple[Path, Path], own_threads: Threads, cache: Path) -> None:
    runtime, images = adavit.load(wide[0], threads=1, specialise=False), random_images(WIDE, 40)
    wanted = runtime.run(images).logits
    for _ in range(10):
        np.testing.assert_array_equal(runtime.run(images).logits, wanted)
    for row in (3, 17):
        np.testing.assert_array_equal(runtime.run(images[row : row + 1]).logits[0], wanted[row])
    assert not runtime.backend.prepared()
    assert not own_threads()
    assert not cache.exists()


def remembered(wide: tuple[Path, Path], cache: Path) -> Path:
    """The file that one runtime leaves for the next, which ran with the heads 1 and 3."""
    first = adavit.load(wide[0], threads=1)
    first.run(random_images(WIDE, 16), policy=keeping((1, 3), 16))
    soon(lambda: list(cache.glob("usage-*.json")))
    (found,) = cache.glob("usage-*.json")
    return found


def test_the_next_start_begins_with_it(wide: tuple[Path, Path], cache: Path) -> None:
    remembered(wide, cache)
    second = adavit.load(wide[0], threads=1)
    soon(lambda: prepared(second) == keys_with((1, 3)))
    other = adavit.load(wide[0], threads=2)  # which would be other sessions
    assert not other.backend.prepared()
    assert not adavit.load(wide[0], threads=1, specialise=False).backend.prepared()


DAMAGE: dict[str, Callable[[Any], Any]] = {
    "of another model": lambda uses: [[*use[:4], [0, 7], *use[5:]] for use in uses],
    "a block that keeps its heads": lambda uses: [[1, 0, 1, 1, [1], 5, 1.0]],
    "a block that runs whole": lambda uses: [[1, 0, 1, 0, [0, 1, 2, 3, 4, 5], 5, 1.0]],
    "no list": lambda uses: 3,
    "nothing": lambda uses: None,
    "text": lambda uses: "many",
    "short": lambda uses: [use[:-1] for use in uses],
    "more often than always": lambda uses: [[*use[:-1], 2.0] for use in uses],
    "not a number": lambda uses: [[*use[:-1], float("nan")] for use in uses],
    "no tokens": lambda uses: [[*use[:5], 0, use[6]] for use in uses],
    "unsorted": lambda uses: [[*use[:4], use[4][::-1], *use[5:]] for use in uses],
}


@pytest.mark.parametrize("kind", [*DAMAGE, "no JSON", "cut", "a folder"])
def test_a_damaged_file_is_a_warning(
    kind: str, wide: tuple[Path, Path], cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = remembered(wide, cache)
    text = path.read_text()
    if kind in DAMAGE:
        content = json.loads(text)
        content["measured"]["usage"] = DAMAGE[kind](content["measured"]["usage"])
        path.write_text(json.dumps(content))
    elif kind == "a folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_text("{" if kind == "no JSON" else text[: len(text) // 2])
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        runtime = adavit.load(wide[0], threads=1)
    (record,) = caplog.records
    assert str(path) in record.getMessage() or str(path.parent) in record.getMessage()
    assert "\n" not in record.getMessage()
    assert not runtime.backend.prepared()
    runtime.run(random_images(WIDE, 16), policy=keeping((0, 5), 16))
    soon(lambda: prepared(runtime) == keys_with((0, 5)))


def test_usages_survive_being_written(loaded: Runtime) -> None:
    for policy in (random_policy(WIDE, 9, 3), Policy.dense(WIDE, 1), keeping(())):
        found = usage_of(policy, 2)
        assert usage_from(json.loads(json.dumps(usage_to(found))), WIDE) == found


def test_of_much_usage_a_part_is_kept(wide: tuple[Path, Path], cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = adavit.load(wide[0], threads=1)
    source = np.random.default_rng(0)
    policy = random_policy(WIDE, 1024, 0)
    policy.heads[:, 1:] = source.random((1024, WIDE.depth - 1, WIDE.heads)) < 0.5
    policy.tokens[..., 1:] = source.random((1024, WIDE.depth, WIDE.tokens - 1)) < source.random((1024, WIDE.depth, 1))
    policy.sublayers[:, 1:] = True
    assert len(usage_of(policy, 1)) > 2000
    monkeypatch.setattr("adavit.runtime.specialise.MOST_USES", 300)
    runtime.run(np.repeat(random_images(WIDE, 1), 1024, 0), policy=policy)
    soon(lambda: list(cache.glob("usage-*.json")))
    (path,) = cache.glob("usage-*.json")
    assert len(json.loads(path.read_text())["measured"]["usage"]) <= 300
    again = adavit.load(wide[0], threads=1)
    soon(again.backend.prepared)


def test_without_a_home_nothing_is_kept(wide: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adavit.runtime.cache.user_folder", lambda *_: None)
    runtime = adavit.load(wide[0], threads=1)
    runtime.run(random_images(WIDE, 16), policy=keeping((1, 3), 16))
    soon(lambda: prepared(runtime) == keys_with((1, 3)))
    assert np.isfinite(runtime.run(random_images(WIDE, 1)).logits).all()


def test_the_thread_ends_with_its_runtime(wide: tuple[Path, Path], own_threads: Threads) -> None:
    runtime = adavit.load(wide[0], threads=1)
    runtime.run(random_images(WIDE, 16), policy=keeping((1, 3), 16))
    (thread,) = own_threads()
    soon(runtime.backend.prepared)
    gone = weakref.ref(runtime), weakref.ref(runtime.backend)
    del runtime
    thread.join(SECONDS)
    assert not thread.is_alive()
    assert [reference() for reference in gone] == [None, None]  # and not only once the garbage is collected


def test_a_runtime_that_goes_while_something_is_prepared_stops_it(
    wide: tuple[Path, Path], own_threads: Threads, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on, count = threading.Event(), threading.Event(), []
    prepare = OnnxRuntimeBackend.prepare

    def slowly(self: Any, wanted: Any) -> None:
        begun.set()
        assert go_on.wait(SECONDS)
        count.append(wanted)
        prepare(self, wanted)

    monkeypatch.setattr(OnnxRuntimeBackend, "prepare", slowly)
    runtime = adavit.load(wide[0], threads=1)
    runtime.run(random_images(WIDE, 16), policy=keeping((1, 3), 16))
    assert begun.wait(SECONDS)
    runtime.run(random_images(WIDE, 64))  # no request waits for it
    (thread,) = own_threads()
    del runtime
    go_on.set()
    thread.join(SECONDS)
    assert not thread.is_alive()
    assert len(count) == 1


FAILURES = {
    "ours": BackendError("it refuses"),
    "another library's": RuntimeError("a\nb"),
    "no memory": MemoryError(),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_a_failure_in_the_background_reaches_no_request(
    kind: str, wide: tuple[Path, Path], caplog: pytest.LogCaptureFixture, own_threads: Threads
) -> None:
    runtime, images = adavit.load(wide[0], threads=1), random_images(WIDE, 16)
    wanted = runtime.run(images).logits

    def fail(_: Any) -> None:
        raise FAILURES[kind]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(runtime.backend, "prepare", fail)
        with caplog.at_level(logging.WARNING):
            for _ in range(3):
                np.testing.assert_allclose(runtime.run(images).logits, wanted, atol=1e-4)
            soon(lambda: caplog.records and not own_threads())
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "nothing more is prepared for what images use most"
    ]
    assert "\n" not in caplog.records[0].getMessage()
    for _ in range(20):
        runtime.run(images)
    assert not own_threads()
    assert runtime.specialise(keeping((1, 3))) == WIDE.depth  # who asks is answered


def test_a_recorded_policy_that_changes_later_is_not_counted(wide: tuple[Path, Path]) -> None:
    runtime, policy = adavit.load(wide[0], threads=1), keeping((1, 3), 15)
    runtime.run(random_images(WIDE, 15), policy=policy)
    policy.heads[:] = False
    runtime.run(random_images(WIDE, 1), policy=keeping((1, 3)))
    soon(lambda: prepared(runtime) == keys_with((1, 3)))


ENDING = """
import sys
import numpy as np
import adavit
runtime = adavit.load(sys.argv[1], threads=1)
side = runtime.architecture.image_size
runtime.run(np.random.default_rng(0).standard_normal((16, 3, side, side), dtype=np.float32))
print("done")
"""


def test_a_process_ends_while_something_is_prepared(wide: tuple[Path, Path]) -> None:
    for _ in range(3):
        done = python(ENDING, wide[0])
        assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
