"""Some 2,500 damaged inputs (FUZZ=2: twice as many): each is read, or refused
in one line that names the file."""
import copy
import io
import json
import os
import random
import zipfile
from pathlib import Path

import pytest
import torch

import datasets
import eval as evaluation
import models
import pictures
import runs
import settings
from settings import UsageError
from tools.shapes import SHAPES, make_shapes

FUZZ = int(os.environ.get("FUZZ", 1))
FAULTS = datasets.DataError, UsageError, models.WeightsError


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz") / "data"
    make_shapes(folder, train=2, val=1)
    return folder


def mutate(data, rng):
    """Flips bits, cuts short, repeats, inserts, writes huge numbers."""
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
            part = data[at:at + rng.randrange(1, 400)]
            data[at:at] = part * rng.randrange(1, 30)
        elif kind == 3:
            data[at:at + rng.randrange(8)] = rng.randbytes(rng.randrange(1, 9))
        elif kind == 4:
            data[at:at + 4] = rng.choice((
                b"\xff" * 4, b"\x7f\xff\xff\xff", b"\0" * 4, b"-1", b"1e999",
                b"nan"))
        else:
            del data[at:at + rng.randrange(1, 60)]
    return bytes(data)


def refusal(read, name=""):
    """The line that read() ends in, or None; any other error is a failure."""
    try:
        read()
        return None
    except FAULTS as error:
        line = str(error)
        assert "\n" not in line and len(line) < 2000 and name in line, line
        return line


def read_data(root):
    for sample in datasets.VOCDataset(root, "train", SHAPES,
                                      masks=["SegmentationClassAug"]):
        datasets.collate([sample])


@pytest.mark.parametrize("name, count", [
    ("Annotations/shapes_00000.xml", 700), ("JPEGImages/shapes_00000.jpg", 400),
    ("SegmentationClassAug/shapes_00000.png", 400),
    ("ImageSets/Segmentation/train.txt", 200)])
def test_mutated_data(root, name, count):
    path = root / name
    good, rng, refused = path.read_bytes(), random.Random(0), 0
    # The line about a list that names other images names the missing image.
    named = "" if path.name == "train.txt" else path.stem
    try:
        for _ in range(FUZZ * count):
            path.write_bytes(mutate(good, rng))
            refused += refusal(lambda: read_data(root), named) is not None
    finally:
        path.write_bytes(good)
    bites(name, FUZZ * count, refused, 1 / 4)


def bites(name, count, refused, share):
    """The mutations matter. Shown by pytest -s."""
    print(f"{name}: {count} damaged, {refused} refused")
    assert refused > share * count


def test_mutated_settings(tmp_path):
    good = settings.DEFAULT_CONFIG.read_bytes()
    path, rng, refused = tmp_path / "my.yaml", random.Random(1), 0
    for _ in range(FUZZ * 300):
        path.write_bytes(mutate(good, rng))
        refused += refusal(lambda: settings.read(
            "train_cls", [str(path), "data.root=x"])) is not None
    bites("settings", FUZZ * 300, refused, 1 / 4)


def checkpoint():
    network = models.BoxClassifier(1, "vgg16_bn", width=0.01)
    return dict(network=dict(kind="BoxClassifier", backbone="vgg16_bn",
                             width=0.01),
                classes=["a"], settings={}, model=network.state_dict())


def load(folder):
    config = settings.read("make_labels", [
        "data.root=x", "data.classes=[a]", "train_cls.backbone=vgg16_bn",
        "train_cls.width=0.01"])
    config.path, config.device = folder, torch.device("cpu")
    runs.load_network(config, "cls.pt", models.BoxClassifier,
                      config.train_cls, classes=config.data.classes)


def test_mutated_checkpoints(tmp_path):
    buffer = io.BytesIO()
    torch.save(checkpoint(), buffer)
    path, rng, refused = tmp_path / "cls.pt", random.Random(2), 0
    path.write_bytes(buffer.getvalue())
    load(tmp_path)
    for _ in range(FUZZ * 200):
        path.write_bytes(mutate(buffer.getvalue(), rng))
        refused += refusal(lambda: load(tmp_path), "cls.pt") is not None
    bites("checkpoints", FUZZ * 200, refused, 1 / 4)


SCORES = {"miou": 51.5, "images": 3, "method": "plain", "split": "val",
          "iou": {"background": 90.1, "a": 12.9}}
RUN_FILES = {  # of a run: as text, and the share of mutations that is noticed
    "labels/made_with.json": (json.dumps(dict(
        settings={"make_labels.u0": True, "data.classes": ["a"]}, x=1)), 1 / 2),
    "labels/scores.json": (json.dumps({"val": dict(
        box=SCORES, Ycrf=SCORES, Yret=SCORES)}), 1 / 4),
    "eval.json": (json.dumps({"val, plain": SCORES}), 1 / 4),
    "settings.yaml": (f"# eval.py: {'x' * 99}\nrun:\n  name: a\n  seed: 0\n"
                      "data: {root: x, classes: [a, b]}\n", 1 / 8),
    "metrics.jsonl": ("".join(json.dumps(dict(
        time=1.5, stage="train_cls", iteration=20 * n, loss=1 / n)) + "\n"
        for n in range(1, 9)), -1)}


