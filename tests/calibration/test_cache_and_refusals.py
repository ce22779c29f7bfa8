"""The calibration cache, mixed precision, and what is refused: one line, and no half-written bundle."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import (
    KEEP_ALL,
    WIDE,
    export,
    invoke,
    picture,
    pictures_in,
    quiet,
    random_images,
    random_model,
    read_config,
    refusal,
    save,
    shell,
    tiny,
    with_weights,
)
from PIL import Image

import adavit
from adavit.calibration.cache import load_ranges
from adavit.calibration.convert import Assignment, assign, converted
from adavit.calibration.mixed import Loss, Measure, Search, read_images
from adavit.calibration.ranges import Ranges
from adavit.calibration.recording import Seen
from adavit.cli import export as command
from adavit.errors import InputError
from adavit.export import ExportOptions, export_bundle
from adavit.precision_options import CalibrationOptions
from adavit.runtime.backend import Options
from adavit.bundle.bundle import Bundle
from adavit.runtime.image_files import ImageFile

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
    for unit, part in ranges.histograms.items():
        assert min(found.threshold("max") for found in part.values()) > 0
        assert ranges.peaks[unit] >= max(found.peak for found in part.values())


def test_a_cache_serves_the_same_images_samples_and_seed_alone(tmp_path: Path) -> None:
    arch = tiny(depth=2, head_policy=False)
    source = save(random_model(arch, sublayers=2.0), tmp_path / "model.safetensors")
    (tmp_path / "pictures").mkdir()
    pictures, cache = pictures_in(tmp_path / "pictures", 18), tmp_path / "ranges.npz"

    def reused(*images: Path, samples: int = 64, seed: int = 0) -> bool:
        """Whether the cache was; either way it is of what was asked for then."""
        calibration = CalibrationOptions("fp16", images, cache, samples=samples, seed=seed)
        options = ExportOptions(with_dense=True, verify=False, force=True, threads=1, calibration=calibration)
        report = export_bundle(source, tmp_path / "bundle", options, quiet)["calibration"]
        assert report["images"] == 18
        ranges, origin = load_ranges(cache)
        assert (origin["samples"], origin["seed"]) == (samples, seed)
        first = ranges.histograms["dense"]["blocks.0.fc1"]  # the layer reads every channel of every token
        assert first.counts.sum() == min(samples, 18) * arch.tokens * arch.width
        return report["reused"]

    assert [reused(pictures) for _ in range(2)] == [False, True]
    assert reused()  # without images, whatever it was made of
    assert [reused(pictures, samples=16) for _ in range(2)] == [False, True]
    before = load_ranges(cache)[0].histograms["dense"]["blocks.1.fc2"]
    assert [reused(pictures, samples=16, seed=1) for _ in range(2)] == [False, True]
    after = load_ranges(cache)[0].histograms["dense"]["blocks.1.fc2"]
    assert not np.array_equal(before.counts, after.counts)  # other images were chosen
    picture(99).save(pictures / "00.png")
    assert [reused(pictures, samples=16, seed=1) for _ in range(2)] == [False, True]


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


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "packed", "version", "bins", "rows", "types"])
def test_a_damaged_cache_is_refused(calibrated: Calibrated, busy: Path, tmp_path: Path, damage: str) -> None:
    calibrated("int8")
    cache = Path(shutil.copy(cache_of(calibrated), tmp_path / "cache.npz"))
    if damage in ("version", "bins", "rows", "types"):
        with np.load(cache) as data:
            counts, about = data["counts"], json.loads(str(data["about"]))
        about |= {"version": 99} if damage == "version" else {}
        counts = {"bins": counts[:, :-1], "rows": counts[:-1], "types": counts.astype(np.int32)}.get(damage, counts)
        np.savez(cache, counts=counts, about=np.asarray(json.dumps(about)))
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
    line = refused(tmp_path, busy, *arguments, "--calibration-images", strange)
    assert "at least 16 images, 1 can be read" in line  # whatever its class is
    line = refused(tmp_path, busy, *arguments, "--calibration-images", strange, "--labels-by-order")
    assert "class folder 'aardvark' is none of the bundle's" in line


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


def test_what_fp16_cannot_hold_stays_in_fp32(pictures: Path, tmp_path: Path) -> None:
    arch = tiny(depth=2, head_policy=False, sublayer_policy=False)
    model = random_model(arch)
    with torch.no_grad():  # before the GELU, which makes 0 of them
        model.blocks[0].mlp.fc1.bias[0], model.blocks[1].mlp.fc1.bias[0] = -40_000, -30_000
    source = save(model, tmp_path / "model.safetensors")
    for precision, images in (("fp16", (pictures,)), ("fp16", ()), ("int8", ())):  # measured, then from the cache
        calibration = CalibrationOptions(precision, images, tmp_path / "ranges.npz")
        options = ExportOptions(
            heads=arch.heads, with_dense=True, verify=False, force=True, threads=1, calibration=calibration
        )
        kept = export_bundle(source, tmp_path / "bundle", options, quiet)["calibration"]["kept_higher"]
        engines = read_config(tmp_path / "bundle")["engines"]
        found = {name for name, engine in engines.items() if engine["precision"] == precision}
        sublayers = {f"blocks.{block}.{kind}" for block in range(2) for kind in ("attention", "mlp")}
        if precision == "int8":  # whose sums are fp32's
            assert (kept, found) == ({}, {"dense", *sublayers})
            continue
        assert set(kept) == {"dense", "blocks.0.mlp"}
        assert {part["precision"] for part in kept.values()} == {"fp32"}
        assert all(
            re.fullmatch(r"its values reach (40|39)\d{3}, too near .*", part["reason"]) for part in kept.values()
        )
        assert found == sublayers - {"blocks.0.mlp"}


@pytest.mark.parametrize(
    ("precision", "reached", "peak", "found", "reason"),
    [
        ("int8", (4, 0), 9.0, "int8", None),
        ("int8", (2, 2), 9.0, "int8", None),  # by either engine
        ("int8", (2, 1), 9.0, "fp16", "only 3 of the images reach it"),
        ("int8", (1, 0), 4e4, "fp32", "its values reach 40000, too near fp16's end"),
        ("int8", (9, 0), 4e4, "int8", None),
        ("int8", (0, 0), 0.0, "fp32", "no image reaches it"),
        ("fp16", (0, 1), 9.0, "fp16", None),
        ("fp16", (0, 0), 0.0, "fp32", "no image reaches it"),
    ],
)
def test_the_precision_that_calibration_allows(
    precision: str, reached: tuple[int, int], peak: float, found: str, reason: str | None, wide: tuple[Path, Path]
) -> None:
    bundle = Bundle.open(wide[0])
    few, others = "blocks.1.mlp", [unit for unit in [*UNITS, "dense"] if unit != "blocks.1.mlp"]
    seen = {few: Seen(reached[0], 9), f"{few}_gather": Seen(reached[1], 9), **dict.fromkeys(others, Seen(9, 99))}
    seen = {name: one for name, one in seen.items() if one.samples}
    ranges = Ranges(9, seen, peaks={**dict.fromkeys(others, 1.0), few: peak})
    assigned = assign(bundle, ranges, precision)
    assert assigned.pop(few) == Assignment(found, reason)
    assert assigned == dict.fromkeys(others, Assignment(precision))


def test_the_dense_twin_quantises_what_its_sublayers_do(calibrated: Calibrated) -> None:
    calibrated("int8")
    bundle, (ranges, _) = Bundle.open(calibrated("fp32")[0]), load_ranges(cache_of(calibrated))
    assigned = {**INT8, "dense": Assignment("int8"), "blocks.1.mlp": Assignment("fp32")}
    ((name, model),) = converted(bundle, ranges, assigned, "max", {"dense": "int8"})
    makers = {node.output[0]: node for node in model.graph.node}
    plain = {
        weight
        for node in model.graph.node
        if node.op_type == "MatMul"
        for weight in node.input
        if weight not in makers and weight.startswith("blocks.")
    }
    assert (name, plain) == ("dense", {"blocks.1.mlp.fc1.weight", "blocks.1.mlp.fc2.weight"})


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


def test_what_is_put_back_is_what_the_bundle_holds(tmp_path: Path) -> None:
    arch = tiny(depth=2, token_policy=False, head_policy=False)
    model = random_model(arch, seed=2, sublayers=KEEP_ALL)
    with torch.no_grad():  # one channel reaches so far that a step of int8 is larger than all others
        for value in model.blocks[1].norm2.parameters():
            value[0] *= 4000
        model.blocks[1].mlp.fc1.weight[:, 0] /= 4000
        model.blocks[1].mlp.fc2.weight *= 20
    source, images = save(model, tmp_path / "model.safetensors"), tmp_path / "images"
    images.mkdir()
    for seed in range(16):
        pixels = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(images / f"{seed}.png")
    options = ExportOptions(
        heads=arch.heads, verify=False, threads=1, calibration=CalibrationOptions("mixed", (images,), max_drop=5.0)
    )
    report = export_bundle(source, tmp_path / "bundle", options, quiet)["calibration"]
    assert report["kept_higher"] == {"blocks.1.mlp": {"precision": "fp16", "reason": "put back for accuracy"}}
    assert next(iter(report["sensitivity"])) == "blocks.1.mlp"
    assert report["sensitivity"]["blocks.1.mlp"]["drop"] > 5 >= report["loss"]["drop"]
    engines = read_config(tmp_path / "bundle")["engines"]
    found = {name: engine["precision"] for name, engine in engines.items() if name.endswith((".attention", ".mlp"))}
    assert found == {name: "fp16" if name == "blocks.1.mlp" else "int8" for name in found}
    written = {path.relative_to(tmp_path / "bundle") for path in (tmp_path / "bundle").rglob("*.onnx")}
    assert written == {Path(engine["file"]) for engine in engines.values()}  # and nothing of what was tried


@pytest.fixture(scope="module")
def measured(calibrated: Calibrated) -> Callable[..., Measure]:
    """What measures the busy model's precisions on some images, with given labels."""

    def measure(labels: list[int | None], decisions: str = "fp32", **others: Bundle) -> Measure:
        bundles = {precision: Bundle.open(calibrated(precision)[0]) for precision in ("fp32", "fp16", "int8")}
        return Measure(bundles | others, Options(threads=1), decisions, NOISE, labels)

    return measure


