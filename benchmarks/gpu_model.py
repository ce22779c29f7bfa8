"""Predicts latencies on GPUs: python benchmarks/gpu_model.py [--json FILE] [--plot FILE]

A model, not a measurement. An engine takes the longer of its multiply-accumulates and its weights' bytes, and a time
for each kernel. Policies are recorded ones of random models; batches of them are drawn. All assumptions are in
gpu_figures.py. It needs no GPU.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gpu_figures as given
import numpy as np
from gpu_figures import GPUS, PUBLISHED, Gpu
from gpu_policies import recorded
from models import ARCHITECTURES, BIASES

from adavit.architecture import Architecture
from adavit.bundle.capacity import CAPACITY_QUANTILE
from adavit.bundle.policy import Policy
from adavit.bundle.statistics import usual_heads
from adavit.macs import batch_macs, block_macs, outside_macs
from adavit.runtime.batch import Room, rooms_of
from adavit.runtime.capacity import CapacityTable

WAYS = ("exact", "capacity", "conditional")
BATCHES = (1, 8, 32)
DRAWS = 64
"""Random batches that a prediction is the mean of."""

Row = dict[str, Any]


@cache
def fitted(name: str, precision: str) -> tuple[float, float]:
    """Share of the peak that ViT-B/16 reaches on a published GPU, and the seconds that each of its kernels adds."""
    published = PUBLISHED[name]
    if precision == "int8" and not published.int8:
        ratio = fitted(given.INT8_LIKE, "int8")[0] / fitted(given.INT8_LIKE, "fp16")[0]
        share, kernel = fitted(name, "fp16")
        return share * ratio, kernel
    times, peak = getattr(published, precision), getattr(published, f"{precision}_peak")
    images, seconds = np.array(list(times)), np.array(list(times.values())) / 1e3
    terms = np.stack([np.ones(len(images)), images], 1) / seconds[:, None]  # least relative error
    fixed, each = np.linalg.lstsq(terms, np.ones(len(images)), rcond=None)[0]
    kernels = given.DENSE_KERNELS * given.VIT_B_BLOCKS + given.OTHER_KERNELS
    return float(2 * given.VIT_B_MACS / (each * peak * 1e12)), float((fixed - given.GRAPH_LAUNCH) / kernels)


@dataclass(frozen=True)
class Device:
    """A GPU as the model has it: MACs a second of linear layers and of attention's products, and seconds of the rest.

    `small` is of a small kernel.
    """

    linear: float
    products: float
    bandwidth: float
    kernel: float
    small: float
    slower: float
    weight_bytes: int

    @classmethod
    def of(cls, gpu: Gpu, precision: str) -> Device:
        share, kernel = fitted(gpu.like, precision)
        products = fitted(gpu.like, "fp16")[0] * gpu.fp16 * 1e12 / 2  # they are fp16 in int8 too
        linear = share * getattr(gpu, precision) * 1e12 / 2
        small, weight_bytes = given.SMALL * gpu.slower, 2 if precision == "fp16" else 1
        return cls(linear, products, gpu.bandwidth * 1e9, kernel, small, gpu.slower, weight_bytes)

    def seconds(self, macs: float, products: float, weights: float, kernels: float) -> float:
        """Of some layers: MACs in all, and those of attention's products; elements of weights; kernels."""
        multiplied = (macs - products) / self.linear + products / self.products
        return max(multiplied, weights * self.weight_bytes / self.bandwidth) + kernels * self.kernel


@dataclass(frozen=True)
class Task:
    """Batches to run.

    Attributes:
        arch: the model's shapes.
        batch: images of one.
        needed: the room that each random batch needs, by block.
        rooms: what the capacity has, by block.
        heads: how many each block's engine has.
        asked: MACs that the policies ask for, of those of the dense model.
        overflowing: share of the batches that need more.
    """

    arch: Architecture
    batch: int
    needed: Sequence[Sequence[Room]]
    rooms: Sequence[Room]
    heads: Sequence[int]
    asked: float
    overflowing: float

    @classmethod
    def of(cls, arch: Architecture, policy: Policy, batch: int) -> Task:
        """Random batches of recorded images; the capacity is of the same images."""
        source = np.random.default_rng(batch)
        needed = [rooms_of(policy[source.integers(len(policy), size=batch)]) for _ in range(DRAWS)]
        rooms = CapacityTable(arch, [policy], CAPACITY_QUANTILE).rooms(batch)
        beyond = (np.array(needed) > np.array(rooms)).any((1, 2))
        runs = policy.sublayers.astype(int)
        blocks = block_macs(arch, policy.tokens.sum(2), policy.heads.sum(2), runs[..., 0], runs[..., 1])
        dense = outside_macs(arch) + arch.depth * block_macs(arch, arch.tokens, arch.heads, 1, 1)
        asked = (outside_macs(arch) + float(blocks.sum(1).mean())) / dense
        heads = [len(block) for block in usual_heads([policy])]
        return cls(arch, batch, needed, rooms, heads, asked, float(beyond.mean()))

    @property
    def rows_bytes(self) -> int:
        """Of all rows of the batch, in fp32."""
        return 4 * self.batch * self.arch.tokens * self.arch.width

    def padding(self) -> float:
        """MACs of a batch at its capacity, of those at its own sizes."""
        return self._macs(self.rooms) / float(np.mean([self._macs(rooms) for rooms in self.needed]))

    def _macs(self, rooms: Sequence[Room]) -> int:
        return sum(batch_macs(self.arch, *room, heads) for room, heads in zip(rooms, self.heads, strict=True))


