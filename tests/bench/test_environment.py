"""What a result says of the machine it was measured on."""

from pathlib import Path

import pytest

from bench import environment

CORE = "processor\t: {}\ncpu family\t: {}\nmodel\t\t: {}\nmodel name\t: AMD EPYC\n\n"


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        (CORE.format(0, 25, 17) + CORE.format(1, 25, 18), "AMD EPYC (family 25, model 17)"),
        ("processor\t: 0\nmodel name\t: Some CPU\n", "Some CPU"),
        ("", "a machine"),
    ],
)
def test_a_processor_is_named_with_its_generation(monkeypatch, cpuinfo, expected):
    monkeypatch.setattr(Path, "read_text", lambda self: cpuinfo)
    monkeypatch.setattr(environment.platform, "processor", lambda: "")
    monkeypatch.setattr(environment.platform, "machine", lambda: "a machine")

    assert environment._cpu_model() == expected
