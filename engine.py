"""What the four scripts share: settings from YAML, checkpoints, logs, and the training loop of stages 1 and 3."""
import difflib
import hashlib
import importlib
import inspect
import io
import json
import math
import multiprocessing
import os
import re
import reprlib
import shutil
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import numpy as np
import torch
import torch.distributed as dist
import yaml
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

import datasets
import models

MOST_YAML = 50_000  # characters
Some = TypeVar("Some", bound=models.Network)
LEAST = {"run.seed": 0, "run.workers": 0, "run.log_every": 1, "run.save_every": 1, "iterations": 1, "batch": 1,
         "crop": 9, "width": 0.01, "jitter": 0, "lr": 0, "new_lr": 0, "momentum": 0, "decay": 0, "poly": 0, "warmup": 0,
         "train_cls.grid": 1, "train_cls.bins": 1, "make_labels.crf_iterations": 1, "make_labels.pictures": 0,
         "eval.crf_iterations": 1, "eval.crf_margin": 0, "eval.panels": 0}
POSITIVE = {"train_cls.scale": 2, "train_seg.scale": 2, "make_labels.crf_bilateral": 3, "make_labels.crf_gaussian": 2,
            "eval.crf_bilateral": 3, "eval.crf_gaussian": 2, "eval.scales": 0}  # lists: how many numbers
DEFAULT_CONFIG = Path(__file__).parent / "configs" / "shapes.yaml"
GO_ON = "the same command goes on from there"
ANOTHER_IS_GONE = f"another rank is gone; torchrun's report names it; {GO_ON}"
SCRIPTS = ("train_cls", "make_labels", "train_seg", "eval")
event_writers: dict = {}  # of this process: folder of a stage -> TensorBoard's writer
MADE_BY = {"cls.pt": "train_cls.py", "seg.pt": "train_seg.py"}


class UsageError(ValueError):
    """A fault of settings, checkpoints or order of the stages. One line: what is wrong, and the way out."""


@dataclass
class Run:
    """Section `run` of the YAML file: what holds for every stage."""
    name: str = "shapes"  # results go to runs/NAME
    seed: int = 0
    device: str = "auto"  # auto: cuda if there is one, else cpu
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: autocast, fp32 weights. A GPU's fp32 convolutions are TF32
    workers: int = 2  # processes that read images, or that run the CRF
    log_every: int = 20  # iterations from one line of metrics.jsonl to the next
    save_every: int = 100  # iterations from one checkpoint to the next
    mean_over: list[str] = field(default_factory=list)  # also report the mean IoU over these labels
    overwrite: bool = False  # what other settings made of this stage in runs/NAME makes room
    deterministic: bool = False  # on a GPU: the same numbers each time, slower; a CPU does so anyway
    compile: bool = False  # torch.compile the backbone for training: minutes at the start, faster steps after


@dataclass
class Training:
    """Settings that stages 1 and 3 share. The defaults are the paper's."""
    backbone: str = "vgg16"  # vgg16, vgg16_bn, resnet50, resnet101, resnet152, resnet101_caffe, timm/NAME
    weights: str = "imagenet"  # imagenet, caffe (the authors', for vgg16), none, or a file
    width: float = 1.0  # of vgg16: a factor on every layer's channels
    dropout: float = 0.5  # of vgg16: share of fc6's and fc7's channels; a narrow network from scratch needs 0
    freeze_norm: bool = True  # pretrained batch normalisation keeps its statistics
    iterations: int = 8000
    batch: int = 20
    crop: int = 321  # pixels, 8 k + 1
    scale: list[float] = field(default_factory=lambda: [0.5, 1.5])  # of images, before the crop
    jitter: float = 0.5  # brightness, contrast, saturation
    lr: float = 1e-3
    new_lr: float = 10.0  # factor on lr of parameters that do not start from pretrained ones
    double_bias: bool = True  # biases at twice the rate, without decay, as in Caffe
    optimizer: Literal["sgd", "adamw"] = "sgd"  # the paper's, or one that learns faster in few iterations
    momentum: float = 0.9  # of sgd
    decay: float = 5e-4
    warmup: int = 0  # iterations over which lr rises to its value: adamw needs some
    poly: float = 0.9  # lr x (1 - iteration / iterations) ^ poly
    drop_at: int = 0  # instead of poly: lr x 0.1 from this iteration on; 0: poly
    balance: bool = False  # draw images so that rare classes come as often as frequent ones


