"""The report on conversations (`objective.name=sft`): what is read, which tokens are predicted, what is dropped.

The rows become tokens as in training, through the token cache, which the run then finds filled.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

import numpy as np

from rm_gallery.data.batching.bin_packing import Packer
from rm_gallery.data.config import DataConfig, Side, mixture_of
from rm_gallery.data.sources import DataFile, entries_of
from rm_gallery.data.token_cache.arrays import TokenData
from rm_gallery.data.token_cache.prepare import prepare
from rm_gallery.data.token_cache.store import Store
from rm_gallery.errors import UserError
from rm_gallery.inspection.findings import MAX_EXAMPLES, Finding, dropped_findings
from rm_gallery.inspection.lengths import CostReport, Distribution, cost_report, distribution
from rm_gallery.inspection.page import (
    Block,
    Chart,
    Figure,
    Figures,
    Page,
    Samples,
    Section,
    cost_blocks,
    dropped_figures,
    finding_figures,
    percentiles,
)
from rm_gallery.inspection.report import LEVELS, Level, Message, Sample, Segment, make_segment, of_dropped, percent
from rm_gallery.inspection.texts import TokenEncoder

# N conversations

_FEW_TARGETS = 0.05
"""Share of predicted tokens below which the summary has a warning."""


@dataclass(frozen=True)
class ConversationSplit:
    """Training or validation data."""

    name: str
    files: tuple[str, ...]
    num_rows: int
    """Rows read, dropped ones included."""
    num_conversations: int
    num_beginnings: int
    """Distinct turns before the first answer."""
    num_answers: int
    num_tokens: int
    num_targets: int
    """Tokens that the model is trained to predict."""
    num_at_limit: int
    """Conversations of `max_length` tokens where longer ones are truncated; 0 where they are dropped."""
    max_length: int
    style: str
    dropped: tuple[Finding, ...]
    repeated: Finding
    lengths: tuple[Distribution, ...]
    cost: CostReport
    samples: tuple[Sample, ...]


@dataclass(frozen=True)
class ConversationReport:
    """All figures, and a summary of the most important ones."""

    tokenizer: str
    splits: tuple[ConversationSplit, ...]
    leakage: tuple[Finding, ...]
    summary: tuple[Message, ...]


def inspect_conversations(
    sides: Sequence[tuple[Side, list[DataFile]]], config: DataConfig, tokenizer: Any, packer: Packer, *,
    model: str, num_samples: int, seed: int,
) -> ConversationReport:  # fmt: skip
    """Read the sides, training data first. Raises UserError for a side without a usable row.

    Bad rows are dropped and counted whatever `data.bad_rows` is.
    """
    config = replace(config, bad_rows="drop")
    encoder = TokenEncoder(tokenizer, config)
    splits, data, hashes = [], [], []
    for name, (side, files) in zip(("training", "validation"), sides, strict=False):
        entries = entries_of(config, side.key)
        store = prepare(files, entries, config, tokenizer, key=side.key, share=side.share)
        if not len(store.data):
            raise UserError(
                f"{side.key}: none of {store.facts.num_rows} rows can be used: {store.dropped.describe()}; "
                f"{store.dropped.remedy}"
            )
        data.append(store.data)
        hashes.append(_hashes(store.data))
        repeated = _repeated(store.data, hashes[-1])
        splits.append(_split_report(name, files, store, repeated, config, encoder, packer, num_samples, seed))
    leakage = tuple(_leakage(data[0], data[1], hashes[0], hashes[1])) if len(data) > 1 else ()
    summary = [message for split in splits for message in _of_split(split)]
    for each in (each for each in leakage if each.count):
        level: Level = "error" if each.key == "shared" or each.share > 0.01 else "warning"
        what = f"Leakage, {each.title}: {each.count:,} validation conversations ({percent(each.share)})"
        summary.append(Message(level, f"{what}; first: {each.examples[0]}."))
    if not any(each.level == "error" for each in summary):
        summary.append(Message("ok", "No errors found."))
    summary.sort(key=lambda each: LEVELS.index(each.level))
    return ConversationReport(model, tuple(splits), leakage, tuple(summary))


def _split_report(
    name: str, files: list[DataFile], store: Store, repeated: Finding, config: DataConfig, encoder: TokenEncoder,
    packer: Packer, num_samples: int, seed: int,
) -> ConversationSplit:  # fmt: skip
    data, counts = store.data, store.data.target_counts
    assert counts is not None, "conversations have targets"
    answers = np.concatenate([[span.last - span.first for span in data[index].spans] for index in range(len(data))])
    lengths = data.sizes.tokens
    sampled = random.Random(seed + 1).sample(range(len(data)), min(num_samples, len(data)))
    return ConversationSplit(
        name=name,
        files=tuple(file.name for file in files),
        num_rows=len(data) + store.dropped.total,
        num_conversations=len(data),
        num_beginnings=len(np.unique(data.prompt_hashes)),
        num_answers=len(answers),
        num_tokens=data.num_tokens,
        num_targets=int(counts.sum()),
        num_at_limit=0 if config.filter_overlong_prompts else int((lengths >= config.max_length).sum()),
        max_length=config.max_length,
        style=data.style,
        dropped=tuple(dropped_findings(store.dropped, len(data), {})),
        repeated=repeated,
        lengths=(
            distribution("conversation", "conversation", lengths),
            distribution("predicted", "predicted tokens of a conversation", counts),
            distribution("answer", "predicted tokens of an answer", answers),
        ),
        cost=cost_report(
            data, config, packer, unit="tokens", max_length=config.max_length, seed=seed,
            mixture=mixture_of(data, files, config) if name == "training" else None,
        ),
        samples=tuple(_sample(data, index, encoder) for index in sorted(sampled)),
    )  # fmt: skip


def _hashes(data: TokenData) -> list[bytes]:
    """Of the tokens of each conversation."""
    return [
        blake2b(b"".join(part.tobytes() for part in (group.prefix, *group.tails)), digest_size=16).digest()
        for group in (data[index] for index in range(len(data)))
    ]


def _repeated(data: TokenData, hashes: Sequence[bytes]) -> Finding:
    first: dict[bytes, int] = {}
    found = []
    for index, each in enumerate(hashes):
        if first.setdefault(each, index) != index:
            found.append((first[each], index))
    examples = tuple(f"{data.where(one)} = {data.where(other)}" for one, other in found[:MAX_EXAMPLES])
    why = "every copy counts again"
    return Finding("repeated", "exact duplicates", len(found), len(data), why, examples, "conversation")


def _leakage(
    train: TokenData, val: TokenData, train_hashes: Sequence[bytes], val_hashes: Sequence[bytes]
) -> Iterator[Finding]:
    known = set(train_hashes)
    whole = [index for index, each in enumerate(val_hashes) if each in known]
    begins = np.flatnonzero(np.isin(val.prompt_hashes, train.prompt_hashes)).tolist()
    for key, title, found in (
        ("shared", "conversations that are in the training data", whole),
        ("shared_beginnings", "conversations that begin as one of the training data, up to the first answer", begins),
    ):
        examples = tuple(val.where(index) for index in found[:MAX_EXAMPLES])
        yield Finding(key, title, len(found), len(val), "val/loss measures memory", examples, "conversation")


def _sample(data: TokenData, index: int, encoder: TokenEncoder) -> Sample:
    """The conversation in segments, which are read only and predicted by turns."""
    group = data[index]
    (ids,) = ([*group.prefix.tolist(), *tail.tolist()] for tail in group.tails)
    segments: list[Segment] = []
    end = 0
    for first, last, label in (
        *((span.first, span.last, "predicted") for span in group.spans),
        (len(ids), len(ids), ""),
    ):
        if first > end or not segments:
            segments.append(make_segment("read", ids[end:first], encoder.pieces))
        if last > first:
            segments.append(make_segment(label, ids[first:last], encoder.pieces))
        end = last
    return Sample(data.where(index), data.sources[int(data.source_numbers[index])], segments[0], tuple(segments[1:]), 0)


def _of_split(split: ConversationSplit) -> Iterator[Message]:
    yield from of_dropped(split.dropped, split.num_rows, split.name)
    if split.repeated.count:
        yield Message(
            "error" if split.repeated.share > 0.01 else "warning",
            f"Exact duplicates: {split.repeated.count:,} {split.name} conversations ({percent(split.repeated.share)}); "
            f"first: {split.repeated.examples[0]}.",
        )
    if split.num_at_limit:
        share = split.num_at_limit / split.num_conversations
        yield Message(
            "error" if share > 0.01 else "warning",
            f"Length: {split.num_at_limit:,} {split.name} conversations ({percent(share)}) have "
            f"data.max_length={split.max_length} tokens, and longer ones are truncated to it.",
        )
    if split.num_targets < _FEW_TARGETS * split.num_tokens:
        yield Message(
            "warning",
            f"Few targets: {percent(split.num_targets / split.num_tokens)} of the {split.name} tokens are predicted.",
        )
    cost = split.cost
    packed = cost.packed if cost.shared is None else cost.shared
    if split.name == "training" and packed:
        yield Message("ok", f"Packing: {cost.padded_batch / packed:.1f}x fewer tokens than padded batches of 8.")


def page_of_conversations(report: ConversationReport, about: Sequence[tuple[str, str]] = ()) -> Page:
    """The report in words. about: as in `Page`."""
    lead = []
    for split in report.splits:
        more = f" and {len(split.files) - 3} more" if len(split.files) > 3 else ""
        lead.append(f"{split.name}: {split.num_conversations:,} conversations of {', '.join(split.files[:3])}{more}")
    lead.append(f"lengths in tokens (tokenizer and chat template of {report.tokenizer})")
    train = report.splits[0]
    cost = Section(
        "Tokens per epoch", "Tokens that the model computes, by batching method.",
        tuple(cost_blocks(train.cost, "conversations")),
    )  # fmt: skip
    sections = [*_sections(train), cost]
    if report.leakage:
        why = "Conversations that overlap with the training data measure memory."
        sections.append(Section("Train/validation leakage", why, (finding_figures(report.leakage),)))
    for split in report.splits[1:]:
        sections += _sections(split)
    for split in report.splits:
        if split.samples:
            why = "Random conversations as the model sees them; `predicted` are the tokens of the loss."
            sections.append(Section(f"{split.name.capitalize()} samples", why, (Samples(split.samples, "tokens"),)))
    return Page("Conversation data report", tuple(lead), report.summary, tuple(sections), report, tuple(about))


def _sections(split: ConversationSplit) -> Iterator[Section]:
    name = split.name.capitalize()
    share = split.num_targets / split.num_tokens
    beginnings = "turns before the first answer; conversations that share them are computed together"
    rows = [
        Figure("rows read", f"{split.num_rows:,}"),
        Figure("conversations used", f"{split.num_conversations:,}", f"input style: {split.style}"),
        Figure("distinct beginnings", f"{split.num_beginnings:,}", beginnings),
        *dropped_figures(split.dropped),
    ]
    repeated = finding_figures((split.repeated,))
    yield Section(f"{name} rows", "Rows read, used and dropped.", (Figures(tuple(rows)), repeated))
    each = split.num_answers / split.num_conversations
    targets = [
        Figure("tokens", f"{split.num_tokens:,}"),
        Figure("predicted tokens", f"{split.num_targets:,} ({percent(share)})", "those of the loss: the answers"),
        Figure("answers", f"{split.num_answers:,}", f"{each:.1f} per conversation"),
    ]
    if split.num_at_limit:
        at_limit = f"{split.num_at_limit:,} ({percent(split.num_at_limit / split.num_conversations)})"
        why = "longer ones are truncated to it (data.truncation)"
        targets.append(Figure(f"conversations of data.max_length={split.max_length:,}", at_limit, why, is_hit=True))
    blocks: list[Block] = [Figures(tuple(targets)), percentiles(split.lengths, "tokens")]
    for length in split.lengths:
        thing = "answers" if length.key == "answer" else "conversations"
        most, is_main = max(length.histogram.counts), length.key == "conversation"
        blocks.append(Chart(length.title, length.histogram, "tokens", thing, most, None, is_main))
    yield Section(f"{name} targets and lengths", "In tokens.", tuple(blocks))
