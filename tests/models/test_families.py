"""Backbones of every family: both tasks build, train and predict, at sizes that fit the backbone and at others."""

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY

from forensics_lib.device import Machine
from forensics_lib.inference.predict import predict_mask
from forensics_lib.models.checkpoint import load_model, save_checkpoint
from forensics_lib.models.combined import CombinedModel, build_model, reflected
from forensics_lib.params import Params
from forensics_lib.reports.attribution import grad_cam
from forensics_lib.training.losses import mask_loss
from forensics_lib.utils.files import project_root

MACHINE = Machine(torch.device("cpu"), precision="fp32", workers=0)
SIDE = 224  # of crops; what backbones for one size alone are built for
FAMILIES = {
    "ConvNeXt": "convnext_atto",
    "ResNet": "resnet18",
    "EfficientNet": "efficientnet_b0",
    "RegNet": "regnetx_002",
    "Swin": "swin_tiny_patch4_window7_224",
    "ViT, DeiT": "deit_tiny_patch16_224",
    "DINOv2": "vit_small_patch14_dinov2",
    "DINOv3": "vit_small_patch16_dinov3",
    "CLIP": "vit_xsmall_patch16_clip_224",
    "SigLIP": "vit_base_patch16_siglip_224",
    "EVA": "eva02_tiny_patch14_224",
    "Hiera": "hiera_tiny_224",
    "MaxViT": "maxvit_nano_rw_256",
}


def built(task: str, backbone: str) -> CombinedModel:
    torch.manual_seed(0)
    return CombinedModel(task, backbone, decoder_channels=16, image_side=SIDE, levels="tokens" if task == "A" else "mask")


def table_row(family: str, model: CombinedModel) -> str:
    """The family's row in docs/backbones.md."""
    sizes = f"up to `crop_size`, padded to {SIDE} here" if model.image_side else f"any, padded to multiples of {model.multiple}"
    stages = [stage["reduction"] for stage in model.backbone.feature_info if stage["reduction"] >= 4]
    stride = model.multiple / 4 if model.blocks else min(stages)
    return f"| {family} | `{model.config['backbone']}` | {sizes} | {stride:g} |"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_backbone_of_each_family_is_in_the_table_of_the_documentation(family):
    row = table_row(family, built("B", FAMILIES[family]))
    print(row)
    assert row in (project_root() / "docs" / "backbones.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("task", ["A", "B"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_backbone_of_each_family_trains_and_predicts_at_any_size(family, task, rng, tmp_path):
    model = built(task, FAMILIES[family])
    model.freeze_backbone(1)
    model.train()
    output = model(torch.rand(2, 3, 96, 96))
    loss = F.cross_entropy(output.logits, torch.tensor([0, 1]))
    if task == "B":
        masks = torch.zeros(2, 1, 96, 96, dtype=torch.bool)
        masks[1, :, :40] = True
        loss = loss + mask_loss(output.mask_logits, masks)
    before = [parameter.detach().clone() for parameter in model.backbone.parameters()]
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1)
    loss.backward()
    optimizer.step()
    assert torch.isfinite(loss)
    changed = [not torch.equal(a, b) for a, b in zip(before, model.backbone.parameters(), strict=True)]
    assert 0 < sum(changed) < len(changed), "the last stage learns, others do not"
    save_checkpoint(tmp_path / "model.pth", model)
    model = load_model(tmp_path / "model.pth")[0]
    for height, width in ((SIDE, SIDE), (75, 130)):
        image = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
        if task == "B":
            prob, mask = predict_mask(model, image, Params(**TINY | {"tile_size": SIDE}), MACHINE)
            assert mask.shape == (height, width) and np.isfinite(mask).all() and 0 <= prob <= 1
        else:
            shown, heat = grad_cam(model, image, MACHINE)
            assert heat.shape == shown.shape[:2] and heat.max() in (0, 1)


def test_images_are_reflected_as_often_as_it_takes():
    image = torch.arange(3.0).view(1, 1, 1, 3)
    assert reflected(image, 2, 8)[0, 0].tolist() == [[0, 1, 2, 2, 1, 0, 0, 1]] * 2


@pytest.mark.parametrize("name", ["hiera_tiny_224", "maxvit_nano_rw_256"])
def test_an_image_that_is_too_large_for_a_backbone_of_one_size_names_the_size_that_fits(name):
    with pytest.raises(ValueError, match=re.escape("at most 224 x 224")):
        built("A", name)(torch.rand(1, 3, 224, 256))


def test_tiles_that_are_too_large_for_a_backbone_of_one_size_are_refused_before_training():
    params = Params(**TINY | {"backbone": "hiera_tiny_224", "crop_size": 224, "tile_size": 225})
    with pytest.raises(ValueError, match=r"tile_size: 225, but hiera_tiny_224 .* set tile_size: 224"):
        build_model(params, "B")


@pytest.mark.parametrize(("name", "side"), [("ghostnetv2_100", 224), ("inception_v3", 299)])
@pytest.mark.parametrize("task", ["A", "B"])
def test_a_backbone_that_does_not_take_small_images_sees_them_padded_to_a_crop(task, name, side):
    model = CombinedModel(task, name, decoder_channels=16, image_side=side).eval()
    with torch.inference_mode():
        output = model(torch.rand(1, 3, 64, 96))
    assert output.logits.shape == (1, 2) and (task == "A" or output.mask_logits.shape == (1, 1, 64, 96))
    with pytest.raises(ValueError, match=f"at most {side} x {side}"):
        model(torch.rand(1, 3, 64, side + 1))


@pytest.mark.parametrize(
    ("name", "said"),
    [("crossvit_9_240", "features are those of several branches"), ("poolformer_s12", "no intermediate features")],
)
def test_a_backbone_without_features_that_can_be_used_is_refused(name, said):
    with pytest.raises(ValueError, match=f"{said}; choose another"):
        CombinedModel("A", name, image_side=240)


def test_a_size_that_no_form_of_a_backbone_takes_says_so():
    with pytest.raises(ValueError, match="takes no images of 100 x 100 pixels; set crop_size: 128, the next that it takes"):
        CombinedModel("A", "maxvit_nano_rw_256", image_side=100)
