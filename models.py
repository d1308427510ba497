"""Background-aware pooling (section 3.1 of the paper), the box classifier that learns with it, the feature
maps its pseudo labels are read from (3.2), and the DeepLab segmenters (3.3).

One file to copy: it needs torch and torchvision alone (and timm for `timm/NAME` backbones).

Geometry, everywhere: a box is x0, y0, x1, y1 in continuous pixel coordinates, x1 and y1 exclusive, so that
pixel i reaches from i to i + 1. Feature cell j of w lies where the convolutions put it, on pixel
j (W - 1) / (w - 1) of W (align_corners); it reaches half a step to each side, cut at the image's edge.
"""
import hashlib
import http.client
import io
import math
import os
import pickle
import re
import struct
import tempfile
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.error import URLError

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

State = dict[str, Tensor]  # a state dict
STRIDE = 8  # pixels from one feature cell to the next, for every backbone here
LEAST_QUERY = 1e-5  # feature cells of background that make a query: less is the rounding of an edge


class WeightsError(ValueError):
    """A backbone or its weights cannot be had; the message is one line."""


# ---------------------------------------------------------------- background-aware pooling


def coverage(intervals: Tensor, length: int, cells: int) -> Tensor:
    """Which part of each feature cell an interval covers, along one axis.

    intervals (..., 2): start and end in pixels. An axis of `length` pixels is held by `cells` feature cells.
    Returns (..., cells) in [0, 1].
    """
    step = (length - 1) / (cells - 1) if cells > 1 else 2 * length  # one cell reaches over all of it
    centres = torch.arange(cells, device=intervals.device, dtype=intervals.dtype) * step + 0.5
    start, end = (centres - step / 2).clamp(min=0), (centres + step / 2).clamp(max=length)
    shared = torch.minimum(intervals[..., 1:], end) - torch.maximum(intervals[..., :1], start)
    return shared.clamp(min=0) / (end - start)


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """To the device, without waiting for it: a copy of memory that is not pinned may wait for the work before it."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def map_parts(cells: int, parts: int, like: Tensor) -> Tensor:
    """Which part of each feature cell lies in each of the equal parts of the map, along one axis: (parts, cells).

    Counted in cells, so each part holds cells / parts of them; a cell across an edge lies in its two parts.
    """
    edges = torch.arange(parts + 1, device=like.device, dtype=like.dtype) * cells / parts
    low = torch.arange(cells, device=like.device, dtype=like.dtype)
    shared = torch.minimum(edges[1:, None], low + 1) - torch.maximum(edges[:-1, None], low)
    return shared.clamp(min=0)


def split(low: Tensor, high: Tensor, parts: int) -> Tensor:
    """Cut intervals [low, high], each (...), into equal parts: (..., parts, 2)."""
    edges = torch.arange(parts + 1, device=low.device, dtype=low.dtype)
    edges = low[..., None] + (high - low)[..., None] * edges / parts
    return torch.stack((edges[..., :-1], edges[..., 1:]), -1)


def outside_boxes(boxes: list[Tensor], image_size: Sequence[int]) -> Tensor:
    """The mask M of the paper: 1 on every pixel that no box touches. N tensors (K_i, 4) -> (N, 1, H, W) float."""
    background = torch.ones(len(boxes), 1, *image_size)
    for mask, image_boxes in zip(background, boxes):
        for x0, y0, x1, y1 in image_boxes.tolist():
            mask[:, max(math.floor(y0), 0):max(math.ceil(y1), 0), max(math.floor(x0), 0):max(math.ceil(x1), 0)] = 0
    return background


class Pooled(NamedTuple):
    foreground: torch.Tensor  # (sum K_i, bins * bins, C): r, image by image in the order given, bins row by row
    queries: torch.Tensor     # (J, C): q of the grid cells that hold background, image by image, row by row
    attention: torch.Tensor   # (N, 1, h, w) in [0, 1]: A, 1 outside boxes


class BAP(nn.Module):
    """Background-aware pooling: mean features of boxes that leave out the background inside them.

        q_j  = sum_{p in grid cell j} M(p) f(p) / sum_{p in grid cell j} M(p)
        A(p) = 1 outside boxes, inside them the mean over j of ReLU(cos(f(p), q_j))
        r_i  = sum_{p in box i} (1 - A(p)) f(p) / sum_{p in box i} (1 - A(p))

    p runs over feature cells. A cell that the background or a box covers in part counts in that part.
    The grid divides the feature map into grid x grid equal parts. Any background in one makes it a query.
    Each box gives bins x bins such r, one for each of its equal parts.
    An image with no more than the share min_background of background, or none, is pooled plainly: A = 0 in
    r_i. aware=False pools every image so: average pooling, the paper's GAP.
    A part that A takes for background all through (to 1 in 10,000; then r_i is 0/0) is pooled plainly, too.

    forward(features (N, C, h, w), boxes: N float tensors (K_i, 4), image_size (H, W), background (N, 1, H, W),
    1 where a pixel is known background, default: outside every box) -> Pooled.
    Boxes and background may stay on the CPU: then nothing here waits for the GPU.
    Given background, torch.compile makes one graph of it. torch.export fixes the numbers of boxes, K_i, and leaves
    J free.
    """

    def __init__(self, grid: int = 4, bins: int = 2, min_background: float = 0.125, aware: bool = True):
        super().__init__()
        self.grid, self.bins = grid, bins
        self.min_background, self.aware = min_background, aware

    def extra_repr(self):
        return (f"grid={self.grid}, bins={self.bins}, min_background={self.min_background}, "
                f"aware={self.aware}")

    def forward(self, features: Tensor, boxes: list[Tensor], image_size: Sequence[int],
                background: Tensor | None = None) -> Pooled:
        if len(boxes) != len(features):
            raise ValueError(f"{len(features)} images but boxes of {len(boxes)}")
        # 1 - A is small where it matters: at least float32, also under autocast.
        dtype = torch.promote_types(features.dtype, torch.float32)
        with torch.autocast(features.device.type, enabled=False):
            return self.pool(features.to(dtype), boxes, image_size, background)

    def pool(self, features: Tensor, boxes: list[Tensor], image_size: Sequence[int],
             background: Tensor | None) -> Pooled:
        (n, _, h, w), (height, width) = features.shape, image_size
        if background is None:
            background = outside_boxes(boxes, image_size)
        elif background.shape != (n, 1, height, width):
            raise ValueError(f"background is {tuple(background.shape)}, not {(n, 1, height, width)}")
        background = background.to(features.dtype)
        geometry: dict = dict(dtype=features.dtype, device=background.device)
        f = features.flatten(2)  # (N, C, hw)

        # M of a feature cell: the mean over its area.
        pixels_y = torch.arange(height, **geometry)
        pixels_x = torch.arange(width, **geometry)
        rows = coverage(torch.stack((pixels_y, pixels_y + 1), -1), height, h)
        columns = coverage(torch.stack((pixels_x, pixels_x + 1), -1), width, w)
        m = (rows.T @ background @ columns).flatten(2)  # (N, 1, hw)

        # q: one weighted mean for each grid cell.
        rows, columns = map_parts(h, self.grid, background), map_parts(w, self.grid, background)
        weights = torch.einsum("ay,bx->abyx", rows, columns).reshape(1, -1, h * w) * m  # (N, grid * grid, hw)
        held = weights.sum(2)
        valid = held > LEAST_QUERY
        plain = (background.mean((1, 2, 3)) <= self.min_background) | ~valid.any(1)
        plain = plain | (not self.aware)
        kept = valid.flatten().nonzero()[:, 0]  # known before the GPU is done, if the background is on the CPU
        weights = weights / held.where(valid, 1)[:, :, None]
        m, valid, plain, weights, kept = (upload(t, features.device) for t in (m, valid, plain, weights, kept))
        queries = weights @ f.mT  # (N, grid * grid, C)

        # A: the cosine's norm of f is divided out at the end, so that no unit copy of f is made.
        cosine = F.relu(F.normalize(queries, dim=2) @ f) / f.norm(dim=1, keepdim=True).clamp(min=1e-12)
        share = (valid & ~plain[:, None]).to(f.dtype) / valid.sum(1, keepdim=True).clamp(min=1)
        attention = (m + (1 - m) * (share[:, None] @ cosine)).clamp(max=1)  # (N, 1, hw)
        keep = torch.where(plain[:, None, None], 1, 1 - attention)

        foreground = self.box_means(f, keep, boxes, image_size, (h, w))
        return Pooled(foreground, queries.flatten(0, 1)[kept], attention.view(n, 1, h, w))

    def box_means(self, f: Tensor, keep: Tensor, boxes: list[Tensor], image_size: Sequence[int],
                  map_size: Sequence[int]) -> Tensor:
        """r of every part of every box, as one matrix product an image: weights (parts, hw) times f (hw, C)."""
        counts = [len(b) for b in boxes]
        if not sum(counts):
            return f.new_zeros(0, self.bins ** 2, f.shape[1]) + 0 * f.sum()
        padded = nn.utils.rnn.pad_sequence(boxes, batch_first=True).to(f.dtype)
        x0, y0, x1, y1 = padded.unbind(2)
        rows = upload(coverage(split(y0, y1, self.bins), image_size[0], map_size[0]), f.device)
        columns = upload(coverage(split(x0, x1, self.bins), image_size[1], map_size[1]), f.device)
        weights = torch.einsum("nkay,nkbx->nkabyx", rows, columns).flatten(4).flatten(1, 3)  # (N, K bins bins, hw)
        aware = weights * keep
        blank = aware.sum(2, keepdim=True) <= 1e-4 * weights.sum(2, keepdim=True)
        weights = torch.where(blank, weights, aware)
        weights = weights / weights.sum(2, keepdim=True).clamp(min=1e-12)
        means = (weights @ f.mT).unflatten(1, (-1, self.bins ** 2))
        return torch.cat([image[:count] for image, count in zip(means, counts)])


# ---------------------------------------------------------------- upsampled features, never formed


def interpolation(pixels: int, cells: int, like: Tensor) -> Tensor:
    """Bilinear upsampling (align_corners) along one axis, as a matrix (pixels, cells)."""
    position = torch.arange(pixels, device=like.device, dtype=like.dtype) * ((cells - 1) / max(pixels - 1, 1))
    nodes = torch.arange(cells, device=like.device, dtype=like.dtype)
    return (1 - (position[:, None] - nodes).abs()).clamp(min=0)


class Upsampled:
    """A feature map (C, h, w) as if upsampled bilinearly to an image's size, at the cost of one channel.

    Upsampling is linear: a dot product commutes with it, a mean over pixels is a mean over cells with the
    transposed weights, and the squared norm at a pixel is a quadratic form of its four neighbouring cells.
    Exact, not an approximation.

    size (H, W): the pixels looked at. canvas: the size that the map spans, if the image was padded at its right
    and bottom before it went through the network (`padded_size`); default: size.
    """

    def __init__(self, features: Tensor, size: Sequence[int], canvas: Sequence[int] | None = None):
        # (h, w, C): of a channels_last map, as a network on the fast path gives it, this is no copy.
        self.features = features.permute(1, 2, 0).contiguous()
        self.norms: Tensor | None = None
        rows, columns = canvas or size
        self.rows = interpolation(rows, features.shape[1], features)[:size[0]]        # (H, h)
        self.columns = interpolation(columns, features.shape[2], features)[:size[1]]  # (W, w)

    def dot(self, vectors: Tensor) -> Tensor:
        """Dot product of every pixel's feature with vectors (K, C) -> (K, H, W)."""
        maps = (vectors @ self.features.flatten(0, 1).T).view(-1, *self.features.shape[:2])
        return self.rows @ maps @ self.columns.T

    def norm(self) -> Tensor:
        """Euclidean norm of every pixel's feature -> (H, W).

        With weights a, 1 - a of the upper and lower, b, 1 - b of the left and right cell, the squared norm is
        the sum over the four cells of weight^2 <f, f>, and over their six pairs of 2 weight weight' <f, f'>.
        """
        if self.norms is not None:
            return self.norms
        f, y, x = self.features, self.rows, self.columns
        y_pair, x_pair = 2 * y[:, :-1] * y[:, 1:], 2 * x[:, :-1] * x[:, 1:]
        itself = (f * f).sum(2)
        right = (f[:, :-1] * f[:, 1:]).sum(2)
        down = (f[:-1] * f[1:]).sum(2)
        diagonals = (f[:-1, :-1] * f[1:, 1:] + f[:-1, 1:] * f[1:, :-1]).sum(2) / 2
        squared = (y * y) @ itself @ (x * x).T + (y * y) @ right @ x_pair.T
        squared = squared + y_pair @ down @ (x * x).T + y_pair @ diagonals @ x_pair.T
        self.norms = squared.clamp(min=0).sqrt()
        return self.norms

    def cosine(self, vectors: Tensor) -> Tensor:
        """Cosine of every pixel's feature with vectors (K, C) -> (K, H, W) in [-1, 1], 0 where a norm is 0."""
        return self.dot(F.normalize(vectors, dim=1)) / self.norm().clamp(min=1e-12)

    def mean(self, masks: Tensor) -> Tensor:
        """Mean feature over masks (K, H, W) of 0 and 1 -> (K, C); the zero vector for an empty mask."""
        masks = masks.to(self.features.dtype)
        weights = (self.rows.T @ masks @ self.columns).flatten(1)  # (K, hw): upsampling, transposed
        return weights @ self.features.flatten(0, 1) / masks.sum((1, 2))[:, None].clamp(min=1)


