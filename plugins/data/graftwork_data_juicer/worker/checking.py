"""Whether Data-Juicer has the operators of a task, with these parameters and the packages that they need."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from .guard import InstallRefused, NotAllowed, causes, import_data_juicer

INTERVALS = ("min_closed_interval", "max_closed_interval", "reversed_range")
"""What every filter takes beside its own parameters."""


def suggestion(name: str, known: Collection[str]) -> str:
    """`; did you mean 'x'?` where something known is near, else nothing."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean '{near[0]}'?" if near else ""


def check(steps: Sequence[Mapping[str, Any]]) -> list[str]:
    """All that is wrong with the steps of a task, a clause each, with the place of the step."""
    registry = import_data_juicer().modules
    return [f"{step['at']}: {problem}" for step in steps for problem in _problems(step, registry)]


def _problems(step: Mapping[str, Any], registry: Mapping[str, Any]) -> Iterator[str]:
    name, params = step["op"], step["params"]
    if (operator := registry.get(name)) is None:
        yield f"this Data-Juicer has no operator '{name}'"
        return
    known = _parameters(operator)
    wrong = False
    for key, value in params.items():
        if key not in known:
            wrong = True
            listed = suggestion(key, known) or (f"; known: {', '.join(known)}" if known else "; it has none")
            yield f"'{name}' has no parameter '{key}'{listed}"
        elif (wanted := _unlike(value, known[key])) is not None:
            wrong = True
            yield f"'{key}' of '{name}' is {value!r}, wanted {wanted}"
    missing = [package for module, package in step["packages"].items() if importlib.util.find_spec(module) is None]
    if missing:
        yield f"'{name}' needs {' and '.join(missing)}, which Graftwork never installs: pip install {' '.join(missing)}"
    elif not wrong:
        try:
            operator(**params)
        except InstallRefused as error:
            yield f"'{name}' needs {error}, which Graftwork never installs: pip install {error}"
        except Exception as error:
            why = next((cause for cause in causes(error) if isinstance(cause, NotAllowed)), error)
            yield f"'{name}' refuses its parameters: {' '.join(str(why).split())[:300]}"


def _parameters(operator: Any) -> dict[str, Any]:
    """The names and the types of an operator's own parameters, without those that Graftwork sets or that run code."""
    from data_juicer.ops.base_op import Filter

    found = {
        name: parameter.annotation
        for name, parameter in inspect.signature(operator.__init__).parameters.items()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        and not name.endswith(("_key", "_keys"))
        and name not in ("self", "trust_remote_code", "tokenizer", "gpu_batch_size")
    }
    return {**found, **dict.fromkeys(INTERVALS, bool)} if issubclass(operator, Filter) else found


def _unlike(value: Any, annotation: Any) -> str | None:
    """What a parameter wants, where a value is not that; None where it is, or where its type cannot be checked."""
    from pydantic import TypeAdapter, ValidationError
    from pydantic.errors import PydanticUserError

    if annotation is inspect.Parameter.empty:
        return None
    try:
        TypeAdapter(annotation).validate_python(value, strict=True)
    except ValidationError as error:
        first = error.errors()[0]["msg"]
        return first.removeprefix("Input should be ").removeprefix("a valid ")
    except (PydanticUserError, TypeError):
        return None
    return None
