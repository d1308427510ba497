"""Your own data: COCO's and YOLO's boxes, any folder of images, the check,
and the walk through all of it in docs/own_data.md."""
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import datasets
import engine
import eval as evaluation
from datasets import DataError, VOCDataset

ROOT = Path(__file__).resolve().parents[1]
CLASSES = ["cat", "dog", "cow"]
SIZE = 60, 40  # width, height
# The same three boxes in each form: VOC's (1-based, inclusive), COCO's (x, y, w, h), YOLO's (cx, cy, w, h, relative).
BOXES = {"a": [("cat", [0, 0, 10, 20]), ("dog", [5, 10, 60, 40])], "b": [], "c": [("cow", [12, 4, 36, 24])]}
VOC = ("<annotation><size><width>60</width><height>40</height></size>{}</annotation>",
       "<object><name>{}</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>")
YOLO = {"a": "0 0.083333333 0.25 0.166666667 0.5\n1 0.541666667 0.625 0.916666667 0.75\n", "c": "2 0.4 0.35 0.4 0.5\n"}


def coco():
    return {
        "images": [{"id": n, "file_name": f"some/where/{name}.jpg", "width": 60, "height": 40}
                   for n, name in enumerate("abc", 7)],
        "categories": [{"id": n, "name": name} for n, name in ((3, "cow"), (90, "cat"), (17, "dog"), (1, "unused"))],
        "annotations": [{"id": 1, "image_id": 7, "category_id": 90, "bbox": [0, 0, 10, 20], "iscrowd": 1},
                        {"id": 2, "image_id": 9, "category_id": 3, "bbox": [12, 4, 24.0, 20], "segmentation": [[1, 2]]},
                        {"id": 3, "image_id": 7, "category_id": 17, "bbox": [5, 10, 55, 30]}]}


def images(folder, names=("a.jpg", "b.PNG", "c.webp")):
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        pixels = np.random.default_rng(number).integers(0, 256, (*SIZE[::-1], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)


def voc(root):
    (root / "Annotations").mkdir()
    for name, objects in BOXES.items():
        text = "".join(VOC[1].format(kind, x0 + 1, y0 + 1, x1, y1) for kind, (x0, y0, x1, y1) in objects)
        (root / "Annotations" / f"{name}.xml").write_text(VOC[0].format(text))
    return "Annotations"


def yolo(root):
    (root / "labels").mkdir()
    for name, text in YOLO.items():
        (root / "labels" / f"{name}.txt").write_text(text)
    (root / "classes.txt").write_text("cat\ndog\ncow\n")
    return "labels"


def coco_file(root):
    (root / "boxes.json").write_text(json.dumps(coco()))
    return "boxes.json"


FORMS = {"voc": voc, "yolo": yolo, "coco": coco_file}


@pytest.fixture
def root(tmp_path):
    images(tmp_path / "mine/images")
    return tmp_path / "mine"


def read(root, boxes, split="all", **settings):
    dataset = VOCDataset(root, split, CLASSES, images="images", boxes=boxes, **settings)
    return dataset, list(dataset[i] for i in range(len(dataset)))


# ---------------------------------------------------------------- images


def test_all_is_every_image_in_order_unless_there_is_such_a_list(root):
    for name in ("._a.jpg", "notes.txt", "a.gif"):
        (root / "images" / name).write_text("no image")
    dataset, samples = read(root, None)
    assert dataset.ids == [sample["id"] for sample in samples] == ["a", "b", "c"]
    for name, sample in zip(("a.jpg", "b.PNG", "c.webp"), samples):
        expected = np.asarray(Image.open(root / "images" / name).convert("RGB"))
        assert np.array_equal(sample["image"].permute(1, 2, 0), expected)
    (root / "ImageSets/Segmentation").mkdir(parents=True)
    (root / "ImageSets/Segmentation/all.txt").write_text("c\na\n")
    assert read(root, None)[0].ids == ["c", "a"]
    (root / "ImageSets/Segmentation/few.txt").write_text("b\n")
    assert read(root, None, "few")[0].paths == {"b": root / "images/b.PNG"}


@pytest.mark.parametrize("spoil, words", [
    (lambda folder: images(folder, ["a.png"]), ["a.png: a second image with the id a, beside a.jpg"]),
    (lambda folder: images(folder, ["x\ny.png"]), ["'x\\ny.png'"]),
    (lambda folder: shutil.rmtree(folder), ["no such folder; set data.images"]),
    (lambda folder: [path.unlink() for path in folder.iterdir()], ["no images (.jpg"]),
    (lambda folder: (folder / "d.jpg").symlink_to("/dev/zero"), ["d.jpg: no such image"]),
], ids=["two of an id", "line break", "no folder", "empty", "device"])
def test_folders_of_images_that_cannot_be(root, spoil, words):
    spoil(root / "images")
    with pytest.raises(DataError) as error:
        read(root, None)
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words)


