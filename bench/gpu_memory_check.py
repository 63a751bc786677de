"""`python -m bench.gpu_memory_check`: the CUDA C++ ops once at every kind of size.

Run under compute-sanitizer, which looks at every access and at what happens between threads.
"""

from __future__ import annotations

import torch

from bench.gpu_rows import leave
from fused_so import ops

# Around the sizes where the work is divided differently.
SIZES = (1, 5, 31, 32, 33, 64, 100, 128, 129, 200, 257)


def check(device: torch.device) -> None:
    for d in SIZES:
        eye = torch.eye(d, device=device)
        a = (2 * eye + 1 / d).expand(3, d, d).clone()
        inverse, info = ops.damped_inverse(a, 1.0)
        assert not info.any()
        # (3 I + 1 1^T / d)^-1 = I / 3 - 1 1^T / (12 d)
        assert torch.allclose(inverse, (eye / 3 - 1 / (12 * d)).expand(3, d, d), atol=1e-6)
    shapes = [(3, 4), (0,), (1,), (), (2047,), (2049,), (65536,)]
    for momentum in (0.0, 0.9):
        params, updates, buffers = (
            [torch.ones(shape, device=device) for shape in shapes] for _ in range(3)
        )
        used = buffers if momentum else []
        ops.apply_update_(params, updates, used, lr=0.5, momentum=momentum, weight_decay=0.1)
        step = 1.1 + momentum
        for p in params:
            assert torch.allclose(p, torch.full_like(p, 1 - 0.5 * step))


def main() -> int:
    check(torch.device("cuda"))
    torch.cuda.synchronize()
    leave({"checked": [f"damped_inverse {d}" for d in SIZES] + ["apply_update_"]})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
