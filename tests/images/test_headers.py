import pytest
from conftest import picture
from PIL import Image

from forensics_lib.images.headers import read_header


@pytest.mark.parametrize("quality", [35, 60, 75, 90, 97])
def test_jpeg_quality_is_estimated_from_the_header(quality, tmp_path, rng):
    Image.fromarray(picture(rng)).save(tmp_path / "x.jpg", quality=quality)
    assert abs(read_header(tmp_path / "x.jpg").jpeg_quality - quality) <= 1.5


def test_a_camera_is_known_by_its_exif(tmp_path, rng):
    image = Image.fromarray(picture(rng))
    exif = image.getexif()
    exif[0x0110] = "a camera"
    image.save(tmp_path / "x.jpg", exif=exif)
    image.save(tmp_path / "y.png")
    assert read_header(tmp_path / "x.jpg").camera
    assert not read_header(tmp_path / "y.png").camera
    assert read_header(tmp_path / "y.png").jpeg_quality is None
