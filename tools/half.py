"""A checkpoint in half the space, for publishing.

    python tools/half.py cls.pt OUT.pth

The weights are rounded to float16; `models.load` and the scripts' weights=FILE
read it as any other checkpoint and compute in float32.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root

import models
import runs


def halved(content: dict) -> dict:
    """A cls.pt or seg.pt with its weights in float16, without the settings
    that name the folders it was made from.
    """
    model = {name: value.half() if value.is_floating_point() else value
             for name, value in content["model"].items()}
    kept = {key: content[key] for key in ("network", "classes", "chosen")
            if key in content}
    return kept | {"model": model}


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python tools/half.py cls.pt OUT.pth")
    source, out = sys.argv[1:]
    try:
        content = models.read_file(source)
        models.network_of(content, source)
        content = halved(content)
        models.network_of(content, "as float16")  # none has become infinite
    except models.WeightsError as fault:
        print(fault, file=sys.stderr)
        sys.exit(2)
    runs.save(Path(out), content)
    print(f"{out}: {Path(out).stat().st_size / 1e6:.1f} MB")
