from collections.abc import Callable
from pathlib import Path

import pytest
from cases import WIDE, pictures_in, quiet, random_model, save

from adavit.export import ExportOptions, export_bundle
from adavit.precision_options import CalibrationOptions


@pytest.fixture(scope="session")
def busy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a model whose policy runs most sub-layers, so that none is starved."""
    return save(random_model(WIDE, sublayers=2.0), tmp_path_factory.mktemp("busy") / "busy.safetensors")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty-two pictures to calibrate on."""
    return pictures_in(tmp_path_factory.mktemp("pictures"), 32)


@pytest.fixture(scope="session")
def calibrated(
    busy: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, dict]]:
    """The busy model's bundle in a precision, and the report of its export; each made once, of one calibration."""
    folder = tmp_path_factory.mktemp("calibrated")
    made: dict[str, tuple[Path, dict]] = {}

    def bundle(precision: str) -> tuple[Path, dict]:
        if precision not in made:
            calibration = CalibrationOptions(precision, (pictures,), folder / "calibration.npz")
            options = ExportOptions(with_dense=True, threads=1, calibration=calibration)
            made[precision] = folder / precision, export_bundle(busy, folder / precision, options, quiet)
        return made[precision]

    return bundle
