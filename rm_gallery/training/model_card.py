"""The model card of a checkpoint: README.md, with the metadata that the Hugging Face hub reads.

Local paths are not written, only the names of files, and what was read from the environment is written as
`${oc.env:NAME}`: a card is made to be published.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined

from rm_gallery.data.sources.config import as_entries
from rm_gallery.safe_text import redact
from rm_gallery.training.config import TrainConfig
from rm_gallery.training.metric_names import parse_metric

CARD_NAME = "README.md"
NOT_UPLOADED = ("training_state/*", "ema/*", "manifest.json", ".gitignore")
"""Files of a checkpoint that matter only where it was trained, and the average of its weights, a model of its own: the
patterns of its .gitignore, which git and the hub respect."""

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SHOWN = ("val/accuracy", "val/loss", "val/margin", "val/perplexity", "val/token_accuracy")

_TRAINED_ON = {
    "bradley_terry": "the Bradley-Terry loss on pairs of a chosen and a rejected response",
    "rao_kupper": "the model of Rao and Kupper (1967) on comparisons with ties",
    "davidson": "the model of Davidson (1970) on comparisons with ties",
    "plackett_luce": "the Plackett-Luce likelihood of rankings",
    "regression": "scores of responses",
    "regression_then_bt": "scores of responses, then the Bradley-Terry loss on responses whose scores differ",
}

_FACTS = """\
| | |
|---|---|
{% for label, value in rows -%}
| {{ label }} | {{ value }} |
{% endfor %}
{%- if metrics %}
## Metrics

| metric | step {{ step }} |
|---|---|
{% for label, value in metrics -%}
| {{ label }} | {{ value }} |
{% endfor %}
{%- endif %}
"""

_TEMPLATE = (
    """\
---
{{ metadata }}---

# {{ name }}

{% if heads > 1 -%}
A reward model with {{ heads }} reward heads on one backbone: the reward of a response is the mean of its {{ heads }}
outputs, and their standard deviation says how much the heads disagree. Trained with {{ trained_on }}, by RM-Gallery.
{%- elif attributes -%}
A reward model with {{ attributes | length }} outputs: it gives each response to a prompt these numbers:
{{ attributes | join(", ") }}.
Trained with the squared error on graded responses, by RM-Gallery.
{%- else -%}
A reward model: it gives each response to a prompt one number, higher for the response that people prefer. Trained with
{{ trained_on }}, by RM-Gallery.
{%- endif %}

"""
    + _FACTS
)

_USAGE = """\
## How to use

```python
from rm_gallery import RewardScorer

scorer = RewardScorer.from_folder("PATH")
scorer.score_messages([[{"role": "user", "content": "Why is the sky blue?"},
                        {"role": "assistant", "content": "Air scatters short waves of light more."}]])
```

With transformers{% if lora %} and peft{% endif %} alone:
{%- if code_file %} it has no sequence classification class for this type, so
{% if lora %}this runs{% else %}`trust_remote_code=True` allows it to run{% endif %} the one in `{{ code_file }}`.
{%- endif %}

```python
import torch
{% if lora -%}
from peft import PeftModel
{% if code_file -%}
from transformers import AutoConfig, AutoTokenizer
from transformers.dynamic_module_utils import get_class_from_dynamic_module
{%- else -%}
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
{%- endif %}
{%- if quantized %}
from transformers import BitsAndBytesConfig
{%- endif %}

tokenizer = AutoTokenizer.from_pretrained("PATH_OR_NAME")
config = AutoConfig.from_pretrained("PATH_OR_NAME")
{% if quantized -%}
quantization = BitsAndBytesConfig(**config.rm_gallery_quantization)
{% endif -%}
{% if code_file -%}
name = config.auto_map["AutoModelForSequenceClassification"]
kind = get_class_from_dynamic_module(name, "PATH_OR_NAME")
base = kind.from_pretrained("BASE_MODEL", config=config{{ mapping }})
{%- else -%}
base = AutoModelForSequenceClassification.from_pretrained("BASE_MODEL", config=config{{ mapping }})
{%- endif %}
model = PeftModel.from_pretrained(base, "PATH_OR_NAME").eval()
{%- else -%}
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH_OR_NAME")
model = AutoModelForSequenceClassification.from_pretrained("PATH_OR_NAME"{{ trust }}).eval()
{%- endif %}
{% if chat -%}
messages = [{"role": "user", "content": "Why is the sky blue?"},
            {"role": "assistant", "content": "Air scatters short waves of light more."}]
text = tokenizer.apply_chat_template(messages, tokenize=False)
inputs = tokenizer(text, return_tensors="pt", add_special_tokens={{ special }})
{%- else -%}
inputs = tokenizer("Why is the sky blue?{{ separator }}Air scatters short waves of light more.", return_tensors="pt")
{%- endif %}
with torch.no_grad():
    {% if attributes -%}
    outputs = model(**inputs).logits[0].tolist()  # in the order of model.config.id2label
    {%- else -%}
    reward = model(**inputs).logits[0, 0].item()
    {%- endif %}
```

