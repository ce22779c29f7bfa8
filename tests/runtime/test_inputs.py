"""What callers hand to a runtime: right from many threads, refused in one line when wrong."""

import gc
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pytest
import torch
from cases import WIDE, assert_same_policy, picture, random_images, random_policy, tiny
from PIL import Image

import adavit
from adavit.bundle.keys import BlockKey
from adavit.bundle.operating_points import TRAINED, Budgets, Offsets, OperatingPoint
from adavit.errors import BackendError, InputError
from adavit.runtime import Policy, Prediction, Result, Runtime, dispatcher
from adavit.runtime.backends.onnxruntime.slot import OnnxRuntimeSlot
from adavit.runtime.dispatcher import Step

IMAGES = random_images(tiny(), 3)


def with_value(value: float) -> np.ndarray:
    images = IMAGES.copy()
    images[1, 2, 3, 4] = value
    return images


WRONG: dict[str, tuple[Any, str]] = {
    "side": (IMAGES[..., :-1], "float32 [3, 3, 32, 31]"),
    "channels": (IMAGES[:, :2], "float32 [3, 2, 32, 32]"),
    "no batch": (IMAGES[0], "float32 [3, 32, 32]"),
    "empty batch": (IMAGES[:0], "float32 [0, 3, 32, 32]"),
    "channels last": (IMAGES.transpose(0, 2, 3, 1), "float32 [3, 32, 32, 3]"),
    "float64": (IMAGES.astype(np.float64), "float64"),
    "uint8": (IMAGES.astype(np.uint8), "uint8"),
    "NaN": (with_value(np.nan), "NaN or infinite"),
    "infinite": (with_value(np.inf), "NaN or infinite"),
    "list": (IMAGES.tolist(), "images is a list"),
    "None": (None, "images is a NoneType"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_images_that_do_not_fit(kind: str, runtime: Runtime) -> None:
    images, message = WRONG[kind]
    for run in (runtime.run, runtime.run_dense):
        with pytest.raises(InputError) as caught:
            run(images)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


def test_large_finite_values_are_no_infinity(runtime: Runtime) -> None:
    images = np.full_like(IMAGES, 1e15)
    assert np.isfinite(runtime.run(images).logits).all()


def test_images_need_not_be_contiguous(runtime: Runtime) -> None:
    turned = np.asfortranarray(IMAGES)
    assert not turned.flags.c_contiguous
    np.testing.assert_array_equal(runtime.run(turned).logits, runtime.run(IMAGES).logits)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_images_may_be_read_only(backend: str, tiny_bundle: Path) -> None:
    loaded, images = adavit.load(tiny_bundle, backend, threads=1, specialise=False), IMAGES.copy()
    wanted = loaded.run(images).logits
    images.setflags(write=False)
    np.testing.assert_array_equal(loaded.run(images).logits, wanted)


def test_as_many_images_at_once_as_there_are_threads(tiny_bundle: Path) -> None:
    loaded, together = adavit.load(tiny_bundle, threads=20, parallel="samples"), Barrier(20)
    loaded.run(random_images(tiny(), 20), observe=lambda step: step.block == 0 and together.wait(60))


def test_running_changes_nothing_it_was_given(runtime: Runtime) -> None:
    images, policy = IMAGES.copy(), random_policy(tiny(), 3, seed=5)
    kept = Policy(policy.tokens.copy(), policy.heads.copy(), policy.sublayers.copy())
    result = runtime.run(images, policy=policy)
    np.testing.assert_array_equal(images, IMAGES)
    assert_same_policy(policy, kept)
    first = result.logits.copy()
    runtime.run(random_images(tiny(), 3, seed=9))
    np.testing.assert_array_equal(result.logits, first)  # and what it gave stays as it was


def dense() -> Policy:
    return Policy.dense(tiny(), 3)


def without(kind: str, *where: int) -> Policy:
    policy = dense()
    getattr(policy, kind)[where] = False
    return policy


POLICIES: dict[str, tuple[Policy, str]] = {
    "fewer images": (Policy.dense(tiny(), 2), "policy.tokens is bool [2, 3, 17]"),
    "other tokens": (Policy.dense(tiny(image_size=40), 3), "policy.tokens is bool [3, 3, 26]"),
    "other heads": (Policy.dense(tiny(heads=6), 3), "policy.heads is bool [3, 3, 6]"),
    "other depth": (Policy.dense(tiny(depth=2), 3), "policy.tokens is bool [3, 2, 17]"),
    "numbers": (Policy(dense().tokens, dense().heads.astype(int), dense().sublayers), "policy.heads is int64"),
    "lists": (Policy(dense().tokens, dense().heads, dense().sublayers.tolist()), "policy.sublayers is list"),
    "class token": (without("tokens", 1, 2, 0), "drops a class token"),
    "heads of a block that keeps them": (without("heads", 0, 0, 1), "policy.heads drops some in block 0"),
    "sub-layer of a block that keeps it": (without("sublayers", 2, 0, 1), "policy.sublayers drops some in block 0"),
}


@pytest.mark.parametrize("kind", POLICIES)
def test_policies_that_do_not_fit(kind: str, runtime: Runtime) -> None:
    policy, message = POLICIES[kind]
    with pytest.raises(InputError) as caught:
        runtime.run(IMAGES, policy=policy)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_tokens_that_are_always_kept() -> None:
    with pytest.raises(InputError, match=r"^policy.tokens drops some, where this model always keeps all$"):
        without("tokens", 1, 2, 3).check(tiny(token_policy=False), 3)


def test_many_threads_get_what_one_gets(runtime: Runtime) -> None:
    batches = [random_images(tiny(), 1 + seed % 3, seed) for seed in range(8)]
    alone = [runtime.run(images) for images in batches]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(runtime.run, batches * 12))
            dense_twins = list(pool.map(runtime.run_dense, batches * 2))
    finally:
        sys.setswitchinterval(interval)
    for position, found in enumerate(together):
        wanted = alone[position % len(batches)]
        assert_same_policy(found.policy, wanted.policy)
        np.testing.assert_array_equal(found.logits, wanted.logits)
        np.testing.assert_array_equal(found.macs, wanted.macs)
    for position, logits in enumerate(dense_twins):
        np.testing.assert_array_equal(logits, dense_twins[position % len(batches)])


def test_many_threads_that_follow_many_policies(wide: tuple[Path, Path]) -> None:
    images = random_images(WIDE, 2)
    policies = [random_policy(WIDE, 2, seed) for seed in range(24)]
    alone = [
        adavit.load(wide[0], threads=1, specialise=False).run(images, policy=policy).logits for policy in policies[:4]
    ]
    shared = adavit.load(wide[0], threads=1, specialise=False)
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda policy: shared.run(images, policy=policy).logits, policies * 3))
    for position, logits in enumerate(together):
        np.testing.assert_array_equal(logits, together[position % len(policies)])
    for found, wanted in zip(together, alone, strict=False):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("parallel", ["operators", "samples", "auto"])
