"""Stages that are killed at random moments and started again end with the files of stages that never were."""
import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

import datasets

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["train_cls.iterations=60", "train_seg.iterations=60", "train_cls.batch=2", "train_seg.batch=2",
         "train_cls.crop=65", "train_seg.crop=65", "train_cls.width=0.0625", "train_seg.width=0.0625",
         "train_cls.dropout=0.3", "run.workers=0", "run.log_every=5", "run.save_every=3",
         "make_labels.crf_iterations=2", "eval.crf_iterations=2", "eval.crf=true"]
STAGES = {"train_cls": "cls.pt", "make_labels": "labels", "train_seg": "seg.pt", "eval": "predictions"}
KILLS = 10


def start(script, folder, *arguments):
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, ROOT / f"{script}.py", *SMALL, *arguments], cwd=folder, text=True,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=one_thread)


def finish(script, folder, *arguments):
    process = start(script, folder, *arguments)
    _, error = process.communicate()
    assert process.returncode == 0, error


def files(folder, output):
    """Relative name -> digest of what a stage has made, other than logs."""
    paths = [folder / output] if (folder / output).is_file() else sorted((folder / output).rglob("*"))
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths if p.is_file()}


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory):
    """A run of all stages; how long each took."""
    folder = tmp_path_factory.mktemp("whole")
    datasets.make_shapes(folder / "data" / "shapes", train=20, val=10)
    seconds = {}
    for script in STAGES:
        begin = time.monotonic()
        finish(script, folder)
        seconds[script] = time.monotonic() - begin
    return folder, seconds


def check_whole(run):
    """Of what lies in the run under its final name, all can be read."""
    for path in run.rglob("*.png"):
        if path.name[0] != ".":
            Image.open(path).load()


@pytest.mark.parametrize("script", STAGES)
def test_killed_at_ten_random_moments(never_stopped, tmp_path, script):
    (whole, seconds), rng, killed = never_stopped, random.Random(script), 0
    (tmp_path / "data").symlink_to(whole / "data")
    before = list(STAGES)[:list(STAGES).index(script)]
    (tmp_path / "runs" / "shapes").mkdir(parents=True)
    for stage in before:
        (tmp_path / "runs/shapes" / STAGES[stage]).symlink_to(whole / "runs/shapes" / STAGES[stage])
    for _ in range(KILLS):
        process = start(script, tmp_path)
        try:
            # Most of a short run is its start; a stage that goes on has less left to do each time.
            process.wait(rng.uniform(0.5, 1.1) * seconds[script])
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            killed += 1
        process.communicate()
        check_whole(tmp_path / "runs" / "shapes")
    finish(script, tmp_path)
    assert killed >= KILLS / 3
    output = f"runs/shapes/{STAGES[script]}"
    assert files(tmp_path, output) == files(whole, output)
    leftovers = [p.name for p in (tmp_path / "runs" / "shapes").rglob("*") if p.name[0] == "." or "partial" in p.name]
    assert not leftovers
