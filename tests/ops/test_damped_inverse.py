"""damped_inverse against float64 and against PyTorch's own route in the same dtype."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch

import fused_so
from fused_so.ops import damped_inverse
from tests.ops import budget

# Around the block sizes (16, 32, 64), the panels (8, 16, 32) and the changes of method (128, 512).
SIZES = [*range(1, 71), 127, 128, 129, 255, 256, 257, 300, 511, 512, 513, 1000]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
DAMPING = 0.1


def covariance_like(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Random symmetric positive semidefinite matrices with eigenvalues of order one."""
    h = torch.randn(*shape[:-2], shape[-1] + 8, shape[-1], dtype=torch.float64)
    return (h.mT @ h / (shape[-1] + 8)).to(dtype)


def widened(a: torch.Tensor) -> torch.Tensor:
    return a if a.dtype == torch.float64 else a.float()


def damped(a: torch.Tensor, damping: float | torch.Tensor) -> torch.Tensor:
    damping = torch.as_tensor(damping, dtype=a.dtype)
    return a + damping[..., None, None] * torch.eye(a.shape[-1], dtype=a.dtype)


def plain_inverse(a: torch.Tensor, damping: float | torch.Tensor) -> torch.Tensor:
    """The ordinary PyTorch route, in the dtype in which the op accumulates."""
    factor, _ = torch.linalg.cholesky_ex(damped(widened(a), damping))
    return torch.cholesky_inverse(factor)


def assert_within_budget(inverse, a, damping):
    """At most twice the error of PyTorch's route, plus eps times the largest entry.

    Of one matrix with a few rows the error is a matter of luck, so callers pass many, and PyTorch's
    error is the worst of four orders of rows and columns.
    """
    damping = torch.as_tensor(damping, dtype=inverse.dtype)
    exact_input = damped(widened(a).double(), damping)
    plain = plain_inverse(a, damping)
    if inverse.dtype == torch.float64:
        # No wider dtype to be exact in: both keep the bound of a backward stable inverse.
        bound = 8 * torch.finfo(torch.float64).eps * torch.linalg.cond(exact_input)
        assert ((inverse - plain).abs().amax((-2, -1)) <= bound * plain.abs().amax((-2, -1))).all()
        return
    # Not linalg.inv: batched on two threads, MKL's getri was seen never to return.
    exact = torch.cholesky_inverse(torch.linalg.cholesky(exact_input))
    error = (inverse.double() - exact).abs().max()
    plain_error = (plain.double() - exact).abs().max()
    for seed in range(3):
        order = torch.randperm(a.shape[-1], generator=torch.Generator().manual_seed(seed))
        permuted, truth = (x[..., order, :][..., order] for x in (a, exact))
        plain = plain_inverse(permuted, damping).double()
        plain_error = torch.maximum(plain_error, (plain - truth).abs().max())
    assert error <= 2 * plain_error + torch.finfo(inverse.dtype).eps * exact.abs().max()


