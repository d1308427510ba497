"""Background-aware pooling (section 3.1 of the paper), the classifier that is
trained with it, the feature maps that its labels are made from (3.2), and the
DeepLab segmenters (3.3).

One file to copy: it needs torch and torchvision, and timm for timm/NAME.

A box is x0, y0, x1, y1 in continuous pixel coordinates, x1 and y1 exclusive:
pixel i reaches from i to i + 1. Feature cell j of w is centred on pixel
j (W - 1) / (w - 1) of W (align_corners). It reaches half a step to each side,
cut off at the image's edge.
"""
import hashlib
import http.client
import io
import math
import os
import pickle
import re
import struct
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import URLError

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import get_model, get_model_weights
from torchvision.tv_tensors import BoundingBoxes

Size = Sequence[int]  # height, width
State = dict[str, Tensor]  # a state dict
PathLike = str | os.PathLike
STRIDE = 8  # pixels from one feature cell to the next, for every backbone
# A grid cell makes a query if it holds more background than this, in feature
# cells; less is rounding at an edge.
LEAST_QUERY = 1e-5


class WeightsError(ValueError):
    """A backbone or its weights cannot be had; the message is one line."""


# ---- background-aware pooling ----

def box_slices(box: Sequence[float]) -> tuple[slice, slice]:
    """Rows and columns of the pixels that a box touches."""
    x0, y0, x1, y1 = (max(side, 0) for side in box)
    rows = slice(math.floor(y0), math.ceil(y1))
    return rows, slice(math.floor(x0), math.ceil(x1))


def outside_boxes(boxes: list[Tensor], image_size: Size) -> Tensor:
    """M of the paper, 1 on every pixel that no box touches: (N, 1, H, W)."""
    background = torch.ones(len(boxes), 1, *image_size)
    for mask, image_boxes in zip(background[:, 0], boxes):
        for box in image_boxes.tolist():
            mask[box_slices(box)] = 0
    return background


def check_boxes(boxes: list[Tensor]) -> None:
    """Raises ValueError for boxes that are not x0, y0, x1, y1."""
    for found in boxes:
        if isinstance(found, BoundingBoxes) and found.format.value != "XYXY":
            raise ValueError(f"boxes are {found.format.value}, not XYXY")
        if found.shape[1:] != (4,):
            raise ValueError(f"boxes are {tuple(found.shape)}, not (K, 4)")
        # Values on a GPU would be waited for; a traced graph has none.
        if found.device.type == "cpu" and not torch.compiler.is_compiling():
            wrong = found[(found[:, :2] > found[:, 2:]).any(1)].tolist()
            if wrong:
                raise ValueError(f"box {wrong[0]} has x1 < x0 or y1 < y0")


def numbers(count, like):
    """0, 1, ... on the device and of the type of another tensor."""
    return torch.arange(count, device=like.device, dtype=like.dtype)


def divide(low, high, parts, like):
    """The interval from low to high, each a number or (..., 1), cut into equal
    parts: their starts and ends, (..., parts, 2).
    """
    edges = low + (high - low) * numbers(parts + 1, like) / parts
    return torch.stack((edges[..., :-1], edges[..., 1:]), -1)


def length_inside(intervals, cells):
    """The length of each cell (n, 2) inside intervals (..., 2): (..., n)."""
    start = torch.maximum(intervals[..., :1], cells[:, 0])
    end = torch.minimum(intervals[..., 1:], cells[:, 1])
    return (end - start).clamp(min=0)


def coverage(intervals, pixels, cells):
    """The part of each feature cell inside intervals (..., 2) of pixels:
    (..., cells) in [0, 1].
    """
    # A single cell reaches over the whole axis.
    step = (pixels - 1) / (cells - 1) if cells > 1 else 2 * pixels
    centre = numbers(cells, intervals) * step + 0.5
    extent = torch.stack((centre - step / 2, centre + step / 2), 1)
    extent = extent.clamp(0, pixels)
    return length_inside(intervals, extent) / (extent[:, 1] - extent[:, 0])


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """To the device; to a GPU without waiting for it, which takes pinned
    memory (except in a compiled graph, which cannot pin).
    """
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    if not torch.compiler.is_compiling():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class Pooled(NamedTuple):
    """Image by image; in an image, bins and grid cells go row by row. All in
    float32 at least.
    """
    foreground: Tensor  # (sum K_i, bins * bins, C): r
    queries: Tensor  # (J, C): q of the grid cells that hold background
    attention: Tensor  # (N, 1, h, w) in [0, 1]: A, 1 where `background` is


