"""What `bench.gpu` leaves behind: one JSON file and one short table."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bench.gpu import Part


def write(path: Path, text: str) -> None:
    """All of it or nothing: a process killed while it writes leaves what was there."""
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(text)
    os.replace(unfinished, path)


def write_json(out: Path, machine: dict[str, Any], parts: Sequence[Part]) -> None:
    results = {
        "machine": machine,
        "parts": {
            part.name: {
                "status": part.status,
                "seconds": round(part.seconds, 1),
                "limit": round(part.limit, 1),
                "missing": part.missing,
                "output": "" if part.passed else part.output,
                **_rows(part),
            }
            for part in parts
        },
    }
    write(out / "gpu.json", json.dumps(results, indent=1) + "\n")


def _rows(part: Part) -> dict[str, Any]:
    """Rows as they came, but of tests only how many passed and what the others said."""
    if not part.rows or "test" not in part.rows[0]:
        return {"rows": part.rows}
    counts = Counter(row["outcome"] for row in part.rows)
    return {"tests": counts, "rows": [row for row in part.rows if row["outcome"] != "passed"]}


def table(machine: dict[str, Any], parts: Sequence[Part]) -> str:
    """The parts, the ops and the steps, as lines of text."""
    lines = [
        ", ".join(
            f"{key} {machine[key]}"
            for key in ("gpu", "driver", "torch", "cuda", "triton", "python", "commit", "date")
            if machine.get(key)
        ),
        "",
    ]
    for part in parts:
        counts = Counter(row["outcome"] for row in part.rows if "test" in row)
        tests = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))
        lines.append(f"{part.name:<24}{part.status:<12}{part.seconds:>6.0f} s  {tests}".rstrip())
    rates = [row for part in parts for row in part.rows if "copy_gbytes" in row]
    # A size that was timed again, beside compiled baselines too, is shown as it came out then.
    ops = list({row["op"]: row for part in parts for row in part.rows if "op" in row}.values())
    steps = [row for part in parts for row in part.rows if "optimizer" in row]
    if ops:
        lines += ["", *_op_lines(ops)]
    tuned = [row for part in parts for row in part.rows if "choices" in row]
    if tuned:
        lines += ["", *_tuned_lines(tuned)]
    for part in parts:
        for row in part.rows:
            if "failed" in row:
                lines.append(f"failed: {row['failed']}: {row['error'].splitlines()[0]}")
    late = [row["not_timed"] for part in parts for row in part.rows if "not_timed" in row]
    if late:
        lines.append(f"no time was left for: {', '.join(dict.fromkeys(late))}")
    references = [row["op"].split()[0] for row in ops if row["kernel"] is False]
    if references:
        lines.append(f"ran on the reference: {', '.join(dict.fromkeys(references))}")
    if rates:
        lines += ["", _rate_line(rates)]
    if steps:
        lines += ["", *_step_lines(steps)]
    return "\n".join(lines)


def _op_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    lines = [
        f"{'op':<46}{'ms':>9}{'kernels':>9}{'PyTorch':>9}{'ratio':>8}{'limit':>7}{'error':>9}  best"
    ]
    for row in rows:
        kernels = f"{row['graph_ms']:.4f}" if row["graph_ms"] else "-"
        best = f"{row['best_pytorch_ms']:.4f}" if row["best_pytorch"] else "-"
        ratio = f"{row['ratio']:.2f}x" if row["ratio"] else "-"
        lines.append(
            f"{row['op']:<46}{row['ms']:>9.4f}{kernels:>9}{best:>9}{ratio:>8}"
            f"{row['share_of_limit']:>7.0%}{row['difference']:>9.1e}  {row['best_pytorch']}"
        )
    return lines


def _tuned_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    lines = [f"{'op':<46}{'ms':>9}{'tuned':>9}{'ratio':>8}  tiles"]
    for row in rows:
        lines.append(
            f"{row['tuned']:<46}{row['ms']:>9.4f}{row['tuned_ms']:>9.4f}"
            f"{row['ratio']:>7.2f}x  {'; '.join(row['choices'])}"
        )
    return lines


def _rate_line(rows: Sequence[dict[str, Any]]) -> str:
    """The best of what the parts measured, each for itself."""
    best = {}
    for row in rows:
        for key, value in row.items():
            best[key] = max(value, best.get(key, 0))
    products = ", ".join(
        f"{key.removeprefix('product_').removesuffix('_tflops')} {value:.0f}"
        for key, value in best.items()
        if key.startswith("product_")
    )
    return f"copy {best['copy_gbytes']:.0f} GB/s; products in TFLOP/s: {products}"


def _step_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    batches = sorted({row["batch"] for row in rows})
    cells = {(row["optimizer"], row["batch"]): row for row in rows}
    lines = [f"{'a step':<12}" + "".join(f"{f'batch {batch}':>20}" for batch in batches)]
    for name in dict.fromkeys(row["optimizer"] for row in rows):
        line = f"{name:<12}"
        for batch in batches:
            row = cells.get((name, batch))
            cell = f"{row['ms']:.3f} ms {row['times_sgd']:.2f}x" if row else "-"
            line += f"{cell:>20}"
        lines.append(line)
    return lines
