"""tools/download_voc.py, with tiny archives in the layout of the real ones from a server on this machine."""
import errno
import hashlib
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import SBDataset
from torchvision.datasets.voc import DATASET_YEAR_DICT

import datasets
from datasets import DataError

sys.path.append(str(Path(__file__).resolve().parents[1] / "tools"))

import download_voc

ROOT = Path(__file__).resolve().parents[1]
TRAINVAL, TEST = "VOCtrainval_06-Nov-2007.tar", "VOCtest_06-Nov-2007.tar"
VOC2012, SBD = "VOCtrainval_11-May-2012.tar", "benchmark.tgz"
LISTS_2007 = {"Main/train": "a", "Main/val": "b", "Main/trainval": "a b", "Main/test": "c d",
              "Segmentation/train": "a", "Segmentation/val": "b", "Segmentation/trainval": "a b",
              "Segmentation/test": "c"}


# ------------------------------------------------------------------------------------------ archives

def picture(label, mode="L"):
    buffer = io.BytesIO()
    Image.new(mode, (5, 4), label).save(buffer, "PNG" if mode == "L" else "JPEG")
    return buffer.getvalue()


def devkit(folder, ids, lists, masks):
    """{path: content} of a devkit. Lists: {path under ImageSets: ids}; masks: {id: label}."""
    size = "<size><width>5</width><height>4</height></size>"
    box = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>3</ymax></bndbox>"
    annotation = f"<annotation>{size}<object><name>cat</name>{box}</object></annotation>".encode()
    files = {f"Annotations/{name}.xml": annotation for name in ids}
    files |= {f"ImageSets/{name}.txt": "".join(f"{i}\n" for i in of.split()).encode() for name, of in lists.items()}
    files |= {f"JPEGImages/{name}.jpg": picture((9, 9, 9), "RGB") for name in ids}
    files |= {f"SegmentationClass/{name}.png": picture(label) for name, label in masks.items()}
    return {f"VOCdevkit/{folder}/{path}": content for path, content in files.items()}


def sbd(lists, masks):
    savemat = pytest.importorskip("scipy.io", reason="scipy, which SBD's masks need, is not installed").savemat
    files = {f"{name}.txt": "".join(f"{i}\n" for i in of.split()).encode() for name, of in lists.items()}
    for name, label in masks.items():
        buffer = io.BytesIO()
        labels = np.full((4, 5), label, np.uint8)
        savemat(buffer, {"GTcls": {"Segmentation": labels, "CategoriesPresent": [label]}})
        files |= {f"cls/{name}.mat": buffer.getvalue(), f"img/{name}.jpg": b"", f"inst/{name}.mat": b""}
    return {f"benchmark_RELEASE/dataset/{path}": content for path, content in files.items()}


def packed(files, compression=""):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=f"w:{compression}") as tar:
        for path, content in files.items():
            member = tarfile.TarInfo(path)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def voc2007():
    trainval = {name: ids for name, ids in LISTS_2007.items() if "test" not in name}
    test = {name: ids for name, ids in LISTS_2007.items() if "test" in name}
    return {TRAINVAL: packed(devkit("VOC2007", "ab", trainval, {"a": 1, "b": 2})),
            TEST: packed(devkit("VOC2007", "cd", test, {"c": 3}))}


def voc2012():
    """VOC with a train id t and a val id v; SBD with s1, s2, and the two again, labelled 9."""
    lists = {"Segmentation/train": "t", "Segmentation/val": "v", "Segmentation/trainval": "t v"}
    return {VOC2012: packed(devkit("VOC2012", ["t", "v", "s1", "s2"], lists, {"t": 255, "v": 2})),
            SBD: packed(sbd({"train": "s1 t", "val": "s2 v"}, {"s1": 5, "s2": 6, "t": 9, "v": 9}), "gz")}


# ------------------------------------------------------------------------------------------ a server