def predicted(device: Device, task: Task) -> dict[str, float]:
    """Seconds of a batch, dense and by each way."""
    arch, stem = task.arch, device.seconds(task.batch * outside_macs(task.arch), 0, 0, given.OTHER_KERNELS)
    room = Room(task.batch * arch.tokens, task.batch, arch.tokens, task.batch * arch.tokens)
    dense = given.GRAPH_LAUNCH * device.slower + stem
    dense += arch.depth * sum(_part(device, arch, room, arch.heads, part) for part in ("attention", "mlp"))
    host = given.GRAPH_HOST * device.slower + given.GRAPH_LAUNCH * device.slower
    exact = float(np.mean([_exact(device, task, needed) for needed in task.needed])) + stem
    capacity = host + stem + sum(_block(device, task, *at) for at in zip(task.rooms, task.heads, strict=True))
    conditional = host + stem + float(np.mean([_conditional(device, task, needed) for needed in task.needed]))
    again = task.overflowing * exact
    return {"dense": dense, "exact": exact, "capacity": capacity + again, "conditional": conditional + again}


def _part(device: Device, arch: Architecture, room: Room, heads: int, part: str) -> float:
    """Seconds of the matrix kernels of a sub-layer."""
    channels = heads * arch.head_width
    if part == "attention":
        macs = batch_macs(arch, *room[:3], 0, heads)
        products = batch_macs(arch, 0, *room[1:3], 0, heads)
        return device.seconds(macs, products, 4 * arch.width * channels, given.DENSE_KERNELS - 3)
    macs = batch_macs(arch, 0, 0, 0, room.mlp_rows, heads)
    return device.seconds(macs, 0, arch.hidden * (channels + arch.width), 3)


def _batch_part(device: Device, task: Task, room: Room, heads: int, part: str) -> float:
    """Seconds of a part of a batch's block."""
    matrix = 0.0 if part == "decisions" else _part(device, task.arch, room, heads, part)
    moved = given.MOVES[part] * task.rows_bytes / device.bandwidth
    return matrix + moved + given.SMALL_KERNELS[part] * device.small


def _block(device: Device, task: Task, room: Room, heads: int) -> float:
    return sum(_batch_part(device, task, room, heads, part) for part in given.SMALL_KERNELS)


def _exact(device: Device, task: Task, needed: Sequence[Room]) -> float:
    """Seconds of the blocks: each waits, is prepared by the host, and then runs as its kernels are launched."""
    kernels = given.DENSE_KERNELS + sum(given.SMALL_KERNELS.values())
    launches = kernels * given.KERNEL_LAUNCH * device.slower
    blocks = [max(launches, _block(device, task, *at)) for at in zip(needed, task.heads, strict=True)]
    host = given.EXACT_HOST * device.slower + (task.arch.depth + 1) * given.WAIT * device.slower
    return host + sum(blocks)


def _conditional(device: Device, task: Task, needed: Sequence[Room]) -> float:
    """Seconds of the blocks, where a sub-layer that no image runs is skipped; the others have the capacity's room."""
    total = 0.0
    for room, own, heads in zip(task.rooms, needed, task.heads, strict=True):
        runs = {"attention": own.attention_rows > 1, "mlp": own.mlp_rows > 1}
        for part in (part for part, some in runs.items() if some):
            total += _batch_part(device, task, room, heads, part) + given.COPIES * task.rows_bytes / device.bandwidth
        total += 2 * given.NODE * device.slower + _batch_part(device, task, room, heads, "decisions")
    return total


