"""The CUDA kernels of damped_inverse, run on the CPU under the checks of tests/ops."""

from __future__ import annotations

import ctypes
import math
import sys

import pytest
import torch

from fused_so.ops import damped_inverse
from tests.cuda import shim
from tests.ops import test_damped_inverse as checks

# Around the sizes of the kernels (16, 32, 64, 128) and the blocks beyond (64).
SIZES = [1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 191, 192, 193, 257]
DAMPING = checks.DAMPING


class Kernels:
    """The op's implementation of fused_so::damped_inverse(a, damping), with the shim as GPU."""

    def __init__(self, library: ctypes.CDLL):
        self.library = library
        library.panel_entries.restype = ctypes.c_int64
        self.seed = 0

    def __call__(self, a, damping):
        inverse = torch.full(a.shape, math.nan, dtype=checks.widened(a).dtype)
        info = torch.full(damping.shape, -1, dtype=torch.int32)
        sizes = (ctypes.c_int64(damping.numel()), ctypes.c_int64(a.shape[-1]))
        if a.numel() == 0:
            return inverse, info.zero_()
        entries = self.library.panel_entries(*sizes)
        panels = torch.full((entries,), math.nan, dtype=inverse.dtype)
        orders = torch.full((damping.numel() if entries else 0,), -1, dtype=torch.int32)
        tensors = (a.contiguous(), damping.contiguous(), inverse, info, panels, orders)
        self.library.shim_reset(self.seed)
        status = self.library.damped_inverse(
            shim.NAMES[a.dtype].encode(), *map(shim.pointer, tensors), *sizes
        )
        shim.assert_success(self.library, status)
        return inverse, info


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return shim.build(shim.SHIM / "damped_inverse.cpp", tmp_path_factory.mktemp("cuda_shim"))


@pytest.fixture(autouse=True)
def kernels(library, monkeypatch):
    """Puts the CUDA kernels behind the public function, and few matrices into the checks."""
    kernels = Kernels(library)
    monkeypatch.setattr(sys.modules["fused_so.ops.damped_inverse"], "_damped_inverse", kernels)
    monkeypatch.setattr(checks, "batch_for", lambda d: min(64, max(3, 600 // d)))
    return kernels


@pytest.mark.parametrize("d", SIZES)
def test_every_size_around_the_tiles(d):
    checks.test_every_size_around_the_tiles(d)


def test_nine_blocks(monkeypatch):
    monkeypatch.setattr(checks, "batch_for", lambda d: 1)
    checks.test_every_size_around_the_tiles(513)


@pytest.mark.parametrize("dtype", checks.DTYPES)
@pytest.mark.parametrize("d", [7, 20, 40, 100, 130])
def test_every_dtype(dtype, d):
    checks.test_every_dtype_around_the_tiles(dtype, d)


@pytest.mark.parametrize("batch", [(), (1,), (2, 3), (0,), (2, 0)])
@pytest.mark.parametrize("d", [0, 1, 20])
def test_batch_shapes(batch, d):
    checks.test_batch_shapes(batch, d)


def test_a_damping_for_each_matrix():
    checks.test_a_damping_for_each_matrix()


def test_a_damping_for_each_large_matrix():
    a, damping = checks.covariance_like(3, 150, 150), torch.tensor([0.01, 0.1, 2.0])
    inverse, _ = damped_inverse(a, damping)
    for one, matrix, number in zip(inverse, a, damping, strict=True):
        assert torch.equal(one, damped_inverse(matrix, number)[0])
    checks.assert_within_budget(inverse, a, damping)


@pytest.mark.parametrize("d", [1, 5, 31, 70, 130, 200])
def test_reads_only_the_lower_triangle(d):
    checks.test_reads_only_the_lower_triangle(d)


@pytest.mark.parametrize("d", [1, 16, 40, 130])
def test_the_product_with_the_matrix_is_the_identity(d):
    checks.test_the_product_with_the_matrix_is_the_identity(d)


@pytest.mark.parametrize("d", [1, 2, 16, 17, 33, 70, 130, 200])
def test_info_is_the_first_bad_minor_in_all_blocks(d):
    checks.test_info_is_the_first_bad_minor_in_all_blocks(d)


@pytest.mark.parametrize("d", [1, 16, 33, 70, 130])
def test_a_nan_is_never_positive_definite(d):
    checks.test_a_nan_is_never_positive_definite(d)


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, -1])
def test_rounding_to_tf32_loses_no_nan(bits):
    a = checks.covariance_like(130, 130)
    a[100, 3] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    assert damped_inverse(a, DAMPING)[1].item() == 101


@pytest.mark.parametrize("d", [3, 40, 100, 130, 200])
def test_bad_matrices_leave_the_good_ones_alone(d):
    checks.test_bad_matrices_leave_the_good_ones_alone(d)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
@pytest.mark.parametrize("d", [5, 40, 130])
def test_huge_and_tiny_scales(d, scale):
    checks.test_huge_and_tiny_scales(d, scale)


@pytest.mark.parametrize("condition", [1e2, 1e5])
@pytest.mark.parametrize("d", [10, 64, 130])
def test_ill_conditioned_spectra(d, condition):
    checks.test_ill_conditioned_spectra(d, condition)


@pytest.mark.parametrize("d", [10, 64, 130])
def test_condition_1e7(d):
    checks.test_condition_1e7(d)


def test_a_list_of_mixed_sizes_keeps_its_order():
    checks.test_a_list_of_mixed_sizes_keeps_its_order()


def test_agrees_with_the_reference_where_it_fails():
    checks.test_agrees_with_the_reference_where_it_fails()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("d", [20, 32, 50, 100, 150])
def test_the_bits_do_not_depend_on_the_order_of_the_threads(kernels, d, dtype):
    a = checks.covariance_like(2, d, d, dtype=dtype)
    a[1, d // 2, d // 2] = -1.0
    results = []
    for seed in range(3):
        kernels.seed = seed
        results.append(damped_inverse(a, DAMPING))
    for inverse, info in results:
        assert info.tolist() == [0, d // 2 + 1]
        assert torch.equal(inverse[0], results[0][0][0])


@pytest.mark.parametrize(
    ("d", "launches"), [(1, 1), (32, 1), (64, 1), (128, 1), (129, 7), (192, 7), (193, 9)]
)
def test_one_launch_up_to_128(kernels, d, launches):
    damped_inverse(checks.covariance_like(3, d, d), DAMPING)
    assert kernels.library.shim_launches() == launches


def test_every_kernel_compiles_without_spills(tmp_path):
    """For every architecture: neither spills nor a stack, and two blocks of 256 threads an SM."""
    found = shim.resources(shim.ROOT / "csrc" / "cuda" / "damped_inverse.cu", tmp_path)
    small, begin, panel_and_update = 4 * 4, 4, 2 * 2
    assert len(found) == (small + begin + panel_and_update) * len(shim.ARCHITECTURES)
    for kernel in found:
        assert kernel.stack == kernel.spills == 0, kernel
        assert kernel.shared <= 20 << 10, kernel
        # But one where 128 rows of float64 lie in 72 registers a thread, and their updates too.
        large_double = "invert_small" in kernel.kernel and "IddLi16ELi16ELi128" in kernel.kernel
        assert kernel.registers <= (255 if large_double else 128), kernel
