"""The experiment on searches, on few trainings."""

from __future__ import annotations

import json
import math

import pytest
import torch

from bench import search_experiment as program


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(program, "EXPERIMENTS", 4)
    monkeypatch.setattr(program, "UPDATES", 2)
    monkeypatch.setattr(program, "TOGETHER", 2)


def test_trainings_together_are_trainings_alone(monkeypatch):
    """Each row of a batched training equals plain PyTorch on that row's parameters and batches."""
    monkeypatch.setattr(program, "UPDATES", 3)
    images = program.digits().double()
    rates, stds = torch.tensor([0.1, 1.0, 1e-3]).double(), torch.tensor([0.3, 0.1, 1.0]).double()
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        together = program.train(images, rates, stds, torch.Generator().manual_seed(1))
        generator = torch.Generator().manual_seed(1)
        drawn = [
            torch.randn(3, a, b, generator=generator)
            for a, b in zip(program.WIDTHS, program.WIDTHS[1:], strict=False)
        ]
        rows = [
            torch.randint(len(images), (3, program.BATCH), generator=generator) for _ in range(3)
        ]
        for index in range(3):
            model = torch.nn.Sequential()
            for weight in drawn:
                linear = torch.nn.Linear(*weight.shape[1:])
                linear.weight.data = (stds[index] * weight[index]).T.clone()
                linear.bias.data.zero_()
                model.extend([linear, torch.nn.Tanh()])
            model[-1] = torch.nn.Sigmoid()
            optimizer = torch.optim.SGD(model.parameters(), lr=rates[index].item())
            for step in range(3):
                batch = images[rows[step][index]]
                optimizer.zero_grad()
                (model(batch) - batch).square().sum(1).mean().backward()
                optimizer.step()
            alone = (model(images) - images).square().sum(1).mean()
            assert together[index].item() == pytest.approx(alone.item(), rel=1e-12)
    finally:
        torch.set_default_dtype(before)


def test_divergence_is_inf():
    images = program.digits() * math.nan
    ones = torch.ones(2)
    assert program.train(images, ones, ones, torch.Generator()).tolist() == [math.inf] * 2


def test_finished_pieces_are_kept(small, tmp_path, monkeypatch, capsys):
    run = program.searches
    calls = []

    def counted(procedure, first, count, images, advance):
        calls.append((procedure, first, count))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return run(procedure, first, count, images, advance)

    monkeypatch.setattr(program, "searches", counted)
    arguments = ["--searches", "3", "--out", str(tmp_path)]
    with pytest.raises(KeyboardInterrupt):
        program.main(arguments)
    halfway = json.loads((tmp_path / "search.json").read_text())
    assert len(halfway["searches"]) == 6
    assert program.main(arguments) == 0
    order = [(name, first) for first in (0, 2) for name in ("grid", "random", "biased")]
    assert [call[:2] for call in calls] == [*order[:4], *order[3:]]
    document = json.loads((tmp_path / "search.json").read_text())
    assert document["searches"][:6] == halfway["searches"]
    assert {(one["procedure"], one["seed"]) for one in document["searches"]} == {
        (name, seed) for name in ("grid", "random", "biased") for seed in range(3)
    }
    for one in document["searches"]:
        if one["seed"] == 0:
            assert one["best"] == min(row[2] for row in one["experiments"])
            assert len(one["experiments"]) == 4
        if (one["procedure"], one["seed"]) == ("grid", 0):
            points = {(row[0], row[1]) for row in one["experiments"]}
            assert points == {(lr, std) for lr in (1e-3, 10.0) for std in (1e-2, 10.0)}
    assert (tmp_path / "search.png").read_bytes().startswith(b"\x89PNG")
    assert "| biased |" in capsys.readouterr().out
    program.main(arguments)
    assert len(calls) == 7
    # Another experiment begins anew.
    monkeypatch.setattr(program, "UPDATES", program.UPDATES + 1)
    program.main(arguments)
    assert len(calls) == 13


def test_summary_is_mean_and_deviation():
    found = [
        {"procedure": "random", "seed": seed, "best": best, "again": 2 * best}
        for seed, best in enumerate((1.0, 2.0, 3.0))
    ]
    assert program.summary(found) == {
        "random": {"mean_best": 2, "stdev_best": 1, "mean_again": 4, "stdev_again": 2}
    }


def test_bad_arguments_are_named(capsys):
    for value, message in (("0", "must be a positive int, got '0'"), ("1", "must be at least 2")):
        with pytest.raises(SystemExit):
            program.main(["--searches", value])
        assert f"argument --searches: {message}" in capsys.readouterr().err
