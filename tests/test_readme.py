"""Every command of the README and of docs/, in their order, on small sets in the layouts that they speak of.

The commands run as they stand; only settings that make them quick come after them.
"""
import dataclasses
import functools
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import datasets
import settings
from tools.shapes import SHAPES, make_shapes

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/results.md", "docs/running.md", "docs/own_data.md", "docs/speed.md", "docs/deviations.md",
         "weights/README.md", "examples/photos/README.md")
README = "".join((ROOT / page).read_text() for page in PAGES)
QUICK = {
    "train_cls": "train_cls.iterations=2 train_cls.batch=2 train_cls.crop=65",
    "train_seg": "train_seg.iterations=2 train_seg.batch=2 train_seg.crop=65",
    "common": "run.workers=0 run.log_every=1 make_labels.crf_iterations=1 eval.crf_iterations=1",
}
NARROW = {"shapes": "train_cls.width=0.0625 train_seg.width=0.0625",
          "voc_vgg16": "train_cls.width=0.0625 train_seg.width=0.0625 train_cls.weights=none train_seg.weights=none",
          "voc_resnet101": "train_cls.width=0.0625 train_cls.weights=none train_seg.weights=none",
          "voc2007": "train_cls.weights=none train_seg.weights=none", "photos": ""}
ELSEWHERE = {  # what a command holds -> where it is tested
    "make ": "test_make", "download": "test_download", "benchmarks/speed.py": "test_speed",
    "benchmarks/soak.py": "half an hour, by hand", "benchmarks/limits.py": "three minutes, by hand",
    "benchmarks/voc2007.py": "test_voc2007", "benchmarks/maps.py": "test_evidence",
    "benchmarks/sigma.py": "test_evidence", "benchmarks/details.py": "test_evidence",
    "benchmarks/prototypes.py": "test_evidence", "benchmarks/unaries.py": "test_evidence",
    "benchmarks/bootstrap.py": "test_bootstrap", "benchmarks/published.py": "test_compare",
    "benchmarks/tables.py": "test_tables",
    "tools/compare.py 'Segmentation": "test_compare",
    "benchmarks/attack.py": "an hour and a half, by hand", "benchmarks/mutants.py": "half an hour, by hand",
    "tools/half.py": "test_hub", "pip install": "requirements-dev.txt",
    "own_data": "test_own_data", "mine.yaml": "test_own_data"}


def commands():
    """Of code blocks and of `inline code`, in the order of the text."""
    found = []
    for number, part in enumerate(re.split(r"^```.*\n", README, flags=re.M)):
        if number % 2:  # inside a fence
            found += [line.split("  #")[0].strip() for line in part.splitlines()]
        else:
            found += [" ".join(text.split()) for text in re.findall(r"`([^`]+)`", part)]
    return [line for line in found if re.match(r"(python|torchrun|make|pip) ", line)]


def is_elsewhere(command):
    return any(part in command for part in ELSEWHERE)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    for name in "configs", "examples":
        (folder / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "weights", folder / "weights")
    make_shapes(folder / "data/shapes", train=8, val=4)
    devkit = folder / "FOLDER"
    shutil.copytree(folder / "data/shapes", devkit)
    for path in (devkit / "Annotations").iterdir():
        for shape, name in zip(SHAPES, datasets.VOC_CLASSES):
            path.write_text(path.read_text().replace(f"<name>{shape}</name>", f"<name>{name}</name>"))
    lists = devkit / "ImageSets/Segmentation"
    for name, source in (("train_aug", "train"), ("test", "val")):
        shutil.copy(lists / f"{source}.txt", lists / f"{name}.txt")
        shutil.copy(lists / f"{source}.txt", folder / f"data/shapes/ImageSets/Segmentation/{name}.txt")
    (devkit / "ImageSets/Main").mkdir()
    shutil.copy(lists / "train.txt", devkit / "ImageSets/Main/trainval.txt")
    (devkit / "SegmentationClass").symlink_to("SegmentationClassAug")
    (folder / "data/VOCdevkit").mkdir()
    (folder / "data/VOCdevkit/VOC2007").symlink_to(devkit)
    (folder / "data/VOCdevkit/VOC2012").symlink_to(devkit)
    (folder / "released").mkdir()
    for kind in ("Ycrf", "Yret"):
        (folder / "released" / kind).symlink_to(devkit / "SegmentationClassAug")
    (folder / "photos").mkdir()
    for path in sorted((devkit / "JPEGImages").iterdir())[:2]:
        shutil.copy(path, folder / "photos")
    (folder / "PHOTO").symlink_to("photos")
    return folder


