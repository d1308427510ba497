"""Settings, files, scores and the training loop that the scripts share."""
import dataclasses
import math
import multiprocessing
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT

import datasets
import engine
import models


def settings(*arguments, script="train_cls"):
    return engine.configure(script, ["data.shapes=false", *arguments])


def test_defaults_then_file_then_command_line(tmp_path):
    file = tmp_path / "my.yaml"
    file.write_text("train_cls: {lr: 2e-3, batch: 7}\n")
    config = settings(str(file), "train_cls.batch=9", "run.name=other")
    assert (config.train_cls.lr, config.train_cls.batch, config.train_cls.iterations) == (2e-3, 9, 8000)
    assert str(config.path) == "runs/other"


def test_a_bare_key_is_the_scripts_own_or_of_run():
    config = settings("pooling=gap", "name=mine")
    assert (config.train_cls.pooling, config.run.name) == ("gap", "mine")


def test_values_that_look_like_numbers_stay_text():
    assert settings("run.name=7").run.name == "7"


@pytest.mark.parametrize("argument, words", [
    ("train_cls.poolng=gap", "unknown setting train_cls.poolng; did you mean pooling?"),
    ("train_csl.pooling=gap", "unknown section train_csl; did you mean train_cls?"),
    ("poling=gap", "unknown setting train_cls.poling; did you mean pooling?"),
    ("pooling=max", "train_cls.pooling is 'max', not one of bap, gap"),
    ("batch=many", "train_cls.batch is 'many', not a int"),
    ("batch=1.5", "train_cls.batch is 1.5, not a int"),
    ("balance=2", "train_cls.balance is 2, not a bool"),
    ("lr=fast", "train_cls.lr is 'fast', not a float"),
    ("scale=1", "train_cls.scale is 1, not a list of float"),
    ("balance=!!bool x", "train_cls.balance is '!!bool x', not a bool"),
    ("run.name=../x", "run.name is '../x'"),
    ("momentum=-1", "train_cls.momentum is -1.0, not at least 0"),
    ("poly=-1", "train_cls.poly is -1.0, not at least 0"),
    ("train_seg.new_lr=-1", "train_seg.new_lr is -1.0, not at least 0"),
    ("decay=-1", "train_cls.decay is -1.0, not at least 0"),
    ("eval.crf_margin=-1", "eval.crf_margin is -1.0, not at least 0"),
])
def test_bad_arguments(argument, words):
    with pytest.raises(engine.UsageError) as error:
        settings(argument)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text, words", [
    ("train_cls: {lrr: 1}", "unknown setting train_cls.lrr; did you mean lr?"),
    ("trian_cls: {lr: 1}", "unknown section trian_cls; did you mean train_cls?"),
    ("train_cls: 3", "section train_cls is 3"),
    ("[1, 2]", "not sections"),
    ("a: [", "not YAML"),
    ("run: {name: !!timestamp x}", "not YAML: a value that is not what its tag says"),
    ("run: {overwrite: !!bool x}", "not YAML: a value that is not what its tag says"),
    ("run: {seed: !!int ''}", "not YAML: a value that is not what its tag says"),
    ("train_seg: {loss: ce}", "train_seg.loss is 'ce', not one of nal, crf, ret, agree, entropy, bootstrap"),
])
def test_bad_files(tmp_path, text, words):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(engine.UsageError) as error:
        settings(str(file))
    assert words in str(error.value) and str(file) in str(error.value) and "\n" not in str(error.value)


def test_a_mistyped_folder_is_not_filled_with_shapes(tmp_path):
    engine.configure("train_cls", [f"data.root={tmp_path}/nowhere"])
    assert not (tmp_path / "nowhere").exists()


def test_no_such_settings_file():
    with pytest.raises(engine.UsageError, match="nowhere.yaml: No such file"):
        settings("nowhere.yaml")


@pytest.mark.parametrize("path", sorted(engine.DEFAULT_CONFIG.parent.glob("*.yaml")), ids=lambda path: path.name)
def test_every_settings_file_is_valid(path):
    settings(str(path))


def test_confusion_and_scores_by_hand():
    truth = np.array([[0, 0, 1, 1], [2, 2, 255, 255]], np.uint8)
    labels = np.array([[0, 1, 1, 255], [2, 0, 1, 0]], np.uint8)
    matrix = engine.confusion(truth, labels, 4)
    assert matrix.tolist() == [[1, 1, 0, 0, 0], [0, 1, 0, 0, 1], [1, 0, 1, 0, 0], [0, 0, 0, 0, 0]]
    config = settings()
    config.run.mean_over = ["a", "c"]
    result = engine.scores(matrix, ["a", "b", "c", "d"], config)
    # IoU: a 1 of {2 true + 1 given}; b 1 of {2 true + 1 given}; c 1 of 2; d is neither true nor given.
    assert result["iou"] == pytest.approx(dict(a=100 / 3, b=100 / 3, c=50, d=None))
    assert result["miou"] == pytest.approx((100 / 3 + 100 / 3 + 50) / 3)
    assert result["miou_over"] == pytest.approx((100 / 3 + 50) / 2)
    assert result["pixel_accuracy"] == pytest.approx(50) and result["mean_accuracy"] == pytest.approx(50)


