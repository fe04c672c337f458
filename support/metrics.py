"""The metrics of pairs: those of every loss, sums over micro-batches, means over processes."""

import torch
import torch.distributed as dist
from torch import Tensor

import asft

ROWS = ("rows", "rows_chosen", "rows_rejected", "rows_both")
# A pair may be one answer, good (chosen) or bad (rejected). The means of these metrics are over the
# pairs that have what they measure; all others, such as the loss, are over all pairs.
MEASURED = {
    **dict.fromkeys(("sft", "logp_w", "sum_logp_w", "align_w"), "rows_chosen"),
    **dict.fromkeys(("logp_l", "sum_logp_l", "align_l", "rejected_weight"), "rows_rejected"),
    **dict.fromkeys(("margin", "accuracy"), "rows_both"),
}


def common_metrics(
    mean_R: Tensor, sum_R: Tensor, length_R: Tensor, drawn: bool
) -> dict[str, Tensor]:
    """What is measured of each pair under every loss, from the mean and summed log-probs of its two
    answers and their numbers of tokens: each (B,).

    rows is 1; rows_chosen, rows_rejected and rows_both are 1 of a pair that has that answer, or
    both, otherwise 0. `drawn` is False of a stand-in, for which all four are 0.
    """
    logp_w_B, logp_l_B = mean_R[0::2], mean_R[1::2]
    rows_B = torch.full_like(logp_w_B, drawn)
    has_chosen_B, has_rejected_B = length_R[0::2] > 0, length_R[1::2] > 0
    return {
        "sft": -logp_w_B,
        "logp_w": logp_w_B,
        "logp_l": logp_l_B,
        "sum_logp_w": sum_R[0::2],
        "sum_logp_l": sum_R[1::2],
        **asft.comparison(logp_w_B, logp_l_B),
        "rows": rows_B,
        "rows_chosen": rows_B * has_chosen_B,
        "rows_rejected": rows_B * has_rejected_B,
        "rows_both": rows_B * has_chosen_B * has_rejected_B,
    }


class Sums(dict):
    """Per-pair metrics summed over micro-batches, then over processes: each pair counts once."""

    def add(self, metrics: dict[str, Tensor], within_B: Tensor | float = 1.0) -> None:
        """Adds a micro-batch's metrics, of those pairs for which within_B is 1."""
        for name, value_B in metrics.items():
            counts_B = within_B * metrics[MEASURED.get(name, "rows")]
            self[name] = self.get(name, 0) + value_B.where(counts_B > 0, 0).sum()

    def mean_over_processes(self, prefix: str = "") -> dict[str, float]:
        """Means, equal on all processes, each name with the prefix. Those of MEASURED are left out
        if no pair has what they measure. If any lacks an answer, also rows_chosen, rows_rejected
        and rows_both, the numbers of pairs that have it."""
        total = torch.stack([value.double() for value in self.values()])
        dist.all_reduce(total)
        sums = dict(zip(self, total.tolist(), strict=True))
        rows = {name: int(sums.pop(name)) for name in ROWS}
        means = {}
        for name, value in sums.items():
            if count := rows[MEASURED.get(name, "rows")]:
                means[name] = value / count
        if rows.pop("rows") != rows["rows_both"]:
            means |= rows
        return {prefix + name: mean for name, mean in means.items()}
