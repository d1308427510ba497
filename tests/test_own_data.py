"""tools/own_data.py: what labelling tools write, from their folder to a folder
that training reads. cases/ holds makers of situations that people reported."""
import json
import os
import re
import runpy
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import ROOT, without_privilege
from PIL import Image, ImageOps

import datasets
from datasets import VOCDataset, to_rgb

CASES = ROOT / "tests/cases"
sys.path.insert(0, str(ROOT / "tools"))
sys.path.insert(0, str(CASES))

import own_data  # noqa: E402
from gen import VOC, YOLO, coco, picture, save, xml  # noqa: E402

THING = ("thing", *VOC)
XML = xml(96, 72, [THING])
BOX = [20, 15, 60, 50]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(monkeypatch, capsys):
    """own_data.py SOURCE out OPTIONS: (status, all that it prints)."""
    def run(source="data", *options, out="out"):
        before, there = snapshot(source), os.path.lexists(out)
        monkeypatch.setattr(sys, "argv", ["own_data.py", source, out, *options])
        with pytest.raises(SystemExit) as end:
            own_data.main()
        assert snapshot(source) == before
        status, text = end.value.code, "".join(capsys.readouterr())
        assert "Traceback" not in text
        if status and not there:
            assert not list(Path(out).parent.glob(f"*{Path(out).name}*"))
        return status, text
    return run


def snapshot(source):
    return {path: path.stat().st_mtime_ns for path in Path(source).rglob("*") if path.is_file()}


def made(out="out"):
    """mine.yaml's data, and {list: {id: sample}}, all read as training does."""
    data = yaml.safe_load(Path(out, "mine.yaml").read_text())["data"]
    folder = Path(data["root"], "ImageSets/Segmentation")
    masked = (folder / "masked.txt").exists()
    lists = {path.stem: read(data, path.stem, masked and path.stem == "masked")
             for path in sorted(folder.glob("*.txt"))}
    return data, lists


def read(data, split, masked=False):
    dataset = VOCDataset(data["root"], split, data["classes"], masks=[data["truth"]] if masked else [])
    return {sample["id"]: sample for sample in dataset}


def boxes(sample):
    return [[round(side, 3) for side in box] for box in sample["boxes"].tolist()]


def case(name):
    runpy.run_path(str(CASES / f"{name}.py"))


def flat(names="ab", ending=".jpg"):
    for name in names:
        save(f"data/images/{name}{ending}", picture(seed=ord(name[0])))
        save(f"data/xml/{name}.xml", XML)


def yolo(text=YOLO, names="thing\nother\n"):
    save("data/images/a.jpg", picture())
    save("data/labels/a.txt", text)
    save("data/classes.txt", names)


# ------------------------------------------------------- reported cases

@pytest.mark.parametrize("kind", ["voc", "yolo", "coco"])
def test_roboflow(run, kind):
    case("roboflow_splits")
    status, text = run(f"data/{kind}")
    data, lists = made()
    assert status == 0 and data["classes"] == ["thing"]
    assert {name: len(ids) for name, ids in lists.items()} == {"train": 1, "val": 1, "test": 1}
    assert data["train"] == "train" and data["val"] == "val" and "faults: 0" in text
    assert ("things" in text) == (kind == "coco")
    for samples in lists.values():
        assert [np.abs(np.subtract(boxes(s), [BOX])).max() < 0.01 for s in samples.values()] == [True]


def test_ultralytics(run):
    case("ultralytics_folders")
    assert run()[0] == 0
    data, lists = made()
    assert data["classes"] == ["thing"] and list(lists["train"]) == ["im0"] and list(lists["val"]) == ["im1"]


def test_darknet(run):
    case("darknet_obj_names")
    assert run()[0] == 0
    data, lists = made()
    assert data["classes"] == ["thing", "other"] and data["val"] == ""
    assert list(lists) == ["train"] and list(lists["train"]) == ["im0", "im1"]


def test_images_without_annotation(run):
    case("no_xml_without_objects")
    status, text = run()
    assert status == 2 and text.count("--empty") == 2 and "faults: 2" in text
    assert all(f"data/JPEGImages/empty{k}.jpg: no annotation" in text for k in (1, 2))
    assert run("data", "--skip-faults")[0] == 0 and len(made()[1]["train"]) == 4
    shutil.rmtree("out")
    status, text = run("data", "--empty")
    assert status == 0 and "2 images without boxes" in text and len(made()[1]["train"]) == 6


def bright(sample):
    """The extent of the red rectangle that gen.picture draws."""
    image = sample["image"].numpy().astype(int)
    y, x = np.nonzero(image[0] - image[1] > 100)
    return [x.min(), y.min(), x.max() + 1, y.max() + 1]


def test_exif(run):
    case("exif")
    status, text = run()
    samples = made()[1]["train"]
    assert status == 0 and len(samples) == 6
    assert not any(Image.open(path).getexif().get(274) for path in Path("out/JPEGImages").iterdir())
    for sample in samples.values():
        assert np.abs(np.subtract(boxes(sample), [bright(sample)])).max() <= 1.5, sample["id"]
    assert samples["stored"]["image"].shape == (3, 96, 72) and boxes(samples["stored"]) == [[22, 20, 57, 60]]
    assert "4 images turned upright" in text and "2 of these" in text


@pytest.mark.parametrize("tag", range(1, 9))
@pytest.mark.parametrize("stored", [False, True])
def test_every_exif_turn(run, tag, stored):
    """Boxes and masks of the stored or of the upright picture, found again on the bright rectangle."""
    image, exif = picture(), Image.Exif()
    exif[274] = tag
    save("data/images/a.png", image, exif=exif.tobytes())
    mask = Image.fromarray((np.asarray(image)[..., 0] > 180).astype(np.uint8))
    upright = Image.open("data/images/a.png")
    upright = ImageOps.exif_transpose(upright)
    red = np.asarray(upright)[..., 0] > 180
    y, x = np.nonzero(red)
    if stored and tag > 4:
        save("data/xml/a.xml", XML)
        save("data/masks/a.png", mask)
    else:
        box = (x.min() + 1, y.min() + 1, x.max() + 1, y.max() + 1)
        save("data/xml/a.xml", xml(*upright.size, [("thing", *box)]))
        save("data/masks/a.png", Image.fromarray(red.astype(np.uint8)))
    assert run()[0] == 0
    sample = made()[1]["masked"]["a"]
    assert boxes(sample) == [[x.min(), y.min(), x.max() + 1, y.max() + 1]]
    assert (sample["masks"][0].numpy() == red).all()


def test_sixteen_bit(run):
    case("sixteen_bit")
    assert run()[0] == 0
    image = made()[1]["train"]["deep"]["image"].numpy()
    assert image.min() == 0 and image.max() == 255 and 20 < image.std() < 120


def test_edges_of_voc_boxes(run):
    case("voc_edges")
    status, text = run()
    named = {"three_beyond": "3 pixels beyond", "minus3": "4 pixels beyond", "comma": "'20,5' is not a number",
             "point": "too small", "line": "too small", "swapped_size": "72 x 96 pixels, but",
             "resized": "96 x 72 pixels, but", "rotated": "a rotated box", "polygon": "no box"}
    *lines, last = text.split("faults: 9\n")[1].splitlines()
    assert last == "out: not written; correct the faults, or give --skip-faults"
    assert status == 2 and len(lines) == 9 and "3 boxes cut" in text
    for name, words in named.items():
        assert sum(f"{name}.xml" in line and words in line for line in lines) == 1, name
    status, text = run("data", "--skip-faults")
    samples = made()[1]["train"]
    assert "9 images with faults, left out" in text
    assert status == 0 and sorted(samples) == [
        "floats", "half_beyond", "im0", "one_beyond", "sci", "zero_based", "zero_size"]
    assert boxes(samples["one_beyond"]) == [[39, 29, 96, 72]] and boxes(samples["zero_based"]) == [[0, 0, 50, 40]]
    assert boxes(samples["sci"]) == boxes(samples["zero_size"]) == [BOX]
    assert boxes(samples["floats"]) == [[19.37, 14.2, 59.9, 50.01]]


