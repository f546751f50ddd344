"""Check: a config -> what training with it would meet, without loading a weight: data, prompts, rewards, memory, time.

P prompts per step, G completions per prompt.
"""

import math
import multiprocessing
import random
import time
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from grpo.config.schema import Config, flatten, to_dict
from grpo.data.card import check_permission
from grpo.data.rows import BadRows, Example, extraction_report, load_examples
from grpo.data.stream import prompt_token_ids, prompts_token_ids
from grpo.data.streaming import peek
from grpo.data.tokenizer import load_tokenizer
from grpo.errors import ConfigError, GrpoError
from grpo.models.strategies.base import Machine
from grpo.rewards.calls import call_reward
from grpo.rewards.math_answers import parse_number
from grpo.rewards.scoring import RewardSum
from grpo.rollout.engine import find_engine
from grpo.run.build import check_names
from grpo.tools.memory import estimate
from grpo.tracking.run_logger import check_trackers, choose_run_dir
from grpo.types import Completion, Group, Prompt

PROBED_ROWS = 16
MEASURED_ROWS = 8_000
"""Prompts that are tokenised for the lengths; more rows than that are measured at even distances."""
DEADLINE = 10.0
"""Seconds for one reward on all probes. It runs in a process of its own, so that one that hangs can be ended."""

FORMS: dict[str, str] = {
    "xml": "<reasoning>\n{work}\n</reasoning>\n<answer>\n{answer}\n</answer>\n",
    "xml, work on one line": "<reasoning>\n{line}\n</reasoning>\n<answer>\n{answer}\n</answer>\n",
    "boxed": "{work}\nThe answer is \\boxed{{{answer}}}.",
    "hash": "{work}\n#### {answer}",
    "plain": "{answer}",
}
"""Ways to write an answer down. The one that the rewards pay best is what gold and wrong answers are written in."""

HOSTILE: dict[str, str] = {
    "several answers in one": "<reasoning>\n?\n</reasoning>\n<answer>\n{other} {answer}\n</answer>\n",
    "two answer blocks": "<answer>{other}</answer>\n<answer>{answer}</answer>",
    "9**9**9**9": "<reasoning>\n\n</reasoning>\n<answer>\n9**9**9**9\n</answer>\n",
    "tags, 100 kB": "</reasoning><answer>" * 5_000,
    "minus signs, 100 kB": "-" * 100_000,
    "escape codes and markup": "\x1b[2J\u202e<img src=x onerror=alert(1)>[link=file:///etc/passwd]",
}


@dataclass(frozen=True)
class RewardCheck:
    """What one reward gave to the probes: the mean over rows, for "hostile" the largest. None = it did not apply."""

    weight: float
    scores: dict[str, float | None]
    milliseconds: float
    """Per completion, on gold, wrong and empty answers."""
    problem: str | None = None
    """None if it tells at least two kinds of completions apart."""


@dataclass(frozen=True)
class PromptCheck:
    text: str
    tokens: int
    answer: str | None


