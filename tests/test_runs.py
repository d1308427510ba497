"""Files of a run, and its worker processes."""
import hashlib
import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import datasets
import models
import runs
import settings
from settings import UsageError
from tools.shapes import SHAPES, make_shapes


def slow_square(x):
    return x * x


@pytest.mark.parametrize("workers", [0, 2])
def test_overlap_keeps_the_order(workers):
    asked = []

    def tasks():
        for k in range(12):
            asked.append(k)
            yield k, (k,)

    results = runs.overlap(workers, slow_square, tasks())
    assert next(results) == (0, 0)
    assert len(asked) <= 2 * max(workers, 1) + 1  # it does not run ahead of its consumer
    assert list(results) == [(k, k * k) for k in range(1, 12)]


def ignores_ctrl_c(folder):
    """Of a worker; two are at it, since each waits for the other."""
    (folder / str(os.getpid())).touch()
    while len(list(folder.iterdir())) < 2:
        time.sleep(0.01)
    return signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_every_worker_leaves_ctrl_c_to_its_parent(tmp_path, request):
    own = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores Ctrl-C from its start
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, own))
    results = runs.overlap(2, ignores_ctrl_c, [(k, (tmp_path,)) for k in range(2)])
    assert list(results) == [(0, True), (1, True)]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_spread():
    assert runs.spread(list("abcdefgh"), 3) == ["a", "c", "f"]
    assert runs.spread([1], 3) == [1]


def opened(tmp_path, made_with=None, overwrite=False):
    config = settings.read("make_labels", [f"run.overwrite={overwrite}"])
    config.path = tmp_path
    runs.discard_outdated(config, tmp_path / "labels", "make_labels",
                          made_with or {"a.b": 1}, tmp_path / "cls.pt")


def test_a_run_is_held_by_one_process_on_windows(tmp_path, monkeypatch):
    """There a lock is of bytes from the file's position on, which nobody else can read. The command may name files in
    bytes that are no text."""
    taken = []

    def take(file, *_):
        position = os.lseek(file, 0, os.SEEK_CUR)
        if position in taken:
            raise PermissionError(13, "Permission denied")
        taken.append(position)

    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(locking=take, LK_NBLCK=2))
    monkeypatch.setattr(sys, "argv", ["eval.py", "images=caf\udce9.jpg"])
    config = SimpleNamespace(path=tmp_path / "a")
    runs.hold(config)
    with pytest.raises(UsageError, match=rf"a is in use by process {os.getpid()} on .*: python eval.py images=caf"):
        runs.hold(config)
    assert taken[0] > (tmp_path / "a/lock").stat().st_size


def test_outdated_files_are_discarded_or_refused(tmp_path):
    (tmp_path / "cls.pt").write_bytes(b"weights")
    file = tmp_path / "labels" / "Ycrf" / "x.png"

    def make():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"label")

    opened(tmp_path)
    make()
    opened(tmp_path)
    assert file.exists()  # the same settings: kept
    with pytest.raises(UsageError, match="labels was made with other settings: a.b 1 -> 2; set"):
        opened(tmp_path, {"a.b": 2})
    assert file.exists()
    opened(tmp_path, {"a.b": 2}, overwrite=True)
    assert not file.exists()
    make()
    (tmp_path / "cls.pt").write_bytes(b"other weights")
    opened(tmp_path, {"a.b": 2})
    assert not file.exists()  # labels of another checkpoint go
    make()
    (tmp_path / "labels" / "made_with.json").unlink()
    with pytest.raises(UsageError, match="holds files but no made_with.json"):
        opened(tmp_path)
    (tmp_path / "labels" / "made_with.json").write_text("{")
    with pytest.raises(UsageError, match="not what this program wrote"):
        opened(tmp_path)


def test_overwrite_keeps_what_the_same_settings_made(tmp_path):
    opened(tmp_path)
    (tmp_path / "labels/x.png").write_bytes(b"label")
    opened(tmp_path, overwrite=True)
    assert (tmp_path / "labels/x.png").exists()


def test_labels_older_than_a_setting_had_its_default(tmp_path):
    opened(tmp_path)
    (tmp_path / "labels/x.png").write_bytes(b"label")
    added = {"a.b": 1, "make_labels.crf_gaussian": [3.0, 3.0], "make_labels.unary": "attention"}
    opened(tmp_path, added)
    with pytest.raises(UsageError, match="settings: make_labels.unary 'attention' -> 'logits'; set"):
        opened(tmp_path, added | {"make_labels.unary": "logits"})
    assert (tmp_path / "labels/x.png").exists()


