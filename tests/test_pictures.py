"""Heat maps, panels, curves and bars: drawn of what a run has, at the right places, from the right numbers."""
import json
import math
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_labels import HEIGHT, WIDTH, literal_attention, literal_maps, scene

import datasets
import make_labels
import models
import pictures
import runs
import settings
from tools.shapes import SHAPES, make_shapes

SMALL = ["train_cls.width=0.0625", "run.workers=0", "make_labels.crf_iterations=1", "make_labels.pictures=1"]


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A folder with a run of which an untrained stage 1 is all there is."""
    folder = tmp_path_factory.mktemp("run")
    make_shapes(folder / "data/shapes", train=2, val=2)
    network = models.BoxClassifier(len(SHAPES), "vgg16_bn", "none", 0.0625, 0.0)
    runs.save(folder / "runs/shapes/cls.pt", dict(
        network=dict(kind="BoxClassifier", backbone="vgg16_bn", width=0.0625), classes=list(SHAPES),
        model=network.state_dict()))
    return folder


@pytest.fixture
def folder(first, tmp_path, monkeypatch):
    shutil.copytree(first, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(monkeypatch, main, *arguments):
    script = Path(sys.modules[main.__module__].__file__).name
    monkeypatch.setattr(sys, "argv", [script, *SMALL, *arguments])
    runs.launch("eval" if main is pictures.main else script[:-3], main)


def drawn(folder):
    return {path.name for path in (folder / "runs/shapes").glob("*.png")}


# ---------------------------------------------------------------- images


def test_boxes_are_drawn_on_their_own_pixels():
    picture = pictures.outlined(np.zeros((20, 30, 3), np.uint8), torch.tensor([[2.0, 3, 12, 15]]), torch.tensor([2]))
    pixels = np.array(picture)
    found = np.argwhere(pixels.any(2))
    assert found.min(0).tolist() == [3, 2] and found.max(0).tolist() == [14, 11]
    assert pixels[3, 2].tolist() == [0, 128, 0] and not pixels[9, 7].any()


def test_a_box_thinner_than_a_pixel_is_drawn():
    picture = pictures.outlined(np.zeros((20, 30, 3), np.uint8), [[2.5, 3, 3, 15], [8, 3.25, 20, 3.5]], [1, 2])
    assert np.array(picture).any(2)[3:15, 2].all() and np.array(picture).any(2)[3, 8:20].all()


def test_heat_is_half_of_each_pixel():
    """Inferno is nearly black at 0 and light yellow (252, 255, 164) at 1."""
    image = np.zeros((2, 3, 3), np.uint8)
    image[1] = 100  # grey
    image[1, 2] = 255, 0, 0  # a luminance of 76
    heat = np.array([[0, 255, 0], [0, 255, 0]], np.uint8)
    found = np.array(pictures.heat_map(image, heat)).astype(int)
    for pixel, colour in {(0, 0): (0, 0, 2), (0, 1): (126, 127, 82),
                          (1, 0): (50, 50, 52), (1, 1): (176, 177, 132),
                          (1, 2): (38, 38, 40)}.items():
        assert np.abs(found[pixel] - colour).max() <= 1


def test_overlays_colour_the_objects_alone(tmp_path, capsys):
    """Half the photograph, half VOC's colour: grey 100 and (128, 0, 0) make (114, 50, 50)."""
    Image.new("RGB", (3, 2), (100, 100, 100)).save(tmp_path / "a.png")
    datasets.write_mask(tmp_path / "made/a.png", np.array([[0, 1, 0], [0, 0, 2]]))
    paths = {"a": tmp_path / "a.png", "without": tmp_path / "labels.png"}
    pictures.write_overlays(paths, tmp_path / "made", ["cat", "dog"])
    grey, red, green = [100] * 3, [114, 50, 50], [50, 114, 50]
    assert np.array(Image.open(tmp_path / "made/a_overlay.png")).tolist() == [[grey, red, grey], [grey, grey, green]]
    assert "overlays of 1 photographs, 1 cat, 2 dog" in capsys.readouterr().out


