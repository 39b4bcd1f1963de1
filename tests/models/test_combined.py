from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import TINY, model, picture

from forensics_lib.models.checkpoint import CheckpointError, load_model, read_checkpoint, save_checkpoint
from forensics_lib.models.combined import CombinedModel, _widen, build_model
from forensics_lib.models.residuals import RESIDUAL_CHANNELS, NoiseResidual
from forensics_lib.params import Params


@pytest.mark.parametrize("backbone", ["test_convnext", "tf_efficientnet_lite0", "resnet18", "test_vit"])
@pytest.mark.parametrize("frontend", ["rgb", "srm"])
def test_outputs_of_any_backbone(backbone, frontend):
    output = model(backbone=backbone, frontend=frontend)(torch.rand(2, 3, 160, 160))
    assert output.logits.shape == (2, 2)
    assert output.mask_logits.shape == (2, 1, 160, 160)


def test_task_a_builds_no_segmentation_branch():
    network = model("A")
    assert network.segmentation is None
    assert network(torch.rand(1, 3, 64, 96)).mask_logits is None


def test_residuals_of_flat_images_are_zero_and_limited_elsewhere():
    residual = NoiseResidual()
    assert residual(torch.full((1, 3, 16, 16), 0.7)).abs().max() < 1e-4
    noisy = residual(torch.rand(1, 3, 16, 16))
    assert noisy.shape == (1, 9, 16, 16)
    assert 0 < noisy.abs().max() <= 3


def test_step_one_freezes_the_backbone_with_its_norms_and_dropout():
    network = model("A", "resnet18")
    network.freeze_backbone(0)
    network.train()
    assert not any(p.requires_grad for p in network.backbone.parameters())
    assert not any(module.training for module in network.backbone.modules() if list(module.parameters()))
    assert network.classifier.training
    before = network.backbone.bn1.running_mean.clone()
    network(torch.rand(4, 3, 64, 64))
    assert torch.equal(before, network.backbone.bn1.running_mean)


@pytest.mark.parametrize("keep", [True, False])
def test_a_pretrained_backbone_keeps_its_statistics_and_trains_its_weights(keep):
    network = model("A", "resnet18")
    network.freeze_backbone("all", keep_statistics=keep)
    network.train()
    before = network.backbone.bn1.running_mean.clone()
    network(torch.rand(4, 3, 64, 64)).logits.sum().backward()
    assert torch.equal(before, network.backbone.bn1.running_mean) == keep
    assert network.backbone.bn1.weight.grad.abs().max() > 0


