"""The training loop of stages 1 and 3, and the scores of label images."""
import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

import datasets
import models
import runs
from settings import TrainCls, TrainSeg, UsageError

Stage = TrainCls | TrainSeg  # settings of a stage that trains


def autocast(config: SimpleNamespace) -> torch.autocast:
    return torch.autocast(config.device.type, torch.bfloat16,
                          enabled=config.run.precision == "bf16")


# ------------------------------------------------------------------ training

def train(config: SimpleNamespace, script: str, network: models.Network,
          dataset: datasets.VOCDataset, objective: Callable,
          inputs: Callable[[], dict], val: Subset | None = None) -> None:
    """Trains `network` with the settings of section `script`, train_cls or
    train_seg, and writes its checkpoint, cls.pt or seg.pt.

    objective(network, batch) -> dict of scalars over the whole batch, of
    which each rank holds a part (see runs.all_ranks): `loss`, which is
    minimised, and others to log. inputs() -> what the result depends on
    besides the settings, such as digests of files; it must not change. val:
    images with a true mask that are scored every val_every iterations and at
    the end.

    Every run.save_every iterations a file beside the checkpoint,
    cls.pt.partial or seg.pt.partial, receives all that is needed to resume;
    where it exists, the training resumes from it.
    """
    s = getattr(config, script)
    path = config.path / {"train_cls": "cls.pt", "train_seg": "seg.pt"}[script]
    partial = path.with_name(f"{path.name}.partial")
    best = path.with_stem(f"{path.stem}_best")
    inputs_before = inputs()
    made_with = inputs_before | runs.settings_of(
        config, script, "data.train", "run.seed",
        without=("val_images", "val_every", "keep_best"))
    if runs.rank() == 0:
        runs.hold(config)
    if finished_before(config, path, partial, made_with):
        return
    if s.batch < runs.num_ranks():
        raise UsageError(f"batch is {s.batch}, too few for "
                         f"{runs.num_ranks()} processes; it is the total")

    torch.backends.cudnn.benchmark = not config.run.deterministic
    network = for_training(config, s, network)
    optimizer = build_optimizer(network, s)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda iteration: lr_factor(s, iteration))
    parts: dict[str, Any] = dict(model=network, optimizer=optimizer,
                                 schedule=schedule)
    if runs.rank():  # each draws a dropout of its own
        torch.manual_seed(config.run.seed + runs.rank())
    done = resume(config, partial, made_with, parts)
    if runs.rank() == 0:
        runs.write_settings(config, script)
        if not done:
            best.unlink(missing_ok=True)  # of an earlier training
    model = compiled_and_parallel(config, network)

    def checkpoint():
        return dict(network=runs.description(network, s),
                    classes=list(config.data.classes), settings=made_with,
                    model=network.state_dict())

    progress = runs.bar(batches(config, s, dataset, done), script,
                        initial=done, total=s.iterations)
    unread = []  # (iteration, ids, values) that have not left the device
    for iteration, batch in enumerate(progress, done + 1):
        if iteration == 1:
            runs.log(config, script, 0)  # where curves.png begins
        lr = float(schedule.get_last_lr()[0])
        values = step(config, model, batch, objective, optimizer)
        schedule.step()

        unread.append((iteration, batch["id"], values))
        last = iteration == s.iterations
        validates = val and (iteration % s.val_every == 0 or last)
        logs = iteration % config.run.log_every == 0 or last or validates
        saves = iteration % config.run.save_every == 0 and not last
        if logs or saves:
            numbers = read_values(script, unread)
            unread.clear()
        if val and validates:
            miou = numbers["val_miou"] = validate(config, network, val)
            if s.keep_best and runs.rank() == 0:
                chosen = f"chosen on {len(val)} images of {config.data.val}"
                keep_best(best, checkpoint() | dict(miou=miou, chosen=chosen))
        if logs:
            progress.set_postfix(loss=numbers["loss"], lr=f"{lr:.2g}")
            runs.log(config, script, iteration, lr=lr, **numbers)
        if saves:
            random = random_states(config)
            if runs.rank() == 0:
                runs.save(partial, dict(
                    settings=made_with, iteration=iteration, random=random,
                    **{key: v.state_dict() for key, v in parts.items()}))

    if runs.rank() == 0:
        refuse_changed_inputs(inputs_before, inputs())
        runs.save(path, checkpoint())
        partial.unlink(missing_ok=True)
    runs.barrier()
    print(f"{path}: {s.iterations} iterations, seed {config.run.seed}")


