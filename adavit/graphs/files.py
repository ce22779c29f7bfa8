"""Writes a precision's weights and graphs into a folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save

from adavit.architecture import Architecture
from adavit.bundle.bundle import DENSE, STEM, WEIGHTS, GraphFiles
from adavit.bundle.keys import BOTH, combinations
from adavit.bundle.stored import StoredFile
from adavit.bundle.tensors import TensorFile
from adavit.graphs.batch import add_batch_block, add_batch_stem
from adavit.graphs.block import add_block
from adavit.graphs.builder import Builder
from adavit.graphs.dense import make_dense
from adavit.graphs.precision import Units
from adavit.graphs.stem import make_stem
from adavit.model.checkpoint_file import sort_header

__all__ = ["write_graphs"]

Tensors = Mapping[str, npt.NDArray[Any]]
Progress = Callable[[str, float], None]


def write_graphs(
    folder: Path,
    precision: str,
    arch: Architecture,
    tensors: Tensors,
    opset: int,
    with_dense: bool,
    progress: Progress,
    units: Units | None = None,
    metadata: Mapping[str, str] | None = None,
) -> GraphFiles:
    """Writes weights and graphs into a folder of the bundle `folder` that is named after the precision.

    Args:
        folder: the bundle.
        precision: its name.
        arch: the model's shapes.
        tensors: the weights by their released names, with those that the stem derives.
        opset: version of the standard operators.
        with_dense: whether to write the dense twin; a model without policies has nothing else.
        progress: told the stage and the share done.
        units: what is not in fp32.
        metadata: of the weights' file.
    """
    (folder / precision).mkdir()
    arrays = {name: np.asarray(value, order="C") for name, value in sorted(tensors.items())}
    data = sort_header(save(arrays, dict(metadata or {})))
    weights = _write(folder, f"{precision}/{WEIGHTS}", data)
    parsed = TensorFile.parse(data, weights.file)
    units = units or Units()
    total = 2 + arch.depth + sum(len(combinations(arch, block)) for block in range(arch.depth))
    done = 0

    def write(name: str, kind: str, make: Callable[[Builder], None]) -> StoredFile:
        nonlocal done
        builder = Builder(kind, opset, parsed, WEIGHTS)
        make(builder)
        done += 1
        progress(f"exporting {precision}", min(1.0, done / total))
        return _write(folder, f"{precision}/{name}", builder.build())

    stem, blocks, batch = None, [], []
    if arch.adapts:
        batch.append(write("batch.stem.onnx", "batch_stem", lambda builder: add_batch_stem(builder, arch)))
        stem = write(STEM, "stem", lambda builder: make_stem(builder, arch))
        for block in range(arch.depth):
            blocks.append(
                {
                    key: write(
                        f"blocks.{block}.{key.name}.onnx",
                        key.name,
                        lambda builder: add_block(builder, arch, block, key, units.of(block, key)),  # noqa: B023
                    )
                    for key in combinations(arch, block)
                }
            )
            batch.append(
                write(
                    f"batch.{block}.onnx",
                    "batch",
                    lambda builder: add_batch_block(builder, arch, block, units.of(block, BOTH)),  # noqa: B023
                )
            )
    dense = None
    if with_dense or not arch.adapts:
        dense = write(DENSE, "dense", lambda builder: make_dense(builder, arch, units))
    return GraphFiles(precision, opset, weights, stem, tuple(blocks), dense, tuple(batch))


def _write(folder: Path, file: str, data: bytes) -> StoredFile:
    (folder / file).write_bytes(data)
    return StoredFile.of(file, data)
