"""Every skip and expected failure among the tests, with its reason. A new one without a reason fails here."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parent
MARKS = re.compile(r"\b(pytest\.skip|importorskip|mark\.skip|mark\.skipif|mark\.xfail|pytest\.xfail)\b")

LEDGER: dict[str, str] = {}
"""Test file -> why it skips."""


def skipping_files() -> set[str]:
    files = (path for path in TESTS.rglob("*.py") if path != Path(__file__))
    return {path.relative_to(TESTS).as_posix() for path in files if MARKS.search(path.read_text())}


def test_every_skip_has_its_reason() -> None:
    assert skipping_files() == set(LEDGER)


def test_the_pattern_finds_skips() -> None:
    assert MARKS.search("@pytest." + "mark." + "skipif(True)")