def test_each_column_shows_its_own_file(folder):
    """Class 1 stands on one pixel of the first row: 0 in Ycrf, 1 in Yret, 2 in the truth, 3 in the prediction."""
    name = datasets.read_list("data/shapes", "val")[0]
    image = Path(f"data/shapes/JPEGImages/{name}.jpg")
    places = {"Ycrf": "runs/shapes/labels/Ycrf", "Yret": "runs/shapes/labels/Yret",
              "truth": "data/shapes/SegmentationClassAug", "prediction": "made"}
    for pixel, place in enumerate(places.values()):
        labels = np.zeros(datasets.read_image(image).shape[:2])
        labels[0, pixel] = 1
        datasets.write_mask(f"{place}/{name}.png", labels)
    row = pictures.panel(settings.read("eval", []), name, image, Path("made"))
    assert row["attention u0"] is None and row["CAM u_c"] is None
    for kind, value in (("u0", 40), ("cam", 200)):
        heat = Image.new("L", Image.open(image).size, value)
        datasets.write_png(f"runs/shapes/labels/{kind}/{name}.png", heat)
    row = pictures.panel(settings.read("eval", []), name, image, Path("made"))
    for title, value in (("attention u0", 40), ("CAM u_c", 200)):
        pixels = datasets.read_image(image)
        assert row[title] == pictures.heat_map(pixels, np.full(pixels.shape[:2], value, np.uint8))
    for pixel, title in enumerate(places):
        found = np.array(row[title])[0]
        assert found[pixel].tolist() == [128, 0, 0] and found.any(1).nonzero()[0].tolist() == [pixel]
    assert np.array(row["Ycrf != Yret"])[0].nonzero()[0].tolist() == [0, 1]


def test_more_heat_is_brighter():
    found = np.array(pictures.heat_map(np.zeros((1, 256, 3), np.uint8), np.arange(256, dtype=np.uint8)[None]))[0]
    brightness = found @ np.array([0.299, 0.587, 0.114])
    assert (np.diff(brightness) > -1).all() and brightness[255] - brightness[0] > 110  # 1: rounding of each colour


@pytest.mark.parametrize("boxes, labels", [
    (((3, 2, 14, 17), (10, 5, 28, 19), (4, 4, 9, 9)), (3, 1, 3)), ((), ())])
def test_what_is_kept_of_attention_and_activation(boxes, labels):
    up, dense, weight, boxes, labels, outside = scene(0, boxes, labels)
    network = SimpleNamespace(features=lambda image: up.features.permute(2, 0, 1)[None],
                              classifier=SimpleNamespace(weight=weight))
    config = SimpleNamespace(make_labels=settings.MakeLabels(), run=settings.Run(), device=torch.device("cpu"))
    sample = {"id": "x", "image": torch.zeros(3, HEIGHT, WIDTH, dtype=torch.uint8), "boxes": boxes, "labels": labels,
              "background": outside[None].byte()}
    u = make_labels.unaries(config, network, sample)
    attention = literal_attention(dense, weight, outside, True)
    maps = literal_maps(dense, weight, boxes, labels, True)
    pictures_of = map(np.array, make_labels.heat(u))
    kept = attention.masked_fill(outside, 1), maps.amax(0) if len(maps) else torch.zeros(HEIGHT, WIDTH)
    for found, expected in zip(pictures_of, kept):
        assert found.dtype == np.uint8
        assert (torch.from_numpy(found) - 255 * expected).abs().max() < 1.01  # of 255; cut off, not rounded
    # What the CRF starts from: of A as it is outside the boxes, too; of the logits of these classes.
    u0 = attention * (attention >= 0.99 * attention.max())
    certain = torch.eye(1 + len(maps), dtype=torch.float64)[0][:, None, None]
    expected = torch.where(outside, certain, torch.cat((u0[None], maps)).softmax(0))
    torch.testing.assert_close(u.probabilities, expected, rtol=1e-5, atol=1e-6)
    config.make_labels.unary, config.make_labels.sizes = "logits", (1.0,)
    classes = sorted({*labels.tolist()})
    own = make_labels.unions(boxes, labels, classes, (HEIGHT, WIDTH))
    expected = make_labels.logit_probabilities(torch.einsum("kc,cyx->kyx", weight[[0, *classes]], dense), own, up,
                                               config.make_labels)
    found = make_labels.unaries(config, network, sample).probabilities
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_kept_pictures_are_made_again_where_one_is_missing(folder, monkeypatch):
    labels = folder / "runs/shapes/labels"
    command(monkeypatch, make_labels.main)
    files = {path.relative_to(labels): path.read_bytes() for path in labels.rglob("*.png")}
    ids = {split: datasets.read_list("data/shapes", split) for split in ("train", "val")}
    assert {str(path) for path in files} == {f"{kind}/{name}.png" for kind in ("box", "Ycrf", "Yret") for name in sum(
        ids.values(), [])} | {f"{kind}/{names[0]}.png" for kind in ("u0", "cam") for names in ids.values()}
    cam = Image.open(labels / "cam" / f"{ids['val'][0]}.png")
    assert cam.mode == "L" and cam.size == Image.open(f"data/shapes/JPEGImages/{ids['val'][0]}.jpg").size
    (labels / "cam" / f"{ids['val'][0]}.png").unlink()  # as a kill, or an earlier version, leaves it
    command(monkeypatch, make_labels.main)
    assert files == {path.relative_to(labels): path.read_bytes() for path in labels.rglob("*.png")}
    command(monkeypatch, make_labels.main, "pictures=2")
    assert len(list((labels / "cam").iterdir())) == 4


