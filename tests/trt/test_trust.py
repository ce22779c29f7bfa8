"""Engines are native code: those that this user did not build on this machine run only where the caller says so."""

import os
import shutil
from pathlib import Path

import pytest
from cases import invoke, picture, random_images, read_config, refusal, write_config
from double import Gpu, add_double_engines, described_engine

import adavit
from adavit.bundle.bundle import Bundle
from adavit.bundle.engine_sets import engine_sets
from adavit.bundle.trust import built_here, remember_built
from adavit.cli import run as run_command
from adavit.errors import BackendError, OptionError
from adavit.runtime import Runtime

ON_POSIX = pytest.mark.skipif(os.name != "posix", reason="files have owners and modes on POSIX alone")


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of what was built here, which is not there yet."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state" / "adavit" / "engine-sets"


@pytest.fixture(autouse=True)
def _empty_cache(cache: Path) -> None:
    """No choice of a backend is known."""


def fingerprint(bundle: Path, key: str = "double") -> str:
    return next(found.fingerprint for found in engine_sets(Bundle.open(bundle)) if found.key == key)


def assert_refused(bundle: Path, gpu: Gpu) -> str:
    """Before a byte is read."""
    for engine in bundle.glob("tensorrt/*/*.engine"):
        engine.unlink()
    with pytest.raises(BackendError, match="native code") as caught:
        adavit.load(bundle, "tensorrt", threads=1)
    assert not gpu.alive["engine"] and not gpu.alive["stream"]
    return str(caught.value)


def test_engines_that_came_with_a_bundle_are_refused(built: Path, gpu: Gpu) -> None:
    message = assert_refused(built, gpu)
    assert "double came with it and were not built by this user on this machine" in message
    assert "if you trust who built them, give `trust_engines=True`, else" in message
    assert message.endswith(f"run: adavit-export {built} --target tensorrt")


def test_engines_that_the_caller_trusts(built: Path, gpu: Gpu, runtime: Runtime) -> None:
    images = random_images(runtime.architecture, 1)
    found = adavit.load(built, "tensorrt", threads=1, trust_engines=True).run(images)
    assert found.logits.shape == (1, runtime.architecture.classes)
    assert adavit.load(built, threads=1, trust_engines=True).backend.name == "onnxruntime"


@pytest.mark.parametrize("value", [1, "yes", None, "tensorrt"])
def test_trust_is_true_or_false(built: Path, value: object) -> None:
    with pytest.raises(OptionError, match=r"trust_engines is .*: expected True or False"):
        adavit.load(built, trust_engines=value)  # type: ignore[arg-type]


def test_engines_that_were_built_here(built: Path, gpu: Gpu, tmp_path: Path) -> None:
    remember_built(fingerprint(built), "double")
    assert adavit.load(built, "tensorrt", threads=1).backend.name == "tensorrt"
    moved = shutil.copytree(built, tmp_path / "moved")
    assert adavit.load(moved, "tensorrt", threads=1).backend.name == "tensorrt"


@pytest.mark.parametrize("change", ["sha256", "role", "version", "flavour", "platform", "precision"])
def test_other_engines_than_were_built_here(built: Path, gpu: Gpu, change: str) -> None:
    before = fingerprint(built)
    remember_built(before, "double")
    config = read_config(built)
    described = config["engine_sets"]["double"]
    if change == "sha256":
        described_engine(config, "stem")["sha256"] = "0" * 64
    elif change == "role":
        first, second = described_engine(config, "blocks.1"), described_engine(config, "blocks.2")
        first["block"], second["block"] = 2, 1
    else:
        other = {"version": "10.0.1", "flavour": "tensorrt-rtx", "platform": "win32_amd64", "precision": "fp16"}
        described[change] = other[change]
    write_config(built, config)
    assert fingerprint(built) != before
    assert not built_here(fingerprint(built))
    if change in ("sha256", "role"):
        assert_refused(built, gpu)


