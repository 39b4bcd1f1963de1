"""Aligned training data for open runs: photographs that went through an autoencoder, as synthetic twins.

A twin has its photograph's content, size and codec, so that nothing but the decoder's traces tells the two apart (Rajan
et al., AlignedForensics, ICLR 2025; Guillaro et al., B-Free, CVPR 2025).  Pixels and frequencies are aligned as in Chen
et al., Dual Data Alignment, NeurIPS 2025: a random share of the photograph is mixed in, and the twin of a JPEG file is
compressed by that file's own quantization tables, which takes away the fine detail that a decoder adds and the
photograph has lost.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image, JpegImagePlugin

from forensics_lib.files import home, whole
from forensics_lib.images import ImageError, open_image, random_square, read_image
from forensics_lib.layouts import COLUMNS
from forensics_lib.params import Aligned
from forensics_lib.plugins import named
from forensics_lib.progress import progress

Autoencode = Callable[[np.ndarray], np.ndarray]  # (H, W, 3) uint8 of any size to the same shape and type


def load_autoencode(name: str) -> Autoencode:
    """``own``: the project's small autoencoder; ``module:function``: what that function returns when called.

    For a diffusers VAE the function wraps ``vae.decode(vae.encode(x).latent_dist.mode())``.  Raises ``ValueError``.
    """
    if name == "own":
        from forensics_lib.autoencoder import load_autoencoder, regenerate

        return partial(regenerate, load_autoencoder())
    wanted = "give 'own', or 'module:function' whose function, called without arguments, returns a callable from image to image"
    return named(name, "autoencoder", wanted)()


def make_twins(photos: pd.DataFrame, settings: Aligned, autoencode: Autoencode | None = None) -> pd.DataFrame:
    """Twins of authentic images: rows with ``layouts.COLUMNS``, label 1, and the group of their photograph.

    At most ``settings.count`` photographs are drawn.  Twins are kept in ``outputs/.cache/aligned`` and made again only
    where photograph or settings changed; the same photographs give the same twins.  Unreadable ones are passed over.
    """
    drawn = photos.sample(min(settings.count, len(photos)), random_state=0).sort_index()
    key = hashlib.sha256(json.dumps(settings.model_dump(exclude={"count"})).encode()).hexdigest()[:12]
    folder = home() / "outputs" / ".cache" / "aligned" / key
    rows, passed_over = [], 0
    for photo in progress(drawn.to_dict("records"), "aligned twins"):
        name = hashlib.sha256(f"{photo['path']} {photo['bytes']}".encode()).hexdigest()[:20]
        path = folder / f"{name}.{'jpg' if photo['format'] == 'JPEG' else 'png'}"
        if not path.is_file():
            autoencode = autoencode or load_autoencode(settings.autoencoder)
            try:
                _write_twin(path, photo["path"], settings, autoencode, np.random.default_rng(int(name, 16)))
            except ImageError:
                passed_over += 1
                continue
        facts = {"path": str(path), "label": 1, "mask_path": None, "split": photo["split"], "kind": "full"}
        names = {"source": f"aligned/{photo['source']}", "generator": settings.autoencoder, "method": "aligned"}
        rows.append(facts | names | {"group": photo["group"]})
    if passed_over:
        print(f"{passed_over} photograph(s) could not be read and have no twin")
    return pd.DataFrame(rows, columns=COLUMNS)


def _write_twin(path: Path, photo: str, settings: Aligned, autoencode: Autoencode, rng: np.random.Generator) -> None:
    image = random_square(read_image(photo), settings.side, rng)
    twin = autoencode(image)
    if twin.shape != image.shape or twin.dtype != np.uint8:
        raise ValueError(
            f"aligned.autoencoder: {settings.autoencoder} made {twin.dtype} {twin.shape} of uint8 {image.shape}; "
            "it must return an image of the same shape and type"
        )
    share = rng.uniform(0, settings.mix)
    mixed = (share * image + (1 - share) * twin.astype(np.float32)).round().clip(0, 255).astype(np.uint8)
    with whole(path) as temporary:
        Image.fromarray(mixed).save(temporary, **_encoding_of(photo))


def _encoding_of(photo: str) -> dict[str, Any]:
    """How to store a twin: by a JPEG photograph's own tables and colour sampling, else without loss."""
    with open_image(photo) as image:
        if image.format != "JPEG":
            return {"format": "PNG"}
        sampling = JpegImagePlugin.get_sampling(image)
        return {"format": "JPEG", "qtables": image.quantization, "subsampling": sampling if sampling in (0, 1, 2) else 0}
