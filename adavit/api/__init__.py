"""What the commands do, as functions with the same words."""

from adavit.api.bundles import compare, export_bundle
from adavit.api.single import export_single_file

__all__ = ["compare", "export_bundle", "export_single_file"]
