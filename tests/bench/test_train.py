"""The training program, on budgets of updates: none of these depends on a clock."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from optuna.distributions import CategoricalDistribution, FloatDistribution

from bench import methods, training
from bench import train as program
from bench.batch_sizes import BatchSizes
from bench.methods import METHODS
from bench.problems import PROBLEMS, Examples
from bench.training import Budget, Run

SHORT = ["--problem", "digits", "--updates", "40", "--batch-size", "128", "--lr", "sgd=0.01"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Two threads on a busy machine wait for each other at every layer."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def digits():
    return PROBLEMS["digits"](None)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A short run of SGD on two seeds: its folder and its JSON document."""
    out = tmp_path_factory.mktemp("runs")
    assert program.main([*SHORT, "--optimizers", "sgd", "--seeds", "2", "--out", str(out)]) == 0
    return out, json.loads((out / "digits.json").read_text())


def test_writes_json_and_figure(finished):
    out, document = finished
    assert (out / "digits.png").read_bytes().startswith(b"\x89PNG")
    assert document["problem"] == "digits"
    assert document["evaluated_examples"] == {"train": 1500, "test": 297}
    assert document["arguments"]["updates"] == 40
    assert document["searches"] == {}
    assert not document["interrupted"]
    assert {"cpu", "cores", "threads", "torch", "python", "fused_so", "commit", "date"} <= set(
        document["machine"]
    )


def test_records_the_curve_of_every_seed(finished):
    _, document = finished
    assert [(run["optimizer"], run["seed"]) for run in document["runs"]] == [("sgd", 0), ("sgd", 1)]
    for run in document["runs"]:
        curve = run["curve"]
        assert set(curve) == {"seconds", "updates", "train_error", "test_error"}
        assert len({len(column) for column in curve.values()}) == 1
        assert curve["updates"][0] == 0
        assert curve["updates"][-1] == 40
        assert curve["updates"] == sorted(set(curve["updates"]))
        assert curve["seconds"] == sorted(curve["seconds"])
        assert curve["train_error"][-1] < curve["train_error"][0] / 2
        assert curve["test_error"][-1] < curve["test_error"][0] / 2
        assert run["hyperparameters"] == {"lr": 0.01}
        assert run["settings"]["momentum"] == 0.9
        assert run["updates_per_second"] > 0
        assert not run["diverged"]


def test_same_seed_gives_the_same_run(digits):
    first, again, other = (Run("sgd", seed, {"lr": 0.01}) for seed in (0, 0, 1))
    for run in (first, again, other):
        program.train(run, digits, Budget(10, "updates"), 128, evaluations=3)
    assert first.curve["train_error"] == again.curve["train_error"]
    assert first.curve["train_error"] != other.curve["train_error"]


def test_methods_start_alike(digits):
    runs = [Run(name, 5, {"lr": 1e-3}) for name in ("sgd", "adam")]
    for run in runs:
        program.train(run, digits, Budget(1, "updates"), 128, evaluations=1)
    assert runs[0].curve["train_error"][0] == runs[1].curve["train_error"][0]


def test_batches_cover_an_epoch_and_repeat_with_the_seed():
    rows = torch.arange(10.0)
    examples = Examples(rows, rows)
    stream, again = (training.batches(examples, 3, seed=0) for _ in range(2))
    epochs = [torch.cat([next(stream).inputs for _ in range(3)]) for _ in range(2)]
    assert all(len(epoch.unique()) == 9 for epoch in epochs)
    assert not torch.equal(*epochs)
    assert torch.equal(epochs[0], torch.cat([next(again).inputs for _ in range(3)]))


def test_batch_sizes_grow_exponentially_up_to_the_last():
    sizes = BatchSizes.parse("128:1024:30")
    assert [sizes.at(update) for update in (0, 10, 20, 30, 31, 1000)] == [
        128, 256, 512, 1024, 1024, 1024,
    ]  # fmt: skip
    assert BatchSizes.parse("256") == BatchSizes.parse(256) == BatchSizes(256, 256, 1)


