"""benchmarks/speed.py runs to its end and prints every table; its numbers are not looked at."""
import sys
from functools import partial

import pytest
import torch
from conftest import ROOT

import models
import settings


def once(*functions, rounds=5):
    """In the place of the clock: every part runs, and each takes a second."""
    for function in functions:
        function()
    return [1.0] * len(functions)


@pytest.fixture
def speed(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import speed
    monkeypatch.setattr(speed, "clock", once)
    monkeypatch.setattr(speed, "depthwise", partial(speed.depthwise, cells=(9, 12)))
    monkeypatch.setattr(speed, "FORMS", speed.FORMS[:2])  # compiling takes a minute
    for name, value in dict(CROP=65, SIZE=(75, 100), COUNTS=(1, 5), SIDES=(64, 96), LABELS=(2, 5)).items():
        monkeypatch.setattr(speed, name, value)
    for kind in ("TrainCls", "TrainSeg"):
        monkeypatch.setattr(speed.settings, kind, partial(getattr(settings, kind), width=0.0625))
    for network in ("BoxClassifier", "DeepLab"):
        monkeypatch.setattr(speed.models, network, partial(getattr(models, network), width=0.0625))
    monkeypatch.setattr(speed, "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    return speed


def test_every_table(speed, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(speed, "peak", lambda case: 1.0)
    monkeypatch.setattr(sys, "argv", ["speed.py"])
    speed.main()
    said = capsys.readouterr().out
    for text in ("stage 1, fp32", "stage 3, bf16", "BAP, 20 x 1024", "NAL, 20 x 21",
                 "stage 3, two masks", "dense CRF", "eight views", "21 labels", "stage 3: 23,805 x 20 crops"):
        assert f"| {text}" in said
    assert ("| 1152 channels, kernel 5" in said) is not speed.GPU
    assert all(line.count("|") > 2 for line in said.splitlines() if line.startswith("|"))
    assert (tmp_path / "docs/speed.png").stat().st_size > 10_000


def test_rates_of_known_times(speed, monkeypatch):
    """A crop of the fastest form; on a CPU, worker processes take their time from the network."""
    seconds = iter([2.0, 1.0, 6.0, 1.0] * 2)
    monkeypatch.setattr(speed, "FORMS", ("fp32", "bf16"))
    monkeypatch.setattr(speed, "peak", lambda case: 1.0)
    monkeypatch.setattr(speed, "clock", lambda *parts, rounds: (next(seconds), next(seconds)))
    assert speed.training() == {"stage 1": 2 / speed.BATCH, "stage 3": 2 / speed.BATCH}
    assert speed.at_once(3, 2) == (3 if speed.GPU else 5)


def test_recipes(speed, monkeypatch, capsys, tmp_path):
    """A step of both stages of a small recipe; all files of configs/ but the demo's are measured."""
    files = {file.stem for file in (ROOT / "configs").iterdir()}
    assert set(speed.RECIPES) == files - {"shapes"}
    (tmp_path / "configs").mkdir()
    sizes = "{batch: 2, crop: 65, width: 0.0625}"
    (tmp_path / "configs/tiny.yaml").write_text(f"train_cls: {sizes}\ntrain_seg: {sizes}\n")
    monkeypatch.setattr(sys, "argv", ["speed.py", "recipes", "tiny"])
    speed.main()
    rows = capsys.readouterr().out.splitlines()[-2:]
    for stage, row in zip(("stage_1", "stage_3"), rows, strict=True):
        assert row.startswith(f"| tiny, {stage}, vgg16 | 2 of 65 | 1 | 1 | 1 | 1 |")
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's peak is counted by torch")
def test_peak_memory_of_what_is_known(speed, monkeypatch):
    """100 MB that are there for a moment."""
    monkeypatch.setitem(speed.MEMORY, "known", lambda: lambda: torch.ones(25_000_000).sum())
    assert speed.resident_peak("known") == pytest.approx(100, abs=10)
