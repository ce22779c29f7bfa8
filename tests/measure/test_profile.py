"""The waterfall: what is counted adds up to the latency, whoever ran when."""

import json
import threading
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import (
    WIDE,
    assert_same_policy,
    invoke,
    random_images,
    random_policy,
    read_config,
    refusal,
    tiny,
    write_config,
)
from hypothesis import given
from hypothesis import strategies as st

import adavit
from adavit.bundle.keys import BOTH, BlockKey, Sublayers
from adavit.bundle.operating_points import Offsets
from adavit.cli import run
from adavit.macs import block_macs, dense_macs
from adavit.measure.benchmark import Plan
from adavit.measure.breakdown import BETWEEN, IDLE, Breakdown
from adavit.measure.profile import FETCH, GRAPH, Event, ProfiledBackend
from adavit.measure.trace import write_trace
from adavit.measure.waterfall import TRACED, Turn, _report, asked_macs, padding_macs, profile
from adavit.runtime import Policy, Runtime

KINDS = (("stem", GRAPH), ("block 0", FETCH), ("block 0", GRAPH), ("block 1", GRAPH), ("block 1", FETCH))
KEYS = ("graphs_ms", "fetch_ms", "calls_ms")


def line(start: int, steps: list[tuple[int, int, tuple[str, str]]], thread: int) -> list[Event]:
    """Events of a thread, each some time after the one before."""
    events = []
    for gap, length, (part, kind) in steps:
        events.append(Event("call", start + gap, start + gap + length, thread, part, kind))
        start += gap + length
    return events


STEPS = st.lists(st.tuples(st.integers(0, 90), st.integers(0, 90), st.sampled_from(KINDS)), min_size=1, max_size=8)


@given(STEPS, st.lists(STEPS, max_size=3), STEPS, st.integers(0, 50))
def test_what_is_counted_is_the_length_of_the_run(
    before: list[Any], workers: list[list[Any]], after: list[Any], slack: int
) -> None:
    asking = line(100, before, thread=0)
    joined = asking[-1].end
    parallel = [line(joined + number, steps, number) for number, steps in enumerate(workers, 1)]
    joined = max([joined, *(events[-1].end for events in parallel)]) + slack
    asking += line(joined, after, thread=0)
    whole = Event("run", 70, asking[-1].end + slack, 0)
    found = Breakdown(max(len(workers), 1))
    found.add(whole, [event for events in [*parallel, asking] for event in events])
    assert sum(found.sums.values()) == pytest.approx(whole.end - whole.start)
    assert min(found.sums.values()) >= 0


def test_where_time_is_counted() -> None:
    found = Breakdown(workers=2)
    calls = [
        Event("stem", 10, 30, 0, "stem", GRAPH),
        Event("fetch decisions", 50, 54, 1, "block 0", FETCH),
        Event("blocks.0.mlp", 60, 90, 1, "block 0", GRAPH),
        Event("blocks.0.both", 40, 50, 2, "block 0", GRAPH),
        Event("blocks.1.both", 100, 120, 0, "block 1", GRAPH),
        Event("fetch logits", 120, 121, 0, "block 1", FETCH),
    ]
    found.add(Event("run", 0, 130, 0), calls)
    assert found.sums == {
        ("stem", BETWEEN): 10,
        ("stem", GRAPH): 20,
        ("block 0", BETWEEN): (20 + 6 + 10) / 2,
        ("block 0", FETCH): 4 / 2,
        ("block 0", GRAPH): (30 + 10) / 2,
        (IDLE, BETWEEN): (140 - 60 - 20) / 2,
        ("block 1", BETWEEN): 9,
        ("block 1", GRAPH): 20,
        ("block 1", FETCH): 1,
    }


@pytest.mark.parametrize("parallel", ["operators", "samples"])
def test_a_profile_adds_up(parallel: str, tiny_bundle: Path) -> None:
    runtime = adavit.load(tiny_bundle, threads=2, parallel=parallel)
    images = random_images(tiny(), 3)
    found = profile(runtime, images, Plan(batch=3, iterations=4, warmup=1))
    assert [part["part"] for part in found["parts"]] == ["stem", "block 0", "block 1", "block 2", IDLE]
    assert found["runs"] + found["disturbed_runs"] == 4
    assert found["total"]["total_ms"] == pytest.approx(found["latency_ms"])
    for part in (*found["parts"], found["total"]):
        assert part["total_ms"] == pytest.approx(sum(part[key] for key in KEYS))
        assert part["graphs_ms"] == pytest.approx(part["ideal_ms"] + part["padding_ms"] + part["slower_ms"])
        assert min(part[key] for key in (*KEYS, "ideal_ms", "padding_ms")) >= 0
    executed = runtime.run(images).macs.sum()
    assert found["total"]["ideal_ms"] == pytest.approx(found["dense_ms"] * executed / (3 * dense_macs(tiny())))
    assert 0 < found["timers_ms"] < found["latency_ms"]
    assert (found["parts"][-1]["calls_ms"] > 0) == (parallel == "samples")


