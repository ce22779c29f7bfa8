"""backend="auto": the fastest that is installed, measured once, and never a reason to fail."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import assert_same_policy, invoke, random_images, refusal, tiny

import adavit
from adavit.bundle.bundle import Bundle
from adavit.cli import run
from adavit.errors import LONGEST_MESSAGE, BackendError, InputError
from adavit.runtime import Runtime
from adavit.runtime import backend as backends
from adavit.runtime import fastest_backend as selection
from adavit.runtime.backend import Options
from adavit.runtime.cache import facts, kept_at, recall, remember
from adavit.runtime.fastest_backend import Choice, fastest_backend


@pytest.fixture(autouse=True)
def _at_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache folder, and measurements that take no time."""
    monkeypatch.setattr(selection, "SECONDS", 0.0)


@pytest.fixture
def opened(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)


class Stage:
    """Backends that take as long as they are told, and note who was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **milliseconds: float | None) -> None:
        self.asked: list[str] = []
        self.milliseconds = milliseconds
        self.now = 0.0
        monkeypatch.setattr(selection, "names", lambda: sorted(milliseconds))
        monkeypatch.setattr(selection, "perf_counter", lambda: self.now)

    def prepare(self, name: str) -> Any:
        self.asked.append(name)
        time = self.milliseconds[name]
        if time is None:
            raise BackendError(f"{name} is not installed")

        def run() -> None:
            self.now += time / 1e3

        return run, 2


def files(cache: Path) -> list[Path]:
    return sorted(cache.glob("backend-*.json"))  # other tests' runtimes may still write what images used


def test_the_fastest_is_taken_and_kept(opened: Bundle, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(monkeypatch, slow=8.0, fast=4.0, absent=None)
    first = fastest_backend(opened, "fp32", Options(1), stage.prepare)
    assert (first.backend, first.cached) == ("fast", False)
    assert first.milliseconds == pytest.approx({"fast": 2.0, "slow": 4.0})
    assert first.skipped == {"absent": "absent is not installed"}
    assert [str(path) for path in files(cache)] == [first.path]
    assert "fast, the fastest here: fast 2.00 ms an image, slow 4.00 ms an image (measured now, kept in" in str(first)
    asked = list(stage.asked)
    again = fastest_backend(opened, "fp32", Options(1), stage.prepare)
    assert (again.backend, again.cached, again.path) == ("fast", True, first.path)
    assert again.milliseconds == first.milliseconds
    assert stage.asked == asked
    assert "measured before" in str(again)


def test_the_best_of_some_rounds_counts_and_the_first_runs_do_not(
    opened: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Stage(monkeypatch, steady=5.0, disturbed=4.0)
    ran: dict[str, int] = {"steady": 0, "disturbed": 0}

    def prepare(name: str) -> Any:
        run, images = stage.prepare(name)

        def uneven() -> None:
            ran[name] += 1
            run()
            late = name == "disturbed" and ran[name] > 9  # other work of the machine
            stage.now += 1.0 if ran[name] < 3 or late else 0.0

        return uneven, images

    found = fastest_backend(opened, "fp32", Options(1), prepare)
    assert found.backend == "disturbed"
    assert found.milliseconds == pytest.approx({"steady": 2.5, "disturbed": 2.0})


def test_a_backend_that_loads_but_does_not_run_is_skipped(opened: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise BackendError("out of memory")

    stage = Stage(monkeypatch, runs=5.0, broken=1.0)
    found = fastest_backend(
        opened, "fp32", Options(1), lambda name: (refuse, 1) if name == "broken" else stage.prepare(name)
    )
    assert (found.backend, found.skipped) == ("runs", {"broken": "out of memory"})


def test_none_at_all(opened: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match="no backend runs this bundle: a is not installed; b is not installed"):
        fastest_backend(opened, "fp32", Options(1), Stage(monkeypatch, a=None, b=None).prepare)


@pytest.mark.openvino
def test_what_a_choice_depends_on(opened: Bundle, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(monkeypatch, a=1.0)
    fastest_backend(opened, "fp32", Options(1), stage.prepare)
    for options in (Options(2), Options(1, parallel="samples")):
        assert not fastest_backend(opened, "fp32", options, stage.prepare).cached
        assert fastest_backend(opened, "fp32", options, stage.prepare).cached
    assert not fastest_backend(opened, "int8", Options(1), stage.prepare).cached
    assert fastest_backend(opened, "fp32", Options(1, shared_pool=True), stage.prepare).cached, (
        "of the command and of load"
    )
    config = json.loads((bundle / "config.json").read_text())
    (bundle / "config.json").write_text(json.dumps({**config, "name": "another"}))
    assert not fastest_backend(Bundle.open(bundle), "fp32", Options(1), stage.prepare).cached
    versions = facts(opened, Options(1))["versions"]
    assert {"onnxruntime", "openvino"} <= set(versions)
    for name, value in (
        ("EXECUTORS", ("onnxruntime",)),
        ("cpu_name", lambda: "another CPU"),
        ("os.cpu_count", lambda: 999),
        ("platform.machine", lambda: "abacus"),
        ("metadata.version", lambda _: "9.9.9"),
        ("__version__", "9.9.9"),
    ):
        monkeypatch.setattr(f"adavit.runtime.cache.{name}", value)
        assert not fastest_backend(opened, "fp32", Options(1), stage.prepare).cached, name
        assert fastest_backend(opened, "fp32", Options(1), stage.prepare).cached, name


def damage(path: Path) -> Iterator[str]:
    kept = json.loads(path.read_text())
    yield ""
    yield "{"
    yield "[]"
    yield "[" * 100_000
    yield json.dumps(kept) + " " * (1 << 20)
    yield json.dumps({**kept, "facts": {}})
    yield json.dumps({**kept, "measured": []})
    yield json.dumps({**kept, "measured": {}})
    yield json.dumps({**kept, "measured": {**kept["measured"], "milliseconds": {}}})
    yield json.dumps({**kept, "measured": {**kept["measured"], "milliseconds": {"a": "soon"}}})
    yield json.dumps({**kept, "measured": {**kept["measured"], "backend": "b"}})
    yield json.dumps({**kept, "measured": {"backend": "gone", "milliseconds": {"gone": 1}, "skipped": {}}})


def test_a_damaged_file_is_measured_again(
    opened: Bundle, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stage = Stage(monkeypatch, a=1.0, b=2.0)
    fastest_backend(opened, "fp32", Options(1), stage.prepare)
    (path,) = files(cache)
    for text in damage(path):
        path.write_text(text)
        caplog.clear()
        again = fastest_backend(opened, "fp32", Options(1), stage.prepare)
        assert (again.backend, again.cached) == ("a", False), text[:80]
        assert "it is replaced" in caplog.text
        assert fastest_backend(opened, "fp32", Options(1), stage.prepare).cached


def test_a_cache_that_cannot_be_written(
    opened: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file, not a folder")
    found = fastest_backend(opened, "fp32", Options(1), Stage(monkeypatch, a=1.0).prepare)
    assert (found.backend, found.cached, found.path) == ("a", False, None)
    assert "is not kept" in caplog.text
    assert "not kept" in str(found)


def unreadable(kind: str, tmp_path: Path) -> str:
    """A base folder of the user's that nobody can look into."""
    if kind == "too long":
        return "/" + "/".join(["h" * 200] * 30)
    path = tmp_path / "base"
    if kind == "a loop":
        path.symlink_to(path)
    else:
        path.mkdir()
        (path / "adavit").write_text("a file, not a folder")
    return str(path)


