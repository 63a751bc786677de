"""Products of float32 on a processor's matrix unit: when it is used, and what it must not disturb.

That its numbers hold is what tests/test_instruction_sets.py asks of every instruction set.
"""

import os
import subprocess
import sys

import pytest
import torch

from tests.ops import budget

pytestmark = [
    budget.needs_kernel,
    pytest.mark.skipif("amx" not in budget.variants(), reason="this processor has no matrix unit"),
]

HASHES = """
import hashlib, torch
from fused_so import ops
torch.manual_seed(0)
def show(*results):
    print(hashlib.sha256(b"".join(r.numpy().tobytes() for r in results)).hexdigest())
for size in (200, 216):
    x, a = torch.randn(size, size), torch.randn(size, size)
    show(*ops.precondition(x, torch.ones(size), torch.ones(size), a))
show(*ops.covariance(torch.randn(20, 300)))
show(*ops.covariance(torch.randn(40, 300)))
show(*ops.centered_grad(torch.randn(40, 300), torch.randn(40, 200)))
show(ops.jacobian_backprop(torch.randn(30, 10, 200), torch.randn(200, 300))[0])
show(ops.grad_gram([torch.randn(400, 60)], [torch.randn(400, 60)]))
show(ops.grad_gram([torch.randn(440, 60)], [torch.randn(440, 60)]))
show(*ops.covariance(torch.randn(300, 300, dtype=torch.float64)))
"""


def run(code: str, variant: str | None) -> list[str]:
    environment = {name: value for name, value in os.environ.items() if name != "FUSED_SO_CPU"}
    if variant is not None:
        environment["FUSED_SO_CPU"] = variant
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def test_large_products_of_float32_take_it_and_small_ones_do_not():
    chosen, matrix_unit, vectors = (run(HASHES, variant) for variant in (None, "amx", "avx512"))
    large = [False, True, False, True, True, True, False, True, False]
    differs = [a != b for a, b in zip(matrix_unit, vectors, strict=True)]
    assert differs == 8 * [True] + [False]  # float64 has no matrix unit
    expected = [m if big else v for big, m, v in zip(large, matrix_unit, vectors, strict=True)]
    assert chosen == expected


# A thread that multiplies bfloat16 keeps its tiles configured as oneDNN left them.
TILES_OF_OTHERS = """
import ctypes, mmap
import torch
from fused_so import ops
torch.set_num_threads(1)

def function(code):
    page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(bytes(code))
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    function.kept = getattr(function, "kept", []) + [page]
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)

load = function([0xC4, 0xE2, 0x78, 0x49, 0x07, 0xC3])   # ldtilecfg [rdi]; ret
store = function([0xC4, 0xE2, 0x79, 0x49, 0x07, 0xC3])  # sttilecfg [rdi]; ret
ops.covariance(torch.randn(200, 200))  # asks the system for the tiles

config = bytearray(64)
config[0] = 1  # palette
for tile, (rows, row_bytes) in enumerate([(3, 8), (16, 64), (7, 20)]):
    config[16 + 2 * tile], config[48 + tile] = row_bytes, rows
memory = (ctypes.c_char * 64)(*config)
load(ctypes.addressof(memory))
for call in (
    lambda: ops.covariance(torch.randn(200, 200)),
    lambda: ops.grad_gram([torch.randn(300, 200)], [torch.randn(300, 200)]),
    lambda: ops.jacobian_backprop(torch.randn(30, 10, 200), torch.randn(200, 200)),
):
    call()
    after = (ctypes.c_char * 64)()
    store(ctypes.addressof(after))
    print(bytes(after) == bytes(config))
"""


def test_tiles_that_others_configured_stay_so():
    assert run(TILES_OF_OTHERS, "amx") == ["True"] * 3


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_an_entry_that_is_not_finite_spoils_its_row_and_no_other(value):
    code = f"""
import torch
from fused_so import ops
torch.manual_seed(0)
x, a = torch.randn(130, 140), torch.randn(140, 140)
x[77, 33] = float("{value}")
result, _ = ops.precondition(x, torch.zeros(130), torch.zeros(140), a)
print(*(~result.isfinite()).any(1).nonzero().flatten().tolist())
print((~result[77].isfinite()).all().item())
"""
    assert run(code, "amx") == ["77", "True"]


def test_every_bit_of_a_float32_counts():
    """Three bfloat16 hold its 24 bits, two do not; down to subnormals, up to the largest number."""
    odd = 1 + 2.0**-9 + 2.0**-23
    for x in (torch.tensor(odd), torch.tensor(1 / 3)):
        high = x.bfloat16().float()
        assert high + (x - high).bfloat16().float() != x
    code = """
import torch
from fused_so import ops
zeros, eye = torch.zeros(128), torch.eye(128)
odd = 1 + 2.0**-9 + 2.0**-23
tiny = 2.0**-149 * (2**22 + 2**13 + 1)
for number in (odd, 1 / 3, 2.0**-60 * odd, 2.0**-126 * odd, tiny, torch.finfo().max):
    x = torch.full((128, 128), number)
    for left, right in ((x, eye), (eye, x)):
        result, _ = ops.precondition(left, zeros, zeros, right)
        print(torch.equal(result, x))
"""
    assert run(code, "amx") == ["True"] * 12


@pytest.mark.parametrize(("alpha", "left", "right"), [(1e30, 1e30, 1e-30), (1e-30, 1e-20, 1e-12)])
def test_a_scale_far_from_one_loses_no_bits(alpha, left, right):
    """What a panel of tiny entries was multiplied by is taken back beside alpha."""
    code = f"""
import torch
from fused_so import ops
torch.manual_seed(0)
zeros = torch.zeros(128)
x, inverse = {left} * torch.randn(128, 128), {right} * torch.randn(128, 128)
result, _ = ops.precondition(x, zeros, zeros, inverse, alpha={alpha})
exact = x.double() @ inverse.double() / {alpha}
print(((result - exact).abs().max() / exact.abs().max()).item() < 1e-6)
"""
    assert run(code, "amx") == ["True"]
