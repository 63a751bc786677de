"""Eigendecompositions that LAPACK refuses at first."""

from __future__ import annotations

import pytest
import torch

from fused_so.optim.eigen import eigenbasis


def failing(times, monkeypatch):
    eigh, dtypes = torch.linalg.eigh, []

    def refuse(matrix):
        dtypes.append(matrix.dtype)
        if len(dtypes) <= times:
            raise torch.linalg.LinAlgError("did not converge")
        return eigh(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", refuse)
    return dtypes


@pytest.mark.parametrize("times", [0, 1])
def test_basis_diagonalizes_the_covariance(times, monkeypatch):
    x = torch.randn(5, 8)
    covariance = x.T @ x / 5  # singular: rounding leaves eigenvalues below zero
    dtypes = failing(times, monkeypatch)
    values, vectors = eigenbasis(covariance)
    assert dtypes == [torch.float32, torch.float64][: times + 1]
    assert values.dtype == vectors.dtype == torch.float32
    assert values.min() >= 0
    assert torch.equal(values, values.sort().values)
    torch.testing.assert_close(vectors @ torch.diag(values) @ vectors.T, covariance)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(8))


def test_a_second_failure_is_raised(monkeypatch):
    failing(2, monkeypatch)
    with pytest.raises(RuntimeError, match="did not converge"):
        eigenbasis(torch.eye(3))
