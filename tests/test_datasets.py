"""datasets.py: what it reads, what it refuses, and that image, boxes and masks stay together."""
import errno
import hashlib
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

import datasets
from datasets import DataError, Stream, VOCDataset, collate, training_transform

ROOT = Path(__file__).resolve().parents[1]
CLASSES = ["cat", "dog", "cow"]
FILL = (10, 200, 30)


def xml(objects, size=(40, 60), extra=""):
    """Objects: (name, xmin, ymin, xmax, ymax); size: (height, width) or None."""
    text = "<annotation>"
    if size:
        text += f"<size><width>{size[1]}</width><height>{size[0]}</height><depth>3</depth></size>"
    for name, *box in objects:
        sides = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box))
        text += f"<object><name>{name}</name>{extra}<bndbox>{sides}</bndbox></object>"
    return text + "</annotation>"


def add(root, name, objects, size=(40, 60), mask=None):
    rng = np.random.default_rng(len(name) + len(objects))
    image = Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
    image.save(root / "JPEGImages" / f"{name}.jpg", quality=95)
    (root / "Annotations" / f"{name}.xml").write_text(xml(objects, size))
    mask = np.zeros(size, np.uint8) if mask is None else mask
    datasets.write_mask(root / "SegmentationClassAug" / f"{name}.png", mask)


