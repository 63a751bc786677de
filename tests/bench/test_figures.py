"""Figures and README's table, from files whose numbers are known."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from bench import figures as program
from bench.evidence import Plan
from bench.report import curves
from bench.training import Budget, Run

ROOT = Path(__file__).parents[2]
MACHINE = {"cpu": "a cpu", "threads": 2, "torch": "2.13", "commit": "0123456789"}
SETTINGS = {"adam": {"lr": 0.0012345}, "acp": {"lr": 0.5}, "cgd": {"lr": 0.1}, "sgd": {"lr": 0.2}}


@pytest.fixture
def evidence(tmp_path):
    """One problem; a run is at the errors given after 1, 2, ... seconds and 10, 20, ... updates."""
    plan = Plan(Budget(1, "seconds"), Budget(3, "seconds"), {"adam": Budget(4, "seconds")})
    errors = {
        ("adam", "tuned"): [[8, 6, 5], [8, 6, 4.5], [8, 7, 5.5]],
        ("adam", "longer"): [[8, 6, 5, 4], [8, 6, 5, 3], [8, 6, 5, 2]],
        ("acp", "tuned"): [[3, 2, 1.5], [4, 3, 1.2], [4, 2, 1]],
        ("acp", "default"): [[4, 4, 3], [4, 4, 3.5], [4, 3.1, 2]],
        ("cgd", "tuned"): [[8, 7, 6], [8, 7, 6], [8, 7]],
        ("sgd", "tuned"): [[8, 7, 6.5], [8, 7, 6.5], [8, 7, 6.5]],
    }
    index = {method: {"hyperparameters": setting} for method, setting in SETTINGS.items()}
    for (method, role), seeds in errors.items():
        for seed, values in enumerate(seeds):
            setting = SETTINGS[method] if role != "default" else {}
            run = Run(method, seed, setting, {"lr": 1.0, **setting})
            for step, error in enumerate([20, *values]):
                run.record(
                    seconds=float(step), updates=10 * step, train_error=error, test_error=error
                )
            run.diverged = len(values) == 2
            file = tmp_path / "digits" / method / f"{role}-{seed}.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            document = {"run": asdict(run), "machine": MACHINE, "error_name": "squared error"}
            file.write_text(json.dumps(document))
            index[method].setdefault(role, []).append(file.name)
    whole = {"problem": "digits", "plan": asdict(plan), "methods": index}
    (tmp_path / "digits" / "index.json").write_text(json.dumps(whole))
    return tmp_path


def test_the_table_says_what_the_files_say(evidence):
    (results,) = program.read(evidence)
    assert program.targets(results) == [
        (5, "tuned Adam's after 3 s"),
        (3, "tuned Adam's after 4 s"),
    ]
    text, _, header, rule, *rows, _, untuned = program.table(results).splitlines()
    assert text == (
        "`digits`, squared error; to reach: tuned Adam's after 3 s, 5 and tuned Adam's after 4 s, "
        "3 (6 trials of 1 s a method, batch 256, medians [ranges] over seeds; a cpu, 2 threads, "
        "torch 2.13, commit 0123456):"
    )
    assert header == (
        "| method | setting | trained for | training error | seconds to 5 | updates "
        "| seconds to 3 | updates |"
    )
    assert rule.count("---") == header.count("|") - 1 == 8
    assert rows == [
        "| `acp` | tuned: lr 0.5 | 3 s | 1.2 [1, 1.5] "
        "| 1 [1, 1] | 10 [10, 10] | 2 [1, 2] | 20 [10, 20] |",
        "| `adam` | tuned: lr 0.0012 | 4 s | 3 [2, 4] "
        "| 3 [3, 3] | 30 [30, 30] | 4 [4, never] | 40 [40, never] |",
        "| `acp` | its defaults | 3 s | 3 [2, 3.5] "
        "| 1 [1, 1] | 10 [10, 10] | 3 [3, never] | 30 [30, never] |",
        "| `adam` | tuned: lr 0.0012 | 3 s | 5 [4.5, 5.5] "
        "| 3 [3, never] | 30 [30, never] | never | never |",
        "| `cgd` | tuned: lr 0.1 | 3 s | 6 [6, diverged] | never | never | never | never |",
        "| `sgd` | tuned: lr 0.2 | 3 s | 6.5 [6.5, 6.5] | never | never | never | never |",
    ]
    # At an error of 3 after 3 s, and after 2 s.
    assert untuned == (
        "Seconds of the defaults over those of the tuned setting, to the larger of their two "
        "final errors (or 1e-07, below which is rounding): `acp` 1.5."
    )


def changed(evidence, method, role, **changes):
    """What `_untuned` says if the files of these runs hold something else."""
    for file in (evidence / "digits" / method).glob(f"{role}-*.json"):
        document = json.loads(file.read_text())
        document["run"] |= changes
        file.write_text(json.dumps(document))
    return program._untuned(program.read(evidence)[0])


def test_a_setting_is_not_compared_with_itself_or_with_a_diverged_one(evidence):
    assert changed(evidence, "acp", "default", settings={"lr": 0.5})[-1].endswith(
        "below which is rounding): `acp` the same setting."
    )
    settings = {"lr": 1.0}
    assert changed(evidence, "acp", "default", settings=settings, diverged=True) == []


def test_errors_below_rounding_count_as_equal(evidence):
    for role, seconds in (("tuned", [0.0, 1.0, 2.0, 3.0]), ("default", [0.0, 1.0, 3.0, 4.0])):
        final = 0.0 if role == "tuned" else 1e-9
        errors = [20, 1, 1e-8, final]
        curve = {"seconds": seconds, "updates": seconds, "train_error": errors}
        (*_, line) = changed(evidence, "acp", role, curve=curve)
    # 3 s to 2 s; to 1e-9 it would be 4 s to 3 s.
    assert line.endswith("`acp` 1.5.")


def test_where_all_diverged_there_is_nothing_to_reach(evidence):
    for method, role in (("adam", "*"), ("acp", "*"), ("cgd", "*"), ("sgd", "*")):
        changed(evidence, method, role, diverged=True)
    file = evidence / "digits" / "index.json"
    index = json.loads(file.read_text())
    del index["methods"]["adam"]
    file.write_text(json.dumps(index))
    (results,) = program.read(evidence)
    assert program.targets(results) == []
    text, _, header, *_ = program.table(results).splitlines()
    assert "to reach: nothing (6 trials" in text
    assert header == "| method | setting | trained for | training error |"


def test_without_adam_the_slowest_method_sets_the_target(evidence):
    file = evidence / "digits" / "index.json"
    index = json.loads(file.read_text())
    del index["methods"]["adam"]["longer"]
    file.write_text(json.dumps(index))
    assert program.targets(program.read(evidence)[0]) == [(5, "tuned Adam's after 3 s")]
    del index["methods"]["adam"]
    file.write_text(json.dumps(index))
    assert program.targets(program.read(evidence)[0]) == [(6.5, "tuned sgd's after 3 s")]


def test_figures_name_their_files(evidence, capsys):
    assert program.main(["--evidence", str(evidence)]) == 0
    folder = evidence / "digits"
    # ubp and kfac have fewer than two methods here.
    assert {file.stem for file in folder.glob("*.png")} == {"centering", "all", "published"}
    assert (folder / "centering.png").read_bytes().startswith(b"\x89PNG")
    document = json.loads((folder / "centering.json").read_text())
    assert document["left_out"] == ["mean_only_bn"]
    assert document["files"] == {
        "sgd, lr 0.2": [f"sgd/tuned-{seed}.json" for seed in range(3)],
        "cgd, lr 0.1": [f"cgd/tuned-{seed}.json" for seed in range(3)],
    }
    for files in document["files"].values():
        assert all((folder / file).is_file() for file in files)
    assert program.BEGIN in capsys.readouterr().out


def test_an_error_of_zero_is_drawn_below_all_others():
    run = Run("sgd", 0, {})
    for step, error in enumerate((4.0, 2.0, 0.0)):
        run.record(seconds=float(step), updates=step, train_error=error, test_error=error)
    drawing = curves({"sgd": [run]}, "title", "error rate (%)", 128, MACHINE)
    line = drawing.axes[0].lines[0]
    assert line.get_ydata() == pytest.approx([4.0, 2.0, 1e-9])
    run.curve["train_error"][2] = 1.0
    limits = curves({"sgd": [run]}, "title", "error", 128, MACHINE).axes[0].get_ylim()
    assert limits == pytest.approx((0.8, 3.0))


def test_the_block_is_replaced_and_nothing_else(evidence, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n\n{program.BEGIN}\nold\n{program.END}\n\nafter\n")
    arguments = ["--evidence", str(evidence), "--readme", str(readme)]
    assert program.main(arguments) == 0
    text = readme.read_text()
    assert text == f"before\n\n{program.block(evidence)}\n\nafter\n"
    assert "old" not in text
    assert program.main(arguments) == 0
    assert readme.read_text() == text


def test_readme_says_what_the_committed_files_say():
    text = (ROOT / "README.md").read_text()
    assert program.with_block(text, program.block(ROOT / "bench/results/evidence")) == text


@pytest.mark.parametrize(
    "text", ["", program.BEGIN, program.END + program.BEGIN, 2 * (program.BEGIN + program.END)]
)
def test_a_readme_without_the_comments_is_refused(text):
    with pytest.raises(ValueError, match="README must have the line"):
        program.with_block(text, "new")


def test_bad_arguments_are_named(evidence, tmp_path, capsys):
    for arguments, message in (
        (["--evidence", str(tmp_path / "none")], "argument --evidence: no finished runs in"),
        (["--evidence", str(evidence), "--readme", str(tmp_path / "none")], "argument --readme:"),
    ):
        with pytest.raises(SystemExit):
            program.main(arguments)
        assert message in capsys.readouterr().err.replace("\n", " ")


def test_a_search_without_runs_is_no_result(tmp_path):
    (tmp_path / "digits").mkdir()
    index = {"problem": "digits", "plan": {}, "methods": {"sgd": {"trial": ["trial00.json"]}}}
    (tmp_path / "digits" / "index.json").write_text(json.dumps(index))
    assert program.read(tmp_path) == []
