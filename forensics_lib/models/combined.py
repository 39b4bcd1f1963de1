"""``CombinedModel``: a timm backbone with a classification branch and, for Task B, a segmentation branch."""

from __future__ import annotations

from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from timm.models import group_parameters
from torch import nn

from forensics_lib.models.backbone import (
    TimmModel,
    block_indices,
    create_backbone,
    has_class_token,
    rounded_up,
    run_checkpoint,
    size_multiple,
)
from forensics_lib.models.lora import is_adapter
from forensics_lib.models.precision import LastInFp32, in_fp32, train_depthwise_in_fp32
from forensics_lib.models.residuals import RESIDUAL_CHANNELS, NoiseResidual
from forensics_lib.params import Params

LEVELS = 4  # the last stages, or blocks of a plain transformer without class tokens, whose statistics the classifier sees
AFTER_STAGES = ("head", "norm", "fc_norm", "attn_pool")  # parts of a timm model
UNSEEN = (*AFTER_STAGES, "conv_head", "bn2")  # which no feature map of a stage comes from
EVIDENCE = (0.002, 0.998)  # mask probabilities are clamped to these before their log-odds are taken


class Output(NamedTuple):
    """Model output for a batch of N images."""

    logits: torch.Tensor  # (N, 2): authentic, synthetic or manipulated
    mask_logits: torch.Tensor | None  # (N, 1, H, W) at input resolution; None for Task A
    features: torch.Tensor  # (N, C): what the classifier sees of the backbone


class Encoded(NamedTuple):
    """What the backbone makes of a batch of N images."""

    final: torch.Tensor  # the last features as timm gives them: a map, or tokens
    stages: list[torch.Tensor]  # maps (N, C, H, W) of its stages, finest first, or of the chosen blocks of a plain transformer
    tokens: list[torch.Tensor]  # class tokens (N, C) of all blocks, where the classifier sees them


