"""CorrectnessGrader: does a response agree with a reference."""

from __future__ import annotations

from rm_gallery.core.graders.llm_grader import LLMGrader


class CorrectnessGrader(LLMGrader):
    """How far a response agrees with the reference response: 1 (contradicts it) to 5 (agrees in all that matters).

    With a reward model the score is its reward. Arguments as for LLMGrader; without a criterion of your own it
    judges by the one in prompts/.
    """

    prompt_name = "correctness"
    needed = ("query", "response", "reference_response")
