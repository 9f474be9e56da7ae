"""Prints data sets, how they were verified, and the histories of single records."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from graftwork.cli.console import make_table, print_json

if TYPE_CHECKING:
    from rich.console import Console

    from graftwork.jobs.data_sets import DataSet


def print_data_set(console: Console, made: DataSet, as_json: bool) -> None:
    """What each stage did, and how what was written is verified."""
    from rich.text import Text

    if as_json:
        print_json({"folder": str(made.folder), **made.manifest})
        return
    table = make_table(["stage", "read*", "made*", "changed*", "dropped*", "kept*"])
    for stage in made.stages:
        table.add_row(
            Text(stage["name"]), *(f"{stage[key]:,}" for key in ("read", "made", "changed", "dropped", "kept"))
        )
    console.print()
    console.print(table)
    if verification := made.manifest.get("verification"):
        print_verification(console, verification)
    console.print(f"\n{made.records:,} records: {made.folder}", markup=False, soft_wrap=True)


def print_verification(console: Console, verification: Mapping[str, Any]) -> None:
    """By group, how many answers were called right, how many wrong ones were too, and what was kept."""
    from rich.text import Text

    table = make_table(["verified", "asked*", "affirmed*", "control*", "of it affirmed*", "kept*"])
    for group in verification["groups"]:
        table.add_row(
            Text(group["group"] or "(no group)"),
            f"{group['records']:,}",
            _share(group["affirmed"], group["records"]),
            f"{group['control']:,}",
            _share(group["control_affirmed"], group["control"]),
            f"{group['kept']:,}",
        )
    console.print()
    console.print(table)
    for group in verification["groups"]:
        if group["why"]:
            console.print(f"{group['group'] or '(no group)'}: {group['why']}", style="yellow", markup=False)
        for name, examples in group["examples"].items():
            for example in examples[:1]:
                console.print(f"  {name}: {example}", markup=False, highlight=False)


def _share(count: int, of: int) -> str:
    return f"{count / of:.1%}" if of else "–"


def print_history(console: Console, found: Mapping[str, Any], indent: str = "") -> None:
    """What became of a record, and of those that it was made from."""

    def say(text: str, style: str = "") -> None:
        lines = f"\n{indent}      ".join(_printable(text).splitlines())
        console.print(f"{indent}{lines}", style=style, markup=False, highlight=False, soft_wrap=True)

    if data_set := found.get("data_set"):
        say(f"data set: {data_set}")
    fate = "kept" if found["kept"] else "dropped" if "dropped" in found else "not in the data"
    say(f"{found['id']}: {fate}", "green" if found["kept"] else "red")
    say(f"  from: {found.get('from') or 'not recorded'}")
    if made_by := found.get("made_by"):
        say(f"  made by: {made_by}")
    for change in found["changes"]:
        place = "beside the turns" if change["turn"] is None else f"turn {change['turn']}"
        say(f"  changed by {change['stage']}, {place}: {change['before']!r} -> {change['after']!r}")
    if dropped := found.get("dropped"):
        say(f"  dropped by {dropped['stage']}: {dropped['why']}")
    for path in found.get("images", ()):
        say(f"  image: {path}")
    for turn in found.get("record", {}).get("conversations", ()):
        say(f"  {turn['from']}: {turn['value']}")
    for name, identity in found.get("writers", {}).items():
        say(f"  {name}: {json.dumps(identity, ensure_ascii=False)}")
    for reply in found.get("replies", ()):
        say(f"  asked by {reply['stage']} of the {reply['writer']}:")
        for role, text in reply["prompt"]:
            say(f"    {role}: {text}")
        say(f"    raw reply: {json.dumps(reply['reply'], ensure_ascii=False)}")
    if verified := found.get("verification"):
        control = f"control {_share(verified['control_affirmed'], verified['control'])} of {verified['control']:,}"
        say(
            f"  verified by {verified['use']}, group '{verified['group']}': affirmed "
            f"{_share(verified['affirmed'], verified['records'])} of {verified['records']:,}, {control}"
        )
    for parent in found.get("of", ()):
        say("  of:")
        print_history(console, parent, f"{indent}    ")


def _printable(text: str) -> str:
    """A text without what a terminal would take for commands."""
    return "".join(letter if letter.isprintable() or letter == "\n" else f"\\x{ord(letter):02x}" for letter in text)
