"""Biased random search against probabilities computed by hand."""

from __future__ import annotations

import math
from collections import Counter

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial

from bench.search import BiasedRandomSampler, acceptance, at_edge

DRAWS = 4000
LR = FloatDistribution(1e-4, 1.0, log=True)
MOMENTUM = FloatDistribution(-1.0, 1.0)


@pytest.fixture(scope="module", autouse=True)
def quiet():
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    yield
    optuna.logging.set_verbosity(before)


def draws(space, history, seed=0, count=DRAWS, **options):
    """What is sampled after `history`: all alike, as trials that still run do not count."""
    study = optuna.create_study(sampler=BiasedRandomSampler(seed), **options)
    for params, value in history:
        study.add_trial(create_trial(params=params, distributions=space, value=value))
    return [study.ask(space).params for _ in range(count)]


def assert_shares(found, expected):
    """Counts within 5 standard deviations of multinomial shares; nothing where the share is 0."""
    counts = Counter(found)
    assert set(counts) <= {name for name, share in expected.items() if share > 0}
    for name, share in expected.items():
        deviation = math.sqrt(DRAWS * share * (1 - share))
        assert abs(counts[name] - DRAWS * share) <= 5 * deviation + 1e-9, (name, counts[name])


def test_acceptance_is_the_rule_of_the_text():
    assert acceptance([3.0, 1.0, 2.5]).tolist() == [0.0, 1.0, 0.25]
    assert acceptance([7.0, 7.0]).tolist() == [1.0, 1.0]
    assert acceptance([3.0, math.inf, 1.0, 2.0]).tolist() == [0.0, 0.0, 1.0, 0.5]
    assert acceptance([2.0, math.inf]).tolist() == [1.0, 0.0]
    assert acceptance([math.inf, math.inf]).tolist() == [1.0, 1.0]


def test_a_linear_range():
    # Cells of the nearest neighbors: [-1, -0.4], [-0.4, 0.3], [0.3, 1]; p = 1, 0.25, 0.
    history = [({"m": -0.6}, 1.0), ({"m": -0.2}, 4.0), ({"m": 0.8}, 5.0)]
    found = [one["m"] for one in draws({"m": MOMENTUM}, history)]
    assert all(-1 <= m <= 1 for m in found)
    cells = ["low" if m < -0.4 else "middle" if m < 0.3 else "high" for m in found]
    low, middle = 0.6 * 1, 0.7 * 0.25
    total = low + middle
    assert_shares(cells, {"low": low / total, "middle": middle / total, "high": 0})


def test_a_logarithmic_range():
    # In decades the cells are [-4, -2.5] and [-2.5, 0]; on a linear scale they met at 0.05.
    history = [({"lr": 1e-4}, 1.0), ({"lr": 1e-1}, 2.0)]
    found = [one["lr"] for one in draws({"lr": LR}, history)]
    decades = [math.log10(lr) for lr in found]
    assert all(-4 <= decade < -2.5 for decade in decades)
    halves = [decade < -3.25 for decade in decades]
    assert_shares(halves, {True: 0.5, False: 0.5})


def test_distances_are_of_scaled_ranges():
    """The nearest of two trials by a brute-force model written anew, on 2 unequal ranges."""
    space = {"lr": LR, "m": MOMENTUM}
    history = [
        ({"lr": 1e-3, "m": -0.5}, 1.0),
        ({"lr": 1e-1, "m": 0.5}, 3.0),
        ({"lr": 1e-3, "m": 0.9}, 2.0),
    ]

    def nearest(lr, m):
        def square(params):
            return ((math.log10(lr) - math.log10(params["lr"])) / 4) ** 2 + (
                (m - params["m"]) / 2
            ) ** 2

        return min(range(3), key=lambda index: square(history[index][0]))

    p = [1.0, 0.0, 0.5]
    side = 200
    mass = [0.0] * 3
    for i in range(side):
        for j in range(side):
            index = nearest(10 ** (-4 + 4 * (i + 0.5) / side), -1 + 2 * (j + 0.5) / side)
            mass[index] += p[index]
    shares = {index: mass[index] / sum(mass) for index in range(3)}
    assert_shares([nearest(**one) for one in draws(space, history)], shares)


def test_trials_that_diverged_are_avoided_and_do_not_set_the_scale():
    history = [({"m": -0.5}, 1.0), ({"m": 0.5}, math.inf)]
    assert all(one["m"] <= 0 for one in draws({"m": MOMENTUM}, history))
    # p of the middle cell, [-0.25, 0.25], is 0.5 whatever diverged.
    history = [({"m": -0.5}, 1.0), ({"m": 0.0}, 2.0), ({"m": 0.5}, math.inf), ({"m": -1.0}, 3.0)]
    found = [one["m"] for one in draws({"m": MOMENTUM}, history)]
    assert_shares([m < -0.25 for m in found], {True: 0.5 / 0.75, False: 0.25 / 0.75})


