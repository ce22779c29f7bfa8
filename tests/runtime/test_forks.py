"""A runtime in other processes: forked children run what was loaded before, pickles load it again."""

import gc
import multiprocessing
import os
import pickle
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from time import monotonic, sleep

import numpy as np
import pytest
from cases import DENSE, random_images, read_config, tiny, write_config

import adavit
from adavit.bundle.operating_points import Offsets

SECONDS = 60
"""More than any child takes that does not wait for ever."""

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
both_backends = pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])


def in_a_fork(work: Callable[[], bytes], tmp_path: Path) -> bytes:
    """What some work returns in a forked child, which is killed where it does not end."""
    if (child := os.fork()) == 0:
        code = 1
        try:
            (tmp_path / "result").write_bytes(work())
            code = 0
        finally:
            os._exit(code)
    until = monotonic() + SECONDS
    while monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0
            return (tmp_path / "result").read_bytes()
        sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    pytest.fail("the child waits for ever")


@forks
@both_backends
@pytest.mark.parametrize("ran", [False, True])
def test_a_model_without_policies_survives_a_fork(
    backend: str, ran: bool, plain: tuple[Path, Path], tmp_path: Path
) -> None:
    runtime, images = adavit.load(plain[0], backend, threads=2), random_images(DENSE, 3)

    def work() -> bytes:
        return runtime.run(images).logits.tobytes() + runtime.run_dense(images).tobytes()

    before = work() if ran else None
    found = np.frombuffer(in_a_fork(work, tmp_path), np.float32)
    np.testing.assert_allclose(found, np.frombuffer(before or work(), np.float32), atol=1e-5)


@forks
@both_backends
@pytest.mark.parametrize("parallel", ["operators", "samples", "auto"])
@pytest.mark.parametrize("ran", [False, True])
def test_a_forked_child_computes_the_same(
    backend: str, parallel: str, ran: bool, tiny_bundle: Path, tmp_path: Path
) -> None:
    runtime, images = adavit.load(tiny_bundle, backend, threads=2, parallel=parallel), random_images(tiny(), 5)

    def work() -> bytes:
        return runtime.run(images).logits.tobytes() + runtime.run_dense(images).tobytes()

    before = work() if ran else None
    found = np.frombuffer(in_a_fork(work, tmp_path), np.float32)
    np.testing.assert_allclose(found, np.frombuffer(before or work(), np.float32), atol=1e-5)


@forks
def test_a_child_of_a_child_and_its_parent_all_run(tiny_bundle: Path, tmp_path: Path) -> None:
    runtime, images = adavit.load(tiny_bundle, threads=2, parallel="samples"), random_images(tiny(), 3)
    (tmp_path / "inner").mkdir()

    def work() -> bytes:
        return runtime.run(images).logits.tobytes()

    def outer() -> bytes:
        return work() + in_a_fork(work, tmp_path / "inner")

    found = np.frombuffer(in_a_fork(outer, tmp_path), np.float32).reshape(2, 3, -1)
    for logits in found:
        np.testing.assert_allclose(logits, runtime.run(images).logits, atol=1e-5)


@forks
@both_backends
@pytest.mark.parametrize("parallel", ["operators", "samples"])
def test_a_child_may_let_go_of_what_its_parent_loaded(
    backend: str, parallel: str, tiny_bundle: Path, tmp_path: Path
) -> None:
    held = [adavit.load(tiny_bundle, backend, threads=2, parallel=parallel)]
    images = random_images(tiny(), 4)
    policy = held[0].run(images).policy
    held[0].run_dense(images)

    def work() -> bytes:
        held[0].specialise(policy)
        found = held[0].run(images).logits.tobytes()
        held.clear()
        gc.collect()
        return found

    found = np.frombuffer(in_a_fork(work, tmp_path), np.float32).reshape(4, -1)
    np.testing.assert_allclose(found, held[0].run(images).logits, atol=1e-5)


@forks
@both_backends
def test_a_child_loads_anew_where_the_parent_let_go_of_a_runtime(
    backend: str, tiny_bundle: Path, tmp_path: Path
) -> None:
    images = random_images(tiny(), 4)
    wanted = adavit.load(tiny_bundle, backend, threads=2, parallel="samples").run(images).logits
    gc.collect()

    def work() -> bytes:
        runtime = adavit.load(tiny_bundle, backend, threads=2, parallel="samples")
        runtime.specialise(runtime.run(images).policy)
        runtime.run_dense(images)
        return runtime.run(images).logits.tobytes()

    found = np.frombuffer(in_a_fork(work, tmp_path), np.float32).reshape(4, -1)
    np.testing.assert_allclose(found, wanted, atol=1e-5)


