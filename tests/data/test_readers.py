"""Each public data set laid out under its own names, with tiny files."""

import csv
import io
import time
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import changed, hub_file, picture, records, save, square_mask, tally, touch, with_data

from forensics_lib.data import check as official
from forensics_lib.data.datasets import TrainingCrops
from forensics_lib.data.manifest import build_manifest, data_sets, usable
from forensics_lib.data.readers import detect_layout, read_data_set, task_of
from forensics_lib.data.rows import DONOR, LayoutError
from forensics_lib.images.io import read_image
from forensics_lib.params import DataSet, Degradations, ParamsError, make_params


def read(root: Path, **values):
    return records(read_data_set(DataSet(root=str(root), **values)))


def refuses(root: Path, reason: str, **values) -> None:
    with pytest.raises(LayoutError, match=reason):
        read(root, **values)


def test_cnndetection_with_its_nested_test_set(tmp_path):
    touch(
        tmp_path,
        "train/airplane/0_real/1.png",
        "train/airplane/1_fake/1.png",
        "val/cat/1_fake/2.png",
        "test/progan/cat/0_real/3.png",
        "test/crn/1_fake/4.png",
    )
    assert detect_layout(tmp_path) == "cnndetection"
    rows = read(tmp_path)
    assert tally(rows, "split", "label") == {("train", 0): 1, ("train", 1): 1, ("val", 1): 1, ("test", 0): 1, ("test", 1): 1}
    assert {row["generator"] for row in rows if row["label"]} == {"progan", "crn"}


def test_one_split_of_cnndetection(tmp_path):
    touch(tmp_path / "progan_val", "cat/0_real/1.png", "cat/1_fake/1.png")
    assert tally(read(tmp_path / "progan_val"), "split") == {("val",): 2}


def test_corvi_ldm_finds_its_listed_photographs(tmp_path):
    touch(tmp_path / "ldm", "train/latent_diffusion_text2img_set0/1.png", "valid/latent_diffusion_noise2image_FFHQ/2.png")
    touch(tmp_path / "coco", "000000000009.jpg")
    touch(tmp_path / "progan", "airplane/0_real/00012.png")
    (tmp_path / "ldm" / "train" / "real_coco.txt").write_text("000000000009.jpg\r\n")
    (tmp_path / "ldm" / "train" / "real_lsun.txt").write_text("airplane_00012.png\n")
    refuses(tmp_path / "ldm", "set coco_root")
    rows = read(tmp_path / "ldm", coco_root=str(tmp_path / "coco"), lsun_root=str(tmp_path / "progan"))
    assert tally(rows, "split", "source", "label") == {
        ("train", "corvi_ldm", 1): 1,
        ("val", "corvi_ldm", 1): 1,
        ("train", "coco", 0): 1,
        ("train", "lsun", 0): 1,
    }
    assert all(Path(row["path"]).is_file() for row in rows)
    assert next(row for row in rows if row["source"] == "coco")["group"] == "coco:9"


def test_itw_sm_knows_the_platform_from_name_or_folder(tmp_path):
    touch(tmp_path, "0_real/Facebook_real_1042.jpg", "1_fake/x_618.jpg", "1_fake/Reddit/12.jpg", "metadata.csv")
    assert detect_layout(tmp_path) == "itw_sm"
    rows = read(tmp_path)
    assert {row["source"] for row in rows} == {"itw_sm/facebook", "itw_sm/x", "itw_sm/reddit"}
    assert {row["split"] for row in rows} == {"val"}


def test_itw_sm_is_never_trained_on():
    with pytest.raises(ParamsError, match="must not be trained on"):
        make_params({"data": [{"layout": "itw_sm", "root": "x", "split": "train"}]}, "own.yaml")


def test_itw_sm_where_its_archive_was_unpacked(tmp_path):
    touch(tmp_path, "ITW-SM/0_real/x_1.jpg", "ITW-SM/1_fake/x_2.jpg")
    assert tally(read(tmp_path), "split", "source") == {("val", "itw_sm/x"): 2}


@pytest.mark.parametrize("layout", ["own", "cnndetection", "community_forensics"])
def test_itw_sm_under_another_layout_is_never_trained_on(tiny_run, tmp_path, layout):
    touch(tmp_path / "ITW-SM", "train/1_fake/x_1.jpg", "train/0_real/x_2.jpg", "a/real/3.jpg")
    run = with_data(tiny_run, {"root": str(tmp_path / "ITW-SM"), "layout": layout}, run_type="open")
    with pytest.raises(LayoutError, match="must not be trained on"):
        data_sets(run, "A")


def test_a_table_may_not_train_on_itw_sm(tmp_path):
    (tmp_path / "t.csv").write_text("path,label,split\nITW-SM/1_fake/x_1.jpg,1,val\nITW-SM/1_fake/x_2.jpg,1,train\n")
    refuses(tmp_path / "t.csv", r"row 3: .*x_2\.jpg is of ITW-SM")


def test_genimage(tmp_path):
    touch(tmp_path, "sdv5/train/ai/1.png", "sdv5/train/nature/2.JPEG", "glide/imagenet_glide/val/ai/3.png")
    assert detect_layout(tmp_path) == "genimage"
    rows = read(tmp_path)
    assert tally(rows, "split", "label") == {("train", 1): 1, ("train", 0): 1, ("val", 1): 1}
    assert {row["generator"] for row in rows if row["label"]} == {"sdv5", "glide"}


def test_community_forensics(tmp_path):
    touch(tmp_path, "kandinsky/fake/1.png", "kandinsky/real/2.png")
    assert detect_layout(tmp_path) == "community_forensics"
    assert tally(read(tmp_path, split="val"), "label", "split") == {(0, "val"): 1, (1, "val"): 1}


