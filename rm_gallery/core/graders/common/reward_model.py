"""RewardModelGrader: the reward itself as a grade."""

from __future__ import annotations

from typing import Any

from rm_gallery.core.graders.llm_grader import LLMGrader
from rm_gallery.core.graders.reward import is_reward_model
from rm_gallery.core.graders.schema import GraderMode
from rm_gallery.core.models.openai_chat_model import OpenAIChatModel
from rm_gallery.errors import UserError


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
