"""Anybody's export, checked, as a folder to train on (docs/own_data.md).

    python tools/own_data.py SOURCE OUT
    python train_cls.py OUT/mine.yaml

What is left out, cut or changed is counted. Every fault is a line with its
file's name; then there is no OUT, and the exit status is 2."""
import argparse
import json
import math
import os
import re
import shutil
import sys
import tempfile
import unicodedata
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from urllib.parse import unquote
from xml.etree import ElementTree
from xml.sax.saxutils import escape

import numpy as np
import torch
import yaml
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datasets import VOC_CLASSES, VOID, DataError  # noqa: I001
from datasets import open_image, outside_boxes, palette, to_rgb, write_mask

TEMPLATE = Path(__file__).resolve().parents[1] / "configs/your_data.yaml"
JPEG = ".jpg", ".jpeg"
KEPT = {"JPEG": JPEG, "MPO": JPEG, "PNG": (".png",)}  # MPO: a phone's JPEG
ENDINGS = {*JPEG, *".jfif .png .bmp .webp .gif .tif .tiff .ppm .pgm .avif "
           ".heic .heif".split()}
MASKS = {*"mask masks labels annotations segmentation gt segmentationclass "
         "segmentationclassaug segmentationobject".split()}
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val",
          "validation": "val", "test": "test", "testing": "test"}
BESIDE = {*SPLITS, *(
    "images image imgs img labels annotations data obj".split())}
TURNS = {  # EXIF's quarter turns: Pillow's; where (x, y) of (w, h) goes
    5: (Image.Transpose.TRANSPOSE, lambda x, y, w, h: (y, x)),
    6: (Image.Transpose.ROTATE_270, lambda x, y, w, h: (h - y, x)),
    7: (Image.Transpose.TRANSVERSE, lambda x, y, w, h: (h - y, w - x)),
    8: (Image.Transpose.ROTATE_90, lambda x, y, w, h: (y, w - x))}