def quick(arguments):
    config = next((Path(a).stem for a in arguments if a.endswith(".yaml")), "shapes")
    return " ".join([*QUICK.values(), NARROW[config]]).split()


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("python") and not is_elsewhere(c)])
def test_command(work, monkeypatch, capsys, command):
    monkeypatch.chdir(work)
    _, script, *arguments = shlex.split(command)
    monkeypatch.syspath_prepend(str((ROOT / script).parent))
    if not script.startswith("tools/"):
        arguments += quick(arguments)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as end:
        assert not end.code, capsys.readouterr().err
    assert capsys.readouterr().out


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("torchrun")])
def test_torchrun(work, command):
    _, *options, script, config = shlex.split(command)
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", *options]
    done = subprocess.run([*start, ROOT / script, config, *quick([config]), "run.name=ranks"], cwd=work,
                          capture_output=True, text=True)
    assert done.returncode == 0 and "cls.pt: 2 iterations" in done.stdout, done.stderr


def test_make():
    """`make demo` is the four commands; `make test` is this."""
    targets = {"demo": [f"{stage}.py" for stage in ("train_cls", "make_labels", "train_seg", "eval")],
               "test": ["pytest tests"], "coverage": ["pytest tests", "coverage report"],
               "voc": ["tools/paper.py"], "voc2007": ["tools/paper.py"]}
    for command in (c for c in commands() if c.startswith("make ")):
        said = subprocess.run(["make", "-n", command.split()[1]], cwd=ROOT, capture_output=True, text=True).stdout
        assert all(step in said for step in targets[command.split()[1]])


def test_every_command_is_found():
    """A block in another style would go untested."""
    assert len(commands()) > 40 and not re.search(r"```(bash|sh|console)", README)


@pytest.mark.parametrize("page", PAGES)
def test_every_table_has_its_head(page):
    """As many cells in the line above the rule as in the rule, and nothing of a paragraph before them."""
    lines = ["", *(ROOT / page).read_text().splitlines()]
    for number, line in enumerate(lines):
        if line.startswith("|---"):
            assert lines[number - 1].startswith("|") and not lines[number - 2], line
            assert lines[number - 1].count("|") == line.count("|"), line


LABELS = {  # rows of the first table -> run, kind of labels
    "whole boxes": ("gap_{}", "box"), "average pooling, Ycrf": ("gap_{}", "Ycrf"),
    "BAP, Ycrf without u0": ("bap_{}_nou0", "Ycrf"), "BAP, Ycrf": ("bap_{}", "Ycrf"), "BAP, Yret": ("bap_{}", "Yret"),
    "from logits (not in the paper): average pooling, Ycrf": ("gap_{}_improved", "Ycrf"),
    "from logits: BAP, Ycrf": ("bap_{}_improved", "Ycrf")}
SEGMENTERS = {
    "NAL": "nal_{}", "cross-entropy on Ycrf": "crf_{}", "cross-entropy on Yret": "ret_{}",
    "cross-entropy where Ycrf and Yret agree": "agree_{}",
    "NAL, labels from logits": "nal_{}_improved", "cross-entropy, labels from logits": "crf_{}_improved",
    "cross-entropy on whole boxes": "boxes_{}", "cross-entropy on 422 true masks, no boxes": "masks_{}",
    "NAL, 422 true masks (paper: 1K) and other images' boxes": "masks_and_boxes_{}"}