class Server(ThreadingHTTPServer):
    """Serves `files`; of those in `broken` and `stalled` half, and then it hangs up or waits."""
    daemon_threads, block_on_close = True, False

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.broken, self.stalled = files, set(), set()
        self.asked, self.half_sent, self.go_on = [], threading.Event(), threading.Event()

    def where(self):
        """What torchvision is to believe: {its key: url and md5}; SBD is None's."""
        keys = {entry["filename"]: key for key, entry in DATASET_YEAR_DICT.items() if key != "2008"} | {SBD: "SBD"}
        return {keys[name]: {"url": f"http://127.0.0.1:{self.server_port}/{name}",
                             "md5": hashlib.md5(content).hexdigest()} for name, content in self.files.items()}

    def fetched(self):
        """Names of the archives asked for, in order; torchvision asks twice, at first for redirections alone."""
        assert self.asked[::2] == self.asked[1::2]
        return self.asked[::2]

    def handle_error(self, *_):
        pass  # a client that hangs up


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        name, server = self.path[1:], self.server
        if name not in server.files:
            return self.send_error(404)
        server.asked.append(name)
        content = server.files[name]
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        half = name in server.broken | server.stalled
        self.wfile.write(content[:len(content) // 2] if half else content)
        if name in server.stalled and server.asked.count(name) == 2:
            server.half_sent.set()
            server.go_on.wait(60)

    def log_message(self, *_):
        pass


@pytest.fixture
def serve(monkeypatch):
    """serve(files): a server that torchvision takes for the real ones."""
    servers = []

    def start(files):
        server = Server(files)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        for key, where in server.where().items():
            if key == "SBD":
                for name, value in where.items():
                    monkeypatch.setattr(SBDataset, name, value)
            else:
                monkeypatch.setitem(DATASET_YEAR_DICT, key, DATASET_YEAR_DICT[key] | where)
        return server
    yield start
    for server in servers:
        server.go_on.set()
        server.shutdown()
        server.server_close()


def check_2007(root):
    voc = root / "VOCdevkit/VOC2007"
    for name, ids in LISTS_2007.items():
        assert (voc / f"ImageSets/{name}.txt").read_text().split() == ids.split()
    for folder, ending, ids in (("JPEGImages", "jpg", "abcd"), ("Annotations", "xml", "abcd"),
                                ("SegmentationClass", "png", "abc")):
        assert sorted(os.listdir(voc / folder)) == [f"{name}.{ending}" for name in ids]
    assert os.listdir(root / "VOCdevkit") == ["VOC2007"]
    for name, label in {"a": 1, "b": 2, "c": 3}.items():
        assert (datasets.read_mask(voc / f"SegmentationClass/{name}.png", 21) == label).all()


def check_2012(root):
    voc = root / "VOCdevkit/VOC2012"
    assert datasets.read_list(voc, "train_aug") == ["s1", "s2", "t"]
    for name, label in {"s1": 5, "s2": 6, "t": 255, "v": 2}.items():
        merged = datasets.read_mask(voc / f"SegmentationClassAug/{name}.png", 21)
        assert np.array_equal(merged, np.full((4, 5), label))
    assert os.listdir(root / "VOCdevkit") == ["VOC2012"]
    assert not list(root.rglob("*.tmp"))


# ---------------------------------------------------------------------------------------------- 2007

def test_2007_is_trainval_and_test_in_one_folder(tmp_path, serve):
    server = serve(voc2007())
    voc = download_voc.download("2007", tmp_path)
    assert voc == tmp_path / "VOCdevkit/VOC2007"
    check_2007(tmp_path)
    assert server.fetched() == [TRAINVAL, TEST]
    assert datasets.VOCDataset(voc, "Main/trainval", datasets.VOC_CLASSES).ids == ["a", "b"]


def test_a_finished_folder_is_left_alone(tmp_path, serve):
    server = serve(voc2007())
    voc = download_voc.download("2007", tmp_path)
    for name in (TRAINVAL, TEST):
        (tmp_path / name).unlink()
    (voc / "Annotations/a.xml").write_text("mine")
    assert download_voc.download("2007", tmp_path) == voc
    assert (voc / "Annotations/a.xml").read_text() == "mine"
    assert server.fetched() == [TRAINVAL, TEST]  # once


def test_a_download_that_breaks_off_is_one_line_and_goes_on(tmp_path, serve):
    server = serve(voc2007())
    server.broken = {TEST}
    with pytest.raises(DataError) as caught:
        download_voc.download("2007", tmp_path)
    line = str(caught.value)
    assert line.startswith(f"{tmp_path / TEST}: cannot be fetched from http://127.0.0.1:") and "\n" not in line
    assert "run the same command again" in line
    assert 0 < (tmp_path / TEST).stat().st_size < len(server.files[TEST])  # half an archive, of the whole one's name
    assert not (tmp_path / "VOCdevkit").exists()
    server.broken = set()
    download_voc.download("2007", tmp_path)
    check_2007(tmp_path)
    assert server.fetched() == [TRAINVAL, TEST, TEST]


@pytest.fixture
def short_timeout():
    before = socket.getdefaulttimeout()
    yield socket.setdefaulttimeout
    socket.setdefaulttimeout(before)


@pytest.mark.parametrize("fault", ["not found", "no server", "no answer"])
def test_a_server_that_fails_is_one_line(tmp_path, serve, short_timeout, fault):
    server = serve(voc2007())
    if fault == "not found":
        server.files = {}
    elif fault == "no server":
        server.shutdown()
        server.server_close()
    else:
        server.stalled = {TRAINVAL}
        short_timeout(0.5)
    with pytest.raises(DataError, match=f"{TRAINVAL}: cannot be fetched from ") as caught:
        download_voc.download("2007", tmp_path)
    assert "\n" not in str(caught.value)


def test_a_full_disk_is_pythons_own_error(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(download_voc, "download_url", full)
    with pytest.raises(OSError, match="No space left on device"):
        download_voc.download("2007", tmp_path)


def test_a_stop_while_unpacking_leaves_no_folder_that_looks_finished(tmp_path, serve, monkeypatch):
    server = serve(voc2007())
    extract = download_voc.extract_archive

    def stop(path, folder):
        if path.name == TEST:
            Path(folder, "VOCdevkit/VOC2007/JPEGImages/half.jpg").touch()
            raise KeyboardInterrupt
        extract(path, folder)
    monkeypatch.setattr(download_voc, "extract_archive", stop)
    with pytest.raises(KeyboardInterrupt):
        download_voc.download("2007", tmp_path)
    assert not (tmp_path / "VOCdevkit/VOC2007").exists()
    monkeypatch.setattr(download_voc, "extract_archive", extract)
    download_voc.download("2007", tmp_path)
    check_2007(tmp_path)
    assert server.fetched() == [TRAINVAL, TEST]


def test_a_folder_of_trainval_alone_is_not_taken_for_whole(tmp_path, serve):
    server = serve(voc2007())
    (tmp_path / "VOCdevkit/VOC2007/ImageSets/Segmentation").mkdir(parents=True)
    with pytest.raises(DataError, match="VOC2007/ImageSets/Segmentation/test.txt: no such list; move .* away"):
        download_voc.download("2007", tmp_path)
    shutil.move(tmp_path / "VOCdevkit", tmp_path / "away")
    download_voc.download("2007", tmp_path)
    check_2007(tmp_path)
    assert server.fetched() == [TRAINVAL, TEST]


# ---------------------------------------------------------------------------------------------- 2012

@pytest.fixture
def three_ids(monkeypatch):
    monkeypatch.setattr(download_voc.merge_augmented, "__defaults__", (3,))


def test_2012_merges_voc_and_sbd(tmp_path, serve, three_ids):
    server = serve(voc2012())
    for _ in range(2):  # the second finds all done
        assert download_voc.download("2012", tmp_path) == tmp_path / "VOCdevkit/VOC2012"
        check_2012(tmp_path)
        assert server.fetched() == [VOC2012, SBD]


def test_2012_goes_on_where_sbd_broke_off(tmp_path, serve, three_ids):
    server = serve(voc2012())
    server.broken = {SBD}
    with pytest.raises(DataError, match=f"{SBD}: cannot be fetched"):
        download_voc.download("2012", tmp_path)
    assert not list(tmp_path.rglob("train_aug.txt"))
    (tmp_path / VOC2012).unlink()  # not needed: it is unpacked
    server.broken = set()
    download_voc.download("2012", tmp_path)
    check_2012(tmp_path)
    assert server.fetched() == [VOC2012, SBD, SBD]


def test_2012_goes_on_where_merging_was_stopped(tmp_path, serve, three_ids, monkeypatch):
    server = serve(voc2012())
    write = download_voc.write_mask

    def stop(path, labels):
        if path.name == "t.png":
            raise KeyboardInterrupt
        write(path, labels)
    monkeypatch.setattr(download_voc, "write_mask", stop)
    with pytest.raises(KeyboardInterrupt):
        download_voc.download("2012", tmp_path)
    assert not list(tmp_path.rglob("train_aug.txt"))
    monkeypatch.setattr(download_voc, "write_mask", write)
    download_voc.download("2012", tmp_path)
    check_2012(tmp_path)
    assert server.fetched() == [VOC2012, SBD]


def test_without_scipy_2012_says_what_to_install_before_it_fetches(tmp_path, serve, monkeypatch):
    server = serve(voc2007())
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(DataError, match="pip install scipy"):
        download_voc.download("2012", tmp_path)
    download_voc.download("2007", tmp_path)  # has no need of it
    assert server.fetched() == [TRAINVAL, TEST]


def test_other_than_10582_ids_are_refused_and_nothing_is_written(tmp_path, serve):
    serve(voc2012())
    with pytest.raises(DataError, match="VOC2012: with SBD 3 ids for train_aug, not 10582; move"):
        download_voc.download("2012", tmp_path)
    voc = tmp_path / "VOCdevkit/VOC2012"
    assert sorted(os.listdir(voc)) == ["Annotations", "ImageSets", "JPEGImages", "SegmentationClass"]
    assert not list(voc.rglob("train_aug.txt"))


# ------------------------------------------------------------------------------------------- command

@pytest.mark.parametrize("arguments", [[], ["2007"], ["2008", "data"], ["2007", ""], ["2007", "a", "b"]])
def test_the_command_line_says_how_it_is_used(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["download_voc.py", *arguments])
    with pytest.raises(SystemExit) as caught:
        download_voc.main()
    output = capsys.readouterr()
    assert caught.value.code == 2 and output.out == ""
    assert output.err == "usage: python tools/download_voc.py 2007|2012 DIR\n"


def test_the_command_fails_in_one_line_survives_a_kill_and_ends_well(tmp_path, serve):
    """The command as it stands, in another folder, with a Python that starts with the server's addresses."""
    server = serve(voc2007())
    (tmp_path / "start").mkdir()
    (tmp_path / "start/sitecustomize.py").write_text(
        "import json\nfrom torchvision.datasets.voc import DATASET_YEAR_DICT\n"
        f"for key, where in json.loads({json.dumps(server.where())!r}).items():\n"
        "    DATASET_YEAR_DICT[key].update(where)\n")
    start = dict(args=[sys.executable, ROOT / "tools/download_voc.py", "2007", "data"], cwd=tmp_path, text=True,
                 env=os.environ | {"PYTHONPATH": str(tmp_path / "start")},
                 stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    server.broken = {TRAINVAL}
    failed = subprocess.run(**start)
    assert failed.returncode == 2 and failed.stdout == "" and "Traceback" not in failed.stderr
    assert failed.stderr.splitlines()[-1].startswith(f"data/{TRAINVAL}: cannot be fetched from ")

    server.broken, server.stalled = set(), {TEST}
    killed = subprocess.Popen(**start)
    assert server.half_sent.wait(300)
    killed.kill()
    killed.communicate()
    server.go_on.set()
    assert not (tmp_path / "data/VOCdevkit").exists()

    server.stalled = set()
    done = subprocess.run(**start)
    assert done.returncode == 0 and done.stdout == "data.root: data/VOCdevkit/VOC2007\n"
    check_2007(tmp_path / "data")
    assert server.fetched() == [TRAINVAL, TRAINVAL, TEST, TEST]
