"""The demo's commands as on other systems: workers that are spawned, no
Unix-only modules, and another default encoding; and in a container whose
shared memory is small."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tools.shapes import make_shapes

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["train_cls.iterations=2", "train_seg.iterations=2", "train_cls.batch=2",
         "train_seg.batch=2", "train_cls.crop=65", "train_seg.crop=65",
         "train_cls.width=0.0625", "train_seg.width=0.0625", "eval.crf=true",
         "make_labels.crf_iterations=1", "eval.crf_iterations=1", "eval.panels=1"]
# Python runs it at the start of every process, workers too.
LIKE_WINDOWS = """
import multiprocessing, os, signal, subprocess, sys, types, warnings

multiprocessing.set_start_method("spawn")
del os.fork, signal.pthread_sigmask
sys.modules["fcntl"] = sys.modules["resource"] = None
sys.modules["msvcrt"] = types.SimpleNamespace(
    LK_NBLCK=2, locking=lambda file, mode, size: None)
warnings.filterwarnings("error", category=EncodingWarning, module="(__main__|"
    "__mp_main__|crf|datasets|engine|losses|models|pictures|runs|settings|tools)")
"""


def shapes(folder):
    make_shapes(folder / "data/shapes", train=2, val=1)


def command(script, *arguments, cwd, before=(), **environment):
    return subprocess.run(
        [*before, sys.executable, ROOT / f"{script}.py", *SMALL, *arguments], cwd=cwd,
        capture_output=True, text=True, env=os.environ | environment)


def test_the_demo_where_workers_are_spawned(tmp_path):
    shapes(tmp_path)
    (tmp_path / "sitecustomize.py").write_text(LIKE_WINDOWS)
    for script in ("train_cls", "make_labels", "train_seg", "eval"):
        done = command(script, "run.workers=2", cwd=tmp_path, PYTHONPATH=str(tmp_path),
                       PYTHONWARNDEFAULTENCODING="1")
        assert done.returncode == 0, done.stderr
    assert "segmenter, CRF" in done.stdout


def test_another_default_encoding_is_noticed(tmp_path):
    """The warning that the test above turns into an error does come."""
    (tmp_path / "sitecustomize.py").write_text(LIKE_WINDOWS)
    (tmp_path / "runs.py").write_text("open(__file__)")
    done = subprocess.run([sys.executable, "-c", "import runs"], cwd=tmp_path, text=True, capture_output=True,
                          env=os.environ | {"PYTHONPATH": str(tmp_path), "PYTHONWARNDEFAULTENCODING": "1"})
    assert "EncodingWarning" in done.stderr


def test_output_that_cannot_hold_a_name(tmp_path):
    """On Windows, a pipe or a file holds cp1252."""
    shapes(tmp_path)
    done = command("eval", "labels=data/shapes/SegmentationClassAug", "split=val",
                   "data.classes=[条, 环, 十, 月, 角, 波]", cwd=tmp_path, PYTHONIOENCODING="cp1252")
    assert done.returncode == 0 and "\\u6761 " in done.stdout, done.stderr


def has_private_mounts():
    return shutil.which("unshare") and subprocess.run(
        ["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"], capture_output=True).returncode == 0


def in_docker(megabytes):
    mount = f'mount -t tmpfs -o size={megabytes}m tmpfs /dev/shm && exec "$@"'
    return ["unshare", "-m", "sh", "-c", mount, "sh"]


@pytest.mark.skipif(not has_private_mounts(), reason="needs root, to mount a small /dev/shm")
def test_shared_memory_of_docker(tmp_path):
    """A batch is 20 x 321 x 321 x 4 bytes, 8.2 MB; 64 MB hold 7 of them."""
    shapes(tmp_path)
    batch = ["train_cls.batch=20", "train_cls.crop=321", "train_cls.iterations=1"]
    done = command("train_cls", *batch, "run.workers=8", cwd=tmp_path, before=in_docker(64))
    assert done.returncode == 2 and done.stderr == (
        "train_cls.py: /dev/shm: 64 MB are free, but batches of 7 MB for 8 workers need 78 MB; start Docker with "
        "--ipc=host, or set a smaller run.workers or batch\n")
    done = command("train_cls", *batch, "run.workers=3", cwd=tmp_path, before=in_docker(64))
    assert done.returncode == 0, done.stderr
