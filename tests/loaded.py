"""All that a training process loads. Only the server of tests/forks.py imports this, before it forks anything."""

from __future__ import annotations

import gc
import importlib

for _name in (
    "hydra",
    "matplotlib.backends.backend_agg",
    "matplotlib.pyplot",
    "pyarrow.parquet",
    "rm_gallery.cli",
    "rm_gallery.training.build",
    "rm_gallery.training.compose",
    "tests.small",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.launcher.api",
    "torch.distributed.run",
    "transformers.models.bert.modeling_bert",
    "transformers.models.qwen2.modeling_qwen2",
):
    importlib.import_module(_name)

# What is here stays: a collection in a forked process would only copy its pages.
gc.collect()
gc.freeze()
