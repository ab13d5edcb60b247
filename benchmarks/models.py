"""How each model type of the installed transformers runs, and how exact it is: writes docs/models.md.

    python -m benchmarks.models [--output docs/models.md] [TYPE ...]

For each type with a sequence classification class a small random model is saved, loaded as training loads it, compared
with one text at a time through plain transformers, exported, and rescored by plain transformers. All in float32.
"""

from __future__ import annotations

import argparse
import logging
import math
import re
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from benchmarks.model_lines import log_lines
from benchmarks.small_models import ENCODER_WRAPPERS, WRAPPERS, config_of, make_wrapper, text_states
from rm_gallery.data.batching.packed_batch import collate
from rm_gallery.data.tokenization.token_group import TokenGroup
from rm_gallery.errors import UserError, one_line
from rm_gallery.modeling.architectures import ARCHITECTURES, closing_token
from rm_gallery.modeling.export import InputRecord, rescore, write_folder
from rm_gallery.modeling.generic_class import auto_map, is_generic, register
from rm_gallery.modeling.model_folder import check_class, quiet_transformers
from rm_gallery.modeling.packing import TOLERANCE, choose_way
from rm_gallery.modeling.parallel.apply import enable_checkpointing
from rm_gallery.modeling.reward_model import RewardModel, load_reward_model
from rm_gallery.modeling.twin import VOCABULARY, NoTwinError, build_twin

