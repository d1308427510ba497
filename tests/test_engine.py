"""The training loop and the scores."""
import dataclasses
import itertools
import math
from contextlib import suppress
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import datasets
import engine
import models
import runs
import settings
from settings import UsageError


def test_confusion_and_scores_by_hand():
    truth = np.array([[0, 0, 1, 1], [2, 2, 255, 255]], np.uint8)
    labels = np.array([[0, 1, 1, 255], [2, 0, 1, 0]], np.uint8)
    matrix = engine.confusion(truth, labels, 4)
    assert matrix.tolist() == [[1, 1, 0, 0, 0], [0, 1, 0, 0, 1], [1, 0, 1, 0, 0], [0, 0, 0, 0, 0]]
    result = engine.scores(matrix, ["a", "b", "c", "d"])
    # IoU: a 1 of {2 true + 1 given}; b 1 of {2 true + 1 given}; c 1 of 2; d is neither true nor given.
    assert result["iou"] == pytest.approx(dict(a=100 / 3, b=100 / 3, c=50, d=None))
    assert result["miou"] == pytest.approx((100 / 3 + 100 / 3 + 50) / 3)
    assert result["pixel_accuracy"] == pytest.approx(50) and result["mean_accuracy"] == pytest.approx(50)


def test_scores_of_21_labels_by_hand():
    """Label 2 is given but never true, so it counts; 20 * 22 is beyond a byte."""
    truth = np.array([[0, 0, 0, 1, 1], [20, 20, 255, 255, 0]], np.uint8)
    labels = np.array([[0, 0, 1, 1, 255], [20, 2, 1, 0, 0]], np.uint8)
    matrix = engine.confusion(truth, labels, 21)
    assert matrix[20, 20] == matrix[20, 2] == matrix[1, 21] == 1 and matrix[0, 0] == 3 and matrix.sum() == 8
    result = engine.scores(matrix, [str(k) for k in range(21)])
    known = {k: v for k, v in result["iou"].items() if v is not None}
    assert known == pytest.approx({"0": 75, "1": 100 / 3, "2": 0, "20": 50})
    assert result["pixel_accuracy"] == pytest.approx(62.5)
    assert result["mean_accuracy"] == pytest.approx((75 + 50 + 50) / 3)


def test_the_table_on_screen(capsys):
    box = dict(miou=60.0, iou=dict(background=60.0, cat=None), pixel_accuracy=61.0, mean_accuracy=62.0)
    crf = dict(miou=75.0, iou=dict(background=80.0, cat=70.0), pixel_accuracy=81.0, mean_accuracy=82.0)
    engine.print_scores("labels of val", dict(box=box, Ycrf=crf))
    assert capsys.readouterr().out == """
labels of val
  IoU, %               box    Ycrf
  background          60.0    80.0
  cat                    -    70.0
  mean                60.0    75.0
  pixel accuracy      61.0    81.0
  mean accuracy       62.0    82.0
"""


def test_losses_are_read_in_order_and_checked():
    unread = [(i, [str(i)], {"other": torch.tensor(0.25), "loss": torch.tensor(float(i))}) for i in (3, 4)]
    assert engine.read_values("train_cls", unread) == {"other": 0.25, "loss": 4.0}
    unread.insert(1, (9, ["a", "b"], {"other": torch.tensor(math.nan), "loss": torch.tensor(math.inf)}))
    with pytest.raises(UsageError, match="loss is inf at iteration 9, images a b;"):
        engine.read_values("train_cls", unread)


def test_learning_rate():
    s = settings.TrainSeg(iterations=100)
    assert engine.lr_factor(s, 0) == 1 and engine.lr_factor(s, 50) == pytest.approx(0.5 ** 0.9)
    s.drop_at = 60
    assert (engine.lr_factor(s, 59), engine.lr_factor(s, 60)) == (1, pytest.approx(0.1))


def test_learning_rate_rises_in_the_warm_up():
    s = settings.TrainSeg(iterations=100, warmup=4, poly=1.0)
    rises = [engine.lr_factor(s, i) / (1 - i / 100) for i in range(7)]
    assert rises == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1, 1])
    s = settings.TrainCls(iterations=100, warmup=4, drop_at=60)
    assert [engine.lr_factor(s, i) for i in (0, 59, 60)] == pytest.approx([0.2, 1, 0.1])


