"""Bytes per parameter of each optimizer: weights, gradients and state after one step, as the tensors are.

    python benchmarks/optimizers.py MODEL_FOLDER

Trains the model one step on made-up tokens, in one process and in bfloat16, with float32 master weights and without.
Peak is what a step of the optimizer allocates beyond them, as torch's profiler counts it.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.master_weights import make_batch
from rm_gallery.modeling.parallel.master_weights import MasterWeights
from rm_gallery.modeling.reward_model import load_reward_model
from rm_gallery.objectives import OBJECTIVES
from rm_gallery.training.config import OptimConfig
from rm_gallery.training.optim import build_optimizer

NAMES = ("adamw", "adamw_8bit", "muon", "adafactor")


def measure(folder: str, name: Any, *, has_masters: bool) -> list[float]:
    """Bytes per parameter: weights and their copies, gradients, state, and the peak of an optimizer's step."""
    model = load_reward_model(folder).model
    count = sum(each.numel() for each in model.parameters())
    weights = MasterWeights(model, torch.bfloat16, has_masters=has_masters)
    optimizer = build_optimizer(weights.named_parameters(), OptimConfig(name=name, lr=1e-4))

    def backward() -> None:
        batch = make_batch(0, pairs=2, vocab_size=model.network.config.vocab_size)
        OBJECTIVES["bradley_terry"](model(batch), batch)[0].backward()

    backward()
    optimizer.step()  # allocates the state
    weights.copy_to_model()
    optimizer.zero_grad(set_to_none=True)
    backward()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        optimizer.step()
    live = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    trained = [each for _, each in weights.named_parameters()]
    state = [value for each in optimizer.state.values() for value in each.values()]
    held = {id(each): each for each in (*trained, *model.parameters())}
    sizes = (held.values(), [each.grad for each in trained if each.grad is not None], state)
    return [*(_bytes(tensors) / count for tensors in sizes), peak / count]


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(each.numel() * each.element_size() for each in tensors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    folder = parser.parse_args().folder
    logging.disable(logging.WARNING)
    print("| master_weights | optim.name | weights | gradients | state | sum | peak of a step |")
    print("|---|---|---|---|---|---|---|")
    for has_masters in (True, False):
        for name in NAMES:
            *parts, peak = measure(folder, name, has_masters=has_masters)
            kind = "fp32" if has_masters else "bf16_stochastic"
            cells = " | ".join(f"{each:.2f}" for each in (*parts, sum(parts), peak))
            print(f"| `{kind}` | `{name}` | {cells} |")


if __name__ == "__main__":
    main()
