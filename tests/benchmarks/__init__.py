"""Tests of benchmarks/. Its scripts import each other by plain names, as Python does when one of them is run."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
