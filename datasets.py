"""Images with boxes: reading, augmentation, a check of your own data, the shapes demo set.

    ROOT/JPEGImages/ID.jpg  Annotations/ID.xml  SegmentationClassAug/ID.png  ImageSets/Segmentation/LIST.txt

is the PASCAL VOC devkit's layout. Boxes may also be YOLO's ID.txt or one COCO JSON file, and the folders any others.

Section 4.1 of the paper (the data) and the augmentation of its training runs. The background mask M(p) of
section 3.1 follows from the boxes, so no file holds it.

    python datasets.py check ROOT       read your own data in full: counts, every fault, the settings for it
    python datasets.py shapes DIR       write the demo set
"""
import difflib
import io
import json
import math
import os
import re
import reprlib
import shutil
import struct
import sys
import tempfile
import warnings
import xml.etree.ElementTree as ElementTree
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2
from tqdm import tqdm

Pathlike = str | os.PathLike
Boxes = tuple[torch.Tensor, torch.Tensor, tuple[int, int]]  # boxes (K,4), labels (K,), (height, width)
Report = Callable[["DataError"], object]  # what is done with a fault: raise it, or note it and go on
VOID = 255
MOST_PIXELS = 50_000_000  # of one image: more is taken for a decompression bomb
LEAST_SIDE = 0.01  # pixels of a box: of a thinner one float32 may see nothing
MOST_JSON = 2 ** 30  # bytes of a COCO file
MIN_BACKGROUND = 0.125  # share at or under which models.BAP pools an image plainly
BROKEN_IMAGE = (OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, AttributeError, ArithmeticError,
                RuntimeError, struct.error, zlib.error, Image.DecompressionBombError)  # what Pillow's decoders raise
ENDINGS = ".jpg", ".jpeg", ".png", ".bmp", ".webp"  # of images, in any case
VOC_CLASSES = ("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
               "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
               "tvmonitor")


class DataError(ValueError):
    """A fault of the user's data. One line: the file or key, what is wrong with it, the way out."""


def _stop(error):
    """What readers do with a fault, unless they are told to report it and go on."""
    raise error


def _skip(error):
    """Somebody else reports it."""


@dataclass
class Settings:
    """Section `data` of the YAML file."""
    root: str = "data/shapes"  # folder that holds all of the following
    images: str = "JPEGImages"  # folder of images; an image's id is its file's name without the ending
    boxes: str = "Annotations"  # folder of VOC's ID.xml or of YOLO's ID.txt, or a COCO JSON file
    shapes: bool = False  # write the shapes demo set to root when root does not exist
    classes: list[str] = field(default_factory=lambda: list(VOC_CLASSES))  # labels 1, 2, ...; 0 is background
    train: str = "train_aug"  # list to learn from, by its path under ImageSets (Main/trainval); a bare name means
    # Segmentation's, then Main's; all: every image, without a list
    val: str = "val"  # list of unseen images, or none
    truth: str = "SegmentationClassAug"  # folder of the true masks: for scores, and for the images of `masks`
    masks: str = ""  # list of images whose true masks stage 3 may see (semi-supervised); none: boxes alone


# ---------------------------------------------------------------------------------------------- files

def list_path(root: Pathlike, split: str) -> Path:
    """The file of a list named by its path under ImageSets, such as Main/trainval; a bare name means Segmentation's,
    then Main's. Whether it is there, is left open. Raises DataError for a name that leads out of ImageSets."""
    folder = Path(root, "ImageSets")
    if not split or ".." in split or Path(split).is_absolute():
        raise DataError(f"{split!r} is not the name of a list: its path under {folder}, without .txt")
    if "/" in split:
        return folder / f"{split}.txt"
    own, main = folder / "Segmentation" / f"{split}.txt", folder / "Main" / f"{split}.txt"
    return main if main.is_file() and not own.is_file() else own


def read_list(root: Pathlike, split: str) -> list[str]:
    """The ids of a list, in order. Raises DataError as list_path and read_ids do."""
    return read_ids(list_path(root, split))


def read_ids(path: Path) -> list[str]:
    """The ids in a file, one a line, in order; blank lines are skipped.

    Raises DataError if it is missing or empty, or holds a path or the same id twice."""
    counts = Counter(line.strip() for line in _read_lines("list", path) if line.strip())
    if not counts:
        raise DataError(f"{path}: an empty list; write one image id a line")
    for name, count in counts.items():
        if "/" in name or "\\" in name or ".." in name or len(name) > 200:
            raise DataError(f"{path}: {reprlib.repr(name)} is not an image id; write ids without folders, one a line")
        if count > 1:
            raise DataError(f"{path}: {reprlib.repr(name)} stands in it {count} times; keep one")
    return list(counts)


def _read_lines(kind, path):
    _check_file(kind, path)
    try:
        return path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot read this {kind} ({type(error).__name__}); save it as UTF-8 text") from None


def find_images(root: Pathlike, split: str, images: str = "JPEGImages") -> dict[str, Path]:
    """{id: path} of a list's images, in its order. The list `all`, unless there is one, is every image of the folder.

    Raises DataError as read_list and list_images do; whether a listed image is there, it leaves open."""
    folder = Path(root, images)
    listed = list_path(root, split)
    if split == "all" and not os.path.lexists(listed):
        return list_images(folder)
    paths = {name: folder / f"{name}.jpg" for name in read_ids(listed)}
    if all(map(os.path.isfile, paths.values())):  # the devkit's layout
        return paths
    found = list_images(folder)
    return {name: found.get(name, path) for name, path in paths.items()}


