"""A step takes what SGD takes, (n, n) matrices, the examples' rows and its solver's vectors."""

import os
import subprocess
import sys

import pytest

from tests.ops.budget import needs_kernel

MEBI = 1 << 20
WIDTH, LAYERS, N = 1500, 4, 256
VECTOR = 4 * LAYERS * (WIDTH * WIDTH + WIDTH)
GRAM, ROWS = 4 * N * N, 4 * LAYERS * N * WIDTH
NATURAL = "fused_so.NaturalGradient(model, 1e-3, likelihood=fused_so.Gaussian(), "
# Each with the momentum of the SGD it is held against, the vectors of the size of the parameters
# that it takes beside SGD's, and the sets of rows.
STEPS = {
    # the step itself
    "tonga": ("fused_so.TONGA(model, 1e-3)", 0.9, 1, 2),
    "gram, empirical": (NATURAL + "solver='gram', metric='empirical_fisher')", 0.0, 1, 2),
    # b - U z and, to refine it, the residual and what it adds
    "gram, sampled": (NATURAL + "solver='gram', metric='sampled_fisher')", 0.0, 3, 2),
    # b, x, r, p and q of CG, a product, and J^T u with its graph
    "cg": (NATURAL + "max_iterations=3)", 0.0, 7, 4),
}
# With every large block mapped and unmapped on its own, what is resident is what is alive.
SCRIPT = """
import torch
import fused_so
from torch import nn

def resident(key):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith(key))

torch.set_num_threads(2)
torch.randn(1 << 20).add_(1)  # wakes the threads
layers = [m for _ in range({layers}) for m in (nn.Linear({width}, {width}), nn.Tanh())]
model = nn.Sequential(*layers[:-1])
x, y = torch.randn({n}, {width}), torch.randn({n}, {width})
opt = {optimizer}
for step in range(3):
    if step == 1:  # beyond the libraries' own first needs
        opt.zero_grad()
        with open("/proc/self/clear_refs", "w") as clear:
            clear.write("5")
        before = resident("VmRSS")
    opt.zero_grad()
    nn.functional.mse_loss(model(x), y).backward()
    opt.step()
print(resident("VmHWM") - before)
"""


def peak(optimizer):
    script = SCRIPT.format(optimizer=optimizer, layers=LAYERS, width=WIDTH, n=N)
    environment = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    run = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True, text=True, env={**os.environ, **environment},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return int(run.stdout)


@needs_kernel
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", STEPS)
def test_a_step_takes_sgd_s_memory_and_its_solver_s(name):
    optimizer, momentum, vectors, rows = STEPS[name]
    sgd = peak(f"torch.optim.SGD(model.parameters(), 1e-3, momentum={momentum})")
    allowed = sgd + vectors * VECTOR + 3 * GRAM + rows * ROWS + 8 * MEBI
    assert peak(optimizer) <= allowed
