"""Rewards from trained models: `RewardScorer`, `RemoteScorer`, `EnsembleScorer`, and `score` and `rank` for files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rm_gallery.scoring.ensemble import EnsembleScorer
    from rm_gallery.scoring.rank_files import rank
    from rm_gallery.scoring.remote import RemoteScorer
    from rm_gallery.scoring.scorer import RewardScorer

__all__ = ["EnsembleScorer", "RemoteScorer", "RewardScorer", "rank"]

_MODULES = {
    "EnsembleScorer": "rm_gallery.scoring.ensemble",
    "RemoteScorer": "rm_gallery.scoring.remote",
    "RewardScorer": "rm_gallery.scoring.scorer",
    "rank": "rm_gallery.scoring.rank_files",
}


def __getattr__(name: str) -> Any:
    # Lazy, so that other modules of this folder can be imported without torch.
    if name in _MODULES:
        from importlib import import_module

        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
