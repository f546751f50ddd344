"""Run the tests that inject faults, and write docs/results/reliability.json and docs/reliability.md.

python benchmarks/reliability.py            all rows; --rows R2 R4: these, the others keep their last result
python benchmarks/reliability.py --trl      the same faults on TRL; needs: pip install -e ".[benchmark]"
python benchmarks/reliability.py --signals  the table of signals to the launcher
python benchmarks/reliability.py --page     write the page again from the stored results
"""

import os
import platform
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from reliability_rows import NOT_HERE, ROWS
from reliability_signals import signal_table
from reliability_trl import OURS, TRL_FAULTS, run_fault
from shared import DOCS, RESULTS, ROOT, markdown, read_json, script_parser, write_json

from grpo.errors import ConfigError, GrpoError
from grpo.runtime.command import run_main

STORED, PAGE = RESULTS / "reliability.json", DOCS / "reliability.md"


def main() -> None:
    """Run the rows and write the page."""
    parser = script_parser(__doc__)
    parser.add_argument("--rows", nargs="*", help="only these rows")
    parser.add_argument("--trl", action="store_true", help="the faults on TRL instead")
    parser.add_argument("--signals", action="store_true", help="the signals to the launcher instead")
    parser.add_argument("--page", action="store_true", help="write the page from the stored results")
    options = parser.parse_args()
    results = read_json(STORED) if STORED.exists() else {"rows": {}, "trl": {}}
    if options.trl:
        results["trl"] = {"version": version("trl"), **{name: run_fault(name) for name in TRL_FAULTS}}
    elif options.signals:
        results["signals"] = signal_table()
    elif not options.page:
        for name in options.rows or ROWS:
            if name not in ROWS:
                raise ConfigError(f"--rows: there is no row {name}, there are {', '.join(ROWS)}")
        results["rows"] |= measure(options.rows or list(ROWS))
    results["machine"] = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    results["date"] = results.get("date") if options.page else str(date.today())
    write_json(STORED, results)
    PAGE.write_text(page(results))
    failed = [name for name, row in results["rows"].items() if row["failed"]]
    if failed:
        raise GrpoError(f"rows with a test that failed: {', '.join(failed)}; {PAGE} shows them")


def measure(names: list[str]) -> dict[str, Any]:
    """Run the tests of the rows in one pytest.

    Returns:
        For each row the number of cases that passed, failed and were skipped, and the figures that they recorded.

    Raises:
        GrpoError: No test of a row ran.
    """
    wanted = sorted({test for name in names for test in ROWS[name][1]})
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "slow or not slow", f"--junitxml={report}", "-o"]
        command += ["junit_family=xunit1", *(f"tests/{test}" for test in wanted)]
        subprocess.run(command, cwd=ROOT, check=False)
        cases = list(ElementTree.parse(report).iter("testcase")) if report.exists() else []
    rows = {name: _row(ROWS[name][1], cases) for name in names}
    for name, row in rows.items():
        if not row["passed"] + row["failed"] + row["skipped"]:
            raise GrpoError(f"row {name}: none of its tests ran; pytest says why above")
    return rows


def _row(tests: list[str], cases: list[ElementTree.Element]) -> dict[str, Any]:
    row: dict[str, Any] = {"passed": 0, "failed": 0, "skipped": 0, "figures": {}}
    for case in cases:
        file = case.get("file", "").removeprefix("tests/")
        if not {file, f"{file}::{case.get('name', '').partition('[')[0]}"} & set(tests):
            continue
        tags = {child.tag for child in case}
        row["failed" if tags & {"failure", "error"} else "skipped" if "skipped" in tags else "passed"] += 1
        for figure in case.iter("property"):
            row["figures"].setdefault(figure.get("name"), []).append(figure.get("value"))
    return row


def page(results: dict[str, Any]) -> str:
    """Return the text of docs/reliability.md."""
    lines = [
        "# Reliability",
        "",
        "Tests inject the faults from outside the trainer. `python benchmarks/reliability.py` runs the tests of every "
        "row and generates this page. `--trl` runs the same faults on TRL, if possible. The result of a row is the "
        "number of cases that passed, and the sums of their counts. A case is a fault, or one place or form of it.",
        "",
        f"Measured {results.get('date')} on {results.get('machine')}.",
        "",
        "| row | fault | tests | result |",
        "|---|---|---|---|",
    ]
    for name, (fault, tests) in ROWS.items():
        row = results["rows"].get(name)
        shown = "not measured" if row is None else f"{row['passed']} of {row['passed'] + row['failed']} cases passed"
        if row is not None and row["skipped"]:
            shown += f", {row['skipped']} skipped"
        for figure, values in (row or {}).get("figures", {}).items():
            shown += f"; {figure}: {_combined(figure, values)}"
        lines.append(f"| {name} | {fault} | {', '.join(f'`{test}`' for test in tests)} | {shown} |")
    lines += ["", *(f"- {name}: {why}." for name, why in NOT_HERE.items()), ""]
    lines += _signals(results.get("signals", [])) + ["## The same faults on TRL", ""]
    trl = results["trl"]
    if not trl:
        return markdown([*lines, "Not measured."])
    lines += [f"TRL {trl['version']}, a tiny random model on the CPU.", "", "| fault | TRL | ours |", "|---|---|---|"]
    lines += [f"| {fault} | {trl[name]} | {OURS[name]} |" for name, fault in TRL_FAULTS.items()]
    return markdown(lines)


def _signals(rows: list[dict[str, Any]]) -> list[str]:
    """Return the section about signals to the launcher."""
    lines = [
        "## Signals to the launcher",
        "",
        "`kill PID`, `timeout`, `Popen.terminate()` and Kubernetes signal `accelerate launch` alone, in the middle of "
        "a run. Each process notices the end of its launcher, saves after its step and ends. The exit code is that of "
        "the launcher (negative: ended by this signal); the trainer's own is 130 after Ctrl-C, otherwise 143. "
        "`python benchmarks/reliability.py --signals` measures this table.",
        "",
        "| signal | processes | processes left | checkpoint | exit code of the launcher | seconds to the end |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        saved = "written" if row["checkpoint"] else "none"
        counts = f"SIG{row['signal']} | {row['processes']} | {row['left']}"
        lines.append(f"| {counts} | {saved} | {row['launcher']} | {row['seconds']} |")
    return [*lines, *(["", "Not measured."] if not rows else []), ""]


def _combined(figure: str, values: list[str]) -> str:
    """Add the counts of several cases up; list words and times."""
    if not figure.startswith("seconds") and all(value.isdigit() for value in values):
        return str(sum(map(int, values)))
    return ", ".join(values)


if __name__ == "__main__":
    run_main(main)
