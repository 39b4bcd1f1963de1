"""What a run may not train on: refused by where it really lies, with every place named."""

import os
from pathlib import Path

import pytest
from conftest import TINY, changed, make_tiny_data, picture, save, touch, with_data

from forensics_lib.data.manifest import build_manifest, data_sets
from forensics_lib.data.rows import LayoutError
from forensics_lib.params import Params, ParamsError, make_params
from forensics_lib.run import Run


def link(run: Run, name: str, target: Path) -> Path:
    """A link in the run's Task A folder."""
    place = run.data / "dataset" / name
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(target)
    return place


def refuses(run: Run, reason: str, task: str = "A") -> None:
    with pytest.raises(LayoutError, match=reason):
        data_sets(run, task)


def opened(run: Run) -> Run:
    return changed(run, run_type="open")


FOREIGN = {
    "open data": ("elsewhere/dataset_open/train/1_fake/sdxl", "open data"),
    "GenImage": ("genimage/Midjourney/imagenet_midjourney/train/ai", "GenImage"),
    "GenImage in capitals": ("gi/ADM/Train/Nature", "GenImage"),
    "Community Forensics": ("cf/kandinsky/fake", "Community Forensics"),
    "test split": ("whatever/test/progan/car/1_fake", "test split"),
    "test generator": ("unpacked/crn/1_fake", "CNNDetection's test set"),
    "test generator in capitals": ("unpacked/BigGAN/1_fake", "CNNDetection's test set"),
    "folder of a test split": ("bench/test/sdxl", "test split"),
    "test category": ("unpacked/stylegan2/horse/1_fake", "CNNDetection's test set"),
    "TGIF": ("tgif/sd2-fr/training/cat", "TGIF"),
}


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("way", ["folder", "deeper", "file", "chain"])
def test_a_constrained_run_follows_every_kind_of_link(tiny_run, tmp_path, name, way):
    target, reason = FOREIGN[name]
    touch(tmp_path / target, "1.png")
    if way == "folder":
        place = link(tiny_run, "train/1_fake/more", tmp_path / target)
    elif way == "deeper":
        place = link(tiny_run, "train/1_fake/src/a/b/more", tmp_path / target)
    elif way == "file":
        place = link(tiny_run, "train/1_fake/src/more.png", tmp_path / target / "1.png")
    else:
        (tmp_path / "middle").symlink_to(tmp_path / target)
        place = link(tiny_run, "train/1_fake/more", tmp_path / "middle")
    with pytest.raises(LayoutError, match="official data only") as refused:
        data_sets(tiny_run, "A")
    assert str(place) in str(refused.value) and str(tmp_path / target) in str(refused.value) and reason in str(refused.value)
    assert [entry.layout for entry in data_sets(opened(tiny_run), "A")] == ["own", "own"]


def test_a_link_to_the_whole_of_a_foreign_set_is_judged_by_what_lies_below(tiny_run, tmp_path):
    touch(tmp_path / "sets" / "gi", "sd5/train/ai/1.png", "sd5/train/nature/2.png")
    link(tiny_run, "train/1_fake/sets", tmp_path / "sets")
    refuses(tiny_run, "GenImage")


def test_a_linked_training_folder_is_judged(tiny_run, tmp_path):
    touch(tmp_path / "gi", "x/train/ai/1.png")
    (tiny_run.data / "dataset" / "train" / "1_fake").rename(tmp_path / "kept")
    link(tiny_run, "train/1_fake", tmp_path / "gi")
    refuses(tiny_run, "GenImage")


@pytest.mark.parametrize("single", [False, True])
def test_what_the_open_folder_links_to_is_open_data(tiny_run, tmp_path, single):
    touch(tmp_path / "pool" / "deep", "1.png", "2.png")
    theirs = tiny_run.data / "dataset_open" / "train" / "1_fake" / ("x.png" if single else "pool")
    theirs.parent.mkdir(parents=True)
    theirs.symlink_to(tmp_path / "pool" / "deep" / "1.png" if single else tmp_path / "pool")
    ours = "1.png" if single else "2.png"
    link(tiny_run, "train/1_fake/src/mine.png", tmp_path / "pool" / "deep" / ours)
    refuses(tiny_run, r"dataset_open holds it too")


