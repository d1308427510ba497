"""What the tests share: the import path, few threads, and the folder of the VOC sample."""
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def voc():
    """A small folder in the VOC devkit's layout, beside the repository."""
    folder = SHARED / "voc"
    if not folder.is_dir():
        pytest.skip("needs a VOC-format folder at ../shared/voc")
    return folder
