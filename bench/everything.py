"""Rerun all that README cites but what is of a GPU or of an earlier search: hours on two cores.

    python -m bench.everything --out results

In an empty folder that is all of it, from nothing; in one that has results, what is missing. Stage
by stage, each a command that can be given by itself; --dry-run prints them. A stage whose file is
there is not run again; those of many pieces go on piece by piece. So the same command goes on after
it was stopped. The machine should have nothing else to do. The first stage that fails ends it, with
its exit status.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

AVX2 = {
    "FUSED_SO_CPU": "avx2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "TORCHINDUCTOR_CACHE_DIR": "{out}/unfinished/inductor",
}
"""Ours, ATen, MKL and oneDNN held to AVX2; Inductor's usual cache would not notice."""
COMPARED = ("singd", "sirfshampoo", "pytorch_optimizer")


@dataclass(frozen=True)
class Stage:
    """One command; {out} stands for the folder of results.

    Attributes:
        arguments: of python.
        leaves: the file under {out} that the stage is done with; "" if the command itself knows
            what is done.
        made: the file that the command writes, if that is another one; figures move with it.
        environment: variables beside those there are.
    """

    arguments: str
    leaves: str = ""
    made: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)


def _train(name: str, problem: str, arguments: str) -> Stage:
    command = f"-m bench.train --problem {problem} {arguments} --out {{out}}/unfinished"
    return Stage(command, f"{name}.json", f"unfinished/{problem}.json")


def _bench(name: str, files: str, environment: Mapping[str, str] | None = None) -> Stage:
    command = f"-m pytest {files} -q --benchmark-json={{out}}/unfinished.json"
    return Stage(command, f"{name}.json", "unfinished.json", environment or {})


_OPS = " ".join(
    f"bench/bench_{op}.py"
    for op in (
        "apply_update", "centered_grad", "covariance", "damped_inverse", "grad_gram",
        "jacobian_backprop", "precondition",
    )
)  # fmt: skip
STAGES = (
    _bench("ops_cpu", _OPS),
    _bench("ops_avx2_cpu", _OPS, AVX2),
    _bench("steps_cpu", "bench/bench_steps.py -k 'test_steps or newton'"),
    _bench("steps_classifier_cpu", "bench/bench_steps.py -k classifier"),
    Stage("-m bench.evidence --out {out}/evidence"),
    Stage("-m bench.evidence --out {out}/evidence_centering --methods sgd,cgd,mean_only_bn,bn"),
    # As long as the runs: in 5 seconds the published libraries do not leave the mean image.
    Stage(
        "-m bench.evidence --out {out}/evidence_published --problems curves "
        "--methods adam,kfac,soap,singd,sirfshampoo --trial-budget 20s --run-budget 20s"
    ),
    Stage(
        "-m bench.evidence --out {out}/evidence_512 --problems curves --methods adam,kfac "
        "--batch-size 512 --run-budget 20s"
    ),
    Stage(
        "-m bench.evidence --out {out}/evidence_paper "
        "--methods adam,sgd,sgd_plain,ubp,ubp_plain,kfac,kfac_paper,kfac_paper_tridiagonal"
    ),
    Stage(
        "-m bench.evidence --out {out}/evidence_tridiagonal --problems curves "
        "--methods kfac,kfac_tridiagonal --trials 8 --trial-budget 200u --run-budget 200u "
        "--threads 1"
    ),
    Stage(
        "-m bench.evidence --out {out}/evidence_momentum --problems curves "
        "--methods kfac,kfac_plain --batch-size 1024 --trial-budget 100u --run-budget 300u "
        "--trials 8 --threads 1"
    ),
    _train("curves_256", "curves", "--optimizers adam_growing --seconds 60 --batch-size 256"),
    _train(
        "curves_1024", "curves", "--optimizers kfac_growing,kfac --seconds 24 --batch-size 1024"
    ),
    _train(
        "curves_tridiagonal",
        "curves",
        "--optimizers kfac,kfac_tridiagonal --updates 200 --threads 1",
    ),
    _train(
        "curves_tridiagonal_paper",
        "curves",
        "--optimizers kfac_paper,kfac_paper_tridiagonal --updates 150 --batch-size 512 --threads 1",
    ),
    _train(
        "digits_tridiagonal",
        "digits",
        "--optimizers kfac,kfac_tridiagonal --updates 300 --threads 1",
    ),
    Stage("-m bench.order --out {out}"),
    Stage("-m bench.search_experiment --out {out}"),
    Stage("-m bench.metric_inputs --out {out}"),
    *(
        Stage(f"-m bench.figures --evidence {{out}}/{name}")
        for name in (
            "evidence_512",
            "evidence_centering",
            "evidence_published",
            "evidence_paper",
            "evidence_tridiagonal",
            "evidence_momentum",
            "evidence",
        )
    ),
)


def command_of(stage: Stage, out: Path) -> list[str]:
    return [part.format(out=out) for part in shlex.split(stage.arguments)]


def variables_of(stage: Stage, out: Path) -> dict[str, str]:
    return {name: value.format(out=out) for name, value in stage.environment.items()}


def run(stage: Stage, out: Path) -> int:
    """The exit status; what a stage leaves takes its place only if it is 0."""
    process = subprocess.Popen(
        [sys.executable, *command_of(stage, out)], env={**os.environ, **variables_of(stage, out)}
    )
    try:
        status = process.wait()
    except KeyboardInterrupt:  # which the command has been told of as well
        process.wait()
        return 130
    if not status and stage.made:
        made = out / stage.made
        for one in (made, made.with_suffix(".png")):
            if one.exists():
                one.replace((out / stage.leaves).with_suffix(one.suffix))
    shutil.rmtree(out / "unfinished", ignore_errors=True)
    return status


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.everything",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("results"), help="(default: results)")
    parser.add_argument("--readme", type=Path, help="write its tables from the new evidence")
    parser.add_argument("--dry-run", action="store_true", help="print the commands that are left")
    options = parser.parse_args(argv)
    missing = [name for name in COMPARED if importlib.util.find_spec(name) is None]
    if missing and not options.dry_run:
        parser.error(f"not installed: {', '.join(missing)}; pip install -e '.[bench,test,compare]'")
    out = options.out.absolute()
    stages = list(STAGES)
    if options.readme:
        readme = shlex.quote(str(options.readme.absolute()))
        stages[-1] = Stage(f"{STAGES[-1].arguments} --readme {readme}")
    for stage in stages:
        if stage.leaves and (out / stage.leaves).exists():
            continue
        variables = "".join(f"{key}={value} " for key, value in variables_of(stage, out).items())
        print(f"{variables}python {shlex.join(command_of(stage, out))}", flush=True)
        if options.dry_run:
            continue
        out.mkdir(parents=True, exist_ok=True)
        status = run(stage, out)
        if status:
            print("stopped: the same command goes on from here", file=sys.stderr)
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