class _GroupNorm(nn.GroupNorm):
    """Group normalisation whose result on a CPU does not depend on the number of threads, as it would in channels last."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type != "cpu":
            return super().forward(x)
        return super().forward(x.contiguous()).contiguous(memory_format=torch.channels_last)


def _conv(channels_in: int, channels_out: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """Convolution, group normalisation (independent of the batch size), GELU."""
    convolution = nn.Conv2d(channels_in, channels_out, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(convolution, _GroupNorm(8, channels_out), nn.GELU())


class Pyramid(nn.Module):
    """Feature maps of four blocks of a plain transformer, all of stride p, to maps of strides p/4, p/2, p and 2p.

    As the neck that brings plain transformers to UPerNet (Bao et al., BEiT, ICLR 2022), after a projection to ``channels``.
    """

    def __init__(self, block_channels: list[int], channels: int) -> None:
        super().__init__()
        self.project = nn.ModuleList(_conv(block, channels, 1) for block in block_channels)
        double = [nn.ConvTranspose2d(channels, channels, 2, 2) for _ in range(3)]
        four_times = nn.Sequential(double[0], _GroupNorm(8, channels), nn.GELU(), double[1])
        self.rescale = nn.ModuleList([four_times, double[2], nn.Identity(), nn.MaxPool2d(2, ceil_mode=True)])

    def forward(self, blocks: list[torch.Tensor]) -> list[torch.Tensor]:
        projected = [project(block) for project, block in zip(self.project, blocks, strict=True)]
        projected = [projected[0]] * (len(self.rescale) - len(projected)) + projected  # of less than four blocks
        return [rescale(block) for rescale, block in zip(self.rescale, projected, strict=True)]


class SegmentationBranch(nn.Module):
    """Backbone stages and noise residuals to mask logits at input resolution.

    A feature pyramid (Lin et al., CVPR 2017) upsamples all stages from stride 4 on to the finest one's stride, where they
    are fused as in UPerNet (Xiao et al., ECCV 2018).  A shallow branch on SRM residuals adds finer detail, and the result
    is refined at stride 2.
    """

    def __init__(self, stage_channels: list[int], channels: int) -> None:
        super().__init__()
        fine = max(8, channels // 4 // 8 * 8)
        self.lateral = nn.ModuleList(_conv(stage, channels, 1) for stage in stage_channels)
        self.smooth = nn.ModuleList(_conv(channels, channels) for _ in stage_channels)
        self.fuse = _conv(channels * len(stage_channels), channels)
        self.shallow = nn.Sequential(NoiseResidual(), _conv(RESIDUAL_CHANNELS, fine, stride=2), _conv(fine, fine))
        before, last = _conv(channels + fine, channels // 2), LastInFp32(channels // 2)
        last.bias = nn.Parameter(torch.tensor([-2.0]))  # most pixels are authentic
        self.refine = nn.Sequential(before, last)

    def forward(self, image: torch.Tensor, stages: list[torch.Tensor]) -> torch.Tensor:
        levels = [lateral(stage) for lateral, stage in zip(self.lateral, stages[-len(self.lateral) :], strict=True)]
        for i in range(len(levels) - 1, 0, -1):
            levels[i - 1] = levels[i - 1] + _resize_like(levels[i], levels[i - 1])
        smooth = [_resize_like(layer(level), levels[0]) for layer, level in zip(self.smooth, levels, strict=True)]
        merged = self.fuse(torch.cat(smooth, 1))
        fine = self.shallow(image)
        merged = torch.cat([_resize_like(merged, fine), fine], 1)
        return _resize_like(self.refine(merged), image)


def _resize_like(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    if x.shape[-2:] == like.shape[-2:]:
        return x
    return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=False)


class CombinedModel(nn.Module):
    """The network of both tasks: RGB images to class logits, and for Task B to mask logits.

    The classification branch is linear in the backbone's pooled features and, with ``levels``, in what earlier levels say:
    traces of generation live in early ones, content in late ones.  Of a transformer they are the class tokens of all blocks
    (RINE, Koutlis and Papadopoulos, ECCV 2024), of a backbone without class tokens the mean and the standard deviation of each
    channel of its last stages.  Task A has this branch alone.  Task B adds the segmentation branch, whose mask evidence
    (log-odds of the mean and of the highest 5% of the mask) is all that its classifier sees, as in TruFor (Guillaro et al.,
    CVPR 2023): what a picture shows says little of whether it was manipulated, and image and mask decisions agree.  All inputs
    of the classifier are of the whole image: one that is processed in tiles is classified once.

    ``forward`` takes images ``(N, 3, H, W)`` float in [0, 1] and returns ``Output``.  Sides that the backbone does not take are
    padded by reflection at their ends; it raises ``ValueError`` for images larger than ``image_side``, where there is one.

    Args:
        task: "A" (real or synthetic) or "B" (manipulated, and where).
        backbone: name of a timm model that returns intermediate features, such as ``convnext_base``.
        frontend: "rgb", or "srm" for noise residuals as nine more input channels of the backbone.
        decoder_channels: width of the segmentation branch.
        drop_path: stochastic depth of the backbone, a probability.
        dropout: dropout of what the classifier sees of the backbone, a probability.
        pretrained: start the backbone from timm's pretrained weights.
        pretrained_file: file of these weights, or a run's checkpoint, instead of a download.
        image_side: side of the largest images, pixels, for backbones that take one size alone; others ignore it.
        levels: what the classifier sees of the backbone.  Of new models "tokens", earlier levels too, for Task A, and "mask",
            nothing but the mask, for Task B.  Of earlier checkpoints True, stages of any backbone too, or False, the pooled
            features alone.

    Raises:
        ValueError: unknown backbone, one without intermediate features, or ``pretrained_file`` of another model.
        OSError: pretrained weights cannot be loaded.
    """

    mean: torch.Tensor
    std: torch.Tensor
    pyramid: Pyramid | None
    segmentation: SegmentationBranch | None
    norm: nn.LayerNorm | None  # of the pooled features, where the classifier sees them

    def __init__(
        self,
        task: str,
        backbone: str,
        *,
        frontend: str = "rgb",
        decoder_channels: int = 128,
        drop_path: float = 0.0,
        dropout: float = 0.0,
        pretrained: bool = False,
        pretrained_file: str | None = None,
        image_side: int = 224,
        levels: bool | str = False,
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {"task": task, "backbone": backbone, "frontend": frontend}
        self.config |= {"decoder_channels": decoder_channels, "drop_path": drop_path, "dropout": dropout, "levels": levels}
        extra = RESIDUAL_CHANNELS if frontend == "srm" else 0
        self.backbone = create_backbone(backbone, drop_path, pretrained, pretrained_file, image_side)
        self.image_side: int | None = self.backbone.fixed_side
        self.keep_statistics = False
        if self.image_side:
            self.config["image_side"] = image_side
        self.multiple, self.blocks = size_multiple(self.backbone), block_indices(self.backbone)
        self.sees_tokens = levels == "tokens" and has_class_token(self.backbone)
        self.first_conv = _widen(self.backbone, extra, pretrained) if extra else None
        statistics = timm.data.resolve_data_config({}, model=self.backbone)
        self.register_buffer("mean", torch.tensor(statistics["mean"][:3]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(statistics["std"][:3]).view(1, 3, 1, 1))
        self.residual = NoiseResidual() if frontend == "srm" else None
        self.pyramid, self.segmentation = self._mask_branch(decoder_channels) if task == "B" else (None, None)
        train_depthwise_in_fp32(self)
        evidence = 2 if task == "B" else 0
        pooled = getattr(self.backbone, "head_hidden_size", self.backbone.num_features)
        self.parts = [] if levels == "mask" else [pooled, *(self._level_sizes() if levels else [])]
        self.norm = nn.LayerNorm(pooled) if self.parts else None
        self.level_norms = nn.ModuleList(nn.LayerNorm(size) for size in self.parts[1:])
        features = sum(self.parts)
        self.dropout, self.classifier = nn.Dropout(dropout), nn.Linear(features + evidence, 2)
        if evidence:  # at first the image's log-odds are half those of its highest 5% of pixels
            with torch.no_grad():
                self.classifier.weight[:, features:] = torch.tensor([[-0.25, 0.0], [0.25, 0.0]])

    def _mask_branch(self, channels: int) -> tuple[Pyramid | None, SegmentationBranch]:
        """The segmentation branch and, for a plain transformer, the pyramid before it."""
        stages = list(self.backbone.feature_info)
        if self.blocks is None:
            return None, SegmentationBranch([stage["num_chs"] for stage in stages if stage["reduction"] >= 4], channels)
        pyramid = Pyramid([stages[index]["num_chs"] for index in self.blocks], channels)
        return pyramid, SegmentationBranch([channels] * 4, channels)

    @property
    def sees_whole(self) -> bool:
        """Whether a model of Task A was trained on images seen whole beside native crops, as all with ``levels`` are."""
        return bool(self.config["levels"])

    def _level_sizes(self) -> list[int]:
        stages = list(self.backbone.feature_info)
        if self.sees_tokens:
            return [block["num_chs"] for block in stages]
        chosen = stages if self.blocks is None else [stages[index] for index in self.blocks]
        return [2 * stage["num_chs"] for stage in chosen[-LEVELS:]]

    def forward(self, images: torch.Tensor) -> Output:
        return self.decide(images, *self.encode(images))

    def encode(self, images: torch.Tensor) -> Encoded:
        """The backbone's features of images ``(N, 3, H, W)`` in [0, 1].  Raises ``TypeError`` of 8-bit images."""
        if not images.is_floating_point():
            raise TypeError(f"images of {images.dtype}: the model takes floats in [0, 1]; divide 8-bit images by 255")
        x = (images - self.mean) / self.std
        if self.residual is not None:
            x = torch.cat([x, self.residual(images)], 1)
        x = reflected(x, *self.padded_sides(*x.shape[-2:]))
        if not self.sees_tokens:
            final, stages = self.backbone.forward_intermediates(x, indices=self.blocks)
            return Encoded(final, stages, [])
        final, blocks = self.backbone.forward_intermediates(x, return_prefix_tokens=True)
        return Encoded(final, [blocks[index][0] for index in self.blocks or ()], [prefix[:, 0] for _, prefix in blocks])

    def padded_sides(self, height: int, width: int) -> tuple[int, int]:
        """The size that images of this one are padded to.  Raises ``ValueError`` of images larger than ``image_side``."""
        if self.image_side is None:
            return rounded_up(height, self.multiple), rounded_up(width, self.multiple)
        if max(height, width) > self.image_side:
            raise ValueError(
                f"images of {height} x {width}: {self.config['backbone']} takes at most {self.image_side} x {self.image_side} "
                f"in this model, its crop_size; set tile_size: {self.image_side}"
            )
        return self.image_side, self.image_side

    def as_map(self, final: torch.Tensor, stages: list[torch.Tensor]) -> torch.Tensor:
        """The backbone's last features, or their gradients, as a map ``(N, C, H, W)``: tokens without those of no patch."""
        if final.ndim == 3:
            height, width = stages[-1].shape[-2:]
            return final[:, -height * width :].transpose(1, 2).unflatten(2, (height, width))
        return final.permute(0, 3, 1, 2) if getattr(self.backbone, "output_fmt", "NCHW") == "NHWC" else final

    def decide(
        self, images: torch.Tensor, final: torch.Tensor, stages: list[torch.Tensor], tokens: list[torch.Tensor]
    ) -> Output:
        """Both branches on what ``encode`` returned for the same images."""
        features = self._seen(final, stages, tokens)
        if self.segmentation is None:
            return Output(self.classify(features), None, features)
        height, width = images.shape[-2:]
        stages = stages if self.pyramid is None else self.pyramid(stages)
        padded = reflected(images, *self.padded_sides(height, width))
        mask_logits = self.segmentation(padded, stages)[..., :height, :width]
        mask = mask_logits.detach().float().sigmoid()  # the image loss must not train masks: fully redrawn images have none
        return Output(self.classify(features, mask), mask_logits, features)

    def _seen(self, final: torch.Tensor, stages: list[torch.Tensor], tokens: list[torch.Tensor]) -> torch.Tensor:
        """What the classifier sees of the backbone's features, ``(N, C)``."""
        if self.norm is None:
            return final.new_zeros(final.shape[0], 0, dtype=torch.float32)  # len() would fix the batch in an export
        with in_fp32(final):
            levels = [token.float() for token in tokens]
            if self.level_norms and not self.sees_tokens:
                levels = [_statistics(stage.float()) for stage in stages[-LEVELS:]]
            return torch.cat([self.backbone.forward_head(final.float(), pre_logits=True), *levels], 1)

    def classify(self, features: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """``Output.features`` ``(N, C)`` and for Task B mask probabilities ``(N, 1, H, W)`` to logits ``(N, 2)``.

        Always in fp32: bf16 would change probabilities by up to 0.02.
        """
        with in_fp32(features):
            if self.norm is not None:
                parts = zip([self.norm, *self.level_norms], features.float().split(self.parts, 1), strict=True)
                features = self.dropout(torch.cat([norm(part) for norm, part in parts], 1))
            return self.classifier(features if mask is None else torch.cat([features, _mask_evidence(mask.float())], 1))

    def train(self, mode: bool = True) -> CombinedModel:
        """As ``nn.Module.train``, but frozen modules, and batch normalization with kept statistics, stay in evaluation mode."""
        super().train(mode)
        if mode:
            for module in self.backbone.modules():
                parameters = list(module.parameters())
                frozen = parameters and not any(parameter.requires_grad for parameter in parameters)
                if frozen or (self.keep_statistics and isinstance(module, nn.modules.batchnorm._BatchNorm)):
                    module.eval()
        return self

    def freeze_backbone(self, trainable_stages: int | str = 0, *, keep_statistics: bool = False) -> None:
        """Freeze the backbone but for its last ``trainable_stages`` (timm's coarse groups); of ``"all"`` none is frozen.

        What follows the stages is frozen where the classifier sees the mask alone, and nothing would reach it.
        Where the backbone has adapters, they alone are trained of these stages.  With ``keep_statistics`` batch normalization
        goes on with the means and variances that it has, those of pretraining, as it did while the head was trained.
        """
        self.keep_statistics = keep_statistics
        groups = group_parameters(self.backbone, self.backbone.group_matcher(coarse=True), reverse=True)
        layer_of = {name: int(layer) for name, layer in groups.items()}
        last = max(layer for name, layer in layer_of.items() if name.partition(".")[0] not in AFTER_STAGES)
        first = 0 if trainable_stages == "all" else last - int(trainable_stages) + 1
        adapters = {name for name in layer_of if is_adapter(name)}
        for name, parameter in self.backbone.named_parameters():
            trained = layer_of[name] >= first and (not adapters or name in adapters)
            trained = trained and not (self.norm is None and name.partition(".")[0] in UNSEEN)
            trained = trained or name == self.first_conv  # whose residual channels are untrained
            parameter.requires_grad_(trainable_stages != 0 and trained)


def reflected(images: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Images ``(N, C, H, W)``, reflected at their lower and right ends, as often as it takes, to ``height`` x ``width``."""
    for dim, side in ((2, height), (3, width)):
        length = images.shape[dim]
        if side > length:
            place = torch.arange(side, device=images.device) % (2 * length)
            images = images.index_select(dim, torch.where(place < length, place, 2 * length - 1 - place))
    return images


def _widen(backbone: TimmModel, extra: int, pretrained: bool) -> str:
    """Give the first convolution ``extra`` input channels; returns the name of its weight.

    Pretrained RGB weights stay and the new ones are zero, so that the output does not change at first.
    """
    name = backbone.pretrained_cfg.get("first_conv")
    old = backbone.get_submodule(name) if isinstance(name, str) else None
    if not isinstance(old, nn.Conv2d) or old.groups != 1:
        raise ValueError(
            f"backbone: {backbone.pretrained_cfg.get('architecture')} has no single first convolution; set frontend: rgb"
        )
    options = {key: getattr(old, key) for key in ("kernel_size", "stride", "padding", "dilation")}
    with torch.random.fork_rng(devices=[]):  # of the same class: some of timm's convolutions pad in their own way
        new = type(old)(old.in_channels + extra, old.out_channels, bias=old.bias is not None, **options)
    if pretrained:
        with torch.no_grad():
            new.weight.zero_()
            new.weight[:, : old.in_channels] = old.weight
            if old.bias is not None and new.bias is not None:
                new.bias.copy_(old.bias)
    parent, _, attribute = name.rpartition(".")
    setattr(backbone.get_submodule(parent), attribute, new)
    return f"{name}.weight"


def _statistics(stage: torch.Tensor) -> torch.Tensor:
    """The mean and the standard deviation over places of a map's channels, ``(N, C, H, W)`` to ``(N, 2 C)``.

    Of rows of places: in channels last the result on a CPU would depend on the number of threads.
    """
    variance, mean = torch.var_mean(stage.contiguous().flatten(2), 2, correction=0)
    return torch.cat([mean, (variance + 1e-6).sqrt()], 1)  # whose gradient is finite where nothing varies


def _mask_evidence(mask: torch.Tensor) -> torch.Tensor:
    """``(N, 1, H, W)`` probabilities to log-odds ``(N, 2)``: of the highest 5% of the mask at stride 8, and of its mean."""
    coarse = F.avg_pool2d(mask, 8, ceil_mode=True).flatten(1)
    top = coarse.topk(max(1, coarse.shape[1] // 20), 1).values
    return torch.logit(torch.stack([top.mean(1), coarse.mean(1)], 1).clamp(*EVIDENCE))


def build_model(params: Params, task: str, *, levels: bool | str | None = None) -> CombinedModel:
    """The model that a run trains for a task, with initial weights; its ``levels`` are those of new models unless given.

    Raises as ``CombinedModel`` does, and ``ValueError`` if tiles are larger than the backbone takes, or a constrained run would
    start from another run's checkpoint, whose training data are not known.
    """
    if params.run_type == "constrained" and params.pretrained_file and run_checkpoint(params.pretrained_file):
        raise ValueError(
            f"pretrained_file: {params.pretrained_file} is a run's checkpoint, which may have been trained on other "
            "than official data: give a constrained run timm's weights of the backbone, or set run_type: open"
        )
    model = CombinedModel(
        task,
        params.backbone,
        frontend=params.frontend,
        decoder_channels=params.decoder_channels,
        drop_path=params.drop_path,
        dropout=params.dropout,
        pretrained=params.pretrained,
        pretrained_file=params.pretrained_file,
        image_side=params.crop_size,
        levels=levels if levels is not None else {"A": "tokens", "B": "mask"}[task],
    )
    if task == "B" and model.image_side and params.tile_size > model.image_side:
        raise ValueError(
            f"tile_size: {params.tile_size}, but {params.backbone} takes images of one size alone, here crop_size: set "
            f"tile_size: {model.image_side}"
        )
    return model
