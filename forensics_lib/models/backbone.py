"""Backbones of timm: their weights, and the image sizes that they take."""

from __future__ import annotations

import inspect
import os
from contextlib import suppress
from typing import Any

import timm
import torch

from forensics_lib.utils.files import LFS_POINTER, broken_link, from_home, is_lfs_pointer

PROBES = ((64, 96), (32, 512))  # sizes that a backbone for images of any size takes; height and width
TimmModel = Any  # an ``nn.Module`` with timm's interface, which has no type of its own


def create_backbone(name: str, drop_path: float, pretrained: bool, file: str | None, side: int) -> TimmModel:
    """A timm model without head, for images of any size or, where timm has no such form of it, of ``side`` pixels.

    Raises ``ValueError`` for an unknown name or one that cannot be used, ``OSError`` where weights cannot be loaded.
    """
    if not timm.is_model(name.split(".")[0]):
        close = timm.list_models(f"{name.split('_')[0].split('.')[0]}*")[:10]
        raise ValueError(f"backbone: timm has no model {name!r}; similar ones: {', '.join(close) or 'see timm.list_models()'}")
    overlay = _weights_of(file, name) if file else None
    if pretrained:
        print(f"loading pretrained weights of {name} from {file or 'timm'}", flush=True)
    options = {"pretrained": pretrained, "num_classes": 0, "pretrained_cfg_overlay": overlay}
    try:
        backbone = _seeded_backbone(name, options, drop_path, side)
        backbone.pretrained_cfg.pop("state_dict", None)  # the weights are in the model now
        if file:
            _check_loaded(backbone, _seeded_backbone(name, options | {"pretrained": False}, drop_path, side))
    except Exception as error:  # damaged files raise nearly anything
        if not pretrained:
            raise
        raise OSError(_no_weights_message(name, file, error)) from error
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


def _seeded_backbone(name: str, options: dict[str, Any], drop_path: float, side: int) -> TimmModel:
    """A timm model; the state of torch's generator determines its initial weights and is not advanced."""
    with torch.random.fork_rng(devices=[]):
        state = torch.get_rng_state()
        for size, fixed in (({"dynamic_img_size": True}, None), ({}, None), ({"img_size": side}, side), ({}, side)):
            torch.set_rng_state(state)
            backbone = _created(name, options | size, drop_path)
            if backbone is None:  # its constructor has no such argument
                continue
            if not hasattr(backbone, "forward_intermediates") or not hasattr(backbone, "group_matcher"):
                raise ValueError(f"backbone: timm's {name} has no intermediate features; choose another, such as convnext_base")
            backbone.fixed_side = fixed
            if all(_takes(backbone, *shape) for shape in ([(side, side)] if backbone.fixed_side else PROBES)):
                return backbone
    fits = _next_side(name, options, side)
    raise ValueError(
        f"backbone: timm's {name} takes no images of {side} x {side} pixels; set crop_size"
        f"{f': {fits}, the next that it takes,' if fits else ' to what it was trained with'} or choose a backbone for any size "
        "(docs/backbones.md)"
    )


def _next_side(name: str, options: dict[str, Any], side: int) -> int | None:
    """The next larger side, a multiple of 32 pixels, of images that a backbone for one size alone takes."""
    for larger in range(rounded_up(side + 1, 32), 2 * side + 256, 32):
        with suppress(Exception):  # constructors refuse sizes with nearly any error
            backbone = _created(name, options | {"pretrained": False, "img_size": larger}, 0.0)
            if backbone is not None and _takes(backbone, larger, larger):
                return larger
    return None


def _created(name: str, options: dict[str, Any], drop_path: float) -> TimmModel | None:
    for more in (options | {"drop_path_rate": drop_path}, options):
        try:
            return timm.create_model(name, **more)
        except TypeError:  # its constructor has no such argument
            continue
    return None


@torch.no_grad()
def _takes(backbone: TimmModel, height: int, width: int) -> bool:
    """Whether images of this size go through; for patches of 14 pixels, the next multiple of 14."""
    multiple = size_multiple(backbone)
    image = torch.zeros(1, 3, rounded_up(height, multiple), rounded_up(width, multiple))
    learning = backbone.training
    try:
        final, _ = backbone.eval().forward_intermediates(image)
    except (RuntimeError, AssertionError, IndexError, ValueError):
        return False
    finally:
        backbone.train(learning)
    if not isinstance(final, torch.Tensor):
        raise ValueError("backbone: its features are those of several branches; choose another, such as convnext_base")
    return True


def size_multiple(backbone: TimmModel) -> int:
    """What the sides of images must be multiples of: the patches of a plain transformer, else 32 pixels."""
    return int(list(backbone.feature_info)[-1]["reduction"]) if _is_plain(backbone) else 32


def rounded_up(side: int, multiple: int) -> int:
    """The next multiple of ``multiple``."""
    return -(-side // multiple) * multiple


def _is_plain(backbone: TimmModel) -> bool:
    """Whether all feature maps have one stride, as those of a plain transformer's blocks."""
    return len({stage["reduction"] for stage in backbone.feature_info}) == 1


def block_indices(backbone: TimmModel) -> list[int] | None:
    """Of a plain transformer four blocks, evenly spaced, the last one among them; None of a backbone with stages."""
    if not _is_plain(backbone):
        return None
    blocks = len(list(backbone.feature_info))
    return sorted({max(0, round((number + 1) * blocks / 4) - 1) for number in range(4)})


def has_class_token(backbone: TimmModel) -> bool:
    """Whether the backbone is a plain transformer with a class token that timm gives of every block."""
    if not _is_plain(backbone) or getattr(backbone, "cls_token", None) is None:
        return False
    return "return_prefix_tokens" in inspect.signature(backbone.forward_intermediates).parameters


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
