"""The machine fails: full disks, no permission, workers that die. Python's own
error is the last line, the status 1, and nothing is lost. And Ctrl-C.
"""
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ROOT, without_privilege
from conftest import script as run_script

import datasets
import models
import runs
import settings
from tools.shapes import SHAPES, make_shapes

SMALL = ["train_cls.iterations=8", "train_cls.batch=2", "train_cls.crop=65", "train_cls.width=0.0625",
         "run.device=cpu", "run.log_every=2", "run.save_every=2", "make_labels.crf_iterations=2"]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder where stage 1 has run."""
    folder = tmp_path_factory.mktemp("work")
    make_shapes(folder / "data" / "shapes", train=8, val=4)
    done = command("train_cls", "run.workers=0", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def folder(work, tmp_path):
    shutil.copytree(work, tmp_path, dirs_exist_ok=True)
    return tmp_path


SEG = ["run.workers=0", "train_seg.iterations=2", "train_seg.width=0.0625", "train_seg.batch=2", "train_seg.crop=65",
       "eval.panels=0"]


@pytest.fixture(scope="module")
def all_stages(work, tmp_path_factory):
    folder = tmp_path_factory.mktemp("all")
    shutil.copytree(work, folder, dirs_exist_ok=True)
    for script in ("make_labels", "train_seg", "eval"):
        done = command(script, *SEG, cwd=folder)
        assert done.returncode == 0, done.stderr
    shutil.rmtree(folder / "runs/shapes/predictions")
    return folder


@pytest.fixture
def segmented(all_stages, tmp_path):
    """A folder where every stage has run."""
    shutil.copytree(all_stages, tmp_path, dirs_exist_ok=True)
    return tmp_path


def command(script, *arguments, cwd, before=(), preexec_fn=None):
    if not before and not preexec_fn:
        return run_script(script, *SMALL, *arguments, cwd=cwd)
    return subprocess.run([*before, sys.executable, ROOT / f"{script}.py", *SMALL, *arguments], cwd=cwd,
                          capture_output=True, text=True, preexec_fn=preexec_fn)


def last_line(done):
    assert done.returncode == 1, done.stderr
    return done.stderr.strip().splitlines()[-1].split("\r")[-1]


def small_files(size):
    """Files may reach so many bytes: writing more fails as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_a_disk_that_fills_up_while_a_checkpoint_is_written(folder):
    run = folder / "runs" / "shapes"
    kept = (run / "cls.pt").read_bytes()
    done = command("train_cls", "run.workers=0", "train_cls.lr=0.01", "overwrite=true", "run.save_every=99",
                   cwd=folder, preexec_fn=partial(small_files, 20_000))
    assert last_line(done) == "OSError: [Errno 27] File too large: 'runs/shapes/cls.pt'"
    assert (run / "cls.pt").read_bytes() == kept and not list(run.glob(".*"))


def test_a_disk_that_fills_up_while_labels_are_written(folder):
    assert command("make_labels", "run.workers=0", cwd=folder).returncode == 0
    shutil.rmtree(folder / "runs/shapes/labels")
    done = command("make_labels", "run.workers=0", cwd=folder, preexec_fn=partial(small_files, 500))
    line = last_line(done)
    assert line.startswith("OSError: [Errno 27] File too large: 'runs/shapes/labels/")
    assert not [p for p in (folder / "runs/shapes/labels").rglob("*") if p.name.endswith(".tmp")]
    assert command("make_labels", "run.workers=0", cwd=folder).returncode == 0


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk(work, tmp_path, small_disk):
    """Two checkpoints do not fit on it. The first stays; where there is room, the run goes on from it to the weights
    of one that never was stopped, and every line of its log can be read."""
    (tmp_path / "data").symlink_to(work / "data")
    (tmp_path / "runs").symlink_to(small_disk)
    for _ in range(2):  # the second time from the first's checkpoint
        line = last_line(command("train_cls", "run.workers=0", cwd=tmp_path))
        assert line == "OSError: [Errno 28] No space left on device: 'runs/shapes/cls.pt.partial'"
        assert models.read_file(small_disk / "shapes/cls.pt.partial")["iteration"] == 2
        assert not (small_disk / "shapes/cls.pt").exists() and not list(small_disk.rglob("*.tmp"))
    (tmp_path / "runs").unlink()
    shutil.copytree(small_disk, tmp_path / "runs")
    assert command("train_cls", "run.workers=0", cwd=tmp_path).returncode == 0
    assert (tmp_path / "runs/shapes/cls.pt").read_bytes() == (work / "runs/shapes/cls.pt").read_bytes()
    lines = (tmp_path / "runs/shapes/metrics.jsonl").read_text().splitlines()
    assert [json.loads(text)["iteration"] for text in lines][-3:] == [4, 6, 8]


