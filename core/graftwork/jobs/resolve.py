"""From a run file to a plan on this machine."""

from __future__ import annotations

from graftwork.config.machine import detect_machine
from graftwork.config.resolve import resolve
from graftwork.config.runfile import RunFile
from graftwork.contracts.lookup import Lookup
from graftwork.contracts.plan import Plan


def resolve_run(run: RunFile, lookup: Lookup, *, fetch: bool = True, missing_files: list[str] | None = None) -> Plan:
    """The plan of a run file on this machine, with every installed and ready kernel to fall back on (see `resolve`)."""
    return resolve(
        run, lookup, detect_machine(), kernels=preferred_kernels(lookup), fetch=fetch, missing_files=missing_files
    )


def preferred_kernels(lookup: Lookup) -> list[str]:
    """The attention kernels that work here, the fastest first by their own word."""
    ready = lookup.names("attention", ready_only=True)
    found = {name: lookup.find("attention", name).component for name in ready}
    return sorted(ready, key=lambda name: -getattr(found[name], "preference", 0))