# ---------------------------------------------------------------- settings


def nearest(word: str, words: Iterable[str]) -> str:
    return "".join(f"; did you mean {w}?" for w in difflib.get_close_matches(word[:99], words, 1, 0.4))


def convert(value, kind, key, where):
    """`value` as YAML read it -> the type that the dataclass asks for."""
    if get_origin(kind) is Literal:
        if value in get_args(kind):
            return value
        raise UsageError(f"{where}: {key} is {reprlib.repr(value)}, not one of {', '.join(map(str, get_args(kind)))}")
    if get_origin(kind) is list:
        if isinstance(value, list):
            return [convert(v, get_args(kind)[0], key, where) for v in value]
    elif kind is float and not isinstance(value, bool):
        try:
            if math.isfinite(number := float(value)):  # YAML 1.1 reads 1e-3 as a string
                return number
        except (TypeError, ValueError, OverflowError):
            pass
    elif isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    name = kind.__name__ if get_origin(kind) is None else f"list of {get_args(kind)[0].__name__}"
    raise UsageError(f"{where}: {key} is {reprlib.repr(value)}, not a {name}")


def configure(script: str, arguments: list[str]) -> SimpleNamespace:
    """Settings of every section: defaults, then the YAML file, then `key=value` arguments.

    arguments: [CONFIG.yaml] [section.key=value ...]; a bare key is one of the script's own section, or of `run`.
    Returns a namespace: run, data, train_cls, make_labels, train_seg, eval, and path, the folder runs/NAME.
    """
    sections = {"run": Run, "data": datasets.Settings}
    sections |= {name: importlib.import_module(name).Settings for name in SCRIPTS}
    found = {name: section() for name, section in sections.items()}

    def put(section, key, value, where):
        kinds = get_type_hints(sections[section])
        if key not in kinds:
            raise UsageError(f"{where}: unknown setting {section}.{key}{nearest(key, kinds)}")
        setattr(found[section], key, convert(value, kinds[key], f"{section}.{key}", where))

    for argument in arguments:
        if argument.startswith("-"):
            raise UsageError(f"{argument}: settings are given as key=value; --help lists them")
    files = [a for a in arguments if "=" not in a]
    if len(files) > 1:
        raise UsageError(f"{files[1]}: a second settings file; usage: python {script}.py [CONFIG.yaml] [key=value ...]")
    path = Path(files[0]) if files else DEFAULT_CONFIG
    for section, content in read_yaml(path).items():
        section = " ".join(str(section).split())[:99]
        if section not in sections:
            raise UsageError(f"{path}: unknown section {section}{nearest(section, sections)}")
        if not isinstance(content, dict | None):
            raise UsageError(f"{path}: section {section} is {reprlib.repr(content)}, not a list of key: value")
        for key, value in (content or {}).items():
            put(section, " ".join(str(key).split())[:99], value, path)
    for argument in arguments:
        if "=" in argument:
            key, _, text = argument.partition("=")
            section, _, name = key.rpartition(".")
            if not section:
                section = script if name in get_type_hints(sections[script]) else "run"
                if name not in get_type_hints(sections[section]):
                    section = script
            if section not in sections:
                raise UsageError(f"{argument}: unknown section {section}{nearest(section, sections)}")
            try:
                value = datasets.load_yaml(text)
            except yaml.YAMLError:
                value = text
            value = text if get_type_hints(sections[section]).get(name) is str else value
            put(section, name, value, "command line")
    if not re.fullmatch(r"[\w-][\w.-]{0,99}", found["run"].name):
        raise UsageError(f"run.name is {reprlib.repr(found['run'].name)}, not a name of letters, digits, . _ and -")
    config = SimpleNamespace(**found, path=Path("runs") / found["run"].name)
    check_values(config)
    config.device = join_processes(find_device(config.run.device))
    if config.run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as cuBLAS asks for it
        torch.use_deterministic_algorithms(True)
    names = ["background", *config.data.classes]
    for name in config.run.mean_over:
        if name not in names:
            raise UsageError(f"run.mean_over: no label {name}{nearest(name, names)}")
    named = any(a.startswith("data.root=") for a in arguments)  # then a missing folder is a slip, not a first use
    if rank() == 0 and config.data.shapes and not named and not Path(config.data.root).exists():
        print(f"writing the shapes set to {config.data.root}")
        datasets.make_shapes(config.data.root)
    wait()
    return config


