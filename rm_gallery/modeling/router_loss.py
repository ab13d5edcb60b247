"""The load-balancing loss of a mixture of experts' routers: `model.router_aux_loss_coef`.

Fedus et al. 2021, "Switch Transformers", equations 4 to 6, as transformers' `load_balancing_loss_func` computes it:

    loss = E * sum over the experts e of f_e * P_e

f_e is how often a token has e among its top-k experts, and P_e the mean of e's probability, both over all tokens and
layers. A product of two means is not a sum over micro-batches. But f_e is a count, without a gradient: once it is known
for the whole step, E * f_e * P_e is linear in the probabilities, so that values and gradients of micro-batches and
ranks add up to those of the step.

A text counts once for each comparison that it is in, as if every pair were computed apart, or in data without
comparisons once for each rating; a conversation as often as the data have it. So neither a shared prompt, nor merged or
split groups, nor the number of ranks change the loss.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rm_gallery.data.batching.packed_batch import PackedBatch
from rm_gallery.distributed.collectives import sum_over_ranks
from rm_gallery.distributed.process_group import world_size
from rm_gallery.errors import UserError
from rm_gallery.modeling.architectures import common_setting
from rm_gallery.modeling.forward import pad_texts
from rm_gallery.modeling.reward_model import RewardModel

# T tokens (padding included where texts are padded), E experts, R responses

_KEY = "model.router_aux_loss_coef"
_PARAMETERS = ["gate_logits", "num_experts", "top_k", "attention_mask"]


class RouterLoss:
    """Records the logits of the routers in each forward pass of a model in training mode.

    In a step: `start`, then for each micro-batch a forward pass, `share`, and the backward pass.
    """

    def __init__(self, model: RewardModel, coefficient: float) -> None:
        """Raises UserError for a model without such routers, and for one in which nothing that they read is trained."""
        backbone = getattr(model.network, model.network.base_model_prefix)
        check_type(type(backbone), model.network.config)
        self.coefficient = coefficient
        self._model = model
        self._kind = model.network.config.model_type
        self._top_k: int = common_setting(model.network.config, "num_experts_per_tok")
        self._logits: list[Tensor] = []
        self._is_recording = False
        self._step: tuple[Tensor, Tensor] | None = None  # of all micro-batches and ranks: N_e [E], their tokens
        routers = _routers(backbone)
        if not routers:
            raise UserError(f"{_KEY}={coefficient}: this {self._kind} has no layer with experts; set null")
        parameters, last = list(backbone.parameters()), set(routers[-1][0].parameters())
        end = max(number for number, each in enumerate(parameters) if each in last) + 1
        if not any(each.requires_grad for each in parameters[:end]):
            raise UserError(
                f"{_KEY}={coefficient} has no effect: no router, and nothing below one, is trained; set null"
            )
        for module, index in routers:
            module.register_forward_hook(self._recorder(index))
        # The hooks are silent where activation checkpointing runs a layer again, in the backward pass.
        model.register_forward_pre_hook(lambda *_: self._record(model.training))
        model.register_forward_hook(lambda *_: self._record(False))

    def start(self, batches: Sequence[PackedBatch], device: torch.device) -> None:
        """Count the step's tokens of each expert, in a pass without gradients over its micro-batches. A collective.

        A step of one micro-batch on one rank needs no such pass. The random numbers (dropout) of the pass are those of
        the one with gradients.
        """
        self._step = None
        if len(batches) == 1 and world_size() == 1:
            return
        total = torch.zeros((), dtype=torch.float64, device=device)
        with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            for batch in batches:
                batch = batch.to(device)
                self._model(batch)
                counts, _, tokens = self._sums(batch)
                total = total + torch.cat([counts, tokens.view(1)])
        total = sum_over_ranks(total, "the counts of experts")
        self._step = total[:-1], total[-1]

    def share(self, batch: PackedBatch) -> Tensor:
        """The share of the last forward pass, of `batch`, in the step's loss: 0-dimensional float32.

        The sum over micro-batches and ranks is the loss, without the coefficient.
        """
        counts, probabilities, tokens = self._sums(batch)
        counts, tokens = self._step or (counts, tokens)
        return ((counts / tokens * len(counts) / tokens).float() * probabilities).sum()

    def _recorder(self, index: int) -> Any:
        def record(module: nn.Module, arguments: Any, output: Any) -> None:
            if self._is_recording:
                self._logits.append(output[index] if isinstance(output, tuple) else output)

        return record

    def _record(self, is_on: bool) -> None:
        self._is_recording = is_on
        if is_on:
            self._logits = []

    def _sums(self, batch: PackedBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Over tokens and layers: tokens of each expert [E] float64, sums of probabilities [E] float32, and tokens."""
        recorded, self._logits = self._logits, []
        weights = token_weights(batch, padded=self._model.padded)  # [T]
        layers = [each.reshape(-1, each.shape[-1]).float() for each in recorded]  # [T, E] each
        if not layers or any(len(each) != len(weights) for each in layers):
            rows = [len(each) for each in layers]
            raise UserError(f"{_KEY}: the routers of {self._kind} saw {rows} tokens of {len(weights)}; set null")
        counts = torch.zeros(layers[0].shape[-1], dtype=torch.float64, device=weights.device)
        repeated = weights.double().unsqueeze(1).expand(-1, self._top_k).reshape(-1)
        sums = torch.zeros_like(layers[0][0])
        for logits in layers:
            probabilities = logits.softmax(-1)
            chosen = probabilities.detach().topk(self._top_k, -1).indices
            counts.index_add_(0, chosen.reshape(-1), repeated)
            sums = sums + weights @ probabilities
        return counts, sums, weights.double().sum() * len(layers)