def list_images(folder: Pathlike, report: Report = _stop) -> dict[str, Path]:
    """{id: path} of every image in a folder, sorted by id. Hidden files, and what ends otherwise, are left out.

    Raises DataError if there is none, two are of one id, or a name cannot be shown in a line."""
    if not os.path.isdir(folder):
        raise DataError(f"{folder}: no such folder; set data.images to the folder of the images")
    found: dict[str, Path] = {}
    for name in sorted(os.listdir(folder)):
        stem, ending = os.path.splitext(name)
        if ending.lower() not in ENDINGS or name.startswith("."):
            continue
        if not name.isprintable():
            report(DataError(f"{folder}: an image is called {name!a}; rename it to plain letters"))
        elif stem in found:
            report(DataError(f"{Path(folder, name)}: a second image with the id {stem}, beside {found[stem].name}; "
                             "rename or remove one"))
        else:
            found[stem] = Path(folder, name)
    if not found:
        raise DataError(f"{folder}: no images ({' '.join(ENDINGS)}); set data.images to their folder")
    return dict(sorted(found.items()))


def read_image(path: Pathlike) -> np.ndarray:
    """The image as (H,W,3) uint8 RGB. Raises DataError if it is missing, broken or cut short."""
    return np.asarray(_open(path, lambda image: image.convert("RGB")))


def read_mask(path: Pathlike, num_labels: int) -> np.ndarray:
    """A label image, palette or grey PNG, as (H,W) uint8: 0..num_labels-1, and 255 for void.

    Raises DataError if it is missing, broken, in colour, or holds another value."""
    mode, mask = _open(path, lambda image: (image.mode, np.array(image)))
    if mode not in ("P", "L"):
        raise DataError(f"{path}: a mask of mode {mode}; save labels as an 8-bit palette or grey PNG")
    counts = np.bincount(mask.ravel(), minlength=256)
    wrong = np.flatnonzero(counts[num_labels:VOID]) + num_labels
    if len(wrong):
        raise DataError(f"{path}: label {wrong[0]} in a mask; valid are 0..{num_labels - 1} and {VOID}, void")
    return mask


