"""Discovery: every way in which a plugin can be broken is one sentence, and harms nobody else."""

from __future__ import annotations

import importlib
import logging
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from graftwork import __version__
from graftwork.errors import ComponentNotFound
from graftwork_registry import Catalog, PluginRow

SOURCE = '''
from graftwork import hookimpl
from graftwork.contracts.data import DataSource

class {name}(DataSource):
    """{summary}"""
    name = "{id}"
    def records(self):
        return iter(())

@hookimpl
def data_sources():
    return [{name}]
'''

Install = Callable[..., None]


def source(id: str, summary: str = "A source.") -> str:
    """A plugin with one data source."""
    return SOURCE.format(name=id.title().replace("-", ""), id=id, summary=summary)


def sources(body: str) -> str:
    """A plugin whose hook runs `body`, where `Good` is a sound data source."""
    return source("good").replace("    return [Good]", textwrap.indent(textwrap.dedent(body), "    "))


def with_settings(arguments: str) -> str:
    """A plugin whose component has the settings that `make_dataclass` makes."""
    return sources(f"import dataclasses\nGood.Settings = dataclasses.make_dataclass({arguments})\nreturn [Good]")


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Puts a distribution with one plugin, as pip would leave it, on the path."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)

    def write(
        name: str,
        code: str | None,
        *,
        plugins: Mapping[str, str] | None = None,
        version: str = "1.0",
        requires: Sequence[str] = (),
    ) -> None:
        module = name.replace("-", "_")
        if code is not None:
            (tmp_path / f"{module}.py").write_text(code, encoding="utf-8")
        info = tmp_path / f"{module}-{version}.dist-info"
        info.mkdir()
        lines = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {text}" for text in requires)]
        (info / "METADATA").write_text("\n".join(["Metadata-Version: 2.1", *lines, ""]))
        points = [f"{entry} = {value}" for entry, value in (plugins or {name: module}).items()]
        (info / "entry_points.txt").write_text("\n".join(["[graftwork.plugins]", *points, ""]))
        importlib.invalidate_caches()

    yield write
    for module in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[module], "__file__", "")):
            del sys.modules[module]


def row_of(catalog: Catalog, plugin: str) -> PluginRow:
    """The only row of a plugin."""
    (row,) = [row for row in catalog.plugins() if row.name == plugin]
    return row


def test_an_installed_plugin_is_found_with_its_distribution_version_file_and_line(
    install: Install, tmp_path: Path
) -> None:
    install("acme", source("acme-files", "Acme's files.\n\n    With more to say."), version="2.5")
    catalog = Catalog.discover()
    plugin = row_of(catalog, "acme")
    assert (plugin.distribution, plugin.version, plugin.state, plugin.sentence) == ("acme", "2.5", "ok", "")
    assert plugin.origin == str(tmp_path / "acme.py")
    row = catalog.row("data_source", "acme-files")
    assert (row.kind, row.plugin, row.distribution, row.version) == ("data_source", "acme", "acme", "2.5")
    assert (row.ready, row.reason, row.summary) == (True, "", "Acme's files")
    assert (row.file, row.line) == (str(tmp_path / "acme.py"), 5)
    found = catalog.find("data_source", "acme-files")
    assert (found.component.name, found.plugin, found.distribution, found.version) == (
        "acme-files",
        "acme",
        "acme",
        "2.5",
    )
    assert "acme-files" in catalog.names("data_source")
    assert "acme-files" not in catalog.names("evaluator")


