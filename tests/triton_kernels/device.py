"""Tensors on the device that the kernels run on: a GPU, or a CPU under the interpreter."""

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def moved(x):
    """x on DEVICE with the strides that it has, and what lies between its entries."""
    if x is None:
        return None
    whole = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
    return whole.to(DEVICE).as_strided(x.shape, x.stride(), x.storage_offset())


def far_apart(x):
    """x with its rows 2^30 + 1 entries apart: the third one begins past 2^31.

    Untouched pages cost no memory."""
    rows, cols = x.shape
    stride = 2**30 + 1
    room = torch.empty((rows - 1) * stride + cols, dtype=x.dtype, device=x.device)
    return room.as_strided((rows, cols), (stride, 1)).copy_(x)