def test_sagi_d(tmp_path):
    lines = ["img_path,mask_path,src_path,split,inpainting_model,diffusion_model,type"]
    lines.append(
        "sagid\\train\\coco\\brushnet\\image\\a.jpg,sagid\\train\\coco\\brushnet\\mask\\a_mask.png,"
        "sagid\\train\\coco\\original\\000000000042.jpg,train,brushnet,sd1-5,fr"
    )
    (tmp_path / "sagid.csv").write_text("\r\n".join(lines))
    assert detect_layout(tmp_path) == "sagi_d"
    original, image = read(tmp_path)
    assert (original["label"], image["label"], image["kind"], image["method"]) == (0, 1, "fr", "brushnet")
    assert original["group"] == image["group"] == "coco:42"
    assert Path(image["mask_path"]) == tmp_path / "train" / "coco" / "brushnet" / "mask" / "a_mask.png"


def test_a_plain_table(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_bytes("\ufeffpath,label,split,source\r\nsub\\a.png,0,train,phone\r\nb.png,1,valid,\r\n".encode())
    rows = read(path)
    assert [Path(row["path"]) for row in rows] == [tmp_path / "sub" / "a.png", tmp_path / "b.png"]
    assert tally(rows, "split", "source") == {("train", "phone"): 1, ("val", "mine"): 1}
    assert task_of(DataSet(root=str(path), layout="table")) == "A"


def test_hub_parquet_is_read_where_it_lies(tmp_path, rng):
    hub_file(tmp_path / "data" / "train-00000-of-00001.parquet", rng, names=["fake", "real"], labels=[0, 1, 0, 1, 1])
    hub_file(tmp_path / "data" / "validation-00000-of-00001.parquet", rng, names=None, labels=["real", "fake", "Fake"])
    assert detect_layout(tmp_path) == "parquet"
    rows = read(tmp_path)
    assert tally(rows, "split", "label") == {("train", 1): 2, ("train", 0): 3, ("val", 0): 1, ("val", 1): 2}
    assert {row["generator"] for row in rows if row["label"]} == {"sd15"}
    assert len({read_image(row["path"]).tobytes() for row in rows}) == 8
    assert (tmp_path / "data").is_dir() and len(list(tmp_path.rglob("*.*"))) == 2, "nothing is unpacked"


def test_hub_parquet_goes_through_the_manifest_and_the_crops(tiny_run, tmp_path, rng):
    for split in ("train", "validation"):
        hub_file(tmp_path / "hub" / f"{split}-0.parquet", rng, names=["real", "fake"], labels=[0, 1, 1, 0], masks=True)
    run = with_data(tiny_run, {"root": str(tmp_path / "hub")}, run_type="open")
    assert [entry.layout for entry in data_sets(run, "B")] == ["parquet"]
    manifest = build_manifest(run, "B")
    assert manifest["error"].isna().all()
    assert set(manifest["format"]) == {"PNG"} and (manifest["bytes"] > 100).all()
    crops = TrainingCrops(usable(manifest, "train"), 32, masks=True, degradations=Degradations())
    assert all("error" not in crops[0, i, 0] for i in range(4))


@pytest.mark.parametrize(("labels", "fault"), [(["cat", "dog"], "row 0: label is 'cat'"), ([3, 1], "label is 3")])
def test_hub_labels_that_are_not_understood(tmp_path, rng, labels, fault):
    hub_file(tmp_path / "train-0.parquet", rng, names=None, labels=labels)
    refuses(tmp_path, fault)


def test_hub_parquet_without_an_image_column(tmp_path):
    pq.write_table(pa.table({"text": ["a"], "label": [1]}), tmp_path / "train-0.parquet")
    refuses(tmp_path, "needs an image column")


def test_tgif2_pairs_masks_by_photo_variation_and_size(tmp_path, rng):
    save(tmp_path / "flux1dev-fr" / "training" / "cat" / "7_mask_bbox.png_flux1dev-1024_0.png", picture(rng, 40, 40))
    save(tmp_path / "flux1dev-sp" / "training" / "cat" / "7_mask_segm.png_flux1dev_0.png", picture(rng))
    save(tmp_path / "flux1dev-sp" / "training" / "cat" / "8_mask_segm.png_flux1dev_0.png", picture(rng))
    save(tmp_path / "original-flux" / "training" / "cat" / "7_orig.png", picture(rng))
    masks = tmp_path / "masks-flux" / "training" / "cat"
    for name, size in (("7_mask_bbox.png", (48, 56)), ("7_mask_bbox_1024.png", (40, 40)), ("7_mask_segm.png", (48, 56))):
        save(masks / name, square_mask(*size))
    assert detect_layout(tmp_path) == "tgif"
    found = {Path(row["path"]).name: row for row in read(tmp_path)}
    assert found["7_orig.png"]["group"] == "coco:7"
    assert found["7_mask_bbox.png_flux1dev-1024_0.png"]["mask_path"] == str(masks / "7_mask_bbox_1024.png")
    spliced = found["7_mask_segm.png_flux1dev_0.png"]
    assert (spliced["mask_path"], spliced["kind"], spliced["generator"]) == (str(masks / "7_mask_segm.png"), "sp", "flux1dev")
    assert found["8_mask_segm.png_flux1dev_0.png"]["mask_path"] is None


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("file,label\na,0\n", "needed: path, label"),
        ("path,label\na,fake\n", "row 2: label 'fake'"),
        ("path,label,colour\n", "allowed"),
    ],
)
def test_a_table_with_wrong_columns_or_values(tmp_path, text, fault):
    (tmp_path / "t.csv").write_text(text)
    refuses(tmp_path / "t.csv", fault)


def test_a_folder_of_no_known_layout_says_what_was_looked_for_and_found(tmp_path):
    touch(tmp_path, "holiday/1.jpg")
    with pytest.raises(LayoutError, match=r"Looked for .*genimage.*holiday/"):
        detect_layout(tmp_path)
    touch(tmp_path, "unpacked/sd2-sp/training/cat/1.png")
    with pytest.raises(LayoutError, match=r"Did you mean root: .*unpacked \(tgif\)\?"):
        detect_layout(tmp_path)
    with pytest.raises(LayoutError, match="is a file"):
        detect_layout(tmp_path / "holiday" / "1.jpg")


