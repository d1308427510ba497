"""Anybody's export, checked, as a folder to train on (docs/own_data.md).

    python tools/own_data.py SOURCE OUT
    python train_cls.py OUT/mine.yaml

What is left out, cut or changed is counted. Every fault is a line with its
file's name; then there is no OUT, and the exit status is 2."""
import argparse
import io
import json
import math
import os
import re
import shlex
import shutil
import sys
import unicodedata
from collections import ChainMap, Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from urllib.parse import unquote
from xml.etree import ElementTree
from xml.sax.saxutils import escape

import numpy as np
import torch
import yaml
from PIL import Image, ImageOps
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from datasets import IMAGE_ENDINGS, VOC_CLASSES, VOID, DataError  # noqa: E402, I001
from datasets import open_image, outside_boxes, palette, refuse_dark, temporary_folder, to_rgb, write_mask  # noqa: E402

JPEG = ".jpg", ".jpeg"
KEPT = {"JPEG": JPEG, "MPO": JPEG, "PNG": (".png",)}  # MPO: a phone's JPEG
MASKS = re.compile(r"(?i)/(masks?|segmentation\w*|labels|annotations|gt)/"
                   r"((train|val|test)\w*/)?[^/]*$")
SPLITS = dict(train="train", training="train", trainval="train", val="val",
              valid="val", validation="val", test="test", testing="test")
BESIDE = {*SPLITS, *"images image imgs img labels annotations data obj set dataset".split()}
TURNS = {  # EXIF's quarter turns: where a box in a stored (w, h) goes
    5: lambda x0, y0, x1, y1, w, h: (y0, x0, y1, x1),
    6: lambda x0, y0, x1, y1, w, h: (h - y1, x0, h - y0, x1),
    7: lambda x0, y0, x1, y1, w, h: (h - y1, w - x1, h - y0, w - x0),
    8: lambda x0, y0, x1, y1, w, h: (y0, w - x1, y1, w - x0)}