def finished_before(config: SimpleNamespace, path: Path, partial: Path,
                    made_with: dict) -> bool:
    """Whether `path` is the result already; refuses one of other settings,
    unless run.overwrite discards it.
    """
    if not path.exists():
        return False
    before = runs.read_checkpoint(path).get("settings")
    # With a partial one, another training is on its way to replace it.
    overwrite = config.run.overwrite or partial.exists()
    if runs.made_otherwise(path, before, made_with, overwrite):
        return False
    print(f"{path}: finished before with these settings; delete it to train "
          "again")
    return True


def for_training(config: SimpleNamespace, s: Stage,
                 network: models.Network) -> models.Network:
    network.freeze_norm &= s.freeze_norm
    several_gpus = runs.num_ranks() > 1 and config.device.type == "cuda"
    if not network.freeze_norm and several_gpus:
        network = synchronised(network, s.backbone)
    return network.train().to(config.device,
                              memory_format=torch.channels_last)


def synchronised(network: models.Network, backbone: str) -> models.Network:
    """The network with batch normalisation over all ranks. timm's layers
    hold an activation as well, which torch's function would drop.
    """
    if backbone.startswith("timm/"):
        from timm.layers import convert_sync_batchnorm
        return convert_sync_batchnorm(network)
    return nn.SyncBatchNorm.convert_sync_batchnorm(network)


def build_optimizer(network: models.Network,
                    s: Stage) -> torch.optim.Optimizer:
    groups = network.parameter_groups(s.lr, s.decay, s.new_lr, s.double_bias)
    if s.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=s.lr)
    return torch.optim.SGD(groups, lr=s.lr, momentum=s.momentum)


def lr_factor(s: Stage, iteration: int) -> float:
    """Factor on the learning rate at an iteration."""
    rise = min((iteration + 1) / (s.warmup + 1), 1)
    if s.drop_at:
        return rise * (0.1 if iteration >= s.drop_at else 1.0)
    return rise * (1 - iteration / s.iterations) ** s.poly


def compiled_and_parallel(config: SimpleNamespace,
                          network: models.Network) -> nn.Module:
    if config.run.compile:
        network.backbone.compile()
    if not dist.is_initialized():
        return network
    # No device_ids: they would make it move the boxes to the GPU, and wait
    # for each.
    return nn.parallel.DistributedDataParallel(network)


def batches(config: SimpleNamespace, s: Stage,
            dataset: datasets.VOCDataset, done: int) -> DataLoader:
    """This rank's part of each batch, from iteration `done` on."""
    weights = datasets.balance_weights(dataset) if s.balance else None
    stream = datasets.Stream(dataset, s.iterations * s.batch,
                             config.run.seed, weights)
    indices = [range(first, first + s.batch)[runs.rank()::runs.num_ranks()]
               for first in range(done * s.batch, len(stream), s.batch)]
    # The loader draws from its generator at its start. One of its own keeps
    # a resumed run's dropout where it was.
    return runs.in_workers(config, stream, batch_sampler=indices,
                           collate_fn=datasets.collate,
                           pin_memory=config.device.type == "cuda",
                           generator=torch.Generator())


