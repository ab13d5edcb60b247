"""Custom datasets: a user-defined class turns a row into a conversation (`data.custom_cls`).

The class needs no base class, only hooks: `_build_messages` and the others of `BaseTrainDataset` in the tutorials, or
`build_group`.
"""

from rm_gallery.data.custom.hooks import DataSection, HookError, build_pair, read_row
from rm_gallery.data.custom.loading import check_custom_class, load_custom_class, source_fingerprint
from rm_gallery.data.custom.rendering import CustomFacts, CustomReader, Renderer, with_template

__all__ = [
    "CustomFacts",
    "CustomReader",
    "DataSection",
    "HookError",
    "Renderer",
    "build_pair",
    "check_custom_class",
    "load_custom_class",
    "read_row",
    "source_fingerprint",
    "with_template",
]
