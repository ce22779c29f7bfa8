"""The waterfall: what is booked adds up to the latency, whoever ran when."""

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
from adavit.cli import run
from adavit.macs import dense_macs, mlp_macs
from adavit.runtime import Policy, Runtime
from adavit.runtime.benchmark import Plan
from adavit.bundle.operating_points import Offsets
from adavit.runtime.ledger import IDLE, Ledger, kind_of
from adavit.runtime.profile import Event, Profiler
from adavit.runtime.trace import write_trace
from adavit.runtime.waterfall import TRACED, Turn, _report, asked_macs, computed_macs, profile

NAMES = ("blocks.0.decide", "fetch", "gather", "blocks.1.attention", "blocks.1.mlp_gather", "scatter")
KEYS = ("engines_ms", "decision_ms", "moves_ms", "calls_ms")


def line(start: int, steps: list[tuple[int, int, str]], thread: int) -> list[Event]:
    """Events of a thread, each some time after the one before."""
    events = []
    for gap, length, name in steps:
        events.append(Event(name, start + gap, start + gap + length, thread, {}))
        start += gap + length
    return events


STEPS = st.lists(st.tuples(st.integers(0, 90), st.integers(0, 90), st.sampled_from(NAMES)), min_size=1, max_size=8)


@given(STEPS, st.lists(STEPS, max_size=3), STEPS, st.integers(0, 50), st.integers(0, 40))
def test_what_is_booked_is_the_length_of_the_run(
    before: list[Any], workers: list[list[Any]], after: list[Any], slack: int, call: int
) -> None:
    asking = line(100, before, thread=0)
    joined = asking[-1].end
    parallel = [line(joined + number, steps, number) for number, steps in enumerate(workers, 1)]
    joined = max([joined, *(events[-1].end for events in parallel)]) + slack
    asking += line(joined, after, thread=0)
    whole = Event("run", 70, asking[-1].end + slack, 0, {})
    ledger = Ledger(max(len(workers), 1), call)
    ledger.book(whole, [event for events in [*parallel, asking] for event in events])
    assert sum(ledger.sums.values()) == pytest.approx(whole.end - whole.start)
    assert min(ledger.sums.values()) >= 0


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("blocks.1.decide", "decision"),
        ("blocks.1.decide_set", "decision"),
        ("blocks.1.both_set", "engines"),
        ("blocks.1.mlp_gather", "engines"),
        ("blocks.1.mlp_weights", "moves"),
        ("gather", "moves"),
        ("fetch", "decision"),
    ],
)
def test_what_a_call_counts_as(name: str, kind: str) -> None:
    assert kind_of(Event(name, 0, 1, 1, {}), "block 1") == kind


def test_where_time_is_booked() -> None:
    ledger = Ledger(workers=2, call=3)
    calls = [
        Event("stem", 10, 30, 0, {}),
        Event("blocks.0.decide", 40, 50, 1, {}),
        Event("fetch", 50, 54, 1, {}),
        Event("gather", 56, 60, 1, {}),
        Event("blocks.0.mlp", 60, 90, 1, {}),
        Event("blocks.0.attention_weights", 30, 50, 2, {}),
        Event("head", 100, 120, 0, {}),
        Event("fetch", 120, 121, 0, {}),
    ]
    ledger.book(Event("run", 0, 130, 0, {}), calls)
    assert ledger.sums == {
        ("stem", "calls"): 10 + 3,
        ("stem", "engines"): 17,
        ("block 0", "calls"): (10 + 3 + 2 + 3) / 2,
        ("block 0", "decision"): (7 + 4) / 2,
        ("block 0", "moves"): (4 + 20) / 2,
        ("block 0", "engines"): 27 / 2,
        (IDLE, "calls"): (140 - 60 - 20) / 2,
        ("head", "calls"): 3 + 9,
        ("head", "engines"): 17,
        ("head", "moves"): 1,
    }


