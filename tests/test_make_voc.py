"""`make voc2007` with a server of the test's own and 20 images: each step is killed at work and started again."""
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

import pytest
import yaml
from conftest import ROOT
from test_download import TEST, TRAINVAL, Server, packed

import datasets
from tools.shapes import SHAPES, make_shapes

TINY = dict(backbone="vgg16", weights="none", width=0.0625, iterations=15, batch=2, crop=65)


def archives(folder):
    """{name: tar}: the shapes set with VOC's classes, 16 images to train on and 4 to test on."""
    make_shapes(folder, train=16, val=4)
    (folder / "SegmentationClassAug").rename(folder / "SegmentationClass")
    for path in (folder / "Annotations").iterdir():
        for shape, name in zip(SHAPES, datasets.VOC_CLASSES):
            path.write_text(path.read_text().replace(f"<name>{shape}</name>", f"<name>{name}</name>"))
    lists, tars = folder / "ImageSets/Segmentation", {}
    for archive, split, new in ((TRAINVAL, "train", "Main/trainval"), (TEST, "val", "Segmentation/test")):
        ids = datasets.read_list(folder, split)
        files = {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*.*"))
                 if path.stem in ids} | {f"ImageSets/{new}.txt": (lists / f"{split}.txt").read_bytes()}
        tars[archive] = packed({f"VOCdevkit/VOC2007/{path}": content for path, content in files.items()})
    return tars


@pytest.fixture
def server(tmp_path):
    server = Server(archives(tmp_path / "shapes"))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.go_on.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def work(tmp_path, server):
    """A folder that looks like a checkout where everything is installed, with a Python that knows the server."""
    folder = tmp_path / "checkout"
    (folder / ".venv").mkdir(parents=True)
    for name in ("Makefile", "requirements.txt", "requirements-dev.txt", "tools", *(p.name for p in ROOT.glob("*.py"))):
        (folder / name).symlink_to(ROOT / name)
    for name in ("installed", "installed-dev"):
        (folder / ".venv" / name).touch()
    (folder / "sitecustomize.py").write_text(
        "import json\nfrom torchvision.datasets.voc import DATASET_YEAR_DICT\n"
        f"for key, where in json.loads({json.dumps(server.where())!r}).items():\n"
        "    DATASET_YEAR_DICT[key].update(where)\n")
    config = yaml.safe_load((ROOT / "configs/voc2007.yaml").read_text())
    config["run"] |= dict(workers=0, save_every=1, precision="fp32")
    for script in ("train_cls", "train_seg"):
        config[script] |= TINY
    config["make_labels"]["crf_iterations"] = config.setdefault("eval", {})["crf_iterations"] = 1
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config))
    return folder


def make(work, *options):
    """make's arguments, for subprocess."""
    # Not of the `make test` that runs this, if there is one.
    env = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    words = ["make", *options, "voc2007", f"PY={sys.executable}", "CONFIG=tiny.yaml"]
    return dict(args=words, cwd=work, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
                env=env | {"PYTHONPATH": str(work), "OMP_NUM_THREADS": "1"})


# What a step has written once it is halfway; the table, which writes nothing, is killed at its start.
HALFWAY = ["cls.pt.partial", "labels/Yret/*.png", "seg.pt.partial", "predictions/plain/*.png",
           "predictions/scales*/*.png", "eval.json"]


def test_each_step_is_killed_and_goes_on(work, server):
    steps = subprocess.run(**make(work, "-n")).stdout.splitlines()
    assert len(steps) == 7 and "download_voc.py 2007 data" in steps[0] and "tools/paper.py tiny.yaml" in steps[-1]
    server.stalled = {TEST}
    for step, halfway in zip(steps, ["", *HALFWAY], strict=True):
        start = make(work) | dict(args=["bash", "-c", step])
        killed = subprocess.Popen(**start, start_new_session=True)
        if halfway:
            while killed.poll() is None and not list((work / "runs/voc2007").glob(halfway)):
                time.sleep(0.005)
        else:
            assert server.half_sent.wait(300)
        with suppress(ProcessLookupError):
            os.killpg(killed.pid, signal.SIGKILL)
        error = killed.communicate()[1]
        # A slow machine may notice only when it has come to its end.
        assert killed.returncode in (-signal.SIGKILL, 0), error
        resumes = halfway.endswith(".partial") and any((work / "runs/voc2007").glob(halfway))
        server.stalled = set()
        server.go_on.set()
        done = subprocess.run(**start)
        assert done.returncode == 0, done.stderr
        assert ("resuming from iteration" in done.stdout) == resumes

    kept = {path: path.stat().st_mtime_ns for path in (work / "runs").rglob("*.p[tn]*") if path.parent.name != "voc2007"
            or path.suffix == ".pt"}
    whole = subprocess.run(**make(work, "-s"))
    assert whole.returncode == 0, whole.stderr
    assert kept == {path: path.stat().st_mtime_ns for path in kept} and len(kept) == 2 + 20 * 3 + 12 * 2 + 2 * 4
    assert len(server.fetched()) == 3  # TEST twice

    labels = json.loads((work / "runs/voc2007/labels/scores.json").read_text())["Segmentation/test"]
    results = json.loads((work / "runs/voc2007/eval.json").read_text())
    full = "scales 0.5 0.75 1 1.5 + flip + CRF"
    plain, headline = (results[f"Segmentation/test, {method}"]["miou"] for method in ("plain", full))
    assert whole.stdout.splitlines()[-7:] == [
        "| mIoU, % | paper, VOC 2012 val | here, voc2007, Segmentation/test |", "|---|---|---|",
        f"| labels: whole box | 62.2 | {labels['box']['miou']:.1f} |",
        f"| labels: Ycrf | 79.2 | {labels['Ycrf']['miou']:.1f} |",
        f"| labels: Yret | 69.9 | {labels['Yret']['miou']:.1f} |",
        f"| segmenter (paper: V1, VGG-16), plain | 62.4 | {plain:.1f} |",
        f"| segmenter (paper: V1, VGG-16), {full} | 68.1 | {headline:.1f} |"]


def test_make_voc_is_the_same_with_voc_2012():
    steps = subprocess.run(["make", "-n", "voc", "PY=python"], cwd=ROOT, capture_output=True, text=True).stdout
    assert "python tools/download_voc.py 2012 data\npython train_cls.py configs/voc_vgg16.yaml\n" in steps


def test_what_is_not_scored_yet(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "tools/paper.py", ROOT / "configs/voc_resnet101.yaml"], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-3:] == [
        "| labels: Yret | 69.9 | - |", "| segmenter (paper: V2, ResNet-101), plain | - | - |",
        "| segmenter (paper: V2, ResNet-101), scales 0.5 0.75 1 1.5 + flip + CRF | 74.6 | - |"]