COLOURS = [tuple(colour) for colour in palette().tolist()]
GREYS = {(299 * r + 587 * g + 114 * b + 500) // 1000 for r, g, b in COLOURS}
FOREIGN = {  # tool: what its own files hold, what to export there instead
    "CVAT": ("<annotations>", "PASCAL VOC 1.1 or COCO 1.0"),
    "LabelMe": ('"imagePath"', "VOC XML, with its labelme2voc.py"),
    "VIA": (r'regions"|region_shape|"_via_', "COCO, from its menu"),
    "CreateML": ('"coordinates"', "VOC XML or COCO, from its tool"),
    "Label Studio": ("lead_time|annotation_id|completed_by|annotator",
                     "Pascal VOC XML, COCO or YOLO"),
    "CSV": (r"\A[^\n{\[<]*[,;]", "VOC XML, COCO or YOLO, from its tool")}
ROTATED = "a rotated box; draw it upright"
ROUNDING = 1e-6  # pixels


def examine(image, most):
    """(upright size, EXIF's turn, format, picture) of an open image; without
    the picture where the file will do, though that is decoded all the same."""
    kind, turn, size = image.format, image.getexif().get(274), image.size
    turn = turn if turn in range(2, 9) else 1
    plain = image.mode in ("RGB", "L") and not image.has_transparency_data
    if kind in KEPT and plain and turn == 1 and max(size) <= most:
        image.draft("L", (1, 1))  # a JPEG is read in full, but faster
        image.load()
        return size, turn, kind, None
    rgb = to_rgb(image)
    return rgb.size, turn, kind, rgb


def refuse(wrong, reason):
    if wrong:
        raise DataError(reason)


@contextmanager
def noted(faults, where=""):
    """Notes a fault, with where it is, and goes on."""
    try:
        yield
    except DataError as error:
        faults.append(f"{where}: {error}" if where else str(error))


def xml(raw):
    """In the declared encoding, also one that Python's parser lacks."""
    head = re.match(rb"\s*<\?xml[^>]*?encoding=[\"']([\w.-]+)[^>]*>", raw)
    raw = raw[head.end():].decode(head[1].decode()) if head else raw
    return ElementTree.fromstring(raw)


TEXT = partial(str, encoding="utf-8-sig")
WORDS = partial(yaml.load, Loader=yaml.BaseLoader)  # yes and 1 stay words


def read(path, parse=TEXT):
    """parse(bytes of a file). Raises DataError if they are not such."""
    try:
        return parse(path.read_bytes())
    except (ValueError, LookupError, RecursionError, yaml.YAMLError,
            ElementTree.ParseError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path}: cannot be read ({reason})") from None


def number(value):
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    hint = "; write a point for the comma" if "," in str(value) else ""
    refuse(not math.isfinite(found), f"{value!r} is not a number{hint}")
    return found


def name_of(value):
    refuse(not str(value or "").strip(), "no class name")
    return " ".join(str(value).split())


def size_of(width, height):
    """None where a file does not say."""
    size = int(number(width or 0)), int(number(height or 0))
    return size if all(size) else None


class Picture:
    """An image, and what is said of it. Boxes: where each stands, its class,
    x0, y0, x1, y1 in pixels from 0 on, or in shares of the image. said: the
    size that its annotation, the file `source`, gives. size and counts, boxes
    by class, are those in OUT."""

    def __init__(self, path):
        self.path, self.id, self.splits = path, "", set()
        self.source, self.said, self.mask = None, None, None
        self.boxes, self.shares = [], False
        self.faults, self.notes = [], Counter()
        self.size, self.counts = (0, 0), Counter()

    def annotate(self, source):
        with noted(self.faults, source):
            refuse(self.source, f"a second annotation of {self.path}, beside "
                                f"{self.source}; keep one")
        self.source = source

    def add(self, where, box_of, *arguments):
        with noted(self.faults, where):
            self.boxes.append((where, *box_of(*arguments)))


class Export:
    """The files of SOURCE. An image is found by what files call it."""

    def __init__(self, root):
        self.root, self.files = root, scan(root)
        self.faults, self.notes, self.names = [], Counter(), []
        images, self.stems = self.ending(*ENDINGS), defaultdict(list)
        apart = {path: MASKS & {part.lower() for part in self.folders(path)}
                 for path in images}
        plain = {folded(path.stem) for path in images if not apart[path]}
        masks = {path for path in images if apart[path] and (
            folded(path.stem) in plain or "segmentation" in str(apart[path]))}
        self.pictures = [Picture(p) for p in images if p not in masks]
        self.masks = [path for path in sorted(masks)
                      if "segmentationobject" not in apart[path]]
        self.notes["masks of objects, left out"] = len(masks) - len(self.masks)
        for picture in self.pictures:
            self.stems[folded(picture.path.stem)].append(picture)

    def ending(self, *endings):
        return [p for p in self.files if p.suffix.lower() in endings]

    def folders(self, path):
        return path.relative_to(self.root).parent.parts

    def known(self, name):
        return folded(name) in self.stems

    def find(self, name, path):
        """The image that the file `path` calls `name`: its stem, its name, a
        path of either system, an address. DataError if none, or several."""
        for form in (name, unquote(name.partition("?")[0])):
            called = PurePosixPath(form.strip().replace("\\", "/"))
            if self.known(called.name):
                return self.nearest(called, called.name, path)
            if called.suffix.lower() in ENDINGS and self.known(called.stem):
                return self.nearest(called, called.stem, path)
        raise DataError(f"no image {name!r}")

    def nearest(self, called, stem, path):
        """Of the images of one name that whose folders agree best."""
        parts = {*self.folders(path), *called.parent.parts,
                 *re.findall(r"[a-z]+\d*", path.stem.lower())}

        def near(picture):
            own = picture.path
            return (called.name == own.name or stem == own.stem,
                    own.parent == path.parent,
                    len(parts.intersection(self.folders(own))))

        first, *rest = sorted(self.stems[folded(stem)], key=near, reverse=True)
        for other in rest[:1]:
            refuse(near(other) == near(first), f"{called.name!r} may be "
                   f"{first.path} or {other.path}; rename one")
        return first


def folded(stem):
    return unicodedata.normalize("NFC", stem).casefold()


def scan(root):
    """All files but hidden ones, sorted; links to folders are followed."""
    found, seen = [], set()
    for folder, folders, names in os.walk(root, followlinks=True):
        loop = os.path.realpath(folder) in seen
        seen.add(os.path.realpath(folder))
        folders[:] = [n for n in folders if n[0] != "." and not loop]
        found += [Path(folder, n) for n in names if n[0] != "." and not loop]
    return sorted(found)


def read_voc(export):
    for path in export.ending(".xml"):
        with noted(export.faults, path):
            picture = export.find(path.stem, path)
            picture.annotate(path)
            with noted(picture.faults):
                tree = read(path, xml)
                refuse(tree.tag != "annotation", f"{path}: not VOC's XML")
                picture.said = size_of(
                    tree.findtext("size/width"), tree.findtext("size/height"))
                # Direct children only: a <part> has a name and a box, too.
                for index, item in enumerate(tree.findall("object"), 1):
                    picture.add(f"{path}: object {index}", voc_box, item)


def voc_box(item):
    """VOC counts pixels from 1 on, and includes the last."""
    name, box = name_of(item.findtext("name")), item.find("bndbox")
    for mark in item.iterfind("attributes/attribute[name='rotation']"):
        refuse(number(mark.findtext("value") or 0), ROTATED)
    refuse(item.find("robndbox") is not None, ROTATED)
    refuse(box is None, f"{name} has no box; draw one")
    x0, y0, x1, y1 = (number(box.findtext(side))
                      for side in ("xmin", "ymin", "xmax", "ymax"))
    return name, (x0 - 1, y0 - 1, x1, y1)


def read_yolo(export):
    names = yolo_names(export)
    refuse(not names, f"{export.root}: no class names; write classes.txt")
    export.names = [*dict.fromkeys(names.values())]
    export.notes["names given twice, one class"] = (
        len(names) - len(export.names))
    for path in export.ending(".txt"):
        if export.known(path.stem) or looks_yolo(path, export):
            with noted(export.faults, path):
                picture = export.find(path.stem, path)
                picture.annotate(path)
                picture.shares = True
                with noted(picture.faults):
                    for index, line in enumerate(read(path).splitlines(), 1):
                        if fields := line.split():
                            picture.add(f"{path}: line {index}", yolo_box,
                                        fields, names, picture.notes)


def looks_yolo(path, export):
    """Text without an image that is a fault: boxes, or an empty label."""
    line = path.read_bytes().strip().split(b"\n")[0]
    boxes = re.match(rb"\d+(\s+[-\d.e]+){4}", line)
    return boxes or not line and "labels" in export.folders(path)


def yolo_box(fields, names, notes):
    """class cx cy w h, or class x y x y x y ..., in shares."""
    index, *values = map(number, fields)
    count = len(values)
    refuse(count == 5, "a sixth number, a confidence? Keep class cx cy w h")
    refuse(count < 4 or count % 2, f"{count + 1} numbers, not class cx cy w h")
    refuse(max(values) > 2, "pixels? YOLO's are shares of the image, 0 to 1")
    refuse(index not in names, f"class {index:g} has no name")
    if count > 4:
        notes["boxes round polygons"] += 1
        return names[index], extent(values)
    x, y, w, h = values
    return names[index], (x - w / 2, y - h / 2, x + w / 2, y + h / 2)


def extent(points):
    x, y = points[::2], points[1::2]
    return min(x), min(y), max(x), max(y)


def yolo_names(export):
    """{index: name}. Raises DataError if two files do not agree."""
    found = {}
    for path in export.files:
        names = []
        if path.suffix.lower() in (".yaml", ".yml"):
            content = read(path, WORDS)
            content = content if isinstance(content, dict) else {}
            names = content.get("names", [])
            refuse(names and "kpt_shape" in content, f"{path}: keypoints")
        elif path.suffix == ".names" or path.name == "classes.txt":
            names = read(path).splitlines()
        if isinstance(names, list):
            names = dict(enumerate(names))
        refuse(isinstance(names, str) or not all(
            isinstance(name, str) for name in names.values()),
            f"{path}: names: not a list of names, nor index: name")
        names = {int(number(index)): " ".join(name.split())
                 for index, name in names.items() if name.strip()}
        first = next(iter(found), path)
        refuse(names and found.setdefault(first, names) != names,
               f"{path}: other names than {first}; keep one of the two")
    return next(iter(found.values()), {})


def coco_files(export):
    """{path: content}; where there are instances_*.json, these alone, since
    COCO's own folder holds captions and keypoints as well."""
    found, export.broken = {}, []
    for path in export.ending(".json"):
        with noted(export.broken):
            content = read(path, json.loads)
            if isinstance(content, dict) and all(
                    isinstance(content.get(key), list)
                    for key in ("images", "annotations", "categories")):
                found[path] = content
    own = {p: found[p] for p in found if p.name.startswith("instances")}
    return own or found


def read_coco(export, path, content):
    names, entries = {}, {}
    for where, item in coco_items(path, content, "categories"):
        with noted(export.faults, where):
            names[value(item, "id")] = name_of(value(item, "name"))
    export.names += [n for n in names.values() if n not in export.names]
    for where, item in coco_items(path, content, "images"):
        with noted(export.faults, where):
            key, name = value(item, "id"), str(value(item, "file_name"))
            refuse(key in entries, f"a second image of the id {key!r}")
            entries[key] = Picture(path)  # takes the boxes of a missing image
            picture = entries[key] = export.find(name, path)
            picture.annotate(path)
            picture.said = size_of(item.get("width"), item.get("height"))
    for where, item in coco_items(path, content, "annotations"):
        with noted(export.faults, where):
            picture = entries.get(value(item, "image_id"))
            refuse(picture is None, "no image has its image_id")
            if item.get("iscrowd"):
                picture.notes["COCO's crowds, left out"] += 1
            else:
                picture.add(f"{where}, {picture.path.name}", coco_box, item,
                            names, picture.notes)


def coco_items(path, content, kind):
    items = enumerate(content[kind])
    return [(f"{path}: {kind}[{index}]", item) for index, item in items]


def value(item, key):
    found = item.get(key) if isinstance(item, dict) else None
    refuse(not isinstance(found, int | str), f"{key} is {found!r}")
    return found


def coco_box(item, names, notes):
    name, box = names.get(value(item, "category_id")), item.get("bbox")
    refuse(name is None, "no category has its category_id")
    marks, parts = item.get("attributes"), item.get("segmentation")
    angle = marks.get("rotation") if isinstance(marks, dict) else 0
    refuse(number(angle or 0), ROTATED)
    if not box and parts and isinstance(parts, list):
        notes["boxes round polygons"] += 1
        return name, extent([number(v) for part in parts for v in part])
    refuse(not isinstance(box, list) or len(box) != 4,
           f"bbox is {box!r}, not x, y, width, height")
    x, y, w, h = map(number, box)
    return name, (x, y, x + w, y + h)


def read_annotations(export):
    """The kind that most images have; the others are counted."""
    coco = coco_files(export)
    xml, txt = (sum(export.known(p.stem) for p in export.ending(ending))
                for ending in (".xml", ".txt"))
    entries = sum(len(content["images"]) for content in coco.values())
    counts = {"VOC XML": xml, "COCO": entries, "YOLO": txt}
    export.kind = max(counts, key=counts.get)
    if not counts.pop(export.kind):
        refuse_foreign(export)
    export.notes.update({f"annotations in {kind}, left out": count
                         for kind, count in counts.items()})
    if export.kind == "COCO":
        export.faults += export.broken
        for path, content in coco.items():
            read_coco(export, path, content)
    else:
        (read_voc if export.kind == "VOC XML" else read_yolo)(export)


def refuse_foreign(export):
    for path in export.ending(".xml", ".json", ".csv"):
        content = read(path)[:100_000]
        for tool, (mark, way_out) in FOREIGN.items():
            refuse(re.search(mark, content),
                   f"{path}: {tool}'s own form; export {way_out}")
    for path in export.ending(".zip", ".rar", ".7z", ".tar", ".gz"):
        raise DataError(f"{path}: an archive; unpack it")
    raise DataError(*export.broken[:1] or [
        f"{export.root}: {len(export.pictures)} images, and no VOC XML, COCO "
        "JSON or YOLO text of them"])


def split_of(name, beside=BESIDE):
    """train, val or test, of a name such as val2017, if its other words are
    all in `beside`; None: any."""
    parts = {*re.findall(r"[a-z]+", name.lower())}
    found = {SPLITS[part] for part in parts & {*SPLITS}}
    fits = len(found) == 1 and (beside is None or parts <= beside)
    return found.pop() if fits else None


def lists(export):
    """[(split, file)]: ImageSets/Segmentation's, or Main's, or others."""
    texts = [p for p in export.ending(".txt") if not export.known(p.stem)]
    for folder in ("ImageSets", "Segmentation"), ("ImageSets", "Main"):
        own = {p.stem: p for p in texts if p.parts[-3:-1] == folder}
        if "trainval" in own:
            own.setdefault("train", own["trainval"])
        if own.keys() & SPLITS.keys():
            return [(SPLITS[k], own[k]) for k in own if k in SPLITS]
    return [(split, p) for p in texts if (split := split_of(p.stem))]


def listed(path, export):
    """The images of a list, which names one a line."""
    for index, line in enumerate(read(path).splitlines(), 1):
        name = line.strip()
        # The devkit's form for a class: 1 in, 0 difficult, -1 out.
        flagged = re.fullmatch(r"(.+?)\s+(1|0|-1)", name)
        if flagged and not export.known(name):
            name = flagged[1] if flagged[2] != "-1" else ""
        with noted(export.faults, f"{path}: line {index}"):
            if name:
                yield export.find(name, path)


def choose(export):
    """Lists are texts, or else COCO files' names, or else folders' names. The
    images of none are left out; if there are no lists, all are train's."""
    for split, path in lists(export):
        for picture in listed(path, export):
            picture.splits.add(split)
    if not any(picture.splits for picture in export.pictures):
        for picture in export.pictures:
            coco = export.kind == "COCO" and picture.source
            named = coco and split_of(coco.stem, None)
            folders = map(split_of, export.folders(picture.path))
            picture.splits = {named} if named else {*filter(None, folders)}
    chosen = [p for p in export.pictures if p.splits] or export.pictures
    for picture in chosen:
        picture.splits = picture.splits or {"train"}
    export.notes.update({
        "images in no list, left out": len(export.pictures) - len(chosen),
        "images in several lists": sum(len(p.splits) > 1 for p in chosen)})
    export.pictures = chosen


def give_ids(export):
    """Stems; before equal ones the names of their folders that differ."""
    same = defaultdict(list)
    for picture in export.pictures:
        same[picture.path.stem].append(picture)
    for stem, group in same.items():
        folders = [export.folders(picture.path) for picture in group]
        shared = set.intersection(*map(set, folders))
        for picture, own in zip(group, folders):
            apart = [folder for folder in own if folder not in shared]
            picture.id = "_".join([*apart, stem])
            if folders.count(own) > 1:  # a.jpg beside a.png
                picture.id += f"_{picture.path.suffix[1:]}"
            export.notes["ids longer than an equal stem"] += len(group) > 1
            with noted(picture.faults, ascii(str(picture.path))):
                refuse(not stem.isprintable() or stem != stem.strip(),
                       "give it a plain name")


def attach_masks(export):
    """SegmentationClassAug, SBD's, comes before the devkit's own masks."""
    export.masks.sort(key=lambda path: "ClassAug" not in str(path))
    for path in export.masks:
        with noted(export.faults, path):
            picture = export.find(path.stem, path)
            refuse(picture.mask and "ClassAug" not in str(picture.mask),
                   f"a second mask, beside {picture.mask}")
            picture.mask = picture.mask or path


def mask_colours(export):
    """{colour: label}: VOC's, or CVAT's labelmap.txt; whether the second."""
    names = ["background", *export.labels]
    colours = dict(zip(COLOURS, range(len(names))))
    maps = [path for path in export.files if path.name == "labelmap.txt"]
    for path in maps[:1]:
        lines = re.findall(r"(?m)^([^#].*):(\d+),(\d+),(\d+):.*:", read(path))
        colours = {(*map(int, colour),): names.index(name)
                   for name, *colour in lines if name in names}
    return {COLOURS[VOID]: VOID} | colours, bool(maps)


def codes_of(mask):
    """(H,W) codes of a mask's pixels, and the colour of each code."""
    if mask.mode == "P":
        own = np.reshape(mask.getpalette() + 768 * [0], (-1, 3)).tolist()
        return np.asarray(mask), lambda index: tuple(own[index])
    if mask.mode == "L" or mask.mode[0] == "I":
        return np.asarray(mask), lambda grey: (grey, grey, grey)
    # What is transparent is background.
    rgba = np.asarray(mask.convert("RGBA")).astype(int)
    codes = (rgba[..., :3] * (rgba[..., 3:] > 0)) @ [1 << 16, 1 << 8, 1]
    return codes, lambda code: (code >> 16, code >> 8 & 255, code & 255)


def labels_of(mask, export):
    """A mask as (H,W) labels, 0, 1, ... and 255, void. Raises DataError of
    the reason alone."""
    (colours, mapped), count = export.colours, len(export.labels)
    mask = mask.convert("L") if mask.mode == "1" else mask
    codes, colour_of = codes_of(mask)
    used, inverse = np.unique(codes, return_inverse=True)
    labels = used = used.tolist()
    shown = [*map(colour_of, used)]
    strange = {*shown} - colours.keys()
    if strange and all(r == g == b for r, g, b in shown):
        labels = [grey for grey, _, _ in shown]
    elif mask.mode != "L" and mask.mode[0] != "I":
        refuse(strange, f"the colour {max(strange, default=0)} is no class's")
        labels = [colours[colour] for colour in shown]
    refuse(mask.mode == "P" and not mapped and labels != used, "a palette in "
           f"another order than VOC's: index {used[0]} is {shown[0]}")
    binary = VOID in labels and {*labels} <= {0, VOID}
    refuse(binary and COLOURS[VOID] not in shown, "nothing but 0 and 255; is "
           "255 the object? Labels are 1, 2, ...")
    wrong = {*labels}.difference(range(count + 1), [VOID])
    refuse(wrong and {*labels} <= GREYS, "VOC's colours turned grey")
    refuse(wrong, f"label {min(wrong, default=0)}; valid: 0..{count}, 255")
    return np.array(labels, np.uint8)[inverse.reshape(codes.shape)]


def check_inside(labels, boxes, names):
    """More than half of a label outside the boxes of its class: the label is
    another class's, or the mask another image's."""
    for label in {*np.unique(labels).tolist()} - {0, VOID}:
        name, here = names[label - 1], labels == label
        own = [box for kind, box in boxes if kind == name]
        own = torch.tensor(own).reshape(-1, 4)
        outside = here & outside_boxes(own, labels.shape)[0].numpy()
        refuse(outside.sum() > here.sum() / 2, f"most of label {label} lies "
               f"outside the boxes of {name}; is that its class?")


def convert(picture, export):
    """Checks an image in full. Without a fault it is written."""
    with noted(picture.faults, picture.path):
        refuse(not picture.source and not export.options.empty, "no "
               "annotation; --empty takes it for an image without objects")
    with noted(picture.faults):
        most = export.options.max_side
        found = open_image(picture.path, partial(examine, most=most))
        boxes = upright_boxes(picture, *found[:2])
        labels = picture.mask and read_mask(picture, boxes, export, *found[:2])
        if not picture.faults:
            write_picture(picture, boxes, labels, export, *found)


def upright_boxes(picture, size, turn):
    """[(class, box)] in pixels of the upright image, cut at its edges."""
    stored = size[::-1] if turn in TURNS else size
    said, notes, boxes = picture.said or size, picture.notes, []
    refuse(said not in (size, stored), f"{picture.source}: {said[0]} x "
           f"{said[1]} pixels, but {picture.path} has {size[0]} x {size[1]}")
    move = TURNS[turn][1] if said != size else None
    unsure = turn > 1 and picture.boxes and picture.said in (None, stored)
    notes["images turned upright"] += turn > 1
    notes["of these cannot tell whether their boxes are of the upright image, "
          "as is assumed"] += bool(unsure and not move)
    for where, name, box in picture.boxes:
        with noted(picture.faults, f"{where}: {name}"):
            if picture.shares:
                box = [share * side for share, side in zip(box, said * 2)]
            inner = cut(box, said)
            notes["boxes cut at the edge, at most a pixel"] += (
                max(np.abs(np.subtract(box, inner))) > ROUNDING)
            if move:
                ends = move(*inner[:2], *said), move(*inner[2:], *said)
                inner = *map(min, *ends), *map(max, *ends)
            boxes.append((name, inner))
    return boxes


def cut(box, size):
    (x0, y0, x1, y1), (width, height) = box, size
    refuse(x1 < x0 or y1 < y0, "corners are swapped, or a side is negative")
    beyond = max(-x0, -y0, x1 - width, y1 - height)
    refuse(beyond > 1 + ROUNDING, f"{beyond:.6g} pixels beyond the edge")
    x0, y0, x1, y1 = max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)
    refuse(min(x1 - x0, y1 - y0) <= 1,
           f"{x1 - x0:.4g} x {y1 - y0:.4g} pixels, too small")
    return x0, y0, x1, y1


