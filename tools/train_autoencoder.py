"""Train the sample's autoencoder on the sample's training photographs, and write its weights."""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from forensics_lib.synthesis.autoencoder import WEIGHTS, Autoencoder
from forensics_lib.synthesis.sample import PHOTOS, load_photo
from forensics_lib.utils.progress import progress


def train_autoencoder(photos: list[np.ndarray], steps: int, seed: int = 0, batch: int = 24, size: int = 64) -> Autoencoder:
    """Train on random ``size`` x ``size`` crops of ``(H, W, 3)`` uint8 photographs.

    The loss is L1 on pixels plus L1 on their horizontal and vertical differences (so that edges stay sharp); the
    learning rate follows one cycle.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = Autoencoder()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    areas = np.array([photo.shape[0] * photo.shape[1] for photo in photos], float)
    bar = progress(range(steps), "autoencoder")
    for step in bar:
        crops = [_random_crop(photos[i], size, rng) for i in rng.choice(len(photos), batch, p=areas / areas.sum())]
        x = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float() / 255
        y = model(x)
        loss = F.l1_loss(y, x) + F.l1_loss(y.diff(dim=2), x.diff(dim=2)) + F.l1_loss(y.diff(dim=3), x.diff(dim=3))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            psnr = -10 * torch.log10(F.mse_loss(y.detach().clamp(0, 1), x))
            bar.note(f"loss {loss.item():.4f}, PSNR {psnr.item():.1f} dB")
    return model.eval()


def _random_crop(photo: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    top = rng.integers(photo.shape[0] - size + 1)
    left = rng.integers(photo.shape[1] - size + 1)
    crop = photo[top : top + size, left : left + size]
    return np.ascontiguousarray(crop[:, ::-1] if rng.random() < 0.5 else crop)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1600, help="optimizer steps (default 1600)")
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="file of the weights")
    arguments = parser.parse_args()
    photos = [load_photo(name) for name, photo in PHOTOS.items() if photo.split == "train"]
    model = train_autoencoder(photos, arguments.steps)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, arguments.out)
    print(f"wrote {arguments.out} ({arguments.out.stat().st_size / 1e6:.2f} MB)")


if __name__ == "__main__":
    main()
