"""weights: caffe, the authors' file: fetched once, whole or not at all, and checked. The server is the test's own."""
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from conftest import ROOT

import engine
import models

LAYERS = {f"conv{block}_{number}": 64 * 2 ** min(block - 1, 3)
          for block, count in enumerate((2, 2, 3, 3, 3), 1) for number in range(1, count + 1)}


def authors_file(path):
    """The names and shapes of vgg_caffe.pth; each tensor is a strided look at few numbers, so that it is small."""
    generator, state, inputs = torch.Generator().manual_seed(0), {}, 3
    for name, outputs in (LAYERS | {"fc6": 1024, "fc7": 1024}).items():
        side = 1 if name == "fc7" else 3
        numbers = torch.rand(5 * outputs + 3 * inputs + 3 * side, generator=generator) / 100
        state[f"{name}.weight"] = numbers.as_strided((outputs, inputs, side, side), (5, 3, 2, 1))
        state[f"{name}.bias"] = numbers[:outputs].clone()
        inputs = outputs
    torch.save(state, path)
    return state


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serves `content`, and where `cut` is set only half of what it promised, until `go_on`."""
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            httpd.asked.append(self.path)
            self.send_response(httpd.status)
            self.send_header("Content-Length", str(len(httpd.content)))
            self.end_headers()
            half = len(httpd.content) // 2 if httpd.cut else None
            self.wfile.write(httpd.content[:half])
            self.wfile.flush()
            httpd.begun.set()
            httpd.go_on.wait(60)

        def log_message(self, *args):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.state = authors_file(tmp_path / "original.pth")
    httpd.content, httpd.status, httpd.cut, httpd.asked = (tmp_path / "original.pth").read_bytes(), 200, False, []
    httpd.begun, httpd.go_on = threading.Event(), threading.Event()
    httpd.go_on.set()
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(models, "CAFFE_URL", f"http://127.0.0.1:{httpd.server_port}/vgg_caffe.pth")
    monkeypatch.setattr(models, "CAFFE_BLOB", models.git_blob(tmp_path / "original.pth"))
    yield httpd
    httpd.go_on.set()
    httpd.shutdown()
    httpd.server_close()


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "hub/checkpoints"


def refused(cache, *words):
    with pytest.raises(models.WeightsError) as error:
        models.DeepLab(3, weights="caffe")
    message = str(error.value)
    assert "\n" not in message
    for word in (str(cache / "vgg_caffe.pth"), models.CAFFE_URL, "weights=imagenet", *words):
        assert word in message


def test_git_blob_is_git_hash_object(tmp_path):
    (tmp_path / "file").write_bytes(b"hello\n")
    assert models.git_blob(tmp_path / "file") == "ce013625030ba8dba906f756967f9e9ca394464a"


def test_fetched_once(server, cache):
    for model in (models.BoxClassifier(3, weights="caffe"), models.DeepLab(3, weights="caffe")):
        held = list(model.backbone.state_dict().values())
        first, *others = server.state.values()
        assert torch.equal(held[0], first.flip(1))
        assert len(held) == 30 and all(torch.equal(a, b) for a, b in zip(held[1:], others, strict=True))
        torch.testing.assert_close(255 * model.mean.flatten(), torch.tensor([122.675, 116.669, 104.008]))
        torch.testing.assert_close(255 * model.std.flatten(), torch.ones(3))
        assert {g["lr"]: len(g["params"]) for g in model.parameter_groups(1.0, 0.0)} == {1.0: 30, 10.0: 1}
    assert server.asked == ["/vgg_caffe.pth"]
    assert [path.name for path in cache.iterdir()] == ["vgg_caffe.pth"]


def test_put_there_by_hand(server, cache):
    cache.mkdir(parents=True)
    (cache / "vgg_caffe.pth").write_bytes(server.content)
    models.DeepLab(3, weights="caffe")
    (cache / "vgg_caffe.pth").write_bytes(server.content + b"\0")
    refused(cache, "not the authors' file")
    assert not server.asked
    assert (cache / "vgg_caffe.pth").read_bytes() == server.content + b"\0"


def test_no_network(server, cache):
    server.shutdown()
    server.server_close()
    refused(cache, "cannot be downloaded")
    assert not list(cache.iterdir())


def test_not_found(server, cache):
    server.status = 404
    refused(cache, "cannot be downloaded", "404")
    assert not list(cache.iterdir())


@pytest.mark.parametrize("fault", ["cut", "changed"])
def test_a_download_cut_or_changed(server, cache, fault):
    if fault == "cut":
        server.cut = True
    else:
        server.content = server.content[:-1] + b"!"
    refused(cache, "cut or changed")
    assert not list(cache.iterdir())


def test_killed_in_the_middle(server, cache):
    server.cut = True
    server.go_on.clear()
    code = f"import models; models.CAFFE_URL = {models.CAFFE_URL!r}; models.DeepLab(3, weights='caffe')"
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert server.begun.wait(120)
    process.kill()
    process.wait()
    assert not (cache / "vgg_caffe.pth").exists()


def test_a_folder_that_cannot_be_made_is_no_missing_network(server, tmp_path):
    (tmp_path / "hub").write_text("a file")
    with pytest.raises(NotADirectoryError):
        models.DeepLab(3, weights="caffe")


def test_the_authors_recipe_starts_from_it():
    for name, stages in (("voc_vgg16", ("train_cls", "train_seg")), ("voc_resnet101", ("train_cls",))):
        config = engine.configure("train_cls", [str(ROOT / f"configs/{name}.yaml")])
        assert all(getattr(config, stage).weights == "caffe" for stage in stages)
