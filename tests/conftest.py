"""What the tests share: the import path, few threads, the folder of the VOC
sample, and ways to run a script."""
import multiprocessing
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once in a process; tests of `deterministic` need it

# A process that has imported what takes seconds; each script is a fork of it.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch", "torchvision", "matplotlib.figure", "conftest"])


def script(name, *arguments, cwd):
    """`python NAME.py ARGUMENTS` in the folder cwd, by one thread, with its
    output, as of subprocess.run."""
    files = [Path(cwd, f".{stream}.txt") for stream in ("stdout", "stderr")]
    process = SERVER.Process(target=as_script, args=(
        str(ROOT / f"{name}.py"), [str(a) for a in arguments], str(cwd), files))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT / "tests"))  # for the server
        process.start()
    process.join()
    said = [file.read_text() for file in files]
    for file in files:
        file.unlink()
    return subprocess.CompletedProcess([name, *arguments], process.exitcode, *said)


def as_script(path, arguments, cwd, files):
    os.chdir(cwd)
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdin = open(os.devnull)
    sys.stdout, sys.stderr = open(1, "w"), open(2, "w", buffering=1)
    sys.argv = [path, *arguments]
    code = 0
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stdout.flush()
    os._exit(code)


def without_privilege():
    """What to put before a command so that the permissions of files hold for
    it: root passes them by."""
    if os.geteuid():
        return []
    if not shutil.which("setpriv"):
        pytest.skip("root may do anything, and there is no setpriv to take that from it")
    return ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-dac_override,-dac_read_search"]
