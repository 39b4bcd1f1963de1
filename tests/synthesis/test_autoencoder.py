import runpy

import numpy as np
import pytest

from forensics_lib.synthesis.autoencoder import WEIGHTS, load_autoencode, load_autoencoder, regenerate
from forensics_lib.synthesis.sample import load_photo
from forensics_lib.utils.files import project_root


def test_the_autoencoder_regenerates_without_copying():
    photo = load_photo("coffee")[:101, :130]
    twin = regenerate(load_autoencoder(), photo)
    error = np.abs(twin.astype(float) - photo).mean()
    assert twin.shape == photo.shape
    assert 0.5 < error < 12
    assert WEIGHTS.stat().st_size < 3_000_000


@pytest.mark.slow
def test_the_weights_script_learns():
    train_autoencoder = runpy.run_path(str(project_root() / "tools" / "train_autoencoder.py"))["train_autoencoder"]
    photos = [load_photo("coffee")]
    errors = []
    for steps in (2, 40):
        twin = regenerate(train_autoencoder(photos, steps, batch=4), photos[0])
        errors.append(np.abs(twin.astype(float) - photos[0]).mean())
    assert errors[1] < errors[0] / 2


def test_callables_are_found_by_name(monkeypatch, tmp_path):
    (tmp_path / "my_autoencoder.py").write_text("def load():\n    return lambda image: image\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert load_autoencode("my_autoencoder:load")("x") == "x"
    assert load_autoencode("own")(np.zeros((20, 30, 3), np.uint8)).shape == (20, 30, 3)
    for wrong in ("my_autoencoder:nothing", "no_such_module:load"):
        with pytest.raises(ValueError, match=f"'{wrong}' cannot be loaded"):
            load_autoencode(wrong)
