"""The built-in sample: a small data set in the official layout, made on any machine without network.

Real images are crops of freely licensed photographs shipped with installed packages.  Synthetic images are the same crops
after the project's own autoencoder; a quarter of those of validation and test went through it enlarged, a way of generation
that only ``dataset_open`` has training images of.  In manipulated images a region that follows an object, where the photograph
has one, is spliced, copied, filled or regenerated (``sp``), or the whole image is regenerated with it (``fr``); validation has
ways that training lacks.  No photograph is in two splits, both classes pass through the same codecs with the same settings, and
the same code always gives the same bytes.

The sample shows that everything works and what it looks like, mistakes included.  Its scores say nothing about real generators.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import skimage
import sklearn
from PIL import Image
from scipy.ndimage import gaussian_filter
from skimage.measure import regionprops
from skimage.segmentation import felzenszwalb

from forensics_lib.images.degradations import upload
from forensics_lib.synthesis.autoencoder import Autoencode, load_autoencode
from forensics_lib.synthesis.forgeries import composed, enlarged, filled, moved, outlined
from forensics_lib.utils.cores import usable_cores
from forensics_lib.utils.locks import exclusive
from forensics_lib.utils.progress import progress

VERSION = 3  # increase it when the bytes change: older copies are then rebuilt
MARKER = "sample.json"  # written last: a folder without it is no finished sample

_SKIMAGE = Path(skimage.__file__).parent / "data"
_SKLEARN = Path(sklearn.__file__).parent / "datasets" / "images"
_MATPLOTLIB = Path(matplotlib.get_data_path()) / "sample_data"


@dataclass(frozen=True)
class Photo:
    """A photograph in an installed package: its file, split and licence."""

    path: Path
    split: str
    licence: str
    scale: float = 1.0  # undoes an enlargement at the photograph's source


PHOTOS: dict[str, Photo] = {
    "astronaut": Photo(_SKIMAGE / "astronaut.png", "train", "public domain, NASA"),
    "brick": Photo(_SKIMAGE / "brick.png", "train", "CC0, CC0Textures"),
    "chelsea": Photo(_SKIMAGE / "chelsea.png", "train", "CC0, Stefan van der Walt"),
    "china": Photo(_SKLEARN / "china.jpg", "train", "CC BY 2.0, danielbuechele"),
    "gravel": Photo(_SKIMAGE / "gravel.png", "train", "CC0, CC0Textures"),
    "grace_hopper": Photo(_MATPLOTLIB / "grace_hopper.jpg", "train", "public domain, US Navy"),
    "rocket": Photo(_SKIMAGE / "rocket.jpg", "train", "public domain, SpaceX"),
    "camera": Photo(_SKIMAGE / "camera.png", "val", "CC0, Lav Varshney"),
    "coffee": Photo(_SKIMAGE / "coffee.png", "val", "CC0, Rachel Michetti"),
    "flower": Photo(_SKLEARN / "flower.jpg", "val", "CC BY 2.0, vultilion"),
    "grass": Photo(_SKIMAGE / "grass.png", "val", "CC0, linolafett"),
    "coins": Photo(_SKIMAGE / "coins.png", "test", "no known restrictions, Brooklyn Museum"),
    "hubble": Photo(_SKIMAGE / "hubble_deep_field.jpg", "test", "public domain, NASA"),
    "motorcycle": Photo(_SKIMAGE / "motorcycle_left.png", "test", "CC0, Daniel Scharstein"),
    "tissue": Photo(_SKIMAGE / "ihc.png", "test", "no known restrictions, CMMI"),
    "moon": Photo(_SKIMAGE / "moon.png", "open_train", "public domain, NASA"),
    "retina": Photo(_SKIMAGE / "retina.jpg", "open_val", "CC0, Mikael Haggstrom", scale=0.25),
}
TASK_A_COUNTS = {"train": 24, "val": 16, "test": 8, "open_train": 24, "open_val": 8}  # real crops per photograph
TASK_B_COUNTS = {"training": 8, "validation": 4, "testing": 4}  # crops per photograph in the TGIF tree
TASK_B_OFFICIAL = {"validation": 4, "test": 6}  # crops per photograph in the Task B validation and test folders
UPLOADED = 0.15  # share of Task A images that went through a platform: shrunk, then JPEG
OBJECTS = (0.03, 0.3)  # smallest and largest region that follows an object, as a share of the image's area
CATEGORIES = ("apple", "bird", "cat", "teddy bear", "vase")  # of TGIF; here names only
TGIF_SPLITS = {"training": "train", "validation": "val", "testing": "test"}


@lru_cache
def load_photo(name: str) -> np.ndarray:
    """One of ``PHOTOS`` as ``(H, W, 3)`` uint8."""
    photo = PHOTOS[name]
    if not photo.path.is_file():
        raise FileNotFoundError(
            f"the sample's photograph {name!r} is missing at {photo.path}; reinstall the environment ('make clean-env setup')"
        )
    with Image.open(photo.path) as opened:
        image = opened.convert("RGB")
    if photo.scale != 1:
        size = round(image.width * photo.scale), round(image.height * photo.scale)
        image = image.resize(size, Image.Resampling.LANCZOS)
    return np.asarray(image)


def build_sample(root: Path) -> Path:
    """Make the sample in ``root`` unless a finished one of this version is there, and say so; returns ``root``.

    It is made in a temporary folder and then renamed, so that an interrupted build leaves no half sample.  Of several
    processes at once, one makes it and the others wait.  Raises ``FileExistsError`` if ``root`` holds other files.
    """
    if _finished(root):
        return root
    with exclusive(root.parent / f".{root.name}-lock", f"another process makes the sample data in {root}: waiting for it"):
        if not _finished(root):
            for left in root.parent.glob(f".{root.name}-*/"):  # of a killed build: none other can be running under this lock
                shutil.rmtree(left)
            print(f"making the built-in sample data in {root}, once (later runs reuse it)", flush=True)
            _build_beside(root)
    return root


def _finished(root: Path) -> bool:
    marker = root / MARKER
    return marker.is_file() and json.loads(marker.read_text())["version"] == VERSION


def _build_beside(root: Path) -> None:
    building = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    try:
        _build(building)
        building.chmod(0o755)  # mkdtemp gives access to the owner alone
        if root.exists():
            if any(root.iterdir()) and not (root / MARKER).is_file():
                raise FileExistsError(f"{root} holds files that are not a sample; move them away, then run 'make sample'")
            shutil.rmtree(root)
        building.replace(root)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _build(root: Path) -> None:
    autoencode = load_autoencode("own")
    jobs: list[Callable[[], None]] = [
        partial(_write_task_a, root, name, np.random.default_rng([1, index]), autoencode) for index, name in enumerate(PHOTOS)
    ]
    jobs += [partial(_write_tgif, root, split, number, name, autoencode) for split, number, name in _tgif_scenes()]
    jobs += [partial(_write_task_b_validation, root, autoencode), partial(_write_task_b_test, root, autoencode)]
    with ThreadPoolExecutor(usable_cores()) as pool:
        for _ in progress(pool.map(lambda job: job(), jobs), "sample data", total=len(jobs)):
            pass
    credits = [f"{name}: {photo.licence}" for name, photo in PHOTOS.items()]
    (root / "README.txt").write_text("\n".join([__doc__ or "", "Photographs:", *credits, ""]))
    (root / MARKER).write_text(json.dumps({"version": VERSION}))


def _write_task_a(root: Path, name: str, rng: np.random.Generator, autoencode: Autoencode) -> None:
    """Crops of one photograph and their synthetic twins, both through the same codecs."""
    photo, split = load_photo(name), PHOTOS[name].split
    ways = (autoencode, enlarged(autoencode))
    for index in range(TASK_A_COUNTS[split]):
        real = _textured_crop(photo, tuple(rng.integers(144, 209, 2)), rng)
        way = 1 if split.startswith("open") else 0 if split == "train" else int(index % 4 == 3)
        jpeg = {"quality": int(rng.integers(80, 97)), "subsampling": int(rng.choice([0, 2]))}
        uploaded, scale, quality = rng.random() < UPLOADED, float(rng.uniform(0.8, 1)), int(rng.integers(75, 91))
        for label, image in enumerate((real, ways[way](real))):
            seen = upload(image, None, scale, quality, np.random.default_rng(index))[0] if uploaded else image
            _save(_task_a_path(root, split, name, label, index, way, rng), seen, **jpeg)


def _task_a_path(root: Path, split: str, name: str, label: int, index: int, way: int, rng: np.random.Generator) -> Path:
    if split == "test":  # names tell nothing, as in the challenge
        return root / "test" / "taskA" / f"{rng.bytes(6).hex()}.jpg"
    folder = "dataset_open" if split.startswith("open") else "dataset"
    source = ("autoencoder", "autoencoder_enlarged")[way] if label else "photographs"
    return root / folder / split.removeprefix("open_") / ("0_real", "1_fake")[label] / source / f"{name}_{index:03d}.jpg"


def _textured_crop(photo: np.ndarray, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """The most textured of four random crops of ``size`` (height, width)."""
    height, width = (min(side, limit) for side, limit in zip(size, photo.shape[:2], strict=True))
    tops = rng.integers(photo.shape[0] - height + 1, size=4)
    lefts = rng.integers(photo.shape[1] - width + 1, size=4)
    crops = [photo[t : t + height, x : x + width] for t, x in zip(tops, lefts, strict=True)]
    return max(crops, key=lambda crop: float(np.abs(np.diff(crop.astype(np.int16), axis=0)).mean()))


@dataclass
class _Scene:
    """A crop of a photograph, the mask of the region to change, and other content of the same size."""

    base: np.ndarray
    mask: np.ndarray
    donor: np.ndarray
    segm: bool  # whether the region follows an object or has an outline like one; else it is a rectangle


def _scene(name: str, split: str, rng: np.random.Generator) -> _Scene:
    photo = load_photo(name)
    base = _textured_crop(photo, tuple(rng.integers(208, 257, 2)), rng)
    donors = [other for other, info in PHOTOS.items() if info.split == split and other != name]
    donor = _textured_crop(load_photo(str(rng.choice(donors))), base.shape[:2], rng)
    donor = np.asarray(Image.fromarray(donor).resize((base.shape[1], base.shape[0]), Image.Resampling.LANCZOS))
    if not np.ptp(base, axis=2).any():  # a grey photograph takes grey content
        donor = np.repeat(donor.mean(2, keepdims=True), 3, 2).round().astype(np.uint8)
    objects = _objects(base)
    segm = bool(objects) or bool(rng.random() < 0.7)
    box = (base.shape[0] // 8, base.shape[1] // 8, base.shape[0] * 3 // 4, base.shape[1] * 3 // 4)
    mask = objects[rng.integers(len(objects))] if objects else outlined(base.shape[:2], box, segm, rng)
    return _Scene(base, mask, donor, segm)


def _objects(image: np.ndarray) -> list[np.ndarray]:
    """Masks of compact regions of one colour that end within the middle three quarters of each side.

    They come from segmentations of several coarsenesses (Felzenszwalb and Huttenlocher, IJCV 2004).
    """
    height, width = image.shape[:2]
    area, found = height * width, []
    for scale in (100, 500):
        for region in regionprops(felzenszwalb(image, scale=scale, sigma=0.8, min_size=area // 60) + 1):
            top, left, bottom, right = region.bbox
            inside = height // 8 <= top < bottom <= height - height // 8 and width // 8 <= left < right <= width - width // 8
            if inside and OBJECTS[0] < region.area_filled / area < OBJECTS[1] and region.extent > 0.4:
                mask = np.zeros((height, width))
                mask[region.slice] = region.image_filled
                found.append(gaussian_filter(mask, 1.5) > 0.5)
    return found


def _spliced(scene: _Scene, autoencode: Autoencode) -> np.ndarray:
    """Content of another photograph, regenerated; all other pixels are the photograph's."""
    return composed(scene.base, scene.mask, scene.donor, autoencode)