@pytest.fixture
def small(tmp_path):
    """Three images: two boxes that overlap, none, one."""
    root = tmp_path / "voc"
    for folder in ("JPEGImages", "Annotations", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    add(root, "a", [("cat", 1, 1, 10, 20), ("dog", 6, 11, 60, 40)])
    add(root, "b", [], (50, 30))
    add(root, "c", [("cat", 5, 5, 5, 5)])
    (root / "ImageSets/Segmentation/train.txt").write_text("a\nb\n\nc\n")
    return root


def read_all(root, **settings):
    settings = {"masks": ["SegmentationClassAug"]} | settings
    dataset = VOCDataset(root, "train", CLASSES, **settings)
    return dataset, [dataset[i] for i in range(len(dataset))]


# ------------------------------------------------------------------------------------------- reading

def test_a_sample_holds_what_the_docstring_says(small):
    dataset, (a, b, c) = read_all(small)
    assert dataset.ids == ["a", "b", "c"] and len(dataset) == 3 and dataset.classes == CLASSES
    assert a["id"] == "a"
    assert isinstance(a["image"], tv_tensors.Image) and a["image"].dtype == torch.uint8
    assert a["image"].shape == (3, 40, 60)
    assert np.array_equal(a["image"].permute(1, 2, 0), datasets.read_image(small / "JPEGImages/a.jpg"))
    assert isinstance(a["boxes"], tv_tensors.BoundingBoxes) and a["boxes"].canvas_size == (40, 60)
    # 1-based and inclusive -> continuous, the end exclusive.
    assert a["boxes"].tolist() == [[0, 0, 10, 20], [5, 10, 60, 40]] and a["boxes"].dtype == torch.float32
    assert a["labels"].tolist() == [1, 2] and a["labels"].dtype == torch.int64
    assert b["boxes"].shape == (0, 4) and b["labels"].shape == (0,) and b["background"].all()
    assert c["boxes"].tolist() == [[4, 4, 5, 5]] and (c["background"] == 0).sum() == 1
    assert isinstance(a["masks"], tv_tensors.Mask) and a["masks"].shape == (1, 40, 60)


def test_background_is_the_union_of_the_boxes_pixel_by_pixel(small):
    for sample in read_all(small)[1]:
        _, height, width = sample["image"].shape
        for y in range(height):
            for x in range(width):
                inside = any(x0 <= x < x1 and y0 <= y < y1 for x0, y0, x1, y1 in sample["boxes"].tolist())
                assert sample["background"][0, y, x] == (not inside)


def test_parts_are_left_out_on_request(small):
    for path in (small / "Annotations").iterdir():
        path.rename(path.with_suffix(".txt"))
    dataset, samples = read_all(small, boxes=None)
    assert set(samples[0]) == {"id", "image", "masks"} and dataset.annotations is None
    assert set(read_all(small, boxes=None, masks=())[1][0]) == {"id", "image"}


def test_masks_stack_in_order_from_relative_and_absolute_folders(small, tmp_path):
    for name, size in (("a", (40, 60)), ("b", (50, 30)), ("c", (40, 60))):
        datasets.write_mask(tmp_path / f"elsewhere/{name}.png", np.full(size, 3))
    sample = read_all(small, masks=["SegmentationClassAug", tmp_path / "elsewhere"])[1][0]
    assert sample["masks"].shape == (2, 40, 60) and sample["masks"].amax((1, 2)).tolist() == [0, 3]


def test_exact_ids_read_the_truth_in_place_of_their_labels(small, tmp_path):
    for kind, value in (("Ycrf", 1), ("Yret", 2)):
        for name, size in (("a", (40, 60)), ("c", (40, 60))):  # b, whose truth is known, needs no labels
            datasets.write_mask(tmp_path / kind / f"{name}.png", np.full(size, value))
    datasets.write_mask(small / "SegmentationClassAug/b.png", np.full((50, 30), 3))
    labels = [tmp_path / "Ycrf", tmp_path / "Yret"]
    _, samples = read_all(small, masks=labels, truth="SegmentationClassAug", exact=["b"])
    assert [sample["masks"].flatten(1).amax(1).tolist() for sample in samples] == [[1, 2], [3, 3], [1, 2]]
    with pytest.raises(DataError, match="b.png: no such mask"):
        read_all(small, masks=labels)


def test_an_objects_parts_are_not_objects(tmp_path):
    head = xml([("head", 2, 2, 3, 3)], None).split("<object>")[1].split("</object>")[0]
    (tmp_path / "a.xml").write_text(xml([("dog", 11, 12, 20, 30)], extra=f"<part>{head}</part>"))
    boxes, labels, size = datasets.read_annotation(tmp_path / "a.xml", CLASSES)
    assert boxes.tolist() == [[10, 11, 20, 30]] and labels.tolist() == [2] and size == (40, 60)


def test_difficult_truncated_and_fractional_boxes_are_kept(tmp_path):
    flags = "<truncated>1</truncated><difficult>1</difficult>"
    (tmp_path / "a.xml").write_text(xml([("dog", 1.5, 0, "60.0", 39.25)], extra=flags))
    boxes, _, _ = datasets.read_annotation(tmp_path / "a.xml", CLASSES)
    assert boxes.tolist() == [[0.5, 0, 60, 39.25]]


@pytest.mark.parametrize("size", [None, (0, 0)])
def test_the_images_own_size_stands_in_for_a_missing_one(small, size):
    (small / "Annotations/a.xml").write_text(xml([("dog", 1, 1, 60, 40)], size))
    assert read_all(small)[1][0]["boxes"].tolist() == [[0, 0, 60, 40]]
    with pytest.raises(DataError, match="a.xml: no <size>"):
        datasets.read_annotation(small / "Annotations/a.xml", CLASSES)


def test_a_list_may_come_from_windows(small):
    (small / "ImageSets/Segmentation/train.txt").write_bytes("\ufeffa\r\nc \r\n\r\n".encode())
    assert datasets.read_list(small, "train") == ["a", "c"]


def test_a_list_is_named_by_its_path_and_a_bare_name_is_segmentations_then_mains(small):
    sets = small / "ImageSets"
    (sets / "Main").mkdir()
    (sets / "Main/train.txt").write_text("c\na\n")
    (sets / "Main/own.txt").write_text("c\n")
    assert datasets.read_list(small, "train") == datasets.read_list(small, "Segmentation/train") == ["a", "b", "c"]
    assert datasets.read_list(small, "Main/train") == ["c", "a"]
    assert datasets.read_list(small, "own") == ["c"]
    for name in ("", "../own", "/own", "Main/../own"):
        with pytest.raises(DataError, match="not the name of a list"):
            datasets.read_list(small, name)
    with pytest.raises(DataError, match="Segmentation/none.txt: no such list"):
        datasets.read_list(small, "none")


# ------------------------------------------------------------------------------------------- refusing

def text(path, content):
    return lambda root: (root / path).write_bytes(content if isinstance(content, bytes) else content.encode())


def remove(path):
    return lambda root: (root / path).unlink()


def cut(path):
    return lambda root: (root / path).write_bytes((root / path).read_bytes()[:-60])


def mask(array, mode=None):
    return lambda root: Image.fromarray(array, mode).save(root / "SegmentationClassAug/a.png")


def box(*sides, name="dog", size=(40, 60)):
    return text("Annotations/a.xml", xml([(name, *sides)], size))


LIST, IMAGE, XML, MASK = "ImageSets/Segmentation/train.txt", "JPEGImages/a.jpg", "Annotations/a.xml", \
    "SegmentationClassAug/a.png"
FAULTS = {  # what is done to the folder, words the message must have
    "no list": (remove(LIST), "train.txt", "no such list"),
    "empty list": (text(LIST, "\n \n"), "train.txt", "empty"),
    "binary list": (text(LIST, b"\xff\xd8\xff\x00"), "train.txt", "UnicodeDecodeError"),
    "folder in an id": (text(LIST, "a\nx/a\n"), "train.txt", "'x/a'"),
    "backslash in an id": (text(LIST, "x\\a\n"), "train.txt", "not an image id"),
    "dots in an id": (text(LIST, "..a\n"), "train.txt", "'..a'"),
    "id twice": (text(LIST, "a\nb\na\n"), "train.txt", "'a' stands in it 2 times"),
    "no image": (remove(IMAGE), "a.jpg", "1 of 3 images are missing"),
    "cut image": (cut(IMAGE), "a.jpg", "truncated"),
    "no image at all": (text(IMAGE, "hello"), "a.jpg", "broken"),
    "empty image": (text(IMAGE, ""), "a.jpg", "broken"),
    "no annotation": (remove(XML), "a.xml", "no such annotation"),
    "cut annotation": (cut(XML), "a.xml", "not an XML annotation"),
    "empty annotation": (text(XML, ""), "a.xml", "not an XML annotation"),
    "unknown encoding": (text(XML, "<?xml version='1.0' encoding='x-no'?><a/>"), "a.xml", "not an XML"),
    "size no number": (box(1, 1, 9, 9, size=("big", 60)), "a.xml", "'big', not a number"),
    "size infinite": (box(1, 1, 9, 9, size=("inf", 60)), "a.xml", "not a number"),
    "size without width": (text(XML, "<a><size><height>4</height></size></a>"), "a.xml", "<width>"),
    "no box": (text(XML, xml([("dog",)])), "a.xml", "<xmin>"),
    "box without a side": (box(1, 1, 9), "a.xml", "<ymax>"),
    "side no number": (box(1, 1, "x", 9), "a.xml", "<xmax> is 'x'"),
    "side empty": (box(1, 1, "", 9), "a.xml", "<xmax>"),
    "side NaN": (box(1, "nan", 9, 9), "a.xml", "<ymin> is 'nan'"),
    "side infinite": (box(1, 1, 9, "inf"), "a.xml", "<ymax>"),
    "box turned round": (box(9, 1, 5, 9), "a.xml", "no area"),
    "box without area": (box(1, 9, 9, 8), "a.xml", "no area"),
    "box left of the image": (box(-1, 1, 9, 9), "a.xml", "60 x 40"),
    "box right of the image": (box(1, 1, 61, 9), "a.xml", "60 x 40"),
    "box below the image": (box(1, 1, 9, 41), "a.xml", "60 x 40"),
    "class unknown": (box(1, 1, 9, 9, name="dogs"), "a.xml", "'dogs'", "nearest is 'dog'"),
    "class over two lines": (box(1, 1, 9, 9, name="do\ng"), "a.xml", "nearest is 'dog'"),
    "class missing": (text(XML, xml([]).replace("</ann", "<object/></ann")), "a.xml", "''"),
    "annotation of another image": (box(1, 1, 9, 9, size=(60, 40)), "a.jpg", "60 x 40", "40 x 60"),
    "no mask": (remove(MASK), "a.png", "1 of 3 masks are missing"),
    "cut mask": (cut(MASK), "a.png", "broken"),
    "no mask at all": (text(MASK, "hello"), "a.png", "broken"),
    "mask of another size": (mask(np.zeros((60, 40), np.uint8)), "a.png", "40 x 60"),
    "mask in colour": (mask(np.zeros((40, 60, 3), np.uint8)), "a.png", "RGB", "palette or grey"),
    "mask with alpha": (mask(np.zeros((40, 60, 4), np.uint8)), "a.png", "RGBA", "palette or grey"),
    "mask of 16 bit": (mask(np.zeros((40, 60), np.uint16)), "a.png", "palette or grey"),
    "label unknown": (mask(np.full((40, 60), 4, np.uint8)), "a.png", "label 4", "0..3"),
    "label under void": (mask(np.full((40, 60), 254, np.uint8)), "a.png", "label 254"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_one_line_that_names_the_file(small, name):
    spoil, *words = FAULTS[name]
    spoil(small)
    with pytest.raises(DataError) as caught:
        read_all(small)
    assert len(str(caught.value).splitlines()) == 1
    for word in words:
        assert word in str(caught.value)


def test_faults_outside_the_pixels_end_the_construction(small):
    box(1, 1, 61, 9)(small)
    with pytest.raises(DataError, match="a.xml"):
        VOCDataset(small, "train", CLASSES)


@pytest.mark.parametrize("classes", [[], ["cat", "dog", "cat"], [str(k) for k in range(255)]])
def test_class_lists_that_cannot_be(small, classes):
    with pytest.raises(DataError, match="data.classes"):
        VOCDataset(small, "train", classes)


def test_no_root(tmp_path):
    with pytest.raises(DataError, match="nowhere: no such folder"):
        VOCDataset(tmp_path / "nowhere", "train", CLASSES)


def test_reading_single_missing_files(tmp_path):
    for read in (datasets.read_image, lambda path: datasets.read_mask(path, 4)):
        with pytest.raises(DataError, match="gone.png: no such image file"):
            read(tmp_path / "gone.png")


def test_damaged_files_never_raise_anything_but_data_error(small):
    rng = np.random.default_rng(0)
    for path in (small / IMAGE, small / MASK, small / XML):
        whole = path.read_bytes()
        for _ in range(60):
            damaged = bytearray(whole)
            for place in rng.integers(0, len(whole), 4):
                damaged[place] = rng.integers(256)
            path.write_bytes(damaged)
            try:
                read_all(small)
            except DataError as error:
                assert len(str(error).splitlines()) == 1
        path.write_bytes(whole)


# --------------------------------------------------------------------------------------------- masks

def test_palette_is_vocs():
    colours = datasets.palette()
    assert colours.shape == (256, 3) and colours.dtype == np.uint8
    known = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 8: (64, 0, 0), 15: (192, 128, 128),
             20: (0, 64, 128), 255: (224, 224, 192)}
    for label, colour in known.items():
        assert tuple(colours[label]) == colour


@pytest.mark.parametrize("grey", [False, True])
def test_palette_and_grey_masks_read_the_same(tmp_path, grey):
    labels = np.random.default_rng(0).choice(np.array([0, 1, 3, 255], np.uint8), (9, 7))
    path = tmp_path / "new" / "folder" / "a.png"
    if grey:
        path.parent.mkdir(parents=True)
        Image.fromarray(labels).save(path)
    else:
        datasets.write_mask(path, labels)
        assert Image.open(path).mode == "P"
        assert np.array_equal(np.asarray(Image.open(path).convert("RGB")), datasets.palette()[labels])
        assert [file.name for file in path.parent.iterdir()] == ["a.png"]
    assert np.array_equal(datasets.read_mask(path, 4), labels)


# -------------------------------------------------------------------------------------- augmentation

def painted(height=90, width=120, box=(30, 20, 70, 65)):
    """A grey image with one dark rectangle; boxes, background and mask say where it is."""
    x0, y0, x1, y1 = box
    label = torch.zeros(1, height, width, dtype=torch.uint8)
    label[:, y0:y1, x0:x1] = 2
    image = torch.where(label > 0, 20, 220).to(torch.uint8).repeat(3, 1, 1)
    boxes = torch.tensor([[*box]], dtype=torch.float32)
    return {"id": "x", "image": tv_tensors.Image(image), "labels": torch.tensor([2]),
            "masks": tv_tensors.Mask(label),
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width)),
            "background": tv_tensors.Mask((label == 0).to(torch.uint8))}


