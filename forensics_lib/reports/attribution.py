"""Attribution: the parts of an image that raise its score for being synthetic."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from forensics_lib.device import Machine
from forensics_lib.images.crops import centre_crop, to_tensor
from forensics_lib.models.combined import CombinedModel, Encoded

SIDE = 512  # the centre of larger images is shown


def grad_cam(model: CombinedModel, image: np.ndarray, machine: Machine) -> tuple[np.ndarray, np.ndarray]:
    """The centre of an image and its Grad-CAM (Selvaraju et al., ICCV 2017), ``(H, W, 3)`` uint8 and ``(H, W)`` in [0, 1].

    The map weighs the last feature map's channels by the mean gradient of the margin (synthetic minus authentic) and keeps
    positive evidence; its maximum is 1, or 0 where there is none.  Of a transformer that classifies by its class token
    alone, the last patches have no gradient: there the map is the gradient times the input, averaged over patches.
    """
    model = model.to(machine.device).eval()
    shown = centre_crop(image, min(SIDE, model.image_side or SIDE))
    x = machine.to_device(to_tensor(shown)[None])
    with torch.enable_grad():
        with torch.no_grad():
            final, stages, tokens = model.encode(x)
        final.requires_grad_()
        (gradient,) = torch.autograd.grad(_margin(model, x, Encoded(final, stages, tokens)), final)
    weights = model.as_map(gradient, stages).mean((2, 3), keepdim=True)
    heat = (weights * model.as_map(final.detach(), stages)).sum(1, keepdim=True).relu()
    if not weights.any():
        heat = _gradient_times_input(model, x)
    full_size = F.interpolate(heat.float(), model.padded_sides(*x.shape[-2:]), mode="bilinear")
    attribution = full_size[0, 0, : x.shape[2], : x.shape[3]].cpu().numpy()
    return shown, attribution / attribution.max() if attribution.max() > 0 else attribution


def _margin(model: CombinedModel, x: torch.Tensor, encoded: Encoded) -> torch.Tensor:
    logits = model.decide(x, *encoded).logits[0]
    return logits[1] - logits[0]


def _gradient_times_input(model: CombinedModel, x: torch.Tensor) -> torch.Tensor:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(_margin(model, x, model.encode(x)), x)
    return F.avg_pool2d((gradient * x.detach()).sum(1, keepdim=True), model.multiple, ceil_mode=True).relu()
