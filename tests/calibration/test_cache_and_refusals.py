"""The calibration cache, mixed precision, and what is refused: one line, and no half-written bundle."""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import (
    KEEP_ALL,
    WIDE,
    invoke,
    picture,
    pictures_in,
    quiet,
    random_images,
    random_model,
    read_config,
    refusal,
    save,
    tiny,
    with_weights,
)
from PIL import Image
from safetensors.numpy import load_file

import adavit
from adavit.calibration.cache import load_ranges
from adavit.calibration.convert import Assignment, assign
from adavit.calibration.linear import Sublayer, sublayers_of
from adavit.calibration.mixed import Loss, Measure, Search
from adavit.calibration.options import CalibrationOptions
from adavit.calibration.ranges import Ranges
from adavit.calibration.recording import DispatchCount
from adavit.cli import export as command
from adavit.datasets.image_files import ImageFile, read_images
from adavit.errors import InputError, OptionError
from adavit.runtime import Runtime

Exported = Callable[..., tuple[Path, dict]]


def precisions_of(bundle: Path, precision: str) -> dict[str, str]:
    """What the weights of each sub-layer are stored in."""
    tensors = load_file(bundle / precision / "model.safetensors")
    names = {"float32": "fp32", "float16": "fp16", "int8": "int8"}
    depth = read_config(bundle)["architecture"]["depth"]
    parts = {"attention": "attn.proj", "mlp": "mlp.fc2"}
    return {
        f"blocks.{block}.{part}": names[tensors[f"blocks.{block}.{layer}.weight"].dtype.name]
        for block in range(depth)
        for part, layer in parts.items()
    }


def test_a_cache_serves_other_precisions_and_methods(
    exported: Exported, busy: Path, converted: Path, cache: Path
) -> None:
    other, report = exported(busy, "int8", calibration_cache=cache, method="percentile")
    found = report["calibration"]["int8"]
    assert (found["reused"], found["method"], found["images"]) == (True, "percentile", 32)
    scales, wanted = (load_file(b / "int8" / "model.safetensors") for b in (other, converted))
    smaller = [name for name in scales if name.endswith("input_scale") and scales[name] < wanted[name]]
    assert len(smaller) > 4 * WIDE.depth
    assert all(np.array_equal(scales[name], wanted[name]) for name in wanted if not name.endswith("input_scale"))


def test_what_a_cache_holds(cache: Path) -> None:
    ranges, origin = load_ranges(cache)
    assert set(origin) == {"model", "images", "samples", "seed"}
    assert ranges.images == 32
    assert ranges.seen["blocks.0.attention"].samples == 32
    assert set(ranges.histograms["blocks.1.mlp"]) == {"blocks.1.fc1", "blocks.1.fc2"}
    assert len(ranges.histograms["dense"]) == 4 * WIDE.depth
    for sublayer in sublayers_of(WIDE):
        found = ranges.histograms[sublayer.name].values()
        assert min(histogram.threshold("max") for histogram in found) > 0
        assert ranges.peaks[sublayer.name] >= max(histogram.peak for histogram in found)


def test_a_cache_serves_the_same_images_samples_and_seed_alone(exported: Exported, tmp_path: Path) -> None:
    arch = tiny(depth=2, head_policy=False)
    source = save(random_model(arch, sublayers=2.0), tmp_path / "model.safetensors")
    (tmp_path / "pictures").mkdir()
    pictures, cache = pictures_in(tmp_path / "pictures", 18), tmp_path / "ranges.npz"

    def reused(*images: Path, samples: int = 64, seed: int = 0) -> bool:
        """Whether the cache was; either way it is of what was asked for then."""
        given = {"calibration_images": images, "calibration_cache": cache, "samples": samples, "seed": seed}
        report = exported(source, "fp16", **given)[1]["calibration"]["fp16"]
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