def test_every_layout_of_the_parameters_has_a_reader():
    from forensics_lib.data.readers import READERS
    from forensics_lib.params import LAYOUTS

    assert set(LAYOUTS) == set(READERS)


def test_named_data_sets_are_read_where_they_lie(tiny_run):
    folder = tiny_run.data / "dataset_taskB"
    run = with_data(
        tiny_run, {"root": str(folder / "TGIF")}, {"root": str(folder / "validation")}, {"root": str(tiny_run.data / "dataset")}
    )
    assert [entry.layout for entry in data_sets(run, "B")] == ["tgif", "task_b_validation"]
    assert build_manifest(run, "B")["path"].tolist() == build_manifest(tiny_run, "B")["path"].tolist()
    assert build_manifest(run, "A")["path"].tolist() == build_manifest(tiny_run, "A")["path"].tolist()


def test_a_table_with_masks_serves_task_b(tiny_run, rng):
    root = tiny_run.data / "mine"
    lines = ["path,label,mask_path,split"]
    for split in ("train", "val"):
        save(root / f"{split}_real.png", picture(rng))
        save(root / f"{split}_fake.png", picture(rng))
        save(root / "mask.png", square_mask(48, 56))
        lines += [f"{split}_real.png,0,,{split}", f"{split}_fake.png,1,mask.png,{split}"]
    (root / "t.csv").write_text("\n".join(lines))
    manifest = build_manifest(with_data(tiny_run, {"root": str(root / "t.csv")}, run_type="open"), "B")
    assert manifest["error"].isna().all()
    assert manifest["label"].tolist() == [0, 1, 0, 1]


def test_a_wrong_entry_names_its_key():
    with pytest.raises(ParamsError, match=r"data\.0\.rot: unknown key .*did you mean 'root'"):
        make_params({"data": [{"rot": "x", "root": "y"}]}, "own.yaml")


def test_a_listing_that_names_no_more_than_the_prefix(tmp_path):
    (tmp_path / "taskB_val.csv").write_text("img_path,mask_path,src_path,type\nsagid,sagid,sagid,sp\n")
    with pytest.raises(LayoutError, match="its table names 'sagid'"):
        read_data_set(DataSet(root=str(tmp_path), layout="task_b_validation"))


# ---- Text as people save it ---------------------------------------------------------------------------------------------

HEADER = ["path", "label", "split", "source"]
NAMES = ["sub/a.png", "b, with comma.png", 'c "quoted".png', "d with blanks.png", "é ü 写真.png"]


def written(rows: list[list[str]], *, separator=",", quoting=csv.QUOTE_MINIMAL, end="\n", encoding="utf-8") -> bytes:
    buffer = io.StringIO()
    csv.writer(buffer, delimiter=separator, quoting=quoting, lineterminator=end).writerows(rows)
    return buffer.getvalue().encode(encoding)


def in_bytes(content: list[list[str]], change: str) -> bytes:
    """A table as some program writes it."""
    plain = written(content).decode()
    padded = "\n".join(" , ".join(f'"{field}"' if "," in field else field for field in row) for row in content)
    made = {
        "plain": lambda: written(content),
        "all quoted": lambda: written(content, quoting=csv.QUOTE_ALL),
        "text quoted": lambda: written(content, quoting=csv.QUOTE_NONNUMERIC),
        "semicolons": lambda: written(content, separator=";"),
        "tabs": lambda: written(content, separator="\t"),
        "semicolons, quoted": lambda: written(content, separator=";", quoting=csv.QUOTE_ALL),
        "byte order mark": lambda: written(content, encoding="utf-8-sig"),
        "byte order mark, quoted, CRLF": lambda: written(content, encoding="utf-8-sig", quoting=csv.QUOTE_ALL, end="\r\n"),
        "UTF-16": lambda: written(content, encoding="utf-16"),
        "UTF-16, big end first, tabs": lambda: b"\xfe\xff" + written(content, encoding="utf-16-be", separator="\t"),
        "CRLF": lambda: written(content, end="\r\n"),
        "CR": lambda: written(content, end="\r"),
        "upper case": lambda: written([[name.upper() for name in content[0]], *content[1:]]),
        "blanks": padded.encode,
        "empty lines": lambda: f"\n{plain}\n\n\n".encode(),
        "empty rows": lambda: f"{plain}{',' * (len(content[0]) - 1)}\n".encode(),
        "empty column": lambda: "".join(f"{line},\n" for line in plain.splitlines()).encode(),
        "no last line end": lambda: plain.rstrip("\n").encode(),
    }
    return made[change]()


