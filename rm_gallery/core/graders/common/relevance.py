"""RelevanceGrader: does a response deal with what is asked."""

from __future__ import annotations

from rm_gallery.core.graders.llm_grader import LLMGrader


class RelevanceGrader(LLMGrader):
    """How far a response deals with what the query asks: 1 (off the subject) to 5 (all of it).

    With a reward model the score is its reward. Arguments as for LLMGrader; without a criterion of your own it
    judges by the one in prompts/.
    """

    prompt_name = "relevance"
