"""A few cases of what bench/fuzz.py tries by the thousand, and its command."""

import pytest

from bench import fuzz


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_whatever_a_file_holds_is_read_or_counted_or_refused_by_its_name(kind, tmp_path):
    outcomes = fuzz.fuzz(kind, 50, 0, tmp_path)
    assert outcomes.total() == 50 and len(outcomes) > 1  # not all of them refused


def test_the_command_prints_outcomes_and_a_failures_smallest_input(monkeypatch, capsys):
    def check(where, raw):
        assert b"{" not in raw
        return "read"

    assert fuzz.main(["--cases", "40", "--seed", "7", "--only", "texts"]) == 0
    assert "texts           40 cases" in capsys.readouterr().out
    monkeypatch.setattr(fuzz, "KINDS", {"bytes": (1, fuzz.st.binary(), check)})
    assert fuzz.main(["--cases", "3000", "--seed", "7"]) == 1
    printed = capsys.readouterr()
    assert "case=b'{'" in printed.err and "of --seed 7" in printed.out and "FAILED" in printed.out
