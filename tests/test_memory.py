"""No op takes more memory than its results and 8 MiB; a step of UBP, at most twice that of SGD."""

import subprocess
import sys

import pytest

from tests.ops.budget import needs_kernel

MEBI = 1 << 20
# Each makes the inputs of a call that leaves nothing but its results.
CALLS = {
    "covariance": "h = torch.randn(2048, 1500); call = lambda: ops.covariance(h)",
    "covariance_": (
        "h, c, m = torch.randn(2048, 1500), torch.zeros(1500, 1500), torch.zeros(1500);"
        "call = lambda: ops.covariance_(c, m, h, decay=0.5)"
    ),
    "covariance of float16": "h = torch.randn(2048, 1500).half(); call = lambda: ops.covariance(h)",
    "centered_grad": (
        "g, h = torch.randn(2048, 1500), torch.randn(2048, 1200);"
        "call = lambda: ops.centered_grad(g, h)"
    ),
    "centered_grad, small": (
        "g, h = torch.randn(200000, 30), torch.randn(200000, 20);"
        "call = lambda: ops.centered_grad(g, h)"
    ),
    "precondition": (
        "w, b, m, a = (torch.randn(s) for s in ((1500, 1200), 1500, 1200, (1200, 1200)));"
        "call = lambda: ops.precondition(w, b, m, a)"
    ),
    "precondition, both sides": (
        "w, b, m, a, o = (torch.randn(s) for s in"
        " ((2500, 1500), 2500, 1500, (1500, 1500), (2500, 2500)));"
        "call = lambda: ops.precondition(w, b, m, a, output_inverse=o)"
    ),
    "inner_products": (
        "x, y = ([torch.randn(2000, 2000) for _ in range(2)] for _ in range(2));"
        "call = lambda: ops.inner_products(x, y)"
    ),
    "row_scales": (
        "g, h, w, b, u = ([torch.randn(s) for _ in range(8)] for s in"
        " ((500, 1500), (500, 1200), (1500, 1200), 1500, 1500));"
        "call = lambda: ops.row_scales(g, h, w, b, u)"
    ),
    "row_scales of many layers": (
        "g, h, w, b, u = ([torch.randn(s)] * 100 for s in"
        " ((200, 100), (200, 3000), (100, 3000), 100, 100));"
        "call = lambda: ops.row_scales(g, h, w, b, u)"
    ),
    "damped_inverse": (
        "a = torch.eye(1500) + torch.ones(1500, 1500); call = lambda: ops.damped_inverse(a, 0.1)"
    ),
    "damped_inverse of a batch": (
        "a = torch.eye(128).repeat(100, 1, 1); call = lambda: ops.damped_inverse(a, 0.1)"
    ),
    "damped_inverse of a list": (
        "a = [torch.eye(1000).mul_(i + 1) for i in range(4)] + [torch.eye(128)] * 100;"
        "call = lambda: ops.damped_inverse(a, 0.1)"
    ),
    "grad_gram": (
        "g, h = ([torch.randn(1500, d) for d in ds] for ds in ((900, 40), (700, 900)));"
        "call = lambda: ops.grad_gram(g, h)"
    ),
    "grad_gram, centered": (
        "g, h = ([torch.randn(1500, d) for d in ds] for ds in ((900, 40), (700, 900)));"
        "call = lambda: ops.grad_gram(g, h, centered=True)"
    ),
    "jacobian_backprop": (
        "j, w, p, d = (torch.randn(s) for s in ((300, 10, 1500), (1500, 1200), (300, 1500),"
        " (300, 1500))); call = lambda: ops.jacobian_backprop(j, w, dphi=p, direction=d)"
    ),
    "jacobian_backprop, small": (
        "j, w, d = torch.randn(200000, 10, 3), torch.randn(3, 2), torch.randn(200000, 3);"
        "call = lambda: ops.jacobian_backprop(j, w, direction=d)"
    ),
    "apply_update_": (
        "p, u, v = ([torch.randn(1500, 1500)] for _ in range(3));"
        "call = lambda: ops.apply_update_(p, u, v, lr=0.1, momentum=0.9)"
    ),
}
# Linux forgets the highest resident size when 5 is written to clear_refs.
SCRIPT = """
import sys
import torch
from fused_so import ops

def resident(key):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith(key))

def tensors(result):
    if isinstance(result, torch.Tensor):
        return [result]
    return [t for part in result or () for t in tensors(part)]

torch.set_num_threads(2)
torch.randn(1 << 20).add_(1)  # wakes the threads
{call}
with open("/proc/self/clear_refs", "w") as clear:
    clear.write("5")
before = resident("VmRSS")
result = call()
results = sum(t.numel() * t.element_size() for t in tensors(result))
print(resident("VmHWM") - before - results)
"""


@needs_kernel
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", CALLS)
def test_an_op_takes_its_results_and_8_mebibytes(name):
    script = SCRIPT.format(call=CALLS[name])
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) <= 8 * MEBI


OPTIMIZERS = {
    "sgd": "torch.optim.SGD(model.parameters(), 1e-4, momentum=0.9)",
    "ubp": "fused_so.UBP(model, 1e-4, likelihood=loss, mode='matrix_free')",
}
STEPS = """
import itertools
import torch
import fused_so
from torch import nn

def resident(key):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith(key))

def train(widths, n):
    layers = []
    for pair in itertools.pairwise(widths):
        layers += [nn.Linear(*pair), nn.Tanh()]
    model, x, loss = nn.Sequential(*layers[:-1]), torch.rand(n, widths[0]), nn.BCEWithLogitsLoss()
    optimizer = {optimizer}
    for _ in range(3):
        optimizer.zero_grad()
        loss(model(x), x).backward()
        optimizer.step()

torch.set_num_threads(2)
train((40, 30, 40), 50)  # imports what is imported late
with open("/proc/self/clear_refs", "w") as clear:
    clear.write("5")
before = resident("VmRSS")
train((784, 1000, 500, 250, 30, 250, 500, 1000, 784), {batch})
print(resident("VmHWM") - before)
"""


@needs_kernel
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("batch", [128, 1024])
def test_matrix_free_ubp_takes_at_most_twice_the_memory_of_sgd(batch):
    """Everything counted: parameters, momentum, gradients, rows and what the products need."""
    peak = {}
    for name, optimizer in OPTIMIZERS.items():
        script = STEPS.format(optimizer=optimizer, batch=batch)
        run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        peak[name] = int(run.stdout)
    assert peak["sgd"] < peak["ubp"] <= 2 * peak["sgd"], peak