def test_growing_batches_hold_every_row_at_most_once_an_epoch():
    rows = torch.arange(10.0)
    stream = training.batches(Examples(rows, rows), "2:4:2", seed=0)
    drawn = [next(stream).inputs for _ in range(5)]
    assert [len(batch) for batch in drawn] == [2, 3, 4, 4, 4]
    assert len(torch.cat(drawn[:3]).unique()) == 9  # the tenth row is too few for the fourth batch
    assert len(torch.cat(drawn[3:]).unique()) == 8


def test_targets_are_taken_with_their_inputs():
    examples = Examples(torch.arange(6.0), torch.arange(6) * 10)
    batch = next(training.batches(examples, 4, seed=0))
    assert torch.equal(batch.inputs * 10, batch.targets)


def test_divergence_is_recorded_and_stops_the_run(digits):
    run = Run("sgd", 0, {"lr": 1e38})
    program.train(run, digits, Budget(50, "updates"), 128)
    assert run.diverged
    assert run.final("updates") < 50
    assert run.final("train_error") == run.final("test_error") == math.inf


def test_a_run_where_everything_diverges_still_reports(tmp_path, capsys):
    short = [*SHORT[:-1], "sgd=1e38", "--optimizers", "sgd", "--seeds", "2"]
    assert program.main([*short, "--out", str(tmp_path)]) == 0
    assert "diverged" in capsys.readouterr().out
    assert all(
        run["diverged"] for run in json.loads((tmp_path / "digits.json").read_text())["runs"]
    )


def _search_in(monkeypatch, space):
    monkeypatch.setitem(METHODS, "sgd", replace(METHODS["sgd"], space=space))


@pytest.fixture
def few_rates(monkeypatch):
    """SGD draws from rates that learn little, well and not at all."""
    space = {"lr": CategoricalDistribution([1e-5, 1e-2, 1e38])}
    _search_in(monkeypatch, space)


def test_search_tries_what_it_may_and_sorts_it(digits, few_rates):
    silent = lambda amount, run: None  # noqa: E731
    tried = program.search("sgd", digits, Budget(20, "updates"), 128, 8, silent)
    assert len(tried) == 8
    assert {trial["lr"] for trial in tried} == {1e-2, 1e-5, 1e38}
    errors = [trial["train_error"] for trial in tried]
    assert errors == sorted(errors)
    assert tried[0]["lr"] == 1e-2
    assert tried[-1] == {"lr": 1e38, "train_error": math.inf}
    again = program.search("sgd", digits, Budget(20, "updates"), 128, 8, silent)
    assert again == tried


def test_the_found_rate_is_used(tmp_path, few_rates):
    arguments = ["--problem", "digits", "--optimizers", "sgd", "--updates", "20", "--seeds", "1"]
    assert program.main([*arguments, "--trials", "6", "--out", str(tmp_path)]) == 0
    document = json.loads((tmp_path / "digits.json").read_text())
    assert document["runs"][0]["hyperparameters"] == {"lr": 1e-2}
    assert len(document["searches"]["sgd"]) == 6


def test_the_edge_of_a_search_is_named(capsys, monkeypatch):
    _search_in(monkeypatch, {"lr": FloatDistribution(1e-3, 1, log=True)})
    tried = [{"lr": 1.1e-3, "kind": "a", "train_error": 2.0}]
    program._report_search("sgd", tried, Budget(1, "seconds"))
    printed = capsys.readouterr().out
    assert "sgd, after 1 s: lr 0.0011 kind a error 2" in printed
    assert "sgd: the best lr, 0.0011, is at the edge of the search" in printed
    program._report_search("sgd", [{**tried[0], "lr": 0.1}], Budget(1, "seconds"))
    assert "edge" not in capsys.readouterr().out


