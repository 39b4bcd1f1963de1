import numpy as np
from conftest import photo_table, picture, save

from forensics_lib.images.spectra import average_spectrum, radial_profile


def test_a_periodic_trace_stands_out_in_the_average_spectrum(tmp_path, rng):
    """A faint wave of four pixels: in each picture lost under noise, in the average a peak at 1/4."""
    lifted = 4 * np.cos(np.arange(160) * np.pi / 2)
    paths = []
    for i in range(30):
        noise = rng.normal(128, 12, (160, 160, 1)) + lifted[None, :, None]
        paths.append(save(tmp_path / f"{i}.png", np.repeat(noise.clip(0, 255), 3, 2).astype(np.uint8)))
    spectrum = average_spectrum(photo_table(paths))
    assert spectrum.shape == (128, 128)
    row = spectrum[64, 66:]
    assert row.argmax() + 2 == 32, "a quarter of the sampling frequency"
    assert radial_profile(np.ones((128, 128))).tolist() == [1.0] * 64
    assert np.isnan(average_spectrum(photo_table([save(tmp_path / "small.png", picture(rng))]))).all()