class BAP(nn.Module):
    """Background-aware pooling. With p running over feature cells,

        q_j  = sum_{p in grid cell j} M(p) f(p) / sum_{p in grid cell j} M(p)
        A(p) = 1 outside boxes, inside the mean over j of ReLU(cos(f(p), q_j))
        r_i  = sum_{p in box i} (1 - A(p)) f(p) / sum_{p in box i} (1 - A(p))

    A feature cell that background or a box covers in part counts with the
    covered share of its area; its A is the mean over its area, with 1 on the
    share that is background.

    grid: the feature map is cut into grid x grid equal grid cells.
    bins: a box is cut into bins x bins equal parts, each with an r.
    min_background: an image with at most this share of background, or with no
        query, is average-pooled: its r are means, as if A were 0.
    aware: False average-pools every image (the paper's GAP).
    A part of a box where 1 - A is at most 1e-4 on average is average-pooled,
    too, since its r would be 0 / 0.
    """

    def __init__(self, grid: int = 4, bins: int = 2,
                 min_background: float = 0.125, aware: bool = True):
        super().__init__()
        self.grid, self.bins = grid, bins
        self.min_background, self.aware = min_background, aware

    def forward(self, features: Tensor, boxes: list[Tensor], image_size: Size,
                background: Tensor | None = None) -> Pooled:
        """features (N, C, h, w); boxes: N tensors (K_i, 4); image_size (H, W)
        of the images as the network saw them, padding included; background
        (N, 1, H, W): 1 where a pixel is known to be background, else 0; by
        default outside every box. Raises ValueError for other shapes.

        A part of a box that lies outside the image or has no area gives a
        foreground of zeros: clip boxes to the image, and drop the empty ones.

        With boxes and background on the CPU, nothing here waits for a GPU.
        With background, torch.compile makes one graph of it. torch.export
        fixes K_i, but not J.
        """
        n = len(features)
        if isinstance(image_size, int):
            raise TypeError(f"image_size is {image_size}, not (H, W)")
        if len(boxes) != n:
            raise ValueError(f"{n} images but boxes of {len(boxes)}")
        check_boxes(boxes)
        if background is None:
            background = outside_boxes(boxes, image_size)
        shape = (n, 1, *image_size)
        if background.shape != shape:
            raise ValueError(
                f"background is {tuple(background.shape)}, not {shape}")
        # 1 - A is small where it matters: float32 at least, in autocast too.
        dtype = torch.promote_types(features.dtype, torch.float32)
        with torch.autocast(features.device.type, enabled=False):
            return self.pool(features.to(dtype), boxes, background.to(dtype))

    def pool(self, features, boxes, background):
        (h, w), (height, width) = features.shape[2:], background.shape[2:]
        f = features.flatten(2)  # (N, C, hw)

        # M of a feature cell: the mean over its area.
        rows = coverage(divide(0, height, height, background), height, h)
        columns = coverage(divide(0, width, width, background), width, w)
        m = (rows.T @ background @ columns).flatten(2)  # (N, 1, hw)

        # q_j: a feature cell counts with its area of background in j.
        rows = length_inside(divide(0, h, self.grid, m), divide(0, h, h, m))
        columns = length_inside(divide(0, w, self.grid, m), divide(0, w, w, m))
        area = torch.einsum("ay,bx->abyx", rows, columns)
        area = area.reshape(1, -1, h * w) * m  # (N, grid * grid, hw)
        total = area.sum(2)
        valid = total > LEAST_QUERY
        area = area / total.where(valid, 1)[:, :, None]
        average = background.mean((1, 2, 3)) <= self.min_background
        average = average | ~valid.any(1) | (not self.aware)
        held = valid.flatten().nonzero()[:, 0]
        m, area, valid, average, held = (
            upload(t, f.device) for t in (m, area, valid, average, held))
        q = area @ f.mT  # (N, grid * grid, C)

        # A: f is divided by its norm last, so that no unit copy of it is made.
        cosine = F.relu(F.normalize(q, dim=2) @ f)
        cosine = cosine / f.norm(dim=1, keepdim=True).clamp(min=1e-12)
        over_j = (valid & ~average[:, None]).to(f.dtype)
        over_j = over_j / valid.sum(1, keepdim=True).clamp(min=1)
        attention = m + (1 - m) * (over_j[:, None] @ cosine)
        attention = attention.clamp(max=1)  # (N, 1, hw)

        # r: a product of areas (parts, hw) and f (hw, C) for each image.
        keep = torch.where(average[:, None, None], 1, 1 - attention)
        padded = nn.utils.rnn.pad_sequence(
            [found.to(f.dtype) for found in boxes], batch_first=True)
        x0, y0, x1, y1 = padded.split(1, 2)
        rows = coverage(divide(y0, y1, self.bins, y0), height, h)
        columns = coverage(divide(x0, x1, self.bins, x0), width, w)
        rows, columns = upload(rows, f.device), upload(columns, f.device)
        area = torch.einsum("nkay,nkbx->nkabyx", rows, columns)
        area = area.flatten(4).flatten(1, 3)  # (N, K bins bins, hw)
        kept, total = area * keep, area.sum(2, keepdim=True)
        blank = kept.sum(2, keepdim=True) <= 1e-4 * total
        area = torch.where(blank, area, kept)
        area = area / area.sum(2, keepdim=True).clamp(min=1e-12)
        r = (area @ f.mT).unflatten(1, (padded.shape[1], self.bins ** 2))
        r = torch.cat([image[:len(b)] for image, b in zip(r, boxes)])
        return Pooled(r, q.flatten(0, 1)[held], attention.view(-1, 1, h, w))


