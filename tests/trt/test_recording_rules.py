"""What the double of CUDA refuses, as CUDA does: each rule, broken by hand."""

import threading
from contextlib import suppress
from typing import Any

import pytest
from bench import Bench
from double import Gpu

from adavit.errors import BackendError
from adavit.runtime.backends.cuda.capture import Condition, Recording
from adavit.runtime.backends.cuda.setter import Setter


def allocate(bench: Bench, event: Any) -> None:
    bench.cuda.call("cudaMalloc", 8)


def allocate_pinned(bench: Bench, event: Any) -> None:
    bench.cuda.call("cudaMallocHost", 8)


def free(bench: Bench, event: Any) -> None:
    bench.cuda.call("cudaFree", bench.numbers[7])


def wait(bench: Bench, event: Any) -> None:
    bench.wait()


def wait_for_another_stream(bench: Bench, event: Any) -> None:
    bench.wait(bench.other)


def wait_for_an_event(bench: Bench, event: Any) -> None:
    bench.cuda.call("cudaEventSynchronize", event)


def wait_for_a_recorded_event(bench: Bench, event: Any) -> None:
    bench.cuda.call("cudaEventRecord", event, bench.stream)
    bench.cuda.call("cudaEventSynchronize", event)


def ask_for_an_event(bench: Bench, event: Any) -> None:
    if not bench.cuda.ready(event):
        raise BackendError("unknown")


def depend_on_what_is_outside(bench: Bench, event: Any) -> None:
    bench.cuda.call("cudaStreamWaitEvent", bench.stream, event, 0)


def leave_a_stream_apart(bench: Bench, event: Any) -> None:
    bench.cuda.call("cudaEventRecord", event, bench.stream)
    bench.cuda.call("cudaStreamWaitEvent", bench.other, event, 0)
    bench.copy(2, 1, bench.other)


def record_twice(bench: Bench, event: Any) -> None:
    bench.cuda.call("cudaStreamBeginCapture", bench.stream, 1)


def load_a_kernel(bench: Bench, event: Any) -> None:
    Setter(bench.cuda)


FORBIDDEN = [
    allocate, allocate_pinned, free, wait, wait_for_another_stream, wait_for_an_event, wait_for_a_recorded_event,
    ask_for_an_event, depend_on_what_is_outside, leave_a_stream_apart, load_a_kernel,
]  # fmt: skip


@pytest.mark.parametrize("broken", [*FORBIDDEN, record_twice], ids=lambda fault: fault.__name__)
def test_what_may_not_be_done_while_recording(bench: Bench, machine: Gpu, broken: Any) -> None:
    event = bench.cuda.call("cudaEventCreateWithFlags", 2)
    bench.cuda.call("cudaEventRecord", event, bench.other)
    with pytest.raises(BackendError), Recording(bench.cuda, bench.stream):
        bench.copy(1, 0, bench.stream)
        broken(bench, event)
    assert machine.alive["graph"] == 0
    bench.wait(bench.other)
    bench.cuda.call("cudaEventDestroy", event)


def test_the_first_error_is_the_one_that_is_told(bench: Bench) -> None:
    with pytest.raises(BackendError, match="cudaMalloc failed"), Recording(bench.cuda, bench.stream):
        bench.cuda.call("cudaMalloc", 8)


def test_a_recording_that_does_not_begin_leaves_nothing(bench: Bench, setter: Setter, machine: Gpu) -> None:
    with Recording(bench.cuda, bench.stream) as recording:
        bench.copy(1, 0, bench.stream)
        with pytest.raises(BackendError, match="BeginCapture"), Recording(bench.cuda, bench.stream, setter):
            pass
        assert machine.alive["stream"] == 2
    recording.instantiate().close()