def read_mask(picture, boxes, export, size, turn):
    """(H,W) labels of SOURCE, upright; None if there is a fault."""
    mask = open_image(picture.mask, Image.Image.copy)
    if turn in TURNS and mask.size == size[::-1] != size:
        mask = mask.transpose(TURNS[turn][0])
    with noted(picture.faults, picture.mask):
        refuse(mask.size != size, f"{mask.width} x {mask.height} pixels, but "
               f"{picture.path} has {size[0]} x {size[1]}")
        labels = labels_of(mask, export)
        if not picture.faults:
            check_inside(labels, boxes, export.labels)
        return labels


def write_picture(picture, boxes, labels, export, size, turn, kind, rgb):
    scale, objects = min(1, export.options.max_side / max(size)), []
    picture.notes["images made smaller"] += scale < 1
    new = picture.size = *(max(1, round(side * scale)) for side in size),
    for name, box in boxes:
        if final := export.final[name]:
            objects.append((final, box * np.tile(np.divide(new, size), 2)))
            picture.counts[final] += 1
        else:
            picture.notes[f"boxes of {name}, left out"] += 1
    endings, own = KEPT.get(kind, (".png",)), picture.path.suffix
    own = own if own.lower() in endings else endings[0]
    target = export.out / f"JPEGImages/{picture.id}{own}"
    if rgb:
        rgb = rgb.resize(new, Image.Resampling.LANCZOS)
        rgb.save(target, "JPEG" if endings == JPEG else "PNG", quality=95,
                 subsampling=0)
    else:
        link(picture.path, target)
    write(export.out, f"Annotations/{picture.id}.xml",
          annotation(new, objects))
    if labels is not None:
        image = Image.fromarray(export.table[labels])
        write_mask(export.out / f"SegmentationClass/{picture.id}.png",
                   np.asarray(image.resize(new, Image.Resampling.NEAREST)))