def _removed(scene: _Scene, autoencode: Autoencode) -> np.ndarray:
    """The region filled from its surroundings, then regenerated."""
    return composed(scene.base, scene.mask, filled(scene.base, scene.mask, _rng_of(scene)), autoencode)


def _copied(scene: _Scene, _: Autoencode) -> np.ndarray:
    """A distant part of the photograph itself; nothing is regenerated."""
    return composed(scene.base, scene.mask, moved(scene.base, scene.mask, _rng_of(scene)))


def _rng_of(scene: _Scene) -> np.random.Generator:
    return np.random.default_rng(int(scene.mask.sum()))


def _fully(scene: _Scene, autoencode: Autoencode) -> np.ndarray:
    """New content in the region, then the whole image regenerated."""
    return autoencode(_spliced(scene, autoencode))


def _inner(scene: _Scene) -> _Scene:
    """TGIF's crop ``512``: three quarters of each side, around the region."""
    height, width = (side * 3 // 4 // 8 * 8 for side in scene.base.shape[:2])
    top, left = (scene.base.shape[0] - height) // 2, (scene.base.shape[1] - width) // 2
    cut = (slice(top, top + height), slice(left, left + width))
    return _Scene(scene.base[cut], scene.mask[cut], scene.donor[cut], scene.segm)


def _outer(scene: _Scene) -> _Scene:
    """TGIF's crop ``1024``: sides cut to multiples of 8."""
    cut = tuple(slice(0, side // 8 * 8) for side in scene.base.shape[:2])
    return _Scene(scene.base[cut], scene.mask[cut], scene.donor[cut], scene.segm)


def _tgif_scenes() -> list[tuple[str, int, str]]:
    """Split, number within it, and photograph of each scene of the TGIF tree."""
    scenes = []
    for split, source in TGIF_SPLITS.items():
        names = [name for name, photo in PHOTOS.items() if photo.split == source]
        scenes += [(split, number, name) for number, name in enumerate(names * TASK_B_COUNTS[split])]
    return scenes


def _write_tgif(root: Path, split: str, number: int, name: str, autoencode: Autoencode) -> None:
    """A scene under TGIF's names: an original and four manipulated images, all PNG."""
    tgif, place = root / "dataset_taskB" / "TGIF", list(TGIF_SPLITS).index(split)
    rng = np.random.default_rng([2, place, number])
    scene, category = _scene(name, TGIF_SPLITS[split], rng), str(rng.choice(CATEGORIES))
    identity = 9_000_000 + 10_000 * place + number  # beyond the ids of COCO
    mask_name = f"{identity}_mask_{'segm' if scene.segm else 'bbox'}"
    inner, outer = _inner(scene), _outer(scene)
    images = {
        f"orig/{split}/{category}/{identity}_orig.png": scene.base,
        f"orig/{split}/{category}/{identity}_orig_512.png": inner.base,
        f"orig/{split}/{category}/{identity}_orig_1024.png": outer.base,
        f"sd2-sp/{split}/{category}/{mask_name}.png_ps_mask.png_sd2_0.png": _spliced(scene, autoencode),
        f"ps-sp/{split}/{category}/{mask_name}.png_ps_0.png": _removed(scene, autoencode),
        f"sd2-fr/{split}/{category}/{mask_name}.png_sd2-512_0.png": _fully(inner, autoencode),
        f"sdxl-fr/{split}/{category}/{mask_name}.png_sdxl-1024_0.png": enlarged(autoencode)(_spliced(outer, autoencode)),
        f"masks/{split}/{category}/{mask_name}.png_ps_mask.png": _as_png(scene.mask),
        f"masks/{split}/{category}/{mask_name}_512.png": _as_png(inner.mask),
        f"masks/{split}/{category}/{mask_name}_1024.png": _as_png(outer.mask),
    }
    for path, pixels in images.items():
        _save(tgif / path, pixels)


Way = tuple[str, str, Callable[[_Scene, Autoencode], np.ndarray]]
SPLICE, REDRAW = ("splice", "sp", _spliced), ("redraw", "fr", _fully)
REMOVE, COPY = ("remove", "sp", _removed), ("copymove", "sp", _copied)
# The ways of the official validation folder, taken in turns: name, kind, function.  Training has no copied regions
WAYS: tuple[tuple[Way, Way], ...] = ((SPLICE, REDRAW), (REMOVE, COPY), (SPLICE, REDRAW), (REMOVE, REDRAW))


def _write_task_b_validation(root: Path, autoencode: Autoencode) -> None:
    """The official validation layout: originals, manipulated JPEGs, masks, and ``taskB_val.csv``."""
    folder, rows = root / "dataset_taskB" / "validation", []
    names = [name for name, photo in PHOTOS.items() if photo.split == "val"]
    for number, name in enumerate(names * TASK_B_OFFICIAL["validation"]):
        rng = np.random.default_rng([3, number])
        scene = _scene(name, "val", rng)
        quality = int(rng.integers(85, 97))
        source = ("coco", "raise")[number % 2]
        stem = f"{9_050_000 + number:012d}" if source == "coco" else f"r{9_050_000 + number:x}t_Q{quality}"
        original = f"{source}/original/{stem}.jpg"
        _save(folder / original, scene.base, quality=quality)
        for method, kind, make in WAYS[number // len(names) % len(WAYS)]:
            name_out = f"{source}_{stem}_{method}_autoencoder_1_None"
            image, mask = f"{source}/{method}/image/{name_out}.jpg", f"{source}/{method}/mask/{name_out}_mask.png"
            _save(folder / image, make(scene, autoencode), quality=quality)
            _save(folder / mask, _as_png(scene.mask))
            rows.append({"img_path": image, "mask_path": mask, "src_path": original, "type": kind})
    table = pd.DataFrame(rows)
    for column in ("img_path", "mask_path", "src_path"):  # as the official file writes its paths
        table[column] = "sagid\\val\\" + table[column].str.replace("/", "\\")
    table.to_csv(folder / "taskB_val.csv", index=False, lineterminator="\r\n")


def _write_task_b_test(root: Path, autoencode: Autoencode) -> None:
    """Unlabelled JPEGs with random names: two of six authentic, the others manipulated in all ways."""
    names = [name for name, photo in PHOTOS.items() if photo.split == "test"]
    makers = (lambda scene, _: scene.base, _spliced, _fully, lambda scene, _: scene.base, _removed, _copied)
    for number, name in enumerate(names * TASK_B_OFFICIAL["test"]):
        rng = np.random.default_rng([4, number])
        image = makers[number // len(names) % 6](_scene(name, "test", rng), autoencode)
        _save(root / "test" / "taskB" / f"{rng.bytes(6).hex()}.jpg", image, quality=int(rng.integers(85, 97)))


def _as_png(mask: np.ndarray) -> np.ndarray:
    return mask.astype(np.uint8) * 255


def _save(path: Path, pixels: np.ndarray, **jpeg: int) -> None:
    """Write pixels as JPEG with these options, or as PNG without any."""
    path.parent.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = jpeg or {"compress_level": 2}
    Image.fromarray(pixels).save(path, **options)
