"""The command line: what `list`, `show` and `schema` say, how errors end, and how fast it starts."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from graftwork import __version__
from graftwork.cli import COMMANDS, main

ROOT = Path(__file__).parent.parent
PLUGIN = '''
from dataclasses import dataclass, field
from graftwork import Requires, hookimpl, setting
from graftwork.contracts.data import DataSource
from graftwork.contracts.kinds import Evaluator

@dataclass(frozen=True)
class FilesSettings:
    path: str = setting("here", "Where the files are")
    most: int | None = setting(None, "How many of them are read", minimum=1)

class Files(DataSource[FilesSettings]):
    """Acme's files, read one after another, each with its records in the order in which they were written.

    They are read slowly.
    """
    name = "acme-files"
    Settings = FilesSettings
    def records(self): return iter(())
    def validate(self, plan):
        """to plans that have [no] path"""
        return ()

class Quiz(Evaluator):
    """Acme's quiz."""
    name = "acme-quiz"
    requires = Requires(packages=("no-such-package>=2", "no-other-package"))
    def records(self): return ()
    def score(self, record, answer): ...

def fail():
    raise RuntimeError("no default today")

@dataclass(frozen=True)
class BadSettings:
    number: int = field(default_factory=fail)

class Bad(DataSource):
    """A source with a bug."""
    name = "acme-bad"
    Settings = BadSettings
    def records(self): return iter(())

@hookimpl
def data_sources(): return [Bad, Files]

