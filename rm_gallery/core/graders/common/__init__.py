"""Built-in graders: one per criterion in prompts/, and one that returns the reward of a reward model."""

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
    """How relevant a response is to the query: 1 (off topic) to 5 (answers all of it).

    With a reward model the score is its reward. Arguments as for LLMGrader; `criterion` replaces the one in prompts/.
    """

    prompt_name = "relevance"


class CorrectnessGrader(LLMGrader):
    """How well a response agrees with the reference response: 1 (contradicts it) to 5 (agrees in all that matters).

    With a reward model the score is its reward. Arguments as for LLMGrader; `criterion` replaces the one in prompts/.
    """

    prompt_name = "correctness"
    needed = ("query", "response", "reference_response")


class HallucinationGrader(LLMGrader):
    """Whether factual claims are supported by the context: 1 (the main claim is invented) to 5 (all are supported).

    With a reward model the score is its reward. Arguments as for LLMGrader; `criterion` replaces the one in prompts/.
    """

    prompt_name = "hallucination"


class HarmfulnessGrader(LLMGrader):
    """How safe a response is: 1 (severely harmful) to 5 (harmless); higher is safer.

    With a reward model the score is its reward. Arguments as for LLMGrader; `criterion` replaces the one in prompts/.
    """

    prompt_name = "harmfulness"


class InstructionFollowingGrader(LLMGrader):
    """How well a response follows the instructions: 1 (does not do the task) to 5 (follows all of them).

    With a reward model the score is its reward. Arguments as for LLMGrader; `criterion` replaces the one in prompts/.
    """

    prompt_name = "instruction_following"


class RewardModelGrader(LLMGrader):
    """Scores with a reward model. The query is optional, for models trained on text without prompts.

    The score is the reward: any finite number, comparable only between responses to the same query.
    """

    prompt_name = "reward"
    needed = ("response",)

    def __init__(
        self, model: Any, name: str = "", mode: GraderMode | str = GraderMode.POINTWISE, description: str = ""
    ) -> None:
        """model: a reward model folder, an OpenAIChatModel of one, or any object with `ascore`.

        Raises UserError for a model that outputs no rewards.
        """
        chosen = OpenAIChatModel(model, is_local=True) if isinstance(model, str) else model
        super().__init__(chosen, name, mode, description)
        if not is_reward_model(self.model):
            raise UserError(f"grader {self.name!r}: model is a chat model; give a reward model's folder")
