"""Weights of others: the authors' file, fetched and checked (the server is the test's own), and whole networks in the
names of the authors' code, compared with networks of those names that are written out here and loaded strictly.
"""
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import ROOT
from conftest import script as run_script
from PIL import Image
from torch import nn

import datasets
import models
import runs
import settings
from settings import UsageError
from tools.shapes import make_shapes

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
    for word in (str(cache / "vgg_caffe.pth"), models.CAFFE_URL, "set weights to a file", *words):
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
    assert server.begun.wait(300)
    process.kill()
    process.wait()
    assert not (cache / "vgg_caffe.pth").exists()


def test_a_folder_that_cannot_be_made_is_no_missing_network(server, tmp_path):
    (tmp_path / "hub").write_text("a file")
    with pytest.raises(NotADirectoryError):
        models.DeepLab(3, weights="caffe")


def test_the_authors_recipe_starts_from_it():
    for name, stages in (("voc_vgg16", ("train_cls", "train_seg")), ("voc_resnet101", ("train_cls",))):
        config = settings.read("train_cls", [str(ROOT / f"configs/{name}.yaml")])
        assert all(getattr(config, stage).weights == "caffe" for stage in stages)


# ---- whole networks in the names of the authors' code ----

BGR_MEAN = torch.tensor([104.008, 116.669, 122.675])[:, None, None]


def caffe_colours(images):
    """RGB in [0, 1] -> BGR in 0..255 minus the mean."""
    return 255 * images.flip(1) - BGR_MEAN


class LargeFOV(nn.Module):
    """VGG-16 as the authors' code names it, for BGR; `rate` is fc6's dilation."""

    def __init__(self, rate, labels):
        super().__init__()
        self.backbone, self.rate, inputs = nn.Module(), rate, 3
        for name, outputs in LAYERS.items():
            rate = 2 if name.startswith("conv5") else 1
            self.backbone.add_module(name, nn.Conv2d(inputs, outputs, 3, padding=rate, dilation=rate))
            inputs = outputs
        self.backbone.fc6 = nn.Conv2d(512, 1024, 3, padding=self.rate, dilation=self.rate)
        self.backbone.fc7 = nn.Conv2d(1024, 1024, 1)
        self.classifier = nn.Conv2d(1024, labels, 1, bias=False)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight)
        for layer in self.backbone.children():
            nn.init.normal_(layer.bias)

    def features(self, x):
        for block, last in enumerate((2, 2, 3, 3, 3), 1):
            for number in range(1, last + 1):
                x = F.relu(getattr(self.backbone, f"conv{block}_{number}")(x))
            x = F.max_pool2d(x, 3, stride=2 if block < 4 else 1, padding=1)
        x = F.avg_pool2d(x, 3, stride=1, padding=1)
        return F.relu(self.backbone.fc7(F.relu(self.backbone.fc6(x))))

    def cosine(self, x):
        phi = F.normalize(self.features(x), dim=1)
        cosine = F.conv2d(phi, F.normalize(self.classifier.weight, dim=1))
        return F.interpolate(cosine, x.shape[2:], mode="bilinear", align_corners=True)