def test_coco_faults(run):
    case("coco_details")
    status, text = run("data/a")
    assert status == 2 and "faults: 5" in text
    for name, words in (("im1", "2 pixels beyond"), ("im5", "3 pixels beyond"), ("im2", "negative"),
                        ("im4", "too small"), ("im6", "too small")):
        assert any(f"annotations.json: annotations[{name[2]}], {name}.jpg" in line and words in line
                   for line in text.splitlines())
    assert run("data/a", "--skip-faults")[0] == 0
    samples = made()[1]["train"]
    assert {name: boxes(sample) for name, sample in samples.items()} == {
        "im0": [BOX], "im3": [[20.123, 15.77, 60.623, 50.87]], "im7": []}
    status, text = run("data/size", out="size")
    assert status == 2 and "annotations.json: 192 x 144 pixels, but data/size/images/im.jpg has 96 x 72" in text


@pytest.mark.parametrize("name, ids, words", [
    ("dup", ["images_a_f0", "images_b_f0"], ""), ("crowd", ["im"], "1 COCO's crowds, left out"),
    ("nobox", ["im"], "1 boxes round"), ("classes", ["im"], "no class: unused"), ("paths", ["im", "im 3", "im2"], ""),
    ("empty", ["im", "none"], ""), ("two", ["im"], "")])
def test_coco_details(run, name, ids, words):
    case("coco_details")
    status, text = run(f"data/{name}")
    data, lists = made()
    assert status == 0 and sorted(lists["train"]) == ids and words in text
    found = [box for sample in lists["train"].values() for box in boxes(sample)]
    if name == "classes":
        assert data["classes"] == ["no", "007", "Größe, mit Komma"]
        assert lists["train"]["im"]["labels"].tolist() == [1, 2, 3]
    else:
        assert found == [BOX] * (1 if name == "empty" else len(ids))


def test_cvats_masks_are_objects(run):
    """In its COCO 1.0, each object that is drawn as a mask is a crowd, with CVAT's attributes beside it."""
    save("data/images/a.jpg", picture())
    drawn = dict(image_id=1, category_id=1, iscrowd=1, bbox=[20, 15, 40, 35], attributes={"occluded": False},
                 segmentation=dict(counts=[1500, 35, 5377], size=[72, 96]))
    save("data/c.json", coco([(1, "a.jpg", 96, 72)], [drawn], [(1, "thing")]))
    status, text = run()
    assert status == 0 and boxes(made()[1]["train"]["a"]) == [BOX]
    assert "1 crowds with attributes, taken for objects" in text


@pytest.mark.parametrize("name, train, val", [
    ("ext", ["im0", "im1"], ["im2"]), ("main", ["im0", "im1", "im2"], ["im3"]), ("slash", ["im0"], ["im2"])])
def test_lists(run, name, train, val):
    case("lists")
    status, text = run(f"data/{name}")
    lists = made()[1]
    assert status == 0 and list(lists["train"]) == train and list(lists["val"]) == val
    left = 4 - len(train) - len(val)
    assert (f"{left} images in no list, left out" in text) == (left > 0)


def test_list_of_a_missing_image(run):
    case("lists")
    status, text = run("data/flag")
    assert status == 2 and "data/flag/ImageSets/Segmentation/train.txt: line 1: no image 'im0 1'" in text
    status, text = run("data/miss")
    assert status == 2 and "data/miss/ImageSets/Segmentation/train.txt: line 3: no image 'im77'" in text
    assert run("data/miss", "--skip-faults")[0] == 0 and list(made()[1]["train"]) == ["im0", "im1"]


@pytest.mark.parametrize("name", ["rgb", "rgba", "labelmap", "sixteen", "greyrgb", "partial"])
def test_masks(run, name):
    case("masks")
    status, text = run(f"data/{name}")
    data, lists = made()
    count = 2 if name == "partial" else 3
    assert status == 0 and f"{count} masked" in text and data["val"] == "masked" and "seen" in text
    assert ("1 images without a mask" in text) == (name == "partial")
    assert sorted(lists["masked"]) == ["im0", "im1", "im2"][:count] and len(lists["train"]) == 3
    for sample in lists["masked"].values():
        mask = sample["masks"][0].numpy()
        assert set(np.unique(mask)) == {0, 1} and mask[32, 40] == 1 and mask[16, 21] == 0
    png = Image.open(f"out/{data['truth']}/im0.png")
    assert png.mode == "P" and png.getpalette()[3:6] == [128, 0, 0]


@pytest.mark.parametrize("name, words", [
    ("binary", "is 255 the object?"), ("one", "is 255 the object?"), ("luma", "turned grey"),
    ("size", "48 x 36 pixels, but"), ("ownpal", "a palette in another order")])
def test_faulty_masks(run, name, words):
    case("masks")
    status, text = run(f"data/{name}")
    assert status == 2 and "faults: 3" in text
    for k in range(3):
        assert any(f"data/{name}/SegmentationClassAug/im{k}.png: " in line and words in line
                   for line in text.splitlines())


# -------------------------------------------------------------- layouts

def test_flat_folders_and_one_folder(run):
    flat()
    save("data/one/c.PNG", picture())
    save("data/one/c.xml", XML)
    assert run()[0] == 0
    assert sorted(made()[1]["train"]) == ["a", "b", "c"] and Path("out/JPEGImages/c.PNG").exists()


def test_cocos_own_layout(run):
    for split, name in (("train2017", "000001.jpg"), ("val2017", "000002.jpg")):
        save(f"data/images/{split}/{name}", picture())
        one = [(1, name, 96, 72)], [dict(image_id=1, category_id=1, bbox=[20, 15, 40, 35])], [(1, "thing")]
        save(f"data/annotations/instances_{split}.json", coco(*one))
        save(f"data/annotations/person_keypoints_{split}.json", coco(one[0], [], [(1, "person")]))
        save(f"data/annotations/captions_{split}.json", '{"images": [], "annotations": []}')
    assert run()[0] == 0
    data, lists = made()
    assert data["classes"] == ["thing"] and list(lists["train"]) == ["000001"] and list(lists["val"]) == ["000002"]


def test_coco_files_called_by_their_split(run):
    for name in ("train", "val"):
        save(f"data/images/{name[0]}.jpg", picture())
        boxes = [dict(image_id=1, category_id=1, bbox=[1, 1, 9, 9])] if name == "train" else []
        save(f"data/my_{name}.json", coco([(1, f"{name[0]}.jpg", 0, 0)], boxes, [(1, "thing"), (2, "thing")]))
    assert run()[0] == 0
    data, lists = made()
    assert list(lists["train"]) == ["t"] and list(lists["val"]) == ["v"]


def test_cvats_yolo(run):
    for name in "ab":
        save(f"data/obj_train_data/deep/{name}.jpg", picture())
        save(f"data/obj_train_data/deep/{name}.txt", YOLO)
    save("data/train.txt", "﻿data/obj_train_data/deep/a.jpg\r\n\r\n")
    save("data/obj.names", "﻿thing\r\n\r\nlast\r\n")
    save("data/obj.data", "classes = 1\n")
    status, text = run()
    assert status == 0 and list(made()[1]["train"]) == ["a"] and made()[0]["classes"] == ["thing", "last"]
    assert "1 images in no list, left out" in text