def help_text(script: str) -> str:
    """Every setting that a script reads, with its default and comment: the lines of its dataclasses' own source."""
    own = importlib.import_module(script).Settings
    sections = {script: [kind for kind in reversed(own.__mro__) if kind is not object],
                "data": [datasets.Settings], "run": [Run]}
    text = [f"python {script}.py [CONFIG.yaml] [key=value ...]; a bare key is one of {script}, or of run"]
    for section, kinds in sections.items():
        fields: dict[str, list[str]] = {}
        for kind in kinds:
            name = ""
            for line in inspect.getsource(kind).splitlines():
                if found := re.match(r"    (\w+): ", line):
                    name = found[1]
                    fields[name] = [line]
                elif name and line.startswith("    #"):
                    fields[name].append(line)
        text += [f"\n{section}", *(line for lines in fields.values() for line in lines)]
    return "\n".join(text)


def find_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"run.device: {name}: {str(error).splitlines()[0]}; use auto or cpu") from None


def read_yaml(path: Path) -> dict:
    try:
        text = path.read_text()
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; configs/ holds the settings files") from None
    except ValueError:
        text = "\0"  # no text, no YAML
    if len(text) > MOST_YAML:
        raise UsageError(f"{path}: {len(text)} characters, too many for a settings file")
    try:
        content = datasets.load_yaml(text)
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: not YAML: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(content, dict | None):
        raise UsageError(f"{path}: not sections of key: value")
    return content or {}


def check_values(config: SimpleNamespace) -> None:
    """Numbers that no stage can work with are refused before any starts."""
    for key, least in LEAST.items():
        for section in [key.split(".")[0]] if "." in key else ["train_cls", "train_seg"]:
            name = key.split(".")[-1]
            value = getattr(getattr(config, section), name)
            if value < least:
                raise UsageError(f"{section}.{name} is {value}, not at least {least}")
    for key, length in POSITIVE.items():
        section, name = key.split(".")
        values = getattr(getattr(config, section), name)
        if len(values) != (length or max(len(values), 1)) or not all(v > 0 for v in values):
            raise UsageError(f"{key} is {values}, not {length or 'one or more'} numbers above 0")
    for s in (config.train_cls, config.train_seg):
        if s.batch < int(os.environ.get("WORLD_SIZE", 1)):
            raise UsageError(f"batch is {s.batch}, too few for {os.environ['WORLD_SIZE']} processes; it is the total")
        if s.scale[0] > s.scale[1] or not 0 <= s.dropout < 1:
            raise UsageError(f"scale is {s.scale}, dropout {s.dropout}: not low, high, or not a share under 1")


def run(script: str, main: Callable[[SimpleNamespace], object]) -> None:
    """A script's entry: its settings to `main`; a user's fault ends as one line on stderr and status 2."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        return print(help_text(script))
    try:
        main(configure(script, sys.argv[1:]))
    except (datasets.DataError, models.WeightsError, UsageError) as error:
        # From a DataLoader's worker the message comes wrapped in its traceback, itself last.
        stop(str(error).strip().splitlines()[-1].split("Error: ", 1)[-1], 2)
    except KeyboardInterrupt:
        stop(f"stopped; {GO_ON}", 130)
    except (OSError, EOFError, RuntimeError, MemoryError) as error:
        line = machine_fault(error)
        if line is None:
            raise
        stop(line, 1)
    if dist.is_initialized():
        dist.destroy_process_group()


def stop(line: str, status: int) -> None:
    """Ends the program with a line on stderr."""
    whose = f"rank {rank()}: " if dist.is_initialized() else ""
    print(f"{Path(sys.argv[0]).name}: {whose}{line}", file=sys.stderr, flush=True)
    if line == ANOTHER_IS_GONE:
        time.sleep(5)  # torchrun blames the first rank that it sees end: that must not be this one
    # At the interpreter's own end a pool that broke or was interrupted, or the other ranks, may wait forever; and
    # what still waits for a dead worker would say so once more, in a traceback.
    if status != 2 or dist.is_initialized():
        os._exit(status)
    sys.exit(status)


def machine_fault(error: Exception) -> str | None:
    """A line for what the machine, not the program, is at fault for; None for anything else."""
    text = str(error)
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}; what was written before is whole: {GO_ON}"
    if isinstance(error, BrokenProcessPool | ConnectionError | EOFError) or "DataLoader worker" in text:
        return f"a worker process died, perhaps for want of memory; fewer run.workers need less: {GO_ON}"
    if dist.is_initialized() and ("onnection" in text or isinstance(error, dist.DistError)):
        return ANOTHER_IS_GONE
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text:
        return "out of memory; make the batch, the crop or run.workers smaller"
    return None


# ---------------------------------------------------------------- the processes of torchrun
# Each is one rank, on one GPU. They share out batches and images; rank 0 alone speaks, and writes what is one file.


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def group() -> dist.ProcessGroup | None:
    """All of them, for what runs over a batch; None where this process is alone."""
    return dist.group.WORLD if dist.is_initialized() else None


def wait() -> None:
    """For the other ranks to come here, too."""
    if dist.is_initialized():
        dist.barrier()


def share(count: int) -> range:
    """Which of `count` images are this rank's."""
    return range(count)[rank()::processes()]