def _open(path, read):
    if not os.path.isfile(path):
        raise DataError(f"{path}: no such image file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the next line is stricter
            image = Image.open(path, formats=("JPEG", "PNG", "WEBP", "BMP"))
        with image:
            if image.width * image.height > MOST_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels, more than {MOST_PIXELS / 1e6:.0f} million")
            return read(image)
    except BROKEN_IMAGE as error:
        if isinstance(error, OSError) and error.errno:
            raise  # the machine's: a disk or a permission
        reason = " ".join(str(error).replace(f" {str(path)!r}", "").split())[:200]
        raise DataError(f"{path}: broken image file ({reason}); fetch or save it again") from None


def palette() -> np.ndarray:
    """VOC's colour map, (256,3) uint8: the bits of a label, spread over the high bits of R, G and B."""
    labels = np.arange(256)
    colours = np.zeros((256, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= ((labels >> (3 * bit + channel) & 1) << (7 - bit)).astype(np.uint8)
    return colours


def write(path: Pathlike, content: bytes | memoryview) -> None:
    """Writes bytes as a file that appears whole or not at all: beside it, to the disk, then renamed.

    Makes parent folders. What a killed process leaves beside it, the next try overwrites. OSError names path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
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


def png(image: Image.Image) -> bytes:
    """A PIL image as the bytes of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def write_mask(path: Pathlike, labels: np.ndarray) -> None:
    """Writes (H,W) uint8 labels as a PNG with VOC's palette, whole or not at all; makes parent folders."""
    image = Image.fromarray(np.ascontiguousarray(labels, np.uint8))
    image.putpalette(palette().tobytes())
    write(path, png(image))


# ---------------------------------------------------------------------------------------------- boxes

def box_reader(path: Pathlike, classes: Sequence[str] | None = None,
               report: Report = _stop) -> tuple[Callable[[str, Pathlike], Boxes], Sequence[str]]:
    """A function (id, path of the image) -> (boxes, labels, (height, width)), and the classes.

    `path`: a COCO JSON file, a folder of YOLO's ID.txt, or of VOC's ID.xml; boxes and labels as of
    read_annotation; `classes`: None takes all that the files name. Raises DataError, there or in the function."""
    path = Path(path)
    if path.suffix.lower() == ".json":
        images, names = _read_coco(path, report)
        classes = classes or names
        return partial(_coco_boxes, path, images, classes, report), classes
    endings = {os.path.splitext(name)[1] for name in os.listdir(path)} if path.is_dir() else set()
    if ".xml" not in endings and ".txt" in endings:
        classes = classes or _yolo_names(path)
        return lambda name, image: read_yolo(path / f"{name}.txt", classes, image, report), classes
    classes = classes or _voc_names(path)
    return lambda name, image: read_annotation(path / f"{name}.xml", classes, image, report), classes


def read_annotation(path: Pathlike, classes: Sequence[str], image: Pathlike | None = None,
                    report: Report = _stop) -> Boxes:
    """The boxes of every object in a VOC XML file, also of the difficult and the truncated ones.

    Returns (boxes, labels, (height, width)): (K,4) float32 x0, y0, x1, y1 in continuous pixels, x1 and y1
    exclusive; (K,) int64 in 1..len(classes). The size is the file's own, or that of the file `image` where
    the annotation gives none. Raises DataError for XML that does not parse, a field that is missing or no
    number, a box without area or beyond the image, a class that is not in `classes`; `report`, if given, is
    called with the errors of single objects instead."""
    annotation = _parse_xml(path)
    size = _image_size(path, annotation, image)

    def read(item):
        label = _label(path, _name(item.findtext("name")), classes)
        sides = [_number(path, item, f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax")]
        xmin, ymin, xmax, ymax = sides
        # VOC counts pixels from 1 and includes the last. A 0, from a tool that counts from 0, is the edge too.
        return _box(path, sides, (xmin - 1, ymin - 1, xmax, ymax), size), label

    # Direct children only: a <part> has a name and a box as well.
    return (*_collect(annotation.findall("object"), read, report), size)


def _parse_xml(path):
    _check_file("annotation", path)
    try:
        return ElementTree.parse(path).getroot()  # expat fetches no entity and stops at one that explodes
    except (OSError, ElementTree.ParseError, ValueError, LookupError) as error:
        raise DataError(f"{path}: not an XML annotation ({error}); write it again") from None


def _voc_names(folder):
    """The class names in a folder's XML files, sorted; files that cannot be read are left to the reader."""
    files = [file for file in Path(folder).glob("*.xml") if file.name[0] != "."]
    roots = [root for file in files if (root := _try(_skip, _parse_xml, file)) is not None]
    return sorted({_name(item.findtext("name")) for root in roots for item in root.findall("object")} - {""})


def read_yolo(path: Pathlike, classes: Sequence[str], image: Pathlike, report: Report = _stop) -> Boxes:
    """The boxes of a YOLO file, of lines `class cx cy w h`: the class's index, and shares of the image's size.

    A file that is not there means no objects. Returns and raises as read_annotation does; a box that leaves
    the image by up to a pixel, of rounding, is cut at the edge."""
    width, height = _open(image, lambda image: image.size)
    lines = _read_lines("annotation", path) if os.path.lexists(path) else []

    def read(line):
        where, fields = f"{path}: line {line[0]}", line[1].split()
        if len(fields) != 5:
            hint = "export boxes, not polygons" if len(fields) > 6 else "correct it"
            raise DataError(f"{where}: {len(fields)} numbers, not the 5 of class cx cy w h; {hint}")
        index, cx, cy, w, h = numbers = [_finite(where, "one of class cx cy w h", field) for field in fields]
        if index not in range(len(classes)):
            raise DataError(f"{where}: class {index:g}; data.classes has 0..{len(classes) - 1}; correct one of them")
        box = (cx - w / 2) * width, (cy - h / 2) * height, (cx + w / 2) * width, (cy + h / 2) * height
        return _box(where, numbers[1:], box, (height, width), 1), int(index) + 1

    lines = [line for line in enumerate(lines, 1) if line[1].strip()]
    return (*_collect(lines, read, report), (height, width))


def _yolo_names(folder):
    """The names in classes.txt or data.yaml, in the folder or up to two above; else class0, class1, ..."""
    places = folder, *folder.parents[:2]
    for path in [place / name for place in places for name in ("classes.txt", "data.yaml")]:
        if path.is_file():
            names = _names_in_yaml(path) if path.suffix == ".yaml" else _read_lines("list", path)
            return [name for name in map(_name, names) if name]
    lines = [line for path in folder.glob("*.txt") for line in _try(_skip, _read_lines, "list", path) or ()]
    indices = [int(line.split()[0]) for line in lines if re.match(r"\s*[0-9]{1,3}\s", line)]
    return [f"class{index}" for index in range(min(max(indices, default=0) + 1, VOID - 1))]


def load_yaml(text: str, most_aliases: int = 20) -> object:
    """yaml.safe_load, for text that anybody wrote. Raises yaml.YAMLError for all that it cannot read, and for what is
    deep or full of aliases, which can take hours and all memory."""
    import yaml
    depth = aliases = 0
    try:
        for event in yaml.parse(text):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            aliases += isinstance(event, yaml.AliasEvent)
            if depth > 10 or aliases > most_aliases:
                raise yaml.YAMLError("too deep, or too many aliases")
        return yaml.safe_load(text)
    except (ValueError, LookupError, TypeError, AttributeError) as error:  # of a tag, such as !!bool x
        raise yaml.YAMLError(f"a value that is not what its tag says ({error})") from None


def _names_in_yaml(path):
    import yaml
    try:
        names = load_yaml("\n".join(_read_lines("list", path)), most_aliases=0)["names"]
        return [str(names[index]) for index in range(len(names))]  # a list, or a mapping from 0 on
    except (yaml.YAMLError, ValueError, LookupError, TypeError):
        raise DataError(f"{path}: no class names; write names: [FIRST, SECOND]") from None


def _read_coco(path, report):
    """A COCO file as {id: (its entry, its annotations as (where, annotation, class name))}, and the names of the
    classes that have boxes, in the order of their numbers. The ids are the stems of its file names."""
    _check_file("annotation", path, MOST_JSON)
    try:
        content = json.loads(path.read_bytes(), object_hook=_without_polygons)
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        raise DataError(f"{path}: not a JSON annotation ({type(error).__name__}: {error}); export it again") from None

    def items(kind, *keys):
        for number, item in enumerate(_field(path, content, kind, list)):
            where = f"{path}: {kind}[{number}]"
            if values := _try(report, lambda where, item: [_field(where, item, key) for key in keys], where, item):
                yield where, item, *values

    names, images, annotations, used = {}, {}, {}, set()
    for where, _, key, name in items("categories", "id", "name"):
        if names.setdefault(key, _name(str(name))) != _name(str(name)):
            report(DataError(f"{where}: a second category of the id {reprlib.repr(key)}; keep one"))
    for where, item, key, file in items("images", "id", "file_name"):
        stem = os.path.splitext(re.split(r"[/\\]", str(file))[-1])[0]
        if key in annotations or stem in images:
            report(DataError(f"{where}: a second image of its id or name, {reprlib.repr(stem)}; keep one"))
        else:
            images[stem] = item, annotations.setdefault(key, [])
    for where, item, image, category in items("annotations", "image_id", "category_id"):
        if image in annotations and category in names:
            annotations[image].append((where, item, names[category]))
            used.add(category)
        else:
            report(DataError(f"{where}: image_id {reprlib.repr(image)} or category_id {reprlib.repr(category)} "
                             "is not in this file; correct it"))
    return images, list(dict.fromkeys(names[key] for key in sorted(used, key=lambda key: (str(type(key)), key))))


def _without_polygons(item):
    item.pop("segmentation", None)  # most of such a file
    return item


def _coco_boxes(path, images, classes, report, name, image):
    if name not in images:
        raise DataError(f"{path}: no image called {name!r} in it; add it, or leave it out of the list")
    entry, annotations = images[name]
    size = [_finite(path, f"{key} of image {name!r}", entry.get(key) or 0) for key in ("height", "width")]
    height, width = map(int, size) if min(size) > 0 else _open(image, lambda image: image.size)[::-1]

    def read(annotation):
        where, item, kind = annotation
        if len(_field(where, item, "bbox", list)) != 4:
            raise DataError(f"{where}: bbox is {reprlib.repr(item['bbox'])}, not [x, y, width, height]; correct it")
        x, y, w, h = sides = [_finite(where, "a side of bbox", side) for side in item["bbox"]]
        box = _box(f"{where}, image {name!r}", sides, (x, y, x + w, y + h), (height, width), 1)
        return box, _label(where, kind, classes)

    return (*_collect(annotations, read, report), (height, width))


def _try(report, read, *arguments):
    """read(*arguments), or None, with its DataError given to report()."""
    try:
        return read(*arguments)
    except DataError as error:
        return report(error)


def _collect(items, read, report):
    """((K,4) float32, (K,) int64) of the items; read(item) gives a box and a label."""
    found = [pair for item in items if (pair := _try(report, read, item))]
    return (torch.tensor([box for box, _ in found], dtype=torch.float32).reshape(-1, 4),
            torch.tensor([label for _, label in found], dtype=torch.int64))


def _name(text):
    return " ".join((text or "").split())[:99]


def _label(where, name, classes):
    if name not in classes:
        nearest = "".join(f"; the nearest is {word!r}" for word in difflib.get_close_matches(name, classes, 1, 0))
        raise DataError(f"{where}: class {name!r} is not in data.classes{nearest}")
    return classes.index(name) + 1


def _box(where, sides, box, size, beyond=0):
    """x0, y0, x1, y1, cut at the edges: it may begin a pixel before the image, and end `beyond` pixels after."""
    (x0, y0, x1, y1), (height, width) = box, size
    text = " ".join(f"{side:g}" for side in sides)
    if min(x0, y0) < -1 or x1 > width + beyond or y1 > height + beyond:
        raise DataError(f"{where}: box {text} leaves the image of {width} x {height} pixels; correct it")
    x0, y0, x1, y1 = max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)
    if min(x1 - x0, y1 - y0) < LEAST_SIDE:
        raise DataError(f"{where}: box {text} has no area; correct it")
    return x0, y0, x1, y1


def _image_size(path, annotation, image):
    """(height, width) as ints. A missing or zero <size> is common in other people's XML."""
    if annotation.find("size") is not None:
        size = _number(path, annotation, "size/height"), _number(path, annotation, "size/width")
        if min(size) > 0:
            return int(size[0]), int(size[1])
    if image is None:
        raise DataError(f"{path}: no <size>; add the image's width and height")
    width, height = _open(image, lambda image: image.size)
    return height, width


def _number(path, element, name):
    text, tag = element.findtext(name), name.replace("/", "><")
    if text is None:
        raise DataError(f"{path}: <{element.tag}> without <{tag}>; add it")
    return _finite(path, f"<{tag}>", text.strip())


def _finite(where, name, value):
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"{where}: {name} is {reprlib.repr(value)}, not a number; correct it")
    return number


def _field(where, item, key, kind=int | str):
    """item[key] of a JSON object, which must be of that type."""
    value = item.get(key) if isinstance(item, dict) else None
    if not isinstance(value, kind):
        need = "a list" if kind is list else "a whole number or a text"
        raise DataError(f"{where}: {key} is {reprlib.repr(value)}, not {need}; correct it")
    return value


# ------------------------------------------------------------------------------------------- dataset

class VOCDataset(torch.utils.data.Dataset):
    """The images of one list, with their boxes and with label images read beside them.

    `split`: name of a list; `classes`: names in label order 1, 2, ...; `transform`: applied to each sample;
    `masks`: folders of label PNGs (relative ones lie under root); `images`: folder under root; `boxes`: what
    box_reader reads, under root, or None; `exact`: ids for which each of the masks is read from the folder
    `truth` instead; `scored`: a folder, images without a PNG there are left out. A sample is a dict:

        id          str
        image       uint8 (3,H,W) RGB
        boxes       float32 (K,4), continuous pixels x0, y0, x1, y1, the last two exclusive
        labels      int64 (K,) in 1..len(classes)
        background  uint8 (1,H,W): 1 outside every box, 0 inside; 255 where the transform padded
        masks       uint8 (len(masks),H,W): labels 0..len(classes), 255 void

    `paths`: id -> image file; `annotations`: id -> (boxes, labels). Everything but the pixels is checked on
    construction, so that a fault ends a run before it starts; every fault, then or on reading a sample, raises
    DataError."""

    def __init__(self, root, split, classes, transform=None, masks=(), images="JPEGImages", boxes="Annotations",
                 truth=None, exact=(), scored=None):
        self.root, self.classes, self.transform = Path(root), list(classes), transform
        _check_classes(self.classes)
        if not self.root.is_dir():
            raise DataError(f"{root}: no such folder; set data.root, or run: python tools/download_voc.py YEAR DIR")
        self.paths = find_images(root, split, images)
        if scored:
            self.paths = {name: path for name, path in self.paths.items() if os.path.isfile(f"{scored}/{name}.png")}
        self.ids = list(self.paths)
        self.mask_folders = [self.root / folder for folder in masks]
        _check_files("image", list(self.paths.values()))
        self.truth, self.exact = truth, set(exact)
        for paths in zip(*map(self.mask_paths, self.ids)):
            _check_files("mask", paths)
        self.annotations, self._sizes = ({}, {}) if boxes else (None, {})
        if boxes:
            read, _ = box_reader(self.root / boxes, self.classes)
            for name, path in self.paths.items():
                *self.annotations[name], self._sizes[name] = read(name, path)

    def mask_paths(self, name: str) -> list[Path]:
        """The files of an image's masks, one in each folder."""
        folders = [self.root / self.truth] * len(self.mask_folders) if name in self.exact else self.mask_folders
        return [folder / f"{name}.png" for folder in folders]

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        name = self.ids[index]
        pixels = read_image(self.paths[name])
        size = pixels.shape[:2]
        sample = {"id": name, "image": tv_tensors.Image(torch.from_numpy(pixels.transpose(2, 0, 1).copy()))}
        if self.annotations is not None:
            _check_size(self.paths[name], size, self._sizes[name], "the annotation")
            boxes, labels = self.annotations[name]
            sample["boxes"] = tv_tensors.BoundingBoxes(boxes.clone(), format="XYXY", canvas_size=size)
            sample["labels"] = labels.clone()
            sample["background"] = tv_tensors.Mask(_outside(boxes, size))
        if self.mask_folders:
            paths = self.mask_paths(name)
            masks = [read_mask(path, len(self.classes) + 1) for path in paths]
            for path, mask in zip(paths, masks):
                _check_size(path, mask.shape, size, "the image")
            sample["masks"] = tv_tensors.Mask(torch.from_numpy(np.stack(masks)))
        return self.transform(sample) if self.transform else sample


def _check_classes(classes):
    if not classes or len(set(classes)) < len(classes) or len(classes) >= VOID:
        raise DataError(f"data.classes: needs 1 to {VOID - 1} different names, not {reprlib.repr(classes)}")
    if "background" in classes:
        raise DataError("data.classes: background is label 0 by itself; leave it out")


def _check_files(kind, paths):
    missing = [path for path in paths if not os.path.isfile(path)]  # which, unlike Path's, takes any name
    if missing:
        raise DataError(f"{missing[0]}: no such {kind}; {len(missing)} of {len(paths)} {kind}s are missing")
    for path in paths:
        _check_file(kind, path)


def _check_file(kind, path, most=10_000_000):
    """A plain file in its own folder: not a device, not a link that leads elsewhere; not huge, if it is text."""
    if not os.path.isfile(path):
        need = "write one id a line" if kind == "list" else "every image needs one"
        raise DataError(f"{path}: no such {kind}; {need}")
    if os.path.islink(path) and Path(path).resolve().parent != Path(path).parent.resolve():
        raise DataError(f"{path}: a link out of its folder; put the {kind} itself there, or link the whole folder")
    if kind in ("list", "annotation") and os.path.getsize(path) > most:
        raise DataError(f"{path}: {os.path.getsize(path)} bytes, too many for a {kind}")


def _check_size(path, found, expected, owner):
    if tuple(found) != tuple(expected):
        raise DataError(f"{path}: {found[1]} x {found[0]} pixels, {owner} {expected[1]} x {expected[0]}; "
                        "one of the two is of another image")


def _outside(boxes, size):
    """(1,H,W) uint8: 1 where no box touches the pixel."""
    background = torch.ones(1, *size, dtype=torch.uint8)
    for x0, y0, x1, y1 in boxes.tolist():
        background[:, math.floor(y0):math.ceil(y1), math.floor(x0):math.ceil(x1)] = 0
    return background


def balance_weights(dataset: VOCDataset) -> torch.Tensor:
    """(len(dataset),) float: 1 / the number of images that show the image's rarest class, for Stream.

    An image without objects gets the mean of the others. Needs a dataset with boxes."""
    present = torch.zeros(len(dataset), len(dataset.classes) + 1)
    for row, name in zip(present, dataset.ids):
        row[dataset.annotations[name][1]] = 1
    weights = (present / present.sum(0).clamp(min=1)).amax(1)
    empty = weights == 0
    weights[empty] = weights[~empty].mean() if (~empty).any() else 1.0
    return weights


class Stream(torch.utils.data.Dataset):
    """Sample k of a training run: which image it is and how it is augmented depend on (seed, k) alone.

    So a run can be stopped, resumed and shared out among workers and devices without changing it. The order
    is one shuffled epoch after another, or, with `weights` (len(dataset),), drawn in proportion to them."""

    def __init__(self, dataset: VOCDataset, length: int, seed: int, weights: torch.Tensor | None = None):
        self.dataset, self.seed = dataset, seed
        generator, size = torch.Generator().manual_seed(seed), len(dataset)
        epochs = [torch.randperm(size, generator=generator) if weights is None
                  else torch.multinomial(weights, size, replacement=True, generator=generator)
                  for _ in range(math.ceil(length / size))]
        self.order = [index for epoch in epochs for index in epoch.tolist()][:length]

    def __len__(self):
        return len(self.order)

    def __getitem__(self, k):
        # Of a seed, torch's CPU generator uses 32 bits, so (seed, k) must be hashed into them. Only that
        # generator is seeded: torch.manual_seed would reset the GPU's, and with it the dropout, as well.
        seed = int(np.random.SeedSequence((self.seed, k)).generate_state(1)[0])
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return self.dataset[self.order[k]]


def collate(samples: list[dict]) -> dict:
    """A batch of N samples, a dict: id, a list; image (N,3,H,W) uint8; boxes and labels, lists of N tensors,
    (K_i,4) and (K_i,); background (N,1,H,W) uint8, 1 only where a pixel is known background, so 0 on padding;
    masks (N,M,H,W) uint8. What the samples lack, it lacks."""
    columns: dict = {key: [sample[key] for sample in samples] for key in samples[0]}
    for key in ("image", "background", "masks"):
        if key in columns:
            columns[key] = torch.stack([value.as_subclass(torch.Tensor) for value in columns[key]])
    if "boxes" in columns:
        columns["boxes"] = [boxes.as_subclass(torch.Tensor) for boxes in columns["boxes"]]
        columns["background"] = (columns["background"] == 1).to(torch.uint8)
    return columns


# -------------------------------------------------------------------------------------- augmentation

def random_scale(sample: dict, scale: Sequence[float]) -> dict:
    """Resizes the sample by one factor drawn from U(scale), bilinear without antialiasing, as OpenCV does."""
    factor = torch.empty(1).uniform_(*scale).item()
    size = [max(1, round(factor * side)) for side in sample["image"].shape[-2:]]
    return v2.Resize(size, antialias=False)(sample)


def pad_to(sample: dict, crop: int, fill: dict) -> dict:
    """Pads a sample that is smaller than the crop to its size; the image then lies in the middle."""
    height, width = sample["image"].shape[-2:]
    across, down = max(crop - width, 0), max(crop - height, 0)
    left, top = across // 2, down // 2
    return v2.Pad([left, top, across - left, down - top], fill=fill)(sample)


def drop_thin_boxes(sample: dict) -> dict:
    """Clips the boxes to the image; those left under a pixel wide or high go, together with their labels."""
    if "boxes" not in sample:
        return sample
    boxes = v2.functional.clamp_bounding_boxes(sample["boxes"])
    keep = ((boxes[:, 2:] - boxes[:, :2]) >= 1).all(1)
    return sample | {"boxes": tv_tensors.wrap(boxes[keep], like=boxes), "labels": sample["labels"][keep]}


def training_transform(crop: int, fill: Sequence[int], scale: Sequence[float] = (0.5, 1.5),
                       jitter: float = 0.5) -> Callable[[dict], dict]:
    """Scale U(scale), pad with the colour `fill` (RGB, 0..255) and the masks with 255, crop x crop pixels at
    random, flip, jitter brightness, contrast and saturation, in that order. Takes and returns a sample of
    VOCDataset."""
    return v2.Compose([
        partial(random_scale, scale=scale),
        partial(pad_to, crop=crop, fill={tv_tensors.Image: list(fill), tv_tensors.Mask: VOID}),
        v2.RandomCrop(crop),
        drop_thin_boxes,
        v2.RandomHorizontalFlip(),
        v2.ColorJitter(brightness=jitter),
        v2.ColorJitter(contrast=jitter),
        v2.ColorJitter(saturation=jitter),
    ])


# -------------------------------------------------------------------------------------------- shapes

SHAPES = ("bar", "ring", "cross", "crescent", "vee", "wave")
BACKGROUNDS = ("stripes", "checks", "blobs", "noise", "gradient", "split")  # the k-th suits the k-th shape
USUAL = 0.6  # how often it lies behind it, as water behind boats: that misleads plain average pooling
SIDES = 129, 161  # of an image, pixels
EXTENTS = 38, 92  # of an object, pixels
BACKGROUND_CONTRAST = 60.0  # between a background's two colours, of 255
OBJECT_CONTRAST = 28.0  # between an object's mean colour and that of the background under it
SURFACE_CONTRAST = 40.0  # amplitude of the fine stripes that all objects of a class share
HUE_SPREAD = 0.25  # radians, deviation of an object's hue from its class's; classes are 1.05 apart
NOISE = 7.0  # deviation of each pixel
VISIBLE = 0.5  # an object that would leave less than this of another in sight is not painted


def _outline(rng, shape):
    """A shape as a union of discs: centres (64,2), about within [-1,1], and radii (64,)."""
    t = np.linspace(-1, 1, 64)
    x, y, radius = t, 0 * t, np.full(64, rng.uniform(0.15, 0.21))  # a bar
    if shape == "ring":
        x, y = 0.85 * np.cos(np.pi * t), 0.85 * np.sin(np.pi * t)
    elif shape == "cross":
        x = np.concatenate([t[::2], t[::2]])
        y = 0.8 * np.concatenate([t[::2], -t[::2]])
    elif shape == "crescent":
        x, y, radius = 0.8 * np.cos(2.1 * t), 0.8 * np.sin(2.1 * t), 0.05 + 0.26 * np.cos(np.pi / 2 * t)
    elif shape == "vee":
        y = 1.5 * np.abs(t) - 0.75
    elif shape == "wave":
        y = 0.55 * np.sin(1.5 * np.pi * t)
    return np.stack([x, y], 1), radius


def _coverage(rng, shape, size):
    """(H,W) in [0,1]: how far a new object of the shape, somewhere in the image, covers each pixel."""
    points, radii = _outline(rng, shape)
    # A bar along an axis would fill its box, so it is kept off them; the others turn freely.
    angle = rng.choice([-1, 1]) * rng.uniform(0.45, 1.1) if shape == "bar" else rng.uniform(0, 2 * np.pi)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    points = points * [1, rng.uniform(0.7, 1)] @ turn.T
    scale = rng.uniform(*EXTENTS) / (np.ptp(points, axis=0).max() + 2 * radii.max())
    points = points * scale + np.array(size[::-1]) * rng.uniform(0.2, 0.8, 2)
    x, y = np.arange(size[1]) + 0.5, np.arange(size[0])[:, None] + 0.5
    distance = np.full(size, np.inf)
    for (px, py), radius in zip(points, np.maximum(radii * scale, 2.5)):
        np.minimum(distance, np.sqrt((x - px) ** 2 + (y - py) ** 2) - radius, out=distance)
    return np.clip(0.5 - distance / 1.5, 0, 1)  # an edge 1.5 pixels soft


def _smooth_noise(rng, size, cell):
    """(H,W) of deviation about 1 that changes over `cell` pixels."""
    coarse = rng.normal(size=(size[0] // cell + 2, size[1] // cell + 2)).astype(np.float32)
    return np.asarray(Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC))


def _background(rng, family, size):
    """(H,W,3) float: two near colours mixed by a pattern of the family."""
    angle, phase, wavelength = rng.uniform(0, np.pi), rng.uniform(0, 2 * np.pi), rng.uniform(11, 26)
    x, y = np.meshgrid(np.arange(size[1]) - size[1] / 2, np.arange(size[0]) - size[0] / 2)
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    wave = np.sin(2 * np.pi * along / wavelength + phase)
    if family == "stripes":
        pattern = np.tanh(3 * wave)
    elif family == "checks":
        pattern = np.tanh(4 * wave * np.sin(2 * np.pi * across / wavelength))
    elif family == "blobs":
        pattern = np.tanh(3 * _smooth_noise(rng, size, rng.integers(9, 15)))
    elif family == "noise":
        pattern = 0.8 * _smooth_noise(rng, size, rng.integers(3, 5))
    elif family == "gradient":
        pattern = 2.5 * along / max(size)
    else:
        pattern = np.sign(along + rng.uniform(-20, 20)) + 0.3 * wave
    colour = rng.uniform(95, 160) + rng.uniform(-12, 12, 3)
    step = 0.6 * rng.normal(size=3) + rng.choice([-1, 1])
    return colour + pattern[..., None] * step * BACKGROUND_CONTRAST / np.linalg.norm(step) / 2


def _surface(rng, label, size):
    """(H,W,3) float, to be added to the background's mean colour: hue and fine stripes tell the class."""
    hue = 2 * np.pi * label / len(SHAPES) + rng.normal(0, HUE_SPREAD)
    red_green, yellow_blue = np.array([1, -1, 0]) / 2 ** 0.5, np.array([1, 1, -2]) / 6 ** 0.5
    colour = OBJECT_CONTRAST * (np.cos(hue) * red_green + np.sin(hue) * yellow_blue) + rng.uniform(-12, 12)
    # Upright, level and crossed stripes, fine and less fine: a flip must not turn one class into another.
    x, y = np.meshgrid(np.arange(size[1]), np.arange(size[0]))
    x, y = (2 * np.pi / (4, 7)[label // 3 % 2] * axis + rng.uniform(0, 2 * np.pi) for axis in (x, y))
    stripes = (np.sin(x), np.sin(y), 1.4 * np.sin(x) * np.sin(y))[label % 3]
    return colour + SURFACE_CONTRAST * stripes[..., None]


def _scene(rng):
    """One image (H,W,3) uint8, the object of each pixel (H,W), 0 for none, and the objects' labels."""
    size = tuple(rng.integers(SIDES[0], SIDES[1] + 1, 2))
    label = rng.integers(1, len(SHAPES) + 1)
    family = BACKGROUNDS[label - 1] if rng.random() < USUAL else rng.choice(BACKGROUNDS)
    image, owner, labels = _background(rng, family, size), np.zeros(size, int), []
    wanted = rng.integers(1, 4)
    while len(labels) < wanted:
        cover = _coverage(rng, SHAPES[label - 1], size)
        inside = cover >= 0.5
        areas = np.bincount(owner.ravel(), minlength=len(labels) + 1)[1:]
        left = np.bincount(owner[~inside], minlength=len(labels) + 1)[1:]
        if (left >= VISIBLE * areas).all():
            paint = image[inside].mean(0) + _surface(rng, label, size)
            image += cover[..., None] * (paint - image)
            labels.append(label)
            owner[inside] = len(labels)
        label = rng.integers(1, len(SHAPES) + 1)
    image += rng.normal(0, NOISE, image.shape)
    return image.clip(0, 255).round().astype(np.uint8), owner, labels


def _with_border(owner, labels):
    """(H,W) uint8 labels with void along the objects' outlines, as VOC's annotators left it."""
    mask = np.array([0, *labels], np.uint8)[owner]
    around = np.pad(owner, 1, mode="edge")
    height, width = owner.shape
    for dy, dx in ((0, 1), (2, 1), (1, 0), (1, 2)):
        mask[around[dy:dy + height, dx:dx + width] != owner] = VOID
    return mask


def _annotation(owner, labels):
    """The devkit's XML: each object's box, counted from 1 and inclusive, tight round its visible pixels."""
    height, width = owner.shape
    text = f"<annotation>\n  <size><width>{width}</width><height>{height}</height><depth>3</depth></size>\n"
    for number, label in enumerate(labels, 1):
        y, x = np.nonzero(owner == number)
        sides = {"xmin": x.min(), "ymin": y.min(), "xmax": x.max(), "ymax": y.max()}
        box = "".join(f"<{side}>{value + 1}</{side}>" for side, value in sides.items())
        text += f"  <object><name>{SHAPES[label - 1]}</name><bndbox>{box}</bndbox></object>\n"
    return text + "</annotation>\n"


def make_shapes(root: Pathlike, train: int = 360, val: int = 120, seed: int = 0) -> None:
    """Writes the demo set to `root`, whole or not at all: lists train and val, classes SHAPES, sides SIDES.

    Image n depends on (seed, n) alone. Textured backgrounds run on into boxes that their objects, of nearly
    the same colour, fill badly. Raises DataError if `root` exists."""
    root = Path(root)
    if root.exists():
        raise DataError(f"{root}: exists already; remove it or name another folder")
    root.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f"{root.name}.", suffix=".tmp", dir=root.parent))
    try:
        temporary.chmod(0o755)
        for folder in ("JPEGImages", "Annotations", "ImageSets/Segmentation"):
            (temporary / folder).mkdir(parents=True)
        ids = [f"shapes_{number:05d}" for number in range(train + val)]
        for number, name in enumerate(tqdm(ids, desc="shapes", leave=False, disable=None)):
            image, owner, labels = _scene(np.random.default_rng((seed, number)))
            Image.fromarray(image).save(temporary / f"JPEGImages/{name}.jpg", quality=92, subsampling=0)
            write_mask(temporary / f"SegmentationClassAug/{name}.png", _with_border(owner, labels))
            (temporary / f"Annotations/{name}.xml").write_text(_annotation(owner, labels))
        for split, part in (("train", ids[:train]), ("val", ids[train:])):
            (temporary / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(part) + "\n")
        os.rename(temporary, root)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# --------------------------------------------------------------------------------------------- check

def check(root):
    """Reads every image under `root` in full, and every box; prints counts, all faults, and the settings to use.

    Returns the faults, one line each. Raises DataError where no images or no boxes are found."""
    import yaml
    root, faults = Path(root), []
    images, boxes = _find_layout(root)
    paths = list_images(root / images, faults.append)
    read, classes = box_reader(root / boxes, report=faults.append)
    sizes, counts, empty, plain = [], Counter(), 0, 0
    for name, path in tqdm(paths.items(), "check", leave=False, disable=None):
        size, found = _try(faults.append, _read_upright, path), _try(faults.append, read, name, path)
        if size:
            sizes.append(size)
        if found:
            counts.update(found[1].tolist())
            empty += not len(found[1])
        if size and found:
            _try(faults.append, _check_size, path, size, found[2], "the annotation")
            plain += _outside(found[0], size).float().mean().item() <= MIN_BACKGROUND
    _try(faults.append, _check_classes, classes)
    sizes.sort(key=math.prod)
    sizes = [f"{w} x {h}" for h, w in (sizes[:1] + sizes[len(sizes) // 2:][:1] + sizes[-1:])]
    faults = sorted({str(fault) for fault in faults})
    lists = [split for split in ("train", "val") if Path(root, f"ImageSets/Segmentation/{split}.txt").is_file()]
    print(f"{root}: {len(paths)} images in {images}, boxes in {boxes}",
          f"smallest, median and largest image: {', '.join(sizes)}",
          f"images without boxes: {empty}",
          f"images with at most {MIN_BACKGROUND:.1%} of background outside boxes: {plain / len(paths):.1%} "
          "(stage 1 pools them plainly)",
          f"boxes: {sum(counts.values())}", *(f"{counts[k]:8} {name}" for k, name in enumerate(classes, 1)),
          f"faults: {len(faults)}", *faults, "", sep="\n")
    print(yaml.safe_dump({"data": dict(
        root=str(root), images=images, boxes=boxes, classes=classes, train="train" if "train" in lists else "all",
        val="val" if "val" in lists else "")}, sort_keys=False, allow_unicode=True, default_flow_style=None, width=110))
    return faults


def _find_layout(root):
    """The folder of the images, and the folder or file of the boxes, both relative to root."""
    if not root.is_dir():
        raise DataError(f"{root}: no such folder")
    found = [(images, ids) for images in ("JPEGImages", "images", ".")
             if (ids := _try(_skip, list_images, root / images, _skip))]
    if not found:
        raise DataError(f"{root}: no images ({' '.join(ENDINGS)}) in JPEGImages, in images or beside them")
    images, ids = found[0]
    folders = sorted(folder for folder in os.listdir(root) if folder.lower() in ("annotations", "labels"))
    for ending in (".xml", ".txt"):
        for folder in (*folders, images, "."):
            if any(name.endswith(ending) and name[:-4] in ids for name in os.listdir(root / folder)):
                return images, folder
    files = [path for folder in (".", *folders) for path in Path(root, folder).glob("*.json")]
    if len(files) != 1:
        raise DataError(f"{root}: {len(files)} JSON files, and no ID.xml or ID.txt of its images; put the boxes into "
                        "Annotations or labels, or keep one COCO file")
    return images, str(files[0].relative_to(root))


def _read_upright(path):
    """(height, width) of an image, read in full."""
    size, turn = _open(path, lambda image: (image.convert("RGB").size, image.getexif().get(274, 1)))
    if turn != 1:
        raise DataError(f"{path}: turned by its EXIF tag, which is not followed here; save the image upright")
    return size[::-1]


def main():
    command, folder = sys.argv[1:] if len(sys.argv) == 3 else ("", "")
    if command not in ("check", "shapes") or not folder:
        print("usage: python datasets.py check ROOT | shapes DIR", file=sys.stderr)
        sys.exit(2)
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be no text
    try:
        if command == "check":
            sys.exit(2 if check(folder) else 0)
        make_shapes(folder)
        print("data.root:", folder)
    except DataError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"{error.filename or folder}: {error.strerror}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