def test_the_checkpoint_that_was_read_is_remembered(tmp_path):
    """Not another one, that replaced it meanwhile."""
    path = tmp_path / "cls.pt"
    torch.save({"a": 1}, path)
    read = hashlib.sha256(path.read_bytes()).hexdigest()
    models.read_file(path)
    torch.save({"a": 2}, path)
    opened(tmp_path)
    made_with = json.loads((tmp_path / "labels/made_with.json").read_text())
    assert made_with["cls.pt"] == read[:12]


def test_labels_behind_a_link_to_another_disk_stay_there(tmp_path):
    with tempfile.TemporaryDirectory(dir="/dev/shm") as disk:
        labels = Path(disk, "labels")
        labels.mkdir()
        (tmp_path / "labels").symlink_to(labels)
        opened(tmp_path)
        datasets.write(tmp_path / "labels/Ycrf/x.png", b"label")
        opened(tmp_path, {"a.b": 2}, overwrite=True)
        datasets.write(tmp_path / "labels/Yret/x.png", b"label")
        assert sorted(p.name for p in labels.iterdir()) == [
            "Yret", "made_with.json"] and (tmp_path / "labels").is_symlink()
        assert [p.name for p in Path(disk).iterdir()] == ["labels"]


def test_workers_that_are_not_forked_are_sent_300_images_with_boxes(tmp_path):
    """forkserver is Python 3.14's way on Linux. Tensors would each be sent as
    an open file, of at most 256."""
    root = tmp_path / "data"
    make_shapes(root, train=1, val=1)
    source = datasets.read_list(root, "train")[0]
    names = [f"{number}" for number in range(300)]
    for name in names:
        for folder in ("JPEGImages", "Annotations"):
            file = next((root / folder).glob(f"{source}.*"))
            os.link(file, root / folder / f"{name}{file.suffix}")
    (root / "ImageSets/Segmentation/all.txt").write_text("\n".join(names))
    dataset = datasets.VOCDataset(root, "all", SHAPES)
    default = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("forkserver", force=True)
    try:
        config = SimpleNamespace(run=SimpleNamespace(workers=1))
        found = [sample["id"] for sample in runs.in_workers(config, dataset)]
    finally:
        multiprocessing.set_start_method(default, force=True)
    assert found == names


class Unpicklable(list):
    """A dataset whose samples cannot be sent by a worker."""
    def __getitem__(self, index):
        return {"x": lambda: 0}


def test_a_worker_that_cannot_send_ends_the_run_in_words():
    config = SimpleNamespace(run=SimpleNamespace(workers=1))
    with pytest.raises(RuntimeError, match="exited unexpectedly"):
        list(runs.in_workers(config, Unpicklable("ab")))


