"""Adapters as peft itself opens them: what an import is compared with."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import peft
from peft.utils import load_peft_weights

from graftwork.contracts import Reference
from graftwork.errors import AdapterError

if TYPE_CHECKING:
    from torch import nn


def opened_by_peft(reference: Reference, folder: Path, optional: Sequence[str]) -> Reference:
    """A model with the adapter in a folder, of which peft matches the names and reads the settings; AdapterError says why it cannot.

    `optional` modules of which the folder holds nothing are hidden from peft, as upstream gives it its model before the towers.
    """
    readers, model = (f"peft {peft.__version__}", *reference.readers), reference.module
    name = " and ".join(readers)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    with warnings.catch_warnings(action="ignore"):  # what it finds wrong is in its result
        try:
            config = peft.PeftConfig.from_pretrained(str(folder))
            config.inference_mode = True
            found = load_peft_weights(str(folder), device="cpu").keys()
            absent = [module for module in optional if not any(f".{module}." in name for name in found)]
            with without(model, absent):
                read = peft.PeftModel(model, config).load_adapter(str(folder), "default", torch_device="cpu")
        except Exception as error:  # whatever peft raises for a folder that it cannot open
            said = next(iter(str(error).splitlines()), "") or type(error).__name__
            raise AdapterError(f"{name} cannot open '{folder}' ({said[:200]})") from error
    if found and len(read.unexpected_keys) >= len(found):
        raise AdapterError(
            f"{name} cannot open '{folder}': it has a place for none of its tensors, such as '{read.unexpected_keys[0]}'"
        )
    rows = getattr(config, "trainable_token_indices", None) or []
    return replace(
        reference,
        readers=readers,
        tokens=tuple({token for each in rows.values() for token in each} if isinstance(rows, dict) else rows),
        missing=(*read.missing_keys,),
        unexpected=(*read.unexpected_keys,),
    )


@contextmanager
def without(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """While entered, a model does not have some of its modules."""
    places = [(model.get_submodule(owner), leaf) for owner, _, leaf in (name.rpartition(".") for name in names)]
    taken = [owner._modules.pop(leaf) for owner, leaf in places]
    try:
        yield
    finally:
        for (owner, leaf), module in zip(places, taken, strict=True):
            owner._modules[leaf] = module
