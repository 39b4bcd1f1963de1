"""Figures of the data before training: balance, shortcuts, residuals and spectra."""

from __future__ import annotations

import contextlib

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from forensics_lib.data.audit import SHORTCUT_LIMIT, Audit, ShortcutAudit
from forensics_lib.data.duplicates import NearDuplicates
from forensics_lib.data.manifest import usable
from forensics_lib.images.crops import centre_crop, random_square
from forensics_lib.images.io import ImageError, read_image
from forensics_lib.images.masks import read_mask
from forensics_lib.images.spectra import average_spectrum, radial_profile, residual
from forensics_lib.reports.figures import (
    BLUE,
    CLASS_COLOURS,
    CLASS_NAMES,
    GREEN,
    GREY,
    ORANGE,
    hide_axes,
    manipulation,
    new_figure,
)
from forensics_lib.synthesis.autoencoder import load_autoencode
from forensics_lib.synthesis.forgeries import METHODS, forge

SHOWN_SIDE = 192  # pixels of an image that a gallery shows, at native resolution


def balance_bars(manifest: pd.DataFrame, task: str) -> Figure:
    """Usable images of each source and method, by split and class."""
    good = manifest[manifest["error"].isna()]
    method = (" · " + good["method"].astype("str")).fillna("")
    names = good["split"] + " · " + good["source"] + method
    counts = pd.crosstab(names, good["label"]).reindex(columns=[0, 1], fill_value=0)
    left_out = max(0, len(counts) - 40)
    counts = counts.head(40)
    figure, axes = new_figure(1, 1, 8, 1.2 + 0.2 * len(counts))
    axis, before = axes[0, 0], np.zeros(len(counts))
    for label, colour in CLASS_COLOURS.items():
        axis.barh(counts.index, counts[label], left=before, color=colour, label=CLASS_NAMES[task][label])
        before += counts[label].to_numpy()
    axis.invert_yaxis()
    axis.set(xlabel="images" + (f" ({left_out} more groups not shown)" if left_out else ""))
    axis.legend(frameon=False)
    figure.suptitle(f"Task {task}: balance of split, source and method", fontsize=10)
    return figure


def file_facts(rows: pd.DataFrame) -> pd.DataFrame:
    """Megapixels, bytes per pixel and JPEG quality of images, missing where a file is no JPEG."""
    pixels = rows["width"] * rows["height"]
    facts = {"megapixels": pixels / 1e6, "bytes per pixel": rows["bytes"] / pixels, "JPEG quality": rows["jpeg_quality"]}
    return pd.DataFrame(facts)


def file_distributions(manifest: pd.DataFrame, task: str) -> Figure:
    """Size, bytes per pixel and JPEG quality of both classes: a difference here is a shortcut that a model may learn."""
    good = manifest[manifest["error"].isna()]
    facts = file_facts(good)
    figure, axes = new_figure(1, 3, 10, 2.6)
    for axis, (title, values) in zip(axes.flat, facts.items(), strict=True):
        if values.notna().any():
            bins = np.linspace(values.quantile(0.005), max(values.quantile(0.99), values.quantile(0.005) + 1e-3), 30)
            for label, colour in CLASS_COLOURS.items():
                chosen = values[good["label"] == label].dropna().clip(bins[0], bins[-1])
                share = np.full(len(chosen), 100 / max(1, (good["label"] == label).sum()))
                axis.hist(chosen, bins, weights=share, histtype="step", color=colour, lw=1.6, label=CLASS_NAMES[task][label])
        else:
            axis.text(0.5, 0.5, "no JPEG files", ha="center", transform=axis.transAxes)
        axis.set(xlabel=title, ylabel="% of the class")
    axes[0, 0].legend(frameon=False)
    figure.suptitle(f"Task {task}: file facts by class", fontsize=10)
    return figure


def shortcut_bars(audit: ShortcutAudit, task: str) -> Figure:
    """AUC of each file fact alone as a classifier."""
    figure, axes = new_figure(1, 1, 6, 2.6)
    axis, facts = axes[0, 0], audit.facts[::-1]
    axis.barh(facts.index, facts, color=[ORANGE if value > SHORTCUT_LIMIT else BLUE for value in facts])
    axis.axvline(SHORTCUT_LIMIT, color=GREY, ls=":", label=f"limit {SHORTCUT_LIMIT}")
    axis.set(xlabel="AUC of the class from this fact alone, cross-validated (0.5: nothing)", xlim=(0, 1))
    axis.legend(frameon=False, loc="lower right")
    figure.suptitle(f"Task {task}: what file facts tell (all together: AUC {audit.auc:.2f})", fontsize=10)
    return figure


