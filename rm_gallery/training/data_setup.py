"""The data of a run: training and validation side as tokens, checked against the model and each other."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rm_gallery.data.batching.bin_packing import Packer
from rm_gallery.data.batching.loader import Phase
from rm_gallery.data.batching.plan import Plan, long_pairs
from rm_gallery.data.benchmarks.named import BenchmarkReader, NamedBenchmark, named_benchmark
from rm_gallery.data.config import DataConfig, Side, sides_of
from rm_gallery.data.custom import CustomReader
from rm_gallery.data.sources import DataFile, entries_of, resolve_files
from rm_gallery.data.sources.config import EVAL_SETS
from rm_gallery.data.token_cache.arrays import TokenData
from rm_gallery.data.token_cache.prepare import peek, prepare
from rm_gallery.data.token_cache.store import Store
from rm_gallery.data.tokenization.template_date import freeze_date
from rm_gallery.data.tokenization.tokenizer import load_tokenizer, read_at
from rm_gallery.errors import UserError
from rm_gallery.modeling.architectures import ENCODERS, closing_token
from rm_gallery.modeling.config import ModelConfig
from rm_gallery.modeling.export import InputRecord
from rm_gallery.modeling.language_model import language_model_way
from rm_gallery.modeling.model_folder import load_model_config
from rm_gallery.modeling.packing import choose_way
from rm_gallery.modeling.reward_model import (
    RewardModel,
    has_position_table,
    max_positions,
    max_rotary_positions,
)
from rm_gallery.modeling.router_loss import check_config
from rm_gallery.modeling.weight_files import tokenizer_folder
from rm_gallery.objectives import Objective
from rm_gallery.objectives.plackett_luce import MAX_EXACT
from rm_gallery.training.benchmark_sets import SCORE, BenchmarkSet
from rm_gallery.training.config import TrainConfig
from rm_gallery.training.metric_names import parse_metric, set_of
from rm_gallery.training.model_setup import check_parts, find_adapter
from rm_gallery.training.validation import BY_SOURCE, by_source_names

log = logging.getLogger(__name__)

SEPARATOR = "\n\n"
"""Text between turns for a model of raw text whose training data had no prompts."""


@dataclass(frozen=True)
class Loaded:
    """One side of the data as tokens, with the counts of dropped rows."""

    store: Store
    files: list[DataFile]
    benchmark: BenchmarkSet | None = None
    """What a set of `trainer.eval_sets` is, if it is one."""

    @property
    def data(self) -> TokenData:
        return self.store.data

    def input_record(self, config: DataConfig, tokenizer: Any, model: ModelConfig) -> InputRecord:
        """How these texts are rendered and tokenized, to be saved with the model."""
        record = InputRecord(
            self.data.style,
            config.append_eos,
            config.max_length,
            separator="" if self.data.has_text_prompts else SEPARATOR,
            text_special_tokens=config.text_special_tokens,
            attributes=tuple(model.outputs),
            attribute_weights=model.output_weights,
        )
        if config.custom_cls.path is None or self.data.style == "text":
            return record
        custom = CustomReader.from_config(config, tokenizer)
        return replace(
            record,
            input_style=custom.style,
            append_eos=custom.append_eos,
            separator=custom.separator,
            own_rendering=not self.store.custom.matches_template,
        )

    def facts(self) -> dict[str, Any]:
        """The entry of this side in run.json."""
        dropped = self.store.dropped
        return {
            "files": [file.name for file in self.files],
            "formats": self.store.facts.formats,
            "groups": len(self.data),
            "comparisons": self.data.num_comparisons,
            "tokens": self.data.num_tokens,
            "style": self.data.style,
            "fingerprint": self.data.fingerprint(),
            "rows": self.store.facts.num_rows,
            "held_out": self.store.facts.held_out,
            "dropped": {
                reason: {"rows": count, "first": dropped.examples[reason]} for reason, count in dropped.counts.items()
            },
        }


def check_inputs(config: TrainConfig) -> None:
    """Check the tokenizer, the model's configuration and the first rows of each file, without reading all of it.

    Raises UserError as `run_training` would.
    """
    model = config.model
    path, key, base = model.partial_pretrain, "model.partial_pretrain", model.lora.base
    adapter = find_adapter(config)
    tokenizer = load_tokenizer(
        tokenizer_folder(path, key=key, base=base),
        trust_remote_code=model.trust_remote_code,
        chat_template=config.data.chat_template,
    )
    freeze_date(tokenizer, config.data.template_date, key="data.template_date")
    if adapter is not None:
        path, key = adapter.base, "base"
    source = load_model_config(
        path, key=key, trust_remote_code=model.trust_remote_code,
        new_head=model.new_head or adapter is not None or config.objective.name == "sft",
        attributes=model.outputs,
    )  # fmt: skip
    what = f"{key}={path}"
    way = (language_model_way if config.objective.name == "sft" else choose_way)(source, model.packing, what=what)
    check_parts(config, source, way, adds_lora=adapter is None)
    if model.router_aux_loss_coef:
        check_config(source)
    read_at(tokenizer, closing_token(source), what=what)
    for side in sides_of(config.data):
        _peek(side.key, config.data, None, tokenizer)
    is_chat = tokenizer.chat_template is not None or config.data.custom_cls.path is not None
    for _, set_key, data, named in _sets_of(config):
        _peek(set_key, data, named, tokenizer, None if is_chat else SEPARATOR)


def _peek(key: str, data: DataConfig, named: NamedBenchmark | None, tokenizer: Any, separator: str | None = None
) -> None:  # fmt: skip
    """Read the first rows of a side. separator: as of `BenchmarkReader`."""
    if named is None:
        files, entries, reader = resolve_files(data, key=key), entries_of(data, key), None
    else:
        files, entries = named.find(key), (named.entry,)
        reader = BenchmarkReader(named.benchmark.name, separator)
    for warning in peek(files, entries, data, tokenizer, key=key, benchmark=reader).warnings():
        log.warning("%s: %s", key, warning)


def load_sides(config: DataConfig, tokenizer: Any, *, validates: bool = True) -> tuple[Loaded, Loaded | None]:
    """Training data and validation data (if there are any) as tokens; logs dropped rows and train/validation leakage.

    validates: whether to read the validation data. Raises UserError for a side without a usable row.
    """
    loaded = [load_side(side, config, tokenizer) for side in sides_of(config)[: None if validates else 1]]
    train, val = loaded[0], loaded[1] if len(loaded) > 1 else None
    if not validates:
        return train, None
    if val is not None:
        _warn_of_overlap(train.data, val.data)
    else:
        log.warning("no validation data: set data.val_files, or hold out prompts with data.val_fraction=0.05")
    return train, val


def _sets_of(config: TrainConfig) -> list[tuple[str, str, DataConfig, NamedBenchmark | None]]:
    """(name, key, configuration with its files as `val_files`, benchmark) of each set of `trainer.eval_sets`."""
    found = []
    for name, files in config.trainer.eval_sets.items():
        data = replace(config.data, val_files=files, val_fraction=0.0, val_split=None)
        named = named_benchmark(name, files)
        if named is not None:
            data = replace(data, bad_rows="drop")  # those that the benchmark does not score; others are errors
        found.append((name, f"{EVAL_SETS}.{name}", data, named))
    return found


def load_eval_sets(config: TrainConfig, tokenizer: Any, train: TokenData) -> dict[str, Loaded]:
    """The sets of `trainer.eval_sets` by name, read as validation data are; logs what `load_sides` logs."""
    found = {}
    separator = None if train.style == "chat" else "" if train.has_text_prompts else SEPARATOR
    for name, key, data, named in _sets_of(config):
        if named is None:
            found[name] = load_side(Side(key), data, tokenizer)
        else:
            files, reader = named.find(key), BenchmarkReader(named.benchmark.name, separator)
            store = _checked(prepare(files, (named.entry,), data, tokenizer, key=key, benchmark=reader), key, data)
            found[name] = Loaded(store, files, BenchmarkSet.of(named.benchmark.name, store, key))
        _warn_of_overlap(train, found[name].data, f" of {key}")
    return found


def check_best_metric(name: str, val: Loaded | None, eval_sets: Mapping[str, Loaded]) -> None:
    """Raise UserError for a metric of a source, or a score, that the validation data do not have."""
    parsed = parse_metric(name)
    if parsed is None or not (parsed.source or parsed.kind == SCORE):
        return
    name_of_set = set_of(parsed.set)  # the average of the weights is validated on the same data
    loaded = eval_sets.get(name_of_set, val if not name_of_set else None)
    if loaded is not None and loaded.benchmark is not None and parsed.kind != "accuracy":
        scores = [f"val/{parsed.set}/{each}" for each in loaded.benchmark.metric_names()]
        if name not in scores:
            raise UserError(
                f"trainer.save_best_metric={name}: validation has no such metric. The scores of this set are "
                f"{', '.join(scores)}"
            )
        return
    sources = by_source_names(loaded.data) if loaded is not None else []
    if parsed.kind not in BY_SOURCE or parsed.source not in sources:
        start = name.removesuffix(f"{parsed.kind}/{parsed.source}")
        known = ", ".join(f"{start}{kind}/{each}" for each in sources for kind in BY_SOURCE)
        raise UserError(
            f"trainer.save_best_metric={name}: validation has no such metric. "
            + (f"By source it has {known}" if known else "These data have a single source")
        )


def load_side(side: Side, config: DataConfig, tokenizer: Any) -> Loaded:
    """One side as tokens, from the token cache if it is there; see `load_sides`."""
    key = side.key if side.share is None else f"{side.key} ({side.share[0]} share)"
    files, entries = resolve_files(config, key=side.key), entries_of(config, side.key)
    store = _checked(prepare(files, entries, config, tokenizer, key=key, share=side.share), key, config)
    return Loaded(store, files)


def _checked(store: Store, key: str, config: DataConfig) -> Store:
    """The store of a side, whose counts are logged. Raises UserError if no row can be used."""
    dropped, facts = store.dropped, store.facts
    if dropped.total:
        log.warning("%s: dropped %d of %d rows: %s", key, dropped.total, facts.num_rows, dropped.describe())
    if not len(store.data):
        why = dropped.describe() or f"{facts.held_out} are on the other side of data.val_fraction={config.val_fraction}"
        raise UserError(f"{key}: none of {facts.num_rows} rows can be used: {why}; {dropped.remedy}")
    log.info(
        "%s: %d groups, %d %s as %s, %d tokens (each prompt once per group)",
        key, len(store.data), store.data.num_comparisons,
        {"pairs": "comparisons"}.get(store.data.unit, store.data.unit), store.data.style, store.data.num_tokens,
    )  # fmt: skip
    for warning in store.custom.warnings():
        log.warning("%s: %s", key, warning)
    return store


def _warn_of_overlap(train: TokenData, val: TokenData, of: str = "") -> None:
    shared = np.isin(val.prompt_hashes, train.prompt_hashes)
    if shared.any():
        log.warning(
            "train/validation leakage: %d of %d validation groups%s have a prompt that is also in the training data "
            "(first: %s); rm-gallery show-data reports details",
            int(shared.sum()), len(val), of, val.where(int(shared.argmax())),
        )  # fmt: skip


def plan_phases(config: TrainConfig, objective: Objective, data: TokenData, plan: Plan) -> list[Phase]:
    """The phases of the run with their numbers of steps; one for most objectives.

    plan: of the training data. Raises UserError for a phase without a step.
    """
    epochs, total = config.trainer.total_epochs, config.trainer.total_training_steps
    steps, ratio = config.objective.regression_steps, config.objective.regression_ratio
    if not plan.epoch_steps(0):
        raise UserError(
            f"data.train_batch_size={config.data.train_batch_size} with data.drop_last=true leaves no step: there are "
            f"{data.num_comparisons} {data.unit}; lower it, or set data.drop_last=false"
        )
    if len(objective.phases) == 1:
        return [Phase(data, plan, total or plan.num_steps(epochs))]
    pairs = data.by_pairs()
    of_pairs = plan.of(pairs.sizes)
    if not of_pairs.epoch_steps(0):
        raise UserError(
            f"data.train_files: objective.name={config.objective.name} needs prompts with two responses whose scores "
            f"differ, and {int(pairs.loss_counts.sum())} such pairs make no step; set objective.name=regression"
        )
    first = steps or max(1, round(ratio * (total or plan.num_steps(epochs))))
    second = total - first if total else of_pairs.num_steps(epochs)
    if not (total or steps):
        second = max(1, round((1 - ratio) * second))
    if second < 1:
        raise UserError(f"{first} steps of regression leave none of trainer.total_training_steps={total}; lower them")
    log.info("phases  %d steps of regression, then %d on %s pairs", first, second, f"{pairs.loss_counts.sum():,}")
    return [Phase(data, plan, first), Phase(pairs, of_pairs, second)]


def check_data(
    config: TrainConfig, objective: Objective, model: RewardModel, train: Loaded, val: Loaded | None,
    eval_sets: Mapping[str, Loaded] = {},
) -> None:  # fmt: skip
    """Raise UserError for data that do not fit the model, the objective or each other.

    Warns about pairs above the token budget.
    """
    validated = {**({"data.val_files": val} if val else {}), **{f"{EVAL_SETS}.{n}": s for n, s in eval_sets.items()}}
    for key, side in validated.items():
        if side.data.style != train.data.style:
            raise UserError(
                f"{key} hold {side.data.style} but data.train_files hold {train.data.style}; "
                "set data.input_style to read both the same way"
            )
    check_labels(config, objective, train, {key: side for key, side in validated.items() if side.benchmark is None})
    limit, rotary = max_positions(model), max_rotary_positions(model.network.config)
    for key, side in {"data.train_files": train, **validated}.items():
        longest = int(side.data.sizes.longest_text.max())
        if rotary is not None and longest > rotary:
            raise UserError(
                f"{key}: the longest text has {longest} tokens, but above {rotary} the rotary embedding of this model "
                f"depends on the longest text of a batch; set data.max_length={rotary}"
            )
        if limit is not None and longest > limit:
            what = f"{key}: the longest text has {longest} tokens, but the model has positions for {limit}"
            if model.network.config.model_type in ENCODERS or has_position_table(model, limit):
                raise UserError(f"{what}; set data.max_length={limit}")
            log.warning("%s; set data.max_length=%d unless this is intended", what, limit)
        packer = Packer(config.data.budget, padded=model.padded)
        warning = long_pairs(side.data, packer, key="data.max_tokens_per_micro_batch")
        if warning:
            log.warning("%s: %s", key, warning)


_LABELS = {"margin": "margins", "p_better": "soft labels", "score": "scores", "rank": "ranks"}
_SOURCES = {
    "margin": ("margin", "data.margin_key={margin_key}, or responses with scores"),
    "p_better": ("share of annotators who prefer it", "data.p_chosen_key={p_chosen_key} (1 where all do)"),
}

_FACTORS = {
    "weight": "set data.weight_key to a column with weights above 0, or leave it out",
    "margin": "set data.margin_key to a column with margins above 0, or objective.name=bradley_terry",
}


def check_labels(config: TrainConfig, objective: Objective, train: Loaded, validated: Mapping[str, Loaded]) -> None:
    """Raise UserError for a label that the objective needs and training data lack; log those that it does not use."""
    name, data = config.objective.name, train.data
    if "tied" in objective.needs and not 0 < data.num_tied < data.num_comparisons:
        found = f"all of {data.num_comparisons:,} are" if data.num_tied else f"none of {data.num_comparisons:,} is"
        raise UserError(
            f"data.train_files: objective.name={name} needs comparisons with and without a tie, and {found} a tie "
            "(equal scores or ranks, a preference of 0, a winner that is a tie); set objective.name=bradley_terry"
        )
    if objective.count == "rankings":
        for key, side in {"data.train_files": train, **validated}.items():
            side.data.as_rankings(MAX_EXACT if config.objective.ties == "exact" else None)
            large = int((side.data.sizes.tokens > config.data.budget).sum())
            if large:
                log.warning(
                    "%s: %d rankings have more tokens than the token budget of a micro-batch, %d; a ranking is not "
                    "cut, so each is a micro-batch of its own", key, large, config.data.budget,
                )  # fmt: skip
    for label in set(objective.needs) & _SOURCES.keys():
        what, source = _SOURCES[label]
        what = f"{what} of 0 or more" if objective.scales else what
        count, where = data.without(label, may_be_negative=not objective.scales)
        column = source.format(margin_key=config.data.margin_key, p_chosen_key=config.data.p_chosen_key)
        if count:
            raise UserError(
                f"data.train_files: objective.name={name} needs a {what} of each comparison, and {count:,} of "
                f"{data.num_comparisons:,} have none (first: {where}); add the column {column}, or set "
                "objective.name=bradley_terry"
            )
        for key, side in validated.items():
            count, where = side.data.without(label, may_be_negative=not objective.scales)
            if count:
                log.warning(
                    "%s: %s of %s comparisons have no %s (first: %s); their loss is that of bradley_terry",
                    key, f"{count:,}", f"{side.data.num_comparisons:,}", what, where,
                )  # fmt: skip
    for label in ("weight", "margin") if objective.scales else ("weight",):
        if data.all_zero(label):
            raise UserError(
                f"data.train_files: every {label} is 0, so that nothing would be learned; {_FACTORS[label]}"
            )
    unused = [_LABELS[label] for label in data.labels() if label not in objective.uses]
    if unused:
        log.info("the data carry %s, which objective.name=%s does not use", " and ".join(unused), name)
