"""The experiment on the order of the data, on few and short runs."""

from __future__ import annotations

import json

import pytest
import torch

from bench import order as program


@pytest.fixture(scope="module")
def data():
    return program.Digits()


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(program, "BATCHES", 10)
    monkeypatch.setattr(program, "BATCH", 16)
    monkeypatch.setattr(program, "REPLACEMENTS", 2)
    monkeypatch.setattr(program, "RATES", (0.03, 0.3))


def test_only_the_segment_is_replaced(data, small):
    plain, labels = program.stream(data, 0, None, 0)
    assert plain.shape == (320, 64)
    assert len(plain.unique(dim=0)) == 320
    other, other_labels = program.stream(data, 0, 3, 0)
    third, _ = program.stream(data, 0, 3, 1)
    changed = (plain != other).any(dim=1).nonzero().flatten().tolist()
    assert changed == list(range(48, 64))
    assert not torch.equal(other[48:64], third[48:64])
    assert torch.equal(labels[:48], other_labels[:48])
    assert torch.equal(plain, program.stream(data, 0, None, 5)[0])
    assert not torch.equal(plain, program.stream(data, 1, None, 0)[0])


def test_examples_are_digits_moved_by_a_pixel_at_most(data):
    inputs, labels = data.examples(50, (1, 2))
    for x, label in zip(inputs.view(-1, 8, 8), labels, strict=True):
        windows = data.images[data.labels == label].unfold(1, 8, 1).unfold(2, 8, 1)
        distances = (windows.reshape(-1, 8, 8) - x).square().mean(dim=(1, 2))
        assert distances.min() < 0.02  # noise of variance 0.01


def test_the_variance_is_of_outputs_over_replacements(data, small, monkeypatch):
    outputs = iter(torch.tensor([[[0.0, 1.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]]] * 10))
    seen = []

    def train(method, lr, data, seed, segment, run):
        seen.append((segment, run))
        return next(outputs), 0.0

    monkeypatch.setattr(program, "train", train)
    found = program.variances("SGD", 0.1, data, 0, lambda: None)
    # Two runs differ by 1 in both classes of one digit of two: (0.5 + 0.5) / 2.
    assert found == [0.5] * 10
    assert seen == [(segment, run) for segment in range(10) for run in range(2)]


def test_a_step_size_of_nothing_has_no_variance(data, small):
    found = program.variances("SGD", 0.0, data, 0, lambda: None)
    assert found == [0.0] * 10


def test_methods_are_compared_at_equal_errors(data, monkeypatch):
    errors = {("SGD", 0.1): 0.3, ("SGD", 1.0): 0.2, ("natural gradient", 0.1): 0.22}
    monkeypatch.setattr(program, "RATES", (0.1, 1.0))
    monkeypatch.setattr(
        program, "train", lambda method, lr, *_: (None, errors.get((method, lr), 0.1))
    )
    rates = program.chosen_rates(data, 0, lambda: None)
    assert rates == {"SGD": 1.0, "natural gradient": 0.1}


def test_a_short_run_leaves_a_file_and_a_figure(tmp_path, small, capsys):
    assert program.main(["--seeds", "2", "--out", str(tmp_path)]) == 0
    document = json.loads((tmp_path / "order.json").read_text())
    for method in program.METHODS:
        result = document["results"][method]
        assert result["lr"] in (0.03, 0.3)
        assert [len(seed["variance"]) for seed in result["seeds"]] == [10, 10]
        assert all(value > 0 for seed in result["seeds"] for value in seed["variance"])
    assert (tmp_path / "order.png").read_bytes().startswith(b"\x89PNG")
    assert "natural gradient, lr" in capsys.readouterr().out


def test_a_stopped_run_goes_on_where_it_was(tmp_path, small, monkeypatch):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert program.main(["--seeds", "2", "--out", str(whole)]) == 0
    calls, train = [], program.train

    def counted(*arguments):
        calls.append(arguments)
        if len(calls) == 4 + 21 + 30:  # rates, the first seed of one method, half of the other's
            raise KeyboardInterrupt
        return train(*arguments)

    monkeypatch.setattr(program, "train", counted)
    with pytest.raises(KeyboardInterrupt):
        program.main(["--seeds", "2", "--out", str(stopped)])
    calls[:] = [()] * 1000
    assert program.main(["--seeds", "2", "--out", str(stopped)]) == 0
    assert len(calls) == 1000 + 2 * 2 * 21 - 2 * 21  # two of the four were finished
    results = [json.loads((out / "order.json").read_text())["results"] for out in (whole, stopped)]
    assert results[0] == results[1]


def test_results_of_another_experiment_are_not_continued(tmp_path, small, monkeypatch):
    assert program.main(["--seeds", "1", "--out", str(tmp_path)]) == 0
    assert set(program.finished(tmp_path / "order.json")) == set(program.METHODS)
    monkeypatch.setattr(program, "RATES", (0.3,))
    assert program.finished(tmp_path / "order.json") == {}
    assert program.finished(tmp_path / "no.json") == {}


def test_bad_arguments_are_named(capsys):
    with pytest.raises(SystemExit):
        program.main(["--seeds", "0"])
    assert "argument --seeds: must be a positive int, got '0'" in capsys.readouterr().err
