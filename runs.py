"""What a run needs around its science: the start and end of a script, the
ranks of torchrun, the files under runs/NAME, and worker processes.
"""
import hashlib
import io
import json
import multiprocessing
import os
import platform
import re
import reprlib
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.queues import Queue
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, TypeVar

import torch
import torch.distributed as dist
import yaml
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

import datasets
import models
import settings
from settings import UsageError

ROOT = Path(__file__).parent
FAULTS = datasets.DataError, models.WeightsError, UsageError
MADE_BY = {"cls.pt": "train_cls.py", "seg.pt": "train_seg.py"}
event_writers: dict = {}  # folder of a stage -> TensorBoard's writer
locks: list = []  # open files that this process holds locked
AnyNetwork = TypeVar("AnyNetwork", bound=models.Network)


# ------------------------------------------------------------------- scripts

def launch(script: str, main: Callable[[SimpleNamespace], object]) -> None:
    """Calls main(config). A fault of the user's ends as one line on stderr
    and status 2, Ctrl-C as one line and 130; a fault of the machine is
    Python's own error, status 1.
    """
    arguments = sys.argv[1:]
    if {"-h", "--help"} & set(arguments):
        print(settings.help_text(script))
        return
    sys.excepthook = end_with_traceback
    # On Windows, the encoding of a file or a pipe lacks some characters.
    if isinstance(sys.stdout, io.TextIOWrapper):  # not in a notebook
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        config = settings.read(script, arguments)
        config.device = find_device(config.run.device)
        join_processes(config.device)
        if config.run.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        write_shapes(config, arguments)
        main(config)
        sys.stdout.flush()
    except FAULTS as fault:
        # A DataLoader's worker sends it inside a traceback, at its end.
        end(re.split(r"^[\w.]+Error: ", str(fault).strip(), flags=re.M)[-1], 2)
    except torch.cuda.OutOfMemoryError as error:
        end(f"{error}; a smaller batch or crop needs less", 1)
    except KeyboardInterrupt:
        end("interrupted; the same command resumes", 130)
    except BrokenPipeError:
        try:
            print(flush=True)
        except BrokenPipeError:  # what reads it has ended, such as `| head`
            os._exit(1)
        raise
    if dist.is_initialized():
        dist.destroy_process_group()


def end(line: str, status: int) -> None:
    """Ends the program with a line on stderr."""
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
    whose = f"rank {rank()}: " if dist.is_initialized() else ""
    print(f"{Path(sys.argv[0]).name}: {whose}{line}", file=sys.stderr)
    if status == 2 and not dist.is_initialized():
        sys.exit(2)
    end_now(status)


def end_with_traceback(kind, error, trace) -> None:
    """Python's own report of an error, as sys.excepthook."""
    sys.__excepthook__(kind, error, trace)
    if dist.is_initialized():
        # torchrun blames the first rank that ends. One that only lost
        # another must not be it.
        time.sleep(5)
    end_now(1)


def end_now(status: int) -> None:
    """The interpreter's own end may wait for ever, for workers that died or
    ranks that are gone.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def write_shapes(config: SimpleNamespace, arguments: list[str]) -> None:
    """Writes the demo set where the settings want it and it is missing. If
    data.root was named on the command line, it is missing by mistake; to
    segment photographs, none is needed.
    """
    named = any(a.startswith("data.root=") for a in arguments)
    missing = not Path(config.data.root).exists() and not config.eval.images
    if config.data.shapes and missing and not named and rank() == 0:
        from tools.shapes import make_shapes
        print(f"writing the shapes set to {config.data.root}")
        make_shapes(config.data.root)
    barrier()


def find_device(name: str) -> torch.device:
    """Of this process: under torchrun, each has a GPU of its own."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and torch.cuda.is_available():
        local = int(os.environ.get("LOCAL_RANK") or 0)
        gpus = torch.cuda.device_count()
        if local >= gpus:
            raise UsageError(f"local rank {local} has no GPU of its own: "
                             f"torchrun's --nproc-per-node is {gpus} at most")
        torch.cuda.set_device(local)
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError):
        raise UsageError(f"run.device: {name}: torch cannot use it here; set "
                         "auto or cpu") from None


