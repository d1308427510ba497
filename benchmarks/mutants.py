"""What do the tests notice? cosmic-ray's mutants of losses.py and of BAP, each one small change of the code.

    python benchmarks/mutants.py losses | bap [NUMBER]      (pip install cosmic-ray)

A mutant is killed if a test fails or takes over a minute; others survive, and are listed. Mutants of equal code count
once. With a number, about so many of them are tried, evenly spread.
"""
import os
import shutil
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import pytest
import torch
import torchvision  # noqa: F401, imported once for all
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 60  # seconds
# The file, what begins and ends the part that is changed, and what pytest runs.
TARGETS = {
    "losses": ("losses.py", "import torch\n", None,
               ["tests/test_losses.py", "tests/test_torchrun.py::test_a_loss_over_a_group_is_that_of_the_whole_batch"]),
    "bap": ("models.py", "def box_slices", "# ---- features at the size",
            ["tests/test_models.py", "-k", "test_bap and not compile and not export or test_box_slices"])}


def mutants(source):
    """[(line number, old line, new line, code)] of different code."""
    found = {}
    for name in operator_names():
        if name.startswith("core/Variable"):  # they need names of variables
            continue
        for occurrence in count():
            code = mutate_code(source, get_operator(name)(), occurrence)
            if code is None:
                break
            pairs = zip(count(1), source.splitlines(), code.splitlines())
            changed = [pair for pair in pairs if pair[1] != pair[2]]
            if changed:
                found.setdefault(code, (*changed[0], code))
    return sorted(found.values())


def survives(folder, tests):
    """Whether the tests pass, in a fork that has torch already."""
    child = os.fork()
    if not child:
        os.chdir(folder)
        os.setsid()
        sys.path.insert(0, str(folder))
        for number in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
        os._exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests])) != 0)
    for _ in range(20 * LIMIT):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status == 0
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def main(target, number=None):
    name, begin, end, tests = TARGETS[target]
    source = (ROOT / name).read_text()
    start, stop = source.index(begin), source.index(end) if end else len(source)
    line = source[:start].count("\n")
    made = mutants(source[start:stop])
    if number:
        made = made[::max(1, len(made) // int(number))]
    torch.set_num_threads(1)
    sys.dont_write_bytecode = True
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        copies = [Path(folder, str(k)) for k in range(os.cpu_count())]
        for copy in copies:
            shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "runs", "data", "weights", "__pycache__"))
        assert survives(copies[0], tests), "the tests fail without a change"

        def try_mutant(mutant):
            copy = copies.pop()
            (copy / name).write_text(source[:start] + mutant[3] + source[stop:])
            alive = survives(copy, tests)
            copies.append(copy)
            if alive:
                print(f"{name}:{line + mutant[0]}\n  {mutant[1].strip()}\n  {mutant[2].strip()}", flush=True)
            return alive

        alive = sum(pool.map(try_mutant, made))
    print(f"{target}: {len(made)} mutants, {len(made) - alive} killed ({100 * (1 - alive / len(made)):.1f} %)")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3) or sys.argv[1] not in TARGETS:
        sys.exit("usage: python benchmarks/mutants.py losses | bap [NUMBER]")
    main(*sys.argv[1:])
