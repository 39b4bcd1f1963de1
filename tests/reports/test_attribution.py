import numpy as np
import torch

from forensics_lib.models.combined import Encoded, Output, build_model
from forensics_lib.reports.attribution import grad_cam
from forensics_lib.training import loop as training


def test_grad_cam_follows_what_speaks_for_synthetic(tiny_run):
    """A model whose margin is the mean of one feature map must show just that map."""
    model = build_model(tiny_run.params, "A").eval()
    image = np.random.default_rng(0).integers(0, 256, (96, 64, 3), dtype=np.uint8)
    machine = training.choose_machine(tiny_run.params)
    shown, heat = grad_cam(model, image, machine)
    assert shown.shape == (96, 64, 3) and heat.shape == (96, 64)
    assert heat.min() >= 0 and heat.max() <= 1

    maps = torch.zeros(1, 2, 3, 2)
    maps[0, 1, 2, 1] = 5.0
    model.encode = lambda x: Encoded(maps, [], [])
    model.decide = lambda x, final, stages, tokens: Output(final.mean((2, 3)), None, final.mean((2, 3)))
    heat = grad_cam(model, image, machine)[1]
    assert np.unravel_index(heat.argmax(), heat.shape)[0] > 64 and heat[:32].max() == 0
