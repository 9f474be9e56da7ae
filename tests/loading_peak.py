"""A program for several processes: build the plans in a folder, and measure what their tensors take in memory.

`python loading_peak.py FOLDER` writes, for each `FOLDER/NAME.plan`, what a process has measured into `FOLDER/NAME.RANK`.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from tiny_runs import COMPONENTS
from torch import Tensor

from graftwork import processes
from graftwork.build import compose
from graftwork.contracts import Assembly, DictLookup, Plan
from graftwork.memory.timeline import Allocation
from graftwork.memory.tracking import Tracker
from graftwork_fsdp import Fsdp
from graftwork_nf4 import Nf4
from graftwork_zero import Zero

LOOKUP = DictLookup(*COMPONENTS, Fsdp, Zero, Nf4)


class RealTensors(Tracker):
    """Follows storages that hold something."""

    def record(self, tensor: Tensor, path: str, phase: str) -> Allocation | None:
        tensor = getattr(tensor, "_local_tensor", tensor)  # around which a DTensor has a storage of no memory
        return None if tensor.is_meta else super().record(tensor, path, phase)


def kept(tensor: Any) -> int:
    """The bytes of a tensor that this process keeps."""
    if hasattr(tensor, "ds_tensor"):
        return int(tensor.ds_tensor.nbytes)
    return int((tensor.to_local() if hasattr(tensor, "to_local") else tensor).untyped_storage().nbytes())


def digests(assembly: Assembly) -> dict[str, str]:
    """What every parameter and buffer holds, all of it. Collective."""
    model = assembly.model
    found = {}
    with assembly.full_params([name for name, _ in model.named_parameters()]):
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            content = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            found[name] = f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(content).hexdigest()}"
    return found


def measured(plan: Plan) -> dict[str, Any]:
    """What building takes at most and in the end, in bytes, and what is built."""
    tracker = RealTensors()
    with tracker.following():
        assembly = compose.build(plan, LOOKUP, device="cpu")
    tensors = (*assembly.model.parameters(), *assembly.model.buffers())
    share = sum(map(kept, tensors)) + sum(value.nbytes for value in assembly.adaptation.base_copy.values())
    return {"peak": tracker.timeline.footprint(0).peak, "share": share, "digests": digests(assembly)}


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    with processes.join("cpu"):
        for file in sorted(folder.glob("*.plan")):
            found = measured(Plan.from_json(json.loads(file.read_text(encoding="utf-8"))))
            file.with_suffix(f".{processes.rank()}").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
