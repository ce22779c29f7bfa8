"""CUDA graphs with conditions, on a double that has CUDA's rules; and each of these rules, broken by hand."""

import threading
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from bench import Bench
from cuda_double import CAPABILITY
from double import Gpu

from adavit.errors import BackendError
from adavit.runtime.backends.cuda import bindings
from adavit.runtime.backends.cuda.capture import Condition, Executable, Recording, conditional_support
from adavit.runtime.backends.cuda.setter import Setter, compiled


def run(bench: Bench, executable: Executable) -> None:
    executable.launch(bench.stream)
    bench.wait()


def test_what_is_recorded_runs_at_each_launch(bench: Bench) -> None:
    with Recording(bench.cuda, bench.stream) as recording:
        bench.copy(1, 0, bench.stream)
        bench.copy(2, 1, bench.stream)
    executable = recording.instantiate()
    for value in (3, 4):
        bench.put(0, value)
        bench.put(2, 0)
        bench.wait()
        assert bench.get(2) == 0
        run(bench, executable)
        assert bench.get(2) == value
    executable.close()


def test_parts_run_where_their_numbers_on_the_device_say_so(bench: Bench, setter: Setter) -> None:
    """The first condition is of 3, which the graph itself makes; the second and the third of 4 and 5."""
    with Recording(bench.cuda, bench.stream, setter) as recording:
        conditions = [recording.condition() for _ in range(3)]
        bench.copy(3, 0, bench.stream)
        recording.set([(conditions[0], bench.numbers[3])])
        with recording.when(conditions[0]) as body:
            bench.copy(6, 1, body)
            bench.copy(4, 6, body)
        recording.set([(conditions[1], bench.numbers[4]), (conditions[2], bench.numbers[5])])
        with recording.when(conditions[1]) as body:
            bench.copy(7, 2, body)
        with recording.when(conditions[2]) as body:
            bench.copy(6, 7, body)
        bench.copy(7, 6, bench.stream)
    executable = recording.instantiate()
    bench.put(1, 1)
    bench.put(2, 2)
    for first, third, wanted in ((9, 0, 1), (9, 1, 2), (0, 0, -1), (0, 1, -2), (-5, 1, -2)):
        for number, value in ((0, first), (4, 0), (5, third), (6, -1), (7, -2)):
            bench.put(number, value)
        run(bench, executable)
        assert bench.get(7) == wanted
    executable.close()


def test_a_condition_that_is_not_set_does_not_hold(bench: Bench, setter: Setter) -> None:
    with Recording(bench.cuda, bench.stream, setter) as recording, recording.when(recording.condition()) as body:
        bench.copy(1, 0, body)
    executable = recording.instantiate()
    bench.put(1, 5)
    run(bench, executable)
    assert bench.get(1) == 5
    executable.close()


def test_one_launch_sets_two_conditions(bench: Bench, setter: Setter, machine: Gpu) -> None:
    with Recording(bench.cuda, bench.stream, setter) as recording:
        conditions = [recording.condition() for _ in range(5)]
        recording.set([(condition, bench.numbers[0]) for condition in conditions])
        for number, condition in enumerate(conditions):
            with recording.when(condition) as body:
                bench.copy(number + 1, 0, body)
    assert [detail for call, detail in machine.calls if call == "set"] == [2, 2, 1]
    executable = recording.instantiate()
    bench.put(0, 8)
    run(bench, executable)
    assert [bench.get(number) for number in range(1, 6)] == [8] * 5
    executable.close()


@pytest.mark.parametrize("within", [False, True], ids=["outside a body", "inside a body"])
@pytest.mark.parametrize("error", [ValueError("no"), BackendError("no"), KeyboardInterrupt()], ids=repr)
def test_an_exception_ends_the_recording(
    bench: Bench, setter: Setter, machine: Gpu, error: BaseException, within: bool
) -> None:
    def broken() -> None:
        with Recording(bench.cuda, bench.stream, setter) as recording:
            bench.copy(1, 0, bench.stream)
            if not within:
                raise error
            with recording.when(recording.condition()) as body:
                bench.copy(2, 1, body)
                raise error

    with pytest.raises(type(error)) as found:
        broken()
    assert found.value is error
    assert machine.alive["graph"] == 0 and machine.alive["stream"] == 2