def join_processes(device: torch.device) -> torch.device:
    """Under torchrun: joins the other ranks. Returns the device of this one."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return device
    if not {"RANK", "LOCAL_RANK"} <= set(os.environ):
        raise UsageError("WORLD_SIZE is set, but not RANK and LOCAL_RANK: start several processes with torchrun")
    on_gpu = device.type == "cuda"
    if on_gpu:
        local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= gpus:
            raise UsageError(f"local rank {local} has no GPU of its own: torchrun's --nproc-per-node is {gpus} at most")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    # The time that one may be ahead of another: a rank that dies is torchrun's to notice, and at once.
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(hours=2),
                            device_id=device if on_gpu else None)
    if rank():
        sys.stdout = open(os.devnull, "w")
    return device


# ---------------------------------------------------------------- files under runs/NAME


def write_json(path: Path, content: dict) -> None:
    datasets.write(path, (json.dumps(content, indent=1) + "\n").encode())


def read_json(path: Path) -> dict:
    """A file of this program's, {} where there is none."""
    try:
        content = json.loads(path.read_text()) if path.exists() else {}
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise UsageError(f"{path}: not what this program wrote; remove it")
    return content


def save(path: Path, content: dict) -> None:
    """torch.save, whole or not at all."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    datasets.write(path, buffer.getbuffer())


def digest(*paths: Path) -> str | None:
    """What tells the content of files from another; None where the first is no file."""
    if not paths or not paths[0].is_file():
        return None
    content = hashlib.sha256()
    for path in paths:
        content.update(path.read_bytes())
    return content.hexdigest()[:12]


def made_with(config: SimpleNamespace, section: str, *others: str, without: Collection[str] = ()) -> dict:
    """What decides a stage's results, as section.key -> value: its own settings, and those in common."""
    keys = [f"{section}.{k}" for k in asdict(getattr(config, section)) if k not in without]
    keys += ["data.root", "data.classes", "run.precision", *others]
    # Only where they differ from the devkit's: of old, there were no others.
    keys += [f"data.{k}" for k in ("images", "boxes") if getattr(config.data, k) != getattr(datasets.Settings, k)]
    return {key: getattr(getattr(config, key.split(".")[0]), key.split(".")[1]) for key in keys}


def check_unchanged(path: Path, before: object, now: dict) -> None:
    """Refuses to go on with what other settings began."""
    before = before if isinstance(before, dict) else {}
    changed = [f"{k} {reprlib.repr(before.get(k))} -> {reprlib.repr(now.get(k))}"
               for k in {**before, **now} if before.get(k) != now.get(k)]
    if changed:
        raise UsageError(f"{path} was made with other settings: {', '.join(changed)}; "
                         "set run.name to a new one, or overwrite=true to lose it")


def claim(config: SimpleNamespace, folder: Path, settings: dict, source: Path) -> None:
    """Makes `folder` ready for files made with `settings` and the checkpoint `source`: what the same made before
    stays, what another checkpoint made goes, what other settings made is refused, or goes with run.overwrite.
    A source from elsewhere (`weights`) counts as a setting: it is no newer state of this run, that older files give
    way to.
    """
    if rank() == 0:
        now = {"settings": settings, source.name: digest(source)}
        if source.parent != config.path:
            now = {"settings": settings | {"weights": digest(source)}}
        make_ready(config, folder, now)
    wait()


