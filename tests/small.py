"""Small models, a byte tokenizer and preference data, made on the spot."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DECODERS = ("qwen2", "qwen3", "llama", "mistral", "gemma3_text")
ENCODERS = ("bert", "roberta", "deberta-v2", "modernbert")


def fast_first(values: Sequence[Any], count: int = 1) -> list[Any]:
    """Values of `parametrize`: `make test` runs the first ones, `make test-all` the others."""
    import pytest  # benchmarks make small models without it

    return [*values[:count], *(pytest.param(value, marks=pytest.mark.slow) for value in values[count:])]


def make_tokenizer(*, encoder: bool = False) -> Any:
    """Byte tokenizer: ChatML for decoders; `[CLS] ... [SEP]` around texts for encoders. Pad differs from EOS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<|pad|>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {token: index for index, token in enumerate(special + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    if encoder:
        backend.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
        )
        return PreTrainedTokenizerFast(
            tokenizer_object=backend, pad_token="<|pad|>", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]"
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|pad|>")
    tokenizer.chat_template = CHATML
    return tokenizer


def make_model(kind: str, folder: Path, *, seed: int = 0, layers: int = 2, **extra: Any) -> Path:
    """A random model of this architecture with its tokenizer, as a causal LM (decoders) or bare encoder."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    torch.manual_seed(seed)
    tokenizer = make_tokenizer(encoder=kind in ENCODERS)
    size: dict[str, Any] = {
        "vocab_size": 264,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "pad_token_id": tokenizer.pad_token_id,
        "initializer_range": 0.2,
    }
    if kind in DECODERS:
        size.update(num_key_value_heads=2, head_dim=8, bos_token_id=None, eos_token_id=tokenizer.eos_token_id)
    if kind == "gemma3_text":
        size.update(sliding_window=8, layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=8)
    if kind == "mistral":
        size.update(sliding_window=8)
    if kind == "modernbert":
        size.update(cls_token_id=4, sep_token_id=5, bos_token_id=4, eos_token_id=5, local_attention=16)
    if kind == "deberta-v2":
        size.update(relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=16, pooler_hidden_size=32)
    config = AutoConfig.for_model(kind, **{**size, **extra})
    model = (AutoModelForCausalLM if kind in DECODERS else AutoModel).from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_pairs(path: Path, rows: Sequence[dict[str, Any]], **options: Any) -> Path:
    """Rows as a parquet file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), path, **options)
    return path


def text_pairs(count: int, *, seed: int = 0) -> list[dict[str, str]]:
    """Pairs of plain strings of mixed lengths; the chosen one talks of good things."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        shared = f"Question {number}. " + "so " * draw.randrange(6)
        better = "good " * draw.randint(1, 8)
        rows.append({"chosen": shared + better + "end", "rejected": shared + better.replace("good", "bad") + "end"})
    return rows


def chat_pairs(count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """The same as chats: a prompt of messages and string responses."""
    return [
        {
            "prompt": [{"role": "user", "content": row["chosen"].partition(".")[0]}],
            "chosen": row["chosen"].partition(".")[2],
            "rejected": row["rejected"].partition(".")[2],
        }
        for row in text_pairs(count, seed=seed)
    ]


def random_groups(seed: int, *, vocab: int = 264, most: int = 40) -> list[Any]:
    """TokenGroups of all shapes: empty prefixes, single tokens, one to five responses."""
    import numpy as np

    from rm_gallery.data.tokenization.token_group import TokenGroup
    from rm_gallery.schema import Comparison

    draw = np.random.default_rng(seed)
    groups = []
    for prefix, count in ((0, 2), (most, 2), (1, 1), (7, 5), (0, 1), (most // 2, 3), (3, 2)):
        tails = [draw.integers(7, vocab, draw.integers(1, most)).astype(np.int32) for _ in range(count)]
        comparisons = [Comparison(a, b) for a in range(count) for b in range(a + 1, count)]
        groups.append(TokenGroup(draw.integers(7, vocab, prefix).astype(np.int32), tails, comparisons))
    return groups


def same_prompt_groups(seed: int, *, vocab: int = 264) -> list[list[Any]]:
    """TokenGroups by prompt: rankings of up to 16 and pairs, with responses in common, equal, or beginning alike."""
    import numpy as np

    from rm_gallery.data.tokenization.token_group import TokenGroup, split_prefix
    from rm_gallery.schema import Comparison

    draw = np.random.default_rng(seed)
    by_prompt = []
    for size, ranked in ((0, 3), (12, 16), (25, 1 + seed % 16), (1, 2), (40, 5)):
        prompt = draw.integers(7, vocab, size)
        pool = [np.concatenate([prompt, draw.integers(7, vocab, draw.integers(1, 12))]) for _ in range(8)]
        pool.append(np.concatenate([pool[0], [8, 9]]))  # begins with another response
        groups: list[TokenGroup] = []
        for _ in range(5):
            better, worse = draw.choice(len(pool), 2, replace=False)
            groups.append(split_prefix([pool[better], pool[worse]], [Comparison(0, 1, float(draw.random()))]))
        answers = [pool[draw.integers(len(pool))] for _ in range(ranked)]  # some of them equal
        pairs = [(a, b) for a in range(ranked) for b in range(a) if not np.array_equal(answers[a], answers[b])]
        groups.append(split_prefix(answers, [Comparison(a, b) for a, b in pairs]))
        by_prompt.append(groups)
    return by_prompt


def whole_texts(groups: Sequence[Any]) -> list[list[int]]:
    """Every response with its prefix in front, in the order of a packed batch."""
    return [[*group.prefix.tolist(), *tail.tolist()] for group in groups for tail in group.tails]


def export_model(folder: Path, model: Any, tokenizer: Any, record: Any, *, dtype: torch.dtype = torch.float32) -> Path:
    """Write a checkpoint folder as a save does, but without the training state."""
    from rm_gallery.modeling.export import write_folder
    from rm_gallery.training.checkpoint.folders import hidden, publish

    state = model.network.state_dict()
    meta = {name: value.to("meta") for name, value in state.items()}
    staging = hidden(folder, "saving")
    publish(staging, folder, write_folder(staging, model, meta, tokenizer, dtype, record, read=state.__getitem__))
    return folder
