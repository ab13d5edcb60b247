"""What benchmarks/throughput.py trains on: pairs as chats, and a random Qwen2 model with a tokenizer of those texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SETS = ("hh_harmless_test", "ultrafeedback_1k_train", "gsm8k_solutions", "ethics_util_train")
MAX_LENGTH = 1024  # tokens; longer pairs are left out for all systems


def write_inputs(folder: Path, data: Path | None, name: str, num_pairs: int, size: str) -> int:
    """Write pairs.parquet and model/, a sequence classifier with its head; returns how many pairs there are.

    They are the first of the file that are no longer than `MAX_LENGTH` tokens, so that no system leaves any out.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForSequenceClassification

    from benchmarks.hh import SIZES, write_model

    columns = ["prompt", "chosen", "rejected"]
    if data:
        table = pq.read_table(data / f"{name}.parquet", columns=columns)
    else:
        from benchmarks.trl_curve import make_rows

        table = pa.Table.from_pylist(make_rows(2 * num_pairs))
    write_model(folder / "model", table, size)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    rows: list[dict[str, Any]] = []
    for row in table.to_pylist():
        chats = [[*row["prompt"], {"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")]
        if all(len(tokenizer.apply_chat_template(chat, return_dict=False)) <= MAX_LENGTH for chat in chats):
            rows.append(row)
        if len(rows) == num_pairs:
            break
    pq.write_table(pa.Table.from_pylist(rows), folder / "pairs.parquet")
    vocab_size, hidden, intermediate, layers, heads, kv_heads = SIZES[size]
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocab_size, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=8192, num_labels=1,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    Qwen2ForSequenceClassification(config).save_pretrained(folder / "model")
    return len(rows)