def extent(mask):
    y, x = torch.nonzero(mask, as_tuple=True)
    return torch.stack([x.min(), y.min(), x.max() + 1, y.max() + 1]).float()


def test_image_boxes_and_masks_stay_together():
    transform = training_transform(100, (220, 220, 220), jitter=0)
    seen, flips, drops = 0, set(), 0
    for seed in range(60):
        torch.manual_seed(seed)
        sample = transform(painted(box=(5, 20, 45, 65)))
        assert sample["image"].shape == (3, 100, 100) and sample["image"].dtype == torch.uint8
        assert sample["masks"].shape == sample["background"].shape == (1, 100, 100)
        assert sample["boxes"].canvas_size == (100, 100) and len(sample["boxes"]) == len(sample["labels"])
        dark, labelled = sample["image"][0] < 120, sample["masks"][0] == 2
        inside = sample["background"][0] == 0
        assert torch.equal(labelled, inside)
        if not len(sample["boxes"]):
            drops += 1
            continue
        seen += 1
        flips.add(bool(sample["boxes"][0, 0] > 60))
        assert sample["id"] == "x" and sample["labels"].tolist() == [2]
        assert (extent(labelled) - sample["boxes"][0]).abs().max() <= 1
        assert (extent(dark) - sample["boxes"][0]).abs().max() <= 1.5
    assert seen > 40 and flips == {False, True}


