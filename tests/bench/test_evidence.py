"""The command that reruns the evidence, on budgets of updates: none of these depends on a clock."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from functools import partial

import pytest
import torch

import fused_so
from bench import evidence as program
from bench.methods import METHODS
from bench.training import Budget, Run
from fused_so.likelihoods import Bernoulli

SMALL = [
    *("--problems", "digits", "--methods", "sgd,acp", "--trials", "3", "--seeds", "2"),
    *("--trial-budget", "2u", "--run-budget", "4u", "--batch-size", "128", "--threads", "1"),
]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def trained(monkeypatch):
    """The runs that were really trained, in order, less those that only try a method out."""
    runs = []
    train = program.train

    def noted(run, problem, budget, *arguments, **options):
        if budget.amount > 1:
            runs.append(run)
        train(run, problem, budget, *arguments, **options)

    monkeypatch.setattr(program, "train", noted)
    return runs


def contents(out):
    return {file: file.read_text() for file in out.rglob("*") if file.is_file()}


def order(runs):
    return [(run.optimizer, run.seed, bool(run.hyperparameters)) for run in runs]


TRIALS = [("sgd", 1000, True), ("acp", 1000, True)]
SEEDS = [[("sgd", seed, True), ("acp", seed, True), ("acp", seed, False)] for seed in (0, 1)]
ORDER = [*TRIALS * 3, *SEEDS[0], *SEEDS[1]]


def test_work_goes_breadth_first_and_nothing_is_done_twice(tmp_path, trained):
    assert program.main([*SMALL, "--out", str(tmp_path)]) == 0
    assert order(trained) == ORDER
    before = contents(tmp_path)
    assert len(before) == len(ORDER) + 1
    trained.clear()
    assert program.main([*SMALL, "--out", str(tmp_path)]) == 0
    assert trained == []
    assert contents(tmp_path) == before


def test_pieces_of_another_machine_are_told_of_where_some_are_missing(
    tmp_path, trained, monkeypatch, capsys
):
    program.main([*SMALL, "--out", str(tmp_path)])
    there = {**program.environment(), "cpu": "Another CPU"}
    monkeypatch.setattr(program, "environment", lambda: there)
    program.main([*SMALL, "--out", str(tmp_path)])
    assert "another machine" not in capsys.readouterr().err
    here = json.loads(next(tmp_path.rglob("tuned*.json")).read_text())["machine"]["cpu"]
    program.main([*SMALL, "--seeds", "3", "--out", str(tmp_path), "--dry-run"])
    message = "digits: finished pieces are of another machine, whose seconds are not this one's: "
    assert message + here in capsys.readouterr().err


def test_files_say_what_was_done(tmp_path, trained):
    program.main([*SMALL, "--out", str(tmp_path)])
    index = json.loads((tmp_path / "digits" / "index.json").read_text())
    assert index["plan"]["trial"] == {"amount": 2, "unit": "updates"}
    for method, parts in index["methods"].items():
        documents = {
            role: [json.loads((tmp_path / "digits" / method / file).read_text()) for file in files]
            for role, files in parts.items()
            if role != "hyperparameters"
        }
        assert set(documents) == {"trial", "tuned"} | ({"default"} if method == "acp" else set())
        best = min(documents["trial"], key=lambda one: one["run"]["curve"]["train_error"][-1])
        assert parts["hyperparameters"] == best["piece"]["hyperparameters"]
        for one in documents["tuned"]:
            assert one["run"]["hyperparameters"] == parts["hyperparameters"]
            assert one["run"]["curve"]["updates"][-1] == 4
        for one in itertools.chain(*documents.values()):
            assert one["piece"]["threads"] == one["machine"]["threads"] == 1
            assert one["piece"]["batch_size"] == 128
            assert one["machine"]["commit"]
            assert one["stopped_by"] is None


@pytest.mark.parametrize("stop", [1, 4, 8, 11])
def test_a_killed_run_goes_on_where_it_was(tmp_path, monkeypatch, stop, trained):
    noted, calls = program.train, []

    def killed(run, problem, budget, *arguments, **options):
        if budget.amount > 1:
            calls.append(run)
            if len(calls) == stop:
                raise KeyboardInterrupt
        noted(run, problem, budget, *arguments, **options)

    monkeypatch.setattr(program, "train", killed)
    assert program.main([*SMALL, "--out", str(tmp_path / "killed")]) == 130
    assert len(contents(tmp_path / "killed")) == stop  # the pieces before it and the index
    for text in contents(tmp_path / "killed").values():
        json.loads(text)
    assert program.main([*SMALL, "--out", str(tmp_path / "killed")]) == 0
    assert order(trained) == ORDER
    program.main([*SMALL, "--out", str(tmp_path / "whole")])

    def results(out):
        return {
            file.relative_to(out): json.loads(text).get("run", {}).get("hyperparameters")
            for file, text in contents(out).items()
        }

    # Budgets of updates are deterministic: the same settings were found, the same pieces made.
    assert results(tmp_path / "killed") == results(tmp_path / "whole")


@pytest.mark.parametrize(
    ("changes", "new"),
    [
        (["--run-budget", "5u"], 6),
        (["--seeds", "3"], 3),
        (["--batch-size", "64"], 12),
        (["--methods", "sgd,acp,adam"], 5),
    ],
)
def test_what_changes_a_result_is_in_its_name(tmp_path, trained, changes, new):
    program.main([*SMALL, "--out", str(tmp_path)])
    trained.clear()
    program.main([*SMALL, *changes, "--out", str(tmp_path)])
    assert len(trained) == new


def test_runs_of_other_defaults_are_made_anew(tmp_path, monkeypatch, trained):
    program.main([*SMALL, "--out", str(tmp_path)])
    trained.clear()
    build = METHODS["acp"].build
    changed = replace(METHODS["acp"], build=partial(build, momentum=0.5))
    monkeypatch.setitem(METHODS, "acp", changed)
    program.main([*SMALL, "--out", str(tmp_path)])
    assert {run.optimizer for run in trained} == {"acp"}
    assert all(run.settings["momentum"] == 0.5 for run in trained)
    trained.clear()
    program.main([*SMALL, "--out", str(tmp_path)])
    assert trained == []


def test_fewer_methods_later_leave_the_index_whole(tmp_path, trained):
    program.main([*SMALL, "--out", str(tmp_path)])
    whole = json.loads((tmp_path / "digits" / "index.json").read_text())
    program.main([*SMALL, "--methods", "sgd", "--out", str(tmp_path)])
    assert json.loads((tmp_path / "digits" / "index.json").read_text()) == whole


def test_work_that_stops_leaves_what_the_index_had(tmp_path, monkeypatch, trained):
    program.main([*SMALL, "--out", str(tmp_path)])
    before = json.loads((tmp_path / "digits" / "index.json").read_text())["methods"]
    noted = program.train

    def killed(run, problem, budget, *arguments, **options):
        if run.optimizer == "adam" and budget.amount > 1:
            raise KeyboardInterrupt
        noted(run, problem, budget, *arguments, **options)

    monkeypatch.setattr(program, "train", killed)
    more = [*SMALL, "--methods", "sgd,acp,adam", "--out", str(tmp_path)]
    assert program.main(more) == 130
    after = json.loads((tmp_path / "digits" / "index.json").read_text())["methods"]
    assert after == {**before, "adam": {}}


def test_a_dry_run_trains_nothing_and_counts(tmp_path, trained, capsys):
    assert program.main([*SMALL, "--dry-run", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "digits: sgd, acp\n  each 3 trials of 2 updates and 2 seeds of 4 updates" in printed
    assert "12 pieces are missing" in printed
    assert "36 updates" in printed  # 6 trials of 2 and 6 runs of 4
    assert trained == []
    assert contents(tmp_path) == {}
    program.main([*SMALL, "--out", str(tmp_path)])
    program.main([*SMALL, "--dry-run", "--out", str(tmp_path)])
    assert "0 pieces are missing" in capsys.readouterr().out


def test_a_run_that_would_not_end_in_time_is_not_started(tmp_path, trained, capsys):
    late = [*SMALL, "--trial-budget", "500s", "--minutes", "2", "--out", str(tmp_path)]
    assert program.main(late) == 1
    assert trained == []
    assert "12 pieces are left" in capsys.readouterr().err


def test_an_optimizer_that_gives_up_counts_as_diverged(tmp_path, monkeypatch, trained):
    noted = program.train

    def failing(run, problem, budget, *arguments, **options):
        noted(run, problem, budget, *arguments, **options)
        if run.optimizer == "acp" and run.seed == 1000 and budget.amount > 1:
            raise RuntimeError("not positive definite")

    monkeypatch.setattr(program, "train", failing)
    assert program.main([*SMALL, "--out", str(tmp_path)]) == 0
    files = sorted((tmp_path / "digits" / "acp").glob("trial*"))
    for document in (json.loads(file.read_text()) for file in files):
        assert document["stopped_by"] == "RuntimeError: not positive definite"
        assert document["run"]["diverged"]
    assert len(trained) == len(ORDER)


def test_a_method_that_cannot_start_is_left_out(tmp_path, monkeypatch, trained, capsys):
    noted = program.train

    def refusing(run, *arguments, **options):
        if run.optimizer == "acp":
            raise TypeError("not this model")
        noted(run, *arguments, **options)

    monkeypatch.setattr(program, "train", refusing)
    assert program.main([*SMALL, "--out", str(tmp_path)]) == 0
    assert "digits: acp is left out: not this model" in capsys.readouterr().err
    assert {run.optimizer for run in trained} == {"sgd"}


def test_a_longer_run_is_one_more(tmp_path, monkeypatch, trained):
    plan = program.Plan(
        Budget(2, "updates"), Budget(3, "updates"), {"sgd": Budget(5, "updates")}, 1, 1, 128
    )
    monkeypatch.setitem(program.PLANS, "digits", plan)
    arguments = ["--problems", "digits", "--methods", "sgd", "--threads", "1"]
    program.main([*arguments, "--out", str(tmp_path)])
    assert [run.final("updates") for run in trained] == [2, 3, 5]
    parts = json.loads((tmp_path / "digits" / "index.json").read_text())["methods"]["sgd"]
    assert [len(parts[role]) for role in ("trial", "tuned", "longer")] == [1, 1, 1]


def test_our_optimizers_are_all_there_and_need_no_options():
    built = {
        type(METHODS[method].build(torch.nn.Linear(1, 1), Bernoulli())) for method in program.OURS
    }
    assert built == {
        one
        for one in vars(fused_so).values()
        if isinstance(one, type) and issubclass(one, torch.optim.Optimizer)
    }


def test_a_diverged_run_is_the_worst():
    run = Run("sgd", 0, {})
    run.record(seconds=1.0, updates=1, train_error=0.1, test_error=0.1)
    assert run.result == 0.1
    run.diverged = True
    assert run.result == float("inf")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--problems", "digits,x"], "argument --problems: unknown problem 'x' (choose from"),
        (["--methods", "x"], "argument --methods: unknown method 'x' (choose from sgd"),
        (["--run-budget", "5"], "argument --run-budget: must be like 30s (seconds) or 500u"),
        (["--run-budget", "0s"], "argument --run-budget: must be a positive float, got '0'"),
        (["--trial-budget", "1.5u"], "argument --trial-budget: must be a positive int, got '1.5'"),
        (["--batch-size", "5000"], "argument --batch-size: digits has 1500 examples"),
        (["--minutes", "-1"], "argument --minutes: must be a positive float, got '-1'"),
        (["--problems", "mnist", "--data", "nowhere"], "argument --data: mnist needs"),
    ],
)
def test_bad_arguments_are_named(changes, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        program.main([*SMALL, *changes, "--out", str(tmp_path)])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.replace("\n", " ")