def make_ready(config: SimpleNamespace, folder: Path, now: dict) -> None:
    stamp = folder / "made_with.json"
    before, trash = read_json(stamp), folder.with_name(f".{folder.name}.old")
    shutil.rmtree(trash, ignore_errors=True)
    if before == now:
        return
    if not config.run.overwrite:
        if "settings" in before:
            check_unchanged(folder, before["settings"], now["settings"])
        elif folder.is_dir() and any(path.name[0] != "." for path in folder.iterdir()):
            raise UsageError(f"{folder} holds files but no {stamp.name}: remove it, or set overwrite=true")
    if folder.is_dir():  # renamed first: a kill while files go must not leave some that look finished
        folder.rename(trash)
        shutil.rmtree(trash)
    write_json(stamp, now)


def log(config: SimpleNamespace, stage: str, iteration: int | None = None, **values: float | str) -> None:
    """One more line of runs/NAME/metrics.jsonl; its numbers to TensorBoard too, where that is installed."""
    if rank():
        return
    config.path.mkdir(parents=True, exist_ok=True)
    line = dict(time=round(time.time(), 3), stage=stage) | ({} if iteration is None else dict(iteration=iteration))
    with open(config.path / "metrics.jsonl", "a") as file:
        file.write(json.dumps(line | values) + "\n")
    show_tensorboard((config.path / "tensorboard" / stage).resolve(), stage, iteration, values)


def show_tensorboard(folder: Path, stage: str, iteration: int | None, values: dict[str, float | str]) -> None:
    """Scalars named by the words in values, such as train_cls/loss or eval/val/plain/miou."""
    if folder not in event_writers:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        # What a killed or renewed run repeats shows once: TensorBoard drops what the folder has from that step on.
        event_writers[folder] = SummaryWriter(folder, purge_step=iteration)
    words = [stage, *(value for value in values.values() if isinstance(value, str))]
    for name, value in values.items():
        if not isinstance(value, str):
            event_writers[folder].add_scalar("/".join((*words, name)), value, iteration or 0)
    event_writers[folder].flush()


def read_checkpoint(path: Path) -> dict:
    if not path.exists():
        raise UsageError(f"{path} is missing: make it with python {MADE_BY[path.name]}")
    try:
        content = models.read_file(path)
    except models.WeightsError:
        raise UsageError(f"{path}: not a checkpoint; delete it, then run python {MADE_BY[path.name]}") from None
    return content if isinstance(content, dict) else {}


def load_network(config: SimpleNamespace, name: str, network: Some, settings: Training, weights: str = "") -> Some:
    """runs/NAME/cls.pt or seg.pt into a network in evaluation mode, or the file `weights`: a checkpoint of another
    run, or a state dict in the names of the authors' code. A checkpoint's backbone and classes must be the settings'.
    """
    path = Path(weights) if weights else config.path / name
    content = models.read_file(path) if weights else read_checkpoint(path)
    checkpoint = content if isinstance(content, dict) else {}
    if not weights or "model" in checkpoint:
        here = dict(backbone=settings.backbone, width=settings.width)
        found, classes = checkpoint.get("network"), checkpoint.get("classes")
        if not isinstance(found, dict) or found != here:
            raise UsageError(f"{path}: holds the network {reprlib.repr(found)}, but the settings say {here}")
        if not isinstance(classes, list) or classes != config.data.classes:
            raise UsageError(f"{path}: was trained on the classes {reprlib.repr(classes)}, not on data.classes")
    try:
        network.load_state_dict(models.state_of(content, path))
    except (RuntimeError, models.WeightsError):
        way_out = f"it must be a {type(network).__name__} of {settings.backbone}" if weights else "train it anew"
        raise UsageError(f"{path}: holds other weights than its network has; {way_out}") from None
    return network.eval().to(config.device).to(memory_format=torch.channels_last)


def autocast(config: SimpleNamespace) -> torch.autocast:
    return torch.autocast(config.device.type, torch.bfloat16, enabled=config.run.precision == "bf16")


def bar(iterable: Iterable, title: str, **options) -> tqdm:
    return tqdm(iterable, title, dynamic_ncols=True, disable=rank() > 0, **options)


def open_data(config: SimpleNamespace, split: str, boxes: bool = True, **settings) -> datasets.VOCDataset:
    """The dataset of a list, from where section `data` of the settings says."""
    data = config.data
    return datasets.VOCDataset(data.root, split, data.classes, images=data.images, boxes=data.boxes if boxes else None,
                               **settings)


def read(config: SimpleNamespace, dataset: Dataset) -> DataLoader:
    """The samples of a dataset, one by one, read in worker processes."""
    return in_workers(config, dataset, batch_size=None)