def link(path, target):
    try:
        os.link(os.path.realpath(path), target)
    except OSError:  # another disk, or one without links
        shutil.copyfile(path, target)


def write(folder, name, content):
    (folder / name).write_text(content, encoding="utf-8")


def annotation(size, objects):
    """The devkit's XML: pixels from 1 on, the last included."""
    content = (f"<annotation>\n  <size><width>{size[0]}</width><height>"
               f"{size[1]}</height><depth>3</depth></size>\n")
    for name, box in objects:
        sides = zip(("xmin", "ymin", "xmax", "ymax"), box + [1, 1, 0, 0])
        sides = "".join(f"<{side}>{x:.10g}</{side}>" for side, x in sides)
        content += (f"  <object><name>{escape(name)}</name><bndbox>{sides}"
                    "</bndbox></object>\n")
    return content + "</annotation>\n"


def name_classes(export):
    """SOURCE's classes in label order; `background` is none."""
    used = {box[1] for p in export.pictures for box in p.boxes}
    names = export.names or sorted(used)
    if export.kind == "COCO":
        export.notes.update(f"category without boxes, no class: {name}"
                            for name in names if name not in used)
        names = [name for name in names if name in used]
    # The masks of a part of VOC count the classes that it lacks as well.
    elif used < {*VOC_CLASSES} and highest_label(export) > len(used):
        names = [*VOC_CLASSES]
    export.labels = [name for name in names if name.lower() != "background"]
    export.notes["class background left out: it is label 0"] = (
        len(names) - len(export.labels))
    return names


