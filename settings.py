"""The settings of every script: one dataclass for each section of a YAML
file. They are read from the defaults below, then the file, then the command
line.
"""
import difflib
import inspect
import math
import re
import reprlib
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

import datasets

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "shapes.yaml"
Numbers3 = tuple[float, float, float]
Numbers2 = tuple[float, float]


class UsageError(ValueError):
    """A fault of settings, checkpoints or the order of the stages: one line
    that says what is wrong and the way out.
    """


@dataclass
class Run:
    """Section `run`: what holds for every stage."""
    name: str = "shapes"  # results go to runs/NAME
    seed: int = 0
    device: str = "auto"  # auto: cuda if there is one, else cpu
    # bf16: autocast with fp32 weights; on a CPU it may be slower. On a GPU
    # fp32 convolutions are TF32.
    precision: Literal["fp32", "bf16"] = "fp32"
    workers: int = 2  # processes that read images; as many run the CRF
    log_every: int = 20  # iterations between lines of metrics.jsonl
    save_every: int = 100  # iterations between checkpoints
    overwrite: bool = False  # discard results made with other settings
    deterministic: bool = False  # on a GPU: repeatable, slower
    compile: bool = False  # torch.compile the backbone for training


@dataclass
class Data:
    """Section `data`."""
    root: str = "data/shapes"  # a folder in the VOC devkit's layout
    shapes: bool = False  # write the demo set to root if root is missing
    classes: tuple[str, ...] = datasets.VOC_CLASSES  # of labels 1, 2, ...
    # A list is named by its path under ImageSets, such as Main/trainval; a
    # bare name means Segmentation's, then Main's.
    train: str = "train_aug"
    val: str = "val"  # images that training never sees; may be empty
    truth: str = "SegmentationClassAug"  # true masks, under root
    masks: str = ""  # a list within train: stage 3 learns its true masks


@dataclass
class Training:
    """What stages 1 and 3 share. The defaults are the paper's."""
    # vgg16, vgg16_bn, resnet50, resnet101, resnet152, one of these three with
    # _caffe behind it, or timm/NAME
    backbone: str = "vgg16"
    width: float = 1.0  # of vgg16: a factor on every layer's channels
    dropout: float = 0.5  # of vgg16: share of the channels of fc6 and fc7
    freeze_norm: bool = True  # keep pretrained batch-norm statistics
    batch: int = 20
    crop: int = 321  # pixels, 8 k + 1
    scale: Numbers2 = (0.5, 1.5)  # of images, before the crop
    jitter: float = 0.5  # of brightness, contrast and saturation
    lr: float = 1e-3
    new_lr: float = 10.0  # factor on lr for layers that are not pretrained
    double_bias: bool = True  # biases: twice the rate, no decay, as in Caffe
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: float = 0.9  # of sgd
    decay: float = 5e-4
    warmup: int = 0  # iterations over which lr rises to its value
    poly: float = 0.9  # lr x (1 - iteration / iterations) ^ poly
    # Draw an image in proportion to 1 / the number of images that show its
    # rarest class.
    balance: bool = False


@dataclass
class TrainCls(Training):
    """Section `train_cls`: stage 1."""
    weights: str = "imagenet"  # imagenet, caffe (for vgg16), none or a file
    iterations: int = 8000
    drop_at: int = 5000  # instead of poly: lr x 0.1 from here on; 0: poly
    pooling: Literal["bap", "gap"] = "bap"  # gap: average pooling
    # Background queries come from grid x grid parts (in labels, from one).
    grid: int = 4
    bins: int = 2  # a box gives bins x bins foreground features
    # Images with no more than this share of background are average pooled.
    min_background: float = 0.125


@dataclass
class MakeLabels:
    """Section `make_labels`: stage 2."""
    # A classifier of another run, or one with the authors' layer names;
    # empty: runs/NAME/cls.pt
    weights: str = ""
    splits: tuple[str, ...] = ()  # lists; empty: data.train and data.val
    u0: bool = True  # false: the background's own activation map instead
    # Background attention below this share of its maximum counts as 0.
    threshold: float = 0.99
    # An activation map is divided by its maximum in each box, or in all.
    cam_norm: Literal["box", "class"] = "box"
    softmax: bool = True  # over {u0, u_c}; false: divided by their sum
    # What the CRF starts from: attention, the paper's {u0, u_c}; or logits,
    # the classifier's, k w_0 . f and k (w_c . f + d), w . f averaged over the
    # image at several sizes, plus s cos(f, q_c), q_c the class's mean feature.
    # With logits the four settings above change no label.
    unary: Literal["attention", "logits"] = "attention"
    logit_scale: float = 0.05  # k
    logit_bias: float = 6.0  # d
    cosine_scale: float = 1.0  # s
    sizes: tuple[float, ...] = (1.0, 1.5, 2.0)  # factors on its sides
    crf_bilateral: Numbers3 = (4.0, 55.0, 3.0)  # weight, pixels, colour
    crf_gaussian: Numbers2 = (3.0, 3.0)  # weight, pixels
    crf_iterations: int = 10  # 0: no CRF
    pictures: int = 8  # images of each list whose u0 and u_c are kept


