"""Times the demo in headless Chromium beside its dense twin: python benchmarks/browser.py [--picture docs/browser.png]

WebAssembly with one thread, one picture at a time, the two models in turns. It needs the extras cpu and export, Node.js
with npm, and Chromium. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from itertools import chain
from pathlib import Path
from statistics import mean, median
from typing import Any

import adavit
from adavit.bundle.demo import demo_bundle

HERE = Path(__file__).parent
PREPARE = HERE.parent / "examples" / "browser" / "prepare.py"
PACKAGE = "puppeteer-core@24"


def pixels() -> list[list[float]]:
    """The demo's photographs as the model takes them, each flat."""
    runtime = adavit.load("demo", threads=1, specialise=False)
    return [runtime.preprocess(path).ravel().tolist() for path in sorted(demo_bundle().parent.glob("images/*/*.png"))]


def drive(folder: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """What browser.js finds at a page."""
    subprocess.run(["npm", "install", "--silent", "--ignore-scripts", PACKAGE], cwd=folder, check=True)
    shutil.copy(HERE / "browser.js", folder / "browser.mjs")
    (folder / "asked.json").write_text(json.dumps(asked))
    done = subprocess.run(["node", "browser.mjs"], cwd=folder, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def summary(times: dict[str, list[list[float]]]) -> dict[str, float]:
    """Milliseconds a picture: the median of all runs, and the mean over the pictures of each one's median."""
    medians = {name: median(chain(*runs)) for name, runs in times.items()}
    means = {name: mean(map(median, runs)) for name, runs in times.items()}
    return {
        **{f"{name}_ms": round(value, 2) for name, value in medians.items()},
        "speedup": round(medians["dense"] / medians["adaptive"], 2),
        **{f"{name}_mean_ms": round(value, 2) for name, value in means.items()},
        "speedup_of_means": round(means["dense"] / means["adaptive"], 2),
    }


def main() -> None:
    """Prepares the page, serves it, and prints what was timed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budget", type=float, default=0.35)
    parser.add_argument("--rounds", type=int, default=20, help="runs of each picture")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--picture", type=Path, help="also writes a picture of the page")
    parser.add_argument("--chromium", default=shutil.which("chromium") or shutil.which("google-chrome"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        command = [sys.executable, str(PREPARE), f"{work}/page", "--serve", "0"]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert server.stdout
            asked = {name: getattr(arguments, name) for name in ("budget", "rounds", "threads", "chromium")}
            asked |= {"url": server.stdout.readline().split()[0], "images": pixels()}
            asked["picture"] = arguments.picture and str(arguments.picture.absolute())
            found = drive(Path(work), asked)
        finally:
            server.terminate()
    macs = mean(found["macs"]) / found["dense_macs"]
    print(json.dumps({"browser": found["browser"], "macs": round(macs, 4), **summary(found["times"])}, indent=2))


if __name__ == "__main__":
    main()