@pytest.mark.parametrize("other", ["dataset_taskB/TGIF/orig", "dataset_taskB/validation/coco/original", "test/taskA"])
def test_folders_that_are_for_something_else_are_not_trained_on(tiny_run, other):
    link(tiny_run, "train/0_real/more", tiny_run.data / other)
    refuses(tiny_run, r"leads into")


def test_a_place_that_another_set_of_the_run_names(tiny_run, tmp_path):
    touch(tmp_path / "b", "sd2-sp/training/cat/1.png", "originals/1.png")
    link(tiny_run, "train/0_real/more", tmp_path / "b" / "originals")
    entries = {"root": str(tiny_run.data / "dataset"), "layout": "own"}, {"root": str(tmp_path / "b")}
    refuses(with_data(tiny_run, *entries), r"it is the set .*b \(tgif\)")


@pytest.mark.parametrize("place", ["inside", "above"])
def test_images_that_a_table_or_a_parquet_file_lists(tiny_run, tmp_path, place):
    touch(tmp_path / "mine", "images/1.png")
    if place == "above":
        (tmp_path / "mine" / "t.csv").write_text("path,label\nimages\\1.png,1\n")
    else:
        touch(tmp_path / "mine", "images/train-0.parquet")
    link(tiny_run, "train/1_fake/more", tmp_path / "mine" / "images")
    refuses(tiny_run, r"the set of the table|parquet set")


def test_official_sets_are_linked_in_as_ever(tiny_run, tmp_path):
    touch(
        tmp_path / "progan_train", "airplane/0_real/1.png", "airplane/1_fake/1.png", "train/0_real/2.png", "train/1_fake/2.png"
    )
    touch(tmp_path / "ldm", "train/latent_diffusion_text2img_set0/1.png")
    touch(tmp_path / "coco" / "train2017", "000000000009.jpg")
    touch(tmp_path / "notes", "t.csv")
    link(tiny_run, "train/0_real/progan_airplane", tmp_path / "progan_train/airplane/0_real")
    link(tiny_run, "train/1_fake/progan_train", tmp_path / "progan_train/train/1_fake")
    link(tiny_run, "train/1_fake/ldm", tmp_path / "ldm/train/latent_diffusion_text2img_set0")
    link(tiny_run, "train/0_real/coco", tmp_path / "coco/train2017")
    shared = tiny_run.data / "dataset_open" / "train" / "0_real" / "coco"  # which the open run may use as well
    shared.parent.mkdir(parents=True)
    shared.symlink_to(tmp_path / "coco/train2017")
    touch(tmp_path / "social" / "ITW-SM" / "0_real", "x_1.jpg")
    link(tiny_run, "val/0_real/itw", tmp_path / "social/ITW-SM/0_real")
    link(tiny_run, "val/1_fake/unseen", tmp_path / "progan_test/stylegan/car/1_fake")
    touch(tmp_path / "progan_test", "stylegan/car/1_fake/1.png")
    assert [entry.layout for entry in data_sets(tiny_run, "A")] == ["own"]


def test_every_refused_place_is_named(tiny_run, tmp_path):
    touch(tmp_path, "gi/a/train/ai/1.png", "cf/b/real/2.png")
    places = [
        link(tiny_run, "train/1_fake/one", tmp_path / "gi/a/train/ai"),
        link(tiny_run, "train/0_real/src/deep/two.png", tmp_path / "cf/b/real/2.png"),
    ]
    with pytest.raises(LayoutError) as refused:
        data_sets(tiny_run, "A")
    assert all(str(place) in str(refused.value) for place in places)


