"""`graftwork new`: what it writes works, for every kind."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner

from graftwork.cli import main
from graftwork.contracts import KINDS
from graftwork_registry import Catalog


def written(kind: str, folder: Path, name: str = "acme-thing") -> Path:
    done = CliRunner().invoke(main, ["new", kind, name, "--into", str(folder)])
    assert done.exit_code == 0, done.output
    return folder / f"graftwork-{name}"


@pytest.mark.parametrize("kind", KINDS)
def test_the_new_component_is_found_and_ready(kind: str, tmp_path: Path) -> None:
    package = written(kind, tmp_path)
    catalog = Catalog.discover(files=[package / "graftwork_acme_thing.py"], disable=["*"])
    (plugin,) = [plugin for plugin in catalog.plugins() if plugin.state != "disabled"]
    assert (plugin.state, plugin.sentence) == ("ok", "")
    row = catalog.row(kind, "acme-thing")
    assert row.ready
    assert row.summary in (package / "README.md").read_text(encoding="utf-8")


def test_the_tests_of_the_new_packages_pass(tmp_path: Path) -> None:
    packages = [str(written(kind, tmp_path, f"acme-{kind.replace('_', '-')}")) for kind in KINDS]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*packages, *filter(None, sys.path)])}
    arguments = ["-q", "-W", "error", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), *packages]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert done.stdout.count(".") >= 2 * len(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_the_new_package_declares_its_plugin_and_leaves_no_blank(kind: str, tmp_path: Path) -> None:
    package = written(kind, tmp_path, "a2-b")
    project = tomllib.loads((package / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["name"] == "graftwork-a2-b"
    assert project["project"]["entry-points"] == {"graftwork.plugins": {"a2-b": "graftwork_a2_b"}}
    assert project["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"] == ["graftwork_a2_b.py"]
    for file in package.iterdir():
        assert "$" not in file.read_text(encoding="utf-8")
    compile((package / "graftwork_a2_b.py").read_text(encoding="utf-8"), "module", "exec")


@pytest.mark.parametrize("name", ["model", "data", "record", "any", "kinds", "vision"])
def test_no_name_collides_with_what_the_module_imports(name: str, tmp_path: Path) -> None:
    for kind in KINDS:
        file = written(kind, tmp_path / kind, name) / f"graftwork_{name}.py"
        catalog = Catalog.discover(files=[file], disable=["*"])
        assert catalog.names(kind) == [name]


@pytest.mark.parametrize("name", ["Acme", "2fast", "a_b", "a--b", "-a", "ä", ""])
def test_a_name_that_is_none_is_refused(name: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["new", "--into", str(tmp_path), "--", "peft", name])
    assert done.exit_code == 1
    assert "lower case with hyphens" in done.stderr
    assert not list(tmp_path.iterdir())


def test_nothing_is_written_over(tmp_path: Path) -> None:
    package = written("peft", tmp_path)
    (package / "README.md").write_text("mine")
    done = CliRunner().invoke(main, ["new", "peft", "acme-thing", "--into", str(tmp_path)])
    assert done.exit_code == 1
    assert "exists already" in done.stderr
    assert (package / "README.md").read_text() == "mine"
