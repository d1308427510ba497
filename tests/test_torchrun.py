"""Several processes (gloo, on the CPU) give the weights, labels and scores of one; and one that dies ends them all."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import reference
import torch
from conftest import ROOT
from conftest import script as run_script
from PIL import Image

import engine
import losses
import models
import runs
import settings
from settings import UsageError
from tools.shapes import make_shapes

# Without dropout and with frozen normalisation nothing but rounding may differ. 7 crops: 2 and 3 do not divide them.
SMALL = ["train_cls.backbone=vgg16", "train_seg.backbone=vgg16", "train_cls.width=0.125", "train_seg.width=0.125",
         "train_seg.weights=stage1", "train_cls.iterations=3", "train_seg.iterations=3", "train_cls.batch=7",
         "train_seg.batch=7", "train_cls.crop=65", "train_seg.crop=65", "train_cls.lr=0.001", "train_seg.lr=0.01",
         "run.device=cpu", "run.workers=0", "run.log_every=2", "train_seg.val_images=3", "train_seg.val_every=2",
         "make_labels.crf_iterations=2", "eval.panels=0"]
STAGES = "train_cls", "make_labels", "train_seg", "eval"


def command(script, processes, *arguments):
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] * (processes > 1)
    return [sys.executable, *torchrun, str(ROOT / f"{script}.py"), *SMALL, *arguments]


def run(script, processes, folder, *arguments):
    if processes == 1:
        done = run_script(script, *SMALL, *arguments, cwd=folder)
        assert done.returncode == 0, done.stderr
        return done.stdout
    done = subprocess.run(command(script, processes, *arguments), cwd=folder, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return done.stdout


def four_stages(folder, processes):
    make_shapes(folder / "data/shapes", train=8, val=5)
    for stage in STAGES:
        (folder / f"{stage}.out").write_text(run(stage, processes, folder))
    return folder / "runs/shapes"


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    return four_stages(tmp_path_factory.mktemp("work"), 1)


@pytest.fixture(scope="module", params=[2, 3])
def folders(request, single, tmp_path_factory):
    """Folders where all four commands have run, with one process and with several."""
    return single, four_stages(tmp_path_factory.mktemp("work"), request.param)


def start_of(name, run):
    """The weights that a stage starts from."""
    torch.manual_seed(0)
    if name == "cls.pt":
        return models.BoxClassifier(6, "vgg16", width=0.125, dropout=0.0).state_dict()
    return models.DeepLab(7, "vgg16", run / "cls.pt", width=0.125, dropout=0.0).state_dict()


@pytest.mark.parametrize("name", ["cls.pt", "seg.pt"])
def test_the_weights_are_those_of_one_process(folders, name):
    """Rounding, which ReLU and the maxima of pools and NAL amplify, is about 0.1 % of the way that the weights go."""
    one, several = (torch.load(folder / name, weights_only=True)["model"] for folder in folders)
    start = start_of(name, folders[0])
    assert list(one) == list(several) == list(start)
    for key in one:
        way = (one[key] - start[key]).norm()
        assert (several[key] - one[key]).norm() <= 0.02 * way, key
    assert (one["classifier.weight"] - start["classifier.weight"]).norm() > 1e-4


@pytest.mark.parametrize("folder", ["labels/Ycrf", "labels/Yret", "predictions/plain"])
def test_the_pictures_are_those_of_one_process(folders, folder):
    """Up to pixels where two labels are equally good to six digits."""
    one, several = (run / folder for run in folders)
    names = sorted(path.name for path in one.glob("*.png"))
    assert names == sorted(path.name for path in several.glob("*.png"))
    assert len(names) == (5 if "predictions" in folder else 13)
    for name in names:
        differ = np.array(Image.open(one / name)) != np.array(Image.open(several / name))
        assert differ.mean() < 1e-3, name
    if folder != "predictions/plain":  # of a segmenter that has hardly begun
        assert len({Image.open(one / name).getextrema()[1] for name in names}) > 2


def test_the_scores_and_losses_are_those_of_one_process(folders):
    logs = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in folders]
    assert [line["stage"] for line in logs[0]] == [line["stage"] for line in logs[1]]  # one line, not one a process
    for one, several in zip(*logs):
        assert one.keys() == several.keys()
        for key in one.keys() & {"loss", "right_boxes", "right_queries", "miou", "val_miou", "Ycrf", "Yret", "box"}:
            assert several[key] == pytest.approx(one[key], rel=1e-3, abs=1e-3), (one["stage"], key)


def test_only_one_process_speaks(folders):
    said = (folders[1].parents[1] / "eval.out").read_text()
    assert said.count("segmenter on val") == 1
    for name in "eval.json", "labels/scores.json":
        one, several = (re.findall(r'"images": (\d+)', (run / name).read_text()) for run in folders)
        assert one == several and one


NAMES = "noise_aware_loss", "cross_entropy", "agreement_loss", "entropy_loss", "bootstrap_loss"


def case():
    """Four images' cosines and labels; the first agrees on a few pixels, the second on nearly all."""
    generator = torch.Generator().manual_seed(3)
    cosine = torch.rand(4, 5, 6, 7, generator=generator, dtype=torch.float64) * 2 - 1
    y_crf, y_ret = torch.randint(0, 5, (2, 4, 6, 7), generator=generator)
    agree = torch.rand(4, 6, 7, generator=generator) < torch.tensor([0.2, 0.9, 0.5, 0.7])[:, None, None]
    return cosine.requires_grad_(), y_crf, torch.where(agree, y_crf, y_ret)