def soundness(audit: Audit, manifest: pd.DataFrame) -> pd.DataFrame:
    """Unusable and duplicate images in % of their split: a row per split, a column per finding."""
    pairs = audit.near.pairs
    alike = pd.concat([pairs[[f"path_{end}", f"split_{end}"]].set_axis(["path", "split"], axis=1) for end in "ab"])
    counts = {
        "left out": manifest[manifest["error"].notna()].groupby("split").size(),
        "equal files": audit.exact.groupby("split").size(),
        "look-alikes": alike.drop_duplicates().groupby("split").size(),
        "photographs also in another split": (audit.groups > 0).sum(),
    }
    sizes = manifest.groupby("split").size()
    return pd.DataFrame(counts).reindex(sizes.index).fillna(0).div(sizes, axis=0) * 100


def soundness_bars(audit: Audit, manifest: pd.DataFrame, task: str) -> Figure:
    """Unusable and duplicate images, as shares of each split."""
    sizes, shares = manifest.groupby("split").size(), soundness(audit, manifest)
    figure, axes = new_figure(1, 1, 7, 2.6)
    axis, height = axes[0, 0], 0.8 / len(shares)
    for number, (split, colour) in enumerate(zip(shares.index, (BLUE, ORANGE, GREEN), strict=False)):
        places = np.arange(len(shares.columns)) + number * height
        bars = axis.barh(places, shares.loc[split], height, color=colour, label=f"{split}, {sizes[split]:,} images")
        axis.bar_label(bars, fmt=lambda share: f"{share:.3g}%", padding=2, fontsize=7)
    axis.set_yticks(np.arange(len(shares.columns)) + 0.4 - height / 2, list(shares))
    axis.set(xlabel="% of the split", xlim=(0, max(1.0, shares.to_numpy().max() * 1.2)))
    axis.invert_yaxis()
    axis.legend(frameon=False, fontsize=8)
    figure.suptitle(f"Task {task}: what cannot be used, and what stands twice", fontsize=10)
    return figure


def near_duplicate_pairs(near: NearDuplicates, count: int = 6) -> Figure:
    """The closest pairs of look-alikes, the images of a pair one above the other; without any an empty figure."""
    pairs = near.pairs.head(count)
    figure, axes = new_figure(2, max(1, len(pairs)), 1.7 * max(3, len(pairs)), 3.8)
    hide_axes(axes)
    for column, (_, pair) in zip(axes.T, pairs.iterrows(), strict=False):
        for axis, end in zip(column, "ab", strict=True):
            with contextlib.suppress(ImageError):
                axis.imshow(read_image(pair[f"path_{end}"]))
            axis.set_title(f"{pair[f'split_{end}']}, class {pair[f'label_{end}']}", fontsize=7)
    figure.suptitle("Look-alikes, the closest first", fontsize=10)
    return figure


def class_samples(manifest: pd.DataFrame, task: str, count: int = 6, seed: int = 0) -> Figure:
    """Native-resolution centres of random training images and, below each, their noise residuals eight times enlarged."""
    figure, axes = new_figure(4, count, 1.6 * count, 6.8)
    hide_axes(axes)
    train = usable(manifest, "train")
    for label in (0, 1):
        members = train[train["label"] == label]
        shown = members.sample(min(count, len(members)), random_state=seed)
        for column, (_, item) in zip(axes[2 * label : 2 * label + 2].T, shown.iterrows(), strict=False):
            try:
                crop = centre_crop(read_image(item["path"]), SHOWN_SIDE)
            except ImageError:
                column[0].set_title("unreadable", fontsize=8)
                continue
            column[0].imshow(crop, interpolation="nearest")
            column[1].imshow(residual(crop), cmap="gray", vmin=-16, vmax=16, interpolation="nearest")
            column[0].set_title(str(item["source"] if pd.isna(item["method"]) else item["method"])[:22], fontsize=8)
        for axis, name in ((axes[2 * label, 0], CLASS_NAMES[task][label]), (axes[2 * label + 1, 0], "residual")):
            axis.text(-0.08, 0.5, name, rotation=90, va="center", ha="right", transform=axis.transAxes, fontsize=9)
    figure.suptitle(f"Task {task}: training images at native resolution, and what a median filter takes away", fontsize=10)
    return figure


def class_spectra(manifest: pd.DataFrame, count: int = 200, seed: int = 0) -> list[np.ndarray]:
    """The average residual spectra of the authentic and of the other training images; see ``average_spectrum``."""
    train = usable(manifest, "train")
    return [average_spectrum(train[train["label"] == label], count=count, seed=seed) for label in (0, 1)]