@pytest.mark.parametrize("root", ["CNN_synth_testset", "renamed", "all"])
def test_cnndetections_test_generators_do_not_train(tiny_run, tmp_path, root):
    names = ("crn/0_real/1.png", "crn/1_fake/1.png", "progan/cat/0_real/1.png", "progan/cat/1_fake/1.png")
    touch(tmp_path / root / ("test" if root == "all" else ""), *names)
    entry = {"root": str(tmp_path / root), "layout": "cnndetection", "split": "train"}
    refuses(with_data(tiny_run, {"root": str(tiny_run.data / "dataset")}, entry), r"test split|not among CNNDetection's")


@pytest.mark.parametrize("which", ["coco_root", "lsun_root"])
def test_the_photographs_of_the_latent_diffusion_set_are_official_too(tiny_run, tmp_path, which):
    touch(tmp_path / "ldm", "train/latent_diffusion_text2img_set0/1.png")
    touch(tmp_path / "unpacked", "crn/0_real/1.png")
    with pytest.raises(LayoutError, match="CNNDetection's test set"):
        entry = {"root": str(tmp_path / "ldm"), which: str(tmp_path / "unpacked/crn/0_real")}
        data_sets(with_data(tiny_run, entry), "A")


ITW_SM = ("0_real/Facebook_real_1042.jpg", "0_real/LinkedIn_real_7.jpg", "1_fake/x_618.jpg", "1_fake/Instagram_fake_3.jpg")


@pytest.mark.parametrize("run_type", ["constrained", "open"])
@pytest.mark.parametrize("way", ["folder", "file", "renamed folder", "renamed file", "copied", "set", "table", "own set"])
def test_itw_sm_is_known_under_any_name(tiny_run, tmp_path, run_type, way):
    root = tmp_path / ("ITW-SM" if way in ("folder", "file") else "social")
    touch(root, *ITW_SM)
    run = changed(tiny_run, run_type=run_type)
    if "folder" in way:
        link(run, "train/1_fake/src/deep/more", root / "1_fake")
    elif "file" in way:
        link(run, "train/1_fake/src/more.jpg", root / "1_fake" / "x_618.jpg")
    elif way == "copied":
        touch(run.data / "dataset" / "train" / "1_fake" / "more", "x_618.jpg", "Instagram_fake_3.jpg")
    elif way == "set":
        (tmp_path / "plain").mkdir()
        (root / "0_real" / "Facebook_real_1042.jpg").rename(tmp_path / "plain" / "1.jpg")
        (root / "0_real" / "1.jpg").symlink_to(tmp_path / "plain" / "1.jpg")
        link(run, "train/0_real/more", root / "0_real")
        run = with_data(run, {"root": str(run.data / "dataset")}, {"root": str(root), "layout": "itw_sm"})
    elif way == "own set":
        run = with_data(run, {"root": str(run.data / "dataset")}, {"root": str(root), "split": "train"})
    else:
        lines = [f"social/{name},{name[0]},train" for name in ITW_SM]
        (tmp_path / "t.csv").write_text("\n".join(["path,label,split", *lines]))
        run = with_data(run, {"root": str(run.data / "dataset")}, {"root": str(tmp_path / "t.csv")}, run_type="open")
    with pytest.raises(LayoutError, match="must not be trained on"):
        build_manifest(run, "A")


@pytest.mark.parametrize("run_type", ["constrained", "open"])
def test_hard_links_of_the_listed_validation_set_do_not_train(tiny_run, tmp_path, rng, run_type):
    """By its content alone: neither the link's name nor its folder tells."""
    for number in range(2):
        for label in ("0_real", "1_fake"):
            save(tmp_path / "social" / label / f"x_{number}.png", picture(rng))
    os.link(tmp_path / "social" / "1_fake" / "x_0.png", tiny_run.data / "dataset" / "train" / "1_fake" / "src" / "again.png")
    entries = {"root": str(tiny_run.data / "dataset")}, {"root": str(tmp_path / "social"), "layout": "itw_sm"}
    with pytest.raises(LayoutError, match=r"again\.png is a file of the validation set"):
        build_manifest(with_data(tiny_run, *entries, run_type=run_type), "A")