def in_workers(config: SimpleNamespace, dataset: Dataset, **options) -> DataLoader:
    """torch's loader of a dataset. On Linux its worker processes are forked, as was the default before Python 3.14:
    any others would be sent the dataset, each tensor of boxes as an open file, and some 250 are allowed."""
    workers = config.run.workers
    context = "fork" if workers and sys.platform == "linux" else None
    return DataLoader(dataset, num_workers=workers, multiprocessing_context=context,
                      worker_init_fn=ignore_interrupts, **options)


def ignore_interrupts(worker: int | None = None) -> None:
    """In a process that reads images: Ctrl-C is its parent's to answer. Stopped halfway, it could keep a lock that the
    parent waits for. Its own faults go to the parent as exceptions; that the parent is gone is no news to print.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.excepthook = lambda *error: None


def start_worker() -> None:
    """In a worker process: a parent that is killed takes its workers along."""
    def follow():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def overlap(workers: int, function: Callable, tasks: Iterable[tuple]) -> Iterator[tuple]:
    """Run `function` in worker processes while `tasks` goes on.

    tasks yields pairs (kept, arguments); this yields (kept, function(*arguments)) in the same order. At most two
    tasks a worker wait, so memory stays flat. workers=0: in this process.
    """
    if not workers:
        yield from ((kept, function(*arguments)) for kept, arguments in tasks)
        return
    # spawn: a fork would copy this process's threads' locks, and its GPU.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start_worker)
    waiting: deque = deque()
    for kept, arguments in tasks:
        # Ctrl-C is this process's to answer: a worker that starts in here is born with it blocked.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        waiting.append((kept, pool.submit(function, *arguments)))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        if len(waiting) > 2 * workers:
            kept, future = waiting.popleft()
            yield kept, future.result()
    for kept, future in waiting:
        yield kept, future.result()
    pool.shutdown()  # only here: after a worker's death it may wait forever


# ---------------------------------------------------------------- scores


def true_masks(config: SimpleNamespace, split: str) -> Path | None:
    """The folder of true masks, or None where no image of the list has one."""
    folder = Path(config.data.root, config.data.truth).resolve()
    if not config.data.truth or not folder.is_dir():
        return None
    ids = datasets.find_images(config.data.root, split, config.data.images)
    return folder if any((folder / f"{name}.png").is_file() for name in ids) else None


def spread(items: Sequence, count: int) -> list:
    """`count` of the items, evenly spaced."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def confusion(truth: np.ndarray, labels: np.ndarray, num_labels: int) -> np.ndarray:
    """Pixels by true and given label: (num_labels, num_labels + 1) int64; void in the truth is left out, void in
    the given labels counts in the last column, as a mistake. Both (H, W) uint8.
    """
    known = truth != datasets.VOID
    given = np.minimum(labels[known], num_labels).astype(np.int64)
    pairs = truth[known].astype(np.int64) * (num_labels + 1) + given
    return np.bincount(pairs, minlength=num_labels * (num_labels + 1)).reshape(num_labels, num_labels + 1)


def score_folders(config: SimpleNamespace, split: str, folders: dict[str, Path]) -> dict[str, dict]:
    """Scores of label images against the truth over those images of a list that have a true mask:
    {name: folder of ID.png} -> {name: scores, and the number of these images}.
    """
    names, truth = ["background", *config.data.classes], true_masks(config, split)
    dataset = open_data(config, split, boxes=False, scored=truth,
                        masks=[truth, *(folder.resolve() for folder in folders.values())])
    matrices = {name: np.zeros((len(names), len(names) + 1), np.int64) for name in folders}
    for sample in bar(read(config, Subset(dataset, share(len(dataset)))), f"scores {split}"):
        truth, *given = sample["masks"].numpy()
        for name, labels in zip(folders, given):
            matrices[name] += confusion(truth, labels, len(names))
    if dist.is_initialized():
        for name, matrix in matrices.items():
            total = torch.from_numpy(matrix).to(config.device)
            dist.all_reduce(total)
            matrices[name] = total.cpu().numpy()
    return {name: {"images": len(dataset), **scores(matrix, names, config)} for name, matrix in matrices.items()}


