"""Low-rank adapters change nothing at first, learn alone, and are saved merged."""

import copy

import pytest
import torch

from forensics_lib.models.checkpoint import load_model, save_checkpoint
from forensics_lib.models.combined import CombinedModel
from forensics_lib.models.lora import LowRankUpdate, add_adapters, is_adapter, merged_state


@pytest.fixture(params=["test_vit", "eva02_tiny_patch14_224", "test_convnext"])
def model(request) -> CombinedModel:
    torch.manual_seed(0)
    return CombinedModel("A", request.param).eval()


def trained_a_little(model: CombinedModel) -> None:
    for module in model.modules():
        if isinstance(module, LowRankUpdate):
            torch.nn.init.normal_(module.up, std=0.05)


@torch.no_grad()
def test_adapters_change_nothing_at_first_and_their_sum_with_the_weights_is_a_plain_model(model, tmp_path):
    images = torch.rand(2, 3, 64, 64)
    before = model(images).logits
    layers = add_adapters(model.backbone, 4)
    assert layers == sum(isinstance(module, torch.nn.Linear) for module in model.backbone.modules())
    assert torch.equal(model(images).logits, before)
    trained_a_little(model)
    adapted = model(images).logits
    assert not torch.equal(adapted, before)
    save_checkpoint(tmp_path / "model.pth", model)
    plain = load_model(tmp_path / "model.pth")[0]
    assert not any("parametrizations" in name for name in plain.state_dict())
    assert torch.equal(plain(images).logits, adapted)
    assert torch.equal(copy.deepcopy(model)(images).logits, adapted), "as the moving average of the weights copies it"


def test_adapters_alone_are_trained_and_only_those_of_the_last_stages(model):
    add_adapters(model.backbone, 2)
    model.freeze_backbone("all")
    everywhere = {name for name, parameter in model.backbone.named_parameters() if parameter.requires_grad}
    assert everywhere and all(is_adapter(name) for name in everywhere)
    model.freeze_backbone(1)
    last = {name for name, parameter in model.backbone.named_parameters() if parameter.requires_grad}
    assert last < everywhere
    model.freeze_backbone(0)
    assert not any(parameter.requires_grad for parameter in model.backbone.parameters())


def test_a_merged_weight_differs_by_a_matrix_of_the_rank(model):
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    add_adapters(model.backbone, 3)
    trained_a_little(model)
    merged = merged_state(model)
    assert set(merged) == set(weights)
    changed = {name: merged[name] - value for name, value in weights.items() if not torch.equal(merged[name], value)}
    assert changed and all(torch.linalg.matrix_rank(update, rtol=1e-4) <= 3 for update in changed.values())


def test_a_network_without_linear_layers_says_so():
    with pytest.raises(ValueError, match="no linear layers to adapt; set lora_rank: 0"):
        add_adapters(CombinedModel("A", "resnet18").backbone, 4)