@dataclass
class Check:
    """Everything that was found. `problems` are what a run should not start with; `warnings` what one should know."""

    config: dict[str, Any] = field(default_factory=dict)
    """Every key with its value, flat."""
    run_dir: str = ""
    data: str = ""
    """Rows read, used and left out, and the rate of the extractor."""
    rows: int = 0
    held_out: int = 0
    with_answer: int = 0
    rejected: list[dict[str, str]] = field(default_factory=list)
    """Rows that cannot be used, with data.bad_rows skip: the place and the reason."""
    measured: int = 0
    """Rows whose prompts were tokenised for what follows."""
    too_long: int = 0
    lengths: dict[str, int] = field(default_factory=dict)
    duplicates: int = 0
    overlap: int = 0
    prompts: list[PromptCheck] = field(default_factory=list)
    batch: str = ""
    steps: int = 0
    form: str = ""
    rewards: dict[str, RewardCheck] = field(default_factory=dict)
    parameters: int = 0
    memory: dict[str, float] = field(default_factory=dict)
    """GiB on each process, by part; "peak" is the most at one time (grpo/tools/memory.py)."""
    least_seconds_per_step: float = 0.0
    matrix_rate: float = 0.0
    """Floating-point operations per second that this machine was measured to do."""
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def check(config: Config, machine: Machine | None = None) -> Check:
    """Everything about `config` that can be known before a weight is loaded. `machine`: what to estimate memory for.

    Raises ConfigError for what `train` would refuse as well.
    """
    found = Check(config=flatten(to_dict(config)))
    check_names(config.objective)
    find_engine(config.rollout.engine)
    score = RewardSum(config.rewards, config.reward_kwargs)
    check_trackers(config.tracking.report_to)
    found.run_dir = str(choose_run_dir(config, datetime.now()))
    permission = check_permission(config.data)
    if permission:
        found.warnings.append(permission)
    bad = BadRows(skip=config.data.bad_rows == "skip")
    streaming = config.data.streaming
    rows = peek(config.data, bad) if streaming else load_examples(config.data, "train", config.seed, bad)
    if not rows:
        raise ConfigError(f"data.name {config.data.name} gave no training rows")
    found.data, found.rejected = extraction_report(rows, config.data, len(bad.rejected)), bad.rejected
    if streaming:
        found.data += f" (data.streaming: only the first {len(rows):,} rows were looked at)"
    held_out = load_examples(config.data, "held_out", config.seed) if config.eval_every else []
    score.check_columns(set(rows[0].columns))
    tokenizer, model = tokenizer_and_shape(config, rows)
    _check_data(found, config, rows, held_out, tokenizer)
    _check_rewards(found, score, rows, tokenizer)
    prompts = None if streaming else round(len(rows) * (1 - found.too_long / found.measured))
    found.batch, found.steps = batch_in_words(config, prompts), steps_of(config, prompts)
    found.parameters = sum(parameter.numel() for parameter in model.parameters())
    found.memory = estimate(config, model, found.lengths["max"], machine or Machine())
    found.matrix_rate = matrix_rate()
    found.least_seconds_per_step = least_operations(config, found) / found.matrix_rate
    return found


def tokenizer_and_shape(config: Config, rows: list[Example]) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """The tokenizer, and the model on the "meta" device: shapes, no weights. The starter's are made without warm-up."""
    name = config.model.name
    if name != "starter":
        tokenizer = load_tokenizer(name, config.model.gguf_file)
        try:
            shape = AutoConfig.from_pretrained(name, trust_remote_code=False)
            with torch.device("meta"):
                return tokenizer, AutoModelForCausalLM.from_config(shape)
        except (OSError, ValueError) as error:
            raise ConfigError(f"model.name '{name}' cannot be loaded: {error}") from error
    from grpo.models.tiny import GSM8K_RECIPE, Recipe, completion_text, generate_problems, make_model, make_tokenizer

    recipe = Recipe() if config.data.name == "arithmetic" else GSM8K_RECIPE
    if config.data.name == "arithmetic":
        problems = generate_problems(recipe.problems, seed=config.seed, split="train")
    else:
        problems = [_worked(row) for row in rows]
    chance = random.Random(f"starter {config.seed}")
    texts = [(row["question"], completion_text(row["answer"], recipe, chance)) for row in problems]
    made = make_tokenizer([part for text in texts for part in text], recipe.vocabulary)
    with torch.device("meta"):
        return made, make_model(made, recipe)


def steps_of(config: Config, prompts: int | None) -> int:
    """How many steps training does: num_train_epochs decides where it is set. `prompts` None = a stream."""
    if config.num_train_epochs is None or prompts is None:
        return config.steps
    return math.ceil(config.num_train_epochs * prompts / config.prompts_per_step)