NOISE = random_images(WIDE, 48, seed=3)
UNITS = [f"blocks.{block}.{kind}" for block in range(WIDE.depth) for kind in ("attention", "mlp")]
INT8 = {unit: Assignment("int8") for unit in UNITS}


def test_a_loss_is_what_a_precision_changes(calibrated: Calibrated, measured: Callable[..., Measure]) -> None:
    wanted, found = (adavit.load(calibrated(p)[0], threads=1).run(NOISE).logits for p in ("fp32", "int8"))
    same = wanted.argmax(1) == found.argmax(1)
    assert 0 < same.sum() < len(NOISE)
    error = np.abs(wanted - found).max(1)
    plain = measured([None] * len(NOISE))
    assert plain.loss({}) == Loss(0.0, 1.0, 0.0)
    assert plain.loss(INT8) == Loss(pytest.approx(100 * (1 - same.mean())), same.mean(), pytest.approx(error.mean()))
    few = plain.loss(INT8, 7)
    assert (few.agreement, few.logit_error) == (same[:7].mean(), pytest.approx(error[:7].mean()))
    # Where images have labels, those without do not count: fp32 is right with 24 of these, int8 with fewer.
    labels: list[int | None] = [*wanted.argmax(1)[:24].tolist(), *[None] * 24]
    assert measured(labels).loss(INT8).drop == pytest.approx(100 * (1 - same[:24].mean()))
    gained: list[int | None] = found.argmax(1).tolist()
    assert measured(gained).loss(INT8).drop == pytest.approx(-100 * (1 - same.mean())) != 0


