"""Which bundle to ship: the rules, on made-up numbers."""

from dataclasses import replace

import pytest

from adavit.runtime.advice import FEWEST_RUNS, MOST_LOST, Candidate, Loss, advise

FP32 = Candidate("fp32", "fp32", "onnxruntime", True, ms=10.0, bytes=1000, speedup=2.0, specialised=5)
NONE_LOST = Loss.of_accuracy(100, 100, 100_000)


def int8(ms: float = 7.0, loss: Loss = NONE_LOST, **changes: object) -> Candidate:
    return replace(FP32, name="int8", precision="int8", ms=ms, bytes=300, loss=loss, **changes)


def fp16(ms: float = 10.0, loss: Loss = NONE_LOST, **changes: object) -> Candidate:
    return replace(FP32, name="fp16", precision="fp16", ms=ms, bytes=500, loss=loss, **changes)


@pytest.mark.parametrize(
    ("others", "ship", "said"),
    [
        ([int8()], "int8", "ship int8 here: it takes 0.70 of fp32's time and 0.30 of its bytes"),
        ([int8(9.6)], "fp32", "nothing else is more than 5% faster"),
        ([int8(9.4)], "int8", "0.94 of fp32's time"),
        ([int8(15.0)], "fp32", "slower. int8 gains little on CPUs without VNNI"),
        ([int8(loss=Loss.of_accuracy(300, 100, 10_000))], "fp32", "loses more than 0.5 points"),
        ([int8(15.0, Loss.of_accuracy(300, 100, 10_000))], "fp32", "slower, loses more than 0.5 points"),
        ([int8(loss=Loss.of_accuracy(0, 0, 20))], "fp32", "20 images cannot rule out a loss of 0.5 points, about"),
        ([int8(loss=Loss.of_accuracy(70, 10, 10_000))], "fp32", "more may"),
        ([int8(loss=Loss.of_classes(200, 10_000))], "fp32", "2.00 % of 10000 images change class: more than 0.5 %"),
        ([int8(loss=Loss.of_classes(1, 10_000))], "int8", "0.01 % of 10000 images change class"),
        ([fp16()], "fp32", "fp16 is for GPUs: CPUs compute it in fp32"),
        ([fp16(), int8()], "int8", "fp16: 1.00 of fp32's time and 0.50 of its bytes"),
        ([fp16(5.0), int8()], "fp16", "int8: 0.70 of fp32's time and 0.30 of its bytes; "),
        ([fp16(7.1), int8()], "int8", "fp16: 0.71 of fp32's time"),
        ([fp16(6.9), int8()], "int8", "int8 is about as fast, and smaller"),
        ([int8(loss=Loss.of_accuracy(0, 300, 10_000))], "int8", "accuracy changes by +3.00 points"),
    ],
)
def test_the_fastest_that_is_shown_to_lose_little(others: list[Candidate], ship: str, said: str) -> None:
    found = advise([FP32, *others], runs=100)
    assert found.ship == ship
    assert found.lines[0].startswith(f"ship {ship} here: ")
    assert said in "\n".join(found.lines)


def test_few_runs_tell_no_speeds_apart() -> None:
    found = advise([FP32, int8()], runs=FEWEST_RUNS - 1)
    assert found.ship is None
    assert "too few" in found.lines[0] and len(found.lines) == 1
    assert advise([FP32, int8()], runs=FEWEST_RUNS).ship == "int8"


def test_precisions_are_excused_on_cpus_alone_and_where_they_are_not_faster() -> None:
    for others in ([fp16(on_cpu=False)], [fp16(7.0)], [int8(15.0, on_cpu=False)], [int8()]):
        text = "\n".join(advise([FP32, *others], runs=100).lines)
        assert "GPUs" not in text and "VNNI" not in text


def test_missing_engines_for_sets_of_heads_explain_a_smaller_speedup() -> None:
    def said(other: Candidate, first: Candidate = FP32) -> bool:
        return any("no engines for frequent sets" in line for line in advise([first, other], runs=100).lines)

    assert said(int8(speedup=1.5, specialised=0))
    assert not said(int8(speedup=1.95, specialised=0))
    assert not said(int8(speedup=1.5, specialised=3))
    assert not said(int8(speedup=None, specialised=0))
    assert not said(int8(speedup=1.5, specialised=0), replace(FP32, specialised=0))


def test_a_reference_that_did_not_run_in_the_others_backend_is_said() -> None:
    other = int8(backend="openvino fp32")
    assert "fp32 did not run in openvino fp32" in advise([FP32, other], runs=100).lines[-1]
    there = replace(FP32, name="fp32 in openvino", backend="openvino fp32", loss=NONE_LOST)
    assert "did not run" not in "\n".join(advise([FP32, there, other], runs=100).lines)


def test_errors_are_paired_by_image() -> None:
    loss = Loss.of_accuracy(30, 10, 10_000)
    assert loss.points == pytest.approx(0.2)
    assert loss.margin == pytest.approx(200 * 41**0.5 / 10_002, rel=1e-2)
    assert not loss.bearable or loss.points + loss.margin <= MOST_LOST
    assert "within noise" not in str(loss)
    assert "within noise" in str(Loss.of_accuracy(12, 10, 10_000))
    assert str(Loss.of_accuracy(0, 0, 100)).startswith("accuracy changes by +0.00 points")


def test_few_images_prove_nothing() -> None:
    for few, many in ((100, 1000), (300, 3000)):
        assert not Loss.of_accuracy(0, 0, few).bearable and Loss.of_accuracy(0, 0, many).bearable
        assert not Loss.of_classes(0, few).bearable and Loss.of_classes(0, many).bearable
        assert not Loss.of_accuracy(1, 0, few).excessive


def test_as_many_images_as_are_said_to_do_it_do_it() -> None:
    loss = Loss.of_accuracy(20, 18, 1000)
    wanted = loss.wanted_images
    assert wanted is not None and not loss.bearable
    assert Loss.of_accuracy(20 * wanted // 1000, 18 * wanted // 1000, wanted).bearable
    assert Loss.of_accuracy(20, 10, 1000).wanted_images is None