def batch_in_words(config: Config, prompts: int | None) -> str:
    """8 prompts x 16 completions = 128 completions per step; ... `prompts` of one epoch; None = a stream, of unknown length."""
    P, G = config.prompts_per_step, config.sampling.num_generations
    steps = steps_of(config, prompts)
    drawn = f"{steps} steps = {steps * P:,} prompts"
    if prompts is not None:
        drawn += f" = {steps * P / max(1, prompts):.2f} epochs of {prompts:,}"
    tokens = P * G * config.sampling.max_completion_length
    iterations = config.objective.num_iterations
    updates = "1 optimizer step" if iterations == 1 else f"{iterations} optimizer steps"
    return (
        f"{P} prompts x {G} completions = {P * G} completions per step, at most {tokens:,} tokens; {updates} on them, in "
        f"batches of up to {config.tokens_per_batch:,} tokens; {drawn}; all over all processes together"
    )


def least_operations(config: Config, found: Check) -> float:
    """Floating-point operations of a step with completions of half the limit: 2 per weight and token to sample, 2 for
    the reference, 6 to learn, per iteration (forward 2, backward 4). Kaplan et al. 2020, section 2.1."""
    completions = config.prompts_per_step * config.sampling.num_generations
    tokens = completions * config.sampling.max_completion_length / 2
    passes = 2 + (2 if config.objective.beta > 0 else 0) + 6 * config.objective.num_iterations
    return passes * found.parameters * (tokens + config.prompts_per_step * found.lengths["median"])


def matrix_rate() -> float:
    """Floating-point operations per second of a float32 matrix product here, the best of five."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    size = 512
    a = torch.rand(size, size, device=device)
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def probes(rows: list[Example]) -> list[tuple[Example, str, str]]:
    """Up to 16 rows with a gold answer, each with that answer and a wrong one."""
    known = [row for row in rows if row.columns.get("answer")]
    chosen = known[:: max(1, len(known) // PROBED_ROWS)][:PROBED_ROWS]
    golds = [str(row.columns["answer"]) for row in chosen]
    return [(row, gold, _other(gold, golds)) for row, gold in zip(chosen, golds, strict=True)]


def _other(gold: str, golds: list[str]) -> str:
    """A wrong answer of the same kind: another row's, else a number or a word that is not the gold one."""
    value = parse_number(gold)
    different = [answer for answer in golds if answer != gold and (value is None or parse_number(answer) != value)]
    if different:
        return different[0]
    return str(value + 1) if value is not None else gold + " not"


