"""`pytest bench`: the --brief option, the table at the end, and what --benchmark-json records."""

import os

import pytest

from bench import measure
from bench.environment import environment

# What holds the kernels here, ATen, MKL and oneDNN to an instruction set.
VARIABLES = (
    "FUSED_SO_CPU",
    "ATEN_CPU_CAPABILITY",
    "MKL_ENABLE_INSTRUCTIONS",
    "ONEDNN_MAX_CPU_ISA",
)


def pytest_addoption(parser):
    parser.addoption(
        "--brief", action="store_true", help="few rounds and small sizes: only whether it works"
    )


def pytest_configure(config):
    measure.REPORT.brief = config.getoption("--brief")


def pytest_generate_tests(metafunc):
    # A bench's SIZES are its cases; in brief mode only the last, the smallest.
    if "size" in metafunc.fixturenames:
        sizes = metafunc.module.SIZES
        chosen = sizes[-1:] if measure.REPORT.brief else sizes
        metafunc.parametrize("size", chosen, ids=lambda size: "x".join(map(str, size)))


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config, machine_info):
    variables = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    machine_info["environment"] = {**environment(), "variables": variables}


def pytest_terminal_summary(terminalreporter):
    if measure.REPORT.rows:
        terminalreporter.section("ratio to the best ordinary PyTorch, and share of the limit")
        for line in measure.table():
            terminalreporter.write_line(line)
    if measure.REPORT.steps:
        terminalreporter.section("a training step, and how many of the faster SGD's it costs")
        for line in measure.steps_table():
            terminalreporter.write_line(line)
