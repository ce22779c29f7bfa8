"""Thousands of altered bundles, their hashes right: nothing but our own errors comes out, and nothing crashes."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from cases import export, python, random_model, read_config, rewrite_stored, rewrite_text, stored_files, tiny
from mutations import ONNX, mutated_json, mutated_message

from adavit.bundle.bundle import Bundle, GraphFiles
from adavit.bundle.graph_keys import PARTS, STEM_GRAPH, GraphKey
from adavit.bundle.graph_keys import read_graph as read_device_graph
from adavit.bundle.graphs import Graphs
from adavit.bundle.stored import StoredFile
from adavit.errors import AdaViTError

RUN = """
import sys
from pathlib import Path
import numpy as np
import adavit

for folder in map(Path, sys.argv[2:]):
    try:
        runtime = adavit.load(folder, sys.argv[1], threads=1, specialise=False)
        side = runtime.architecture.image_size
        images = np.random.default_rng(0).standard_normal((1, 3, side, side), np.float32)
        policy = adavit.Policy.dense(runtime.architecture, 1)
        runtime.run(images)
        runtime.run(images, policy)
        policy.heads[:, 1:, 1:] = False
        runtime.run(images, policy)
        for dropped in (0, 1, [0, 1]):
            policy.sublayers[:, 1:] = True
            policy.sublayers[:, 1:, dropped] = False
            runtime.run(images, policy)
        if runtime.graphs.files.dense is not None:
            runtime.run_dense(images)
    except adavit.AdaViTError as error:
        assert "\\n" not in str(error)
print("done", len(sys.argv) - 2)
"""
RUN_BATCHES = """
import sys
from pathlib import Path
import numpy as np
sys.path.append(sys.argv[1])
from batch_reference import BatchReference, all_of, fitting
from adavit.bundle.bundle import Bundle
from adavit.bundle.graphs import Graphs

for folder in map(Path, sys.argv[2:]):
    graphs = Graphs(Bundle.open(folder))
    arch, images = graphs.architecture, np.random.default_rng(0).standard_normal((3, 3, 32, 32), np.float32)
    most = all_of(arch, len(images))
    for in_parts in (False, True):
        batches = BatchReference(graphs, {}, in_parts)
        batches.run(images, most)
        for share in (1, 0.3):
            batches.run(images, lambda block, sizes: fitting(block, np.minimum(sizes, most(block, sizes)) * share))
print("done", len(sys.argv) - 2)
"""
EACH = 150
"""How many times a graph is altered."""
RUNS = {"onnxruntime": 16, "openvino": 5}
"""How many of the altered bundles that are not refused run on a backend."""
BATCHES = ["batch.stem", "batch.1", "batch.2"]
GRAPHS = ["stem", "blocks.0.both", "blocks.1.attention", "blocks.1.mlp", "blocks.2.both", "blocks.2.none", "dense"]


@pytest.fixture(scope="module")
def t2t(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of a small model with a T2T stem."""
    model = random_model(tiny(stem="t2t", patch_size=16, qkv_bias=False))
    return export(model, tmp_path_factory.mktemp("t2t"), verify=False)


def accepted(read: Callable[[], object]) -> bool:
    """Whether what is read is not refused; anything but a refusal of ours fails the test."""
    try:
        read()
    except AdaViTError as error:
        assert "\n" not in str(error)
        return False
    return True


def read_graph(graphs: Graphs, name: str) -> None:
    """Reads one graph, as a backend would be handed it."""
    if name in ("stem", "dense"):
        getattr(graphs, name)()
        return
    role, number, *_ = name.split(".")
    if role == "batch":
        keys = [GraphKey("block", int(number), part) for part in (None, *PARTS)] if number != "stem" else [STEM_GRAPH]
        for key in keys:
            read_device_graph(graphs, key)
        return
    _, number, kind = name.split(".")
    graphs.block(int(number), next(key for key in graphs.files.blocks[int(number)] if key.name == kind))


def read_all(bundle: Bundle) -> None:
    """Reads everything that a backend would be handed."""
    assert bundle.fingerprint
    assert bundle.name
    for precision in bundle.graphs:
        graphs = Graphs(bundle, precision)
        graphs.check_deciding()
        for name in (*GRAPHS, *BATCHES):
            read_graph(graphs, name)


