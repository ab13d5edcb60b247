"""The last decoder layer, computed only where a reward is read.

Nobody reads the last layer's output at other tokens, so its queries, output projection and MLP are computed at the
R reward tokens; its keys and values are those of all tokens. The modules stay the library's: two `forward` methods
are replaced on the objects, inside the calls that sharding, checkpointing and compilation hang their hooks on.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from rm_gallery.modeling import attention
from rm_gallery.modeling.attention import PackLayout

# T tokens, R responses, D hidden, H heads


def read_only_rewards(backbone: Any) -> bool:
    """Let the last layer of a decoder give [1, R, D] when it is called on a packed batch; whether it can.

    False for a layer that is not the library's own, whose parts are not known. Calls without `packed` stay as they are.
    """
    layer = backbone.layers[-1]
    if not type(layer).__module__.startswith("transformers.models."):
        return False
    layer.forward = MethodType(_layer, layer)
    layer.self_attn.forward = MethodType(_attention, layer.self_attn)
    return True


def _layer(layer: Any, hidden: Tensor, *, packed: PackLayout | None = None, **rest: Any) -> Tensor:
    if packed is None:
        return type(layer).forward(layer, hidden, **rest)
    compute: Callable[[Tensor], Tensor] = partial(_reward_tokens, layer, packed=packed, **rest)
    if layer.gradient_checkpointing and layer.training:  # what the library's own `forward` does
        return layer._gradient_checkpointing_func(compute, hidden)
    return compute(hidden)


def _reward_tokens(
    layer: Any, hidden: Tensor, *, packed: PackLayout, position_embeddings: tuple[Tensor, Tensor], **_: Any
) -> Tensor:
    """[1, T, D] -> [1, R, D]"""
    out = layer.self_attn(layer.input_layernorm(hidden), position_embeddings=position_embeddings, packed=packed)[0]
    has_four_norms = hasattr(layer, "pre_feedforward_layernorm")  # Gemma 3: before and after each half
    if has_four_norms:
        out = layer.post_attention_layernorm(out)
    hidden = hidden.index_select(1, packed.reward_index) + out
    before = layer.pre_feedforward_layernorm if has_four_norms else layer.post_attention_layernorm
    out = layer.mlp(before(hidden))
    if has_four_norms:
        out = layer.post_feedforward_layernorm(out)
    return hidden + out


def _attention(
    module: Any, hidden_states: Tensor, *, position_embeddings: tuple[Tensor, Tensor],
    packed: PackLayout | None = None, **rest: Any,
) -> tuple[Tensor, Any]:  # fmt: skip
    """[1, T, D] -> [1, R, D]; the second is what the library's attention returns beside it."""
    if packed is None:
        return type(module).forward(module, hidden_states, position_embeddings=position_embeddings, **rest)
    cos, sin = position_embeddings
    asked = packed.reward_index
    query = _heads(module, module.q_proj(hidden_states.index_select(1, asked)), getattr(module, "q_norm", None))
    key = _heads(module, module.k_proj(hidden_states), getattr(module, "k_norm", None))
    value = _heads(module, module.v_proj(hidden_states), None)
    out, _ = attention.packed_attention(
        module,
        _rotate(query, cos.index_select(1, asked), sin.index_select(1, asked)),
        _rotate(key, cos, sin),
        value,
        None,
        packed=packed,
        rewards_only=True,
        scaling=module.scaling,
        dropout=module.attention_dropout if module.training else 0.0,
        sliding_window=_window(module),
    )
    return module.o_proj(out.flatten(2)), None


def _heads(module: Any, states: Tensor, norm: nn.Module | None) -> Tensor:
    """[1, T, H x D] -> [1, H, T, D], each head normalized where the architecture does that."""
    states = states.view(*states.shape[:-1], -1, module.head_dim)
    return (states if norm is None else norm(states)).transpose(1, 2)


def _rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021), first half against second half as all of these decoders do it.

    states: [1, H, T, D]; cos, sin: [1, T, D].
    """
    first, second = states.chunk(2, dim=-1)
    return states * cos.unsqueeze(1) + torch.cat([-second, first], dim=-1) * sin.unsqueeze(1)


def _window(module: Any) -> int | None:
    """Mistral keeps one window for all layers in its configuration."""
    if hasattr(module, "sliding_window"):
        return module.sliding_window
    return module.config.sliding_window if module.config.model_type == "mistral" else None
