"""Mutations: small faults are put into a copy of the code, one at a time, and the fast tests must notice each.

    python benchmarks/mutations.py [--area rollout] [--file grpo/losses.py ...] [--only NAME ...] [--output FILE.json]

The mutations are data: benchmarks/mutations/*.yaml, each with a file, a text in it, its replacement, and the tests of
that file. First the tests run without a mutation, and must pass. Then each mutation is applied, its tests run until
the first failure, and the file is restored. killed: a test failed. survived: none did. stale: the text is no longer
there, and the entry must be updated. A mutation that changes nothing that can be observed is equivalent: its entry
gives the reason, and it is not run.

    python benchmarks/mutations.py --page            docs/results/mutations.json -> docs/mutations.md
"""

import contextlib
import importlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from shared import DOCS, RESULTS, markdown, read_json, script_parser, write_json

ROOT = Path(__file__).resolve().parents[1]
LISTS = ROOT / "benchmarks" / "mutations"
PAGE = DOCS / "mutations.md"
PRELOADED = ("torch", "transformers", "accelerate", "peft", "safetensors.torch", "datasets", "hypothesis", "rich")
"""Imported once: each run of tests is a fork of this process, and imports only the project and the tests."""


@dataclass(frozen=True)
class Mutation:
    """One fault."""

    name: str
    file: str
    old: str
    """A text that the file holds exactly once."""
    new: str
    tests: str
    """Arguments of pytest: the fast tests that should notice."""
    equivalent: str = ""
    """Reason why no test can notice."""


@dataclass
class Result:
    """What became of a mutation: killed, survived, stale or equivalent."""

    name: str
    file: str
    verdict: str
    tests: str
    seconds: float = 0.0
    reason: str = field(default="")
    commit: str = field(default="")
    """The code that it was run on; with + where that was not committed."""


def mutations(area: str = "*") -> list[Mutation]:
    """Return the mutations of benchmarks/mutations/AREA.yaml; default: of all files there."""
    entries = [entry for path in sorted(LISTS.glob(f"{area}.yaml")) for entry in yaml.safe_load(path.read_text())]
    return [Mutation(**entry) for entry in entries]


def main() -> None:
    """Run the mutations and print the table."""
    parser = script_parser(__doc__)
    parser.add_argument("--area", default="*", help="only those of one list: " + ", ".join(names_of_lists()))
    parser.add_argument("--only", nargs="+", help="only the mutations of these names")
    parser.add_argument("--file", nargs="+", help="only the mutations of these files")
    parser.add_argument("--output", help="write the JSON here; results of other mutations that it holds stay")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for the tests of one mutation")
    parser.add_argument("--no-baseline", dest="baseline", action="store_false", help="do not run the tests as they are")
    parser.add_argument("--page", action="store_true", help="write docs/mutations.md from the stored results")
    options = parser.parse_args()
    if options.page:
        PAGE.write_text(page(read_json(RESULTS / "mutations.json")), encoding="utf-8")
        return
    chosen = [m for m in mutations(options.area) if options.only is None or m.name in options.only]
    chosen = [m for m in chosen if options.file is None or m.file in options.file]
    for name in PRELOADED:
        importlib.import_module(name)
    results, commit = [], commit_of_the_code()
    with copied_tree() as tree:
        tests = dict.fromkeys(m.tests for m in chosen if not m.equivalent)
        failing = [given for given in tests if options.baseline and run_tests(tree, given, options.timeout) != 0]
        if failing:
            print("these tests fail without a mutation:", *failing, sep="\n  ", file=sys.stderr)
        for mutation in chosen:
            if mutation.tests not in failing:
                results.append(replace(judge(tree, mutation, options.timeout), commit=commit))
                print(line(results[-1]), flush=True)
    report = {
        "command": "python benchmarks/mutations.py --output docs/results/mutations.json",
        "listed": len(mutations()),
        "mutations": [asdict(result) for result in results],
    }
    print(summary(report))
    if options.output:
        stored = read_json(Path(options.output))["mutations"] if Path(options.output).exists() else []
        write_json(options.output, report | {"mutations": merged(stored, report["mutations"])})
    if failing:
        sys.exit(1)


def merged(stored: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the stored results with those that were measured again, in the order of the lists."""
    found = {(row["file"], row["name"]): row for row in [*stored, *new]}
    return [found[key] for m in mutations() if (key := (m.file, m.name)) in found]


def commit_of_the_code() -> str:
    """Return the short hash of the commit, with + if files differ from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "grpo", "tests") else "")