ROOT = Path(__file__).resolve().parents[1]
_NOT_BUILT = {"t5gemma": "encoder-decoder of two configurations", "t5gemma2": "encoder-decoder of two configurations"}
_HEAD = """# Model types

A model of any type of transformers that has a sequence classification class, or is a decoder with a causal language model, can be
trained if its rewards are exact: those of one text at a time through plain transformers, within 1e-4 in float32.
`model.packing=auto` takes the first way that is:

1. packed with own layers: {own} types, tested on their own;
2. packed with transformers' layers: no padding, shared prompts computed once;
3. padded: whole texts, grouped by length.

A check decides for each model when it is loaded, and the log has the way and the reason. It runs a small random model with
the scalar settings of the model's own configuration, and with windows, chunks and soft caps so small that its texts depend on
them, so two models of one type may run differently. Packed attention has windows, chunks, soft caps and attention sinks; the check
fails if one of them is omitted. If no small model can be built from the configuration, the loaded model itself is checked on short
texts and runs padded. A type that is exact in no way is refused.

Scoring uses the same choice. It also runs other heads as transformers does, padded, if the same check passes on the loaded model.

**Encoder-decoders** (BART, T5) read the reward at EOS, so each text has exactly one: rows with another number are dropped and counted,
and a tokenizer that does not write EOS at the end of a text is an error.

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
- rewards that depend on padding: `rewards of mobilebert depend on the padding, and so on the other texts of a batch`.

**Mixtures of experts.** `model.router_aux_loss_coef=0.001` adds the load-balancing loss of the routers (Fedus et al. 2021, equations 4
to 6), as transformers' `load_balancing_loss_func` defines it, for all types that have it: Mixtral, Qwen2 MoE, Qwen3 MoE, Qwen3-Next, Qwen3.5
MoE, OLMoE, GPT-OSS, PhiMoE, Granite MoE, Jamba, MiniMax and others. It is taken over the tokens and layers of the whole optimizer step, and a text
counts once for each comparison that it is in (or rating, with `model.attributes`), so that it depends neither on micro-batches, nor on shared prompts or the number of
processes. A step of more than one micro-batch also runs each of them without gradients first, to count the tokens of
each expert. `train/router_aux_loss` is the loss without its weight; `train/loss` stays the preference loss. Under FSDP2 each rank holds and reads
its own experts.

**Limits.** With a rotary embedding of type `longrope` or `dynamic`, a text above its original length changes the rewards of its
batch, so such texts are refused (`data.max_length`).

## What the log says

The line of the way, or the error, for types of all ways with their default configurations (`model.packing=auto`):

| type | line |
|---|---|
{lines}

## All types

The table is written by `python -m benchmarks.models` with transformers {version}, from the default configuration of each type, over
{texts} texts of up to {longest} tokens of a small random model:

- difference: the largest one from one text at a time through plain transformers, relative to rewards above 1, in training and in
  scoring of the checkpoint; exported: that of the checkpoint in plain transformers;
- gradients: against one text at a time, relative to the largest of a parameter above 1; checkpointing: against no activation
  checkpointing, empty where transformers does not support it;
- bf16: the largest difference of rewards with bfloat16 weights from those in float32, in standard deviations of the rewards, and the
  same for plain transformers; at most 3 times that plus 0.1 passes;
- speed: forward and backward passes per second against the padded way, 16 prompts of 48 tokens with two responses of 16, on
  one CPU core, median of three alternating runs. Small models show the overhead; [speed.md](speed.md) has real ones.

{counts}

| type | class | runs | difference | exported | gradients | checkpointing | bf16 | bf16, plain | speed |
|---|---|---|---|---|---|---|---|---|---|
"""  # noqa: E501
_WRAPPERS_HEAD = """
Wrappers, whose text model is trained; "difference" is that from the text model inside the wrapper:

| type | class | text model | runs | difference |
|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Row:
    """One model type. Differences are relative to rewards above 1; those of gradients to the largest of a parameter."""

    kind: str
    name: str
    way: str
    difference: float = math.nan
    exported: float = math.nan
    gradients: float = math.nan
    checkpointing: float = math.nan
    bf16: float = math.nan
    """The largest difference of rewards with bfloat16 weights, in standard deviations of the rewards."""
    plain_bf16: float = math.nan
    """The same for plain transformers."""
    speed: float = math.nan
    """Forward and backward passes per second against the padded way."""

    @property
    def is_exact(self) -> bool:
        return all(each <= TOLERANCE for each in (self.difference, self.exported, self.gradients))

    @property
    def is_wrong(self) -> bool:
        found = (self.difference, self.exported, self.gradients, self.checkpointing)
        is_measured = self.way.startswith(("packed", "padded"))
        if is_measured and math.isnan(self.difference + self.exported):
            return True
        return any(each > TOLERANCE for each in found) or self.bf16 > 3 * self.plain_bf16 + 0.1 or "FAILED" in self.way

    def __str__(self) -> str:
        exact = (self.difference, self.exported, self.gradients, self.checkpointing)
        cells = ["" if math.isnan(each) else f"{each:.1e}" for each in exact]
        cells += ["" if math.isnan(each) else f"{each:.2f}" for each in (self.bf16, self.plain_bf16, self.speed)]
        return f"| {self.kind} | {self.name} | {self.way} | {' | '.join(cells)} |"


def sample_groups(closing: int | None = None) -> list[TokenGroup]:
    """Groups of texts of up to 44 tokens with prefixes of all lengths. closing: the last token of each text."""
    draw = np.random.default_rng(1)
    groups = []
    for prefix, tails in [(0, (30, 3)), (24, (20, 9, 2)), (9, (17,)), (5, (8, 8))]:
        start = draw.integers(8, VOCABULARY, prefix).astype(np.int32)
        ends = [draw.integers(8, VOCABULARY, tail).astype(np.int32) for tail in tails]
        if closing is not None:
            for each in ends:
                each[-1] = closing
        groups.append(TokenGroup(start, ends, ()))
    return groups


def texts_of(groups: Sequence[TokenGroup]) -> list[list[int]]:
    """Each response with its prefix."""
    return [[*group.prefix.tolist(), *tail.tolist()] for group in groups for tail in group.tails]


def measure(kind: str, name: str, folder: Path, *, more: bool = True) -> Row:
    """The row of a type. more: gradients, checkpointing, bfloat16 and speed too."""
    if kind in _NOT_BUILT:
        return Row(kind, name, f"refused: {_NOT_BUILT[kind]}")
    try:
        config = config_of(kind)
        check_class(config, what="")
        choose_way(config, "auto", what="")
        try:
            network = build_twin(config)
        except NoTwinError as error:
            return Row(kind, name, f"not measured: no small model can be built ({_short(str(error))})")
        name = name or type(network).__name__
        network.save_pretrained(folder / "model")
        model = load_reward_model(str(folder / "model")).model.eval()
        groups = sample_groups(closing_token(model.network.config))
        wanted = _one_by_one(network, groups)
        found = model(collate(groups)).detach()
        exported = torch.tensor(_rescore(model, folder / "checkpoint", texts_of(groups)))
        scored = load_reward_model(str(folder / "checkpoint"), new_head=None).model.eval()
        found = torch.stack([found, scored(collate(groups)).detach()])
    except UserError as error:
        return Row(kind, name, f"refused: {_short(str(error).removeprefix(': '))}")
    how = "packed" if model.way.own_layers else str(model.way).partition(":")[0]
    if is_generic(model.network):
        how += ", own class"
    row = Row(kind, name, how, _difference(found, wanted), _difference(exported, wanted))
    if not more:
        return row
    return replace(
        row, gradients=_gradients(model, network, groups), checkpointing=_checkpointing(model, groups),
        speed=_speed(model, folder / "model"),
        bf16=_bf16(model, lambda each: each(collate(groups)), wanted),
        plain_bf16=_bf16(network, lambda each: _one_by_one(each, groups), wanted),
    )  # fmt: skip


def _difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float(((found - wanted).abs() / wanted.abs().clamp(min=1)).max())


@torch.no_grad()
def _one_by_one(network: Any, groups: Sequence[TokenGroup]) -> torch.Tensor:
    return torch.cat([network(input_ids=torch.tensor([text])).logits[:, 0].float() for text in texts_of(groups)])


def _rescore(model: RewardModel, folder: Path, texts: Sequence[Sequence[int]]) -> list[float]:
    """Rewards of the checkpoint as plain transformers gives them; of an own class by the file in the checkpoint."""
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    with tempfile.TemporaryDirectory() as tokenizer:
        _any_tokenizer().save_pretrained(tokenizer)
        state = model.network.state_dict()
        meta = {name: each.to("meta") for name, each in state.items()}
        write_folder(folder, model, meta, _any_tokenizer(), torch.float32, InputRecord("text"), read=state.__getitem__)
    if is_generic(model.network):
        reference = auto_map(model.network)["AutoModelForSequenceClassification"]
        network = get_class_from_dynamic_module(reference, folder).from_pretrained(folder, dtype=torch.float32).eval()
        rows = [torch.tensor(text) for text in texts]
        ids = pad_sequence(rows, batch_first=True, padding_value=network.config.pad_token_id)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        with torch.no_grad():
            return network(input_ids=ids, attention_mask=mask).logits[:, 0].tolist()
    return rescore(folder, texts)


def _any_tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 9, "[PAD]": 0}, [])), pad_token="[PAD]")


def _backward(model: Any, rewards: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    (rewards * torch.arange(1.0, len(rewards) + 1)).sum().backward()
    found = {
        name.removeprefix("network."): each.grad.clone()
        for name, each in model.named_parameters() if each.grad is not None
    }  # fmt: skip
    model.zero_grad(set_to_none=True)
    return found


def _largest(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """The largest difference of gradients, relative to the largest of each parameter where that is above 1."""
    both = [(found.get(name, torch.zeros_like(each)), each) for name, each in wanted.items()]
    return max(float((one - other).abs().max() / other.abs().max().clamp(min=1)) for one, other in both)


def _gradients(model: RewardModel, network: Any, groups: Sequence[TokenGroup]) -> float:
    """In the packed or padded batch against one text at a time."""
    rewards = torch.cat([network(input_ids=torch.tensor([text])).logits[:, 0] for text in texts_of(groups)])
    return _largest(_backward(model, model(collate(groups))), _backward(network, rewards))


def _checkpointing(model: RewardModel, groups: Sequence[TokenGroup]) -> float:
    """Gradients with activation checkpointing against those without, in training mode without dropout."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.train()
    try:
        torch.manual_seed(0)  # routers of PhiMoE draw random numbers in training
        wanted = _backward(model, model(collate(groups)))
        torch.manual_seed(0)
        enable_checkpointing(model, "full")
        return _largest(_backward(model, model(collate(groups))), wanted)
    except UserError:  # transformers does not support it, as the error says
        return math.nan
    finally:
        getattr(model.network, "gradient_checkpointing_disable", lambda: None)()
        model.eval()


