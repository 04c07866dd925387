"""What the documentation shows is executed: docstring examples, and the README's Python and commands."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

import madit
from madit.cli import app
from madit.zoo import small

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
LONG = {"madit.workflows.demo"}
"""Modules whose examples take minutes: `make demo` is that example."""

MODULES = sorted(
    name
    for _, name, _ in pkgutil.walk_packages(madit.__path__, "madit.")
    if not name.endswith("__main__") and name not in LONG
)


class Checker(doctest.OutputChecker):
    """Examples marked as skipped have no fixed output: they run, and what they print is not compared."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        return bool(optionflags & SHOWN) or super().check_output(want, got, optionflags)


SHOWN = doctest.register_optionflag("SHOWN")


def examples(module: str) -> list[doctest.DocTest]:
    found = doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(module))
    for test in found:
        for example in test.examples:
            if example.options.pop(doctest.SKIP, False):
                example.options[SHOWN] = True
    return [test for test in found if test.examples]


@pytest.mark.parametrize("module", MODULES)
def test_docstring_examples(module: str, workspace: Path, in_workspace: Path) -> None:
    tests = examples(module)
    known: dict[str, Any] = {}
    if tests:
        tree = madit.open_run("run.zarr")
        known = {
            "madit": madit,
            "dit": madit.DiT.from_pretrained("model"),
            "tree": tree,
            "channels": madit.ChannelSet.load("channels.json"),
            "prompts": ["a cat", "a dog", "a red circle"],
            "small_sd3": small.small_sd3,
        }
    if module in ("madit.recording", "madit.factorial"):  # these write the stores that others read
        for store in ("run.zarr", "factorial.zarr"):
            Path(store).unlink()
    runner = doctest.DocTestRunner(checker=Checker(), optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    report: list[str] = []
    for test in tests:
        test.globs = {**known, **test.globs}
        runner.run(test, out=report.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(report)


def test_the_public_functions_have_examples() -> None:
    lacking = [name for name in madit.__all__ if ">>>" not in (getattr(madit, name).__doc__ or "")]
    assert lacking == []


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_readme_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first block runs as it is; the others name models of the hub, and are compiled."""
    first, *others = blocks("python")
    assert len([line for line in first.splitlines() if line.strip()]) <= 14
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(first, "README.md", "exec"), names)
    assert len(names["channels"]) > 0
    assert names["metrics"].attrs["n"] == 2
    assert names["metrics"].high_band_power < 0.5 * madit.evaluate(names["guided"]).high_band_power
    assert len(others) == 2
    for block in others:
        compile(block, "README.md", "exec")
        used = re.findall(r"madit\.(\w+)", block)
        assert used
        assert set(used) <= set(madit.__all__)


def test_readme_commands_exist_with_these_options() -> None:
    group = typer.main.get_command(app)
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("madit ")]
    assert lines
    for line in lines:
        verb, *words = shlex.split(line)[1:]
        command = group.commands[verb]  # type: ignore[attr-defined]
        if verb == "export":
            command, words = command.commands[words[0]], words[1:]
        command.make_context(verb, words, resilient_parsing=False)


def test_readme_names_every_verb() -> None:
    group = typer.main.get_command(app)
    for verb in group.commands:  # type: ignore[attr-defined]
        assert f"`madit {verb}" in README


def test_no_machine_paths_in_the_tree() -> None:
    texts = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "pyproject.toml", ROOT / "constraints.txt"]
    assert [p.name for p in texts if re.search(r"(?<![\w.])/(home|root|tmp|work)/", p.read_text())] == []
