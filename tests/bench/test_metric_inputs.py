"""The experiment on the inputs of the metric, on few updates."""

from __future__ import annotations

import json

import pytest
import torch

from bench import metric_inputs as program


def test_a_split_is_the_seed_s_and_its_parts_are_disjoint():
    first, again, other = program.split(0), program.split(0), program.split(1)
    assert torch.equal(first.labeled.inputs, again.labeled.inputs)
    assert not torch.equal(first.labeled.inputs, other.labeled.inputs)
    sizes = [len(part) for part in (first.labeled, first.validation, first.test, first.unlabeled)]
    assert sizes == [300, 200, 397, 900]
    parts = (first.labeled.inputs, first.validation.inputs, first.test.inputs, first.unlabeled)
    assert len(torch.cat(parts).unique(dim=0)) == 1797


def test_the_metric_is_of_what_the_method_says(monkeypatch):
    data = program.split(0)
    rows = {tuple(row) for row in data.labeled.inputs.tolist()}
    given = {}
    for name, (build, _) in program.METHODS.items():
        if name.startswith("metric"):
            opt = build(torch.nn.Linear(64, 10), data, 0)
            given[name] = opt.metric_inputs and next(iter(opt.metric_inputs))
    assert given["metric of the same batch"] is None
    other = {tuple(row) for row in given["metric of another batch"].tolist()}
    assert len(other) == program.BATCH
    assert other <= rows
    sizes = {"metric of unlabeled inputs": program.BATCH, "metric of all 900 unlabeled inputs": 900}
    for name, size in sizes.items():
        unlabeled = {tuple(row) for row in given[name].tolist()}
        assert len(unlabeled) == size
        assert unlabeled <= {tuple(row) for row in data.unlabeled.tolist()}
        assert not unlabeled & rows


def test_a_short_run_leaves_a_table_and_a_file(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(program, "SEARCH_SEEDS", (1000,))
    monkeypatch.setattr(
        program,
        "METHODS",
        {
            name: (build, {key: values[:1] for key, values in grid.items()})
            for name, (build, grid) in program.METHODS.items()
        },
    )
    assert program.main(["--seeds", "2", "--updates", "2", "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines] == [f"| {name}" for name in program.METHODS]
    assert lines[0].endswith("| - |")
    assert "+-" in lines[1]
    document = json.loads((tmp_path / "metric_inputs.json").read_text())
    for result in document["results"].values():
        assert len(result["runs"]) == 2
        assert len(result["search"]) == 1
        for run in result["runs"]:
            assert 0 <= run["test"] <= 1
    # What a stopped run has finished is not done again.
    last = list(program.METHODS)[-1]
    del document["results"][last]
    (tmp_path / "metric_inputs.json").write_text(json.dumps(document))
    trained, train = [], program.train
    monkeypatch.setattr(program, "train", lambda m, *rest: trained.append(m) or train(m, *rest))
    assert program.main(["--seeds", "2", "--updates", "2", "--out", str(tmp_path)]) == 0
    assert set(trained) == {last}
    assert capsys.readouterr().out.splitlines()[:-1] == lines[:-1]


def test_bad_arguments_are_named(capsys):
    with pytest.raises(SystemExit):
        program.main(["--seeds", "0"])
    assert "--seeds and --updates must be at least 1" in capsys.readouterr().err