def test_what_a_report_counts(runtime: Runtime) -> None:
    """Two runs, and one that something disturbed; of an image whose block 1 is an MLP for one of three heads."""
    arch, policy = tiny(), Policy.dense(tiny(), 1)
    policy.heads[:, 1, 1:] = policy.sublayers[:, 1, 0] = False
    key = BlockKey(1, Sublayers(attention=False, mlp=True), (0,))

    def turn(length: int, dense: int) -> Turn:
        calls = [
            Event("stem", 0, 100_000, 0, "stem", GRAPH),
            Event("blocks.1.mlp", 110_000, length - 50_000, 0, "block 1", GRAPH, key, arch.tokens, 2 * arch.tokens),
            Event("fetch logits", length - 50_000, length - 40_000, 0, "block 2", FETCH),
        ]
        return Turn(Event("run", 0, length, 0), calls, policy, Event("dense twin", 0, dense, 0))

    turns = [turn(1_000_000, 2_000_000), turn(9_000_000, 1_900_000), turn(1_400_000, 2_500_000)]
    found = _report(runtime, Plan(batch=1), turns, noted=300.0)
    assert (found["runs"], found["disturbed_runs"]) == (2, 1)
    assert found["latency_ms"] == pytest.approx(1.2)
    assert found["dense_ms"] == 2.0
    assert found["dense_gmacs_per_second"] == pytest.approx(dense_macs(arch) / 2e6)
    assert found["timers_ms"] == pytest.approx(3 * 300 / 1e6)
    parts = {part["part"]: part for part in found["parts"]}
    assert parts["stem"]["graphs_ms"] == pytest.approx(0.1)
    assert parts["block 1"]["graphs_ms"] == pytest.approx(1.2 - 0.16)
    assert parts["block 1"]["calls_ms"] == pytest.approx(0.01)
    assert (parts["block 2"]["fetch_ms"], parts["block 2"]["calls_ms"]) == pytest.approx((0.01, 0.04))
    asked = asked_macs(arch, policy)
    for name, macs in asked.items():
        assert parts[name]["ideal_ms"] == pytest.approx(2 * macs / dense_macs(arch))
    more = block_macs(arch, 2 * arch.tokens, 1, 0, 1) - block_macs(arch, arch.tokens, 1, 0, 1)
    assert parts["block 1"]["padding_ms"] == pytest.approx(2 * more / dense_macs(arch))
    assert parts["block 2"]["padding_ms"] == parts["stem"]["padding_ms"] == 0
    slower = parts["block 1"]["graphs_ms"] - parts["block 1"]["ideal_ms"] - parts["block 1"]["padding_ms"]
    assert parts["block 1"]["slower_ms"] == pytest.approx(slower)
    assert found["total"]["total_ms"] == pytest.approx(1.2)


def test_a_profile_is_of_what_runs(wide: tuple[Path, Path], tmp_path: Path) -> None:
    """Of a recorded policy, and of the runtime's offsets; the first runs are traced, and what is prepared stays so."""
    runtime, images = adavit.load(wide[0], threads=1, specialise=False), random_images(WIDE, 3)
    policy = Policy.dense(WIDE, 3)
    policy.heads[:, 1:, 1:] = False
    policy.sublayers[:, 2, 1] = False
    prepared = runtime.specialise(policy)
    assert prepared > 0
    plan = Plan(iterations=12, warmup=0)

    def ran(runtime: Runtime, recorded: Policy | None = None) -> list[dict[str, Any]]:
        profile(runtime, images, plan, recorded, tmp_path / "trace.json")
        events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
        return [event for event in events if event["ph"] == "X"]

    events = ran(runtime, policy)
    names = Counter(event["name"] for event in events)
    assert names["run"] == names["dense twin"] == names["blocks.2.attention"] == TRACED < 12
    (about,) = {tuple(event["args"].items()) for event in events if event["name"] == "blocks.2.attention"}
    assert dict(about) == {"tokens": WIDE.tokens, "heads": 1}
    assert len(runtime.backend.prepared()) == prepared
    everything = Runtime(
        runtime.bundle, runtime.graphs, runtime.backend, runtime.options, Offsets(1e3, 1e3, 1e3), specialise=False
    )
    found = [event["args"] for event in ran(everything) if event["name"] == "blocks.2.both"]
    assert found == [{"tokens": WIDE.tokens, "heads": WIDE.heads}] * TRACED


