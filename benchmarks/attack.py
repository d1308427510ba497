"""Kills, damaged inputs and long runs, in the numbers that CONTRIBUTING.md states; tests/ hold a part of each.

    python benchmarks/attack.py

112 kills, 28 in each of the four stages, each stage started again until it ends and compared file by file with one that
never was killed; 5,000 damaged inputs, 1,000 checkpoints and files of a run among them; 8 minutes of each stage, for
its memory (benchmarks/soak.py). Ends with status 1 at the first that fails. About 90 minutes on two cores.
"""
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTEST = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider"]
PARTS = [([*PYTEST, "tests/test_kill.py"], {"KILLS": "28"}), ([*PYTEST, "tests/test_fuzz.py"], {"FUZZ": "2"}),
         ([sys.executable, "benchmarks/soak.py"], {})]

for command, variables in PARTS:
    print(*(f"{name}={value}" for name, value in variables.items()), *command[1:], flush=True)
    if subprocess.run(command, cwd=ROOT, env=os.environ | variables).returncode:
        sys.exit(1)