def batch_for(d: int) -> int:
    return min(64, max(4, 3000 // d))


@budget.needs_kernel
def test_the_compiled_kernel_is_what_runs():
    assert torch._C._dispatch_has_kernel_for_dispatch_key("fused_so::damped_inverse", "CPU")


@pytest.mark.parametrize("d", SIZES)
def test_every_size_around_the_tiles(d):
    a = covariance_like(batch_for(d), d, d)
    inverse, info = damped_inverse(a, DAMPING)
    assert inverse.dtype == torch.float32
    assert info.dtype == torch.int32
    assert (info == 0).all()
    assert torch.equal(inverse, inverse.mT)
    assert_within_budget(inverse, a, DAMPING)


@pytest.mark.parametrize("d", [1023, 1025, 2049])
def test_large_sizes_around_the_tiles(d):
    a = covariance_like(d, d)
    inverse, info = damped_inverse(a, DAMPING)
    assert info.item() == 0
    assert torch.equal(inverse, inverse.mT)
    assert_within_budget(inverse, a, DAMPING)


def test_a_very_large_size():
    d = 4097
    h, x = torch.randn(64, d), torch.randn(d, 3, dtype=torch.float64)
    a = h.T @ h / 64

    def residual(inverse):
        y = inverse.double() @ x
        return (a.double() @ y + DAMPING * y - x).abs().max()

    inverse, info = damped_inverse(a, DAMPING)
    assert info.item() == 0
    assert torch.equal(inverse, inverse.mT)
    assert residual(inverse) <= 2 * residual(plain_inverse(a, DAMPING))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [1, 7, 16, 33, 100, 257, 520])
def test_every_dtype_around_the_tiles(dtype, d):
    a = covariance_like(batch_for(d), d, d, dtype=dtype)
    inverse, info = damped_inverse(a, DAMPING)
    assert inverse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (info == 0).all()
    assert torch.equal(inverse, inverse.mT)
    assert_within_budget(inverse, a, DAMPING)


@pytest.mark.parametrize("batch", [(), (1,), (5,), (2, 3), (1, 2, 1), (0,), (2, 0)])
@pytest.mark.parametrize("d", [0, 1, 20])
def test_batch_shapes(batch, d):
    a = covariance_like(*batch, d, d)
    inverse, info = damped_inverse(a, DAMPING)
    assert inverse.shape == a.shape
    assert info.shape == batch
    assert (info == 0).all()
    if a.numel():
        torch.testing.assert_close(inverse, plain_inverse(a, DAMPING), rtol=1e-4, atol=1e-4)


def test_a_damping_for_each_matrix():
    a = covariance_like(2, 3, 20, 20)
    damping = torch.rand(2, 3) + 0.01
    inverse, _ = damped_inverse(a, damping)
    assert_within_budget(inverse, a, damping)
    for index in [(0, 0), (1, 2)]:
        one, _ = damped_inverse(a[index], damping[index])
        assert torch.equal(inverse[index], one)
    assert torch.equal(damped_inverse(a, damping.double())[0], inverse)
    expanded = torch.full((1, 1), 0.5).expand(2, 3)
    assert torch.equal(damped_inverse(a, expanded)[0], damped_inverse(a, 0.5)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("d", [19, 40, 300])
def test_any_strides_to_the_bit(d, dtype):
    a = covariance_like(2, 3, d, d, dtype=dtype)
    wide = torch.full((2, 3, 2 * d, 3 * d), math.nan, dtype=dtype)
    wide[:, :, ::2, 1::3] = a
    views = {
        "column-major": a.mT.contiguous().mT,
        "strided": wide[:, :, ::2, 1::3],
        "batch dimensions swapped": a.transpose(0, 1).contiguous().transpose(0, 1),
        "batch dimensions inside": a.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1),
    }
    expected, _ = damped_inverse(a, DAMPING)
    for name, view in views.items():
        assert not view.is_contiguous()
        assert torch.equal(damped_inverse(view, DAMPING)[0], expected), name
    repeated, info = damped_inverse(a[0, 0].expand(4, 2, d, d), DAMPING)
    assert info.shape == (4, 2)
    assert (repeated == expected[0, 0]).all()


@pytest.mark.parametrize("d", [1, 5, 16, 31, 70, 130, 300, 520])
def test_reads_only_the_lower_triangle(d):
    a = covariance_like(2, d, d)
    poisoned = a.where(torch.ones(d, d).tril().bool(), math.nan)
    assert poisoned.isnan().sum() == d * (d - 1)
    before = poisoned.clone()
    assert torch.equal(damped_inverse(poisoned, DAMPING)[0], damped_inverse(a, DAMPING)[0])
    torch.testing.assert_close(poisoned, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("d", [1, 16, 40, 130, 260, 520])
def test_the_product_with_the_matrix_is_the_identity(d):
    a = covariance_like(d, d)
    inverse, _ = damped_inverse(a, DAMPING)
    product = damped(a.double(), DAMPING) @ inverse.double()
    off_diagonal = product - product.diagonal().diag()
    eps = torch.finfo(torch.float32).eps
    assert (product.diagonal() - 1).abs().max() <= 64 * eps
    assert off_diagonal.abs().max() <= 64 * eps


def failing_rows(d: int) -> list[int]:
    return sorted({0, 1, 14, 15, 16, 17, 31, 32, 63, 64, d // 2, d - 1} & set(range(d)))


@pytest.mark.parametrize("d", [1, 2, 16, 17, 33, 70, 130, 300, 520])
def test_info_is_the_first_bad_minor_in_all_blocks(d):
    a = covariance_like(d, d)
    for row in failing_rows(d):
        bad = a.clone()
        bad[row, row] = -1.0
        _, expected = torch.linalg.cholesky_ex(damped(bad, DAMPING))
        inverse, info = damped_inverse(bad, DAMPING)
        assert info.item() == row + 1 == expected.item()
        assert inverse.isnan().all()


@pytest.mark.parametrize("d", [1, 16, 33, 70, 300])
def test_a_nan_is_never_positive_definite(d):
    a = covariance_like(d, d)
    for row in failing_rows(d):
        for column in {0, row // 2, row}:
            bad = a.clone()
            bad[row, column] = math.nan
            inverse, info = damped_inverse(bad, DAMPING)
            assert info.item() == row + 1
            assert inverse.isnan().all()


@pytest.mark.parametrize("d", [3, 40, 300, 520])
def test_bad_matrices_leave_the_good_ones_alone(d):
    a = covariance_like(4, d, d)
    a[1, d - 1, d - 1] = -5.0
    a[2] = 0.0
    damping = torch.tensor([DAMPING, DAMPING, 0.0, DAMPING])
    inverse, info = damped_inverse(a, damping)
    assert info.tolist() == [0, d, 1, 0]
    assert inverse[1].isnan().all()
    assert inverse[2].isnan().all()
    for good in (0, 3):
        assert torch.equal(inverse[good], damped_inverse(a[good], DAMPING)[0])


@pytest.mark.parametrize("scale", [1e-37, 1e-30, 1e-12, 1e12, 1e30, 1e37])
@pytest.mark.parametrize("d", [5, 40, 300])
def test_huge_and_tiny_scales(d, scale):
    a = covariance_like(batch_for(d), d, d) + DAMPING * torch.eye(d)
    inverse, info = damped_inverse(a * scale, 0.0)
    assert (info == 0).all()
    assert_within_budget(inverse, a * scale, 0.0)


@pytest.mark.parametrize("d", [1, 5, 40, 300])
def test_denormal_entries(d):
    # (I + S)^-1 = I - S + S^2 ..., where the square of a denormal number is zero
    a = 1e-40 * (covariance_like(d, d) + torch.eye(d))
    assert a.abs().max() < torch.finfo(torch.float32).smallest_normal
    inverse, info = damped_inverse(a, 1.0)
    assert info.item() == 0
    off_diagonal = a - a.diagonal().diag()
    assert off_diagonal.count_nonzero() >= d * d // 2 - d
    assert (inverse - torch.eye(d) + off_diagonal).abs().max() <= 1e-44  # some last places
    # Alone they have an inverse, but not among the numbers of float32.
    inverse, info = damped_inverse(a, 0.0)
    assert info.item() == 0
    assert not inverse.diagonal().isfinite().any()


@pytest.mark.parametrize("condition", [1e2, 1e4, 1e5])
@pytest.mark.parametrize("d", [10, 64, 200])
def test_ill_conditioned_spectra(d, condition):
    basis, _ = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64))
    a = basis * torch.logspace(0, -math.log10(condition), d, dtype=torch.float64) @ basis.T
    for matrix in (a, a.float()):
        inverse, info = damped_inverse(matrix, 0.0)
        assert info.item() == 0
        residual = (matrix.double() @ inverse.double() - torch.eye(d)).abs().max()
        plain = plain_inverse(matrix, 0.0).double()
        plain_residual = (matrix.double() @ plain - torch.eye(d)).abs().max()
        assert residual <= 2 * plain_residual + 4 * condition * torch.finfo(matrix.dtype).eps


@pytest.mark.parametrize("d", [10, 64, 200])
def test_condition_1e7(d):
    # Badly scaled: Cholesky does not mind.
    a = covariance_like(batch_for(d), d, d, dtype=torch.float64) + DAMPING * torch.eye(d)
    scaling = torch.logspace(0, -3.5, d, dtype=torch.float64)
    graded = (scaling[:, None] * a * scaling).float()
    inverse, info = damped_inverse(graded, 0.0)
    assert (info == 0).all()
    unscaled = inverse.double() * scaling[:, None] * scaling
    assert_within_budget(unscaled.float(), a.float(), 0.0)
    # Truly near singular: float64 copes, float32 may say that it does not, and never lies.
    basis, _ = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64))
    a = basis * torch.logspace(0, -9, d, dtype=torch.float64) @ basis.T
    for dtype in (torch.float64, torch.float32):
        matrix = a.to(dtype)
        inverse, info = damped_inverse(matrix, 1e-7)
        assert info.item() == 0 or dtype == torch.float32
        assert inverse.isfinite().all() == (info.item() == 0)
        if info.item() == 0:
            product = damped(matrix.double(), 1e-7) @ inverse.double()
            assert (product - torch.eye(d)).abs().max() <= 1e7 * 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("batch", [1, 2, 3, 7])
@pytest.mark.parametrize("d", [20, 130, 257, 520])
def test_the_bits_do_not_depend_on_the_number_of_threads(batch, d):
    a = covariance_like(batch, d, d)
    results = [budget.with_threads(n, lambda: damped_inverse(a, DAMPING)[0]) for n in (1, 2, 3)]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_a_list_of_mixed_sizes_keeps_its_order():
    sizes = [20, 7, 130, 20, 0, 7, 300, 20]
    matrices = [covariance_like(d, d) for d in sizes]
    matrices[5] = -matrices[5]
    dampings = torch.rand(len(sizes)) * 0.01 + 0.1
    inverses, info = damped_inverse(matrices, dampings)
    assert isinstance(inverses, list)
    assert info.dtype == torch.int32
    assert info.tolist() == [0, 0, 0, 0, 0, 1, 0, 0]
    for matrix, damping, inverse in zip(matrices, dampings, inverses, strict=True):
        one, _ = damped_inverse(matrix, damping)
        torch.testing.assert_close(inverse, one, rtol=0, atol=0, equal_nan=True)
    same, _ = damped_inverse(tuple(matrices), 0.1)
    assert torch.equal(same[2], damped_inverse(matrices[2], 0.1)[0])


def test_agrees_with_the_reference_where_it_fails():
    a = covariance_like(3, 12, 12)
    a[1, 4, 4] = -3.0
    for mine, oracle in zip(
        damped_inverse(a, DAMPING), fused_so.reference.damped_inverse(a, DAMPING), strict=True
    ):
        torch.testing.assert_close(mine, oracle, equal_nan=True)


@pytest.mark.parametrize("shape", [(4, 4), (2, 3, 20, 20), (0, 5, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_opcheck(shape, dtype):
    a = covariance_like(*shape, dtype=dtype)
    damping = torch.full(shape[:-2], DAMPING, dtype=widened(a).dtype)
    torch.library.opcheck(torch.ops.fused_so.damped_inverse.default, (a, damping))


def test_compiles_as_one_graph():
    a = covariance_like(3, 20, 20)
    compiled = torch.compile(lambda x: damped_inverse(x * 2, DAMPING), fullgraph=True)
    for mine, eager in zip(compiled(a), damped_inverse(a * 2, DAMPING), strict=True):
        assert torch.equal(mine, eager)


def test_the_list_form_compiles_as_one_graph():
    matrices = [covariance_like(d, d) for d in (5, 20, 5)]
    function = torch.compile(damped_inverse, fullgraph=True, backend="aot_eager")
    inverses, info = function(matrices, DAMPING)
    expected, expected_info = damped_inverse(matrices, DAMPING)
    assert torch.equal(info, expected_info)
    assert all(map(torch.equal, inverses, expected))


SQUARE = torch.eye(3)


@pytest.mark.parametrize(
    ("a", "damping", "error", "message"),
    [
        (None, 0.1, TypeError, "a must be a Tensor, got NoneType"),
        (torch.eye(3, dtype=torch.int64), 0.1, TypeError, "a must be float16.*got torch.int64"),
        (torch.eye(3, dtype=torch.complex64), 0.1, TypeError, "a must be.*got torch.complex64"),
        (SQUARE.to_sparse(), 0.1, TypeError, "a must be a dense.*sparse_coo"),
        (torch.ones(3), 0.1, ValueError, r"a must be square.*got shape \(3,\)"),
        (torch.ones(2, 3, 4), 0.1, ValueError, r"a must be square.*got shape \(2, 3, 4\)"),
        (SQUARE, -1.0, ValueError, "damping must be at least 0 and finite, got -1.0"),
        (SQUARE, math.nan, ValueError, "damping must be at least 0 and finite, got nan"),
        (SQUARE, math.inf, ValueError, "damping must be at least 0 and finite, got inf"),
        (SQUARE, "much", TypeError, "damping must be a number, got str"),
        (SQUARE, True, TypeError, "damping must be a number, got bool"),
        (SQUARE, torch.ones(2), ValueError, r"damping must have shape \(\), got \(2,\)"),
        (SQUARE, torch.tensor(1), TypeError, "damping must be float16.*got torch.int64"),
        (SQUARE, torch.ones((), device="meta"), ValueError, "damping must be on the device of a"),
        ([], 0.1, ValueError, "a must hold at least one matrix"),
        ([SQUARE, None], 0.1, TypeError, r"a\[1\] must be a Tensor, got NoneType"),
        ([SQUARE, torch.ones(2, 3)], 0.1, ValueError, r"a\[1\] must be square.*\(2, 3\)"),
        ([SQUARE[None]], 0.1, ValueError, r"a\[0\] must have shape.*got \(1, 3, 3\)"),
        ([SQUARE, SQUARE.double()], 0.1, TypeError, r"a\[1\] must have the dtype of a\[0\]"),
        ([SQUARE, SQUARE.to("meta")], 0.1, ValueError, r"a\[1\] must be on the device of a\[0\]"),
        ([SQUARE], torch.ones(2), ValueError, r"damping must have shape \(1\), got \(2,\)"),
    ],
)
def test_bad_arguments(a, damping, error, message):
    with pytest.raises(error, match=message):
        damped_inverse(a, damping)


def test_an_unknown_instruction_set_is_an_error():
    program = "import torch, fused_so; fused_so.ops.damped_inverse(torch.eye(2), 0.1)"
    run = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"FUSED_SO_CPU": "mmx"},
        capture_output=True,
        text=True,
    )
    assert run.returncode != 0
    assert "FUSED_SO_CPU must be amx, avx512, avx2 or portable, got 'mmx'" in run.stderr
