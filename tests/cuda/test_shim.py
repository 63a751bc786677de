"""The shim that runs CUDA kernels on the CPU: it does what a GPU does, and names every fault."""

from __future__ import annotations

import math
import re

import pytest
import torch

from tests.cuda import shim

THREADS = 64


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return shim.build(shim.SHIM / "faults.cpp", tmp_path_factory.mktemp("cuda_shim"))


def run(library, name, *, blocks=1, seed=0):
    given, out = torch.arange(THREADS).float(), torch.full((THREADS,), math.nan)
    library.shim_reset(seed)
    status = library.run(name.encode(), blocks, shim.pointer(given), shim.pointer(out))
    return status, library.shim_error().decode(), out


@pytest.mark.parametrize("seed", range(4))
def test_a_sound_kernel(library, seed):
    status, error, out = run(library, "sound", seed=seed)
    assert (status, error) == (0, "")
    t = torch.arange(THREADS)
    # A warp's sum of its neighbors' values, plus its first thread; `up` then `down` by one lane.
    first = ((t + 1) % THREADS).reshape(2, 32).sum(1).float() + torch.tensor([0.0, 32.0])
    sent = first.repeat_interleave(32) + t
    up = torch.where(t % 32 == 0, sent, sent.roll(1))
    down = torch.where(t % 32 == 31, up, up.roll(-1))
    assert torch.equal(out, down[t // 32 * 32 + (t + 1) % 32])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing_barrier", "shared memory"),  # in a race, or not yet written
        ("write_after_read", "entry .* of shared memory in a race with block 0, thread"),
        ("warp_barrier_for_a_block", "shared memory"),
        ("unwritten_shared", "thread 5: reads entry .* of shared memory, which nobody has written"),
        ("unwritten_output", "reads entry .* of out, which nobody has written"),
        ("reads_beyond", "thread 63: reads 4 bytes that belong to nothing"),
        ("writes_beyond", "thread 0: writes 4 bytes that belong to nothing"),
        ("index_beyond", "thread 63: index 64 is out of bounds, line"),
        ("writes_input", "writes to the input in"),
        ("two_barriers", "diverged: thread .* waits at a barrier, line .*waits at a barrier, line"),
        ("leaves_early", "diverged: .*thread 3 has finished"),
        ("lane_is_missing", "diverged: .*waits in a warp operation"),
        ("partial_mask", "only full masks are supported, got 0xffff"),
    ],
)
def test_every_fault_is_named(library, name, message, seed):
    status, error, _ = run(library, name, seed=seed)
    assert status != 0
    assert re.search(message, error), error


def test_blocks_may_not_write_the_same(library):
    assert run(library, "blocks_write_the_same")[0] == 0
    status, error, _ = run(library, "blocks_write_the_same", blocks=3)
    assert status != 0
    assert "of out in a race with block" in error


def test_the_order_of_threads_is_random(library):
    errors = {run(library, "writes_input", seed=seed)[1] for seed in range(5)}
    assert len(errors) > 1
    assert run(library, "writes_input", seed=1)[1] == run(library, "writes_input", seed=1)[1]


def test_the_product_of_the_tensor_cores(library):
    a, b, c = torch.randn(16, 8), torch.randn(8, 8), torch.randn(16, 8)
    # 11 significant bits of an operand count.
    left, right = ((x.view(torch.int32) & ~0x1FFF).view(torch.float32).double() for x in (a, b))
    exact = c.double() + left @ right
    assert library.multiply(*map(shim.pointer, (a, b, c))) == 0, library.shim_error()
    # Cut off after 24 bits, never rounded up.
    assert (c.double().abs() <= exact.abs()).all()
    assert ((c.double() - exact).abs() <= 2**-23 * exact.abs()).all()
