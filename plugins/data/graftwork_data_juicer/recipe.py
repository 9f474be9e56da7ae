"""What is to be done: the operators of a run file or of a recipe of Data-Juicer's, and all that is wrong with them."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftwork.contracts import MissingFile
from graftwork.data import read_text
from graftwork.errors import DataError
from graftwork_data_juicer.allowed import ALLOWED, Allowed, why_refused

IGNORED = (
    *("project_name", "dataset_path", "export_path", "export_shard_size", "export_in_parallel", "np", "work_dir"),
    *("open_tracer", "trace_num", "open_monitor", "use_cache", "cache_compress", "temp_dir", "ds_cache_dir"),
)
"""Keys of a recipe that say where data lies and how fast the work is done, which is said in the run file."""
INSTEAD = {"executor_type": "; set 'engine' instead", "ray_address": "; set 'address' instead"}


@dataclass(frozen=True)
class Step:
    """An operator and its parameters, with the place where they were read."""

    at: str
    op: str
    params: Mapping[str, Any]

    @property
    def allowed(self) -> Allowed:
        """What the operator needs."""
        return ALLOWED[self.op]

    def task(self) -> dict[str, Any]:
        """What the worker is told of it."""
        allowed, params = self.allowed, dict(self.params)
        return {
            "at": self.at,
            "op": self.op,
            "params": params,
            "packages": allowed.packages,
            "images": allowed.images,
            "marks": allowed.marks,
            "model": allowed.holds == "config.json",
            "captions": allowed.captions,
            "keeps": params.get("keep_original_sample", True),
            "duplicates": allowed.duplicates,
        }


def read_steps(process: Sequence[Mapping[str, Any]], recipe: Path | None, folder: Path) -> tuple[list[Step], list[str]]:
    """The steps that are allowed, and what is wrong with any, a clause each. Folders that they name are taken from `folder`."""
    entries = [(f"process.{number}", entry) for number, entry in enumerate(process)]
    problems = []
    if recipe and process:
        problems.append("both 'recipe' and 'process' are set; keep one of them")
    elif recipe:
        try:
            found, problems = _of_recipe(recipe)
        except DataError as error:
            return [], [error.sentence]
        entries = [(f"{recipe.name}: process.{number}", entry) for number, entry in enumerate(found)]
    elif not process:
        problems.append("neither 'process' nor 'recipe' is set; name the operators that shall run")
    steps = []
    for at, entry in entries:
        step = _step(at, entry)
        if isinstance(step, str):
            problems.append(step)
            continue
        resolved = _with_folder(step, folder)
        problems += [type(problem)(f"{at}: {problem}") for problem in _problems(resolved)]
        if step.op in ALLOWED:
            steps.append(resolved)
    return steps, problems


def _of_recipe(path: Path) -> tuple[list[Any], list[str]]:
    """The entries of a recipe's `process`, and a clause for each other key of it that changes what comes out."""
    import yaml

    try:
        content = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        place = getattr(error, "problem_mark", None)
        line = f", line {place.line + 1}" if place else ""
        raise DataError(
            f"the recipe '{path}'{line} is not YAML ({getattr(error, 'problem', error)}); correct it"
        ) from None
    if not isinstance(content, dict) or not isinstance(content.get("process"), list) or not content["process"]:
        raise DataError(f"the recipe '{path}' has no list 'process'; is it a recipe of Data-Juicer?")
    others = [key for key in content if key != "process" and key not in IGNORED]
    return content["process"], [
        f"the key '{key}' of the recipe '{path.name}' is not read here{INSTEAD.get(key, '; take it out')}"
        for key in others
    ]


def _step(at: str, entry: Any) -> Step | str:
    """The step of an entry in one of its forms, or what is wrong with its form."""
    if isinstance(entry, str):
        return Step(at, entry, {})
    if isinstance(entry, Mapping):
        if isinstance(op := entry.get("op"), str):
            return Step(at, op, {key: value for key, value in entry.items() if key != "op"})
        if len(entry) == 1:
            ((op, params),) = entry.items()
            if isinstance(op, str) and (params is None or isinstance(params, Mapping)):
                return Step(at, op, dict(params or {}))
    return f"{at}: is neither a table with 'op' and parameters nor an operator's name with a table of its parameters"


def _with_folder(step: Step, folder: Path) -> Step:
    """The step with the folder that it names taken from `folder`, if there is such a folder."""
    name = ALLOWED[step.op].folder if step.op in ALLOWED else ""
    given = step.params.get(name) if name else None
    if not isinstance(given, str) or not given:
        return step
    path = folder / Path(given).expanduser()
    return Step(step.at, step.op, {**step.params, name: str(path)}) if path.exists() else step


def _problems(step: Step) -> Iterator[str]:
    """What can be said of a step without Data-Juicer."""
    if step.op not in ALLOWED:
        if why := why_refused(step.op):
            yield f"'{step.op}' may not run here: {why}"
        else:
            near = difflib.get_close_matches(step.op, ALLOWED, n=1)
            yield f"'{step.op}' is no operator that may run here" + (
                f"; did you mean '{near[0]}'?" if near else "; docs/data.md lists those that may"
            )
        return
    try:
        json.dumps(step.params, allow_nan=False)
    except (TypeError, ValueError) as error:
        yield f"the parameters of '{step.op}' are not plain values ({error})"
    for name, (value, why) in step.allowed.refused.items():
        if step.params.get(name) == value:
            yield f"'{name}' of '{step.op}' may not be {json.dumps(value)}: {why}"
    if name := step.allowed.folder:
        yield from _folder_problems(step, name)


def _folder_problems(step: Step, name: str) -> Iterator[str]:
    given, holds = step.params.get(name), step.allowed.holds
    if not isinstance(given, str) or not given:
        yield f"'{step.op}' needs '{name}', a folder with '{holds}' on this machine; nothing is fetched"
    elif not Path(given).is_dir():
        yield MissingFile(
            f"'{name}' of '{step.op}' is '{given}', and there is no such folder; fetch it first, as hub ids are not followed"
        )
    elif not any(Path(given).glob(holds)):
        yield f"'{name}' of '{step.op}' is '{given}', which holds no '{holds}'; name the folder that does"
    elif step.op == "image_aesthetics_filter" and not any(kind in given for kind in ("v1", "v2")):
        yield f"'{name}' of '{step.op}' is '{given}', and Data-Juicer tells the kind of model by a 'v1' or 'v2' in its path"
