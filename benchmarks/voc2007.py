"""The trainings behind docs/results.md on VOC 2007: two at a time, on one
thread each.

    python benchmarks/voc2007.py STUDY [data.root=FOLDER] [key=value ...]

In the environment, SEEDS="0" makes one seed alone, and JOBS=4 runs four
trainings at a time, for a GPU (with run.workers=4). STUDY is one of

    queries      the least background that makes a query of BAP: any, half a
                 feature cell, or a whole one
    length       stage 1 with 16,000 crops, average pooling and BAP, and with
                 32,000; of the former two, benchmarks/unaries.py
    seg_length   stage 3 with 6,000 and with 12,000 crops: needs `length`
    labels       average pooling and BAP, three seeds; BAP with and without
                 u0 and its threshold; both with what unaries.py chose
    segmenters   losses and labels of stage 3, three seeds: needs the labels
    improved     NAL and cross-entropy on labels with what unaries.py chose,
                 three seeds: needs the labels
    nal          NAL, cross-entropy and agreement alone, five seeds more, on
                 the labels of seed mod 3: needs these
    evaluation   details of the final evaluation, of the segmenter nal_0

Each run is the scripts' own, runs/voc2007_NAME, with all they print in its
log.txt. The scripts skip what is done and resume what was stopped, so the
same command continues a study. At its end it prints a table, and gathers what
the table is made from in runs/voc2007_STUDY.json; docs/voc2007 keeps these.
"""
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STUDIES = ("queries", "length", "seg_length", "labels", "segmenters",
           "improved", "nal", "evaluation")
JOBS = int(os.environ.get("JOBS", 2))  # runs at a time


def seeds(default):
    return [int(seed) for seed in os.environ.get("SEEDS", default).split()]


SEEDS = seeds("0 1 2")
MORE_SEEDS = seeds("3 4 5 6 7")  # of segmenters, on the labels of seed mod 3
LOSSES = {"improved": ["nal", "crf"], "nal": ["nal", "crf", "agree"]}
# Choices are made with networks that never saw the list they are scored on.
APART = ["data.train=Main/train", "data.val=Segmentation/val"]
CHOOSE = [*APART, "make_labels.splits=[Segmentation/val]"]
REPORT = ["make_labels.splits=[Segmentation/trainval, Segmentation/test]"]
QUERIES = {"any": 1e-5, "half": 0.5, "whole": 1.0}  # feature cells
ROWS = {"": [], "_nou0": ["make_labels.u0=false"],
        "_nothing": ["make_labels.u0=false", "make_labels.threshold=0"]}
IMPROVED = ["make_labels.unary=logits"]
# Each checkpoint stays, as seg_ITERATION.pt, for benchmarks/sigma.py.
KEEP = """
save = runs.save
def save_and_keep(path, content):
    save(path, content)
    if "iteration" in content:
        save(path.with_name(f"seg_{content['iteration']}.pt"), content)
runs.save = save_and_keep
"""
FULL = ["eval.scales=[0.5, 0.75, 1, 1.5]", "eval.flip=true", "eval.crf=true"]
# The CRF sees what the authors' code gives it: BGR less Caffe's mean colour,
# cast to bytes, so that negative values wrap round.
CRF_IMAGE = """
crf = s.dense_crf
def on_bytes(image, *others):
    bgr = image[..., ::-1] - s.np.array([104.008, 116.669, 122.675])
    return crf((bgr.astype(int) % 256).astype(s.np.uint8), *others)
s.dense_crf = on_bytes
"""
ANTIALIAS = """
import engine
from torchvision.transforms.v2.functional import resize
engine.resized = lambda image, scale: resize(
    image[None].float() / 255, [round(scale * n) for n in image.shape[1:]])
"""
EVALUATIONS = {"_bytes": CRF_IMAGE, "_antialias": ANTIALIAS}


# ---------------------------------------------------------------- classifiers