CHANGES = [
    "plain", "all quoted", "text quoted", "semicolons", "tabs", "semicolons, quoted", "byte order mark",
    "byte order mark, quoted, CRLF", "UTF-16", "UTF-16, big end first, tabs", "CRLF", "CR", "upper case", "blanks",
    "empty lines", "empty rows", "empty column", "no last line end",
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_tables_as_programs_write_them(tmp_path, change):
    names = [name for name in NAMES if change != "blanks" or '"' not in name]
    content = [HEADER, *([name, str(number % 2), "train", "phone"] for number, name in enumerate(names))]
    (tmp_path / "t.csv").write_bytes(in_bytes(content, change))
    rows = read(tmp_path / "t.csv")
    assert [row["path"] for row in rows] == [str(tmp_path / name) for name in names]
    assert [row["label"] for row in rows] == [number % 2 for number in range(len(names))]
    assert {row["source"] for row in rows} == {"phone"}
    assert task_of(DataSet(root=str(tmp_path / "t.csv"), layout="table")) == "A"


@pytest.mark.parametrize("change", CHANGES)
def test_masks_are_found_however_the_table_is_written(tmp_path, change):
    content = [["path", "label", "mask_path", "split"], ["a.png", "0", "", "train"], ["b.png", "1", "b mask.png", "train"]]
    (tmp_path / "t.csv").write_bytes(in_bytes(content, change))
    assert task_of(DataSet(root=str(tmp_path / "t.csv"), layout="table")) == "B"
    assert [row["mask_path"] for row in read(tmp_path / "t.csv")] == [None, str(tmp_path / "b mask.png")]


@pytest.mark.parametrize("change", CHANGES)
def test_listings_of_data_sets_as_programs_write_them(tmp_path, change):
    val = ["sagid\\val\\coco\\brushnet\\" + name for name in ("image\\a b.jpg", "mask\\a b_mask.png", "..\\original\\42.jpg")]
    val[2] = "sagid\\val\\coco\\original\\000000000042.jpg"
    (tmp_path / "taskB_val.csv").write_bytes(in_bytes([["img_path", "mask_path", "src_path", "type"], [*val, "sp"]], change))
    (row,) = read(tmp_path, layout="task_b_validation")
    assert Path(row["path"]) == tmp_path / "coco" / "brushnet" / "image" / "a b.jpg" and row["group"] == "coco:42"
    header = ["img_path", "mask_path", "src_path", "split", "inpainting_model", "diffusion_model", "type"]
    line = ["sagid\\train\\raise\\brushnet\\image\\a b.jpg", "sagid\\train\\raise\\brushnet\\mask\\a b_mask.png", ""]
    (tmp_path / "sagid.csv").write_bytes(in_bytes([header, [*line, "train", "brushnet", "sd", "fr"]], change))
    (row,) = read(tmp_path, layout="sagi_d")
    assert Path(row["path"]) == tmp_path / "train" / "raise" / "brushnet" / "image" / "a b.jpg" and row["kind"] == "fr"


@pytest.mark.parametrize(("encoding", "end"), [("utf-8", "\n"), ("utf-8-sig", "\r\n"), ("utf-16", "\r"), ("utf-16", "\r\n")])
def test_lists_of_photographs_name_one_a_line(tmp_path, encoding, end):
    for split in ("train", "valid"):
        (tmp_path / split).mkdir()
        lines = ["airplane_a b.png ", "", "cat_é.png"]
        (tmp_path / split / "real_lsun.txt").write_bytes(end.join(lines).encode(encoding))
        (tmp_path / split / "real_coco.txt").write_bytes(
            end.join(["train2017/000000000009 copy.jpg", "7.jpg"]).encode(encoding)
        )
    rows = read(tmp_path, layout="corvi_ldm", coco_root=str(tmp_path), lsun_root=str(tmp_path))
    names = ["000000000009 copy.jpg", "7.jpg", "airplane/0_real/a b.png", "cat/0_real/é.png"]
    assert [row["path"] for row in rows] == [f"{tmp_path}/{name}" for name in names] * 2
    refuses(
        tmp_path,
        r"coco_root: .*gone is not there",
        layout="corvi_ldm",
        coco_root=str(tmp_path / "gone"),
        lsun_root=str(tmp_path),
    )


CP1252 = "path,label\na.png,0\ncafé.png,1\n".encode("cp1252")


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (CP1252, r"byte 0xe9 in row 3\. Save it as UTF-8 .* iconv -f cp1252"),
        (CP1252.replace(b"\n", b"\r"), "byte 0xe9 in row 3"),
        ("path,label\na.png,0\n".encode("utf-16-le"), "null byte, which no text does .UTF-16"),
        (b"\xff\xfep\0a\0t", "not a CSV in UTF-16"),
        (b",path,label\n0,a.png,0\n1,b.png,1\n", r"column 1 has no name.*index=False"),
        (b"path\tlabel\t\na.png\t0\t7\n", "column 3 has no name"),
        (b"path,label,Path\na.png,0,b.png\n", "names a column twice: path, label, path"),
        (b"path,label\na, b.png,0\n", "not a CSV: .*must be quoted"),
        (b"path,label\n\n,0\n", "row 3: names no path"),
        (b"\n\npath,label\n\na.png,7\n", "row 5: label '7'"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "git lfs pull"),
        (b"", "not a CSV"),
        (b"path,label\n\xbb\xbf.jpg,0\n", "not a CSV"),
        (b"path,label\na.jpg,0,surplus\n", "not a CSV"),
        (b"path,label\na.jpg,0\na\0b.jpg,1\n", "row 3: holds a null byte"),
        (b'path,label\n"a.jpg,0\n', "not a CSV"),
        (b"path\na.jpg\n", "needed: path, label"),
    ],
)
def test_text_that_is_not_read_says_what_is_wrong_and_what_helps(tmp_path, content, fault):
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(LayoutError, match=fault) as refused:
        read(tmp_path / "t.csv")
    assert "t.csv" in str(refused.value)


@pytest.mark.parametrize("layout", ["task_b_validation", "sagi_d", "corvi_ldm"])
def test_every_reader_of_text_names_the_byte_that_is_not_utf8(tmp_path, layout):
    names = {"task_b_validation": "taskB_val.csv", "sagi_d": "sagid.csv", "corvi_ldm": "train/real_coco.txt"}
    (tmp_path / "train").mkdir()
    (tmp_path / names[layout]).write_bytes(b"a\r\nb\r\n\xe9\r\n")
    refuses(tmp_path, f"{names[layout]} is not a .* in UTF-8: byte 0xe9 in row 3", layout=layout, coco_root=str(tmp_path))


# ---- Which task a set serves --------------------------------------------------------------------------------------------


def photographs(folder: Path, rng, name: str = "photos.csv", fakes: int = 0) -> Path:
    lines = ["path,label,split"]
    for split in ("train", "val"):
        for number in range(2 + fakes):
            save(folder / f"{split}{number}.png", picture(rng))
            lines.append(f"{split}{number}.png,{int(number >= 2)},{split}")
    (folder / name).write_text("\n".join(lines))
    return folder / name


