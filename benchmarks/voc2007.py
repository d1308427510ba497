"""The trainings behind docs/results.md on VOC 2007: two at a time, on one thread each.

    python benchmarks/voc2007.py STUDY [data.root=FOLDER] [key=value ...]

    queries   the least background that makes a query of BAP: any, half a feature cell, or a whole one
    length    stage 1 with 16,000 and with 32,000 crops
    labels    average pooling and BAP, three seeds, with and without u0 and its threshold

Each run is the scripts' own, runs/voc2007_NAME, with all they print in its log.txt. The scripts skip what is done and
resume what was stopped, so the same command continues a study; at its end it prints a table.
"""
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SEEDS = 0, 1, 2
# Choices are made with networks that never saw the list they are scored on.
CHOOSE = ["data.train=Main/train", "data.val=Segmentation/val", "make_labels.splits=[Segmentation/val]"]
REPORT = ["make_labels.splits=[Segmentation/trainval, Segmentation/test]"]
QUERIES = {"any": 1e-5, "half": 0.5, "whole": 1.0}  # feature cells
ROWS = {"": [], "_nou0": ["make_labels.u0=false"],
        "_nothing": ["make_labels.u0=false", "make_labels.threshold=0"]}
PLAIN = {"": []}


def study(name):
    """A study's classifiers, in order: (name of the run, its settings, models.LEAST_QUERY, rows of labels)."""
    if name == "queries":
        return [(f"queries_{kind}_{seed}", [*CHOOSE, f"run.seed={seed}", "train_cls.iterations=250"], least, PLAIN)
                for seed in SEEDS for kind, least in QUERIES.items()]
    if name == "length":
        return [(f"length_{n}", [*CHOOSE, f"train_cls.iterations={n}"], None, PLAIN) for n in (2000, 4000)]
    return [(f"{pooling}_{seed}", [*REPORT, f"run.seed={seed}", f"train_cls.pooling={pooling}"], None, ROWS)
            for seed in SEEDS for pooling in ("gap", "bap")]


def stage(script, run, settings, least):
    """One script of one run; its output goes to the run's log. Ends this program if the script fails."""
    folder = Path("runs", f"voc2007_{run}")
    folder.mkdir(parents=True, exist_ok=True)
    constant = f"import models; models.LEAST_QUERY = {least}; " if least else ""
    code = f"import sys; sys.path[0] = {str(ROOT)!r}; {constant}import engine, {script} as s; "
    arguments = [str(ROOT / "configs/voc2007.yaml"), *settings, f"run.name={folder.name}", "run.workers=0"]
    with open(folder / "log.txt", "a") as log:
        print(script, *arguments, file=log, flush=True)
        done = subprocess.run([sys.executable, "-c", f"{code}engine.run({script!r}, s.main)", *arguments],
                              env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=log)
    if done.returncode:
        sys.exit(f"{folder}/log.txt: {script}.py ended with status {done.returncode}")


def carry_out(run, settings, least, rows):
    """A classifier, and at once the labels of each row that it makes: it has its scores before another begins."""
    stage("train_cls", run, settings, least)
    for row, changes in rows.items():
        weights = [f"make_labels.weights=runs/voc2007_{run}/cls.pt"] if row else []
        stage("make_labels", run + row, settings + changes + weights, least)


def table(runs):
    """mIoU of each run's labels on each list that it scored, as Markdown."""
    print("| run | list | images | box | Ycrf | Yret |\n|---|---|---|---|---|---|")
    for run in (run + row for run, _, _, rows in runs for row in rows):
        path = Path("runs", f"voc2007_{run}", "labels/scores.json")
        for split, scores in json.loads(path.read_text()).items():
            cells = " | ".join(f"{scores[kind]['miou']:.1f}" for kind in ("box", "Ycrf", "Yret"))
            print(f"| {run} | {split} | {scores['Ycrf']['images']} | {cells} |")


def main(name, settings):
    runs = study(name)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda run: carry_out(run[0], run[1] + settings, *run[2:]), runs))
    table(runs)


if __name__ == "__main__":
    if sys.argv[1:2] not in (["queries"], ["length"], ["labels"]):
        sys.exit("usage: python benchmarks/voc2007.py queries | length | labels [key=value ...]")
    main(sys.argv[1], sys.argv[2:])
