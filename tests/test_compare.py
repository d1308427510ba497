"""tools/compare.py: literal numbers in, a literal table out."""
import json
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.fixture
def runs(tmp_path):
    """Three runs; of the class "b" the last has no IoU."""
    for name, a, b, images in (("x_0", 60, 10, 5), ("x_1", 62, 20, 5), ("x_2", 61, None, 5), ("other", 61, 15, 4)):
        iou = dict(a=a, b=b)
        known = [v for v in (a, b) if v is not None]
        result = dict(images=images, miou=sum(known) / len(known), iou=iou)
        (tmp_path / f"runs/{name}/labels").mkdir(parents=True)
        (tmp_path / f"runs/{name}/eval.json").write_text(json.dumps({"val, plain": result, "val, CRF": result}))
        (tmp_path / f"runs/{name}/labels/scores.json").write_text(
            json.dumps({"val": {"Ycrf": result | dict(miou=90 + a / 10)}}))
    return tmp_path


def command(folder, *arguments):
    return subprocess.run([sys.executable, ROOT / "tools/compare.py", *arguments], cwd=folder, capture_output=True,
                          text=True, encoding="utf-8", env={"PYTHONIOENCODING": "utf-8"})


def test_runs_side_by_side(runs):
    """Of 60, 62, 61: mean 61, deviation 1, and 4.303 / sqrt(3) = 2.48."""
    done = command(runs, "val, plain", "x_0", "x_1", "x_2")
    assert done.returncode == 0, done.stderr
    assert done.stdout == """\
| IoU, %, val, plain | x_0 | x_1 | x_2 | mean | deviation | 95 % |
|---|---|---|---|---|---|---|
| a | 60.0 | 62.0 | 61.0 | 61.00 | 1.00 | ± 2.48 |
| b | 10.0 | 20.0 | - | - | - | - |
| mean | 35.0 | 41.0 | 61.0 | 45.67 | 13.61 | ± 33.82 |
"""


def test_labels_of_one_run(runs):
    done = command(runs, "val, Ycrf", "x_0")
    assert done.stdout == "| IoU, %, val, Ycrf | x_0 |\n|---|---|\n| a | 60.0 |\n| b | 10.0 |\n| mean | 96.0 |\n"


def test_differences_seed_by_seed(runs):
    """60 - 61, 62 - 60, 61 - 62 of class a: mean 0, deviation sqrt(3), and 4.303 sqrt(3) / sqrt(3) = 4.30."""
    done = command(runs, "val, plain", "x_0", "x_1", "x_2", "minus", "x_2", "x_0", "x_1")
    assert done.stdout == """\
| IoU, %, val, plain | x_0 - x_2 | x_1 - x_0 | x_2 - x_1 | mean | deviation | 95 % |
|---|---|---|---|---|---|---|
| a | -1.0 | 2.0 | -1.0 | 0.00 | 1.73 | ± 4.30 |
| b | - | 10.0 | - | - | - | - |
| mean | -26.0 | 6.0 | 20.0 | 0.00 | 23.58 | ± 58.58 |
"""


@pytest.mark.parametrize("arguments, words", [
    (["val, plain", "x_0", "minus", "x_1", "x_2"], "1 runs minus 2: give one of each seed on both sides"),
    (["val, flip", "x_0"], "runs/x_0: no scores of 'val, flip', only of 'val, plain', 'val, CRF', 'val, Ycrf'"),
    (["val, plain", "x_0", "minus"],
     "usage: python tools/compare.py KEY RUN [RUN ...] [minus RUN [RUN ...]]"),
    (["val, plain", "x_0", "nowhere"], "runs/nowhere: no scores of 'val, plain', only of nothing"),
    (["val, plain", "x_0", "other"], "runs/other: scores of 4 images, not of 5")])
def test_what_cannot_be_compared_is_one_line(runs, arguments, words):
    done = command(runs, *arguments)
    assert done.returncode == 2 and done.stderr == f"{words}\n" and not done.stdout


def test_published_runs(tmp_path):
    """docs/voc2007 as folders again, of which the table says what docs/results.md does."""
    unpack = [sys.executable, ROOT / "benchmarks/published.py", ROOT / "docs/voc2007/segmenters.json"]
    done = subprocess.run(unpack, cwd=tmp_path, capture_output=True, text=True)
    assert "| voc2007_nal_1 | train_seg | 1,500 | 1.6 |" in done.stdout.splitlines(), done.stderr
    for name, files in json.loads((ROOT / "docs/voc2007/segmenters.json").read_text()).items():
        folder = tmp_path / "runs" / name
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        assert list(map(json.loads, lines)) == files["metrics.jsonl"]
        assert json.loads((folder / "eval.json").read_text()) == files["eval.json"]
    ret, crf = ([f"voc2007_{loss}_{seed}" for seed in (0, 1, 2)] for loss in ("ret", "crf"))
    last = command(tmp_path, "Segmentation/test, plain", *ret, "minus", *crf).stdout.splitlines()[-1]
    assert last.endswith("| 0.6 | 0.3 | 0.6 | 0.52 | 0.15 | ± 0.38 |") and "| +0.52 ± 0.38 |" in (
        ROOT / "docs/results.md").read_text()
    own = tmp_path / "runs/voc2007_nal_0/eval.json"
    own.write_text("somebody's own")
    again = subprocess.run(unpack, cwd=tmp_path, capture_output=True, text=True)
    assert again.stdout == done.stdout and own.read_text() == "somebody's own"


def test_hours_leave_out_stops():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from published import hours
    assert hours([1000, 1060, 1360, 1661, 1721]) == (60 + 300 + 60) / 3600


def test_without_scipy(runs):
    code = ("import sys, runpy; sys.modules['scipy'] = None; sys.argv = ['compare.py', 'val, plain', 'x_0', 'x_1'];"
            f"runpy.run_path({str(ROOT / 'tools/compare.py')!r}, run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", code], cwd=runs, capture_output=True, text=True)
    assert done.returncode and done.stderr == "the 95 % interval needs scipy: pip install scipy\n"
