"""A run's scores beside the paper's, as a Markdown table.

    python tools/paper.py [CONFIG.yaml] [key=value ...]

Reads runs/NAME; what is not scored on data.val yet shows as -. The paper's
numbers are of its method, BAP with u0 and NAL, whatever the settings choose.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root

import settings
from tools.compare import read_scores

PAPER = {"box": ("labels: whole box", 62.2), "Ycrf": ("labels: Ycrf", 79.2),
         "Yret": ("labels: Yret", 69.9)}
FULL = "scales 0.5 0.75 1 1.5 + flip + CRF"
V1 = {"plain": ("segmenter (paper: V1, VGG-16), plain", 62.4),
      FULL: (f"segmenter (paper: V1, VGG-16), {FULL}", 68.1)}
V2 = {"plain": ("segmenter (paper: V2, ResNet-101), plain", None),
      FULL: (f"segmenter (paper: V2, ResNet-101), {FULL}", 74.6)}


def table(config) -> str:
    """config: as of settings.read."""
    val, scores = config.data.val, read_scores(config.path)
    network = V2 if config.train_seg.backbone.startswith("resnet") else V1
    lines = [f"| mIoU, % | paper, VOC 2012 val | here, {config.path.name}, "
             f"{val} |", "|---|---|---|"]
    for kind, (title, theirs) in (PAPER | network).items():
        ours = scores.get(f"{val}, {kind}", {}).get("miou")
        cells = ("-" if v is None else f"{v:.1f}" for v in (theirs, ours))
        lines.append(f"| {' | '.join([title, *cells])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
        sys.exit()
    try:
        print(table(settings.read("eval", sys.argv[1:])))
    except settings.UsageError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