@pytest.mark.parametrize("name", RUN_FILES)
def test_mutated_run_files(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pictures, "png_of", lambda figure: b"")
    config = settings.read("eval", ["data.root=x", "run.name=a"])
    texts = {file: text for file, (text, _) in RUN_FILES.items()}
    rng, refused, count = random.Random(3), 0, FUZZ * 60

    def use():
        before = json.loads(texts["labels/made_with.json"])
        runs.replace_if_changed(config.path / "labels", before, False)
        runs.write_settings(config, "eval")
        results = runs.read_json(config.path / "eval.json")
        evaluation.print_summary(config, "val", results)
        pictures.draw_curves(config)

    for number in range(count + 1):
        for file, text in texts.items():
            datasets.write(config.path / file, text.encode())
        if number:  # as they are, they are read
            datasets.write(config.path / name,
                           mutate(texts[name].encode(), rng))
        line = refusal(use, Path(name).parts[0])
        assert number or line is None
        refused += line is not None
    capsys.readouterr()  # what use() printed
    with capsys.disabled():
        bites(name, count, refused, RUN_FILES[name][1])


SWAPS = [None, 0, -1, 1e308, "text", "", [], {}, [1], {"a": 1},
         torch.tensor(1), torch.zeros(0), True, "x" * 10 ** 6]


@pytest.mark.parametrize("key", ["network", "classes", "model", "whole"])
def test_checkpoints_of_other_types(tmp_path, key):
    for value in SWAPS:
        content = value if key == "whole" else checkpoint() | {key: value}
        torch.save(content, tmp_path / "cls.pt")
        assert refusal(lambda: load(tmp_path), "cls.pt")
    for value in SWAPS:
        content = copy.deepcopy(checkpoint())
        content["model"]["classifier.weight"] = value
        torch.save(content, tmp_path / "cls.pt")
        assert refusal(lambda: load(tmp_path), "cls.pt")


def test_a_checkpoint_that_unpacks_to_much(tmp_path):
    torch.save(checkpoint(), tmp_path / "good.pt")
    with zipfile.ZipFile(tmp_path / "good.pt") as old, zipfile.ZipFile(
            tmp_path / "cls.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for item in old.infolist():
            tensor = item.filename.endswith("/0")
            new.writestr(item.filename,
                         bytes(10 ** 8) if tensor else old.read(item))
    assert refusal(lambda: load(tmp_path), "cls.pt")


XML = ("<annotation><size><width>{w}</width><height>{h}</height></size>{more}"
       "</annotation>")
BOX = ("<object><name>{name}</name><bndbox><xmin>{a}</xmin><ymin>1</ymin>"
       "<xmax>{b}</xmax><ymax>9</ymax></bndbox></object>")
LAUGHS = "<!DOCTYPE a [<!ENTITY a0 'ha'>" + "".join(
    f"<!ENTITY a{n + 1} '{f'&a{n};' * 10}'>" for n in range(12)) + "]>"


@pytest.mark.parametrize("text", [
    LAUGHS + "<annotation>&a12;</annotation>", "<a>" * 200_000,
    XML.format(w="9" * 5000, h=1, more=""), XML.format(w=1e400, h=1, more=""),
    XML.format(w="nan", h="nan", more=""),
    XML.format(w=99, h=99, more=BOX.format(name="bar\nbar", a="1\n2", b=9)),
    XML.format(w=99, h=99, more=BOX.format(name="bar", a=-1e300, b=1e300)),
    "\0" * 1000, "", "<annotation/>", "\xff\xfe<",
    "<?xml version='1.0' encoding='none'?><a/>",
    "<?xml version='1.0' encoding='utf-7'?><a/>",
], ids=lambda text: " ".join(text[:30].split()))
def test_hostile_annotations(root, text):
    path = root / "Annotations/shapes_00000.xml"
    good = path.read_bytes()
    try:
        path.write_text(text)
        assert refusal(lambda: read_data(root), path.stem)
    finally:
        path.write_bytes(good)


@pytest.mark.parametrize("text", [
    "[" * 20_000, "run: {? [a] : b}", "!!python/object/apply:os.system [x]",
    "run: {seed: 1e999}", "train_cls: {lr: .nan}", "\0", "? \"a\\nb\"\n: 1",
    "train_cls: {lr: 1" + "0" * 5000 + "}", "run: {name: ../x}",
    "run: {name: /tmp/x}", "run: {name: .hidden}", "eval: {scales: []}",
    "train_cls: {scale: [1.5, 0.5]}", "train_seg: {crop: -3}",
    "run: {workers: -1}", "make_labels: {crf_bilateral: [1, 2]}",
], ids=lambda text: " ".join(text[:30].split()))
def test_hostile_settings(tmp_path, text):
    path = Path(tmp_path, "my.yaml")
    path.write_text(text)
    assert refusal(lambda: settings.read("train_cls", [str(path)]))
