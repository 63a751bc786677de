"""These tests take a CUDA GPU: without one they are not collected, and with one none may skip.

`python -m bench.gpu` runs them, and fails when they did not run.
"""

import torch

collect_ignore = [] if torch.cuda.is_available() else ["test_gpu.py"]