# ---- features at the size of the image ----

def interpolation(pixels, cells, like):
    """Bilinear upsampling (align_corners) along an axis: (pixels, cells)."""
    step = (cells - 1) / max(pixels - 1, 1)
    distance = (numbers(pixels, like) * step)[:, None] - numbers(cells, like)
    return (1 - distance.abs()).clamp(min=0)


class Upsampled:
    """A feature map (C, h, w) as if upsampled bilinearly to its image's size,
    at the cost of one channel. It is exact: upsampling commutes with a dot
    product, and the squared norm is a quadratic form of a pixel's four cells.
    It computes in float32 at least; under autocast it would not.

    size (H, W): the pixels asked for. canvas: what the map spans, if the image
    was padded at its right and bottom (`padded_size`); by default, size.
    """

    def __init__(self, features: Tensor, size: Size, canvas: Size = ()):
        # Coordinates and sums over an image are too large for half precision.
        dtype = torch.promote_types(features.dtype, torch.float32)
        features = features.to(dtype)
        # (h, w, C): of a map in channels_last this is no copy.
        self.features = features.permute(1, 2, 0).contiguous()
        (h, w, _), (height, width) = self.features.shape, canvas or size
        self.rows = interpolation(height, h, features)[:size[0]]
        self.columns = interpolation(width, w, features)[:size[1]]

    def dot(self, vectors: Tensor) -> Tensor:
        """Each pixel's dot product with vectors (K, C): (K, H, W)."""
        vectors = vectors.to(self.features.dtype)
        maps = vectors @ self.features.flatten(0, 1).T
        maps = maps.view(-1, *self.features.shape[:2])
        return self.rows @ maps @ self.columns.T

    @cached_property
    def norm(self) -> Tensor:
        """The norm (H, W) of each pixel's feature, sum_i a_i f_i over its four
        cells i, with bilinear weights a_i. The squared norm is
        sum_i a_i^2 <f_i, f_i> + sum_{i<j} 2 a_i a_j <f_i, f_j>.
        """
        f, y, x = self.features, self.rows, self.columns
        y_pair, x_pair = 2 * y[:, :-1] * y[:, 1:], 2 * x[:, :-1] * x[:, 1:]
        itself = (f * f).sum(2)
        right = (f[:, :-1] * f[:, 1:]).sum(2)
        down = (f[:-1] * f[1:]).sum(2)
        diagonals = f[:-1, :-1] * f[1:, 1:] + f[:-1, 1:] * f[1:, :-1]
        # Halved, since y_pair and x_pair each hold the 2 of 2 a_i a_j.
        diagonals = diagonals.sum(2) / 2
        squared = (y * y) @ itself @ (x * x).T + (y * y) @ right @ x_pair.T
        squared = squared + y_pair @ down @ (x * x).T
        squared = squared + y_pair @ diagonals @ x_pair.T
        return squared.clamp(min=0).sqrt()

    def cosine(self, vectors: Tensor) -> Tensor:
        """Each pixel's cosine with vectors (K, C): (K, H, W) in [-1, 1]; 0
        where a norm is 0.
        """
        dot = self.dot(F.normalize(vectors, dim=1))
        return dot / self.norm.clamp(min=1e-12)

    def mean(self, masks: Tensor) -> Tensor:
        """The mean over masks (K, H, W) of 0 and 1: (K, C); 0 over none. Masks
        of weights in [0, 1] give the weighted mean, if they sum to 1 or more.
        """
        masks = masks.to(self.features.dtype)
        cells = (self.rows.T @ masks @ self.columns).flatten(1)
        count = masks.sum((1, 2))[:, None].clamp(min=1)
        return cells @ self.features.flatten(0, 1) / count


