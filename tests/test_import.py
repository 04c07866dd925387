"""`import madit` and `madit --help` stay light, every public name exists, and each framework has one door."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import madit

HEAVY = ("torch", "diffusers", "nnsight", "zarr", "xarray", "transformers", "dask", "seaborn")
PACKAGE = Path(madit.__file__).parent


def loaded_by(code: str) -> set[str]:
    """Which of the heavy packages a fresh interpreter has loaded after running `code`."""
    report = f"{code}\nimport sys; print(*[m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", report], capture_output=True, text=True, check=True)
    return set(done.stderr.split())


def test_import_is_light() -> None:
    assert loaded_by("import madit; dir(madit); madit.__version__") == set()


def test_the_probe_sees_heavy_packages() -> None:
    assert "xarray" in loaded_by("import madit; madit.open_run")


def test_help_is_light() -> None:
    code = (
        "import typer.testing, madit.cli as cli\n"
        "for args in (['--help'], ['record', '--help'], ['export', 'guidance', '--help'], ['nonsense']):\n"
        "    typer.testing.CliRunner().invoke(cli.app, args)\n"
    )
    assert loaded_by(code) == set()


def test_every_public_name_resolves_to_its_home() -> None:
    homes = madit._HOMES
    assert set(madit.__all__) == set(homes) <= set(dir(madit))
    for name, home in homes.items():
        value = getattr(madit, name)
        assert value.__name__ == name
        assert value.__module__.startswith("madit."), home
        assert value.__doc__


def test_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(madit, "nonsense")


def test_diffusers_guiders_have_one_door() -> None:
    importers = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            if "guiders" in module or "BaseGuidance" in names or any("guiders" in name for name in names):
                importers.add(path.relative_to(PACKAGE).as_posix())
    assert importers == {"guider.py"}


def test_files_stay_readable() -> None:
    lengths = {p.relative_to(PACKAGE).as_posix(): len(p.read_text().splitlines()) for p in PACKAGE.rglob("*.py")}
    assert {name: n for name, n in lengths.items() if n > 400} == {}
