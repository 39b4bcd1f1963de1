"""The project's own neural generator: a small convolutional autoencoder.

It replaces the decoder of a latent diffusion model where no larger generator is at hand: its output carries the traces of
a learned decoder (lost noise, correlated residuals), with the content and the size of the photograph.  The weights in
``assets/autoencoder.safetensors`` were trained by ``tools/train_autoencoder.py`` on the training photographs of the built-in
sample.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from forensics_lib.utils.callables import load_callable

WEIGHTS = Path(__file__).parents[1] / "assets" / "autoencoder.safetensors"
PADDING = 32  # images are padded to multiples of this: few distinct shapes are faster than many
Autoencode = Callable[[np.ndarray], np.ndarray]  # (H, W, 3) uint8 of any size to the same shape and type


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with a skip connection; keeps the shape ``(N, channels, H, W)``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv2(F.silu(self.conv1(F.silu(x))))


class Autoencoder(nn.Module):
    """Images ``(N, 3, H, W)`` in [0, 1], H and W multiples of 4, to images of the same shape (not clipped).

    The latent has ``latent`` channels at a quarter of the resolution; 6 channels compress by a factor of 8.
    """

    def __init__(self, latent: int = 6, width: tuple[int, int] = (32, 64)) -> None:
        super().__init__()
        fine, coarse = width
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(2),
            nn.Conv2d(12, fine, 3, padding=1),
            ResidualBlock(fine),
            nn.Conv2d(fine, coarse, 3, stride=2, padding=1),
            ResidualBlock(coarse),
            ResidualBlock(coarse),
            nn.Conv2d(coarse, latent, 1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(latent, coarse, 3, padding=1),
            ResidualBlock(coarse),
            ResidualBlock(coarse),
            nn.Upsample(scale_factor=2, mode="nearest"),
            nn.Conv2d(coarse, fine, 3, padding=1),
            ResidualBlock(fine),
            nn.Conv2d(fine, 12, 3, padding=1),
            nn.PixelShuffle(2),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.encoder(x))


def load_autoencoder(weights: Path = WEIGHTS) -> Autoencoder:
    """The trained autoencoder in evaluation mode."""
    if not weights.is_file():
        raise FileNotFoundError(
            f"no autoencoder weights at {weights}; restore the file, or train it by 'python tools/train_autoencoder.py'"
        )
    model = Autoencoder()
    model.load_state_dict(load_file(weights))
    return model.eval()


@torch.no_grad()
def regenerate(model: Autoencoder, image: np.ndarray) -> np.ndarray:
    """Pass an ``(H, W, 3)`` uint8 image of any size through the autoencoder; returns the same shape and type."""
    height, width = image.shape[:2]
    padded = np.pad(image, ((0, -height % PADDING), (0, -width % PADDING), (0, 0)), mode="symmetric")
    tensor = torch.from_numpy(padded).permute(2, 0, 1)[None].float() / 255
    pixels = model(tensor)[0].permute(1, 2, 0)[:height, :width]
    return (pixels * 255).round().clamp(0, 255).to(torch.uint8).numpy()


def load_autoencode(name: str) -> Autoencode:
    """Load the autoencoder that a parameter names: ``own``, the project's small one, or ``module:function``.

    That function, called without arguments, returns a callable from an ``(H, W, 3)`` uint8 image of any size to one of the
    same shape and type; for a diffusers VAE it wraps ``vae.decode(vae.encode(x).latent_dist.mode())``.  Raises ``ValueError``
    if it cannot be loaded.
    """
    if name == "own":
        return partial(regenerate, load_autoencoder())
    wanted = "give 'own', or 'module:function' whose function, called without arguments, returns a callable from image to image"
    return load_callable(name, "autoencoder", wanted)()
