"""Attribution: the parts of an image that raise its score for being synthetic."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from forensics_lib.device import Machine
from forensics_lib.images.crops import centre_crop, pad_to, to_tensor
from forensics_lib.models.combined import CombinedModel, padded_side

SIDE = 512  # the centre of larger images is shown


def grad_cam(model: CombinedModel, image: np.ndarray, machine: Machine) -> tuple[np.ndarray, np.ndarray]:
    """The centre of an image and its Grad-CAM (Selvaraju et al., ICCV 2017), ``(H, W, 3)`` uint8 and ``(H, W)`` in [0, 1].

    The map weighs the last feature map's channels by the mean gradient of the margin (synthetic minus authentic) and keeps
    positive evidence; its maximum is 1, or 0 where there is none.
    """
    model = model.to(machine.device).eval()
    shown = centre_crop(image, SIDE)
    height, width = shown.shape[:2]
    padded = pad_to(shown, padded_side(height), padded_side(width))
    x = machine.to_device(to_tensor(padded)[None])
    with torch.enable_grad():
        final, stages = model.encode(x)
        final = final.detach().requires_grad_()
        logits = model.decide(x, final, [stage.detach() for stage in stages]).logits[0]
        (gradient,) = torch.autograd.grad(logits[1] - logits[0], final)
    heat = (gradient.mean((2, 3), keepdim=True) * final.detach()).sum(1, keepdim=True).relu()
    full_size = F.interpolate(heat.float(), padded.shape[:2], mode="bilinear", align_corners=False)[0, 0]
    attribution = full_size[:height, :width].cpu().numpy()
    return shown, attribution / attribution.max() if attribution.max() > 0 else attribution
