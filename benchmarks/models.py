"""How each model type of the installed transformers runs, and how exact it is: writes docs/models.md.

    python -m benchmarks.models [--output docs/models.md] [TYPE ...]

For each type with a sequence classification class a small random model is saved, loaded as training loads it, compared
with one text at a time through plain transformers, exported, and rescored by plain transformers. All in float32.
"""

from __future__ import annotations

import argparse
import logging
import math
import tempfile
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rm_gallery.data.batching.packed_batch import collate
from rm_gallery.data.tokenization.token_group import TokenGroup
from rm_gallery.errors import UserError, one_line
from rm_gallery.modeling.architectures import ARCHITECTURES
from rm_gallery.modeling.model_folder import check_class, quiet_transformers
from rm_gallery.modeling.packing import TOLERANCE, choose_way
from rm_gallery.modeling.reward_model import load_reward_model
from rm_gallery.modeling.twin import VOCABULARY, build_twin

ROOT = Path(__file__).resolve().parents[1]
_NOT_BUILT = {"t5gemma": "encoder-decoder of two configurations", "t5gemma2": "encoder-decoder of two configurations"}
_NO_DEFAULTS: dict[str, dict[str, Any]] = {"deepseek_v2": {"num_experts_per_tok": 2, "topk_group": 1, "n_group": 1}}
"""Settings without which the type's default configuration does not run."""
_HEAD = """# Model types

A model of any type of transformers that has a sequence classification class, or is a decoder with a causal language model, can be
trained if its rewards are exact: those of one text at a time through plain transformers, within 1e-4 in float32. `model.packing=auto` takes the first way that is:

1. packed with own layers: {own} types, tested on their own;
2. packed with transformers' layers: no padding, shared prompts computed once;
3. padded: whole texts, grouped by length.

A check decides for each model when it is loaded, and the log has the way and the reason. It runs a small random model with
the scalar settings of the model's own configuration, and windows shorter than its texts, so two models of one type may run
differently: Gemma 2 has a soft cap and runs padded. If no small model can be built from the configuration, the loaded model
itself is checked on short texts and runs padded. A type that is exact in no way is refused.

Scoring uses the same choice. It also runs other heads as transformers does, padded, if the same check passes on the loaded model.

**Wrappers of text and images.** A folder of Gemma 3, Mistral 3, Qwen3.5, Llama 4, Qwen2-VL or another wrapper (second table) is
accepted: its text model is trained, and the checkpoint is a text classifier of the text model's type. Qwen2-VL's and Qwen2.5-VL's
text models become `qwen2`, Qwen3-VL's `qwen3`: in text, their three position ids are equal.

**Own class.** Where transformers has a causal language model only (Granite, Cohere, OLMoE, ...), its generic classification class is
combined with the type's base class. The checkpoint holds that class as a file: see [consumers.md](consumers.md).

**Refused**, with these messages:

- types that are no language models of text: `architecture 'vit' is not supported: transformers {version} has neither a sequence
  classification class nor a causal language model of text for it`;
- wrappers whose text model has no class, or whose files hold its tensors in another form (Qwen3-VL MoE, Kimi K2.5): `architecture
  'kimi_k25' is not supported: it wraps several models (text_config, vision_config in config.json); save its text model as a
  folder of its own`;
- other heads, in training: `architecture 'bart' is not supported: its head is not score or classifier`;
- rewards that depend on padding: `rewards of mobilebert depend on the padding, and so on the other texts of a batch`.

**Limits.** With a rotary embedding of type `longrope` or `dynamic`, a text above its original length changes the rewards of its
batch, so such texts are refused (`data.max_length`). `estimate` counts a mixture of experts without its experts' matrices.
Not done: the auxiliary loss of routers.

The table is written by `python -m benchmarks.models` with transformers {version}, from the default configuration of each type.
"Difference" is the largest one from one text at a time, relative to rewards above 1, over {texts} texts of up to {longest}
tokens of a small random model; "exported" is that of the exported folder in plain transformers.

{counts}

| type | class | runs | difference | exported |
|---|---|---|---|---|
"""  # noqa: E501