def forbidden(*_: object, **__: object) -> None:
    raise PermissionError(13, "Permission denied")


@pytest.mark.parametrize("kind", ["too long", "a loop", "a file", "not allowed"])
def test_a_cache_that_cannot_be_read(
    kind: str, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", unreadable(kind, tmp_path))
    with monkeypatch.context() as patch:
        if kind == "not allowed":
            patch.setattr("adavit.runtime.cache.os.listdir", forbidden)
            patch.setattr("adavit.runtime.cache.open_regular", forbidden)
        for _ in range(2):
            images = random_images(tiny(), 1)
            assert len(adavit.load(tiny_bundle, threads=1).run(images).logits) == 1
    assert [record.levelname for record in caplog.records if "cannot be read" in record.message] == ["WARNING"]
    if kind != "not allowed":
        assert recall("usage", {}) is remember("usage", {}, {}) is None


def test_warnings_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path.joinpath(*(["a\n\x1b[31m" * 20] * 5))))
    path = kept_at("usage", {})
    assert path
    path.parent.mkdir(parents=True)
    for content in ("{", "{}"):
        path.write_text(content)
        assert recall("usage", {}) is None
    path.unlink()
    path.mkdir()
    assert recall("usage", {}) is remember("usage", {}, {}) is None
    assert len(caplog.records) == 4
    for record in caplog.records:
        assert record.message.isprintable()
        assert len(record.message) <= LONGEST_MESSAGE