def padded_size(size: Size) -> tuple[int, ...]:
    """The least size >= (H, W) of sides 8 k + 1: cell j lies on pixel 8 j."""
    # Not 1 - (1 - side) // STRIDE * STRIDE: below 0, ONNX does not floor.
    return tuple((side + STRIDE - 2) // STRIDE * STRIDE + 1 for side in size)


# ---- backbones ----

BACKBONES = ("vgg16", "vgg16_bn", "resnet50", "resnet101", "resnet152",
             "resnet50_caffe", "resnet101_caffe", "resnet152_caffe")
IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
CAFFE = dict(mean=(122.675 / 255, 116.669 / 255, 104.008 / 255),
             std=(1 / 255,) * 3)
# The authors' start of both stages, VGG-16 with fc6 and fc7 cut (vgg16_20M),
# and the hash of its git blob.
CAFFE_URL = (
    "https://raw.githubusercontent.com/cvlab-yonsei/BANA/"
    "345cf9402dec878264a6bd0a5a00cdc24931553f/weights/vgg_caffe.pth")
CAFFE_BLOB = "7a933a082bdab72e8af949a837fc6abde17a9ea6"


def build_backbone(
        name: str, weights: PathLike = "none", dilation: int = 1,
        width: float = 1.0, dropout: float = 0.5) -> tuple[Any, dict, set]:
    """The arguments are those of `Network`; dilation is fc6's. To add a
    backbone, add its name to BACKBONES and a branch. Returns

    module: maps images of sides 8 k + 1, normalised by mean and std, to
        features (N, channels, h, w), or to a list that holds only these.
        Cell j lies on pixel 8 j. `channels` is an attribute.
    colours: mean and std, of RGB in [0, 1].
    loaded: the names in the module's state dict that are pretrained.
    """
    source, in_timm = str(weights), name.startswith("timm/")
    if name not in BACKBONES and not in_timm:
        raise WeightsError(f"backbone: {name!r} is none of "
                           f"{', '.join(BACKBONES)}, timm/NAME")
    if width != 1 and not name.startswith("vgg16"):
        raise WeightsError(f"width: {width} is for vgg16 and vgg16_bn, not "
                           f"{name}")
    caffe = name.endswith("_caffe")
    if (source == "caffe" and name != "vgg16"
            or source == "imagenet" and caffe):
        raise WeightsError(f"weights: {source} does not exist for {name}; "
                           "use a file or none")
    state: State = {}
    if source == "imagenet" and not in_timm:
        state = state_of(imagenet_weights(name), source)
    elif source not in ("none", "imagenet"):
        source = caffe_file() if source == "caffe" else source
        state = state_of(read_file(source), source)

    if {"mean", "std"} <= state.keys():  # of a Network
        module, *_ = build_backbone(name, "none", dilation, width, dropout)
        own = {key.removeprefix("backbone."): value
               for key, value in state.items() if key.startswith("backbone.")}
        return module, state, copy_state(module, own, source)
    if in_timm:
        return timm_backbone(name.removeprefix("timm/"), source, state)
    if name.startswith("resnet"):
        module = resnet(name)
    else:
        module = VGG16(dilation, width, name == "vgg16_bn", dropout)
    if not state:
        return module, CAFFE if caffe else IMAGENET, set()
    own = {key: value for key, value in state.items()
           if not key.startswith(("fc.", "classifier."))}
    return module, IMAGENET, copy_state(module, own, source)


class VGG16(nn.Module):
    """VGG-16 as LargeFOV has it: 3x3 pools, the last two of stride 1, conv5
    dilated by 2, a 3x3 average pool, fc6 a dilated 3x3 and fc7 a 1x1
    convolution of 1,024 channels. `features` is named as in torchvision.
    """

    def __init__(self, dilation=1, width=1.0, batch_norm=False, dropout=0.5):
        super().__init__()
        layers, inputs = [], 3
        for block, (channels, depth) in enumerate(
                ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)), 1):
            outputs, rate = round(channels * width), 2 if block == 5 else 1
            for _ in range(depth):
                layers.append(nn.Conv2d(inputs, outputs, 3, 1, rate, rate))
                layers += [nn.BatchNorm2d(outputs)] * batch_norm
                layers.append(nn.ReLU(inplace=True))
                inputs = outputs
            layers.append(nn.MaxPool2d(3, 2 if block < 4 else 1, 1))
        self.features = nn.Sequential(*layers, nn.AvgPool2d(3, 1, 1))
        self.channels = round(1024 * width)
        self.fc6 = nn.Conv2d(inputs, self.channels, 3, 1, dilation, dilation)
        self.fc7 = nn.Conv2d(self.channels, self.channels, 1)
        self.dropout = nn.Dropout2d(dropout)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, nonlinearity="relu")
                nn.init.zeros_(m.bias)

    def forward(self, x):
        x = self.dropout(F.relu(self.fc6(self.features(x))))
        return self.dropout(F.relu(self.fc7(x)))