def test_a_file_where_the_folder_belongs(folder):
    shutil.rmtree(folder / "runs")
    (folder / "runs").write_text("a file")
    done = command("train_cls", "run.workers=0", cwd=folder)
    assert "runs" in last_line(done)


@pytest.mark.parametrize("script", ["train_cls", "make_labels"])
def test_no_permission_to_write(folder, script):
    run = folder / "runs/shapes"
    kept = (run / "cls.pt").read_bytes()
    run.chmod(0o555)
    (run / "metrics.jsonl").chmod(0o444)
    done = command(script, "run.workers=0", "train_cls.lr=0.01", "overwrite=true", cwd=folder,
                   before=without_privilege())
    assert last_line(done).startswith("PermissionError: [Errno 13] Permission denied: 'runs/shapes")
    assert (run / "cls.pt").read_bytes() == kept and not (run / "labels").exists()


def test_no_permission_to_read(folder):
    image = sorted((folder / "data/shapes/JPEGImages").iterdir())[0]
    image.chmod(0)
    done = command("make_labels", "run.workers=0", cwd=folder, before=without_privilege())
    assert image.name in last_line(done) and "Permission denied" in last_line(done)
    assert "broken" not in done.stderr  # the machine's fault, not the file's


@pytest.mark.parametrize("script, file", [
    ("train_cls", "runs/shapes/cls.pt.partial"), ("train_cls", "data/shapes/Annotations/shapes_00000.xml"),
    ("make_labels", "runs/shapes/cls.pt"), ("train_seg", "runs/shapes/labels/Yret/shapes_00000.png"),
    ("train_seg", "runs/shapes/seg.pt.partial"), ("eval", "runs/shapes/seg.pt"),
    ("eval", "data/shapes/SegmentationClassAug/shapes_00008.png")])
def test_no_permission_to_read_in_any_stage(segmented, script, file):
    """Nobody is told that a file is broken, or to delete it; with the permission back, the stage succeeds."""
    path = segmented / file
    if path.suffix == ".partial":
        path.with_suffix("").rename(path)  # one that is not finished
    elif script.startswith("train"):
        (segmented / f"runs/shapes/{script[6:]}.pt").unlink()
    before, mode = path.read_bytes(), path.stat().st_mode
    path.chmod(0)
    done = command(script, *SEG, cwd=segmented, before=without_privilege())
    line = last_line(done)
    assert line.startswith("PermissionError: [Errno 13] Permission denied: ") and line.endswith(f"{file}'"), line
    assert not any(word in done.stderr for word in ("broken", "delete", "remove", "overwrite"))
    path.chmod(mode)
    assert path.read_bytes() == before
    if path.suffix != ".partial":
        assert command(script, *SEG, cwd=segmented).returncode == 0