def test_losses_are_read_in_order_and_checked():
    unread = [(i, [str(i)], {"other": torch.tensor(0.25), "loss": torch.tensor(float(i))}) for i in (3, 4)]
    assert engine.read_losses("train_cls", unread) == {"other": 0.25, "loss": 4.0}
    unread.insert(1, (9, ["a", "b"], {"other": torch.tensor(math.nan), "loss": torch.tensor(math.inf)}))
    with pytest.raises(engine.UsageError, match="loss is inf at iteration 9, images a b;"):
        engine.read_losses("train_cls", unread)


def slow_square(x):
    return x * x


@pytest.mark.parametrize("workers", [0, 2])
def test_overlap_keeps_the_order(workers):
    asked = []

    def tasks():
        for k in range(12):
            asked.append(k)
            yield k, (k,)

    results = engine.overlap(workers, slow_square, tasks())
    assert next(results) == (0, 0)
    assert len(asked) <= 2 * max(workers, 1) + 1  # it does not run ahead of its consumer
    assert list(results) == [(k, k * k) for k in range(1, 12)]


@pytest.mark.parametrize("script", ["train_cls", "make_labels", "train_seg", "eval"])
def test_help_names_every_setting_once_with_its_default_and_comment(script):
    done = subprocess.run([sys.executable, ROOT / f"{script}.py", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr
    _, *sections = done.stdout.split("\n\n")
    for text, kind in zip(sections, (__import__(script).Settings, datasets.Settings, engine.Run), strict=True):
        lines = {line.split(":")[0].strip(): line for line in text.splitlines()[1:] if not line.startswith("    #")}
        assert len(text.splitlines()) - 1 - text.count("\n    #") == len(lines)  # each once
        assert lines.keys() == {field.name for field in dataclasses.fields(kind)}
        for field in dataclasses.fields(kind):
            if field.default is not dataclasses.MISSING:
                assert eval(lines[field.name].split(" = ")[1].split("  #")[0]) == field.default


@pytest.mark.parametrize("argument", ["-v", "--seed", "--train_cls.lr=1"])
def test_options_are_told_how_settings_are_given(argument):
    with pytest.raises(engine.UsageError, match=f"{argument}: settings are given as key=value; --help lists them"):
        engine.configure("train_cls", [argument])


def test_learning_rate():
    s = settings().train_seg
    s.iterations = 100
    assert engine.rate(s, 0) == 1 and engine.rate(s, 50) == pytest.approx(0.5 ** 0.9)
    s.drop_at = 60
    assert (engine.rate(s, 59), engine.rate(s, 60)) == (1, pytest.approx(0.1))


def test_learning_rate_rises_in_the_warm_up():
    s = engine.Training(iterations=100, warmup=4, poly=1.0)
    rises = [engine.rate(s, i) / (1 - i / 100) for i in range(7)]
    assert rises == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1, 1])
    s = engine.Training(iterations=100, warmup=4, drop_at=60)
    assert [engine.rate(s, i) for i in (0, 59, 60)] == pytest.approx([0.2, 1, 0.1])