@pytest.mark.parametrize("together", [1, 2, 5, 99])
def test_images_side_by_side_get_what_each_gets_alone(
    parallel: str, together: int, wide: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many images go through the blocks together."""
    monkeypatch.setattr(dispatcher, "SIDE_BY_SIDE", together)
    runtime = adavit.load(wide[0], threads=3, parallel=parallel, specialise=False)
    images, policy = random_images(WIDE, 7), random_policy(WIDE, 7, 0)
    policy.tokens[::2, 1:] = True
    for recorded in (None, policy):
        found = runtime.run(images, policy=recorded)
        for position in range(len(images)):
            rows = slice(position, position + 1)
            alone = runtime.run(images[rows], policy=None if recorded is None else recorded[rows])
            np.testing.assert_allclose(found.logits[rows], alone.logits, atol=1e-5)
            assert_same_policy(found.policy[rows], alone.policy)
            assert found.macs[position] == alone.macs[0]


def test_an_array_that_changes_between_runs_is_read_anew(runtime: Runtime) -> None:
    """Engines keep what was bound last: the memory, never a copy of what it held."""
    images = random_images(tiny(), 2, seed=5)
    for seed in (5, 6, 7):
        images[:] = random_images(tiny(), 2, seed)
        fresh = images.copy()
        np.testing.assert_array_equal(runtime.run_dense(images), runtime.run_dense(fresh))
        np.testing.assert_array_equal(runtime.run(images).logits, runtime.run(fresh).logits)


def test_a_failing_graph_leaves_a_runtime_that_works(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = adavit.load(tiny_bundle, threads=2, parallel="samples", specialise=False)
    wanted, block = runtime.run(IMAGES).logits, OnnxRuntimeSlot.block

    def fail(slot: Any, key: BlockKey, tokens: Any) -> None:
        if key.block == 1:
            raise BackendError("a graph failed")
        block(slot, key, tokens)

    with monkeypatch.context() as patched:
        patched.setattr(OnnxRuntimeSlot, "block", fail)
        with pytest.raises(BackendError, match="failed"):
            runtime.run(IMAGES)
    np.testing.assert_array_equal(runtime.run(IMAGES).logits, wanted)


def slots() -> int:
    gc.collect()
    return sum(type(thing) is OnnxRuntimeSlot for thing in gc.get_objects())


def test_a_failing_observer_is_told_no_more_and_nothing_is_lost(tiny_bundle: Path) -> None:
    runtime, images = (
        adavit.load(tiny_bundle, threads=2, parallel="samples", specialise=False),
        random_images(tiny(), 12),
    )
    runtime.run(images)
    before, told = slots(), 0

    def fail(step: Step) -> None:
        nonlocal told
        told += 1
        if step.image == 5:
            raise ValueError("enough")

    for _ in range(3):
        with pytest.raises(ValueError, match="enough"):
            runtime.run(images, observe=fail)
        after = told
        time.sleep(0.2)
        assert told == after
    assert slots() == before


def test_runtimes_side_by_side_do_not_disturb_each_other(tiny_bundle: Path, runtime: Runtime) -> None:
    wanted = runtime.run(IMAGES).logits
    for parallel in ("operators", "samples", "auto"):
        other = adavit.load(tiny_bundle, threads=3, parallel=parallel)
        np.testing.assert_allclose(other.run(IMAGES).logits, wanted, atol=1e-5)
    np.testing.assert_array_equal(runtime.run(IMAGES).logits, wanted)


@pytest.mark.parametrize("threads", [0, -1, 1025, 1.5, "2", True])
def test_threads_that_make_no_sense(threads: Any, tiny_bundle: Path) -> None:
    with pytest.raises(InputError, match="expected a whole number from 1 to 1024"):
        adavit.load(tiny_bundle, threads=threads)


def test_unknown_names(tiny_bundle: Path) -> None:
    with pytest.raises(BackendError, match=r"unknown backend 'nope'; choose one of .*onnxruntime"):
        adavit.load(tiny_bundle, backend="nope")
    with pytest.raises(BackendError, match="give `backend='onnxruntime'` and `provider='CUDAExecutionProvider'`"):
        adavit.load(tiny_bundle, backend="cuda")
    with pytest.raises(BackendError, match=r"no provider 'NopeProvider' here; it has .*CPUExecutionProvider"):
        adavit.load(tiny_bundle, provider="NopeProvider")
    with pytest.raises(InputError, match="parallel is 'nope': choose"):
        adavit.load(tiny_bundle, parallel="nope")
    with pytest.raises(InputError, match="dispatch is 'nope': choose 'auto', 'exact', 'capacity', 'conditional'"):
        adavit.load(tiny_bundle, dispatch="nope")
    for way in ("exact", "capacity", "conditional"):
        with pytest.raises(InputError, match="`dispatch` is how batches are driven on a GPU; onnxruntime runs on the"):
            adavit.load(tiny_bundle, dispatch=way)
    with pytest.raises(InputError, match=r"is not in precision 'int4'; it has fp32: choose one of them, or export"):
        adavit.load(tiny_bundle, precision="int4")
    with pytest.raises(InputError, match=r"is not in precision 'int8'; it has fp32"):
        adavit.load(tiny_bundle, precision="int8")


@pytest.mark.parametrize("name", ["specialise", "shared_pool", "trust_engines"])
def test_what_is_no_truth(name: str, tiny_bundle: Path) -> None:
    options: dict[str, Any] = {name: 1}
    with pytest.raises(InputError, match=f"{name} is 1: expected True or False"):
        adavit.load(tiny_bundle, **options)


def test_the_precision_can_be_named(tiny_bundle: Path, runtime: Runtime) -> None:
    named = adavit.load(tiny_bundle, threads=1, precision="fp32", specialise=False)
    assert named.graphs.precision == runtime.graphs.precision == "fp32"
    np.testing.assert_allclose(named.run(IMAGES).logits, runtime.run(IMAGES).logits, atol=1e-5)


def test_the_provider_can_be_named(tiny_bundle: Path, runtime: Runtime) -> None:
    named = adavit.load(tiny_bundle, threads=1, provider="CPUExecutionProvider", specialise=False)
    np.testing.assert_allclose(named.run(IMAGES).logits, runtime.run(IMAGES).logits, atol=1e-5)
    assert named.backend.versions()["provider"] == "CPUExecutionProvider"


def test_predictions_of_paths_pictures_and_arrays(runtime: Runtime, tmp_path: Path) -> None:
    image = picture()
    image.save(tmp_path / "a.png")
    predictions = runtime.predict([tmp_path / "a.png", str(tmp_path / "a.png"), image, np.asarray(image)], top=3)
    assert len(predictions) == 4
    logits = runtime.run(runtime.preprocess(image)[None])
    shares = np.exp(logits.logits[0].astype(float))
    shares /= shares.sum()
    order = np.argsort(-shares)[:3]
    for found in predictions:
        assert found.error is None
        assert found.classes == tuple(order)
        assert [label for label, _ in found] == [runtime.labels[i] for i in order]
        np.testing.assert_allclose([share for _, share in found.top], shares[order], rtol=1e-4)
        assert found.macs == logits.macs[0]
        assert found.usage == logits.policy.usage()
        assert_same_policy(found.policy, logits.policy)


@pytest.mark.parametrize("one", ["path", "picture", "array"])
def test_a_single_picture_needs_no_list(one: str, runtime: Runtime, tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    single = {"path": tmp_path / "a.png", "picture": picture(), "array": np.asarray(picture())}[one]
    assert runtime.predict(single) == runtime.predict([picture()])


def test_unreadable_images_among_good_ones_are_reported(runtime: Runtime, tmp_path: Path) -> None:
    picture(0, (300, 300)).save(tmp_path / "cut.jpg")
    data = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
    (tmp_path / "empty.png").touch()
    good = picture(1)
    with Image.open(tmp_path / "cut.jpg") as opened:
        images: list[Any] = [
            tmp_path / "empty.png", good, tmp_path / "cut.jpg", tmp_path / "no.png", opened, None,
            np.zeros((4, 4), np.float32), good,
        ]  # fmt: skip
        found = runtime.predict(images, top=1)
    assert found[1] == found[7] == runtime.predict(good, top=1)[0]
    for position, message in (
        (0, "empty.png: not a readable image (it is empty)"),
        (2, "cut.jpg: not a readable image"),
        (3, "no.png: no such image"),
        (4, "not a readable image"),
        (5, "an image is a path"),
        (6, "an image is uint8"),
    ):
        assert message in str(found[position].error)
        assert found[position] == Prediction(error=found[position].error)


def test_nothing_but_unreadable_images(runtime: Runtime, tmp_path: Path) -> None:
    assert [bool(found.error) for found in runtime.predict([tmp_path / "a.png", tmp_path / "b.png"])] == [True, True]
    assert runtime.predict([]) == []


def test_how_many_classes(runtime: Runtime) -> None:
    assert [len(runtime.predict(picture(), top=top)[0].top) for top in (1, 5, 99)] == [1, 5, 5]
    assert sum(share for _, share in runtime.predict(picture(), top=5)[0].top) == pytest.approx(1)
    assert len(runtime.predict(picture(), top=np.int64(2))[0].top) == 2  # type: ignore[arg-type]
    for top in (0, 2.5, True, None, "1"):
        with pytest.raises(InputError, match=r"top is .*: expected a whole number from 1 on"):
            runtime.predict(picture(), top=top)  # type: ignore[arg-type]


def test_pictures_of_a_generator_are_taken_some_at_a_time(tiny_bundle: Path) -> None:
    loaded, taken, most = adavit.load(tiny_bundle, threads=1, specialise=False), 0, 0
    pictures = [picture(seed) for seed in range(70)]
    wanted = loaded.predict(pictures)

    def generated() -> Iterator[Image.Image]:
        nonlocal taken
        for image in pictures:
            taken += 1
            yield image

    def run(images: np.ndarray, **options: Any) -> Result:
        nonlocal taken, most
        most, taken = max(most, taken), 0
        return Runtime.run(loaded, images, **options)

    loaded.run = run  # type: ignore[method-assign]
    assert loaded.predict(generated()) == wanted
    assert most == 32


WRONG_RESULTS: dict[str, tuple[Callable[[Result], dict[str, Any]], str]] = {
    "no architecture": (lambda _: {"architecture": None}, "its architecture is None"),
    "another architecture": (lambda _: {"architecture": tiny(keep=2)}, "of another model"),
    "objects": (lambda r: {"logits": r.logits.astype(object)}, "not finite floats, but object"),
    "text": (lambda r: {"logits": r.logits.astype(str)}, "not finite floats, but <U"),
    "complex": (lambda r: {"logits": r.logits.astype(complex)}, "not finite floats, but complex128"),
    "NaN": (lambda r: {"logits": r.logits * np.nan}, "image 0 are not finite floats"),
    "infinite": (lambda r: {"logits": r.logits + np.inf}, "image 0 are not finite floats"),
    "another policy": (lambda r: {"policy": Policy.dense(tiny(depth=2), len(r.logits))}, "policy.tokens is bool"),
}


@pytest.mark.parametrize("kind", WRONG_RESULTS)
def test_results_that_do_not_fit(kind: str, runtime: Runtime) -> None:
    change, message = WRONG_RESULTS[kind]
    result = runtime.run(IMAGES)
    assert runtime.prediction(result, 0).top
    with pytest.raises(InputError) as caught:
        runtime.prediction(replace(result, **change(result)), 0)
    assert message in str(caught.value)


class Foreign(os.PathLike[str]):
    """What fails in whatever it is asked for."""

    def fail(self) -> Any:
        raise RuntimeError("not mine")

    __index__ = __float__ = __fspath__ = fail


class ForeignFloat(float):
    __float__ = Foreign.fail  # type: ignore[assignment]


def test_foreign_classes_that_fail(runtime: Runtime) -> None:
    policy, foreign = Policy.dense(tiny(), 3), Foreign()
    result = runtime.run(IMAGES)
    calls: list[Callable[[Any], Any]] = [
        lambda value: runtime.predict(picture(), top=value),
        lambda value: runtime.prediction(result, value),
        lambda value: runtime.prediction(result, 0, value),
        lambda value: runtime.preprocess(value),
        lambda value: adavit.load(value),
        lambda value: Policy.dense(tiny(), value),
        lambda value: policy.check(tiny(), value),
        lambda value: policy[slice(value)],
        lambda value: policy.save(value),
        lambda value: Policy.load(value),
    ]
    for call in calls:
        for value in (foreign, torch.tensor(1, device="meta")):
            with pytest.raises(InputError):
                call(value)
    with pytest.raises(InputError, match="expected a share"):
        points().offsets(ForeignFloat(0.7))
    bad, good = runtime.predict([foreign, picture()])
    assert "expected a path" in str(bad.error)
    assert good.top


def points() -> Budgets:
    return Budgets((OperatingPoint(0.5, Offsets(heads=-1.0), {}), OperatingPoint(0.9, TRAINED, {})), {})


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no FIFOs")
def test_a_path_that_cannot_be_opened_takes_nothing_else_down(runtime: Runtime, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.jpg")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    picture().save(tmp_path / "good.png")
    bad = [
        "a" * 300 + ".jpg",
        tmp_path / "x.jpg",
        tmp_path / "loop.jpg",
        "a\0b.jpg",
        "\ud800.jpg",
        tmp_path,
        "/dev/zero",
    ]
    *errors, good = runtime.predict([*bad, tmp_path / "good.png"])
    assert good.top
    for found in errors:
        assert found.error
        assert found.error.isprintable()
        assert len(found.error) <= 500
    assert "x.jpg: not a readable image (is not a regular file but a pipe)" in str(errors[1].error)