@torch.no_grad()
def _bf16(model: Any, rewards: Callable[[Any], torch.Tensor], wanted: torch.Tensor) -> float:
    """The largest difference with bfloat16 weights, in standard deviations of the rewards. Restores the weights."""
    state = {name: each.clone() for name, each in model.state_dict().items()}
    model.to(torch.bfloat16)
    if isinstance(model, RewardModel):
        model.head.float()
    try:
        return float((rewards(model).float() - wanted).abs().max() / wanted.std())
    except RuntimeError:  # of layers that mix dtypes
        return math.nan
    finally:
        model.float()
        model.load_state_dict(state)


def _speed(model: RewardModel, folder: Path) -> float:
    """Forward and backward passes per second against padded ones on the same weights: the median of three, alternating.

    16 prompts of 48 tokens with two responses of 16.
    """
    if model.padded:
        return math.nan
    draw = np.random.default_rng(2)
    ids = [draw.integers(8, VOCABULARY, length).astype(np.int32) for length in (48, 16, 16) * 16]
    batch = collate([TokenGroup(ids[at], ids[at + 1 : at + 3], ()) for at in range(0, len(ids), 3)])
    padded = load_reward_model(str(folder), packing="padded").model.eval()
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(3):
        for is_packed in (True, False):
            started = time.perf_counter()
            rewards = (model if is_packed else padded)(batch)
            rewards.sum().backward()
            seconds[is_packed].append(time.perf_counter() - started)
    model.zero_grad(set_to_none=True)
    return sorted(slow / fast for fast, slow in zip(seconds[True], seconds[False], strict=True))[1]


