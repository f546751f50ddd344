"""Reliability: every fault of the list below, put in by a test -> docs/results/reliability.json and docs/reliability.md.

python benchmarks/reliability.py            # all rows; --rows R2 R4 for some (the others keep their last result)
python benchmarks/reliability.py --trl      # the same faults on TRL, where they can be run; needs: pip install -e ".[benchmark]"
python benchmarks/reliability.py --page     # the page again, from the stored results
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from grpo.errors import ConfigError, GrpoError
from grpo.runtime.command import run_main

ROOT = Path(__file__).parent.parent
RESULTS, PAGE = ROOT / "docs" / "results" / "reliability.json", ROOT / "docs" / "reliability.md"

ROWS: dict[str, tuple[str, list[str]]] = {
    "R1": (
        "stopped at any step and resumed: weights, moments, schedule, every metric but times equal to the bit; full, LoRA, "
        "num_iterations 1 and 2; two ranks; with completions sampled ahead; what adaptive KL and dynamic sampling have come to",
        [
            "run/test_resume.py::test_resume_is_exact_at_every_step",
            "runtime/test_ranks.py::test_resume_on_two_ranks_and_on_another_number_of_them",
            "runtime/test_ranks.py::test_resume_on_two_ranks_with_lora_and_two_iterations",
            "rollout/test_async_sampler.py::test_a_run_that_samples_ahead_is_resumed_to_the_bit",
            "test_trainer.py::test_what_a_run_has_come_to_is_resumed_too",
        ],
    ),
    "R2": (
        "kill -9 before each write, fsync, rename and removal of a save, found by tracing its system calls",
        ["run/test_checkpoint.py::test_killed_before_every_call_that_changes_a_file"],
    ),
    "R3": (
        "each file of a checkpoint cut short, or one bit flipped: named, and the one before is used",
        [
            "run/test_resume.py::test_a_damaged_file_is_named_and_the_checkpoint_before_is_used",
            "run/test_checkpoint.py::test_a_damaged_checkpoint_is_named_and_the_one_before_is_used",
        ],
    ),
    "R4": (
        "full disk (the system refuses the write): training goes on, the older checkpoint stays; exit 3 if the last save fails; "
        "free space is looked up before training and before each checkpoint",
        [
            "runtime/test_outages.py::test_a_full_disk_does_not_stop_training",
            "runtime/test_outages.py::test_a_last_save_that_fails_is_exit_code_3_and_costs_nothing_else",
            "runtime/test_outages.py::test_lines_wait_for_room_and_none_is_torn_or_doubled",
            "runtime/test_outages.py::test_too_little_room_is_said_before_training",
            "runtime/test_outages.py::test_a_checkpoint_that_will_not_fit_is_not_begun",
        ],
    ),
    "R5": (
        "SIGTERM, SIGUSR1, Ctrl-C in each phase, to one rank or all; a second one; what is resumed then equals an "
        "unstopped run to the bit",
        [
            "runtime/test_signals.py::test_a_signal_in_each_phase",
            "runtime/test_signals.py::test_a_second_signal_a_locked_directory_and_the_exit_code",
            "runtime/test_signals.py::test_the_exit_code_of_the_command",
            "runtime/test_ranks.py::test_a_signal_to_one_rank_or_all_of_them",
        ],
    ),
    "R6": (
        "one rank raises, or hangs: the job ends, its own words first",
        [
            "runtime/test_ranks.py::test_a_rank_that_fails_ends_the_job_with_its_own_words_first",
            "runtime/test_ranks.py::test_a_rank_that_hangs_ends_the_job",
        ],
    ),
    "R7": (
        "a reward that hangs, also inside C code: killed, masked, counted; given up after three silent steps",
        [
            "rewards/test_workers.py::test_a_hang_is_killed_and_only_it_is_masked",
            "rewards/test_workers.py::test_a_slow_reward_makes_no_other_one_wait",
            "rewards/test_workers.py::test_silence_for_three_steps_ends_the_run",
        ],
    ),
    "R8": (
        "a reward that raises: masked and counted; above 20 % of a step the run ends",
        [
            "rewards/test_workers.py::test_a_reward_that_fails_often_ends_the_run",
            "rewards/test_workers.py::test_what_becomes_of_a_failure_can_be_chosen",
            "rewards/test_workers.py::test_a_failed_part_masks_the_sum",
        ],
    ),
    "R9": (
        "NaN, infinity, text, wrong length, nested values; no reward vector makes a non-finite advantage",
        [
            "rewards/test_workers.py::test_one_bad_completion_is_masked_and_counted",
            "rewards/test_rewards.py::test_a_bad_return_value_is_named",
            "rewards/test_workers.py::test_no_reward_vector_makes_a_non_finite_advantage",
            "test_advantages.py::test_any_reward_vector_gives_finite_advantages",
        ],
    ),
    "R10": (
        "NaN or infinity in loss or gradient, on one rank only: the step is skipped on all, bit for bit; three in a row: exit 4",
        [
            "runtime/test_ranks.py::test_nan_on_one_rank_changes_nothing_on_any",
            "runtime/test_ranks.py::test_three_skipped_steps_in_a_row_end_the_run",
        ],
    ),
    "R11": (
        "groups that are all flat, and ten other reasons not to learn: said once, with the mend",
        ["tracking/test_diagnostics.py", "test_trainer.py::test_flat_groups_move_nothing_not_even_by_weight_decay"],
    ),
    "R12": (
        "all cut off, all ended at once, one token each",
        ["data/test_data_faults.py::test_odd_lengths_are_finite"],
    ),
    "R13": (
        "prompts at the limit and beyond, chat template counted",
        [
            "data/test_data_faults.py::test_the_limit_counts_the_chat_template",
            "data/test_stream.py::test_render_prompts_leaves_out_long_ones_and_keeps_the_index",
        ],
    ),
    "R14": (
        "twelve kinds of bad rows: file, line, reason; or left out and written down",
        [
            "data/test_data_faults.py::test_a_bad_row_is_named_or_left_out",
            "data/test_data_faults.py::test_a_run_writes_down_the_rows_that_it_left_out",
            "data/test_data.py::test_an_unusable_file_is_named_with_its_line",
            "data/test_data.py::test_other_unusable_sources",
        ],
    ),
    "R15": (
        "repeated questions; held-out ones among the training rows",
        [
            "data/test_data_faults.py::test_repeated_and_leaked_questions_are_counted",
            "tools/test_check.py::test_held_out_questions_among_the_training_rows",
        ],
    ),
    "R16": (
        "letters beyond ASCII, lone surrogates, U+0000; NFC on both sides",
        [
            "data/test_data_faults.py::test_letters_come_back_as_they_were",
            "data/test_data_faults.py::test_rewards_in_other_processes_see_the_letters_as_they_are",
            "data/test_data_faults.py::test_both_sides_are_compared_in_nfc",
            "test_security.py::test_hostile_text_survives_the_files",
        ],
    ),
    "R17": (
        "what looks like a number",
        ["rewards/test_rewards.py::test_parse_number", "rewards/test_rewards.py::test_parse_number_refuses"],
    ),
    "R18": (
        "tokenizers without end token, with several, with pad = end; without template; doubled BOS",
        [
            "data/test_data_faults.py::test_end_tokens",
            "data/test_data_faults.py::test_the_end_token_is_trained_where_it_is_the_padding_too",
            "data/test_stream.py::test_a_template_that_doubles_the_bos_is_mended",
            "data/test_stream.py::test_without_a_template_the_prompt_is_plain",
        ],
    ),
    "R19": (
        "a reference with another vocabulary; one whose KL does not start at 0; with LoRA, the adapter off is the start",
        [
            "run/test_build.py::test_a_reference_with_another_vocabulary_is_refused",
            "models/test_reference.py::test_a_frozen_copy_stays_where_the_policy_started",
            "models/test_reference.py::test_another_checkpoint",
            "models/test_lora.py::test_off_is_the_start_and_the_copy_is_the_policy",
        ],
    ),
    "R20": (
        "settings changed on resume: free, with a flag, or refused; another number of ranks, the same prompts",
        [
            "run/test_resume.py::test_a_changed_learning_rate_is_applied_and_said",
            "run/test_resume.py::test_what_would_be_another_run_needs_a_flag",
            "run/test_resume.py::test_what_does_not_fit_is_refused_before_weights",
            "run/test_resume.py::test_a_checkpoint_without_progress_goes_on_exactly",
            "runtime/test_ranks.py::test_resume_on_two_ranks_and_on_another_number_of_them",
        ],
    ),
    "R21": (
        "W&B raises, or hangs, at start, log or finish; no key",
        [
            "runtime/test_outages.py::test_a_tracker_that_hangs_is_left_behind",
            "runtime/test_outages.py::test_a_call_that_overstays_is_noticed_while_the_run_goes_on",
            "runtime/test_outages.py::test_a_call_that_never_returns_does_not_hold_up_the_end_of_the_program",
            "tracking/test_run_logger.py::test_a_tracker_that_raises_is_switched_off_with_one_warning",
            "tracking/test_run_logger.py::test_without_a_key_wandb_is_offline_from_the_start",
        ],
    ),
    "R22": (
        "output full, closed or a pipe that ends, ASCII locale, no terminal: the same weights",
        [
            "runtime/test_outages.py::test_without_a_terminal_the_weights_are_the_same",
            "tracking/test_run_logger.py::test_exit_code_stays_0_when_stdout_is_gone",
        ],
    ),
    "R23": (
        "no network: training, evaluation and resume try no connection; a push that the hub refuses: exit 3, nothing lost, the "
        "command that tries again",
        [
            "runtime/test_outages.py::test_without_a_network_none_is_asked_for",
            "tracking/test_report.py::test_a_push_that_fails_loses_nothing",
        ],
    ),
    "R24": (
        "two runs in one directory; a lock after kill -9",
        [
            "runtime/test_signals.py::test_a_second_signal_a_locked_directory_and_the_exit_code",
            "runtime/test_signals.py::test_a_lock_is_freed_by_kill_9",
        ],
    ),
    "R25": (
        "300 steps: memory, files, threads, processes",
        [
            "runtime/test_outages.py::test_300_steps_leave_no_trace",
            "rewards/test_workers.py::test_no_process_thread_or_file_is_left",
        ],
    ),
    "R26": (
        "after a resume each step stands once in the records, and in TensorBoard, W&B and Trackio",
        [
            "tracking/test_run_logger.py::test_resume_drops_the_rows_that_will_be_made_again",
            "tracking/test_backends.py",
        ],
    ),
    "X1": (
        "code in a model folder",
        [
            "test_security.py::test_code_of_a_model_folder_is_not_run",
            "test_security.py::test_each_load_by_transformers_refuses_remote_code",
        ],
    ),
    "X2": (
        "pickles in checkpoints and weights",
        [
            "test_security.py::test_a_pickle_in_place_of_any_file_is_not_loaded",
            "test_security.py::test_a_pickle_in_place_of_any_file_of_a_lora_run_is_not_loaded",
        ],
    ),
    "X3": (
        "code in what the model writes",
        ["test_security.py::test_what_no_source_file_may_hold", "rewards/test_countdown.py::test_attacks_are_refused"],
    ),
    "X5": (
        "64 hostile completions, math_verify among the rewards",
        ["rewards/test_workers.py::test_64_hostile_completions"],
    ),
    "X6": (
        "hostile text for the built-in rewards",
        [
            "rewards/test_rewards.py::test_hostile_text_takes_bounded_time",
            "rewards/test_rewards.py::test_hostile_answers_take_bounded_time",
        ],
    ),
    "X7": (
        "secrets in the environment and in .env",
        [
            "test_security.py::test_secrets_are_found_nowhere",
            "test_security.py::test_an_error_does_not_tell_a_secret",
            "test_security.py::test_secrets_are_not_settings",
        ],
    ),
    "X8": (
        "the dashboard: this machine only, or a password; no file of the run directory is served",
        [
            "tools/test_dashboard.py::test_nobody_else_without_a_password",
            "tools/test_dashboard.py::test_this_machine_needs_none",
            "tools/test_dashboard.py::test_files_are_not_served",
            "tools/test_dashboard.py::test_no_event_is_an_open_interface",
        ],
    ),
    "X9": (
        "markup, escape codes, direction marks",
        [
            "test_security.py::test_hostile_text_is_shown_not_obeyed",
            "tools/test_dashboard.py::test_what_a_run_found_about_itself_is_shown_and_stays_text",
            "tools/test_dashboard_browser.py::test_every_page_loads_and_a_hostile_completion_stays_text",
            "tracking/test_report.py::test_a_completion_cannot_leave_its_block",
            "data/test_card.py::test_a_run_records_its_card_and_the_model_card_shows_it",
        ],
    ),
    "X10": ("run names", ["test_security.py::test_run_names_stay_in_the_output_folder"]),
    "X11": ("YAML", ["test_security.py::test_yaml", "test_security.py::test_yaml_numbers"]),
    "X12": (
        "columns that rewards would confuse",
        [
            "test_security.py::test_columns_that_rewards_would_confuse",
            "run/test_build.py::test_a_reward_that_needs_a_column_the_data_lacks",
        ],
    ),
    "X13": ("a reward file that has changed", ["run/test_resume.py::test_a_changed_reward_file_is_warned_about"]),
    "X14": (
        "versions: pinned, and a lock file with hashes that agrees with them",
        [
            "test_security.py::test_requirements_are_pinned",
            "test_security.py::test_the_lock_holds_what_is_required_with_hashes",
        ],
    ),
}
NOT_HERE = {
    "X4": "no reward executes what a model writes, so there is no sandbox to test (SECURITY.md)",
}
TRL_FAULTS = {
    "window": "resume from a checkpoint inside a generation window (steps_per_generation 4, stopped after 2 of 4 steps)",
    "boundary": "resume where every step samples anew",
    "nan": "all rewards NaN",
    "stdout": "standard output on a full disk, log_completions on",
    "disk": "a checkpoint that does not fit on the disk, save_total_limit 1",
}
OURS = {
    "window": "R1: equal to the bit at every step (a step samples and learns as a whole, num_iterations included)",
    "boundary": "R1: the same",
    "nan": "R8, R9: exit 5, naming the reward and three completions",
    "stdout": "R22: exit 0, the same weights",
    "disk": "R4: a warning, training goes on, the older checkpoint stays",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="*", help="only these rows")
    parser.add_argument("--trl", action="store_true", help="the faults on TRL instead")
    parser.add_argument("--page", action="store_true", help="write the page from the stored results")
    parser.add_argument("--fault", choices=list(TRL_FAULTS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.fault:
        print(json.dumps(trl_fault(arguments.fault)), file=sys.stderr)
        return
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": {}, "trl": {}}
    if arguments.trl:
        results["trl"] = {"version": version("trl"), **{name: run_fault(name) for name in TRL_FAULTS}}
    elif not arguments.page:
        for name in arguments.rows or ROWS:
            if name not in ROWS:
                raise ConfigError(f"--rows: there is no row {name}, there are {', '.join(ROWS)}")
        results["rows"] |= measure(arguments.rows or list(ROWS))
    results["machine"] = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    results["date"] = results.get("date") if arguments.page else str(date.today())
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    PAGE.write_text(page(results))
    failed = [name for name, row in results["rows"].items() if row["failed"]]
    if failed:
        raise GrpoError(f"rows with a test that failed: {', '.join(failed)}; {PAGE} shows them")


def measure(names: list[str]) -> dict[str, Any]:
    """Runs the rows' tests in one go; -> for each row how many passed, failed, were skipped, and what they recorded.

    Raises GrpoError if pytest ran none of a row's tests.
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
        file = case.get("classname", "").rpartition(".")[2] + ".py"
        if not {file, f"{file}::{case.get('name', '').partition('[')[0]}"} & set(tests):
            continue
        tags = {child.tag for child in case}
        row["failed" if tags & {"failure", "error"} else "skipped" if "skipped" in tags else "passed"] += 1
        for figure in case.iter("property"):
            row["figures"].setdefault(figure.get("name"), []).append(figure.get("value"))
    return row


