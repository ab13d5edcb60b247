"""Graders ready for use."""

from rm_gallery.core.graders.common.correctness import CorrectnessGrader
from rm_gallery.core.graders.common.hallucination import HallucinationGrader
from rm_gallery.core.graders.common.harmfulness import HarmfulnessGrader
from rm_gallery.core.graders.common.instruction_following import InstructionFollowingGrader
from rm_gallery.core.graders.common.relevance import RelevanceGrader
from rm_gallery.core.graders.common.reward_model import RewardModelGrader

__all__ = [
    "CorrectnessGrader",
    "HallucinationGrader",
    "HarmfulnessGrader",
    "InstructionFollowingGrader",
    "RelevanceGrader",
    "RewardModelGrader",
]