def test_a_table_without_masks_serves_task_b_as_photographs_where_its_entry_says_so(tiny_run, tmp_path, rng, capsys):
    entries = [{"root": str(tiny_run.data / "dataset_taskB" / name)} for name in ("TGIF", "validation")]
    table = photographs(tmp_path / "photos", rng, fakes=3)
    run = with_data(tiny_run, *entries, {"root": str(table), "task": "B"}, run_type="open", tasks=["B"])
    manifest = build_manifest(run, "B")
    ours = manifest[manifest["data_set"] == str(table)]
    assert ours["mask_path"].isna().all() and ours["error"].isna().all()
    assert ours.groupby(["split", "label"]).size().to_dict() == {("train", 0): 2, ("val", 0): 2, (DONOR, 1): 3}
    assert "3 synthetic image(s), which have no masks, are left out of Task B" in capsys.readouterr().out
    own = {"root": str(tiny_run.data / "dataset"), "task": "B"}
    with pytest.raises(LayoutError, match=r"dataset \(own\) is none of Task B"):
        build_manifest(with_data(run, *entries, own, run_type="constrained"), "B")


def test_a_set_of_task_b_serves_task_a_without_its_masks(tiny_run):
    root = str(tiny_run.data / "dataset_taskB" / "TGIF")
    masks = list((tiny_run.data / "dataset_taskB" / "TGIF" / "masks").rglob("*.png"))
    masks[0].unlink()
    run = with_data(tiny_run, {"root": root, "task": "A"}, run_type="open", tasks=["A"])
    manifest = build_manifest(run, "A")
    assert manifest["mask_path"].isna().all() and manifest["error"].isna().all()
    assert set(manifest["kind"]) == {"orig", "full"}


@pytest.mark.parametrize(("task", "other"), [("A", "B"), ("B", "A")])
def test_a_set_that_no_task_of_the_run_uses_is_named(tiny_run, capsys, task, other):
    folder = tiny_run.data / "dataset_taskB"
    entries = [{"root": str(root)} for root in (folder / "TGIF", folder / "validation", tiny_run.data / "dataset")]
    run = with_data(tiny_run, *entries, tasks=[task])
    manifest = build_manifest(run, task)
    unused = [f"data: {entry['root']} " for entry in entries if ("taskB" in entry["root"]) == (other == "B")]
    notes = "\n".join(manifest.attrs["notes"])
    assert all(name in notes for name in unused) and f"serves Task {other} and is not used" in notes
    assert ("set task: B in its entry" in notes) == (task == "B")
    capsys.readouterr()
    official.check_data(run)
    assert f"serves Task {other} and is not used" in capsys.readouterr().out
    assert not any(
        "is not used" in note for note in build_manifest(with_data(run, *entries, tasks=["A", "B"]), task).attrs["notes"]
    )


@pytest.mark.parametrize(("task", "names"), [("A", ["dataset_taskB/TGIF", "dataset_taskB/validation"]), ("B", ["dataset"])])
def test_data_of_one_of_two_tasks(tiny_run, task, names):
    entries = [{"root": str(tiny_run.data / name)} for name in names]
    with pytest.raises(
        LayoutError, match=rf"Task {task}: no data set of data: serves it.*take the task out: tasks: \["
    ) as found:
        build_manifest(with_data(tiny_run, *entries), task)
    assert all(entry["root"] in str(found.value) for entry in entries)


# ---- What is not there --------------------------------------------------------------------------------------------------


def test_links_whose_disk_is_not_mounted_are_named_at_any_depth(tmp_path):
    place = tmp_path / "own"
    touch(place, "train/0_real/a/1.png", "train/1_fake/b/2.png", "val/0_real/3.png", "val/1_fake/deep/er/4.png")
    assert len(read(place, layout="own")) == 4
    for name in ("train/0_real/gone", "val/1_fake/deep/er/gone", "val/gone", "gone"):
        (place / name).symlink_to("/mnt/none/set")
        refuses(place, rf"{name} is a link to /mnt/none/set, which is not there: is its disk mounted\?", layout="own")
        (place / name).unlink()


@pytest.mark.parametrize("name", ["train", "train/1_fake", "val/0_real"])
def test_a_class_folder_that_is_a_broken_link_is_not_empty(tmp_path, name):
    touch(tmp_path / "own", "train/0_real/1.png", "train/1_fake/2.png", "val/0_real/3.png", "val/1_fake/4.png")
    (tmp_path / "own" / name).rename(tmp_path / "moved")
    (tmp_path / "own" / name).symlink_to(tmp_path / "elsewhere")
    for layout in (None, "own"):
        refuses(tmp_path / "own", "elsewhere, which is not there: is its disk mounted", layout=layout)


def test_a_data_set_or_a_split_of_tgif_that_is_a_broken_link(tiny_run, tmp_path):
    (tmp_path / "gone").symlink_to("/mnt/none")
    refuses(tmp_path / "gone", "gone is a link to /mnt/none")
    refuses(tmp_path / "gone" / "deeper", "gone is a link to /mnt/none")
    tgif = tiny_run.data / "dataset_taskB" / "TGIF"
    (tgif / "sd2-fr" / "training").rename(tmp_path / "moved")
    (tgif / "sd2-fr" / "training").symlink_to("/mnt/none/training")
    with pytest.raises(LayoutError, match="is its disk mounted"):
        build_manifest(tiny_run, "B")


def test_files_that_are_broken_links_are_listed_with_where_they_lead(tiny_run):
    folder = tiny_run.data / "dataset" / "train" / "1_fake" / "src"
    (folder / "gone.png").symlink_to("/mnt/none/gone.png")
    errors = build_manifest(tiny_run, "A")["error"].dropna().tolist()
    assert (
        len(errors) == 1 and "gone.png is a link to /mnt/none/gone.png, which is not there: is its disk mounted?" in errors[0]
    )