def study(name):
    """A study's classifiers, in order: (name of the run, its settings, rows
    of labels, what stage is given as `before`)."""
    if name == "queries":
        return [(f"queries_{kind}_{seed}",
                 [*CHOOSE, f"run.seed={seed}", "train_cls.iterations=250"],
                 {"": []}, f"models.LEAST_QUERY = {least}")
                for seed in SEEDS for kind, least in QUERIES.items()]
    if name == "length":
        return [(f"length_{run}", [*CHOOSE, *changes], {"": []}, "")
                for run, changes in (
                    ("2000", ["train_cls.iterations=2000"]),
                    ("gap_2000", ["train_cls.iterations=2000",
                                  "train_cls.pooling=gap"]),
                    ("4000", ["train_cls.iterations=4000"]))]
    return [(f"{pooling}_{seed}",
             [*REPORT, f"run.seed={seed}", f"train_cls.pooling={pooling}"],
             rows | {"_improved": IMPROVED}, "") for seed in SEEDS
            for pooling, rows in (("gap", {"": []}), ("bap", ROWS))]


def stage(script, run, settings, before=""):
    """One script of one run, after the statement `before`; its output goes
    to the run's log. Ends this program if the script fails."""
    folder = Path("runs", f"voc2007_{run}")
    folder.mkdir(parents=True, exist_ok=True)
    code = (f"import sys; sys.path[0] = {str(ROOT)!r}\n"
            f"import models, runs, {script} as s\n{before}\n"
            f"runs.launch({script!r}, s.main)")
    arguments = [str(ROOT / "configs/voc2007.yaml"), "run.workers=0",
                 *settings, f"run.name={folder.name}"]
    with open(folder / "log.txt", "a") as log:
        print(script, *arguments, file=log, flush=True)
        done = subprocess.run([sys.executable, "-c", code, *arguments],
                              env=os.environ | {"OMP_NUM_THREADS": "1"},
                              stdout=log, stderr=log)
    if done.returncode:
        sys.exit(f"{folder}/log.txt: {script}.py ended with status "
                 f"{done.returncode}")


def weights_of(run):
    return f"make_labels.weights=runs/voc2007_{run}/cls.pt"


def classify(run, settings, rows, before):
    """A classifier, and at once the labels of each row that it makes: it has
    its scores before another begins."""
    stage("train_cls", run, settings, before)
    for row, changes in rows.items():
        weights = [weights_of(run)] if row else []
        stage("make_labels", run + row, settings + changes + weights, before)


def table_of_labels(runs):
    """mIoU of each run's labels on each list that it scored."""
    print("| run | list | images | box | Ycrf | Yret |\n"
          "|---|---|---|---|---|---|")
    for run in runs:
        path = Path("runs", f"voc2007_{run}", "labels/scores.json")
        for split, scores in json.loads(path.read_text()).items():
            cells = " | ".join(f"{scores[kind]['miou']:.1f}"
                               for kind in ("box", "Ycrf", "Yret"))
            images = scores["Ycrf"]["images"]
            print(f"| {run} | {split} | {images} | {cells} |")


# ----------------------------------------------------------------- segmenters

def segmenters(name):
    """A study's segmenters, seed by seed: (the run whose labels they learn
    from, its settings, {run: settings of train_seg}).
    """
    if name == "seg_length":
        run = "length_2000"
        return [(run, [*APART, "make_labels.splits=[Main/train]",
                       "train_cls.iterations=2000"],
                 {f"seg_length_{n}": [
                     *APART, learns_from(run), "train_seg.loss=crf",
                     f"train_seg.iterations={n}"] for n in (750, 1500)})]
    groups, kind = [], "_improved" if name == "improved" else ""
    for seed in MORE_SEEDS if name == "nal" else SEEDS:
        classifier = f"bap_{seed % 3}"
        labels = ["make_labels.splits=[Main/trainval]",
                  f"run.seed={seed % 3}", "train_cls.pooling=bap"]
        if kind:
            labels += [*IMPROVED, weights_of(classifier)]
        rows = losses_and_labels(classifier + kind)
        groups.append((classifier + kind, labels, {
            f"{row}_{seed}{kind}": [f"run.seed={seed}", *rows[row]]
            for row in LOSSES.get(name, rows)}))
    return groups


