"""What a worker process of the tests runs; apart from them, since it loads no torch."""

from __future__ import annotations

from typing import Any

from rm_gallery.data.custom import CustomReader, source_fingerprint
from rm_gallery.data.formats import FormatConfig
from rm_gallery.data.sources import Row

ROW = Row({"query": "Why?", "chosen": "So.", "rejected": "No."}, "a.parquet", 0)


def in_worker(config: FormatConfig, tokenizer: Any) -> tuple[list[str], str]:
    """What a worker makes of the row: the texts, and the fingerprint it finds."""
    reader = CustomReader.from_config(config, tokenizer)
    group = reader.read(ROW)
    texts = [reader.render(group.prompt, response) for response in group.responses]  # type: ignore[arg-type]
    return texts, source_fingerprint(config.custom_cls)