def padded_size(size: Sequence[int]) -> tuple[int, ...]:
    """The least size >= (H, W) at which every feature cell lies on a pixel 8 j: each side 8 k + 1."""
    return tuple(-(-(side - 1) // STRIDE) * STRIDE + 1 for side in size)


# ---------------------------------------------------------------- backbones
# Each maps normalised images to features at stride 8. With it come its colours, mean and std of RGB in [0, 1],
# and the names of the parameters that pretrained weights gave.

IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
CAFFE = dict(mean=(122.675 / 255, 116.669 / 255, 104.008 / 255), std=(1 / 255,) * 3)

# The authors' start of both VGG stages: VGG-16 for ImageNet, its fc6 and fc7 cut to 1,024 channels (vgg16_20M).
CAFFE_URL = ("https://raw.githubusercontent.com/cvlab-yonsei/BANA/"
             "345cf9402dec878264a6bd0a5a00cdc24931553f/weights/vgg_caffe.pth")
CAFFE_BLOB = "7a933a082bdab72e8af949a837fc6abde17a9ea6"  # git's name of its content
# What torch.load makes of bytes that are no weights, or broken ones.
BROKEN = (RuntimeError, ValueError, LookupError, TypeError, AttributeError, AssertionError, ArithmeticError, EOFError,
          pickle.UnpicklingError, struct.error)
NO_NETWORK = (URLError, ConnectionError, TimeoutError, http.client.HTTPException)


class VGG16(nn.Module):
    """VGG-16 as LargeFOV has it: 3x3 pools, pool4 and pool5 of stride 1, conv5 dilated by 2, a 3x3 average
    pool, fc6 a dilated 3x3 and fc7 a 1x1 convolution of 1,024 channels. features.* is named as in torchvision.
    """

    def __init__(self, dilation: int = 1, width: float = 1.0, batch_norm: bool = False, dropout: float = 0.5):
        super().__init__()
        layers: list[nn.Module] = []
        previous = 3
        for block, (channels, convolutions) in enumerate(((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)), 1):
            for _ in range(convolutions):
                d = 2 if block == 5 else 1
                layers.append(nn.Conv2d(previous, round(channels * width), 3, padding=d, dilation=d))
                previous = round(channels * width)
                layers += [nn.BatchNorm2d(previous)] * batch_norm
                layers.append(nn.ReLU(inplace=True))
            layers.append(nn.MaxPool2d(3, stride=2 if block < 4 else 1, padding=1))
        self.features = nn.Sequential(*layers, nn.AvgPool2d(3, stride=1, padding=1))
        self.channels = round(1024 * width)
        self.fc6 = nn.Conv2d(previous, self.channels, 3, padding=dilation, dilation=dilation)
        self.fc7 = nn.Conv2d(self.channels, self.channels, 1)
        self.dropout = nn.Dropout2d(dropout)
        for m in self.modules():
            if isinstance(m, nn.Conv2d) and m.bias is not None:
                nn.init.kaiming_normal_(m.weight, nonlinearity="relu")
                nn.init.zeros_(m.bias)

    def forward(self, x):
        x = self.dropout(F.relu(self.fc6(self.features(x))))
        return self.dropout(F.relu(self.fc7(x)))


def load(module: nn.Module, state: State, source: str, optional: Sequence[str] = ()) -> set[str]:
    """Copy `state` into `module`, whose layers named in `optional` may be missing from it. Returns the names."""
    try:
        missing, unexpected = module.load_state_dict(state, strict=False)
        fits = not unexpected and all(name.split(".")[0] in optional for name in missing)
    except RuntimeError:  # other shapes
        fits = False
    if not fits:
        raise WeightsError(f"{source}: weights of another network; set weights or backbone")
    if not all(value.isfinite().all() for value in state.values()):
        raise WeightsError(f"{source}: holds weights that are not finite numbers")
    return set(state)


def read_file(source: str | os.PathLike) -> object:
    """What torch.save wrote. That the machine cannot read it is Python's own error."""
    try:
        content = Path(source).read_bytes()
    except (FileNotFoundError, IsADirectoryError):
        raise WeightsError(f"{source}: no such file; weights is imagenet, caffe, none or a file") from None
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except BROKEN as error:
        if "can't allocate memory" in str(error):
            raise
        raise WeightsError(f"{source}: not a file of weights that torch.load can read safely") from None


def state_of(content: object, source: str | os.PathLike) -> State:
    """The state dict in a file's content: a checkpoint's (cls.pt, seg.pt) or the content itself; of a network in
    Caffe's names, in those of `Network`.
    """
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        content = content["model"]
    if not content or not isinstance(content, dict) or not all(
            isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()):
        raise WeightsError(f"{source}: not a state dict (names to tensors)")
    try:
        return from_caffe(content)
    except (RuntimeError, LookupError):
        raise WeightsError(f"{source}: named as a network of Caffe's, but not of its shapes") from None


def caffe_file() -> str:
    """The authors' vgg_caffe.pth in torch.hub's cache: fetched once, checked each time."""
    path = Path(torch.hub.get_dir(), "checkpoints", "vgg_caffe.pth")
    way_out = f"put {CAFFE_URL} there by hand, or set weights=imagenet"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            partial = Path(folder, path.name)
            try:
                torch.hub.download_url_to_file(CAFFE_URL, str(partial))
            except NO_NETWORK as error:
                raise WeightsError(f"{path}: cannot be downloaded ({error}); {way_out}") from None
            if git_blob(partial) != CAFFE_BLOB:
                raise WeightsError(f"{path}: its download came cut or changed; {way_out}")
            partial.replace(path)
    elif git_blob(path) != CAFFE_BLOB:
        raise WeightsError(f"{path}: not the authors' file, git blob {CAFFE_BLOB[:12]}; {way_out}")
    return str(path)


def git_blob(path: Path) -> str:
    """git's name of a file's content."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def torchvision_weights(name: str) -> State:
    """torchvision's ImageNet weights, downloaded into torch.hub's cache."""
    entry = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"]
    try:
        return entry.get_state_dict(progress=True)
    except NO_NETWORK as error:
        raise WeightsError(f"{entry.url}: cannot be downloaded ({error}); set weights to a file") from None


def cut_vgg16(state: State) -> State:
    """torchvision's VGG-16 to LargeFOV's: fc6, fc7 of every 4th channel, fc6's 7x7 kernel at 0, 3, 6."""
    cut = {name: value for name, value in state.items() if not name.startswith("classifier.")}
    if "classifier.0.weight" in state:
        cut["fc6.weight"] = state["classifier.0.weight"].view(4096, 512, 7, 7)[::4, :, ::3, ::3]
        cut["fc6.bias"] = state["classifier.0.bias"][::4]
        cut["fc7.weight"] = state["classifier.3.weight"].view(4096, 4096, 1, 1)[::4, ::4]
        cut["fc7.bias"] = state["classifier.3.bias"][::4]
    return cut


def vgg16_from_caffe(state: State) -> State:
    """conv1_1.weight ... fc7.bias, with fc6 and fc7 whole or as LargeFOV cut them, in the names of `VGG16`."""
    layers, index = {}, 0
    for block, convolutions in enumerate((2, 2, 3, 3, 3), 1):
        for number in range(1, convolutions + 1):
            layers[f"conv{block}_{number}"] = f"features.{index}"
            index += 2  # its ReLU
        index += 1  # its pool
    if len(state.get("fc6.bias", ())) == 4096:
        layers |= {"fc6": "classifier.0", "fc7": "classifier.3"}
    renamed = {}
    for name, value in state.items():
        layer, _, kind = name.rpartition(".")
        renamed[f"{layers.get(layer, layer)}.{kind}"] = value
    return cut_vgg16(renamed)


def resnet_from_caffe(state: State) -> State:
    """kazuto1011's layer1.conv1.conv.weight, layer2.block1.reduce.conv.weight ... in the names of `resnet`."""
    units = {"layer1.conv1.conv": "conv1", "layer1.conv1.bn": "bn1",
             "shortcut.conv": "downsample.0", "shortcut.bn": "downsample.1"}
    for number, unit in enumerate(("reduce", "conv3x3", "increase"), 1):
        units |= {f"{unit}.conv": f"conv{number}", f"{unit}.bn": f"bn{number}"}
    renamed = {}
    for name, value in state.items():
        name = re.sub(r"layer(\d)\.block(\d+)", lambda m: f"layer{int(m[1]) - 1}.{int(m[2]) - 1}", name)
        for theirs, ours in units.items():
            name = name.replace(theirs, ours)
        renamed[f"caffe.{name}"] = value
    return renamed


def from_caffe(state: State) -> State:
    """A network in the names of Caffe's converted files, for BGR, in the names of `Network`, for RGB; another state
    dict as it is. What comes before the names (backbone., base., scale.) is cut off. Classifiers of Caffe's own go.
    """
    for first, rename in (("conv1_1.weight", vgg16_from_caffe), ("layer1.conv1.conv.weight", resnet_from_caffe)):
        prefix = next((name.removesuffix(first) for name in state if name.endswith(first)), None)
        if prefix is None:
            continue
        body, renamed = {}, {}
        for name, value in state.items():
            layer = name.removeprefix(prefix)
            if name == "classifier.weight":
                renamed[name] = value.flatten(1)
            elif layer.startswith("aspp.c"):
                renamed[f"head.branches.{layer.removeprefix('aspp.c')}"] = value
            elif not layer.startswith(("fc.", "fc8")):
                body[layer] = value
        body[first] = body[first].flip(1)
        renamed |= {f"backbone.{name}": value for name, value in rename(body).items()}
        return renamed | {key: torch.tensor(value).view(3, 1, 1) for key, value in CAFFE.items()}
    return state


def resnet(name: str) -> nn.Sequential:
    """torchvision's ResNet at stride 8, computing what its weights were trained for: where a stride of 2 went, all
    convolutions behind it read every other cell. Of a stage's first block torchvision's have the stride in the 3x3,
    which itself still reads neighbours; resnet101_caffe, for the original weights, in the 1x1 before that.
    """
    net = torchvision.models.get_model(name.removesuffix("_caffe"), weights=None,
                                       replace_stride_with_dilation=(False, True, True))
    body = nn.Sequential(OrderedDict(list(net.named_children())[:-2]))  # without avgpool and fc
    if name.endswith("_caffe"):  # the original's first pool has ceil_mode: at sides of 8 k + 1 that changes nothing
        for first, second, *_ in (net.layer1, net.layer2, net.layer3, net.layer4):
            first.conv1.stride, first.conv2.stride = first.conv2.stride, (1, 1)
            first.conv2.dilation = first.conv2.padding = second.conv2.dilation
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.001  # in Caffe's terms 0.999; the authors train it, here freeze_norm: false does
        body = nn.Sequential(OrderedDict(caffe=body))  # other names: neither kind takes the other's weights
    body.channels = net.fc.in_features
    return body


class DilatedDepthwise(nn.Conv2d):
    """A depthwise convolution with dilation that autocast leaves in float32 on a CPU: in bfloat16 and channels_last
    oneDNN 3.13 (torch 2.15) adds memory that nobody wrote to the gradient of its weights. Float32 is also faster.
    """

    def forward(self, x):
        if x.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float())


def timm_backbone(name, source, state):
    try:
        import timm
    except ImportError:
        raise WeightsError(f"backbone timm/{name} needs timm: pip install timm") from None
    file = {}
    try:
        if state:  # checked here, since timm skips what does not fit
            with torch.device("meta"):
                names = set(timm.create_model(name).state_dict())
            if names != set(state):
                raise WeightsError(f"{source}: weights of another network than timm/{name}")
            file = dict(pretrained_cfg_overlay=dict(file=source))
        module = timm.create_model(name, features_only=True, output_stride=STRIDE, out_indices=(-1,),
                                   pretrained=source != "none", **file)
    except WeightsError:
        raise
    except (RuntimeError, ValueError, TypeError, LookupError, OSError) as error:
        if isinstance(error, OSError) and error.errno and not isinstance(error, NO_NETWORK):
            raise  # the machine's
        raise WeightsError(f"backbone timm/{name}: timm says: {' '.join(str(error).split())}") from None
    for layer in module.modules():
        if type(layer) is nn.Conv2d and layer.groups == layer.in_channels > 1 and layer.dilation != (1, 1):
            layer.__class__ = DilatedDepthwise
    module.channels = module.feature_info.channels()[-1]
    known = timm.get_pretrained_cfg(name)
    return module, dict(mean=known.mean, std=known.std), set(module.state_dict()) if source != "none" else set()


def build_backbone(name: str, weights: str | os.PathLike = "none", dilation: int = 1, width: float = 1.0,
                   dropout: float = 0.5) -> tuple[nn.Module, dict, set[str]]:
    """-> (module with .channels, colours dict(mean, std), names of loaded weights)."""
    source, vgg = str(weights), name in ("vgg16", "vgg16_bn")
    if not vgg and width != 1:
        raise WeightsError(f"width: {width} is for vgg16 alone, not for {name}")
    if source == "caffe":
        if name != "vgg16":
            raise WeightsError(f"weights: caffe is for vgg16 alone, not for {name}; use imagenet, none or a file")
        source = caffe_file()
    state = {} if source in ("none", "imagenet") else state_of(read_file(source), source)
    own = {n.removeprefix("backbone."): v for n, v in state.items() if n.startswith("backbone.")}
    if own and {"mean", "std"} <= set(state):  # a Network's, or once in Caffe's names
        module, _, _ = build_backbone(name, "none", dilation, width, dropout)
        colours = {key: tuple(state[key].flatten().tolist()) for key in ("mean", "std")}
        return module, colours, load(module, own, source, optional=("fc6", "fc7"))
    if name.startswith("timm/"):
        return timm_backbone(name.removeprefix("timm/"), source, state)
    caffe = name.endswith("_caffe")
    if not vgg and name.removesuffix("_caffe") not in ("resnet50", "resnet101", "resnet152"):
        raise WeightsError(f"backbone: {name!r} is none of vgg16, vgg16_bn, resnet50, resnet101, resnet152, "
                           "resnet101_caffe, timm/NAME")
    module = VGG16(dilation, width, name == "vgg16_bn", dropout) if vgg else resnet(name)
    if source == "none":
        return module, CAFFE if caffe else IMAGENET, set()
    if caffe and not state:
        raise WeightsError(f"weights: imagenet does not exist for {name}; use a file in kazuto1011's names, or none")
    state = state or torchvision_weights(name)
    try:
        state = cut_vgg16(state) if vgg else {n: v for n, v in state.items() if not n.startswith("fc.")}
    except (RuntimeError, LookupError):
        raise WeightsError(f"{source}: its classifier is not VGG-16's") from None
    return module, IMAGENET, load(module, state, source, optional=("fc6", "fc7"))


# ---------------------------------------------------------------- networks


class ASPP(nn.Module):
    """DeepLab-V2's head: four 3x3 convolutions at rates 6, 12, 18, 24, without biases, summed, ReLU."""

    def __init__(self, inputs, channels=256, rates=(6, 12, 18, 24)):
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Conv2d(inputs, channels, 3, padding=r, dilation=r, bias=False) for r in rates)
        self.channels = channels

    def forward(self, x):
        return F.relu(sum(branch(x) for branch in self.branches))


