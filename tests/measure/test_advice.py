"""Which bundle to ship: the rules, on made-up numbers."""

from dataclasses import replace

import pytest

from adavit.measure.advice import FEWEST_RUNS, Candidate, Loss, advise

FP32 = Candidate("fp32", "fp32", "onnxruntime", True, ms=10.0, bytes=1000)
NONE_LOST = Loss(100, 100, 100_000)


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
        ([int8(loss=Loss(300, 100, 10_000))], "fp32", "loses more than 0.5 points"),
        ([int8(15.0, Loss(300, 100, 10_000))], "fp32", "slower, loses more than 0.5 points"),
        ([int8(loss=Loss(0, 0, 20))], "fp32", "20 images cannot rule out a loss of 0.5 points, about"),
        ([int8(loss=Loss(70, 10, 10_000))], "fp32", "more may"),
        (
            [int8(loss=Loss(200, 0, 10_000, labelled=False))],
            "fp32",
            "2.00 % of 10000 images change class: more than 0.5 %",
        ),
        ([int8(loss=Loss(1, 0, 10_000, labelled=False))], "int8", "0.01 % of 10000 images change class"),
        ([fp16()], "fp32", "fp16 is for GPUs: CPUs compute it in fp32"),
        ([fp16(), int8()], "int8", "fp16: 1.00 of fp32's time and 0.50 of its bytes"),
        ([fp16(5.0), int8()], "fp16", "int8: 0.70 of fp32's time and 0.30 of its bytes; "),
        ([fp16(7.1), int8()], "int8", "fp16: 0.71 of fp32's time"),
        ([fp16(6.9), int8()], "int8", "int8 is about as fast, and no larger"),
        ([int8(loss=Loss(0, 300, 10_000))], "int8", "accuracy changes by +3.00 points"),
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


def test_a_reference_that_did_not_run_in_the_others_backend_is_said() -> None:
    other = int8(backend="openvino fp32")
    assert "fp32 did not run in openvino fp32" in advise([FP32, other], runs=100).lines[-1]
    there = replace(FP32, name="fp32 in openvino", backend="openvino fp32", loss=NONE_LOST)
    assert "did not run" not in "\n".join(advise([FP32, there, other], runs=100).lines)


def test_errors_are_paired_by_image() -> None:
    loss = Loss(30, 10, 10_000)
    low, high = loss.interval
    assert loss.points == pytest.approx(0.2)
    assert (low + high) / 2 == pytest.approx(0.2, rel=1e-3)
    assert (high - low) / 2 == pytest.approx(200 * 41**0.5 / 10_002, rel=1e-2)
    assert str(loss) == "accuracy changes by -0.20 points (-0.33 to -0.07)"
    assert "within noise" in str(Loss(12, 10, 10_000))
    assert str(Loss(0, 0, 100)).startswith("accuracy changes by +0.00 points")


@pytest.mark.parametrize(("lost", "gained", "images"), [(0, 1, 1), (1, 0, 1), (4, 0, 20), (0, 4, 20), (0, 0, 20)])
def test_a_handful_of_images_shows_neither_gain_nor_loss(lost: int, gained: int, images: int) -> None:
    loss = Loss(lost, gained, images)
    assert not loss.acceptable and not loss.excessive and "within noise" in str(loss)


def test_few_images_prove_nothing() -> None:
    for few, many in ((100, 1000), (300, 3000)):
        assert not Loss(0, 0, few).acceptable and Loss(0, 0, many).acceptable
        assert not Loss(0, 0, few, labelled=False).acceptable and Loss(0, 0, many, labelled=False).acceptable
        assert not Loss(1, 0, few).excessive


@pytest.mark.parametrize("loss", [Loss(20, 18, 1000), Loss(0, 0, 20), Loss(0, 0, 20, labelled=False)])
def test_as_many_images_as_are_said_to_do_it_do_it(loss: Loss) -> None:
    wanted = loss.wanted_images
    assert wanted is not None and not loss.acceptable
    share = [part / loss.images for part in (loss.lost, loss.gained)]
    assert Loss(*(wanted * part for part in share), wanted, loss.labelled).acceptable
    assert not Loss(*(wanted / 2 * part for part in share), wanted / 2, loss.labelled).acceptable


def test_no_number_of_images_makes_a_large_loss_small() -> None:
    assert Loss(20, 10, 1000).wanted_images is None


def test_a_bundle_that_is_faster_by_luck_is_not_shipped() -> None:
    slow, quick = (10.0, 12.0) * 10, (12.0, 9.0) * 10  # ahead in every second turn
    first = replace(FP32, ms=11.0, turns=slow)
    assert advise([first, int8(9.9, turns=quick)], runs=20).ship == "fp32"
    assert advise([first, int8(9.9, turns=(9.0, 11.0) * 10)], runs=20).ship == "int8"


def test_what_is_shipped_is_faster_than_the_first() -> None:
    small = fp16(9.9)  # as fast as int8, but not faster than fp32
    assert advise([FP32, int8(9.45), small], runs=100).ship == "int8"
