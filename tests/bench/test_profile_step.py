"""The profile of a step counts what an optimizer calls."""

import pytest

from bench import profile_step


def test_the_update_is_one_call_a_step(capsys):
    assert profile_step.main(["--batch", "4", "--steps", "2", "--rows", "1000"]) == 0
    lines = {line[:50].strip(): line.split() for line in capsys.readouterr().out.splitlines()}
    assert lines["fused_so::apply_update_"][-1] == "1.00"
    assert lines["aten::addmm"][-1] == "8.00"
    assert float(lines["all ops"][-1]) > 0


def test_bad_numbers_are_refused(capsys):
    with pytest.raises(SystemExit):
        profile_step.main(["--batch", "0"])
    assert "--batch, --steps and --rows must be at least 1" in capsys.readouterr().err
