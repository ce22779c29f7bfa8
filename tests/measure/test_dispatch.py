"""What `adavit-run` says of batches on a device, and their profile: graphs of batches on the CPU, and the double."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from batch_reference import batches_on_cpu
from cases import invoke, random_images, refusal, tiny
from double import Gpu, add_double_engines, add_statistics, install

import adavit
from adavit.cli import run as run_command
from adavit.macs import batch_macs
from adavit.measure.benchmark import Plan, measure
from adavit.measure.dispatch import asked_of_blocks, dispatch_report
from adavit.measure.profile import GRAPH, Event
from adavit.measure.waterfall import padding_macs, profile
from adavit.runtime import Policy
from adavit.runtime.batch import Room, rooms_of
from adavit.runtime.batch_dispatcher import Ran

ARCH = tiny()
ON_GPU = ("--backend", "tensorrt", "--trust-engines", "--threads", 1, "--warmup", 2, "--iterations", 3)
SOME_HEADS = ((0, 1, 2), (0, 2), (1,))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    return install(monkeypatch)


def test_what_a_report_counts(tiny_bundle: Path) -> None:
    one, many = Room(1, 1, 1, 1), Room(34, 2, 17, 34)
    backend: Any = batches_on_cpu(tiny_bundle, heads=SOME_HEADS).backend
    ran = [Ran("capacity", 2, (one,) * 3), Ran("capacity", 2, (one,) * 3, 1, (many,) * 3), Ran("exact", 1, (many,) * 3)]
    found = dispatch_report(ARCH, backend, ran, 1000)
    macs = {room: [batch_macs(ARCH, *room, heads=len(heads)) for heads in SOME_HEADS] for room in (one, many)}
    again = 3 * batch_macs(ARCH, *many)
    assert found == {
        "ways": {"capacity": 2, "exact": 1},
        "batches": 3,
        "overflowed_batches": 1,
        "images": 5,
        "overflowed_images": 1,
        "macs_asked": 1000,
        "macs_multiplied": 2 * sum(macs[one]) + sum(macs[many]) + again,
        "macs_of_overflows": again,
        "padding": (2 * sum(macs[one]) + sum(macs[many]) + again) / 1000,
    }
    assert dispatch_report(ARCH, backend, [], 0)["padding"] is None


def test_a_batch_that_keeps_everything_has_no_padding() -> None:
    policy = Policy.dense(ARCH, 4)
    multiplied = sum(batch_macs(ARCH, *room) for room in rooms_of(policy))
    assert multiplied == asked_of_blocks(ARCH, policy)


@pytest.mark.parametrize("way", ["exact", "capacity", "conditional"])
def test_measuring_counts_every_batch_once(roomy: Callable[..., Path], way: str) -> None:
    runtime = batches_on_cpu(roomy(), way)
    images = random_images(ARCH, 6)
    found = measure(runtime, images, Plan(batch=4, iterations=5, warmup=2, dense=True)).dispatch
    assert found is not None
    assert (found["ways"], found["batches"], found["images"]) == ({way: 5}, 5, 20)
    used = Policy.concatenate([runtime.run(np.roll(images, -4 * turn, 0)[:4]).policy for turn in range(2, 7)])
    assert found["macs_asked"] == asked_of_blocks(ARCH, used)
    assert found["overflowed_images"] == 0
    everything = sum(batch_macs(ARCH, *room) for room in rooms_of(Policy.dense(ARCH, 4)))
    if way == "exact":
        assert 1 <= found["padding"] < 5 * everything / found["macs_asked"]
    else:
        assert found["macs_multiplied"] == 5 * everything


def test_padding_of_batches() -> None:
    """What is asked for counts once, whatever runs again, and heads that engines lack are not multiplied."""
    policy = Policy.dense(ARCH, 4)
    room = rooms_of(policy)[0]
    asked = batch_macs(ARCH, *room)

    def padding(*calls: tuple[Room, int | None]) -> int:
        events = [Event("block", 0, 0, 0, "block 2", GRAPH, room=room, heads=heads) for room, heads in calls]
        return padding_macs(ARCH, events, policy)["block 2"]

    assert padding((room, None)) == 0, "the head counts as asked for, and as multiplied"
    assert padding((room, None), (room, None)) == asked
    assert padding((room, 2)) == batch_macs(ARCH, *room, heads=2) - asked
    half = Room(room[0] // 2, room[1] // 2, room[2], room[3] // 2)
    assert padding((half, None), (half, None)) == 0


@pytest.mark.parametrize(
    ("way", "heads", "most"), [("exact", None, 32), ("capacity", SOME_HEADS, 32), ("exact", None, 2)]
)
def test_a_profile_of_batches_adds_up(roomy: Callable[..., Path], way: str, heads: Any, most: int) -> None:
    runtime = batches_on_cpu(roomy(), way, heads, most)
    found = profile(runtime, random_images(ARCH, 4), Plan(batch=4, iterations=3, warmup=1))
    parts = {part["part"]: part for part in found["parts"]}
    assert {"stem", "block 0", "block 1", "block 2"} <= set(parts)
    assert found["total"]["total_ms"] == pytest.approx(found["latency_ms"])
    for block in range(ARCH.depth):
        row = parts[f"block {block}"]
        assert row["graphs_ms"] > 0
        assert row["ideal_ms"] + row["padding_ms"] + row["slower_ms"] == pytest.approx(row["graphs_ms"])
        if heads is None:
            assert row["padding_ms"] >= 0
    assert runtime.options.dispatch == way, "the runtime itself stays as it is"


@pytest.mark.parametrize("way", ["auto", "exact", "capacity", "conditional"])
def test_the_command(roomy: Callable[..., Path], gpu: Gpu, way: str, cache: Path) -> None:
    arguments = [roomy(), *ON_GPU, "--batch", 4, "--dispatch", way]
    done = invoke(run_command, *arguments, "--json", "-")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)["dispatch"]
    assert found["batches"] == 3 and found["images"] == 12 and found["padding"] >= 1
    assert sum(found["ways"].values()) == 3 and set(found["ways"]) == ({way} if way != "auto" else set(found["ways"]))
    done = invoke(run_command, *arguments)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("dispatch ")]
    assert "; blocks multiplied " in line and " times the MACs that the policies ask for" in line
    assert "overflows " not in done.stdout


def test_the_command_says_what_overflowed(bundle: Path, gpu: Gpu) -> None:
    policy = Policy.dense(ARCH, 64)
    policy.tokens[..., 1:] = False
    add_double_engines(add_statistics(bundle, policy, capacity_quantile=0.5))
    once = ("--no-specialise", "--warmup", 0, "--iterations", 1)  # before the table grows
    done = invoke(run_command, bundle, *ON_GPU[:-4], *once, "--batch", 3, "--dispatch", "capacity")
    assert done.exit_code == 0, done.output
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("overflows ")]
    assert "in 100.0% of the batches: 3 images of 3 ran again, " in line


def test_the_command_profiles_batches(roomy: Callable[..., Path], gpu: Gpu) -> None:
    done = invoke(run_command, roomy(), *ON_GPU, "--batch", 2, "--dispatch", "capacity", "--profile", "--json", "-")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["dispatch"]["ways"] == {"capacity": 3}
    assert [part["part"] for part in report["profile"]["parts"]][:4] == ["stem", "block 0", "block 1", "block 2"]


def test_dispatch_on_the_cpu_is_refused(tiny_bundle: Path, built_plain: Path, gpu: Gpu) -> None:
    for arguments in (["--backend", "onnxruntime"], ["--backend", "openvino"]):
        message = refusal(invoke(run_command, tiny_bundle, *arguments, "--dispatch", "capacity"), code=2)
        assert "how batches are driven on a GPU" in message
    message = refusal(invoke(run_command, built_plain, *ON_GPU, "--dispatch", "capacity"), code=2)
    assert "needs statistics; add them with adavit-export" in message


@pytest.fixture
def built_plain(bundle: Path) -> Path:
    """Engines, and no statistics."""
    return add_double_engines(bundle)


def test_a_cpu_has_no_report(tiny_bundle: Path) -> None:
    runtime = adavit.load(tiny_bundle, threads=1, specialise=False)
    assert measure(runtime, random_images(ARCH, 2), Plan(iterations=2, dense=False)).dispatch is None
