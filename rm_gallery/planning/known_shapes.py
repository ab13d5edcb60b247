"""Published shapes, so that a plan needs no download: the values of each repository's config.json on the hub."""

from __future__ import annotations

from typing import Any

# Hub repository, model type, and the values that _NAMES names.
_ROWS: tuple[tuple[str, str, int, int, int, int, int, int, int, int], ...] = (
    ("Qwen/Qwen2.5-0.5B", "qwen2", 24, 896, 4864, 14, 2, 64, 151936, 32768),
    ("Qwen/Qwen2.5-1.5B", "qwen2", 28, 1536, 8960, 12, 2, 128, 151936, 131072),
    ("Qwen/Qwen2.5-3B", "qwen2", 36, 2048, 11008, 16, 2, 128, 151936, 32768),
    ("Qwen/Qwen2.5-7B", "qwen2", 28, 3584, 18944, 28, 4, 128, 152064, 131072),
    ("Qwen/Qwen2.5-14B", "qwen2", 48, 5120, 13824, 40, 8, 128, 152064, 131072),
    ("Qwen/Qwen2.5-32B", "qwen2", 64, 5120, 27648, 40, 8, 128, 152064, 131072),
    ("Qwen/Qwen2.5-72B", "qwen2", 80, 8192, 29568, 64, 8, 128, 152064, 131072),
    ("Qwen/Qwen3-0.6B", "qwen3", 28, 1024, 3072, 16, 8, 128, 151936, 40960),
    ("Qwen/Qwen3-1.7B", "qwen3", 28, 2048, 6144, 16, 8, 128, 151936, 40960),
    ("Qwen/Qwen3-4B", "qwen3", 36, 2560, 9728, 32, 8, 128, 151936, 40960),
    ("Qwen/Qwen3-8B", "qwen3", 36, 4096, 12288, 32, 8, 128, 151936, 40960),
    ("Qwen/Qwen3-14B", "qwen3", 40, 5120, 17408, 40, 8, 128, 151936, 40960),
    ("Qwen/Qwen3-32B", "qwen3", 64, 5120, 25600, 64, 8, 128, 151936, 40960),
    ("meta-llama/Llama-3.2-1B", "llama", 16, 2048, 8192, 32, 8, 64, 128256, 131072),
    ("meta-llama/Llama-3.2-3B", "llama", 28, 3072, 8192, 24, 8, 128, 128256, 131072),
    ("meta-llama/Llama-3.1-8B", "llama", 32, 4096, 14336, 32, 8, 128, 128256, 131072),
    ("meta-llama/Llama-3.1-70B", "llama", 80, 8192, 28672, 64, 8, 128, 128256, 131072),
    ("mistralai/Mistral-7B-v0.3", "mistral", 32, 4096, 14336, 32, 8, 128, 32768, 32768),
    ("google-bert/bert-base-uncased", "bert", 12, 768, 3072, 12, 12, 64, 30522, 512),
    ("google-bert/bert-large-uncased", "bert", 24, 1024, 4096, 16, 16, 64, 30522, 512),
    ("FacebookAI/roberta-base", "roberta", 12, 768, 3072, 12, 12, 64, 50265, 514),
    ("FacebookAI/roberta-large", "roberta", 24, 1024, 4096, 16, 16, 64, 50265, 514),
    ("microsoft/deberta-v3-base", "deberta-v2", 12, 768, 3072, 12, 12, 64, 128100, 512),
    ("microsoft/deberta-v3-large", "deberta-v2", 24, 1024, 4096, 16, 16, 64, 128100, 512),
    ("answerdotai/ModernBERT-base", "modernbert", 22, 768, 1152, 12, 12, 64, 50368, 8192),
    ("answerdotai/ModernBERT-large", "modernbert", 28, 1024, 2624, 16, 16, 64, 50368, 8192),
)  # fmt: skip
_NAMES = (
    "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "max_position_embeddings",
)  # fmt: skip
_MORE: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "roberta": {"type_vocab_size": 1},
    "deberta-v2": {
        "relative_attention": True, "position_buckets": 256, "pos_att_type": ["p2c", "c2p"], "share_att_key": True,
        "norm_rel_ebd": "layer_norm", "position_biased_input": False, "type_vocab_size": 0,
        "max_relative_positions": -1,
    },
}  # fmt: skip
_TAILS = ("-instruct", "-chat", "-base", "-uncased", "-cased")


def short_name(repository: str) -> str:
    """`Qwen/Qwen2.5-7B-Instruct` as `qwen2.5-7b`: what a shape is called here."""
    name = repository.lower().rpartition("/")[2]
    for tail in _TAILS:
        # Some shapes are called "base" themselves: bert-base-uncased.
        if name.endswith(tail) and not (tail == "-base" and name.startswith(("bert", "roberta", "deberta", "modern"))):
            name = name.removesuffix(tail)
    return name


KNOWN = {short_name(row[0]): row for row in _ROWS}


def known_config(model: str) -> tuple[str, Any] | None:
    """(hub repository, transformers' configuration) of a shape called by its short or hub name; None for any other."""
    row = KNOWN.get(short_name(model))
    owner = model.rpartition("/")[0]
    if row is None or owner not in ("", row[0].partition("/")[0]):
        return None
    from transformers import AutoConfig

    repository, model_type = row[0], row[1]
    values: dict[str, Any] = dict(zip(_NAMES, row[2:], strict=True))
    if model_type in ("bert", "roberta", "deberta-v2", "modernbert"):
        del values["num_key_value_heads"], values["head_dim"]
    return repository, AutoConfig.for_model(model_type, **values, **_MORE.get(model_type, {}))
