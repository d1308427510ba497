"""Images, boxes and label images in the layout of PASCAL VOC's devkit, and
the augmentation of training (section 4.1 of the paper).

One file to copy: it needs torch, torchvision, numpy and Pillow.
"""
import difflib
import io
import math
import os
import shutil
import struct
import xml.etree.ElementTree as ElementTree
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision import tv_tensors
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2

PathLike = str | os.PathLike
VOID = 255  # the label of pixels that count for nothing
VOC_CLASSES = tuple(
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog "
    "horse motorbike person pottedplant sheep sofa train tvmonitor".split())

IMAGE_ENDINGS = {*IMG_EXTENSIONS, ".jfif", ".gif", ".avif", ".heic", ".heif"}

with suppress(ImportError):  # photographs of many phones
    from pillow_heif import register_heif_opener
    register_heif_opener()

# What Pillow raises for a broken file.
BROKEN_IMAGE = (
    OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError,
    AttributeError, ArithmeticError, RuntimeError, struct.error, zlib.error)


class DataError(ValueError):
    """A fault in the user's data, in one line: the file and the way out."""


def list_path(root: PathLike, split: str) -> Path:
    """The file of a list, given its path under ImageSets (Main/trainval).
    A bare name means Segmentation's list, then Main's."""
    folders = [""] if "/" in split else ["Segmentation", "Main"]
    paths = [Path(root, "ImageSets", f, f"{split}.txt") for f in folders]
    return next(filter(Path.is_file, paths), paths[0])


def read_list(root: PathLike, split: str) -> list[str]:
    """The ids of a list, in order. DataError if it is missing or empty, or
    has an id twice."""
    path = list_path(root, split)
    _check_files("list", [path])
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise DataError(f"{path}: not UTF-8 text; save it as such") from None
    counts = Counter(line.strip() for line in lines if line.strip())
    if not counts:
        raise DataError(f"{path}: an empty list; write one id a line")
    name, count = counts.most_common(1)[0]
    if count > 1:
        raise DataError(f"{path}: {name!r} is in it {count} times; keep one")
    return list(counts)


def find_images(root: PathLike, split: str) -> dict[str, Path]:
    """{id: path} of a list's images: JPEGImages/ID.jpg, .jpeg or .png."""
    folder = Path(root, "JPEGImages")
    paths = {name: folder / f"{name}.jpg" for name in read_list(root, split)}
    missing = [name for name in paths if not os.path.isfile(paths[name])]
    if missing and folder.is_dir():
        files = {file.stem: file for file in sorted(folder.iterdir())
                 if file.suffix.lower() in (".jpg", ".jpeg", ".png")}
        paths |= {name: files[name] for name in missing if name in files}
    return paths


def _check_files(kind, paths):
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        raise DataError(f"{missing[0]}: no such {kind} ({len(missing)} of "
                        f"{len(paths)} missing); add it or correct the list")


def _check_size(path, size, image_size):
    if size != image_size:
        raise DataError(f"{path}: height and width are {size}, the image's "
                        f"{image_size}; use files of the same image")


def open_image(path: PathLike, see: Callable[[Image.Image], Any]) -> Any:
    """see(image) of a file. Raises DataError if it is missing or broken."""
    _check_files("image", [path])
    try:
        with Image.open(path) as image:
            return see(image)
    except Image.DecompressionBombError:
        raise DataError(f"{path}: more pixels than Pillow reads; cut it into "
                        "tiles, or make it smaller") from None
    except BROKEN_IMAGE as error:
        if isinstance(error, OSError) and error.errno:
            raise  # the machine's fault: errors of decoding have no number
        reason = " ".join(str(error).replace(f" {str(path)!r}", "").split())
        heic = str(path).lower().endswith((".heic", ".heif"))
        if heic and ".heic" not in Image.registered_extensions():
            reason = "HEIC needs pillow-heif: pip install pillow-heif"
        raise DataError(f"{path}: broken image ({reason})") from None


def refuse_dark(image: Image.Image) -> None:
    """ValueError for colours of 16 bits, of which Pillow reads the upper 8, if
    these are almost 0. Before EXIF is read, which loads a PNG.
    """
    deep = any(";16" in str(tile) for tile in getattr(image, "tile", ()))
    deep = deep and image.mode in ("RGB", "RGBA", "LA")
    if deep and np.asarray(image.convert("RGB")).max() < 64:
        raise ValueError("16 bits a channel, the upper 8 almost 0: save it "
                         "with 8 bits")


