"""What the ops share that take lists with an entry for every layer."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fused_so.ops import _check


def lists_of_layers(**arguments: object) -> dict[str, list]:
    """The arguments as lists, all as long as the first."""
    lists: dict[str, list] = {}
    first = next(iter(arguments))
    for name, given in arguments.items():
        lists[name] = _check.tensor_list(name, given)
        count = len(lists[first])
        if len(lists[name]) != count:
            raise ValueError(
                f"{name} must hold {count} entries, one for each of {first}, got {len(lists[name])}"
            )
    return lists


def by_device(tensors: Sequence[Tensor]) -> list[list[int]]:
    """The numbers of the tensors that are on one device, of each device: one call of a kernel."""
    members: dict[object, list[int]] = {}
    for i, tensor in enumerate(tensors):
        members.setdefault(tensor.device, []).append(i)
    return list(members.values())