def test_the_devkits_own_jpg_comes_first(root):
    """As it always did: ID.jpg of a list is taken, whatever lies beside it."""
    images(root / "images", ["a.png"])
    (root / "ImageSets/Segmentation").mkdir(parents=True)
    (root / "ImageSets/Segmentation/train.txt").write_text("a\n")
    assert read(root, None, "train")[0].paths == {"a": root / "images/a.jpg"}


# ---------------------------------------------------------------- boxes


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_boxes(root, form):
    dataset, samples = read(root, FORMS[form](root))
    assert dataset.ids == ["a", "b", "c"]
    for sample in samples:
        kinds, boxes = [kind for kind, _ in BOXES[sample["id"]]], [box for _, box in BOXES[sample["id"]]]
        assert sample["labels"].tolist() == [CLASSES.index(kind) + 1 for kind in kinds]
        assert sample["boxes"].dtype == torch.float32 and sample["labels"].dtype == torch.int64
        torch.testing.assert_close(sample["boxes"].as_subclass(torch.Tensor),
                                   torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", [{}, {"width": 0, "height": 0}, {"width": None, "height": None}])
def test_a_coco_image_without_a_size_has_its_files(root, size):
    content = coco()
    content["images"] = [{"id": i["id"], "file_name": i["file_name"].replace("/", "\\")} | size
                         for i in content["images"]]
    (root / "boxes.json").write_text(json.dumps(content))
    assert read(root, "boxes.json")[1][0]["boxes"].tolist() == [[0, 0, 10, 20], [5, 10, 60, 40]]


def one_box(root, form, x0, y0, x1, y1):
    """The first box of image a is this one."""
    boxes = FORMS[form](root)
    if form == "yolo":
        sides = (x0 + x1) / 2 / 60, (y0 + y1) / 2 / 40, (x1 - x0) / 60, (y1 - y0) / 40
        (root / "labels/a.txt").write_text(" ".join(map(str, (0, *sides))))
    else:
        content = coco()
        content["annotations"][0]["bbox"] = [x0, y0, x1 - x0, y1 - y0]
        (root / "boxes.json").write_text(json.dumps(content))
    return boxes


@pytest.mark.parametrize("form", ["coco", "yolo"])
@pytest.mark.parametrize("box, cut", [((-0.9, 1, 9, 9), (0, 1, 9, 9)), ((1, -0.9, 9, 40.9), (1, 0, 9, 40)),
                                      ((50, 1, 60.9, 9), (50, 1, 60, 9)), ((-0.5, -0.5, 60.5, 40.5), (0, 0, 60, 40))])
def test_a_box_a_pixel_out_is_cut_at_the_edge(root, form, box, cut):
    first = read(root, one_box(root, form, *box))[1][0]["boxes"][0]
    assert first.tolist() == pytest.approx(cut, abs=1e-4)


@pytest.mark.parametrize("form, where", [("coco", "boxes.json: annotations[0], image 'a'"),
                                         ("yolo", "labels/a.txt: line 1")])
@pytest.mark.parametrize("box, words", [
    ((-1.1, 1, 9, 9), "leaves the image of 60 x 40"), ((1, -1.1, 9, 9), "leaves the image"),
    ((1, 1, 61.1, 9), "leaves the image"), ((1, 1, 9, 41.1), "leaves the image"), ((9, 1, 9, 9), "no area"),
    ((9, 1, 5, 9), "no area"), ((60.1, 1, 60.9, 9), "no area"), ((5, 1, 5.001, 9), "no area")])
def test_a_box_further_out_or_without_area_is_refused(root, form, where, box, words):
    with pytest.raises(DataError) as error:
        read(root, one_box(root, form, *box))
    assert where in str(error.value) and words in str(error.value)


@pytest.mark.parametrize("text, words", [
    ("0 .5 .5 .5", "line 1: 4 numbers"), ("\n1 .1 .1 .2 .2 .3 .3 .1 .1", "line 2: 9 numbers"),
    ("1 .1 .1 .2 .2 .3 .3 .1 .1", "export boxes, not polygons"), ("0 .5 .5 .5 .5 .9", "6 numbers"),
    ("3 .5 .5 .5 .5", "class 3; data.classes has 0..2"), ("-1 .5 .5 .5 .5", "class -1"),
    ("0.5 .5 .5 .5 .5", "class 0.5"), ("cat .5 .5 .5 .5", "'cat', not a number"), ("0 nan .5 .5 .5", "'nan'"),
    ("0 .5 .5 inf .5", "'inf'"), ("0 1e999 .5 .5 .5", "'1e999'"), ("9" * 9999 + " .5 .5 .5 .5", "not a number"),
    ("0 30 20 10 10", "leaves the image"), ("\xff\xfe", "UnicodeDecodeError"), ("x" * 11_000_000, "too many"),
    ("0 .5 .5 .5 .5\n" * 3 + "0,.5,.5,.5,.5", "line 4: 1 numbers"),
], ids=lambda text: text[:20].strip())
def test_yolo_files_that_cannot_be(root, text, words):
    yolo(root)
    (root / "labels/a.txt").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError) as error:
        read(root, "labels")
    assert f"{root}/labels/a.txt: " in str(error.value) and words in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def changed(*keys, to):
    """COCO's content as text, with one value replaced; `to` of ... leaves the key out."""
    content = place = coco()
    for key in keys[:-1]:
        place = place[key]
    if to is ...:
        del place[keys[-1]]
    else:
        place[keys[-1]] = to
    return json.dumps(content)


