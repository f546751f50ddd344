"""docs/theory.md: its names exist, its claims hold, and every paper cited anywhere is in the list."""

import ast
import json
import re
from pathlib import Path

import pytest
import torch

from grpo.advantages import ADVANTAGES, SUBSETS, group_advantages
from grpo.losses import LOSSES
from tests.test_trainer import run

ROOT = Path(__file__).parents[2]
THEORY = (ROOT / "docs" / "theory.md").read_text(encoding="utf-8")
ARXIV = re.compile(r"arXiv[\s:]+(\d{4}\.\d{5})")


def names_in(path: Path) -> set[str]:
    """Return the names of functions and classes at the top level of a file."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return {node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def test_every_function_and_test_that_is_named_exists() -> None:
    functions = set(re.findall(r"`(grpo/[\w/]+\.py):(\w+)`", THEORY))
    tests = set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", THEORY))
    assert len(functions) > 15 and len(tests) > 30
    for path, name in functions | tests:
        assert name in names_in(ROOT / path), f"{path} has no {name}"


@pytest.mark.parametrize("registry", [LOSSES, ADVANTAGES, SUBSETS], ids=["losses", "advantages", "subsets"])
def test_every_variant_is_on_the_page(registry: object) -> None:
    for name in registry.names():
        assert re.search(rf"`(objective\.subset: )?{name}`", THEORY) or name == "shortest", f"{name} is not explained"


def test_every_citation_is_in_the_list_and_none_is_there_for_nothing() -> None:
    listed = json.loads((ROOT / "docs" / "citations.json").read_text(encoding="utf-8"))
    cited: dict[str, str] = {}
    files = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    for folder in ("grpo", "launch", "benchmarks", "tests"):
        files += [*(ROOT / folder).rglob("*.py"), *(ROOT / folder).rglob("*.yaml")]
    for path in files:
        for number in ARXIV.findall(path.read_text(encoding="utf-8").replace("\n", " ")):
            cited.setdefault(number, str(path.relative_to(ROOT)))
    missing = {number: path for number, path in cited.items() if number not in listed}
    assert not missing, f"add title, authors and year to docs/citations.json: {missing}"
    assert set(listed) == set(cited)
    for number, entry in listed.items():
        assert set(entry) == {"name", "title", "authors", "year"}
        assert entry["year"] == 2000 + int(number[:2])  # the id begins with year and month of the first version


def expected_pull(p: float, count: int, scale: str) -> float:
    """Return the mean gradient with respect to p over all groups of `count` completions, right with probability p.

    A completion is one token; d log p(right) / dp = 1 / p, d log p(wrong) / dp = -1 / (1 - p).
    """
    right = torch.arange(count + 1, dtype=torch.float64)
    log_chance = torch.distributions.Binomial(count, torch.tensor(p, dtype=torch.float64)).log_prob(right)
    rewards_PG = (torch.arange(count) < right[:, None]).double()  # row k: k of them are right
    advantages_PG = group_advantages(rewards_PG, scale=scale)
    score_PG = rewards_PG / p - (1 - rewards_PG) / (1 - p)
    return float((log_chance.exp() * (advantages_PG * score_PG).mean(1)).sum())


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5, 0.9])
def test_dividing_by_the_deviation_maximises_the_arcsine(p: float) -> None:
    step = 1e-6
    arcsine = torch.asin(torch.tensor([p + step, p - step], dtype=torch.float64).sqrt()) * 2
    slope = float(arcsine[0] - arcsine[1]) / (2 * step)
    assert expected_pull(p, 400, "group") == pytest.approx(slope, rel=2e-2)
    # Not divided: the slope of p itself is 1, and its own reward in the baseline costs (G - 1) / G, exactly.
    for count in (2, 8, 400):
        assert expected_pull(p, count, "none") == pytest.approx((count - 1) / count, rel=1e-9)


def test_a_variant_and_an_estimator_of_ones_own_train_in_under_ten_lines(tmp_path: Path) -> None:
    source = (
        "from grpo import register_loss\n"
        "@register_loss('capped_from_a_file', per='token')\n"
        "def capped_from_a_file(ratio, advantages, *, epsilon):\n"
        "    return -ratio.clamp(max=1 + epsilon) * advantages\n"
        "def above_the_median(rewards_PG):\n"
        "    return rewards_PG - rewards_PG.median(dim=1, keepdim=True).values\n"
    )
    assert len(source.splitlines()) < 10
    (tmp_path / "mine.py").write_text(source)
    rows = run(
        tmp_path,
        "run",
        steps=2,
        eval_every=0,
        prompts_per_step=6,
        **{
            "objective.loss_type": f"{tmp_path}/mine.py:capped_from_a_file",
            "objective.advantage_estimator": f"{tmp_path}/mine.py:above_the_median",
            "objective.num_iterations": 2,
        },
    )
    assert any(row["policy/grad_norm"] > 0 for row in rows)
    written = [json.loads(line) for line in (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()]
    group = [row for row in written if row["draw"] == 0]
    median = sorted(row["reward"] for row in group)[1]  # torch's median of four: the lower one in the middle
    assert [row["advantage"] for row in group] == pytest.approx([row["reward"] - median for row in group])