def test_a_run_without_labels_shows_boxes_and_truth(folder, monkeypatch, capsys):
    command(monkeypatch, pictures.main)
    assert drawn(folder) == {"panels.png"} and Image.open("runs/shapes/panels.png").width == 2 * 186 + 6
    assert "boxes, truth of 2 images" in capsys.readouterr().out


def test_a_run_with_labels_but_no_segmenter_and_no_truth(folder, monkeypatch, capsys):
    command(monkeypatch, make_labels.main, "data.truth=none")
    capsys.readouterr()
    command(monkeypatch, pictures.main, "data.truth=none", "photos=false", "panels=1")
    assert capsys.readouterr().out == ("runs/shapes/panels.png: boxes, attention u0, CAM u_c, Ycrf, Yret, Ycrf != Yret "
                                       "of 1 images\n")
    sheet, name = np.array(Image.open("runs/shapes/panels.png")), datasets.read_list("data/shapes", "val")[0]
    assert sheet.shape[1] == 6 * 186 + 6
    # The image's corner is outside every box, where u0 is 1 and every u_c is 0: yellow and black over the grey 224.
    boxes = datasets.read_annotation(f"data/shapes/Annotations/{name}.xml", SHAPES)[0]
    assert (boxes[:, :2].amin(0) > 4).all()
    corner = (22 + 2, 6 + 2)
    for column, colour in ((0, [224, 224, 224]), (1, [238, 239, 194]), (2, [112, 112, 114]), (3, [0, 0, 0])):
        found = sheet[corner[0], corner[1] + 186 * column].astype(int)
        assert np.abs(found - colour).max() <= 1