@pytest.mark.parametrize("name, kind", [("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)])
def test_optimizer(name, kind):
    """Both learn in the groups of the network, with the decay that is set; biases have none."""
    network = models.BoxClassifier(2, "vgg16", width=0.0625)
    s = settings.TrainCls(optimizer=name, lr=0.1, decay=0.3, new_lr=4, momentum=0.7)
    optimizer = engine.build_optimizer(network, s)
    assert type(optimizer) is kind
    assert optimizer.defaults.get("momentum", 0.7) == 0.7
    found = {(group["lr"], group["weight_decay"]) for group in optimizer.param_groups}
    assert sorted(found) == [(pytest.approx(0.4), 0.3), (pytest.approx(0.8), 0.0)]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(network.parameters()))


@pytest.mark.parametrize("loaded, setting", [(True, True), (True, False), (False, True), (False, False)])
def test_batch_normalisation_is_frozen_if_it_is_pretrained_and_shall_be(loaded, setting):
    network = models.DeepLab(3, "vgg16_bn", width=0.0625)
    network.freeze_norm = loaded
    config = settings.read("train_seg", [])
    config.device = torch.device("cpu")
    made = engine.for_training(config, settings.TrainSeg(freeze_norm=setting), network)
    trained = {m.training for m in made.modules() if isinstance(m, torch.nn.BatchNorm2d)}
    assert trained == {not (loaded and setting)}


class Tiny(torch.nn.Module):
    freeze_norm = False

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv2d(3, 1, 3)

    def parameter_groups(self, lr, decay, new_lr, double_bias):
        return [dict(params=list(self.parameters()), lr=lr, weight_decay=decay)]


class Noise(torch.utils.data.Dataset):
    def __len__(self):
        return 10

    def __getitem__(self, i):
        return {"id": str(i), "image": torch.rand(3, 9, 9)}


def train_tiny(path, losses, lr=0.1, batch=2, **run):
    config = settings.read("train_cls", ["run.workers=0", "run.save_every=2",
                                         "run.log_every=1"])
    config.device = torch.device("cpu")
    vars(config.run).update(run)
    config.path, s = path, config.train_cls
    s.iterations, s.batch, s.weights, s.lr = 7, batch, "none", lr
    torch.manual_seed(0)
    network = Tiny()
    engine.train(config, "train_cls", network, Noise(), losses, dict)
    return torch.load(path / "cls.pt", weights_only=True)["model"]


def square(network, batch):
    return {"loss": network.layer(batch["image"]).square().mean() * torch.rand(())}


def square_until(file):
    """The same, but Ctrl-C once the file exists."""
    def stop(network, batch):
        if file.exists():
            raise KeyboardInterrupt
        return square(network, batch)

    return stop


def square_until_the_sixth():
    """The same, but Ctrl-C in the sixth iteration."""
    iterations = itertools.count(1)

    def stop(network, batch):
        if next(iterations) == 6:
            raise KeyboardInterrupt
        return square(network, batch)

    return stop


def test_the_steps_are_those_of_sgd_by_hand(tmp_path):
    """Of a gradient of 1: v = 0.9 v + 1 + 5e-4 b, then b -= 0.1 (1 - i / 7)^0.9 v."""
    seen = []

    def slope(network, batch):
        seen.append(network.layer.bias.item())
        return {"loss": network.layer.bias.sum()}

    train_tiny(tmp_path, slope)
    b, v = seen[0], 0
    for i, found in enumerate(seen):
        assert found == pytest.approx(b, rel=1e-4)
        v = 0.9 * v + 1 + 5e-4 * b
        b -= 0.1 * (1 - i / 7) ** 0.9 * v


@pytest.mark.parametrize("double", [True, False])
def test_rates_and_decays_of_the_settings(double):
    """Of a network without pretrained layers: new_lr x lr; biases twice that, without decay, if double_bias."""
    network = models.BoxClassifier(2, "vgg16", width=0.0625)
    optimizer = engine.build_optimizer(network, settings.TrainCls(lr=0.1, decay=0.3, new_lr=4, double_bias=double))
    found = {(round(group["lr"], 6), group["weight_decay"]) for group in optimizer.param_groups}
    assert found == ({(0.4, 0.3), (0.8, 0.0)} if double else {(0.4, 0.3)})


def test_a_checkpoint_names_every_setting_that_decides_it(tmp_path):
    train_tiny(tmp_path, square)
    made = torch.load(tmp_path / "cls.pt", weights_only=True)["settings"]
    assert made.keys() == {f"train_cls.{field.name}" for field in dataclasses.fields(settings.TrainCls)} | {
        "data.root", "data.classes", "data.train", "run.precision", "run.seed"}


def test_balance_reaches_the_order(monkeypatch):
    config = settings.read("train_cls", ["balance=true", "iterations=50", "batch=2", "run.workers=0"])
    config.device = torch.device("cpu")
    monkeypatch.setattr(datasets, "balance_weights", lambda dataset: torch.tensor([0.0] * 9 + [1]))
    batches = engine.batches(config, config.train_cls, Noise(), 0)
    assert {name for batch in batches for name in batch["id"]} == {"9"}


@pytest.mark.parametrize("precision, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_precision_is_the_networks_and_the_weights_stay_float32(tmp_path, precision, dtype):
    seen = set()

    def losses(network, batch):
        out = network.layer(batch["image"])
        seen.add(out.dtype)
        return {"loss": out.float().square().mean()}

    weights = train_tiny(tmp_path, losses, precision=precision)
    assert seen == {dtype} and {value.dtype for value in weights.values()} == {torch.float32}


@pytest.mark.parametrize("asked", [True, False])
def test_the_backbone_is_compiled_if_it_is_asked_for(tmp_path, monkeypatch, asked):
    calls = []
    monkeypatch.setattr(Tiny, "backbone", SimpleNamespace(compile=lambda: calls.append(1)), raising=False)
    train_tiny(tmp_path, square, compile=asked)
    assert len(calls) == asked


def test_each_rank_draws_a_dropout_of_its_own(tmp_path, monkeypatch):
    drawn = []

    def draw(network, batch):
        drawn.append(torch.rand(()).item())
        return {"loss": network.layer.bias.sum()}

    for rank, seed in (0, 0), (1, 0), (2, 0), (1, 7):
        monkeypatch.setattr(runs, "rank", lambda rank=rank: rank)
        with suppress(FileNotFoundError):  # rank 0 alone writes
            train_tiny(tmp_path / f"{rank} {seed}", draw, batch=3, seed=seed)
    assert len(drawn) == len(set(drawn)) == 4 * 7


def test_more_ranks_may_go_on(tmp_path, monkeypatch):
    """One that the checkpoint knows nothing of takes up the others' iteration."""
    with pytest.raises(KeyboardInterrupt):
        train_tiny(tmp_path, square_until_the_sixth())
    monkeypatch.setattr(runs, "rank", lambda: 1)
    batches = []
    with suppress(FileNotFoundError):
        train_tiny(tmp_path, lambda network, batch: batches.append(batch) or square(network, batch))
    assert len(batches) == 3  # from iteration 4 to 7


def test_a_stopped_run_goes_on_where_it_was(tmp_path):
    whole = train_tiny(tmp_path / "whole", square)
    with pytest.raises(KeyboardInterrupt):
        train_tiny(tmp_path / "stopped", square_until_the_sixth())
    resumed = train_tiny(tmp_path / "stopped", square)
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)
    assert not (tmp_path / "stopped" / "cls.pt.partial").exists()


def test_nan_names_the_images_and_keeps_the_checkpoint(tmp_path):
    count = 0

    def losses(network, batch):
        nonlocal count
        count += 1
        return {"loss": network.layer(batch["image"]).square().mean() * (math.nan if count == 4 else 1)}

    with pytest.raises(UsageError, match="loss is nan at iteration 4, images . .;"):
        train_tiny(tmp_path, losses)
    assert not (tmp_path / "cls.pt").exists()
    saved = torch.load(tmp_path / "cls.pt.partial", weights_only=True)
    assert saved["iteration"] == 2 and all(v.isfinite().all() for v in saved["model"].values())


def test_a_nan_between_two_logs_is_not_saved(tmp_path):
    with pytest.raises(UsageError, match="loss is nan at iteration 1, images . .;"):
        train_tiny(tmp_path, lambda network, batch: {"loss": math.nan * network.layer(batch["image"]).mean()},
                   log_every=5)
    assert not list(tmp_path.glob("cls.pt*"))


def test_a_finished_run_is_left_alone_and_other_settings_are_refused(tmp_path, capsys):
    train_tiny(tmp_path, square)
    first = (tmp_path / "cls.pt").read_bytes()
    train_tiny(tmp_path, square)
    assert "finished before" in capsys.readouterr().out and (tmp_path / "cls.pt").read_bytes() == first
    with pytest.raises(UsageError, match="train_cls.lr 0.1 -> 0.2; set run.name to a new one, or over"):
        train_tiny(tmp_path, square, lr=0.2)
    assert (tmp_path / "cls.pt").read_bytes() == first
    with pytest.raises(UsageError, match="run.seed 0 -> 1; set"):
        train_tiny(tmp_path, square, seed=1)
    train_tiny(tmp_path, square, lr=0.2, overwrite=True)
    assert (tmp_path / "cls.pt").read_bytes() != first


@pytest.mark.parametrize("file, words", [("cls.pt", "finished before"), ("cls.pt.partial", "from iteration 2")])
def test_a_training_older_than_a_setting_had_its_default(tmp_path, capsys, file, words):
    """So that a new setting does not put an end to the trainings of before."""
    stop = square_until(tmp_path / file)
    with suppress(KeyboardInterrupt):
        train_tiny(tmp_path, stop)
    content = torch.load(tmp_path / file, weights_only=True)
    del content["settings"]["run.precision"]
    torch.save(content, tmp_path / file)
    with pytest.raises(UsageError, match="settings: run.precision 'fp32' -> 'bf16'; set"):
        train_tiny(tmp_path, square, precision="bf16")
    train_tiny(tmp_path, square)
    assert words in capsys.readouterr().out


def test_an_unfinished_run_with_other_settings_is_refused_or_lost(tmp_path):
    stop = square_until(tmp_path / "cls.pt.partial")
    with pytest.raises(KeyboardInterrupt):
        train_tiny(tmp_path, stop)
    with pytest.raises(UsageError, match="train_cls.lr 0.1 -> 0.2; set"):
        train_tiny(tmp_path, square, lr=0.2)
    lost = train_tiny(tmp_path, square, lr=0.2, overwrite=True)
    new = train_tiny(tmp_path / "new", square, lr=0.2)
    assert all(torch.equal(lost[k], new[k]) for k in new)


def test_what_was_to_be_overwritten_is_still_finished(tmp_path, capsys):
    """While a training of other settings, which was stopped, can go on."""
    stop = square_until(tmp_path / "cls.pt.partial")
    train_tiny(tmp_path, square)
    first = (tmp_path / "cls.pt").read_bytes()
    with pytest.raises(KeyboardInterrupt):
        train_tiny(tmp_path, stop, lr=0.2, overwrite=True)
    train_tiny(tmp_path, square)
    assert "finished before" in capsys.readouterr().out and (tmp_path / "cls.pt").read_bytes() == first
    train_tiny(tmp_path, square, lr=0.2)
    assert "resuming from iteration 2" in capsys.readouterr().out and (tmp_path / "cls.pt").read_bytes() != first


def test_the_same_command_resumes_with_overwrite_too(tmp_path, capsys):
    stop = square_until(tmp_path / "cls.pt.partial")
    train_tiny(tmp_path, square)
    with pytest.raises(KeyboardInterrupt):
        train_tiny(tmp_path, stop, lr=0.2, overwrite=True)
    train_tiny(tmp_path, square, lr=0.2, overwrite=True)
    assert "resuming from iteration 2" in capsys.readouterr().out
    train_tiny(tmp_path, square, lr=0.2, overwrite=True)
    assert "finished before" in capsys.readouterr().out


def test_a_disk_that_is_full_at_the_end_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    whole, save = train_tiny(tmp_path / "whole", square), runs.save

    def full(path, content):
        if path.name == "cls.pt":
            raise OSError(28, "No space left on device")
        save(path, content)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(runs, "save", full)
        train_tiny(tmp_path / "full", square)
    assert models.read_file(tmp_path / "full/cls.pt.partial")["iteration"] == 6
    again = train_tiny(tmp_path / "full", square)
    assert all(torch.equal(whole[k], again[k]) for k in whole)


@pytest.mark.parametrize("function, words", [
    ("load", "DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes"),
    ("set_rng_state", "DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes"),
    ("set_rng_state", "CUDA error: unspecified launch failure")])
def test_what_the_machine_lacks_does_not_ask_to_delete_a_checkpoint(tmp_path, monkeypatch, function, words):
    stop = square_until(tmp_path / "cls.pt.partial")

    def fail(*arguments, **settings):
        raise RuntimeError(words)

    with pytest.raises(KeyboardInterrupt):
        train_tiny(tmp_path, stop)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match=f"^{words}$"):
        patch.setattr(torch, function, fail)
        train_tiny(tmp_path, square)
    train_tiny(tmp_path, square)


def test_the_best_of_other_images_is_replaced(tmp_path):
    path = tmp_path / "seg_best.pt"
    for chosen, miou, kept in (("a", 50.0, 50.0), ("a", 40.0, 50.0), ("b", 30.0, 30.0)):
        engine.keep_best(path, dict(chosen=chosen, miou=miou))
        assert torch.load(path, weights_only=True)["miou"] == kept
    engine.keep_best(path, dict(chosen="b", miou=30.0, later=True))
    assert "later" not in torch.load(path, weights_only=True)  # of equals, the first stays