@hookimpl
def evaluators(): return [Quiz]
'''
REASON = 'needs no-such-package>=2 and no-other-package: pip install "no-such-package>=2" "no-other-package"'


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    file = tmp_path / "acme.py"
    file.write_text(PLUGIN, encoding="utf-8")
    return file


def graftwork(*arguments: str | Path, **environment: str) -> Result:
    """Run the command with the given plugins only."""
    return CliRunner().invoke(main, ["--disable", "*", *map(str, arguments)], env=environment)


def test_list_says_kind_name_plugin_origin_readiness_and_summary_without_cutting_anything(plugin: Path) -> None:
    broken = plugin.with_name("broken.py")
    broken.write_text("import acme_dora")
    done = graftwork("--plugin", plugin, "--plugin", broken, "list")
    assert done.exit_code == 0
    assert REASON in done.stdout
    lines = [re.split(r"  +", line) for line in done.stdout.splitlines()]
    assert lines[0] == ["kind", "name", "plugin", "distribution", "ready", "summary"]
    assert ["evaluator", "acme-quiz", "acme", "acme.py", REASON, "Acme's quiz"] in lines
    assert ["data_source", "acme-bad", "acme", "acme.py", "ready", "A source with a bug"] in lines
    sentence = "plugin 'broken' could not be loaded: ModuleNotFoundError: No module named 'acme_dora'; "
    assert any(line[0].startswith(sentence) for line in lines)


def test_list_of_one_kind_leaves_the_others_out(plugin: Path) -> None:
    done = graftwork("--plugin", plugin, "list", "evaluator")
    assert "acme-quiz" in done.stdout
    assert "acme-files" not in done.stdout
    wrong = graftwork("list", "evaluators")
    assert (wrong.exit_code, wrong.stdout) == (1, "")
    assert wrong.stderr.startswith("Error: no kind of component is called 'evaluators' (did you mean 'evaluator'?)")


@pytest.mark.parametrize("columns", [60, 80, 119, 120, 140])
def test_list_fits_a_terminal(columns: int, plugin: Path) -> None:
    done = graftwork("--plugin", plugin, "list", FORCE_COLOR="1", COLUMNS=str(columns))
    lines = re.sub(r"\x1b\[[\d;]*m", "", done.stdout).splitlines()
    components = [line for line in lines if not line.startswith("plugin '")]
    assert max(len(line.rstrip()) for line in components) <= columns
    words = " ".join(" ".join(components).split())
    for expected in ("acme-files", "Acme's quiz", "acme.py", "ready", "no-such-package>=2"):
        assert expected in words


def test_list_as_json_holds_components_and_plugins(plugin: Path) -> None:
    said = json.loads(graftwork("--plugin", plugin, "list", "--json").stdout)
    (quiz,) = [row for row in said["components"] if row["name"] == "acme-quiz"]
    assert quiz == {
        "kind": "evaluator",
        "name": "acme-quiz",
        "plugin": "acme",
        "distribution": "acme.py",
        "version": "",
        "ready": False,
        "reason": REASON,
        "summary": "Acme's quiz",
        "file": str(plugin),
        "line": PLUGIN[: PLUGIN.index("class Quiz")].count("\n") + 1,
    }
    (acme,) = [row for row in said["plugins"] if row["name"] == "acme"]
    assert (acme["state"], acme["origin"]) == ("ok", str(plugin))


def test_show_says_everything_about_a_component(plugin: Path) -> None:
    said = graftwork("--plugin", plugin, "show", "data_source", "acme:acme-files").stdout
    line = PLUGIN[: PLUGIN.index("class Files(")].count("\n") + 1
    for expected in (
        "data_source acme-files: Acme's files, read one after another",
        "\nThey are read slowly.\n",
        f"{plugin}:{line}\n",
        "to plans that have [no] path",
        "path     string                    'here'   Where the files are",
        "most     integer ≥ 1 or nothing    nothing  How many of them are read",
    ):
        assert re.sub(" +", " ", expected) in re.sub(" +", " ", said)
    assert f"no: {REASON}" in graftwork("--plugin", plugin, "show", "evaluator", "acme-quiz").stdout


def test_show_as_json_holds_the_settings(plugin: Path) -> None:
    said = json.loads(graftwork("--plugin", plugin, "show", "data_source", "acme-files", "--json").stdout)
    assert said["settings"][0] == {"name": "path", "type": "string", "default": "'here'", "help": "Where the files are"}
    assert (said["about"], said["needs"], said["ready"]) == ("They are read slowly.", [], True)


def test_show_in_a_terminal_prints_brackets_as_they_are(plugin: Path) -> None:
    said = graftwork("--plugin", plugin, "show", "data_source", "acme-files", FORCE_COLOR="1", COLUMNS="80").stdout
    assert "to plans that have [no] path" in said
    assert "Where the files are" in said


def test_schema_describes_the_components(plugin: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.schema.json"
    plugin.write_text(PLUGIN.replace("[Bad, Files]", "[Files]"))
    printed = graftwork("--plugin", plugin, "schema").stdout
    assert graftwork("--plugin", plugin, "schema", "-o", file).stdout == ""
    assert json.loads(printed) == json.loads(file.read_text(encoding="utf-8"))
    assert "acme-files" in printed


def test_an_error_of_the_user_is_a_sentence_and_status_1(plugin: Path) -> None:
    broken = plugin.with_name("broken.py")
    broken.write_text("import acme_dora")
    arguments = ("--plugin", plugin, "--plugin", broken, "show", "data_source", "acme-flies")
    done = graftwork(*arguments)
    assert (done.exit_code, done.stdout) == (1, "")
    first, second, *_ = done.stderr.splitlines()
    assert first.startswith(
        "Error: data_source: nothing is called 'acme-flies' (did you mean 'acme-files'?); installed: "
    )
    assert second.startswith("  plugin 'broken' could not be loaded: ")
    assert "Traceback" not in done.stderr
    assert "Traceback" in graftwork("--debug", *arguments).stderr


def test_a_bug_shows_its_traceback_and_asks_for_a_report(plugin: Path) -> None:
    done = graftwork("--plugin", plugin, "show", "data_source", "acme-bad")
    assert done.exit_code == 70
    assert "Traceback" in done.stderr
    assert "RuntimeError: no default today" in done.stderr
    assert done.stderr.endswith("please report it with the lines above.\n")


def test_an_interrupt_ends_with_status_130(plugin: Path) -> None:
    plugin.write_text("raise KeyboardInterrupt")
    done = graftwork("--plugin", plugin, "list")
    assert (done.exit_code, done.stderr) == (130, "Interrupted.\n")


def test_a_wrong_option_is_a_usage_error(tmp_path: Path) -> None:
    assert graftwork("--plugin", tmp_path / "none.py", "list").exit_code == 2
    assert graftwork("lst").exit_code == 2


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_of_the_help_exists_and_has_help(name: str) -> None:
    command = main.get_command(None, name)  # type: ignore[arg-type]
    assert command is not None
    assert command.name == name
    assert command.help


# Starting ---------------------------------------------------------------------------------------------------------------

HEAVY = ("torch", "transformers", "pydantic", "numpy", "peft", "PIL", "safetensors")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """As after `pip install`: this project's entry points are declared, and modules are compiled once."""
    site = tmp_path_factory.mktemp("site")
    info = site / f"graftwork-{__version__}.dist-info"
    info.mkdir()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    points = project["entry-points"]["graftwork.plugins"]
    lines = ["[graftwork.plugins]", *(f"{name} = {value}" for name, value in points.items()), ""]
    (info / "entry_points.txt").write_text("\n".join(lines))
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: graftwork\nVersion: {__version__}\n")
    kept = {
        key: value for key, value in os.environ.items() if key not in ("PYTHONDONTWRITEBYTECODE", "GRAFTWORK_DISABLE")
    }
    path = os.pathsep.join([str(site), *filter(None, sys.path)])
    return {**kept, "PYTHONPATH": path, "PYTHONPYCACHEPREFIX": str(tmp_path_factory.mktemp("compiled"))}


def python(code: str, environment: dict[str, str]) -> str:
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_imports_no_command_and_no_registry(environment: dict[str, str]) -> None:
    code = """
import sys
from graftwork.cli import main
main(["--help"], standalone_mode=False)
print([name for name in sys.modules if name.startswith(("graftwork.cli.", "graftwork_registry", "rich", "torch"))])
"""
    said = python(code, environment)
    assert said.splitlines()[-1] == "[]"
    assert all(help.split()[0] in said for _, help in COMMANDS.values())


@pytest.mark.parametrize("arguments", [["list"], ["list", "--json"], ["show", "peft", "lora"]])
def test_listing_imports_nothing_heavy(arguments: list[str], environment: dict[str, str]) -> None:
    code = f"""
import sys
from graftwork.cli import main
main({arguments}, standalone_mode=False)
print([name for name in {HEAVY} if name in sys.modules])
"""
    said = python(code, environment)
    assert said.splitlines()[-1] == "[]"
    assert "lora" in said