@pytest.mark.parametrize("file, text", [
    ("data.yaml", "train: ../kept/a\nval: [kept/b, lists/two.txt]\nnames: [thing]\n"),
    ("data.yaml", "path: /far/off\ntrain:\n  - kept/a\nval:\n- kept/b\n- ./lists/two.txt\ntest:\nnames: {0: thing}\n"),
    ("obj.data", "classes = 1\r\ntrain  = lists/one.txt\r\nvalid = data/lists/test.txt\r\nnames = obj.names\r\n")])
def test_splits_of_settings(run, file, text):
    """Folders and lists, with the paths that tools write; darknet's test.txt may be val."""
    for name in "abcd":
        save(f"data/kept/{name}/{name}.jpg", picture())
        save(f"data/kept/{name}/{name}.txt", YOLO)
    save("data/lists/one.txt", "data/kept/a/a.jpg\n")
    save("data/lists/two.txt", "kept/c/c.jpg\n")
    save("data/data/lists/test.txt", "kept\\b\\b.jpg\r\nkept/c/c.jpg")
    save(f"data/{file}", text)
    if file == "obj.data":
        save("data/obj.names", "thing\n")
    status, text = run()
    lists = made()[1]
    assert status == 0 and list(lists["train"]) == ["a"] and list(lists["val"]) == ["b", "c"]
    assert "1 images in no list, left out" in text


def test_splits_of_settings_that_are_not_all_there(run):
    """The folders of those that no path leads to say theirs by their names."""
    for name, split in zip("abc", ("train", "valid", "test")):
        save(f"data/{split}/images/{name}.jpg", picture())
        save(f"data/{split}/labels/{name}.txt", YOLO)
    save("data/data.yaml", "train: ../train/images\nval: ../val/images\nnames: [thing]\n")
    status, text = run()
    lists = made()[1]
    assert status == 0 and "1 val of data/data.yaml, which is not there: val/images" in text
    assert {split: list(samples) for split, samples in lists.items()} == dict(train=["a"], val=["b"], test=["c"])


def test_broken_texts_are_named_with_all_other_faults(run):
    yolo()
    save("data/a.yaml", "a: [")
    save("data/b.yaml", "names: [other]")
    save("data/train.txt", "ä".encode("latin-1"))
    save("data/images/b.jpg", b"broken")
    for options in ([], ["--skip-faults"]):
        status, text = run("data", *options)
        assert status == 2 and "faults: 4" in text
        for words in ("data/a.yaml: cannot be read", "data/classes.txt: other names than data/b.yaml",
                      "data/train.txt: cannot be read (UnicodeDecodeError", "data/images/b.jpg: broken image"):
            assert words in text


def test_segmentation_comes_before_main_and_trainval_is_train(run):
    flat("abc")
    save("data/ImageSets/Main/train.txt", "c\n")
    save("data/ImageSets/Main/thing_train.txt", "a 1\nb 1\n")
    save("data/ImageSets/Segmentation/trainval.txt", "b\n")
    save("data/ImageSets/Segmentation/val.txt", "a\na\nb\n")
    status, text = run()
    assert status == 0 and "1 images in several lists" in text and "1 images in no list" in text
    assert list(made()[1]["train"]) == ["b"] and list(made()[1]["val"]) == ["a", "b"]


def test_hidden_and_foreign_files_stop_nothing(run):
    flat()
    save("data/images/._a.jpg", b"junk")
    save("data/.git/x.xml", "<annotation>")
    save("data/__MACOSX/images/._b.jpg", b"junk")
    save("data/README.txt", "by hand")
    save("data/notes.json", '{"shapes": 1}')
    save("data/broken.json", "{")
    assert run()[0] == 0 and "faults: 0" in run("data", out="again")[1]


def test_the_kind_of_most_images_counts_and_the_others_are_said(run):
    flat("abc")
    save("data/images/a.txt", YOLO)
    status, text = run()
    assert status == 0 and "1 annotations in YOLO, left out" in text


def test_annotations_without_images_are_named(run):
    flat()
    save("data/xml/lost.xml", XML)
    status, text = run()
    assert status == 2 and "data/xml/lost.xml: no image 'lost'" in text
    shutil.rmtree("data")
    yolo()
    save("data/labels/lost.txt", YOLO)
    status, text = run()
    assert status == 2 and "data/labels/lost.txt: no image 'lost'" in text
    save("data/labels/lost.txt", "")  # one without objects
    save("data/notes.txt", "")
    status, text = run()
    assert status == 2 and "faults: 1\ndata/labels/lost.txt: no image 'lost'" in text
    shutil.rmtree("data")
    save("data/a.jpg", picture())
    save("data/c.json", coco([(1, "a.jpg", 96, 72), (2, "lost.jpg", 96, 72)],
                             [dict(image_id=2, category_id=1, bbox=[1, 1, 9, 9])], [(1, "thing")]))
    status, text = run()
    assert status == 2 and "images[1]: no image 'lost.jpg'" in text and "faults: 1" in text


@pytest.mark.parametrize("name", ["a.jpg.txt", "a.txt"])
def test_an_image_with_two_endings(run, name):
    """As on a system that hides the second."""
    save("data/a.jpg.jpg", picture())
    save(f"data/{name}", YOLO)
    save("data/classes.txt", "thing")
    assert run()[0] == 0 and np.abs(np.subtract(boxes(made()[1]["train"]["a.jpg"]), [BOX])).max() < 0.01


def test_images_of_test_may_lack_an_annotation(run):
    for split in ("train", "test"):
        save(f"data/{split}/images/{split}.jpg", picture())
    save("data/train/labels/train.txt", YOLO)
    save("data/classes.txt", "thing")
    status, text = run()
    assert status == 0 and "1 images of test without an annotation" in text
    assert [list(samples) for samples in made()[1].values()] == [["test"], ["train"]]


def test_images_of_test_may_have_masks_and_no_boxes(run):
    for split in ("train", "test"):
        save(f"data/{split}/images/{split}.jpg", picture())
    save("data/train/labels/train.txt", YOLO)
    save("data/classes.txt", "thing")
    mask = np.zeros((72, 96), np.uint8)
    mask[15:50, 20:60] = 1
    save("data/test/masks/test.png", Image.fromarray(mask))
    status, text = run()
    assert status == 0, text
    assert (np.array(Image.open("out/SegmentationClass/test.png")) == mask).all()


def test_one_ending_or_two_of_a_name(run):
    for name in ("a.jpg", "a.jpg.jpg"):
        save(f"data/{name}", picture())
    save("data/c.json", coco([(1, "a.jpg", 96, 72), (2, "a.jpg.jpg", 96, 72)],
                             [dict(image_id=k, category_id=1, bbox=[k, 5, 9, 9]) for k in (1, 2)], [(1, "thing")]))
    status, text = run()
    assert status == 0, text
    assert {name: boxes(sample)[0][0] for name, sample in made()[1]["train"].items()} == {"a": 1, "a.jpg": 2}


def test_equal_stems_take_their_folders(run):
    for part in ("north", "south"):
        save(f"data/images/{part}/f.jpg", picture())
        save(f"data/labels/{part}/f.xml", XML if part == "north" else xml(96, 72, []))
    save("data/images/north/g.jpg", picture())
    save("data/labels/north/g.xml", XML)
    assert run()[0] == 0
    samples = made()[1]["train"]
    assert {name: len(boxes(s)) for name, s in samples.items()} == {
        "images_north_f": 1, "images_south_f": 0, "g": 1}


