"""A running covariance of per-example gradients, kept as a fixed number of past examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused_so.optim.rows import Rows


def with_past(
    states: Sequence[dict[str, Any]],
    members: list[int],
    rows: Sequence[Rows],
    unit: Tensor,
    decay: float,
) -> tuple[Tensor, Tensor, list[Rows]]:
    """Weights that sum to 1, units and rows of the batch and of the directions kept, if any.

    unit_i times g_i (h_i, 1)^T is the gradient of example i alone; those kept have unit 1. What
    was kept for other layers than `members` together is of other examples, and not used.
    """
    weights = torch.full_like(unit, (1 - decay) / len(unit))
    if any(state.get("past_members") != members for state in states):
        return weights / weights.sum(), unit, list(rows)
    past_weights = states[0]["past_weights"]
    weights = torch.cat([weights, decay * past_weights])
    pool = [
        row._replace(g=torch.cat([row.g, state["past_g"]]), h=torch.cat([row.h, state["past_h"]]))
        for row, state in zip(rows, states, strict=True)
    ]
    return weights / weights.sum(), torch.cat([unit, torch.ones_like(past_weights)]), pool


def draw(
    states: Sequence[dict[str, Any]],
    members: list[int],
    pool: Sequence[Rows],
    weights: Tensor,
    unit: Tensor,
    energies: Tensor,
    count: int,
    seed: int,
) -> None:
    """Keeps `count` of the pool's examples, drawn in proportion to their energies.

    Systematic sampling: direction j is where the running sum of energies, the weighted squared
    norms, passes (j + u) / count of the whole, with one random u. Each then stands for 1 / count
    of the trace, and the expectation of the covariance is what it was. A pool that is not finite
    leaves the past as it was.
    """
    shares = energies / energies.sum()
    u = torch.rand((), generator=torch.Generator().manual_seed(seed)).item()
    places = (torch.arange(count, device=weights.device, dtype=weights.dtype) + u) / count
    chosen = torch.searchsorted(shares.cumsum(0), places).clamp_(max=len(shares) - 1)
    # kappa_i / (count share_i), where an example is drawn count share_i times on average
    kept = weights[chosen] / (count * shares[chosen])
    finite = torch.isfinite(kept).all()
    for state, row in zip(states, pool, strict=True):
        known = state.get("past_members") == members
        for key, value in (
            ("past_g", row.g[chosen] * unit[chosen, None]),
            ("past_h", row.h[chosen]),
            ("past_weights", kept),
        ):
            old = state[key] if known else torch.zeros_like(value)
            state[key] = torch.where(finite, value, old)
        state["past_members"] = members
