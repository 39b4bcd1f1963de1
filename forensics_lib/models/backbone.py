"""Backbones of timm, with pretrained weights from the hub, from a file, or with random ones."""

from __future__ import annotations

import os
from typing import Any

import timm
import torch

from forensics_lib.utils.files import LFS_POINTER, broken_link, from_home, is_lfs_pointer

TimmModel = Any  # an ``nn.Module`` with timm's interface, which has no type of its own


def create_backbone(name: str, drop_path: float, pretrained: bool, file: str | None) -> TimmModel:
    """A timm model without head.  Raises ``ValueError`` for an unknown name, ``OSError`` where weights cannot be loaded."""
    if not timm.is_model(name.split(".")[0]):
        close = timm.list_models(f"{name.split('_')[0].split('.')[0]}*")[:10]
        raise ValueError(f"backbone: timm has no model {name!r}; similar ones: {', '.join(close) or 'see timm.list_models()'}")
    overlay = _weights_of(file, name) if file else None
    if pretrained:
        print(f"loading pretrained weights of {name} from {file or 'timm'}", flush=True)
    options = {"pretrained": pretrained, "num_classes": 0, "pretrained_cfg_overlay": overlay}
    try:
        backbone = _seeded_backbone(name, options, drop_path)
        backbone.pretrained_cfg.pop("state_dict", None)  # the weights are in the model now
        if file:
            _check_loaded(backbone, _seeded_backbone(name, options | {"pretrained": False}, drop_path))
    except Exception as error:  # damaged files raise nearly anything
        if not pretrained:
            raise
        raise OSError(_no_weights_message(name, file, error)) from error
    if not hasattr(backbone, "forward_intermediates") or not hasattr(backbone, "group_matcher"):
        raise ValueError(f"backbone: timm's {name} has no intermediate features; choose another, such as convnext_base")
    return backbone


def _weights_of(file: str, name: str) -> dict[str, Any]:
    """timm's ``pretrained_cfg_overlay`` for ``pretrained_file``: the file, or the backbone weights of a run's checkpoint.

    Raises ``FileNotFoundError``, and ``ValueError`` where the checkpoint holds another backbone.
    """
    path = from_home(file)
    if not path.is_file():
        raise FileNotFoundError(
            f"pretrained_file: {broken_link(path) or f'no file {path}'}; give a .pth or .safetensors file of {name}"
        )
    content = run_checkpoint(file)
    if content is None:
        return {"file": str(path)}
    config = content["config"]
    if (config["backbone"], config["frontend"]) != (name, "rgb"):
        raise ValueError(
            f"pretrained_file: {path} is a run's checkpoint of {config['backbone']} with frontend {config['frontend']}; a run "
            f"with {name} can start from one with backbone {name} and frontend rgb"
        )
    weights = {key.removeprefix("backbone."): value for key, value in content["model"].items() if key.startswith("backbone.")}
    return {"state_dict": weights}


def run_checkpoint(file: str) -> dict[str, Any] | None:
    """The content of ``pretrained_file`` where it is the checkpoint of a run, else None."""
    try:
        content = torch.load(from_home(file), map_location="cpu", weights_only=True)
    except Exception:  # not torch's format, or damaged: timm will say what is wrong
        return None
    return content if isinstance(content, dict) and {"format", "config", "model"} <= set(content) else None


def _seeded_backbone(name: str, options: dict[str, Any], drop_path: float) -> TimmModel:
    """A timm model; the state of torch's generator determines its initial weights and is not advanced."""
    with torch.random.fork_rng(devices=[]):
        try:
            return timm.create_model(name, drop_path_rate=drop_path, **options)
        except TypeError:  # a model without stochastic depth
            return timm.create_model(name, **options)


def _check_loaded(backbone: TimmModel, fresh: TimmModel) -> None:
    """Raise ``RuntimeError`` where weights still have their initial values: of missing weights timm only warns."""
    initial = dict(fresh.named_parameters())
    weights = [(name, p) for name, p in backbone.named_parameters() if p.ndim > 1]
    missing = [name for name, p in weights if torch.equal(p, initial[name])]
    if missing:
        raise RuntimeError(f"{len(missing)} of {len(weights)} weights are not in the file, such as {missing[0]}")


def _no_weights_message(name: str, file: str | None, error: Exception) -> str:
    from huggingface_hub.constants import HF_HUB_CACHE

    if file and is_lfs_pointer(from_home(file)):
        return f"pretrained_file: {file} is {LFS_POINTER}"
    if file:
        return f"the weights in {file} do not load into {name}: {error}"
    cache = os.environ.get("HF_HUB_CACHE", HF_HUB_CACHE)
    return (
        f"cannot load the pretrained weights of {name}: no network, and they are not in the cache {cache}.\n"
        f"Either bring them as a file and set pretrained_file: /path/to/{name}.safetensors,\n"
        f"or train from scratch with pretrained: false.\n"
        f"({type(error).__name__}: {str(error).splitlines()[0]})"
    )
