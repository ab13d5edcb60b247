"""Model types whose layers are known, in one table: what differs between them, for the model call and the estimate.

Other types run as `packing.py` finds out.

Loads no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Architecture:
    """One model type of transformers (`config.model_type`)."""

    is_decoder: bool
    """Causal: texts are packed and share prompts. Encoders run padded."""
    gated_mlp: bool = False
    """The MLP multiplies two projections (SwiGLU, GeGLU)."""
    head_norms: bool = False
    """Queries and keys of each head are normalized."""
    four_norms: bool = False
    """Norms before and after both attention and MLP, not only before."""
    float32_norms: bool = False
    """RMS norms compute in float32, scale by 1 + weight, and round last."""
    window_in_config: bool = False
    """One sliding window for all layers, in the configuration instead of the attention module."""
    relative_attention: bool = False
    """Attention scores have terms for relative positions (disentangled attention)."""


ARCHITECTURES = {
    "qwen2": Architecture(is_decoder=True, gated_mlp=True),
    "qwen3": Architecture(is_decoder=True, gated_mlp=True, head_norms=True),
    "llama": Architecture(is_decoder=True, gated_mlp=True),
    "mistral": Architecture(is_decoder=True, gated_mlp=True, window_in_config=True),
    "gemma3_text": Architecture(is_decoder=True, gated_mlp=True, head_norms=True, four_norms=True, float32_norms=True),
    "bert": Architecture(is_decoder=False),
    "roberta": Architecture(is_decoder=False),
    "deberta-v2": Architecture(is_decoder=False, relative_attention=True),
    "modernbert": Architecture(is_decoder=False, gated_mlp=True),
}
_OTHER = Architecture(is_decoder=False)
_AFTER_PADDING = frozenset({
    "camembert", "data2vec-text", "esm", "ibert", "layoutlmv3", "lilt", "longformer", "luke", "markuplm", "roberta",
    "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod",
})  # fmt: skip
NOT_TRAINED = {"reformer": "transformers trains it on texts of one length alone"}
"""Types that are scored only, and why."""
DECODERS = tuple(name for name, each in ARCHITECTURES.items() if each.is_decoder)
ENCODERS = tuple(name for name, each in ARCHITECTURES.items() if not each.is_decoder)


def architecture(model_type: str) -> Architecture:
    """The entry of a model type; one without special features for types that are not in the table."""
    return ARCHITECTURES.get(model_type, _OTHER)


def closing_token(config: Any) -> int | None:
    """The token at which the reward is read, so that each text has exactly one: EOS in encoder-decoders (BART, T5)."""
    return config.eos_token_id if getattr(config, "is_encoder_decoder", False) else None


def common_setting(config: Any, name: str, default: Any = None) -> Any:
    """A setting of a configuration; `default` if it has none, or if its layers have values of their own (Gemma 4)."""
    try:
        return getattr(config, name, default)
    except RuntimeError:  # of transformers
        return default


def positions_after_padding(model_type: str, pad_token_id: int) -> int:
    """Rows of the position table that no token has: position ids of some types start after the padding id."""
    if model_type == "mpnet":
        return 2  # for any padding id
    return pad_token_id + 1 if model_type in _AFTER_PADDING else 0