@pytest.fixture(scope="module")
def authors(tmp_path_factory):
    """A classifier and a segmenter of one file, in the names of the authors' code: (both by fc6's dilation, file)."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("authors") / "theirs.pth"
    torch.save(LargeFOV(1, 7).state_dict(), file)
    networks = {}
    for rate in (1, 12):
        networks[rate] = LargeFOV(rate, 7).eval()
        networks[rate].load_state_dict(torch.load(file), strict=True)
    return networks, file


def loaded(script, tmp_path, kind, file, backbone="vgg16"):
    config = settings.read(script, ["data.root=x", "run.device=cpu"])
    config.path, config.device = tmp_path, torch.device("cpu")
    return runs.load_network(config, "none.pt", kind, settings.TrainCls(backbone=backbone), str(file))


def pictures(*size):
    return torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1))


def close(ours, theirs):
    assert ours.shape == theirs.shape and theirs.std() > 1e-3
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())


def test_a_classifier_in_the_authors_names(tmp_path, authors):
    networks, file = authors
    ours = loaded("make_labels", tmp_path, models.BoxClassifier, file)
    images, boxes = pictures(65, 57), [torch.tensor([[8.0, 9, 40, 50], [0, 0, 30, 20]]), torch.zeros(0, 4)]
    with torch.no_grad():
        features = networks[1].features(caffe_colours(images))
        close(ours.features(images), features)
        pooled = models.BAP()(features, boxes, (65, 57))
        scores, rows = ours(images, boxes), networks[1].classifier.weight[:, :, 0, 0]
        close(scores.foreground, pooled.foreground @ rows.T)
        close(scores.queries, pooled.queries @ rows.T)


def test_a_segmenter_in_the_authors_names(tmp_path, authors):
    networks, file = authors
    ours = loaded("eval", tmp_path, models.DeepLab, file)
    with torch.no_grad():
        close(ours(pictures(65, 57)), networks[12].cosine(caffe_colours(pictures(65, 57))))


def test_training_may_start_from_it(authors):
    """Its backbone; the classifier is new, also where its shape fits."""
    networks, file = authors
    for build in models.BoxClassifier, models.DeepLab:
        network = build(7, weights=file).eval()
        assert network.loaded == {f"backbone.{n}" for n, _ in network.backbone.named_parameters()}
        assert network.classifier.weight.std() < 0.02 < networks[1].classifier.weight.std()
        rate = 1 if build is models.BoxClassifier else 12
        with torch.no_grad():
            close(network.features(pictures(65, 57)), networks[rate].features(caffe_colours(pictures(65, 57))))


def test_a_network_of_unknown_names(tmp_path):
    torch.save({"backbone.conv.weight": torch.zeros(3)}, tmp_path / "odd.pth")
    with pytest.raises(models.WeightsError, match="odd.pth: weights of another network"):
        models.BoxClassifier(3, weights=tmp_path / "odd.pth")


def run(script, *arguments, cwd):
    vgg = [f"{stage}.{value}" for stage in ("train_cls", "train_seg") for value in ("backbone=vgg16", "width=1.0")]
    return run_script(script, *vgg, "run.workers=0", "make_labels.crf_iterations=1", *arguments, cwd=cwd)


def done(script, *arguments, cwd):
    finished = run(script, *arguments, cwd=cwd)
    assert finished.returncode == 0, finished.stderr


def refused_line(script, *arguments, cwd):
    finished = run(script, *arguments, cwd=cwd)
    assert finished.returncode == 2
    return finished.stderr.splitlines()[-1]


def test_scripts_use_a_file_without_a_training(tmp_path, authors):
    networks, file = authors
    make_shapes(tmp_path / "data/shapes", train=2, val=1)
    done("make_labels", f"weights={file}", "splits=[val]", cwd=tmp_path)
    done("eval", f"weights={file}", cwd=tmp_path)
    folder = tmp_path / "runs/shapes"
    assert not list(folder.glob("*.pt"))
    state = torch.load(file)
    state["classifier.weight"] *= -1
    torch.save(state, tmp_path / "other.pth")
    for script in ("make_labels", "eval"):
        assert "made with other settings: weights" in refused_line(script, "weights=other.pth", cwd=tmp_path)
    name = datasets.read_list(tmp_path / "data/shapes", "val")[0]
    assert (folder / f"labels/Ycrf/{name}.png").exists() and (folder / f"labels/Yret/{name}.png").exists()
    assert json.loads((folder / "eval.json").read_text())["val, plain"]["miou"] >= 0

    image = torch.from_numpy(datasets.read_image(tmp_path / f"data/shapes/JPEGImages/{name}.jpg").copy())
    image = image.permute(2, 0, 1)[None] / 255
    size, canvas = image.shape[2:], models.padded_size(image.shape[2:])
    x = F.pad(caffe_colours(image), (0, canvas[1] - size[1], 0, canvas[0] - size[0]))
    with torch.no_grad():
        expected = networks[12].cosine(x)[0, :, :size[0], :size[1]].argmax(0).numpy()
    given = np.array(Image.open(folder / f"predictions/plain/{name}.png"))
    assert (given == expected).mean() > 0.999 and len(np.unique(expected)) > 1


def test_what_a_file_made_is_remembered_by_its_content(tmp_path):
    config = settings.read("eval", ["data.root=x", "run.device=cpu"])
    config.path, folder = tmp_path / "run", tmp_path / "run/predictions/plain"
    files = {"theirs.pth": b"weights", "copy.pth": b"weights", "other.pth": b"others", "run/seg.pt": b"weights"}
    folder.mkdir(parents=True)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)

    def claim(name):
        runs.discard_outdated(config, folder, "eval", {"a.b": 1},
                              tmp_path / name)

    claim("theirs.pth")
    (folder / "x.png").write_bytes(b"prediction")
    claim("copy.pth")
    for name in ("other.pth", "run/seg.pt"):
        with pytest.raises(UsageError, match="made with other settings: weights"):
            claim(name)
    assert (folder / "x.png").exists()
    config.run.overwrite = True
    claim("other.pth")
    assert not (folder / "x.png").exists()


def test_files_that_scripts_refuse(tmp_path, authors):
    _, file = authors
    make_shapes(tmp_path / "data/shapes", train=2, val=1)
    assert "nowhere.pth: no such file" in refused_line("eval", "weights=nowhere.pth", cwd=tmp_path)
    line = refused_line("eval", f"weights={file}", "data.classes=[bar, ring]", "train_seg.weights=none", cwd=tmp_path)
    assert "theirs.pth: weights of another network" in line
    network = models.BoxClassifier(2, width=0.0625)
    torch.save(dict(network=dict(kind="BoxClassifier", backbone="vgg16", width=0.0625),
                    classes=["a", "b"], model=network.state_dict()),
               tmp_path / "cls.pt")
    line = refused_line("make_labels", "weights=cls.pt", cwd=tmp_path)
    assert line.endswith("cls.pt: does not know bar, ring, cross, crescent, vee, wave, only a, b; "
                         "name the boxes so: tools/own_data.py --rename OLD=NEW")
    line = refused_line("eval", "weights=cls.pt", cwd=tmp_path)
    assert "cls.pt: a BoxClassifier, not a DeepLab, which train_seg.py makes" in line
    assert not (tmp_path / "runs").exists()


# ---- ResNet-101 in kazuto1011's names ----

class Unit(nn.Sequential):
    def __init__(self, inputs, outputs, side, stride, dilation=1):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, side, stride, dilation * (side // 2), dilation, bias=False)
        self.bn = nn.BatchNorm2d(outputs, momentum=0.001)


class Block(nn.Module):
    def __init__(self, inputs, outputs, stride, dilation, first):
        super().__init__()
        self.reduce = Unit(inputs, outputs // 4, 1, stride)
        self.conv3x3 = Unit(outputs // 4, outputs // 4, 3, 1, dilation)
        self.increase = Unit(outputs // 4, outputs, 1, 1)
        self.shortcut = Unit(inputs, outputs, 1, stride) if first else nn.Identity()

    def forward(self, x):
        y = F.relu(self.conv3x3(F.relu(self.reduce(x))))
        return F.relu(self.increase(y) + self.shortcut(x))


class CaffeResNet(nn.Module):
    """The original ResNet as kazuto1011's files name it, for BGR: stride in a block's first 1x1, a first pool with
    ceil_mode; at stride 8 with dilations, or as for classification, at stride 32.
    """

    def __init__(self, counts, strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4)):
        super().__init__()
        self.layer1, inputs = nn.Module(), 64
        self.layer1.conv1 = Unit(3, 64, 7, 2)
        for stage, (count, stride, dilation) in enumerate(zip(counts, strides, dilations)):
            outputs, layer = 256 * 2 ** stage, nn.Sequential()
            for number in range(1, count + 1):
                first = number == 1
                layer.add_module(f"block{number}", Block(inputs, outputs, stride if first else 1, dilation, first))
                inputs = outputs
            self.add_module(f"layer{stage + 2}", layer)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                for values, low in (module.weight, 0.5), (module.bias, -1), (module.running_mean, -1), (
                        module.running_var, 0.5):
                    nn.init.uniform_(values, low, 1)

    def body(self, x):
        x = F.max_pool2d(F.relu(self.layer1.conv1(x)), 3, stride=2, padding=1, ceil_mode=True)
        return self.layer5(self.layer4(self.layer3(self.layer2(x))))


class CaffeDeepLab(CaffeResNet):
    """With DeepLab-V2's head, without biases, and a cosine classifier."""

    def __init__(self, labels):
        super().__init__((3, 4, 23, 3))
        self.aspp = nn.Module()
        for number, rate in enumerate((6, 12, 18, 24)):
            self.aspp.add_module(f"c{number}", nn.Conv2d(2048, 256, 3, 1, rate, rate, bias=False))
        self.classifier = nn.Conv2d(256, labels, 1, bias=False)

    def cosine(self, x):
        x = self.body(x)
        phi = F.normalize(F.relu(sum(branch(x) for branch in self.aspp.children())), dim=1)
        cosine = F.conv2d(phi, F.normalize(self.classifier.weight, dim=1))
        return F.interpolate(cosine, (65, 57), mode="bilinear", align_corners=True)