@pytest.mark.parametrize("file", ["", "1_fake0.png"])
def test_a_training_link_into_the_validation_folder(tiny_run, file):
    link(tiny_run, f"train/1_fake/more{file}", tiny_run.data / "dataset" / "val" / "1_fake" / "src" / file)
    refuses(tiny_run, "it is in the run's validation set")


def test_the_task_b_validation_set_is_never_trained_on(tiny_run):
    place = tiny_run.data / "dataset_taskB" / "TGIF" / "orig" / "training" / "more"
    place.symlink_to(tiny_run.data / "dataset_taskB" / "validation" / "coco" / "original")
    for run in (tiny_run, opened(tiny_run)):
        refuses(run, "must not be trained on", task="B")


def test_flat_class_folders_are_not_itw_sm_for_that_reason(tiny_run, tmp_path, rng):
    for label in ("0_real", "1_fake"):
        save(tmp_path / "flat" / label / "cat_0001.png", picture(rng))
    own = {"root": str(tiny_run.data / "dataset")}
    refuses(with_data(tiny_run, own, {"root": str(tmp_path / "flat"), "split": "val"}), r"refused: .*flat \(folders\)")
    with pytest.raises(LayoutError, match="set split: train, val or test"):
        build_manifest(with_data(tiny_run, own, {"root": str(tmp_path / "flat")}, run_type="open"), "A")
    stated = {"root": str(tmp_path / "flat"), "split": "test"}
    assert build_manifest(with_data(tiny_run, own, stated, run_type="open"), "A")["split"].eq("test").sum() == 2


def tabled(run: Run, folder: Path, listed: Path, *others: Path, mask: Path | None = None) -> Run:
    """An open run on some sets, and on a table that lists one image for training."""
    (folder / "t.csv").write_text(
        f"path,label,split{',mask_path' * bool(mask)}\n{listed},1,train{f',{mask}' if mask else ''}\n"
    )
    return with_data(run, *({"root": str(root)} for root in (*others, folder / "t.csv")), run_type="open")


@pytest.mark.parametrize("way", ["table", "hard link"])
def test_the_task_b_validation_set_does_not_train_task_a(tiny_run, tmp_path, way):
    dataset = tiny_run.data / "dataset"
    image = next((tiny_run.data / "dataset_taskB" / "validation" / "coco" / "brushnet" / "image").iterdir())
    if way == "table":
        run = tabled(tiny_run, tmp_path, image, dataset)
    else:
        os.link(image, dataset / "train" / "1_fake" / "src" / "again.jpg")
        run = with_data(tiny_run, {"root": str(dataset)}, run_type="open")
    with pytest.raises(LayoutError, match=r"is a file of the validation set .*must not be trained on"):
        build_manifest(run, "A")


def test_an_unlisted_task_b_validation_set_does_not_train_task_b(tiny_run, tmp_path):
    folder = tiny_run.data / "dataset_taskB"
    image = next((folder / "validation" / "coco" / "brushnet" / "image").iterdir())
    mask = image.parents[1] / "mask" / f"{image.stem}_mask.png"
    with pytest.raises(LayoutError, match=r"is a file of the validation set"):
        build_manifest(tabled(tiny_run, tmp_path, image, folder / "TGIF", mask=mask), "B")


def test_a_validation_set_that_is_listed_for_the_other_task(tiny_run, tmp_path):
    (tiny_run.data / "dataset_taskB" / "validation").rename(tmp_path / "apart")
    image = next((tmp_path / "apart" / "coco" / "original").iterdir())
    with pytest.raises(LayoutError, match=r"is a file of the validation set"):
        build_manifest(tabled(tiny_run, tmp_path, image, tiny_run.data / "dataset", tmp_path / "apart"), "A")


