"""The networks trained on VOC 2007, for torch.hub.load(REPOSITORY, NAME)."""
import importlib.util
import sys
from pathlib import Path

# Under a name of its own, since the caller may have a module `models`.
spec = importlib.util.spec_from_file_location(
    "bana_models", Path(__file__).with_name("models.py"))
assert spec and spec.loader
models = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = models  # where pickle looks for the networks
spec.loader.exec_module(models)

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