@pytest.fixture(scope="module")
def caffe_deeplab(tmp_path_factory):
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("kazuto1011") / "deeplab.pth"
    torch.save(CaffeDeepLab(7).state_dict(), file)
    network = CaffeDeepLab(7).eval()
    network.load_state_dict(torch.load(file), strict=True)
    return network, file


def test_a_segmenter_of_resnet101_in_kazuto1011s_names(tmp_path, caffe_deeplab):
    network, file = caffe_deeplab
    ours = loaded("eval", tmp_path, models.DeepLab, file, "resnet101_caffe")
    with torch.no_grad():
        close(ours(pictures(65, 57)), network.cosine(caffe_colours(pictures(65, 57))))


@pytest.mark.parametrize("prefix, old", [("", False), ("base.", True)])
def test_training_may_start_from_kazuto1011s_files(tmp_path, prefix, old):
    """With a classifier of their own; old files lack num_batches_tracked. Batch norm trains as in Caffe, if asked."""
    torch.manual_seed(0)
    network = CaffeResNet((3, 4, 6, 3))
    state = {f"{prefix}{name}": value for name, value in network.state_dict().items()
             if not (old and name.endswith("num_batches_tracked"))}
    torch.save(state | {f"{prefix}fc.weight": torch.zeros(91, 2048, 1, 1), f"{prefix}aspp.c0.bias": torch.zeros(21)},
               tmp_path / "start.pth")
    ours, images, found = models.DeepLab(7, "resnet50_caffe", tmp_path / "start.pth").train(), pictures(65, 57), []
    ours.backbone.register_forward_hook(lambda module, inputs, output: found.append(output))
    assert not any(m.training for m in ours.modules() if isinstance(m, nn.BatchNorm2d))
    with torch.no_grad():
        for train in (False, True):
            ours.freeze_norm = not train
            ours.train()
            ours.features(images)
            close(found[-1], network.train(train).body(caffe_colours(images)))
    held = ours.backbone.caffe.layer4[0].bn2.running_mean
    torch.testing.assert_close(held, network.layer5.block1.conv3x3.bn.running_mean)
    assert ours.loaded >= {f"backbone.{n}" for n, _ in ours.backbone.named_parameters()}
    assert ours.fill == [123, 117, 104]


