"""`adavit-train` as it is used: a process that is killed, and weights that others have trained."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from training_cases import tiny

from adavit.cli_train import main
from adavit.model import AdaViT, load_checkpoint, save_safetensors
from adavit.training import start

COMMAND = [sys.executable, "-c", "from adavit.cli_train import main; main(prog_name='adavit-train')"]
STEPS = 24
DENSE = tiny(token_policy=False, head_policy=False, sublayer_policy=False)


def train(*arguments: object) -> None:
    """Runs the command to its end, which must be a good one."""
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(folder / "weights.safetensors").state_dict()


def steps_done(folder: Path) -> int:
    """The last step in a run's log, which may be in the midst of being written."""
    try:
        lines = (folder / "log.jsonl").read_text().splitlines()
        return int(json.loads(lines[-1])["step"])
    except (OSError, IndexError, ValueError):
        return 0


def test_a_killed_process_resumes_to_the_same_weights(tmp_path: Path, idx_folder: Path) -> None:
    dense = tmp_path / "dense.safetensors"
    save_safetensors(start.new_model(DENSE, 1), dense)
    run = ("adapt", "--data", idx_folder, "--from", dense, "--steps", STEPS, "--batch", 8, "--warmup", 3, "--threads",
           1, "--log-every", 1, "--save-every", 3, "--evaluate-every", 10, "--mixup", 0.3)  # fmt: skip
    train(*run, "-o", tmp_path / "whole")
    folder, kill_at = tmp_path / "killed", random.randrange(4, STEPS - 5)
    print("killed at step", kill_at)  # shown where the test fails
    with subprocess.Popen([*COMMAND, *map(str, run), "-o", str(folder)], stderr=subprocess.PIPE) as process:
        while process.poll() is None and steps_done(folder) < kill_at:
            time.sleep(0.001)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert kill_at <= steps_done(folder)
    train(*run, "-o", folder, "--resume")
    expected, found = weights(tmp_path / "whole"), weights(folder)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert (tmp_path / "whole/log.jsonl").read_text() == (folder / "log.jsonl").read_text()
    assert [path for path in folder.iterdir() if path.suffix == ".tmp"] == []


def foreign(model: AdaViT, path: Path, container: str | None) -> Path:
    """Writes a model as T2T-ViT, DeiT and timm do: query, key and value in one matrix."""
    state: dict[str, torch.Tensor] = {}
    for name, value in model.state_dict().items():
        parts = name.split(".query.")
        if len(parts) == 2:
            rows = [model.state_dict()[f".{kind}.".join(parts)] for kind in ("query", "key", "value")]
            state[".qkv.".join(parts)] = torch.cat(rows)
        elif ".key." not in name and ".value." not in name:
            state[name] = value
    torch.save({container: state} if container else state, path)
    return path


@pytest.mark.parametrize(
    ("shapes", "container"),
    [
        ({"stem": "t2t", "image_size": 32, "patch_size": 16, "qkv_bias": False}, "state_dict_ema"),
        ({}, None),
        ({}, "model"),
    ],
    ids=["T2T-ViT", "timm", "DeiT"],
)
def test_dense_weights_of_others(
    shapes: dict[str, object], container: str | None, tmp_path: Path, idx_folder: Path
) -> None:
    """With a learning rate of 0, the run ends with what it started from; then the weights serve `adapt`."""
    policies = {"token_policy": False, "head_policy": False, "sublayer_policy": False}
    model = start.new_model(tiny(**policies, **shapes), 3)
    source = foreign(model, tmp_path / "foreign.pth", container)
    short = ("--data", idx_folder, "--heads", 4, "--steps", 2, "--batch", 8, "--warmup", 1, "--threads", 1)
    train("dense", "--from", source, *short, "--learning-rate", 0, "-o", tmp_path / "dense")
    found, expected = weights(tmp_path / "dense"), model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    train("adapt", "--from", source, *short, "-o", tmp_path / "adaptive")
    assert load_checkpoint(tmp_path / "adaptive" / "weights.safetensors").arch.token_policy