@pytest.mark.parametrize("run_type", ["constrained", "open"])
@pytest.mark.parametrize("way", ["folder", "file", "hard link", "table"])
def test_test_images_do_not_train(tiny_run, tmp_path, run_type, way):
    run = changed(tiny_run, run_type=run_type, aligned=None)
    tests = run.data / "test" / "taskA"
    if way == "folder":
        link(run, "train/0_real/t", tests)
    elif way == "file":
        link(run, "train/0_real/src/t.jpg", tests / "a1.jpg")
    elif way == "hard link":
        os.link(tests / "a1.jpg", run.data / "dataset" / "train" / "0_real" / "src" / "t.jpg")
    else:
        run = tabled(run, tmp_path, tests / "a1.jpg", run.data / "dataset")
    with pytest.raises(LayoutError, match=r"Task A test images.* nor must the test images"):
        build_manifest(with_data(run, {"root": str(run.data / "dataset")}) if way != "table" else run, "A")


@pytest.mark.parametrize(("split", "role"), [("testing", "a test split"), ("validation", "run's validation set")])
def test_single_files_of_tgifs_other_splits_do_not_train(tiny_run, split, role):
    root = tiny_run.data / "dataset_taskB" / "TGIF"
    target = next((root / "sd2-sp" / split / "cat").iterdir())
    (root / "sd2-sp" / "training" / "cat" / target.name).symlink_to(target)
    with pytest.raises(LayoutError, match=role) as refused:
        data_sets(tiny_run, "B")
    assert ("validation" in str(refused.value).partition("Official layouts")[0]) == (split == "validation")


def test_a_chain_of_links_through_a_linked_folder(tiny_run, tmp_path):
    touch(tiny_run.data / "dataset_open" / "train" / "1_fake" / "flux", "1.png")
    (tmp_path / "first").symlink_to(tiny_run.data / "dataset_open" / "train" / "1_fake" / "flux")
    (tmp_path / "single.png").symlink_to(tmp_path / "first" / "1.png")
    link(tiny_run, "train/1_fake/src/z.png", tmp_path / "single.png")
    refuses(tiny_run, "it is open data")


def test_an_open_file_that_is_linked_through_a_linked_folder(tiny_run, tmp_path):
    touch(tmp_path / "pool", "1.png")
    (tmp_path / "first").symlink_to(tmp_path / "pool")
    theirs = tiny_run.data / "dataset_open" / "train" / "1_fake" / "f" / "a.png"
    theirs.parent.mkdir(parents=True)
    theirs.symlink_to(tmp_path / "first" / "1.png")
    link(tiny_run, "train/1_fake/src/z.png", tmp_path / "pool" / "1.png")
    refuses(tiny_run, "dataset_open holds it too")


@pytest.mark.parametrize("run_type", ["constrained", "open"])
@pytest.mark.parametrize("way", ["class folder", "platform folder", "file", "table"])
def test_itw_sm_is_known_by_its_platforms_folders(tiny_run, tmp_path, run_type, way):
    root = tmp_path / "social"
    touch(root, "0_real/facebook/0.jpg", "0_real/x/0.jpg", "1_fake/Reddit/0.jpg")
    run = changed(tiny_run, run_type=run_type)
    if way == "class folder":
        link(run, "train/1_fake/more", root / "1_fake")
    elif way == "platform folder":
        link(run, "train/0_real/src/deep/more", root / "0_real" / "facebook")
    elif way == "file":
        link(run, "train/0_real/src/more.jpg", root / "0_real" / "x" / "0.jpg")
    else:
        run = tabled(run, tmp_path, root / "1_fake" / "Reddit" / "0.jpg", run.data / "dataset")
    with pytest.raises(LayoutError, match=r"ITW-SM.*must not be trained on"):
        build_manifest(run, "A")


def test_sources_may_be_named_for_platforms(tiny_run):
    for label in ("0_real", "1_fake"):
        folder = tiny_run.data / "dataset" / "train" / label
        (folder / "src").rename(folder / "reddit")
    assert build_manifest(tiny_run, "A")["source"].eq("reddit").sum() == 12