def with_graph(files: GraphFiles, name: str, data: bytes) -> GraphFiles:
    """What describes the graphs with other data of one of them."""
    if name in ("stem", "dense"):
        return replace(files, **{name: StoredFile.of(f"fp32/{name}.onnx", data)})
    if name in BATCHES:
        batch = list(files.batch)
        at = next(i for i, file in enumerate(batch) if file.file == f"fp32/{name}.onnx")
        batch[at] = StoredFile.of(batch[at].file, data)
        return replace(files, batch=tuple(batch))
    _, number, kind = name.split(".")
    blocks = [dict(block) for block in files.blocks]
    key, own = next((key, own) for key, own in blocks[int(number)].items() if key.name == kind)
    blocks[int(number)][key] = StoredFile.of(own.file, data)
    return replace(files, blocks=tuple(blocks))


def altered(original: Path, names: list[str], source: Random, count: int, folder: Path) -> list[Path]:
    """Bundles with a graph that was altered and is not refused; all of whose alterations are refused in our words."""
    run, graphs = [], Graphs(Bundle.open(shutil.copytree(original, folder / "altered")))
    intact = graphs.files
    for name in names:
        file = stored_files(original)[name]
        data = (original / file).read_bytes()
        for _ in range(EACH):
            changed = mutated_message(data, ONNX, source)
            (graphs.path / file).write_bytes(changed)
            graphs.files = with_graph(intact, name, changed)
            if accepted(lambda: read_graph(graphs, name)) and changed != data:  # noqa: B023
                run.append((file, changed))
        (graphs.path / file).write_bytes(data)
    assert len(run) > count
    folders = []
    for number, (file, changed) in enumerate(source.sample(run, count)):
        folders.append(shutil.copytree(original, folder / f"run{number}"))
        rewrite_stored(folders[-1], file, changed)
    return folders


@pytest.mark.parametrize("backend", RUNS)
@pytest.mark.parametrize("stem", ["patch", "t2t"])
def test_altered_graphs(stem: str, backend: str, tiny_bundle: Path, t2t: Path, tmp_path: Path) -> None:
    original = {"patch": tiny_bundle, "t2t": t2t}[stem]
    folders = altered(original, GRAPHS, Random(stem + backend), RUNS[backend], tmp_path)
    ran = python(RUN, backend, *folders)
    assert (ran.returncode, ran.stdout) == (0, f"done {RUNS[backend]}\n"), ran.stderr


def test_altered_graphs_of_batches(tiny_bundle: Path, tmp_path: Path) -> None:
    """Those that are not refused read and write rows within bounds: ONNX Runtime would say where they do not."""
    folders = altered(tiny_bundle, BATCHES, Random(0), 16, tmp_path)
    ran = python(RUN_BATCHES, Path(__file__).parent.parent, *folders)
    assert (ran.returncode, ran.stdout) == (0, "done 16\n"), ran.stderr


def test_altered_headers_of_weights(bundle: Path) -> None:
    intact, source = Bundle.open(bundle), Random(0)
    file = stored_files(bundle)["weights"]
    data = (bundle / file).read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    for _ in range(400):
        text = mutated_json(header, source).encode(errors="replace")
        if source.random() < 0.9:
            text += b" " * (-len(text) % 8)
        length = len(text) if source.random() < 0.95 else source.choice([0, 1, 1 << 62, len(data), len(text) - 1])
        changed = length.to_bytes(8, "little") + text + data[end:]
        (bundle / file).write_bytes(changed)
        graphs = replace(intact.files_of(), weights=StoredFile.of(file, changed))
        accepted(lambda: read_all(replace(intact, graphs={"fp32": graphs})))  # noqa: B023


def test_altered_descriptions(bundle: Path) -> None:
    config, source = read_config(bundle), Random(0)
    for _ in range(600):
        (bundle / "config.json").write_text(mutated_json(config, source), errors="replace")
        accepted(lambda: read_all(Bundle.open(bundle)))


def test_altered_preprocessing_and_labels(bundle: Path) -> None:
    source = Random(0)
    values = json.loads((bundle / "preprocessor_config.json").read_text())
    for _ in range(300):
        rewrite_text(bundle, "preprocessor_config.json", mutated_json(values, source).encode(errors="replace"))
        accepted(lambda: read_all(Bundle.open(bundle)))
    for _ in range(100):
        rewrite_text(bundle, "labels.txt", source.randbytes(source.randrange(1, 20)))
        accepted(lambda: read_all(Bundle.open(bundle)))
