"""Decision parity: `adavit-run --compare`."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from cases import (
    WIDE,
    edit_weights,
    export,
    invoke,
    pictures_in,
    random_model,
    read_config,
    refusal,
    stored_files,
    tiny,
    write_config,
)

import adavit
from adavit.cli import run


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures_in(tmp_path_factory.mktemp("photos"), 10)


@pytest.fixture(scope="module")
def shifted(wide: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wide bundle, its block 1 deciding otherwise on heads, and its classes moved."""
    bundle = shutil.copytree(wide[0], tmp_path_factory.mktemp("shifted") / "bundle")
    for name, shift in (("blocks.1.head_select.mlp_head.bias", 0.5), ("head.bias", 0.01)):
        edit_weights(bundle, lambda key: key == name, lambda array: array + shift)  # noqa: B023
    return bundle


@pytest.fixture(scope="module")
def two_precisions(wide: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wide bundle with its graphs twice: as fp32, and as what calls itself fp16."""
    bundle = shutil.copytree(wide[0], tmp_path_factory.mktemp("two") / "both")
    shutil.copytree(bundle / "fp32", bundle / "fp16")
    config = read_config(bundle)
    text = json.dumps(config["precisions"]["fp32"]).replace("fp32/", "fp16/")
    config["precisions"]["fp16"] = json.loads(text)
    write_config(bundle, config)
    return bundle


SHORT = ("--iterations", 2, "--warmup", 0, "--threads", 1)


def compared(*arguments: object) -> dict:
    done = invoke(run, "--compare", *arguments, *SHORT, "--json", "-")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_a_bundle_agrees_with_itself(wide: tuple[Path, Path], photos: Path) -> None:
    report = compared(wide[0], wide[0], "--images", photos)
    assert report["free"]["flipped"] == report["replayed"]["flipped"] == 0
    assert report["free"]["identical_policies"] == report["free"]["top1_agreement"] == 1
    assert report["free"]["mean_logit_difference"] == 0
    assert (report["images"], report["accuracy"]) == (10, None)
    decided = {kind: values["decisions"] for kind, values in report["decisions"].items()}
    adapted = WIDE.depth - WIDE.keep
    assert decided == {
        "tokens": 10 * WIDE.depth * WIDE.patches, "heads": 10 * adapted * WIDE.heads, "sublayers": 10 * adapted * 2,
    }  # fmt: skip


def test_blocks_that_are_skipped(photos: Path, tmp_path: Path) -> None:
    bundle = export(random_model(WIDE, sublayers=-2.0), tmp_path)
    loaded = adavit.load(bundle, threads=1)
    images = np.stack([loaded.preprocess(path) for path in sorted(photos.iterdir())])
    assert (~loaded.run(images).policy.sublayers.any(2)).any()
    report = compared(bundle, bundle, "--images", photos)
    assert report["free"]["flipped"] == report["replayed"]["flipped"] == 0
    assert report["free"]["identical_policies"] == 1


def test_flips_are_counted_where_they_happen(wide: tuple[Path, Path], shifted: Path, photos: Path) -> None:
    report = compared(wide[0], shifted, "--images", photos)
    first, second = (adavit.load(bundle, threads=1) for bundle in (wide[0], shifted))
    images = np.stack([first.preprocess(path) for path in sorted(photos.iterdir())])
    wanted, found = first.run(images).policy, second.run(images).policy
    for kind in ("tokens", "heads", "sublayers"):
        different = (getattr(wanted, kind) != getattr(found, kind)).sum()
        share = different / report["decisions"][kind]["decisions"]
        assert report["free"]["flipped_by_kind"][kind] == pytest.approx(share)
    replayed = report["replayed"]
    assert replayed["flipped_by_kind"]["heads"] > 0
    assert replayed["flipped_by_kind"]["tokens"] == replayed["flipped_by_kind"]["sublayers"] == 0
    assert [share > 0 for share in replayed["flipped_by_block"]["heads"]] == [False, True, False]
    assert replayed["mean_logit_difference"] == pytest.approx(0.01, abs=1e-4)
    assert report["decisions"]["heads"]["logit_drift_max"] == pytest.approx(0.5, abs=1e-4)
    assert report["decisions"]["heads"]["largest_flipped_margin"] <= 0.5
    same = [all((getattr(wanted, k)[i] == getattr(found, k)[i]).all() for k in ("tokens", "heads")) for i in range(10)]
    assert report["free"]["identical_policies"] <= np.mean(same)


def test_margins_are_cumulative_shares(wide: tuple[Path, Path], photos: Path) -> None:
    for kind in compared(wide[0], wide[0], "--images", photos)["decisions"].values():
        shares = list(kind["margins_below"].values())
        assert shares == sorted(shares) and shares[0] >= 0 and 0 < shares[-1] <= 1


def test_labelled_folders_give_accuracy(tiny_bundle: Path, labelled: Path) -> None:
    report = compared(tiny_bundle, tiny_bundle, "--images", labelled)
    assert report["labelled"] == 3
    assert report["accuracy"]["first"] == report["accuracy"]["second"] == report["accuracy"]["replayed"]
    assert (report["lost"], report["gained"]) == (0, 0)
    done = invoke(run, "--compare", tiny_bundle, tiny_bundle, "--images", labelled, *SHORT)
    assert "images with the same policy" in done.stdout and "accuracy" in done.stdout
    assert "3, 3 of them labelled" in done.stdout


def test_a_row_for_each_bundle(wide: tuple[Path, Path], shifted: Path, photos: Path, tmp_path: Path) -> None:
    fp32 = shutil.copytree(wide[0], tmp_path / "fp32")
    without = shutil.copytree(wide[0], tmp_path / "without")
    config = read_config(without)
    del config["precisions"]["fp32"]["dense"]
    write_config(without, config)
    report = compared(fp32, shifted, without, "--images", photos, "--batch", 2)
    rows = report["bundles"]
    assert [row["name"] for row in rows] == ["fp32", "bundle", "without"]
    assert [row["path"] for row in rows] == [str(fp32), str(shifted), str(without)]
    assert {(row["precision"], row["backend"], row["accuracy"]) for row in rows} == {("fp32", "onnxruntime", None)}
    sizes = [sum((one / file).stat().st_size for file in stored_files(one).values()) for one in (fp32, without)]
    assert [row["bytes"] for row in rows] == [sizes[0], sizes[0], sizes[1]]
    first = rows[0]
    assert first["top1_agreement"] is first["flipped"] is rows[2]["speedup"] is rows[2]["dense_latency_ms"] is None
    for row in rows:
        assert row["ms_per_image"] == row["latency_ms"]["p50"] / 2 > 0
        over_first = first["dense_latency_ms"]["p50"] / row["latency_ms"]["p50"]
        assert row["speedup_over_first_dense"] == pytest.approx(over_first)
    for row in rows[:2]:
        assert row["speedup"] == pytest.approx(row["dense_latency_ms"]["p50"] / row["latency_ms"]["p50"])
    assert (report["batch"], report["threads"], report["parallel"], report["runs"]) == (2, 1, "auto", 2)
    assert [one["free"]["flipped"] > 0 for one in report["compared"]] == [True, False]
    assert [row["flipped"] for row in rows[1:]] == [one["free"]["flipped"] for one in report["compared"]]
    assert "free" not in report  # which is of a pair
    assert report["advice"]["ship"] is None and "too few" in report["advice"]["lines"][0]


def test_a_pair_has_its_numbers_at_the_top(wide: tuple[Path, Path], shifted: Path, photos: Path) -> None:
    report = compared(wide[0], shifted, "--images", photos)
    assert {key: report[key] for key in report["compared"][0]} == report["compared"][0]
    assert set(report["compared"][0]) == {
        "first", "second", "backend", "images", "free", "replayed", "decisions", "accuracy", "labelled", "lost",
        "gained",
    }  # fmt: skip


def test_the_table(wide: tuple[Path, Path], shifted: Path, photos: Path, tmp_path: Path) -> None:
    fp32 = shutil.copytree(wide[0], tmp_path / "fp32")
    arguments = (fp32, shifted, fp32, "--compare", "--images", photos, "--warmup", 0, "--threads", 1)
    done = invoke(run, *arguments, "--iterations", 10)
    assert done.exit_code == 0, done.output
    header, *rows = done.stdout.splitlines()[:4]
    assert header.split()[:5] == ["bundle", "precision", "MB", "ms", "speedup"]
    assert "over fp32 (1)'s twin" in header
    assert [row.split()[:3] for row in rows[::2]] == [["fp32", "(1)", "fp32"], ["fp32", "(3)", "fp32"]]
    assert "weights and graphs on disk" in done.stdout
    assert "advice      ship " in done.stdout
    assert "by block" not in done.stdout  # which is of a pair
    done = invoke(run, *arguments, "--iterations", 10, "--no-dense")
    assert done.exit_code == 0, done.output
    assert done.stdout.split("\n")[0].split()[-2:] == ["class", "flipped"]
    assert "speedup" not in done.stdout.split("advice")[0] and "dense twin was run" not in done.stdout


def test_every_bundle_is_prepared(wide: tuple[Path, Path], photos: Path) -> None:
    both = (wide[0], wide[0], "--images", photos)
    assert all(row["prepared"] > 0 for row in compared(*both)["bundles"])
    assert [row["prepared"] for row in compared(*both, "--no-specialise")["bundles"]] == [0, 0]


def test_each_precision_of_a_bundle_is_a_row(wide: tuple[Path, Path], two_precisions: Path, photos: Path) -> None:
    def rows(*arguments: object) -> list[tuple[str, str]]:
        report = compared(*arguments, "--images", photos, "--no-dense", "--no-specialise")
        assert {row["flipped"] for row in report["bundles"][1:]} == {0}
        return [(row["name"], row["precision"]) for row in report["bundles"]]

    assert rows(two_precisions) == [("both fp32", "fp32"), ("both fp16", "fp16")]
    assert rows(wide[0], two_precisions) == [("bundle fp32", "fp32"), ("both fp32", "fp32"), ("both fp16", "fp16")]
    assert rows(wide[0], two_precisions, "--precision", "fp32") == [("bundle", "fp32"), ("both", "fp32")]
    few = invoke(run, "--compare", two_precisions, "--images", photos, "--precision", "fp16")
    assert "a comparison takes two bundles or more, or one in several precisions" in refusal(few, 2)
    none = invoke(run, "--compare", wide[0], two_precisions, "--images", photos, "--precision", "fp16")
    assert "is not in precision 'fp16'; it has fp32" in refusal(none)


def test_names_tell_bundles_apart(wide: tuple[Path, Path], photos: Path, tmp_path: Path) -> None:
    copies = [shutil.copytree(wide[0], tmp_path / name / "bundle") for name in "ab"]
    names = [row["name"] for row in compared(*copies, "--images", photos)["bundles"]]
    assert names == list(map(str, copies))


def test_what_cannot_be_compared(
    wide: tuple[Path, Path], tiny_bundle: Path, photos: Path, labelled: Path, tmp_path: Path
) -> None:
    line = refusal(invoke(run, "--compare", wide[0], wide[0], tiny_bundle, "--images", photos))
    assert "different models" in line
    assert "give --images" in refusal(invoke(run, "--compare", wide[0], wide[0]), 2)
    for few in ((), (wide[0],)):
        assert "takes two" in refusal(invoke(run, "--compare", *few, "--images", photos), 2)
    assert "add --compare" in refusal(invoke(run, wide[0], tiny_bundle, "--images", photos), 2)
    for option in (("--budget", 0.5), ("--top", 2), ("--record-policy", tmp_path / "policy.npz")):
        message = refusal(invoke(run, "--compare", wide[0], wide[0], "--images", photos, *option), 2)
        assert f"--compare runs the trained policies, without {option[0]}" in message
    (tmp_path / "broken.png").write_bytes(b"")
    assert "can be read" in refusal(invoke(run, "--compare", wide[0], wide[0], "--images", tmp_path))


def test_a_twin_that_is_asked_for_has_to_be_there(checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    bundle = export(checkpoint, tmp_path, with_dense=False)
    message = refusal(invoke(run, "--compare", bundle, bundle, "--images", photos, "--dense", *SHORT))
    assert "exported without its dense twin" in message


def test_models_without_some_policies(tmp_path: Path, photos: Path) -> None:
    bundle = export(random_model(tiny(head_policy=False, sublayer_policy=False)), tmp_path)
    assert set(compared(bundle, bundle, "--images", photos)["decisions"]) == {"tokens"}
