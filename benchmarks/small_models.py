"""Small model folders of any type: causal language models, classifiers, and wrappers of text and other models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rm_gallery.modeling.generic_class import register
from rm_gallery.modeling.twin import draw_weights, shrink

VOCABULARY = 264
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
NO_DEFAULTS: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "deepseek_v2": {"num_experts_per_tok": 2, "topk_group": 1, "n_group": 1},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "lfm2": {"layer_types": ["conv", "conv", "full_attention"] * 4, "num_hidden_layers": 12},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention"] * 4, "num_hidden_layers": 12},
    "t5": {"decoder_start_token_id": 0},
    "xmod": {"default_language": "en_XX"},
}
"""Settings without which the type's default configuration does not run, or lacks a kind of layer."""
WRAPPERS = (
    "gemma3", "gemma4", "mistral3", "llama4", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "qwen3_5_moe", "llava",
    "internvl", "aya_vision", "exaone4_5", "idefics3", "smolvlm", "lfm2_vl", "hyperclovax_vision_v2", "modernvbert",
    "ultravbert",
)  # fmt: skip
ENCODER_WRAPPERS = ("modernvbert", "ultravbert")
_OTHER_SIZES = {
    "hidden_size": 32, "embed_dim": 32, "depth": 2, "num_hidden_layers": 2, "out_hidden_size": 64, "image_size": 32,
    "patch_size": 8, "num_attention_heads": 4, "num_key_value_heads": 4, "num_heads": 4, "intermediate_size": 64,
    "head_dim": 8, "vision_output_dim": 64, "projector_input_dim": 64, "projector_output_dim": 64,
    "num_position_embeddings": 64, "position_embedding_size": 64,
}  # fmt: skip


def config_of(kind: str, **values: Any) -> Any:
    """The default configuration of a type, with settings that it cannot do without."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(kind, **{**NO_DEFAULTS.get(kind, {}), **values})
    register(config)
    return config


def save_language_model(kind: str, folder: Path, **values: Any) -> Path:
    """A small causal language model of this type, without a tokenizer."""
    from transformers import AutoModelForCausalLM

    config = _set_vocabulary(shrink(config_of(kind, **values)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        draw_weights(network)
    network.save_pretrained(folder)
    return folder


def _set_vocabulary(config: Any) -> Any:
    for name in ("vocab_size", "vocab_size_per_layer_input"):
        if hasattr(config, name):
            setattr(config, name, VOCABULARY)
    config.pad_token_id, config.eos_token_id = 0, 2  # of the byte tokenizer in tests/small.py
    return config


def make_wrapper(kind: str, *, classifier: bool = False) -> Any:
    """A small wrapper of text and images, as a language model or with its own head, in evaluation mode."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    config = config_of(kind)
    values = config.to_dict()
    values["text_config"] = _set_vocabulary(shrink(config.text_config)).to_dict()
    if "mrope_section" in str(config.text_config) or kind in ("qwen2_vl", "qwen2_5_vl"):
        values["text_config"]["rope_parameters"] = {**_ROPE, "mrope_section": [2, 3, 3]}
    for name in ("vision_config", "audio_config"):
        if isinstance(values.get(name), dict):
            values[name] = _shrink_other(values[name])
    for name, each in values.items():
        if name.endswith(("_token_id", "_token_index")) and isinstance(each, int):
            values[name] = 3
    classifier = classifier or kind in ENCODER_WRAPPERS
    names = auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES if classifier else (
        {**auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, **auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
    )  # fmt: skip
    small = type(config).from_dict(values)
    if classifier:
        small.num_labels = 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = getattr(transformers, names[kind])._from_config(small, dtype=torch.float32)
        draw_weights(network)
    return network.eval()


def _shrink_other(values: dict[str, Any]) -> dict[str, Any]:
    small = {
        name: min(each, _OTHER_SIZES[name]) if name in _OTHER_SIZES and isinstance(each, int) else each
        for name, each in values.items()
    }
    if "deepstack_visual_indexes" in small:
        small["deepstack_visual_indexes"] = [0]
    if small.get("layer_types"):
        small["layer_types"] = small["layer_types"][: small["num_hidden_layers"]]
    return small


def text_states(wrapper: Any, text: list[int]) -> torch.Tensor:
    """The hidden state [D] of the last token of a text by the wrapper itself."""
    backbone = wrapper.model if hasattr(wrapper, "model") else wrapper.language_model.model
    ids = torch.tensor([text])
    states: torch.Tensor = backbone(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    return states[0, -1]
