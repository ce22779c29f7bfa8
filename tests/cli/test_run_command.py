"""`adavit-run`, end to end."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import (
    assert_same_policy,
    invoke,
    picture,
    pictures_in,
    python,
    read_config,
    refusal,
    shell,
    stored_files,
    tiny,
    write_config,
)

import adavit
from adavit.cli import run
from adavit.macs import dense_macs
from adavit.runtime import Policy, Runtime

SHORT = ("--iterations", 2, "--warmup", 1, "--threads", 1)
LATENCY = {"p50", "p90", "p95", "p99", "mean"}


def report(bundle: Path, *arguments: object) -> dict[str, Any]:
    """What `--json -` prints, which must be all that it prints."""
    done = invoke(run, bundle, *SHORT, "--json", "-", *arguments)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def pictures(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.png")) + sorted(folder.rglob("*.jpg"))


def test_the_keys_of_a_report(tiny_bundle: Path, labelled: Path) -> None:
    values = report(tiny_bundle, "--images", labelled)
    assert set(values) >= {
        "model", "backend", "batch", "threads", "images", "latency_ms", "throughput", "macs", "usage", "dense",
        "speedup", "ideal_speedup", "efficiency", "accuracy", "versions", "precision", "prepared",
    }  # fmt: skip
    assert set(values["latency_ms"]) == set(values["dense"]["latency_ms"]) == LATENCY
    assert set(values["macs"]) == {"executed_mean", "dense"}
    assert set(values["usage"]) == {"tokens", "heads", "sublayers"}
    assert set(values["accuracy"]) == {"top1", "top5", "n"}
    assert {"adavit", "python", "numpy", "onnxruntime"} <= set(values["versions"])
    assert (values["model"], values["backend"], values["batch"], values["threads"]) == ("tiny", "onnxruntime", 1, 1)
    assert (values["precision"], values["parallel"]) == ("fp32", "auto")
    assert values["images"] == 3


def test_the_numbers_fit_together(tiny_bundle: Path, labelled: Path, runtime: Runtime) -> None:
    values = report(tiny_bundle, "--images", labelled, "--iterations", 3)
    result = runtime.run(np.stack([runtime.preprocess(path) for path in pictures(labelled)]))
    assert values["macs"] == {"executed_mean": result.macs.mean(), "dense": dense_macs(tiny())}
    assert values["usage"] == pytest.approx(result.policy.usage())
    assert values["ideal_speedup"] == pytest.approx(dense_macs(tiny()) / result.macs.mean())
    assert values["speedup"] == pytest.approx(values["dense"]["latency_ms"]["p50"] / values["latency_ms"]["p50"])
    assert values["efficiency"] == pytest.approx(values["speedup"] / values["ideal_speedup"])
    assert values["throughput"] == pytest.approx(1000 / values["latency_ms"]["mean"])
    for latency in (values["latency_ms"], values["dense"]["latency_ms"]):
        assert 0 < latency["p50"] <= latency["p90"] <= latency["p95"] <= latency["p99"]


def test_predictions_and_accuracy(tiny_bundle: Path, labelled: Path, runtime: Runtime) -> None:
    values = report(tiny_bundle, "--images", labelled, "--top", 3)
    predictions = runtime.predict(pictures(labelled), top=3)
    labels = ["bee", "bee", "dog"]
    right = np.mean([found.top[0][0] == label for found, label in zip(predictions, labels, strict=True)])
    assert values["accuracy"] == {"top1": pytest.approx(right), "top5": None, "n": 3}, "of five classes"
    assert [shown["label"] for shown in values["predictions"]] == labels
    assert [shown["image"] for shown in values["predictions"]] == ["bee/0.png", "bee/1.png", "dog/2.jpg"]
    for shown, found in zip(values["predictions"], predictions, strict=True):
        assert [label for label, _ in shown["top"]] == [label for label, _ in found.top]
        assert shown["macs"] == found.macs
        assert shown["usage"] == found.usage


def test_the_table(tiny_bundle: Path, labelled: Path, tmp_path: Path) -> None:
    done = invoke(run, tiny_bundle, *SHORT, "--images", labelled, "--json", tmp_path / "report.json")
    assert (done.exit_code, done.stderr) == (0, "")
    for part in ("bee/0.png", "GMACs", "p50", "p90", "p95", "p99", "mean", "adaptive", "dense twin", "images/s"):
        assert part in done.stdout
    for part in (
        "MACs ",
        "usage ",
        "speedup ",
        "ideal",
        "efficiency",
        "accuracy ",
        "top-1",
        "of 3 images",
        "over the dense twin",
    ):
        assert part in done.stdout
    assert "top-5" not in done.stdout, "all of five classes are among five"
    assert "random noise" not in done.stdout
    assert json.loads((tmp_path / "report.json").read_text())["images"] == 3
    (tmp_path / "link.json").symlink_to("report.json")
    (tmp_path / "report.json").write_text("old")
    assert invoke(run, tiny_bundle, *SHORT, "--json", tmp_path / "link.json").exit_code == 0
    assert (tmp_path / "link.json").is_symlink()
    assert json.loads((tmp_path / "report.json").read_text())["input"] == "random"


def test_single_files_have_no_accuracy(tiny_bundle: Path, labelled: Path) -> None:
    values = report(tiny_bundle, "--images", labelled / "bee" / "0.png", "--images", labelled / "dog")
    assert values["accuracy"] is None
    assert [shown["label"] for shown in values["predictions"]] == [None, None]


def test_images_shown_are_spread_over_classes(tiny_bundle: Path, tmp_path: Path) -> None:
    for name, count in (("ant", 30), ("bee", 2), ("cat", 5)):
        (tmp_path / "set" / name).mkdir(parents=True)
        pictures_in(tmp_path / "set" / name, count)
    done = invoke(run, tiny_bundle, *SHORT, "--images", tmp_path / "set", "--json", tmp_path / "report.json")
    values = json.loads((tmp_path / "report.json").read_text())
    shown = [found["image"] for found in values["predictions"]]
    assert values["images"] == values["accuracy"]["n"] == 37
    assert len(shown) == 20 and shown == sorted(shown)
    assert Counter(Path(name).parent.name for name in shown) == {"ant": 13, "bee": 2, "cat": 5}
    assert "20 images, evenly of all classes; 17 more were run" in done.stdout


def test_one_thread_is_not_compared_with_two(
    tiny_bundle: Path, labelled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adavit.console.options.types.usable_cpus", lambda: 4)
    arguments = (tiny_bundle, "--images", labelled, "--iterations", 2, "--threads", 2, "--parallel", "samples")
    for batch, threads in ((1, 1), (2, 2)):
        done = invoke(run, *arguments, "--batch", batch, "--json", "-")
        values = json.loads(done.stdout)
        assert (values["threads"], values["parallel"], len(values["notes"])) == (threads, "samples", 2 - threads)
    done = invoke(run, *arguments)
    assert "adavit-run: note: samples run in parallel, each on one thread: a batch of 1 uses 1 of 2" in done.stderr
    assert "batch 1, 1 thread," in done.stdout


def test_random_input_without_images(tiny_bundle: Path) -> None:
    values = report(tiny_bundle)
    assert (values["input"], values["accuracy"], values["predictions"]) == ("random", None, [])
    shown = invoke(run, tiny_bundle, *SHORT).stdout
    assert "input       random noise, so that accuracy means nothing" in shown


def test_batches(tiny_bundle: Path, labelled: Path) -> None:
    one, two = (report(tiny_bundle, "--images", labelled, "--batch", batch) for batch in (1, 2))
    assert (two["batch"], two["images"]) == (2, 3)
    assert [shown["macs"] for shown in two["predictions"]] == [shown["macs"] for shown in one["predictions"]]
    assert two["throughput"] == pytest.approx(2000 / two["latency_ms"]["mean"])
    assert report(tiny_bundle, "--images", labelled, "--batch", 8)["batch"] == 8  # more than there are images


@pytest.mark.parametrize("parallel", ["auto", "operators", "samples"])
def test_either_way_to_share_threads(parallel: str, tiny_bundle: Path, labelled: Path) -> None:
    values = report(tiny_bundle, "--images", labelled, "--parallel", parallel, "--batch", 2)
    assert values["parallel"] == parallel
    assert values["images"] == 3


def test_what_is_prepared(wide: tuple[Path, Path], tmp_path: Path) -> None:
    """For what random images use, or photographs."""
    photos = pictures_in(tmp_path, 3)
    for images in ((), ("--images", photos)):
        assert report(wide[0], *images)["prepared"] > 0
        assert report(wide[0], *images, "--no-specialise")["prepared"] == 0
    done = invoke(run, wide[0], *SHORT, "--images", photos)
    assert " for what images use most" in done.stdout
    assert "prepared " not in invoke(run, wide[0], *SHORT, "--no-specialise").stdout


def test_a_measurement_is_no_use_to_remember(wide: tuple[Path, Path], tmp_path: Path) -> None:
    """An application's images are others."""
    code = "from adavit.entry import run; run()"
    done = python(
        code,
        wide[0],
        "--iterations",
        40,
        "--threads",
        1,
        "--json",
        "-",
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
    )
    assert json.loads(done.stdout)["prepared"] > 0
    assert not (tmp_path / "adavit").exists()


