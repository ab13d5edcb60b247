"""Checkpoints: saving a run to `global_step_N` folders, and resuming from one.

To add state to a checkpoint: numbers go into `Progress`, tensors into `RunTensors`.
"""

from rm_gallery.training.checkpoint.folders import list_checkpoints, refuse_earlier_run
from rm_gallery.training.checkpoint.mirror import Mirror
from rm_gallery.training.checkpoint.resume import PLAN, RunIdentity, Start, find_start
from rm_gallery.training.checkpoint.save import Checkpoints, WeightsFolder
from rm_gallery.training.checkpoint.state import Progress, RunTensors, random_state, set_random_state

__all__ = [
    "PLAN",
    "Checkpoints",
    "Mirror",
    "Progress",
    "RunIdentity",
    "RunTensors",
    "Start",
    "WeightsFolder",
    "find_start",
    "list_checkpoints",
    "random_state",
    "refuse_earlier_run",
    "set_random_state",
]