@pytest.mark.parametrize("form", ["semicolons", "tabs", "UTF-16", "capitals", "ending", "long"])
def test_images_that_a_table_of_any_form_lists(tiny_run, tmp_path, form):
    touch(tmp_path / "mine", "images/1.png")
    mark = {"semicolons": ";", "tabs": "\t"}.get(form, ",")
    rows = [["path", "label"], *([["others/0.png", "0"]] * 300 if form == "long" else []), ["images/1.png", "1"]]
    text = "\n".join(mark.join(row) for row in rows)
    text = text.replace("path,label", "Path,Label") if form == "capitals" else text
    name = "t.CSV" if form == "ending" else "t.csv"
    (tmp_path / "mine" / name).write_text(text, encoding="utf-16" if form == "UTF-16" else "utf-8")
    link(tiny_run, "train/1_fake/more", tmp_path / "mine" / "images")
    refuses(tiny_run, "the set of the table")


def test_hard_links_of_open_data_do_not_train_a_constrained_run(tiny_run, rng):
    theirs = save(tiny_run.data / "dataset_open" / "train" / "1_fake" / "f" / "i.png", picture(rng))
    os.link(theirs, tiny_run.data / "dataset" / "train" / "1_fake" / "x.png")
    with pytest.raises(LayoutError, match=r"x\.png is a file of .*dataset_open too: it is open data"):
        build_manifest(tiny_run, "A")


def test_hard_links_of_official_files_train(tiny_run, tmp_path, rng):
    """Links that lead elsewhere than into the open folder, and official folders that both folders hold."""
    save(tiny_run.data / "dataset_open" / "train" / "1_fake" / "f" / "i.png", picture(rng))
    coco = save(tmp_path / "coco" / "train2017" / "1.png", picture(rng))
    shared = tiny_run.data / "dataset_open" / "train" / "0_real" / "coco"
    shared.parent.mkdir()
    shared.symlink_to(coco.parent)
    os.link(coco, tiny_run.data / "dataset" / "train" / "0_real" / "src" / "coco.png")
    assert len(build_manifest(tiny_run, "A")) == 21


@pytest.mark.parametrize("form", ["flat", "platforms", "names", "inner", "folder"])
def test_a_stated_itw_sm_is_one(tiny_run, tmp_path, form):
    name = {"names": "x_1.jpg", "platforms": "reddit/1.jpg"}.get(form, "1.jpg")
    root = tmp_path / ("ITW-SM" if form == "folder" else "set")
    touch(root / ("ITW-SM" if form == "inner" else ""), f"0_real/{name}", f"1_fake/{name}")
    run = with_data(tiny_run, {"root": str(tiny_run.data / "dataset")}, {"root": str(root), "layout": "itw_sm"})
    if form == "flat":
        refuses(run, r"official data only; refused: .*set \(itw_sm, but")
    else:
        assert [entry.layout for entry in data_sets(run, "A")] == ["own", "itw_sm"]


@pytest.mark.parametrize(
    "above", ["train/ai", "dataset_open", "test", "fake", "biggan/1_fake", "sd2-sp/training", "orig/training"]
)
def test_what_lies_above_the_data_root_tells_nothing(tmp_path, above):
    data = make_tiny_data(tmp_path / above / "data")
    run = Run(Params(**TINY, data_root=str(data)), data)
    link(run, "train/1_fake/more", data / "pool" / "progan_airplane")
    touch(data / "pool" / "progan_airplane", "1.png")
    assert [entry.layout for entry in data_sets(run, "A")] == ["own"]
    named = with_data(run, {"root": str(make_tiny_data(tmp_path / "other" / above / "mine") / "dataset")})
    assert [entry.layout for entry in data_sets(named, "A")] == ["own"]
    touch(tmp_path / "gi" / "train" / "ai", "1.png")
    link(run, "train/1_fake/gi", tmp_path / "gi" / "train" / "ai")
    refuses(run, "GenImage")


