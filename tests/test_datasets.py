"""datasets.py: what it reads, what it refuses, and that image, boxes and
masks of a sample stay together."""
import errno
import os
import pickle

import numpy as np
import pytest
import torch
from conftest import SHARED
from PIL import Image
from torchvision import tv_tensors

import datasets
from datasets import DataError, Stream, VOCDataset, collate

training_transform = datasets.training_transform
CLASSES = ["cat", "dog", "cow"]
FILL = 10, 200, 30
SIDES = "xmin", "ymin", "xmax", "ymax"
LIST = "ImageSets/Segmentation/train.txt"
IMAGE, XML = "JPEGImages/a.jpg", "Annotations/a.xml"
MASKS = "SegmentationClassAug"
MASK = f"{MASKS}/a.png"


def xml(objects, size=(40, 60), extra=""):
    """Objects (name, xmin, ymin, xmax, ymax); size (height, width)."""
    text = "<annotation>"
    if size:
        text += (f"<size><width>{size[1]}</width>"
                 f"<height>{size[0]}</height></size>")
    for name, *box in objects:
        sides = "".join(f"<{k}>{v}</{k}>" for k, v in zip(SIDES, box))
        text += (f"<object><name>{name}</name>{extra}"
                 f"<bndbox>{sides}</bndbox></object>")
    return text + "</annotation>"


def add(root, name, objects, size=(40, 60)):
    rng = np.random.default_rng(len(objects))
    pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(root / f"JPEGImages/{name}.jpg")
    path = root / f"Annotations/{name}.xml"
    path.write_text(xml(objects, size))
    path = root / MASKS / f"{name}.png"
    datasets.write_mask(path, np.zeros(size))