def test_a_cache_of_another_model_is_refused(busy: Path, cache: Path, tmp_path: Path) -> None:
    other = save(random_model(WIDE, seed=3), tmp_path / "other.safetensors")
    for source, more in ((other, ()), (busy, ("--mean", 0.5, 0.5, 0.5)), (busy, ("--no-dense",))):
        line = refused(tmp_path, source, "--precision", "int8", "--calibration-cache", cache, *more)
        assert "calibrated for another model" in line and "--calibration-cache" in line


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "packed", "version", "bins", "rows", "types"])
def test_a_damaged_cache_is_refused(cache: Path, busy: Path, tmp_path: Path, damage: str) -> None:
    cache = Path(shutil.copy(cache, tmp_path / "cache.npz"))
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
    images, cached = ("--calibration-images", pictures), ("--calibration-cache", tmp_path / "cache.npz")
    assert "--precision mixed" in refused(tmp_path, busy, "--precision", "fp32,mixed", *cached, code=2)
    assert "'int4' is none of" in refused(tmp_path, busy, "--precision", "fp32,int4", *images, code=2)
    assert "given twice" in refused(tmp_path, busy, "--precision", "fp32,fp32", code=2)
    for given in ((), ("int4",), "int8", ["int8"]):
        with pytest.raises(OptionError, match="choose from fp32, fp16, int8, mixed"):
            CalibrationOptions(given).check()  # type: ignore[arg-type]


def test_starved_sublayers_are_named_and_stay(exported: Exported, pictures: Path, tmp_path: Path) -> None:
    model = random_model(WIDE, sublayers=2.0)
    model.blocks[1].layer_select.mlp_head.bias.data[1] = -50.0  # its MLP never runs
    source = save(model, tmp_path / "model.safetensors")
    bundle, report = exported(source, "int8", calibration_images=(pictures,))
    found = report["calibration"]["int8"]
    assert found["kept_higher"] == {"blocks.1.mlp": {"precision": "fp32", "reason": "no image reaches it"}}
    stored = precisions_of(bundle, "int8")
    assert stored.pop("blocks.1.mlp") == "fp32" and set(stored.values()) == {"int8"}
    assert found["sublayers"]["blocks.1.mlp"] == {"samples": 0, "tokens": 0, "precision": "fp32"}
    images, runtime = random_images(WIDE, 2), adavit.load(bundle, threads=1)
    assert np.isfinite(runtime.run_dense(images)).all()  # the twin runs it, in fp32 too


def test_what_fp16_cannot_hold_stays_in_fp32(exported: Exported, pictures: Path, tmp_path: Path) -> None:
    arch = tiny(depth=2, head_policy=False, sublayer_policy=False)
    model = random_model(arch)
    with torch.no_grad():  # before the GELU, which makes 0 of them
        model.blocks[0].mlp.fc1.bias[0], model.blocks[1].mlp.fc1.bias[0] = -40_000, -30_000
    source, cache = save(model, tmp_path / "model.safetensors"), tmp_path / "ranges.npz"
    for images in ((pictures,), ()):  # measured, then from the cache
        given = {"calibration_images": images, "calibration_cache": cache}
        bundle, report = exported(source, "fp16", "int8", **given)
        kept = report["calibration"]["fp16"]["kept_higher"]
        assert list(kept) == ["blocks.0.mlp"] and kept["blocks.0.mlp"]["precision"] == "fp32"
        assert re.fullmatch(r"its values reach (40|39)\d{3}, too near .*", kept["blocks.0.mlp"]["reason"])
        stored = precisions_of(bundle, "fp16")
        assert stored.pop("blocks.0.mlp") == "fp32" and set(stored.values()) == {"fp16"}
        assert report["calibration"]["int8"]["kept_higher"] == {}  # whose sums are fp32's
        assert set(precisions_of(bundle, "int8").values()) == {"int8"}


@pytest.mark.parametrize(
    ("precision", "reached", "peak", "found", "reason"),
    [
        ("int8", 4, 9.0, "int8", None),
        ("int8", 3, 9.0, "fp16", "only 3 of the images reach it"),
        ("int8", 1, 4e4, "fp32", "its values reach 40000, too near fp16's end"),
        ("int8", 9, 4e4, "int8", None),
        ("int8", 0, 0.0, "fp32", "no image reaches it"),
        ("fp16", 1, 9.0, "fp16", None),
        ("fp16", 0, 0.0, "fp32", "no image reaches it"),
    ],
)
def test_the_precision_that_calibration_allows(
    precision: str, reached: int, peak: float, found: str, reason: str | None
) -> None:
    few, every = Sublayer(1, "mlp"), sublayers_of(WIDE)
    seen = {sublayer.name: DispatchCount(reached if sublayer == few else 9, 99) for sublayer in every}
    ranges = Ranges(9, seen, peaks={**{sublayer.name: 1.0 for sublayer in every}, few.name: peak})
    assigned = assign(WIDE, ranges, precision)
    assert assigned.pop(few) == Assignment(found, reason)
    assert assigned == {sublayer: Assignment(precision) for sublayer in every if sublayer != few}