def resnet(name: str) -> nn.Sequential:
    """torchvision's ResNet at stride 8. Convolutions behind a stride that is
    taken out are dilated, so that the cells of stride 32 keep their values.
    A stage's first block has the stride in its 3x3 convolution; in NAME_caffe,
    the original network, it is in the 1x1 convolution before that.
    """
    net = get_model(
        name.removesuffix("_caffe"), weights=None,
        replace_stride_with_dilation=(False, True, True))
    layers = OrderedDict(list(net.named_children())[:-2])  # no avgpool, no fc
    body = nn.Sequential(layers)
    if name.endswith("_caffe"):
        for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
            first, second, *_ = stage
            first.conv1.stride, first.conv2.stride = first.conv2.stride, (1, 1)
            rate = second.conv2.dilation
            first.conv2.dilation = first.conv2.padding = rate
        for m in net.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.momentum = 0.001  # Caffe calls it 0.999
        # Under other names, so that neither takes the other's weights.
        body = nn.Sequential(OrderedDict(caffe=body))
    body.channels = net.fc.in_features
    return body


class DilatedGroups(nn.Conv2d):
    """A dilated grouped convolution. On a CPU it stays in float32 under
    autocast: in bfloat16 and channels_last, oneDNN (3.12 and 3.13, of torch
    2.14 and 2.15) adds uninitialised memory to the gradient of its weights.
    In evaluation on a CPU, padding by more than 4 cells is done by F.pad,
    since oneDNN's own is slow.
    """

    def forward(self, x):
        if x.device.type != "cpu":
            return super().forward(x)
        if torch.is_autocast_enabled("cpu"):
            x = x.float()
        with torch.autocast("cpu", enabled=False):
            if (self.training or self.padding_mode != "zeros"
                    or isinstance(self.padding, str)
                    or max(self.padding) <= 4):
                return super().forward(x)
            rows, columns = self.padding
            x = F.pad(x, (columns, columns, rows, rows))
            return F.conv2d(x, self.weight, self.bias, self.stride, 0,
                            self.dilation, self.groups)


def timm_backbone(name, source, state):
    settings = dict(features_only=True, output_stride=STRIDE,
                    out_indices=(-1,), pretrained=source != "none")
    try:
        import timm
        if state:  # timm would skip what does not fit
            with torch.device("meta"):
                names = timm.create_model(name).state_dict().keys()
            if names != state.keys():
                raise ValueError(f"{source}: weights of another network")
            settings["pretrained_cfg_overlay"] = dict(file=source)
        module = timm.create_model(name, **settings)
    except ImportError:
        raise WeightsError(
            f"backbone timm/{name} needs timm: pip install timm") from None
    except (RuntimeError, ValueError, TypeError, LookupError, OSError,
            AssertionError) as error:
        if getattr(error, "errno", None):
            raise  # a fault of the machine; being offline sets no errno
        words = " ".join(str(error).split())
        if not words or "output_stride" in words:
            words = (f"timm cannot make it with output_stride={STRIDE}; "
                     "choose another")
        raise WeightsError(f"backbone timm/{name}: {words}") from None
    with torch.no_grad():
        cells = module.eval()(torch.zeros(1, 3, 65, 65))[0].shape[2:]
    pools = [m.kernel_size for m in module.modules()
             if isinstance(m, nn.AvgPool2d)]
    # ConvNeXt's patches lie side by side; ResNet-D averages 2 x 2 cells.
    if cells != (9, 9) or 2 in pools or (2, 2) in pools:
        raise WeightsError(f"backbone timm/{name}: its cells do not lie on "
                           "every eighth pixel; choose another")
    module.train().channels = module.feature_info.channels()[-1]
    made = timm.get_pretrained_cfg(name)
    loaded = set(module.state_dict()) if source != "none" else set()
    return module, dict(mean=made.mean, std=made.std), loaded


# ---- files of weights ----

# What torch.load raises for a file that is broken or holds something else.
BROKEN = (RuntimeError, ValueError, LookupError, TypeError, AttributeError,
          AssertionError, ArithmeticError, EOFError, pickle.UnpicklingError,
          struct.error)
DOWNLOAD_FAULTS = (
    URLError, ConnectionError, TimeoutError, http.client.HTTPException)


def imagenet_weights(name: str) -> State:
    """torchvision's, which it keeps in torch.hub's folder."""
    entry = get_model_weights(name)["IMAGENET1K_V1"]
    try:
        return entry.get_state_dict(progress=True, check_hash=True)
    except DOWNLOAD_FAULTS as error:
        raise WeightsError(f"{entry.url}: cannot be downloaded ({error}); "
                           "set weights to a file") from None


def caffe_file() -> str:
    """The authors' start in torch.hub's folder: downloaded once, and checked
    each time by the hash of its git blob.
    """
    path = Path(torch.hub.get_dir(), "checkpoints", "vgg_caffe.pth")
    path.parent.mkdir(parents=True, exist_ok=True)
    way_out = f"put {CAFFE_URL} there by hand, or set weights to a file"
    missing = not path.exists()
    try:
        if missing:
            torch.hub.download_url_to_file(CAFFE_URL, str(path))
    except DOWNLOAD_FAULTS as error:
        raise WeightsError(
            f"{path}: cannot be downloaded ({error}); {way_out}") from None
    if git_blob(path) != CAFFE_BLOB:
        if missing:
            path.unlink()
        raise WeightsError(f"{path}: not the authors' file, or a download "
                           f"that was cut or changed; {way_out}")
    return str(path)