def test_the_precision_is_one_that_there_is(tiny_bundle: Path) -> None:
    assert report(tiny_bundle, "--precision", "fp32")["precision"] == "fp32"
    message = refusal(invoke(run, tiny_bundle, *SHORT, "--precision", "int8"))
    assert "is not in precision 'int8'; it has fp32" in message
    assert "'int4' is not one of" in refusal(invoke(run, tiny_bundle, "--precision", "int4"), code=2)


@pytest.mark.parametrize("command", ["adavit.cli", "adavit.entry"])
def test_the_command_takes_no_thread_pool_of_the_process(command: str, tiny_bundle: Path) -> None:
    """It measures what an application gets; and whoever calls it from another program keeps the pools of its own."""
    code = f"""
import sys
import onnxruntime
from {command} import run
sys.argv = ["adavit-run", {str(tiny_bundle)!r}, "--threads", "2", "--iterations", "1"]
try:
    run()
except SystemExit as end:
    assert not end.code
onnxruntime.set_global_thread_pool_sizes(2, 1)  # raises where there is one
"""
    done = python(code)
    assert done.returncode == 0, done.stderr


def test_without_the_dense_twin(tiny_bundle: Path, bundle: Path) -> None:
    values = report(tiny_bundle, "--no-dense")
    assert values["dense"] is values["speedup"] is values["efficiency"] is None
    assert values["ideal_speedup"] > 1
    done = invoke(run, tiny_bundle, *SHORT, "--no-dense")
    assert "dense twin" not in done.stdout
    assert "speedup" not in done.stdout
    config = read_config(bundle)
    del config["precisions"]["fp32"]["dense"]
    write_config(bundle, config)
    assert report(bundle)["dense"] is None
    assert "without its dense twin" in refusal(invoke(run, bundle, *SHORT, "--dense"))


