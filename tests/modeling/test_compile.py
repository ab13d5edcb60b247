"""Compiled layers give the rewards and gradients of eager layers."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from rm_gallery.data.batching.packed_batch import collate
from rm_gallery.distributed.process_group import World
from rm_gallery.modeling.config import FsdpConfig, ModelConfig
from rm_gallery.modeling.parallel.apply import apply
from rm_gallery.modeling.reward_model import load_reward_model
from rm_gallery.objectives import OBJECTIVES
from tests.small import make_model, random_groups

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiled_layers_change_nothing(tmp_path: Path) -> None:
    folder = make_model("qwen2", tmp_path)
    found = []
    for compiled in (False, True):
        torch.manual_seed(1)
        model = load_reward_model(str(folder)).model.train()
        config = ModelConfig(
            compile=compiled,
            enable_gradient_checkpointing=True,
            fsdp_config=FsdpConfig(model_dtype="fp32"),
        )
        apply(model, config, World(0, 1, torch.device("cpu")), strategy="none")
        rewards = []
        for seed in (4, 5):  # another number of tokens
            batch = collate(random_groups(seed))
            rewards.append(model(batch))
            OBJECTIVES["bradley_terry"](rewards[-1], batch)[0].backward()
        found.append([*(each.detach() for each in rewards), *(p.grad for p in model.parameters())])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5 * max(1.0, float(theirs.abs().max())), rtol=0)
