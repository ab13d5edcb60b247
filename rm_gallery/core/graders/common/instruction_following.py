"""InstructionFollowingGrader: does a response do what it was told."""

from __future__ import annotations

from rm_gallery.core.graders.llm_grader import LLMGrader


class InstructionFollowingGrader(LLMGrader):
    """How far a response meets the query's requirements: 1 (does not do the task) to 5 (meets every one).

    With a reward model the score is its reward. Arguments as for LLMGrader; without a criterion of your own it
    judges by the one in prompts/.
    """

    prompt_name = "instruction_following"
