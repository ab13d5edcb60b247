"""A twin of a model: a small network from the same configuration, on which a way to run the model is tried.

Scalars that decide what is computed are those of the configuration: multipliers, rotary settings, clips,
kinds of layers. Sizes are small, windows and chunks are shorter than the texts of the check, soft caps so low that they
have an effect, weights are random. A check needs neither the model's weights nor its memory.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

VOCABULARY = 128
WINDOW = 6  # in tokens; even, since some types halve it
_SOFT_CAP = 1.0  # below most attention scores, so that rewards depend on it
_FIRST_TOKEN = 8  # texts of the check have no smaller ids: special tokens are below
_MAX_LAYERS = 4
_WIDTH, _HEADS, _HEAD_DIM = 64, 4, 16

_SIZES: tuple[tuple[int, str], ...] = (
    (_WIDTH, "hidden_size d_model n_embd dim emb_dim word_embed_proj_dim pooler_hidden_size dim_model_base d_latents"),
    (_HEADS, "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads"),
    (_HEAD_DIM, "head_dim d_head d_kv kv_channels kv_lora_rank q_lora_rank qk_head_dim mamba_headdim"),
    (_HEAD_DIM, "linear_head_dim chunk_size mamba_chunk_size"),
    (_HEADS, "linear_num_heads"),
    (_HEAD_DIM, "attention_head_size query_pre_attn_scalar mamba_d_head"),
    (2 * _HEADS, "mamba_n_heads"),
    (2 * _WIDTH, "mamba_d_ssm"),
    (2 * _WIDTH, "attention_hidden_size"),
    (2 * _HEAD_DIM, "attention_head_dim"),
    (96, "intermediate_size ffn_dim d_inner dff d_ff hidden_dim n_inner encoder_ffn_dim decoder_ffn_dim"),
    (96, "ffn_hidden_size"),
    (32, "moe_intermediate_size shared_expert_intermediate_size input_embedding_size output_embedding_size"),
    (32, "expert_ffn_hidden_size"),
    (32, "entity_emb_size pronunciation_embed_dim shape_embed_dim"),
    (8, "qk_nope_head_dim qk_rope_head_dim v_head_dim linear_key_head_dim linear_value_head_dim rotary_dim"),
    (8, "num_latents adapter_rank mamba_d_state hidden_size_per_layer_input laurel_rank"),
    (WINDOW, "sliding_window window_size local_attention attention_chunk_size floor_scale"),
    (4, "zero_expert_num"),
    (4, "num_experts num_local_experts n_routed_experts mamba_dt_rank linear_num_value_heads"),
    (2, "num_experts_per_tok moe_topk linear_num_key_heads n_mamba_heads n_group mamba_ngroups"),
    (2, "num_experts_per_token num_expert_group"),
    (1, "topk_group"),
    (VOCABULARY, "vocab_size entity_vocab_size pronunciation_vocab_size shape_vocab_size vocab_size_per_layer_input"),
)
_SMALL = {name: size for size, names in _SIZES for name in names.split()}
_REQUIRED = ("head_dim", "vocab_size")
"""Sizes that some types leave open until a configuration sets them."""
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers")
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")
_MAX_POSITIONS = 512


class NoTwinError(Exception):
    """No small network can be built from this configuration; the message gives the reason."""


def build_twin(config: Any, *, language_model: bool = False) -> Any:
    """A sequence classification network with one label from a smaller copy of `config`, in evaluation mode.

    language_model: the causal language model instead. The state of the random number generator does not change.
    Raises NoTwinError.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    library = AutoModelForCausalLM if language_model else AutoModelForSequenceClassification
    try:
        small = shrink(config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = library.from_config(small, dtype=torch.float32)
            draw_weights(network)
    except Exception as error:  # inconsistent sizes raise various errors in torch and transformers
        raise NoTwinError(f"{type(error).__name__}: {error}") from error
    return network.eval()


def shrink(config: Any) -> Any:
    """A copy of a configuration with small sizes and windows, one label, and every kind of layer that it has."""
    values = config.to_dict()
    for name in ("architectures", "quantization_config", "auto_map", "id2label", "label2id", "dtype", "torch_dtype"):
        values.pop(name, None)
    before = dict(values)
    _drop_layers(values)
    # 1. Sizes, with the ratios between them that change what is computed.
    heads, width = before.get("num_attention_heads"), before.get("hidden_size")
    for name, size in _SMALL.items():
        if isinstance(values.get(name), int) and not isinstance(values[name], bool):
            values[name] = min(size, values[name]) if size <= WINDOW else size
        elif name in _REQUIRED and name in values:
            values[name] = size
    if before.get("ffn_hidden_size") == 4 * (width or 0):
        values["ffn_hidden_size"] = 4 * _WIDTH  # Falcon
    if isinstance(values.get("attention_window"), list):  # Longformer
        values["attention_window"] = [2 * WINDOW] * len(values["attention_window"])
    if "num_layers_per_stack" in values:  # HRM
        values["num_layers_per_stack"] = 2
    if isinstance(values.get("intermediate_size"), list):
        values["intermediate_size"] = [_SMALL["intermediate_size"]] * len(values["intermediate_size"])
    for name in ("num_key_value_heads", "num_kv_heads"):
        if name in values:
            values[name] = {1: 1, heads: _HEADS, None: _HEADS}.get(values[name], 2)
    if isinstance(values.get("embedding_size"), int):
        values["embedding_size"] = _WIDTH if values["embedding_size"] == width else _WIDTH // 2
    if "qk_rope_head_dim" in values and before.get("head_dim") == before["qk_rope_head_dim"]:
        values["head_dim"] = values["qk_rope_head_dim"]
    if "mamba_headdim" in values:  # Zamba 2
        values["mamba_headdim"] = values["mamba_expand"] * _WIDTH // values["n_mamba_heads"]
    if "max_2d_position_embeddings" in values:  # LayoutLM and others: four coordinates and two sizes make the width
        values["hidden_size"] = 6 * _HEAD_DIM
        values.update({name: _HEAD_DIM for name in ("coordinate_size", "shape_size") if name in values})
    if "axial_pos_embds_dim" in values:  # Reformer
        values["axial_pos_embds_dim"] = [_WIDTH // 4, _WIDTH - _WIDTH // 4]
    if values.get("attn_logit_softcapping"):
        values["attn_logit_softcapping"] = min(values["attn_logit_softcapping"], _SOFT_CAP)
    _shrink_layer_settings(values, before)
    # 2. A table of learned positions; rotary settings may depend on the number of positions, so it stays with them.
    if not values.get("rope_parameters"):
        for name in _POSITIONS:
            if isinstance(values.get(name), int):
                values[name] = min(values[name], _MAX_POSITIONS)
    _shorten_rotary_lists(values)
    # 3. Special tokens inside the vocabulary.
    for name, each in values.items():
        if name.endswith(("_token_id", "_token_index")) and each is not None and name != "pad_token_id":
            values[name] = each if isinstance(each, int) and 0 <= each < _FIRST_TOKEN else 2
    pad = values.get("pad_token_id")
    values["pad_token_id"] = pad if isinstance(pad, int) and 0 <= pad < _FIRST_TOKEN else 0
    values.update(num_labels=1, problem_type="regression", use_cache=False)
    return type(config).from_dict(values)


def _drop_layers(values: dict[str, Any]) -> None:
    """Keep a few layers, and what the configuration says of each of them."""
    shared, special = values.get("num_kv_shared_layers") or 0, values.get("per_layer_config")
    for name in [name for name in _LAYERS if isinstance(values.get(name), int)]:
        depth = values[name]
        kept = _kept_layers(values, depth)
        for key, each in values.items():
            if isinstance(each, list) and len(each) == depth > 0:
                values[key] = [each[index] for index in kept]
        values[name] = len(kept)
        if shared:  # the last layers use keys and values of earlier ones
            values["num_kv_shared_layers"] = sum(index >= depth - shared for index in kept)
        if isinstance(special, dict):
            own = {int(index): each for index, each in special.items()}
            values["per_layer_config"] = {at: own[index] for at, index in enumerate(kept) if index in own}
        if isinstance(values.get("hybrid_layer_ids"), list):
            values["hybrid_layer_ids"] = [at for at, index in enumerate(kept) if index in values["hybrid_layer_ids"]]


def _shrink_layer_settings(values: dict[str, Any], before: dict[str, Any]) -> None:
    """Sizes of single layers, in their ratio to that of all layers."""
    for at, own in (values.get("per_layer_config") or {}).items():
        values["per_layer_config"][at] = {
            name: max(1, values[name] * each // before[name])
            if isinstance(each, int) and isinstance(before.get(name), int) and not isinstance(each, bool)
            else each
            for name, each in own.items()
        }


def _kept_layers(values: dict[str, Any], depth: int) -> list[int]:
    """Layers of the twin: the first and second of each kind, then the first others, in order.

    Where kinds follow from a period instead of a list, one period is kept; where they may follow from another setting,
    `_MAX_LAYERS`. Each layer costs the check a few milliseconds.
    """
    columns = [each for each in values.values() if isinstance(each, list) and len(each) == depth]
    shared, special = values.get("num_kv_shared_layers") or 0, values.get("per_layer_config")
    columns.append([index >= depth - shared for index in range(depth)])
    if isinstance(special, dict):
        own = {int(index): each for index, each in special.items()}
        columns.append([own.get(index) for index in range(depth)])
    if isinstance(values.get("hybrid_layer_ids"), list):
        columns.append([index in values["hybrid_layer_ids"] for index in range(depth)])
    periods = [
        each for name, each in values.items()
        if isinstance(each, int) and name.endswith(("_period", "_interval", "_sparse_step", "_pattern"))
    ]  # fmt: skip
    kinds: dict[str, list[int]] = {}
    for index in range(depth):
        kinds.setdefault(repr([column[index] for column in columns]), []).append(index)
    wanted = [each[0] for each in kinds.values()][: 2 * _MAX_LAYERS]
    if len(wanted) <= _MAX_LAYERS:
        wanted += [each[1] for each in kinds.values() if len(each) > 1][: 2 * _MAX_LAYERS - len(wanted)]
    most = max([_MAX_LAYERS // 2, *(each for each in periods if each <= 2 * _MAX_LAYERS), len(wanted)])
    if any(
        re.search(r"layer|dense|sparse|block", name)
        and name not in _LAYERS
        and ((type(each) is int and each > 1) or (isinstance(each, list | dict) and each and each not in columns))
        for name, each in values.items()
    ):  # layers may differ in what no list says
        most = max(most, min(_MAX_LAYERS, depth))
    others = [index for index in range(depth) if index not in wanted]
    return sorted([*wanted, *others[: most - len(wanted)]])


def _shorten_rotary_lists(values: dict[str, Any]) -> None:
    """Factors for each rotary frequency: as many as the small head has."""
    rope = values.get("rope_parameters")
    if not isinstance(rope, dict):
        return
    size = values.get("qk_rope_head_dim") or values.get("head_dim") or _WIDTH // _HEADS
    count = int(size * rope.get("partial_rotary_factor", 1.0)) // 2
    for name, each in rope.items():
        if isinstance(each, Sequence) and not isinstance(each, str) and name.endswith("_factor"):
            rope[name] = list(each)[:count]


@torch.no_grad()
def draw_weights(network: nn.Module) -> None:
    """Weights so large that rewards spread, attention is not uniform, and each norm and bias has an effect."""
    config = getattr(network, "config", None)
    gain = 1.0 if hasattr(config, "H_cycles") else 1.4  # layers that run many times would amplify rounding
    linear = {id(module.weight) for module in network.modules() if isinstance(module, nn.Linear)}
    for name, parameter in network.named_parameters():
        if not parameter.is_floating_point() or name.endswith(("A_log", "dt_bias", "D")):
            continue  # parameters of a scan have values of their own
        noise = torch.randn(parameter.shape)
        is_table = parameter.ndim == 2 and ("embed" in name or name.endswith(("wte.weight", "wpe.weight")))
        is_table = is_table and id(parameter) not in linear
        if parameter.ndim < 2 or is_table:
            parameter.add_(noise, alpha=0.3) if parameter.ndim < 2 else parameter.copy_(noise)
        else:
            parameter.copy_(noise * gain / parameter[0].numel() ** 0.5)
            if name.endswith("Attention.q.weight"):  # T5 does not divide scores by the root of the head's size
                parameter.mul_(_HEAD_DIM**-0.5)