def test_labels_that_change_while_they_are_learnt(segmented, monkeypatch):
    """What the checkpoint says of its labels is what was read: a training on labels that another process rewrites
    ends without one."""
    import engine
    import train_seg
    file, read = segmented / "runs/shapes/labels/Ycrf/shapes_00000.png", engine.read_values

    def read_and_replace(*arguments):
        datasets.write_mask(file, 1 - datasets.read_mask(file, 7).clip(max=1))
        return read(*arguments)

    monkeypatch.chdir(segmented)
    monkeypatch.setattr(engine, "read_values", read_and_replace)
    (segmented / "runs/shapes/seg.pt").unlink()
    config = settings.read("train_seg", [*SMALL, *SEG, "train_seg.iterations=1"])
    config.device = torch.device("cpu")
    with pytest.raises(settings.UsageError, match="content of labels: changed during the training; start it again"):
        train_seg.main(config)
    runs.locks.pop().close()
    assert not (segmented / "runs/shapes/seg.pt").exists()


def test_what_a_killed_process_was_writing_is_removed(folder):
    """That of a process that lives stays."""
    dead = subprocess.Popen(["true"])
    dead.wait()
    run = folder / "runs/shapes"
    left, lives = run / f"labels/Ycrf/.a.png.{dead.pid}.tmp", run / f".x.{os.getpid()}.tmp"
    part = folder / f"data/.more.{dead.pid}.tmp"
    (part / "JPEGImages").mkdir(parents=True)
    left.parent.mkdir(parents=True)
    for file in (left, lives, part / "JPEGImages/x.jpg", run / ".odd.tmp", run / f".odd.{10 ** 20}.tmp"):
        file.write_bytes(b"")
    done = command("make_labels", "run.workers=0", "overwrite=true", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert not left.exists() and lives.exists() and (run / ".odd.tmp").exists() and part.exists()
    make_shapes(folder / "data/more", train=1, val=1)
    assert not part.exists()


def begin(script, *arguments, cwd):
    # What a shell starts in the background is deaf to Ctrl-C, and so would be what these tests start.
    return subprocess.Popen([sys.executable, ROOT / f"{script}.py", *SMALL, *arguments], cwd=cwd, text=True,
                            stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))


