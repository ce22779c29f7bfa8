"""Export: a model becomes a bundle of ONNX engines, verified before it is kept."""

from adavit.calibration.options import BudgetOptions, CalibrationOptions
from adavit.export.bundle import export_bundle
from adavit.export.check import check_bundle
from adavit.export.options import ExportOptions
from adavit.export.single_file import export_single_file
from adavit.export.single_options import SingleFileOptions
from adavit.tensorrt.options import BuildOptions

__all__ = [
    "BudgetOptions",
    "BuildOptions",
    "CalibrationOptions",
    "ExportOptions",
    "SingleFileOptions",
    "check_bundle",
    "export_bundle",
    "export_single_file",
]