def test_two_images_of_one_annotation_and_two_annotations_of_one_image(run):
    flat()
    save("data/images/a.png", picture())
    status, text = run()
    assert status == 2 and "data/xml/a.xml: 'a' may be data/images/a." in text
    Path("data/images/a.png").unlink()
    save("data/old/b.xml", XML)
    status, text = run()
    assert status == 2 and "data/xml/b.xml: a second annotation of data/images/b.jpg, beside data/old/b.xml" in text


# -------------------------------------------------------- names of classes

@pytest.mark.parametrize("file, text, names", [
    ("data.yaml", "names: [yes, '1', null, 1e3]", ["yes", "1", "null", "1e3"]),
    ("my.yml", "names:\n  0: no\n  5: off\n", ["no", "off"]), ("labels/classes.txt", "one\ntwo\n", ["one", "two"]),
    ("classes.txt", "﻿one\r\ntwo", ["one", "two"]), ("x.names", "one\n", ["one"]),
    ("data.yaml", "names: [background, one]", ["one"]), ("obj.names", "one\n\nlast", ["one", "last"])])
def test_yolos_names(run, file, text, names):
    yolo(YOLO if "back" not in text else "1" + YOLO[1:])
    Path("data/classes.txt").unlink()
    save(f"data/{file}", text)
    status, said = run()
    data, lists = made()
    assert status == 0 and data["classes"] == names and ("background left out" in said) == ("back" in text)
    assert lists["train"]["a"]["labels"].tolist() == [1]


def test_captions_beside_coco_and_other_xml(run):
    save("data/a.jpg", picture())
    save("data/a.txt", "a red box on noise")
    save("data/c.json", coco([(1, "a.jpg", 96, 72)], [dict(image_id=1, category_id=1, bbox=[1, 1, 9, 9])], [(1, "b")]))
    status, text = run()
    assert status == 0 and text.startswith("COCO: ") and "1 annotations in YOLO, left out" in text
    shutil.rmtree("data")
    flat("ab")
    save("data/xml/b.xml", "<page><object/></page>")
    status, text = run(out="other")
    assert status == 2 and "data/xml/b.xml: not VOC's XML" in text


@pytest.mark.parametrize("names", [
    "cat, dog", "[[a, b]]", "{a: b}", "{0: {x: y}}", "[a, b, a]", "[a]\nkpt_shape: [17, 2]"])
def test_names_that_are_no_list(run, names):
    yolo()
    Path("data/classes.txt").unlink()
    save("data/data.yaml", f"names: {names}")
    save("data/images/a.jpg", b"broken")
    for options in ([], ["--skip-faults"]):
        status, text = run("data", *options)
        assert status == 2 and "faults: 2\ndata/data.yaml: " in text and "data/images/a.jpg: broken image" in text


def test_yolo_without_names(run):
    yolo(names="")
    status, text = run()
    assert status == 2 and "faults: 1\ndata: no class names; write classes.txt" in text


def test_vocs_names_are_sorted_and_background_is_none(run):
    save("data/a.jpg", picture())
    objects = [("zebra", *VOC), ("background", 1, 1, 9, 9), ("Ape &amp; co", *VOC)]
    save("data/a.xml", xml(96, 72, objects))
    status, text = run()
    data, lists = made()
    assert status == 0 and data["classes"] == ["Ape & co", "zebra"] and "1 boxes of background, left out" in text
    assert lists["train"]["a"]["labels"].tolist() == [2, 1]


def test_classes_and_renamed_ones(run):
    save("data/images/a.jpg", picture())
    objects = [("cat", 1, 1, 20, 20), ("dog", 31, 31, 50, 50), ("cow", 61, 1, 80, 20)]
    save("data/xml/a.xml", xml(96, 72, objects))
    mask = np.zeros((72, 96), np.uint8)
    mask[0:20, 0:20], mask[0:20, 60:80], mask[30:50, 30:50], mask[60:, :] = 1, 2, 3, 255
    save("data/masks/a.png", Image.fromarray(mask))
    status, text = run("data", "--classes", "cow, pet", "--rename", "cat=pet", "--rename", "dog=pet")
    data, lists = made()
    sample = lists["masked"]["a"]
    assert status == 0 and data["classes"] == ["pet", "cow"] and sample["labels"].tolist() == [1, 1, 2]
    expected = np.array([0, 1, 2, 1], np.uint8)[mask % 255]
    expected[60:] = 255
    assert (sample["masks"][0].numpy() == expected).all()
    status, text = run("data", "--classes", "dog", out="dogs")
    sample = made("dogs")[1]["masked"]["a"]
    assert status == 0 and "1 boxes of cat, left out" in text and sample["labels"].tolist() == [1]
    assert sample["masks"][0][40, 40] == 1 and sample["masks"][0][10, 10] == 0
    for options in (["--classes", "bat"], ["--rename", "bat=cat"]):
        status, text = run("data", *options, out="none")
        assert status == 2 and "'bat'" in text and "cat, cow, dog" in text


def test_images_that_lose_all_boxes_stay(run):
    flat("a")
    save("data/images/b.jpg", picture())
    save("data/xml/b.xml", xml(96, 72, [("other", *VOC)]))
    status, text = run("data", "--classes", "thing")
    assert status == 0 and "1 images without boxes" in text and sorted(made()[1]["train"]) == ["a", "b"]


# ------------------------------------------------------------------ texts

@pytest.mark.parametrize("encoding", ["gbk", "utf-8", "utf-8-sig", "utf-16", "shift_jis", "big5"])
def test_xml_in_its_declared_encoding(run, encoding):
    name = "中"
    save("data/a.jpg", picture())
    head = f'<?xml version="1.0" encoding="{encoding.removesuffix("-sig")}"?>\n'
    save("data/a.xml", (head + xml(96, 72, [(name, *VOC)])).encode(encoding))
    assert run()[0] == 0 and made()[0]["classes"] == [name]


@pytest.mark.parametrize("content", [b"<annotation>", b"", b"\xff\xfe\x00", "<annotation>é".encode("latin-1"),
                                     b'<?xml version="1.0" encoding="klingon"?><annotation/>'])
def test_broken_xml_is_named(run, content):
    flat()
    save("data/xml/a.xml", content)
    status, text = run("data", "--empty")
    assert status == 2 and "data/xml/a.xml: cannot be read" in text and "faults: 1" in text


# ------------------------------------------------------------------ boxes

@pytest.mark.parametrize("line, words", [
    ("0 .5 .5 .5 .5 .9", "a confidence?"), ("0 48 36 20 20", "pixels?"), ("0 .5,.5,.5,.5", "not a number"),
    ("0 0,5 0,5 0,5 0,5", "comma"), ("thing .5 .5 .5 .5", "'thing' is not a number"), ("7 .5 .5 .5 .5", "no name"),
    ("0.5 .5 .5 .5 .5", "no name"), ("-1 .5 .5 .5 .5", "no name"), ("0 .5 .5 .5", "3 numbers"), ("0", "0 numbers"),
    ("0 .5 .5 nan .5", "not a number"), ("0 .5 .5 -.5 .5", "negative"), ("0 .9 .5 .5 .5", "pixels beyond"),
    ("0 .5 .5 .01 .5", "too small"), ("0 .5 .5 .5 .5 .5 .5 .5", "7 numbers")])
def test_faults_in_yolo(run, line, words):
    yolo(f"{YOLO}\n{line}\n")
    status, text = run()
    assert status == 2 and any("data/labels/a.txt: line 3" in x and words in x for x in text.splitlines()), text