def spectra(manifest: pd.DataFrame, task: str, count: int = 200, seed: int = 0) -> Figure:
    """The average residual spectrum of each class, their difference, and all as curves over frequency."""
    both = class_spectra(manifest, count, seed)
    figure, axes = new_figure(1, 4, 12, 2.9)
    low, high = np.nanpercentile(both, [1, 99.5]) if np.isfinite(both).any() else (0, 1)
    for axis, spectrum, name in zip(axes.flat, both, CLASS_NAMES[task], strict=False):
        figure.colorbar(axis.imshow(spectrum, cmap="cividis", vmin=low, vmax=high), ax=axis, label="dB", shrink=0.8)
        axis.set_title(name, fontsize=9)
    difference = both[1] - both[0]
    limit = max(3.0, np.nanpercentile(np.abs(difference), 99)) if np.isfinite(difference).any() else 3.0
    shown = axes[0, 2].imshow(difference, cmap="PuOr_r", vmin=-limit, vmax=limit)
    figure.colorbar(shown, ax=axes[0, 2], shrink=0.8)
    axes[0, 2].set_title(f"{CLASS_NAMES[task][1]} minus authentic, dB", fontsize=9)
    for axis in axes.flat[:3]:
        axis.set(xticks=[], yticks=[])
    for label, colour in CLASS_COLOURS.items():
        profile = radial_profile(both[label])
        axes[0, 3].plot(np.arange(len(profile)) / len(profile) / 2, profile, color=colour, label=CLASS_NAMES[task][label])
    axes[0, 3].set(xlabel="frequency, cycles per pixel", ylabel="dB")
    axes[0, 3].legend(frameon=False)
    figure.suptitle(f"Task {task}: average spectra of noise residuals, up to {count} training images a class", fontsize=10)
    return figure


def region_samples(manifest: pd.DataFrame, count: int = 6, seed: int = 0) -> Figure:
    """Manipulated training images with the outline of their true masks, in turn from each method."""
    train = usable(manifest, "train")
    shuffled = train[train["label"] == 1].sample(frac=1, random_state=seed)
    turn = shuffled.groupby("method", dropna=False).cumcount()
    figure, axes = new_figure(1, count, 1.7 * count, 2.2)
    hide_axes(axes)
    for axis, (_, item) in zip(
        axes.flat, shuffled.assign(turn=turn).sort_values("turn", kind="stable").iterrows(), strict=False
    ):
        try:
            image = read_image(item["path"])
            mask = read_mask(item["mask_path"], image.shape[:2])
        except ImageError:
            continue
        axis.imshow(image)
        axis.contour(mask, levels=[0.5], colors=ORANGE, linewidths=1.2)
        axis.set_title(manipulation(item), fontsize=8)
    figure.suptitle("Manipulated images; the line encloses what was changed", fontsize=10)
    return figure


def forgery_samples(manifest: pd.DataFrame, count: int = 4, seed: int = 0) -> Figure:
    """Forgeries of authentic training images with the outline of their masks, a row per method."""
    train, rng = usable(manifest, "train"), np.random.default_rng(seed)
    drawn = train[train["label"] == 0].sample(frac=1, random_state=seed)["path"]
    photos = []
    for path in drawn.head(2 * count):
        with contextlib.suppress(ImageError):
            photos.append(read_image(path))
    autoencode = load_autoencode("own")
    figure, axes = new_figure(len(METHODS), count, 1.9 * count, 1.9 * len(METHODS))
    hide_axes(axes)
    for row, method in zip(axes, METHODS, strict=True):
        for number, axis in enumerate(row):
            photo, donor = (photos[(number + shift) % len(photos)] for shift in (0, 1))
            found = forge(random_square(photo, 2 * SHOWN_SIDE, rng), donor, method, autoencode, rng)
            axis.imshow(found.image, interpolation="nearest")
            axis.contour(found.mask, levels=[0.5], colors=ORANGE, linewidths=1.2)
            axis.set_title(f"{method} ({found.kind})", fontsize=8)
    figure.suptitle("Forgeries that the library makes; the line encloses what is new", fontsize=10)
    return figure


def mask_area_distribution(areas: pd.DataFrame) -> Figure:
    """Distribution of the manipulated share of an image, for spliced and fully regenerated images."""
    areas = areas.dropna(subset=["share"])  # of masks that cannot be used
    figure, axes = new_figure(1, 1, 5, 2.6)
    axis, bins = axes[0, 0], np.linspace(0, 100, 26)
    for kind, colour in (("sp", BLUE), ("fr", GREEN)):
        chosen = areas.loc[areas["kind"] == kind, "share"] * 100
        axis.hist(chosen, bins, histtype="step", lw=1.6, color=colour, label=f"{kind}, median {chosen.median():.0f}%")
    axis.set(xlabel="manipulated pixels, % of the image", ylabel="images")
    axis.legend(frameon=False)
    figure.suptitle(f"Size of manipulated regions, {len(areas)} images", fontsize=10)
    return figure