@pytest.mark.parametrize("broken", [one for one in FORBIDDEN if one is not ask_for_an_event], ids=lambda f: f.__name__)
def test_a_recording_that_was_broken_is_not_used(bench: Bench, broken: Any) -> None:
    """Even where nobody looked at what the call said."""
    event = bench.cuda.call("cudaEventCreateWithFlags", 2)
    bench.cuda.call("cudaEventRecord", event, bench.other)
    with pytest.raises(BackendError, match="EndCapture"), Recording(bench.cuda, bench.stream):
        bench.copy(1, 0, bench.stream)
        with suppress(BackendError):
            broken(bench, event)
    bench.wait(bench.other)
    bench.cuda.call("cudaEventDestroy", event)


@pytest.mark.parametrize("broken", [allocate, wait, wait_for_an_event], ids=lambda fault: fault.__name__)
def test_what_may_not_be_done_while_recording_a_body(bench: Bench, setter: Setter, machine: Gpu, broken: Any) -> None:
    event = bench.cuda.call("cudaEventCreateWithFlags", 2)
    with (
        pytest.raises(BackendError),
        Recording(bench.cuda, bench.stream, setter) as recording,
        recording.when(recording.condition()) as body,
    ):
        bench.copy(1, 0, body)
        broken(bench, event)
    assert machine.alive["graph"] == 0
    bench.cuda.call("cudaEventDestroy", event)


def test_a_condition_is_for_one_part(bench: Bench, setter: Setter) -> None:
    with pytest.raises(BackendError, match="AddNode"), Recording(bench.cuda, bench.stream, setter) as recording:
        condition = recording.condition()
        for _ in range(2):
            with recording.when(condition) as body:
                bench.copy(1, 0, body)


def test_a_condition_has_a_part(bench: Bench, setter: Setter, machine: Gpu) -> None:
    with Recording(bench.cuda, bench.stream, setter) as recording:
        recording.condition()
        bench.copy(1, 0, bench.stream)
    with pytest.raises(BackendError, match="Instantiate"):
        recording.instantiate()
    assert machine.alive["graph"] == 0


def test_a_condition_of_another_graph(bench: Bench, setter: Setter) -> None:
    with Recording(bench.cuda, bench.stream, setter) as recording:
        condition = recording.condition()
        with recording.when(condition) as body:
            bench.copy(1, 0, body)
    recording.instantiate().close()
    with (
        pytest.raises(BackendError, match="AddNode"),
        Recording(bench.cuda, bench.stream, setter) as recording,
        recording.when(condition) as body,
    ):
        bench.copy(1, 0, body)


def test_addresses_live_as_long_as_the_graph(bench: Bench) -> None:
    with Recording(bench.cuda, bench.stream) as recording:
        bench.copy(1, 0, bench.stream)
    executable = recording.instantiate()
    bench.cuda.call("cudaFree", bench.numbers[1])
    bench.numbers[1] = bench.cuda.call("cudaMalloc", 256)
    executable.launch(bench.stream)
    with pytest.raises(AssertionError, match="are no device memory"):
        bench.wait()
    bench.gpu.streams[int(bench.stream)].queue.clear()
    bench.gpu.alive["exec"] -= 1


def test_a_stream_that_is_gone(bench: Bench) -> None:
    gone = bench.cuda.call("cudaStreamCreateWithFlags", 1)
    bench.cuda.call("cudaStreamDestroy", gone)
    with pytest.raises(AssertionError, match="is no stream"):
        bench.copy(1, 0, gone)


def test_a_graph_is_not_freed_while_it_runs(bench: Bench) -> None:
    with Recording(bench.cuda, bench.stream) as recording:
        bench.copy(1, 0, bench.stream)
    executable = recording.instantiate()
    executable.launch(bench.stream)
    with pytest.raises(AssertionError, match="may be running"):
        executable.close()
    bench.wait()
    executable.close()


def test_a_graph_is_not_launched_into_a_recording(bench: Bench) -> None:
    with Recording(bench.cuda, bench.stream) as recording:
        bench.copy(1, 0, bench.stream)
    executable = recording.instantiate()
    with pytest.raises(BackendError, match="GraphLaunch"), Recording(bench.cuda, bench.stream):
        executable.launch(bench.stream)
    executable.close()


