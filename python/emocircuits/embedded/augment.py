"""Random changes of training pictures, so that what is learned is the face and not the drawing program."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Move, scale, turn, flip, recolour, blur and noise [B, H, W, 3] uint8 -> [B, 3, H, W] float in [-1, 1]."""
    n = len(images)

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return torch.rand(n, *shape, generator=generator) * (high - low) + low

    x = images.permute(0, 3, 1, 2).float() / 127.5 - 1
    angle, flip = uniform(-0.2, 0.2), torch.sign(uniform(-1, 1))
    zoom = torch.where(uniform(0, 1) < 0.75, uniform(0.8, 1.35), uniform(1.3, 2.0))  # above 1 the face gets smaller
    stretch = uniform(0.92, 1.08)
    cos, sin = torch.cos(angle) * zoom, torch.sin(angle) * zoom
    theta = torch.stack(
        [
            torch.stack([flip * cos * stretch, -sin, uniform(-0.2, 0.2)], 1),
            torch.stack([flip * sin, cos, uniform(-0.2, 0.2)], 1),
        ],
        1,
    )
    x = F.grid_sample(
        x, F.affine_grid(theta, list(x.shape), align_corners=False), padding_mode="border", align_corners=False
    )
    per_channel = torch.where(uniform(0, 1, 1, 1, 1) < 0.5, 1.0, 0.0)
    gain = 1 + uniform(-0.2, 0.2, 1, 1, 1) + per_channel * uniform(-0.15, 0.15, 3, 1, 1)
    x = x * gain + uniform(-0.15, 0.15, 1, 1, 1) + per_channel * uniform(-0.08, 0.08, 3, 1, 1)
    gray = uniform(0, 1, 1, 1, 1) < 0.1
    x = torch.where(gray, x.mean(1, keepdim=True), x)
    soft = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    x = torch.lerp(x, soft, torch.where(uniform(0, 1, 1, 1, 1) < 0.3, uniform(0, 1, 1, 1, 1), 0.0))
    noise = torch.randn(x.shape, generator=generator) * uniform(0, 0.08, 1, 1, 1)
    return (x + noise * (uniform(0, 1, 1, 1, 1) < 0.6)).clamp(-1, 1)


def cosine(step: int, total: int, warmup: int = 100, floor: float = 0.02) -> float:
    """Factor on the learning rate: linear warm-up, then a cosine from 1 down to ``floor``."""
    decay = 0.5 * (1 + math.cos(math.pi * min(1.0, step / total)))
    return min(1.0, (step + 1) / warmup) * (floor + (1 - floor) * decay)