def _short(text: str) -> str:
    text = re.sub(r"model\.partial_pretrain=\S+: ", "", one_line(text)).partition("; ")[0]
    text = text.replace("|", "/").replace("'", "`")
    return text if len(text) <= 110 else f"{text[:107]}..."


def measure_wrapper(kind: str, folder: Path) -> str:
    """The row of a wrapper of text and images: its text model in our folder against that in the wrapper itself."""
    wrapper = make_wrapper(kind)
    wrapper.save_pretrained(folder)
    model = load_reward_model(str(folder)).model.eval()
    groups = sample_groups()
    with torch.no_grad():
        if kind in ENCODER_WRAPPERS:  # their own head is another one
            wanted = torch.stack([text_states(wrapper, text) for text in texts_of(groups)])
            found = torch.stack([text_states(model.network, text) for text in texts_of(groups)])
        else:
            torch.nn.init.normal_(model.network.score.weight, std=0.3)
            wanted = torch.cat([model.network.score(text_states(wrapper, text)) for text in texts_of(groups)])
            found = model(collate(groups))
        difference = _difference(found, wanted)
    name = type(wrapper).__name__
    way = str(model.way).partition(":")[0]
    return f"| {kind} | {name} | {model.network.config.model_type} | {way} | {difference:.1e} |"


def text_types() -> dict[str, str]:
    """Types with a sequence classification class, or with a causal language model of text, by name of the class."""
    from transformers.models.auto import modeling_auto as auto

    classes = {kind: name if isinstance(name, str) else name[0]
               for kind, name in auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.items()}  # fmt: skip
    for kind in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() - classes.keys():
        try:
            config = config_of(kind)
        except Exception:
            continue  # no configuration of its own
        if register(config):
            classes[kind] = ""
    return {kind: classes[kind] for kind in sorted(classes) if kind not in WRAPPERS}


def main() -> None:
    from transformers import __version__

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", metavar="TYPE", help="only these, printed and not written")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "models.md")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    classes, rows, wrappers = text_types(), [], []
    for kind in arguments.types or classes:
        with tempfile.TemporaryDirectory() as folder, quiet_transformers():
            try:
                row = measure(kind, classes.get(kind, ""), Path(folder))
            except Exception as error:
                row = Row(kind, "", f"FAILED: {type(error).__name__}: {_short(str(error))}")
        print(row, flush=True)
        rows.append(row)
    for kind in () if arguments.types else WRAPPERS:
        with tempfile.TemporaryDirectory() as folder, quiet_transformers():
            try:
                wrappers.append(measure_wrapper(kind, Path(folder)))
            except Exception as error:
                wrappers.append(f"| {kind} |  |  | FAILED: {_short(str(error))} |  |")
        print(wrappers[-1], flush=True)
    print(f"wrong: {[row.kind for row in rows if row.is_wrong] or 'none'}")
    if arguments.types:
        return
    counts = Counter(row.way.partition(":")[0] for row in rows)
    lines = "\n".join(f"- {way}: {count}" for way, count in counts.most_common())
    texts, exact = texts_of(sample_groups()), sum(row.is_exact for row in rows)
    page = _HEAD.format(
        version=__version__, own=sum(each.is_decoder for each in ARCHITECTURES.values()),
        counts=f"Of {len(rows)} types, **{exact} are exact**:\n\n{lines}",
        lines="\n".join(log_lines()), texts=len(texts), longest=max(map(len, texts)),
    )  # fmt: skip
    tables = "\n".join(map(str, rows)) + "\n" + _WRAPPERS_HEAD + "\n".join(wrappers) + "\n"
    arguments.output.write_text(page + tables, encoding="utf-8")


if __name__ == "__main__":
    main()
