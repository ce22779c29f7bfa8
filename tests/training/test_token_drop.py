"""Training on some of the patches: which, and that the model then sees those alone."""

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from training_cases import tiny

from adavit.cli_train import main
from adavit.model import save_safetensors
from adavit.training import start
from adavit.training.data import open_images
from adavit.training.distributed import World
from adavit.training.loop import Intervals, Trainer
from adavit.training.settings import PolicySettings, Settings
from adavit.training.token_drop import choose_tokens

ALONE = World(0, 1, torch.device("cpu"))
DENSE = tiny(token_policy=False, head_policy=False, sublayer_policy=False)


def test_which_tokens_stay() -> None:
    assert choose_tokens(196, 0.0, 4, 0, ALONE) is None
    chosen = choose_tokens(196, 0.75, 200, 3, ALONE)
    assert chosen is not None
    assert chosen.shape == (200, 49)
    assert (chosen.diff(dim=1) > 0).all()
    counts = torch.bincount(chosen.flatten(), minlength=196)
    assert counts.min() > 25  # each is as likely: 50 of 200, of deviation 6
    assert counts.max() < 80
    other = choose_tokens(196, 0.75, 200, 4, ALONE)
    assert other is not None
    assert not torch.equal(chosen, other)
    least = choose_tokens(9, 0.99, 2, 0, ALONE)
    assert least is not None
    assert least.shape == (2, 1)


def test_processes_share_the_draw_of_one() -> None:
    whole = choose_tokens(49, 0.5, 8, 1, ALONE)
    parts = [choose_tokens(49, 0.5, 4, 1, World(rank, 2, torch.device("cpu"))) for rank in (0, 1)]
    assert whole is not None
    assert torch.equal(whole, torch.cat([part for part in parts if part is not None]))


def test_the_model_sees_the_chosen_patches_alone() -> None:
    model = start.new_model(DENSE, 0).eval()
    images = torch.randn(3, 3, DENSE.image_size, DENSE.image_size)
    side, grid = DENSE.patch_size, DENSE.image_size // DENSE.patch_size
    chosen = torch.tensor([[0, 2], [1, grid], [grid + 1, grid * grid - 1]])
    altered = images.clone()
    for image, kept in zip(altered, chosen.tolist(), strict=True):
        for place in set(range(grid * grid)) - set(kept):
            row, column = place // grid * side, place % grid * side
            image[:, row : row + side, column : column + side] = 7.0
    with torch.inference_mode():
        assert torch.equal(model(images, None, chosen=chosen).logits, model(altered, None, chosen=chosen).logits)
        assert not torch.equal(model(images, None).logits, model(altered, None).logits)
        every = torch.arange(grid * grid).expand(3, -1)
        assert torch.equal(model(images, None, chosen=every).logits, model(images, None).logits)


@pytest.mark.parametrize("policy", [None, PolicySettings()])
def test_a_run_leaves_tokens_out(policy: PolicySettings | None, tmp_path: Path, idx_folder: Path) -> None:
    ends = []
    for drop in (0.0, 0.5):
        folder = tmp_path / str(drop)
        folder.mkdir()
        settings = Settings(steps=2, batch=8, token_drop=drop, policy=policy)
        one = Trainer(start.new_model(tiny() if policy else DENSE, 0), settings, ALONE, folder)
        seen: list[int] = []
        one.model.norm.register_forward_pre_hook(lambda _, given, seen=seen: seen.append(given[0].shape[1]))
        one.run(open_images(idx_folder, "train"), open_images(idx_folder, "test"), Intervals(1, 2, 2, 8), 1)
        patches = DENSE.tokens - 1
        assert seen[:2] == [1 + patches - round(drop * patches)] * 2
        ends.append(one.model.pos_embed.detach())
    assert not torch.equal(*ends)


def test_what_is_compared_inside_needs_every_token(tmp_path: Path, idx_folder: Path) -> None:
    save_safetensors(start.new_model(DENSE, 0), tmp_path / "dense.safetensors")
    options = ["--token-drop", "0.5", "--hidden-weight", "1", "--steps", "1"]
    where = ["--data", str(idx_folder), "--from", str(tmp_path / "dense.safetensors"), "-o", str(tmp_path / "run")]
    done = CliRunner().invoke(main, ["adapt", *where, *options])
    assert done.exit_code == 2
    assert "--token-drop" in done.output
    assert not (tmp_path / "run").exists()
