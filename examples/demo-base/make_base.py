"""Make the demo's base weights again: tokenizer, training from random weights, merge, and the folder that ships.

    python examples/demo-base/make_base.py [FOLDER]

It takes about a quarter of an hour on two CPU cores. FOLDER is where the base goes, by default where the demo looks for it.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
SHIPPED = HERE.parents[1] / "plugins" / "graftwork_demo" / "base"


def graftwork(*arguments: str | Path) -> None:
    """Run one command of Graftwork, and stop where it fails."""
    subprocess.run([sys.executable, "-m", "graftwork", *map(str, arguments)], check=True)


def main() -> None:
    """Train, merge, and put the result in place."""
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else SHIPPED
    subprocess.run([sys.executable, HERE / "make_tokenizer.py"], check=True)
    out, merged = HERE / "out", HERE / "merged"
    for old in (out, merged):
        shutil.rmtree(old, ignore_errors=True)
    graftwork("train", HERE / "base.toml", "--out", out)
    graftwork("merge", out, merged)
    (merged / "certificate.json").unlink()
    shutil.rmtree(target, ignore_errors=True)
    shutil.move(merged, target)


if __name__ == "__main__":
    main()
