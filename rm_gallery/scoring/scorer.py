"""RewardScorer: rewards from a checkpoint folder, with the tokens, packs and attention of training."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from rm_gallery.data.batch import collate
from rm_gallery.data.dropped import BadRow
from rm_gallery.data.packing import plan_step
from rm_gallery.data.token_data import TokenData, split_prefix
from rm_gallery.data.tokenize import TokenizeConfig, encode_many, load_tokenizer
from rm_gallery.errors import UserError
from rm_gallery.modeling.export import InputRecord, read_record, settle_pad_token
from rm_gallery.modeling.parallel import DTYPES
from rm_gallery.modeling.reward_model import RewardModel, load_reward_model
from rm_gallery.schema import Message, PreferenceGroup

log = logging.getLogger(__name__)


class RewardScorer:
    """Scores responses with a trained model; the responses of one prompt compute the prompt once."""

    def __init__(self, model: RewardModel, tokenizer: Any, record: InputRecord, *, token_budget: int = 8192) -> None:
        self.model, self.tokenizer, self.record, self.token_budget = model.eval(), tokenizer, record, token_budget

    @classmethod
    def from_folder(
        cls, folder: str | Path, *, device: str = "auto", dtype: Literal["auto", "fp32", "bf16"] = "auto"
    ) -> RewardScorer:
        """Load a checkpoint folder.

        device: `auto` takes a GPU when there is one. dtype: `auto` is bfloat16 on a GPU, float32 on a CPU.
        Raises UserError for a folder that holds no one-label model.
        """
        where = torch.device(
            "cuda" if device == "auto" and torch.cuda.is_available() else device.replace("auto", "cpu")
        )
        model = load_reward_model(str(folder), key="checkpoint").model
        tokenizer = load_tokenizer(str(folder), key="checkpoint")
        settle_pad_token(model, tokenizer)
        wanted = ("bf16" if where.type == "cuda" else "fp32") if dtype == "auto" else dtype
        head = model.head
        model.to(where, DTYPES[wanted])
        head.float()
        record = read_record(folder) or InputRecord("chat" if tokenizer.chat_template else "text")
        return cls(model, tokenizer, record)

    def score(self, groups: Sequence[PreferenceGroup]) -> list[list[float]]:
        """One list of K rewards per group, in the order of its responses.

        Raises UserError for a text without tokens and a conversation that the chat template refuses.
        """
        config = TokenizeConfig(max_length=self.record.max_length, append_eos=self.record.append_eos)
        try:
            texts = encode_many(groups, self.tokenizer, config)
            data = TokenData(((split_prefix(ids, ()), "") for ids in texts), self.record.input_style)
        except BadRow as error:
            raise UserError(f"a text cannot be scored: {error}") from error
        longest = int(data.sizes.longest_text.max(initial=0))
        if longest > self.record.max_length:
            log.warning("a text of %d tokens is longer than any in training (%d)", longest, self.record.max_length)
        device = next(self.model.parameters()).device
        rewards: list[list[float]] = [[] for _ in groups]
        budget = max(self.token_budget, int((data.sizes.longest_text * data.sizes.num_responses).max(initial=1)))
        plan = plan_step(np.arange(len(data)), data.sizes, token_budget=budget, padded=self.model.padded)
        for pack in plan.packs[0]:
            with torch.inference_mode():
                flat = self.model(collate([data[index] for index in pack]).to(device)).tolist()
            for index in pack:
                count = int(data.sizes.num_responses[index])
                rewards[index], flat = flat[:count], flat[count:]
        return rewards

    def score_messages(self, conversations: Sequence[Sequence[Message]]) -> list[float]:
        """The reward of the last turn of each conversation."""
        groups = [PreferenceGroup((), [conversation], style="chat") for conversation in conversations]
        return [rewards[0] for rewards in self.score(groups)]