def test_interruption_keeps_what_was_measured(tmp_path, monkeypatch, capsys):
    train = program.train

    def interrupted(run, *arguments, **options):
        if run.seed == 1:
            raise KeyboardInterrupt
        train(run, *arguments, **options)

    monkeypatch.setattr(program, "train", interrupted)
    assert program.main([*SHORT, "--optimizers", "sgd", "--out", str(tmp_path)]) == 130
    document = json.loads((tmp_path / "digits.json").read_text())
    assert document["interrupted"]
    assert [run["seed"] for run in document["runs"]] == [0]
    assert "interrupted" in capsys.readouterr().out


def test_table_counts_to_the_best_of_sgd():
    def run(optimizer, seed, errors):
        run = Run(optimizer, seed, {}, settings={"lr": 0.1})
        for step, error in enumerate(errors):
            run.record(seconds=step / 2, updates=step, train_error=error, test_error=2 * error)
        return run

    runs = [run("sgd", 0, [9, 5, 4]), run("sgd", 1, [9, 5, 3])]
    runs += [run("adam", 0, [9, 3, 2]), run("adam", 1, [9, 4, 2])]
    header, sgd, adam = program.table(runs).splitlines()
    assert "s to SGD's 3" in header
    assert "3.5 [3, 4]" in sgd
    assert sgd.split()[-1] == "never]"
    assert "0.75 [0.5, 1]" in adam
    assert adam.endswith("1.5 [1, 2]")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--problem", "mnits"], "argument --problem: invalid choice: 'mnits' (choose from"),
        (["--optimizers", "sgd,adma"], "argument --optimizers: unknown optimizer 'adma' (choose"),
        (["--seconds", "0"], "argument --seconds: must be a positive float, got '0'"),
        (["--seconds", "nan"], "argument --seconds: must be a positive float, got 'nan'"),
        (["--updates", "1.5"], "argument --updates: must be a positive int, got '1.5'"),
        (["--updates", "5", "--seconds", "5"], "argument --seconds: not allowed with argument"),
        (["--updates", "5", "--search-seconds", "5"], "argument --search-seconds: not allowed"),
        (["--trials", "0"], "argument --trials: must be a positive int, got '0'"),
        (["--seeds", "-1"], "argument --seeds: must be a positive int, got '-1'"),
        (["--batch-size", "x"], "argument --batch-size: must be a positive int, or FIRST:LAST"),
        (["--batch-size", "0"], "argument --batch-size: must be a positive int, or FIRST:LAST"),
        (["--batch-size", "9:8:5"], "with FIRST at most LAST, got '9:8:5'"),
        (["--batch-size", "8:9"], "with FIRST at most LAST, got '8:9'"),
        (["--batch-size", "64:5000:9"], "argument --batch-size: digits has only 1500 training"),
        (["--batch-size", "5000"], "argument --batch-size: digits has only 1500 training"),
        (["--threads", "0"], "argument --threads: must be a positive int, got '0'"),
        (["--lr", "0.1"], "argument --lr: must be OPTIMIZER=RATE, got '0.1'"),
        (["--lr", "sgd=fast"], "argument --lr: must be a positive float, got 'fast'"),
        (["--lr", "adam=0.1"], "argument --lr: 'adam' is not among --optimizers"),
        (["--tune", "none"], "argument --tune: invalid choice"),
        (["--out", __file__], "argument --out: "),
    ],
)
def test_bad_arguments_are_named(changes, message, tmp_path, capsys):
    good = ["--problem", "digits", "--optimizers", "sgd", "--out", str(tmp_path)]
    with pytest.raises(SystemExit) as stopped:
        program.main([*good, *changes])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.replace("\n", " ")


def test_an_optimizer_that_cannot_be_imported_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(METHODS, "acp", replace(METHODS["acp"], build=methods._fused_so("Missing")))
    monkeypatch.setitem(__import__("sys").modules, "fused_so", None)
    with pytest.raises(SystemExit) as stopped:
        program.main(["--problem", "digits", "--optimizers", "acp", "--out", str(tmp_path)])
    assert stopped.value.code == 2
    assert "argument --optimizers: 'acp' cannot be used here" in capsys.readouterr().err
