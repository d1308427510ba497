"""The paper's comparisons, with several seeds: one command a study prints its table.

    python benchmarks/ablations.py STUDY [CONFIG.yaml] [key=value ...]

    pooling   stage 1 with average pooling or with BAP; stage 2 with u0, without, and with another threshold of u0
    grid      N, the background queries' grid, in stage 1
    features  what of a box's features the authors' code adds to the equations
    labels    the choices of stage 2, on the classifiers of `pooling`
    loss      stage 3's losses, on the labels in runs/NAME/labels
    nal       gamma and lambda, on the same
    start     stage 3 from the weights that are set, or from stage 1's backbone, on the same
    improved  stage 3 on labels made with runs/NAME/cls.pt and IMPROVED, against those in runs/NAME/labels

Each cell is a run of the scripts themselves, runs/NAME_CELL_SEED, and what is finished is not done again. Every
seed's scores go to runs/NAME_STUDY.jsonl. Labels are scored on up to 100 images of data.train and of data.val,
segmenters on data.val, plain.
"""
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import labels  # noqa: E402

import engine  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
SEEDS = 0, 1, 2
BAP = "bap", ["train_cls.pooling=bap"]
POOLING = {"average pooling": ("gap", ["train_cls.pooling=gap"]), "BAP": BAP}
GRID = {"N = 1": ("grid1", ["train_cls.grid=1"]), "N = 2": ("grid2", ["train_cls.grid=2"]), "N = 4": BAP}
FEATURES = {"2 x 2 features, plain up to 12.5 % background": BAP, "one feature": ("bins1", ["train_cls.bins=1"]),
            "never plain": ("never", ["train_cls.min_background=0"])}
LOSS = {"cross-entropy on Ycrf": ["loss=crf"], "cross-entropy on Yret": ["loss=ret"], "agreement alone": ["loss=agree"],
        "entropy": ["loss=entropy"], "bootstrapping": ["loss=bootstrap"], "NAL": ["loss=nal"]}
NAL = {"as set": LOSS["NAL"], "gamma 1": ["loss=nal", "gamma=1"], "lambda 0.01": ["loss=nal", "weight=0.01"],
       "lambda 1": ["loss=nal", "weight=1"]}
START = {"as set": LOSS["NAL"], "from stage 1": ["loss=nal", "weights=stage1"]}
IMPROVED = ("threshold=0.9",)


def script(stage, arguments, name, *more):
    """One stage of one cell; its bars go to the screen's stderr, its tables nowhere: the numbers are in its files."""
    done = subprocess.run([sys.executable, ROOT / f"{stage}.py", *arguments, f"run.name={name}", *more],
                          stdout=subprocess.DEVNULL)
    if done.returncode:
        raise engine.UsageError(f"{stage}.py ended with status {done.returncode} in runs/{name}")


def link(config, name, files):
    """runs/`name` with links to this run's own files."""
    folder = Path("runs", name)
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        if not (config.path / file).exists():
            raise engine.UsageError(f"{config.path / file} is missing: run the stages before on {config.run.name}")
        if not (folder / file).exists():
            (folder / file).symlink_to(os.path.relpath(config.path / file, folder))


def short(result):
    return {key: result[key] for key in ("miou", "miou_over", "iou") if key in result}


def of_labels(config, arguments, cells, rows):
    """Trains a classifier for each cell and seed, and yields the scores of the labels that `rows` make with it."""
    for seed in SEEDS:
        for title, (cell, settings) in cells.items():
            name = f"{config.run.name}_{cell}_{seed}"
            script("train_cls", arguments, name, f"run.seed={seed}", *settings)
            own = engine.configure("make_labels", [*arguments, f"run.name={name}"])
            for split in own.make_labels.splits or (own.data.train, own.data.val):
                for (row, kind), result in label_scores(own, split, rows).items():
                    yield dict(row=", ".join(filter(None, (title, row))), seed=seed, split=split, kind=kind, **result)


