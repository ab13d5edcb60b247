"""Checkpoints: `global_step_N` folders of a run, what they hold, and how training goes on from one.

To add something that must survive: a number goes into `Progress`, a tensor into `RunTensors`.
"""

from rm_gallery.training.checkpoint.folders import list_checkpoints, refuse_earlier_run
from rm_gallery.training.checkpoint.mirror import Copies
from rm_gallery.training.checkpoint.resume import PLAN, RunIdentity, Start, find_start
from rm_gallery.training.checkpoint.save import Checkpoints, WeightsFolder
from rm_gallery.training.checkpoint.state import Progress, RunTensors, random_state, set_random_state

__all__ = [
    "PLAN",
    "Checkpoints",
    "Copies",
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
