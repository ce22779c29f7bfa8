from pathlib import Path

import pytest
from training_cases import write_idx_set


@pytest.fixture
def idx_folder(tmp_path: Path) -> Path:
    return write_idx_set(tmp_path / "data")