@pytest.fixture
def small(tmp_path):
    """Three images: two boxes that overlap, none, one of a pixel."""
    root = tmp_path / "voc"
    for folder in ("JPEGImages", "Annotations", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    add(root, "a", [("cat", 1, 1, 10, 20), ("dog", 6, 11, 60, 40)])
    add(root, "b", [], (50, 30))
    add(root, "c", [("cat", 5, 5, 5, 5)])
    (root / LIST).write_text("a\nb\n\nc\n")
    return root


def read_all(root, **settings):
    settings = {"masks": [MASKS]} | settings
    dataset = VOCDataset(root, "train", CLASSES, **settings)
    return dataset, [dataset[i] for i in range(len(dataset))]


# ---- reading ----

def test_a_sample_holds_what_the_docstring_says(small):
    dataset, (a, b, c) = read_all(small)
    assert dataset.ids == ["a", "b", "c"] and len(dataset) == 3
    assert dataset.classes == CLASSES and a["id"] == "a"
    assert isinstance(a["image"], tv_tensors.Image)
    pixels = np.array(Image.open(small / IMAGE))
    assert np.array_equal(a["image"].permute(1, 2, 0), pixels)
    assert isinstance(a["boxes"], tv_tensors.BoundingBoxes)
    assert a["boxes"].canvas_size == (40, 60)
    # 1-based and inclusive -> continuous, the end exclusive.
    assert a["boxes"].tolist() == [[0, 0, 10, 20], [5, 10, 60, 40]]
    assert a["boxes"].dtype == torch.float32
    assert a["labels"].tolist() == [1, 2]
    assert a["labels"].dtype == torch.int64
    assert b["boxes"].shape == (0, 4) and b["labels"].shape == (0,)
    assert b["background"].all() and b["background"].shape == (1, 50, 30)
    assert c["boxes"].tolist() == [[4, 4, 5, 5]]
    assert (c["background"] == 0).sum() == 1
    assert c["background"][0, 4, 4] == 0
    assert isinstance(a["masks"], tv_tensors.Mask)
    assert a["masks"].shape == (1, 40, 60)


def test_a_samples_tensors_are_its_own(small):
    dataset, (a, *_) = read_all(small)
    a["boxes"] += 1
    a["labels"] += 1
    assert dataset[0]["boxes"].tolist() == [[0, 0, 10, 20], [5, 10, 60, 40]]
    assert dataset[0]["labels"].tolist() == [1, 2]


def test_background_is_what_no_box_touches(small):
    for sample in read_all(small)[1]:
        boxes = sample["boxes"].tolist()
        _, height, width = sample["image"].shape
        for y in range(height):
            for x in range(width):
                inside = any(x0 <= x < x1 and y0 <= y < y1
                             for x0, y0, x1, y1 in boxes)
                assert sample["background"][0, y, x] == (not inside)


def test_parts_are_left_out_on_request(small):
    (small / XML).unlink()
    dataset, (sample, *_) = read_all(small, boxes=False)
    assert set(sample) == {"id", "image", "masks"}
    assert dataset.annotations is None
    _, (sample, *_) = read_all(small, boxes=False, masks=())
    assert set(sample) == {"id", "image"}


def write_masks(folder, names, value):
    for name in names:
        size = (50, 30) if name == "b" else (40, 60)
        path = folder / f"{name}.png"
        datasets.write_mask(path, np.full(size, value))


def test_masks_stack_from_relative_and_absolute_folders(small, tmp_path):
    write_masks(tmp_path / "elsewhere", "abc", 3)
    folders = [MASKS, tmp_path / "elsewhere"]
    mask = read_all(small, masks=folders)[1][0]["masks"]
    assert mask.shape == (2, 40, 60)
    assert mask.amax((1, 2)).tolist() == [0, 3]


def test_exact_ids_read_the_truth_in_place_of_labels(small, tmp_path):
    folders = [tmp_path / "Ycrf", tmp_path / "Yret"]
    write_masks(folders[0], "ac", 1)  # b needs no labels
    write_masks(folders[1], "ac", 2)
    write_masks(small / MASKS, "b", 3)
    dataset, samples = read_all(
        small, masks=folders, truth=MASKS, exact=["b"])
    found = [s["masks"].flatten(1).amax(1).tolist() for s in samples]
    assert found == [[1, 2], [3, 3], [1, 2]]
    assert dataset.mask_paths("a") == [f / "a.png" for f in folders]
    assert dataset.mask_paths("b") == [small / f"{MASKS}/b.png"] * 2
    with pytest.raises(DataError, match="b.png: no such mask"):
        read_all(small, masks=folders)


def test_scored_leaves_out_images_without_a_png(small, tmp_path):
    write_masks(tmp_path / "truth", "ca", 0)
    write_masks(small / "truth", "b", 0)
    for folder, ids in (tmp_path / "truth", ["a", "c"]), ("truth", ["b"]):  # absolute, and under root
        dataset, _ = read_all(small, scored=folder)
        assert dataset.ids == list(dataset.annotations) == ids


def test_an_objects_parts_are_not_objects(tmp_path):
    part = xml([("head", 2, 2, 3, 3)], None)
    part = part.split("<object>")[1].split("</object>")[0]
    extra = f"<part>{part}</part>"
    path = tmp_path / "a.xml"
    path.write_text(xml([("dog", 11, 12, 20, 30)], extra=extra))
    boxes, labels, size = datasets.read_annotation(path, CLASSES)
    assert boxes.tolist() == [[10, 11, 20, 30]]
    assert labels.tolist() == [2] and size == (40, 60)


def test_difficult_truncated_and_fractional_boxes_count(tmp_path):
    flags = "<truncated>1</truncated><difficult>1</difficult>"
    path = tmp_path / "a.xml"
    # A 0 is the edge, as a 1 is.
    path.write_text(xml([("dog", 1.5, 0, "60.0", 39.25)], extra=flags))
    boxes, _, _ = datasets.read_annotation(path, CLASSES)
    assert boxes.tolist() == [[0.5, 0, 60, 39.25]]


def test_images_may_end_in_jpg_jpeg_or_png_in_any_case(small):
    folder = small / "JPEGImages"
    a, b, c = folder / "a.JPG", folder / "b.jpeg", folder / "c.Png"
    (folder / "a.jpg").rename(a)
    (folder / "b.jpg").rename(b)
    Image.open(folder / "c.jpg").save(c)
    (folder / "c.jpg").unlink()
    (folder / "b.txt").write_text("no image")
    (folder / "d.PNG").write_text("not in the list")
    expected = {"a": a, "b": b, "c": c}
    assert datasets.find_images(small, "train") == expected
    assert list(datasets.find_images(small, "train")) == ["a", "b", "c"]
    assert len(read_all(small)[1]) == 3
    Image.open(c).save(folder / "c.jpg")  # the devkit's ending goes first
    expected["c"] = folder / "c.jpg"
    assert datasets.find_images(small, "train") == expected


def test_photographs_of_phones_are_read(tmp_path):
    pytest.importorskip("pillow_heif", reason="needs pillow-heif")
    pixels = np.full((40, 60, 3), (200, 90, 30), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.HEIC", quality=95)
    assert np.abs(datasets.read_image(tmp_path / "a.HEIC").astype(int) - pixels).max() < 9


def test_a_list_may_come_from_windows(small):
    text = "\ufeffa\r\nc \r\n\r\n"
    (small / LIST).write_bytes(text.encode())
    assert datasets.read_list(small, "train") == ["a", "c"]


def test_a_bare_name_is_segmentations_list_then_mains(small):
    main = small / "ImageSets/Main"
    main.mkdir()
    (main / "train.txt").write_text("c\na\n")
    (main / "own.txt").write_text("c\n")
    for name in ("train", "Segmentation/train"):
        assert datasets.list_path(small, name) == small / LIST
        assert datasets.read_list(small, name) == ["a", "b", "c"]
    assert datasets.read_list(small, "Main/train") == ["c", "a"]
    assert datasets.read_list(small, "own") == ["c"]
    with pytest.raises(DataError, match="Segmentation/none.txt: no such"):
        datasets.read_list(small, "none")


# ---- refusing ----

def text(path, content):
    return lambda root: (root / path).write_text(content)


def remove(path):
    return lambda root: (root / path).unlink()


def cut(path):
    def spoil(root):
        content = (root / path).read_bytes()
        (root / path).write_bytes(content[:-60])
    return spoil


def mask(array):
    return lambda root: Image.fromarray(array).save(root / MASK)


def box(*sides, name="dog", size=(40, 60)):
    return text(XML, xml([(name, *sides)], size))


NO_NAME = xml([]).replace("</ann", "<object/></ann")
NO_NUMBER = "not a number"
FAULTS = {  # what is done to the folder, words that the message has
    "no list": (remove(LIST), "train.txt: no such list"),
    "empty list": (text(LIST, "\n \n"), "train.txt: an empty list"),
    "id twice": (text(LIST, "a\nb\na\n"), "train.txt: 'a'", "2 times"),
    "no image": (remove(IMAGE), "a.jpg: no such image (1 of 3"),
    "cut image": (cut(IMAGE), "a.jpg: broken", "truncated"),
    "no image at all": (text(IMAGE, "hello"), "a.jpg: broken"),
    "no XML": (remove(XML), "a.xml: no such annotation (1 of 3"),
    "cut XML": (cut(XML), "a.xml: not XML"),
    "unknown encoding": (
        text(XML, "<?xml version='1.0' encoding='x-no'?><a/>"), "not XML"),
    "no size": (box(1, 1, 9, 9, size=None), "a.xml: <size/height> is ''",
                "tools/own_data.py"),
    "size 0": (box(1, 1, 9, 9, size=(40, 0)), "<size/width> is '0'",
               "tools/own_data.py"),
    "size no number": (box(1, 1, 9, 9, size=("big", 60)), "is 'big'"),
    "no box": (text(XML, xml([("dog",)])), "a.xml: <bndbox/xmin>"),
    "no ymax": (box(1, 1, 9), "a.xml: <bndbox/ymax> is ''"),
    "side no number": (box(1, 1, "x", 9), "<bndbox/xmax> is 'x'"),
    "side NaN": (box(1, "nan", 9, 9), "<bndbox/ymin>", NO_NUMBER),
    "side infinite": (box(1, 1, 9, "inf"), "<bndbox/ymax>", NO_NUMBER),
    "box turned round": (box(9, 1, 5, 9), "box 9 1 5 9 has no area"),
    "box without area": (box(1, 9, 9, 8), "box 1 9 9 8 has no area"),
    "box of two edges": (box(0, 1, 0, 9), "box 0 1 0 9 has no area"),
    "box left of it": (box(-1, 1, 9, 9), "<bndbox/xmin> is '-1'"),
    "box right of it": (box(1, 1, 61, 9), "box 1 1 61 9", "60 x 40"),
    "box below it": (box(1, 1, 9, 41), "box 1 1 9 41", "60 x 40"),
    "class unknown": (box(1, 1, 9, 9, name="dogs"),
                      "a.xml: class 'dogs'", "nearest is 'dog'"),
    "no class": (text(XML, NO_NAME), "a.xml: class ''"),
    "other image's XML": (box(1, 1, 9, 9, size=(60, 40)),
                          "a.xml", "(60, 40)", "(40, 60)"),
    "no mask": (remove(MASK), "a.png: no such mask (1 of 3"),
    "cut mask": (cut(MASK), "a.png: broken"),
    "other image's mask": (mask(np.zeros((60, 40), np.uint8)),
                           "a.png", "(60, 40)", "(40, 60)"),
    "colours": (mask(np.zeros((40, 60, 3), np.uint8)), "a.png: RGB"),
    "black and white": (mask(np.zeros((40, 60), bool)), "a.png: 1; save a"),
    "see-through": (mask(np.zeros((40, 60, 4), np.uint8)), "a.png: RGBA; save"),
    "label unknown": (mask(np.full((40, 60), 4, np.uint8)),
                      "a.png: label 4", "0..3"),
    "label 254": (mask(np.full((40, 60), 254, np.uint8)), "label 254"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_one_line_that_names_the_file(small, name):
    spoil, *words = FAULTS[name]
    spoil(small)
    with pytest.raises(DataError) as caught:
        read_all(small)
    message = str(caught.value)
    assert "\n" not in message and str(small) in message
    assert all(word in message for word in words), message


def test_faults_outside_the_pixels_end_the_construction(small):
    box(1, 1, 61, 9)(small)
    with pytest.raises(DataError, match="a.xml"):
        VOCDataset(small, "train", CLASSES)


@pytest.mark.parametrize("classes", [
    [], ["cat", "dog", "cat"], [str(k) for k in range(255)],
    ["background", "cat"]])
def test_class_lists_that_cannot_be(small, classes):
    with pytest.raises(DataError, match="^data.classes: needs 1 to 254 different names"):
        VOCDataset(small, "train", classes)


def test_a_missing_root_says_how_to_get_one(tmp_path):
    with pytest.raises(DataError) as caught:
        VOCDataset(tmp_path / "nowhere", "train", CLASSES)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}/nowhere: no such folder")
    assert "python tools/download_voc.py YEAR DIR" in message
    assert "python tools/shapes.py DIR" in message


def test_a_single_file_that_is_missing(tmp_path):
    path = tmp_path / "gone"
    with pytest.raises(DataError, match="gone: no such image"):
        datasets.read_image(path)
    with pytest.raises(DataError, match="gone: no such image"):
        datasets.read_mask(path, 4)
    with pytest.raises(DataError, match="gone: no such annotation"):
        datasets.read_annotation(path, CLASSES)


def test_the_machines_faults_are_pythons_own(small, monkeypatch):
    error = OSError(errno.EIO, "Input/output error", "a.jpg")

    def fail(*_):
        raise error

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(OSError) as caught:
        datasets.read_image(small / IMAGE)
    assert caught.value is error


def test_damaged_files_raise_nothing_but_data_error(small):
    rng = np.random.default_rng(0)
    for path in (small / IMAGE, small / MASK, small / XML):
        whole, refused = path.read_bytes(), 0
        for _ in range(60):
            damaged = bytearray(whole)
            for place in rng.integers(0, len(whole), 4):
                damaged[place] = rng.integers(256)
            path.write_bytes(damaged)
            try:
                read_all(small)
            except DataError as error:
                refused += 1
                assert "\n" not in str(error)
        path.write_bytes(whole)
        assert refused > 5


# ---- masks ----

def test_palette_is_vocs():
    colours = datasets.palette()
    assert colours.shape == (256, 3) and colours.dtype == np.uint8
    known = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 8: (64, 0, 0),
             15: (192, 128, 128), 20: (0, 64, 128), 255: (224, 224, 192)}
    for label, colour in known.items():
        assert tuple(colours[label]) == colour


def test_palette_and_grey_masks_are_read_alike(tmp_path):
    labels = np.array([[0, 1, 3], [255, 3, 0]], np.uint8)
    path = tmp_path / "new/folder/a.png"
    datasets.write_mask(path, labels)
    image = Image.open(path)
    assert image.mode == "P" and np.array_equal(image, labels)
    colours = np.array([image.getpalette()]).reshape(-1, 3)
    assert colours[3].tolist() == [128, 128, 0]
    assert os.listdir(path.parent) == ["a.png"]
    Image.fromarray(labels).save(tmp_path / "grey.png")
    for file in (path, tmp_path / "grey.png"):
        found = datasets.read_mask(file, 4)
        assert np.array_equal(found, labels) and found.dtype == np.uint8


# ---- augmentation ----

def painted(height=90, width=120, box=(30, 20, 70, 65)):
    """A grey image with one dark rectangle; all else says where it is."""
    x0, y0, x1, y1 = box
    label = torch.zeros(1, height, width, dtype=torch.uint8)
    label[:, y0:y1, x0:x1] = 2
    image = torch.where(label > 0, 20, 220).to(torch.uint8)
    boxes = tv_tensors.BoundingBoxes(
        torch.tensor([[*box]], dtype=torch.float32), format="XYXY",
        canvas_size=(height, width))
    background = (label == 0).to(torch.uint8)
    return {"id": "x", "image": tv_tensors.Image(image.repeat(3, 1, 1)),
            "boxes": boxes, "labels": torch.tensor([2]),
            "masks": tv_tensors.Mask(label),
            "background": tv_tensors.Mask(background)}


def extent(mask):
    y, x = torch.nonzero(mask, as_tuple=True)
    sides = [x.min(), y.min(), x.max() + 1, y.max() + 1]
    return torch.stack(sides).float()


def test_image_boxes_and_masks_stay_together():
    transform = training_transform(100, (220, 220, 220), jitter=0)
    seen, flips = 0, set()
    for seed in range(60):
        torch.manual_seed(seed)
        sample = transform(painted(box=(5, 20, 45, 65)))
        assert sample["image"].shape == (3, 100, 100)
        assert sample["image"].dtype == torch.uint8
        assert sample["boxes"].canvas_size == (100, 100)
        assert len(sample["boxes"]) == len(sample["labels"])
        dark = sample["image"][0] < 120
        labelled = sample["masks"][0] == 2
        assert torch.equal(labelled, sample["background"][0] == 0)
        if not len(sample["boxes"]):
            continue
        seen += 1
        box = sample["boxes"][0]
        flips.add(bool(box[0] > 60))
        assert sample["id"] == "x" and sample["labels"].tolist() == [2]
        assert (extent(labelled) - box).abs().max() <= 1
        assert (extent(dark) - box).abs().max() <= 1.5
    assert seen > 40 and flips == {False, True}


def test_padding_has_the_fill_colour_and_is_never_background():
    transform = training_transform(150, FILL, scale=(0.5, 0.5), jitter=0)
    torch.manual_seed(0)
    sample = transform(painted())
    padding = sample["masks"][0] == 255
    assert padding.sum() == 150 * 150 - 45 * 60
    assert torch.equal(sample["background"][0] == 255, padding)
    colours = sample["image"][:, padding]
    assert (colours == torch.tensor(FILL)[:, None]).all()
    assert not collate([sample])["background"][0, 0][padding].any()


def test_an_image_smaller_than_the_crop_lies_in_its_middle():
    # 90 x 120 becomes 45 x 60.
    transform = training_transform(150, FILL, scale=(0.5, 0.5), jitter=0)
    for seed in range(5):
        torch.manual_seed(seed)
        inside = transform(painted())["masks"][0] != 255
        assert extent(inside).tolist() == [45, 52, 105, 97]


def test_the_scale_covers_its_range_and_reaches_the_boxes():
    transform = training_transform(200, FILL, jitter=0)
    scales = []
    for seed in range(80):
        torch.manual_seed(seed)
        x0, _, x1, _ = transform(painted())["boxes"][0].tolist()
        scales.append((x1 - x0) / 40)
    assert 0.45 < min(scales) < 0.6 and 1.4 < max(scales) < 1.55
    assert 0.9 < np.mean(scales) < 1.1
    dot = {"image": tv_tensors.Image(torch.zeros(3, 1, 1))}
    dot = datasets.random_scale(dot, (0.4, 0.4))
    assert dot["image"].shape == (3, 1, 1)


def test_jitter_changes_colours_only():
    torch.manual_seed(3)
    plain = training_transform(100, FILL, (1, 1), jitter=0)(painted())
    torch.manual_seed(3)
    sample = training_transform(100, FILL, (1, 1))(painted())
    assert not torch.equal(sample["image"], plain["image"])
    for key in ("boxes", "labels", "masks", "background"):
        assert torch.equal(sample[key], plain[key])


def test_jitter_is_brightness_then_contrast_then_saturation():
    steps = training_transform(9, FILL, jitter=0.3).transforms[-3:]
    found = [(step.brightness, step.contrast, step.saturation) for step in steps]
    share = pytest.approx((0.7, 1.3))
    assert found == [(share, None, None), (None, share, None), (None, None, share)]


def test_the_crop_may_lie_anywhere():
    y, x = torch.meshgrid(torch.arange(12), torch.arange(14), indexing="ij")
    image = tv_tensors.Image(torch.stack([y, x, x]).byte())
    transform, corners = training_transform(9, FILL, (1, 1), jitter=0), set()
    for seed in range(400):
        torch.manual_seed(seed)
        crop = transform({"image": image})["image"]
        corners.add((crop[0].min().item(), crop[1].min().item()))
    assert corners == {(y, x) for y in range(4) for x in range(6)}


def test_scaling_takes_pixels_as_opencv_does():
    """At 1/3 each new pixel is the middle one of three, not their mean."""
    image = ((torch.arange(27) % 3 == 1).byte() * 255).expand(3, 9, 27)
    scaled = datasets.random_scale({"image": tv_tensors.Image(image)}, (1 / 3, 1 / 3))
    assert scaled["image"].shape == (3, 3, 9) and (scaled["image"] > 250).all()


def test_boxes_under_a_pixel_go_with_their_labels():
    sample = painted()
    boxes = torch.tensor([[10, 10, 10.9, 40], [10, 10, 11, 40],
                          [-5, 3, 0.5, 9], [90, 80, 130, 99.0]])
    sample["boxes"] = tv_tensors.wrap(boxes, like=sample["boxes"])
    sample["labels"] = torch.tensor([1, 2, 3, 4])
    kept = datasets.drop_thin_boxes(sample)
    assert kept["labels"].tolist() == [2, 4]
    expected = [[10, 10, 11, 40], [90, 80, 120, 90]]
    assert kept["boxes"].tolist() == expected
    assert isinstance(kept["boxes"], tv_tensors.BoundingBoxes)


@pytest.mark.parametrize("boxes", [True, False])
@pytest.mark.parametrize("masks", [(), [MASKS], [MASKS, MASKS]])
def test_a_batch_has_what_its_samples_have(small, boxes, masks):
    transform = training_transform(32, FILL)
    _, samples = read_all(
        small, transform=transform, boxes=boxes, masks=masks)
    batch = collate(samples)
    keys = {"id", "image"} | ({"masks"} if masks else set())
    if boxes:
        keys |= {"boxes", "labels", "background"}
    assert set(batch) == keys and batch["id"] == ["a", "b", "c"]
    assert batch["image"].shape == (3, 3, 32, 32)
    for key in keys & {"image", "masks", "background"}:
        assert type(batch[key]) is torch.Tensor
        assert batch[key].dtype == torch.uint8
    if masks:
        assert batch["masks"].shape == (3, len(masks), 32, 32)
    if boxes:
        for found, labels in zip(batch["boxes"], batch["labels"]):
            assert type(found) is torch.Tensor
            assert found.shape == (len(labels), 4)
        assert batch["background"].shape == (3, 1, 32, 32)
        assert batch["background"].max() <= 1


# ---- streams ----

def same(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor)
        else a[k] == b[k] for k in a)


def test_a_stream_depends_on_seed_and_k_alone(small):
    dataset, _ = read_all(small, transform=training_transform(32, FILL))
    stream, before = Stream(dataset, 12, seed=1), torch.get_rng_state()
    straight = [stream[k] for k in range(12)]
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(99)
    longer = Stream(dataset, 40, seed=1)
    for k in (7, 11, 0):
        assert same(straight[k], longer[k])
    for workers in (0, 2):
        loader = torch.utils.data.DataLoader(
            stream, batch_size=None, num_workers=workers)
        assert all(same(a, b) for a, b in zip(straight, loader))
    other = Stream(dataset, 12, seed=2)
    assert not all(same(straight[k], other[k]) for k in range(12))
    other.order = stream.order  # the same images, augmented otherwise
    assert not any(same(straight[k], other[k]) for k in range(12))
    # The same image is augmented in another way each time.
    images = [s["image"] for s in straight if s["id"] == "a"]
    assert len({image.sum().item() for image in images}) == 4


def test_a_stream_goes_through_whole_epochs():
    order = Stream(range(7), 24, seed=0).order
    assert len(order) == 24
    for start in (0, 7, 14):
        assert sorted(order[start:start + 7]) == list(range(7))
    assert order[:7] != order[7:14]
    assert Stream(range(7), 100, seed=0).order[:24] == order


def test_a_weighted_stream_draws_in_proportion():
    weights = torch.tensor([1.0, 0, 3])
    order = Stream(range(3), 4000, 0, weights).order
    shares = np.bincount(order, minlength=3) / 4000
    assert np.abs(shares - [0.25, 0, 0.75]).max() < 0.03
    assert Stream(range(3), 50, 0, weights).order == order[:50]


def test_balance_weights_are_the_literal_counts(small):
    add(small, "d", [("cat", 1, 1, 9, 9), ("cat", 2, 2, 8, 8),
                     ("cow", 3, 3, 9, 9)])
    add(small, "e", [("cow", 1, 1, 9, 9)])
    (small / LIST).write_text("a\nb\nc\nd\ne\n")
    dataset = VOCDataset(small, "train", CLASSES)
    # cat in a, c, d; dog in a; cow in d, e; nothing in b
    expected = [1, (1 + 1 / 3 + 1 / 2 + 1 / 2) / 4, 1 / 3, 1 / 2, 1 / 2]
    weights = datasets.balance_weights(dataset).tolist()
    assert weights == pytest.approx(expected)
    (small / LIST).write_text("b\n")
    dataset = VOCDataset(small, "train", CLASSES)
    assert datasets.balance_weights(dataset).tolist() == [1]


def test_a_stream_can_be_sent_to_spawned_workers(small):
    dataset, _ = read_all(small, transform=training_transform(32, FILL))
    stream = Stream(dataset, 3, seed=0)
    sent = pickle.loads(pickle.dumps(stream))
    assert all(same(sent[k], stream[k]) for k in range(3))


# ---- VOC 2007 itself ----

VOC = SHARED / "voc2007"
needs_voc = pytest.mark.skipif(
    not VOC.is_dir(), reason="needs VOC 2007 at ../shared/voc2007")


@needs_voc
def test_annotations_of_voc_2007():
    dataset = VOCDataset(VOC, "Main/train", datasets.VOC_CLASSES)
    assert len(dataset) == 2501
    labels = torch.cat([torch.tensor(found) for _, found in dataset.annotations.values()])
    counts = torch.bincount(labels, minlength=21)
    assert counts[0] == 0 and counts.sum() == 7844
    assert counts[6] == 131 and counts[15] == 2705  # bus, person
    boxes, labels = dataset.annotations["000017"]
    expected = [[184, 61, 279, 199], [89, 77, 403, 336]]
    assert boxes.tolist() == expected and labels.tolist() == [15, 13]


@needs_voc
def test_masks_of_voc_2007():
    dataset = VOCDataset(VOC, "train", datasets.VOC_CLASSES,
                         training_transform(321, (123, 117, 104)),
                         masks=["SegmentationClass"])
    assert len(dataset) == 209
    index = dataset.ids.index("000032")  # an aeroplane and a person
    mask = dataset[index]["masks"]
    assert set(mask.unique().tolist()) <= {0, 1, 15, 255}
    stream = Stream(dataset, 4, seed=0)
    batch = collate([stream[k] for k in range(4)])
    assert batch["image"].shape == (4, 3, 321, 321)
    assert batch["masks"].shape == (4, 1, 321, 321)


# ---- writing ----

def test_write_is_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "file"
    datasets.write(path, b"first")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        datasets.write(path, b"second")
    assert caught.value.filename == str(path)
    assert caught.value.errno == errno.ENOSPC
    assert path.read_bytes() == b"first"
    assert os.listdir(path.parent) == ["file"]


def test_write_reaches_the_disk_before_its_name(tmp_path, monkeypatch):
    """fsync, then rename, both of a name that no other process uses."""
    calls, fsync, replace = [], os.fsync, os.replace

    def synced(file):
        calls.append(os.readlink(f"/proc/self/fd/{file}"))
        fsync(file)

    def renamed(old, new):
        calls.append(f"{old} -> {new}")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    datasets.write(tmp_path / "file", b"content")
    temporary = f"{tmp_path}/.file.{os.getpid()}.tmp"
    assert calls == [temporary, f"{temporary} -> {tmp_path}/file"]


def test_a_folder_that_a_process_of_the_same_number_left(tmp_path):
    """As in containers, where it may be 1 each time."""
    left = tmp_path / f".OUT.{os.getpid()}.tmp"
    (left / "old").mkdir(parents=True)
    with datasets.temporary_folder(tmp_path / "OUT") as folder:
        assert not any(folder.iterdir())


def test_scaling_is_bilinear():
    image = tv_tensors.Image(torch.tensor([[[0, 200]]], dtype=torch.uint8))
    assert datasets.random_scale({"image": image}, (2, 2))["image"][0].tolist() == [[0, 50, 150, 200]] * 2


def test_half_of_the_crops_are_mirrored():
    image = tv_tensors.Image(torch.tensor([[[0, 255]]], dtype=torch.uint8).expand(3, 9, 2).contiguous())
    transform, mirrored = training_transform(9, (99, 99, 99), (1, 1), jitter=0), 0
    for seed in range(400):
        torch.manual_seed(seed)
        row = transform({"image": image})["image"][0, 4].tolist()
        mirrored += row.index(255) < row.index(0)
    assert 160 < mirrored < 240