def test_mixed_precision_meets_its_bound(exported: Exported, busy: Path, pictures: Path, cache: Path) -> None:
    drops = []
    for bound in (100.0, 0.0):
        given = {"calibration_images": (pictures,), "calibration_cache": cache, "max_drop": bound}
        bundle, report = exported(busy, "mixed", "fp32", **given)
        assert list(report["precisions"]) == ["mixed", "fp32"]
        found = report["calibration"]["mixed"]
        assert len(found["sensitivity"]) == 2 * WIDE.depth
        assert found["loss"]["drop"] <= bound
        drops.append(len(found["kept_higher"]))
        assert {name: part["precision"] for name, part in found["sublayers"].items()} == precisions_of(bundle, "mixed")
    assert drops[0] == 0 <= drops[1]
    images = random_images(WIDE, 2)
    assert np.isfinite(adavit.load(bundle, threads=1).run_dense(images)).all()


def test_what_is_put_back_is_what_the_bundle_holds(exported: Exported, tmp_path: Path) -> None:
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
    bundle, report = exported(source, "mixed", calibration_images=(images,), max_drop=5.0)
    found = report["calibration"]["mixed"]
    assert found["kept_higher"] == {"blocks.1.mlp": {"precision": "fp16", "reason": "put back for accuracy"}}
    assert next(iter(found["sensitivity"])) == "blocks.1.mlp"
    assert found["sensitivity"]["blocks.1.mlp"]["drop"] > 5 >= found["loss"]["drop"]
    stored = precisions_of(bundle, "mixed")
    assert stored == {name: "fp16" if name == "blocks.1.mlp" else "int8" for name in stored}
    assert [path.name for path in bundle.iterdir() if path.is_dir()] == ["mixed"]  # and nothing of what was tried


NOISE = random_images(WIDE, 48, seed=3)
INT8 = {sublayer: Assignment("int8") for sublayer in sublayers_of(WIDE)}


def test_a_loss_is_what_a_precision_changes(converted: Path) -> None:
    runtimes = {p: adavit.load(converted, threads=1, precision=p, specialise=False) for p in ("fp32", "int8")}
    wanted, found = (runtime.run(NOISE).logits for runtime in runtimes.values())
    same = wanted.argmax(1) == found.argmax(1)
    assert 0 < same.sum() < len(NOISE)
    error = np.abs(wanted - found).max(1)

    def make(assigned: Mapping[Sublayer, Assignment]) -> Runtime:
        return runtimes["int8" if assigned else "fp32"]

    plain = Measure(make, wanted, NOISE, [None] * len(NOISE))
    assert plain.loss({}) == Loss(0.0, 1.0, 0.0)
    assert plain.loss(INT8) == Loss(pytest.approx(100 * (1 - same.mean())), same.mean(), pytest.approx(error.mean()))
    few = plain.loss(INT8, 8)
    assert (few.agreement, few.logit_error) == (same[:8].mean(), pytest.approx(error[:8].mean()))
    # Where images have labels, those without do not count: fp32 is right with 24 of these, int8 with fewer.
    labels: list[int | None] = [*wanted.argmax(1)[:24].tolist(), *[None] * 24]
    assert Measure(make, wanted, NOISE, labels).loss(INT8).drop == pytest.approx(100 * (1 - same[:24].mean()))
    gained: list[int | None] = found.argmax(1).tolist()
    assert Measure(make, wanted, NOISE, gained).loss(INT8).drop == pytest.approx(-100 * (1 - same.mean())) != 0