@dataclass(frozen=True)
class Row:
    """One model type."""

    kind: str
    name: str
    way: str
    difference: float = math.nan
    exported: float = math.nan

    def __str__(self) -> str:
        cells = ["" if math.isnan(each) else f"{each:.1e}" for each in (self.difference, self.exported)]
        return f"| {self.kind} | {self.name} | {self.way} | {' | '.join(cells)} |"


def sample_groups() -> list[TokenGroup]:
    """Groups of texts of up to 44 tokens with prefixes of all lengths."""
    draw = np.random.default_rng(1)
    shapes = [(0, (30, 3)), (24, (20, 9, 2)), (9, (17,)), (5, (8, 8))]
    return [
        TokenGroup(
            draw.integers(8, VOCABULARY, prefix).astype(np.int32),
            [draw.integers(8, VOCABULARY, tail).astype(np.int32) for tail in tails],
            (),
        )
        for prefix, tails in shapes
    ]


def texts_of(groups: Sequence[TokenGroup]) -> list[list[int]]:
    """Each response with its prefix."""
    return [[*group.prefix.tolist(), *tail.tolist()] for group in groups for tail in group.tails]


@torch.no_grad()
def measure(kind: str, name: str, folder: Path) -> Row:
    """The row of a type."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    if kind in _NOT_BUILT:
        return Row(kind, name, f"refused: {_NOT_BUILT[kind]}")
    config = AutoConfig.for_model(kind, **_NO_DEFAULTS.get(kind, {}))
    groups = sample_groups()
    try:
        check_class(config, what="")
        way = choose_way(config, "auto", what="")
        if not way.is_checked:
            return Row(kind, name, f"padded, if the loaded model passes the check: {_short(way.reason)}")
        build_twin(config).save_pretrained(folder / "model")
        model = load_reward_model(str(folder / "model")).model.eval()
        plain = AutoModelForSequenceClassification.from_pretrained(folder / "model", dtype=torch.float32).eval()
        wanted = torch.cat([plain(input_ids=torch.tensor([text])).logits[:, 0] for text in texts_of(groups)])
        found = model(collate(groups))
        exported = _export_and_rescore(model, folder / "checkpoint", texts_of(groups))
    except UserError as error:
        return Row(kind, name, f"refused: {_short(str(error).removeprefix(': '))}")
    size = wanted.abs().clamp(min=1)
    how = "packed" if model.way.own_layers else str(model.way).partition(":")[0]
    return Row(kind, name, how, float(((found - wanted).abs() / size).max()),
               float(((exported - wanted).abs() / size).max()))  # fmt: skip


def _export_and_rescore(model: Any, folder: Path, texts: Sequence[Sequence[int]]) -> torch.Tensor:
    """Rewards of the saved network as plain transformers gives them, in one padded batch."""
    from rm_gallery.modeling.export import rescore

    model.network.save_pretrained(folder)
    return torch.tensor(rescore(folder, texts))


def _short(text: str) -> str:
    text = one_line(text).partition("; ")[0].replace("|", "/").replace("'", "`")
    return text if len(text) <= 110 else f"{text[:107]}..."


def main() -> None:
    from transformers import __version__
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as CLASSES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", metavar="TYPE", help="only these, printed and not written")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "models.md")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    rows = []
    for kind in arguments.types or sorted(CLASSES):
        name = CLASSES[kind] if isinstance(CLASSES[kind], str) else CLASSES[kind][0]
        with tempfile.TemporaryDirectory() as folder, quiet_transformers():
            try:
                row = measure(kind, name, Path(folder))
            except Exception as error:
                row = Row(kind, name, f"FAILED: {type(error).__name__}: {_short(str(error))}")
        print(row, flush=True)
        rows.append(row)
    wrong = [row.kind for row in rows if row.difference > TOLERANCE or row.exported > TOLERANCE or "FAILED" in row.way]
    print(f"wrong: {wrong or 'none'}")
    if arguments.types:
        return
    counts = Counter(row.way.partition(":")[0] for row in rows)
    lines = "\n".join(f"- {way}: {count}" for way, count in counts.most_common())
    own = sum(each.is_decoder for each in ARCHITECTURES.values())
    texts = texts_of(sample_groups())
    page = _HEAD.format(
        version=__version__, own=own, counts=f"Of {len(rows)} types:\n\n{lines}", texts=len(texts),
        longest=max(map(len, texts)),
    )  # fmt: skip
    arguments.output.write_text(page + "\n".join(map(str, rows)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