def scores(matrix: np.ndarray, names: list[str], config: SimpleNamespace) -> dict:
    """Of one confusion matrix over a whole split, in per cent: IoU = right / (true + given - right) of each label,
    None where it is neither true nor given; their mean; the mean over run.mean_over; pixel and mean accuracy.
    """
    right, true = matrix.diagonal(), matrix.sum(1)
    union = true + matrix[:, :len(names)].sum(0) - right
    iou = {name: 100 * r / u if u else None for name, r, u in zip(names, right.tolist(), union.tolist())}

    def mean(values):
        values = [v for v in values if v is not None]
        return sum(values) / len(values) if values else math.nan

    result = dict(miou=mean(iou.values()), iou=iou)
    if config.run.mean_over:
        result["miou_over"] = mean(iou[name] for name in config.run.mean_over)
    result["pixel_accuracy"] = 100 * right.sum().item() / max(true.sum().item(), 1)
    result["mean_accuracy"] = mean([100 * r / t if t else None for r, t in zip(right.tolist(), true.tolist())])
    return result


def show(title: str, columns: dict[str, dict]) -> None:
    """A table on screen: columns name -> scores; IoU of each label, then the means."""
    def row(name, values):
        cells = "".join("       -" if v is None else f"{v:8.1f}" for v in values)
        print(f"  {name:<16}{cells}")

    results = list(columns.values())
    print(f"\n{title}\n  {'IoU, %':<16}" + "".join(f"{name:>8}" for name in columns))
    for name in results[0]["iou"]:
        row(name, [r["iou"][name] for r in results])
    for key, name in (("miou", "mean"), ("miou_over", "mean_over"), ("pixel_accuracy", "pixel accuracy"),
                      ("mean_accuracy", "mean accuracy")):
        if key in results[0]:
            row(name, [r[key] for r in results])


# ---------------------------------------------------------------- training


def rate(settings: Training, iteration: int) -> float:
    """Factor on the learning rate at an iteration."""
    rise = min((iteration + 1) / (settings.warmup + 1), 1)
    if settings.drop_at:
        return rise * (0.1 if iteration >= settings.drop_at else 1.0)
    return rise * (1 - iteration / settings.iterations) ** settings.poly


def build_optimizer(network: models.Network, s: Training) -> torch.optim.Optimizer:
    groups = network.parameter_groups(s.lr, s.decay, s.new_lr, s.double_bias)
    if s.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=s.lr)
    return torch.optim.SGD(groups, lr=s.lr, momentum=s.momentum)


def train(config: SimpleNamespace, script: str, settings: Training, network: models.Network,
          dataset: datasets.VOCDataset, losses: Callable, **inputs: object) -> None:
    """Train `network` and write its checkpoint (cls.pt or seg.pt).

    losses(network, batch) -> dict of scalars over the whole batch, of which each rank holds a part (see `group`),
    among them `loss`, which is minimised. Every save_every iterations
    NAME.partial holds all that the run needs to go on; where it lies, the run goes on from it. inputs: digests of the
    files that the run starts from.
    """
    path = config.path / {"train_cls": "cls.pt", "train_seg": "seg.pt"}[script]
    partial = path.with_name(f"{path.name}.partial")
    state: dict = dict(settings=made_with(config, script, "data.train", "run.seed") | inputs, iteration=0)
    if path.exists() and not partial.exists():
        before = read_checkpoint(path).get("settings", {})
        if before == state["settings"]:
            print(f"{path}: finished before with these settings; delete it to train it anew")
            return
        if not config.run.overwrite:
            check_unchanged(path, before, state["settings"])
    torch.backends.cudnn.benchmark = not config.run.deterministic  # crops are of one size
    network.freeze_norm &= settings.freeze_norm
    if not network.freeze_norm and processes() > 1 and config.device.type == "cuda":  # there is none for a CPU
        network = synchronised(network, settings.backbone)
    network = network.train().to(config.device, memory_format=torch.channels_last)
    optimizer = build_optimizer(network, settings)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: rate(settings, i))
    parts: dict = dict(model=network, optimizer=optimizer, schedule=schedule)
    if rank():
        torch.manual_seed(config.run.seed + rank())  # each draws a dropout of its own
    if partial.exists():
        resume(config, partial, state, parts)
    if config.run.compile:
        network.backbone.compile()
    # Without device_ids: with them it would move the boxes to the GPU, and wait for each.
    model = nn.parallel.DistributedDataParallel(network) if dist.is_initialized() else network

    weights = datasets.balance_weights(dataset) if settings.balance else None
    stream = datasets.Stream(dataset, settings.iterations * settings.batch, config.run.seed, weights)
    batches = [list(range(first, first + settings.batch)[rank()::processes()])
               for first in range(state["iteration"] * settings.batch, len(stream), settings.batch)]
    # A generator of its own: the loader draws from it on its start, which must not shift the dropout of a resumed run.
    loader = in_workers(config, stream, batch_sampler=batches, collate_fn=datasets.collate,
                        pin_memory=config.device.type == "cuda", generator=torch.Generator())
    progress = bar(loader, script, initial=state["iteration"], total=settings.iterations)
    unread = []  # ids and losses of iterations whose numbers have not left the device
    for iteration, batch in enumerate(progress, state["iteration"] + 1):
        batch["image"] = batch["image"].to(config.device, non_blocking=True, memory_format=torch.channels_last)
        with autocast(config):
            values = losses(model, batch)
        optimizer.zero_grad(set_to_none=True)
        values["loss"].backward()
        optimizer.step()
        schedule.step()
        unread.append((iteration, batch["id"], {k: v.detach() for k, v in values.items()}))
        logs = iteration % config.run.log_every == 0 or iteration == settings.iterations
        saves = iteration % config.run.save_every == 0 and iteration < settings.iterations
        if logs or saves:
            values = read_losses(script, unread)
            unread.clear()
        if logs:
            progress.set_postfix(loss=values["loss"], lr=f"{schedule.get_last_lr()[0]:.2g}")
            log(config, stage=script, iteration=iteration, lr=float(schedule.get_last_lr()[0]), **values)
        if saves:
            state |= dict(iteration=iteration, random=random_states(config))
            state |= {key: part.state_dict() for key, part in parts.items()}
            if rank() == 0:
                save(partial, state)

    if rank() == 0:
        save(path, dict(network=dict(backbone=settings.backbone, width=settings.width), classes=config.data.classes,
                        settings=state["settings"], model=network.state_dict()))
        partial.unlink(missing_ok=True)
    wait()
    print(f"{path}: {settings.iterations} iterations, seed {config.run.seed}")


