import pytest
import torch
from cases import random_images, random_model, tiny

from adavit.errors import CheckpointError
from adavit.model import resize


def test_the_position_embedding_is_interpolated_and_all_else_kept() -> None:
    model = random_model(tiny())
    with torch.no_grad():
        rows = torch.arange(4.0).repeat_interleave(4)[:, None]
        model.pos_embed[0, 1:] = rows.expand(-1, 48)  # grows from the top row of patches to the bottom one
    larger = resize(model, 56)
    assert (larger.arch.grid, larger.arch.tokens) == (7, 50)
    grid = larger.pos_embed[0, 1:, 0].unflatten(0, (7, 7))
    assert torch.equal(larger.pos_embed[:, 0], model.pos_embed[:, 0])
    torch.testing.assert_close(grid, grid[:, :1].expand(7, 7))
    assert (grid[1:, 0] > grid[:-1, 0]).all()
    assert grid[3, 0].item() == pytest.approx(1.5)
    assert all(
        torch.equal(value, larger.state_dict()[key]) for key, value in model.state_dict().items() if key != "pos_embed"
    )
    assert larger(torch.from_numpy(random_images(larger.arch, 1))).logits.shape == (1, 5)


def test_the_same_size_is_the_same_model() -> None:
    model = random_model(tiny())
    assert resize(model, 32) is model


@pytest.mark.parametrize("size", [0, -32, 33, 1 << 20])
def test_a_size_that_cannot_be_had_is_refused(size: int) -> None:
    with pytest.raises(CheckpointError, match=f"image size {size} cannot be had"):
        resize(random_model(tiny()), size)