def test_what_is_not_finite_is_the_worst_loss(converted: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(converted, tmp_path / "broken")
    with_weights(broken, "blocks.1.mlp.fc1.bias", np.nan, "int8")
    runtime = adavit.load(broken, threads=1, precision="int8", specialise=False)
    wanted = np.zeros((len(NOISE), WIDE.classes), np.float32)
    found = Measure(lambda _: runtime, wanted, NOISE, [None] * len(NOISE)).loss(INT8)
    assert (found.drop, found.agreement) == (100, 0)
    assert np.isfinite(found.logit_error)


def test_images_of_many_are_evenly_spaced_and_keep_their_labels() -> None:
    files = [ImageFile(Path(str(number)), number % 7) for number in range(2000)]

    def preprocess(path: Path) -> np.ndarray:
        if int(path.name) % 3 == 0:
            raise InputError("cannot be read")
        return np.full((3, 1, 1), int(path.name), np.float32)

    pixels, labels = read_images(files, preprocess, 512)
    numbers = pixels[:, 0, 0, 0].astype(int)
    assert pixels.shape == (len(labels), 3, 1, 1)
    assert 512 / 2 < len(labels) <= 512
    assert (numbers[0] < 8, numbers[-1]) == (True, 1999)
    assert np.diff(numbers).max() < 4 * 2000 / 512
    assert labels == [number % 7 for number in numbers]
    assert len(read_images(files[1:3], preprocess, 512)[1]) == 2


@dataclass
class Pretended:
    """Losses that add up: each sub-layer in int8 costs what it is said to."""

    costs: dict[str, float]
    rest: float = 0.0
    few: dict[str, float] | None = None
    """What they seem to cost on few images."""
    errors: dict[str, float] | None = None

    def loss(self, assigned: dict[Sublayer, Assignment], most: int | None = None) -> Loss:
        int8 = [sublayer.part for sublayer, found in assigned.items() if found.precision == "int8"]
        costs = self.costs if most is None or self.few is None else self.few
        total = self.rest + sum(costs[part] for part in int8)
        return Loss(total, 1 - total / 100, sum((self.errors or costs)[part] for part in int8))


def search(costs: dict[str, float], bound: float, rest: float = 0.0, too_large: str = "", **more: object) -> Search:
    """A search over sub-layers of these names."""
    names = [Sublayer(0, name) for name in costs]
    int8 = {name: Assignment("int8") for name in names}
    fp16 = {name: Assignment("fp32", "too large") if name.part == too_large else Assignment("fp16") for name in names}
    return Search(Pretended(costs, rest, **more), int8, fp16, bound, quiet)  # type: ignore[arg-type]


def order(found: Search) -> list[str]:
    return [sublayer.part for sublayer in found.sensitivity]


def run(found: Search) -> dict[str, Assignment]:
    return {sublayer.part: assignment for sublayer, assignment in found.run().items()}


def test_the_most_sensitive_are_put_back_first_and_no_more_than_needed() -> None:
    found = search({"a": 0.1, "b": 2.0, "c": 0.5, "d": 1.0}, bound=0.7)
    assert order(found) == ["b", "d", "c", "a"]
    assigned = run(found)
    assert [unit for unit, part in assigned.items() if part.precision == "fp16"] == ["b", "d"]
    assert found.loss.drop == pytest.approx(0.6)
    assert not [part for part in run(search({"a": 0.1}, bound=1)).values() if part.precision != "int8"]


def test_what_fp16_cannot_hold_is_put_back_to_fp32() -> None:
    assigned = run(search({"a": 0.1, "b": 2.0, "c": 2.0}, bound=0.7, too_large="b"))
    assert assigned["b"] == Assignment("fp32", "put back for accuracy; too large")
    assert assigned["c"] == Assignment("fp16", "put back for accuracy")
    assert assigned["a"] == Assignment("int8")


def test_sublayers_that_drop_nothing_go_by_what_they_change() -> None:
    found = search({"a": 0.0, "b": -3.0, "c": 0.0, "d": 1.0}, 9, errors={"a": 0.1, "b": 0.5, "c": 0.3, "d": 0.0})
    assert order(found) == ["d", "b", "c", "a"]


def test_what_was_put_back_for_little_is_taken_back() -> None:
    found = search({"a": 0.05, "b": 1.0, "c": 0.5}, bound=0.6, few={"a": 3.0, "b": 2.0, "c": 0.5})
    assert order(found) == ["a", "b", "c"]
    assigned = run(found)
    assert {unit: part.precision for unit, part in assigned.items()} == {"a": "int8", "b": "fp16", "c": "int8"}
    assert found.loss.drop == pytest.approx(0.55)


def test_a_bound_that_cannot_be_met_says_what_was_the_best() -> None:
    with pytest.raises(InputError, match=r"`max_drop=0.2` cannot be met: the best was a drop of 0.30 points"):
        search({"a": 1.0, "b": 2.0}, bound=0.2, rest=0.3).run()
    with pytest.raises(InputError, match=r"the best was a drop of 0.50 points, with up to all of 2 sub-layers"):
        search({"a": 1.0, "b": -0.5}, bound=0.2, rest=1.0).run()  # which b makes worse in fp16
