"""The networks trained on VOC 2007, for torch.hub.load(REPOSITORY, NAME)."""
import importlib.util
import sys
from pathlib import Path

# Under a name of its own, since the caller may have a module `models`; once,
# since pickle looks there for the very class of a network.
if "bana_models" not in sys.modules:
    spec = importlib.util.spec_from_file_location(
        "bana_models", Path(__file__).with_name("models.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["bana_models"] = module
models = sys.modules["bana_models"]

dependencies = ["torch", "torchvision"]  # and timm, for some files
WEIGHTS = Path(__file__).parent / "weights"


def _load(path, kind):
    network = models.load(path)
    if not isinstance(network, kind):
        raise ValueError(f"{path}: a {type(network).__name__}, not a "
                         f"{kind.__name__}")
    return network


def classifier(path=""):
    """Stage 1's network, of images and boxes, in evaluation mode, with its
    `classes`; from a cls.pt, if `path` names one. ValueError: the file is
    missing or holds something else.
    """
    return _load(path or WEIGHTS / "voc2007_cls.pth", models.BoxClassifier)


def segmenter(path=""):
    """Stage 3's network: images (N, 3, H, W), RGB, uint8 or in [0, 1] ->
    cosine maps (N, 1 + classes, H, W); else as classifier, of a seg.pt.
    """
    return _load(path or WEIGHTS / "voc2007_seg.pth", models.DeepLab)