@pytest.mark.parametrize("parallel", ["operators", "samples"])
def test_a_profile_adds_up(parallel: str, tiny_bundle: Path) -> None:
    runtime = adavit.load(tiny_bundle, threads=2, parallel=parallel)
    images = random_images(tiny(), 3)
    found = profile(runtime, images, Plan(batch=3, iterations=4, warmup=1))
    assert [part["part"] for part in found["parts"]] == ["stem", "block 0", "block 1", "block 2", "head", IDLE]
    assert found["runs"] + found["disturbed_runs"] == 4
    assert found["total"]["total_ms"] == pytest.approx(found["latency_ms"])
    for part in (*found["parts"], found["total"]):
        assert part["total_ms"] == pytest.approx(sum(part[key] for key in KEYS))
        assert part["engines_ms"] == pytest.approx(part["ideal_ms"] + part["padding_ms"] + part["slower_ms"])
        assert min(part[key] for key in (*KEYS, "ideal_ms", "padding_ms")) >= 0
    executed = runtime.run(images).macs.sum()
    assert found["total"]["ideal_ms"] == pytest.approx(found["dense_ms"] * executed / (3 * dense_macs(tiny())))
    assert 0 < found["timers_ms"] < found["latency_ms"]
    assert found["call_us"] > 0
    assert (found["parts"][-1]["calls_ms"] > 0) == (parallel == "samples")


def test_what_a_report_counts(runtime: Runtime) -> None:
    """Two runs, and one that something disturbed; of an image whose block 1 is an MLP for one of three heads."""
    arch, policy = tiny(), Policy.dense(tiny(), 1)
    policy.heads[:, 1, 1:] = policy.sublayers[:, 1, 0] = False
    masked = {"K": arch.tokens}

    def turn(length: int, dense: int) -> Turn:
        calls = [Event("stem", 0, 100_000, 0, {}), Event("blocks.1.mlp", 100_000, length - 50_000, 0, masked)]
        calls.append(Event("head", length - 50_000, length - 40_000, 0, {}))
        return Turn(Event("run", 0, length, 0, {}), calls, policy, Event("dense twin", 0, dense, 0, {}))

    turns = [turn(1_000_000, 2_000_000), turn(9_000_000, 1_900_000), turn(1_400_000, 2_500_000)]
    found = _report(runtime, Plan(batch=1), turns, noted=300.0, call=5_000.0)
    assert (found["runs"], found["disturbed_runs"]) == (2, 1)
    assert found["latency_ms"] == pytest.approx(1.2)
    assert found["dense_ms"] == 2.0
    assert found["dense_gmacs_per_second"] == pytest.approx(dense_macs(arch) / 2e6)
    assert found["timers_ms"] == pytest.approx(3 * 300 / 1e6)
    assert found["call_us"] == 5
    parts = {part["part"]: part for part in found["parts"]}
    assert parts["stem"]["engines_ms"] == pytest.approx(0.095)
    assert parts["block 1"]["engines_ms"] == pytest.approx(1.2 - 0.15 - 0.005)
    assert parts["block 1"]["calls_ms"] == pytest.approx(0.005)
    assert (parts["head"]["engines_ms"], parts["head"]["calls_ms"]) == pytest.approx((0.005, 0.045))
    asked = asked_macs(arch, policy)
    for name, macs in asked.items():
        assert parts[name]["ideal_ms"] == pytest.approx(2 * macs / dense_macs(arch))
    more = mlp_macs(arch, arch.tokens, 3) - mlp_macs(arch, arch.tokens, 1)
    assert parts["block 1"]["padding_ms"] == pytest.approx(2 * more / dense_macs(arch))
    assert parts["head"]["padding_ms"] == parts["stem"]["padding_ms"] == 0
    slower = parts["block 1"]["engines_ms"] - parts["block 1"]["ideal_ms"] - parts["block 1"]["padding_ms"]
    assert parts["block 1"]["slower_ms"] == pytest.approx(slower)
    assert found["total"]["total_ms"] == pytest.approx(1.2)