def test_all_is_uniform_while_nothing_is_known():
    diverged = [({"m": -0.5}, math.inf), ({"m": 0.9}, math.inf)]
    for history in ([], [({"m": 0.3}, 1.0)], diverged):
        found = [one["m"] for one in draws({"m": MOMENTUM}, history)]
        assert_shares([math.floor(2 * m) for m in found], dict.fromkeys(range(-2, 2), 0.25))


def test_failed_and_pruned_trials_do_not_count():
    study = optuna.create_study(sampler=BiasedRandomSampler(0))
    for state, m, value in (
        (TrialState.COMPLETE, -0.5, 1.0),
        (TrialState.COMPLETE, 0.5, 2.0),
        (TrialState.FAIL, -0.6, None),
        (TrialState.PRUNED, -0.7, 9.0),
    ):
        params, space = {"m": m}, {"m": MOMENTUM}
        study.add_trial(create_trial(state=state, params=params, distributions=space, value=value))
    found = [study.ask({"m": MOMENTUM}).params["m"] for _ in range(DRAWS)]
    assert_shares([m < 0 for m in found], {True: 1.0, False: 0.0})


def test_maximizing_turns_the_costs():
    history = [({"m": -0.5}, 1.0), ({"m": 0.5}, 2.0)]
    found = draws({"m": MOMENTUM}, history, direction="maximize", count=200)
    assert all(one["m"] >= 0 for one in found)


def test_categories_are_equally_far_and_ties_share():
    space = {"kind": CategoricalDistribution(["a", "b", "c"])}
    # Nobody tried c: it is as far from a as from b, and p is the mean of 1 and 0.
    found = [one["kind"] for one in draws(space, [({"kind": "a"}, 1.0), ({"kind": "b"}, 2.0)])]
    assert_shares(found, {"a": 1 / 1.5, "b": 0, "c": 0.5 / 1.5})
    # One category tried twice shares too, and never becomes impossible by its worse trial.
    history = [({"kind": "a"}, 3.0), ({"kind": "a"}, 1.0), ({"kind": "b"}, 3.0)]
    found = [one["kind"] for one in draws(space, history)]
    assert_shares(found, {"a": 0.5 / (0.5 + 1 / 3), "b": 0, "c": (1 / 3) / (0.5 + 1 / 3)})


def test_integers_stay_integers_in_their_range():
    space = {"n": IntDistribution(1, 4), "one": FloatDistribution(2.0, 2.0)}
    history = [({"n": 1, "one": 2.0}, 1.0), ({"n": 4, "one": 2.0}, 2.0)]
    found = draws(space, history)
    assert_shares([one["n"] for one in found], {1: 0.5, 2: 0.5, 3: 0, 4: 0})
    assert all(one["one"] == 2 for one in found)


def test_a_seed_gives_the_study_and_storage_resumes_it(tmp_path):
    def objective(trial):
        return (trial.suggest_float("lr", 1e-4, 1, log=True) - 0.1) ** 2 + trial.suggest_float(
            "m", -1, 1
        )

    def run(seed, storage=None, pieces=(12,)):
        for count in pieces:
            study = optuna.create_study(
                sampler=BiasedRandomSampler(seed),
                storage=storage,
                study_name="s",
                load_if_exists=True,
            )
            study.optimize(objective, n_trials=count)
        return [trial.params for trial in study.trials]

    file = optuna.storages.journal.JournalFileBackend(str(tmp_path / "journal"))
    storage = optuna.storages.JournalStorage(file)
    whole = run(3)
    assert run(3, storage, pieces=(5, 1, 6)) == whole
    assert run(4) != whole
    assert run(None) != run(None)


def test_bad_seeds_and_several_objectives_are_refused():
    with pytest.raises(ValueError, match="seed must be at least 0 or None, got -1"):
        BiasedRandomSampler(-1)
    study = optuna.create_study(directions=["minimize"] * 2, sampler=BiasedRandomSampler(0))
    with pytest.raises(ValueError, match="multi-objective.*BiasedRandomSampler"):
        study.ask({"m": MOMENTUM})


def test_the_edges_of_a_range():
    inside, outside = (1.6e-4, 0.5), (1.5e-4, 0.7)
    assert [at_edge(LR, value) for value in inside + outside] == [False, False, True, True]
    assert [at_edge(MOMENTUM, value) for value in (-0.95, 0.0, 0.95)] == [True, False, True]
    assert not at_edge(CategoricalDistribution(["a"]), "a")
