"""`adavit.export_bundle` and `adavit.compare`: what the commands do, from Python."""

import inspect
import json
import logging
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from cases import WIDE, invoke, pictures_in, python, random_model, read_config

import adavit
from adavit import cli
from adavit.console.options.run import OPERATING
from adavit.console.options.single import SINGLE
from adavit.tensorrt.options import BuildOptions

OF_BUNDLES = {
    "single_file", "output", "with_dense", "opset", "license", "dataset", "max_drop",
    *(field.name for field in fields(BuildOptions)),
}  # fmt: skip
"""Options of bundles alone."""
QUICK: dict[str, Any] = {"iterations": 2, "warmup": 0, "threads": 1}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures_in(tmp_path_factory.mktemp("photos"), 20)


@pytest.fixture(scope="module")
def exported(busy: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict, list]:
    """A bundle of two precisions with budgets, its report, and what was told of progress."""
    bundle, told = tmp_path_factory.mktemp("exported") / "bundle", list[tuple[str, float]]()
    report = adavit.export_bundle(
        str(busy), str(bundle), precision="fp32,int8", calibration_images=photos, budgets=[np.float32(0.75)], threads=1,
        budget_images=20, progress=lambda stage, share: told.append((stage, share)),
    )  # fmt: skip
    return bundle, report, told


def without_seconds(report: dict[str, Any]) -> dict[str, Any]:
    changing = {"seconds", "bundle", "cache"}
    return {
        key: without_seconds(value) if isinstance(value, dict) else value
        for key, value in report.items()
        if key not in changing
    }