def test_yolos_polygons_and_empty_files(run):
    yolo("1 0.25 0.25 0.5 0.25 0.5 0.75\n0 0.5 0.5 1.01 1.0\n")
    save("data/images/b.jpg", picture())
    save("data/labels/b.txt", "\n")
    status, text = run()
    samples = made()[1]["train"]
    assert status == 0 and "1 boxes round polygons" in text and "1 boxes cut at the edge" in text
    assert boxes(samples["a"]) == [[24, 18, 48, 54], [0, 0, 96, 72]] and samples["a"]["labels"].tolist() == [2, 1]
    assert boxes(samples["b"]) == []


@pytest.mark.parametrize("change, words", [
    (dict(bbox=[1, 2, 3]), "bbox is [1, 2, 3]"), (dict(bbox=[1, 2, 3, 4, 5]), "bbox is"), (dict(bbox=None), "bbox is"),
    (dict(bbox=["1,5", 2, 30, 40]), "'1,5' is not a number"), (dict(category_id=9), "category_id"),
    (dict(image_id=9), "image_id"), (dict(image_id=None), "image_id"), (dict(bbox=[90, 9, 9, 9]), "3 pixels beyond"),
    (dict(attributes={"rotation": 12.5}), "a rotated box"), (dict(bbox=[[1, 2], 3, 4, 5]), "not a number")])
def test_faults_in_coco(run, change, words):
    save("data/a.jpg", picture())
    save("data/c.json", coco([(1, "a.jpg", 96, 72)], [dict(image_id=1, category_id=1, bbox=[20, 15, 40, 35]),
                             dict(dict(image_id=1, category_id=1, bbox=[20, 15, 40, 35]), **change)], [(1, "thing")]))
    status, text = run()
    assert status == 2 and any("data/c.json: annotations[1]" in x and words in x for x in text.splitlines()), text


def test_voc_rotations_of_cvat_and_difficult_objects(run):
    mark = "<attributes><attribute><name>rotation</name><value>{}</value></attribute></attributes></object>"
    for name, angle in (("a", "0.0"), ("b", "30.0")):
        save(f"data/{name}.jpg", picture())
        save(f"data/{name}.xml", XML.replace("</object>", mark.format(angle)).replace(
            "<difficult>0", "<difficult>1"))
    status, text = run()
    assert status == 2 and "data/b.xml: object 1: a rotated box" in text and "faults: 1" in text
    assert run("data", "--skip-faults")[0] == 0 and boxes(made()[1]["train"]["a"]) == [BOX]


# ----------------------------------------------------------------- pixels

def shown(image):
    return np.asarray(to_rgb(image))


def test_to_rgb_shows_what_a_viewer_shows():
    grey = np.array([[1000, 2000], [3000, 3000]])
    for kind in (np.uint16, np.int32, np.float32):
        assert shown(Image.fromarray(grey.astype(kind))).tolist() == [
            [[0] * 3, [128] * 3], [[255] * 3, [255] * 3]]
    assert shown(Image.new("I;16", (1, 1), 777)).tolist() == [[[0, 0, 0]]]
    assert shown(Image.new("RGBA", (1, 1), (9, 8, 7, 0))).tolist() == [[[255] * 3]]
    assert shown(Image.new("RGBA", (1, 1), (9, 8, 7, 255))).tolist() == [[[9, 8, 7]]]
    assert shown(Image.new("LA", (1, 1), (0, 0))).tolist() == [[[255] * 3]]
    assert shown(Image.new("CMYK", (1, 1), (0, 255, 255, 0))).tolist() == [[[255, 0, 0]]]
    assert shown(Image.new("1", (1, 1), 1)).tolist() == [[[255] * 3]]
    unknown = np.array([[0, np.nan], [1, 2]], np.float32)
    assert shown(Image.fromarray(unknown))[..., 0].tolist() == [[0, 0], [128, 255]]
    palette = Image.new("P", (2, 1), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.putpixel((0, 0), 0)
    assert shown(palette).tolist() == [[[0, 0, 0], [10, 20, 30]]]
    palette.info["transparency"] = 0
    assert shown(palette).tolist() == [[[255] * 3, [10, 20, 30]]]


@pytest.mark.parametrize("name, mode, ending", [
    ("a.tif", "RGB", ".png"), ("a.tiff", "CMYK", ".png"), ("a.bmp", "RGB", ".png"), ("a.webp", "RGB", ".png"),
    ("a.gif", "P", ".png"), ("a.png", "RGBA", ".png"), ("a.PNG", "LA", ".PNG"), ("a.jpeg", "CMYK", ".jpeg"),
    ("a.JPG", "RGB", ".JPG"), ("a.jpg", "L", ".jpg"), ("a.jfif", "RGB", ".jpg"), ("a.tif", "I;16", ".png")])
def test_endings(run, name, mode, ending):
    image = picture()
    deep = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 9)
    save(f"data/{name}", deep if mode == "I;16" else image.convert(mode))
    save("data/a.xml", XML)
    assert run()[0] == 0
    target = Path(f"out/JPEGImages/a{ending}")
    assert [path.name for path in Path("out/JPEGImages").iterdir()] == [target.name]
    linked = ending.lower() in (".jpg", ".jpeg") and mode in ("RGB", "L")
    assert Path("data", name).samefile(target) == linked
    if not linked:
        expected = np.asarray(to_rgb(Image.open(f"data/{name}"))).astype(int)
        found = np.asarray(Image.open(target).convert("RGB"))
        assert np.abs(found - expected).mean() < (3 if ending == ".jpeg" else 1e-9)
    assert boxes(made()[1]["train"]["a"]) == [BOX]


def test_a_phones_jpeg_of_two_views_is_linked(run):
    picture().save("a.mpo", "MPO", save_all=True, append_images=[picture()])
    Path("data").mkdir()
    os.rename("a.mpo", "data/a.jpg")
    save("data/a.xml", XML)
    assert run()[0] == 0 and Path("data/a.jpg").samefile("out/JPEGImages/a.jpg")


def test_where_links_fail_files_are_copied(run, monkeypatch):
    flat("a")

    def fail(*paths):
        raise OSError(18, "Invalid cross-device link")
    monkeypatch.setattr(os, "link", fail)
    assert run()[0] == 0
    copy = Path("out/JPEGImages/a.jpg")
    assert copy.read_bytes() == Path("data/images/a.jpg").read_bytes() and copy.stat().st_nlink == 1


def test_linked_images_are_those_behind_links(run):
    flat("a")
    os.rename("data/images/a.jpg", "far.jpg")
    os.symlink(Path("far.jpg").absolute(), "data/images/a.jpg")
    assert run()[0] == 0
    assert not Path("out/JPEGImages/a.jpg").is_symlink() and Path("out/JPEGImages/a.jpg").samefile("far.jpg")


def test_larger_images_shrink_with_boxes_and_masks(run):
    save("data/images/a.jpg", picture(2000, 1000, (400, 200, 800, 600)))
    save("data/xml/a.xml", xml(2000, 1000, [("thing", 401, 201, 800, 600)]))
    mask = np.zeros((1000, 2000), np.uint8)
    mask[200:600, 400:800] = 1
    save("data/masks/a.png", Image.fromarray(mask))
    status, text = run()
    sample = made()[1]["masked"]["a"]
    assert status == 0 and "1 images made smaller" in text and boxes(sample) == [[200, 100, 400, 300]]
    assert sample["image"].shape == (3, 500, 1000) and sample["masks"][0].sum() == 200 * 200
    assert np.abs(np.subtract(bright(sample), [200, 100, 400, 300])).max() <= 1
    assert run("data", "--max-side", "2000", out="large")[0] == 0
    assert Path("large/JPEGImages/a.jpg").samefile("data/images/a.jpg")


