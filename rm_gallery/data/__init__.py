"""From files to packed batches; docs/architecture.md shows the path of a row.

Modules that scripts imported before the folders were reorganized can still be imported under their former names, with
a DeprecationWarning.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import warnings
from types import ModuleType
from typing import Any

_FORMER_NAMES = {
    "rm_gallery.data.encode": "rm_gallery.data.tokenization.encoder",
    "rm_gallery.data.tokenize": "rm_gallery.data.tokenization.tokenizer",
    "rm_gallery.data.source": "rm_gallery.data.sources",
    "rm_gallery.data.source.records": "rm_gallery.data.sources.records",
}


class _FormerNames(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports a module under its former name as a copy of the names of the module that replaced it."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name not in _FORMER_NAMES:
            return None
        return importlib.util.spec_from_loader(name, self, is_package=name.endswith(".source"))

    def exec_module(self, module: ModuleType) -> None:
        current = _FORMER_NAMES[module.__name__]
        warnings.warn(f"{module.__name__} is now {current}", DeprecationWarning, stacklevel=2)
        names = vars(importlib.import_module(current))
        vars(module).update({name: value for name, value in names.items() if not name.startswith("__")})


sys.meta_path.append(_FormerNames())