def value_and_gradient(module, name, cosine, y_crf, y_ret, **options):
    labels = (y_crf,) if name == "cross_entropy" else (y_crf, y_ret)
    loss = getattr(module, name)(cosine, *labels, **options)
    (gradient,) = torch.autograd.grad(loss, cosine)
    return loss.item(), gradient


def losses_of_a_part(rank, results, meeting):
    """One of two processes: the losses of its own images, and their gradients."""
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    mine = slice(0, 1) if rank == 0 else slice(1, 4)
    part = [values.detach()[mine] for values in case()]
    part[0].requires_grad_()
    results[rank] = [value_and_gradient(losses, name, *part, group=torch.distributed.group.WORLD) for name in NAMES]
    torch.distributed.destroy_process_group()


def test_a_loss_over_a_group_is_that_of_the_whole_batch(tmp_path):
    """One image lies with the first process and three with the second, in float64; the equations are reference.py's.
    A mean of each process's own pixels would differ. DistributedDataParallel halves the sum of two gradients."""
    with torch.multiprocessing.Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(losses_of_a_part, (results, f"file://{tmp_path}/meeting"), nprocs=2)
        parts = results[0], results[1]
    for name, (loss, first), (same, second) in zip(NAMES, *parts):
        expected, gradient = value_and_gradient(reference, name, *case())
        assert loss == same == pytest.approx(expected), name
        assert torch.allclose(torch.cat((first, second)) / 2, gradient), name


class Statistics(torch.nn.Module):
    """A segmenter whose every pixel has the label that its buffer says."""

    def __init__(self, label):
        super().__init__()
        self.register_buffer("label", torch.tensor(label))

    def forward(self, images):
        maps = torch.nn.functional.one_hot(self.label, 3).float()
        return maps[None, :, None, None].expand(-1, -1, *images.shape[2:])


def score_of_a_rank(rank, results, meeting):
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    config = settings.read("train_seg", ["data.classes=[a, b]"])
    config.device = torch.device("cpu")
    image, mask = torch.zeros(3, 9, 9, dtype=torch.uint8), torch.ones(1, 9, 9, dtype=torch.uint8)
    results[rank] = engine.validate(config, Statistics(1 + rank), [dict(image=image, masks=mask)] * 2)
    torch.distributed.destroy_process_group()


def test_scores_during_the_training_are_those_of_what_is_saved(tmp_path):
    """Rank 0's network, also where each rank's batches gave it statistics of its own."""
    with torch.multiprocessing.Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(score_of_a_rank, (results, f"file://{tmp_path}/meeting"), nprocs=2)
        assert dict(results) == {0: 100, 1: 100}


