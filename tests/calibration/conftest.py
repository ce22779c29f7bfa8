from collections.abc import Callable
from pathlib import Path

import pytest
from cases import WIDE, pictures_in, quiet, random_model, save

from adavit.calibration.options import CalibrationOptions
from adavit.export import ExportOptions, export_bundle


@pytest.fixture(scope="session")
def busy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a model whose policy runs most sub-layers, so that none is starved."""
    return save(random_model(WIDE, sublayers=2.0), tmp_path_factory.mktemp("busy") / "busy.safetensors")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty-two pictures to calibrate on."""
    return pictures_in(tmp_path_factory.mktemp("pictures"), 32)


@pytest.fixture(scope="session")
def calibrated(busy: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """The busy model's bundle in fp32, fp16 and int8, its ranges in calibration.npz beside it, and the report."""
    folder = tmp_path_factory.mktemp("calibrated")
    calibration = CalibrationOptions(("fp32", "fp16", "int8"), (pictures,), folder / "calibration.npz")
    options = ExportOptions(threads=1, calibration=calibration)
    return folder / "bundle", export_bundle(busy, folder / "bundle", options, quiet)


@pytest.fixture(scope="session")
def cache(calibrated: tuple[Path, dict]) -> Path:
    """The ranges of that bundle."""
    return calibrated[0].with_name("calibration.npz")


@pytest.fixture(scope="session")
def converted(calibrated: tuple[Path, dict]) -> Path:
    """That bundle."""
    return calibrated[0]


Exported = Callable[..., tuple[Path, dict]]


@pytest.fixture
def exported(tmp_path: Path) -> Exported:
    """Exports a checkpoint in some precisions, and returns the bundle and its report."""

    def export(source: Path, *precisions: str, opset: int = 20, **calibration: object) -> tuple[Path, dict]:
        folder = tmp_path / "bundle"
        options = ExportOptions(
            verify=False,
            force=True,
            threads=1,
            opset=opset,
            calibration=CalibrationOptions(precisions, **calibration),  # type: ignore[arg-type]
        )
        return folder, export_bundle(source, folder, options, quiet)

    return export
