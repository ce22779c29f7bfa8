"""Biases moved after training: usages meet their targets on images that were not looked at, and nothing else moves."""

import copy
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from training_cases import tiny, write_idx_set

from adavit.bundle.preprocessing import Preprocessor
from adavit.model import AdaViT
from adavit.model import policy as P
from adavit.training import start
from adavit.training.balance import balance
from adavit.training.data import LabelledImages, open_images
from adavit.training.distributed import World
from adavit.training.loader import evaluation_batches
from adavit.training.predict import predict
from adavit.training.settings import Settings

ROOT = Path(__file__).parents[2]
ALONE = World(0, 1, torch.device("cpu"))
SETTINGS = Settings(steps=1, batch=128)
LAYERS = {"tokens": "token_select", "heads": "head_select", "sublayers": "layer_select"}
NAMES = {"tokens": "token_policy", "heads": "head_policy", "sublayers": "sublayer_policy"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_idx_set(tmp_path_factory.mktemp("balance"), train=512, test=512)


def random_model(seed: int, kinds: tuple[str, ...] = tuple(LAYERS), **changes: object) -> AdaViT:
    """A model whose decisions depend on the image: weights far larger than a run starts with."""
    model = start.new_model(tiny(**{name: kind in kinds for kind, name in NAMES.items()}, **changes), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def usage(model: AdaViT, data: LabelledImages) -> dict[str, float]:
    batches = evaluation_batches(data, range(len(data.labels)), Preprocessor(model.arch.image_size), 256)
    return predict(model, batches, P.decide).target_usage(model.arch.keep)


def moved(model: AdaViT, targets: Mapping[str, float], data: Path) -> tuple[AdaViT, dict[str, float]]:
    found = copy.deepcopy(model)
    return found, balance(found, targets, open_images(data, "train"), SETTINGS, ALONE)


@pytest.mark.parametrize("seed", [0, 2, 4])
@pytest.mark.parametrize(
    "targets",
    [
        {"tokens": 0.5, "heads": 0.6, "sublayers": 0.75},
        {"tokens": 0.37, "heads": 0.45, "sublayers": 0.7},
        {"heads": 0.6},
    ],
    ids=["all", "between units", "heads"],
)
def test_usages_meet_their_targets_on_other_images(seed: int, targets: dict[str, float], data: Path) -> None:
    model = random_model(seed, tuple(targets))
    train, test = (open_images(data, part) for part in ("train", "test"))
    before, found = usage(model, test), moved(model, targets, data)[0]
    assert max(abs(before[kind] - target) for kind, target in targets.items()) > 0.05
    for images, near in ((train, 0.02), (test, 0.03)):
        after = usage(found, images)
        assert {kind: after[kind] for kind in targets} == pytest.approx(targets, abs=near)


def test_the_biases_of_a_kind_move_by_its_offset_and_nothing_else_moves(data: Path) -> None:
    model = random_model(0)
    found, offsets = moved(model, {"tokens": 0.4, "sublayers": 0.6}, data)
    assert set(offsets) == {"tokens", "sublayers"}
    for name, before in model.state_dict().items():
        by = next((offset for kind, offset in offsets.items() if f"{LAYERS[kind]}.mlp_head.bias" in name), 0.0)
        torch.testing.assert_close(found.state_dict()[name], before + by, rtol=0, atol=1e-6)


def test_usages_that_are_right_stay(data: Path) -> None:
    model = random_model(1)
    targets = usage(model, open_images(data, "train"))
    found, offsets = moved(model, targets, data)
    assert set(offsets.values()) == {0.0}
    assert all(torch.equal(weight, found.state_dict()[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize(("target", "nearest"), [(0.65, 0.75), (0.9, 1.0), (0.3, 0.25), (0.05, 0.0)])
def test_of_usages_between_decisions_that_never_vary_the_nearest_is_taken_with_a_warning(
    target: float, nearest: float, data: Path
) -> None:
    """Four heads a block decide alike for all images, at the same four logits in every block."""
    model = random_model(0, ("heads",))
    with torch.no_grad():
        for block in model.blocks[1:]:
            block.head_select.mlp_head.weight.zero_()
            block.head_select.mlp_head.bias.copy_(torch.tensor([-2.0, -0.5, 1.0, 2.5]))
    with pytest.warns(UserWarning, match=f"usage of heads is {nearest:.3f}, the target {target:.3f}"):
        found, _ = moved(model, {"heads": target}, data)
    assert usage(found, open_images(data, "test"))["heads"] == nearest


def test_rounds_that_no_longer_help_are_spared(data: Path) -> None:
    """Every head of every block decides alike for all images: the usage is 0 or 1, whatever the offset."""
    model, told = random_model(0, ("heads",)), set()
    with torch.no_grad():
        for block in model.blocks[1:]:
            block.head_select.mlp_head.weight.zero_()
            block.head_select.mlp_head.bias.fill_(1.0)

    def tell(_: str, share: float) -> None:
        told.add(math.ceil(24 * share - 1e-6))

    with pytest.warns(UserWarning, match="usage of heads is"):
        balance(model, {"heads": 0.4}, open_images(data, "train"), SETTINGS, ALONE, tell)
    assert max(told) <= 10


def test_two_processes_move_alike(tmp_path: Path, data: Path) -> None:
    model, targets = random_model(0), {"tokens": 0.5, "heads": 0.6, "sublayers": 0.75}
    torch.save(model, tmp_path / "model.pth")
    program = tmp_path / "balance.py"
    program.write_text(
        f"""
import torch
from pathlib import Path
from adavit.training.balance import balance
from adavit.training.data import open_images
from adavit.training.distributed import join_world
from adavit.training.settings import Settings

torch.set_num_threads(1)
folder, train = Path({str(tmp_path)!r}), open_images(Path({str(data)!r}), "train")
model = torch.load(folder / "model.pth", weights_only=False)
with join_world() as world:
    balance(model, {targets!r}, train, Settings(steps=1, batch=128), world)
    torch.save(model.state_dict(), folder / f"{{world.rank}}.pth")
"""
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run(torchrun, check=True, env=environment, timeout=300)
    first, second = (torch.load(tmp_path / f"{rank}.pth") for rank in range(2))
    assert all(torch.equal(weight, second[name]) for name, weight in first.items())
    model.load_state_dict(first)
    for kind, found in usage(model, open_images(data, "train")).items():
        assert found == pytest.approx(targets[kind], abs=0.01)
