"""Decoder layers of transformers on packed batches: attention, norms, and a last layer for reward tokens only.

The modules are the library's: `forward` methods are replaced on the objects, inside the calls that FSDP2, activation
checkpointing and torch.compile hook, so parameter names and saved files do not change.

Only the R reward tokens of the last layer's output are read, so its queries, output projection and MLP are computed for
these tokens; keys and values are computed for all T tokens. Example: two pairs with 300 tokens each have T = 600 and
R = 4, and the last MLP runs on 4 rows instead of 600.

RMS norm and rotary embedding have handwritten backward passes, with fewer passes over memory than autograd's. On two
CPU cores they took a tenth of a training step (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from rm_gallery.modeling.architectures import architecture
from rm_gallery.modeling.attention.dispatch import AttentionSpec, PackLayout, attend

# T tokens, R responses, N queries (T, or R in the last layer), D hidden, H heads


def adapt(backbone: Any, *, only_rewards: bool = True) -> bool:
    """Replace the forward methods of a decoder's layers; on a packed batch its last hidden state is then [1, R, D].

    only_rewards: False keeps the hidden states of all tokens, [1, T, D], for a language model.
    Returns False and changes nothing for layers that are not from transformers. Calls without `packed` run the
    library's code.
    """
    layers = list(backbone.layers)
    if not all(type(layer).__module__.startswith("transformers.models.") for layer in layers):
        return False
    for layer in layers:
        layer.self_attn.forward = MethodType(_attention, layer.self_attn)
    if only_rewards:
        last = layers[-1]
        last.forward = MethodType(_last_layer, last)
        last.self_attn.forward = MethodType(_last_attention, last.self_attn)
    if architecture(backbone.config.model_type).float32_norms:
        return True  # norms keep their own forward: `rms_norm` rounds as in Llama
    for module in backbone.modules():
        if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            module.forward = MethodType(_norm, module)
    return True


def restore_last_layer(backbone: Any) -> None:
    """Let the last of the adapted layers compute all tokens, as the others do."""
    last = backbone.layers[-1]
    del last.forward
    last.self_attn.forward = MethodType(_attention, last.self_attn)


def _norm(module: Any, hidden_states: Tensor) -> Tensor:
    return rms_norm(hidden_states, module.weight, module.variance_epsilon)


def _last_layer(layer: Any, hidden: Tensor, *, packed: PackLayout | None = None, **rest: Any) -> Tensor:
    if packed is None or packed.reads_all:
        more = {} if packed is None else {"packed": packed}
        whole: Tensor = type(layer).forward(layer, hidden, **more, **rest)
        return whole
    compute: Callable[[Tensor], Tensor] = partial(_reward_tokens, layer, packed=packed, **rest)
    if layer.gradient_checkpointing and layer.training:  # as the library's `forward` does
        recomputed: Tensor = layer._gradient_checkpointing_func(compute, hidden)
        return recomputed
    return compute(hidden)


def _reward_tokens(
    layer: Any, hidden: Tensor, *, packed: PackLayout, position_embeddings: tuple[Tensor, Tensor], **_: Any
) -> Tensor:
    """[1, T, D] -> [1, R, D]"""
    has_four_norms = architecture(layer.self_attn.config.model_type).four_norms
    # 1. Attention: keys and values of all T tokens, queries and output of the R reward tokens.
    out = layer.self_attn(layer.input_layernorm(hidden), position_embeddings=position_embeddings, packed=packed)[0]
    if has_four_norms:
        out = layer.post_attention_layernorm(out)
    # 2. From here on the residual stream has R rows.
    hidden = hidden.index_select(1, packed.reward_index) + out
    before = layer.pre_feedforward_layernorm if has_four_norms else layer.post_attention_layernorm
    out = layer.mlp(before(hidden))
    if has_four_norms:
        out = layer.post_feedforward_layernorm(out)
    return hidden + out


def _attention(
    module: Any, hidden_states: Tensor, *, position_embeddings: tuple[Tensor, Tensor],
    packed: PackLayout | None = None, rewards_only: bool = False, **rest: Any,
) -> tuple[Tensor, Any]:  # fmt: skip
    """[1, T, D] -> ([1, N, D], None), the library's return type."""
    if packed is None:
        whole: tuple[Tensor, Any] = type(module).forward(
            module, hidden_states, position_embeddings=position_embeddings, **rest
        )
        return whole
    states = hidden_states[0]
    cos, sin = (part[0] for part in position_embeddings)  # each [T, D of a head]
    query_states, cos_q, sin_q = states, cos, sin
    if rewards_only:
        query_states, cos_q, sin_q = (part.index_select(0, packed.reward_index) for part in (states, cos, sin))
    query = _heads(module, module.q_proj(query_states), getattr(module, "q_norm", None))
    key = _heads(module, module.k_proj(states), getattr(module, "k_norm", None))
    key, value = rotate(key, cos, sin), _heads(module, module.v_proj(states), None)
    if packed.past is not None:
        key, value = packed.extend(module.layer_idx, key, value)
    out = getattr(module, "attend", attend)(  # excluded from the graph when layers are compiled
        rotate(query, cos_q, sin_q),
        key,
        value,
        packed,
        AttentionSpec(module.scaling, _window(module), dropout=module.attention_dropout if module.training else 0.0),
        rewards_only=rewards_only,
    )
    return module.o_proj(out.flatten(1)).unsqueeze(0), None


