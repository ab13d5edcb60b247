"""How good a reward model is: `evaluate` in Python, `rm-gallery evaluate` on the command line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rm_gallery.evaluation.run import Evaluation, evaluate

__all__ = ["Evaluation", "evaluate"]


def __getattr__(name: str) -> Any:
    # Lazy, so that the command line starts without numpy.
    if name in __all__:
        from rm_gallery.evaluation import run

        return getattr(run, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