def test_padding_has_the_fill_colour_and_is_never_background():
    transform = training_transform(150, FILL, scale=(0.5, 0.5), jitter=0)
    torch.manual_seed(0)
    sample = transform(painted())
    padding = sample["masks"][0] == 255
    assert padding.sum() == 150 * 150 - 45 * 60
    assert torch.equal(sample["background"][0] == 255, padding)
    assert (sample["image"][:, padding] == torch.tensor(FILL)[:, None]).all()
    assert not collate([sample])["background"][0, 0][padding].any()


def test_an_image_smaller_than_the_crop_lies_in_its_middle():
    transform = training_transform(150, FILL, scale=(0.5, 0.5), jitter=0)  # 90 x 120 becomes 45 x 60
    for seed in range(5):
        torch.manual_seed(seed)
        assert extent(transform(painted())["masks"][0] != 255).tolist() == [45, 52, 105, 97]


def test_the_scale_covers_its_range_and_reaches_the_boxes():
    transform = training_transform(200, FILL, jitter=0)
    widths = []
    for seed in range(80):
        torch.manual_seed(seed)
        sample = transform(painted())
        widths.append((sample["boxes"][0, 2] - sample["boxes"][0, 0]).item() / 40)
    assert 0.45 < min(widths) < 0.6 and 1.4 < max(widths) < 1.55 and 0.9 < np.mean(widths) < 1.1