def _last_attention(
    module: Any, hidden_states: Tensor, *, packed: PackLayout | None = None, **arguments: Any
) -> tuple[Tensor, Any]:
    only_rewards = packed is not None and not packed.reads_all
    return _attention(module, hidden_states, packed=packed, rewards_only=only_rewards, **arguments)


def _heads(module: Any, states: Tensor, norm: nn.Module | None) -> Tensor:
    """[T, H x D] -> [T, H, D], with the norm of each head where the architecture has one."""
    states = states.view(len(states), -1, module.head_dim)
    return states if norm is None else norm(states)


def _window(module: Any) -> int | None:
    """Sliding window of the layer in tokens, or None. Mistral has one for all layers, in its configuration."""
    in_config = not hasattr(module, "sliding_window") and architecture(module.config.model_type).window_in_config
    holder = module.config if in_config else module
    return getattr(holder, "sliding_window", None)


# T tokens, H heads, D features of a token or of a head


def rms_norm(states: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """weight * states / rms(states) over the last axis (Zhang and Sennrich 2019), rounded as in Llama.

    The norm is computed in float32 and cast to the dtype of `states` before the product with `weight`.
    """
    result: Tensor = _RmsNorm.apply(states, weight, epsilon)
    return result


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = states.float()
        size = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        inverse = size.square_().div_(states.shape[-1]).add_(epsilon).rsqrt_()
        normal = (wide * inverse).to(states.dtype)
        ctx.save_for_backward(normal, weight, inverse)
        return normal * weight

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        # y = w n, n = x / r: dx = (dn - n mean(dn n)) / r with dn = w dy
        normal, weight, inverse = ctx.saved_tensors
        gradient = gradients[0]
        scaled = gradient * weight
        mean = (scaled * normal).sum(-1, keepdim=True, dtype=torch.float32).div_(normal.shape[-1])
        states = torch.addcmul(scaled.float(), normal.float(), mean, value=-1).mul_(inverse).to(gradient.dtype)
        summed = (gradient * normal).flatten(0, -2).sum(0)
        return states, summed.to(weight.dtype), None


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021) that rotates the first half of a head with the second.

    states: [T, H, D]; cos, sin: [T, D], without gradients.
    """
    result: Tensor = _Rotate.apply(states, cos.unsqueeze(1), sin.unsqueeze(1))
    return result


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        first, second = states.chunk(2, -1)
        sin_first, sin_second = sin.chunk(2, -1)
        rotated = states * cos
        a, b = rotated.chunk(2, -1)
        a.addcmul_(second, sin_first, value=-1)
        b.addcmul_(first, sin_second)
        return rotated

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        first, second = gradients[0].chunk(2, -1)
        sin_first, sin_second = sin.chunk(2, -1)
        states = gradients[0] * cos
        a, b = states.chunk(2, -1)
        a.addcmul_(second, sin_second)
        b.addcmul_(first, sin_first, value=-1)
        return states, None, None