CODE = [1 << 16, 1 << 8, 1]  # of a colour, a number
COLOURS = (palette() @ CODE).tolist()
LUMA = ((palette() @ [299, 587, 114] + 500) // 1000).tolist()
FOREIGN = {  # what other tools' own files hold, and the way out
    "CVAT": (b"<annotations>", "export the task as PASCAL VOC 1.1 or COCO 1.0"),
    "LabelMe": (b'"imagePath"', "convert it with LabelMe's own "
                "examples/bbox_detection/labelme2voc.py"),
    "VIA": (b'regions"|region_shape|"_via_', "choose Annotation, Export "
            "Annotations (COCO format) there"),
    "CreateML": (b'"coordinates"', "export Pascal VOC or COCO from the tool "
                 "that wrote it"),
    "Label Studio": (b"lead_time|annotation_id|completed_by|annotator",
                     "choose Export, Pascal VOC XML or COCO there"),
    "CSV": (rb"\A[^\n{\[<]*[,;]", "export Pascal VOC, COCO or YOLO from the "
            "tool that wrote it")}
SIDES = "xmin", "ymin", "xmax", "ymax"
ROTATED = "a rotated box; draw it upright"
ROUNDING = 1e-6  # pixels
# What reading a broken text, or one of another form, raises.
BROKEN = (ValueError, LookupError, TypeError, AttributeError, RecursionError,
          yaml.YAMLError, ElementTree.ParseError)


def refuse(wrong, reason):
    if wrong:
        raise DataError(reason)


@contextmanager
def noted(faults, where="", kinds=BROKEN):
    """Notes a fault, with where it is, and goes on."""
    try:
        yield
    except kinds as error:
        reason = " ".join(str(error).split())
        if not isinstance(error, DataError):
            reason = f"cannot be read ({type(error).__name__}: {reason})"
        faults.append(f"{where}: {reason}" if where else reason)


def xml(raw):
    """In the declared encoding, also one that Python's parser lacks."""
    head = re.match(rb"\s*<\?xml[^>]*?encoding=[\"']([\w.-]+)[^>]*>", raw)
    raw = raw[head.end():].decode(head[1].decode()) if head else raw
    return ElementTree.fromstring(raw)


def lines(path):
    """[(number, line)] without the empty ones."""
    found = enumerate(path.read_text("utf-8-sig").splitlines(), 1)
    return [(k, line.strip()) for k, line in found if line.strip()]


def number(value):
    with suppress(TypeError, ValueError, OverflowError):
        if math.isfinite(float(value)):
            return float(value)
    hint = "; write a point for the comma" if "," in str(value) else ""
    raise DataError(f"{value!r} is not a number{hint}")


def name_of(value):
    refuse(not str(value or "").strip(), "no class name")
    return " ".join(str(value).split())


# argparse calls a wrong value by these functions' names.

def class_names(text):
    """A,B of --classes"""
    return [*map(name_of, text.split(","))]


def renaming(pair):
    """OLD=NEW of --rename"""
    old, new = map(name_of, pair.split("="))
    return {old: new}


def extent(points):
    """The box round a polygon x y x y ..."""
    refuse(len(points) < 6 or len(points) % 2,
           f"{len(points)} numbers, neither a box nor a polygon")
    return min(points[::2]), min(points[1::2]), max(points[::2]), max(points[1::2])


def stem_of(name):
    """What an image is known by: its stem, be it named with or without the
    ending, by a path of either system, by an address, in any letters."""
    name = unquote(name.partition("?")[0]).strip().replace("\\", "/")
    path = Path(name.rpartition("/")[2])
    while path.suffix.lower() in IMAGE_ENDINGS:  # some have two
        path = path.with_suffix("")
    return unicodedata.normalize("NFC", path.name).casefold()


def scan(folder):
    """All files but hidden ones; links to folders are followed."""
    for path in sorted(folder.iterdir()):
        if path.name[0] != ".":
            yield from scan(path) if path.is_dir() else [path]


class Picture:
    """An image, and what is said of it. Boxes: where each stands, its class,
    x0, y0, x1, y1 in pixels from 0 on, or normalised. said: the size that its
    annotation, the file `source`, gives. size and counts, boxes by class, are
    those in OUT."""

    def __init__(self, path):
        self.path, self.id, self.splits = path, "", set()
        self.source, self.said, self.mask = None, None, None
        self.boxes, self.normalised = [], False
        self.faults, self.notes = [], Counter()
        self.size, self.counts = (0, 0), Counter()

    def annotate(self, source):
        with noted(self.faults, source):
            refuse(self.source, f"a second annotation of {self.path}, beside {self.source}")
        self.source = source

    def measure(self, width, height):
        """None or 0: the file does not say."""
        with noted(self.faults, self.source):
            size = int(number(width or 0)), int(number(height or 0))
            self.said = size if all(size) else None


class Export:
    """The files of SOURCE. `faults` concern one image or line each; `broken`
    concern more than that, so --skip-faults does not skip them."""

    def __init__(self, root, options):
        self.root, self.options, self.files = root, options, [*scan(root)]
        self.faults, self.broken, self.notes = [], [], Counter()
        self.names, self.places, self.stems = [], [], defaultdict(list)
        images = self.ending(*IMAGE_ENDINGS)
        masks = {p for p in images if p.suffix.lower() not in (*JPEG, ".jfif")
                 and MASKS.search(f"/{p.relative_to(root)}")}
        # Of an image that lies elsewhere, or without an annotation beside it.
        others = {stem_of(p.name) for p in images if p not in masks}
        beside = {(p.parent, stem_of(p.stem)) for p in self.ending(".xml", ".txt")}
        masks = {p for p in masks if stem_of(p.name) in others
                 or (p.parent, stem_of(p.name)) not in beside}
        # Without images elsewhere it is the images' own folder.
        self.masks = masks if len(masks) < len(images) else set()
        self.pictures = [Picture(p) for p in images if p not in self.masks]
        for picture in self.pictures:
            self.stems[stem_of(picture.path.name)].append(picture)

    def ending(self, *endings):
        return [p for p in self.files if p.suffix.lower() in endings]

    def named(self, *endings):
        """The files of these endings that are called like an image."""
        return [p for p in self.ending(*endings) if stem_of(p.stem) in self.stems]

    def folders(self, path):
        return path.relative_to(self.root).parts[:-1]

    def words(self, path, name=""):
        text = f"{path.relative_to(self.root)}/{name}".lower()
        return {*re.findall(r"[^/\\._]+", text)}

    def find(self, name, path):
        """The image that the file `path` calls `name`: of several, the one whose
        path differs in the fewest words from `path` and `name`. DataError if
        none is called so, or two differ as little."""
        found = self.stems.get(stem_of(name), [])
        mask = [p for p in self.masks if stem_of(p.name) == stem_of(name) and p != path]
        hint = f"; {mask[0]} is taken for a mask: rename its folder" if mask else ""
        refuse(not found, f"no image {name!r}{hint}")
        exact = name.replace("\\", "/").rpartition("/")[2]
        found = [p for p in found if p.path.name == exact] or found
        said = self.words(path, name)
        apart = [len(said ^ self.words(picture.path)) for picture in found]
        best = [p for p, count in zip(found, apart) if count == min(apart)]
        # The same words in another order: the innermost folders decide.
        inner = [*self.folders(path), *name.replace("\\", "/").split("/")[:-1]][::-1]
        alike = [len(os.path.commonprefix([inner, [*self.folders(p.path)][::-1]])) for p in best]
        best = [p for p, count in zip(best, alike) if count == max(alike)]
        refuse(len(best) > 1, f"{name!r} may be {best[0].path} or "
               f"{best[-1].path}; rename one")
        return best[0]


def read_each(export, ending, mark, parse):
    """parse(path, picture) of each file, an image's by its name. A file named
    like no image is a fault if it looks like an annotation, or is empty and
    lies beside annotations."""
    named = {*export.named(ending)}
    beside = {path.parent for path in named}
    for path in export.ending(ending):
        content = path.read_bytes()
        empty = not content.strip() and path.parent in beside
        if path in named or empty or re.match(mark, content):
            with noted(export.faults, path):
                picture = export.find(path.stem, path)
                picture.annotate(path)
                with noted(picture.faults, path):
                    parse(path, picture)


def read_voc(path, picture):
    tree = xml(path.read_bytes())
    refuse(tree.tag != "annotation", "not VOC's XML")
    picture.measure(tree.findtext("size/width"), tree.findtext("size/height"))
    # Direct children only: a <part> has a name and a box, too.
    for index, item in enumerate(tree.findall("object"), 1):
        with noted(picture.faults, where := f"{path}: object {index}"):
            name, box = name_of(item.findtext("name")), item.find("bndbox")
            angle = item.findtext("attributes/attribute[name='rotation']/value")
            rotated = item.find("robndbox") is not None
            refuse(rotated or number(angle or 0), ROTATED)
            refuse(box is None, f"{name} has no box; draw one")
            x0, y0, x1, y1 = (number(box.findtext(side)) for side in SIDES)
            # VOC counts pixels from 1 on, and includes the last.
            picture.boxes.append((where, name, (x0 - 1, y0 - 1, x1, y1)))


def read_yolo(path, picture, names):
    """class cx cy w h, or class x y x y x y ..., normalised."""
    picture.normalised = True
    for index, line in lines(path):
        with noted(picture.faults, where := f"{path}: line {index}"):
            kind, *values = map(number, line.split())
            refuse(len(values) == 5, "a sixth number, a confidence? Drop it")
            # A triangle that ends on the lower edge has 1.0 there.
            track = len(values) == 6 and line.split()[-1].isdigit() and values[-1] >= 1
            refuse(track, "a seventh number, a track's? Drop it and the confidence")
            refuse(max(values, default=0) > 2, "pixels? YOLO's are normalised")
            refuse(names and kind not in names, f"class {kind:g} has no name")
            if len(values) == 4:
                x, y, w, h = values
                box = x - w / 2, y - h / 2, x + w / 2, y + h / 2
            else:
                box = extent(values)
                picture.notes["boxes round polygons"] += 1
            picture.boxes.append((where, names.get(kind, str(kind)), box))


def yolo_names(export):
    """{index: name}, the same in every file that has names."""
    found = {}
    for path in export.files:
        with noted(export.broken, path):
            names = []
            file = path.name.lower()
            if file.endswith((".yaml", ".yml")) or file == "obj.data":
                names = names_in(path, export)
            elif file.endswith(".names") or file == "classes.txt":
                names = path.read_text("utf-8-sig").splitlines()
            if isinstance(names, list):
                names = dict(enumerate(names))
            refuse(not isinstance(names, dict), "names: no list, nor index: name")
            names = {int(index): " ".join(name.split())
                     for index, name in names.items() if name.strip()}
            refuse(len({*names.values()}) < len(names), "a name is given twice")
            first = next(iter(found), path)
            refuse(names and found.setdefault(first, names) != names,
                   f"other names than {first}; keep one of the two")
    if not found and not export.broken:
        export.broken.append(f"{export.root}: no class names; write classes.txt")
    return next(iter(found.values()), {})


def names_in(path, export):
    """Notes where YAML, or darknet's `key = value`, says that splits are."""
    raw = re.sub(rb"(?m)^(\w+) *= *", rb"\1: ", path.read_bytes())
    content = yaml.load(raw, yaml.BaseLoader)  # yes and 1 stay words
    content = content if isinstance(content, dict) else {}
    for key in content.keys() & SPLITS.keys():
        values = content[key]
        for value in values if isinstance(values, list) else [values]:
            if not isinstance(value, str):  # another tool's settings
                continue
            # ../train/images is train/images here.
            place = value.replace("\\", "/").lstrip("./")
            if place and (path.parent / place).exists():
                export.places.append((SPLITS[key], path.parent / place))
            elif place:
                export.notes[f"{key} of {path}, which is not there: {place}"] += 1
    refuse("kpt_shape" in content, "keypoints; export boxes")
    return content.get("names", []) if path.suffix.lower() != ".data" else []


def coco_files(export):
    """{path: content}, and the faults of files that cannot be read. Where there
    are instances_*.json, these alone, since COCO's own folder holds captions
    and keypoints as well."""
    found, faults = {}, []
    for path in export.ending(".json"):
        with noted(faults, path):
            content = json.loads(path.read_bytes())
            if isinstance(content, dict) and all(
                    isinstance(content.get(key), list)
                    for key in ("images", "annotations", "categories")):
                found[path] = content
    own = {p: found[p] for p in found if p.name.startswith("instances")}
    export.notes["COCO files beside instances*.json, left out"] = len(found) - len(own or found)
    return own or found, faults


def read_coco(export, path, content):
    names = {item["id"]: name_of(item["name"]) for item in content["categories"]}
    export.names += [n for n in names.values() if n not in export.names]
    entries = {}
    for index, item in enumerate(content["images"]):
        with noted(export.faults, f"{path}: images[{index}]"):
            refuse(item["id"] in entries, "a second image of its id")
            entries[item["id"]] = Picture(path)  # a missing image's boxes
            picture = export.find(item["file_name"], path)
            picture.annotate(path)
            entries[item["id"]] = picture
            picture.measure(item.get("width"), item.get("height"))
    for index, item in enumerate(content["annotations"]):
        with noted(export.faults, where := f"{path}: annotations[{index}]"):
            refuse(item["image_id"] not in entries, "no image has its image_id")
            picture = entries[item["image_id"]]
            # CVAT says so of each object that is drawn as a mask.
            crowd = item.get("iscrowd")
            if crowd and not item.get("attributes"):
                picture.notes["COCO's crowds, left out: they are background"] += 1
                continue
            picture.notes["crowds with attributes, taken for objects"] += bool(crowd)
            with noted(picture.faults, where := f"{where}, {picture.path.name}"):
                picture.notes["boxes round polygons"] += not item.get("bbox")
                picture.boxes.append((where, *coco_box(item, names)))


def coco_box(item, names):
    refuse(item["category_id"] not in names, "no category has its category_id")
    refuse((item.get("attributes") or {}).get("rotation"), ROTATED)
    name, box = names[item["category_id"]], item.get("bbox")
    parts = item.get("segmentation")
    if not box and isinstance(parts, list):
        return name, extent([number(x) for part in parts for x in part])
    refuse(not isinstance(box, list) or len(box) != 4,
           f"bbox is {box!r}, not x, y, width, height")
    x, y, w, h = map(number, box)
    return name, (x, y, x + w, y + h)


def read_annotations(export):
    """The kind that most images have; the others are counted."""
    coco, faults = coco_files(export)
    counts = {"VOC XML": len(export.named(".xml")),
              "COCO": sum(len(content["images"]) for content in coco.values()),
              "YOLO": len(export.named(".txt"))}
    export.kind = max(counts, key=counts.get)
    if not counts.pop(export.kind) or not export.pictures:
        hint = (" with VOC XML, COCO JSON or YOLO text; unpack archives"
                if export.pictures else "; add them, or unpack archives")
        raise DataError(foreign(export) or [
            *faults, f"{export.root}: no images{hint}"][0])
    for kind, count in counts.items():
        export.notes[f"annotations in {kind}, left out"] = count
    if export.kind == "VOC XML":
        read_each(export, ".xml", rb"(?s).*<annotation[\s>]", read_voc)
    elif export.kind == "YOLO":
        names = yolo_names(export)
        export.names = [*names.values()]
        read_each(export, ".txt", rb"(\xef\xbb\xbf)?\s*\d+(\s+[-\d.e]+){4}",
                  partial(read_yolo, names=names))
    else:
        export.broken += faults
        for path, content in coco.items():
            with noted(export.broken, path):
                read_coco(export, path, content)


def foreign(export):
    for path in export.ending(".xml", ".json", ".csv"):
        for tool, (mark, way_out) in FOREIGN.items():
            if re.search(mark, path.read_bytes()):
                return f"{path}: {tool}'s own form; {way_out}"


def split_of(name, beside=BESIDE):
    """train, val or test, of a name such as val2017, if its other words are
    all in `beside`; None: any."""
    parts = {*re.findall(r"[a-z]+", name.lower())}
    found = {SPLITS[part] for part in parts & SPLITS.keys()}
    fits = len(found) == 1 and (beside is None or parts <= beside)
    return found.pop() if fits else None


def lists(export):
    """[(split, list or folder)]: as data.yaml or obj.data says, or those of
    ImageSets, or any texts called so."""
    if any(split == "train" for split, _ in export.places):
        return export.places
    texts = {*export.ending(".txt")} - {*export.named(".txt")}
    for folder in ("ImageSets/Segmentation", "ImageSets/Main", ""):
        own = {p: p.stem for p in texts if str(p.parent).endswith(folder)}
        whole = "train" not in own.values()
        found = [(split_of(stem), path) for path, stem in own.items()
                 if split_of(stem) and (whole or stem != "trainval")]
        if found:
            return found
    return []


def choose(export):
    """The images of no list are left out. Without lists COCO files' names
    tell, or folders' names; without any, all are train's."""
    for split, place in lists(export):
        if place.is_dir():
            for picture in export.pictures:
                if place in picture.path.parents:
                    picture.splits.add(split)
            continue
        with noted(export.broken, place):
            for index, line in lines(place):
                with noted(export.faults, f"{place}: line {index}"):
                    export.find(line, place).splits.add(split)
    listed = set().union(*(picture.splits for picture in export.pictures))
    if not listed or export.places and listed < {*SPLITS.values()}:
        for picture in export.pictures:
            coco = export.kind == "COCO" and picture.source
            named = coco and split_of(coco.stem, None)
            folders = export.folders(picture.path) if not named else ()
            told = {named or None, *map(split_of, folders)} - {None}
            picture.splits = picture.splits or told - listed
    # After a broken list all are checked.
    chosen = [p for p in export.pictures if p.splits or export.broken]
    chosen = chosen or export.pictures
    export.notes["images in no list, left out"] = len(export.pictures) - len(chosen)
    for picture in chosen:
        picture.splits = picture.splits or {"train"}
        export.notes["images in several lists"] += len(picture.splits) > 1
    export.pictures = chosen


def give_ids(export):
    """The stem; before equal ones come the names of the image's folders."""
    taken = {}
    for picture in export.pictures:
        path, stem = picture.path, picture.path.stem
        equal = len(export.stems[stem_of(path.name)]) > 1
        picture.id = "_".join([*export.folders(path) * equal, stem])
        export.notes["ids with folders before an equal stem"] += equal
        first = taken.setdefault(picture.id, path)
        with noted(picture.faults, ascii(str(path))):
            refuse(first != path, f"{first} has the same id; rename one")
            # A narrow space is plain: macOS writes one into names of screenshots.
            plain = picture.id.replace("\u202f", " ").isprintable()
            refuse(not plain or picture.id != picture.id.strip(), "give it, and its folders, plain names")
            refuse(len(os.fsencode(picture.id)) > 200, "give it, or its folders, a shorter name")


def attach_masks(export):
    """SegmentationClassAug, SBD's, comes before the devkit's own masks."""
    for path in sorted(export.masks, key=lambda p: "Aug" not in p.parent.name):
        with noted(export.faults, path):
            picture = export.find(path.stem, path)
            if picture.mask or path.parent.name == "SegmentationObject":
                export.notes["masks of objects, second masks, left out"] += 1
            else:
                picture.mask = path
                if "train" in picture.splits:
                    picture.splits.add("masked")


def mask_colours(export):
    """{colour: label}: VOC's, or CVAT's labelmap.txt; whether the second."""
    names, colours = ["background", *export.objects], {}
    for path in [path for path in export.files if path.name == "labelmap.txt"]:
        with noted(export.broken, path):
            for _, line in lines(path):
                name, colour = line.split(":")[:2]
                if name in names:
                    code = bytes(map(int, colour.split(",")))
                    colours[int.from_bytes(code, "big")] = names.index(name)
    own = colours or dict(zip(COLOURS, range(len(names))))
    return {COLOURS[VOID]: VOID} | own, bool(colours)


def labels_of(mask, export):
    """A mask as (H, W) labels, 0, 1, ... and 255, void. Raises DataError of
    the reason alone."""
    (known, mapped), count = export.colours, len(export.objects)
    grey = mask.mode in ("1", "L") or mask.mode[0] == "I"
    if grey:
        colours = np.asarray(mask.convert("I")).astype(int) * sum(CODE)
    else:  # what is transparent is background
        rgba = np.asarray(mask.convert("RGBA")).astype(int)
        colours = rgba[..., :3] * (rgba[..., 3:] > 0) @ CODE
    found, order = np.unique(colours, return_inverse=True)
    strange = {*found.tolist()} - known.keys()
    if grey or strange and not (found % sum(CODE)).any():
        labels = found // sum(CODE)
    else:
        refuse(strange, f"the colour #{max(strange, default=0):06x} is no class's")
        labels = np.array([known[colour] for colour in found.tolist()])
    used = {*labels.tolist()}
    refuse(VOID in used <= {0, VOID} and COLOURS[VOID] not in found, "nothing "
           "but 0 and 255; is 255 the object? Labels are 1, 2, ...")
    wrong = used.difference(range(count + 1)[:VOID], [VOID])
    refuse(wrong and used <= {*LUMA}, "VOC's colours turned grey")
    refuse(wrong, f"label {min(wrong, default=0)}; valid: 0..{count}, 255")
    labels = labels.astype(np.uint8)[order].reshape(colours.shape)
    refuse(mask.mode == "P" and not mapped and (labels != np.asarray(mask)).any(),
           "a palette in another order than VOC's")
    return labels


def examine(image, most):
    """(upright size, EXIF's turn, format, picture) of an open image; picture
    is None if the file can be used as it is, but it is decoded all the same,
    to find damage."""
    refuse_dark(image)
    kind, turn, size = image.format, image.getexif().get(274), image.size
    turn = turn if turn in range(2, 9) else 1
    plain = image.mode in ("RGB", "L") and not image.has_transparency_data
    if kind in KEPT and plain and turn == 1 and max(size) <= most:
        image.draft("L", (1, 1))  # a JPEG is read in full, but faster
        image.load()
        return size, turn, kind, None
    rgb = to_rgb(image)
    return rgb.size, turn, kind, rgb


def convert(picture, export):
    """Checks an image in full. Without a fault it is written."""
    options, notes = export.options, picture.notes
    with noted(picture.faults, picture.path, DataError):
        test = picture.splits == {"test"}  # which nothing learns from
        notes["images of test without an annotation"] += test and not picture.source
        refuse(not (picture.source or test or options.empty or export.broken),
               "no annotation; --empty takes it for an image without objects")
    with noted(picture.faults, kinds=DataError):
        size, turn, kind, rgb = open_image(
            picture.path, partial(examine, most=options.max_side))
        notes["images turned upright"] += turn > 1
        notes["images without a mask"] += bool(export.masks and not picture.mask)
        boxes = upright_boxes(picture, size, turn)
        labels = picture.mask and upright_labels(picture, boxes, export, size, turn)
        if picture.faults:
            return
        scale = min(1, options.max_side / max(size))
        notes["images made smaller"] += scale < 1
        new = picture.size = tuple(max(1, round(side * scale)) for side in size)
        write_image(picture, kind, rgb, export.out)
        write_boxes(picture, boxes, np.divide(new * 2, size * 2), export)
        if picture.mask:
            labels = Image.fromarray(export.table[labels]).resize(new, 0)
            path = export.out / f"SegmentationClass/{picture.id}.png"
            write_mask(path, np.asarray(labels))


def upright_boxes(picture, size, turn):
    """[(class, box)] in pixels of the upright image, cut at its edges."""
    stored = size[::-1] if turn in TURNS else size
    said, notes, boxes = picture.said or size, picture.notes, []
    refuse(said not in (size, stored), f"{picture.source}: {said[0]} x "
           f"{said[1]} pixels, but {picture.path} has {size[0]} x {size[1]}")
    unsure = turn > 1 and said == size and picture.said in (None, stored)
    notes["of these whose boxes may be of the stored image; the upright one is "
          "assumed"] += bool(unsure and picture.boxes)
    for where, name, box in picture.boxes:
        with noted(picture.faults, f"{where}: {name}", DataError):
            scale = said if picture.normalised else (1, 1)
            x0, y0, x1, y1 = np.multiply(box, scale * 2).tolist()
            refuse(x1 < x0 or y1 < y0, "corners are swapped, or a side is negative")
            beyond = max(-x0, -y0, x1 - said[0], y1 - said[1])
            refuse(beyond > 1 + ROUNDING, f"{beyond:.6g} pixels beyond the edge")
            notes["boxes cut at the edge, at most a pixel"] += beyond > ROUNDING
            box = max(x0, 0), max(y0, 0), min(x1, said[0]), min(y1, said[1])
            refuse(min(box[2] - box[0], box[3] - box[1]) <= 1, "too small: "
                   "a pixel or less")
            boxes.append((name, box if said == size else TURNS[turn](*box, *said)))
    return boxes


def upright_labels(picture, boxes, export, size, turn):
    """(H, W) labels of SOURCE, upright; None if there is a fault."""
    mask = open_image(picture.mask, Image.Image.copy)
    if turn in TURNS and mask.size == size[::-1] != size:
        mask.getexif()[274] = turn
        mask = ImageOps.exif_transpose(mask)
    with noted(picture.faults, picture.mask, DataError):
        refuse(mask.size != size, f"{mask.width} x {mask.height} pixels, but "
               f"{picture.path} has {size[0]} x {size[1]}")
        labels = labels_of(mask, export)
        for label in {*np.unique(labels).tolist()} - {0, VOID}:
            # Outside, it is another class's label, or another image's mask.
            name, here = export.objects[label - 1], labels == label
            own = torch.tensor([box for kind, box in boxes if kind == name])
            outside = here & outside_boxes(own.reshape(-1, 4), here.shape)[0].numpy()
            checked = picture.source or picture.splits != {"test"}
            refuse(checked and not picture.faults
                   and outside.sum() > here.sum() / 2,
                   f"most of label {label} lies outside the boxes of {name}; "
                   f"labels 1, 2, ... are {', '.join(export.objects[:20])}")
        return labels


def write_image(picture, kind, rgb, out):
    """A link to the file if there is no `rgb`."""
    endings, own = KEPT.get(kind, (".png",)), picture.path.suffix
    own = own if own.lower() in endings else endings[0]
    target = out / f"JPEGImages/{picture.id}{own}"
    if rgb:
        rgb = rgb.resize(picture.size, Image.Resampling.LANCZOS)
        rgb.save(target, "JPEG" if endings == JPEG else "PNG", quality=95,
                 subsampling=0)
        return
    try:
        os.link(os.path.realpath(picture.path), target)
    except OSError:  # another disk, or one without links
        shutil.copyfile(picture.path, target)


def write_boxes(picture, boxes, scale, export):
    """The devkit's XML: pixels from 1 on, the last included."""
    content = ("<annotation>\n  <size><width>{}</width><height>{}</height>"
               "<depth>3</depth></size>\n").format(*picture.size)
    for name, box in boxes:
        final = export.final.get(name)
        if not final:
            picture.notes[f"boxes of {name}, left out"] += 1
            continue
        picture.counts[final] += 1
        box = "".join(f"<{side}>{x:.10g}</{side}>" for side, x in zip(
            SIDES, box * scale + [1, 1, 0, 0]))
        content += (f"  <object><name>{escape(final)}</name><bndbox>{box}"
                    "</bndbox></object>\n")
    path = export.out / f"Annotations/{picture.id}.xml"
    path.write_text(content + "</annotation>\n", "utf-8")


def source_classes(export):
    """SOURCE's classes in order, background among them."""
    used = {box[1] for p in export.pictures for box in p.boxes}
    names = export.names or sorted(used)
    if export.kind == "COCO":
        export.notes.update(f"category without boxes, no class: {name}"
                            for name in names if name not in used)
        return [name for name in names if name in used]
    if export.kind == "VOC XML" and used < {*VOC_CLASSES}:
        # The masks of a part of VOC count the classes that it lacks as well.
        for path in export.masks:
            with suppress(DataError):  # convert reports it
                counts = open_image(path, Image.Image.histogram)
                if len(counts) == 256 and any(counts[len(used) + 1:VOID]):
                    return [*VOC_CLASSES]
    return names


def name_classes(export, chosen, new):
    """Sets objects, SOURCE's classes but background, in label order; classes,
    OUT's; final, {class: its name in OUT}; and table, OUT's label of each of
    SOURCE's."""
    names = source_classes(export)
    final = {name: new.get(name, name) for name in names}
    unknown = {*new, *chosen} - {*names, *final.values()}
    refuse(unknown, f"--classes, --rename: no class {[*unknown][:1]}; there "
           f"are {', '.join(names)}")
    export.objects = [name for name in names if name.lower() != "background"]
    export.notes["class background left out: it is label 0"] = (
        len(names) - len(export.objects))
    export.final = {old: name for old, name in final.items()
                    if name.lower() != "background"
                    and (not chosen or {old, name} & {*chosen})}
    export.classes = [*dict.fromkeys(export.final.values())]
    refuse(len(export.classes) >= VOID, f"{export.root}: over 254 classes")
    labels = [export.classes.index(export.final[name]) + 1
              if name in export.final else 0 for name in export.objects]
    export.table = np.array([0, *labels, *[0] * 256][:256], np.uint8)
    export.table[VOID] = VOID


def prepare(source, out, options):
    """Makes OUT; returns the exit status, 0 or 2."""
    refuse(not 16 <= options.max_side <= 7000, "--max-side: 16 to 7000 pixels")
    refuse(not source.is_dir(), f"{source}: no folder; unpack an archive")
    refuse(os.path.lexists(out), f"{out}: exists already; name a new folder")
    refuse(source.resolve() in out.resolve().parents,
           f"{out}: lies in {source}, where nothing is written")
    export = Export(source, options)
    read_annotations(export)
    choose(export)
    attach_masks(export)
    give_ids(export)
    name_classes(export, options.classes, dict(ChainMap(*options.rename)))
    export.colours = mask_colours(export)
    with temporary_folder(out) as export.out:
        return fill(export, out)


def fill(export, out):
    for folder in ("JPEGImages", "Annotations", "ImageSets/Segmentation"):
        (export.out / folder).mkdir(parents=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        done = pool.map(partial(convert, export=export), export.pictures)
        [*tqdm(done, "images", len(export.pictures), False, disable=None)]
    whole = [p for p in export.pictures if not p.faults]
    faults = sum((p.faults for p in export.pictures), export.broken + export.faults)
    ids = {split: [p.id for p in whole if split in p.splits]
           for split in ("train", "val", "test", "masked")}
    print_report(export, whole, ids, faults)
    if export.broken or faults and not export.options.skip_faults:
        print(f"{out}: not written; correct the faults"
              f"{'' if export.broken else ', or give --skip-faults'}")
        return 2
    used = [split for split in ("val", "test") if ids[split]]
    hint = (f", all are in {' and '.join(used)}; rename the folder, list or JSON that is called so"
            if used and not ids["train"] else "")
    refuse(not any("train" in p.splits and p.counts for p in whole),
           f"{export.root}: no image with boxes for train{hint}")
    for split in filter(ids.get, ids):
        path = export.out / f"ImageSets/Segmentation/{split}.txt"
        path.write_text("\n".join([*ids[split], ""]), "utf-8")
    write_settings(export, ids, out)
    export.out.rename(out)
    print(f"\npython train_cls.py {shlex.quote(str(out / 'mine.yaml'))}")
    return 0


def print_report(export, whole, ids, faults):
    counts = sum((p.counts for p in whole), Counter())
    notes = sum((p.notes for p in whole), export.notes)
    notes["images without boxes"] = sum(not p.counts for p in whole)
    notes["images with faults, left out"] = len(export.pictures) - len(whole)
    sizes = sorted((p.size for p in whole), key=math.prod) or [(0, 0)]
    sizes = [f"{w} x {h}" for w, h in (sizes[0], sizes[len(sizes) // 2], sizes[-1])]
    print(f"{export.kind}: {len(whole)} images",
          *(f"{len(ids[split]):8} {split}" for split in ids),
          f"smallest, median and largest: {', '.join(sizes)}",
          f"boxes: {counts.total()}",
          *(f"{counts[name]:8} {name}" for name in export.classes),
          *(f"{count} {note}" for note, count in notes.items() if count),
          f"faults: {len(faults)}", *faults, sep="\n")


def write_settings(export, ids, out):
    """mine.yaml: configs/your_data.yaml, filled in."""
    seen = ids["masked"] and not ids["val"]
    if seen:
        print("data.val is masked.txt: images of train, so seen")
    values = {
        "name": re.sub(r"[^\w.-]|^\.", "_", out.name)[:99],
        "root": str(out.absolute()), "classes": export.classes, "train": "train",
        "val": "masked" if seen else "val" if ids["val"] else "",
        "truth": "SegmentationClass"}
    content = (ROOT / "configs/your_data.yaml").read_text("utf-8")
    for key, value in values.items():
        filled = f"  {key}: {json.dumps(value, ensure_ascii=False)}"
        line = re.search(rf"(?m)^  {key}: .*?(?=  #|$)", content)
        content = content.replace(line[0], filled, 1)
    (export.out / "mine.yaml").write_text(content, "utf-8")


def main():
    parser = argparse.ArgumentParser(description="docs/own_data.md tells more")
    add = parser.add_argument
    add("SOURCE", type=Path)
    add("OUT", type=Path, help="a new folder")
    add("--empty", action="store_true", help="no annotation means no objects")
    add("--skip-faults", action="store_true", help="leave images with faults out")
    add("--max-side", type=int, default=1000, help="pixels; 1000")
    add("--classes", type=class_names, default=[],
        help="A,B: keep these alone")
    add("--rename", type=renaming, action="append", default=[],
        help="OLD=NEW; repeatable")
    options = parser.parse_args()
    if isinstance(sys.stdout, io.TextIOWrapper):  # not in a notebook
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        sys.exit(prepare(options.SOURCE, options.OUT, options))
    except DataError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("stopped; nothing was written")


if __name__ == "__main__":
    main()