PAPER = {  # rows of the first table -> the paper's numbers, and those of its replication
    "whole boxes": ("62.2", ""), "average pooling, Ycrf": ("76.1", "75.5"), "BAP, Ycrf without u0": ("77.8", "77.0"),
    "BAP, Ycrf": ("79.2", "78.8"), "BAP, Yret": ("69.9", "69.9"), "NAL": ("62.4 / 68.1", "61.4 / 64.8"),
    "cross-entropy on Ycrf": ("- / 67.8", "- / 64.7"), "cross-entropy on Yret": ("- / 66.1", "- / 62.8"),
    "cross-entropy where Ycrf and Yret agree": ("61.8 / 67.5", "60.9 / 64.5"),
    "NAL, 422 true masks (paper: 1K) and other images' boxes": ("- / 70.5", "")}


@functools.cache
def published():
    """The files of each run, as docs/voc2007 keeps them."""
    ran = {}
    for path in sorted((ROOT / "docs/voc2007").glob("*.json")):
        ran |= json.loads(path.read_text())
    return ran


def labels_of(run, kind, split="test"):
    """The scores of a run's labels; None where there is no such run."""
    files = published().get(f"voc2007_{run}")
    return files and files["labels/scores.json"][f"Segmentation/{split}"][kind]


def segmenter_of(run, method, split="test"):
    """Likewise of a segmenter, plain or final."""
    results = published().get(f"voc2007_{run}", {}).get("eval.json", {})
    return next((scores for key, scores in results.items() if key.startswith(f"Segmentation/{split}, ")
                 and ("CRF" in key) == (method == "final")), None)


def cell(scores):
    return f"{scores['miou']:.1f}" if scores else ""


def test_the_first_table_is_what_the_runs_say():
    """Its last columns, seeds 0, 1 and 2; a cell is empty where there is no such run."""
    assert "| paper, VOC 2012 val | replication [R] | here, VOC 2007 test, seed 0 | seed 1 | seed 2 |\n" in README

    def score(kind, name, seed):
        if kind == "segmenter":
            run = SEGMENTERS[name].format(seed)
            return " / ".join(filter(None, (cell(segmenter_of(run, method)) for method in ("plain", "final"))))
        run, of = LABELS[name]
        return cell(labels_of(run.format(seed), of))

    rows = re.findall(r"^\| (labels|segmenter):? (.+?)" + r" \|([-\d./ ]*)" * 5 + r"\|$", README, re.M)
    assert [row[1] for row in rows] == [*LABELS, *SEGMENTERS]
    for kind, name, *cells in rows:
        here = [score(kind, name, seed) for seed in range(3)]
        assert [text.strip() for text in cells] == [*PAPER.get(name, ("", "")), *here], name


def table(head):
    """The cells of a table of docs/results.md, without the rows' names."""
    rows = (ROOT / "docs/results.md").read_text().split(f"\n{head}", 1)[1].split("\n\n")[0].splitlines()[2:]
    return [[text.strip() for text in row.strip("|").split("|")][1:] for row in rows]


def of_seeds(scores):
    """58.9, -, 57.6: of each seed up to the last that has been trained."""
    cells = [cell(of_seed) for of_seed in scores]
    while not cells[-1]:
        cells.pop()
    return ", ".join(text or "-" for text in cells)


def test_the_labels_of_results_are_what_the_runs_say():
    rows = [("gap_{}", "Ycrf"), ("gap_{}", "Yret"), ("bap_{}_nou0", "Ycrf"), ("bap_{}_nothing", "Ycrf"),
            ("bap_{}", "Ycrf"), ("bap_{}", "Yret"), ("bap_{}_improved", "Ycrf"), ("gap_{}_improved", "Ycrf")]
    boxes, *found = table("| labels | seen | unseen | paper |")
    assert boxes[:2] == [cell(labels_of("gap_0", "box", split)) for split in ("trainval", "test")]
    assert [row[:2] for row in found] == [
        [of_seeds([labels_of(run.format(seed), kind, split) for seed in range(3)]) for split in ("trainval", "test")]
        for run, kind in rows]