@forks
def test_a_child_prepares_by_a_thread_of_its_own(tiny_bundle: Path, tmp_path: Path, cache: Path) -> None:
    runtime, images = adavit.load(tiny_bundle, threads=1), random_images(tiny(), 16)
    wanted = runtime.run(images).logits  # from here on the parent prepares

    def work() -> bytes:
        runtime.backend.retain(())
        found = runtime.run(images).logits
        until = monotonic() + SECONDS / 2
        while not runtime.backend.prepared() and monotonic() < until:
            runtime.run(images)
        assert runtime.backend.prepared()
        assert runtime.specialise(runtime.run(images).policy) > 0
        return found.tobytes() + runtime.run_dense(images).tobytes()

    found = np.frombuffer(in_a_fork(work, tmp_path), np.float32).reshape(2, *wanted.shape)
    np.testing.assert_allclose(found[0], wanted, atol=1e-5)
    np.testing.assert_allclose(found[1], runtime.run_dense(images), atol=1e-5)


@forks
def test_no_fork_happens_while_something_is_made(
    tiny_bundle: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Native code that makes it may hold locks, which in a child nobody would give back."""
    runtime, images = adavit.load(tiny_bundle, threads=1), random_images(tiny(), 16)
    begun, making = threading.Event(), False

    def prepare(_: object) -> None:
        nonlocal making
        making = True
        begun.set()
        sleep(0.3)
        making = False

    monkeypatch.setattr(runtime.backend, "prepare", prepare)
    runtime.run(images)
    assert begun.wait(SECONDS)
    assert in_a_fork(lambda: str(making).encode(), tmp_path) == b"False"


@forks
def test_what_runs_on_a_gpu_says_that_it_does_not_survive_a_fork(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime, images = adavit.load(tiny_bundle, threads=1), random_images(tiny(), 1)
    monkeypatch.setattr(runtime.backend, "on_host", False)
    runtime.run(images)

    def work() -> bytes:
        messages = []
        for run in (runtime.run, runtime.run_dense):
            with pytest.raises(adavit.BackendError) as caught:
                run(images)
            messages.append(str(caught.value))
        return "\n".join(messages).encode()

    first, second = in_a_fork(work, tmp_path).decode().splitlines()
    assert first == second
    assert "does not survive a fork; load it in the child" in first


def logits_of(runtime: adavit.Runtime, images: np.ndarray) -> np.ndarray:
    return runtime.run(images).logits


@both_backends
def test_a_pickled_runtime_loads_again_in_a_spawned_process(backend: str, tiny_bundle: Path) -> None:
    runtime, images = adavit.load(tiny_bundle, backend, threads=1, parallel="samples"), random_images(tiny(), 2)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.apply_async(logits_of, (runtime, images)).get(SECONDS)
    np.testing.assert_allclose(found, runtime.run(images).logits, atol=1e-5)


def test_a_pickle_keeps_options_and_offsets(tiny_bundle: Path) -> None:
    runtime = adavit.load(tiny_bundle, threads=1, specialise=False, shared_pool=True)
    runtime.offsets = Offsets(tokens=0.7, heads=(0.1, -0.2, 0.3))
    found = pickle.loads(pickle.dumps(runtime))
    assert (found.options, found.offsets, found.backend.name) == (runtime.options, runtime.offsets, "onnxruntime")
    assert found.graphs.precision == "fp32"
    images = random_images(tiny(), 32)
    for _ in range(3):
        np.testing.assert_array_equal(found.run(images).logits, runtime.run(images).logits)
    assert not found.backend.prepared()


def test_a_pickle_is_of_one_bundle(bundle: Path) -> None:
    pickled = pickle.dumps(adavit.load(bundle, threads=1))
    config = read_config(bundle)
    write_config(bundle, {**config, "name": "another"})
    with pytest.raises(adavit.BundleError, match="another bundle than the one that was loaded"):
        pickle.loads(pickled)
    shutil.rmtree(bundle)
    with pytest.raises(adavit.BundleError, match="no such bundle folder"):
        pickle.loads(pickled)