def check_type(backbone: Any, config: Any) -> None:
    """Raise UserError for a type without the load-balancing loss. backbone: the class of its base model."""
    function = getattr(sys.modules[backbone.__module__], "load_balancing_loss_func", None)
    if function is None or not _recorders(backbone):
        raise UserError(
            f"{_KEY}: {config.model_type} has no load-balancing loss of routers in transformers "
            "(load_balancing_loss_func); set null"
        )
    is_common = list(inspect.signature(function).parameters) == _PARAMETERS
    if not is_common or not isinstance(common_setting(config, "num_experts_per_tok"), int):
        raise UserError(f"{_KEY}: the load-balancing loss of {config.model_type} has a form of its own; set null")


def check_config(config: Any) -> None:
    """`check_type` for a configuration without its model; types from a model folder's own code pass."""
    from transformers import MODEL_MAPPING

    if type(config) in MODEL_MAPPING:
        backbone = MODEL_MAPPING[type(config)]
        check_type(backbone[0] if isinstance(backbone, tuple) else backbone, config)


def _recorders(backbone: Any) -> list[Any]:
    """What transformers records as router logits: the class of the module, and the index in its output."""
    found = (getattr(backbone, "_can_record_outputs", None) or {}).get("router_logits", [])
    return found if isinstance(found, list) else [found]


def _routers(backbone: nn.Module) -> list[tuple[nn.Module, int]]:
    """The routers in order, with the index of the logits in their output."""
    return [
        (module, each.index)
        for name, module in backbone.named_modules()
        for each in _recorders(type(backbone))
        if isinstance(module, each.target_class) and (each.layer_name is None or f".{each.layer_name}." in f".{name}.")
    ]


def token_weights(batch: PackedBatch, *, padded: bool) -> Tensor:
    """In how many comparisons, ratings or conversations each token is, of a text or of several: [T] float32.

    Padding has 0.

    Example: the pair of a prompt [a b] and responses [c] and [d e] has weights 2 2 1 1 1.
    """
    device, count = batch.input_ids.device, len(batch.reward_index)
    if not count:
        return torch.zeros(1, device=device)  # the dummy token of an empty batch
    texts = torch.zeros(count, device=device)  # [R]
    for side in (batch.better, batch.worse) if len(batch.better) else (batch.rated,):
        texts.index_add_(0, side, torch.ones(side.shape, device=device))
    if len(batch.target_texts) and not (len(batch.better) or len(batch.rated)):
        texts = batch.target_texts
    if padded:
        return (pad_texts(batch, 0)[1] * texts.unsqueeze(1)).reshape(-1)
    groups = torch.zeros(len(batch.group_lengths), device=device)
    groups.index_add_(0, batch.group[batch.reward_index], texts)
    return torch.where(batch.response < 0, groups[batch.group], texts[batch.response])
