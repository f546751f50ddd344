"""Rewards on probes: gold, wrong, empty and hostile completions of rows from the data."""

import inspect
import multiprocessing
import time
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from grpo.data.rows import Example
from grpo.errors import GrpoError
from grpo.rewards.calls import call_reward
from grpo.rewards.number_text import parse_number
from grpo.rewards.scoring import RewardSum
from grpo.rewards.text_match import same_text
from grpo.tools.check_result import Check, RewardCheck
from grpo.types import Completion, Group, Prompt

PROBED_ROWS = 16
GIVEN = "environment_reward"
"""Argument of rewards that the environment gives. They cannot be tried without its turns."""
DEADLINE = 10.0
"""Seconds for one reward on all probes. It runs in its own process, so that one that hangs can be ended."""

FORMS: dict[str, str] = {
    "xml": "<reasoning>\n{work}\n</reasoning>\n<answer>\n{answer}\n</answer>\n",
    "xml, work on one line": "<reasoning>\n{line}\n</reasoning>\n<answer>\n{answer}\n</answer>\n",
    "boxed": "{work}\nThe answer is \\boxed{{{answer}}}.",
    "hash": "{work}\n#### {answer}",
    "plain": "{answer}",
    "the whole answer column": "{solution}",
}
"""Answer formats. Gold and wrong answers are reported in the one that the rewards score highest."""

HOSTILE: dict[str, str] = {
    "several answers in one": "<reasoning>\n?\n</reasoning>\n<answer>\n{other} {answer}\n</answer>\n",
    "two answer blocks": "<answer>{other}</answer>\n<answer>{answer}</answer>",
    "9**9**9**9": "<reasoning>\n\n</reasoning>\n<answer>\n9**9**9**9\n</answer>\n",
    "tags, 100 kB": "</reasoning><answer>" * 5_000,
    "minus signs, 100 kB": "-" * 100_000,
    "escape codes and markup": "\x1b[2J\u202e<img src=x onerror=alert(1)>[link=file:///etc/passwd]",
}


@dataclass(frozen=True)
class Probe:
    """A row with its gold answer and a wrong one; both are empty where no row has a gold answer."""

    row: Example
    gold: str
    wrong: str
    wrong_solution: str = ""
    """A whole answer that is wrong: that of another row, or this one with the gold answer edited."""


@dataclass(frozen=True)
class Scored:
    """The values of one reward by kind of probe."""

    scores: dict[str, list[float | None]]
    milliseconds: float
    problem: str | None = None
    ends_the_run: bool = False
    """The problem would end the first step of training, too."""

    def means(self) -> dict[str, float | None]:
        return {kind: _mean(values) for kind, values in self.scores.items()}


def check_rewards(found: Check, score: RewardSum, rows: list[Example], tokenizer: PreTrainedTokenizerBase) -> None:
    """Score probes with every reward and add the results, problems and warnings to `found`."""
    probes = make_probes(rows)
    with_gold = bool(probes)
    if not with_gold:
        probes = [Probe(row, "", "") for row in rows[:PROBED_ROWS]]
        found.warnings.append("no row has a gold answer: rewards are tried on empty and hostile completions only")
    groups = probe_groups(probes, tokenizer, with_gold=with_gold)
    given = [name for name, function in score.functions.items() if GIVEN in inspect.signature(function).parameters]
    scored = {name: score_in_process(name, score, groups) for name in score.functions if name not in given}
    scored |= {name: Scored({kind: [None] for kind in groups}, 0.0) for name in given}
    means = {name: result.means() for name, result in scored.items()}
    totals = {
        kind: sum(weight * (means[name].get(kind) or 0.0) for name, weight in score.weights.items()) for kind in groups
    }
    found.form = max(FORMS if with_gold else [], key=lambda form: totals[f"gold {form}"], default="")
    for name, weight in score.weights.items():
        result = _reward_check(weight, scored[name], found.form)
        if name in given:
            result = replace(result, problem=None)
        found.rewards[name] = result
        if result.problem is not None:
            (found.problems if scored[name].ends_the_run else found.warnings).append(
                f"reward '{name}' is {result.problem}"
            )
    if with_gold and not given and all(result.problem is None for result in scored.values()):
        _compare_totals(found, totals)


