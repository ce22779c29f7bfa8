"""Export: a model becomes a bundle of ONNX engines, verified before it is kept."""

from adavit.calibration.options import BudgetOptions, CalibrationOptions
from adavit.export.bundle import export_bundle
from adavit.export.check import check_bundle
from adavit.export.options import ExportOptions
from adavit.tensorrt.options import BuildOptions

__all__ = [
    "BudgetOptions",
    "BuildOptions",
    "CalibrationOptions",
    "ExportOptions",
    "check_bundle",
    "export_bundle",
]