def to_rgb(image: Image.Image) -> Image.Image:
    """The picture that a viewer shows: 8-bit RGB, upright by EXIF.

    Grey of more than 8 bits is stretched from its darkest to its brightest
    value; what is transparent shows white. ValueError for dark colours of 16
    bits."""
    refuse_dark(image)
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        grey = np.nan_to_num(np.asarray(image, np.float64))
        grey = (grey - grey.min()) * 255 / max(np.ptp(grey), 1e-6)
        image = Image.fromarray(grey.round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def read_image(path: PathLike) -> np.ndarray:
    """(H, W, 3) uint8 RGB, as to_rgb shows it. Raises DataError."""
    return np.asarray(open_image(path, to_rgb))


def read_mask(path: PathLike, num_labels: int) -> np.ndarray:
    """The labels in a palette or grey PNG, (H, W) uint8: 0..num_labels-1, and
    255 for void. DataError if the file is missing, broken or of another
    mode, or holds another label."""
    mode, mask = open_image(path, lambda image: (image.mode, np.array(image)))
    if mode not in ("P", "L"):
        raise DataError(f"{path}: {mode}; save a palette or grey PNG")
    counts = np.bincount(mask.ravel(), minlength=256)
    wrong = np.flatnonzero(counts[num_labels:VOID]) + num_labels
    if len(wrong):
        raise DataError(f"{path}: label {wrong[0]} in a mask; valid are "
                        f"0..{num_labels - 1} and {VOID}, void")
    return mask


def palette() -> np.ndarray:
    """VOC's colours (256, 3) uint8: a label's bits, spread over R, G and B."""
    labels, channels = np.arange(256)[:, None], np.arange(3)
    colours = np.zeros((256, 3), int)
    for bit in range(8):
        colours |= (labels >> (3 * bit + channels) & 1) << (7 - bit)
    return colours.astype(np.uint8)


def _temporary(path):
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def write(path: PathLike, content: bytes | memoryview) -> None:
    """Writes a file atomically, and its folders. An OSError names the file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


def remove_abandoned(paths: Iterable[Path]) -> None:
    """Removes those files and folders, called .NAME.PID.tmp, that a killed
    process was writing."""
    if os.name != "posix":
        return  # os.kill would stop the process
    for path in list(paths):
        try:
            os.kill(int(path.suffixes[-2][1:]), 0)  # only asks
        except ProcessLookupError:
            path.unlink() if path.is_file() else shutil.rmtree(path)
        except (ValueError, LookupError, OverflowError, PermissionError):
            pass  # not such a name; another user's process, which lives


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path` to fill and to rename to it."""
    remove_abandoned(path.parent.glob(f".{path.name}.*.tmp"))
    folder = _temporary(path)
    # A container's processes may all have one number.
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_png(path: PathLike, image: Image.Image) -> None:
    """Writes a PIL image as a PNG, atomically."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    write(path, buffer.getbuffer())


def write_mask(path: PathLike, labels: np.ndarray) -> None:
    """Writes (H, W) uint8 labels as a PNG with VOC's colours, atomically."""
    image = Image.fromarray(np.ascontiguousarray(labels, np.uint8))
    image.putpalette(palette().tobytes())
    write_png(path, image)


def read_annotation(path: PathLike, classes: Sequence[str]) -> tuple:
    """Boxes (K, 4) float32, labels (K,) int64 in 1..len(classes), and (H, W).

    A box is x0 y0 x1 y1 in continuous pixels, x1 and y1 exclusive. Difficult
    and truncated objects count. DataError if the file is missing or no XML,
    or a field, a class or a box is wrong."""
    _check_files("annotation", [path])
    try:
        root = ElementTree.parse(path).getroot()
    except (ElementTree.ParseError, LookupError, ValueError) as error:
        raise DataError(f"{path}: not XML ({error}); replace it") from None
    height = int(_number(path, root, "size/height", 1))
    width = int(_number(path, root, "size/width", 1))
    boxes, labels = [], []
    for item in root.findall("object"):
        name = item.findtext("name", "").strip()
        if name not in classes:
            nearest = "".join(difflib.get_close_matches(name, classes, 1, 0))
            raise DataError(f"{path}: class {name!r} is not in data.classes; "
                            f"the nearest is {nearest!r}")
        sides = "xmin", "ymin", "xmax", "ymax"
        xmin, ymin, xmax, ymax = (
            _number(path, item, f"bndbox/{side}", 0) for side in sides)
        # VOC counts from 1, the last pixel included. Tools that count from 0
        # write 0 for the edge.
        x0, y0 = max(xmin - 1, 0), max(ymin - 1, 0)
        if not (x0 < xmax <= width and y0 < ymax <= height):
            raise DataError(
                f"{path}: box {xmin:g} {ymin:g} {xmax:g} {ymax:g} has no area "
                f"or leaves the image of {width} x {height}; correct it")
        boxes.append((x0, y0, xmax, ymax))
        labels.append(classes.index(name) + 1)
    return (torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            torch.tensor(labels, dtype=torch.int64), (height, width))


def _number(path, element, field, least):
    text = element.findtext(field, "")
    with suppress(ValueError):
        if least <= float(text) < math.inf:
            return float(text)
    raise DataError(f"{path}: <{field}> is {text[:40]!r}, not a number of at "
                    f"least {least}; correct it, or convert with "
                    "tools/own_data.py")


def outside_boxes(boxes: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """M(p) of section 3.1, (1, H, W) uint8: 1 where no box touches a pixel."""
    mask = torch.ones(1, *size, dtype=torch.uint8)
    for x0, y0, x1, y1 in boxes.clamp(min=0).tolist():
        rows = slice(math.floor(y0), math.ceil(y1))
        mask[:, rows, math.floor(x0):math.ceil(x1)] = 0
    return mask


class VOCDataset(torch.utils.data.Dataset):
    """The images of one list. A sample is a dict:

        id          str
        image       (3, H, W) uint8 RGB
        boxes       (K, 4) float32, as of read_annotation
        labels      (K,) int64, k for the k-th of `classes`
        background  (1, H, W) uint8: 1 outside boxes, 0 inside, 255 padding
                    (of which `collate` makes 0)
        masks       (M, H, W) uint8: one from each of the M folders `masks`

    `masks`, `truth` and `scored` are folders, absolute or under root. All
    masks of the ids in `exact` are read from `truth`. Images without a PNG in
    `scored` are left out. DataError is raised on construction; for faults in
    pixels, when the sample is read.
    `paths` is {id: image file}; `annotations` {id: (boxes, labels)} or None,
    in numpy: a spawned worker would be sent each tensor as an open file.
    """

    def __init__(self, root: PathLike, split: str, classes: Sequence[str],
                 transform: Callable[[dict], dict] | None = None,
                 masks: Sequence[PathLike] = (), boxes: bool = True,
                 truth: PathLike = "", exact: Collection[str] = (),
                 scored: PathLike | None = None):
        self.root, self.classes = Path(root), list(classes)
        self.transform, self.truth, self.exact = transform, truth, set(exact)
        self.mask_folders = [self.root / folder for folder in masks]
        if not 0 < len({*classes} - {"background"}) == len(classes) < VOID:
            raise DataError("data.classes: needs 1 to 254 different names, "
                            "without background, which is label 0")
        if not self.root.is_dir():
            raise DataError(f"{root}: no such folder; set data.root, or run "
                            "python tools/download_voc.py YEAR DIR (or for "
                            "the demo python tools/shapes.py DIR)")
        self.paths = find_images(root, split)
        if scored:
            folder = self.root / scored
            self.paths = {name: path for name, path in self.paths.items()
                          if os.path.isfile(folder / f"{name}.png")}
        self.ids = list(self.paths)
        _check_files("image", self.paths.values())
        for paths in zip(*map(self.mask_paths, self.ids)):
            _check_files("mask", paths)
        self.annotations: dict | None = None
        if boxes:
            files = list(map(self.annotation_path, self.ids))
            _check_files("annotation", files)
            self.annotations, self._sizes = {}, {}
            for name, file in zip(self.ids, files):
                *found, size = read_annotation(file, self.classes)
                self.annotations[name] = [part.numpy() for part in found]
                self._sizes[name] = size

    def mask_paths(self, name: str) -> list[Path]:
        """The files of an image's masks, one for each folder."""
        exact = [self.root / self.truth] * len(self.mask_folders)
        folders = exact if name in self.exact else self.mask_folders
        return [folder / f"{name}.png" for folder in folders]

    def annotation_path(self, name: str) -> Path:
        return self.root / f"Annotations/{name}.xml"

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        name = self.ids[index]
        pixels = read_image(self.paths[name])
        size = pixels.shape[:2]
        pixels = torch.from_numpy(pixels.transpose(2, 0, 1).copy())
        sample = {"id": name, "image": tv_tensors.Image(pixels)}
        if self.annotations is not None:
            boxes, labels = map(torch.tensor, self.annotations[name])
            _check_size(self.annotation_path(name), self._sizes[name], size)
            sample["boxes"] = tv_tensors.BoundingBoxes(
                boxes, format="XYXY", canvas_size=size)
            sample["labels"] = labels
            sample["background"] = tv_tensors.Mask(outside_boxes(boxes, size))
        if self.mask_folders:
            paths = self.mask_paths(name)
            masks = [read_mask(path, len(self.classes) + 1) for path in paths]
            for path, mask in zip(paths, masks):
                _check_size(path, mask.shape, size)
            masks = torch.from_numpy(np.stack(masks))
            sample["masks"] = tv_tensors.Mask(masks)
        return self.transform(sample) if self.transform else sample


def balance_weights(dataset: VOCDataset) -> torch.Tensor:
    """(len(dataset),) float, for Stream: 1 / the number of images that show
    the image's rarest class. Images without objects get the others' mean."""
    assert dataset.annotations is not None, "a dataset without boxes"
    present = torch.zeros(len(dataset), len(dataset.classes) + 1)
    for row, name in zip(present, dataset.ids):
        row[dataset.annotations[name][1]] = 1
    weights = (present / present.sum(0).clamp(min=1)).amax(1)
    empty = weights == 0
    weights[empty] = weights[~empty].mean() if (~empty).any() else 1.0
    return weights


class Stream(torch.utils.data.Dataset):
    """Sample k of a training run depends on (seed, k) alone, so a run can be
    resumed, or shared among workers and devices, without changing it. The
    order: one shuffled epoch after another, or drawn in proportion to
    `weights` (len(dataset),)."""

    def __init__(self, dataset: VOCDataset, length: int, seed: int,
                 weights: torch.Tensor | None = None):
        self.dataset, self.seed = dataset, seed
        size, generator = len(dataset), torch.Generator().manual_seed(seed)
        order: list[int] = []
        for _ in range(math.ceil(length / size)):
            if weights is None:
                epoch = torch.randperm(size, generator=generator)
            else:
                epoch = torch.multinomial(
                    weights, size, replacement=True, generator=generator)
            order += epoch.tolist()
        self.order = order[:length]

    def __len__(self):
        return len(self.order)

    def __getitem__(self, k):
        # torch's CPU generator uses 32 bits of a seed, so (seed, k) is hashed.
        # torch.manual_seed would also reset the GPU's generator, for dropout.
        seed = np.random.SeedSequence((self.seed, k)).generate_state(1)[0]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(seed))
            return self.dataset[self.order[k]]


def collate(samples: list[dict]) -> dict:
    """A batch of N samples, a dict with their keys: lists of ids, boxes and
    labels; image (N, 3, H, W), masks (N, M, H, W) and background
    (N, 1, H, W) uint8, which is 0 on padding too."""
    batch: dict = {key: [s[key] for s in samples] for key in samples[0]}
    for key in batch.keys() & {"image", "background", "masks"}:
        batch[key] = torch.stack(batch[key])
    if "boxes" in batch:
        batch["boxes"] = [b.as_subclass(torch.Tensor) for b in batch["boxes"]]
        batch["background"] = (batch["background"] == 1).to(torch.uint8)
    return batch


def random_scale(sample: dict, scale: Sequence[float]) -> dict:
    """Resizes by a factor of U(scale); no antialiasing, as in OpenCV."""
    factor = torch.empty(1).uniform_(*scale).item()
    size = [max(1, round(factor * n)) for n in sample["image"].shape[-2:]]
    return v2.Resize(size, antialias=False)(sample)


def pad_to(sample: dict, crop: int, fill: dict) -> dict:
    """Pads a sample to at least crop x crop, the image in the middle."""
    height, width = sample["image"].shape[-2:]
    across, down = max(crop - width, 0), max(crop - height, 0)
    left, top = across // 2, down // 2
    return v2.Pad([left, top, across - left, down - top], fill=fill)(sample)


def drop_thin_boxes(sample: dict) -> dict:
    """Clips boxes to the image and drops those under a pixel wide or high."""
    if "boxes" not in sample:
        return sample
    boxes = v2.functional.clamp_bounding_boxes(sample["boxes"])
    keep = ((boxes[:, 2:] - boxes[:, :2]) >= 1).all(1)
    return sample | {"boxes": tv_tensors.wrap(boxes[keep], like=boxes),
                     "labels": sample["labels"][keep]}


def training_transform(
        crop: int, fill: Sequence[int], scale: Sequence[float] = (0.5, 1.5),
        jitter: float = 0.5) -> Callable[[dict], dict]:
    """Scale, pad with the RGB colour `fill` (0..255) and masks with 255, crop,
    flip, jitter brightness, contrast and saturation, in that order."""
    # v2.Pad looks up a fill for "others", the boxes, too, but ignores it.
    fills: dict = {tv_tensors.Image: list(fill), tv_tensors.Mask: VOID,
                   "others": 0}
    return v2.Compose([
        partial(random_scale, scale=scale),
        partial(pad_to, crop=crop, fill=fills),
        v2.RandomCrop(crop),
        drop_thin_boxes,
        v2.RandomHorizontalFlip(),
        v2.ColorJitter(brightness=jitter),
        v2.ColorJitter(contrast=jitter),
        v2.ColorJitter(saturation=jitter),
    ])
