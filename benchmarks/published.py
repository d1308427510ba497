"""The runs behind docs/results.md, as folders: what tools/compare.py and pictures.py read of a run.

    python benchmarks/published.py docs/voc2007/*.json

Writes runs/NAME where there is none, with all that a file of docs/voc2007 holds of the run, and prints the hours that
each training took: from the first to the last line of its log, without gaps of more than 5 minutes, in which it was
stopped.
"""
import json
import sys
from itertools import pairwise
from pathlib import Path

LONGEST_GAP = 300  # seconds


def hours(times):
    """Of a log's lines, given their times in seconds."""
    gaps = [after - before for before, after in pairwise(times)]
    return sum(gap for gap in gaps if gap <= LONGEST_GAP) / 3600


def write_run(folder, files):
    """files: {name under the folder: content}, as benchmarks/voc2007.py gathers them."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".json"):
            content = json.dumps(content)
        elif name.endswith(".jsonl"):
            content = "".join(f"{json.dumps(line)}\n" for line in content)
        path.write_text(content, encoding="utf-8")


def main(*paths):
    print("| run | training | iterations | hours |\n|---|---|---|---|")
    for path in paths:
        for name, files in json.loads(Path(path).read_text(encoding="utf-8")).items():
            folder = Path("runs", name)
            if not folder.exists():
                write_run(folder, files)
            for stage in ("train_cls", "train_seg"):
                lines = [line for line in files["metrics.jsonl"] if line["stage"] == stage]
                if lines:
                    took = hours([line["time"] for line in lines])
                    print(f"| {name} | {stage} | {lines[-1]['iteration']:,} | {took:.1f} |")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python benchmarks/published.py FILE.json [FILE.json ...]")
    try:
        main(*sys.argv[1:])
    except FileNotFoundError as fault:
        sys.exit(str(fault))
