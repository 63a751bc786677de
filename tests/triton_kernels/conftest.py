"""What the interpreter needs, and poison for the memory that the launchers allocate."""

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter


@pytest.fixture(autouse=True)
def bfloat16_dot(monkeypatch):
    """Triton's interpreter multiplies the bit patterns of bfloat16 as if they were integers."""
    builder = interpreter.InterpreterBuilder
    create_dot = builder.create_dot

    def decoded(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        bits = x.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def patched(self, a, b, *args):
        return create_dot(self, decoded(a), decoded(b), *args)

    monkeypatch.setattr(builder, "create_dot", patched)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Memory the launchers allocate holds NaN (integers: 2), so that nothing relies on zeros."""

    def poison(self, *args, new_empty=torch.Tensor.new_empty, **kwargs):
        x = new_empty(self, *args, **kwargs)
        return x.fill_(float("nan") if x.is_floating_point() else 2)

    monkeypatch.setattr(torch.Tensor, "new_empty", poison)


@pytest.fixture(autouse=True)
def bfloat16_rounding(monkeypatch):
    """Triton's interpreter cuts float32 off to bfloat16 where a GPU rounds to nearest."""
    builder = interpreter.InterpreterBuilder
    cast = builder.cast_impl

    def patched(self, x, to):
        if x.dtype.scalar != tl.float32 or to.scalar != tl.bfloat16:
            return cast(self, x, to)
        rounded = torch.from_numpy(np.array(x.data)).bfloat16().view(torch.int16)
        return interpreter.TensorHandle(rounded.numpy().view(np.uint16), tl.bfloat16)

    monkeypatch.setattr(builder, "cast_impl", patched)