def test_a_profile_is_of_what_runs(wide: tuple[Path, Path], tmp_path: Path) -> None:
    """Of its engines for sets of heads, a recorded policy, and its offsets; the first runs are traced."""
    runtime, images = adavit.load(wide[0], threads=1), random_images(WIDE, 3)
    policy = Policy.dense(WIDE, 3)
    policy.heads[:, 1:, 1:] = False
    runtime.specialise(policy)
    plan = Plan(iterations=12, warmup=0)

    def ran(runtime: Runtime, recorded: Policy | None = None) -> list[dict[str, Any]]:
        profile(runtime, images, plan, recorded, tmp_path / "trace.json")
        events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
        return [event for event in events if event["ph"] == "X"]

    events = ran(runtime, policy)
    names = Counter(event["name"] for event in events)
    assert names["run"] == names["dense twin"] == names["blocks.2.both_set"] == TRACED < 12
    assert {event["args"]["h"] for event in events if event["name"] == "blocks.2.both_set"} == {1}
    runtime.dispatcher.specialise(())
    names = Counter(event["name"] for event in ran(runtime, policy))
    assert names["blocks.2.attention_gather"] + names["blocks.2.attention"] == TRACED
    assert not names["blocks.2.attention_weights"]  # every set of heads was seen before what is timed
    everything = Runtime(runtime.bundle, runtime.backend, runtime.options, Offsets(1000.0, 1000.0, 1000.0))
    assert {event["args"].get("K") for event in ran(everything) if event["name"] == "blocks.2.mlp"} == {WIDE.tokens}


def test_timers_change_nothing(runtime: Runtime) -> None:
    images, policy = random_images(tiny(), 2), random_policy(tiny(), 2, seed=3)
    profiler = Profiler(runtime.bundle, runtime.backend)
    timed = Runtime(runtime.bundle, profiler, runtime.options)
    for replay in (None, policy):
        wanted = runtime.run(images, replay)
        with profiler.recording() as calls:
            found = timed.run(images, replay)
        np.testing.assert_array_equal(found.logits, wanted.logits)
        assert_same_policy(found.policy, wanted.policy)
        assert {call.thread for call in calls} == {threading.get_ident()}
        assert sum(call.name.endswith(".decide") for call in calls) == 2 * tiny().depth
        assert all(first.end <= second.start for first, second in pairwise(calls))
        asked = asked_macs(tiny(), wanted.policy)
        assert sum(asked.values()) == wanted.macs.sum()
        computed = sum(computed_macs(tiny(), call) for call in calls)
        assert computed >= sum(macs for part, macs in asked.items() if part.startswith("block"))


def test_padding_is_what_masked_heads_cost() -> None:
    arch = tiny()
    masked = computed_macs(arch, Event("blocks.1.attention", 0, 1, 0, {"K": 9}))
    gathered = computed_macs(arch, Event("blocks.1.attention_gather", 0, 1, 0, {"K": 9, "h": 1}))
    assert masked == 3 * gathered
    in_a_set = computed_macs(arch, Event("blocks.1.attention_set", 0, 1, 0, {"K": 9, "c": arch.head_width}))
    assert in_a_set == gathered
    assert computed_macs(arch, Event("blocks.1.attention_weights", 0, 1, 0, {"h": 1})) == 0
    assert computed_macs(arch, Event("gather", 0, 1, 0, {"rows": 9})) == 0


def test_a_trace_is_what_perfetto_reads(tmp_path: Path) -> None:
    events = [Event("run", 5_000, 9_000, 77, {}), Event("blocks.0.mlp", 6_000, 7_500, 99, {"K": 4})]
    write_trace(tmp_path / "trace.json", "a model", events)
    written = json.loads((tmp_path / "trace.json").read_text())
    assert written["traceEvents"][0]["args"] == {"name": "a model"}
    complete = [event for event in written["traceEvents"] if event["ph"] == "X"]
    assert [(e["name"], e["ts"], e["dur"], e["tid"], e["args"]) for e in complete] == [
        ("run", 0.0, 4.0, 1, {}),
        ("blocks.0.mlp", 1.0, 1.5, 2, {"K": 4}),
    ]
    named = {event["tid"] for event in written["traceEvents"] if event["name"] == "thread_name"}
    assert {event["tid"] for event in complete} == named


def test_the_command(tiny_bundle: Path, tmp_path: Path) -> None:
    trace, values = tmp_path / "trace.json", tmp_path / "report.json"
    short = (tiny_bundle, "--iterations", 3, "--threads", 1)
    done = invoke(run, *short, "--profile", trace, "--json", values)
    assert (done.exit_code, done.stderr) == (0, "")
    columns = ("ideal", "padding", "excess", "engines", "decisions", "copies", "overhead")
    for part in (*columns, "stem", "block 2", "head", "the timers' own cost", "GMAC/s"):
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
    del config["engines"]["dense"]
    write_config(bundle, config)
    assert "export again without --no-dense, or leave out --profile" in refusal(invoke(run, bundle, "--profile"))
