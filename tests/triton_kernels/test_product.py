"""The parts that the products share: plan, order of the tiles, halves, addresses."""

import itertools

import pytest
import torch
import triton
import triton.language as tl

from fused_so.triton_kernels import _matrix, _product
from tests.triton_kernels.device import DEVICE, far_apart


@pytest.mark.parametrize("dtype", _product.CONFIGS)
@pytest.mark.parametrize("splittable", [True, False])
def test_plan_covers_the_sum_once(dtype, splittable):
    sizes = (1, 10, 64, 500, 2000)
    for m, n, k in itertools.product(sizes, sizes, (1, 127, 128, 257, 5000, 10**6)):
        config, tiles, splits, depth = _product.plan(m, n, k, dtype, splittable=splittable)
        assert tiles == -(-m // config.block_m) * -(-n // config.block_n)
        assert depth % config.block_k == 0
        assert (splits - 1) * depth < k <= splits * depth
        assert splittable or splits == 1


def test_plan_fills_a_gpu_where_it_can():
    def chosen(*sizes):
        config, tiles, splits, _ = _product.plan(*sizes, torch.float32)
        return config.block_m, tiles, splits

    assert chosen(2000, 2000, 1000) == (128, 256, 1)
    assert chosen(500, 250, 1024) == (64, 32, 4)
    assert chosen(64, 64, 4096) == (32, 4, 32)
    assert chosen(10, 20, 30) == (32, 1, 1)
    # A side of no columns has its sums to write all the same.
    assert chosen(0, 70, 30) == chosen(70, 0, 30) == (32, 3, 1)


@pytest.mark.parametrize(("tiles_m", "tiles_n"), [(1, 1), (1, 9), (9, 1), (7, 5), (11, 9)])
def test_every_tile_once(tiles_m, tiles_n):
    @triton.jit
    def positions(i_ptr, j_ptr, size_m, size_n, BLOCK: tl.constexpr):
        tile = tl.program_id(0)
        i, j = _product.product_tile(tile, size_m, size_n, BLOCK, BLOCK)
        tl.store(i_ptr + tile, i)
        tl.store(j_ptr + tile, j)

    i, j = (torch.full((tiles_m * tiles_n,), -1, device=DEVICE) for _ in range(2))
    positions[(len(i),)](i, j, tiles_m * 16 - 3, tiles_n * 16, BLOCK=16)
    expected = itertools.product(range(tiles_m), range(tiles_n))
    assert sorted(zip(i.tolist(), j.tolist(), strict=True)) == list(expected)


def test_stores_past_32_bits():
    @triton.jit
    def fill(x_ptr, stride, rows, cols, BLOCK: tl.constexpr):
        at = tl.arange(0, BLOCK)
        value = at[:, None] * 10 + at[None, :]
        _product.store_tile(x_ptr, stride, 1, rows, cols, at, at, value.to(tl.float16))

    x = far_apart(torch.zeros(3, 5, dtype=torch.float16, device=DEVICE))
    fill[(1,)](x, x.stride(0), 3, 5, BLOCK=16)
    expected = torch.arange(3)[:, None] * 10 + torch.arange(5)
    assert torch.equal(x.cpu(), expected.half())


@pytest.fixture
def cuda_precision():
    """The newer of PyTorch's two settings."""
    setting = torch.backends.cuda.matmul
    before = setting.fp32_precision
    yield setting
    setting.fp32_precision = before


def test_the_newer_setting_of_the_precision_is_followed(cuda_precision):
    assert _matrix.float32_precision() == "highest"
    cuda_precision.fp32_precision = "tf32"
    # PyTorch itself raises here: the older setting still says "highest".
    assert _matrix.float32_precision() == "high"
    assert not _product.rounded(torch.bfloat16)
    cuda_precision.fp32_precision = "ieee"
    assert _matrix.float32_precision() == "highest"