def test_what_is_not_finite_is_the_worst_loss(
    calibrated: Calibrated, measured: Callable[..., Measure], tmp_path: Path
) -> None:
    broken = shutil.copytree(calibrated("int8")[0], tmp_path / "bundle")
    with_weights(broken, "blocks.1.mlp", np.nan, "bias")
    found = measured([None] * len(NOISE), int8=Bundle.open(broken)).loss(INT8)
    assert (found.drop, found.agreement) == (100, 0)
    assert np.isfinite(found.logit_error)


def test_losses_are_against_decisions_in_fp32(
    measured: Callable[..., Measure], tmp_path_factory: pytest.TempPathFactory
) -> None:
    model = random_model(WIDE, sublayers=2.0, heads=-100.0)  # decides otherwise, and is the same but for that
    other = Bundle.open(export(model, tmp_path_factory.mktemp("other"), verify=False, with_dense=True))
    found = measured([None] * len(NOISE), "fp16", fp16=other).loss({unit: Assignment("fp32") for unit in UNITS})
    assert found.agreement < 1


def test_images_of_many_are_evenly_spaced_and_keep_their_labels() -> None:
    files = [ImageFile(Path(str(number)), number % 7) for number in range(2000)]

    def preprocess(path: Path) -> np.ndarray:
        if int(path.name) % 3 == 0:
            raise InputError("cannot be read")
        return np.full((3, 1, 1), int(path.name), np.float32)

    pixels, labels = read_images(files, preprocess)
    numbers = pixels[:, 0, 0, 0].astype(int)
    assert pixels.shape == (len(labels), 3, 1, 1)
    assert 512 / 2 < len(labels) <= 512
    assert (numbers[0] < 8, numbers[-1]) == (True, 1999)
    assert np.diff(numbers).max() < 4 * 2000 / 512
    assert labels == [number % 7 for number in numbers]
    assert len(read_images(files[1:3], preprocess)[1]) == 2