def test_more_processes_than_crops(tmp_path):
    done = subprocess.run(command("train_cls", 2, "train_cls.batch=1"), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode and "batch is 1, too few for 2 processes; it is the total" in done.stderr


def ranks_of(torchrun):
    """Process ids of torchrun's ranks that live, by rank."""
    found = {}
    for pid in Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text().split():
        with suppress(FileNotFoundError, ProcessLookupError):  # it has ended
            environment = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
            found |= {int(entry[5:]): int(pid) for entry in environment if entry.startswith("RANK=")}
    return found


def begin(folder, *arguments):
    """Starts a command, and waits for its first checkpoint."""
    process = subprocess.Popen(command(*arguments), cwd=folder, text=True, stderr=subprocess.PIPE,
                               stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    end = time.monotonic() + 300
    while not (folder / "runs/shapes/cls.pt.partial").exists() and process.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.1)
    return process


@pytest.mark.parametrize("dead", [0, 1])
def test_a_rank_that_dies_is_named(tmp_path, monkeypatch, dead):
    """Killed as the kernel kills what takes too much memory: a line says which, and the checkpoint stays. torchrun
    looks so seldom here that the other rank, which loses it, could end before and be blamed."""
    monkeypatch.setenv("PET_MONITOR_INTERVAL", "1")
    make_shapes(tmp_path / "data/shapes", train=8, val=5)
    process = begin(tmp_path, "train_cls", 2, "train_cls.iterations=100000", "run.save_every=2")
    os.kill(ranks_of(process.pid)[dead], signal.SIGKILL)
    _, error = process.communicate(timeout=300)
    assert process.returncode and (tmp_path / "runs/shapes/cls.pt.partial").exists()
    assert re.search(rf"failed \(exitcode: -9\) local_rank: {dead} .*python", error)
    assert f"rank      : {dead}" in error and "Signal 9" in error  # the report after it, where machines are several


def killed(folder, *arguments):
    """Starts a training and kills it with its ranks; whether that was halfway."""
    process = begin(folder, *arguments)
    ranks = ranks_of(process.pid).values() if process.poll() is None else ()
    for pid in [process.pid, *ranks]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.communicate()
    return (folder / "runs/shapes/cls.pt.partial").exists()


def test_killed_ranks_go_on_to_the_same_weights(tmp_path):
    """With dropout, which each rank draws from a generator of its own, in crops of the same number."""
    weights = []
    for name in ("killed", "not"):
        folder = tmp_path / name
        make_shapes(folder / "data/shapes", train=8, val=5)
        arguments = ("train_cls", 2, "train_cls.iterations=12", "run.save_every=2", "train_cls.dropout=0.5",
                     "train_cls.batch=6")
        if name == "killed":
            while not killed(folder, *arguments):  # it had come to its end
                shutil.rmtree(folder / "runs")
            states = torch.load(folder / "runs/shapes/cls.pt.partial", weights_only=True)["random"]
            assert not torch.equal(states[0][0], states[1][0])
        said = run(*arguments[:2], folder, *arguments[2:])
        assert ("resuming from iteration" in said) == (name == "killed")
        weights.append(torch.load(folder / "runs/shapes/cls.pt", weights_only=True)["model"])
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())


def test_two_machines(tmp_path):
    """Two torchruns of one rank each, which meet at an address and share a folder, as on two machines; here on one."""
    make_shapes(tmp_path / "data/shapes", train=8, val=5)
    script = command("train_cls", 1)[1:]
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    meeting = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-conf=is_host=0",
               f"--rdzv-endpoint=127.0.0.1:{store.port}"]
    both = [subprocess.Popen([sys.executable, "-m", "torch.distributed.run", *meeting, *script], cwd=tmp_path,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=300) for process in both]
    assert all(process.returncode == 0 for process in both), said
    assert sum("cls.pt: 3 iterations" in out for out, _ in said) == 1
    lines = [json.loads(line) for line in (tmp_path / "runs/shapes/metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [0, 2, 3]


def test_more_processes_than_gpus(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch, "empty", lambda *size, device: SimpleNamespace(device=f"{device}:{chosen[-1]}"))
    for rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert runs.find_device("auto") == f"cuda:{rank}" and chosen[-1] == int(rank)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UsageError, match="local rank 2 has no GPU .* is 2 at most"):
        runs.find_device("cuda")


def test_several_processes_without_torchrun(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="with torchrun"):
        runs.join_processes(torch.device("cpu"))


@pytest.mark.parametrize("backbone", ["vgg16_bn", "resnet50", "timm/tf_efficientnet_lite0"])
def test_synchronised_normalisation_computes_the_same(backbone):
    """Before there are ranks to share statistics with."""
    if backbone.startswith("timm/"):
        pytest.importorskip("timm")
    torch.manual_seed(0)
    network = models.DeepLab(3, backbone, width=0.125 if backbone == "vgg16_bn" else 1.0).eval()
    image = torch.rand(1, 3, 65, 65)
    with torch.no_grad():
        before = network(image)
        network = engine.synchronised(network, backbone)
        assert any(isinstance(module, torch.nn.SyncBatchNorm) for module in network.modules())
        torch.testing.assert_close(network(image), before)