def page(results: dict[str, Any]) -> str:
    """docs/reliability.md. Pure: the page is what the results say, and a test holds it to them."""
    lines = [
        "# Reliability",
        "",
        "Faults are put in from the tests, from outside the trainer. `python benchmarks/reliability.py` runs the tests of every row and "
        "writes this page; `--trl` runs the same faults on TRL, where they can be run. A row's result is how many cases passed (a case "
        "is a fault, or one place or form of it), and what they counted, all cases together.",
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
            shown += f"; {figure}: {_together(figure, values)}"
        lines.append(f"| {name} | {fault} | {', '.join(f'`{test}`' for test in tests)} | {shown} |")
    lines += ["", *(f"- {name}: {why}." for name, why in NOT_HERE.items()), "", "## The same faults on TRL", ""]
    trl = results["trl"]
    if not trl:
        return "\n".join([*lines, "Not measured.", ""])
    lines += [f"TRL {trl['version']}, a tiny random model on the CPU.", "", "| fault | TRL | ours |", "|---|---|---|"]
    lines += [f"| {fault} | {trl[name]} | {OURS[name]} |" for name, fault in TRL_FAULTS.items()]
    return "\n".join([*lines, ""])


def _together(figure: str, values: list[str]) -> str:
    """What several cases counted is added up; words and times stand side by side."""
    if not figure.startswith("seconds") and all(value.isdigit() for value in values):
        return str(sum(map(int, values)))
    return ", ".join(values)


def run_fault(name: str) -> str:
    """One fault on TRL, in a process of its own -> what came of it, in words."""
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, __file__, "--fault", name],
            stdout=full if name == "stdout" else subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
    last = (result.stderr.strip().splitlines() or [""])[-1]
    try:
        return str(json.loads(last))
    except ValueError:
        return f"exit {result.returncode}: {last[:160]}"