def highest_label(export):
    """In the masks; a broken one is named later, with all other faults."""
    highest = 0
    for path in export.masks:
        with noted([]):
            highest = max(highest, open_image(path, top))
    return highest


def top(mask):
    """The highest label in a mask that holds labels."""
    labels = mask.getcolors() or [] if mask.mode in "PL" else []
    return max((k for _, k in labels if k < VOID), default=0)


def rename(export, names, chosen, new):
    """Sets final, {class: its name in OUT or None}, OUT's classes in label
    order, and table, OUT's label of each label."""
    final = {name: new.get(name, name) for name in names}
    unknown = {*new, *chosen} - {*names, *final.values()}
    refuse(unknown, f"--classes, --rename: no class {[*unknown][:1]}; there "
           f"are {', '.join(names)}")
    for name in names:
        kept = not chosen or {name, final[name]} & {*chosen}
        if final[name].lower() == "background" or not kept:
            final[name] = None
    classes = [*dict.fromkeys(filter(None, final.values()))]
    refuse(len(classes) >= VOID, f"{export.root}: over 254 classes")
    export.final, export.classes = final, classes
    export.table = np.arange(256, dtype=np.uint8)
    numbers = {None: 0} | {name: k for k, name in enumerate(classes, 1)}
    for label, name in enumerate(export.labels, 1):
        export.table[label] = numbers[final[name]]