def test_edition_2026_takes_any_data_for_task_b_and_official_data_alone_for_task_a(tiny_run, tmp_path):
    folder = tiny_run.data / "dataset_taskB"
    (tmp_path / "own.csv").write_text("path,label,mask_path\nx.png,0,\n")
    b = [
        {"root": str(folder / "TGIF")},
        {"root": str(folder / "validation")},
        {"root": str(tmp_path / "own.csv"), "split": "train"},
    ]
    a = [{"root": str(tiny_run.data / "dataset")}]
    refuses(with_data(tiny_run, *a, *b), r"own\.csv \(table\)", "B")
    run = with_data(tiny_run, *a, *b, edition=2026)
    assert [entry.layout for entry in data_sets(run, "B")] == ["tgif", "task_b_validation", "table"]
    assert [entry.layout for entry in data_sets(run, "A")] == ["own"]
    (tmp_path / "more.csv").write_text("path,label\nx.png,0\n")
    run = with_data(tiny_run, *a, *b, {"root": str(tmp_path / "more.csv"), "split": "train"}, edition=2026)
    refuses(run, r"more\.csv \(table\)", "A")
    assert make_params(run.params.model_dump() | {"forgeries": {}}, "test").forgeries
    with pytest.raises(ParamsError, match="aligned twins are for open runs"):
        make_params(run.params.model_dump() | {"aligned": {}}, "test")


def test_a_constrained_run_names_what_it_refuses(tiny_run, tmp_path):
    touch(tmp_path / "gen", "sdv5/train/ai/1.png")
    entries = {"root": str(tiny_run.data / "dataset")}, {"root": str(tmp_path / "gen")}
    with pytest.raises(LayoutError, match=r"refused: .*gen \(genimage\)"):
        build_manifest(with_data(tiny_run, *entries), "A")
    assert len(data_sets(with_data(tiny_run, *entries, run_type="open"), "A")) == 2


def test_a_constrained_run_looks_at_names_and_at_where_links_lead(tiny_run, tmp_path):
    touch(tmp_path / "faces", "train/stylegan/1_fake/1.png", "train/cat/0_real/1.png")
    refuses(
        with_data(tiny_run, {"root": str(tmp_path / "faces"), "layout": "cnndetection"}), r"stylegan: not among CNNDetection's"
    )
    touch(tmp_path / "ldm", "train/latent_diffusion_mine/1.png")
    refuses(with_data(tiny_run, {"root": str(tmp_path / "ldm")}), "latent_diffusion_mine: not among")
    touch(tmp_path / "dataset_open", "train/1_fake/1.png", "train/0_real/1.png")
    refuses(with_data(tiny_run, {"root": str(tmp_path / "dataset_open")}), r"dataset_open.* is open data")


@pytest.mark.parametrize(
    ("target", "fault"),
    [("dataset_open/train/1_fake", "is open data"), ("sd5/train/ai", "GenImage"), ("sd3/fake", "Community")],
)
def test_links_in_the_constrained_folder_may_not_lead_into_open_data(tiny_run, tmp_path, target, fault):
    touch(tmp_path / "elsewhere" / target, "1.png")
    (tiny_run.data / "dataset" / "train" / "1_fake" / "more").symlink_to(tmp_path / "elsewhere" / target)
    refuses(tiny_run, f"official data only; refused: .*{fault}")
    opened = changed(tiny_run, run_type="open")
    assert len(data_sets(opened, "A")) == 2


@pytest.mark.parametrize("run_type", ["constrained", "open"])
def test_the_validation_set_is_never_trained_on_by_a_link(tiny_run, tmp_path, run_type):
    touch(tmp_path / "ITW-SM", "1_fake/x_1.jpg")
    (tiny_run.data / "dataset" / "train" / "1_fake" / "itw").symlink_to(tmp_path / "ITW-SM" / "1_fake")
    refuses(changed(tiny_run, run_type=run_type), "must not be trained on")