BROKEN = {
    "a missing module": (
        "import acme_dora",
        "could not be loaded: ModuleNotFoundError: No module named 'acme_dora'; install",
    ),
    "a syntax error": ("def x(:", "could not be loaded: SyntaxError: "),
    "an exit": ("raise SystemExit(3)", "could not be loaded: SystemExit: 3"),
    "no hook": ("def data_sources(): return []", "has no hook: decorate its functions with @graftwork.hookimpl"),
    "a wrong signature": (
        "from graftwork import hookimpl\n@hookimpl\ndef evaluators(extra): return []",
        "could not be registered: PluginValidationError: .*Argument.*'extra'",
    ),
    "a misspelt hook": (
        "from graftwork import hookimpl\n@hookimpl\ndef peft_method(): return []",
        r"has an unknown hook 'peft_method' \(did you mean 'peft_methods'\?\)",
    ),
    "a hook that raises": (sources("1 / 0"), "failed in data_sources: ZeroDivisionError: division by zero"),
    "a hook that exits": (sources("raise SystemExit(1)"), "failed in data_sources: SystemExit: 1"),
    "no list": (sources("return 7"), "failed in data_sources: it returned 7, which is not a list of classes"),
    "nothing": (sources("pass"), "failed in data_sources: it returned None, which is not a list of classes"),
    "no class": (sources("return [Good(None)]"), "failed in data_sources: it returned <.*>, which is not a class"),
    "another kind": (
        sources("from graftwork.contracts.kinds import Evaluator\nreturn [Evaluator]"),
        "failed in data_sources: it returned 'Evaluator', which does not extend DataSource",
    ),
    "abstract methods": (
        sources("class Bad(DataSource):\n    'A.'\n    name = 'bad'\nreturn [Bad]"),
        "failed in data_sources: 'Bad' lacks records",
    ),
    "no name": (sources("del Good.name\nreturn [Good]"), "'Good' has no name: write name = "),
    "a bad name": (
        sources("Good.name = 'Too_Good'\nreturn [Good]"),
        "'Good' is called 'Too_Good', and a name is lower case",
    ),
    "a hyphen too many": (sources("Good.name = 'good-'\nreturn [Good]"), "is called 'good-'"),
    "no docstring": (sources("Good.__doc__ = None\nreturn [Good]"), "'Good' has no docstring"),
    "another kind's name": (
        sources("Good.kind = 'peft'\nreturn [Good]"),
        "says that its kind is 'peft', not 'data_source'",
    ),
    "settings that are no dataclass": (
        sources("Good.Settings = dict\nreturn [Good]"),
        "'Good' has Settings that are no dataclass",
    ),
    "settings that can change": (
        with_settings('"S", [("path", str, "x")]'),
        r"'Good' has Settings that can change: write @dataclass\(frozen=True\)",
    ),
    "a setting without a default": (
        with_settings('"S", ["path"], frozen=True'),
        "'Good' has no default for its setting 'path'",
    ),
    "a setting of an unknown type": (
        with_settings('"S", [("path", "Path", None)], frozen=True'),
        "'Good' has Settings whose types cannot be read: NameError: name 'Path' is not defined",
    ),
    "a requirement as a text": (
        sources("from graftwork import Requires\nGood.requires = Requires('torch')\nreturn [Good]"),
        "has a requires that is no Requires with a tuple of packages",
    ),
    "an unreadable requirement": (
        sources("from graftwork import Requires\nGood.requires = Requires(('a b',))\nreturn [Good]"),
        "requires 'a b', which is no requirement",
    ),
    "a name twice": (sources("return [Good, type('Twin', (Good,), {'__doc__': 'B.'})]"), "it returned 'good' 2 times"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_plugin_becomes_one_sentence_and_harms_nobody(case: str, install: Install) -> None:
    code, sentence = BROKEN[case]
    install("acme-broken", code)
    install("acme-sound", source("acme-files"))
    catalog = Catalog.discover()
    row = row_of(catalog, "acme-broken")
    assert row.state == "broken"
    assert row.sentence.startswith("plugin 'acme-broken' ")
    assert "\n" not in row.sentence
    assert re.search(sentence, row.sentence)
    assert not [component for component in catalog.components() if component.plugin == "acme-broken"]
    assert row_of(catalog, "acme-sound").state == "ok"
    assert catalog.find("data_source", "acme-files").plugin == "acme-sound"


def test_a_keyboard_interrupt_while_a_plugin_is_loaded_is_not_swallowed(install: Install) -> None:
    install("acme-slow", "raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        Catalog.discover()


def test_the_sound_components_of_a_broken_plugin_stay(install: Install) -> None:
    install("acme", sources("return [Good, 'bad']") + "\n@hookimpl\ndef peft_method(): return []\n")
    catalog = Catalog.discover()
    assert catalog.find("data_source", "good").plugin == "acme"
    assert row_of(catalog, "acme").sentence == (
        "plugin 'acme' failed in data_sources: it returned 'bad', which is not a class, "
        "and has an unknown hook 'peft_method' (did you mean 'peft_methods'?)"
    )


def test_the_traceback_of_a_broken_plugin_is_kept(install: Install, tmp_path: Path) -> None:
    install("acme", "def fail():\n    raise OSError('no disk')\nfail()\n")
    row = row_of(Catalog.discover(), "acme")
    assert row.sentence == "plugin 'acme' could not be loaded: OSError: no disk"
    assert f'File "{tmp_path / "acme.py"}", line 2, in fail' in row.traceback


def test_a_plugin_that_prints_does_not_print_into_the_output(
    install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    install("acme", "print('hello')\n" + sources("print('again')\nreturn [Good]"))
    assert row_of(Catalog.discover(), "acme").state == "ok"
    assert capsys.readouterr() == ("", "hello\nagain\n")


def test_a_module_under_two_entry_points_is_loaded_once(install: Install) -> None:
    install("acme", source("acme-files"), plugins={"acme": "acme", "acme-too": "acme"})
    catalog = Catalog.discover()
    assert row_of(catalog, "acme").state == "ok"
    assert row_of(catalog, "acme-too").sentence == (
        "plugin 'acme-too' could not be registered: it is the same module as plugin 'acme'; "
        "remove one of the two entry points"
    )
    assert catalog.find("data_source", "acme-files").plugin == "acme"


def test_a_plugin_can_be_an_object_of_a_module(install: Install) -> None:
    code = source("acme-files").replace(
        "@hookimpl\ndef data_sources():", "class Plugin:\n  @hookimpl\n  def data_sources(self):"
    )
    install("acme", f"{code}\nplugin = Plugin()\n", plugins={"acme": "acme:plugin"})
    catalog = Catalog.discover()
    assert catalog.find("data_source", "acme-files").plugin == "acme"
    assert row_of(catalog, "acme").origin.endswith("acme.py")


def test_an_entry_point_whose_module_is_gone_says_how_to_renew_it(install: Install) -> None:
    install("graftwork", None, plugins={"acme": "graftwork_gone"}, version=__version__)
    install("other", None, plugins={"other": "other_gone.inner"})
    catalog = Catalog.discover()
    assert row_of(catalog, "acme").sentence.endswith("No module named 'graftwork_gone'; run `pip install -e .` again")
    assert row_of(catalog, "other").sentence.endswith("No module named 'other_gone'; reinstall 'other'")


def test_a_plugin_for_a_newer_graftwork_is_not_imported(install: Install) -> None:
    install("acme-new", "1 / 0", requires=["graftwork>=99", "graftwork-other>=1"])
    install("acme-old", source("acme-files"), requires=["graftwork[demo]>=0.1", "graftwork>=99; extra == 'x'"])
    catalog = Catalog.discover()
    assert row_of(catalog, "acme-new").sentence == (
        f"plugin 'acme-new' could not be loaded: it needs graftwork>=99, and this is {__version__}: "
        "pip install -U graftwork"
    )
    assert row_of(catalog, "acme-old").state == "ok"


def test_a_distribution_without_metadata_still_brings_its_plugin(install: Install, tmp_path: Path) -> None:
    install("acme", source("acme-files"))
    (tmp_path / "acme-1.0.dist-info" / "METADATA").unlink()
    found = Catalog.discover().find("data_source", "acme-files")
    assert (found.plugin, found.distribution, found.version) == ("acme", "unknown", "unknown")


def test_equal_names_are_refused_until_told_apart(install: Install) -> None:
    install("acme", source("files", "Acme's."))
    install("bolt", source("files", "Bolt's."))
    catalog = Catalog.discover()
    with pytest.raises(ComponentNotFound) as refused:
        catalog.find("data_source", "files")
    assert str(refused.value) == "data_source: 'files' is in 2 plugins; write 'acme:files' or 'bolt:files'"
    assert catalog.find("data_source", "bolt:files").component.summary() == "Bolt's"
    assert {"acme:files", "bolt:files"} <= set(catalog.names("data_source"))
    assert Catalog.discover(disable=["acme"]).find("data_source", "files").plugin == "bolt"


def test_plugins_of_equal_name_are_told_apart_by_their_distributions(install: Install) -> None:
    install("acme", source("files"), plugins={"io": "acme"})
    install("bolt", source("files"), plugins={"io": "bolt"})
    catalog = Catalog.discover()
    assert catalog.find("data_source", "bolt/io:files").distribution == "bolt"
    assert row_of(catalog, "acme/io").state == "ok"


def test_an_unknown_name_is_answered_with_the_nearest_the_installed_and_the_broken(install: Install) -> None:
    install("acme", source("acme-files"))
    install("acme-dora", "import missing_dora")
    install("acme-other", "from graftwork import hookimpl\n@hookimpl\ndef evaluators(): return 3\n")
    install("acme-off", source("never"))
    with pytest.raises(ComponentNotFound) as error:
        Catalog.discover(disable=["acme-off"]).find("data_source", "acme-flies")
    text = str(error.value)
    assert text.startswith("data_source: nothing is called 'acme-flies' (did you mean 'acme-files'?); installed: ")
    assert "acme-files" in text.partition("installed: ")[2].partition("\n")[0].split(", ")
    assert "\n  plugin 'acme-dora' could not be loaded: ModuleNotFoundError: No module named 'missing_dora'" in text
    assert "acme-other" not in text  # only its evaluators are missing
    assert text.endswith("\n  disabled plugins: acme-off")


def test_an_unknown_kind_is_answered_with_the_kinds(install: Install) -> None:
    with pytest.raises(ComponentNotFound) as error:
        Catalog.discover(disable=["*"]).find("evaluators", "x")
    assert str(error.value).startswith(
        "no kind of component is called 'evaluators' (did you mean 'evaluator'?); the kinds are model, "
    )


def test_disabled_plugins_are_not_imported(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("acme", "raise AssertionError('imported')")
    install("bolt", source("files"))
    row = row_of(Catalog.discover(disable=["acme"]), "acme")
    assert (row.state, row.sentence) == ("disabled", "plugin 'acme' is disabled by --disable or GRAFTWORK_DISABLE")
    monkeypatch.setenv("GRAFTWORK_DISABLE", "acme, not-installed-here")
    assert [row_of(Catalog.discover(), name).state for name in ("acme", "bolt")] == ["disabled", "ok"]
    monkeypatch.setenv("GRAFTWORK_DISABLE", "*")
    assert {row.state for row in Catalog.discover().plugins()} == {"disabled"}


def test_disabling_what_is_not_there_is_an_error(install: Install) -> None:
    install("acme", source("files"))
    with pytest.raises(ComponentNotFound, match=r"--disable: no plugin is called 'amce'.*; installed: .*acme"):
        Catalog.discover(disable=["amce"])


def test_a_single_file_is_a_plugin_even_where_the_installed_ones_are_disabled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GRAFTWORK_DISABLE", raising=False)
    (tmp_path / "my_source.py").write_text(source("mine"), encoding="utf-8")
    (tmp_path / "notes.txt").write_text("no python")
    catalog = Catalog.discover(files=[tmp_path / "my_source.py", tmp_path / "notes.txt"], disable=["*"])
    found = catalog.find("data_source", "mine")
    assert (found.plugin, found.distribution, found.version) == ("my-source", "my_source.py", "")
    assert row_of(catalog, "my-source").origin == str(tmp_path / "my_source.py")
    assert "is not a Python file" in row_of(catalog, "notes").sentence
    assert (
        row_of(Catalog.discover(files=[tmp_path / "my_source.py"], disable=["my-source"]), "my-source").state
        == "disabled"
    )


OBSERVER = """
from graftwork import hookimpl
told = []
@hookimpl
def happened({arguments}):
    told.append(1)
    {action}
"""


def test_an_observer_that_raises_is_muted_and_reported_once(install: Install, caplog: pytest.LogCaptureFixture) -> None:
    install("acme", OBSERVER.format(arguments="event", action="raise RuntimeError('disk full')"))
    install("bolt", OBSERVER.format(arguments="", action="pass"))
    install("cork", OBSERVER.format(arguments="event", action="raise SystemExit"))
    catalog = Catalog.discover()
    with caplog.at_level(logging.WARNING, logger="graftwork"):
        for _ in range(3):
            catalog.emit("event")
    told = {name: len(sys.modules[name].told) for name in ("acme", "bolt", "cork")}
    assert told == {"acme": 1, "bolt": 3, "cork": 1}
    assert catalog.muted == {"acme": "RuntimeError: disk full", "cork": "SystemExit:"}
    assert (
        caplog.messages[0] == "plugin 'acme' failed when told of str, and is told nothing more: RuntimeError: disk full"
    )
    assert len(caplog.messages) == 2


def test_a_component_that_lacks_a_package_is_listed_with_the_pip_line(install: Install) -> None:
    code = sources(
        "from graftwork import Requires\nGood.requires = Requires(('no-such-package>=2', 'pluggy'))\nreturn [Good]"
    )
    install("acme", code)
    catalog = Catalog.discover()
    row = catalog.row("data_source", "good")
    assert not row.ready
    assert row.reason == 'needs no-such-package>=2: pip install "no-such-package>=2"'
    assert catalog.find("data_source", "good").component is row.component
    assert "good" in catalog.names("data_source")
    assert "good" not in catalog.names("data_source", ready_only=True)