# ------------------------------------------------------- the ranks of torchrun
# Each is one process, on one GPU. They share out batches and images; rank 0
# alone prints, and writes what is a single file.

def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def num_ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def all_ranks() -> dist.ProcessGroup | None:
    """The group for what runs over a batch; None for a single process."""
    return dist.group.WORLD if dist.is_initialized() else None


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def of_this_rank(count: int) -> range:
    """Which of `count` images this rank works on."""
    return range(count)[rank()::num_ranks()]


def samples_left(config: SimpleNamespace, dataset: Any, title: str,
                 is_done: Callable[[str], bool]) -> tqdm:
    """This rank's samples whose id is not done yet, under a bar."""
    mine = of_this_rank(len(dataset))
    left = [i for i in mine if not is_done(dataset.ids[i])]
    return bar(in_workers(config, Subset(dataset, left)), title,
               initial=len(mine) - len(left), total=len(mine))


def spread(items: Sequence, count: int) -> list:
    """`count` of the items, evenly spaced."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def join_processes(device: torch.device) -> None:
    """Under torchrun: joins the other ranks."""
    if int(os.environ.get("WORLD_SIZE") or 1) == 1:
        return
    if not {"RANK", "LOCAL_RANK"} <= set(os.environ):
        raise UsageError("WORLD_SIZE is set, but not RANK and LOCAL_RANK: "
                         "start several processes with torchrun")
    on_gpu = device.type == "cuda"
    # One rank may be hours ahead of another, while labels are made. A rank
    # that dies is noticed by torchrun at once.
    dist.init_process_group("nccl" if on_gpu else "gloo",
                            timeout=timedelta(hours=2),
                            device_id=device if on_gpu else None)
    if rank():
        sys.stdout = open(os.devnull, "w", encoding="utf-8",
                          errors="backslashreplace")


# ------------------------------------------------------- files under runs/NAME

def hold(config: SimpleNamespace) -> None:
    """Refuses a second process that would write to this run. The lock is in
    runs/NAME/lock; the system drops it when this process ends or is killed.
    """
    config.path.mkdir(parents=True, exist_ok=True)
    file = open(config.path / "lock", "a+", encoding="utf-8",
                errors="backslashreplace")
    try:
        lock(file)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        raise UsageError(f"{config.path} is in use by {file.read()}; wait "
                         "for it, or set another run.name") from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}: python "
               f"{' '.join(sys.argv)}")
    file.flush()
    locks.append(file)  # closing it would drop the lock
    datasets.remove_abandoned(config.path.rglob(".*.tmp"))


def lock(file: IO) -> None:
    """Locks a file, or raises at once if another process holds it."""
    try:
        import fcntl
    except ImportError:  # Windows, where none can read a locked byte
        import msvcrt  # so it is one far behind the text
        os.lseek(file.fileno(), 1 << 30, os.SEEK_SET)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore
    else:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def write_json(path: Path, content: dict) -> None:
    datasets.write(path, (json.dumps(content, indent=1) + "\n").encode())


def read_json(path: Path) -> dict:
    """A file of write_json; {} where there is none."""
    if not path.exists():
        return {}
    with own_file(path):
        content = json.loads(path.read_text(encoding="utf-8"))
        return content | {}  # a TypeError unless it is a dictionary


@contextmanager
def own_file(path: Path) -> Iterator[None]:
    """For a `with` block that reads and uses a file written by this program:
    content that is damaged raises UsageError, which names the file.
    """
    try:
        yield
    except settings.UNREADABLE:
        raise UsageError(f"{path}: not what this program wrote; remove "
                         "it") from None


def save(path: Path, content: dict) -> None:
    """torch.save, whole or not at all."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    datasets.write(path, buffer.getbuffer())


def digest(*paths: Path) -> str | None:
    """A hash of the files' content; None of no paths, or where the first is
    no file. Of a file of weights: as it was when it was read, since it may be
    another now.
    """
    if not paths or not paths[0].is_file():
        return None
    read = models.READ.get(os.path.abspath(paths[0]))
    if read:
        return read[:12]
    content = hashlib.sha256()
    for path in paths:
        content.update(path.read_bytes())
    return content.hexdigest()[:12]


