import shutil
from pathlib import Path

import pytest
from single_cases import with_budgets, write


@pytest.fixture(scope="session")
def budgeted(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny bundle with operating points."""
    return with_budgets(shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("budgeted") / "bundle"))


@pytest.fixture(scope="session")
def choosing(budgeted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its file, which takes a budget and tells its policy."""
    path = tmp_path_factory.mktemp("choosing") / "model.onnx"
    write(budgeted, path, budget_input=True, with_policy=True)
    return path
