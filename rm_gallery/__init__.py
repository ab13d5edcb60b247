"""RM-Gallery: train Bradley-Terry reward models and use what was trained.

from rm_gallery import train, evaluate, RewardScorer
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rm_gallery.api import TrainResult, train
    from rm_gallery.errors import UserError
    from rm_gallery.evaluation import evaluate
    from rm_gallery.scoring import RemoteScorer, RewardScorer, rank

__version__ = "0.1.0"
__all__ = ["RemoteScorer", "RewardScorer", "TrainResult", "UserError", "evaluate", "rank", "train"]

_MODULES = {
    "RemoteScorer": "rm_gallery.scoring",
    "RewardScorer": "rm_gallery.scoring",
    "TrainResult": "rm_gallery.api",
    "UserError": "rm_gallery.errors",
    "evaluate": "rm_gallery.evaluation",
    "rank": "rm_gallery.scoring",
    "train": "rm_gallery.api",
}


def __getattr__(name: str) -> Any:
    # Lazy, so that `import rm_gallery` and the command line start without torch.
    if name in _MODULES:
        from importlib import import_module

        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