def test_timers_change_nothing(runtime: Runtime) -> None:
    images, policy = random_images(tiny(), 2), random_policy(tiny(), 2, seed=3)
    timing = ProfiledBackend(tiny(), runtime.backend)
    timed = Runtime(runtime.bundle, runtime.graphs, timing, runtime.options, specialise=False)
    for replay in (None, policy):
        wanted = runtime.run(images, replay)
        with timing.recording() as calls:
            found = timed.run(images, replay)
        np.testing.assert_array_equal(found.logits, wanted.logits)
        assert_same_policy(found.policy, wanted.policy)
        assert {call.thread for call in calls} == {threading.get_ident()}
        assert Counter(call.part for call in calls if call.kind == GRAPH) == dict.fromkeys(
            asked_macs(tiny(), policy), 2
        )
        assert sum(call.name == "fetch decisions" for call in calls) == (0 if replay else 2 * tiny().depth)
        assert all(first.end <= second.start for first, second in pairwise(calls))
        assert sum(asked_macs(tiny(), wanted.policy).values()) == wanted.macs.sum()
        assert not any(padding_macs(tiny(), calls, Policy.dense(tiny(), 1)).values())


def test_decisions_belong_to_the_block_that_takes_them(runtime: Runtime) -> None:
    timing = ProfiledBackend(tiny(), runtime.backend)
    with timing.recording() as calls:
        Runtime(runtime.bundle, runtime.graphs, timing, runtime.options, specialise=False).run(random_images(tiny(), 1))
    parts = ["stem", *(f"block {block}" for block in range(tiny().depth) for _ in "dg")]
    assert [call.part for call in calls][: len(parts)] == parts
    assert {call.part for call in calls[len(parts) :]} == {f"block {tiny().depth - 1}"}


def test_padding_is_of_further_tokens() -> None:
    event = Event("blocks.1.both", 0, 1, 0, "block 1", GRAPH, BlockKey(1, BOTH, (0, 2)), kept=9, computed=12)
    found = padding_macs(tiny(), [event, Event("stem", 0, 1, 0, "stem", GRAPH)], Policy.dense(tiny(), 1))
    assert found["block 1"] == block_macs(tiny(), 12, 2, 1, 1) - block_macs(tiny(), 9, 2, 1, 1)
    assert found["stem"] == 0


def test_a_trace_is_what_perfetto_reads(tmp_path: Path) -> None:
    key = BlockKey(0, Sublayers(attention=False, mlp=True), (0, 1))
    events = [Event("run", 5_000, 9_000, 77), Event("blocks.0.mlp", 6_000, 7_500, 99, "block 0", GRAPH, key, 3, 4)]
    write_trace(tmp_path / "trace.json", "a model", events)
    written = json.loads((tmp_path / "trace.json").read_text())
    assert written["traceEvents"][0]["args"] == {"name": "a model"}
    complete = [event for event in written["traceEvents"] if event["ph"] == "X"]
    assert [(e["name"], e["cat"], e["ts"], e["dur"], e["tid"], e["args"]) for e in complete] == [
        ("run", "run", 0.0, 4.0, 1, {}),
        ("blocks.0.mlp", "graph", 1.0, 1.5, 2, {"tokens": 4, "heads": 2}),
    ]
    named = {event["tid"] for event in written["traceEvents"] if event["name"] == "thread_name"}
    assert {event["tid"] for event in complete} == named


def test_the_command(tiny_bundle: Path, tmp_path: Path) -> None:
    trace, values = tmp_path / "trace.json", tmp_path / "report.json"
    short = (tiny_bundle, "--iterations", 3, "--threads", 1)
    done = invoke(run, *short, "--profile", trace, "--json", values)
    assert (done.exit_code, done.stderr) == (0, "")
    columns = ("ideal", "padding", "excess", "graphs", "waiting", "overhead")
    for part in (*columns, "stem", "block 2", "the timers' own cost", "GMAC/s"):
        assert part in done.stdout
    meanings = [line.split()[0] for line in done.stdout.splitlines()[-len(columns) :]]
    assert meanings == list(columns), "every column has its meaning below"
    found = json.loads(values.read_text())["profile"]
    assert found["total"]["total_ms"] == pytest.approx(found["latency_ms"])
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event["ph"] == "X"]
    runs = [event for event in events if event["name"] == "run"]
    assert len(runs) == sum(event["name"] == "dense twin" for event in events) == 3
    calls = [event for event in events if event["name"] not in ("run", "dense twin")]
    assert all(any(r["ts"] <= e["ts"] and e["ts"] + e["dur"] <= r["ts"] + r["dur"] for r in runs) for e in calls)
    assert "padding" in invoke(run, *short, "--profile").stdout
    assert "padding" not in invoke(run, *short).stdout


def test_wrong_inputs(tiny_bundle: Path, bundle: Path) -> None:
    message = refusal(invoke(run, "--profile", tiny_bundle), code=2)
    assert "is a folder; a BUNDLE goes before --profile" in message
    config = read_config(bundle)
    del config["precisions"]["fp32"]["dense"]
    write_config(bundle, config)
    assert "export again without --no-dense, or leave out --profile" in refusal(invoke(run, bundle, "--profile"))
