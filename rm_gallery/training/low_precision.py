"""Less memory for training: AdamW with 8-bit moments, and bfloat16 weights that are rounded stochastically.

Both work on replicated parameters and on those that FSDP2 shards, and are independent of the world size: a checkpoint
of several ranks resumes on one.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.functional import pad

from rm_gallery.training.optimizers import local, sharded_like

_BLOCK = 256  # most numbers of a row with one scale
_CHUNK = 1 << 22  # numbers that are computed in float32 at a time


class _KeepsDtypes(torch.optim.Optimizer):
    """An optimizer whose state has other dtypes than its parameters: loading does not cast it, unlike PyTorch's."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        names = [name for group in state_dict["param_groups"] for name in group["params"]]
        parameters = [each for group in self.param_groups for each in group["params"]]
        for name, parameter in zip(names, parameters, strict=True):
            if name in state_dict["state"]:
                self.state[parameter] = dict(state_dict["state"][name])


class AdamW8bit(_KeepsDtypes):
    """AdamW whose moments have 8 bits (Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization").

    A block of at most 256 numbers of one row has a float32 scale, its largest absolute value, and each number is stored
    as the nearest of 256 values between -1 and 1 (0 and 1 for the second moment), which are denser towards 0. The
    update is computed in float32. Tensors of less than 4,096 numbers, and vectors, have float32 moments, as in AdamW.

    A block never spans two rows, so rows of an embedding do not influence each other, and rows that are sharded keep
    their blocks. A second moment that is not 0 is never stored as 0, since its update would be divided by `eps` alone.
    """

    def __init__(self, params: Any, *, lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    if not state:
                        state.update(_new_moments(parameter))
                    state["step"] += 1
                    _update(parameter, {key: local(value) for key, value in state.items()}, group)


def _new_moments(parameter: Tensor) -> dict[str, Tensor]:
    state = {"step": torch.zeros(())}
    for name in ("exp_avg", "exp_avg_sq"):
        if not has_8bit_moments(parameter):
            state[name] = torch.zeros_like(parameter)
            continue
        state[name] = torch.zeros_like(parameter, dtype=torch.uint8)
        values = local(parameter)
        scales = torch.zeros((*values.shape[:-1], -(-values.shape[-1] // _BLOCK)), device=values.device)
        state[f"{name}_scale"] = sharded_like(parameter, scales) if isinstance(parameter, DTensor) else scales
    return state


def has_8bit_moments(parameter: Tensor) -> bool:
    """Whether `AdamW8bit` quantizes the moments of a parameter."""
    return parameter.ndim >= 2 and parameter.numel() >= 4096


def _update(parameter: Tensor, state: Mapping[str, Tensor], group: Mapping[str, Any]) -> None:
    """AdamW, on as many rows at a time as bound the memory of float32 moments."""
    values, gradient, step = local(parameter), local(parameter.grad), state["step"].item()
    if not values.numel():  # of a shard
        return
    width = values.shape[-1] if values.ndim else 1
    rows = max(1, _CHUNK // width)
    beta1, beta2 = group["betas"]
    parts = [tensor.reshape(-1, width).split(rows) for tensor in (values, gradient)]
    moments = {
        name: tensor.view(-1, width if name in ("exp_avg", "exp_avg_sq") else tensor.shape[-1]).split(rows)
        for name, tensor in state.items() if name != "step"
    }  # fmt: skip
    for index, (part, grad) in enumerate(zip(*parts, strict=True)):
        found = {name: tensors[index] for name, tensors in moments.items()}
        mean, square = (_unpacked(found, name, signed=name == "exp_avg") for name in ("exp_avg", "exp_avg_sq"))
        mean.lerp_(grad, 1 - beta1)
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        part.mul_(1 - group["lr"] * group["weight_decay"])
        divisor = square.sqrt().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
        part.addcdiv_(mean, divisor, value=-group["lr"] / (1 - beta1**step))
        for name, moment in (("exp_avg", mean), ("exp_avg_sq", square)):
            if f"{name}_scale" in found:
                _pack(moment, found[name], found[f"{name}_scale"], signed=name == "exp_avg")


def _unpacked(found: Mapping[str, Tensor], name: str, *, signed: bool) -> Tensor:
    """A moment in float32: itself if it has no scale."""
    if f"{name}_scale" not in found:
        return found[name]
    codes, scales = found[name], found[f"{name}_scale"]
    numbers = _values(signed, codes.device).index_select(0, codes.int().view(-1))
    blocks = _blocks(numbers.view(codes.shape), scales.shape[-1])
    return blocks.mul_(scales.unsqueeze(-1)).flatten(1)[:, : codes.shape[1]]


def _pack(numbers: Tensor, codes: Tensor, scales: Tensor, *, signed: bool) -> None:
    """Write the scales of the blocks, and the code of each number."""
    blocks = _blocks(numbers, scales.shape[-1])
    torch.amax(blocks.abs(), dim=-1, out=scales)
    relative = blocks / scales.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1)
    places = relative.view(torch.int32).bitwise_right_shift_(12).bitwise_and_((1 << 20) - 1)
    found = _codes(signed, codes.device).index_select(0, places.view(-1)).view(len(codes), -1)
    codes.copy_(found[:, : codes.shape[1]])


def _blocks(numbers: Tensor, count: int) -> Tensor:
    """Shape [rows, count, block]: the numbers of each row in equal blocks, the last one filled with zeros."""
    width = numbers.shape[1]
    size = -(-width // count)
    return (numbers if width == size * count else pad(numbers, (0, size * count - width))).view(-1, count, size)


@cache
def _values(signed: bool, device: torch.device) -> Tensor:
    """The 256 numbers that a code stands for, in order.

    Those of the dynamic exponent (Dettmers 2016, "8-Bit Approximations for Parallelism in Deep Learning"): of seven
    decades below 1, the largest has half of the codes, in equal distances, the next one half of the rest, and so on.
    """
    magnitudes = []
    for decade in range(7):
        count = (64 if signed else 128) >> decade
        width = 0.9 / count
        magnitudes += [10.0**-decade * (0.1 + width * (index + 0.5)) for index in range(count)]
    numbers = [*magnitudes, *(-each for each in magnitudes)] if signed else magnitudes
    return torch.tensor(sorted([*numbers, 0.0, 1.0]), device=device)


@cache
def _codes(signed: bool, device: torch.device) -> Tensor:
    """Shape [2^20]: the code nearest to the numbers whose upper 20 bits in float32 are the place in the table."""
    places = torch.arange(1 << 20, dtype=torch.int64, device=device)
    numbers = (places << 12 | 1 << 11).to(torch.int32).view(torch.float32).nan_to_num()
    values = _values(signed, device)
    codes = torch.bucketize(numbers, (values[1:] + values[:-1]) / 2)
    if not signed:  # only 0 itself is stored as 0
        codes[1:].clamp_(min=1)
    return codes.to(torch.uint8)


class StochasticRounding(_KeepsDtypes):
    """An optimizer over bfloat16 parameters: each is updated in float32 and rounded stochastically.

    A number between two bfloat16 ones is rounded up with the probability of its distance from the lower one, so that
    updates which are far smaller than the distance of the two have their effect on average. The random numbers are
    those of a generator that is seeded, for each parameter, by the run's seed and the number of its roundings, which is
    part of the state: ranks that replicate a parameter round alike, and a resumed run as an uninterrupted one. float32
    parameters are updated as they are.
    """

    def __init__(self, inner: torch.optim.Optimizer, *, seed: int) -> None:
        """inner: over the same parameters; it updates one at a time, in float32."""
        self._inner, self._seed = inner, seed
        super().__init__([{"params": [each for group in inner.param_groups for each in group["params"]]}], {})
        self.param_groups = inner.param_groups

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        index = 0
        for place, group in enumerate(self.param_groups):
            for parameter in group["params"]:
                index += 1
                if parameter.grad is not None:
                    self._step_one(parameter, place, index)

    def _step_one(self, parameter: Tensor, place: int, index: int) -> None:
        """Update one parameter through a float32 copy, which the optimizer takes for the parameter."""
        is_narrow = parameter.dtype != torch.float32
        copy = parameter.detach().float() if is_narrow else parameter
        if is_narrow:
            assert parameter.grad is not None
            copy.grad = parameter.grad.float()
        state = self.state[parameter]
        count = state.pop("roundings", torch.zeros(()))
        self._inner.state = defaultdict(dict, {copy: state})
        self._inner.param_groups = [
            {**group, "params": [copy] if number == place else []} for number, group in enumerate(self.param_groups)
        ]
        self._inner.step()
        if is_narrow:
            count += 1
            key = (self._seed, index, int(count.item()), _shard_index(parameter))
            seed = int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest()) >> 1
            round_stochastically(local(copy), local(parameter), seed)
            state["roundings"] = count


def _shard_index(parameter: Tensor) -> int:
    """Which shard of a parameter this rank has; 0 for a replicated one."""
    if not isinstance(parameter, DTensor):
        return 0
    coordinate = parameter.device_mesh.get_coordinate()
    assert coordinate is not None
    return next(
        (place for place, kind in zip(coordinate, parameter.placements, strict=True) if kind.is_shard()), 0
    )  # fmt: skip


def round_stochastically(source: Tensor, target: Tensor, seed: int) -> None:
    """Write float32 numbers into a bfloat16 tensor.

    bfloat16 has the upper 16 bits of a float32 number. Adding a uniform random number of 16 bits to the number's bits
    carries into the upper ones with the probability of the lower ones / 2^16. Infinities and NaN stay what they are.
    """
    generator = torch.Generator(source.device).manual_seed(seed)
    source, target = source.reshape(-1), target.view(-1)
    for numbers, rounded in zip(source.split(_CHUNK), target.split(_CHUNK), strict=True):
        noise = torch.randint(0, 1 << 16, numbers.shape, generator=generator, device=numbers.device, dtype=torch.int32)
        bits = noise.add_(numbers.contiguous().view(torch.int32)).bitwise_and_(-1 << 16)
        rounded.copy_(torch.where(numbers.isfinite(), bits.view(torch.float32), numbers))