{{ unit }}; no sigmoid is applied.
"""


_GENERATION = """\
## How to use

```python
{% if lora -%}
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, pipeline
{%- if quantized %}
from transformers import BitsAndBytesConfig
{%- endif %}

config = AutoConfig.from_pretrained("PATH_OR_NAME")
{% if quantized -%}
quantization = BitsAndBytesConfig(**config.rm_gallery_quantization)
{% endif -%}
base = AutoModelForCausalLM.from_pretrained("BASE_MODEL", config=config, dtype=torch.float32{{ mapping }})
model = PeftModel.from_pretrained(base, "PATH_OR_NAME")
generate = pipeline("text-generation", model, tokenizer=AutoTokenizer.from_pretrained("PATH_OR_NAME"))
{%- else -%}
from transformers import pipeline

generate = pipeline("text-generation", "PATH_OR_NAME")
{%- endif %}
{% if chat -%}
generate([{"role": "user", "content": "Why is the sky blue?"}])
{%- else -%}
generate("Why is the sky blue?")
{%- endif %}
```
"""


_LANGUAGE_MODEL = (
    """\
---
{{ metadata }}---

# {{ name }}

A language model, fine-tuned on the assistant turns of conversations by RM-Gallery.

"""
    + _FACTS
    + _GENERATION
)


_AVERAGED = """\
---
{{ metadata }}---

# {{ name }}

A {{ kind }} model whose weights are the mean of those of {{ members | length }} {{ kind }} models
(`rm-gallery average`); it was not trained itself.
{%- if kind == "reward" %} The mean and standard deviation of their validation rewards do not hold for it.{% endif %}