class Network(nn.Module):
    """What the classifier and the segmenter share: images -> features (N, C, h, w) at stride 8.

    backbone: vgg16, vgg16_bn, resnet50, resnet101, resnet152, resnet101_caffe (of the original weights) or timm/NAME.
    weights: imagenet (torchvision's or timm's), caffe (the authors', for vgg16), none, or a file: of such weights, or
    of a network, this class's or the authors', whose backbone is taken. Raises WeightsError where these cannot be had.
    width: a factor on VGG-16's channels. dropout: share of VGG-16's fc6 and fc7 channels dropped in training.
    With pretrained weights batch normalisation stays frozen, since batches of crops are too small for its
    statistics; set freeze_norm = False to train it.
    """

    mean: Tensor  # (3, 1, 1) of the colours, RGB in [0, 1]
    std: Tensor

    def __init__(self, num_labels, backbone, weights, width, dropout, dilation, head):
        super().__init__()
        self.backbone, colours, loaded = build_backbone(backbone, weights, dilation, width, dropout)
        self.loaded = {"backbone." + name for name in loaded}
        self.freeze_norm = bool(loaded)
        self.head = nn.Identity() if isinstance(self.backbone, VGG16) else head(self.backbone.channels)
        channels = getattr(self.head, "channels", self.backbone.channels)
        self.classifier = nn.Linear(channels, num_labels, bias=False)
        for module in (*self.head.modules(), self.classifier):
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self.register_buffer("mean", torch.tensor(colours["mean"]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(colours["std"]).view(3, 1, 1))

    @property
    def fill(self) -> list[int]:
        """The mean colour as RGB 0..255: what images are padded with."""
        return [round(255 * v) for v in self.mean.flatten().tolist()]

    def train(self, mode=True):
        super().train(mode)
        if self.freeze_norm:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self

    def features(self, images: Tensor) -> Tensor:
        """RGB images (N, 3, H, W), uint8 or float in [0, 1] -> features (N, C, h, w) of images padded with the
        mean colour at their right and bottom to `padded_size`, where the map's cells lie on pixels 8 j.
        """
        if not images.is_floating_point():
            images = images.float() / 255
        height, width = padded_size(images.shape[2:])
        x = (images - self.mean) / self.std
        x = F.pad(x, (0, width - images.shape[3], 0, height - images.shape[2]))
        x = self.backbone(x)
        return self.head(x[0] if isinstance(x, list) else x)

    def parameter_groups(self, lr: float, decay: float, new_lr: float = 10.0,
                         double_bias: bool = False) -> list[dict]:
        """Groups for SGD: parameters that no pretrained file gave learn at new_lr x lr; with double_bias, as
        Caffe had it, biases at twice their rate and without decay.
        """
        groups: dict[tuple[float, float], list] = {}
        for name, parameter in self.named_parameters():
            bias = double_bias and name.endswith(".bias")
            rate = lr * (1 if name in self.loaded else new_lr) * (2 if bias else 1)
            groups.setdefault((rate, 0.0 if bias else decay), []).append(parameter)
        return [dict(params=p, lr=rate, weight_decay=d) for (rate, d), p in groups.items()]


class Head(nn.Sequential):
    """The classifier's head on backbones other than VGG-16: one 3x3 convolution to 512 channels."""

    def __init__(self, inputs, channels=512):
        super().__init__(nn.Conv2d(inputs, channels, 3, padding=1), nn.ReLU(inplace=True))
        self.channels = channels


class Scores(NamedTuple):
    foreground: torch.Tensor  # (sum K_i, bins * bins, 1 + num_classes): logits of r
    queries: torch.Tensor     # (J, 1 + num_classes): logits of q


class BoxClassifier(Network):
    """Stage 1: one softmax classifier without bias over background (0) and num_classes objects (1..), of
    the features that `pooling` (a BAP) draws from boxes.
    """

    def __init__(self, num_classes: int, backbone: str = "vgg16", weights: str | os.PathLike = "none",
                 width: float = 1.0, dropout: float = 0.5, pooling: BAP | None = None):
        super().__init__(1 + num_classes, backbone, weights, width, dropout, dilation=1, head=Head)
        self.pooling = pooling or BAP()

    def forward(self, images: Tensor, boxes: list[Tensor], background: Tensor | None = None) -> Scores:
        """images (N, 3, H, W) with H, W = 8 k + 1, boxes and background as for BAP -> Scores."""
        size = images.shape[2:]
        if padded_size(size) != tuple(size):
            raise ValueError(f"crops of {tuple(size)}: each side must be 8 k + 1, such as 321")
        pooled = self.pooling(self.features(images), boxes, size, background)
        return Scores(self.classifier(pooled.foreground), self.classifier(pooled.queries))


class DeepLab(Network):
    """Stage 3: with vgg16 DeepLab-V1 (LargeFOV), with others DeepLab-V2 (ASPP), and a cosine classifier."""

    def __init__(self, num_labels: int, backbone: str = "vgg16", weights: str | os.PathLike = "none",
                 width: float = 1.0, dropout: float = 0.5):
        super().__init__(num_labels, backbone, weights, width, dropout, dilation=12, head=ASPP)

    def forward(self, images: Tensor) -> Tensor:
        """images (N, 3, H, W) -> cos(phi(p), W_c): (N, L, H, W) in [-1, 1]."""
        phi = F.normalize(self.features(images), dim=1)
        cosine = F.conv2d(phi, F.normalize(self.classifier.weight, dim=1)[:, :, None, None])
        size = images.shape[2:]
        cosine = F.interpolate(cosine.float(), padded_size(size), mode="bilinear", align_corners=True)
        return cosine[:, :, :size[0], :size[1]]