def wait_for(condition, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def children(process):
    return [int(p) for p in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def command_of(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except (FileNotFoundError, ProcessLookupError):  # it has ended
        return ""


def test_ctrl_c_while_labels_are_made(folder):
    # So slow that it is not done before it is stopped.
    process = begin("make_labels", "run.workers=2", "make_labels.crf_iterations=300", cwd=folder)
    wait_for(lambda: list((folder / "runs/shapes/labels").glob("Ycrf/*.png")))
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 130 and "Traceback" not in error


def test_ctrl_c(folder):
    (folder / "runs/shapes/cls.pt").unlink()
    process = begin("train_cls", "train_cls.iterations=100000", "run.workers=1", cwd=folder)
    wait_for((folder / "runs/shapes/cls.pt.partial").exists)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the workers get it, too
    _, error = process.communicate(timeout=300)
    assert process.returncode == 130 and "Traceback" not in error
    assert error.strip().splitlines()[-1].endswith("interrupted; the same command resumes")


def test_an_image_worker_that_dies(folder):
    (folder / "runs/shapes/cls.pt").unlink()
    process = begin("train_cls", "train_cls.iterations=100000", "run.workers=1", cwd=folder)
    wait_for((folder / "runs/shapes/cls.pt.partial").exists)
    for pid in children(process):
        command = command_of(pid)
        if command and "resource_tracker" not in command:
            os.kill(pid, signal.SIGKILL)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 1 and (folder / "runs/shapes/cls.pt.partial").exists()
    # Either torch notices the death, or the connection to the worker breaks first.
    broken = "RuntimeError: DataLoader worker|Connection(Reset|Refused)Error|EOFError|BrokenPipeError"
    assert re.match(broken, error.splitlines()[-1]), error


def test_a_crf_worker_that_dies(folder):
    process = begin("make_labels", "run.workers=1", "make_labels.crf_iterations=2000", cwd=folder)

    def crf_worker():
        return [p for p in children(process) if "spawn_main" in command_of(p)]

    wait_for(crf_worker)
    time.sleep(3)  # it works by now
    os.kill(crf_worker()[0], signal.SIGKILL)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 1 and "BrokenProcessPool" in error


@pytest.mark.parametrize("script, arguments", [
    ("make_labels", ["make_labels.crf_iterations=200"]),
    ("train_cls", ["train_cls.iterations=100000", "overwrite=true"])])
def test_a_killed_stage_leaves_no_process_behind(folder, script, arguments):
    process = begin(script, "run.workers=2", *arguments, cwd=folder)
    wait_for(lambda: len(children(process)) >= 2)
    time.sleep(4)  # they work by now
    workers = children(process)
    process.kill()
    process.communicate()
    wait_for(lambda: not any("python" in command_of(pid) for pid in workers))


ENDLESS = {"train_cls": ["train_cls.iterations=100000"], "make_labels": ["make_labels.crf_iterations=1000000"],
           "train_seg": ["train_seg.iterations=100000"], "eval": ["eval.crf=true", "eval.crf_iterations=1000000"]}


@pytest.mark.parametrize("holder", ENDLESS)
def test_a_second_process_is_told_who_writes_to_the_run(segmented, holder):
    """For all pairs of stages. Killed, the first holds nothing: the second starts at once."""
    # Stage 3 learns from the true masks: stage 2 may just have discarded the run's labels.
    options = [*SEG, "overwrite=true", "train_seg.labels=[SegmentationClassAug]"]
    first = begin(holder, *options, *ENDLESS[holder], cwd=segmented)
    try:
        lock = segmented / "runs/shapes/lock"
        wait_for(lambda: lock.read_text().startswith(f"process {first.pid} on "))
        for second in ENDLESS:
            done = command(second, *options, cwd=segmented)
            assert done.returncode == 2
            line = done.stderr.strip().splitlines()[-1]
            assert f"runs/shapes is in use by process {first.pid} on " in line and f"{holder}.py {SMALL[0]}" in line
    finally:
        first.kill()
        first.wait()
    for second in ENDLESS:
        done = command(second, *options, cwd=segmented)
        assert done.returncode == 0, done.stderr


READS = {  # what reads -> a file of the run or the data
    "weights": lambda file: models.read_file(file),
    "checkpoint": lambda file: runs.read_checkpoint(file),
    "network": lambda file: models.load(file),
    "json": lambda file: runs.read_json(file),
    "settings": lambda file: settings.read("eval", [str(file)]),
    "image": lambda file: datasets.read_image(file),
    "mask": lambda file: datasets.read_mask(file, 7),
    "annotation": lambda file: datasets.read_annotation(file, SHAPES),
    "list": lambda file: datasets.read_list(file.parents[2], file.stem)}
FILES = {"weights": "runs/shapes/cls.pt", "checkpoint": "runs/shapes/cls.pt", "network": "runs/shapes/cls.pt",
         "json": "x.json", "settings": "x.yaml", "image": "data/shapes/JPEGImages/shapes_00000.jpg",
         "mask": "data/shapes/SegmentationClassAug/shapes_00000.png",
         "annotation": "data/shapes/Annotations/shapes_00000.xml",
         "list": "data/shapes/ImageSets/Segmentation/train.txt"}


@pytest.mark.parametrize("fault", [PermissionError(13, "Permission denied"), OSError(5, "Input/output error"),
                                   MemoryError()], ids=["permission", "device", "memory"])
@pytest.mark.parametrize("kind", READS)
def test_a_file_that_cannot_be_read_just_now_is_not_called_broken(work, monkeypatch, kind, fault):
    """Python's own error comes through, and the file stays."""
    (work / "x.json").write_text("{}")
    (work / "x.yaml").write_text("run: {seed: 1}")
    file = work / FILES[kind]
    before = file.read_bytes()
    READS[kind](file)

    def failing(path, *arguments, real=open, **options):
        if str(path) == str(file):
            raise fault
        return real(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", failing)
        patch.setattr("io.open", failing)
        with pytest.raises(type(fault)) as raised:
            READS[kind](file)
    assert raised.value is fault and file.read_bytes() == before