| model | weight |
|---|---|
{% for label, share in members -%}
| {{ label }} | {{ share }} |
{% endfor %}
"""


def averaged_card(
    name: str, members: Sequence[tuple[str, float]], cards: Sequence[Path], *, is_language_model: bool,
    input_style: str, separator: str, attributes: Sequence[str], adds_special_tokens: bool, code_file: str,
) -> str:  # fmt: skip
    """The model card of an average of weights. members: (name, weight) of each model; cards: their model cards.

    Licence, base model and data are those that all cards name. For the other arguments see `model_card`.
    """
    metadata: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation" if is_language_model else "text-classification",
    }
    found = [_metadata_of(card) for card in cards]
    for key in ("license", "base_model", "datasets"):
        if found[0].get(key) and all(each.get(key) == found[0][key] for each in found):
            metadata[key] = found[0][key]
    metadata["tags"] = ["sft" if is_language_model else "reward-model", "weight-averaging", "rm-gallery"]
    card = _render(
        _AVERAGED + (_GENERATION if is_language_model else _USAGE), metadata, name=_cell(name),
        kind="language" if is_language_model else "reward",
        members=[(_cell(each), f"{share:.4g}") for each, share in members],
        chat=input_style == "chat", lora=False, attributes=attributes, code_file=code_file, mapping="", quantized=False,
        trust=", trust_remote_code=True" if code_file else "", special=adds_special_tokens,
        separator=json.dumps(separator)[1:-1], unit="Rewards are comparable between responses to the same prompt",
    )  # fmt: skip
    return redact(card)


def _metadata_of(card: Path) -> Mapping[str, Any]:
    """The metadata of a model card; {} without one."""
    try:
        found = yaml.safe_load(card.read_text(encoding="utf-8").split("---")[1])
    except (OSError, ValueError, IndexError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _render(template: str, metadata: Mapping[str, Any], **values: Any) -> str:
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)
    text = yaml.safe_dump(dict(metadata), sort_keys=False, allow_unicode=True)
    return environment.from_string(template).render(metadata=text, **values)


def model_card(
    config: TrainConfig,
    *,
    num_parameters: int,
    num_trained: int | None = None,
    comparisons: int,
    step: int,
    metrics: Mapping[str, float],
    metrics_step: int | None = None,
    input_style: str,
    separator: str = "",
    adds_special_tokens: bool = False,
    versions: Mapping[str, str] | None = None,
    code_file: str = "",
    renames: Mapping[str, str] | None = None,
    objective: Mapping[str, Any] = {},
    ema: bool = False,
    unit: str = "",
) -> str:
    """The text of README.md.

    comparisons: number of items of the training data, which are `unit`.
    metrics: by name, those of the last validation, at `metrics_step`.
    renames: of tensors in the base model's folder, a wrapper of several models.
    objective: values of its parameters, see `Objective.record`. ema: the card of the average of the weights.
    code_file: Python file of the checkpoint that transformers needs, if any.
    adds_special_tokens: whether a rendered chat still needs those of the tokenizer, as for encoders.
    """
    value, attributes = partial(_value, config.to_save()), config.model.outputs
    train, val = _sources(value("data.train_files")), _sources(value("data.val_files"))
    base = value("model.partial_pretrain")
    is_hub = _is_hub_name(base)
    lora = config.model.lora
    kind = "regression" if config.model.attributes else config.objective.name.replace("_", "-")
    is_language_model = config.objective.name == "sft"
    metadata: dict[str, Any] = {
        "library_name": "peft" if lora.rank else "transformers",
        "pipeline_tag": "text-generation" if is_language_model else "text-classification",
        "license": config.trainer.license and value("trainer.license"),
        "tags": [*(["sft"] if is_language_model else ["reward-model", kind]), "rm-gallery"],
    }
    if is_hub:
        metadata["base_model"] = base
    if datasets := [name for name in dict.fromkeys((*train, *val)) if "/" in name]:
        metadata["datasets"] = datasets
    unit = unit or ("rated responses" if config.data.attributes else "pairs")
    rows = _rows(config, num_parameters, num_trained, comparisons, unit, step, objective)
    if ema:
        rows.append(("weights", f"exponential moving average over the steps, decay {value('trainer.ema_decay')}"))
    rows.append(("input", "conversations, rendered by the chat template" if input_style == "chat" else "plain text"))
    rows.append(("compute dtype, seed", f"{value('model.fsdp_config.model_dtype')}, {value('trainer.seed')}"))
    rows.append(("versions", ", ".join(f"{name} {number}" for name, number in (versions or {}).items())))
    card = _render(
        _LANGUAGE_MODEL if is_language_model else _TEMPLATE + _USAGE,
        metadata,
        name=value("trainer.experiment_name"),
        rows=[(label, _cell(value)) for label, value in rows if value],
        metrics=[(name, f"{metrics[name]:.4f}") for name in (*_SHOWN, *_of_sets(metrics)) if name in metrics],
        step=step if metrics_step is None else metrics_step,
        chat=input_style == "chat",
        lora=lora.rank > 0,
        attributes=attributes,
        heads=config.model.heads,
        unit=_unit(config, objective),
        trained_on=_TRAINED_ON.get(config.objective.name, f"`objective.name={config.objective.name}`"),
        code_file=code_file,
        mapping=_base_options(renames or {}, config.model.quantization),
        quantized=config.model.quantization is not None,
        trust=", trust_remote_code=True" if code_file else "",
        special=adds_special_tokens,
        separator=json.dumps(separator)[1:-1],
    )
    return redact(card)


def _rows(
    config: TrainConfig, num_parameters: int, num_trained: int | None, comparisons: int, items: str, step: int,
    objective: Mapping[str, Any],
) -> list[tuple[str, str]]:  # fmt: skip
    """Rows of the first table, the empty ones too."""
    value, lora, frozen = partial(_value, config.to_save()), config.model.lora, config.model.freeze
    train, val = _sources(value("data.train_files")), _sources(value("data.val_files"))
    base = value("model.partial_pretrain")
    targets = lora.target_modules if isinstance(lora.target_modules, str) else ", ".join(lora.target_modules)
    how = "LoRA" if lora.rank else "" if frozen is None else f"model.freeze={frozen}"
    return [
        ("base model", base if _is_hub_name(base) else _last_part(base)),
        ("parameters", f"{num_parameters:,}" + (f", {num_trained:,} of them trained ({how})" if how else "")),
        ("LoRA", f"rank {lora.rank}, alpha {lora.alpha:g}, {targets}" if lora.rank else ""),
        ("training data", f"{', '.join(train)} ({comparisons:,} {items})"),
        (
            "validation data",
            ", ".join(val) or (f"{value('data.val_fraction')} of the prompts" if config.data.val_fraction else "none"),
        ),
        *((f"{key} of the objective", f"{each:.4g}") for key, each in objective.items() if isinstance(each, float)),
        ("steps", f"{step:,} of {value('data.train_batch_size')} {items}"),
        ("optimizer", value("optim.name")),
        (
            "learning rate",
            f"{value('optim.lr')}, {value('optim.lr_scheduler')}, warm-up {value('optim.warmup_steps_ratio')}",
        ),
        ("weight decay, clipping", f"{value('optim.weight_decay')}, {value('optim.clip_grad')}"),
        ("maximum length", f"{value('data.max_length')} tokens"),
    ]


def _unit(config: TrainConfig, objective: Mapping[str, Any]) -> str:
    """What the size of a reward means."""
    if objective.get("cut_points"):
        scores, cuts = (", ".join(f"{each:.4g}" for each in objective[key]) for key in ("scores", "cut_points"))
        return (
            f"Rewards are log-odds. The score of a response is one of {scores}, and is at most the k-th of them with\n"
            f"probability sigmoid(c_k - reward), c = {cuts}"
        )
    if config.data.attributes and config.objective.name != "regression_then_bt":
        return f"The outputs are in the unit of {', '.join(config.data.attributes)} in the training data"
    return "Rewards are comparable between responses to the same prompt. They have no unit and no zero point"


def _base_options(renames: Mapping[str, str], quantization: str | None) -> str:
    """More arguments of `from_pretrained` for the base model of an adapter."""
    found = f", key_mapping={json.dumps(dict(renames))}" if renames else ""
    return found + (", quantization_config=quantization" if quantization else "")


def _of_sets(metrics: Mapping[str, float]) -> list[str]:
    """Accuracies of the sets of `trainer.eval_sets`, and scores of those that are benchmarks."""
    parts = {name: parse_metric(name) for name in metrics}
    return [
        name
        for name, each in parts.items()
        if each and each.set and each.kind in ("accuracy", "score") and not each.source
    ]


def _sources(files: Any) -> list[str]:
    """Hub names as they are; of other paths and URLs only the last part."""
    names = []
    for entry in as_entries(files):
        path = (entry["path"] if isinstance(entry, Mapping) else entry.path).partition("?")[0].rstrip("/")
        repository = "/".join(path.split("/")[:2])
        is_hub = not Path(path).expanduser().exists() and _is_hub_name(repository)
        names.append(repository if is_hub else _last_part(path))
    return names


def _last_part(path: str) -> str:
    """The name of a file or folder; `${oc.env:NAME,/a/b}` is one part."""
    return ([""] + re.findall(r"(?:\$\{[^}]*\}|[^/])+", path))[-1]


def _value(saved: Any, key: str) -> Any:
    """A value of the saved configuration: numbers as text, and `${oc.env:NAME}` for what was read there."""
    for part in key.split("."):
        saved = saved[part]
    return f"{saved:g}" if isinstance(saved, float) else saved


def _is_hub_name(text: str) -> bool:
    return bool(_HUB_NAME.fullmatch(text)) and not Path(text).exists()


def _cell(value: str) -> str:
    """Text that cannot end a cell of a table."""
    return value.replace("|", "\\|").replace("\n", " ")
