"""PyTorch's mode of fake tensors, whose cache is asked faster: a rehearsal asks it some 100,000 times."""

from __future__ import annotations

from typing import Any


def mode() -> Any:
    """The mode in which tensors are fake. The key of an operator in the cache has the same facts as PyTorch's (version 2.13), but each
    plain tensor is one tuple of them."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    strided = torch.strided
    plain = {int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format}

    class Mode(FakeTensorMode):  # type: ignore[no-untyped-call]
        def _prep_args_for_hash(self, result: list[object], args: Any, state: Any, id_hashed_objects: Any) -> None:
            if isinstance(args, dict):
                result.append(tuple(args))
                args = args.values()
            for arg in args:
                kind = type(arg)
                if kind in plain:
                    result += (kind, arg)
                elif kind is FakeTensor and arg.constant is None and arg.fake_mode is self and arg.layout is strided:
                    result.append(facts(arg))
                elif kind in (list, tuple):
                    result.append((kind, len(arg)))
                    self._prep_args_for_hash(result, arg, state, id_hashed_objects)
                else:
                    super()._prep_args_for_hash(result, (arg,), state, id_hashed_objects)

    return Mode()


def facts(tensor: Any) -> tuple[object, ...]:
    """All that decides what an operator makes of a tensor without content."""
    return (
        tensor.dtype,
        tensor.shape,
        tensor.stride(),
        tensor.fake_device,
        tensor.storage_offset(),
        tensor.untyped_storage().nbytes(),
        tensor.requires_grad,
        tensor.is_conj(),
        tensor.is_neg(),
        tensor.is_inference(),
    )
