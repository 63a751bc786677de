"""Biased random search (George 2017, Algorithm 1), which tunes every method here by one procedure.

Sample hyperparameters uniformly, guess what they would cost from the nearest ones tried so far, and
keep them with a probability that falls from 1 for the best cost seen to 0 for the worst.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import optuna
from optuna._transform import _SearchSpaceTransform  # what Optuna's own samplers scale with
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.search_space import intersection_search_space
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState


class BiasedRandomSampler(optuna.samplers.BaseSampler):
    """Random search that rejects what a 1-nearest-neighbor model of the cost expects to be bad.

    A sample a is kept with probability p = (c_max - c(a)) / (c_max - c_min), where c(a) is the cost
    of the finished trial nearest to a, and c_max and c_min are the largest and smallest finite
    costs; otherwise another one is drawn. Distances are Euclidean in coordinates in which every
    range is [0, 1], logarithmic where the range is; a category is a coordinate of its own, 0 or 1.

    What the thesis leaves open: a trial that diverged, whose value is inf, has p = 0. Trials at
    equal distance share: p is the mean of theirs. As long as all finite costs are the same, p = 1
    near them, and everywhere if there are none. Failed and pruned trials do not count, as in all of
    Optuna's samplers: return inf, not NaN, for hyperparameters that are no good.

    Draws depend on `seed` and the number of the trial alone, so that a study resumed from storage
    goes on as it would have. Without a seed one is drawn.

    Raises:
        ValueError: `seed` is negative, or the study has several objectives.
    """

    def __init__(self, seed: int | None = None) -> None:
        if seed is not None and seed < 0:
            raise ValueError(f"seed must be at least 0 or None, got {seed}")
        self._seed = np.random.SeedSequence().entropy if seed is None else seed

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        self._raise_error_if_multi_objective(study)
        shared = intersection_search_space(
            study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        )
        return {name: one for name, one in shared.items() if not one.single()}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        if not search_space:
            return {}
        generator = np.random.default_rng([self._seed, trial.number])
        scaled = _SearchSpaceTransform(search_space, transform_0_1=True)
        history = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        tried = np.stack([scaled.transform(one.params) for one in history])
        sign = -1 if study.direction == StudyDirection.MAXIMIZE else 1
        keep = acceptance([sign * one.value for one in history])
        while True:
            drawn = scaled.untransform(generator.uniform(*scaled.bounds.T))
            distances = np.linalg.norm(tried - scaled.transform(drawn), axis=1)
            p = keep[distances == distances.min()].mean()
            if generator.uniform() < p:
                return drawn

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Draw uniformly what is not part of every finished trial: there is no history of it."""
        name = zlib.crc32(param_name.encode())
        generator = np.random.default_rng([self._seed, trial.number, name])
        scaled = _SearchSpaceTransform({param_name: param_distribution}, transform_0_1=True)
        return scaled.untransform(generator.uniform(*scaled.bounds.T))[param_name]


def acceptance(costs: Sequence[float]) -> np.ndarray:
    """The probability of keeping a sample next to each trial: (c_max - c) / (c_max - c_min)."""
    costs = np.asarray(costs, dtype=float)
    finite = np.isfinite(costs)
    if not finite.any():
        return np.ones(len(costs))
    worst, best = costs[finite].max(), costs[finite].min()
    if worst == best:
        return finite.astype(float)
    return np.where(finite, (worst - np.where(finite, costs, worst)) / (worst - best), 0.0)


def at_edge(distribution: BaseDistribution, value: Any) -> bool:
    """Whether `value` is within a twentieth of the range from one of its ends, on its own scale."""
    if not isinstance(distribution, FloatDistribution) or distribution.single():
        return False
    scale = math.log if distribution.log else float
    low, high = scale(distribution.low), scale(distribution.high)
    return not 0.05 <= (scale(value) - low) / (high - low) <= 0.95