def test_numbers_of_conditions_are_on_the_device(bench: Bench, setter: Setter) -> None:
    host = bench.cuda.call("cudaMallocHost", 8)
    with Recording(bench.cuda, bench.stream, setter) as recording:
        condition = recording.condition()
        recording.set([(condition, host)])
        with recording.when(condition) as body:
            bench.copy(1, 0, body)
    executable = recording.instantiate()
    executable.launch(bench.stream)
    with pytest.raises(AssertionError, match="are no device memory"):
        bench.wait()
    bench.gpu.alive["exec"] -= 1
    bench.cuda.call("cudaFreeHost", host)


def test_an_empty_body_hangs_before_cuda_12_8(bench: Bench, setter: Setter, machine: Gpu) -> None:
    machine.driver = 12070
    with Recording(bench.cuda, bench.stream, setter) as recording:
        add_node(bench, recording.condition(), body=False)
    executable = recording.instantiate()
    executable.launch(bench.stream)
    with pytest.raises(AssertionError, match="hangs"):
        bench.wait()
    bench.gpu.alive["exec"] -= 1


def test_nodes_run_in_no_order_but_that_of_their_dependencies(bench: Bench, setter: Setter) -> None:
    """A part that is added to the graph, but not to what its stream waits for, runs too late."""
    for tied, wanted in ((True, 1), (False, -1)):
        with Recording(bench.cuda, bench.stream, setter) as recording:
            condition = recording.condition()
            recording.set([(condition, bench.numbers[0])])
            add_node(bench, condition, tied=tied)
            bench.copy(3, 2, bench.stream)
        executable = recording.instantiate()
        for number, value in ((0, 1), (1, 1), (2, -1)):
            bench.put(number, value)
        bench.run(executable)
        assert bench.get(3) == wanted
        executable.close()


def add_node(bench: Bench, condition: Condition, body: bool = True, tied: bool = True) -> None:
    """Adds a conditional node by hand; its body copies a number."""
    runtime, call = bench.cuda.runtime, bench.cuda.call
    node = runtime.cudaGraphNodeParams()
    node.type = runtime.cudaGraphNodeType.cudaGraphNodeTypeConditional
    node.conditional.handle, node.conditional.type, node.conditional.size = condition.handle, 0, 1
    _, _, graph, nodes, edges, count = call("cudaStreamGetCaptureInfo", bench.stream)
    added = call("cudaGraphAddNode", graph, nodes, edges, count, node)
    if tied:
        call("cudaStreamUpdateCaptureDependencies", bench.stream, [added], None, 1, 1)
    if body:
        call("cudaStreamBeginCaptureToGraph", bench.other, node.conditional.phGraph_out[0], None, None, 0, 1)
        bench.copy(2, 1, bench.other)
        call("cudaStreamEndCapture", bench.other)


def test_streams_are_ordered_by_events_alone(bench: Bench) -> None:
    bench.put(0, 5)
    bench.put(1, 0)
    event = bench.cuda.call("cudaEventCreateWithFlags", 2)
    for ordered, wanted in ((False, 0), (True, 5)):
        bench.copy(1, 0, bench.other)
        bench.cuda.call("cudaEventRecord", event, bench.other)
        if ordered:
            bench.cuda.call("cudaStreamWaitEvent", bench.stream, event, 0)
        bench.copy(2, 1, bench.stream)
        bench.wait()
        assert bench.get(2) == wanted
        assert bench.cuda.ready(event) == ordered
        bench.wait(bench.other)
        bench.put(1, 0)
    bench.cuda.call("cudaEventDestroy", event)


def test_another_thread_does_not_get_into_a_graph(bench: Bench) -> None:
    found: list[BaseException] = []

    def intrude() -> None:
        try:
            bench.copy(2, 0, bench.stream)
        except AssertionError as error:
            found.append(error)

    with Recording(bench.cuda, bench.stream) as recording:
        bench.copy(1, 0, bench.stream)
        thread = threading.Thread(target=intrude)
        thread.start()
        thread.join()
    recording.instantiate().close()
    assert "another thread" in str(found[0])
