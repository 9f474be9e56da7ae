"""Writers as a file names them: a checkpoint, a model or an endpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from graftwork.config import runfile
from graftwork.config.runfile import RunFile, TableReader
from graftwork.config.tables import EndpointTable, WriterTable
from graftwork.config.wording import join
from graftwork.errors import RunFileError

ONE_OF = ("checkpoint", "model", "endpoint")


@dataclass(frozen=True)
class WriterPlan:
    """Who writes: exactly one of a checkpoint, a model and an endpoint."""

    where: str
    """The dotted path of its table."""
    fields: WriterTable
    model: RunFile | None = None
    """A run of nothing but that model."""
    endpoint: EndpointTable | None = None
    seed: int = 0


def read_writer(reader: TableReader, table: Mapping[str, Any], where: str, seed: int) -> WriterPlan | None:
    """The writer of a table; None, and a problem more, where it has mistakes."""
    before = len(reader.problems)
    fields, tables = reader.split(WriterTable, table, where)
    reader.unknown(tables, ONE_OF, where)
    named = [name for name in ONE_OF if name in table]
    if len(named) != 1:
        found = " and ".join(named) or "none of them"
        reader.problems.append(f"{where}: names {found}; name one of {', '.join(ONE_OF)}")
        return None
    endpoint = None
    if "endpoint" in tables:
        endpoint = reader.read(EndpointTable, reader.table(tables, "endpoint", where), join(where, "endpoint"))
        reader.problems += [f"{join(where, 'endpoint')}: {each}" for each in _mistakes(endpoint)] if endpoint else []
    if fields and fields.variant == "base" and named != ["checkpoint"]:
        reader.problems.append(f"{where}.variant: only a checkpoint has a base; leave it out")
    model = _model(reader, reader.table(tables, "model", where), where, seed) if "model" in tables else None
    if len(reader.problems) > before or fields is None:
        return None
    return WriterPlan(where, fields, model, endpoint, seed)


def _mistakes(endpoint: EndpointTable) -> list[str]:
    """What is wrong with an endpoint beyond the types of its keys."""
    found = []
    if "@" in endpoint.url.split("//")[-1].split("/")[0]:
        found.append("'url' holds a password, which would be written down; name a variable in 'key_from' instead")
    elif "?" in endpoint.url or "#" in endpoint.url:
        found.append(
            "'url' goes on with '?' or '#', which would be written down; leave that out, and name a variable that holds a "
            "key in 'key_from'"
        )
    elif not _is_address(endpoint.url):
        found.append(f"'url' is '{endpoint.url}'; give an address such as http://127.0.0.1:8000/v1")
    if not endpoint.model:
        found.append("'model' is missing; name the model that the server has")
    return found


def _model(reader: TableReader, table: Mapping[str, Any], where: str, seed: int) -> RunFile | None:
    """The run of nothing but a model, whose table is that of a run file."""
    try:
        return runfile.parse_run({"seed": seed, "model": dict(table)}, reader.folder)
    except RunFileError as error:
        reader.problems += [f"{where}.{line}" for line in error.details]
        return None


def _is_address(url: str) -> bool:
    try:
        address = urlsplit(url)
        return address.scheme in ("http", "https") and bool(address.hostname) and address.port != 0
    except ValueError:  # Brackets that are left open, or a port that is none.
        return False


def is_loopback(url: str) -> bool:
    """Whether an endpoint is on this machine."""
    host = urlsplit(url).hostname or ""
    try:
        address = ip_address(host)
    except ValueError:
        return host == "localhost"
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback
