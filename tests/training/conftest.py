from pathlib import Path

import pytest
import torch
from training_cases import write_idx_set


@pytest.fixture
def idx_folder(tmp_path: Path) -> Path:
    return write_idx_set(tmp_path / "data")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Models this small only lose by sharing their work."""
    torch.set_num_threads(1)