def prepare(source, out, options):
    """Makes OUT; returns the exit status, 0 or 2."""
    zipped = source.suffix.lower() == ".zip" and source.is_file()
    refuse(zipped, f"{source}: an archive; unpack it")
    refuse(not source.is_dir(), f"{source}: no such folder")
    refuse(os.path.lexists(out), f"{out}: exists already; name a new folder")
    refuse(source.resolve() in out.resolve().parents,
           f"{out}: lies in {source}, where nothing is written")
    export = Export(source)
    export.options = options
    read_annotations(export)
    attach_masks(export)
    choose(export)
    give_ids(export)
    rename(export, name_classes(export), options.classes, dict(options.rename))
    export.colours = mask_colours(export)
    out.parent.mkdir(parents=True, exist_ok=True)
    export.out = Path(tempfile.mkdtemp(".tmp", f".{out.name}.", out.parent))
    try:
        return fill(export, out)
    finally:
        shutil.rmtree(export.out, ignore_errors=True)


def fill(export, out):
    export.out.chmod(0o755)
    for folder in ("JPEGImages", "Annotations", "SegmentationClass",
                   "ImageSets/Segmentation"):
        (export.out / folder).mkdir(parents=True)
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        done = pool.map(partial(convert, export=export), export.pictures)
        [*tqdm(done, "images", len(export.pictures), False, disable=None)]
    finally:
        pool.shutdown(cancel_futures=True)
    whole = [p for p in export.pictures if not p.faults]
    faults = sum((p.faults for p in export.pictures), export.faults)
    print_report(export, whole, faults)
    if faults and not export.options.skip_faults:
        return 2
    refuse(not any("train" in p.splits and p.counts for p in whole),
           f"{export.root}: no image with boxes for train")
    write_settings(export, whole, out)
    export.out.rename(out)
    print(f"\npython train_cls.py {out / 'mine.yaml'}")
    return 0