def learns_from(run, *kinds):
    folders = [f"runs/voc2007_{run}/labels/{kind}"
               for kind in kinds or ("Ycrf", "Yret")]
    return f"train_seg.labels=[{', '.join(folders)}]"


def losses_and_labels(run):
    both = learns_from(run)
    return {"nal": [both],
            "crf": [both, "train_seg.loss=crf"],
            "masks": ["train_seg.labels=[SegmentationClass]",
                      "data.train=Segmentation/trainval"],
            "boxes": [learns_from(run, "box")],
            "masks_and_boxes": [both, "data.masks=Segmentation/trainval"],
            "ret": [both, "train_seg.loss=ret"],
            "agree": [both, "train_seg.loss=agree"]}


def segment(run, changes):
    before, settings = "", ["eval.panels=0", *changes]
    if run == "nal_0":
        settings.append("run.save_every=300")
        before = KEEP
    stage("train_seg", run, settings, before)
    stage("eval", run, settings)
    stage("eval", run, settings + FULL)


def evaluate(detail, settings):
    stage("eval", f"nal_0{detail}",
          ["eval.weights=runs/voc2007_nal_0/seg.pt", "eval.panels=0", *FULL,
           # Last: workers would import the CRF without the detail.
           *settings, "run.workers=0"], EVALUATIONS[detail])


def table_of_segmenters(runs):
    print("| run | list | images | method | mIoU |\n|---|---|---|---|---|")
    for run in runs:
        path = Path("runs", f"voc2007_{run}", "eval.json")
        for result in json.loads(path.read_text()).values():
            print(f"| {run} | {result['split']} | {result['images']} | "
                  f"{result['method']} | {result['miou']:.1f} |")


def gather(name, folders):
    """Settings, scores and numbers of each run, as its files hold them."""
    kept = {}
    for folder in map(Path, folders):
        kept[folder.name] = run = {
            file: json.loads((folder / file).read_text())
            for file in ("labels/made_with.json", "labels/scores.json",
                         "eval.json") if (folder / file).exists()}
        run["settings.yaml"] = (folder / "settings.yaml").read_text()
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        run["metrics.jsonl"] = [json.loads(line) for line in lines]
    text = json.dumps(kept)
    Path("runs", f"voc2007_{name}.json").write_text(text + "\n")


def main(name, settings):
    made, table = [], table_of_segmenters
    with ThreadPoolExecutor(JOBS) as pool:
        if name == "evaluation":
            list(pool.map(lambda detail: evaluate(detail, settings),
                          EVALUATIONS))
            made = ["nal_0", *(f"nal_0{detail}" for detail in EVALUATIONS)]
        elif name in ("seg_length", "segmenters", "improved", "nal"):
            for labels, changes, rows in segmenters(name):
                # All that they learn from, before any of them.
                stage("make_labels", labels,
                      ["run.workers=2", *changes, *settings])
                list(pool.map(lambda row: segment(row[0], row[1] + settings),
                              rows.items()))
                made += rows
        else:
            classifiers, table = study(name), table_of_labels
            list(pool.map(lambda c: classify(c[0], c[1] + settings, *c[2:]),
                          classifiers))
            made = [run + row for run, _, rows, _ in classifiers
                    for row in rows]
    table(made)
    gather(name, [f"runs/voc2007_{run}" for run in made])


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in STUDIES:
        sys.exit("usage: python benchmarks/voc2007.py "
                 f"{' | '.join(STUDIES)} [key=value ...]")
    main(sys.argv[1], sys.argv[2:])
