"""The Plackett-Luce loss of rankings, with ties."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rm_gallery.data.batching.packed_batch import PackedBatch
from rm_gallery.objectives.base import Objective
from rm_gallery.objectives.metrics import means, pairwise_sums

# S ranked responses


class PlackettLuce(Objective):
    """Negative log-likelihood of whole rankings: the best is chosen from all, the next from the rest, and so on.

    P(1 over 2 over ... over K) = product over k of exp(r_k) / sum over j >= k of exp(r_j) (Plackett 1975; Luce 1959).
    Two responses are Bradley-Terry. d tied responses D among the remaining R: Efron's approximation (Efron 1977, "The
    Efficiency of Cox's Likelihood Function for Censored Data"), whose k-th factor, k = 0 to d - 1, is (k + 1) exp(r) /
    (sum of R - k / d x sum of D), without a penalty where tied responses have equal rewards at the end of a ranking.
    The loss is summed over rankings and divided by their number.

    Needs rankings: each two responses of a row are compared, or tied. Use it for rankings of three and more, where all
    comparisons of a ranking would count it K (K - 1) / 2 times, as if they were independent. A ranking is never cut.

    Example: rewards [2, 1, 1] ranked 1, 2, 2: -2 + log(e^2 + e + e) = 0.551, and nothing for the tie.
    """

    uses = ("score", "rank")
    count = "rankings"
    divisible = False

    def loss(self, rewards: Tensor, batch: PackedBatch) -> Tensor:
        chosen = rewards[batch.rated]  # [S]
        same, rank = _same_group(batch), batch.rank
        tied = same & (rank.unsqueeze(1) == rank.unsqueeze(0))
        remaining = same & (rank.unsqueeze(1) <= rank.unsqueeze(0))
        place = tied.tril(-1).sum(1).to(chosen.dtype)  # among the tied ones
        log_share = torch.log1p(-place / tied.sum(1))
        terms = chosen.unsqueeze(0) + torch.where(tied, log_share.unsqueeze(1), 0.0)
        total = terms.masked_fill(~remaining, -torch.inf).logsumexp(1)
        return ((total - chosen - torch.log1p(place)) * batch.rating_weight).sum()

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
