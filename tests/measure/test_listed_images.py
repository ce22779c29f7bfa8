import pytest

from adavit.measure.listed_images import spread_over_classes


@pytest.mark.parametrize(
    ("labels", "most", "shown"),
    [
        ([None] * 30, 3, [0, 1, 2]),
        ([0] * 5 + [1] * 5 + [2] * 5, 6, [0, 1, 5, 6, 10, 11]),
        ([0] * 5 + [1] * 5 + [2] * 5, 7, [0, 1, 2, 5, 6, 10, 11]),
        ([0] * 9 + [1], 4, [0, 1, 2, 9]),
        (list(range(100)), 3, [0, 50, 99]),
        ([3, 3], 5, [0, 1]),
        ([], 5, []),
    ],
)
def test_images_are_spread_over_classes(labels: list[int | None], most: int, shown: list[int]) -> None:
    assert spread_over_classes(labels, most) == shown