def test_jitter_changes_colours_only():
    torch.manual_seed(3)
    plain = training_transform(100, FILL, scale=(1, 1), jitter=0)(painted())
    torch.manual_seed(3)
    sample = training_transform(100, FILL, scale=(1, 1))(painted())
    assert not torch.equal(sample["image"], plain["image"])
    for key in ("boxes", "labels", "masks", "background"):
        assert torch.equal(sample[key], plain[key])


def test_boxes_under_a_pixel_go_with_their_labels():
    sample = painted()
    boxes = torch.tensor([[10, 10, 10.9, 40], [10, 10, 11, 40], [-5, 3, 0.5, 9], [90, 80, 130, 99.0]])
    sample |= {"boxes": tv_tensors.wrap(boxes, like=sample["boxes"]), "labels": torch.tensor([1, 2, 3, 4])}
    kept = datasets.drop_thin_boxes(sample)
    assert kept["labels"].tolist() == [2, 4]
    assert kept["boxes"].tolist() == [[10, 10, 11, 40], [90, 80, 120, 90]]
    assert isinstance(kept["boxes"], tv_tensors.BoundingBoxes)


@pytest.mark.parametrize("settings", [{"boxes": False}, {"masks": ()}, {"boxes": False, "masks": ()}, {}])
def test_transform_and_collate_take_samples_with_parts_missing(small, settings):
    dataset, _ = read_all(small, transform=training_transform(32, FILL), **settings)
    samples = [dataset[i] for i in range(3)]
    batch = collate(samples)
    assert set(batch) == set(samples[0]) and batch["id"] == ["a", "b", "c"]
    assert batch["image"].shape == (3, 3, 32, 32) and type(batch["image"]) is torch.Tensor
    if "masks" in batch:
        assert batch["masks"].shape == (3, 1, 32, 32) and batch["masks"].dtype == torch.uint8
    if "boxes" in batch:
        assert [type(boxes) for boxes in batch["boxes"]] == [torch.Tensor] * 3
        assert all(boxes.shape == (len(labels), 4) for boxes, labels in zip(batch["boxes"], batch["labels"]))
        assert batch["background"].shape == (3, 1, 32, 32) and batch["background"].max() <= 1


