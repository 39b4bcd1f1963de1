"""TAEF2, a tiny autoencoder of FLUX.2 latents (MIT, Ollin Boer Bohan), built to load the corpus' weights.

``aligned: {autoencoder: "taef2:load"}`` uses it, with this folder on Python's path.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from forensics_lib.utils.files import project_root

CORPUS = Path(os.environ.get("FORENSICS_CORPUS", project_root().parent / "shared" / "corpus"))
LATENT = 32


def conv(channels_in: int, channels_out: int, *, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=bias)


class Block(nn.Module):
    """Three convolutions beside a shortcut; with ``pool`` a normalised 1x1 bottleneck is added before them."""

    def __init__(self, channels_in: int, channels_out: int, *, pool: bool = False) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            conv(channels_in, channels_out), nn.ReLU(), conv(channels_out, channels_out), nn.ReLU(),
            conv(channels_out, channels_out),
        )  # fmt: skip
        self.skip = nn.Conv2d(channels_in, channels_out, 1, bias=False) if channels_in != channels_out else nn.Identity()
        if pool:
            wide = 4 * channels_in
            self.pool = nn.Sequential(
                nn.Conv2d(channels_in, wide, 1, bias=False), nn.GroupNorm(4, wide), nn.ReLU(),
                nn.Conv2d(wide, channels_in, 1, bias=False),
            )  # fmt: skip
        else:
            self.pool = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.pool is not None:
            x = x + self.pool(x)
        return (self.conv(x) + self.skip(x)).relu()


class Clamp(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x / 3).tanh() * 3


def encoder() -> nn.Sequential:
    layers: list[nn.Module] = [conv(3, 64), Block(64, 64)]
    for pool in (False, False, True):
        layers += [conv(64, 64, stride=2, bias=False), *(Block(64, 64, pool=pool) for _ in range(3))]
    return nn.Sequential(*layers, conv(64, LATENT))


def decoder() -> nn.Sequential:
    layers: list[nn.Module] = [Clamp(), conv(LATENT, 64), nn.ReLU()]
    for pool in (True, False, False):
        layers += [*(Block(64, 64, pool=pool) for _ in range(3)), nn.Upsample(scale_factor=2), conv(64, 64, bias=False)]
    return nn.Sequential(*layers, Block(64, 64), conv(64, 3))


def load() -> Callable[[np.ndarray], np.ndarray]:
    """A callable from image to image, ``(H, W, 3)`` uint8 of any size."""
    parts = []
    for name, network in (("encoder", encoder()), ("decoder", decoder())):
        weights = load_file(CORPUS / "weights" / f"taef2_{name}.safetensors")
        network.load_state_dict({key: value.float() for key, value in weights.items()})
        parts.append(network.eval().to(memory_format=torch.channels_last))

    @torch.inference_mode()
    def autoencode(image: np.ndarray) -> np.ndarray:
        height, width = image.shape[:2]
        padded = np.pad(image, ((0, -height % 32), (0, -width % 32), (0, 0)), mode="symmetric")
        x = torch.from_numpy(padded).permute(2, 0, 1)[None].float().div(255).to(memory_format=torch.channels_last)
        for network in parts:
            x = network(x)
        pixels = x.clamp(0, 1)[0].permute(1, 2, 0)[:height, :width]
        return (pixels * 255).round().to(torch.uint8).numpy()

    return autoencode
