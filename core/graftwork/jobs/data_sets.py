"""Data sets on disk: processed, imported and exported."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from os import PathLike
from pathlib import Path
from typing import Any, cast

import graftwork
from graftwork.checkpoint import locking
from graftwork.checkpoint.writing import hidden, put_in_place
from graftwork.config.datafile import DataPlan, resolve_data, resolve_evaluators
from graftwork.config.wording import suggestion
from graftwork.contracts.data import DataSource
from graftwork.contracts.lookup import Lookup
from graftwork.data import cache, curated, measuring, pipeline
from graftwork.data.pipeline import PipelineResult, Stage
from graftwork.errors import DataError, GraftworkError, NothingLeft
from graftwork.jobs.data_check import report_on
from graftwork.jobs.messages import Listener, Message, ignore
from graftwork.jobs.run import installed
from graftwork.report.data import write_data_report

LIBRARIES = ("datasets", "openai", "pillow", "py-data-juicer", "pyarrow", "ray", "tokenizers", "torch", "transformers")
"""What records may depend on, and a manifest names where it is installed."""
MAX_TOLD = 20
"""How many records that an export leaves out are named."""
FINISHED = "data-set"
"""What the folder is called, among what is unfinished, that is to be the data set."""
SUFFIXES = ("", "-json", "-jsonl")
"""What may be left out of the name of a format."""


@dataclass(frozen=True)
class DataSet:
    """A data set on disk."""

    folder: Path
    manifest: Mapping[str, Any]

    @property
    def records(self) -> int:
        """How many records it has."""
        return int(self.manifest["records"])

    @property
    def stages(self) -> Sequence[Mapping[str, Any]]:
        """What each source and operator did: `read + made = kept + dropped`."""
        return cast("Sequence[Mapping[str, Any]]", self.manifest["stages"])

    @property
    def sources(self) -> list[DataSet]:
        """The data sets that it was read from, as far as they are there and as they were."""
        found: dict[str, DataSet] = {}
        for stage in self.stages:
            for value in stage["settings"].values() if isinstance(stage["settings"], Mapping) else ():
                if isinstance(value, str) and value and curated.is_data_set(Path(value)):
                    with suppress(DataError):
                        found[value] = DataSet.open(value)
        return list(found.values())

    @property
    def ancestry(self) -> Iterator[DataSet]:
        """It, those that it was read from, those that these were read from, and so on."""
        yield self
        for source in self.sources:
            yield from source.ancestry

    @classmethod
    def open(cls, folder: str | PathLike[str]) -> DataSet:
        """The data set in a folder; DataError where there is none, or its files are not as they were written."""
        return cls(Path(folder), curated.read_manifest(Path(folder)))


def process_data(
    data: str | PathLike[str] | Mapping[str, Any],
    out: str | PathLike[str],
    *,
    limit: int | None = None,
    copy: bool = False,
    report: bool = True,
    resume: bool = False,
    on_event: Listener = ignore,
    lookup: Lookup | None = None,
) -> DataSet:
    """Read the sources of a data file, apply its operators, and write what is left, dropped and changed as a data set.

    `data` is a data file, a run file, the tables of one, or a file or folder that a source recognises; `limit` the number of records
    that are read. With `copy` all images are copied into the data set; else it names the folder in which they lie. With `report` a page
    shows what is in it, beside what the sources gave; it opens every image. Where a command
    was killed, `resume` goes on after the last complete stage, to the same bytes. Raises RunFileError, PlanRefused and DataError.
    """
    lookup = lookup or installed()
    plan = resolve_data(data if isinstance(data, Mapping) else Path(data), lookup)
    return make_data_set(plan, Path(out), lookup, limit=limit, copy=copy, report=report, resume=resume, listen=on_event)


@dataclass(frozen=True)
class Writing:
    """How operators are lent writers, and what a manifest says of that."""

    lend: pipeline.Lend = lambda operator, folder: nullcontext()
    identity: Any = None
    """What says who writes; a data set of other writers is another one."""
    facts: Callable[[PipelineResult, Path], Mapping[str, Any]] = lambda result, folder: {
        "writer": None,
        "verification": None,
    }
    """What a manifest says, once the data set is in the folder."""


def make_data_set(
    plan: DataPlan,
    out: Path,
    lookup: Lookup,
    *,
    limit: int | None,
    copy: bool,
    report: bool,
    resume: bool,
    listen: Listener,
    writing: Writing | None = None,
) -> DataSet:
    """All of `process_data` with data that is resolved, and with `writing` for operators that ask a writer."""
    folder, writing = out.absolute(), writing or Writing()
    evaluators = resolve_evaluators((), plan, lookup) if report else {}
    work = folder.parent / f".{folder.name}.unfinished"
    _refuse_existing(folder)
    with _only_writer(work):
        _refuse_existing(folder)  # Another command may have finished meanwhile.
        begun = _begin(plan, work, (limit, copy, writing.identity), resume=resume, listen=listen)
        try:
            manifest, result = _process(plan, work, folder, limit, copy, writing, listen)
            if report:
                page = report_on(result, plan, lookup, evaluators, listen, with_input=True)
                write_data_report(work / FINISHED, page)
        except OSError as error:
            raise DataError(
                f"'{out}' could not be written ({error.strerror or error}); make room, and go on with --resume"
            ) from error
        except KeyboardInterrupt:
            listen(Message(f"what was done is kept in '{work}'; go on with --resume", "warning"))
            raise
        except GraftworkError as error:
            complete = any((work / "stages").glob(f"*/{pipeline.DONE}"))
            if isinstance(error, NothingLeft) or not complete:  # There is nothing to go on with.
                shutil.rmtree(work, ignore_errors=True)
            else:
                listen(Message(f"the stages that are complete are kept in '{work}' for --resume", "warning"))
            raise
        put_in_place(work / FINISHED, folder)
        begun.unlink()
        shutil.rmtree(work, ignore_errors=True)
    return DataSet(out, manifest)


def _refuse_existing(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"'{folder}' is there already; name another folder, or remove it")


@contextmanager
def _only_writer(work: Path) -> Iterator[None]:
    """The lock of a folder that is being written; DataError where another process has it."""
    work.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = locking.lock(work)
    except BlockingIOError:
        raise DataError(f"another process writes into '{work}'; wait for it, or name another folder") from None
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)
        if work.is_dir() and not any(work.iterdir()):
            work.rmdir()


def _begin(plan: DataPlan, work: Path, how: tuple[Any, ...], *, resume: bool, listen: Listener) -> Path:
    """The file that says what is being done in a folder; DataError where that is something else, or it is not to go on."""
    asked = [each.files() for each in plan.sources] + [each.files() for each in plan.operators]
    files = [file for each in asked for file in each or ()]
    try:
        hashes = cache.known_hashes(files)
    except OSError as error:
        raise DataError(f"'{error.filename}' cannot be read ({error.strerror}); correct the path") from None
    key, file = cache.key_of(asdict(plan.run_context), hashes, *how), work / "begun.txt"
    if not file.exists():
        if resume:
            listen(Message("there is nothing to resume; it starts anew", "warning"))
        file.write_text(key, encoding="utf-8")
    elif not resume:
        raise DataError(f"an unfinished data set lies in '{work}'; go on with --resume, or remove that folder")
    elif file.read_text(encoding="utf-8") != key:
        raise DataError(
            f"what lies unfinished in '{work}' was begun with other settings or other files; change them back, or remove that "
            "folder and start without --resume"
        )
    return file


def _process(
    plan: DataPlan, work: Path, folder: Path, limit: int | None, copy: bool, writing: Writing, listen: Listener
) -> tuple[Mapping[str, Any], PipelineResult]:
    """Write the data set into `work`; returns its manifest, and its records with those of all stages."""
    stages, result_folder = work / "stages", work / FINISHED
    stages.mkdir(exist_ok=True)
    if (stages / measuring.IMAGES).exists() and not measuring.has_same_images(stages):
        raise DataError(f"images have changed since '{work}' was begun; remove that folder, and start without --resume")

    def say(stage: Stage) -> None:
        if not (stages / measuring.IMAGES).exists():  # The sources, which come first, were read.
            measuring.keep_image_states(stages)
        listen(Message(told(asdict(stage))))

    result = pipeline.read_records(
        plan.sources,
        plan.operators,
        seed=plan.seed,
        strict=plan.strict,
        lend=writing.lend,
        folder=stages,
        limit=limit,
        say=say,
    )
    shutil.rmtree(result_folder, ignore_errors=True)
    result_folder.mkdir()
    written = curated.write_data_set(result, result_folder, copy=copy)
    facts = {**_facts(plan, result, written, limit), **writing.facts(result, result_folder)}
    manifest = curated.manifest_of(result_folder, written, folder, facts)
    text = json.dumps(manifest, ensure_ascii=False, indent=1, sort_keys=True, default=str)
    (result_folder / curated.MANIFEST).write_text(text + "\n", encoding="utf-8")
    return manifest, result


def _facts(plan: DataPlan, result: PipelineResult, written: curated.Written, limit: int | None) -> dict[str, Any]:
    """What a manifest says beside what is in its files."""
    choices = (*plan.run_context.sources, *plan.run_context.operators)
    versions = {name: found for name in LIBRARIES if (found := _version(name))}
    return {
        "graftwork": graftwork.__version__,
        "libraries": {"python": ".".join(map(str, sys.version_info[:3])), **versions},
        "data": plan.table,
        "seed": plan.seed,
        "limit": limit,
        "records": len(result.records),
        "plugins": {each.label: f"{each.distribution} {each.version}" for each in choices},
        "source_files": [_source_files(each) for each in plan.sources],
        "stages": curated.stage_rows(result, written, [choice.settings for choice in choices]),
        "checked_against": {each.name: sorted(each.questions) for each in plan.operators if each.questions},
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _source_files(source: DataSource[Any]) -> dict[str, Any]:
    hashes = cache.known_hashes(source.files() or ())
    return {path: {"bytes": Path(path).stat().st_size, "sha256": digest} for path, digest in hashes.items()}


def told(stage: Mapping[str, Any]) -> str:
    """What a stage did, as a sentence."""
    made = f" and made {stage['made']:,}" if stage["made"] else ""
    counts = f"read {stage['read']:,}{made}, kept {stage['kept']:,}, dropped {stage['dropped']:,}"
    return f"{stage['name']}: {counts} ({stage['seconds']:.1f} s)"


# Other formats ----------------------------------------------------------------------------------------------------------


def import_data(
    path: str | PathLike[str],
    out: str | PathLike[str],
    *,
    format: str,
    settings: Mapping[str, Any] | None = None,
    limit: int | None = None,
    copy: bool = False,
    resume: bool = False,
    on_event: Listener = ignore,
    lookup: Lookup | None = None,
) -> DataSet:
    """Read data of a format, the name of a data source such as `messages-jsonl`, or `messages`, and write it as a data set.

    `settings` are further settings of the source, such as `image_folder`; all else is as in `process_data`.
    """
    lookup = lookup or installed()
    name = _source_named(format, lookup)
    if not Path(path).exists():
        raise DataError(f"there is no file or folder '{path}'; correct the path")
    table = {"use": name, "path": str(Path(path).absolute()), **(settings or {})}
    return process_data(
        {"data": {"source": [table]}},
        out,
        limit=limit,
        copy=copy,
        report=False,
        resume=resume,
        on_event=on_event,
        lookup=lookup,
    )


def export_data(
    data: str | PathLike[str] | Mapping[str, Any],
    out: str | PathLike[str],
    *,
    format: str,
    on_event: Listener = ignore,
    lookup: Lookup | None = None,
) -> Path:
    """Write a data set, or what else `process_data` takes, in another format, with its images; returns what was written.

    `format` is the name of a data source, such as `llava-json`, or `llava`. DataError where it cannot be written.
    """
    lookup, folder = lookup or installed(), Path(out)
    source = cast("type[DataSource[Any]]", lookup.find("data_source", _source_named(format, lookup)).component)
    plan = resolve_data(data if isinstance(data, Mapping) else Path(data), lookup)
    _refuse_existing(folder)
    result = pipeline.read_records(plan.sources, plan.operators, seed=plan.seed, strict=plan.strict)
    for stage in result.stages:
        on_event(Message(told(asdict(stage)), "warning" if stage.dropped else "info"))
    for bad in result.bad[:MAX_TOLD]:
        on_event(Message(f"  {bad.where}: {bad.why}", "warning"))
    if len(result.bad) > MAX_TOLD:
        on_event(Message(f"  … and {len(result.bad) - MAX_TOLD:,} more, which graftwork data process names", "warning"))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with hidden(folder.parent) as work:
        written = source.write((replace(record, source=0) for record in result.records), work)
        put_in_place(work, folder)
    return folder / written.relative_to(work)


def _source_named(given: str, lookup: Lookup) -> str:
    """The data source that a name means, which may leave out what the format is made of."""
    names = lookup.names("data_source")
    found = next((given + suffix for suffix in SUFFIXES if given + suffix in names), None)
    if found is None:
        raise DataError(f"there is no data source '{given}'{suggestion(given, names)}")
    return found
