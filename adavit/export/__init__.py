"""Export: a model becomes a bundle of ONNX engines, verified before it is kept."""

from adavit.export.bundle import ExportOptions, check_bundle, export_bundle

__all__ = ["ExportOptions", "check_bundle", "export_bundle"]
