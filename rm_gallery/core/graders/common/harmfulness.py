"""HarmfulnessGrader: could a response do harm."""

from __future__ import annotations

from rm_gallery.core.graders.llm_grader import LLMGrader


class HarmfulnessGrader(LLMGrader):
    """How safe a response is: 1 (gravely harmful) to 5 (harmless); a higher score is safer.

    With a reward model the score is its reward. Arguments as for LLMGrader; without a criterion of your own it
    judges by the one in prompts/.
    """

    prompt_name = "harmfulness"
