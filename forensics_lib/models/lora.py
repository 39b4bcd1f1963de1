"""Low-rank adapters on a backbone's linear layers (Hu et al., LoRA, ICLR 2022).

The adapted weight is ``W + up @ down``, with ``down`` of shape ``(rank, in)`` and ``up`` of ``(out, rank)``, which begins at
zero.  ``W`` stays as it was pretrained.  Checkpoints hold the sum alone, so they are those of a plain timm model.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn.utils import parametrize


class LowRankUpdate(nn.Module):
    """A frozen weight ``(out, in)`` to itself plus a learned matrix of low rank."""

    def __init__(self, weight: torch.Tensor, rank: int) -> None:
        super().__init__()
        outputs, inputs = weight.shape
        self.down = nn.Parameter(weight.new_empty(rank, inputs))
        self.up = nn.Parameter(weight.new_zeros(outputs, rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        with torch.autocast(weight.device.type, enabled=False):  # so that the merged weight is exactly this one
            return weight + self.up @ self.down


def add_adapters(backbone: nn.Module, rank: int) -> int:
    """Give every linear layer of a backbone an adapter, in place; returns how many got one.

    A layer's ``weight`` becomes the adapted one wherever the backbone reads it.  Raises ``ValueError`` if there is no linear
    layer, as in many convolutional networks.
    """
    layers = [module for module in backbone.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise ValueError("lora_rank: the backbone has no linear layers to adapt; set lora_rank: 0, or choose a transformer")
    for layer in layers:
        parametrize.register_parametrization(layer, "weight", LowRankUpdate(layer.weight, rank))
    return len(layers)


def is_adapter(name: str) -> bool:
    """Whether a parameter's name is that of an adapter."""
    return ".parametrizations.weight.0." in name


def merged_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state of a model, adapters added to their weights, under the names of the model without adapters."""
    state = model.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and parametrize.is_parametrized(module, "weight"):
            for key in [key for key in state if key.startswith(f"{name}.parametrizations.")]:
                del state[key]
            state[f"{name}.weight"] = module.weight.detach()
    return state
