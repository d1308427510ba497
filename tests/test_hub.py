"""hubconf.py, as torch.hub.load takes it from a folder."""
import shutil

import pytest
import torch
from conftest import ROOT

import models


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """hub(name, ...): of a folder that holds no more than what hubconf.py needs."""
    pytest.importorskip("timm")
    for name in ("hubconf.py", "models.py"):
        shutil.copy(ROOT / name, tmp_path)
    return lambda *arguments: torch.hub.load(str(tmp_path), *arguments, source="local")


def save(path, network, labels):
    path.parent.mkdir(exist_ok=True)
    state = {name: value.half() for name, value in network.state_dict().items()}
    torch.save(dict(model=state, classes=["leaf", "sea"],
                    network=dict(kind=type(network).__name__, backbone="vgg16", width=0.0625)), path)


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