def synchronised(network: Some, backbone: str) -> Some:
    """The network with batch normalisation over all ranks. timm's has an activation in it, which torch's way drops."""
    if backbone.startswith("timm/"):
        from timm.layers import convert_sync_batchnorm
        return convert_sync_batchnorm(network)
    return nn.SyncBatchNorm.convert_sync_batchnorm(network)


def read_losses(script: str, unread: list) -> dict[str, float]:
    """The last of these losses as numbers; all are checked. Only here does training wait for the device."""
    table = torch.stack([torch.stack([v.float() for v in values.values()]) for _, _, values in unread]).tolist()
    names = list(unread[0][2])
    for (iteration, ids, _), row in zip(unread, table):
        loss = row[names.index("loss")]
        if not math.isfinite(loss):
            raise UsageError(f"the loss is {loss} at iteration {iteration}, images {' '.join(ids)}; the last "
                             f"checkpoint is kept; try a smaller {script}.lr, with overwrite=true")
    return {name: round(value, 5) for name, value in zip(names, table[-1])}


def random_states(config: SimpleNamespace) -> list[list[torch.Tensor]]:
    """Of each rank: its CPU's generator, and its GPU's where the run is on one: dropout draws from it."""
    states = [torch.get_rng_state()]
    states += [torch.cuda.get_rng_state(config.device)] if config.device.type == "cuda" else []
    of_all = [states] * processes()
    if dist.is_initialized():
        dist.all_gather_object(of_all, states)
    return of_all


def resume(config: SimpleNamespace, partial: Path, state: dict, parts: dict) -> None:
    try:
        saved: Any = models.read_file(partial)
        if saved["settings"] != state["settings"] and config.run.overwrite:
            return
        check_unchanged(partial, saved["settings"], state["settings"])
        for key, part in parts.items():
            part.load_state_dict(saved[key])
        if rank() < len(saved["random"]):  # a run may go on with more ranks than it began with
            cpu, *gpu = saved["random"][rank()]
            torch.set_rng_state(cpu)
            for random in gpu if config.device.type == "cuda" else ():
                torch.cuda.set_rng_state(random, config.device)
    except (UsageError, torch.cuda.OutOfMemoryError):
        raise
    except models.BROKEN:
        raise UsageError(f"{partial}: cannot be read; delete it to start this stage anew") from None
    state["iteration"] = saved["iteration"]
    print(f"going on from iteration {state['iteration']} ({partial})")
