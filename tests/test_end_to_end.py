"""The four commands, one after another, on a small copy of the shapes set; and what they say to bad input."""
import hashlib
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
from conftest import ROOT
from conftest import script as run_script
from PIL import Image

import datasets
import runs
from tools.shapes import SHAPES, make_shapes

SMALL = ["train_cls.iterations=4", "train_seg.iterations=4", "train_cls.batch=4", "train_seg.batch=4",
         "train_cls.crop=65", "train_seg.crop=65", "train_cls.width=0.0625", "train_seg.width=0.0625", "run.workers=0",
         "run.device=cpu", "run.log_every=2", "make_labels.crf_iterations=2", "eval.crf_iterations=2", "eval.panels=2"]


def command(script, *arguments, cwd):
    return run_script(script, *SMALL, *arguments, cwd=cwd)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder where all four commands have run."""
    folder = tmp_path_factory.mktemp("work")
    make_shapes(folder / "data" / "shapes", train=8, val=4)
    for script in ("train_cls", "make_labels", "train_seg", "eval"):
        done = command(script, cwd=folder)
        assert done.returncode == 0, done.stderr
        (folder / f"{script}.out").write_text(done.stdout)
    return folder


def test_every_file_is_there(work):
    run = work / "runs" / "shapes"
    names = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    names = {name for name in names if not name.startswith("tensorboard/")}  # there if it is installed
    ids = {split: datasets.read_list(work / "data" / "shapes", split) for split in ("train", "val")}
    labels = {f"labels/{kind}/{name}.png" for kind in ("box", "Ycrf", "Yret", "u0", "cam")
              for name in ids["train"] + ids["val"]}
    predictions = {f"predictions/plain/{name}.png" for name in ids["val"]}
    others = {"cls.pt", "labels/made_with.json", "labels/boxes.json", "labels/scores.json", "seg.pt",
              "predictions/plain/made_with.json", "eval.json", "metrics.jsonl", "settings.yaml", "index.md", "lock",
              "panels.png", "curves.png"}
    assert names == labels | predictions | others
    index = (run / "index.md").read_text(encoding="utf-8")
    for name in names:
        kind = re.sub(r"shapes_\d+", "ID", name.replace("/plain/", "/METHOD/"))
        assert f"`{kind}`" in index or f"`{Path(kind).name}`" in index, name


def test_labels_are_palette_images_and_background_outside_boxes(work):
    run, root = work / "runs" / "shapes", work / "data" / "shapes"
    dataset = datasets.VOCDataset(root, "train", SHAPES)
    for sample in dataset:
        for kind in ("Ycrf", "Yret"):
            picture = Image.open(run / "labels" / kind / f"{sample['id']}.png")
            assert picture.mode == "P" and picture.getpalette()[3:6] == [128, 0, 0]
            mask = np.array(picture)
            assert (mask[sample["background"][0].numpy() == 1] == 0).all()
            assert set(np.unique(mask)) <= {0, *sample["labels"].tolist()}


def test_scores_are_those_of_the_files(work):
    run, root = work / "runs" / "shapes", work / "data" / "shapes"
    written = json.loads((run / "labels" / "scores.json").read_text())["val"]
    for kind in ("Ycrf", "Yret"):
        right = wrong = 0
        inter, union = np.zeros(7), np.zeros(7)
        for name in datasets.read_list(root, "val"):
            truth = np.array(Image.open(root / "SegmentationClassAug" / f"{name}.png"))
            labels = np.array(Image.open(run / "labels" / kind / f"{name}.png"))
            for y in range(truth.shape[0]):
                for t, p in zip(truth[y].tolist(), labels[y].tolist()):
                    if t == 255:
                        continue
                    right, wrong = right + (t == p), wrong + (t != p)
                    for c in {t, p}:
                        union[c] += 1
                    inter[t] += t == p
        iou = [100 * i / u for i, u in zip(inter, union) if u]
        assert written[kind]["miou"] == pytest.approx(sum(iou) / len(iou))
        assert written[kind]["pixel_accuracy"] == pytest.approx(100 * right / (right + wrong))


def test_the_screen_ends_with_the_table(work):
    lines = (work / "eval.out").read_text().split("mIoU, %, val\n")[1].splitlines()
    assert [line.strip().rsplit(maxsplit=1)[0] for line in lines[:4]] == [
        "whole boxes as labels", "Ycrf", "Yret", "segmenter, plain"]
    run = work / "runs/shapes"
    labels = json.loads((run / "labels/scores.json").read_text())["val"]
    expected = [labels[kind]["miou"] for kind in ("box", "Ycrf", "Yret")]
    expected.append(json.loads((run / "eval.json").read_text())["val, plain"]["miou"])
    assert [line.split()[-1] for line in lines[:4]] == [f"{miou:.1f}" for miou in expected]


def test_metrics_hold_every_number(work):
    lines = [json.loads(line) for line in (work / "runs" / "shapes" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["stage"], line.get("iteration")) for line in lines] == [
        ("train_cls", 0), ("train_cls", 2), ("train_cls", 4), ("make_labels", None), ("make_labels", None),
        ("train_seg", 0), ("train_seg", 2), ("train_seg", 4), ("eval", None)]
    keys = {"train_cls": "lr loss right_boxes right_queries", "make_labels": "split box Ycrf Yret",
            "train_seg": "lr loss", "eval": "split method miou"}
    for line in lines:
        numbers = [] if line.get("iteration") == 0 else keys[line["stage"]].split()
        assert line.keys() - {"time", "stage", "iteration"} == {*numbers}
        assert np.isfinite(line.get("loss", 0))
        if "lr" in line:  # of that step: 0.03 (1 - i / 4)^0.9 with i = 1, 3
            assert line["lr"] == pytest.approx(0.03 * (1 - (line["iteration"] - 1) / 4) ** 0.9)
    scores = json.loads((work / "runs/shapes/labels/scores.json").read_text())
    for line in lines[3:5]:
        assert all(line[kind] == scores[line["split"]][kind]["miou"] for kind in ("box", "Ycrf", "Yret"))
    assert lines[-1]["miou"] == json.loads((work / "runs/shapes/eval.json").read_text())["val, plain"]["miou"]


def test_panels_hold_two_rows(work):
    width, height = Image.open(work / "runs" / "shapes" / "panels.png").size
    assert width == 8 * 186 + 6 and height > 2 * 120


def test_scales_flip_and_crf_are_named_and_kept_beside_plain(spoilt):
    done = command("eval", "scales=[0.5, 1]", "flip=true", "crf=true", "panels=0", "run.workers=1", cwd=spoilt)
    assert done.returncode == 0, done.stderr
    assert "segmenter on val, 4 images, scales 0.5 1 + flip + CRF" in done.stdout
    results = json.loads((spoilt / "runs" / "shapes" / "eval.json").read_text())
    assert set(results) == {"val, plain", "val, scales 0.5 1 + flip + CRF"}


def test_a_folder_of_labels_is_scored(work):
    done = command("eval", "labels=data/shapes/SegmentationClassAug", cwd=work)
    assert done.returncode == 0, done.stderr
    assert "mean               100.0" in done.stdout
    done = command("eval", "labels=runs/shapes/labels/Ycrf", "split=train", cwd=work)
    miou = json.loads((work / "runs/shapes/labels/scores.json").read_text())["train"]["Ycrf"]["miou"]
    assert f"mean            {miou:8.1f}" in done.stdout


def test_a_reader_that_has_seen_enough(work):
    """As `| head -1`: nothing is said of the pipe."""
    read, write = os.pipe()
    os.close(read)
    process = subprocess.Popen([sys.executable, ROOT / "eval.py", *SMALL, "labels=data/shapes/SegmentationClassAug"],
                               cwd=work, stdout=write, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "PYTHONUNBUFFERED": ""})
    os.close(write)
    said = process.stderr.read()
    assert process.wait() == 1 and "scores val" in said and "Pipe" not in said and "Traceback" not in said


def test_any_pictures(spoilt):
    source = Image.open(next((spoilt / "data/shapes/JPEGImages").iterdir()))
    (spoilt / "photos").mkdir()
    source.save(spoilt / "photos/grey one.png")
    source.convert("L").resize((90, 60)).save(spoilt / "photos/b.jpg")
    done = command("eval", "images=photos/*", "flip=true", cwd=spoilt)
    assert done.returncode == 0, done.stderr
    folder = spoilt / "runs/shapes/pictures/flip"
    for name, size in (("grey one", source.size), ("b", (90, 60))):
        labels, overlay = Image.open(folder / f"{name}.png"), Image.open(folder / f"{name}_overlay.png")
        assert labels.mode == "P" and overlay.mode == "RGB" and labels.size == overlay.size == size
        same = np.array(labels) == 0
        original = np.array(Image.open(next((spoilt / "photos").glob(f"{name}*"))).convert("RGB"))
        assert (np.array(overlay)[same] == original[same]).all()
    (spoilt / "others").mkdir()
    source.resize((70, 50)).save(spoilt / "others/b.jpg")
    done = command("eval", "images=others/b.jpg", "flip=true", cwd=spoilt)  # another picture of the same name
    assert done.returncode == 0, done.stderr
    assert Image.open(folder / "b.png").size == Image.open(folder / "b_overlay.png").size == (70, 50)
    done = command("eval", "images=nothing/*", cwd=spoilt)
    assert done.returncode == 2 and "no such image files" in done.stderr


def test_a_folder_of_photographs(work, tmp_path):
    """One is no image, one is longer than max_side, one is turned by EXIF; a film lies beside it."""
    shutil.copytree(work / "runs", tmp_path / "runs")
    source = Image.open(next((work / "data/shapes/JPEGImages").iterdir()))
    folder = tmp_path / "[photos]"
    folder.mkdir()
    (folder / "notes.png").write_text("no image")
    (folder / "turned.mov").write_text("no image, and not called as one")
    source.resize((200, 100)).save(folder / "long.png")
    turned = Image.Exif()
    turned[274] = 6
    source.resize((80, 60)).save(folder / "turned.jpg", exif=turned)
    source.resize((30, 20)).save(folder / "long_overlay.png")
    done = command("eval", "images=[photos]", "max_side=100", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "skipped: [photos]/notes.png" in done.stderr and ".mov" not in done.stderr
    results = tmp_path / "runs/shapes/pictures/plain"
    for name, size in {"long": (200, 100), "turned": (60, 80)}.items():
        for ending in ("", "_overlay" if name != "long" else "_overlay_"):
            assert Image.open(results / f"{name}{ending}.png").size == size
    assert Image.open(results / "long_overlay.png").size == (30, 20)
    (folder / "turned.jpg").write_bytes(b"no image any more")
    done = command("eval", "images=[photos]", "max_side=90", cwd=tmp_path)
    assert done.returncode == 0 and "labels and overlays of 2 photographs" in done.stdout, done.stderr
    assert not (results / "turned.png").exists() and not (results / "turned_overlay.png").exists()


def test_a_list_is_scored_on_the_images_that_have_a_mask(work, tmp_path):
    """It is labelled whole; the scores are those of the same images in a list of their own, and say how many."""
    shutil.copytree(work, tmp_path, dirs_exist_ok=True)
    root = tmp_path / "data/shapes"
    names = datasets.read_list(root, "val")
    (root / "ImageSets/Main").mkdir()
    (root / "ImageSets/Main/whole.txt").write_text("\n".join(names))
    (root / "ImageSets/Segmentation/masked.txt").write_text("\n".join(names[1:]))
    (root / f"SegmentationClassAug/{names[0]}.png").unlink()
    for split in ("Main/whole", "whole", "masked"):
        done = command("make_labels", f"make_labels.splits=[{split}]", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        evaluated = command("eval", f"eval.split={split}", cwd=tmp_path)
        assert evaluated.stdout.count("segmenter, plain") == 1, evaluated.stderr  # in the summary: of this list
    labels = json.loads((tmp_path / "runs/shapes/labels/scores.json").read_text())
    assert labels["Main/whole"] == labels["whole"] == labels["masked"]
    assert labels["whole"]["Ycrf"]["images"] == len(names) - 1
    assert f"labels of masked, {len(names) - 1} images" in done.stdout
    segmenter = json.loads((tmp_path / "runs/shapes/eval.json").read_text())
    assert segmenter["Main/whole, plain"]["iou"] == segmenter["masked, plain"]["iou"]


def test_same_seed_same_weights(work, tmp_path):
    shutil.copytree(work / "data", tmp_path / "data")
    assert command("train_cls", cwd=tmp_path).returncode == 0
    first, second = (torch.load(f / "runs/shapes/cls.pt", weights_only=True)["model"] for f in (work, tmp_path))
    assert all(torch.equal(first[name], second[name]) for name in first)


# ---------------------------------------------------------------- bad input


@pytest.fixture
def spoilt(work, tmp_path, monkeypatch):
    """A copy of the folder, to be spoilt, as the current one."""
    shutil.copytree(work, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(script, capsys, monkeypatch, *arguments):
    """Run a script in this process; returns the one line that it must end with."""
    module = __import__(script)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *SMALL, "data.shapes=false", *arguments])

    def times():
        """Of every file but settings.yaml and lock, which a start writes."""
        return {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*.*")
                if path.is_file() and path.name != "settings.yaml"}

    before = times()
    with pytest.raises(SystemExit) as end:
        runs.launch(script, module.main)
    lines = [line for line in capsys.readouterr().err.splitlines() if "%|" not in line and line]
    assert end.value.code == 2 and len(lines) == 1, lines
    assert times() == before
    return lines[0]


IMAGE, XML = "data/shapes/JPEGImages/{}.jpg", "data/shapes/Annotations/{}.xml"
MASK = "data/shapes/SegmentationClassAug/{}.png"


@pytest.mark.parametrize("script, path, change, words", [
    ("train_cls", IMAGE, None, "no such image"),
    ("train_cls", IMAGE, b"\xff\xd8broken", ""),
    ("train_cls", XML, None, "no such annotation"),
    ("train_cls", XML, b"<annotation><object>", ""),
    ("make_labels", MASK, b"\x89PNG broken", ""),
    ("eval", MASK, b"\x89PNG broken", ""),
    ("train_seg", "runs/shapes/labels/Yret/{}.png", None, "no such mask"),
])
def test_files_that_are_missing_or_broken(spoilt, capsys, monkeypatch, script, path, change, words):
    split = "val" if script == "eval" else "train"
    file = Path(path.format(datasets.read_list("data/shapes", split)[0]))
    file.write_bytes(change) if change else file.unlink()
    for checkpoint in {"train_cls": ["cls.pt"], "train_seg": ["seg.pt"]}.get(script, ()):
        Path("runs/shapes", checkpoint).unlink()
    line = refused(script, capsys, monkeypatch)
    assert str(file) in line and words in line


def test_a_broken_image_in_a_worker_is_one_line_too(spoilt, capsys, monkeypatch):
    file = Path(IMAGE.format(datasets.read_list("data/shapes", "train")[0]))
    file.write_bytes(b"\xff\xd8broken")
    Path("runs/shapes/cls.pt").unlink()
    line = refused("train_cls", capsys, monkeypatch, "run.workers=1")
    assert line.startswith(f"train_cls.py: {file}: ")


@pytest.mark.parametrize("old, new, word", [
    ("<xmax>{}</xmax>", "<xmax>9999</xmax>", "leaves the image"),
    ("<name>{}</name>", "<name>rign</name>", "rign"),
])
def test_bad_boxes(spoilt, capsys, monkeypatch, old, new, word):
    file = Path(XML.format(datasets.read_list("data/shapes", "train")[0]))
    pattern = re.escape(old).replace(r"\{\}", "[a-z0-9]+")
    file.write_text(re.sub(pattern, new, file.read_text(), count=1))
    line = refused("train_cls", capsys, monkeypatch)
    assert str(file) in line and word in line


def test_missing_folder_list_and_settings(spoilt, capsys, monkeypatch):
    assert "nowhere: no such folder" in refused("train_cls", capsys, monkeypatch, "data.root=nowhere")
    assert "trian.txt" in refused("train_cls", capsys, monkeypatch, "data.train=trian")
    assert "did you mean lr?" in refused("train_cls", capsys, monkeypatch, "train_cls.lrr=1")
    assert "nowhere.pth: no such file" in refused("train_cls", capsys, monkeypatch, "weights=nowhere.pth")
    assert "train_cls.crop is 64" in refused("train_cls", capsys, monkeypatch, "crop=64")
    assert "train_seg.batch is 0" in refused("train_seg", capsys, monkeypatch, "batch=0")
    assert "run.device: nonsense" in refused("eval", capsys, monkeypatch, "run.device=nonsense")
    assert "no list to work on" in refused("eval", capsys, monkeypatch, "data.val=")
    for truth in ("none", ""):
        assert "no true masks" in refused("eval", capsys, monkeypatch, "labels=runs", f"data.truth={truth}")
    assert "background, which is label 0" in refused("train_cls", capsys, monkeypatch, "data.classes=[background, bar]")


def test_a_stage_whose_input_is_missing_names_the_command_that_makes_it(spoilt, capsys, monkeypatch):
    shutil.rmtree("runs/shapes")
    Path("runs/shapes").mkdir()
    assert "python train_cls.py" in refused("make_labels", capsys, monkeypatch)
    assert "python make_labels.py" in refused("train_seg", capsys, monkeypatch)
    assert "python train_seg.py" in refused("eval", capsys, monkeypatch)


def test_checkpoints_of_others(spoilt, capsys, monkeypatch):
    assert "the settings say" in refused("make_labels", capsys, monkeypatch, "train_cls.width=0.125")
    assert "classes" in refused("eval", capsys, monkeypatch, "data.classes=[bar, ring, cross, crescent, vee, wav]")
    Path("runs/shapes/seg.pt").write_bytes(b"nonsense")
    assert "not a checkpoint" in refused("eval", capsys, monkeypatch)
    shutil.copy("runs/shapes/cls.pt", "runs/shapes/seg.pt")
    assert "a BoxClassifier, not a DeepLab, which train_seg.py makes" in refused("eval", capsys, monkeypatch)
    torch.save({"network": {}}, "runs/shapes/cls.pt")
    assert "not a cls.pt or seg.pt" in refused("make_labels", capsys, monkeypatch)


def test_a_checkpoint_that_would_run_code_is_refused(spoilt, capsys, monkeypatch):
    class Attack:
        def __reduce__(self):
            return Path.touch, (Path("attacked"),)

    torch.save({"network": Attack()}, "runs/shapes/cls.pt")
    assert "not a checkpoint" in refused("make_labels", capsys, monkeypatch)
    assert not Path("attacked").exists()


@pytest.mark.parametrize("loss", ["crf", "ret", "agree", "entropy", "bootstrap"])
def test_every_loss_trains(spoilt, monkeypatch, loss):
    import train_seg
    monkeypatch.setattr(sys, "argv", ["train_seg.py", *SMALL, f"loss={loss}", "overwrite=true"])
    runs.launch("train_seg", train_seg.main)
    assert all(v.isfinite().all() for v in torch.load("runs/shapes/seg.pt", weights_only=True)["model"].values())


def test_a_segmenter_of_another_temperature_predicts_anew(spoilt, monkeypatch):
    earlier = next(Path("runs/shapes/predictions/plain").glob("*.png"))
    earlier.write_bytes(b"earlier")
    for script, overwrite in (("train_seg", "true"), ("eval", "false")):
        monkeypatch.setattr(sys, "argv", [
            f"{script}.py", *SMALL, "train_seg.temperature=10", f"run.overwrite={overwrite}"])
        runs.launch(script, __import__(script).main)
    made = json.loads(Path("runs/shapes/predictions/plain/made_with.json").read_text())
    assert made["seg.pt"] == hashlib.sha256(Path("runs/shapes/seg.pt").read_bytes()).hexdigest()[:12]
    assert earlier.read_bytes() != b"earlier"


def test_semi_supervised(spoilt, capsys, monkeypatch):
    """Images of the list data.masks learn from their true masks: their labels are not needed."""
    import train_seg
    ids = datasets.read_list("data/shapes", "train")
    Path("data/shapes/ImageSets/Segmentation/known.txt").write_text("\n".join(ids[:3]))
    for name in ids[:3]:
        Path(f"runs/shapes/labels/Ycrf/{name}.png").unlink()
    weights = torch.load("runs/shapes/seg.pt", weights_only=True)["model"]
    monkeypatch.setattr(sys, "argv", ["train_seg.py", *SMALL, "data.masks=known", "overwrite=true"])
    runs.launch("train_seg", train_seg.main)
    other = torch.load("runs/shapes/seg.pt", weights_only=True)["model"]
    assert not all(torch.equal(weights[k], other[k]) for k in weights)
    for name in ids[:3]:  # the same as if both labels were the true masks
        for kind in ("Ycrf", "Yret"):
            shutil.copy(MASK.format(name), f"runs/shapes/labels/{kind}/{name}.png")
    both = "labels=[runs/shapes/labels/Ycrf, runs/shapes/labels/Yret]"
    monkeypatch.setattr(sys, "argv", [
        "train_seg.py", *SMALL, "name=copied", both, "train_seg.weights=runs/shapes/cls.pt"])
    runs.launch("train_seg", train_seg.main)
    copied = torch.load("runs/copied/seg.pt", weights_only=True)["model"]
    assert all(torch.equal(copied[k], other[k]) for k in other)
    line = refused("train_seg", capsys, monkeypatch, "data.masks=train")
    assert "data.masks 'known' -> 'train'" in line
    Path("data/shapes/ImageSets/Segmentation/rest.txt").write_text("\n".join(ids[2:]))
    line = refused("train_seg", capsys, monkeypatch, "data.masks=known", "data.train=rest")
    assert f"data.masks: {ids[0]} is not in data.train (2 of 3 are not)" in line


@pytest.mark.parametrize("argument", ["pooling=gap", "grid=2", "bins=1", "balance=true", "run.precision=bf16",
                                      "run.compile=true", "run.deterministic=true"])
def test_every_setting_of_stage_1_trains(spoilt, monkeypatch, argument):
    import train_cls
    monkeypatch.setattr(sys, "argv", ["train_cls.py", *SMALL, argument, "overwrite=true"])
    runs.launch("train_cls", train_cls.main)
    assert torch.are_deterministic_algorithms_enabled() == ("deterministic" in argument)
    torch.use_deterministic_algorithms(False)  # as before
    assert all(v.isfinite().all() for v in torch.load("runs/shapes/cls.pt", weights_only=True)["model"].values())


@pytest.mark.parametrize("argument", [
    "u0=false", "cam_norm=class", "softmax=false", "threshold=0", "unary=logits", "run.workers=1"])
def test_every_setting_of_stage_2_labels(spoilt, monkeypatch, argument):
    import make_labels
    shutil.rmtree("runs/shapes/labels")
    monkeypatch.setattr(sys, "argv", ["make_labels.py", *SMALL, argument, "splits=[val]"])
    runs.launch("make_labels", make_labels.main)
    assert len(list(Path("runs/shapes/labels/Ycrf").glob("*.png"))) == 4


def test_labels_remember_the_settings_that_made_them(spoilt, capsys, monkeypatch):
    """Those of logits decide nothing without logits."""
    import make_labels
    monkeypatch.setattr(sys, "argv", ["make_labels.py", *SMALL, "logit_scale=0.3", "sizes=[1]"])
    runs.launch("make_labels", make_labels.main)
    line = refused("make_labels", capsys, monkeypatch, "unary=logits", "logit_scale=0.3")
    assert "make_labels.unary 'attention' -> 'logits'" in line and "make_labels.logit_scale 0.05 -> 0.3" in line


def test_labels_of_corrected_boxes_are_made_again(spoilt, capsys, monkeypatch):
    """One image's, of every kind; the others stay, also after one of another list alone. A start that ends while it
    removes them loses nothing."""
    import make_labels
    with open(XML.format(datasets.read_list("data/shapes", "train")[0]), "a") as other:
        other.write("\n")
    monkeypatch.setattr(sys, "argv", ["make_labels.py", *SMALL, "make_labels.splits=[train]"])
    runs.launch("make_labels", make_labels.main)
    monkeypatch.setattr(sys, "argv", ["make_labels.py", *SMALL])
    folder, name = Path("runs/shapes/labels"), datasets.read_list("data/shapes", "val")[1]
    files = {path: path.read_bytes() for path in folder.rglob("*.png")}
    xml = Path(XML.format(name))
    text = re.sub(r"<object>.*</object>", "", xml.read_text(), flags=re.S)
    box = "<bndbox><xmin>11</xmin><ymin>21</ymin><xmax>40</xmax><ymax>60</ymax></bndbox>"
    xml.write_text(text.replace("</annotation>", f"<object><name>{SHAPES[2]}</name>{box}</object></annotation>"))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda *arguments, **options: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            runs.launch("make_labels", make_labels.main)
    for path in folder.rglob("*.png"):
        os.utime(path, (1, 1))
    runs.launch("make_labels", make_labels.main)
    again = {path for path in folder.rglob("*.png") if path.stat().st_mtime > 1}
    assert again == {folder / f"{kind}/{name}.png" for kind in ("box", "Ycrf", "Yret", "u0", "cam")}
    assert all(path.read_bytes() == files[path] for path in files.keys() - again)
    filled = np.array(Image.open(folder / f"box/{name}.png"))
    assert (filled[20:60, 10:40] == 3).all() and (filled > 0).sum() == 40 * 30
    assert set(np.unique(np.array(Image.open(folder / f"Ycrf/{name}.png")))) <= {0, 3}
