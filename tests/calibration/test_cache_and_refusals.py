"""The calibration cache, mixed precision, and what is refused: one line, and no half-written bundle."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from cases import WIDE, export, invoke, picture, quiet, random_images, random_model, read_config, refusal, shell

import adavit
from adavit.calibration.cache import load_ranges
from adavit.calibration.convert import Assignment
from adavit.calibration.mixed import Loss, Search
from adavit.cli import export as command
from adavit.errors import InputError
from adavit.export import ExportOptions, export_bundle
from adavit.precision_options import CalibrationOptions

pytest.importorskip("modelopt", reason="pip install 'adavit[int8]' to convert engines")

Calibrated = Callable[[str], tuple[Path, dict]]


def cache_of(calibrated: Calibrated) -> Path:
    return calibrated("fp16")[0].parent / "calibration.npz"


def test_a_cache_serves_other_precisions_and_methods(calibrated: Calibrated, busy: Path, tmp_path: Path) -> None:
    assert (
        calibrated("int8")[1]["calibration"]["reused"] is False
        or calibrated("fp16")[1]["calibration"]["reused"] is False
    )
    done = invoke(
        command, busy, "-o", tmp_path / "other", "--with-dense", "--no-verify", "--threads", 1, "--precision", "int8",
        "--method", "percentile", "--calibration-cache", cache_of(calibrated), "--json", "-",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert (report["calibration"]["reused"], report["calibration"]["method"]) == (True, "percentile")
    assert read_config(tmp_path / "other")["statistics"] == read_config(calibrated("int8")[0])["statistics"]
    hashes = [
        {name: engine["sha256"] for name, engine in read_config(bundle)["engines"].items()}
        for bundle in (tmp_path / "other", calibrated("int8")[0])
    ]
    assert hashes[0] != hashes[1]


def test_decisions_may_take_fp16(calibrated: Calibrated, busy: Path, tmp_path: Path) -> None:
    calibrated("int8")
    calibration = CalibrationOptions("fp16", (), cache_of(calibrated), decision_precision="fp16")
    options = ExportOptions(with_dense=True, verify=False, threads=1, calibration=calibration)
    export_bundle(busy, tmp_path / "bundle", options, quiet)
    engines = read_config(tmp_path / "bundle")["engines"]
    assert {engine["precision"] for name, engine in engines.items() if name.endswith("decide")} == {"fp16"}
    images = random_images(WIDE, 4)
    bundles = tmp_path / "bundle", calibrated("fp32")[0]
    policies = [adavit.load(bundle, threads=1).run(images).policy for bundle in bundles]
    assert (policies[0].tokens == policies[1].tokens).mean() > 0.99


def test_what_a_cache_holds(calibrated: Calibrated) -> None:
    calibrated("int8")
    ranges, origin = load_ranges(cache_of(calibrated))
    assert set(origin) == {"model", "images", "samples", "seed"}
    assert ranges.images == 32
    assert set(ranges.histograms["blocks.1.mlp"]) == {"blocks.1.fc1", "blocks.1.fc2"}
    assert len(ranges.histograms["dense"]) == 4 * WIDE.depth
    assert all(found.threshold("max") > 0 for part in ranges.histograms.values() for found in part.values())


def refused(tmp_path: Path, source: Path, *arguments: object, code: int = 1) -> str:
    target = tmp_path / "refused"
    line = refusal(invoke(command, source, "-o", target, "--no-verify", "--threads", 1, *arguments), code)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith((target.name, "."))]
    return line


def test_a_cache_of_another_model_is_refused(calibrated: Calibrated, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = export(random_model(WIDE, seed=3), tmp_path / "other").parent / "model.safetensors"
    calibrated("int8")
    line = refused(tmp_path, other, "--precision", "int8", "--calibration-cache", cache_of(calibrated))
    assert "calibrated for another model" in line and "--calibration-cache" in line


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "packed", "version"])
def test_a_damaged_cache_is_refused(calibrated: Calibrated, busy: Path, tmp_path: Path, damage: str) -> None:
    calibrated("int8")
    cache = Path(shutil.copy(cache_of(calibrated), tmp_path / "cache.npz"))
    if damage == "version":
        with np.load(cache) as data:
            about = json.loads(str(data["about"])) | {"version": 99}
            np.savez(cache, counts=data["counts"], about=np.asarray(json.dumps(about)))
    else:
        data = cache.read_bytes()
        packed = data[:60] + b"\xff" * 60 + data[120:]
        cache.write_bytes({"empty": b"", "text": b"no cache", "cut": data[:-200], "packed": packed}[damage])
    line = refused(tmp_path, busy, "--precision", "int8", "--calibration-cache", cache)
    assert "not a calibration cache" in line


def test_images_that_do_not_do(busy: Path, pictures: Path, tmp_path: Path) -> None:
    arguments = ("--precision", "int8")
    assert "--calibration-images" in refused(tmp_path, busy, *arguments, code=2)
    assert "no such image or folder" in refused(tmp_path, busy, *arguments, "--calibration-images", tmp_path / "no")
    few = tmp_path / "few"
    few.mkdir()
    assert "holds no image file" in refused(tmp_path, busy, *arguments, "--calibration-images", few)
    for seed in range(15):
        picture(seed).save(few / f"{seed}.png")
    (few / "broken.png").write_bytes(b"no picture")
    line = refused(tmp_path, busy, *arguments, "--calibration-images", few)
    assert "at least 16 images, 15 can be read" in line and "broken.png" in line
    strange = tmp_path / "strange"
    (strange / "aardvark").mkdir(parents=True)
    picture().save(strange / "aardvark" / "0.png")
    assert "aardvark" in refused(tmp_path, busy, *arguments, "--calibration-images", strange)


def test_unreadable_images_are_left_out_and_named(busy: Path, pictures: Path, tmp_path: Path) -> None:
    some = shutil.copytree(pictures, tmp_path / "some")
    (some / "broken.png").write_bytes(b"no picture")
    done = invoke(
        command, busy, "-o", tmp_path / "fp16", "--no-verify", "--threads", 1, "--precision", "fp16",
        "--calibration-images", some,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "calibrated  on 32 images" in done.stdout
    assert "1 could not be read, first:" in done.stdout and "broken.png" in done.stdout
    assert "blocks.1.attention" in done.stdout


def test_options_that_do_not_fit(busy: Path, pictures: Path, tmp_path: Path) -> None:
    images = ("--calibration-images", pictures)
    assert "--opset 19" in refused(tmp_path, busy, "--precision", "fp16", "--opset", 17, *images, code=2)
    cached = ("--calibration-cache", tmp_path / "cache.npz")
    assert "--precision mixed" in refused(tmp_path, busy, "--precision", "mixed", *cached, code=2)
    assert "--precision" in refused(tmp_path, busy, "--precision", "int4", *images, code=2)


def test_without_model_optimizer_the_extra_is_named(busy: Path, pictures: Path, tmp_path: Path) -> None:
    without = """
