"""CUDA graphs with conditions, on a double that has CUDA's rules."""

import threading

import numpy as np
import pytest
from bench import Bench
from cuda_double import CAPABILITY
from double import Gpu

from adavit.errors import BackendError
from adavit.runtime.backends.cuda import bindings
from adavit.runtime.backends.cuda.capture import Recording
from adavit.runtime.backends.cuda.setter import Setter, compiled


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
        bench.run(executable)
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
        bench.run(executable)
        assert bench.get(7) == wanted
    executable.close()


def test_a_condition_that_is_not_set_does_not_hold(bench: Bench, setter: Setter) -> None:
    with Recording(bench.cuda, bench.stream, setter) as recording, recording.when(recording.condition()) as body:
        bench.copy(1, 0, body)
    executable = recording.instantiate()
    bench.put(1, 5)
    bench.run(executable)
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
    bench.run(executable)
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
    bench.run(executable)
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
    bench.run(executable)
    assert bench.get(3) == 4
    executable.close()
    for event in events:
        bench.cuda.call("cudaEventDestroy", event)


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
    if reason is None:
        Setter(bench.cuda).close()
        return
    with pytest.raises(BackendError, match=reason) as caught:
        Setter(bench.cuda)
    assert len(str(caught.value).splitlines()) == 1


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
