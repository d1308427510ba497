"""3,000 and more spoilt inputs: each is read, or refused in one line that names the file; nothing else happens."""
import copy
import io
import json
import random
import resource
import sys
import time
import zipfile
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image

import datasets
import engine
import models

FAULTS = datasets.DataError, engine.UsageError, models.WeightsError
OPENED = []
sys.addaudithook(lambda event, arguments: OPENED.append(arguments[:2]) if event == "open" else None)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    datasets.make_shapes(folder / "data", train=2, val=1)
    (folder / "secret").write_text("shapes_00000\n")
    write_other_forms(folder / "data")
    return folder


def write_other_forms(data):
    """The boxes of the first two images once more, as labels/ID.txt and in shapes.json."""
    (data / "labels").mkdir()
    (data / "labels/classes.txt").write_text("\n".join(datasets.SHAPES))
    content = {"images": [], "annotations": [],
               "categories": [{"id": n, "name": name} for n, name in enumerate(datasets.SHAPES, 1)]}
    for number, sample in enumerate(datasets.VOCDataset(data, "train", datasets.SHAPES)):
        height, width = sample["image"].shape[1:]
        content["images"].append(dict(id=number, file_name=f"{sample['id']}.jpg", width=width, height=height))
        lines = []
        for (x0, y0, x1, y1), label in zip(sample["boxes"].tolist(), sample["labels"].tolist()):
            content["annotations"].append(dict(image_id=number, category_id=label, bbox=[x0, y0, x1 - x0, y1 - y0]))
            sides = (x0 + x1) / 2 / width, (y0 + y1) / 2 / height, (x1 - x0) / width, (y1 - y0) / height
            lines.append(" ".join(map(str, (label - 1, *sides))))
        (data / "labels" / f"{sample['id']}.txt").write_text("\n".join(lines))
    (data / "shapes.json").write_text(json.dumps(content))


