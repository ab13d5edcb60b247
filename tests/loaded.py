"""All that a training process loads. Only the server of tests/forks.py imports this, before it forks anything."""

from __future__ import annotations

import gc
import importlib
import io

gc.disable()  # loading makes little rubbish, and many rounds of looking for it
for _name in (
    "hydra",
    "matplotlib.backends.backend_agg",
    "pyarrow.parquet",
    "pydantic.dataclasses",
    "pydantic.json_schema",
    "pydantic.type_adapter",
    "pytest",
    "rm_gallery.cli",
    "rm_gallery.training.setup",
    "tests.small",
    "torch.distributed.checkpoint._fsspec_filesystem",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.launcher.api",
    "torch.distributed.fsdp",
    "torch.distributed.run",
    "torch.distributed.tensor",
    "transformers.convert_slow_tokenizer",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.bert.modeling_bert",
    "transformers.models.qwen2.modeling_qwen2",
    "transformers.models.qwen2.tokenization_qwen2",
):
    importlib.import_module(_name)


def _use() -> None:
    """What libraries prepare at their first use, and keep: plugins, grammars, fonts, tables of names."""
    from matplotlib.figure import Figure
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    from rm_gallery.config import compose
    from rm_gallery.training.config import TrainConfig

    compose(TrainConfig, None, ["trainer.seed=1"])
    get_checkpoint_conversion_mapping("qwen2")
    figure = Figure()
    figure.subplots().plot([0, 1])
    figure.savefig(io.BytesIO(), format="png")


_use()
# What is here stays: to look at it in a forked process would copy its pages.
gc.freeze()
gc.enable()
