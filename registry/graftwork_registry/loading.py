"""One plugin at a time: imported, registered and called, so that a failure stays with its plugin."""

from __future__ import annotations

import contextlib
import re
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pluggy

import graftwork
from graftwork.contracts.component import Component
from graftwork.contracts.kinds import KINDS
from graftwork_registry.judging import faults_of
from graftwork_registry.sources import Source
from graftwork_registry.wording import in_one_line, nearest


class Fault(NamedTuple):
    """Something wrong with a plugin: a clause to follow its name, and the kinds that lack components because of it."""

    clause: str
    kinds: frozenset[str] = frozenset(KINDS)
    traceback: str = ""


@dataclass
class Loaded:
    """What became of a plugin."""

    source: Source
    origin: str
    """The file that was imported, or what would have been."""
    components: list[type[Component[Any]]] = field(default_factory=list)
    observers: list[pluggy.HookImpl] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)


class Refused(Exception):
    """A plugin that cannot be used, for a reason that needs no traceback."""


def load(source: Source, manager: pluggy.PluginManager) -> Loaded:
    """Import, register and call one plugin. Of its exceptions only a keyboard interrupt is raised on."""
    loaded = Loaded(source, source.origin)
    step = "loaded"
    try:
        _refuse_older_core(source)
        with contextlib.redirect_stdout(sys.stderr):  # a plugin that prints must not spoil output for machines
            plugin = source.load()
        step = "registered"
        loaded.origin = _file_of(plugin) or source.origin
        _register(plugin, source.name, manager)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        loaded.faults.append(_fault(f"could not be {step}", error, advice=_import_advice(source, error)))
        return loaded
    callers = manager.get_hookcallers(plugin) or []
    if not callers:
        loaded.faults.append(Fault("has no hook: decorate its functions with @graftwork.hookimpl"))
    for caller in callers:
        for implementation in caller.get_hookimpls():
            if implementation.plugin is plugin:
                _call(caller, implementation, loaded)
    return loaded


def _refuse_older_core(source: Source) -> None:
    from packaging.requirements import Requirement

    for text in source.requires:
        if re.match(r"graftwork(?![\w.-])", text):
            wanted = Requirement(text)
            applies = wanted.marker is None or wanted.marker.evaluate()
            if applies and not wanted.specifier.contains(graftwork.__version__, prereleases=True):
                raise Refused(f"it needs {text}, and this is {graftwork.__version__}: pip install -U graftwork")


def _file_of(plugin: object) -> str | None:
    module = plugin if hasattr(plugin, "__file__") else sys.modules.get(type(plugin).__module__)
    return getattr(module, "__file__", None)


def _import_advice(source: Source, error: BaseException) -> str:
    if not isinstance(error, ModuleNotFoundError) or not error.name:
        return ""
    if not f"{source.origin.partition(':')[0]}.".startswith(f"{error.name}."):
        return f"; install the package that holds '{error.name}'"
    if source.distribution == "graftwork":
        return "; run `pip install -e .` again"
    return f"; reinstall '{source.distribution}'"


def _register(plugin: object, name: str, manager: pluggy.PluginManager) -> None:
    twin = manager.get_name(plugin)
    if twin:
        raise Refused(f"it is the same module as plugin '{twin}'; remove one of the two entry points")
    try:
        manager.register(plugin, name)
    except BaseException:
        if manager.has_plugin(name):  # pluggy before 1.7 keeps plugins that it refused
            manager.unregister(name=name)
        raise


def _call(caller: pluggy.HookCaller, implementation: pluggy.HookImpl, loaded: Loaded) -> None:
    kind = next((kind for kind, hook in KINDS.items() if hook == caller.name), None)
    if kind is None:
        if caller.has_spec():
            loaded.observers.append(implementation)
        elif not implementation.optionalhook:
            loaded.faults.append(Fault(f"has an unknown hook '{caller.name}'{nearest(caller.name, KINDS.values())}"))
        return
    try:
        with contextlib.redirect_stdout(sys.stderr):
            components, clauses = _split(kind, implementation.function())
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        loaded.faults.append(_fault(f"failed in {caller.name}", error, frozenset([kind])))
        return
    loaded.components += components
    loaded.faults += [Fault(f"failed in {caller.name}: {clause}", frozenset([kind])) for clause in clauses]


def _split(kind: str, returned: Any) -> tuple[list[type[Component[Any]]], list[str]]:
    """The valid components among what a hook returned, and what is wrong with the rest."""
    if isinstance(returned, str | bytes) or not isinstance(returned, Iterable):
        raise Refused(f"it returned {returned!r}, which is not a list of classes")
    valid, clauses = [], []
    for component in returned:
        faults = [*faults_of(kind, component)]
        clauses += faults
        if not faults:
            valid.append(component)
    times = Counter(component.name for component in valid)
    clauses += [f"it returned '{name}' {count} times" for name, count in times.items() if count > 1]
    return [component for component in valid if times[component.name] == 1], clauses


def _fault(step: str, error: BaseException, kinds: frozenset[str] = frozenset(KINDS), advice: str = "") -> Fault:
    if isinstance(error, Refused):
        return Fault(f"{step}: {error}", kinds)
    import traceback

    return Fault(f"{step}: {in_one_line(error)}{advice}", kinds, "".join(traceback.format_exception(error)))