def summary(report: dict[str, Any]) -> str:
    """Return the counts in a sentence."""
    verdicts = Counter(row["verdict"] for row in report["mutations"])
    judged = verdicts["killed"] + verdicts["survived"]
    counts = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.most_common())
    return (
        f"{verdicts.total()} mutations: {counts}. {verdicts['killed'] / max(1, judged):.1%} of those that are not "
        f"equivalent were killed."
    )


def page(report: dict[str, Any]) -> str:
    """Return docs/mutations.md."""
    rows = report["mutations"]
    left = report["listed"] - len(rows)
    lines = [
        "# Mutation tests",
        "",
        f"`{report['command']}` puts small faults into a copy of the code, one at a time, and runs the fast tests of "
        "the mutated file. A fault is killed if a test fails. The faults are in `benchmarks/mutations/*.yaml`.",
        "",
        summary(report),
        *([f"The lists hold {left} more, which were not run for this page."] if left else []),
        "",
        "| file | faults | killed | survived | equivalent | run on the code of |",
        "|---|---|---|---|---|---|",
    ]
    for file in dict.fromkeys(row["file"] for row in rows):
        of_file = Counter(row["verdict"] for row in rows if row["file"] == file)
        counts = " | ".join(str(of_file[verdict]) for verdict in ("killed", "survived", "equivalent"))
        commits = dict.fromkeys(row["commit"] for row in rows if row["file"] == file)
        lines.append(f"| `{file}` | {of_file.total()} | {counts} | {', '.join(commits)} |")
    for verdict, title in (("survived", "Not noticed"), ("equivalent", "Equivalent")):
        found = [row for row in rows if row["verdict"] == verdict]
        if found:
            lines += ["", f"## {title}", "", "| file | fault | reason |", "|---|---|---|"]
            lines += [f"| `{row['file']}` | {row['name']} | {row['reason']} |" for row in found]
    lines += ["", "## Killed", "", "| file | fault |", "|---|---|"]
    lines += [f"| `{row['file']}` | {row['name']} |" for row in rows if row["verdict"] == "killed"]
    return markdown(lines)


def names_of_lists() -> list[str]:
    """Return the names of the lists."""
    return sorted(path.stem for path in LISTS.glob("*.yaml"))


def line(result: Result) -> str:
    """Return a row of the table as text."""
    reason = f" ({result.reason})" if result.reason else ""
    return f"{result.verdict:10} {result.seconds:5.1f} s  {result.file}: {result.name}{reason}"


@contextlib.contextmanager
def copied_tree() -> Iterator[Path]:
    """Copy the files of the repository into a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            check=True,
        )
        for name in filter(None, listed.stdout.decode().split("\0")):
            source, target = ROOT / name, Path(folder) / name
            if source.is_file():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target)
        yield Path(folder)


def judge(tree: Path, mutation: Mutation, timeout: float) -> Result:
    """Apply a mutation, run its tests, and restore the file."""
    if mutation.equivalent:
        return Result(mutation.name, mutation.file, "equivalent", mutation.tests, reason=mutation.equivalent)
    path, start = tree / mutation.file, time.perf_counter()
    original = path.read_text(encoding="utf-8")
    if not applies(mutation, original):
        return Result(mutation.name, mutation.file, "stale", mutation.tests)
    path.write_text(original.replace(mutation.old, mutation.new), encoding="utf-8")
    try:
        code = run_tests(tree, mutation.tests, timeout)
    finally:
        path.write_text(original, encoding="utf-8")
    if code in (pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.NO_TESTS_COLLECTED):
        return Result(mutation.name, mutation.file, "stale", mutation.tests, reason="there are no such tests")
    verdict = "survived" if code == 0 else "killed"
    return Result(mutation.name, mutation.file, verdict, mutation.tests, round(time.perf_counter() - start, 1))


def applies(mutation: Mutation, text: str) -> bool:
    """Return whether the file holds the old text exactly once."""
    return text.count(mutation.old) == 1 and mutation.old != mutation.new


def run_tests(tree: Path, tests: str, timeout: float) -> int:
    """Run pytest in a fork of this process. Return its exit code; -1 if it took too long or died."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os._exit(_in_child(tree, tests))
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else -1
        time.sleep(0.02)
    os.killpg(child, 9)
    os.waitpid(child, 0)
    return -1


def _in_child(tree: Path, tests: str) -> int:
    os.setpgid(0, 0)
    os.chdir(tree)
    sys.path.insert(0, str(tree))
    for name in [name for name in sys.modules if name.partition(".")[0] in ("grpo", "tests", "benchmarks")]:
        del sys.modules[name]  # not the copy's
    sys.dont_write_bytecode = True  # a stale .pyc could hide a mutation of the same size and second
    os.environ |= {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    log = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(log, stream)
    return int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *shlex.split(tests)]))


if __name__ == "__main__":
    main()