# ------------------------------------------------------------------------------------------- streams

def same(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(a[key], b[key]) if isinstance(a[key], torch.Tensor) else a[key] == b[key] for key in a)


def test_a_stream_depends_on_seed_and_k_alone(small):
    dataset, _ = read_all(small, transform=training_transform(32, FILL))
    stream = Stream(dataset, 12, seed=1)
    straight = [stream[k] for k in range(12)]
    torch.manual_seed(99)
    longer = Stream(dataset, 40, seed=1)
    assert all(same(straight[k], longer[k]) for k in (7, 11, 0))  # another start and length
    for workers in (0, 2):
        loader = torch.utils.data.DataLoader(stream, batch_size=None, num_workers=workers)
        assert all(same(a, b) for a, b in zip(straight, loader))
    other = Stream(dataset, 12, seed=2)
    assert not all(same(straight[k], other[k]) for k in range(12))
    # The same image is augmented anew each time.
    assert len({straight[k]["image"].sum().item() for k in range(12) if straight[k]["id"] == "a"}) == 4


def test_a_stream_leaves_the_global_generator_alone(small):
    stream = Stream(read_all(small, transform=training_transform(32, FILL))[0], 3, seed=0)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    stream[0]
    assert torch.equal(before, torch.get_rng_state())


def test_a_stream_goes_through_whole_epochs():
    stream = Stream(list(range(7)), 24, seed=0)
    assert len(stream) == 24
    for start in (0, 7, 14):
        assert sorted(stream.order[start:start + 7]) == list(range(7))
    assert stream.order[:7] != stream.order[7:14]
    assert Stream(list(range(7)), 100, seed=0).order[:24] == stream.order


def test_a_weighted_stream_draws_in_proportion():
    weights = torch.tensor([1.0, 0, 3])
    order = Stream(list(range(3)), 4000, seed=0, weights=weights).order
    counts = np.bincount(order, minlength=3) / 4000
    assert np.abs(counts - [0.25, 0, 0.75]).max() < 0.03
    assert Stream(list(range(3)), 50, seed=0, weights=weights).order == order[:50]