@dataclass
class TrainSeg(Training):
    """Section `train_seg`: stage 3."""
    # imagenet, caffe (for vgg16), none, a file, or stage1: cls.pt's backbone
    weights: str = "imagenet"
    iterations: int = 23805
    drop_at: int = 0  # instead of poly: lr x 0.1 from here on; 0: poly
    # Folders of ID.png to learn from, here or under data.root: two stand
    # for Ycrf and Yret; one is learnt by cross-entropy; empty: the run's own.
    labels: tuple[str, ...] = ()
    # crf and ret are cross-entropy on one of the two.
    loss: Literal["nal", "crf", "ret", "agree", "entropy",
                  "bootstrap"] = "nal"
    gamma: float = 7.0  # of nal: how fast trust falls
    weight: float = 0.1  # lambda: of the loss where Ycrf and Yret differ
    temperature: float = 20.0  # logits are temperature x cosine
    # Images of data.val that are scored every val_every iterations and at the
    # end; the weights do not depend on it.
    val_images: int = 0
    val_every: int = 500
    keep_best: bool = False  # the best of these scores: seg_best.pt


@dataclass
class Eval:
    """Section `eval`: stage 4. The paper's final score uses scales
    [0.5, 0.75, 1, 1.5], flip and crf."""
    # A segmenter of another run, or one with the authors' layer names;
    # empty: runs/NAME/seg.pt
    weights: str = ""
    split: str = ""  # list to score; empty: data.val
    labels: str = ""  # score this folder's ID.png, not a segmenter
    # Segment these photographs instead: a file, a folder, or a path with *
    images: str = ""
    max_side: int = 1000  # pixels, to which longer photographs are reduced
    scales: tuple[float, ...] = (1.0,)  # image sizes, averaged
    flip: bool = False  # average over mirrored images, too
    crf: bool = False
    crf_bilateral: Numbers3 = (4.0, 121.0, 5.0)  # weight, pixels, colour
    crf_gaussian: Numbers2 = (3.0, 3.0)  # weight, pixels
    crf_iterations: int = 10
    panels: int = 8  # rows of panels.png; 0: none is drawn
    photos: bool = True  # false: panels.png without the images


SECTIONS = dict(run=Run, data=Data, train_cls=TrainCls,
                make_labels=MakeLabels, train_seg=TrainSeg, eval=Eval)
# The least values that can work; of a tuple, of each of its numbers.
LEAST = dict(
    seed=0, workers=0, log_every=1, save_every=1, iterations=1, batch=1,
    crop=9, width=0.01, scale=0.01, jitter=0, lr=0, new_lr=0, momentum=0,
    decay=0, warmup=0, poly=0, grid=1, bins=1, pictures=0, panels=0,
    max_side=9, val_images=0, val_every=1,
    scales=0.01, sizes=0.01, crf_bilateral=0.1, crf_gaussian=0.1,
    crf_iterations=0)
# What yaml and json raise; the last five for a tag such as !!int x, or too
# deep.
UNREADABLE = (yaml.YAMLError, ValueError, LookupError, TypeError,
              AttributeError, RecursionError)


def read(script: str, arguments: list[str]) -> SimpleNamespace:
    """Settings of every section, from [CONFIG.yaml] [section.key=value ...];
    a bare key is one of the script's own section, or of `run`.

    Returns a namespace with the names of SECTIONS, and path, the folder
    runs/NAME. Raises UsageError.
    """
    found = {name: kind() for name, kind in SECTIONS.items()}
    for argument in arguments:
        if argument.startswith("-"):
            raise UsageError(f"{argument}: settings are given as key=value; "
                             "--help lists them")
    files = [a for a in arguments if "=" not in a]
    if len(files) > 1:
        raise UsageError(f"{files[1]}: a second settings file; usage: python "
                         f"{script}.py [CONFIG.yaml] [key=value ...]")
    fill_from_file(found, Path(files[0]) if files else DEFAULT_CONFIG)
    for argument in arguments:
        if "=" in argument:
            fill_from_argument(found, script, argument)
    config = SimpleNamespace(**found, path=Path("runs") / found["run"].name)
    # data/ is data, and ~ the home folder.
    config.data.root = str(Path(config.data.root).expanduser())
    check(config)
    return config


def fill_from_file(found: dict, path: Path) -> None:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (FileNotFoundError, IsADirectoryError):
        raise UsageError(f"{path}: no such file; configs/ holds the settings "
                         "files") from None
    except UNREADABLE as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"{path}: not YAML: {reason}") from None
    if not isinstance(content, dict | None):
        raise UsageError(f"{path}: not sections of key: value")
    for section, values in (content or {}).items():
        if not isinstance(values, dict | None):
            raise UsageError(f"{path}: section {one_line(section)} is "
                             f"{reprlib.repr(values)}, not key: value")
        for key, value in (values or {}).items():
            put(found, one_line(section), one_line(key), value, str(path))