def git_blob(path: Path) -> str:
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


READ: dict[str, str] = {}  # file -> SHA-256 of what read_file last read there


def read_file(source: PathLike) -> Any:
    """What torch.save wrote. A fault of the machine is Python's own error."""
    try:
        content = Path(source).read_bytes()
    except (FileNotFoundError, IsADirectoryError):
        raise WeightsError(f"{source}: no such file; name another; to train, "
                           "imagenet, caffe or none will do, too") from None
    READ[os.path.abspath(source)] = hashlib.sha256(content).hexdigest()
    try:
        return torch.load(
            io.BytesIO(content), map_location="cpu", weights_only=True)
    except BROKEN as error:
        if "can't allocate memory" in str(error):
            raise
        raise WeightsError(f"{source}: not a file of weights that torch.load "
                           "can read safely") from None


def state_of(content: Any, source: PathLike) -> State:
    """The state dict that a file's content is, or in cls.pt and seg.pt holds.
    Caffe's names become those of `Network`, and VGG-16's fc6 and fc7 are cut
    (cut_vgg16). WeightsError if it is none, or holds NaN or infinity.
    """
    try:
        state = content.get("model", content)
        if not state:
            raise LookupError
        for name, value in state.items():
            if not value.isfinite().all():
                kind = "NaN" if value.isnan().any() else "infinity"
                raise WeightsError(f"{source}: holds {kind} in {name}")
        return cut_vgg16(from_caffe(state))
    except (AttributeError, TypeError, RuntimeError, LookupError):
        raise WeightsError(f"{source}: not a state dict (names to tensors), "
                           "or not of the shapes of its names") from None


def copy_state(module: nn.Module, state: State, source: Any) -> set[str]:
    """Copies a state dict into a module; the state may lack fc6 and fc7.
    Returns its names; WeightsError if names or shapes do not fit.
    """
    try:
        missing, unknown = module.load_state_dict(state, strict=False)
        fits = not unknown and all(
            name.startswith(("fc6.", "fc7.")) for name in missing)
    except RuntimeError:  # of other shapes
        fits = False
    if not fits:
        raise WeightsError(f"{source}: weights of another network; set "
                           "weights or backbone")
    return set(state)


def cut_vgg16(state: State, fc6="classifier.0", fc7="classifier.3") -> State:
    """Keeps what LargeFOV has of VGG-16's fc6 and fc7: every fourth channel,
    and rows and columns 0, 3, 6 of fc6's kernels.
    """
    if len(state.get(f"{fc6}.bias", ())) != 4096:
        return state
    weight6 = state[f"{fc6}.weight"].view(4096, 512, 7, 7)
    weight7 = state[f"{fc7}.weight"].view(4096, 4096, 1, 1)
    return state | {"fc6.weight": weight6[::4, :, ::3, ::3],
                    "fc6.bias": state[f"{fc6}.bias"][::4],
                    "fc7.weight": weight7[::4, ::4],
                    "fc7.bias": state[f"{fc7}.bias"][::4]}


# Layers of kazuto1011's ResNet, such as layer2.block1.reduce.conv, and here.
CAFFE_LAYERS = {
    "layer1.conv1.conv": "caffe.conv1", "layer1.conv1.bn": "caffe.bn1",
    "reduce.conv": "conv1", "reduce.bn": "bn1", "conv3x3.conv": "conv2",
    "conv3x3.bn": "bn2", "increase.conv": "conv3", "increase.bn": "bn3",
    "shortcut.conv": "downsample.0", "shortcut.bn": "downsample.1"}


def caffe_name(name: str) -> str:
    """conv1_2.bias -> features.2.bias in VGG-16; likewise in a ResNet."""
    if m := re.fullmatch(r"conv(\d)_(\d)\.(.+)", name):
        first = (0, 5, 10, 17, 24)[int(m[1]) - 1]  # of this block
        return f"features.{first + 2 * int(m[2]) - 2}.{m[3]}"
    for theirs, ours in CAFFE_LAYERS.items():
        name = name.replace(theirs, ours)
    if m := re.fullmatch(r"layer(\d)\.block(\d+)\.(.+)", name):
        return f"caffe.layer{int(m[1]) - 1}.{int(m[2]) - 1}.{m[3]}"
    return name