def test_strides_become_dilations_exactly(tmp_path):
    """At the cells that it keeps, a network at stride 32 gives the features of the one at stride 8."""
    torch.manual_seed(0)
    images = pictures(65, 97)
    kinds = {"resnet50": torchvision.models.resnet50(),
             "resnet50_caffe": CaffeResNet((3, 4, 6, 3), (1, 2, 2, 2), (1, 1, 1, 1))}
    for name, network in kinds.items():
        torch.save(network.state_dict(), tmp_path / "start.pth")
        ours = models.build_backbone(name, tmp_path / "start.pth")[0].eval()
        if name == "resnet50":
            network.body = nn.Sequential(*list(network.children())[:-2])
        with torch.no_grad():
            expected = network.eval().body(images if name == "resnet50" else images.flip(1))
            assert expected.shape[2:] == (3, 4)
            close(ours(images)[:, :, ::4, ::4], expected)


def test_neither_resnet_takes_the_others_weights(tmp_path):
    def names(network):  # small on disk
        return {name: torch.zeros((), device="cpu").expand(value.shape) for name, value in network.state_dict().items()}

    with torch.device("meta"):
        files = [("resnet50_caffe", names(torchvision.models.resnet50())),
                 ("resnet50_caffe", names(models.DeepLab(7, "resnet50"))),
                 ("resnet50", names(models.DeepLab(7, "resnet50_caffe"))),
                 ("resnet50", names(CaffeResNet((3, 4, 6, 3))))]
    for backbone, state in files:
        torch.save(state, tmp_path / "other.pth")
        with pytest.raises(models.WeightsError, match="weights of another network; set weights or backbone"):
            models.DeepLab(7, backbone, tmp_path / "other.pth")