def fill_from_argument(found: dict, script: str, argument: str) -> None:
    key, _, text = argument.partition("=")
    section, _, name = key.rpartition(".")
    if not section:
        section_of = {key: section for section in ("run", script)
                      for key in get_type_hints(SECTIONS[section])}
        # Of a mistyped key: that of the nearest.
        close = difflib.get_close_matches(name[:99], section_of, 1, 0)
        section = section_of[close[0]]
    try:
        value = yaml.safe_load(text)
    except UNREADABLE:
        value = text
    if get_type_hints(SECTIONS.get(section, Run)).get(name) is str:
        value = text
    put(found, section, name, value, "command line")


def put(found: dict, section: str, key: str, value: object,
        where: str) -> None:
    """Sets one value of one section, as the type of its field."""
    if section not in SECTIONS:
        raise UsageError(f"{where}: unknown section {section}"
                         f"{nearest(section, SECTIONS)}")
    kinds = get_type_hints(SECTIONS[section])
    if key not in kinds:
        homes = [f"{name}.{key}" for name, kind in SECTIONS.items()
                 if key in get_type_hints(kind)]
        hint = nearest(key, kinds, cutoff=0.9)  # one letter off
        if not hint and homes:
            hint = f"; did you mean {' or '.join(homes)}?"
        hint = hint or nearest(key, kinds)
        raise UsageError(f"{where}: unknown setting {section}.{key}{hint}")
    try:
        setattr(found[section], key, convert(value, kinds[key]))
    except (ValueError, TypeError, OverflowError):
        raise UsageError(f"{where}: {section}.{key} is {reprlib.repr(value)},"
                         f" not {in_words(kinds[key])}") from None


def convert(value: Any, kind: type) -> object:
    """What YAML read as the type that a field asks for. Raises ValueError."""
    parts = get_args(kind)
    if get_origin(kind) is Literal and value in parts:
        return value
    if get_origin(kind) is tuple and isinstance(value, list):
        if Ellipsis in parts:
            parts = parts[:1] * len(value)
        return tuple(convert(*pair) for pair in zip(value, parts,
                                                    strict=True))
    if kind is float and not isinstance(value, bool):
        value = float(value)  # YAML 1.1 reads 1e-3 as a string
        if not math.isfinite(value):
            raise ValueError
    if type(value) is kind:
        return value
    raise ValueError


def in_words(kind: type) -> str:
    parts = get_args(kind)
    if get_origin(kind) is Literal:
        return f"one of {', '.join(parts)}"
    if get_origin(kind) is tuple:
        count = "" if Ellipsis in parts else f"{len(parts)} "
        return f"a list of {count}{'names' if str in parts else 'numbers'}"
    return {int: "an integer", float: "a number", str: "a string",
            bool: "true or false"}[kind]


def one_line(name: object) -> str:
    return " ".join(str(name).split())[:99]


def nearest(word: str, words: Iterable[str], cutoff: float = 0.4) -> str:
    close = difflib.get_close_matches(word[:99], words, 1, cutoff)
    return f"; did you mean {close[0]}?" if close else ""


def check(config: SimpleNamespace) -> None:
    """Refuses values that no stage can work with before any starts."""
    for section in SECTIONS:
        for key, least in LEAST.items():
            value = getattr(getattr(config, section), key, least)
            if min(value if isinstance(value, tuple) else [value],
                   default=-1) < least:
                raise UsageError(f"{section}.{key} is {value}, not at least "
                                 f"{least}")
    for section in ("train_cls", "train_seg"):
        s = getattr(config, section)
        if s.scale[0] > s.scale[1]:
            raise UsageError(f"{section}.scale is {s.scale}, not low, high")
        if not 0 <= s.dropout < 1:
            raise UsageError(f"{section}.dropout is {s.dropout}, not a share "
                             "under 1")
    if config.eval.crf and not config.eval.crf_iterations:
        raise UsageError("eval.crf_iterations is 0; set eval.crf=false")
    if not re.fullmatch(r"[\w-][\w.-]{0,99}", config.run.name):
        raise UsageError(f"run.name is {reprlib.repr(config.run.name)}, not "
                         "a name of letters, digits, . _ and -")


def help_text(script: str) -> str:
    """Every setting that a script reads, with its default and comment: the
    source of its dataclasses.
    """
    text = f"python {Path(sys.argv[0]).name} [CONFIG.yaml] [key=value ...]\n"
    text += f"A bare key is one of {script}, or of run. Lists are [a, b].\n"
    text += ("The defaults below hold where CONFIG.yaml, by default "
             "configs/shapes.yaml,\nsays nothing else.\n")
    for section in (script, "data", "run"):
        text += f"\n{section}\n"
        for kind in reversed(SECTIONS[section].__mro__[:-1]):
            body = inspect.getsource(kind).split('"""\n', 1)[1]
            text += body.rstrip() + "\n"
    return text.rstrip()
