"""Smoke tests of an installed adavit, as users run it: `python .ci/smoke.py PART ...`, with the Python it is in.

Parts: lowest, wheel, run, openvino, export, int8, train, tensorrt-rtx, deit. All of them run in a temporary folder.
Ends with 1 at the first that fails, and says which.
"""

import json
import os
import subprocess
import sys
from importlib import metadata, util
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import adavit as package
from adavit.architecture import Architecture

REPOSITORY = Path(__file__).resolve().parent.parent
DEMO = Path(package.__file__).resolve().parent / "demo"
IMAGES = DEMO / "images"
EMBEDDED = """
import sys
import adavit
runtime = adavit.load(sys.argv[1])
for prediction in runtime.predict(sys.argv[2:]):
    print(prediction.top[0][0])
"""
"""A program that prints the labels of images."""


def attempt(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs `adavit-NAME`, whether it fails or not."""
    command = [str(Path(sys.executable).parent / f"adavit-{name}"), *map(str, arguments)]
    return subprocess.run(command, text=True, capture_output=True, check=False)


def adavit(name: str, *arguments: object) -> dict[str, Any]:
    """The report of `adavit-NAME` with --json; a command that fails ends the smoke test."""
    done = attempt(name, *arguments)
    if done.returncode:
        raise SystemExit(
            f"{' '.join(done.args)} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
        )
    return json.loads(done.stdout) if "--json" in arguments else {}


def expect(right: bool, what: str, report: object) -> None:
    """Ends the smoke test where a report isn't right."""
    if not right:
        raise SystemExit(f"{what} is wrong in:\n{json.dumps(report)[:4000]}")


def measured(*arguments: object, budget: float | None = 0.35) -> dict[str, Any]:
    """Runs the demo's images, and checks what the report says. Without a bundle, these come with the demo's."""
    arguments = (*arguments, "--iterations", 3, "--warmup", 1, "--json", "-")
    report = adavit("run", *arguments, *(() if budget is None else ("--budget", budget)))
    share = report["macs"]["executed_mean"] / report["macs"]["dense"]
    expect(report["accuracy"]["n"] == 20 and report["accuracy"]["top1"] >= 0.8, "the accuracy", report["accuracy"])
    expect(0.3 < share < (0.4 if budget else 0.5), "the share of the dense MACs", report["macs"])
    expect(report["speedup"] > 0 and report["dense"]["latency_ms"]["p50"] > 0, "the speedup", report)
    return report


def lowest(_: Path) -> None:
    """What adavit needs is there in the lowest versions that it asks for."""
    for requirement in metadata.requires("adavit") or []:
        name, _, floor = requirement.partition(">=")
        if ";" not in requirement:
            found = metadata.version(name)
            expect(f"{found}.".startswith(f"{floor}."), "the version", f"{name} {found}, not {floor}")


def wheel(_: Path) -> None:
    """What `pip install adavit[cpu]` brings: the package with its demo and licences, and neither torch nor onnx."""
    expect(REPOSITORY not in DEMO.parents, "the place of the package", str(DEMO))
    installed = metadata.distribution("adavit")
    licences = installed.metadata.get_all("License-File") or []
    held = [bool(installed.read_text(f"licenses/{licence}")) for licence in licences]
    expect(len(held) == 3 and all(held), "the licences", licences)
    extras = [name for name in ("torch", "onnx", "safetensors", "matplotlib") if util.find_spec(name)]
    expect(not extras, "what is installed besides", extras)
    done = attempt("run")
    expect(done.returncode == 0 and "speedup" in done.stdout, "adavit-run", [done.stdout, done.stderr])
    expect("left out" not in done.stderr, "the notes", done.stderr)
    program = [sys.executable, "-c", EMBEDDED, DEMO / "bundle", *sorted((IMAGES / "trouser").glob("*.png"))]
    done = subprocess.run(program, text=True, capture_output=True, check=False)
    expect(done.stdout.split() == ["trouser", "trouser"], "an embedded run", [done.stdout, done.stderr])


def run(_: Path) -> None:
    """The demo bundle that comes with the package."""
    versions = measured()["versions"]
    print("   ", *(f"{name} {versions[name]}" for name in ("python", "numpy", "onnxruntime")))


def openvino(_: Path) -> None:
    """The same in OpenVINO."""
    versions = measured("--backend", "openvino", "--provider", "fp32")["versions"]
    print("    openvino", versions["openvino"])


def export(folder: Path) -> None:
    """The demo's checkpoint, verified against PyTorch, and the bundle run."""
    report = adavit("export", "demo", "--output", folder / "exported", "--json", "-")
    expect(report["verified"]["decisions"] > 0, "the verification", report)
    measured(folder / "exported", "--images", IMAGES)


def int8(folder: Path) -> None:
    """The same checkpoint in int8 and fp16."""
    options = ("--precision", "int8,fp16", "--calibration-images", IMAGES, "--samples", 16, "--json", "-")
    report = adavit("export", "demo", "--output", folder / "int8", *options)
    for name in ("int8", "fp16"):
        precisions = [found["precision"] for found in report["calibration"][name]["sublayers"].values()]
        expect(precisions.count(name) >= 8, "the precision of the sub-layers", report["calibration"][name])
    measured(folder / "int8", "--images", IMAGES, budget=None)


def train(folder: Path) -> None:
    """A few steps of a dense backbone and of its policies, and a bundle of the weights."""
    sys.path.insert(0, str(REPOSITORY / "tests/training"))
    from training_cases import write_idx_set

    data = ("--data", write_idx_set(folder / "data"), "--steps", 3, "--batch", 16, "--threads", 1)
    shape = ("--width", 16, "--depth", 2, "--heads", 2, "--patch-size", 2, "--image-size", 8, "--hidden", 32)
    adavit("train", "dense", *data, *shape, "--output", folder / "dense")
    weights = folder / "dense/weights.safetensors"
    adavit("train", "adapt", *data, "--from", weights, "--output", folder / "adapted")
    weights = folder / "adapted/weights.safetensors"
    for plot in folder.glob("*/plot.png"):
        expect(plot.read_bytes().startswith(b"\x89PNG"), "a plot", str(plot))
    report = adavit("export", weights, "--output", folder / "trained", "--json", "-")
    expect(report["verified"]["decisions"] > 0, "the verification", report)
    adavit("run", folder / "trained", "--iterations", 2, "--json", "-")


def tensorrt_rtx(folder: Path) -> None:
    """An engine set of the demo for one GPU architecture; that it runs, only such a GPU shows.

    Without a GPU the run says so in one line, so the bindings of CUDA and TensorRT do import. NVRTC compiles a kernel.
    """
    from cuda.bindings import nvrtc

    from adavit.runtime.backends.cuda.setter import compiled

    image = compiled(nvrtc, 86)
    expect(image.startswith(b"\x7fELF"), "the kernel", image[:8].hex())
    adavit("export", "demo", "--output", folder / "rtx", "--no-verify")
    build = ("--target", "tensorrt-rtx", "--compute-capability", 86, "--json", "-")
    report = adavit("export", folder / "rtx", *build)
    expect(len(report["engine_sets"]) == 1, "the engine set", list(report))
    refused = attempt("run", folder / "rtx", "--backend", "tensorrt-rtx")
    lines = refused.stderr.splitlines()
    right = len(lines) == 1 and "no NVIDIA GPU can be used here" in lines[0]
    expect(not refused.returncode or right, "the reason why it does not run here", lines)


def deit(folder: Path) -> None:
    """Engine sets of a DeiT-S of random weights in every precision, its blocks' parts too, for one GPU architecture.

    Without the parts and the dense twin, a set is little larger than the weights.
    """
    sys.path.insert(0, str(REPOSITORY / "tests"))
    from cases import random_model, save

    arch = Architecture(
        stem="patch", image_size=224, patch_size=16, width=384, depth=12, heads=6, hidden=1536, classes=1000, keep=1,
        qkv_bias=True, token_policy=True, head_policy=True, sublayer_policy=True,
    )  # fmt: skip
    checkpoint, bundle = save(random_model(arch, sublayers=9.0), folder / "deit.safetensors"), folder / "deit"
    precisions = ("--precision", "fp32,fp16,int8", "--calibration-images", IMAGES, "--samples", 16)
    adavit("export", checkpoint, "--output", bundle, "--no-verify", *precisions)
    build = ("--target", "tensorrt-rtx", "--conditional", "--compute-capability", 86, "--jobs", 2, "--json", "-")
    sets = adavit("export", bundle, *build)["engine_sets"].values()
    expect([built["precision"] for built in sets] == ["fp32", "fp16", "int8"], "the engine sets", list(sets))
    described = json.loads((bundle / "config.json").read_text(encoding="utf-8"))["precisions"]
    for built in sets:
        precision, engines = built["precision"], built["engines"]
        whole = ("stem", *(f"blocks.{block}" for block in range(arch.depth)))
        expect(len(engines) == 4 * arch.depth + 2, "the engines", list(engines))
        ratio = sum(engines[name]["bytes"] for name in whole) / described[precision]["weights"]["bytes"]
        print(f"    {precision}: {built['seconds']:.0f} s, {ratio:.2f} times the weights' bytes")
        expect(ratio <= (1.7 if precision == "int8" else 1.4), "the size of a set", [precision, ratio])


PARTS = {
    "lowest": lowest,
    "wheel": wheel,
    "run": run,
    "openvino": openvino,
    "export": export,
    "int8": int8,
    "train": train,
    "tensorrt-rtx": tensorrt_rtx,
    "deit": deit,
}


def main(parts: list[str]) -> None:
    """Runs these parts in their order, each in the same temporary folder."""
    if not parts or set(parts) - set(PARTS):
        raise SystemExit(f"name parts of {', '.join(PARTS)}")
    with TemporaryDirectory() as folder:
        os.chdir(folder)
        for part in parts:
            PARTS[part](Path(folder))


if __name__ == "__main__":
    main(sys.argv[1:])