FAULTS = {
    "empty": ("", "not a JSON annotation"), "cut": (json.dumps(coco())[:-9], "not a JSON annotation"),
    "a list": ("[1, 2]", "is None, not a list"), "a number": ("3", "not a list"),
    "deep": ("[" * 200_000, "RecursionError"),
    "deep in it": ('{"a":' * 100_000 + "1" + "}" * 100_000, "RecursionError"),
    "no text": ("\xff\xfe\xfa", "not a JSON annotation"),
    "long number": ('{"images": 1' + "0" * 9999 + "}", "not a JSON"),
    "no categories": (changed("categories", to=...), "categories is None"),
    "annotations an object": (changed("annotations", to={"a": 1}), "annotations is {'a': 1}, not a list"),
    "image no object": (changed("images", 0, to=5), "images[0]: id is None"),
    "image id a list": (changed("images", 0, "id", to=[1]), "images[0]: id is [1]"),
    "image twice": (changed("images", 1, "id", to=7), "images[1]: a second image"),
    "name twice": (changed("images", 1, "file_name", to="a.png"), "images[1]: a second image of its id or name, 'a'"),
    "no file name": (changed("images", 1, "file_name", to=None), "file_name is None"),
    "image missing": (changed("images", 1, "file_name", to="x.jpg"), "no image called 'b'"),
    "width a text": (changed("images", 0, "width", to="big"), "width of image 'a' is 'big', not a number"),
    "width infinite": (changed("images", 0, "width", to=float("inf")), "width of image 'a' is inf"),
    "category twice": (changed("categories", 1, "id", to=3), "categories[1]: a second category"),
    "unknown image": (changed("annotations", 0, "image_id", to=99), "annotations[0]: image_id 99"),
    "unknown category": (changed("annotations", 2, "category_id", to=4), "annotations[2]: image_id 7 or category_id 4"),
    "category id a float": (changed("annotations", 2, "category_id", to=1.5), "category_id is 1.5"),
    "unknown class": (changed("categories", 1, "name", to="catt"), "class 'catt' is not in data.classes; the near"),
    "no bbox": (changed("annotations", 0, "bbox", to=...), "annotations[0]: bbox is None"),
    "bbox of three": (changed("annotations", 0, "bbox", to=[1, 2, 3]), "bbox is [1, 2, 3], not [x, y, width, height]"),
    "bbox of texts": (changed("annotations", 0, "bbox", to=["a", 2, 3, 4]), "is 'a', not a number"),
    "bbox NaN": (changed("annotations", 0, "bbox", to=[1, float("nan"), 3, 4]), "is nan, not a number"),
    "bbox huge": (changed("annotations", 0, "bbox", to=[1, 10 ** 400, 3, 4]), "not a number"),
    "bbox of lists": (changed("annotations", 0, "bbox", to=[[1], 2, 3, 4]), "is [1], not a number"),
    "long name": (changed("annotations", 0, "image_id", to="x" * 10 ** 6), "annotations[0]: image_id 'xxx"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_coco_files_that_cannot_be(root, name):
    text, words = FAULTS[name]
    (root / "boxes.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError) as error:
        read(root, "boxes.json")
    assert f"{root}/boxes.json: " in str(error.value) and words in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_an_annotation_of_an_image_of_another_size(root):
    (root / "boxes.json").write_text(changed("images", 0, "width", to=61))
    with pytest.raises(DataError, match="images/a.jpg: 60 x 40 pixels, the annotation 61 x 40"):
        read(root, "boxes.json")


def test_a_coco_file_of_a_gigabyte_may_be(root, monkeypatch):
    """And one above that is refused before it is read."""
    coco_file(root)
    with open(root / "boxes.json", "a") as file:
        file.truncate(10 ** 9)  # sparse
    opened = []
    monkeypatch.setattr(datasets.json, "loads", lambda *_, **__: opened.append(1) or coco())
    monkeypatch.setattr(Path, "read_bytes", lambda path: b"")
    assert read(root, "boxes.json")[0].ids == ["a", "b", "c"] and opened
    os.truncate(root / "boxes.json", 2 ** 30 + 1)
    with pytest.raises(DataError, match="boxes.json: 1073741825 bytes, too many"):
        read(root, "boxes.json")


# ---------------------------------------------------------------- python datasets.py check ROOT


@pytest.fixture
def check(tmp_path, monkeypatch, capsys):
    """python datasets.py check NAME, in tmp_path and in this process: (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(name="mine"):
        monkeypatch.setattr(sys, "argv", ["datasets.py", "check", name])
        with pytest.raises(SystemExit) as end:
            datasets.main()
        return end.value.code, *capsys.readouterr()

    return run


def settings_of(output):
    return yaml.safe_load(output[output.index("data:\n"):])["data"]


@pytest.mark.parametrize("form, names", [("voc", ["cat", "cow", "dog"]), ("yolo", CLASSES),
                                         ("coco", ["cow", "dog", "cat"])])  # by name, by classes.txt, by number
def test_check_finds_the_form_and_prints_settings_that_read_it(root, check, form, names):
    boxes = FORMS[form](root)
    Image.new("RGB", (10, 10)).save(root / "images/b.PNG")
    if form == "voc":
        (root / "Annotations/b.xml").write_text(VOC[0].format("").replace("60", "10").replace("40", "10"))
    if form == "coco":
        content = coco()
        content["images"][1] |= {"width": 10, "height": 10}
        (root / "boxes.json").write_text(json.dumps(content))
    status, output, error = check()
    assert status == 0 and error == ""
    lines = output.splitlines()
    assert lines[:5] == [f"mine: 3 images in images, boxes in {boxes}",
                         "smallest, median and largest image: 10 x 10, 60 x 40, 60 x 40", "images without boxes: 1",
                         # of image a 350 of 2,400 pixels are outside, 14.6 %
                         "images with at most 12.5% of background outside boxes: 0.0% (stage 1 pools them plainly)",
                         "boxes: 3"]
    assert sorted(line.split() for line in lines[5:8]) == [["1", "cat"], ["1", "cow"], ["1", "dog"]]
    assert "faults: 0" in lines
    data = settings_of(output)
    assert data == {"root": "mine", "images": "images", "boxes": boxes, "classes": names, "train": "all", "val": ""}
    (root.parent / "my.yaml").write_text(yaml.safe_dump({"data": data | {"root": str(root)}}))
    config = engine.configure("train_cls", [str(root.parent / "my.yaml")])
    assert [len(sample["boxes"]) for sample in engine.open_data(config, config.data.train)] == [2, 0, 1]


def test_check_counts_the_images_that_boxes_fill(root, check):
    voc(root)
    text = VOC[0].format(VOC[1].format("cat", 1, 1, 60, 35))  # exactly 12.5 % are left
    (root / "Annotations/c.xml").write_text(text)
    assert "outside boxes: 33.3% (" in check()[1]


@pytest.mark.parametrize("names, expected", [
    ("names: [cat, dog, cow]", CLASSES), ("train: x\nnames:\n  0: cat\n  1: dog\n  2: cow\n", CLASSES),
    ("names: {0: cat, 2: cow}", None), ("[" * 20_000, None), ("a: &a [cat]\nnames: *a", None), ("nc: 3", None),
    ("names: [0x" + "f" * 9000 + "]", None), ("names: [!!bool x]", None),
    ("", ["class0", "class1", "class2"])])
def test_check_reads_yolos_names(root, check, names, expected):
    yolo(root)
    (root / "classes.txt").unlink()
    if names:
        (root / "data.yaml").write_text(names)
    status, output, error = check()
    if expected:
        assert status == 0 and settings_of(output)["classes"] == expected
    else:
        assert status == 2 and error == "mine/data.yaml: no class names; write names: [FIRST, SECOND]\n"


def spoil_voc(root):
    voc(root)
    one, two = (VOC[1].format("cat", *box) for box in ((1, 1, 61, 9), (9, 9, 5, 9)))
    (root / "Annotations/a.xml").write_text(VOC[0].format(one + VOC[1].format("dog", 1, 1, 9, 9) + two))
    (root / "Annotations/b.xml").write_text("<annotation>")
    return ["Annotations/a.xml: box 1 1 61 9 leaves the image of 60 x 40 pixels; correct it",
            "Annotations/a.xml: box 9 9 5 9 has no area; correct it",
            "Annotations/b.xml: not an XML annotation (no element found: line 1, column 12); write it again"]


def spoil_yolo(root):
    yolo(root)
    (root / "labels/a.txt").write_text("0 .5 .5 .5\n1 .5 .5 .5 .5\n7 .5 .5 .5 .5\n")
    (root / "labels/b.txt").write_bytes(b"\xff")
    return ["labels/a.txt: line 1: 4 numbers, not the 5 of class cx cy w h; correct it",
            "labels/a.txt: line 3: class 7; data.classes has 0..2; correct one of them",
            "labels/b.txt: cannot read this annotation (UnicodeDecodeError); save it as UTF-8 text"]


def spoil_coco(root):
    content = coco()
    content["annotations"] += [{"image_id": 5, "category_id": 3, "bbox": [1, 1, 1, 1]},
                               {"image_id": 7, "category_id": 17, "bbox": [1, 1, 1]}]
    del content["images"][1]
    (root / "boxes.json").write_text(json.dumps(content))
    return ["boxes.json: annotations[3]: image_id 5 or category_id 3 is not in this file; correct it",
            "boxes.json: annotations[4]: bbox is [1, 1, 1], not [x, y, width, height]; correct it",
            "boxes.json: no image called 'b' in it; add it, or leave it out of the list"]


@pytest.mark.parametrize("spoil", [spoil_voc, spoil_yolo, spoil_coco])
def test_check_names_every_fault_at_once(root, check, spoil):
    faults = spoil(root)
    (root / "images/d.jpg").write_bytes(b"\xff\xd8broken")
    Image.new("RGB", (5, 5)).save(root / "images/a.png")
    upside_down = Image.Exif()
    upside_down[274] = 3
    Image.open(root / "images/c.webp").save(root / "images/c.webp", exif=upside_down)
    status, output, _ = check()
    assert status == 2
    lines = output.split("faults: ")[1].split("\n\n")[0].splitlines()
    assert int(lines[0]) == len(lines) - 1 and lines[1:] == sorted(lines[1:])
    assert {f"mine/{line}" for line in faults} < set(lines)
    rest = [line for line in lines[1:] if line not in {f"mine/{line}" for line in faults}]
    assert [line for line in rest if line.startswith("mine/images/a.png: a second image with the id a, beside a.jpg")]
    assert [line for line in rest if line.startswith("mine/images/c.webp: turned by its EXIF tag")]
    assert [line for line in rest if line.startswith("mine/images/d.jpg: broken image file")]
    assert len(rest) == 3 + (spoil is not spoil_yolo)  # and d has no annotation, which for YOLO is none at all


@pytest.mark.parametrize("spoil, words", [
    (lambda root: shutil.rmtree(root), "mine: no such folder"),
    (lambda root: shutil.rmtree(root / "images"), "mine: no images (.jpg .jpeg .png .bmp .webp) in JPEGImages"),
    (lambda root: None, "mine: 0 JSON files, and no ID.xml or ID.txt"),
    (lambda root: [(root / f"{name}.json").write_text("{}") for name in "ab"], "mine: 2 JSON files"),
    (lambda root: (root / "a.json").write_text("{"), "mine/a.json: not a JSON annotation"),
], ids=["no root", "no images", "no boxes", "two JSON files", "broken JSON"])
def test_check_says_in_a_line_what_it_does_not_find(root, check, spoil, words):
    spoil(root)
    status, output, error = check()
    assert status == 2 and output == "" and len(error.splitlines()) == 1
    assert error.startswith(words)


def test_check_takes_the_devkits_layout_and_files_side_by_side(tmp_path, check):
    datasets.make_shapes(tmp_path / "shapes", train=3, val=1)
    data = settings_of(check("shapes")[1])
    assert {key: data[key] for key in ("images", "boxes", "train", "val")} == {
        "images": "JPEGImages", "boxes": "Annotations", "train": "train", "val": "val"}
    images(tmp_path / "flat")
    yolo(tmp_path / "flat")
    for path in (tmp_path / "flat/labels").iterdir():
        path.rename(tmp_path / "flat" / path.name)
    data = settings_of(check("flat")[1])
    assert (data["images"], data["boxes"], data["classes"]) == (".", ".", CLASSES)


# ---------------------------------------------------------------- the walk through it


def test_every_line_of_the_settings_file_is_explained():
    path = ROOT / "configs/your_data.yaml"
    lines = [line for line in path.read_text().splitlines() if line.startswith(" ")]
    assert len(lines) > 30 and all("  # " in line for line in lines)
    engine.configure("train_cls", [str(path)])  # and known


def readme_commands():
    section = (ROOT / "docs/own_data.md").read_text().split("## Labels from elsewhere")[0]
    return [line for block in re.findall(r"```\n(.*?)```", section, re.S) for line in block.splitlines()
            if line.split()[0] in ("python", "cp")]


def small_set(root):
    """Four images of the shapes set, their boxes as one COCO file."""
    datasets.make_shapes(root.parent / "shapes", train=4, val=1)
    dataset = VOCDataset(root.parent / "shapes", "train", datasets.SHAPES)
    (root / "images").mkdir(parents=True)
    content = {"images": [], "annotations": [],
               "categories": [{"id": n, "name": name} for n, name in enumerate(datasets.SHAPES, 1)]}
    for n, sample in enumerate(dataset):
        shutil.copy(dataset.paths[sample["id"]], root / "images")
        height, width = sample["image"].shape[1:]
        content["images"].append({"id": n, "file_name": f"{sample['id']}.jpg", "width": width, "height": height})
        for (x0, y0, x1, y1), label in zip(sample["boxes"].tolist(), sample["labels"].tolist()):
            content["annotations"].append({"image_id": n, "category_id": label, "bbox": [x0, y0, x1 - x0, y1 - y0]})
    (root / "annotations").mkdir()
    (root / "annotations/boxes.json").write_text(json.dumps(content))


def test_the_commands_of_the_readme_run_as_they_stand(tmp_path, monkeypatch):
    small_set(tmp_path / "data/mine")
    for path in (*ROOT.glob("*.py"), ROOT / "configs"):
        (tmp_path / path.name).symlink_to(path)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    commands, output = readme_commands(), ""
    assert [command.split()[1] for command in commands] == [
        "datasets.py", "configs/your_data.yaml", "train_cls.py", "make_labels.py", "train_seg.py", "eval.py"]
    for command in commands:
        done = subprocess.run(command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, (command, done.stderr)
        output = output or done.stdout  # of the check
        if command.startswith("cp "):
            paste(tmp_path / "mine.yaml", output[output.index("data:\n"):])
    ids = [f"shapes_{n:05d}" for n in range(4)]
    for folder in ("labels/Ycrf", "labels/Yret", "predictions/plain"):
        assert sorted(path.stem for path in (tmp_path / "runs/dry" / folder).glob("*.png")) == ids
    assert "labels of 4 images; no true masks" in done.stdout
    boxes = np.array(Image.open(tmp_path / "runs/dry/panels.png"))[:, :186]
    palette = datasets.palette()[1:7]
    assert (boxes[..., None, :] == palette).all(3).any()  # COCO's boxes are drawn
    monkeypatch.chdir(tmp_path)
    with pytest.raises(engine.UsageError, match="eval.split: no list to work on; set data.val, eval.split or eval.im"):
        evaluation.main(engine.configure("eval", ["mine.yaml", "run.name=dry"]))


def paste(path, section):
    """The section `data` in place of the file's, as docs/own_data.md asks for."""
    text = path.read_text()
    start, end = text.index("data:"), text.index("train_cls:")
    path.write_text(text[:start] + section.strip() + "\n" + text[end:])