def settings_of(config: SimpleNamespace, section: str, *others: str,
                without: Collection[str] = ()) -> dict:
    """What decides a stage's results, as section.key -> value: its own
    settings but those in `without`, the `others`, and those in common.
    """
    keys = [f"{section}.{key}" for key in asdict(getattr(config, section))
            if key not in without]
    keys += ["data.root", "data.classes", "run.precision", *others]
    values = {key: attrgetter(key)(config) for key in keys}
    return {key: list(value) if isinstance(value, tuple) else value
            for key, value in values.items()}


def made_otherwise(path: Path, before: object, now: dict,
                   overwrite: bool) -> bool:
    """Whether other settings, `before`, made what is at `path`, which is
    refused unless it may be overwritten. Those that were added to settings.py
    since then had their defaults, which must not change results.
    """
    before = before if isinstance(before, dict) else {}
    defaults = {f"{name}.{key}": list(v) if isinstance(v, tuple) else v
                for name, section in settings.SECTIONS.items()
                for key, v in asdict(section()).items()}
    before = {key: defaults[key] for key in now if key in defaults} | before
    changed = [f"{key} {reprlib.repr(before.get(key))} -> "
               f"{reprlib.repr(now.get(key))}" for key in {**before, **now}
               if before.get(key) != now.get(key)]
    if changed and not overwrite:
        raise UsageError(f"{path} was made with other settings: "
                         f"{', '.join(changed)}; set run.name to a new one, "
                         "or overwrite=true to discard it")
    return bool(changed)


def discard_outdated(config: SimpleNamespace, folder: Path, script: str,
                     made_with: dict, source: Path) -> None:
    """Empties `folder` unless the same settings and checkpoint `source` made
    what it holds. What other settings made is refused, or discarded with
    run.overwrite. A source outside runs/NAME counts as a setting; this run's
    own may be trained again, which discards without run.overwrite.
    """
    if rank() == 0:
        hold(config)
        now = {"settings": made_with, source.name: digest(source)}
        if source.parent != config.path:
            now = {"settings": made_with | {"weights": digest(source)}}
        if folder.is_symlink():  # to another disk, where its files stay
            folder = folder.resolve()
            datasets.remove_abandoned(folder.rglob(".*.tmp"))
        replace_if_changed(folder, now, config.run.overwrite)
        write_settings(config, script)
    barrier()


def replace_if_changed(folder: Path, now: dict, overwrite: bool) -> None:
    stamp = folder / "made_with.json"
    before = read_json(stamp)
    trash = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(trash, ignore_errors=True)
    if "settings" in before and not made_otherwise(
            folder, before["settings"], now["settings"], overwrite):
        before["settings"] = now["settings"]  # with those added since then
    if before == now:
        return
    if folder.is_dir():
        if not before and not overwrite and any(
                path.name[0] != "." for path in folder.iterdir()):
            raise UsageError(f"{folder} holds files but no {stamp.name}: "
                             "remove it, or set overwrite=true")
        # Renamed first: a kill must not leave some that look finished.
        folder.rename(trash)
        shutil.rmtree(trash)
    write_json(stamp, now)


def write_settings(config: SimpleNamespace, script: str) -> None:
    """runs/NAME/settings.yaml: the script's settings, those of stages that
    ran before as they were then, and a line of versions for each script; and
    index.md, what each file of the folder is. `run` and `data`, which all
    share, are those of the last training, once there was one.
    """
    index = config.path / "index.md"
    if not index.exists():
        datasets.write(index, (ROOT / "docs/run_folder.md").read_bytes())
    path = config.path / "settings.yaml"
    with own_file(path):
        before = path.read_text(encoding="utf-8") if path.exists() else ""
        earlier = (yaml.safe_load(before) or {}) | {}
    header = {line.split(":")[0]: line for line in before.splitlines()
              if line.startswith("# ")}
    now = {name: asdict(getattr(config, name)) for name in settings.SECTIONS}
    # These were meant for this once.
    now["run"]["overwrite"] = False
    now["eval"] |= dict(weights="", images="")
    current = {script, "run", "data"}
    if {"# train_cls.py", "# train_seg.py"} & header.keys() and (
            not script.startswith("train_")):
        current = {script}
    sections = {name: values if name in current
                else earlier.get(name, values)
                for name, values in now.items()}
    header[f"# {script}.py"] = f"# {script}.py: {versions()}"
    text = "\n".join([*header.values(), yaml.safe_dump(
        sections, sort_keys=False, allow_unicode=True,
        default_flow_style=None)])
    if text != before:
        datasets.write(path, text.encode())