def test_images_that_cannot_be_read_are_named(run, monkeypatch):
    monkeypatch.delitem(Image.EXTENSION, ".heic", raising=False)  # as without pillow-heif
    flat("abc")
    whole = Path("data/images/a.jpg").read_bytes()
    save("data/images/a.jpg", whole[:len(whole) // 2])
    save("data/images/b.jpg", b"no image")
    save("data/images/d.heic", b"\0\0\0\x18ftypheic")
    save("data/xml/d.xml", XML)
    status, text = run()
    assert status == 2 and "faults: 3" in text
    assert "data/images/a.jpg: broken image (image file is truncated" in text
    assert "data/images/b.jpg: broken image (cannot identify image file)" in text
    assert "data/images/d.heic: broken image (HEIC" in text and "pillow-heif" in text


def test_heic(run):
    pytest.importorskip("pillow_heif", reason="needs pillow-heif")
    save("data/a.HEIC", picture())
    save("data/a.xml", XML)
    assert run()[0] == 0
    sample = made()[1]["train"]["a"]
    assert np.abs(np.subtract(bright(sample), boxes(sample)[0])).max() <= 1 and Path("out/JPEGImages/a.png").exists()


def test_what_may_not_be_read_is_pythons_error():
    flat()
    Path("data/images/a.jpg").chmod(0)
    done = subprocess.run([*without_privilege(), sys.executable, ROOT / "tools/own_data.py", "data", "out"],
                          capture_output=True, text=True)
    assert done.returncode == 1 and not Path("out").exists()
    assert re.match("PermissionError: .*images/a.jpg", done.stderr.splitlines()[-1])


@pytest.mark.parametrize("error", [MemoryError, PermissionError(13, "no")])
def test_the_machines_errors_are_not_the_files(monkeypatch, error):
    save("data/a.jpg", picture())

    def fail(image):
        raise error
    with pytest.raises(MemoryError if error is MemoryError else PermissionError):
        datasets.open_image(Path("data/a.jpg"), fail)


# ------------------------------------------------------------------ masks

def masked(mask, names=("thing",), **options):
    """data with an image whose left half holds the first class, the right half the last."""
    save("data/JPEGImages/a.jpg", picture())
    objects = [(names[0], 1, 1, 48, 72), (names[-1], 49, 1, 96, 72)]
    save("data/Annotations/a.xml", xml(96, 72, objects))
    save("data/SegmentationClass/a.png", mask, **options)


def halves(left, right, kind=np.uint8):
    return np.repeat(np.array([[left, right]], kind), 48, 1).repeat(72, 0)


def coloured(left, right):
    image = Image.fromarray(halves(left, right))
    image.putpalette(datasets.palette().tobytes())
    return image


@pytest.mark.parametrize("mask, expected", [
    (coloured(1, 2), [1, 2]), (coloured(255, 2), [255, 2]), (coloured(0, 255), [0, 255]), (coloured(0, 0), [0, 0]),
    (coloured(1, 2).convert("RGB"), [1, 2]), (coloured(255, 0).convert("RGB"), [255, 0]),
    (Image.fromarray(np.dstack([np.array(coloured(1, 2).convert("RGB")), halves(0, 255)])), [0, 2]),
    (Image.fromarray(halves(1, 255, np.uint16)), [1, 255])])
def test_masks_that_are_right(run, mask, expected):
    masked(mask, ("cat", "dog"))
    assert run()[0] == 0
    found = made()[1]["masked"]["a"]["masks"][0]
    assert [found[9, 9], found[9, 90]] == expected


@pytest.mark.parametrize("mask, words", [
    (coloured(1, 2), "most of label 1 lies outside the boxes of pug"), (coloured(1, 3), "colour #808000 is no"),
    (Image.fromarray(halves(1, 3)), "label 3; valid: 0..2, 255"), (Image.fromarray(halves(38, 75)), "turned grey"),
    (Image.fromarray(halves(0, 255)), "is 255 the object?"), (Image.fromarray(halves(255, 255)), "is 255 the object?"),
    (Image.fromarray(halves(255, 0)).convert("RGB"), "is 255 the object?"),
    (Image.fromarray(np.full((72, 96, 3), (1, 2, 3), np.uint8)), "colour #010203"),
    (b"junk", "broken image")])
def test_masks_that_are_wrong(run, mask, words):
    masked(mask, ("tabby", "pug"))
    status, text = run()
    lines = [line for line in text.splitlines() if "data/SegmentationClass/a.png: " in line]
    assert status == 2 and "faults: 1" in text and words in lines[0]


@pytest.mark.parametrize("mode", ["P", "RGB", "L"])
def test_the_grey_of_vocs_colours_is_no_grey_value(run, mode):
    """Label 7 is (128, 128, 128)."""
    masked(coloured(7, 0).convert(mode) if mode != "L" else Image.fromarray(halves(7, 0)), ("car", "zoo"))
    path = Path("data/Annotations/a.xml")
    more = xml(96, 72, [(name, *VOC) for name in ("a", "ab", "b", "bc", "c", "c0")])
    path.write_text(path.read_text().replace("</annotation>", more[more.index("<object>"):]))
    assert run()[0] == 0 and made()[1]["masked"]["a"]["masks"][0][9, 9] == 7


def test_masks_of_cvat_with_a_class_less(run):
    masked(Image.fromarray(np.where(halves(1, 0)[..., None] == 1, np.uint8([51, 221, 255]), np.uint8([9, 9, 9]))))
    save("data/labelmap.txt", "# label:color_rgb:parts:actions\nbackground:9,9,9::\nbird:1,2,3::\nthing:51,221,255::\n")
    assert run()[0] == 0
    assert made()[1]["masked"]["a"]["masks"][0][9, ::80].tolist() == [1, 0]


def test_masks_of_a_part_of_voc_keep_vocs_labels(run):
    masked(coloured(8, 12), ("cat", "dog"))
    assert run()[0] == 0
    data, lists = made()
    assert data["classes"] == list(datasets.VOC_CLASSES)
    assert lists["masked"]["a"]["masks"][0][9, ::80].tolist() == [8, 12]


def test_merged_masks_come_first_and_objects_are_none(run):
    masked(coloured(1, 0))
    save("data/SegmentationClassAug/a.png", coloured(1, 1))
    save("data/SegmentationObject/a.png", coloured(3, 4))
    status, text = run()
    assert status == 0 and made()[1]["masked"]["a"]["masks"][0].min() == 1
    assert "2 masks of objects, second masks, left out" in text


def test_a_mask_without_an_image_is_named(run):
    masked(coloured(1, 1))
    save("data/SegmentationClass/lost.png", coloured(1, 1))
    status, text = run()
    assert status == 2 and "data/SegmentationClass/lost.png: no image 'lost'" in text


def test_masked_names_images_of_train_alone(run):
    """One of the list test is scored by its mask all the same, but is nothing to learn from."""
    masked(coloured(1, 0))
    for part, ending in (("JPEGImages", "jpg"), ("Annotations", "xml"), ("SegmentationClass", "png")):
        shutil.copy(f"data/{part}/a.{ending}", f"data/{part}/b.{ending}")
    for split, name in (("train", "a"), ("test", "b")):
        save(f"data/ImageSets/Main/{split}.txt", f"{name}\n")
    assert run()[0] == 0
    data, lists = made()
    assert data["val"] == "masked" and list(lists["masked"]) == list(lists["train"]) == ["a"]
    assert Path("out", data["truth"], "b.png").exists() and list(lists["test"]) == ["b"]


def test_real_voc(run, folder):
    source = ROOT.parent / "shared/voc2007"
    if not source.is_dir():
        pytest.skip("needs VOC 2007 at ../shared/voc2007")
    ids = sorted(path.stem for path in (source / "SegmentationClass").iterdir())[:12]
    for name in ids:
        for part, ending in (("JPEGImages", "jpg"), ("Annotations", "xml"), ("SegmentationClass", "png")):
            (folder / "data" / part).mkdir(parents=True, exist_ok=True)
            shutil.copy(source / f"{part}/{name}.{ending}", folder / "data" / part)
    assert run()[0] == 0
    data, lists = made()
    assert sorted(lists["masked"]) == ids and data["classes"] == list(datasets.VOC_CLASSES)
    for name, sample in lists["masked"].items():
        assert (sample["masks"][0].numpy() == np.asarray(Image.open(source / f"SegmentationClass/{name}.png"))).all()
        boxes, labels, _ = datasets.read_annotation(source / f"Annotations/{name}.xml", data["classes"])
        assert (sample["boxes"] == boxes).all() and (sample["labels"] == labels).all()


# -------------------------------------------------------------- other tools

@pytest.mark.parametrize("name, content, tool", [
    ("a.json", json.dumps({"version": "5", "shapes": [], "imagePath": "a.jpg", "imageData": None}), "LabelMe"),
    ("via.json", json.dumps({"a.jpg9": {"filename": "a.jpg", "regions": []}}), "VIA"),
    ("via.json", json.dumps({"_via_settings": {}, "_via_img_metadata": {}}), "VIA"),
    ("via.csv", "filename,file_size,region_shape_attributes\na.jpg,9,{}\n", "VIA"),
    ("ls.json", json.dumps([{"annotations": [{"completed_by": 1}], "data": {"image": "a.jpg"}}]), "Label Studio"),
    ("min.json", json.dumps([{"image": "a.jpg", "annotation_id": 3, "label": []}]), "Label Studio"),
    ("ml.json", json.dumps([{"image": "a.jpg", "annotations": [{"label": "x", "coordinates": {"x": 1}}]}]), "CreateML"),
    ("annotations.xml", '<?xml version="1.0"?>\n<annotations><image name="a.jpg"/></annotations>', "CVAT"),
    ("boxes.csv", "filename,width,height,class,xmin\na.jpg,1,1,cat,1\n", "CSV")])
def test_other_exports_are_named_in_a_line(run, name, content, tool):
    save("data/a.jpg", picture())
    save(f"data/{name}", content)
    status, text = run()
    assert status == 2 and len(text.splitlines()) == 1 and text.startswith(f"data/{name}: ") and tool in text
    assert ("labelme2voc.py" if tool == "LabelMe" else "COCO") in text


@pytest.mark.parametrize("write, words", [
    (lambda: None, "data: no folder; unpack an archive"), (lambda: Path("data").mkdir(), "data: no images"),
    (lambda: save("data/a.jpg", picture()), "with VOC XML"), (lambda: save("data/a.zip", b"PK"), "unpack"),
    (lambda: save("data/a.json", "{"), "data/a.json: cannot be read"),
    (lambda: save("data/a.xml", XML), "data: no images; add them"),
    (lambda: save("data/a.json", coco([(1, "a.jpg", 96, 72)], [], [(1, "thing")])), "data: no images; add them")])
def test_nothing_to_read(run, write, words):
    write()
    status, text = run()
    assert status == 2 and len(text.splitlines()) == 1 and words in text


# ------------------------------------------------------------ the command

def test_mine_yaml_is_the_template_filled_in(run, folder):
    flat()
    assert run(out="my set")[0] == 0
    data = yaml.safe_load((ROOT / "configs/your_data.yaml").read_text())
    mine = (folder / "my set/mine.yaml").read_text()
    assert yaml.safe_load(mine) == data | {
        "run": data["run"] | {"name": "my_set"},
        "data": {"root": str(folder / "my set"), "classes": ["thing"], "train": "train", "val": "",
                 "truth": "SegmentationClass"}}
    template = (ROOT / "configs/your_data.yaml").read_text().splitlines()
    comments = [line.partition("  #")[2] for line in template]
    assert [line.partition("  #")[2] for line in mine.splitlines()] == comments
    assert set(data["data"]) == {"root", "classes", "train", "val", "truth"}


def test_an_out_that_exists_or_lies_in_source_is_refused(run, folder):
    flat()
    save("out/keep.txt", "mine")
    assert run() == (2, "out: exists already; name a new folder\n")
    assert [path.name for path in Path("out").iterdir()] == ["keep.txt"]
    status, text = run(out="data/out")
    assert status == 2 and text.startswith("data/out: lies in data")
    os.symlink("nowhere", "link")
    assert run(out="link") == (2, "link: exists already; name a new folder\n")
    assert os.readlink("link") == "nowhere"


def test_out_is_whole_or_not_there(run, monkeypatch, folder):
    flat()

    def fail(*arguments):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(own_data, "write_settings", fail)
    monkeypatch.setattr(sys, "argv", ["own_data.py", "data", "deep/out"])
    with pytest.raises(OSError, match="No space"):
        own_data.main()
    assert not list(Path("deep").iterdir())
    monkeypatch.setattr(own_data, "convert", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(SystemExit, match="stopped"):
        own_data.main()
    assert not list(Path("deep").iterdir())


@pytest.mark.parametrize("options", [["--max-side", "0"], ["--max-side", "x"], ["--rename", "cat"],
                                     ["--rename", "cat=dog,cow=pet"], ["--classes", "cat,,cow"], ["--what"]])
def test_wrong_options(run, options):
    flat()
    assert run("data", *options)[0] == 2


def test_the_report(run):
    flat("abc")
    save("data/images/b.jpg", picture(48, 36))
    save("data/xml/b.xml", xml(48, 36, []))
    status, text = run()
    assert status == 0 and text.splitlines() == [
        "VOC XML: 3 images", "       3 train", "       0 val", "       0 test", "       0 masked",
        "smallest, median and largest: 48 x 36, 96 x 72, 96 x 72",
        "boxes: 2", "       2 thing", "1 images without boxes", "faults: 0", "", "python train_cls.py out/mine.yaml"]


def test_all_skipped_is_nothing(run):
    flat("a")
    save("data/images/a.jpg", b"")
    status, text = run("data", "--skip-faults")
    assert status == 2 and "no image with boxes for train" in text


def test_the_commands_of_the_page_run_as_they_stand(folder):
    case("masks")
    page = (ROOT / "docs/own_data.md").read_text().split("## Labels from elsewhere")[0]
    commands = [line for line in page.splitlines() if line.startswith("python ") and "=" in line]
    assert page.count("\npython tools/own_data.py SOURCE OUT\npython train_cls.py OUT/mine.yaml\n") == 1
    for path in (*ROOT.glob("*.py"), ROOT / "configs", ROOT / "tools"):
        (folder / path.name).symlink_to(path)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    commands.insert(0, "python tools/own_data.py SOURCE OUT")
    assert [command.split()[1] for command in commands] == [
        "tools/own_data.py", "train_cls.py", "make_labels.py", "train_seg.py", "eval.py", *["train_seg.py"] * 2]
    said = {}
    for command in commands:
        command = command.split("#")[0].replace("SOURCE", "data/rgb").replace("OUT", "out").replace("NAME", "dry")
        if "labels=" in command:  # beside the dry run, whose labels are all background
            command = re.sub("Ycrf|Yret", "box", command) + " weights=none iterations=3 batch=2 crop=65"
        done = subprocess.run(command, shell=True, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, (command, done.stderr)
        said[command.split()[1]] = done.stdout
    assert Path("runs/dry/panels.png").is_file() and "IoU" in said["eval.py"]
    assert Path("runs/semi/seg.pt").is_file() and Path("runs/crf/seg.pt").is_file()


def test_a_broken_mask_hides_no_other_fault(run):
    """Also where the classes are VOC's, whose masks are looked at early."""
    for name in ("a", "b"):
        save(f"data/JPEGImages/{name}.jpg", picture())
        save(f"data/Annotations/{name}.xml", xml(96, 72, [("cat", *VOC)]))
        Path("data/SegmentationClass").mkdir(exist_ok=True)
    Path("data/SegmentationClass/a.png").write_bytes(b"\x89PNG broken")
    Path("data/JPEGImages/b.jpg").write_bytes(b"\xff\xd8broken")
    status, text = run()
    assert status == 2 and "faults: 2" in text
    assert "SegmentationClass/a.png: broken image" in text
    assert "JPEGImages/b.jpg: broken image" in text


def labelled(*names, text=YOLO):
    for seed, name in enumerate(names):
        save(f"data/{name}", picture(seed=seed))
        save(f"data/{Path(name).with_suffix('.txt')}", text)
    save("data/classes.txt", "thing\n")


def entry(image):
    return dict(image_id=image, category_id=1, bbox=[20, 15, 40, 35])


@pytest.mark.parametrize("ending", [".jpg", ".png"])
@pytest.mark.parametrize("name", ["mask", "labels", "annotations"])
def test_annotated_images_in_a_folder_that_masks_could_be_in(run, name, ending):
    for part in (name, "other"):
        save(f"data/{part}/{part}{ending}", picture())
        save(f"data/{part}/{part}.xml", XML)
    assert run()[0] == 0
    assert [*made()[1]["train"]] == [name, "other"] or {*made()[1]["train"]} == {name, "other"}


def test_only_a_logo_lies_outside(run):
    for n in "ab":
        save(f"data/annotations/{n}.jpg", picture())
        save(f"data/annotations/{n}.xml", XML)
    save("data/logo.png", picture())
    status, text = run()
    assert status == 2 and "data/logo.png: no annotation" in text and "unpack" not in text


def test_an_image_that_is_taken_for_a_mask_is_said_to_be(run):
    for part in ("mask", "other"):
        save(f"data/{part}/{part}.png", picture())
    save("data/a.json", coco([(1, "mask/mask.png", 96, 72), (2, "other/other.png", 96, 72)],
                             [entry(1), entry(2)], [(1, "thing")]))
    status, text = run()
    assert status == 2 and "no image 'mask/mask.png'; data/mask/mask.png is taken for a mask" in text


def test_equal_names_in_folders_of_equal_words(run):
    labelled("2023/01/02/f.jpg", "2023/02/01/f.jpg")
    save("data/2023/02/01/f.txt", "")
    assert run()[0] == 0
    assert {name: len(boxes(s)) for name, s in made()[1]["train"].items()} == {"2023_01_02_f": 1, "2023_02_01_f": 0}


def test_equal_names_in_folders_of_equal_words_in_coco(run):
    names = "2023/01/02/f.jpg", "2023/02/01/f.jpg"
    for n in names:
        save(f"data/images/{n}", picture())
    save("data/all.json", coco([(k, n, 96, 72) for k, n in enumerate(names)], [entry(0)], [(1, "thing")]))
    assert run()[0] == 0
    assert {name[-7:]: len(boxes(s)) for name, s in made()[1]["train"].items()} == {"01_02_f": 1, "02_01_f": 0}


@pytest.mark.parametrize("part", [" new", "a" * 201, os.fsdecode(b"M\xfcnchen")])
def test_folders_that_become_a_part_of_an_id(run, part):
    labelled(f"{part}/f.jpg", "old/f.jpg")
    status, text = run()
    assert status == 2 and "faults: 1\n" in text and "name" in text


def test_names_of_screenshots(run):
    labelled("Screenshot 1.00.00\u202fPM.png")  # macOS, a narrow no-break space
    assert run()[0] == 0
    assert [*made()[1]["train"]] == ["Screenshot 1.00.00\u202fPM"]


def test_a_coco_file_beside_instances_is_said_to_be_left_out(run):
    for n, file in ("a", "one/instances_default.json"), ("b", "two/_annotations.coco.json"):
        save(f"data/images/{n}.jpg", picture())
        save(f"data/{file}", coco([(1, f"{n}.jpg", 96, 72)], [entry(1)], [(1, "thing")]))
    status, text = run("data", "--empty")
    assert "1 COCO files beside instances*.json, left out" in text


def test_a_second_annotation_names_its_image(run):
    for n in ("cat", "dog"):
        save(f"data/{n}.json", coco([(1, "a.jpg", 96, 72)], [entry(1)], [(1, n)]))
    save("data/a.jpg", picture())
    status, text = run()
    assert status == 2 and "data/dog.json: a second annotation of data/a.jpg, beside data/cat.json" in text


def test_settings_of_other_tools(run):
    labelled("a.jpg")
    save("data/params.yaml", "train:\n  epochs: 10\n")  # DVC's
    assert run()[0] == 0


def test_all_in_test(run):
    labelled("test/a.jpg")
    status, text = run()
    assert status == 2 and "no image with boxes for train, all are in test; rename" in text


def test_yolo_with_a_mark_of_a_missing_image(run):
    labelled("a.jpg")
    save("data/b.txt", "\ufeff" + YOLO)
    status, text = run()
    assert status == 2 and "data/b.txt: no image 'b'" in text


def test_a_huge_image(run):
    save("data/a.png", Image.new("1", (20000, 10000)))
    save("data/a.xml", xml(20000, 10000, [THING]))
    status, text = run()
    assert status == 2 and "data/a.png: more pixels than" in text and "tiles" in text


def test_the_command_to_copy(run):
    labelled("a.jpg")
    assert "python train_cls.py 'my out/mine.yaml'" in run(out="my out")[1]


def deep_png(path, array):
    """(H, W, 3) as a PNG of 16 bits a channel, which Pillow cannot write."""
    height, width, _ = array.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    parts = (b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")
    save(path, b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts))


def test_dark_colours_of_sixteen_bits_are_named(run):
    dark = np.asarray(picture()).astype(int) * 16  # of 12 bits, as microscopes have
    deep_png("data/a.png", dark)
    deep_png("data/b.png", dark * 16)
    for n in "ab":
        save(f"data/{n}.xml", XML)
    status, text = run()
    assert status == 2 and "faults: 1" in text and "data/a.png: " in text and "16 bits" in text
    with pytest.raises(datasets.DataError, match="16 bits"):
        datasets.read_image("data/a.png")
    assert datasets.read_image("data/b.png").max() > 200


@pytest.mark.parametrize("track", ["1", "7"])
def test_yolo_of_a_tracker(run, track):
    labelled("a.jpg", text=f"0 0.4 0.45 0.4 0.48 0.91 {track}\n")
    status, text = run()
    assert status == 2 and "data/a.txt: line 1: a seventh number" in text


@pytest.mark.parametrize("name", ["Classes.txt", "CLASSES.TXT"])
def test_class_names_in_capitals(run, name):
    labelled("a.jpg")
    Path("data/classes.txt").rename(f"data/{name}")
    assert run()[0] == 0 and made()[0]["classes"] == ["thing"]


def test_folders_called_sets(run):
    labelled("training_set/a.jpg", "test_set/b.jpg")
    assert run()[0] == 0
    assert {split: [*names] for split, names in made()[1].items() if names} == {"train": ["a"], "test": ["b"]}
