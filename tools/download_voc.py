"""Fetches PASCAL VOC from where torchvision does, as a folder for data.root: DIR/VOCdevkit/VOC2007 or VOC2012.

    python tools/download_voc.py 2007 DIR    0.9 GB to fetch
    python tools/download_voc.py 2012 DIR    3.4 GB: VOC and SBD, merged. Needs scipy

VOC2007 is complete once it exists, VOC2012 once it holds the list train_aug.
After a stop, for whatever reason, the same command continues: complete archives
in DIR are kept, any other is fetched from its beginning. Once it is done, DIR's
archives may be removed.
"""
import os
import shutil
import socket
import ssl
import sys
from importlib.util import find_spec
from pathlib import Path

from torchvision.datasets import SBDataset
from torchvision.datasets.utils import download_url, extract_archive
from torchvision.datasets.voc import DATASET_YEAR_DICT
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root

from datasets import DataError, PathLike, read_list, read_mask, write, write_mask
from models import DOWNLOAD_FAULTS

PARTS = {"2007": ("2007", "2007-test"), "2012": ("2012",)}  # torchvision's names of VOC's archives
LAST = {"2007": "test", "2012": "train_aug"}  # a list that only the whole folder has
# RuntimeError is torchvision's own: the file that came has another md5.
FAULTS = *DOWNLOAD_FAULTS, ssl.SSLError, RuntimeError


def download(year: str, root: PathLike) -> Path:
    """Makes VOC 2007 or 2012 under `root`; returns the folder for data.root.

    Raises DataError if an archive cannot be fetched, scipy is missing, or
    something else has made a part of the folder."""
    root = Path(root)
    voc = root / "VOCdevkit" / f"VOC{year}"
    unpacked = voc.with_name(f"{voc.name}.tmp")
    last = voc / f"ImageSets/Segmentation/{LAST[year]}.txt"
    merge = year == "2012" and not last.is_file()
    if merge and find_spec("scipy") is None:
        raise DataError("scipy: not installed, and SBD's masks are .mat files; pip install scipy")
    if not voc.is_dir():
        unpack([DATASET_YEAR_DICT[part] for part in PARTS[year]], root, unpacked)
        os.rename(unpacked / "VOCdevkit" / voc.name, voc)
    if merge:
        unpack([vars(SBDataset)], root, unpacked)
        merge_augmented(voc, unpacked / "benchmark_RELEASE/dataset")
    shutil.rmtree(unpacked, ignore_errors=True)
    if not last.is_file():
        raise DataError(f"{last}: no such list; move {voc} away and run the same command again")
    return voc


def unpack(archives, root, folder):
    """Fetches archives into root and unpacks them all into an empty folder."""
    for archive in archives:
        path, url = root / archive["filename"], archive["url"]
        try:
            download_url(url, root, path.name, archive["md5"])
        except FAULTS as error:
            reason = " ".join(str(error).split())
            raise DataError(f"{path}: cannot be fetched from {url} ({reason}); "
                            "run the same command again, or put the file there yourself") from None
    shutil.rmtree(folder, ignore_errors=True)  # of a try that was stopped
    for archive in archives:
        extract_archive(root / archive["filename"], folder)


def merge_augmented(voc: Path, sbd: Path, expected: int = 10582) -> None:
    """Writes the masks SegmentationClassAug, VOC's own or else SBD's, and the list
    train_aug: (SBD train + SBD val + VOC train) - VOC val.

    Raises DataError, with nothing written, unless that is `expected` ids."""
    val = read_list(voc, "val")
    texts = [(sbd / f"{split}.txt").read_text(encoding="utf-8")
             for split in ("train", "val")]
    ids = {*" ".join(texts).split(), *read_list(voc, "train")} - set(val)
    if len(ids) != expected:
        raise DataError(f"{voc}: with SBD {len(ids)} ids for train_aug, not {expected}; "
                        "move this folder away and run the same command again")
    for name in tqdm(sorted(ids.union(val)), "SegmentationClassAug", leave=False, disable=None):
        own = voc / f"SegmentationClass/{name}.png"
        mask = read_mask(own, 21) if own.is_file() else read_mat(sbd / f"cls/{name}.mat")
        write_mask(voc / f"SegmentationClassAug/{name}.png", mask)
    lines = "\n".join(sorted(ids)) + "\n"
    write(voc / "ImageSets/Segmentation/train_aug.txt", lines.encode())  # last: the masks are whole


def read_mat(path):
    """The labels (H, W) of one of SBD's files."""
    from scipy.io import loadmat
    return loadmat(path)["GTcls"][0]["Segmentation"][0]


def main():
    year, folder = sys.argv[1:] if len(sys.argv) == 3 else ("", "")
    if year not in PARTS or not folder:
        print("usage: python tools/download_voc.py 2007|2012 DIR", file=sys.stderr)
        sys.exit(2)
    socket.setdefaulttimeout(60)  # seconds without a byte; else torchvision waits for ever
    try:
        print("data.root:", download(year, folder))
    except DataError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
