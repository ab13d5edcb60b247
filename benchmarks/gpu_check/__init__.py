"""What works on this GPU, how exactly and how fast: `python -m benchmarks.gpu_check`, or `make gpu-check`.

Runs from a bare checkout with torch, transformers, numpy, safetensors and tokenizers. The configuration dataclasses
name constraints of annotated_types, which pydantic reads; where that package is missing, so is pydantic, and the
dataclasses are built directly: names without a meaning are enough.
"""

import importlib.util
import sys
import types

stand_ins: list[str] = []
"""Modules that are not installed and only have names."""
if importlib.util.find_spec("annotated_types") is None:
    stand_ins.append("annotated_types")
    _names = types.ModuleType("annotated_types")
    for _name in ("Ge", "Gt", "Le", "Lt"):
        setattr(_names, _name, type(_name, (), {"__init__": lambda self, limit: None}))
    sys.modules["annotated_types"] = _names
