"""bench.gpu without a GPU: its baselines compute what the ops do, and no part stops another."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch

from bench import gpu, gpu_cases, gpu_memory_check, gpu_ops, gpu_report, gpu_steps
from bench.bench_steps import OPTIMIZERS
from bench.environment import environment
from bench.gpu import Part
from fused_so import _extension
from fused_so.triton_kernels import _autotune

CPU = torch.device("cpu")
CASES = [(op, case) for op in gpu.OPS for case in gpu_cases.CASES[op]()]


def small(cases, most=2**22):
    """Those whose least operations a CPU does at once."""
    return [(op, case) for op, case in cases if case.flops < most * 64]


# The cases.


def test_every_op_is_timed_from_32_to_8192():
    assert set(gpu.OPS) == set(gpu_cases.CASES)
    for op in gpu.OPS:
        names = [case.name for case in gpu_cases.CASES[op]()]
        assert len(set(names)) == len(names)
        assert any("32" in name for name in names), op
        assert any("8192" in name for name in names), op


@pytest.mark.parametrize(("op", "case"), small(CASES), ids=lambda x: getattr(x, "name", x))
def test_baselines_compute_what_the_op_does(op, case):
    results = []
    for function in (case.ours, *case.baselines):
        torch.manual_seed(0)
        results.append([x.double() for x in gpu_cases.tensors(function(*case.inputs(CPU)))])
    mine, *others = results
    # A product of bfloat16 rounds its deviations and its result.
    bound = 0.02 if case.dtype == torch.bfloat16 else 1e-4
    for theirs in others:
        assert len(theirs) == len(mine) > 0
        for x, y in zip(mine, theirs, strict=True):
            assert (x - y).abs().max() <= bound * y.abs().max()


def test_a_baseline_that_is_wrong_is_seen():
    (case,) = (case for _, case in CASES if case.name == "precondition 32 x 32")
    right = gpu_ops.difference(case, CPU)
    assert right < 1e-5
    wrong = gpu_cases.Case(**{**vars(case), "baselines": (lambda gw, gb, m, a: (gw, gb),)})
    assert gpu_ops.difference(wrong, CPU) > 0.1


def test_bytes_and_operations():
    by_name = {case.name: case for _, case in CASES}
    assert by_name["covariance_ float32 n 8192, d 1024"].flops == 8192 * 1024 * 1025
    assert by_name["covariance_ bfloat16 n 128, d 32"].bytes == 2 * 128 * 32 + 8 * 32 * 32
    assert by_name["precondition 32 x 32"].bytes == 3 * 4 * 32 * 32
    assert by_name["damped_inverse 8 x 1000"].flops == 8 * 1000**3
    for _, case in small(CASES):
        inputs = gpu_cases.tensors(case.inputs(CPU))
        assert case.bytes >= sum(x.nbytes for x in inputs) * 0.3, case.name


# The timing.


def test_sets_of_inputs_are_larger_than_the_cache():
    (case,) = (case for _, case in CASES if case.name == "precondition 256 x 256")
    size = sum(x.nbytes for x in case.inputs(CPU))
    sets = gpu_ops.sets_of_inputs(case, CPU, 4 * size)
    assert len(sets) == 12
    addresses = {x.data_ptr() for inputs in sets for x in inputs}
    assert len(addresses) == 12 * 4
    assert len(gpu_ops.sets_of_inputs(case, CPU, 0)) == 2
    assert len(gpu_ops.sets_of_inputs(case, CPU, 10**9)) == gpu_ops.MOST_SETS


def test_calls_take_turns_and_rotate(monkeypatch):
    monkeypatch.setattr(gpu_ops, "SECONDS_A_CANDIDATE", 0.001)
    seen = {"a": [], "b": []}
    sets = [(torch.full((1,), float(i)),) for i in range(3)]
    candidates = {name: lambda x, log=log: log.append(int(x)) for name, log in seen.items()}
    medians = gpu_ops.interleave(candidates, sets)
    assert set(medians) == {"a", "b"}
    for log in seen.values():
        # Warm-up takes sets 0 and 1, the first estimate 2, 0 and 1, and then they go round.
        assert log[:5] == [0, 1, 2, 0, 1]
        assert {0, 1, 2} == set(log[5:])


def test_a_row_from_its_medians():
    (case,) = (case for _, case in CASES if case.name == "precondition 1000 x 784")
    rates = {"copy_gbytes": 4000.0, "product_float32_tflops": 100.0}
    row = gpu_ops.row_of(case, {"ours": 0.05, "one": 0.2, "two": 0.1}, rates)
    assert row["best_pytorch"] == "two"
    assert row["ratio"] == 2.0
    assert row["pytorch_ms"] == {"one": 0.2, "two": 0.1}
    flops = 2 * 1000 * 784**2
    assert row["limit_ms"] == pytest.approx(flops / 100e12 * 1e3)
    assert row["share_of_limit"] == pytest.approx(row["limit_ms"] / 0.05)
    assert row["tflops"] == pytest.approx(flops / 0.05e-3 / 1e12)
    # With slower memory it is the bytes that bind.
    slow = gpu_ops.row_of(case, {"ours": 0.05, "one": 0.1}, rates | {"copy_gbytes": 1.0})
    assert slow["limit_ms"] == pytest.approx(case.bytes / 1e9 * 1e3)


@pytest.fixture
def rows_file(tmp_path, monkeypatch):
    file = tmp_path / "rows.jsonl"
    monkeypatch.setenv("FUSED_SO_ROWS", str(file))
    return lambda: [json.loads(line) for line in file.read_text().splitlines()]


def quick(monkeypatch, *cases):
    monkeypatch.setattr(gpu_ops, "SECONDS_A_CANDIDATE", 0.001)
    monkeypatch.setitem(gpu_cases.CASES, "precondition", lambda: iter(cases))


def test_an_op_is_timed_and_a_size_that_fails_does_not_stop_the_next(rows_file, monkeypatch):
    (case,) = (case for _, case in CASES if case.name == "precondition 32 x 32")

    def out_of_memory(*_):
        raise RuntimeError("CUDA out of memory")

    broken = gpu_cases.Case(**{**vars(case), "name": "broken", "inputs": out_of_memory})
    quick(monkeypatch, broken, case)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    assert gpu_ops.time_op("precondition", CPU, 0) is False
    rates, *rows = rows_file()
    assert rates["copy_gbytes"] > 0
    assert rates["product_float32_tflops"] >= rates["product_tf32_tflops"] / 3
    eager_failed, eager, compiled_failed, compiled = rows
    assert eager_failed == compiled_failed == {
        "failed": "broken", "error": "CUDA out of memory", "kernel": True,
    }  # fmt: skip
    assert eager["op"] == compiled["op"] == "precondition 32 x 32"
    assert set(eager["pytorch_ms"]) == {"precondition_plain"}
    assert set(compiled["pytorch_ms"]) == {"precondition_plain", "precondition_plain, compiled"}
    assert eager["kernel"] is True
    assert eager["graph_ms"] is None
    assert eager["difference"] < 1e-5


def test_what_there_is_no_time_for_is_said(rows_file, monkeypatch):
    (case,) = (case for _, case in CASES if case.name == "precondition 32 x 32")
    quick(monkeypatch, case)
    monkeypatch.setattr(gpu_ops, "seconds_left", lambda: 5.0)  # for eager, not for compiling
    assert gpu_ops.time_op("precondition", CPU, 0) is True
    _, eager, compiled = rows_file()
    assert eager["op"] == "precondition 32 x 32"
    assert compiled == {"not_timed": "precondition 32 x 32", "compiled": True}


def test_what_a_search_gains(rows_file, monkeypatch):
    (case,) = (case for _, case in CASES if case.name == "precondition 32 x 32")
    seen = []

    def ours(*inputs):
        seen.append(_extension.AUTOTUNE)
        if seen[-1]:
            _autotune.choices.setdefault("precondition", ("a", "tile"))
        return case.ours(*inputs)

    def out_of_memory(*_):
        raise RuntimeError("CUDA out of memory")

    broken = gpu_cases.Case(**{**vars(case), "name": "broken", "inputs": out_of_memory})
    quick(monkeypatch, broken, gpu_cases.Case(**{**vars(case), "ours": ours}))
    monkeypatch.setattr(_autotune, "choices", {"another size": "another tile"})
    assert gpu_ops.time_tuned("precondition", CPU, 0) is False
    failed, row = rows_file()
    assert failed == {"failed": "broken, tuned", "error": "CUDA out of memory"}
    assert row["tuned"] == case.name
    assert row["choices"] == ["('a', 'tile')"]
    assert row["ratio"] == row["ms"] / row["tuned_ms"]
    # The search comes first, then calls without it and with it, by turns.
    assert seen[:3] == [True, False, False]
    assert True in seen[3:]
    assert _extension.AUTOTUNE is False
    monkeypatch.setattr(gpu_ops, "seconds_left", lambda: 5.0)
    assert gpu_ops.time_tuned("precondition", CPU, 0) is True
    assert rows_file()[-1] == {"not_timed": case.name, "tuned": True}


def test_steps_of_every_optimizer():
    medians = gpu_steps.time_steps(4, CPU, steps=10, rounds=1)
    rows = gpu_steps.rows_of(4, medians)
    names = [row["optimizer"] for row in rows]
    assert names == list(OPTIMIZERS)
    assert min(row["times_sgd"] for row in rows[:2]) == 1.0
    assert all(row["ms"] > 0 for row in rows)
    ratios = {row["optimizer"]: row["times_sgd"] for row in gpu_steps.rows_of(
        8, {"sgd": 2.0, "sgd fused": 4.0, "acp": 5.0}
    )}  # fmt: skip
    assert ratios == {"sgd": 1.0, "sgd fused": 2.0, "acp": 2.5}


@pytest.mark.parametrize(("seconds", "rounds"), [(0.0, 1), (float("inf"), 4)])
def test_rounds_of_steps_end_when_their_time_does(monkeypatch, seconds, rounds):
    taken = []
    monkeypatch.setattr(gpu_steps, "OPTIMIZERS", {"sgd": None})
    monkeypatch.setattr(gpu_steps, "stepper", lambda name, x: lambda: taken.append(name))
    medians = gpu_steps.time_steps(4, CPU, steps=20, rounds=4, seconds=seconds)
    assert set(medians) == {"sgd"}
    assert len(taken) == 20 * (1 + rounds)  # and those of the warm-up


def test_the_commit_of_a_copy_without_git(monkeypatch):
    monkeypatch.setenv("FUSED_SO_COMMIT", "abc")
    assert environment()["commit"] == "abc"
    monkeypatch.delenv("FUSED_SO_COMMIT")
    assert environment()["commit"] != "abc"


def test_what_the_sanitizer_watches_has_the_right_results():
    gpu_memory_check.check(CPU)


# The command.


def python(code, **options):
    return Part(options.pop("name", "part"), [sys.executable, "-c", code], 1.0, **options)


LEAVE = "import os; open(os.environ['FUSED_SO_ROWS'], 'a').write('{\"a\": 1}\\n');"


def run_all(tmp_path, *todo, seconds=60.0):
    said = []
    code = gpu.run_all(todo, {"gpu": "none"}, tmp_path, seconds, said.append)
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert (tmp_path / "gpu.txt").read_text() == said[-1] + "\n"
    return code, results, "\n".join(said)


def test_a_part_that_fails_or_cannot_run_does_not_stop_the_next(tmp_path):
    code, results, said = run_all(
        tmp_path,
        python("import sys; print('what went wrong'); sys.exit(3)", name="bad"),
        Part("absent", ["no-such-program-here"], 1.0),
        Part("sanitizer", ["x"], 1.0, missing="compute-sanitizer is not installed"),
        python(LEAVE + "os._exit(0)", name="good"),
        python("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", name="crash"),
    )
    assert code == 1
    statuses = {name: part["status"] for name, part in results["parts"].items()}
    assert statuses == {
        "bad": "failed", "absent": "failed", "sanitizer": "missing", "good": "passed",
        "crash": "failed",
    }  # fmt: skip
    assert "what went wrong" in results["parts"]["bad"]["output"]
    assert "no-such-program-here" in results["parts"]["absent"]["output"]
    assert results["parts"]["good"]["rows"] == [{"a": 1}]
    assert results["machine"] == {"gpu": "none"}
    assert "what went wrong" in said
    assert "compute-sanitizer is not installed" in said


def test_a_part_that_runs_over_is_ended_with_all_it_started_and_keeps_its_rows(tmp_path):
    marker = tmp_path / "alive"
    child = f"import time; time.sleep(3); open({str(marker)!r}, 'w')"
    endless = (
        LEAVE + f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}]);"
        "import time; time.sleep(1000)"
    )
    # Shares of 1 and 1 of 4 seconds: the second part has what the first one leaves.
    code, results, _ = run_all(
        tmp_path, python(endless, name="endless"), python("print(1)", name="next"), seconds=4.0
    )
    assert code == 1
    first, second = results["parts"].values()
    assert first["status"] == "over time"
    assert first["limit"] == 2.0
    assert first["rows"] == [{"a": 1}]
    assert second["status"] == "passed"
    time.sleep(2)
    assert not marker.exists()


def test_results_are_written_while_a_part_runs(tmp_path):
    written = []
    part = python(LEAVE + "import time; time.sleep(0.6)")

    def look():
        gpu_report.write_json(tmp_path, {}, [part])
        written.append(json.loads((tmp_path / "gpu.json").read_text()))

    gpu.run_part(part, 30.0, look, poll=0.05)
    assert written[0]["parts"]["part"]["rows"] == [{"a": 1}]
    assert written[0]["parts"]["part"]["status"] == "not run"
    assert part.status == "passed"


def test_a_line_that_is_still_being_written_waits(tmp_path):
    file = tmp_path / "rows"
    part = python("")
    file.write_text('{"a": 1}\n{"a"')
    assert gpu._read_rows(part, file)
    assert part.rows == [{"a": 1}]
    assert not gpu._read_rows(part, file)
    file.write_text('{"a": 1}\n{"a": 2}\n')
    assert gpu._read_rows(part, file)
    assert part.rows == [{"a": 1}, {"a": 2}]


def test_time_is_shared_and_what_is_left_over_goes_on():
    parts = [Part(str(share), [], share) for share in (1.0, 3.0)]
    absent = Part("absent", [], 4.0, missing="nothing there")
    assert gpu.share_of(100.0, parts) == 25.0
    assert gpu.share_of(90.0, parts[1:]) == 90.0
    assert gpu.share_of(-1.0, parts) == 0.0
    assert gpu.share_of(100.0, [parts[0], absent, parts[1]]) == 25.0
    assert gpu.share_of(100.0, [absent, *parts]) == 0.0


def test_the_parts_are_what_there_is_and_end_within_eight_minutes():
    todo = {part.name: part for part in gpu.parts()}
    assert list(todo)[:2] == ["build", "tests on the GPU"]
    assert todo["build"].command[1:] == ["setup.py", "build_ext", "--inplace"]
    assert todo["build"].environment["FUSED_SO_CUDA"] == "1"
    assert todo["build"].environment["PATH"] == f"{os.environ['PATH']}:/usr/local/cuda/bin"
    for op in gpu.OPS:
        assert todo[f"time {op}"].command[-2:] == ["bench.gpu_ops", op]
    assert "time steps" in todo
    for tool in ("memcheck", "racecheck"):
        assert f"--tool={tool}" in todo[tool].command
        assert (todo[tool].missing is None) == os.path.exists(todo[tool].command[0])
    assert "tests/triton_kernels" in todo["Triton tests"].command
    assert gpu.SECONDS < 8 * 60 - 10
    for path in ("tests/gpu/test_gpu.py", "tests/triton_kernels", "bench/gpu_memory_check.py"):
        assert (gpu.ROOT / path).exists()


def test_the_search_is_a_part_only_when_it_is_asked_for():
    usual, more = gpu.parts(), gpu.parts(autotune=True)
    assert [part.name for part in more[: len(usual)]] == [part.name for part in usual]
    added = {part.name: part.command[-3:] for part in more[len(usual) :]}
    assert added == {f"tune {op}": ["bench.gpu_ops", op, "--tuned"] for op in gpu.TRITON_OPS}
    kernels = gpu.ROOT / "fused_so" / "triton_kernels"
    for op in gpu.OPS:
        assert (op in gpu.TRITON_OPS) == (kernels / f"{op.removesuffix('_')}.py").exists()


def run_pytest(tmp_path, text):
    (tmp_path / "test_it.py").write_text(text)
    rows = tmp_path / "rows"
    rows.write_text("")
    command = [sys.executable, "-m", "pytest", "-p", "bench.gpu_pytest", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "--rootdir", tmp_path, "-c", os.devnull, tmp_path / "test_it.py"],
        env={**os.environ, "FUSED_SO_ROWS": str(rows)}, cwd=gpu.ROOT,
        capture_output=True, text=True,
    )  # fmt: skip
    return done.returncode, [json.loads(line) for line in rows.read_text().splitlines()]


def test_skipped_tests_are_a_failure_on_a_gpu(tmp_path):
    passing = "def test_a(): pass\n"
    code, rows = run_pytest(tmp_path, passing)
    assert code == 0
    assert [row["outcome"] for row in rows] == ["passed"]
    skipping = passing + "import pytest\n@pytest.mark.skip\ndef test_b(): pass\n"
    code, rows = run_pytest(tmp_path, skipping)
    assert code != 0
    assert [row["outcome"] for row in rows] == ["passed", "skipped"]
    code, rows = run_pytest(tmp_path, passing + "def test_c(): assert 1 == 2\n")
    assert code == 1
    assert "assert 1 == 2" in rows[-1]["message"]
    code, _ = run_pytest(tmp_path, "")
    assert code != 0


def test_gpu_tests_are_collected_with_a_gpu_only():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "tests/gpu"],
        cwd=gpu.ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert ("test_gpu.py" in done.stdout) == torch.cuda.is_available()
    assert (done.returncode == 5) == (not torch.cuda.is_available())


def test_without_a_gpu_one_line_says_what_is_missing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    out = tmp_path / "out"
    assert gpu.main(["--out", str(out)]) == 2
    expected = f"bench.gpu needs a CUDA GPU: torch {torch.__version__} is built without CUDA\n"
    assert capsys.readouterr().out == expected
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert gpu.main(["--out", str(out)]) == 2
    expected = f"bench.gpu needs a CUDA GPU: torch {torch.__version__} sees no CUDA GPU\n"
    assert capsys.readouterr().out == expected
    assert not out.exists()


# The report.


def test_the_table():
    op = {
        "op": "precondition 32 x 32", "ms": 0.05, "graph_ms": 0.01, "best_pytorch": "plain",
        "best_pytorch_ms": 0.1, "ratio": 2.0, "share_of_limit": 0.25, "difference": 1e-6,
        "kernel": False,
    }  # fmt: skip
    again = {**op, "best_pytorch": "plain, compiled", "ratio": 1.5, "graph_ms": None}
    rates = {"copy_gbytes": 4000.0, "product_float32_tflops": 150.0}
    parts = [
        Part("tests", [], 1.0, status="failed", seconds=3.0, rows=[
            {"test": "a", "outcome": "passed", "message": ""},
            {"test": "b", "outcome": "failed", "message": "wrong"},
        ]),
        Part("time precondition", [], 1.0, status="passed", rows=[rates, op, again]),
        Part("time other", [], 1.0, status="over time", rows=[
            {**rates, "copy_gbytes": 4200.0},
            {"failed": "other 64", "error": "out of memory\nat line 3", "kernel": True},
            {"not_timed": "other 8192", "compiled": True},
        ]),
        Part("tune precondition", [], 1.0, status="passed", rows=[
            {"tuned": "precondition 64 x 64", "ms": 0.2, "tuned_ms": 0.1, "ratio": 2.0,
             "choices": ["one", "two"]},
            {"not_timed": "precondition 128 x 128", "tuned": True},
        ]),
        Part("time steps", [], 1.0, status="passed", rows=[
            {"batch": 128, "optimizer": "sgd", "ms": 1.0, "times_sgd": 1.0},
            {"batch": 128, "optimizer": "acp", "ms": 1.5, "times_sgd": 1.5},
            {"batch": 512, "optimizer": "sgd", "ms": 2.0, "times_sgd": 1.0},
        ]),
    ]  # fmt: skip
    lines = gpu_report.table({"gpu": "H200", "driver": "580", "commit": "abc"}, parts).splitlines()
    assert lines[0] == "gpu H200, driver 580, commit abc"
    assert "1 failed, 1 passed" in next(line for line in lines if line.startswith("tests"))
    # A size that was timed again, beside compiled baselines, is shown once.
    (shown,) = (line for line in lines if line.startswith("precondition 32"))
    assert shown.split()[4:] == ["0.0500", "-", "0.1000", "1.50x", "25%", "1.0e-06", "plain,",
                                 "compiled"]  # fmt: skip
    assert "failed: other 64: out of memory" in lines
    assert "no time was left for: other 8192, precondition 128 x 128" in lines
    tuned = next(line for line in lines if line.startswith("precondition 64"))
    assert tuned.split()[3:] == ["64", "0.2000", "0.1000", "2.00x", "one;", "two"]
    assert "ran on the reference: precondition" in lines
    assert "copy 4200 GB/s; products in TFLOP/s: float32 150" in lines
    assert next(line for line in lines if line.startswith("acp")).split() == [
        "acp", "1.500", "ms", "1.50x", "-",
    ]  # fmt: skip


def test_tests_that_passed_are_counted_and_the_others_kept(tmp_path):
    rows = [{"test": str(i), "outcome": "passed", "message": ""} for i in range(5)]
    rows.append({"test": "b", "outcome": "failed", "message": "wrong"})
    part = Part("tests", [], 1.0, status="failed", rows=rows)
    gpu_report.write_json(tmp_path, {}, [part])
    found = json.loads((tmp_path / "gpu.json").read_text())["parts"]["tests"]
    assert found["tests"] == {"passed": 5, "failed": 1}
    assert found["rows"] == rows[-1:]
    assert [path.name for path in tmp_path.iterdir()] == ["gpu.json"]
