"""Why the optimizer's weights are float32: the share of parameters that an update changes.

    python benchmarks/master_weights.py [--lr 5e-7] [--steps 20] [--batches 20] [--output FILE.json]

Trains the same small Qwen2 reward model three times on made-up pairs: with bfloat16 weights that the optimizer updates
itself, with bfloat16 weights that are rounded stochastically (`master_weights=bf16_stochastic`), and with float32
master weights beside bfloat16 compute weights, as the trainer has them. A step changes a parameter when its stored
value differs after the step. The loss is the mean of the last `batches` steps. bfloat16 keeps 8 bits of a number, so an
update below about 1/256 of the weight's size is rounded away; AdamW's updates are about as large as the learning rate.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from torch import nn

from rm_gallery.data.batching.packed_batch import PackedBatch, collate
from rm_gallery.data.tokenization.token_group import TokenGroup
from rm_gallery.modeling.attention import dispatch
from rm_gallery.modeling.packing import choose_way
from rm_gallery.modeling.parallel.master_weights import MasterWeights
from rm_gallery.modeling.reward_model import RewardModel
from rm_gallery.objectives import OBJECTIVES
from rm_gallery.schema import Comparison
from rm_gallery.training.config import OptimConfig
from rm_gallery.training.optim import build_optimizer
from rm_gallery.training.optimizers import groups_of


def build(seed: int = 0) -> RewardModel:
    """A random Qwen2 reward model with weights of the usual size (standard deviation 0.02)."""
    from transformers import AutoModelForSequenceClassification, Qwen2Config

    torch.manual_seed(seed)
    dispatch.install()
    config = Qwen2Config(
        vocab_size=4000, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, num_labels=1, pad_token_id=0,
    )  # fmt: skip
    network = AutoModelForSequenceClassification.from_config(config, attn_implementation=dispatch.NAME)
    return RewardModel(network, choose_way(config, "auto", what="model"))


def make_batch(seed: int, pairs: int = 16, vocab_size: int = 4000) -> PackedBatch:
    """Random pairs with a shared prompt."""
    draw = np.random.default_rng(seed)
    groups = []
    for _ in range(pairs):
        parts = [draw.integers(1, vocab_size, size).astype(np.int32) for size in draw.integers(10, 60, 3)]
        groups.append(TokenGroup(parts[0], parts[1:], [Comparison(0, 1)]))
    return collate(groups)


KINDS = ("bfloat16", "bfloat16, stochastic", "float32")


def run(lr: float, steps: int, batches: int, kind: str) -> tuple[float, float, float]:
    """Mean share of parameters that a step changes, of those it changed at all over the run, and the last losses."""
    model = build()
    weights = MasterWeights(model, torch.bfloat16, has_masters=kind == "float32") if kind != "bfloat16" else None
    if weights is None:
        model.to(torch.bfloat16)
    named = list(weights.named_parameters() if weights else model.named_parameters())
    config = OptimConfig(lr=lr, weight_decay=0.1)
    parameters: list[nn.Parameter] = [parameter for _, parameter in named]
    optimizer: torch.optim.Optimizer
    if weights:
        optimizer = build_optimizer(named, config)
    else:  # rounds to the nearest
        optimizer = torch.optim.AdamW(groups_of(parameters, config.weight_decay), lr=lr, betas=config.betas, fused=True)
    start = [parameter.detach().clone() for parameter in parameters]
    shares, losses = [], []
    for step in range(steps):
        batch = make_batch(step % batches)
        loss, _ = OBJECTIVES["bradley_terry"](model(batch), batch)
        losses.append(loss.item() / len(batch.better))
        (loss / len(batch.better)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 2.0)
        before = [parameter.detach().clone() for parameter in parameters]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if weights:
            weights.copy_to_model()
        shares.append(share_changed(before, parameters))
    return float(np.mean(shares)), share_changed(start, parameters), float(np.mean(losses[-batches:]))


def share_changed(before: list[torch.Tensor], after: list[nn.Parameter]) -> float:
    """Share of single values that differ."""
    changed = sum(int((a != b).sum()) for a, b in zip(before, after, strict=True))
    return changed / sum(a.numel() for a in before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lr", type=float, default=5e-7)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batches", type=int, help="different ones, repeated in turn; by default one for each step")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    batches = arguments.batches or arguments.steps
    rows = {kind: run(arguments.lr, arguments.steps, batches, kind) for kind in KINDS}
    print(f"learning rate {arguments.lr:g}, {arguments.steps} steps of AdamW, {batches} batches")
    print(f"{'optimizer weights':<22} {'changed in a step':>18} {'changed after all':>18} {'loss':>8}")
    for name, (per_step, overall, loss) in rows.items():
        print(f"{name:<22} {per_step:>18.2%} {overall:>18.2%} {loss:>8.4f}")
    if arguments.output:
        arguments.output.write_text(json.dumps({"lr": arguments.lr, "steps": arguments.steps, **rows}, indent=2))


if __name__ == "__main__":
    main()
