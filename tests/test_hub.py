"""hubconf.py, as torch.hub.load takes it from a folder; and published networks in the scripts."""
import pickle
import shutil
import subprocess
import sys
import types
import zipfile

import numpy as np
import pytest
import torch
from conftest import ROOT, script
from PIL import Image

import datasets
import models
from tools.shapes import SHAPES, make_shapes


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """hub(name, ...): of a folder that holds no more than what hubconf.py needs, and without timm."""
    monkeypatch.setitem(sys.modules, "timm", None)
    for name in ("hubconf.py", "models.py"):
        shutil.copy(ROOT / name, tmp_path)
    return lambda *arguments: torch.hub.load(str(tmp_path), *arguments, source="local")


def save(path, network, labels):
    path.parent.mkdir(exist_ok=True)
    state = {name: value.half() for name, value in network.state_dict().items()}
    torch.save(dict(model=state, classes=["leaf", "sea"],
                    network=dict(kind=type(network).__name__, backbone="vgg16", width=0.0625)), path)


def test_a_network_can_be_saved_whole(hub, tmp_path):
    save(tmp_path / "weights/voc2007_seg.pth", models.DeepLab(3, "vgg16", width=0.0625), 3)
    for network in [hub("segmenter"), hub("segmenter")]:  # the first as well, with the second there
        again = pickle.loads(pickle.dumps(network))
        assert again.classes == network.classes
        torch.testing.assert_close(again.classifier.weight, network.classifier.weight)


def test_the_caller_may_have_a_module_models(hub, tmp_path, monkeypatch):
    theirs = types.ModuleType("models")
    monkeypatch.setitem(sys.modules, "models", theirs)
    save(tmp_path / "weights/voc2007_seg.pth", models.DeepLab(3, "vgg16", width=0.0625), 3)
    assert hub("segmenter").classes == ["leaf", "sea"] and sys.modules["models"] is theirs


@pytest.mark.parametrize("name, kind, file, labels", [
    ("segmenter", models.DeepLab, "voc2007_seg.pth", 3), ("classifier", models.BoxClassifier, "voc2007_cls.pth", 2)])
def test_networks_of_the_repository(hub, tmp_path, name, kind, file, labels):
    with pytest.raises(ValueError, match=f"weights/{file}: no such file; name another") as fault:
        hub(name)
    assert "\n" not in str(fault.value)
    made = kind(labels, "vgg16", width=0.0625).eval()
    save(tmp_path / "weights" / file, made, labels)
    save(tmp_path / "other.pt", made, labels)
    image, boxes = torch.rand(1, 3, 65, 65), [torch.tensor([[9.0, 9, 40, 50]])]
    for network in (hub(name), hub(name, tmp_path / "other.pt")):
        assert type(network).__name__ == kind.__name__ and network.classes == ["leaf", "sea"]
        assert not network.training
        with torch.inference_mode():
            inputs = (image,) if kind is models.DeepLab else (image, boxes)
            found, expected = network(*inputs), made(*inputs)
        for one, other in zip(found, expected):
            torch.testing.assert_close(one, other, atol=0.01, rtol=0.01)  # of 16 bits


@pytest.mark.parametrize("name, other", [("segmenter", models.BoxClassifier), ("classifier", models.DeepLab)])
def test_a_network_of_the_other_kind_is_refused(hub, tmp_path, name, other):
    path = tmp_path / "other.pt"
    save(path, other(2 + (other is models.DeepLab), "vgg16", width=0.0625), 3)
    with pytest.raises(ValueError, match=f"other.pt: a {other.__name__}, not a "):
        hub(name, path)


def test_a_published_network_labels_and_segments_under_any_settings(tmp_path):
    """tools/half.py rounds a checkpoint; the scripts use it without a training, also with some of its
    classes in another order, and for a photograph."""
    make_shapes(tmp_path / "data/shapes", train=1, val=1)
    torch.manual_seed(0)
    networks = dict(cls=models.BoxClassifier(len(SHAPES), "vgg16_bn", width=0.0625),
                    seg=models.DeepLab(1 + len(SHAPES), "vgg16_bn", width=0.0625))
    for name, network in networks.items():
        torch.nn.init.normal_(network.classifier.weight)
        described = dict(kind=type(network).__name__, backbone="vgg16_bn", width=0.0625)
        torch.save(dict(model=network.state_dict(), classes=list(SHAPES), network=described,
                        settings={"train_seg.temperature": 5.0, "data.root": "/somewhere"},
                        chosen="chosen on 3 images"), tmp_path / f"{name}.pt")
        subprocess.run([sys.executable, ROOT / "tools/half.py", f"{name}.pt", f"half/{name}.pth"], cwd=tmp_path,
                       check=True)
        with zipfile.ZipFile(tmp_path / f"half/{name}.pth") as archive:
            assert {item.compress_type for item in archive.infolist()} == {zipfile.ZIP_DEFLATED}
        content = torch.load(tmp_path / f"half/{name}.pth")
        assert set(content) == {"network", "classes", "model", "settings", "chosen"}
        assert content["settings"] == {"train_seg.temperature": 5.0}
        for key, value in content["model"].items():
            whole = network.state_dict()[key]
            rounded = whole.bfloat16().half() if whole.is_floating_point() else whole
            torch.testing.assert_close(value, rounded, rtol=0, atol=0)

    def succeeds(*arguments):
        done = script(*arguments, "device=cpu", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    # The default settings are of a network of another width.
    picture, = (tmp_path / "data/shapes/JPEGImages").glob("*_00001.*")
    said = succeeds("eval", "weights=half/seg.pth", f"images={picture}")
    assert ", ".join(f"{k} {name}" for k, name in enumerate(SHAPES, 1)) in said
    labels = np.array(Image.open(tmp_path / f"runs/shapes/pictures/plain/{picture.stem}.png"))
    image = torch.from_numpy(datasets.read_image(picture).copy()).permute(2, 0, 1)
    with torch.inference_mode():
        expected = models.load(tmp_path / "half/seg.pth")(image[None])[0].argmax(0).numpy()
    assert len(np.unique(labels)) > 1 and (labels == expected).mean() > 0.999

    turned = SHAPES[::-1]
    succeeds("make_labels", "weights=half/cls.pth", "splits=[val]", "crf_iterations=1")
    succeeds("make_labels", "weights=half/cls.pth", "splits=[val]", "crf_iterations=1", "name=turned",
             f"data.classes=[{', '.join(turned)}]")
    for kind in "Ycrf", "Yret":
        ours, theirs = (np.array(Image.open(tmp_path / f"runs/{run}/labels/{kind}/{picture.stem}.png"))
                        for run in ("shapes", "turned"))
        assert ours.any() and (np.where(theirs, len(SHAPES) + 1 - theirs, 0) == ours).all()
    broken, bare, large = (tmp_path / f"{name}.pt" for name in ("broken", "bare", "large"))
    broken.write_bytes(b"nothing")
    torch.save(networks["seg"].state_dict(), bare)
    content = torch.load(tmp_path / "seg.pt")
    content["model"]["classifier.weight"][0, 0] = 1e6
    torch.save(content, large)
    for file, words in ((broken, f"{broken}: not a file of weights"), (bare, f"{bare}: not a cls.pt or seg.pt"),
                        (large, "as float16: holds infinity in classifier.weight")):
        done = subprocess.run([sys.executable, ROOT / "tools/half.py", file, "out.pth"], cwd=tmp_path,
                              capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.startswith(words)
        assert not (tmp_path / "out.pth").exists()