def test_balance_weights_are_the_literal_counts(small):
    add(small, "d", [("cat", 1, 1, 9, 9), ("cat", 2, 2, 8, 8), ("cow", 3, 3, 9, 9)])
    add(small, "e", [("cow", 1, 1, 9, 9)])
    (small / LIST).write_text("a\nb\nc\nd\ne\n")
    weights = datasets.balance_weights(VOCDataset(small, "train", CLASSES))
    # cat in a, c, d; dog in a; cow in d, e
    expected = torch.tensor([1, 0, 1 / 3, 1 / 2, 1 / 2])
    expected[1] = expected[[0, 2, 3, 4]].mean()
    assert torch.allclose(weights, expected)


def test_balance_weights_without_any_object(small):
    (small / LIST).write_text("b\n")
    assert datasets.balance_weights(VOCDataset(small, "train", CLASSES)).tolist() == [1]


def test_datasets_can_be_sent_to_spawned_workers(small):
    dataset, _ = read_all(small, transform=training_transform(32, FILL))
    assert len(pickle.loads(pickle.dumps(Stream(dataset, 5, seed=0)))) == 5


# -------------------------------------------------------------------------------------------- shapes

def digest(root):
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    root = tmp_path_factory.mktemp("made") / "data" / "shapes"
    datasets.make_shapes(root, train=30, val=10)
    return root


def test_shapes_are_the_same_bytes_each_time(shapes, tmp_path):
    datasets.make_shapes(tmp_path / "again", train=6, val=2)
    datasets.make_shapes(tmp_path / "other", train=6, val=2, seed=1)
    again, other, first = digest(tmp_path / "again"), digest(tmp_path / "other"), digest(shapes)
    assert len(again) == 3 * 8 + 2
    names = [name for name in again if "ImageSets" not in name]
    assert all(again[name] == first[name] and again[name] != other[name] for name in names)
    assert {path.name for path in tmp_path.iterdir()} == {"again", "other"}  # no temporary folder is left


def test_shapes_read_as_a_dataset(shapes):
    assert len(datasets.SHAPES) >= 5 and len(set(datasets.SHAPES)) == len(datasets.SHAPES)
    train, val = (datasets.read_list(shapes, split) for split in ("train", "val"))
    assert (len(train), len(val)) == (30, 10) and not set(train) & set(val)
    dataset = VOCDataset(shapes, "train", datasets.SHAPES, masks=["SegmentationClassAug"])
    labels, fill, sizes = set(), [], set()
    for sample in (dataset[i] for i in range(len(dataset))):
        mask, boxes = sample["masks"][0], sample["boxes"]
        labels |= set(sample["labels"].tolist())
        sizes.add(tuple(mask.shape))
        assert 1 <= len(boxes) <= 3
        # The void border has its outer half outside the boxes; an object's own pixels are inside.
        objects = (mask > 0) & (mask < 255)
        assert not (objects & (sample["background"][0] == 1)).any()
        assert set(mask.unique().tolist()) <= {0, 255, *sample["labels"].tolist()}
        assert 0.02 < (mask == 255).float().mean() / objects.float().mean() < 1.5
        fill.append((objects.sum() / (sample["background"] == 0).sum()).item())
        if len(boxes) == 1:  # tight: the border's inner half is in the box, its outer half round it
            ends = torch.tensor([1, 1, -1, -1])
            canvas = torch.tensor([0, 0, mask.shape[1], mask.shape[0]])
            inner, outer = extent(objects), extent(mask > 0)
            cut = boxes[0] == canvas
            assert ((inner - boxes[0]) * ends >= 0).all() and ((inner - boxes[0]).abs() <= 2).all()
            assert torch.equal(outer[~cut], (boxes[0] - ends)[~cut])
    assert labels == set(range(1, len(datasets.SHAPES) + 1))
    assert np.mean(fill) < 0.45 and len(sizes) > 10