def print_report(export, whole, faults):
    counts = sum((p.counts for p in whole), Counter())
    notes = sum((p.notes for p in whole), export.notes)
    splits = Counter(split for p in whole for split in p.splits)
    sizes = sorted((p.size for p in whole), key=math.prod) or [(0, 0)]
    notes["images without boxes"] = sum(not p.counts for p in whole)
    if export.masks:
        notes["images with a mask"] = sum(bool(p.mask) for p in whole)
        notes["images without a mask"] = sum(not p.mask for p in whole)
    lists = ", ".join(f"{s} {splits[s]}" for s in ("train", "val", "test"))
    sizes = sizes[0], sizes[len(sizes) // 2], sizes[-1]
    sizes = ", ".join(f"{width} x {height}" for width, height in sizes)
    print(f"{export.kind}: {len(whole)} images; {lists}",
          f"smallest, median and largest: {sizes}", f"boxes: {counts.total()}",
          *(f"{counts[name]:8} {name}" for name in export.classes),
          *(f"{count} {note}" for note, count in notes.items() if count),
          f"faults: {len(faults)}", *faults, sep="\n")


def write_settings(export, whole, out):
    """The lists, and mine.yaml: configs/your_data.yaml, filled in."""
    ids = {name: [p.id for p in whole if name in p.splits]
           for name in ("train", "val", "test")}
    ids["masked"] = [p.id for p in whole if p.mask]
    for name in filter(ids.get, ids):
        write(export.out, f"ImageSets/Segmentation/{name}.txt",
              "\n".join([*ids[name], ""]))
    val = next((name for name in ("val", "masked") if ids[name]), "")
    if val == "masked":
        print("data.val is masked.txt: images of train, so seen")
    values = {
        "name": re.sub(r"[^\w.-]|^\.", "_", out.name)[:99],
        "root": str(out.absolute()), "classes": export.classes,
        "train": "train", "val": val, "truth": "SegmentationClass"}
    content = read(TEMPLATE)
    for key, filling in values.items():
        filling = yaml.safe_dump(
            filling, default_style='"', allow_unicode=True, width=math.inf,
            default_flow_style=True).strip()
        line = re.search(rf"(?m)^  {key}: .*?(?=  #|$)", content)
        content = content.replace(line[0], f"  {key}: {filling}", 1)
    write(export.out, "mine.yaml", content)


def renaming(argument):
    old, new = map(name_of, argument.split("=", 1))
    return old, new


def side(argument):
    refuse(not 16 <= int(argument) <= 7000, "not 16 to 7000")
    return int(argument)


def main():
    parser = argparse.ArgumentParser(description="docs/own_data.md tells more")
    add = parser.add_argument
    add("SOURCE", type=Path)
    add("OUT", type=Path, help="a new folder")
    add("--empty", action="store_true",
        help="an image without an annotation is one without objects")
    add("--skip-faults", action="store_true", help="leave such images out")
    add("--max-side", type=side, default=1000, help="pixels, 16 to 7000")
    add("--classes", type=lambda names: [*map(name_of, names.split(","))],
        default=[], help="A,B: keep these alone")
    add("--rename", type=renaming, action="append", default=[],
        help="OLD=NEW; repeatable, several may become one")
    options = parser.parse_args()
    sys.stdout.reconfigure(errors="backslashreplace")
    if find_spec("pillow_heif"):
        import pillow_heif
        pillow_heif.register_heif_opener()
    try:
        sys.exit(prepare(options.SOURCE, options.OUT, options))
    except DataError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("stopped; nothing was written")


if __name__ == "__main__":
    main()