@pytest.mark.parametrize("name, kind", [("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)])
def test_optimizer(name, kind):
    """Both learn in the groups of the network, with the decay that is set; biases have none."""
    network = models.BoxClassifier(2, "vgg16", width=0.0625)
    s = engine.Training(optimizer=name, lr=0.1, decay=0.3, new_lr=4, momentum=0.7)
    optimizer = engine.build_optimizer(network, s)
    assert type(optimizer) is kind
    assert optimizer.defaults.get("momentum", 0.7) == 0.7
    found = {(group["lr"], group["weight_decay"]) for group in optimizer.param_groups}
    assert sorted(found) == [(pytest.approx(0.4), 0.3), (pytest.approx(0.8), 0.0)]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(network.parameters()))


def test_spread():
    assert engine.spread(list("abcdefgh"), 3) == ["a", "c", "f"] and engine.spread([1], 3) == [1]


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


def train_tiny(path, losses, lr=0.1, **run):
    config = settings("run.workers=0", "run.save_every=2", "run.log_every=1")
    vars(config.run).update(run)
    config.path, s = path, config.train_cls
    s.iterations, s.batch, s.weights, s.lr = 7, 2, "none", lr
    torch.manual_seed(0)
    network = Tiny()
    engine.train(config, "train_cls", s, network, Noise(), losses)
    return torch.load(path / "cls.pt", weights_only=True)["model"]


def square(network, batch):
    return {"loss": network.layer(batch["image"]).square().mean() * torch.rand(())}


def test_a_stopped_run_goes_on_where_it_was(tmp_path):
    whole = train_tiny(tmp_path / "whole", square)
    count = 0

    def stop(network, batch):
        nonlocal count
        count += 1
        if count == 6:
            raise KeyboardInterrupt
        return square(network, batch)

    with pytest.raises(KeyboardInterrupt):
        train_tiny(tmp_path / "stopped", stop)
    resumed = train_tiny(tmp_path / "stopped", square)
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)
    assert not (tmp_path / "stopped" / "cls.pt.partial").exists()


def test_nan_names_the_images_and_keeps_the_checkpoint(tmp_path):
    count = 0

    def losses(network, batch):
        nonlocal count
        count += 1
        return {"loss": network.layer(batch["image"]).square().mean() * (math.nan if count == 4 else 1)}

    with pytest.raises(engine.UsageError, match="loss is nan at iteration 4, images . .;"):
        train_tiny(tmp_path, losses)
    assert not (tmp_path / "cls.pt").exists()
    saved = torch.load(tmp_path / "cls.pt.partial", weights_only=True)
    assert saved["iteration"] == 2 and all(v.isfinite().all() for v in saved["model"].values())


def test_a_nan_between_two_logs_is_not_saved(tmp_path):
    with pytest.raises(engine.UsageError, match="loss is nan at iteration 1, images . .;"):
        train_tiny(tmp_path, lambda network, batch: {"loss": math.nan * network.layer(batch["image"]).mean()},
                   log_every=5)
    assert not list(tmp_path.iterdir())


def test_a_finished_run_is_left_alone_and_other_settings_are_refused(tmp_path, capsys):
    train_tiny(tmp_path, square)
    first = (tmp_path / "cls.pt").read_bytes()
    train_tiny(tmp_path, square)
    assert "finished before" in capsys.readouterr().out and (tmp_path / "cls.pt").read_bytes() == first
    with pytest.raises(engine.UsageError, match="train_cls.lr 0.1 -> 0.2; set run.name to a new one, or over"):
        train_tiny(tmp_path, square, lr=0.2)
    assert (tmp_path / "cls.pt").read_bytes() == first
    train_tiny(tmp_path, square, lr=0.2, overwrite=True)
    assert (tmp_path / "cls.pt").read_bytes() != first


def test_an_unfinished_run_with_other_settings_is_refused_or_lost(tmp_path):
    def stop(network, batch):
        if (tmp_path / "cls.pt.partial").exists():
            raise KeyboardInterrupt
        return square(network, batch)

    with pytest.raises(KeyboardInterrupt):
        train_tiny(tmp_path, stop)
    with pytest.raises(engine.UsageError, match="train_cls.lr 0.1 -> 0.2; set"):
        train_tiny(tmp_path, square, lr=0.2)
    lost = train_tiny(tmp_path, square, lr=0.2, overwrite=True)
    new = train_tiny(tmp_path / "new", square, lr=0.2)
    assert all(torch.equal(lost[k], new[k]) for k in new)


def claimed(tmp_path, settings=None, **run):
    config = globals()["settings"]()
    config.path = tmp_path
    config.run.overwrite = run.get("overwrite", False)
    engine.claim(config, tmp_path / "labels", settings or {"a.b": 1}, tmp_path / "cls.pt")


def test_claim(tmp_path):
    (tmp_path / "cls.pt").write_bytes(b"weights")
    file = tmp_path / "labels" / "Ycrf" / "x.png"

    def make():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"label")

    claimed(tmp_path)
    make()
    claimed(tmp_path)
    assert file.exists()  # the same settings: kept
    with pytest.raises(engine.UsageError, match="labels was made with other settings: a.b 1 -> 2; set"):
        claimed(tmp_path, {"a.b": 2})
    assert file.exists()
    claimed(tmp_path, {"a.b": 2}, overwrite=True)
    assert not file.exists()
    make()
    (tmp_path / "cls.pt").write_bytes(b"other weights")
    claimed(tmp_path, {"a.b": 2})
    assert not file.exists()  # labels of another checkpoint go
    make()
    (tmp_path / "labels" / "made_with.json").unlink()
    with pytest.raises(engine.UsageError, match="holds files but no made_with.json"):
        claimed(tmp_path)
    (tmp_path / "labels" / "made_with.json").write_text("{")
    with pytest.raises(engine.UsageError, match="not what this program wrote"):
        claimed(tmp_path)


def test_workers_read_a_dataset_of_many_tensors_whatever_pythons_way_to_start_them():
    """Python 3.14's way sends them each tensor as an open file, of at most 256."""
    default = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("forkserver", force=True)
    try:
        config = SimpleNamespace(run=SimpleNamespace(workers=1))
        dataset = [torch.tensor([number]) for number in range(300)]
        assert [int(number) for number in engine.read(config, dataset)] == list(range(300))
    finally:
        multiprocessing.set_start_method(default, force=True)
