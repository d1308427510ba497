"""benchmarks/ablations.py: every cell is run with every seed, and the tables hold the means and spreads of what the
runs' own files say."""
import json
import runpy
import statistics
import sys
from pathlib import Path

import pytest
import torch

import datasets
import engine

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["train_cls.iterations=2", "train_seg.iterations=2", "train_cls.batch=2", "train_seg.batch=2",
         "train_cls.crop=65", "train_seg.crop=65", "train_cls.width=0.0625", "train_seg.width=0.0625", "run.workers=0",
         "run.log_every=1", "make_labels.crf_iterations=1"]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    datasets.make_shapes(folder / "data/shapes", train=6, val=4)
    return folder


def in_process(stage, arguments, name, *more):
    """As ablations.script does, without a new interpreter for each."""
    before = sys.argv
    sys.argv = [stage, *arguments, f"run.name={name}", *more]
    try:
        runpy.run_path(str(ROOT / f"{stage}.py"), run_name="__main__")
    finally:
        sys.argv = before


@pytest.fixture
def ablations(work, monkeypatch):
    monkeypatch.chdir(work)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import ablations
    monkeypatch.setattr(ablations, "script", in_process)
    return ablations


def run(ablations, study, *arguments):
    config = engine.configure("train_cls", [*SMALL, *arguments])
    ablations.main(study, config, [*SMALL, *arguments])
    return [json.loads(line) for line in Path(f"runs/shapes_{study}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("study, rows", [("pooling", 6), ("grid", 3), ("features", 3), ("labels", 3)])
def test_labels_are_scored_for_every_cell_seed_list_and_kind(ablations, capsys, monkeypatch, study, rows):
    some = {row: ablations.labels.ROWS[row] for row in ("as set", "u0 off", "threshold 0.9")}
    monkeypatch.setattr(ablations.labels, "ROWS", some)
    monkeypatch.setattr(ablations, "SEEDS", (0, 1))
    lines = run(ablations, study)
    assert len(lines) == rows * len(ablations.SEEDS) * 2 * 2
    assert len({(r["row"], r["seed"], r["split"], r["kind"]) for r in lines}) == len(lines)
    first = [r["miou"] for r in lines if (r["row"], r["split"], r["kind"]) == (lines[0]["row"], "val", "Ycrf")]
    shown = f"{statistics.mean(first):.1f} ± {statistics.stdev(first):.1f}"
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith(f"| {lines[0]['row']} |"))
    assert shown in row
    kept = engine.read_checkpoint(Path("runs/shapes_bap_1/cls.pt"))["settings"]
    assert kept["train_cls.pooling"] == "bap" and kept["train_cls.grid"] == 4 and kept["run.seed"] == 1


def check_improved(ablations):
    lines = run(ablations, "improved")
    assert [(r["row"], r["seed"]) for r in lines] == [
        (row, seed) for seed in (0, 1) for row in ("as set", "threshold=0.9")]
    folder = Path("runs/shapes_improved_lossnal_1")
    assert (folder / "labels").resolve() == Path("runs/shapes_improved/labels").resolve()
    made = json.loads((folder / "labels/made_with.json").read_text())["settings"]
    assert made["make_labels.threshold"] == 0.9
    assert lines[-1]["miou"] == json.loads((folder / "eval.json").read_text())["val, plain"]["miou"]


def test_segmenters_learn_from_the_runs_own_labels(ablations, capsys, monkeypatch):
    monkeypatch.setattr(ablations, "SEEDS", (0, 1))
    monkeypatch.setattr(ablations, "LOSS", {name: ablations.LOSS[name] for name in ("cross-entropy on Ycrf", "NAL")})
    for stage in ("train_cls", "make_labels"):
        in_process(stage, SMALL, "shapes")
    lines = run(ablations, "loss")
    assert [(r["row"], r["seed"]) for r in lines] == [
        (row, seed) for seed in (0, 1) for row in ("cross-entropy on Ycrf", "NAL")]
    check_improved(ablations)
    for line in lines:
        name = {"NAL": "lossnal", "cross-entropy on Ycrf": "losscrf"}[line["row"]]
        folder = Path(f"runs/shapes_{name}_{line['seed']}")
        assert (folder / "labels").resolve() == Path("runs/shapes/labels").resolve()
        assert line["miou"] == json.loads((folder / "eval.json").read_text())["val, plain"]["miou"]
        settings = engine.read_checkpoint(folder / "seg.pt")["settings"]
        assert settings["train_seg.loss"] == name.removeprefix("loss") and settings["run.seed"] == line["seed"]
    assert "| NAL |" in capsys.readouterr().out


def test_segmenters_start_from_stage_1(ablations, capsys, monkeypatch):
    """At a rate so small that the first weights are still to be seen in the last."""
    monkeypatch.setattr(ablations, "SEEDS", (0,))
    for stage in ("train_cls", "make_labels"):
        in_process(stage, SMALL, "shapes")
    lines = run(ablations, "start", "train_seg.weights=none", "train_seg.lr=1e-12", "run.overwrite=true")
    assert [(r["row"], r["seed"]) for r in lines] == [("as set", 0), ("from stage 1", 0)]
    weight = "backbone.features.0.weight"
    one, other, source = (engine.read_checkpoint(Path(path))["model"][weight] for path in (
        "runs/shapes_lossnal_0/seg.pt", "runs/shapes_lossnal_weightsstage1_0/seg.pt", "runs/shapes/cls.pt"))
    assert torch.allclose(other, source) and not torch.allclose(one, source)
    in_process("train_cls", [*SMALL, "run.seed=5", "run.overwrite=true"], "shapes")
    with pytest.raises(SystemExit):  # another start
        run(ablations, "start", "train_seg.weights=none", "train_seg.lr=1e-12")
    assert "seg.pt was made with other settings: weights file" in capsys.readouterr().err


def test_a_missing_stage_is_named(ablations):
    with pytest.raises(engine.UsageError, match="runs/other/labels is missing"):
        run(ablations, "loss", "run.name=other")