def label_scores(config, split, rows):
    """labels.scores, remembered in runs/NAME/label_scores.json."""
    path = config.path / "label_scores.json"
    known = engine.read_json(path)
    left = {row: changes for row, changes in rows.items() if f"{split}, {row}, Ycrf" not in known}
    if left:
        found = labels.scores(config, split, left)
        known |= {f"{split}, {row}, {kind}": short(result) for (row, kind), result in found.items()}
        engine.write_json(path, known)
    return {(row, kind): known[f"{split}, {row}, {kind}"] for row in rows for kind in ("Ycrf", "Yret")}


def of_segmenter(config, arguments, title, name, seed, settings):
    script("train_seg", arguments, name, f"run.seed={seed}", *(f"train_seg.{s}" for s in settings))
    script("eval", arguments, name, f"run.seed={seed}", "eval.panels=0")
    result = engine.read_json(Path("runs", name, "eval.json"))[f"{config.data.val}, plain"]
    return dict(row=title, seed=seed, split=config.data.val, kind="segmenter", **short(result))


def pooling(config, arguments):
    rows = "as set", "u0 off", "threshold 0.9"
    return of_labels(config, arguments, POOLING, {row: labels.ROWS[row] for row in rows})


def grid(config, arguments):
    return of_labels(config, arguments, GRID, {"as set": {}})


def features(config, arguments):
    return of_labels(config, arguments, FEATURES, {"as set": {}})


def choices(config, arguments):
    return of_labels(config, arguments, {"": BAP}, labels.ROWS)


def loss(config, arguments, rows=None):
    for seed in SEEDS:
        for title, settings in (rows or LOSS).items():
            name = f"{config.run.name}_{'_'.join(settings).replace('=', '')}_{seed}"
            link(config, name, ["labels"] + ["cls.pt"] * (config.path / "cls.pt").exists())
            yield of_segmenter(config, arguments, title, name, seed, settings)


def nal(config, arguments):
    return loss(config, arguments, NAL)


def start(config, arguments):
    return loss(config, arguments, START)


def improved(config, arguments):
    made = f"{config.run.name}_improved"
    link(config, made, ["cls.pt"])
    script("make_labels", arguments, made, *(f"make_labels.{s}" for s in IMPROVED),
           f"make_labels.splits=[{config.data.train}]")
    own = engine.configure("train_seg", [*arguments, f"run.name={made}"])
    for pair in zip(loss(config, arguments, {"as set": LOSS["NAL"]}),
                    loss(own, arguments, {", ".join(IMPROVED): LOSS["NAL"]})):
        yield from pair


STUDIES = dict(pooling=pooling, grid=grid, features=features, labels=choices, loss=loss, nal=nal, start=start,
               improved=improved)


def cell(values):
    """Mean and spread (standard deviation) over seeds."""
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def table(study, results):
    """Markdown: a row a setting, a column a list and a kind of labels; after the slash, the mean over run.mean_over."""
    columns = list(dict.fromkeys((r["split"], r["kind"]) for r in results))
    print(f"\n| {study}, {len({r['seed'] for r in results})} seeds | "
          + " | ".join(f"{kind}, {split}" for split, kind in columns) + " |")
    print("|---" * (1 + len(columns)) + "|")
    for row in dict.fromkeys(r["row"] for r in results):
        cells = []
        for column in columns:
            found = [r for r in results if r["row"] == row and (r["split"], r["kind"]) == column]
            cells.append(" / ".join(cell([r[key] for r in found]) for key in ("miou", "miou_over") if key in found[0]))
        print(f"| {row} | {' | '.join(cells)} |")


def main(study, config, arguments):
    path, results = Path("runs", f"{config.run.name}_{study}.jsonl"), []
    path.parent.mkdir(exist_ok=True)
    with open(path, "w") as log:
        for result in STUDIES[study](config, arguments):
            results.append(result)
            log.write(json.dumps(result) + "\n")
            log.flush()
    table(study, results)


if __name__ == "__main__":
    if sys.argv[1:2] == [] or sys.argv[1] not in STUDIES:
        sys.exit(f"usage: python benchmarks/ablations.py {' | '.join(STUDIES)} [CONFIG.yaml] [key=value ...]")
    study = sys.argv.pop(1)
    engine.run("train_cls", lambda config: main(study, config, sys.argv[1:]))
