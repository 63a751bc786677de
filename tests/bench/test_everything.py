"""The command that reruns all results: what it would run, and what it leaves."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from torch import nn

from bench import everything as program
from bench import train
from bench.evidence import ELSEWHERE
from bench.methods import METHODS
from bench.problems import PROBLEMS

ROOT = Path(__file__).parents[2]
IGNORED = ("momentum", "nesterov", "max_norm", "max_decrease", "warmup")
WRITE = "import pathlib; [pathlib.Path(r'{{out}}', n).write_text('x') for n in {names!r}]"


def stage(*names, leaves="", made=""):
    """One that writes the named files."""
    return program.Stage(f'-c "{WRITE.format(names=list(names))}"', leaves, made)


def test_a_stage_is_run_once_and_leaves_its_files_under_their_names(tmp_path, monkeypatch, capfd):
    one = stage("raw.json", "raw.png", leaves="fine.json", made="raw.json")
    monkeypatch.setattr(program, "STAGES", (one, stage("resumable")))
    assert program.main(["--out", str(tmp_path / "new")]) == 0
    found = {file.name for file in (tmp_path / "new").iterdir()}
    assert found == {"fine.json", "fine.png", "resumable"}
    assert capfd.readouterr().out.count("python -c") == 2
    # The second one knows by itself what is done.
    assert program.main(["--out", str(tmp_path / "new")]) == 0
    assert capfd.readouterr().out.count("python -c") == 1


def test_a_stage_that_fails_leaves_nothing_and_ends_it(tmp_path, monkeypatch, capfd):
    made = f"{WRITE.format(names=['raw.json'])}; raise SystemExit(3)"
    failing = program.Stage(f'-c "{made}"', "fine.json", "raw.json")
    monkeypatch.setattr(program, "STAGES", (failing, stage("later")))
    assert program.main(["--out", str(tmp_path)]) == 3
    assert {file.name for file in tmp_path.iterdir()} == {"raw.json"}
    assert "the same command goes on from here" in capfd.readouterr().err


def test_a_dry_run_prints_what_is_left(tmp_path, capsys):
    (tmp_path / "steps_cpu.json").touch()
    arguments = ["--out", str(tmp_path), "--readme", "README.md", "--dry-run"]
    assert program.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(program.STAGES) - 1
    assert not any("test_steps" in line for line in lines)
    assert lines[1].startswith("FUSED_SO_CPU=avx2 ATEN_CPU_CAPABILITY=avx2 ")
    assert lines[-1].endswith(f"--readme {Path('README.md').absolute()}")
    assert {file.name for file in tmp_path.iterdir()} == {"steps_cpu.json"}


def test_variables_of_a_stage_are_set(tmp_path, monkeypatch):
    write = "import os, pathlib; pathlib.Path(r'{out}', 'seen').write_text(os.environ['ONLY_HERE'])"
    one = program.Stage(f'-c "{write}"', environment={"ONLY_HERE": "in {out}"})
    monkeypatch.setattr(program, "STAGES", (one,))
    assert program.main(["--out", str(tmp_path)]) == 0
    assert (tmp_path / "seen").read_text() == f"in {tmp_path}"


def test_ctrl_c_waits_for_the_command_and_says_how_to_go_on(tmp_path, monkeypatch, capfd):
    class Interrupted(program.subprocess.Popen):
        def wait(self, *arguments):
            if not self.__dict__.setdefault("told", False):
                self.told = True
                raise KeyboardInterrupt
            return super().wait(*arguments)

    monkeypatch.setattr(program.subprocess, "Popen", Interrupted)
    monkeypatch.setattr(program, "STAGES", (stage("one"), stage("two")))
    assert program.main(["--out", str(tmp_path)]) == 130
    assert {file.name for file in tmp_path.iterdir()} == {"one"}
    assert "the same command goes on from here" in capfd.readouterr().err


def test_libraries_to_compare_with_must_be_there(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(program, "COMPARED", ("torch", "not_installed_anywhere"))
    with pytest.raises(SystemExit):
        program.main(["--out", str(tmp_path)])
    assert "not installed: not_installed_anywhere; pip install" in capsys.readouterr().err


@pytest.mark.parametrize("readme", ["README.md", "bench/results/README.md"])
def test_every_file_that_readme_cites_is_made(readme):
    cited = set(re.findall(r"`(?:bench/results/)?(\w+)\.json`", (ROOT / readme).read_text()))
    named = {one.leaves.removesuffix(".json") for one in program.STAGES if one.leaves}
    resumable = {"order", "search", "metric_inputs"}
    grids = {"digits_ubp", "digits_classifier"}  # rates over a grid, before there was a search
    assert cited <= named | resumable | grids
    for name in named | resumable:
        assert (ROOT / "bench/results" / f"{name}.json").exists()


def test_trainings_are_those_of_the_committed_files():
    compared = ("problem", "optimizers", "updates", "seeds", "batch_size")
    trainings = [one for one in program.STAGES if "bench.train" in one.arguments]
    assert len(trainings) == 5
    for one in trainings:
        command = program.command_of(one, Path("results"))[2:]
        now = vars(train._parser().parse_args(command))
        then = json.loads((ROOT / "bench/results" / one.leaves).read_text())
        assert {key: now[key] for key in compared} == {
            key: then["arguments"][key] for key in compared
        }, one.leaves
        # With the defaults of today.
        likelihood = PROBLEMS[now["problem"]](now["data"]).likelihood
        for run in then["runs"]:
            method, setting = METHODS[run["optimizer"]], run["hyperparameters"]
            options = method.build(nn.Linear(1, 1), likelihood, **setting).defaults
            # What KFAC's documentation says that recipe="paper" ignores.
            ignored = IGNORED if "paper" in run["optimizer"] else ()
            options = json.loads(json.dumps(options, default=str))
            for settings in (options, run["settings"]):
                for name in ignored:
                    settings.pop(name, None)
            assert options == run["settings"], one.leaves


def test_every_method_is_asked_for_by_a_stage():
    lists = re.findall(
        r"--(?:methods|optimizers) (\S+)", " ".join(one.arguments for one in program.STAGES)
    )
    assert set(ELSEWHERE) <= {name for text in lists for name in text.split(",")}


def test_every_bench_of_an_op_is_run():
    benches = {file.name for file in (ROOT / "bench").glob("bench_*.py")} - {"bench_steps.py"}
    assert set(re.findall(r"bench_\w+\.py", program.STAGES[0].arguments)) == benches