def test_what_is_wrong_with_a_run_is_one_line(folder, monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        command(monkeypatch, pictures.main, "name=elsewhere")
    line = capsys.readouterr().err
    assert end.value.code == 2 and line.startswith("pictures.py: runs/elsewhere: no such run") and line.count("\n") == 1
    assert not Path("runs/elsewhere").exists()
    name = datasets.read_list("data/shapes", "val")[0]
    datasets.write_mask(f"runs/shapes/labels/cam/{name}.png", np.zeros((3, 4)))
    with pytest.raises(SystemExit):
        command(monkeypatch, pictures.main)
    line = capsys.readouterr().err
    assert line.startswith(f"pictures.py: runs/shapes/labels/cam/{name}.png: not of its image's size")
    assert line.count("\n") == 1


# ---------------------------------------------------------------- numbers


METRICS = """
{"time": 1, "stage": "train_cls", "iteration": 0}
{"time": 1, "stage": "train_cls", "iteration": 10, "loss": 9.0, "right_boxes": 0.1, "right_queries": 0.9}
{"time": 1, "stage": "train_cls", "iteration": 40, "loss": 8.0, "right_boxes": 0.1, "right_queries": 0.9}
{"time": 2, "stage": "train_cls", "iteration": 0}
{"time": 2, "stage": "train_cls", "iteration": 20, "loss": 3.0, "right_boxes": 0.2, "right_queries": NaN}
{"time": 2, "stage": "train_cls", "iteration": 40, "loss": 2.5, "right_boxes": 0.3, "right_queries": 0.8}
{"time": 2, "stage": "train_cls", "iteration": 60, "loss": 2.0, "right_boxes": 0.4, "right_queries": 0.9}
{"time": 2, "stage": "train_cls", "itera
{"time": 3, "stage": "train_cls", "iteration": 60, "loss": 1.5, "right_boxes": 0.5, "right_queries": 1.0}
{"time": 3, "stage": "train_cls", "iteration": 80, "loss": 1.0, "right_boxes": 0.6, "right_queries": 1.0}
{"time": 4, "stage": "make_labels", "split": "val", "box": 40.0, "Ycrf": 60.0, "Yret": 50.0}
{"time": 5, "stage": "train_seg", "iteration": 20, "lr": 0.1, "loss": 0.7}
{"time": 6, "stage": "train_seg", "iteration": 20, "lr": 0.1, "loss": 0.5, "val_miou": 30.0}
{"time": 7, "stage": "train_seg", "iteration": 25, "lr": 0.1, "loss": 0.4}
{"time": 8, "stage": "train_seg", "iteration": 30, "lr": 0.1, "loss": 0.3, "val_miou": 40.0}
"""


@pytest.fixture
def numbers(folder):
    """A run with numbers of three starts of stage 1: one overwritten, one killed after 60 and taken up again after
    40, the last.
    """
    run = folder / "runs/shapes"
    (run / "metrics.jsonl").write_text(METRICS.strip())
    return folder


def test_the_last_pass_of_a_stage(numbers):
    lines = pictures.read_log(Path("runs/shapes/metrics.jsonl"))
    assert [(p["iteration"], p.get("loss")) for p in pictures.last_pass(lines, "train_cls")] == [
        (0, None), (20, 3.0), (40, 2.5), (60, 1.5), (80, 1.0)]
    assert [(p["iteration"], p["loss"]) for p in pictures.last_pass(lines, "train_seg")] == [
        (20, 0.5), (25, 0.4), (30, 0.3)]
    assert pictures.read_log(Path("nothing")) == []


def test_damaged_lines_are_skipped_and_counted(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    good = {"stage": "train_cls", "iteration": 3, "loss": 1.0}
    other = {"stage": "make_labels", "Ycrf": 1.0}
    path.write_bytes(b"\n".join([
        json.dumps(good).encode(), b'{"stage": "train_cls", "itera', b"[1]",
        b'{"stage": "train_cls", "iteration": "x"}', b"\xff\xfe", b"7",
        json.dumps(other).encode(), b""]))
    assert pictures.last_pass(pictures.read_log(path), "train_cls") == [good]
    assert f"{path}: 5 damaged lines skipped" in capsys.readouterr().out


def test_curves_hold_these_numbers(numbers, monkeypatch):
    figures, png_of = [], pictures.png_of
    monkeypatch.setattr(pictures, "png_of",
                        lambda f: figures.append(f) or png_of(f))
    command(monkeypatch, pictures.main)
    assert drawn(numbers) == {"panels.png", "curves.png"}
    curves = figures[0].axes
    assert [axes.get_title() for axes in curves] == [
        "stage 1: loss", "stage 1: share classified right", "stage 3: loss", "stage 3: mIoU on val, %"]
    assert curves[0].lines[0].get_xydata().tolist() == [
        [20, 3], [40, 2.5], [60, 1.5], [80, 1]]
    assert curves[1].lines[0].get_ydata().tolist() == [0.2, 0.3, 0.5, 0.6]
    assert math.isnan(curves[1].lines[1].get_ydata()[0])
    assert curves[2].lines[0].get_xydata().tolist() == [[20, 0.5], [25, 0.4], [30, 0.3]]
    assert curves[3].lines[0].get_xydata().tolist() == [[20, 30], [30, 40]]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run's settings; no TensorBoard writer is open."""
    monkeypatch.setattr(runs, "event_writers", {})
    return SimpleNamespace(path=tmp_path / "runs" / "x")


def test_tensorboard_gets_every_number(run):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for iteration, loss in ((2, 9.0), (4, 8.0), (6, 7.0)):
        runs.log(run, stage="train_cls", iteration=iteration, loss=loss)
    runs.event_writers.clear()  # killed, and started again from iteration 3
    time.sleep(1)  # files of events are read in the order of their names, which hold the second
    runs.log(run, stage="train_cls", iteration=4, loss=1.0)
    runs.log(run, stage="eval", split="val", method="plain", miou=47.5)

    def scalars(stage, name):
        events = accumulator.EventAccumulator(str(run.path / "tensorboard" / stage)).Reload()
        return [(event.step, event.value) for event in events.Scalars(name)]

    assert scalars("train_cls", "train_cls/loss") == [(2, 9.0), (4, 1.0)]
    assert scalars("eval", "eval/val/plain/miou") == [(0, 47.5)]
    assert len((run.path / "metrics.jsonl").read_text().splitlines()) == 5


def test_without_tensorboard_nothing_changes(run, monkeypatch, capsys):
    for name in [name for name in sys.modules if "tensorboard" in name]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    runs.log(run, stage="train_cls", iteration=2, loss=9.0)
    assert [path.name for path in run.path.iterdir()] == ["metrics.jsonl"]
    assert json.loads((run.path / "metrics.jsonl").read_text())["loss"] == 9.0
    assert capsys.readouterr() == ("", "")


def test_panels_lie_in_their_rows_and_no_label_is_blended(tmp_path, monkeypatch):
    shades = dict(zip("abcd", (40, 80, 120, 160)))
    stripes = Image.fromarray(np.tile(np.uint8([0, 255]), (45, 45)))
    monkeypatch.setattr(pictures, "panel", lambda config, name, *others: {
        "boxes": Image.new("RGB", (90, 45), (shades[name],) * 3), "Ycrf": stripes})
    config = settings.read("eval", ["panels=2"])
    config.path = tmp_path
    pictures.draw_panels(config, dict.fromkeys("abcd"), Path("made"))
    sheet = np.array(Image.open(tmp_path / "panels.png"))
    for top, name in ((22, "a"), (22 + 90 + 6, "c")):  # evenly spaced
        assert (sheet[top:top + 90, 6:186] == shades[name]).all()
        assert set(sheet[top:top + 90, 192:372].flat) == {0, 255}
