import numpy as np
import pytest
from PIL import Image

from adavit.bundle.preprocessing import Preprocessor
from adavit.training.augment import Augment, Draw, usual_crop

PIXELS = np.random.default_rng(0).integers(0, 255, (28, 28, 3), dtype=np.uint8)


def draw(*numbers: float, mirror: bool = False) -> Draw:
    return Draw(np.array(numbers), mirror)


def test_small_images_are_not_resized() -> None:
    assert usual_crop(28) == 1 and usual_crop(224) == 0.9
    assert np.array_equal(Augment("none", 28, 1.0, False)(PIXELS, draw(0, 0, 0, 0)), PIXELS)


def test_without_augmentation_an_image_is_what_a_bundle_sees() -> None:
    pixels = np.random.default_rng(1).integers(0, 255, (300, 401, 3), dtype=np.uint8)
    found = Augment("none", 224, 0.9, False)(pixels, draw(0, 0, 0, 0))
    image = Image.fromarray(pixels).resize((248 * 401 // 300, 248), Image.Resampling.BICUBIC)
    assert np.array_equal(found, np.asarray(image)[12:236, 54:278])
    prepare = Preprocessor(224, 0.9)
    assert np.array_equal(prepare.normalise(found), prepare(pixels))


@pytest.mark.parametrize("shape", [(30, 50), (50, 30), (7, 9), (224, 224)])
@pytest.mark.parametrize("kind", ["none", "shift", "crop"])
def test_every_size_becomes_the_asked_square(shape: tuple[int, int], kind: str) -> None:
    pixels = np.zeros((*shape, 3), np.uint8)
    augment = Augment(kind, 16, 0.9, True)
    assert all(augment(pixels, one).shape == (16, 16, 3) for one in augment.draws(0, 0, 8))


def test_shift_moves_by_up_to_a_fourteenth_and_mirror_mirrors() -> None:
    augment = Augment("shift", 28, 1.0, True)
    assert np.array_equal(augment(PIXELS, draw(0.5, 0.5, 0, 0)), PIXELS)
    moved = augment(PIXELS, draw(0.999, 0.5, 0, 0))
    assert np.array_equal(moved[:26], PIXELS[2:]) and not moved[26:].any()
    assert np.array_equal(augment(PIXELS, draw(0.5, 0.5, 0, 0, mirror=True)), PIXELS[:, ::-1])


def test_draws_depend_on_seed_and_step_alone() -> None:
    augment = Augment("shift", 28, 1.0, True)

    def numbers(seed: int, step: int) -> list[float]:
        return [float(one.numbers[0]) for one in augment.draws(seed, step, 4)]

    assert numbers(1, 2) == numbers(1, 2) and numbers(1, 2) != numbers(1, 3) != numbers(2, 3)
