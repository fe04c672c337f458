"""A few hundred cases of what tests/fuzz.py tries by the thousand, and its command."""

import fuzz
import pytest


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_whatever_a_file_holds_is_read_dropped_and_counted_or_refused_by_its_name(kind, tmp_path):
    outcomes = fuzz.fuzz(kind, 50, 0, tmp_path)
    assert outcomes.total() == 50 and len(outcomes) > 1  # not refused one and all


def test_the_command_prints_what_it_tried_and_a_failure_with_its_smallest_input(
    monkeypatch, capsys
):
    def check(where, raw):
        assert b"{" not in raw
        return "read"

    assert fuzz.main(["--cases", "40", "--seed", "7", "--only", "texts"]) == 0
    assert "texts           40 cases" in capsys.readouterr().out
    monkeypatch.setitem(fuzz.KINDS, "bytes", (fuzz.st.binary(), check))
    monkeypatch.setattr(fuzz, "SHARES", {"bytes": 1})
    assert fuzz.main(["--cases", "3000", "--seed", "7"]) == 1
    printed = capsys.readouterr()
    assert "case=b'{'" in printed.err and "of --seed 7" in printed.out and "FAILED" in printed.out
