"""A micro-batch never synchronizes with the device: no host code depends on a value of a tensor.

Without a GPU the model runs on the meta device, whose tensors have no values: an operation that needs one, such as
`.item()` or boolean indexing, raises there.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.gpu_check.training import one_micro_batch
from rm_gallery.data.batching.packed_batch import collate
from rm_gallery.modeling.parallel.master_weights import MasterWeights
from rm_gallery.modeling.reward_model import load_reward_model
from rm_gallery.objectives.metrics import Sums
from tests.small import DECODERS, fast_first, make_model, random_groups


@pytest.mark.parametrize("dtype", fast_first([torch.bfloat16, torch.float32]))
@pytest.mark.parametrize("kind", DECODERS)
def test_a_micro_batch_on_the_meta_device(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    meta = torch.device("meta")
    model = load_reward_model(str(make_model(kind, tmp_path))).model.to(meta).train()
    weights = MasterWeights(model, dtype)
    one_micro_batch(model, weights, collate(random_groups(3)).to(meta), Sums())
    weights.copy_to_model()
    assert all(parameter.grad is not None for _, parameter in weights.named_parameters())


def test_the_meta_device_raises_where_a_value_is_needed() -> None:
    tensor = torch.zeros(3, device="meta")
    with pytest.raises((RuntimeError, NotImplementedError)):
        tensor.sum().item()
    with pytest.raises((RuntimeError, NotImplementedError)):
        tensor[tensor > 0]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", DECODERS)
def test_a_micro_batch_on_a_gpu(kind: str, tmp_path: Path) -> None:
    device = torch.device("cuda")
    model = load_reward_model(str(make_model(kind, tmp_path))).model.to(device).train()
    weights, sums = MasterWeights(model, torch.bfloat16), Sums()
    for seed in (1, 2):  # warm-up: kernels are selected and compiled
        one_micro_batch(model, weights, collate(random_groups(seed)).to(device), sums)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        one_micro_batch(model, weights, collate(random_groups(3)).to(device), sums)
        weights.copy_to_model()
    finally:
        torch.cuda.set_sync_debug_mode("default")