def test_it_makes_what_the_command_makes(exported: tuple[Path, dict, list], busy: Path, photos: Path) -> None:
    bundle, report, _ = exported
    other = bundle.with_name("other")
    done = invoke(
        cli.export, busy, "--output", other, "--precision", "fp32,int8", "--calibration-images", photos,
        "--budgets", float(np.float32(0.75)), "--budget-images", 20, "--threads", 1, "--json", "-",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert without_seconds(json.loads(done.stdout)) == without_seconds(json.loads(json.dumps(report)))
    assert {path.relative_to(bundle): path.read_bytes() for path in bundle.rglob("*") if path.is_file()} == {
        path.relative_to(other): path.read_bytes() for path in other.rglob("*") if path.is_file()
    }


def test_its_report(exported: tuple[Path, dict, list]) -> None:
    bundle, report, _ = exported
    assert report["bundle"] == str(bundle)
    assert list(report["precisions"]) == ["fp32", "int8"]
    assert report["verified"]["decisions"] > 0
    points = json.loads(json.dumps(report["budgets"]["points"]))
    assert points == read_config(bundle)["budgets"]["points"]
    runtime = adavit.load(bundle, threads=1, precision="int8", budget=0.75)
    assert runtime.graphs.precision == "int8"


def test_progress_is_told(exported: tuple[Path, dict, list]) -> None:
    told = exported[2]
    assert all(0 <= share <= 1 for _, share in told)
    stages = list(dict.fromkeys(stage for stage, _ in told))
    assert stages[0] == "loading the checkpoint"
    assert {"verifying", "measuring ranges", "finding operating points"} <= set(stages)


def test_its_precisions_are_compared(exported: tuple[Path, dict, list], photos: Path) -> None:
    told: list[str] = []
    report = adavit.compare(
        exported[0], sorted(photos.iterdir()), progress=lambda stage, _: told.append(stage), **QUICK
    )
    assert [row["precision"] for row in report["bundles"]] == ["fp32", "int8"]
    assert report["images"] == 20
    assert report["advice"]["lines"]
    assert {"loading the bundle", "comparing", "measuring"} <= set(told)
    done = invoke(
        cli.run, "--compare", exported[0], "--images", photos, "--iterations", 2, "--warmup", 0, "--threads", 1,
        "--json", "-",
    )  # fmt: skip
    command = json.loads(done.stdout)
    assert (set(command), command["free"]) == (set(report), report["free"])


def test_a_generator_of_bundles_and_one_precision(exported: tuple[Path, dict, list], photos: Path) -> None:
    paths = (path for path in (exported[0], exported[0]))
    report = adavit.compare(paths, photos, precision="int8", dense=False, specialise=False, batch=np.int64(2), **QUICK)
    assert [row["precision"] for row in report["bundles"]] == ["int8", "int8"]
    assert report["free"]["flipped"] == 0


def parameters(function: Callable[..., Any]) -> dict[str, Any]:
    return {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}


@pytest.mark.parametrize(
    ("function", "command", "own", "left_out"),
    [
        (adavit.export_bundle, cli.export, {"checkpoint"}, {"source", "check", "against", "single_file", *SINGLE}),
        (adavit.export_single_file, cli.export, {"output"}, {"check", "against", *OF_BUNDLES}),
        (adavit.compare, cli.run, set(), {"compare", "top", *OPERATING}),
    ],
)
def test_the_words_are_the_commands(
    function: Callable[..., Any], command: click.Command, own: set[str], left_out: set[str]
) -> None:
    options = {option.name: option.default for option in command.params if option.name not in {*left_out, "version"}}
    options["precision"] = options.pop("precisions", options.get("precision"))
    del options["json_file"]
    words = parameters(function)
    assert set(words) == set(options) | own | {"progress"}
    for name, default in options.items():
        if words[name] not in (inspect.Parameter.empty, ()) and isinstance(default, str | float | int | bool):
            assert words[name] == default, name


def ranges(command: click.Command) -> list[tuple[str, float]]:
    """Values just beyond the bounds of a command's numbers."""
    found = []
    for option in command.params:
        if isinstance(option.type, click.IntRange | click.FloatRange):
            found += [] if option.type.min is None else [(option.name or "", option.type.min - 1)]
            found += [] if option.type.max is None else [(option.name or "", option.type.max + 1)]
    return found


@pytest.mark.parametrize(("name", "value"), ranges(cli.export))
def test_numbers_have_the_commands_bounds(name: str, value: float, busy: Path, tmp_path: Path) -> None:
    given: Any = [value] * 3 if name in ("mean", "std") else value
    others = {"target": "tensorrt"} if name in ("workspace", "builder_optimization_level", "max_batch", "jobs") else {}
    with pytest.raises(adavit.InputError, match=f"{name} is .*expected a"):
        if name in SINGLE:
            adavit.export_single_file(busy, tmp_path / "file.onnx", **{name: given})
        else:
            adavit.export_bundle(busy, tmp_path / "bundle", **{name: given}, **others)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "int4"}, "`precision` is ('int4',): choose from fp32, fp16, int8, mixed"),
        ({"precision": ["fp32", "fp32"]}, "`precision` names one twice"),
        ({"precision": 8}, "precision is 8: expected a text such as 'fp32,int8', or a sequence of names"),
        ({"precision": ()}, "`precision` is ()"),
        ({"precision": "int8"}, "needs `calibration_images`, or a `calibration_cache`"),
        ({"calibration_images": 5}, "calibration_images is 5: expected a path, or a sequence of paths"),
        ({"calibration_images": [None]}, "calibration_images is None: expected a path"),
        ({"calibration_images": "photos"}, "give a `precision` or leave out `calibration_images`"),
        ({"seed": 1}, "nothing is calibrated in fp32, give a `precision` or leave out `seed`"),
        ({"budgets": "0.3,0.5"}, "budgets is '0.3,0.5': expected a share of the dense MACs, or a sequence of them"),
        ({"budgets": ["0.3"]}, "`budgets`: '0.3' is no share of the dense MACs"),
        ({"budgets": 0.3}, "`budgets` needs `calibration_images`"),
        ({"mean": "0.5"}, "mean is '0.5': expected three numbers"),
        ({"mean": (0.5, 0.5)}, "mean is (0.5, 0.5): expected three numbers"),
        ({"std": (0.5, 0.5, 0)}, "std is 0: expected a number above 0 to 1000"),
        ({"opset": "20"}, "opset '20' is not supported; choose 17 to 23"),
        ({"verify": 1}, "verify is 1: expected True or False"),
        ({"labels": 3}, "labels is 3: expected a path"),
        ({"method": "best"}, "method is 'best': choose from entropy, max, percentile"),
        ({"threads": "2"}, "threads is '2': expected a whole number"),
        ({"target": "cuda"}, "target is 'cuda': choose from tensorrt, tensorrt-rtx"),
        ({"target": 1}, "target is 1: expected a name, or a sequence of names"),
        ({"target": "tensorrt-rtx", "compute_capability": "86"}, "expected numbers such as (86, 120)"),
        ({"jobs": 2}, "options for building TensorRT engines without a `target`; add one"),
        ({"progress": "bar"}, "progress is 'bar': expected a function of a stage and a share"),
    ],
)  # fmt: skip
def test_options_that_cannot_be_exported(options: dict[str, Any], message: str, busy: Path, tmp_path: Path) -> None:
    with pytest.raises(adavit.InputError) as caught:
        adavit.export_bundle(busy, tmp_path / "bundle", **options)
    assert message in str(caught.value)
    assert "--" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "int4"}, "precision is 'int4': choose from fp32, fp16, int8, mixed"),
        ({"precision": ("fp32",)}, "precision is ('fp32',): choose from"),
        ({"batch": 0}, "batch is 0: expected a whole number from 1 to 4096"),
        ({"threads": "2"}, "threads is '2': expected a whole number"),
        ({"parallel": "both"}, "parallel is 'both': choose from auto, operators, samples"),
        ({"seconds": 1, "iterations": 2}, "give `iterations` or `seconds`, not both"),
        ({"seconds": float("nan")}, "seconds is nan: expected a number from 0.01"),
        ({"dense": "yes"}, "dense is 'yes': expected True or False"),
        ({"provider": 3}, "provider is 3: expected a name"),
        ({"images": ()}, "a comparison measures on images; give `images`"),
        ({"images": 3}, "images is 3: expected a path, or a sequence of paths"),
        ({"bundles": 3}, "bundles is 3: expected a path, or a sequence of paths"),
        ({"bundles": ()}, "a comparison takes two bundles or more, or one in several precisions"),
    ],
)  # fmt: skip
def test_options_that_cannot_be_compared(options: dict[str, Any], message: str, tiny_bundle: Path) -> None:
    given = {"bundles": [tiny_bundle] * 2, "images": "photos", **options}
    with pytest.raises(adavit.InputError) as caught:
        adavit.compare(given.pop("bundles"), given.pop("images"), **given)
    assert message in str(caught.value)