def test_a_link_to_an_empty_folder_is_noted(tmp_path):
    touch(tmp_path / "own", "train/0_real/1.png", "train/1_fake/2.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "own" / "train" / "0_real" / "more").symlink_to(tmp_path / "empty")
    (note,) = read_data_set(DataSet(root=str(tmp_path / "own"), layout="own")).notes()
    assert "own/train/0_real/more" in note and "is its disk mounted?" in note


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (POINTER, "git lfs pull"),
        (b"", "download it again"),
        (b"<!DOCTYPE html>", "download it again"),
        (None, "download it again"),
    ],
)
def test_shards_that_are_damaged_or_not_downloaded_are_all_named(tmp_path, rng, content, why):
    for number in range(4):
        hub_file(tmp_path / "hub" / f"train-{number}.parquet", rng, names=None, labels=[0, 1])
    whole = (tmp_path / "hub" / "train-0.parquet").read_bytes()
    for number in (0, 2):
        (tmp_path / "hub" / f"train-{number}.parquet").write_bytes(whole[:-9] if content is None else content)
    for act in (read, lambda root: task_of(DataSet(root=str(root), layout="parquet"))):
        with pytest.raises(LayoutError, match=rf"2 of 4 parquet files.*train-0\.parquet \(.*{why}.*train-2\.parquet \(.*{why}"):
            act(tmp_path / "hub")


def test_a_shard_that_is_damaged_inside_or_a_broken_link_is_named(tmp_path, rng):
    file = hub_file(tmp_path / "hub" / "train-0.parquet", rng, names=None, labels=["real", "fake"] * 40)
    group = pq.read_metadata(file).row_group(0)
    start = next(column for column in map(group.column, range(group.num_columns)) if column.path_in_schema == "label")
    data = bytearray(file.read_bytes())
    place = min(start.data_page_offset, start.dictionary_page_offset or start.data_page_offset)
    data[place : place + 12] = b"\xff" * 12
    file.write_bytes(data)
    refuses(tmp_path / "hub", r"train-0\.parquet: damaged")
    file.unlink()
    file = tmp_path / "hub" / "a" / "b" / "train-0.parquet"
    file.parent.mkdir(parents=True)
    file.symlink_to("/mnt/none/blob")
    refuses(tmp_path / "hub", r"train-0\.parquet \(.*is a link to /mnt/none/blob", layout="parquet")
    file.unlink()
    refuses(tmp_path / "hub", "no parquet files in", layout="parquet")


def test_shards_behind_links_to_folders_are_read_once(tmp_path, rng):
    hub_file(tmp_path / "disk" / "train-0.parquet", rng, names=None, labels=[0, 1])
    (tmp_path / "disk" / "loop").symlink_to(tmp_path / "disk")
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "data").symlink_to(tmp_path / "disk")
    assert len(read(tmp_path / "hub")) == 2


def test_a_hub_set_of_many_generators_is_read_in_one_pass(tmp_path, rng):
    """Time must not grow with rows times generators."""
    count = 20_000
    columns = {"image": [b"x"] * count, "label": [1] * count, "generator": [f"g{i % 5_000}" for i in range(count)]}
    pq.write_table(pa.table(columns), tmp_path / "train-0.parquet")
    started = time.process_time()
    table = read_data_set(DataSet(root=str(tmp_path))).table()
    assert time.process_time() - started < 3
    assert table["generator"].value_counts().eq(4).all() and table["path"].nunique() == count
    row = int(table["path"].iloc[-1].rpartition("=")[2])
    assert table["generator"].iloc[-1] == f"g{row % 5_000}"


SPELLINGS = [
    ("train/real", "train/fake", "val/real", "test/fake"),
    ("Train/Real", "Train/Fake", "Val/REAL", "Test/FAKE"),
    ("training/authentic", "training/synthetic", "validation/authentic", "testing/synthetic"),
    ("real/train", "fake/train", "real/valid", "fake/test"),
    ("0_real/train", "1_fake/train", "0_real/dev", "1_fake/held-out"),
    ("train/nature", "train/ai", "eval/nature", "test/ai"),
    ("train/real_images", "train/AI-generated", "val_set/Real Images", "test_set/ai generated"),
    ("sd/train/real", "sd/train/fake", "sd/validation/real", "sd/Testing/fake"),
    ("train/sd/real", "train/sd/fake", "dev/sd/real", "test/sd/fake"),
    ("train/0_real", "train/1_fake", "validation/0_real", "testing/1_fake"),
]


@pytest.mark.parametrize("folders", SPELLINGS, ids=lambda folders: folders[2])
def test_split_and_class_in_the_fields_spellings(tmp_path, folders):
    touch(tmp_path / "mine", *(f"{folder}/{i}.png" for i, folder in enumerate(folders)))
    expected = {("train", 0): 1, ("train", 1): 1, ("val", 0): 1, ("test", 1): 1}
    rows = read_data_set(DataSet(root=str(tmp_path / "mine")))
    assert tally(records(rows), "split", "label") == expected
    assert rows.notes() == []


def test_a_category_named_train_is_no_split(tmp_path):
    for root in ("progan_train", "progan_val"):
        touch(tmp_path / root, *(f"{name}/{label}/1.png" for name in ("cat", "train") for label in ("0_real", "1_fake")))
        assert detect_layout(tmp_path / root) == "cnndetection"
        assert tally(read(tmp_path / root), "split") == {(root.removeprefix("progan_"),): 4}
    (tmp_path / "progan_val").rename(tmp_path / "photos")
    assert tally(read(tmp_path / "photos", split="val"), "split") == {("val",): 4}


@pytest.mark.parametrize("layout", ["own", "folders", "cnndetection", "community_forensics", "genimage", "itw_sm"])
@pytest.mark.parametrize(("outer", "inner"), [("0_real", "fake"), ("1_fake", "authentic"), ("1_fake", "nature")])
def test_a_class_inside_the_other_is_an_error_that_names_both(tmp_path, layout, outer, inner):
    above = "train/" if layout == "own" else ""
    touch(tmp_path / "mine", f"{above}{outer}/deeper/{inner}/1.png", f"{above}{outer}/2.png")
    refuses(tmp_path / "mine", f"{outer}/deeper/{inner}: {inner} is named for a class", layout=layout, split="val")


