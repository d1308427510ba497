"""The machine fails: full disks, no permission, Ctrl-C, workers that die. One line, a status, and nothing lost."""
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import datasets
import engine

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["train_cls.iterations=8", "train_cls.batch=2", "train_cls.crop=65", "train_cls.width=0.0625",
         "run.log_every=2", "run.save_every=2", "make_labels.crf_iterations=2"]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder where stage 1 has run."""
    folder = tmp_path_factory.mktemp("work")
    datasets.make_shapes(folder / "data" / "shapes", train=8, val=4)
    done = command("train_cls", "run.workers=0", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def folder(work, tmp_path):
    shutil.copytree(work, tmp_path, dirs_exist_ok=True)
    return tmp_path


def command(script, *arguments, cwd, before=(), **options):
    return subprocess.run([*before, sys.executable, ROOT / f"{script}.py", *SMALL, *arguments], cwd=cwd,
                          capture_output=True, text=True, **options)


def last_line(done):
    assert "Traceback" not in done.stderr, done.stderr
    return done.stderr.strip().splitlines()[-1].split("\r")[-1]


def test_a_full_disk(folder):
    """/dev/full says what a full disk says."""
    run = folder / "runs" / "shapes"
    kept = (run / "cls.pt").read_bytes()
    (run / ".cls.pt.tmp").symlink_to("/dev/full")
    done = command("train_cls", "run.workers=0", "train_cls.lr=0.01", "overwrite=true", "run.save_every=99", cwd=folder)
    assert done.returncode == 1
    assert last_line(done) == ("train_cls.py: runs/shapes/cls.pt: No space left on device; what was written before is "
                               "whole: the same command goes on from there")
    assert (run / "cls.pt").read_bytes() == kept and not (run / ".cls.pt.tmp").exists()


def test_a_disk_that_fills_up_while_labels_are_written(folder):
    """Files may reach 3,000 bytes: less than some label has."""
    import resource
    done = command("make_labels", "run.workers=0", cwd=folder, preexec_fn=lambda: (
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))))
    assert done.returncode == 1 and "File too large; what was written before is whole" in last_line(done)
    assert not [p for p in (folder / "runs/shapes/labels").rglob("*") if p.name.endswith(".tmp")]
    assert command("make_labels", "run.workers=0", cwd=folder).returncode == 0


def test_a_file_where_the_folder_belongs(folder):
    shutil.rmtree(folder / "runs")
    (folder / "runs").write_text("a file")
    done = command("train_cls", "run.workers=0", cwd=folder)
    assert done.returncode == 1 and "runs" in last_line(done)


def without_privilege():
    """What to put before a command so that the permissions of files hold for it: root passes them by."""
    if os.geteuid():
        return []
    if not shutil.which("setpriv"):
        pytest.skip("root may write anywhere, and there is no setpriv to take that from it")
    return ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-dac_override,-dac_read_search"]


@pytest.mark.parametrize("script", ["train_cls", "make_labels"])
def test_no_permission_to_write(folder, script):
    run = folder / "runs/shapes"
    kept = (run / "cls.pt").read_bytes()
    run.chmod(0o555)
    (run / "metrics.jsonl").chmod(0o444)
    done = command(script, "run.workers=0", "train_cls.lr=0.01", "overwrite=true", cwd=folder,
                   before=without_privilege())
    assert done.returncode == 1
    assert last_line(done).startswith(f"{script}.py: runs/shapes")
    assert "Permission denied; what was written before is whole" in last_line(done)
    assert (run / "cls.pt").read_bytes() == kept and not (run / "labels").exists()


def test_no_permission_to_read(folder):
    image = sorted((folder / "data/shapes/JPEGImages").iterdir())[0]
    image.chmod(0)
    done = command("make_labels", "run.workers=0", cwd=folder, before=without_privilege())
    assert done.returncode == 1 and image.name in last_line(done) and "Permission denied" in last_line(done)
    assert "broken" not in last_line(done)  # the machine's fault, not the file's


def begin(script, *arguments, cwd):
    # What a shell starts in the background is deaf to Ctrl-C, and so would be what these tests start.
    return subprocess.Popen([sys.executable, ROOT / f"{script}.py", *SMALL, *arguments], cwd=cwd, text=True,
                            stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def children(process):
    return [int(p) for p in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def test_ctrl_c_while_labels_are_made(folder):
    # So slow that it is not done before it is stopped.
    process = begin("make_labels", "run.workers=2", "make_labels.crf_iterations=300", cwd=folder)
    wait_for(lambda: list((folder / "runs/shapes/labels").glob("Ycrf/*.png")))
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in error


def test_ctrl_c(folder):
    (folder / "runs/shapes/cls.pt").unlink()
    process = begin("train_cls", "train_cls.iterations=100000", "run.workers=1", cwd=folder)
    wait_for((folder / "runs/shapes/cls.pt.partial").exists)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the workers get it, too
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in error
    assert error.strip().splitlines()[-1].endswith("stopped; the same command goes on from there")


def test_an_image_worker_that_dies(folder):
    (folder / "runs/shapes/cls.pt").unlink()
    process = begin("train_cls", "train_cls.iterations=100000", "run.workers=1", cwd=folder)
    wait_for((folder / "runs/shapes/cls.pt.partial").exists)
    for pid in children(process):
        if "resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_text():
            os.kill(pid, signal.SIGKILL)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in error
    assert "a worker process died" in error and (folder / "runs/shapes/cls.pt.partial").exists()


def test_a_crf_worker_that_dies(folder):
    process = begin("make_labels", "run.workers=1", "make_labels.crf_iterations=2000", cwd=folder)

    def crf_worker():
        return [p for p in children(process) if "spawn_main" in Path(f"/proc/{p}/cmdline").read_text()]

    wait_for(crf_worker)
    time.sleep(3)  # it works by now
    os.kill(crf_worker()[0], signal.SIGKILL)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1 and "a worker process died" in error and "Traceback" not in error


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
    wait_for(lambda: not any(Path(f"/proc/{pid}/cmdline").exists() and "python" in Path(
        f"/proc/{pid}/cmdline").read_text() for pid in workers), 30)


@pytest.mark.parametrize("error, words", [
    (MemoryError(), "out of memory"), (RuntimeError("CUDA out of memory. Tried"), "out of memory"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "a worker process died"),
    (ConnectionResetError(104, "Connection reset by peer"), "a worker process died"),
    (EOFError(), "a worker process died"),
    (OSError(28, "No space left on device", "x.pt"), "x.pt: No space left"), (RuntimeError("a bug"), None),
    (OSError("a bug"), None)])
def test_whose_fault(error, words):
    line = engine.machine_fault(error)
    assert line is None if words is None else words in line