def _check_data(
    found: Check, config: Config, rows: list[Example], held_out: list[Example], tokenizer: PreTrainedTokenizerBase
) -> None:
    measured = rows if len(rows) <= MEASURED_ROWS else rows[:: -(-len(rows) // MEASURED_ROWS)]
    many = [row.messages for row in measured]
    blocks = [prompts_token_ids(many[start : start + 1000], tokenizer) for start in range(0, len(many), 1000)]
    lengths = sorted(len(ids) for block in blocks for ids in block)
    found.measured = len(measured)
    found.rows, found.held_out = len(rows), len(held_out)
    found.with_answer = sum(row.columns.get("answer") is not None for row in rows)
    found.lengths = {
        "shortest": lengths[0],
        "median": lengths[len(lengths) // 2],
        "95 %": lengths[min(len(lengths) - 1, len(lengths) * 95 // 100)],
        "max": lengths[-1],
    }
    limit = config.data.max_prompt_length
    found.too_long = sum(length > limit for length in lengths) if limit is not None else 0
    if limit is not None:
        found.lengths["max"] = min(limit, lengths[-1])
    seen = {_identity(row) for row in rows}
    found.duplicates = len(rows) - len(seen)
    found.overlap = sum(_identity(row) in seen for row in held_out)
    for row in rows[:2]:
        ids = prompt_token_ids(row.messages, tokenizer)
        answer = row.columns.get("answer")
        found.prompts.append(PromptCheck(str(tokenizer.decode(ids)), len(ids), None if answer is None else str(answer)))
    if found.too_long == len(lengths):
        raise ConfigError(
            f"data.max_prompt_length is {limit}, which leaves none of the {len(lengths)} prompts (the shortest has "
            f"{lengths[0]} tokens): raise it"
        )
    if found.overlap:
        found.problems.append(
            f"{found.overlap} of {len(held_out)} held-out questions are among the training rows: the evaluation would "
            f"measure memory. Take them out of data.path or data.eval_path"
        )
    if found.duplicates:
        found.warnings.append(f"{found.duplicates} training rows repeat a question that is there already")
    if found.too_long:
        of = "" if len(lengths) == len(rows) else f" of the {len(lengths):,} measured"
        found.warnings.append(f"{found.too_long}{of} prompts are longer than data.max_prompt_length {limit}: left out")


def _check_rewards(found: Check, score: RewardSum, rows: list[Example], tokenizer: PreTrainedTokenizerBase) -> None:
    chosen = probes(rows)
    if not chosen:
        chosen = [(row, "", "") for row in rows[:PROBED_ROWS]]
        found.warnings.append("no row has a gold answer: rewards are tried on empty and hostile completions only")
    with_gold = bool(chosen[0][1])
    texts: dict[str, list[tuple[Example, str]]] = {}
    for form, template in FORMS.items() if with_gold else ():
        texts[f"gold {form}"] = [(row, _written(template, row, gold)) for row, gold, _ in chosen]
        texts[f"wrong {form}"] = [(row, _written(template, row, other)) for row, _, other in chosen]
    texts["empty"] = [(row, "") for row, _, _ in chosen]
    for kind, template in HOSTILE.items():
        texts[f"hostile {kind}"] = [
            (row, template.replace("{answer}", gold).replace("{other}", other)) for row, gold, other in chosen[:1]
        ]
    groups = {kind: [_group(row, text, tokenizer) for row, text in made] for kind, made in texts.items()}
    given = {name: _in_a_process(name, score, groups) for name in score.functions}
    means = {name: {kind: _mean(values) for kind, values in result.scores.items()} for name, result in given.items()}

    def total(kind: str) -> float:
        return sum(weight * (means[name].get(kind) or 0.0) for name, weight in score.weights.items())

    forms = list(FORMS) if with_gold else []
    found.form = max(forms, key=lambda form: total(f"gold {form}"), default="")
    for name, weight in score.weights.items():
        mean = means[name]
        hostile = [value for kind, value in mean.items() if kind.startswith("hostile") and value is not None]
        shown = {
            "gold": mean.get(f"gold {found.form}"),
            "wrong": mean.get(f"wrong {found.form}"),
            "empty": mean.get("empty"),
            "hostile": max(hostile, default=None),
        }
        problem = given[name].problem
        different = {value for value in mean.values() if value is not None}
        if problem is None and not different:
            problem = "applies to nothing"
        elif problem is None and with_gold and len(different) == 1:
            problem = (
                f"constant: {shown['empty']} for gold, wrong, empty and hostile answers alike, so it teaches nothing"
            )
        found.rewards[name] = RewardCheck(weight, shown, given[name].milliseconds, problem)
        if problem is not None:
            (found.problems if given[name].problem else found.warnings).append(f"reward '{name}' is {problem}")
    if with_gold and not found.problems:
        gold, wrong = total(f"gold {found.form}"), total(f"wrong {found.form}")
        if not gold > wrong:
            found.problems.append(
                f"a right answer earns {gold:.3f}, a wrong one {wrong:.3f}: nothing tells the model to be right. Add a "
                f"reward that compares with the gold answer, such as --rewards.accuracy 1.0"
            )
        for kind in groups:
            if kind.startswith("hostile") and total(kind) >= gold:
                found.warnings.append(
                    f"{kind.removeprefix('hostile ')} earns {total(kind):.3f}, a right answer {gold:.3f}"
                )


@dataclass(frozen=True)
class _Given:
    scores: dict[str, list[float | None]]
    milliseconds: float
    problem: str | None = None


def _in_a_process(name: str, score: RewardSum, groups: dict[str, list[Group]]) -> _Given:
    """One reward on every kind of probe, with a deadline."""
    if "fork" not in multiprocessing.get_all_start_methods():
        return _score_all(name, score, groups)
    context = multiprocessing.get_context("fork")  # fork: a reward from a file of one's own need not be importable
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=lambda: there.send(_score_all(name, score, groups)), daemon=True)
    process.start()
    there.close()
    try:
        if here.poll(DEADLINE):
            return here.recv()
        return _Given(
            {}, 0.0, f"too slow: not done after {DEADLINE:.0f} s on {sum(map(len, groups.values()))} completions"
        )
    except EOFError:
        return _Given({}, 0.0, "broken: its process died")
    finally:
        process.kill()
        process.join()


def _score_all(name: str, score: RewardSum, groups: dict[str, list[Group]]) -> _Given:
    scores: dict[str, list[float | None]] = {}
    seconds, count = 0.0, 0
    for kind, made in groups.items():
        started = time.perf_counter()
        try:
            values = call_reward(name, score.functions[name], made, score.kwargs[name])
        except GrpoError as error:
            return _Given(scores, 0.0, f"broken on the {kind} completions: {error}")
        if not kind.startswith("hostile"):
            seconds, count = seconds + time.perf_counter() - started, count + len(made)
        scores[kind] = values
    return _Given(scores, 1000 * seconds / max(1, count))


def score_rows(config: Config, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of {"prompt", "completion", + columns} -> the same rows with "rewards" (by name, unweighted) and "reward".

    A prompt that is text gives rewards a completion that is text; one of messages gives messages. Rows of a run's
    rollouts.jsonl are taken as well: theirs were chats. Raises ConfigError for rows without the two fields.
    """
    score = RewardSum(config.rewards, config.reward_kwargs)
    groups: list[Group] = []
    for number, row in enumerate(rows, start=1):
        if "prompt" not in row or "completion" not in row:
            raise ConfigError(f"--completions, row {number}: needs 'prompt' and 'completion', has {', '.join(row)}")
        columns = {key: value for key, value in row.items() if key not in ("prompt", "completion")}
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(columns.get("columns"), dict) and "draw" in columns:  # a row of rollouts.jsonl
            columns = {"question": prompt, **columns["columns"]}
            prompt = [{"role": "user", "content": prompt}]
        if isinstance(completion, list):
            completion = completion[-1]["content"] if completion else ""
            prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        ids = row.get("completion_ids") or []
        groups.append(Group(Prompt(number, prompt, (), columns), [Completion(ids, [], True, str(completion))]))
    if not groups:
        return []
    score.check_columns({name for group in groups for name in group.prompt.columns})
    scores = score(groups)
    scored = []
    for index, row in enumerate(rows):
        by_name = {name: _number(values[index, 0]) for name, values in scores.by_name.items()}
        scored.append({**row, "rewards": by_name, "reward": _number(scores.rewards_PG[index, 0])})
    return scored


def _number(value: torch.Tensor) -> float | None:
    number = float(value)
    return None if number != number else number


def _group(row: Example, text: str, tokenizer: PreTrainedTokenizerBase) -> Group:
    ids = tokenizer.encode(text[:2000], add_special_tokens=False)
    return Group(Prompt(0, row.messages, (), row.columns), [Completion(ids, [0.0] * len(ids), True, text)])


def _written(template: str, row: Example, answer: str) -> str:
    work = str(row.columns.get("solution") or "...").rpartition("####")
    text = (work[0] or work[2]).strip()
    return template.format(work=text, line=text.partition("\n")[0], answer=answer)


def _worked(row: Example) -> dict[str, str]:
    return {
        "question": str(row.columns.get("question", "")),
        "answer": str(row.columns.get("solution") or row.columns.get("answer") or ""),
    }


def _identity(row: Example) -> str:
    return " ".join(str(row.columns.get("question", row.messages)).split())


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
