"""Generators: scored responses become training data. `export_data` writes files that training reads.

Names are imported on first access, so that importing this package stays fast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rm_gallery.core.generator.summary import ExportSummary
    from rm_gallery.core.generator.write import export_data

__all__ = ["ExportSummary", "export_data"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from rm_gallery.core.generator import write

    return getattr(write, name)
