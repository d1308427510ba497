"""A checkpoint in less than half the space, for publishing.

    python tools/half.py cls.pt OUT.pth

The weights are rounded to 8 significant bits, those of bfloat16, in float16,
and the file is deflated. `models.load` and the scripts' weights=FILE read it
as any other checkpoint and compute in float32.
"""
import io
import sys
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root

import torch

import datasets
import models


def halved(content: dict) -> dict:
    """A cls.pt or seg.pt with its weights rounded; without its settings,
    which name the folders it was made from, but for what eval.py needs.
    """
    model = {name: (value.bfloat16().half() if value.is_floating_point()
                    else value) for name, value in content["model"].items()}
    kept = {key: content[key] for key in ("network", "classes", "chosen")
            if key in content}
    needed = {key: value for key, value in content.get("settings", {}).items()
              if key == "train_seg.temperature"}
    return kept | {"model": model, "settings": needed}


def deflated(content: dict) -> bytes:
    """What torch.save writes, a zip archive, compressed."""
    plain, small = io.BytesIO(), io.BytesIO()
    torch.save(content, plain)
    with (zipfile.ZipFile(plain) as source,
          zipfile.ZipFile(small, "w", zipfile.ZIP_DEFLATED) as target):
        for name in source.namelist():
            target.writestr(name, source.read(name))
    return small.getvalue()


if __name__ == "__main__":
    if len(sys.argv) != 3:
        print("usage: python tools/half.py cls.pt OUT.pth", file=sys.stderr)
        sys.exit(2)
    source, out = sys.argv[1:]
    try:
        content = models.read_file(source)
        models.network_of(content, source)
        content = halved(content)
        models.network_of(content, "as float16")  # none has become infinite
    except models.WeightsError as fault:
        print(fault, file=sys.stderr)
        sys.exit(2)
    datasets.write(Path(out), deflated(content))
    print(f"{out}: {Path(out).stat().st_size / 1e6:.1f} MB")