def make_probes(rows: list[Example]) -> list[Probe]:
    """Return up to 16 rows with a gold answer, each with a wrong answer."""
    known = [row for row in rows if row.columns.get("answer")]
    chosen = known[:: max(1, len(known) // PROBED_ROWS)][:PROBED_ROWS]
    return [_probe(row, chosen) for row in chosen]


def _probe(row: Example, rows: list[Example]) -> Probe:
    """Return a row with a wrong answer of the same kind: another row's, else an edited one."""
    gold = str(row.columns["answer"])
    value = parse_number(gold)
    for other in rows:
        answer = str(other.columns["answer"])
        if not same_text(answer, gold) and (value is None or parse_number(answer) != value):
            return Probe(row, gold, answer, solution_of(other))
    wrong = str(value + 1) if value is not None else "\n".join(_edited(term) for term in gold.splitlines())
    solution = solution_of(row)
    for term, edited in zip(gold.splitlines(), wrong.splitlines(), strict=True):
        solution = solution.replace(term, edited)
    return Probe(row, gold, wrong, solution)


def _edited(term: str) -> str:
    """Return a term with its first two different neighbouring letters swapped, or doubled where there are none."""
    for place in range(len(term) - 1):
        if term[place] != term[place + 1]:
            return term[:place] + term[place + 1] + term[place] + term[place + 2 :]
    return term + (term or "?")


def solution_of(row: Example) -> str:
    return str(row.columns.get("solution") or row.columns.get("answer") or "")


def probe_groups(probes: list[Probe], tokenizer: PreTrainedTokenizerBase, *, with_gold: bool) -> dict[str, list[Group]]:
    """Return groups of one completion by kind: "gold FORM", "wrong FORM", "empty", "hostile NAME"."""
    groups: dict[str, list[Group]] = {}
    for form, template in FORMS.items() if with_gold else ():
        for kind in ("gold", "wrong"):
            made = [probe_group(probe.row, _written(template, probe, kind), tokenizer) for probe in probes]
            groups[f"{kind} {form}"] = made
    groups["empty"] = [probe_group(probe.row, "", tokenizer) for probe in probes]
    first = probes[0]
    for name, template in HOSTILE.items():
        text = template.replace("{answer}", first.gold).replace("{other}", first.wrong)
        groups[f"hostile {name}"] = [probe_group(first.row, text, tokenizer)]
    return groups


def _reward_check(weight: float, scored: Scored, form: str) -> RewardCheck:
    means = scored.means()
    hostile = [value for kind, value in means.items() if kind.startswith("hostile") and value is not None]
    shown = {
        "gold": means.get(f"gold {form}"),
        "wrong": means.get(f"wrong {form}"),
        "empty": means.get("empty"),
        "hostile": max(hostile, default=None),
    }
    problem = scored.problem
    different = {value for value in means.values() if value is not None}
    if problem is None and not different:
        problem = "not applicable to any probe"
    elif problem is None and form and len(different) > 1 and len(set(shown.values()) - {None}) == 1:
        problem = (
            f"blind: {shown['empty']} for gold, wrong, empty and hostile answers alike; only forms differ in which the "
            f"other rewards pay less"
        )
    elif problem is None and form and len(different) == 1:
        problem = f"constant: {shown['empty']} for gold, wrong, empty and hostile answers alike, so it teaches nothing"
    return RewardCheck(weight, shown, scored.milliseconds, problem)


def _compare_totals(found: Check, totals: dict[str, float]) -> None:
    """Compare the weighted sums of right, wrong and hostile answers."""
    gold, wrong = totals[f"gold {found.form}"], totals[f"wrong {found.form}"]
    if not gold > wrong:
        found.warnings.append(
            f"a right answer earns {gold:.3f}, a wrong one {wrong:.3f}: nothing tells the model to be right. Add a "
            f"reward that compares with the gold answer, such as --rewards.accuracy 1.0"
        )
    for kind, total in totals.items():
        if kind.startswith("hostile") and total >= gold:
            found.warnings.append(f"{kind.removeprefix('hostile ')} earns {total:.3f}, a right answer {gold:.3f}")


def score_in_process(
    name: str, score: RewardSum, groups: dict[str, list[Group]], deadline: float | None = None
) -> Scored:
    """Score every kind of probe with one reward, within the deadline in seconds (default: DEADLINE)."""
    if "fork" not in multiprocessing.get_all_start_methods():
        return _score_all(name, score, groups)
    deadline = deadline or DEADLINE
    context = multiprocessing.get_context("fork")  # fork: a reward from a user's file need not be importable
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(_score_all(name, score, groups)), daemon=True)
    process.start()
    sender.close()
    try:
        if receiver.poll(deadline):
            return receiver.recv()
        count = sum(map(len, groups.values()))
        return Scored({}, 0.0, f"too slow: not done after {deadline:.0f} s on {count} completions")
    except EOFError:
        return Scored({}, 0.0, "broken: its process died", ends_the_run=True)
    finally:
        process.kill()
        process.join()


def _score_all(name: str, score: RewardSum, groups: dict[str, list[Group]]) -> Scored:
    scores: dict[str, list[float | None]] = {}
    seconds, count = 0.0, 0
    for kind, made in groups.items():
        started = time.perf_counter()
        try:
            values = call_reward(name, score.functions[name], made, score.kwargs[name])
        except GrpoError as error:
            problem = f"broken on the {kind} completions: {error}"
            return Scored(scores, 0.0, problem, ends_the_run=kind.startswith("gold"))
        if not kind.startswith("hostile"):
            seconds, count = seconds + time.perf_counter() - started, count + len(made)
        scores[kind] = values
    return Scored(scores, 1000 * seconds / max(1, count))


def probe_group(row: Example, text: str, tokenizer: Any) -> Group:
    ids = tokenizer.encode(text[:2000], add_special_tokens=False)
    return Group(Prompt(0, row.messages, (), row.columns), [Completion(ids, [0.0] * len(ids), True, text)])


def _written(template: str, probe: Probe, kind: str) -> str:
    """Return the completion of a probe. The work of a wrong answer is wrong too: it must not hold the gold answer."""
    solution = solution_of(probe.row) if kind == "gold" else probe.wrong_solution
    answer = probe.gold if kind == "gold" else probe.wrong
    parts = solution.rpartition("####")
    work = (parts[0] or parts[2]).strip()
    if not probe.row.columns.get("solution"):  # the column says no more than the answer
        work = "..."
    return template.format(work=work, line=work.partition("\n")[0], answer=answer, solution=solution)


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
