"""Graders score or rank the responses of a sample with a chat model, a reward model or a rule."""

from rm_gallery.core.graders.base_grader import (
    BaseGrader,
    GraderError,
    GraderMode,
    GraderRank,
    GraderResult,
    GraderScore,
)
from rm_gallery.core.graders.llm_grader import LLMGrader

__all__ = ["BaseGrader", "GraderError", "GraderMode", "GraderRank", "GraderResult", "GraderScore", "LLMGrader"]