def versions() -> str:
    """The commit of this code, and what it runs on."""
    commit = "unknown"
    with suppress(FileNotFoundError, subprocess.CalledProcessError):
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=ROOT, capture_output=True, encoding="utf-8",
            check=True).stdout.strip()
    found = [f"commit {commit}", f"Python {platform.python_version()}"]
    for package in ("torch", "torchvision", "timm", "numpy", "pydensecrf2"):
        with suppress(PackageNotFoundError):
            found.append(f"{package} {version(package)}")
    return ", ".join(found)


def log(config: SimpleNamespace, stage: str, iteration: int | None = None,
        **values: float | str) -> None:
    """Appends a line to runs/NAME/metrics.jsonl; the numbers go to
    TensorBoard, too, where it is installed.
    """
    if rank():
        return
    config.path.mkdir(parents=True, exist_ok=True)
    line: dict = dict(time=round(time.time(), 3), stage=stage)
    if iteration is not None:
        line["iteration"] = iteration
    with open(config.path / "metrics.jsonl", "ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":  # a full disk cut the last line short
                file.write(b"\n")
        file.write(json.dumps(line | values).encode() + b"\n")
    folder = (config.path / "tensorboard" / stage).resolve()
    log_tensorboard(folder, stage, iteration, values)


def log_tensorboard(folder: Path, stage: str, iteration: int | None,
                    values: dict[str, float | str]) -> None:
    """Scalars named by the words in values: eval/val/plain/miou."""
    if folder not in event_writers:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        # From this step on, what an earlier process wrote is dropped.
        event_writers[folder] = SummaryWriter(folder, purge_step=iteration)
    words = [stage, *(v for v in values.values() if isinstance(v, str))]
    for name, value in values.items():
        if not isinstance(value, str):
            event_writers[folder].add_scalar("/".join((*words, name)), value,
                                             iteration or 0)
    event_writers[folder].flush()


def read_checkpoint(path: Path) -> dict:
    """cls.pt or seg.pt of this run."""
    script = MADE_BY[path.name]
    if not path.exists():
        raise UsageError(f"{path} is missing: make it with python {script}")
    try:
        content = models.read_file(path)
    except models.WeightsError:
        content = None
    if not isinstance(content, dict):
        raise UsageError(f"{path}: not a checkpoint; delete it, then run "
                         f"python {script}")
    return content


def load_network(config: SimpleNamespace, name: str,
                 kind: type[AnyNetwork], s: settings.Training,
                 weights: str = "",
                 classes: Sequence[str] = ()) -> AnyNetwork:
    """The network in runs/NAME/cls.pt or seg.pt, in evaluation mode; or in
    the file `weights`: a checkpoint of another run, or a state dict with the
    layer names of the authors' code. That dict and the run's own checkpoint
    must be of the settings' backbone and width and of data.classes. classes:
    the network's classes to keep, as labels 1, 2, ...; by default, all.
    """
    path = Path(weights) if weights else config.path / name
    content = models.read_file(path) if weights else read_checkpoint(path)
    network: models.Network
    if not weights or isinstance(content, dict) and "network" in content:
        network = models.network_of(content, path)
    else:
        labels = len(config.data.classes) + (kind is models.DeepLab)
        network = kind(labels, s.backbone, width=s.width).eval()
        models.copy_state(network, models.state_of(content, path), path)
        network.classes = list(config.data.classes)
    here = description(network, s)
    if not weights and content["network"] != here:
        raise UsageError(f"{path}: holds the network "
                         f"{reprlib.repr(content['network'])}, but the "
                         f"settings say {here}; give all stages the same, "
                         "best in the YAML file")
    if not weights and network.classes != list(config.data.classes):
        raise UsageError(f"{path}: was trained on the classes "
                         f"{reprlib.repr(network.classes)}, not on "
                         "data.classes")
    if not isinstance(network, kind):
        raise UsageError(f"{path}: a {type(network).__name__}, not a "
                         f"{kind.__name__}, which {MADE_BY[name]} makes")
    unknown = [name for name in classes if name not in network.classes]
    if unknown:
        raise UsageError(f"{path}: does not know {', '.join(unknown)}, only "
                         f"{', '.join(network.classes)}; name the boxes so: "
                         "tools/own_data.py --rename OLD=NEW")
    if classes:
        network.keep_classes(classes)
    network.to(config.device)
    return network.to(memory_format=torch.channels_last)


def description(network: models.Network, s: settings.Training) -> dict:
    """What a checkpoint says of its network."""
    return dict(kind=type(network).__name__, backbone=s.backbone,
                width=s.width)


# ------------------------------------------------------------------- workers

def bar(iterable: Iterable, title: str, **options) -> tqdm:
    return tqdm(iterable, title, dynamic_ncols=True, disable=rank() > 0,
                **options)


def in_workers(config: SimpleNamespace, dataset: Any,
               **options) -> DataLoader:
    """torch's loader of a dataset; by default one sample at a time."""
    workers = min(config.run.workers, len(dataset))
    if "batch_sampler" not in options:
        options["batch_size"] = None
    if workers:
        batch = next(iter(options.get("batch_sampler", ())), [0])
        size = sum(value.nbytes for value in dataset[0].values()
                   if isinstance(value, torch.Tensor))
        options["prefetch_factor"] = batches_ahead(workers, len(batch) * size)
    return DataLoader(dataset, num_workers=workers,
                      worker_init_fn=begin_worker, **options)


def batches_ahead(workers: int, size: int) -> int:
    """How many batches of `size` bytes each worker may read ahead: 2, or 1
    where shared memory, through which they come, holds no more.
    """
    memory = Path("/dev/shm")
    free = shutil.disk_usage(memory).free if memory.is_dir() else sys.maxsize
    free //= int(os.environ.get("LOCAL_WORLD_SIZE") or 1)  # shared by ranks
    # Two more: the batch in use, and the next one.
    for ahead in (2, 1):
        if (ahead * workers + 2) * size <= free:
            return ahead
    raise UsageError(
        f"{memory}: {free >> 20} MB are free, but batches of {size >> 20} MB "
        f"for {workers} workers need {(workers + 2) * size >> 20} MB; start "
        "Docker with --ipc=host, or set a smaller run.workers or batch")


def begin_worker(number: int) -> None:
    """Leaves Ctrl-C to the parent: a worker stopped halfway could keep a lock
    that its parent waits for. Faults reach the parent as exceptions; that
    the parent is gone needs no traceback. A worker that cannot send a batch
    ends, since its parent would wait for it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.excepthook = lambda *error: None
    Queue._on_queue_feeder_error = staticmethod(end_worker)  # type: ignore


def end_worker(error: Exception, batch: object) -> None:
    print(f"a worker cannot send a batch: {error}", file=sys.stderr)
    end_now(1)


def follow_parent() -> None:
    """A worker ends when its parent is killed."""
    def wait_and_end():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait_and_end, daemon=True).start()


def overlap(workers: int, function: Callable,
            tasks: Iterable[tuple]) -> Iterator[tuple]:
    """Runs `function` in worker processes while `tasks` goes on.

    tasks yields pairs (kept, arguments); this yields (kept,
    function(*arguments)) in the same order. At most two tasks a worker wait,
    so memory stays flat. workers=0: in this process.
    """
    if not workers:
        for kept, arguments in tasks:
            yield kept, function(*arguments)
        return
    # Workers are spawned: a fork would copy the locks of this process's
    # threads, and its GPU. They inherit that Ctrl-C is ignored.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), follow_parent)
    for _ in range(workers):
        pool.submit(int)  # starts one
    signal.signal(signal.SIGINT, handler)
    waiting: deque = deque()
    for kept, arguments in tasks:
        waiting.append((kept, pool.submit(function, *arguments)))
        if len(waiting) > 2 * workers:
            kept, future = waiting.popleft()
            yield kept, future.result()
    for kept, future in waiting:
        yield kept, future.result()
    pool.shutdown()  # not after a worker's death: it may wait for ever