def mutate(data, rng):
    """Bytes flipped, cut short, repeated, inserted, or numbers made huge."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8, 40))):
        if not data:
            break
        kind, at = rng.randrange(6), rng.randrange(len(data))
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            data[at:at] = data[at:at + rng.randrange(1, 400)] * rng.randrange(1, 30)
        elif kind == 3:
            data[at:at + rng.randrange(8)] = rng.randbytes(rng.randrange(1, 9))
        elif kind == 4:
            data[at:at + 4] = rng.choice((b"\xff" * 4, b"\x7f\xff\xff\xff", b"\0\0\0\0", b"-1", b"1e999", b"nan"))
        else:
            del data[at:at + rng.randrange(1, 60)]
    return bytes(data)


def check(read, path, root):
    """read() ends well or in one line that names the file, soon, small, and without a look at other files."""
    OPENED.clear()
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        read()
        line = None
    except FAULTS as error:
        line = str(error)
        assert "\n" not in line and len(line) < 2000 and str(path.name.split(".")[0]) in line, line
    assert time.monotonic() - start < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1e6  # kB
    python = (*sys.path[1:], sys.prefix, sys.base_prefix)
    for file, mode in OPENED:
        if isinstance(file, (str, Path)) and not str(file).startswith(python):
            assert Path(file).resolve().is_relative_to(root), file
            assert mode is None or "r" in mode, (file, mode)
    return line


def read_data(root, boxes="Annotations"):
    data = root / "data"
    for sample in datasets.VOCDataset(data, "train", datasets.SHAPES, masks=["SegmentationClassAug"], boxes=boxes):
        datasets.collate([sample])


@pytest.mark.parametrize("name, count, boxes", [
    ("Annotations/shapes_00000.xml", 700, "Annotations"), ("JPEGImages/shapes_00000.jpg", 400, "Annotations"),
    ("SegmentationClassAug/shapes_00000.png", 400, "Annotations"),
    ("ImageSets/Segmentation/train.txt", 200, "Annotations"), ("labels/shapes_00000.txt", 400, "labels"),
    ("shapes.json", 400, "shapes.json")])
def test_mutated_data(root, name, count, boxes):
    path = root / "data" / name
    good, rng, refused = path.read_bytes(), random.Random(0), 0
    try:
        for _ in range(count):
            path.write_bytes(mutate(good, rng))
            # A list that names other images is a good list, and the line names the missing image.
            named = Path("") if path.name == "train.txt" else path
            refused += check(lambda: read_data(root, boxes), named, root) is not None
    finally:
        path.write_bytes(good)
    assert refused > count / 4  # the mutations bite


def test_mutated_data_is_checked(root):
    """python datasets.py check ends, too, and finds a fault, a line each, where VOCDataset does."""
    data, rng = root / "checked", random.Random(4)
    (data / "images").mkdir(parents=True)
    for name in ("shapes_00000.jpg", "shapes_00001.jpg"):
        (data / "images" / name).write_bytes((root / "data/JPEGImages" / name).read_bytes())
    good = (root / "data/shapes.json").read_bytes()
    for _ in range(200):
        (data / "shapes.json").write_bytes(mutate(good, rng))
        line = check(lambda: datasets.VOCDataset(data, "all", datasets.SHAPES, images="images", boxes="shapes.json"),
                     Path("shapes"), root)
        try:
            faults = datasets.check(data)
        except datasets.DataError as error:
            faults = [str(error)]
        assert not any("\n" in fault for fault in faults)
        assert faults or line is None or "is not in data.classes" in line, line  # the check takes any name


def test_mutated_settings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = b"".join(path.read_bytes() for path in sorted(engine.DEFAULT_CONFIG.parent.glob("*.yaml"))[:1])
    path, rng, refused = tmp_path / "my.yaml", random.Random(1), 0
    for _ in range(300):
        path.write_bytes(mutate(good, rng))
        line = check(lambda: engine.configure("train_cls", [str(path), "data.root=x"]), Path(""), tmp_path)
        refused += line is not None
    assert refused > 75


def checkpoint():
    network = torch.nn.Linear(2, 3)
    return dict(network=dict(backbone="vgg16", width=1.0), classes=["a"], settings={}, model=network.state_dict())


def load(folder):
    config = engine.configure("make_labels", ["data.root=x", "data.classes=[a]"])
    config.path = folder
    engine.load_network(config, "cls.pt", torch.nn.Linear(2, 3), config.train_cls)


def test_mutated_checkpoints(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    buffer = io.BytesIO()
    torch.save(checkpoint(), buffer)
    path, rng, refused = tmp_path / "cls.pt", random.Random(2), 0
    for _ in range(200):
        path.write_bytes(mutate(buffer.getvalue(), rng))
        refused += check(lambda: load(tmp_path), path, tmp_path) is not None
    assert refused > 50


SWAPS = [None, 0, -1, 1e308, "text", "", [], {}, [1], {"a": 1}, torch.tensor(1), torch.zeros(0), True, "x" * 10 ** 6]


@pytest.mark.parametrize("key", ["network", "classes", "model", "whole"])
def test_checkpoints_of_other_types(tmp_path, monkeypatch, key):
    monkeypatch.chdir(tmp_path)
    for value in SWAPS:
        content = checkpoint()
        if key == "whole":
            content = value
        else:
            content[key] = value
        torch.save(content, tmp_path / "cls.pt")
        assert check(lambda: load(tmp_path), tmp_path / "cls.pt", tmp_path)
    for value in SWAPS:
        content = copy.deepcopy(checkpoint())
        content["model"]["weight"] = value
        torch.save(content, tmp_path / "cls.pt")
        assert check(lambda: load(tmp_path), tmp_path / "cls.pt", tmp_path)


# ---------------------------------------------------------------- attacks by hand


XML = "<annotation><size><width>{w}</width><height>{h}</height></size>{more}</annotation>"
BOX = ("<object><name>{name}</name><bndbox><xmin>{a}</xmin><ymin>1</ymin><xmax>{b}</xmax><ymax>9</ymax></bndbox>"
       "</object>")
LAUGHS = "<!DOCTYPE a [<!ENTITY a0 'ha'>" + "".join(
    f"<!ENTITY a{n + 1} '{f'&a{n};' * 10}'>" for n in range(12)) + "]>"


@pytest.mark.parametrize("text", [
    LAUGHS + "<annotation>&a12;</annotation>",
    "<!DOCTYPE a [<!ENTITY x SYSTEM 'file:///etc/passwd'>]><annotation>&x;</annotation>",
    "<!DOCTYPE a SYSTEM 'file:///etc/passwd'><annotation/>",
    "<a>" * 200_000, "<a>" * 20_000 + "</a>" * 20_000,
    XML.format(w="9" * 5000, h=1, more=BOX.format(name="bar", a=1, b=9)),
    XML.format(w=1e400, h=1, more=""), XML.format(w="nan", h="nan", more=""),
    XML.format(w=100, h=100, more=BOX.format(name="b" * 10 ** 6, a=1, b=9)),
    XML.format(w=100, h=100, more=BOX.format(name="bar\nbar", a="1\n2", b=9)),
    XML.format(w=100, h=100, more=BOX.format(name="bar", a=-1e300, b=1e300)),
    XML.format(w=100, h=100, more=BOX.format(name="ring", a=1, b=9) * 90_000),
    "\0" * 1000, "", " " * 10 ** 6, "<annotation/>", "\xff\xfe<", "<?xml version='1.0' encoding='none'?><a/>",
    "<?xml version='1.0' encoding='utf-7'?><a/>", "x" * 11_000_000,
], ids=lambda text: " ".join(text[:30].split()))
def test_hostile_annotations(root, text):
    path = root / "data/Annotations/shapes_00000.xml"
    good = path.read_bytes()
    try:
        path.write_text(text)
        line = check(lambda: read_data(root), path, root)
        assert line or text.endswith(("<annotation/>", "</size></annotation>", "</a>"))  # an image without objects
    finally:
        path.write_bytes(good)


def bomb(side):
    """A PNG of side x side pixels in a few bytes for each row."""
    buffer = io.BytesIO()
    Image.new("1", (side, side)).save(buffer, "PNG", compress_level=9)
    return buffer.getvalue()


def header_of(width, height):
    """A PNG that says it is huge."""
    data = bytearray(bomb(8))
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


@pytest.mark.parametrize("data", [
    lambda: bomb(8000), lambda: header_of(2 ** 31 - 1, 2 ** 31 - 1), lambda: header_of(0, 5),
    lambda: b"%!PS-Adobe-3.0\n",
    lambda: b"", lambda: b"GIF89a" + b"\xff" * 99, lambda: b"BM" + b"\xff" * 60, lambda: b"\x89PNG\r\n\x1a\n" * 9],
    ids=["bomb", "header", "empty header", "postscript", "nothing", "gif", "bmp", "png"])
@pytest.mark.parametrize("folder, ending", [("JPEGImages", "jpg"), ("SegmentationClassAug", "png")])
def test_hostile_images(root, folder, ending, data):
    path = root / "data" / folder / f"shapes_00000.{ending}"
    good = path.read_bytes()
    try:
        path.write_bytes(data())
        assert check(lambda: read_data(root), path, root)
    finally:
        path.write_bytes(good)


@pytest.mark.parametrize("name", ["JPEGImages/shapes_00000.jpg", "Annotations/shapes_00000.xml",
                                  "SegmentationClassAug/shapes_00000.png", "ImageSets/Segmentation/train.txt",
                                  "labels/shapes_00000.txt", "shapes.json"])
@pytest.mark.parametrize("target", ["secret", "/etc/passwd", "/dev/zero", "nowhere", "data"])
def test_links_out_of_the_folder(root, name, target):
    path, folder = root / "data" / name, name.split("/")[0]
    good = path.read_bytes()
    try:
        path.unlink()
        path.symlink_to(target if target[0] == "/" else root / target)
        boxes = folder if folder in ("labels", "shapes.json") else "Annotations"
        assert check(lambda: read_data(root, boxes), path, root)
    finally:
        path.unlink()
        path.write_bytes(good)


def test_whole_folders_may_be_links(root, tmp_path):
    for folder in (root / "data").iterdir():
        (tmp_path / folder.name).symlink_to(folder)
    assert len(datasets.VOCDataset(tmp_path, "train", datasets.SHAPES)[0]["image"]) == 3


@pytest.mark.parametrize("name", ["../shapes_00000", "/etc/passwd", "..", "a/b", "..\\x", "a\0b", "x" * 5000, "-", "*"])
def test_ids_that_lead_elsewhere(root, name):
    path = root / "data/ImageSets/Segmentation/train.txt"
    good = path.read_bytes()
    try:
        path.write_text(name + "\n")
        assert check(lambda: read_data(root), Path(""), root)
    finally:
        path.write_bytes(good)


@pytest.mark.parametrize("split", ["../../../secret", "/etc/passwd", "", "..", "../Segmentation/train"])
def test_lists_that_lead_elsewhere(root, split):
    assert check(lambda: datasets.read_list(root / "data", split), Path(""), root)


@pytest.mark.parametrize("text", [
    "b0: &b0 [x,x,x,x,x,x,x,x,x]\n" + "".join(f"b{n + 1}: &b{n + 1} [{','.join([f'*b{n}'] * 9)}]\n" for n in range(9)),
    "[" * 20_000, "run: {name: '" + "x" * 40_000 + "'}", "run: {? [a] : b}", "x" * 60_000,
    "!!python/object/apply:os.system [x]",
    "run: {seed: 1e999}", "train_cls: {lr: .nan}", "train_cls: {lr: 1" + "0" * 5000 + "}", "? \"a\\nb\"\n: 1", "\0",
    "run: {name: ../x}", "run: {name: /tmp/x}", "run: {name: .hidden}", "train_cls: {scale: [1.5, 0.5]}",
    "eval: {scales: []}", "train_seg: {crop: -3}", "run: {workers: -1}", "make_labels: {crf_bilateral: [1, 2]}",
], ids=lambda text: " ".join(text[:30].split()))
def test_hostile_settings(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yaml").write_text(text)
    assert check(lambda: engine.configure("train_cls", ["my.yaml", "data.root=x"]), Path(""), tmp_path)


def test_a_checkpoint_that_unpacks_to_much(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(checkpoint(), tmp_path / "good.pt")
    with zipfile.ZipFile(tmp_path / "good.pt") as old:
        with zipfile.ZipFile(tmp_path / "cls.pt", "w", zipfile.ZIP_DEFLATED) as new:
            for item in old.infolist():
                new.writestr(item.filename, bytes(10 ** 8) if item.filename.endswith("/0") else old.read(item))
    check(lambda: load(tmp_path), tmp_path / "cls.pt", tmp_path)


def test_a_read_of_the_truth_is_seen(root):
    """The check itself: a file outside the folder is noticed."""
    with pytest.raises(AssertionError):
        check(lambda: open("/etc/hostname").close(), Path(""), root)
    with pytest.raises(AssertionError):
        check(lambda: open(root / "new", "w").close(), Path(""), root)