def test_a_set_that_was_built_here_is_taken_beside_one_that_came_along(built: Path, gpu: Gpu) -> None:
    config = read_config(built)
    theirs = config["engine_sets"]["double"]
    more = {**described_engine(config, "stem"), "role": "block", "block": 9}
    engines = [*theirs["engines"], {**more, "sha256": "1" * 64}]
    config["engine_sets"] = {
        "theirs": {**theirs, "engines": engines},
        "double": {**theirs, "hardware_compatible": True},
    }
    write_config(built, config)
    remember_built(fingerprint(built), "double")
    assert adavit.load(built, "tensorrt", threads=1).backend.versions()["engine_set"] == "double"
    trusting = adavit.load(built, "tensorrt", threads=1, trust_engines=True)
    assert trusting.backend.versions()["engine_set"] == "theirs"


def test_the_last_set_that_was_built_is_taken(built: Path, gpu: Gpu) -> None:
    config = read_config(built)
    theirs = config["engine_sets"]["double"]
    newer = {**theirs, "compute_capabilities": [80, *theirs["compute_capabilities"]]}
    for order in (("first", "second"), ("second", "first")):
        config["engine_sets"] = dict(zip(order, (theirs, newer), strict=True))
        write_config(built, config)
        taken = adavit.load(built, "tensorrt", threads=1, trust_engines=True).backend.versions()["engine_set"]
        assert taken == order[1]


@ON_POSIX
@pytest.mark.parametrize("mode", [0o020, 0o002])
@pytest.mark.parametrize("level", range(3))
def test_what_others_may_have_written_is_not_believed(built: Path, state: Path, mode: int, level: int) -> None:
    found = fingerprint(built)
    remember_built(found, "double")
    path = (state / found, state, state.parent)[level]
    assert built_here(found)
    path.chmod(path.stat().st_mode | mode)
    assert not built_here(found)


@ON_POSIX
def test_a_record_of_another_user_is_not_believed(built: Path, state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = fingerprint(built)
    remember_built(found, "double")
    monkeypatch.setattr(os, "geteuid", lambda: 123456)
    assert not built_here(found)


@ON_POSIX
def test_a_link_is_no_record(built: Path, state: Path, tmp_path: Path) -> None:
    state.mkdir(0o700, parents=True)
    (tmp_path / "other").write_text("double\n")
    (state / fingerprint(built)).symlink_to(tmp_path / "other")
    assert not built_here(fingerprint(built))


@ON_POSIX
def test_the_record_is_made_for_this_user_alone(state: Path) -> None:
    before = os.umask(0)
    try:
        remember_built("0" * 64, "double")
    finally:
        os.umask(before)
    assert built_here("0" * 64)


def test_where_nothing_can_be_remembered_there_is_one_warning(
    state: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    state.parent.parent.mkdir()
    state.parent.write_text("a file, not a folder")
    remember_built("0" * 64, "double")
    assert not built_here("0" * 64)
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", "not/absolute")
    remember_built("0" * 64, "double")
    assert not built_here("0" * 64)
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert all("run them with `trust_engines=True`" in record.message for record in caplog.records)


def test_auto_says_why_it_left_them_out(built: Path, gpu: Gpu) -> None:
    found = adavit.load(built, "auto", threads=1)
    assert found.choice is not None
    assert "native code" in found.choice.skipped["tensorrt"]
    found = adavit.load(built, "auto", threads=1, trust_engines=True)
    assert found.choice is not None and not found.choice.cached
    assert "tensorrt" in found.choice.milliseconds


def test_the_command(built: Path, gpu: Gpu, tmp_path: Path) -> None:
    arguments = [built, "--backend", "tensorrt", "--iterations", 2, "--warmup", 1, "--threads", 1]
    assert "native code: if you trust who built them, give --trust-engines" in refusal(invoke(run_command, *arguments))
    done = invoke(run_command, *arguments, "--trust-engines")
    assert done.exit_code == 0, done.output


def test_comparing(built: Path, gpu: Gpu, tmp_path: Path) -> None:
    picture().save(tmp_path / "0.png")
    arguments = ["--compare", built, built, "--images", tmp_path / "0.png", "--backend", "tensorrt", "--threads", 1]
    assert "native code" in refusal(invoke(run_command, *arguments))
    done = invoke(run_command, *arguments, "--trust-engines")
    assert done.exit_code == 0, done.output


def test_engines_for_another_machine_are_said_to_be_so(bundle: Path, gpu: Gpu) -> None:
    add_double_engines(bundle, version="10.1.0")
    with pytest.raises(BackendError, match=r"its engines are for tensorrt 10\.1\.0"):
        adavit.load(bundle, "tensorrt", threads=1)
