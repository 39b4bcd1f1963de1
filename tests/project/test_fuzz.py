"""Random damage to everything that is read from outside: a stated error or a result, never another exception or a hang.

``FORENSICS_FUZZ`` is the number of executions of each test (default 300); ``make fuzz`` runs 20,000.
"""

import io
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import TINY, encoded, make_tiny_data, picture, square_mask
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from forensics_lib.data.readers import read_data_set
from forensics_lib.data.rows import LayoutError
from forensics_lib.images.headers import facts_of
from forensics_lib.images.io import ImageError, read_image
from forensics_lib.images.masks import read_mask, save_mask
from forensics_lib.params import DataSet, Params, ParamsError, load_params
from forensics_lib.submission.validate import validate_submission

EXECUTIONS = int(os.environ.get("FORENSICS_FUZZ", "300"))
fuzzed = settings(
    max_examples=EXECUTIONS,
    deadline=10_000,  # milliseconds for one execution
    derandomize="FORENSICS_FUZZ" not in os.environ,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@st.composite
def damaged(draw: Callable, seeds: list[bytes]) -> bytes:
    """One of ``seeds`` after a few random edits: bytes set, removed, repeated, or taken from another seed."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(0, len(data) - 1)))
        length = draw(st.integers(0, 64))
        way = draw(st.integers(0, 5))
        if way == 0:
            data[place : place + length] = draw(st.binary(min_size=0, max_size=64))
        elif way == 1:
            del data[place : place + length]
        elif way == 2:
            data[place:place] = data[place : place + length]
        elif way == 3:
            del data[place:]
        elif way == 4:
            other = draw(st.sampled_from(seeds))
            data[place:] = other[min(place, len(other)) :]
        else:
            data[place : place + 4] = draw(
                st.sampled_from([b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\0\0\x80\0"])
            )
    return bytes(data)


PHOTO = Image.fromarray(picture(np.random.default_rng(0), 24, 32))
IMAGES = [encoded(PHOTO, form) for form in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "JPEG2000", "PPM")]
IMAGES += [encoded(PHOTO, "JPEG", progressive=True), encoded(PHOTO.convert("CMYK"), "JPEG"), encoded(PHOTO.quantize(8), "PNG")]
IMAGES += [encoded(Image.new("I;16", (9, 7), 500), form) for form in ("PNG", "TIFF")]
IMAGES += [encoded(PHOTO, "TIFF", compression=name) for name in ("tiff_lzw", "tiff_deflate", "jpeg", "packbits")]


@fuzzed
@given(content=damaged(IMAGES))
def test_images(content):
    try:
        pixels = read_image(content)
    except ImageError:
        return
    assert pixels.dtype == np.uint8
    assert pixels.ndim == 3 and pixels.shape[2] == 3


@fuzzed
@given(content=damaged([encoded(Image.fromarray(square_mask(24, 32)), form) for form in ("PNG", "TIFF", "GIF")]))
def test_masks_and_headers(content, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "fuzzed.png"
    path.write_bytes(content)
    assert len(facts_of([str(path)])[0]) == 7
    try:
        mask = read_mask(path, (24, 32))
    except ImageError:
        return
    assert mask.shape == (24, 32)
    assert mask.any()


LISTINGS = {
    "table": ("table.csv", "path,label,split,generator\na.jpg,0,train,\n'b.jpg',1,val,sd\n"),
    "task_b_validation": (
        "taskB_val.csv",
        "img_path,mask_path,src_path,type\r\n"
        "sagid\\val\\coco\\brushnet\\image\\coco_000000000001_brushnet_1.jpg,"
        "sagid\\val\\coco\\brushnet\\mask\\coco_000000000001_brushnet_1_mask.png,"
        "sagid\\val\\coco\\original\\000000000001.jpg,sp\r\n",
    ),
    "sagi_d": (
        "sagid.csv",
        "img_path,mask_path,src_path,split,inpainting_model,diffusion_model,type\n"
        "sagid\\train\\coco\\m\\image\\a.jpg,sagid\\train\\coco\\m\\mask\\a_mask.png,sagid\\train\\coco\\original\\b.jpg,"
        "train,brushnet,sd15,sp\n",
    ),
}


@pytest.mark.parametrize("layout", list(LISTINGS))
@fuzzed
@given(data=st.data())
def test_listings(layout, data, tmp_path_factory):
    name, text = LISTINGS[layout]
    folder = tmp_path_factory.getbasetemp() / f"fuzzed-{layout}"
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(
        data.draw(damaged([text.encode(), ("\ufeff" + text).encode(), text.encode("utf-16"), b"\0\xff,\n"]))
    )
    root = folder / name if layout == "table" else folder
    try:
        rows = read_data_set(DataSet(root=str(root), layout=layout))
    except LayoutError:
        return
    assert set(rows.table()["label"].dropna()) <= {0, 1}


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=6,
)


@fuzzed
@given(values=st.dictionaries(st.sampled_from(sorted(Params.model_fields)) | st.text(max_size=12), VALUES, max_size=4))
def test_values_of_parameters(values, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "values.yaml"
    path.write_text(yaml.safe_dump(TINY | values), encoding="utf-8")
    try:
        assert isinstance(load_params(path), Params)
    except ParamsError as error:
        assert str(path) in str(error)


@fuzzed
@given(content=damaged([Path("params/constrained.yaml").read_bytes(), b"!!python/object/apply:os.system ['true']\n"]))
def test_text_of_parameters(content, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "text.yaml"
    path.write_bytes(content)
    try:
        assert isinstance(load_params(path), Params)
    except ParamsError as error:
        assert str(path) in str(error)


@pytest.fixture(scope="module")
def archives(tmp_path_factory) -> tuple[Path, list[bytes]]:
    """A test folder, and archives of it: stored and compressed."""
    root = make_tiny_data(tmp_path_factory.mktemp("archives"))
    made = []
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", method) as archive:
            rows = ["image_id,prob,label,threshold,loc_threshold"]
            for number in range(4):
                mask = root / "mask.npz"
                save_mask(mask, np.full((70, 90), 0.25))
                archive.writestr(f"b{number}.npz", mask.read_bytes())
                rows.append(f"b{number}.jpg,0.75,1,0.5,0.5")
            archive.writestr("scores.csv", "\n".join(rows) + "\n")
        made.append(buffer.getvalue())
    return root / "test" / "taskB", made


@fuzzed
@given(data=st.data())
def test_archives(data, archives, tmp_path_factory):
    folder, made = archives
    path = tmp_path_factory.getbasetemp() / "fuzzed.zip"
    path.write_bytes(data.draw(damaged(made)))
    result = validate_submission(path, "B", folder)
    assert result.report()


def test_the_seeds_themselves_are_sound(archives, tmp_path):
    folder, made = archives
    for content in made:
        (tmp_path / "sound.zip").write_bytes(content)
        assert validate_submission(tmp_path / "sound.zip", "B", folder).valid
    for content in IMAGES:
        assert read_image(content).ndim == 3