@pytest.mark.parametrize("free, ahead", [(6, 2), (5, 1), (4, 1)])
def test_workers_read_ahead_what_shared_memory_holds(monkeypatch, free, ahead):
    """Of two workers: two batches or one each, the one in use, and the next."""
    monkeypatch.setattr(runs.shutil, "disk_usage",
                        lambda path: SimpleNamespace(free=free * 10 ** 6))
    assert runs.batches_ahead(2, 10 ** 6) == ahead
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # torchrun's ranks share it
    assert runs.batches_ahead(2, 10 ** 6 // 2) == ahead


def test_too_little_shared_memory_is_refused(monkeypatch):
    monkeypatch.setattr(runs.shutil, "disk_usage",
                        lambda path: SimpleNamespace(free=64 << 20))
    with pytest.raises(UsageError, match="/dev/shm: 64 MB are free, but "
                       "batches of 20 MB for 2 workers need 80 MB; .*ipc=host"):
        runs.batches_ahead(2, 20 << 20)


def test_a_run_can_be_repeated_from_its_settings(tmp_path, monkeypatch):
    """Stage 1's settings, its seed and its lists stay while stage 2 runs without them."""
    monkeypatch.chdir(tmp_path)
    first = settings.read("train_cls", ["train_cls.lr=0.5", "name=x", "seed=7",
                                        "data.classes=['yes', '1']"])
    runs.write_settings(first, "train_cls")
    second = settings.read("make_labels", ["threshold=0.5", "name=x", "overwrite=true"])
    runs.write_settings(second, "make_labels")
    text = (tmp_path / "runs/x/settings.yaml").read_text()
    again = settings.read("eval", ["runs/x/settings.yaml"])
    assert again.train_cls == first.train_cls
    assert again.make_labels == second.make_labels
    assert again.run == first.run and again.data == first.data
    other = settings.read("eval", ["seed=3", "name=y"])
    runs.write_settings(settings.read("make_labels", ["seed=2", "name=y"]), "make_labels")
    runs.write_settings(other, "eval")  # of a run without a training: those of its last stage
    assert settings.read("eval", ["runs/y/settings.yaml"]).run == other.run
    third = settings.read("train_seg", ["seed=8", "name=x", "overwrite=true"])
    runs.write_settings(third, "train_seg")
    again = settings.read("eval", ["runs/x/settings.yaml"])
    assert again.run.seed == 8 and not again.run.overwrite
    lines = [line for line in text.splitlines() if line.startswith("#")]
    assert [line.split(":")[0] for line in lines] == [
        "# train_cls.py", "# make_labels.py"]
    for line in lines:
        assert f"torch {torch.__version__.split('+')[0]}" in line
        assert "commit " in line and "numpy " in line


def test_changed_code_is_not_the_commits(tmp_path, monkeypatch):
    git = ["git", "-c", "user.name=me", "-c", "user.email=me@here"]
    (tmp_path / "models.py").write_text("1\n")
    for command in ["init", "-q"], ["add", "models.py"], ["commit", "-qm", "first"]:
        subprocess.run([*git, *command], cwd=tmp_path, check=True)
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    assert "-dirty" not in runs.versions()
    (tmp_path / "models.py").write_text("2\n")
    assert "-dirty, Python" in runs.versions()


def test_another_segmenter_and_photographs_are_not_repeated(tmp_path, monkeypatch):
    """A run that is repeated would be scored by the old one's network, or not at all."""
    monkeypatch.chdir(tmp_path)
    runs.write_settings(settings.read("eval", ["weights=other.pt", "images=photos", "flip=true"]), "eval")
    again = settings.read("eval", ["runs/shapes/settings.yaml"]).eval
    assert (again.weights, again.images, again.flip) == ("", "", True)


@pytest.mark.parametrize("script, argument", [("train_cls", "data.root=nowhere"), ("eval", "images=photos")])
def test_the_demo_set_is_not_written_where_none_is_wanted(script, argument, tmp_path, monkeypatch):
    """At a mistyped folder, or to segment photographs."""
    monkeypatch.chdir(tmp_path)
    config = settings.read(script, [argument])
    runs.write_shapes(config, [argument])
    assert not any(tmp_path.iterdir())


def test_a_line_that_was_cut_short_swallows_no_other(tmp_path):
    config = SimpleNamespace(path=tmp_path)
    path = tmp_path / "metrics.jsonl"
    runs.log(config, "x", 1, loss=1.0)
    path.write_bytes(path.read_bytes()[:-9])
    runs.log(config, "x", 2, loss=2.0)
    runs.log(config, "x", 3, loss=3.0)
    assert [json.loads(line)["loss"] for line in
            path.read_text().splitlines()[1:]] == [2.0, 3.0]


@pytest.mark.parametrize("error, status, line", [
    (UsageError("a: b\nError: c\x1b[2J"), 2, "a: b\\nError: c\\x1b[2J"),
    (UsageError("Caught it in a worker.\nTraceback:\n  here\n"
                "datasets.DataError: x.png: no such image\n"), 2,
     "x.png: no such image"),
    (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried 2 GiB"), 1,
     "CUDA out of memory. Tried 2 GiB; a smaller batch or crop needs less"),
    (KeyboardInterrupt(), 130, "interrupted; the same command resumes")])
def test_how_a_script_ends(monkeypatch, capsys, error, status, line):
    def main(config):
        raise error

    def leave(status):
        raise SystemExit(status)

    monkeypatch.setattr(runs, "end_now", leave)
    monkeypatch.setattr(sys, "argv", ["dir/train_cls.py", "data.shapes=false"])
    with pytest.raises(SystemExit) as end:
        runs.launch("train_cls", main)
    assert end.value.code == status
    assert capsys.readouterr().err == f"train_cls.py: {line}\n"


def test_a_notebooks_output_is_no_file(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_cls.py", "data.shapes=false"])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    runs.launch("train_cls", lambda config: print("done"))
    assert sys.stdout.getvalue() == "done\n"
