"""The Plackett-Luce loss of rankings, with ties."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rm_gallery.data.batching.packed_batch import PackedBatch
from rm_gallery.objectives.base import Objective
from rm_gallery.objectives.metrics import means, pairwise_sums

# S ranked responses, M members of a tie

MAX_EXACT = 6
"""Most tied responses whose orders are summed: all subsets of them are computed."""


@dataclass(frozen=True)
class PlackettLuce(Objective):
    """Negative log-likelihood of whole rankings: the best is chosen from all, the next from the rest, and so on.

    P(1 over 2 over ... over K) = product over k of exp(r_k) / sum over j >= k of exp(r_j) (Plackett 1975; Luce 1959).
    Two responses are Bradley-Terry. Of d tied responses D among the remaining R any order may be the true one:

    - exact: the sum of the probabilities of all orders of D, for at most `MAX_EXACT` tied responses. f(S), the
      probability that the responses S of D come before the rest B of R, is the sum over i in S of exp(r_i) f(S without
      i) / (sum of B and S). In survival analysis this is the exact partial likelihood (Kalbfleisch and Prentice 1973,
      "Marginal Likelihoods Based on Cox's Regression and Life Model"). Ties at the end of a ranking have probability 1.
    - `efron`: the k-th factor, k = 0 to d - 1, is (k + 1) exp(r) / (sum of R - k / d x sum of D) (Efron 1977, "The
      Efficiency of Cox's Likelihood Function for Censored Data"). Equal to the exact one where tied responses have
      equal rewards, and otherwise a penalty on their differences, at the end of a ranking too.

    `ties=auto` is exact up to `MAX_EXACT` and Efron's beyond. The loss is summed over rankings and divided by their
    number. A ranking adds center_coefficient x (2 x mean reward)^2 and reward_l2 x mean square of its rewards, which
    for two responses is what objectives on comparisons add.

    Needs rankings: each two responses of a row are compared, or tied. Use it for rankings of three and more, where all
    comparisons of a ranking would count it K (K - 1) / 2 times, as if they were independent. A ranking is never cut.

    Example: rewards [2, 1, 1] ranked 1, 2, 2: -2 + log(e^2 + e + e) = 0.551, and nothing for the tie. Ranked 1, 1, 2:
    both orders have e^2 / 12.826 x e / 5.437 = 0.288 and e / 12.826 x e^2 / 10.107 = 0.155, so -log(0.443) = 0.814.
    """

    uses: ClassVar[tuple[str, ...]] = ("score", "rank")
    count: ClassVar[Literal["comparisons", "values", "rankings"]] = "rankings"
    divisible: ClassVar[bool] = False
    ties: Literal["auto", "exact", "efron"] = "auto"
    center_coefficient: float = 0.0
    reward_l2: float = 0.0

    def loss(self, rewards: Tensor, batch: PackedBatch) -> Tensor:
        chosen = rewards[batch.rated]  # [S]
        same, rank = _same_group(batch), batch.rank
        tied = same & (rank.unsqueeze(1) == rank.unsqueeze(0))
        worse = same & (rank.unsqueeze(1) < rank.unsqueeze(0))
        place, size = tied.tril(-1).sum(1), tied.sum(1)  # among the tied ones, and their number
        losses = _efron(chosen, tied, worse, place, size)
        if self.ties != "efron":
            exact = _exact(chosen, tied, worse, place, size).where(place == 0, 0.0)
            is_last = ~worse.any(1)
            losses = torch.where(size <= MAX_EXACT, exact, losses.where(~is_last, 0.0))
        if self.center_coefficient or self.reward_l2:
            count = same.sum(1)
            mean = (same.to(chosen.dtype) @ chosen) / count
            bound = self.center_coefficient * (2 * mean).square() + self.reward_l2 * chosen.square()
            losses = losses + bound / count
        return (losses * batch.rating_weight).sum()

    def sums(self, rewards: Tensor, batch: PackedBatch) -> dict[str, Tensor]:
        rankings = (~_same_group(batch).tril(-1).any(1)).sum()
        return {"rankings": rankings, **pairwise_sums(rewards[batch.better], rewards[batch.worse])}

    def means(self, sums: Mapping[str, float], prefix: str) -> dict[str, float]:
        """The loss over rankings, and the metrics of their comparisons."""
        found = means(sums, prefix)
        for name in ("loss", "router_aux_loss"):
            if f"{prefix}/{name}" in found:
                found[f"{prefix}/{name}"] = sums[name] / sums["rankings"]
        return found


def _same_group(batch: PackedBatch) -> Tensor:
    """[S, S]: whether two ranked responses are in the same ranking."""
    return batch.rated_group.unsqueeze(1) == batch.rated_group.unsqueeze(0)


def _efron(chosen: Tensor, tied: Tensor, worse: Tensor, place: Tensor, size: Tensor) -> Tensor:
    """[S] negative logarithms of Efron's factors."""
    place = place.to(chosen.dtype)
    log_share = torch.log1p(-place / size)
    terms = chosen.unsqueeze(0) + torch.where(tied, log_share.unsqueeze(1), 0.0)
    total = terms.masked_fill(~(tied | worse), -torch.inf).logsumexp(1)
    return total - chosen - torch.log1p(place)


def _exact(chosen: Tensor, tied: Tensor, worse: Tensor, place: Tensor, size: Tensor) -> Tensor:
    """[S] negative log-likelihood of each tie of at most `MAX_EXACT`, in the entry of its first member."""
    own = torch.arange(len(chosen), device=chosen.device)
    # Row of the first member: all members, in order; others, and ties that are too large, are not read below.
    members = own.unsqueeze(1).repeat(1, MAX_EXACT + 1)  # [S, M + 1]
    first = own.unsqueeze(0).where(tied, len(chosen)).amin(1) if len(chosen) else own
    members[first, place.clamp(max=MAX_EXACT)] = own
    values = chosen[members[:, :MAX_EXACT]]  # [S, M]
    rest = chosen.unsqueeze(0).masked_fill(~worse, -torch.inf).logsumexp(1)
    found, before = [], torch.zeros_like(values[:, :1])
    for inside, without in _subsets(chosen.device):  # of one member, of two, ...
        of_subset = values[:, inside]  # [S, subsets, members]
        total = torch.logaddexp(rest.unsqueeze(1), of_subset.logsumexp(2))
        before = (of_subset + before[:, without]).logsumexp(2) - total
        found.append(-before[:, 0])  # of the first members, as many as the subset has
    return torch.stack(found, 1).gather(1, size.clamp(max=MAX_EXACT).unsqueeze(1) - 1).squeeze(1)


@cache
def _subsets(device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """For subsets of 1 to M members: [subsets, members] which they are, and the smaller subset without each."""
    found, smaller = [], dict[tuple[int, ...], int]({(): 0})
    for count in range(1, MAX_EXACT + 1):
        subsets = list(combinations(range(MAX_EXACT), count))
        without = [[smaller[each[:i] + each[i + 1 :]] for i in range(count)] for each in subsets]
        found.append((torch.tensor(subsets, device=device), torch.tensor(without, device=device)))
        smaller = {each: number for number, each in enumerate(subsets)}
    return found