@dataclass
class Pretended:
    """Losses that add up: each sub-layer in int8 costs what it is said to."""

    costs: dict[str, float]
    rest: float = 0.0
    few: dict[str, float] | None = None
    """What they seem to cost on few images."""
    errors: dict[str, float] | None = None

    def loss(self, assigned: dict[str, Assignment], most: int | None = None) -> Loss:
        int8 = [unit for unit, found in assigned.items() if found.precision == "int8"]
        costs = self.costs if most is None or self.few is None else self.few
        total = self.rest + sum(costs[unit] for unit in int8)
        return Loss(total, 1 - total / 100, sum((self.errors or costs)[unit] for unit in int8))


def search(costs: dict[str, float], bound: float, rest: float = 0.0, too_large: str = "", **more: Any) -> Search:
    int8 = {unit: Assignment("int8") for unit in costs}
    fp16 = {unit: Assignment("fp32", "too large") if unit == too_large else Assignment("fp16") for unit in costs}
    return Search(Pretended(costs, rest, **more), int8, fp16, bound, quiet)  # type: ignore[arg-type]


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


def test_sublayers_that_drop_nothing_go_by_what_they_change() -> None:
    found = search({"a": 0.0, "b": -3.0, "c": 0.0, "d": 1.0}, 9, errors={"a": 0.1, "b": 0.5, "c": 0.3, "d": 0.0})
    assert list(found.sensitivity) == ["d", "b", "c", "a"]


def test_what_was_put_back_for_little_is_taken_back() -> None:
    found = search({"a": 0.05, "b": 1.0, "c": 0.5}, bound=0.6, few={"a": 3.0, "b": 2.0, "c": 0.5})
    assert list(found.sensitivity) == ["a", "b", "c"]
    assigned = found.run()
    assert {unit: part.precision for unit, part in assigned.items()} == {"a": "int8", "b": "fp16", "c": "int8"}
    assert found.loss.drop == pytest.approx(0.55)


def test_a_bound_that_cannot_be_met_says_what_was_the_best() -> None:
    with pytest.raises(InputError, match=r"--max-drop 0.2 cannot be met: the best was a drop of 0.30 points"):
        search({"a": 1.0, "b": 2.0}, bound=0.2, rest=0.3).run()
    with pytest.raises(InputError, match=r"the best was a drop of 0.50 points, with up to all of 2 sub-layers"):
        search({"a": 1.0, "b": -0.5}, bound=0.2, rest=1.0).run()  # which b makes worse in fp16
