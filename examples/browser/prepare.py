"""Makes a folder that any web server shows as the page: python examples/browser/prepare.py OUT [--serve 8000]

It holds the adaptive model and its dense twin as one ONNX file each, the page, pictures, and onnxruntime-web, which npm
downloads. The page needs nothing else: it works offline. This script needs the extras cpu and export, and npm.
"""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import distribution
from pathlib import Path

import click

import adavit
from adavit.bundle.bundle import Bundle
from adavit.bundle.demo import demo_bundle, find_bundle
from adavit.bundle.graphs import Graphs
from adavit.errors import AdaViTError

PAGE = ("index.html", "style.css", "cards.css", "page.js", "view.js", "drawing.js", "pixels.js", "worker.js")
ENGINE = "onnxruntime-web@1.30.0"
ENGINE_FILES = {
    "ort.wasm.min.mjs": "ort.js",
    "ort-wasm-simd-threaded.mjs": "wasm.js",
    "ort-wasm-simd-threaded.wasm": "ort.wasm",
}
"""By their names in the package; many web servers do not know that .mjs is JavaScript."""
LICENCES = ("LICENSE", "ThirdPartyNotices.txt")
"""Of ONNX Runtime, which its Python package has and its npm package lacks."""
HEADERS = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cache-Control": "no-cache",
}
"""The first two isolate the page, which gives WebAssembly threads."""


def write_models(bundle: Path, folder: Path) -> None:
    """Writes model.onnx, model.json and dense.onnx."""
    adavit.export_single_file(bundle, folder / "model.onnx", budget_input=True, with_policy=True, force=True)
    graphs = Graphs(Bundle.open(bundle), "fp32")
    dense = graphs.dense()
    weights = {name: graphs.tensors.array(weight.tensor) for name, weight in dense.weights.items() if weight.tensor}
    (folder / "dense.onnx").write_bytes(dense.model(weights))


def write_engine(folder: Path) -> None:
    """Downloads onnxruntime-web, and writes what the page needs of it, with its licence."""
    npm = shutil.which("npm")
    if npm is None:
        raise click.ClickException("npm is missing, which downloads onnxruntime-web; install Node.js")
    folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        packed = subprocess.run(
            [npm, "pack", "--silent", "--prefer-offline", ENGINE], cwd=work, capture_output=True, text=True
        )
        archives = list(Path(work).glob("*.tgz"))
        if packed.returncode or not archives:
            reason = (packed.stderr.strip().splitlines() or ["no reason given"])[0]
            raise click.ClickException(f"npm could not download {ENGINE}: {reason}")
        with tarfile.open(archives[0]) as archive:
            for name, place in ENGINE_FILES.items():
                member = archive.extractfile(f"package/dist/{name}")
                assert member, f"{ENGINE} has no file {name}"
                (folder / place).write_bytes(member.read())
    for name in LICENCES:
        shutil.copy(distribution("onnxruntime").locate_file(f"onnxruntime/{name}"), folder)


def write_samples(folder: Path) -> Iterator[dict[str, str]]:
    """Copies a picture of each class with their licence; yields their places and names."""
    source = demo_bundle().parent / "images"
    (folder / "samples").mkdir(exist_ok=True)
    shutil.copy(source / "LICENSE.txt", folder / "samples")
    for kind in sorted(path for path in source.iterdir() if path.is_dir()):
        place = f"samples/{kind.name}.png"
        shutil.copy(min(kind.glob("*.png")), folder / place)
        yield {"file": place, "name": kind.name.replace("_", " ")}


def write_page(bundle: Path, folder: Path) -> None:
    """Copies the page, and writes what it is to show."""
    for name in PAGE:
        shutil.copy(Path(__file__).parent / name, folder)
    site = {
        "model": "model.onnx",
        "info": "model.json",
        "dense": "dense.onnx",
        "tones": bundle == demo_bundle(),  # the demo alone knows garments that are light on black
        "samples": list(write_samples(folder)),
    }
    (folder / "site.json").write_text(json.dumps(site, indent=2) + "\n")


class Handler(SimpleHTTPRequestHandler):
    """Serves files in a way that isolates the page."""

    extensions_map = SimpleHTTPRequestHandler.extensions_map | {".js": "text/javascript", ".wasm": "application/wasm"}

    def end_headers(self) -> None:
        """Adds the headers."""
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, *_: object) -> None:
        """Says nothing of each file."""


def serve(folder: Path, port: int) -> None:
    """Serves the page on this machine alone, until Ctrl-C."""
    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), functools.partial(Handler, directory=folder))
    except OSError as error:
        raise click.ClickException(
            f"port {port} cannot be served: {error.strerror}; --serve 0 takes a free one"
        ) from None
    with server:
        click.echo(f"http://127.0.0.1:{server.server_port}/ (Ctrl-C ends it)")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            click.echo()


@click.command(help=__doc__)
@click.argument("output", type=click.Path(path_type=Path, file_okay=False))
@click.option("--bundle", default="demo", show_default=True, type=click.Path(path_type=Path), help="Another model.")
@click.option("--serve", "port", type=click.IntRange(0, 65535), help="Serve the page at this port; 0 takes a free one.")
def main(output: Path, bundle: Path, port: int | None) -> None:
    """Prepares the page, and serves it where that is asked for."""
    try:
        bundle = find_bundle(bundle)
        output.mkdir(parents=True, exist_ok=True)
        write_engine(output / "ort")
        write_models(bundle, output)
        write_page(bundle, output)
        if port is None:
            click.echo(f"{output} is ready for any web server; --serve 8000 shows it with threads")
        else:
            serve(output, port)
    except (AdaViTError, OSError) as error:
        raise click.ClickException(str(error)) from None


if __name__ == "__main__":
    main()