def test_the_segmenters_of_results_are_what_the_runs_say():
    runs = [*(f"{row}_{{}}" for row in ("nal", "crf", "ret", "agree", "boxes", "masks", "masks_and_boxes")),
            "nal_{}_improved", "crf_{}_improved"]
    assert [row[:2] for row in table("| learns from | plain | final |")] == [
        [of_seeds([segmenter_of(run.format(seed), method) for seed in range(3)]) for method in ("plain", "final")]
        for run in runs]


def test_the_classes_of_results_are_what_the_runs_say():
    """Each column a mean over seeds 0, 1 and 2."""
    kinds = [("bap_{}", "box"), ("gap_{}", "Ycrf"), ("bap_{}", "Ycrf"), ("gap_{}_improved", "Ycrf"),
             ("bap_{}_improved", "Ycrf"), ("bap_{}", "Yret")]
    runs = ("nal_{}", "nal_{}_improved", "crf_{}", "crf_{}_improved", "ret_{}", "agree_{}", "boxes_{}", "masks_{}",
            "masks_and_boxes_{}")
    tables = {"| IoU, % | whole boxes |": [[labels_of(run.format(k), kind) for k in range(3)] for run, kind in kinds]}
    for method in ("plain", "final"):
        tables[f"| IoU, %, {method} | NAL |"] = [[segmenter_of(run.format(k), method) for k in range(3)]
                                                 for run in runs]
    for head, columns in tables.items():
        expected = [[f"{sum(s['iou'][name] for s in column) / len(column):.1f}" for column in columns]
                    for name in columns[0][0]["iou"]]
        expected.append([f"{sum(s['miou'] for s in column) / len(column):.1f}" for column in columns])
        assert table(head) == expected


def test_the_table_of_crops_is_what_the_runs_say():
    runs = [("length_2000_again", "Ycrf"), ("length_2000_again", "Yret"), ("length_2000_again_improved", "Ycrf"),
            ("length_4000", "Ycrf"), ("length_4000", "Yret"), ("length_4000_improved", "Ycrf")]
    found = table("| crops | Ycrf | Yret | Ycrf from logits |")
    assert sum(found[:2], []) == [cell(labels_of(*run, "val")) for run in runs]
    found = table("| crops of stage 3 | plain | final |")
    assert sum(found[:2], []) == [cell(segmenter_of(f"seg_length_{iterations}", method, "val"))
                                  for iterations in (750, 1500) for method in ("plain", "final")]


def test_published_runs_follow_the_recipe():
    recipe = settings.read("eval", [str(ROOT / "configs/voc2007.yaml")])
    own = {"train_cls": {"pooling", "weights"}, "train_seg": {"labels", "loss", "weights"}}
    for run, files in published().items():
        made = yaml.safe_load(files.get("settings.yaml", "{}"))
        for stage in own.keys() & made.keys():
            expected = json.loads(json.dumps(dataclasses.asdict(getattr(recipe, stage))))  # tuples to lists
            another = {"iterations"} if any(name in run for name in ("length_4000", "seg_length_750")) else set()
            changed = {key for key in made[stage] if made[stage][key] != expected[key]}
            assert changed <= own[stage] | another, (run, stage)
        made = files.get("labels/made_with.json", {"settings": {}})["settings"]
        expected = json.loads(json.dumps(dataclasses.asdict(recipe.make_labels)))
        expected |= {"u0": not run.endswith(("_nou0", "_nothing")),
                     "threshold": 0 if run.endswith("_nothing") else 0.99,
                     "unary": "logits" if run.endswith("_improved") else "attention"}
        for key in (key for key in made if key.startswith("make_labels.")):
            assert made[key] == expected[key.removeprefix("make_labels.")], (run, key)
