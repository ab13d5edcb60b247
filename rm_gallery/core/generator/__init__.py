"""Generators: judged answers become training data. `export_data` writes files that the trainer reads.

The name is looked up when it is asked for, so that importing this package costs next to nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rm_gallery.core.generator.export import export_data
    from rm_gallery.core.generator.summary import ExportSummary

__all__ = ["ExportSummary", "export_data"]


def __getattr__(name: str) -> Any:
    # Late for `python -m rm_gallery.core.generator.export` too: Python warns when the module is loaded before it runs.
    if name == "export_data":
        from rm_gallery.core.generator.export import export_data

        return export_data
    if name == "ExportSummary":
        from rm_gallery.core.generator.summary import ExportSummary

        return ExportSummary
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