def from_caffe(state: State) -> State:
    """A network in the names of Caffe's converted files, for BGR, as one of
    `Network`, for RGB, without Caffe's own classifiers. Another state dict is
    returned as it is.
    """
    first = re.search(  # there may be a prefix: backbone., base., scale.
        r"^(.*)(conv1_1|layer1\.conv1\.conv)\.weight$", "\n".join(state), re.M)
    if not first:
        return state
    state = state | {first[0]: state[first[0]].flip(1)}
    backbone, renamed = {}, {}
    for name, value in state.items():
        layer = name.removeprefix(first[1])
        if name == "classifier.weight":
            renamed[name] = value.flatten(1)
        elif layer.startswith("aspp.c"):
            renamed[layer.replace("aspp.c", "head.branches.")] = value
        elif not layer.startswith(("fc.", "fc8")):
            backbone[caffe_name(layer)] = value
    for name, value in cut_vgg16(backbone, "fc6", "fc7").items():
        renamed[f"backbone.{name}"] = value
    for name, colour in CAFFE.items():
        renamed[name] = torch.tensor(colour).view(3, 1, 1)
    return renamed


# ---- networks ----

class ASPP(nn.Module):
    """DeepLab-V2's head: 3x3 convolutions of four rates, summed, and ReLU."""
    channels = 256

    def __init__(self, inputs):
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Conv2d(inputs, 256, 3, 1, rate, rate, bias=False)
            for rate in (6, 12, 18, 24))

    def forward(self, x):
        return F.relu(sum(branch(x) for branch in self.branches))


class Head(nn.Sequential):
    """BoxClassifier's head, except with VGG-16: 3x3 convolution and ReLU."""
    channels = 512

    def __init__(self, inputs):
        super().__init__(nn.Conv2d(inputs, 512, 3, 1, 1), nn.ReLU(True))


class Network(nn.Module):
    """What the classifier and the segmenter share: images -> features.

    backbone: one of BACKBONES, or timm/NAME.
    weights: imagenet (torchvision's, timm's), caffe (the authors', for vgg16),
        none, or a file: of such weights, or of a whole network (cls.pt,
        seg.pt or the authors'), whose backbone alone is taken.
    width: a factor on the channels of vgg16.
    dropout: of the channels of vgg16's fc6 and fc7.

    Pretrained batch normalisation keeps its statistics, since batches of crops
    are too small for new ones; its scale and shift are trained. freeze_norm =
    False trains it whole.
    """
    fc6_dilation = 12  # in VGG-16
    make_head: Any = ASPP  # for the other backbones
    mean: Tensor  # (3, 1, 1) of the colours, RGB in [0, 1]
    std: Tensor
    classes: list[str]  # of a network that comes from `load`
    chosen = ""  # on what images the best of a training was chosen, if so
    trained_with: dict = {}  # section.key -> value, where its file says so

    def __init__(self, num_labels: int, backbone: str = "vgg16",
                 weights: PathLike = "none", width: float = 1.0,
                 dropout: float = 0.5):
        super().__init__()
        self.backbone, colours, loaded = build_backbone(
            backbone, weights, self.fc6_dilation, width, dropout)
        for m in self.backbone.modules():
            grouped = type(m) is nn.Conv2d and m.groups > 1
            if grouped and m.dilation != (1, 1):
                m.__class__ = DilatedGroups
        self.loaded = {f"backbone.{name}" for name in loaded}
        self.freeze_norm = bool(loaded)
        self.head, last = nn.Identity(), self.backbone
        if not isinstance(self.backbone, VGG16):
            self.head = last = self.make_head(self.backbone.channels)
        self.classifier = nn.Linear(last.channels, num_labels, bias=False)
        for m in (*self.head.modules(), self.classifier):
            if isinstance(m, nn.Conv2d | nn.Linear):
                nn.init.normal_(m.weight, std=0.01)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)
        for name in ("mean", "std"):
            colour = torch.as_tensor(colours[name], dtype=torch.float32)
            self.register_buffer(name, colour.view(3, 1, 1))
        self.train()  # which keeps the statistics from the first batch on

    @property
    def fill(self) -> list[int]:
        """The mean colour, 0..255: images are padded with it."""
        return [round(255 * v) for v in self.mean.flatten().tolist()]

    def keep_classes(self, classes: Sequence[str]) -> None:
        """From now on labels 1, 2, ... are these of its classes."""
        rows = [0, *(1 + self.classes.index(name) for name in classes)]
        weight = self.classifier.weight.detach()[rows]
        self.classifier.weight = nn.Parameter(weight)
        self.classes = list(classes)

    def train(self, mode=True):
        super().train(mode)
        for m in self.modules():
            if self.freeze_norm and isinstance(m, nn.BatchNorm2d):
                m.eval()
        return self

    def features(self, images: Tensor) -> Tensor:
        """RGB images (N, 3, H, W), uint8 or float in [0, 1] -> features
        (N, C, h, w). Pads the images itself, at the right and the bottom, to
        `padded_size` with the mean colour.
        """
        if not images.is_floating_point():
            images = images.to(self.mean.dtype) / 255
        height, width = padded_size(images.shape[2:])
        right, bottom = width - images.shape[3], height - images.shape[2]
        x = F.pad((images - self.mean) / self.std, (0, right, 0, bottom))
        x = self.backbone(x)
        return self.head(x[0] if isinstance(x, list) else x)

    def parameter_groups(
            self, lr: float, decay: float, new_lr: float = 10.0,
            double_bias: bool = False) -> list[dict]:
        """For an optimizer. What is not pretrained learns at new_lr x lr. With
        double_bias, as in Caffe, biases learn twice as fast and do not decay.
        """
        groups: dict = {}
        for name, parameter in self.named_parameters():
            bias = double_bias and name.endswith(".bias")
            rate = lr * (1 if name in self.loaded else new_lr)
            key = rate * (2 if bias else 1), 0.0 if bias else decay
            groups.setdefault(key, []).append(parameter)
        return [dict(params=params, lr=rate, weight_decay=decay)
                for (rate, decay), params in groups.items()]