import sys
class Refused:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "modelopt":
            raise ImportError(name)
sys.meta_path.insert(0, Refused())
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "modelopt" else found(name, *rest)
"""
    done = shell(
        "adavit-export", busy, "-o", tmp_path / "bundle", "--precision", "int8", "--calibration-images", pictures,
        before=without,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    assert "modelopt is not installed; run: pip install 'adavit[int8]'" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_starved_sublayers_are_named_and_stay(pictures: Path, tmp_path: Path) -> None:
    model = random_model(WIDE, sublayers=2.0)
    model.blocks[1].layer_select.mlp_head.bias.data[1] = -50.0  # its MLP never runs
    (tmp_path / "source").mkdir()
    source = export(model, tmp_path / "source").parent / "model.safetensors"
    options = ExportOptions(verify=False, threads=1, calibration=CalibrationOptions("int8", (pictures,)))
    report = export_bundle(source, tmp_path / "bundle", options, quiet)["calibration"]
    assert report["kept_higher"] == {"blocks.1.mlp": {"precision": "fp32", "reason": "no image reaches it"}}
    engines = read_config(tmp_path / "bundle")["engines"]
    assert [engines[f"blocks.{block}.mlp"]["precision"] for block in range(3)] == ["int8", "fp32", "int8"]


def test_mixed_precision_meets_its_bound(calibrated: Calibrated, busy: Path, pictures: Path, tmp_path: Path) -> None:
    calibrated("int8")
    drops = []
    for bound in (100.0, 0.0):
        calibration = CalibrationOptions("mixed", (pictures,), cache_of(calibrated), max_drop=bound)
        options = ExportOptions(with_dense=True, verify=False, threads=1, calibration=calibration)
        report = export_bundle(busy, tmp_path / f"{bound}", options, quiet)
        assert report["precision"] == "mixed"
        found = report["calibration"]
        assert len(found["sensitivity"]) == 2 * WIDE.depth
        assert found["loss"]["drop"] <= bound
        drops.append(len(found["kept_higher"]))
    assert drops[0] == 0 <= drops[1]


@dataclass
class Pretended:
    """Losses that add up: each sub-layer in int8 costs what it is said to."""

    costs: dict[str, float]
    rest: float = 0.0
    asked: list[list[str]] = field(default_factory=list)

    def loss(self, assigned: dict[str, Assignment], most: int | None = None) -> Loss:
        int8 = [unit for unit, found in assigned.items() if found.precision == "int8"]
        self.asked.append(int8)
        total = self.rest + sum(self.costs[unit] for unit in int8)
        return Loss(total, 1 - total / 100, total)


def search(costs: dict[str, float], bound: float, rest: float = 0.0, too_large: str = "") -> Search:
    int8 = {unit: Assignment("int8") for unit in costs}
    fp16 = {unit: Assignment("fp32", "too large") if unit == too_large else Assignment("fp16") for unit in costs}
    return Search(Pretended(costs, rest), int8, fp16, bound, quiet)  # type: ignore[arg-type]


def test_the_most_sensitive_are_put_back_first_and_no_more_than_needed() -> None:
    found = search({"a": 0.1, "b": 2.0, "c": 0.5, "d": 1.0}, bound=0.7)
    assert list(found.sensitivity) == ["b", "d", "c", "a"]
    assigned = found.run()
    assert [unit for unit, part in assigned.items() if part.precision == "fp16"] == ["b", "d"]
    assert found.loss.drop == pytest.approx(0.6)
    assert not [part for part in search({"a": 0.1}, bound=1).run().values() if part.precision != "int8"]


def test_what_fp16_cannot_hold_is_put_back_to_fp32() -> None:
    assigned = search({"a": 0.1, "b": 2.0, "c": 2.0}, bound=0.7, too_large="b").run()
    assert assigned["b"] == Assignment("fp32", "put back for accuracy; too large")
    assert assigned["c"] == Assignment("fp16", "put back for accuracy")
    assert assigned["a"] == Assignment("int8")


def test_a_bound_that_cannot_be_met_says_what_was_the_best() -> None:
    with pytest.raises(InputError, match=r"--max-drop 0.2 cannot be met: the best was a drop of 0.30 points"):
        search({"a": 1.0, "b": 2.0}, bound=0.2, rest=0.3).run()
