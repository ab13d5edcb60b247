"""Modules of `rm_gallery.data` under the names they had before the folders were reorganized."""

import importlib
import sys

import pytest

from rm_gallery.data import _FORMER_NAMES


@pytest.mark.parametrize("former", _FORMER_NAMES)
def test_a_former_module_name_still_imports_the_same_objects(former: str) -> None:
    sys.modules.pop(former, None)
    with pytest.warns(DeprecationWarning, match=f"{former} is now {_FORMER_NAMES[former]}"):
        module = importlib.import_module(former)
    current = importlib.import_module(_FORMER_NAMES[former])
    public = [name for name in vars(current) if not name.startswith("_")]
    assert public and all(getattr(module, name) is getattr(current, name) for name in public)
