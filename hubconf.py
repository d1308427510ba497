"""The networks trained on VOC 2007, for torch.hub.load(REPOSITORY, NAME)."""
from pathlib import Path

import models

dependencies = ["torch", "torchvision", "timm"]
WEIGHTS = Path(__file__).parent / "weights"


def classifier(path: models.PathLike = "") -> models.Network:
    """Stage 1's network, of images and boxes, in evaluation mode, with its
    `classes`; from a cls.pt, if `path` names one. models.WeightsError: the
    file is missing or is not a checkpoint.
    """
    return models.load(path or WEIGHTS / "voc2007_cls.pth")


def segmenter(path: models.PathLike = "") -> models.Network:
    """Stage 3's network: images (N, 3, H, W), RGB, uint8 or in [0, 1] ->
    cosine maps (N, 1 + classes, H, W); else as classifier, of a seg.pt.
    """
    return models.load(path or WEIGHTS / "voc2007_seg.pth")
