"""The device on which the fused kernels are tested: the GPU, or the interpreter on the CPU."""

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
