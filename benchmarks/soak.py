"""Memory of every stage over a long run: resident memory from image 200 on must stay flat.

    python benchmarks/soak.py [MINUTES a stage, default 8]

Writes a shapes set of some thousand images into a temporary folder and runs the four commands there, each until its
time is over, with a limit on the memory they may ask for. Prints each stage's resident memory, its worker processes
included, at image 200 and at its highest after that.
"""
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools.shapes import make_shapes  # noqa: E402

LIMIT = 6 * 2 ** 30  # bytes of data that a process may ask for
IMAGES = 3000
BATCH = {"train_cls": 8, "make_labels": 1, "train_seg": 8, "eval": 1}  # images a step of the bar


def resident(pid):
    """MB of a process and its children."""
    try:
        own = int(Path(f"/proc/{pid}/status").read_text().split("VmRSS:")[1].split()[0]) / 1e3
        return own + sum(map(resident, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
    except (OSError, IndexError):  # it ended meanwhile
        return 0.0


def watch(script, minutes, folder, *arguments):
    """-> [(images done, MB)], one a second."""
    process = subprocess.Popen([sys.executable, ROOT / f"{script}.py", *arguments], cwd=folder, stderr=subprocess.PIPE,
                               stdout=subprocess.DEVNULL, text=True, bufsize=1, preexec_fn=lambda: resource.setrlimit(
                                   resource.RLIMIT_DATA, (LIMIT, LIMIT)))
    seen, done, text = [], 0, [""]

    def read():
        while letter := process.stderr.read(1):
            text[0] = text[0][-200:] + letter

    threading.Thread(target=read, daemon=True).start()
    end = time.monotonic() + 60 * minutes
    while process.poll() is None and time.monotonic() < end:
        time.sleep(1)
        steps = re.findall(r"\| (\d+)/", text[0])
        done = int(steps[-1]) * BATCH[script] if steps else done
        seen.append((done, resident(process.pid)))
    if process.poll() is None:
        process.terminate()
    elif process.returncode:
        sys.exit(f"{script}: {text[0]}")
    process.wait()
    return [(images, size) for images, size in seen if size]


def main():
    minutes = float(sys.argv[1]) if len(sys.argv) > 1 else 8
    print("| stage | images | MB at image 200 | highest after | change, % |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        make_shapes(Path(folder, "data/shapes"), train=IMAGES, val=IMAGES)
        for stage, settings in (("train_cls", []), ("make_labels", []), ("train_seg", ["train_seg.weights=none"]),
                                ("eval", ["eval.crf=true"])):
            # A stage that is stopped leaves no input for the next: short runs make it first.
            if stage == "make_labels":
                watch("train_cls", 9, folder, "iterations=20", "overwrite=true")
            if stage == "train_seg":
                watch("make_labels", 30, folder, "crf_iterations=1", "splits=[train]", "overwrite=true")
            if stage == "eval":
                watch("train_seg", 9, folder, "iterations=20", "train_seg.weights=none", "overwrite=true")
            long = [f"{stage}.iterations=100000"] if stage.startswith("train") else []
            seen = [(i, m) for i, m in watch(stage, minutes, folder, *settings, *long) if i >= 200]
            if not seen:
                print(f"| {stage} | fewer than 200 |")
                continue
            start, highest = seen[0][1], max(m for _, m in seen)
            print(f"| {stage} | {seen[-1][0]} | {start:.0f} | {highest:.0f} | {100 * (highest / start - 1):+.1f} |",
                  flush=True)


if __name__ == "__main__":
    main()