def test_no_home(opened: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("no home")

    monkeypatch.setenv("XDG_CACHE_HOME", "relative/paths/do/not/count")
    monkeypatch.setattr(Path, "home", homeless)
    known = facts(opened, Options(1))
    assert kept_at("backend", known) is recall("backend", known) is remember("backend", known, {}) is None


@pytest.mark.openvino
def test_loading(tiny_bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        loaded = adavit.load(tiny_bundle, backend="auto", threads=1)
    assert loaded.choice is not None
    assert loaded.backend.name == loaded.choice.backend
    assert {"onnxruntime", "openvino"} <= set(loaded.choice.milliseconds)
    assert f"backend {loaded.backend.name}, the fastest here: " in caplog.text
    again = adavit.load(tiny_bundle, backend="auto", threads=1)
    assert again.choice is not None
    assert again.choice.cached
    images = random_images(tiny(), 2)
    named = adavit.load(tiny_bundle, backend=loaded.backend.name, threads=1)
    assert named.choice is None
    assert_same_policy(loaded.run(images).policy, named.run(images).policy)
    np.testing.assert_array_equal(loaded.run(images).logits, named.run(images).logits)


@pytest.mark.parametrize(("parallel", "sizes"), [("auto", [1] * 4), ("operators", [1] * 4), ("samples", [4])])
def test_what_is_timed(parallel: str, sizes: list[int], tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Single images, or a batch where each thread has an image."""
    ran: list[int] = []
    run_images = Runtime.run

    def noted(runtime: Runtime, images: np.ndarray, *given: Any) -> Any:
        ran.append(len(images))
        return run_images(runtime, images, *given)

    monkeypatch.setattr(selection, "names", lambda: ["onnxruntime"])
    monkeypatch.setattr(Runtime, "run", noted)
    choice = adavit.load(tiny_bundle, backend="auto", threads=2, parallel=parallel).choice
    assert choice is not None
    assert (choice.backend, list(choice.milliseconds)) == ("onnxruntime", ["onnxruntime"])
    assert ran[: len(sizes)] == sizes
    assert set(ran) == set(sizes)


def test_without_openvino(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def importing(module: str) -> Any:
        if "openvino" in module:
            raise BackendError("OpenVINO does not import; run: pip install 'adavit[openvino]'")
        return real(module)

    real = backends.import_module
    monkeypatch.setattr(backends, "import_module", importing)
    choice = adavit.load(tiny_bundle, backend="auto", threads=1).choice
    assert isinstance(choice, Choice)
    assert choice.backend == "onnxruntime"
    assert "pip install 'adavit[openvino]'" in choice.skipped["openvino"]


def test_the_command(tiny_bundle: Path, tmp_path: Path) -> None:
    short = (tiny_bundle, "--backend", "auto", "--iterations", 1, "--threads", 1)
    for when in ("now", "before"):
        done = invoke(run, *short, "--json", tmp_path / "report.json")
        assert (done.exit_code, done.stderr) == (0, "")
        assert "the fastest here: " in done.stdout
        assert f"(measured {when}, kept in " in done.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["backend"] == report["choice"]["backend"]
    assert report["choice"]["cached"]
    assert report["choice"]["milliseconds"][report["backend"]] == min(report["choice"]["milliseconds"].values())


def test_a_provider_belongs_to_one_backend(tiny_bundle: Path) -> None:
    with pytest.raises(InputError, match="name that instead of 'auto'"):
        adavit.load(tiny_bundle, backend="auto", provider="fp32")
    done = invoke(run, tiny_bundle, "--backend", "auto", "--provider", "fp32")
    assert "name that instead" in refusal(done, code=2)
