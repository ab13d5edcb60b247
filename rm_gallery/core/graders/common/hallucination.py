"""HallucinationGrader: is what a response states borne out."""

from __future__ import annotations

from rm_gallery.core.graders.llm_grader import LLMGrader


class HallucinationGrader(LLMGrader):
    """Whether statements of fact are borne out by the context: 1 (the main point is invented) to 5 (all are borne out).

    With a reward model the score is its reward. Arguments as for LLMGrader; without a criterion of your own it
    judges by the one in prompts/.
    """

    prompt_name = "hallucination"