def test_an_unknown_backend(exported: tuple[Path, dict, list], photos: Path) -> None:
    with pytest.raises(adavit.BackendError, match=r"unknown backend 'cuda'; choose one of .*give `backend='onnxr"):
        adavit.compare(exported[0], photos, backend="cuda", **QUICK)


MISSING = """
import sys
sys.modules[sys.argv[1]] = None
import adavit
assert adavit.export_bundle and adavit.compare
try:
    adavit.export_bundle("demo", sys.argv[2])
except adavit.AdaViTError as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize("package", ["torch", "safetensors"])
def test_a_package_that_is_missing(package: str, tmp_path: Path) -> None:
    done = python(MISSING, package, tmp_path / "bundle")
    hint = "pip install 'adavit[export]' (in a clone: pip install '.[export]')"
    assert done.stdout == f"AdaViTError {package} is not installed; run: {hint}\n", done.stderr


def test_a_message_in_both_ways(busy: Path, tmp_path: Path, tiny_bundle: Path, photos: Path) -> None:
    """Errors name options as their reader gives them."""
    both: tuple[tuple[Callable[[], object], tuple[object, ...], str, str], ...] = (
        (
            lambda: adavit.export_bundle(busy, tiny_bundle),
            (cli.export, busy, "--output", tiny_bundle),
            "already there; give `force=True` to replace it",
            "already there; give --force to replace it",
        ),
        (
            lambda: adavit.export_bundle(busy, tmp_path / "new", precision="fp32,int8"),
            (cli.export, busy, "--output", tmp_path / "new", "--precision", "fp32,int8"),
            "`precision` fp32,int8 needs `calibration_images`, or a `calibration_cache`",
            "--precision fp32,int8 needs --calibration-images, or a --calibration-cache",
        ),
        (
            lambda: adavit.load(tiny_bundle, precision="int8"),
            (cli.run, tiny_bundle, "--precision", "int8"),
            "export it again with that `precision`",
            "export it again with that --precision",
        ),
    )
    for call, command, in_python, in_flags in both:
        with pytest.raises(adavit.AdaViTError) as caught:
            call()
        assert in_python in str(caught.value)
        assert in_flags in invoke(*command).stderr  # type: ignore[arg-type]


def test_a_warning_in_both_ways(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from adavit.model import save_safetensors

    checkpoint = tmp_path / "noted.safetensors"
    save_safetensors(random_model(WIDE), checkpoint, {"classes": json.dumps(["ant", "bee"])})
    with caplog.at_level(logging.WARNING):
        adavit.export_bundle(checkpoint, tmp_path / "bundle", verify=False, threads=1)
    assert "labels are numbers, give `labels`" in caplog.text
    done = invoke(cli.export, checkpoint, "--output", tmp_path / "again", "--no-verify", "--threads", 1)
    assert "adavit-export: warning: " in done.stderr and "labels are numbers, give --labels\n" in done.stderr