@pytest.mark.parametrize("folder", ["train/fake/sd/test", "fake/train/validation", "train/sd/val/fake"])
def test_test_and_validation_images_inside_of_training(tmp_path, folder):
    touch(tmp_path / "mine", f"{folder}/1.png", "train/real/2.png")
    refuses(tmp_path / "mine", "lies inside of a training folder", layout="folders")


@pytest.mark.parametrize(
    "folders",
    [("real", "fake"), ("0_real", "1_fake"), ("sd/real", "sd/fake"), ("sd/ai", "sd/nature"), ("cat/0_real", "cat/1_fake")],
)
def test_a_split_that_nothing_tells_must_be_stated(tmp_path, folders):
    touch(tmp_path / "mine", *(f"{folder}/1.png" for folder in folders))
    refuses(tmp_path / "mine", r"mine: no folder or file name tells .*set split: .*validation")
    assert tally(read(tmp_path / "mine", split="test"), "split") == {("test",): 2}
    (tmp_path / "mine").rename(tmp_path / "Testing")
    assert tally(read(tmp_path / "Testing"), "split") == {("test",): 2}


@pytest.mark.parametrize("folder", ["test/real", "fake/testing", "sd/test/fake"])
def test_a_test_split_is_never_trained_on(tmp_path, folder):
    touch(tmp_path / "mine", f"{folder}/1.png", "train/real/1.png")
    refuses(tmp_path / "mine", r"split: train, but .*1\.png is of a test split", split="train")


def test_a_stated_split_holds_for_layouts_that_tell_one(tmp_path):
    touch(tmp_path, "ldm/train/latent_diffusion_class2image/1.png", "gi/sd5/train/ai/1.png", "gi/sd5/val/nature/2.png")
    assert tally(read(tmp_path / "ldm", split="test"), "split") == {("test",): 1}
    assert tally(read(tmp_path / "gi", split="val"), "split") == {("val",): 2}


@pytest.mark.parametrize(
    ("layout", "names", "unread"),
    [
        (
            "own",
            ("train/0_real/1.png", "extra/1_fake/2.png", "train/ood/3.png", "4.png"),
            ("/extra", "train/ood", "1 image(s)"),
        ),
        ("folders", ("train/real/1.png", "train/unknown/2.png"), ("train/unknown",)),
        ("genimage", ("sd/train/ai/1.png", "sd/train/others/2.png"), ("train/others",)),
        ("itw_sm", ("0_real/x_1.jpg", "2_other/x_2.jpg"), ("2_other",)),
        ("corvi_ldm", ("train/latent_diffusion_class2image/1.png", "train/mine/2.png"), ("train/mine",)),
        (
            "tgif",
            ("orig/training/cat/1_orig.png", "orig/train/cat/2_orig.png", "new-fr/training/3.png"),
            ("orig/train", "new-fr"),
        ),
    ],
)
def test_what_a_layout_does_not_read_is_said(tmp_path, layout, names, unread):
    touch(tmp_path / "mine", *names)
    rows = read_data_set(DataSet(root=str(tmp_path / "mine"), layout=layout))
    notes = "\n".join(note for note in rows.notes() if note.startswith("not read"))
    assert len(rows) == 1
    assert all(place in notes for place in unread), notes
    assert notes.count("not read") == len(unread)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("validation-00000-of-00004.parquet", "val"),
        ("test.parquet", "test"),
        ("default_Train_0.parquet", "train"),
        ("data/train/0000.parquet", "train"),
        ("default/partial-validation/0000.parquet", "val"),
        ("dev/a/0000.parquet", "val"),
    ],
)
def test_the_split_of_a_parquet_shard(tmp_path, rng, name, split):
    hub_file(tmp_path / "hub" / name, rng, names=None, labels=[0, 1])
    assert tally(read(tmp_path / "hub"), "split") == {(split,): 2}
    if split == "test":
        refuses(tmp_path / "hub", "never trained on", split="train")


@pytest.mark.parametrize("empty", ["", "NaN", "nan", "None", "null"])
def test_empty_fields_and_labels_of_a_table_as_programs_write_them(tmp_path, empty):
    path = tmp_path / "mine.csv"
    rows = [("a.png", "0.0", empty), ("b.png", "True", "m.png"), ("c.png", "1.0", "m.png"), ("d.png", "FALSE", "m.png")]
    lines = [f"{name};{label};train;{mask};{empty}" for name, label, mask in rows]
    path.write_text("\n".join(["sep=;", "path;label;split;mask_path;kind", *lines]))
    table = read_data_set(DataSet(root=str(path)))
    found = records(table)
    assert [(row["label"], row["kind"]) for row in found] == [(0, "orig"), (1, "sp"), (1, "sp"), (0, "orig")]
    assert [isinstance(row["mask_path"], str) for row in found] == [False, True, True, False]
    assert any("the masks of 1 rows with label 0" in note for note in table.notes())