def rows_of(
    model: str, profile: str, gpus: Mapping[str, Gpu], batches: Sequence[int], precisions: Sequence[str]
) -> list[Row]:
    """The predictions of a model and profile, in ms."""
    arch, policy, found = ARCHITECTURES[model], recorded(model, profile), []
    for task in (Task.of(arch, policy, batch) for batch in batches):
        for precision in precisions:
            for name, gpu in gpus.items():
                device = Device.of(gpu, precision)
                ms = {way: 1e3 * seconds for way, seconds in predicted(device, task).items()}
                spread = sorted(
                    _gain(predicted(replace(device, small=device.small * factor), task))
                    for factor in (1 / given.SPREAD, given.SPREAD)
                )
                found.append(
                    {"model": model, "profile": profile, "gpu": name, "batch": task.batch, "precision": precision}
                    | {"ms": ms, "best": min(WAYS, key=ms.__getitem__), "speedup": _gain(ms), "speedup_range": spread}
                    | {"asked": task.asked, "padding": task.padding(), "overflowing": task.overflowing}
                )
    return found


def _gain(times: Mapping[str, float]) -> float:
    """How many times as fast as the dense engine the best way is."""
    return times["dense"] / min(times[way] for way in WAYS)


def verdict(row: Row) -> str:
    """What the range of a row says."""
    low, high = row["speedup_range"]
    return "yes" if low > 1 else "no" if high < 1 else "open"


def line(row: Row) -> str:
    """A row of the table."""
    low, high = row["speedup_range"]
    cells = [row["gpu"], str(row["batch"]), *(f"{row['ms'][way]:.2f}" for way in ("dense", *WAYS)), row["best"]]
    return "| " + " | ".join([*cells, f"{row['speedup']:.2f}x", f"{low:.2f} to {high:.2f}", verdict(row)]) + " |"


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    head = ["GPU", "batch", "dense, ms", *(f"{way}, ms" for way in WAYS), "best", "speedup", "range", "pays"]
    return "\n".join(["| " + " | ".join(head) + " |", "|" + " --- |" * len(head), *map(line, rows)])


def assumptions() -> dict[str, Any]:
    """Everything that the predictions rest on."""
    plain = {name: value for name, value in vars(given).items() if name.isupper() and name not in ("GPUS", "PUBLISHED")}
    fits = {
        f"{name}, {precision}": dict(zip(("share", "kernel_s"), fitted(name, precision), strict=True))
        for name in PUBLISHED
        for precision in ("fp16", "int8")
    }
    return plain | {
        "fits": fits,
        "gpus": {name: asdict(gpu) for name, gpu in GPUS.items()},
        "published": {name: asdict(of) for name, of in PUBLISHED.items()},
    }


def images(text: str) -> int:
    """The images of a batch, of an argument."""
    if not text.isdecimal() or not 1 <= int(text) <= 4096:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of images from 1 to 4096")
    return int(text)


def writable(text: str) -> Path:
    """A file to write, of an argument."""
    if not Path(text).parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: its folder is not there")
    return Path(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=ARCHITECTURES, default=["t2t_vit_19"])
    parser.add_argument("--gpus", nargs="+", choices=GPUS, default=list(GPUS), metavar="GPU")
    parser.add_argument("--batches", nargs="+", type=images, default=BATCHES)
    parser.add_argument("--precisions", nargs="+", choices=("fp16", "int8"), default=["fp16"])
    parser.add_argument("--json", type=writable, help="all numbers, and what they rest on")
    parser.add_argument("--plot", type=writable, help="a picture of the speedups, in the first precision")
    arguments = parser.parse_args()
    if arguments.plot and not find_spec("matplotlib"):
        parser.error("--plot needs matplotlib; run: pip install matplotlib")
    gpus, rows = {name: GPUS[name] for name in arguments.gpus}, []
    for model, profile in BIASES:
        if model in arguments.models:
            rows += (some := rows_of(model, profile, gpus, arguments.batches, arguments.precisions))
            for precision in arguments.precisions:
                asked = f"{some[0]['asked']:.0%} of the dense MACs"
                print(f"\n{model}, {profile}, {precision}: the policies ask for {asked}. A model, not a measurement.\n")
                print(table([row for row in some if row["precision"] == precision]))
    if arguments.json:
        text = json.dumps({"rows": rows, "assumptions": assumptions()}, indent=2)
        arguments.json.write_text(text + "\n", encoding="utf-8")
    if arguments.plot:
        from gpu_plot import plot

        plot([row for row in rows if row["precision"] == arguments.precisions[0]], arguments.plot)


if __name__ == "__main__":
    main()