def test_recording_and_replaying(tiny_bundle: Path, labelled: Path, tmp_path: Path, runtime: Runtime) -> None:
    recorded = tmp_path / "policy.npz"
    decided = report(tiny_bundle, "--images", labelled, "--record-policy", recorded, "--batch", 2)
    wanted = runtime.run(np.stack([runtime.preprocess(path) for path in pictures(labelled)]))
    assert_same_policy(Policy.load(recorded), wanted.policy)
    replayed = report(tiny_bundle, "--images", labelled, "--replay-policy", recorded, "--batch", 2)
    for key in ("predictions", "accuracy", "usage", "macs"):
        assert replayed[key] == decided[key]
    Policy.dense(tiny(), 3).save(recorded)
    replayed = report(tiny_bundle, "--images", labelled, "--replay-policy", recorded)
    assert replayed["macs"]["executed_mean"] == replayed["macs"]["dense"]
    assert replayed["usage"] == {"tokens": 1.0, "heads": 1.0, "sublayers": 1.0}


def test_policies_that_cannot_be_replayed(tiny_bundle: Path, labelled: Path, tmp_path: Path) -> None:
    for policy, message in (
        (Policy.dense(tiny(), 2), "holds 2 images, fewer than are to be run"),
        (Policy.dense(tiny(heads=6), 3), "policy.heads is bool"),
    ):
        policy.save(tmp_path / "policy.npz")
        done = invoke(run, tiny_bundle, *SHORT, "--images", labelled, "--replay-policy", tmp_path / "policy.npz")
        assert message in refusal(done)
    done = invoke(run, tiny_bundle, *SHORT, "--images", labelled, "--replay-policy", tmp_path / "no.npz")
    assert "no such policy file" in refusal(done)


