"""Stages that are killed at random moments and started again end with the files of stages that never were."""
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from tools.shapes import make_shapes

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["train_cls.iterations=60", "train_seg.iterations=60", "train_cls.batch=2", "train_seg.batch=2",
         "train_cls.crop=65", "train_seg.crop=65", "train_cls.width=0.0625", "train_seg.width=0.0625",
         "train_cls.dropout=0.3", "run.workers=0", "run.log_every=5", "run.save_every=3",
         "make_labels.crf_iterations=2", "eval.crf_iterations=2", "eval.crf=true"]
if torch.cuda.is_available():
    SMALL.append("run.deterministic=true")
STAGES = {"train_cls": "cls.pt", "make_labels": "labels", "train_seg": "seg.pt", "eval": "predictions"}
KILLS = int(os.environ.get("KILLS", 3))  # in each stage


def start(script, folder):
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, ROOT / f"{script}.py", *SMALL], cwd=folder, text=True,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=one_thread)


def wait_for_work(process):
    """Until the bar appears: what comes before is the interpreter's start. False if the stage ends without one."""
    seen = ""
    while "%|" not in seen:
        letter = process.stderr.read(1)
        if not letter:
            return False
        seen += letter
    return True


def finish(script, folder):
    """Seconds of work."""
    process = start(script, folder)
    wait_for_work(process)
    begin = time.monotonic()
    _, error = process.communicate()
    assert process.returncode == 0, error
    return time.monotonic() - begin


def files(folder, output):
    """Relative name -> digest of what a stage has made, other than logs."""
    paths = [folder / output] if (folder / output).is_file() else sorted((folder / output).rglob("*"))
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths if p.is_file()}


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory):
    """A run of all stages; how long each took."""
    folder = tmp_path_factory.mktemp("whole")
    make_shapes(folder / "data" / "shapes", train=20, val=10)
    return folder, {script: finish(script, folder) for script in STAGES}


def check_whole(run):
    """Of what lies in the run under its final name, all can be read."""
    for path in run.rglob("*.png"):
        if path.name[0] != ".":
            Image.open(path).load()


@pytest.mark.parametrize("script", STAGES)
def test_killed_at_random_moments(never_stopped, tmp_path, script):
    (whole, seconds), rng, killed = never_stopped, random.Random(script), 0
    (tmp_path / "data").symlink_to(whole / "data")
    before = list(STAGES)[:list(STAGES).index(script)]
    (tmp_path / "runs" / "shapes").mkdir(parents=True)
    for stage in before:
        (tmp_path / "runs/shapes" / STAGES[stage]).symlink_to(whole / "runs/shapes" / STAGES[stage])
    output = f"runs/shapes/{STAGES[script]}"
    while killed < KILLS:
        process = start(script, tmp_path)
        if wait_for_work(process):
            # The first steps on a GPU take long; before a checkpoint nothing is resumed.
            while output.endswith(".pt") and not (tmp_path / f"{output}.partial").exists() and process.poll() is None:
                time.sleep(0.01)
            try:
                process.communicate(timeout=rng.uniform(0, 0.2) * seconds[script])
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                killed += 1
        process.communicate()
        check_whole(tmp_path / "runs" / "shapes")
        if process.returncode == 0:  # it came to its end before all kills: compared, and started again
            compare(tmp_path, whole, output)
            shutil.rmtree(tmp_path / output, ignore_errors=True)
            (tmp_path / output).unlink(missing_ok=True)
    finish(script, tmp_path)
    compare(tmp_path, whole, output)


def compare(folder, whole, output):
    assert files(folder, output) == files(whole, output)
    leftovers = [p.name for p in (folder / "runs" / "shapes").rglob("*") if p.name[0] == "." or "partial" in p.name]
    assert not leftovers