def step(config: SimpleNamespace, model: nn.Module, batch: dict,
         objective: Callable,
         optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """One iteration; returns what the objective did, without gradients."""
    batch["image"] = models.upload(batch["image"], config.device).to(
        memory_format=torch.channels_last)
    with autocast(config):
        values = objective(model, batch)
    optimizer.zero_grad(set_to_none=True)
    values["loss"].backward()
    optimizer.step()
    return {name: value.detach() for name, value in values.items()}


def read_values(script: str, unread: list) -> dict[str, float]:
    """The latest of these values as numbers; a loss that is not finite ends
    the run. Only here does training wait for the device (and in batch
    normalisation over several GPUs, which is torch's).
    """
    table = torch.stack([torch.stack([v.float() for v in values.values()])
                         for _, _, values in unread]).tolist()
    names = list(unread[0][2])
    for (iteration, ids, _), row in zip(unread, table):
        loss = row[names.index("loss")]
        if not math.isfinite(loss):
            raise UsageError(
                f"the loss is {loss} at iteration {iteration}, images "
                f"{' '.join(ids)}; the last checkpoint is kept; try a "
                f"smaller {script}.lr, with overwrite=true")
    return {name: round(v, 5) for name, v in zip(names, table[-1])}


def keep_best(path: Path, content: dict) -> None:
    """Saves a checkpoint, unless the one at `path` was chosen on the same
    images and has as high an mIoU.
    """
    before = models.read_file(path) if path.exists() else {}
    if (before.get("chosen") != content["chosen"]
            or content["miou"] > before["miou"]):
        runs.save(path, content)


def random_states(config: SimpleNamespace) -> list[list[torch.Tensor]]:
    """Of each rank: the state of its CPU's generator, and of its GPU's if the
    run is on one. Dropout draws from it.
    """
    states = [torch.get_rng_state()]
    if config.device.type == "cuda":
        states.append(torch.cuda.get_rng_state(config.device))
    of_all = [states] * runs.num_ranks()
    if dist.is_initialized():
        dist.all_gather_object(of_all, states)
    return of_all


def resume(config: SimpleNamespace, partial: Path, made_with: dict,
           parts: dict) -> int:
    """Loads `partial` into the parts, if it exists. Returns how many
    iterations are done.
    """
    if not partial.exists():
        return 0
    try:
        saved: Any = models.read_file(partial)
        if runs.made_otherwise(partial, saved["settings"], made_with,
                               config.run.overwrite):
            return 0
        for key, part in parts.items():
            part.load_state_dict(saved[key])
        if runs.rank() < len(saved["random"]):  # there may be more ranks now
            cpu, *gpu = saved["random"][runs.rank()]
            torch.set_rng_state(cpu)
            for state in gpu if config.device.type == "cuda" else ():
                torch.cuda.set_rng_state(state, config.device)
    except (UsageError, torch.cuda.OutOfMemoryError):
        raise
    except models.BROKEN as error:
        if re.search("can't allocate memory|CUDA error", str(error)):
            raise
        raise UsageError(f"{partial}: not a checkpoint of this network; "
                         "delete it to start this stage again") from None
    print(f"resuming from iteration {saved['iteration']} ({partial})")
    return saved["iteration"]


def refuse_changed_inputs(before: dict, now: dict) -> None:
    for name, value in now.items():
        if value != before[name]:
            raise UsageError(f"{name}: changed during the training; start it "
                             "again, with overwrite=true")


# -------------------------------------------------------------------- scores

def resized(image: Tensor, scale: float) -> Tensor:
    """image (3, H, W) uint8 -> (1, 3, scale H, scale W) in [0, 1]."""
    view = image[None].float() / 255
    size = [max(1, round(scale * side)) for side in image.shape[1:]]
    return F.interpolate(view, size, mode="bilinear", align_corners=False)


@torch.inference_mode()
def predict(network: models.Network, image: Tensor,
            scales: Sequence[float] = (1,), flip: bool = False) -> Tensor:
    """image (3, H, W) uint8 -> cosine maps (L, H, W), the mean over scales
    and mirror images.
    """
    size, views = image.shape[1:], []
    for scale in scales:
        view = resized(image, scale)
        if flip:
            view = torch.cat((view, view.flip(3)))
        cosine = network(view.contiguous(memory_format=torch.channels_last))
        if flip:
            cosine = torch.stack((cosine[0], cosine[1].flip(2)))
        cosine = F.interpolate(cosine, size, mode="bilinear",
                               align_corners=False)
        views.append(cosine.mean(0))
    return torch.stack(views).mean(0)


def validate(config: SimpleNamespace, network: models.Network,
             val: Subset) -> float:
    """mIoU in per cent, as eval.py's plain one, of a network in training over
    samples with their true mask. It draws no random numbers.
    """
    names = ["background", *config.data.classes]
    matrix = np.zeros((len(names), len(names) + 1), np.int64)
    if dist.is_initialized():  # the checkpoint has rank 0's statistics
        for statistic in network.buffers():
            dist.broadcast(statistic, 0)
    network.eval()
    for index in runs.of_this_rank(len(val)):
        sample = val[index]
        image = sample["image"].as_subclass(Tensor).to(config.device)
        with autocast(config):
            cosine = predict(network, image).float().cpu().numpy()
        labels = cosine.argmax(0).astype(np.uint8)
        matrix += confusion(sample["masks"][0].numpy(), labels, len(names))
    network.train()
    miou = scores(sum_over_ranks(config, matrix), names)["miou"]
    return round(miou, 5)


def method(config: SimpleNamespace) -> str:
    """What is measured, in words: plain, or what is added to it."""
    s, parts = config.eval, []
    if s.scales != (1,):
        parts.append(f"scales {' '.join(f'{v:g}' for v in s.scales)}")
    parts += ["flip"] * s.flip + ["CRF"] * s.crf
    return " + ".join(parts) or "plain"


def prediction_folder(config: SimpleNamespace) -> Path:
    """runs/NAME/predictions/METHOD; of photographs, pictures/METHOD."""
    kind = "pictures" if config.eval.images else "predictions"
    name = method(config).replace(" + ", "_").replace(" ", "_")
    return config.path / kind / name


def true_masks(config: SimpleNamespace, split: str) -> Path | None:
    """The folder of true masks, or None where no image of the list has one."""
    folder = Path(config.data.root, config.data.truth).resolve()
    ids = datasets.find_images(config.data.root, split)
    found = any((folder / f"{name}.png").is_file() for name in ids)
    return folder if found else None


def confusion(truth: np.ndarray, labels: np.ndarray,
              num_labels: int) -> np.ndarray:
    """Pixels by true and given label: (num_labels, num_labels + 1) int64.

    truth, labels: (H, W) uint8. Void in the truth is left out. Void in the
    given labels counts in the last column, as a mistake.
    """
    known = truth != datasets.VOID
    given = np.minimum(labels[known], num_labels).astype(np.int64)
    shape = num_labels, num_labels + 1
    pairs = truth[known].astype(np.int64) * shape[1] + given
    return np.bincount(pairs, minlength=shape[0] * shape[1]).reshape(shape)


def score_folders(config: SimpleNamespace, split: str,
                  folders: dict[str, Path]) -> dict[str, dict]:
    """Scores label images against the truth, over those images of a list
    that have a true mask: {name: folder of ID.png} -> {name: scores}.
    """
    names = ["background", *config.data.classes]
    truth = Path(config.data.root, config.data.truth).resolve()
    masks = [truth, *(folder.resolve() for folder in folders.values())]
    dataset = datasets.VOCDataset(
        config.data.root, split, config.data.classes, boxes=False,
        masks=masks, scored=truth)
    matrices = np.zeros((len(folders), len(names), len(names) + 1), np.int64)
    mine = Subset(dataset, runs.of_this_rank(len(dataset)))
    for sample in runs.bar(runs.in_workers(config, mine), f"scores {split}"):
        true, *given = sample["masks"].numpy()
        for matrix, labels in zip(matrices, given):
            matrix += confusion(true, labels, len(names))
    return {name: dict(images=len(dataset), **scores(matrix, names))
            for name, matrix in zip(folders, sum_over_ranks(config, matrices))}


def sum_over_ranks(config: SimpleNamespace, matrix: np.ndarray) -> np.ndarray:
    if not dist.is_initialized():
        return matrix
    total = torch.from_numpy(matrix).to(config.device)
    dist.all_reduce(total)
    return total.cpu().numpy()


def scores(matrix: np.ndarray, names: list[str]) -> dict:
    """Scores in per cent, of one confusion matrix over a whole list: miou;
    iou of each label, right / (true + given - right), None where it is
    neither true nor given; pixel and mean accuracy.
    """
    right, true = matrix.diagonal(), matrix.sum(1)
    union = true + matrix[:, :len(names)].sum(0) - right
    iou = dict(zip(names, percentages(right, union)))
    pixels = 100 * right.sum().item() / max(true.sum().item(), 1)
    return dict(miou=mean(iou.values()), iou=iou, pixel_accuracy=pixels,
                mean_accuracy=mean(percentages(right, true)))


def percentages(part: np.ndarray, whole: np.ndarray) -> list[float | None]:
    return [100 * p / w if w else None
            for p, w in zip(part.tolist(), whole.tolist())]


def mean(values: Iterable[float | None]) -> float:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else math.nan


def print_scores(title: str, columns: dict[str, dict]) -> None:
    """A table on screen, of columns name -> scores."""
    def row(name, values):
        cells = ("       -" if v is None else f"{v:8.1f}" for v in values)
        print(f"  {name:<16}{''.join(cells)}")

    results = list(columns.values())
    heads = "".join(f"{name:>8}" for name in columns)
    print(f"\n{title}\n  {'IoU, %':<16}{heads}")
    for name in results[0]["iou"]:
        row(name, [r["iou"][name] for r in results])
    for key, name in (("miou", "mean"), ("pixel_accuracy", "pixel accuracy"),
                      ("mean_accuracy", "mean accuracy")):
        row(name, [r[key] for r in results])