def trl_fault(name: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        if name in ("window", "boundary"):
            per_generation = 4 if name == "window" else 1
            whole = trl_train(Path(folder) / "whole", steps_per_generation=per_generation)
            checkpoint = str(Path(folder) / "whole" / "checkpoint-2")
            part = trl_train(Path(folder) / "part", resume=checkpoint, steps_per_generation=per_generation)
            change = max(float((whole[key] - part[key]).abs().max()) for key in whole)
            return f"largest difference of a weight {change:.2g}"
        if name == "nan":
            losses: list[float] = []
            trl_train(Path(folder), reward=lambda completions, **_: [float("nan")] * len(completions), losses=losses)
            return f"finishes, exit 0; losses {losses}"
        if name == "stdout":
            trl_train(Path(folder), log_completions=True)
            sys.stdout.flush()
            return "exit 0"
        try:
            trl_train(Path(folder), save_total_limit=1, full_from=2)
            outcome = "goes on"
        except Exception as error:
            outcome = f"ends with {type(error).__name__}"
        left = sorted(path.name for path in Path(folder).glob("checkpoint-*"))
        whole_ones = [name for name in left if (Path(folder) / name / "trainer_state.json").exists()]
        return f"{outcome}; folders left: {', '.join(left)}; whole: {', '.join(whole_ones) or 'none'}"


def trl_train(
    folder: Path,
    *,
    reward: Any = None,
    resume: str | None = None,
    losses: list[float] | None = None,
    full_from: int | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Four steps of TRL's GRPOTrainer on a tiny random model; -> its weights."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        import trl
    except ImportError as error:
        raise ConfigError('the same faults on TRL need it: pip install -e ".[benchmark]"') from error
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, PrinterCallback, Qwen2Config, Qwen2ForCausalLM, TrainerCallback

    words = {word: index for index, word in enumerate(["<end>", "<pad>", *"abcdefghijklmnopqrstuvwxyz"])}
    inner = Tokenizer(models.WordLevel(words, unk_token="a"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<end>", pad_token="<pad>", unk_token="a", padding_side="left"
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, bos_token_id=None, eos_token_id=0, pad_token_id=1,
        )
    )  # fmt: skip

    class FullDisk(TrainerCallback):
        def on_step_end(self, arguments: Any, state: Any, *_: Any, **__: Any) -> None:
            if full_from is not None and state.global_step >= full_from:
                limit_file_size(4000)

    config = trl.GRPOConfig(
        output_dir=str(folder), max_steps=4, save_strategy="steps", save_steps=1, per_device_train_batch_size=4,
        num_generations=4, max_completion_length=6, learning_rate=1e-2, lr_scheduler_type="constant", bf16=False,
        use_cpu=True, gradient_checkpointing=False, logging_steps=1, report_to=[], disable_tqdm=True, seed=0, **settings,
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": letters} for letters in ("ab", "cd", "ef", "gh", "ij", "kl")]),
        reward_funcs=[reward or (lambda completions, **_: [text.count("a") + len(text) / 10 for text in completions])],
        processing_class=tokenizer,
        callbacks=[FullDisk()],
    )
    trainer.remove_callback(PrinterCallback)
    try:
        trainer.train(resume_from_checkpoint=resume)
    finally:
        limit_file_size(None)
    if losses is not None:
        losses += [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


def limit_file_size(size: int | None) -> None:
    """Let the system refuse every byte of a file beyond `size`; None lifts it."""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard if size is None else size, hard))


if __name__ == "__main__":
    run_main(main)
