"""What every test shares."""

from __future__ import annotations

import os

import pytest
import torch

# Triton decides at import whether its kernels run in the interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