def test_unreadable_images_are_reported_and_the_rest_done(tiny_bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    picture().save(folder / "b.png")
    (folder / "a.png").touch()
    (folder / "c.jpg").write_text("hello")
    done = invoke(run, tiny_bundle, *SHORT, "--images", folder, "--json", "-", "--batch", 4)
    assert done.exit_code == 0
    values = json.loads(done.stdout)
    assert values["images"] == len(values["predictions"]) == 1
    assert done.stderr.splitlines() == [f"adavit-run: skipped {message}" for message in values["skipped"]]
    assert [message.split(": ")[0] for message in values["skipped"]] == [str(folder / "a.png"), str(folder / "c.jpg")]
    (folder / "b.png").unlink()
    message = refusal(invoke(run, tiny_bundle, *SHORT, "--images", folder))
    assert "none of the 2 images can be read; first: " in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--iterations", "2", "--seconds", "1"], "give --iterations or --seconds, not both"),
        (["--iterations", "0"], "0 is not in the range"),
        (["--seconds", "0"], "0.0 is not in the range"),
        (["--seconds", "nan"], "nan is not a finite number"),
        (["--batch", "0"], "0 is not in the range"),
        (["--threads", "0"], "0 is not in the range"),
        (["--threads", "many"], "'many' is not a valid integer"),
        (["--top", "0"], "0 is not in the range"),
        (["--warmup", "-1"], "-1 is not in the range"),
        (["--parallel", "nope"], "'nope' is not one of"),
        (["--dispatch", "nope"], "'nope' is not one of 'auto', 'exact', 'capacity', 'conditional'"),
        (["--dispatch", "exact"], "--dispatch is how batches are driven on a GPU; onnxruntime runs on the CPU here"),
        (["--cuda-graphs"], "No such option"),
        (["--nope"], "No such option"),
    ],
)
def test_usage(arguments: list[str], message: str, tiny_bundle: Path) -> None:
    assert message.lower() in refusal(invoke(run, tiny_bundle, *arguments), code=2).lower()


def test_an_unknown_backend(tiny_bundle: Path) -> None:
    done = invoke(run, tiny_bundle, "--backend", "nope")
    message = refusal(done, code=2)
    assert "nope" in message
    assert "onnxruntime" in message


def test_wrong_inputs(tiny_bundle: Path, labelled: Path, tmp_path: Path) -> None:
    (tmp_path / "bird").mkdir()
    picture().save(tmp_path / "bird" / "0.png")
    for arguments, message in (
        ([tmp_path / "nothing"], "no such bundle folder; make one with adavit-export"),
        ([tmp_path], "config.json: missing"),
        ([tiny_bundle, "--images", tmp_path / "nothing"], "no such image or folder"),
        ([tiny_bundle, "--images", tiny_bundle], "holds no image file"),
        ([tiny_bundle, "--images", tmp_path], "class folder 'bird' is none of the bundle's 5 labels"),
        ([tiny_bundle, "--provider", "Nope"], "no provider 'Nope' here"),
        ([tiny_bundle, "--record-policy", tmp_path / "no" / "policy.npz"], "no such folder to write into; make it"),
        (
            [tiny_bundle, "--json", tmp_path / "no" / "report.json"],
            f"--json {tmp_path / 'no' / 'report.json'}: no such",
        ),
        ([tiny_bundle, "--json", ""], "--json .: is a folder; name a file"),
        ([tiny_bundle, "--profile", tmp_path / "no" / "trace.json"], "no such folder to write into; make it first"),
    ):
        message_found = refusal(invoke(run, *arguments, *SHORT))
        assert message in message_found


def test_the_demo_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adavit.measure.run.demo_bundle", lambda: tmp_path / "bundle")
    assert "no such bundle folder" in refusal(invoke(run, *SHORT))


def test_in_a_process_of_its_own(tiny_bundle: Path, labelled: Path, bundle: Path) -> None:
    done = shell("adavit-run", tiny_bundle, *SHORT, "--images", labelled, "--json", "-")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["accuracy"]["n"] == 3
    graph = bundle / stored_files(bundle)["stem"]
    graph.write_bytes(graph.read_bytes()[:-1] + b"?")
    done = shell("adavit-run", bundle)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"adavit-run: error: {graph}: altered since export")
    assert done.stderr.count("\n") == 1


def test_ctrl_c_during_the_measurement(tiny_bundle: Path, tmp_path: Path) -> None:
    recorded = tmp_path / "policy.npz"
    command = [sys.executable, "-c", "from adavit.cli import run; run(prog_name='adavit-run')", str(tiny_bundle)]
    command += ["--seconds", "600", "--threads", "1", "--record-policy", str(recorded)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while not recorded.exists() and process.poll() is None:  # it is written before the measurement begins
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=120)
    assert (process.returncode, output, errors) == (130, "", "adavit-run: interrupted\n")
    assert [path.name for path in tmp_path.iterdir()] == ["policy.npz"]
    assert len(adavit.Policy.load(recorded)) == 8
