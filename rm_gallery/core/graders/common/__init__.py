"""Graders ready for use, each judging by a criterion in prompts/; and one whose grade is a reward."""

from __future__ import annotations

from typing import Any

from rm_gallery.core.graders.base_grader import GraderMode
from rm_gallery.core.graders.llm_grader import LLMGrader
from rm_gallery.core.graders.reward import is_reward_model
from rm_gallery.core.models.openai_chat_model import OpenAIChatModel
from rm_gallery.errors import UserError

__all__ = [
    "CorrectnessGrader",
    "HallucinationGrader",
    "HarmfulnessGrader",
    "InstructionFollowingGrader",
    "RelevanceGrader",
    "RewardModelGrader",
]


class RelevanceGrader(LLMGrader):
    """How far a response deals with what the query asks: 1 (off the subject) to 5 (all of it).

    With a reward model the score is its reward. Arguments as for LLMGrader; without a criterion of your own it
    judges by the one in prompts/.
    """

    prompt_name = "relevance"


class CorrectnessGrader(LLMGrader):
    """How far a response agrees with the reference response: 1 (contradicts it) to 5 (agrees in all that matters).

    With a reward model the score is its reward. Arguments as for LLMGrader; without a criterion of your own it
    judges by the one in prompts/.
    """

    prompt_name = "correctness"
    needed = ("query", "response", "reference_response")


class HallucinationGrader(LLMGrader):
    """Whether statements of fact are borne out by the context: 1 (the main point is invented) to 5 (all are borne out).

    With a reward model the score is its reward. Arguments as for LLMGrader; without a criterion of your own it
    judges by the one in prompts/.
    """

    prompt_name = "hallucination"


class HarmfulnessGrader(LLMGrader):
    """How safe a response is: 1 (gravely harmful) to 5 (harmless); a higher score is safer.

    With a reward model the score is its reward. Arguments as for LLMGrader; without a criterion of your own it
    judges by the one in prompts/.
    """

    prompt_name = "harmfulness"


class InstructionFollowingGrader(LLMGrader):
    """How far a response meets the query's requirements: 1 (does not do the task) to 5 (meets every one).

    With a reward model the score is its reward. Arguments as for LLMGrader; without a criterion of your own it
    judges by the one in prompts/.
    """

    prompt_name = "instruction_following"


class RewardModelGrader(LLMGrader):
    """Scores with a reward model; takes responses without a query too, for models of bare text.

    The score is the reward: any finite number, comparable between responses to one query only.
    """

    prompt_name = "reward"
    needed = ("response",)

    def __init__(
        self, model: Any, name: str = "", mode: GraderMode | str = GraderMode.POINTWISE, description: str = ""
    ) -> None:
        """model: an OpenAIChatModel of a reward model's folder, the folder itself, or any object with `ascore`.

        Raises UserError for a model that gives no rewards.
        """
        chosen = OpenAIChatModel(model, is_local=True) if isinstance(model, str) else model
        super().__init__(chosen, name, mode, description)
        if not is_reward_model(self.model):
            raise UserError(f"grader {self.name!r}: model is a chat model; give a reward model's folder")