def test_shapes_are_near_their_backgrounds_colour(shapes):
    dataset = VOCDataset(shapes, "train", datasets.SHAPES, masks=["SegmentationClassAug"])
    for sample in (dataset[i] for i in range(len(dataset))):
        image, mask = sample["image"].float(), sample["masks"][0]
        inside, behind = image[:, (mask > 0) & (mask < 255)], image[:, mask == 0]
        assert (inside.mean(1) - behind.mean(1)).abs().max() < 75
        assert behind.std(1).max() > 8  # a textured background


def test_shapes_never_overwrite(shapes):
    before = digest(shapes)
    with pytest.raises(DataError, match="shapes: exists"):
        datasets.make_shapes(shapes)
    assert digest(shapes) == before


def test_shapes_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(datasets, "_annotation", fail)
    with pytest.raises(KeyboardInterrupt):
        datasets.make_shapes(tmp_path / "shapes", train=2, val=1)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------ commands

def command(*arguments):
    return subprocess.run([sys.executable, ROOT / "datasets.py", *arguments], capture_output=True, text=True)


@pytest.mark.parametrize("arguments", [[], ["shapes"], ["shapes", ""], ["nonsense", "x"], ["shapes=x"],
                                       ["shapes", "x", "y"]])
def test_the_command_line_says_how_it_is_used(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["datasets.py", *arguments])
    with pytest.raises(SystemExit) as caught:
        datasets.main()
    output = capsys.readouterr()
    assert caught.value.code == 2 and output.out == ""
    assert output.err.startswith("usage: ") and len(output.err.splitlines()) == 1


def test_the_command_line_reports_a_fault_in_one_line(tmp_path):
    done = command("shapes", tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert "exists" in done.stderr and len(done.stderr.splitlines()) == 1


def test_the_command_line_reports_a_fault_of_the_machine_in_one_line():
    done = command("shapes", "/proc/shapes")  # where nobody can write
    assert done.returncode == 1 and done.stdout == ""
    assert "/proc/shapes" in done.stderr and len(done.stderr.splitlines()) == 1


def test_the_command_line_writes_the_shapes(tmp_path, monkeypatch, capsys):
    made = []
    monkeypatch.setattr(datasets, "make_shapes", made.append)
    monkeypatch.setattr(sys, "argv", ["datasets.py", "shapes", f"{tmp_path}/x"])
    datasets.main()
    assert made == [f"{tmp_path}/x"] and capsys.readouterr().out == f"data.root: {tmp_path}/x\n"


# ----------------------------------------------------------------------------------------- real data

@pytest.mark.parametrize("split, count", [("train_aug", 3362), ("train", 667), ("val", 335)])
def test_real_voc_annotations_all_parse(voc, split, count):
    dataset = VOCDataset(voc, split, datasets.VOC_CLASSES, training_transform(321, (123, 117, 104)),
                         masks=["SegmentationClassAug"])
    assert len(dataset) == len(dataset.annotations) == count
    assert all(len(boxes) == len(labels) > 0 for boxes, labels in dataset.annotations.values())
    batch = collate([Stream(dataset, 4, seed=0)[k] for k in range(4)])
    assert batch["image"].shape == (4, 3, 321, 321) and batch["masks"].shape == (4, 1, 321, 321)
    assert set(batch["masks"].unique().tolist()) <= {*range(21), 255}


# ---------------------------------------------------------------- writing

def test_write_is_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "file"
    datasets.write(path, b"first")

    def full(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError) as error:
        datasets.write(path, b"second")
    assert error.value.filename == str(path) and error.value.strerror == "No space left on device"
    assert path.read_bytes() == b"first" and os.listdir(path.parent) == ["file"]


def test_write_reaches_the_disk_before_its_name(tmp_path, monkeypatch):
    """fsync comes before rename, and of the file that is renamed."""
    calls, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (calls.append(os.readlink(f"/proc/self/fd/{file}")), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda old, new: (calls.append(("rename", str(old))), replace(old, new)))
    datasets.write(tmp_path / "file", b"content")
    assert calls == [str(tmp_path / ".file.tmp"), ("rename", str(tmp_path / ".file.tmp"))]
