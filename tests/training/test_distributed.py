"""Two processes on the CPU against one at the same global batch."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from training_cases import tiny

from adavit.model import save_safetensors
from adavit.model.checkpoint_file import load_safely
from adavit.training import start

ROOT = Path(__file__).parents[2]
PROGRAM = "import torch; torch.set_num_threads(1); from adavit.cli_train import main; main()"


def adapt(output: Path, data: Path, dense: Path, *launcher: str) -> None:
    command = [
        *launcher, "adapt", "--data", data, "--from", dense, "--output", output, "--steps", 6, "--batch", 8, "--mixup",
        0.2, "--warmup", 1, "--learning-rate", 3e-3, "--floor", 0.2, "--floor-weight", 0.5, "--diversity-weight", 0.5,
        "--attention-weight", 0.1, "--hidden-weight", 0.1, "--anneal", 0, "--evaluate-every", 3,
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([str(part) for part in command], check=True, env=environment, timeout=120)


def test_two_processes_train_like_one(tmp_path: Path, idx_folder: Path) -> None:
    program = tmp_path / "train.py"
    program.write_text(PROGRAM)
    dense = tmp_path / "dense.safetensors"
    shapes = tiny(token_policy=False, head_policy=False, sublayer_policy=False)
    save_safetensors(start.new_model(shapes, 0), dense)
    adapt(tmp_path / "one", idx_folder, dense, sys.executable, str(program))
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program))
    adapt(tmp_path / "two", idx_folder, dense, *torchrun)
    before = start.new_model(shapes, 0).state_dict()
    one, two = (load_safely(tmp_path / name / "checkpoint.pth")["state_dict"] for name in ("one", "two"))
    for name, expected in one.items():
        torch.testing.assert_close(two[name], expected, atol=2e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    assert not torch.allclose(one["head.weight"], before["head.weight"], atol=1e-3)