def test_a_table_names_the_row_below_its_separator_and_the_kinds_that_are_known(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("sep=;\npath;label;split;kind\na, b.png;1;train;FR\nc.png;1;train;splice\n")
    refuses(path, r"row 4: kind 'splice' must be one of orig, sp, fr, full")


@pytest.mark.parametrize("labels", [["0", "1"], ["0.0", "1.0"], ["False", "true"], [False, True], [0.0, 1.0]])
def test_labels_of_a_parquet_file_in_text_and_numbers(tmp_path, rng, labels):
    hub_file(tmp_path / "train-0.parquet", rng, names=None, labels=labels)
    assert sorted(row["label"] for row in read(tmp_path)) == [0, 1]


def with_column(file: Path, name: str, values: list) -> Path:
    pq.write_table(pq.read_table(file).append_column(name, pa.array(values)), file)
    return file


@pytest.mark.parametrize("stated", [None, "val"])
def test_a_split_column_of_a_parquet_file_is_heeded(tmp_path, rng, stated):
    file = hub_file(tmp_path / "train-0.parquet", rng, names=None, labels=[0, 1, 1, 0])
    with_column(file, "Split", ["Training", "test", "testing", None])
    rest = stated or "train"
    rows = read(tmp_path, layout="parquet", split=stated)
    assert tally(rows, "split", "label") == Counter([("train", 0), ("test", 1), ("test", 1), (rest, 0)])
    with_column(hub_file(file, rng, names=None, labels=[0, 1]), "split", ["train", "fold3"])
    refuses(tmp_path, r"train-0\.parquet row 1: split is 'fold3'; it must be train, val or test", layout="parquet")


def test_hidden_parquet_files_are_passed_over_and_any_case_of_the_ending_is_read(tmp_path, rng):
    hub_file(tmp_path / "train-0.PARQUET", rng, names=None, labels=[0, 1])
    for name in (".cache/train-1.parquet", "__MACOSX/train-2.parquet", "._train-0.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"no parquet")
    assert detect_layout(tmp_path) == detect_layout(tmp_path / "train-0.PARQUET") == "parquet"
    rows = read(tmp_path)
    assert len(rows) == 2
    assert read_image(rows[0]["path"]).shape == (48, 56, 3)


def test_masks_in_any_parquet_file_make_the_set_of_task_b(tmp_path, rng):
    hub_file(tmp_path / "train-0.parquet", rng, names=None, labels=[0, 0])
    masked = pq.read_table(hub_file(tmp_path / "train-1.parquet", rng, names=None, labels=[0, 1], masks=True))
    pq.write_table(masked.rename_columns(["image", "label", "model", "Mask"]), tmp_path / "train-1.parquet")
    assert task_of(DataSet(root=str(tmp_path), layout="parquet")) == "B"
    rows = read(tmp_path, layout="parquet")
    assert [row["label"] for row in rows if isinstance(row["mask_path"], str)] == [1]
    hub_file(tmp_path / "train-0.parquet", rng, names=None, labels=[0, 1])
    refuses(tmp_path, r"train-0\.parquet row 1: manipulated, but this file has no column mask", layout="parquet")


def test_a_parquet_shard_that_tells_no_split(tmp_path, rng):
    file = hub_file(tmp_path / "hub" / "part-0.parquet", rng, names=None, labels=[0, 1])
    refuses(tmp_path / "hub", "set split")
    assert tally(read(file, split="train"), "split") == {("train",): 2}


def test_the_split_of_a_table(tmp_path):
    text = "path,label,split\na.png,0,Validation\nb.png,1,\n"
    for name, split in (("mine.csv", None), ("test_list.csv", "test"), ("my-train.csv", "train")):
        (tmp_path / name).write_text(text)
        if split is None:
            refuses(tmp_path / name, r"b\.png is for training: set split")
        else:
            assert tally(read(tmp_path / name), "split") == {("val",): 1, (split,): 1}
    assert tally(read(tmp_path / "mine.csv", split="train"), "split") == {("val",): 1, ("train",): 1}
    refuses(tmp_path / "test_list.csv", "never trained on", split="train")


def test_the_data_root_in_other_spellings(tiny_run):
    folder = tiny_run.data / "dataset"
    (folder / "train").rename(folder / "Training")
    (folder / "val").rename(folder / "Validation")
    (folder / "Validation" / "0_real").rename(folder / "Validation" / "Real")
    assert tiny_run.missing() == {}
    assert build_manifest(tiny_run, "A").groupby(["split", "label"]).size().to_dict() == {
        ("train", 0): 6,
        ("train", 1): 6,
        ("val", 0): 4,
        ("val", 1): 4,
    }


SAGID = "img_path,mask_path,src_path,split,inpainting_model,diffusion_model,type\n"


def sagi_d(root: Path, rng) -> Path:
    parts = "sagid\\train\\coco\\brushnet\\{}", "sagid\\train\\coco\\original\\9.jpg"
    line = ",".join((parts[0].format("image\\9.jpg"), parts[0].format("mask\\9_mask.png"), parts[1], "train,brushnet,sd1,fr"))
    root.mkdir(parents=True)
    (root / "sagid.csv").write_text(SAGID + line + "\n")
    for name in ("brushnet/image/9.jpg", "original/9.jpg"):
        save(root / "train" / "coco" / name, picture(rng))
    save(root / "train" / "coco" / "brushnet" / "mask" / "9_mask.png", square_mask(48, 56))
    return root


@pytest.mark.parametrize("name", ["SAGI-D", "sagid"])
def test_edition_2026_trains_on_tgif_and_sagi_d(tiny_run, rng, capsys, name):
    run = changed(tiny_run, edition=2026)
    folder = run.data / "dataset_taskB"
    assert "B" in run.params.tasks and run.missing() == {}
    assert set(build_manifest(run, "B")["layout"]) == {"tgif", "task_b_validation"}
    assert f"{folder / 'SAGI-D'} is not there" in capsys.readouterr().out
    sagi_d(folder / name, rng)
    manifest = build_manifest(run, "B")
    assert set(manifest["layout"]) == {"tgif", "sagi_d", "task_b_validation"}
    assert manifest[manifest["label"].eq(1)].groupby("split")["kind"].agg(set).to_dict() == {
        "train": {"fr"},
        "val": {"sp", "fr"},
        "test": {"sp", "fr"},
    }
    assert "2 manipulated training images are not trained on: kind asks for fr" in capsys.readouterr().out
    assert "sagi_d" in set(official.check_data(run).table["layout"])
    (folder / "TGIF").rename(folder / "gone")
    assert run.missing() == {}
    assert set(build_manifest(run, "B")["layout"]) == {"sagi_d", "task_b_validation"}
    assert f"{folder / 'TGIF'} is not there" in capsys.readouterr().out
    (folder / name).rename(folder / "gone too")
    assert sorted(path.name for path in run.missing().values()) == ["SAGI-D", "TGIF"]
    assert [path.name for path in tiny_run.missing().values()] == ["TGIF"]