class Logits(NamedTuple):
    foreground: Tensor  # (sum K_i, bins * bins, 1 + num_classes): of r
    queries: Tensor  # (J, 1 + num_classes): of q


class BoxClassifier(Network):
    """Stage 1: a softmax classifier without bias over background, 0, and
    objects, 1, 2, ..., of what `pooling` draws from the features.
    """
    fc6_dilation, make_head = 1, Head

    def __init__(self, num_classes: int, backbone: str = "vgg16",
                 weights: PathLike = "none", width: float = 1.0,
                 dropout: float = 0.5, pooling: BAP | None = None):
        super().__init__(1 + num_classes, backbone, weights, width, dropout)
        self.pooling = pooling or BAP()

    def forward(self, images: Tensor, boxes: list[Tensor],
                background: Tensor | None = None) -> Logits:
        """images (N, 3, H, W) of sides 8 k + 1; the others as for BAP."""
        size = images.shape[2:]
        if padded_size(size) != tuple(size):
            raise ValueError(f"crops of {tuple(size)}: each side must be "
                             "8 k + 1, such as 321")
        pooled = self.pooling(self.features(images), boxes, size, background)
        return Logits(self.classifier(pooled.foreground),
                      self.classifier(pooled.queries))


class DeepLab(Network):
    """Stage 3: DeepLab-V1 (LargeFOV) with vgg16, DeepLab-V2 (ASPP) with other
    backbones, and a cosine classifier.
    """

    def forward(self, images: Tensor) -> Tensor:
        """images (N, 3, H, W) -> cos(phi(p), W_c): (N, L, H, W)."""
        (height, width), size = images.shape[2:], padded_size(images.shape[2:])
        # eps: after a ReLU phi may be 0, and half precision rounds 1e-12 to 0.
        phi = F.normalize(self.features(images), dim=1, eps=1e-6)
        rows = F.normalize(self.classifier.weight, dim=1)[:, :, None, None]
        cosine = F.interpolate(
            F.conv2d(phi, rows).float(), size, mode="bilinear",
            align_corners=True)
        if not torch.compiler.is_compiling():
            return cosine[:, :, :height, :width]
        # A slice would be exported for padded or for unpadded images alone.
        return F.pad(cosine, (0, width - size[1], 0, height - size[0]))


def load(path: PathLike) -> BoxClassifier | DeepLab:
    """The network in a checkpoint, cls.pt or seg.pt, in evaluation mode. Its
    `classes` are the names of labels 1, 2, ...; 0 is the background.
    """
    return network_of(read_file(path), path)


def network_of(content: Any, path: PathLike) -> BoxClassifier | DeepLab:
    """As load, of what read_file returned."""
    try:
        made, classes = content["network"], content["classes"]
        kind = dict(BoxClassifier=BoxClassifier, DeepLab=DeepLab)[made["kind"]]
        named = all(isinstance(name, str) for name in classes)
        if not isinstance(classes, list) or not named:
            raise TypeError
        if not 0.01 <= made["width"] <= 10:
            raise ValueError
        labels = len(classes) + (kind is DeepLab)
        network = kind(labels, made["backbone"], width=made["width"])
        network.trained_with = dict(content.get("settings", {}))
    except WeightsError as fault:
        raise WeightsError(f"{path}: {fault}") from None
    except (LookupError, TypeError, AttributeError, ValueError):
        raise WeightsError(f"{path}: not a cls.pt or seg.pt") from None
    # Only training pools; the parameters of another pooling are not needed.
    state = {name: value for name, value in state_of(content, path).items()
             if not name.startswith("pooling.")}
    network.loaded = copy_state(network, state, path)
    network.freeze_norm = True  # as of all that is pretrained
    network.classes = classes
    network.chosen = content.get("chosen", "")
    return network.eval()