@pytest.mark.parametrize("backbone", ["test_convnext", "tf_efficientnet_lite0", "resnet18", "test_vit"])
def test_the_classifier_sees_the_statistics_of_the_last_stages(backbone):
    network, images = model("A", backbone, levels=True).eval(), torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        features, (final, stages, tokens) = network(images).features, network.encode(images)
        pooled, *levels = features.split(network.parts, 1)
        assert torch.equal(pooled, network.backbone.forward_head(final, pre_logits=True))
    assert len(levels) == min(4, len(stages)) and not tokens
    for level, stage in zip(levels, stages[-4:], strict=True):
        mean, deviation = level.chunk(2, 1)
        torch.testing.assert_close(mean, stage.mean((2, 3)), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(deviation**2, stage.var((2, 3), correction=0) + 1e-6, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("backbone", ["test_vit", "test_convnext"])
def test_the_classifier_sees_the_class_tokens_of_all_blocks_where_there_are_any(backbone):
    network, images = model("A", backbone, levels="tokens").eval(), torch.rand(2, 3, 64, 64)
    seen, hooks = [], []
    for block in getattr(network.backbone, "blocks", []):
        hooks.append(block.register_forward_hook(lambda _module, _input, output: seen.append(output[:, 0])))
    with torch.no_grad():
        pooled, *levels = network(images).features.split(network.parts, 1)
        final = network.encode(images).final
        assert torch.equal(pooled, network.backbone.forward_head(final, pre_logits=True))
    assert network.sees_whole and network.sees_tokens == bool(hooks)
    if hooks:
        assert len(levels) == len(hooks) and all(torch.equal(*pair) for pair in zip(levels, seen, strict=False))
    else:
        assert [level.shape[1] for level in levels] == [2 * stage["num_chs"] for stage in network.backbone.feature_info][-4:]


@pytest.mark.parametrize("levels", ["tokens", True, False])
def test_a_checkpoint_sees_the_levels_that_it_was_trained_with(levels, tmp_path: Path):
    torch.manual_seed(0)
    network = CombinedModel("A", "test_vit", levels=levels).eval()
    save_checkpoint(tmp_path / "m.pth", network)
    again, images = load_model(tmp_path / "m.pth", "A")[0], torch.rand(2, 3, 64, 64)
    assert again.parts == network.parts and again.sees_tokens == (levels == "tokens")
    with torch.no_grad():
        assert torch.equal(again(images).logits, network(images).logits)


@pytest.mark.parametrize(
    ("backbone", "last"), [("test_convnext", "stages.3."), ("resnet18", "layer4."), ("tf_efficientnet_lite0", "blocks.6.")]
)
def test_step_two_trains_the_last_stage_alone(backbone, last):
    network = model("A", backbone)
    network.freeze_backbone(1)
    trained = [name for name, p in network.backbone.named_parameters() if p.requires_grad]
    assert any(name.startswith(last) for name in trained)
    assert all(name.startswith((last, "head", "norm", "conv_head", "bn2")) for name in trained)


def test_all_stages():
    network = model("A")
    network.freeze_backbone("all")
    assert all(p.requires_grad for p in network.backbone.parameters())


@pytest.mark.parametrize("task", ["A", "B"])
def test_threads_change_nothing_in_bf16(task):
    torch.manual_seed(0)
    model = CombinedModel(task, "test_convnext", decoder_channels=16, levels="tokens" if task == "A" else "mask").eval()
    model = model.to(memory_format=torch.channels_last)
    outputs, before = [], torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for side in (64, 96, 160):
            x = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(side))
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
                found = model(x.contiguous(memory_format=torch.channels_last))
            outputs.append([found.logits, found.features] + ([found.mask_logits] if task == "B" else []))
    torch.set_num_threads(before)
    for number, output in enumerate(outputs):
        assert all(torch.equal(value, first) for value, first in zip(output, outputs[number % 3], strict=True))


def test_a_pretrained_network_begins_as_it_was_when_it_gets_residuals(tmp_path: Path):
    torch.manual_seed(0)
    plain = CombinedModel("A", "tf_efficientnet_lite0")
    torch.save(plain.backbone.state_dict(), tmp_path / "w.pth")
    options = {"pretrained": True, "pretrained_file": str(tmp_path / "w.pth")}
    images = torch.rand(2, 3, 64, 64)
    backbones = [CombinedModel("A", "tf_efficientnet_lite0", frontend=kind, **options).eval() for kind in ("rgb", "srm")]
    first, second = (model.encode(images)[0] for model in backbones)
    torch.testing.assert_close(first, second)


def test_the_widened_convolution_is_trained_with_the_last_stages():
    model = CombinedModel("A", "test_convnext", frontend="srm")
    model.freeze_backbone(1)
    trained = {name for name, parameter in model.backbone.named_parameters() if parameter.requires_grad}
    assert model.first_conv in trained and not any(name.startswith("stages.0") for name in trained)
    model.freeze_backbone(0)
    assert not any(parameter.requires_grad for parameter in model.backbone.parameters())


def test_residuals_ignore_flat_images():
    residual = NoiseResidual()
    flat = residual(torch.full((1, 3, 32, 32), 0.4))
    assert flat.shape[1] == RESIDUAL_CHANNELS
    assert flat.abs().max() < 1e-3
    assert 0.1 < residual(torch.rand(1, 3, 32, 32)).abs().max() <= 3


def test_a_backbone_without_a_single_first_convolution_says_so():
    backbone = timm.create_model("test_convnext")
    backbone.pretrained_cfg["first_conv"] = ("stem.0", "stem.1")
    with pytest.raises(ValueError, match="set frontend: rgb"):
        _widen(backbone, 3, pretrained=False)


@pytest.mark.parametrize("levels", [False, "mask"])
def test_image_and_mask_agree_from_the_start(levels):
    torch.manual_seed(0)
    model = CombinedModel("B", "test_convnext", decoder_channels=16, levels=levels).eval()
    features, found = torch.zeros(1, sum(model.parts)), torch.full((1, 1, 64, 64), 0.01)
    with torch.no_grad():
        empty = model.classify(features, found).softmax(1)[0, 1]
        found[..., 20:40, 20:40] = 0.99
        marked = model.classify(features, found).softmax(1)[0, 1]
    assert empty < 0.3 < 0.7 < marked


# ---- Precision -------------------------------------------------------------------------------------------------------


def in_bf16():
    return torch.autocast("cpu", torch.bfloat16)


def test_kernels_are_whole_and_sum_to_zero():
    weight = NoiseResidual().weight
    assert torch.equal(weight, weight.round()) and not weight.sum((1, 2, 3)).any()


@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, 0.4, 0.623, 200 / 255, 1.0])
@pytest.mark.parametrize("mixed", [False, True])
def test_an_image_of_one_colour_has_no_noise(value, mixed):
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        assert not NoiseResidual()(torch.full((1, 3, 40, 48), value)).any()