def test_a_body_has_to_have_something(bench: Bench, setter: Setter) -> None:
    with (
        pytest.raises(BackendError, match="nothing was enqueued"),
        Recording(bench.cuda, bench.stream, setter) as recording,
        recording.when(recording.condition()),
    ):
        pass


def test_a_recording_without_a_setter_sets_nothing(bench: Bench) -> None:
    with pytest.raises(BackendError, match="without a setter"), Recording(bench.cuda, bench.stream) as recording:
        recording.set([(recording.condition(), bench.numbers[0])])


def test_other_threads_may_allocate_and_wait_meanwhile(bench: Bench) -> None:
    def elsewhere() -> None:
        address = bench.cuda.call("cudaMalloc", 8)
        bench.copy(3, 0, bench.other)
        bench.wait(bench.other)
        bench.cuda.call("cudaFree", address)
        done.append(bench.get(3))

    done: list[int] = []
    bench.put(0, 6)
    with Recording(bench.cuda, bench.stream) as recording:
        bench.copy(1, 0, bench.stream)
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        bench.copy(2, 1, bench.stream)
    assert done == [6]
    executable = recording.instantiate()
    run(bench, executable)
    assert bench.get(2) == 6
    executable.close()


def test_streams_may_fork_within_a_recording(bench: Bench) -> None:
    events = [bench.cuda.call("cudaEventCreateWithFlags", 2) for _ in range(2)]
    with Recording(bench.cuda, bench.stream) as recording:
        bench.copy(1, 0, bench.stream)
        bench.cuda.call("cudaEventRecord", events[0], bench.stream)
        bench.cuda.call("cudaStreamWaitEvent", bench.other, events[0], 0)
        bench.copy(2, 1, bench.other)
        bench.cuda.call("cudaEventRecord", events[1], bench.other)
        bench.cuda.call("cudaStreamWaitEvent", bench.stream, events[1], 0)
        bench.copy(3, 2, bench.stream)
    executable = recording.instantiate()
    bench.put(0, 4)
    run(bench, executable)
    assert bench.get(3) == 4
    executable.close()
    for event in events:
        bench.cuda.call("cudaEventDestroy", event)


# What the double refuses, as CUDA does


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
        run(bench, executable)
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


@pytest.mark.parametrize(
    "driver, refused, reason",
    [
        (13000, None, None),
        (12040, None, None),
        (12030, None, "need CUDA 12.4; the driver is for CUDA 12.3"),
        (11080, None, "need CUDA 12.4; the driver is for CUDA 11.8"),
        (13000, "nvrtc", "NVRTC is missing .*; run: pip install 'cuda-bindings"),
        (13000, "architecture", "NVRTC 13.0 does not know compute capability 8.7; install a newer"),
        (13000, "compile", "nvrtcCompileProgram failed"),
    ],
)
def test_why_there_are_no_conditions_here(
    bench: Bench, machine: Gpu, driver: int, refused: str | None, reason: str | None
) -> None:
    machine.driver = driver
    machine.refuse |= {refused} if refused else set()
    found = conditional_support(bench.cuda)
    if reason is None:
        assert found is None
    else:
        assert found and len(found.splitlines()) == 1
        with pytest.raises(BackendError, match=reason):
            Setter(bench.cuda)


def test_the_kernel_is_compiled_for_every_gpu() -> None:
    nvrtc = bindings.import_nvrtc()
    try:
        known = nvrtc.nvrtcGetSupportedArchs()[1]
    except RuntimeError:
        pytest.skip("NVRTC is not installed: pip install 'cuda-bindings[all]'")
    wanted = [one for one in known if 75 <= one <= 120]
    assert {75, 80, 86, 89, 90, 100, 120} <= set(wanted)
    for capability in wanted:
        image = compiled(nvrtc, capability)
        assert image.startswith(b"\x7fELF") and b"set_conditions" in image
        machine = np.frombuffer(image, np.uint16, 1, 18)[0]
        assert machine == 190  # EM_CUDA
    assert compiled(nvrtc, wanted[0]) is compiled(nvrtc, wanted[0])


def test_the_double_loads_what_was_compiled_for_it_alone(bench: Bench) -> None:
    image = compiled(bench.cuda.nvrtc, 86)
    assert CAPABILITY != 86
    with pytest.raises(BackendError, match="cuModuleLoadData"):
        bench.cuda.call_driver("cuModuleLoadData", image)
