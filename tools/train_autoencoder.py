"""Train the sample's autoencoder on the sample's training photographs, and write its weights."""

import argparse
from pathlib import Path

from safetensors.torch import save_file

from forensics_lib.synthesis.autoencoder import WEIGHTS, train_autoencoder
from forensics_lib.synthesis.sample import PHOTOS, load_photo


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