@pytest.mark.parametrize("size", [(1, 1), (2, 40), (40, 1)])
def test_images_of_few_pixels_have_a_mask(size):
    output = model(frontend="srm").eval()(torch.rand(1, 3, *size))
    assert output.mask_logits.shape == (1, 1, *size) and torch.isfinite(output.logits).all()


def test_residuals_are_as_exact_in_bf16_as_in_fp32():
    torch.manual_seed(0)
    residual = NoiseResidual()
    dark = torch.randint(0, 9, (2, 3, 40, 48)) / 255  # small differences, which bf16 would round away
    for images in (dark, dark + 200 / 255):
        alone = residual(images)
        with in_bf16():
            assert torch.equal(residual(images), alone)
        torch.testing.assert_close(alone.double(), residual.double()(images.double()), atol=1e-3, rtol=0)
        residual.float()


def test_noise_is_what_the_published_kernels_leave():
    images = torch.randint(0, 256, (1, 3, 24, 24)) / 255
    kernel = (
        torch.tensor([[-1, 2, -2, 2, -1], [2, -6, 8, -6, 2], [-2, 8, -12, 8, -2], [2, -6, 8, -6, 2], [-1, 2, -2, 2, -1]]) / 12
    )
    green = torch.nn.functional.conv2d(images[:, 1:2], kernel[None, None])
    expected = (20 * green).clamp(-3, 3)
    torch.testing.assert_close(NoiseResidual()(images)[:, 4:5, 2:-2, 2:-2], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("task", ["A", "B"])
def test_the_head_gives_in_bf16_what_it_gives_in_fp32(task):
    torch.manual_seed(0)
    network = CombinedModel(task, "test_convnext", decoder_channels=16, levels="tokens" if task == "A" else "mask").eval()
    torch.nn.init.normal_(network.classifier.weight)
    features = torch.randn(64, sum(network.parts)) * 5
    mask = torch.rand(64, 1, 64, 64) ** 8 if task == "B" else None
    with torch.no_grad():
        exact = network.classify(features, mask)
        with in_bf16():
            mixed = network.classify(features, mask)
            of_bf16 = network.classify(features.bfloat16(), mask)
    assert mixed.dtype == of_bf16.dtype == torch.float32
    assert torch.equal(mixed, exact)
    assert torch.equal(of_bf16, network.classify(features.bfloat16().float(), mask))


def test_masks_in_bf16_have_the_values_of_fp32(rng):
    torch.manual_seed(0)
    network = model(backbone="test_convnext").eval()
    images = torch.from_numpy(np.stack([picture(rng, 96, 96) for _ in range(4)])).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        exact = network(images)
        with in_bf16():
            mixed = network(images)
    probs = [output.mask_logits.sigmoid() for output in (exact, mixed)]
    assert (probs[0] - probs[1]).abs().max() < 0.02
    assert len(probs[1].unique()) > 0.5 * probs[1].numel()  # bf16 has some hundred values here
    assert (exact.logits.softmax(1) - mixed.logits.softmax(1)).abs().max() < 0.01


def test_a_model_that_learned_from_residuals_in_bf16_keeps_them(tmp_path):
    torch.manual_seed(0)
    images = torch.rand(2, 3, 64, 64)
    network = model(frontend="srm").eval()
    save_checkpoint(tmp_path / "new.pth", network)
    content = read_checkpoint(tmp_path / "new.pth")
    for facts in content["model"]._metadata.values():
        facts["version"] = 1  # as all modules were saved before
    torch.save(content, tmp_path / "old.pth")
    for _ in range(2):
        old, _ = load_model(tmp_path / "old.pth")
        with in_bf16():
            of_old, of_new = old.residual(images), load_model(tmp_path / "new.pth")[0].residual(images)
            assert of_old.dtype == torch.bfloat16 and of_new.dtype == torch.float32
            assert 0 < (of_old - of_new).abs().max() < 3
            assert old.segmentation.shallow[0](images).dtype == torch.bfloat16
        torch.testing.assert_close(old.residual(images), of_new, atol=5e-2, rtol=0)  # levels between whole ones are rounded
        save_checkpoint(tmp_path / "old.pth", old)  # and so does what is made of it


@pytest.mark.parametrize("mixed", [False, True])
def test_task_b_decides_by_its_mask_alone(mixed):
    torch.manual_seed(0)
    network = CombinedModel("B", "test_convnext", decoder_channels=16, levels="mask").eval()
    images = torch.rand(3, 3, 64, 64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        found = network(images)
        again = network.classify(torch.zeros(3, 0), found.mask_logits.float().sigmoid())
    assert found.features.shape == (3, 0) and found.features.dtype == torch.float32
    assert torch.equal(found.logits, again)
    assert network.norm is None and not network.level_norms


@pytest.mark.parametrize("shape", [(1, 1), (3, 200), (64, 64)])
def test_a_mask_of_any_size_gives_evidence(shape):
    model = CombinedModel("B", "test_convnext", decoder_channels=16).eval()
    features = torch.zeros(2, sum(model.parts))
    assert torch.isfinite(model.classify(features, torch.rand(2, 1, *shape))).all()


def test_pretrained_file_is_looked_for_from_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    source = timm.create_model("test_convnext", num_classes=0)
    for place in (tmp_path / "user" / "w.pth", tmp_path / "weights" / "w.pth"):  # tmp_path is the project's home
        place.parent.mkdir()
        torch.save(source.state_dict(), place)
    for name in ("~/w.pth", "weights/w.pth"):
        network = model("A", pretrained=True, pretrained_file=name)
        assert torch.equal(source.stem[0].weight, network.backbone.stem[0].weight)
    (tmp_path / "gone.pth").symlink_to("/mnt/none/w.pth")
    with pytest.raises(FileNotFoundError, match="is its disk mounted"):
        model("A", pretrained=True, pretrained_file="gone.pth")
    (tmp_path / "pointer.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    with pytest.raises(OSError, match="git lfs pull"):
        model("A", pretrained=True, pretrained_file="pointer.safetensors")


@pytest.mark.parametrize("frontend", ["rgb", "srm"])
def test_a_run_starts_from_the_backbone_of_another_one(tmp_path, frontend):
    source = model("B")
    with torch.no_grad():
        source.backbone.stem[0].weight.fill_(0.25)
    save_checkpoint(tmp_path / "run.pth", source)
    network = model("A", pretrained=True, pretrained_file="run.pth", frontend=frontend)
    found, wanted = network.backbone.state_dict(), source.backbone.state_dict()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted if name != network.first_conv)
    assert torch.equal(found["stem.0.weight"][:, :3], wanted["stem.0.weight"])
    assert "state_dict" not in network.backbone.pretrained_cfg


def test_a_run_does_not_start_from_what_does_not_fit_or_may_not_be_used(tmp_path):
    save_checkpoint(tmp_path / "srm.pth", model("A", frontend="srm"))
    with pytest.raises(ValueError, match="checkpoint of test_convnext with frontend srm"):
        model("A", pretrained=True, pretrained_file="srm.pth")
    save_checkpoint(tmp_path / "run.pth", model("A"))
    with pytest.raises(ValueError, match="checkpoint of test_convnext with frontend rgb; a run with resnet18"):
        CombinedModel("A", "resnet18", pretrained=True, pretrained_file="run.pth")
    values = TINY | {"pretrained": True, "pretrained_file": "run.pth"}
    with pytest.raises(ValueError, match="run's checkpoint, which may have been trained on other than official data"):
        build_model(Params(**values), "A")
    assert build_model(Params(**values, run_type="open"), "A").config["backbone"] == "test_convnext"


@pytest.mark.parametrize("parts", [{"residual_branch": False}, {"frontend": "bayar"}], ids=str)
def test_a_checkpoint_with_removed_parts_says_so_and_one_without_loads(tmp_path, parts):
    network = model("B")
    network.config["residual_branch"] = True  # as earlier versions wrote it
    save_checkpoint(tmp_path / "run.pth", network)
    assert load_model(tmp_path / "run.pth", "B")[0].config == model("B").config
    network.config |= parts
    save_checkpoint(tmp_path / "run.pth", network)
    with pytest.raises(CheckpointError, match=r"removed .*train again"):
        load_model(tmp_path / "run.pth")


def test_8_bit_images_are_refused():
    """Their values, up to 255 instead of 1, would give answers without sense."""
    model = CombinedModel("A", "test_convnext")
    with pytest.raises(TypeError, match="divide 8-bit images by 255"):
        model(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
