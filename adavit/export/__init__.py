"""Export: a model becomes a bundle of ONNX engines, verified before it is kept."""

from adavit.export.bundle import export_bundle
from adavit.export.check import check_bundle
from adavit.export.options import ExportOptions

__all__ = ["ExportOptions", "check_bundle", "export_bundle"]
