"""The faults of docs/reliability.md: row -> (description, tests that inject the fault)."""

ROWS: dict[str, tuple[str, list[str]]] = {
    "R1": (
        "stopped at any step and resumed: weights, moments, schedule and all metrics except times equal to the bit; "
        "full, LoRA, num_iterations 1 and 2; two ranks; with sampling ahead; state of adaptive KL and dynamic sampling",
        [
            "run/test_resume.py::test_resume_is_exact_at_every_step",
            "runtime/test_ranks.py::test_resume_on_two_ranks_and_on_another_number_of_them",
            "runtime/test_ranks.py::test_resume_on_two_ranks_with_lora_and_two_iterations",
            "rollout/test_async_sampler.py::test_a_run_that_samples_ahead_is_resumed_to_the_bit",
            "test_trainer.py::test_what_a_run_has_come_to_is_resumed_too",
        ],
    ),
    "R2": (
        "kill -9 before each write, fsync, rename and removal of a save, found by tracing system calls",
        ["run/test_checkpoint.py::test_killed_before_every_call_that_changes_a_file"],
    ),
    "R3": (
        "each file of a checkpoint truncated, or one bit flipped: named, and the previous checkpoint is used",
        [
            "run/test_resume.py::test_a_damaged_file_is_named_and_the_checkpoint_before_is_used",
            "run/test_checkpoint.py::test_a_damaged_checkpoint_is_named_and_the_one_before_is_used",
        ],
    ),
    "R4": (
        "full disk (the system refuses the write): training continues, the older checkpoint stays; exit 3 if the last "
        "save fails; free space is checked before training and before each checkpoint",
        [
            "runtime/test_outages.py::test_a_full_disk_does_not_stop_training",
            "runtime/test_outages.py::test_a_last_save_that_fails_is_exit_code_3_and_costs_nothing_else",
            "runtime/test_outages.py::test_lines_wait_for_room_and_none_is_torn_or_doubled",
            "runtime/test_outages.py::test_too_little_room_is_said_before_training",
            "runtime/test_outages.py::test_a_checkpoint_that_will_not_fit_is_not_begun",
        ],
    ),
    "R5": (
        "SIGTERM, SIGUSR1, Ctrl-C in each phase, to one rank or all; a second one; the resumed run equals an "
        "uninterrupted one to the bit",
        [
            "runtime/test_signals.py::test_a_signal_in_each_phase",
            "runtime/test_signals.py::test_a_second_signal_a_locked_directory_and_the_exit_code",
            "runtime/test_signals.py::test_the_exit_code_of_the_command",
            "runtime/test_ranks.py::test_a_signal_to_one_rank_or_all_of_them",
        ],
    ),
    "R6": (
        "one rank raises or hangs: the job ends, that rank's message first",
        [
            "runtime/test_ranks.py::test_a_rank_that_fails_ends_the_job_with_its_own_words_first",
            "runtime/test_ranks.py::test_a_rank_that_hangs_ends_the_job",
        ],
    ),
    "R7": (
        "a reward that hangs, also inside C code: killed, masked, counted; three silent steps end the run",
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
        "NaN or infinity in loss or gradient, on one rank only: all ranks skip the step, bit for bit; three in a row: "
        "exit 4",
        [
            "runtime/test_ranks.py::test_nan_on_one_rank_changes_nothing_on_any",
            "runtime/test_ranks.py::test_three_skipped_steps_in_a_row_end_the_run",
        ],
    ),
    "R11": (
        "groups that are all flat, and ten other reasons not to learn: reported once, with the fix",
        ["tracking/test_diagnostics.py", "test_trainer.py::test_flat_groups_move_nothing_not_even_by_weight_decay"],
    ),
    "R12": (
        "all truncated, all ended at once, one token each",
        ["data/test_data_faults.py::test_odd_lengths_are_finite"],
    ),
    "R13": (
        "prompts at and over the limit, chat template included",
        [
            "data/test_data_faults.py::test_the_limit_counts_the_chat_template",
            "data/test_stream.py::test_render_prompts_leaves_out_long_ones_and_keeps_the_index",
        ],
    ),
    "R14": (
        "twelve kinds of bad rows: file, line, reason; or left out and recorded",
        [
            "data/test_data_faults.py::test_a_bad_row_is_named_or_left_out",
            "data/test_data_faults.py::test_a_run_writes_down_the_rows_that_it_left_out",
            "data/test_data.py::test_an_unusable_file_is_named_with_its_line",
            "data/test_data.py::test_other_unusable_sources",
        ],
    ),
    "R15": (
        "repeated questions; held-out questions among the training rows",
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
        "parsing of numbers",
        ["rewards/test_rewards.py::test_parse_number", "rewards/test_rewards.py::test_parse_number_refuses"],
    ),
    "R18": (
        "tokenizers without end token, with several, with pad = end; without template; doubled BOS",
        [
            "data/test_data_faults.py::test_end_tokens",
            "data/test_data_faults.py::test_the_end_token_is_trained_where_it_is_the_padding_too",
            "data/test_stream.py::test_a_doubled_bos_is_removed",
            "data/test_stream.py::test_without_a_template_the_prompt_is_plain",
        ],
    ),
    "R19": (
        "a reference with another vocabulary; a KL that does not start at 0; LoRA: without the adapter, the start",
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
        "W&B raises or hangs at start, log or finish; no key",
        [
            "runtime/test_outages.py::test_a_tracker_that_hangs_is_left_behind",
            "runtime/test_outages.py::test_a_call_that_overstays_is_noticed_while_the_run_goes_on",
            "runtime/test_outages.py::test_a_call_that_never_returns_does_not_hold_up_the_end_of_the_program",
            "tracking/test_run_logger.py::test_a_tracker_that_raises_is_switched_off_with_one_warning",
            "tracking/test_run_logger.py::test_without_a_key_wandb_is_offline_from_the_start",
        ],
    ),
    "R22": (
        "output full, closed or a broken pipe, ASCII locale, no terminal: the same weights",
        [
            "runtime/test_outages.py::test_without_a_terminal_the_weights_are_the_same",
            "tracking/test_run_logger.py::test_exit_code_stays_0_when_stdout_is_gone",
        ],
    ),
    "R23": (
        "no network: training, evaluation and resume try no connection; a push that the hub refuses: exit 3, nothing "
        "lost, and the command to try again",
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
        "after a resume each step appears once in the records, TensorBoard, W&B and Trackio",
        [
            "tracking/test_run_logger.py::test_resume_drops_the_rows_that_will_be_made_again",
            "tracking/test_trackers.py",
        ],
    ),
    "R27": (
        "the launcher ends (SIGKILL, or a signal that it does not pass on): each process saves and ends; SIGHUP, "
        "nohup, SIGUSR2, SIGXCPU; a second Ctrl-C in a notebook ends the cell, not the kernel",
        ["runtime/test_launcher.py"],
    ),
    "R28": (
        "killed between the last checkpoint and final/: a resume writes it; an older final/ is not exported as the "
        "run's model; a last checkpoint that does not fit: final/ is written; no half final/",
        ["run/test_final.py"],
    ),
    "R29": (
        "file systems that refuse fsync or removal, checkpoints that are links or may not be read, all checkpoints "
        "damaged, nothing to resume",
        [
            "runtime/test_storage.py",
            "run/test_checkpoint.py::test_a_pruned_link_costs_nothing",
            "run/test_checkpoint.py::test_an_old_checkpoint_that_cannot_be_removed_stays_with_one_line",
            "run/test_checkpoint.py::test_a_file_system_that_syncs_no_folders",
            "run/test_checkpoint.py::test_a_checkpoint_that_may_not_be_read_is_no_damaged_one",
            "run/test_checkpoint.py::test_damaged_checkpoints_are_not_none",
            "run/test_checkpoint.py::test_nothing_to_resume_is_said_with_the_runs_beside_it",
        ],
    ),
    "R30": (
        "two runs in one directory without flock, on two machines, or where the second one loads slowly; names that "
        "collide; records of an earlier start",
        ["runtime/test_run_lock.py", "tracking/test_run_dir.py"],
    ),
    "R31": (
        "limits of containers and batch systems on memory and cores",
        ["runtime/test_limits.py", "runtime/test_device.py::test_limits_of_a_container_count"],
    ),
    "R32": (
        "a cache that cannot be read, written or trusted; a truncated library",
        [
            "runtime/test_storage.py::test_without_a_cache_folder_a_temporary_one_is_used",
            "models/test_tiny.py::test_a_cache_of_another_user_is_left_alone",
            "kernels/test_cpu_kernels.py::test_a_damaged_library_is_compiled_again",
            "kernels/test_cpu_kernels.py::test_a_library_that_others_can_write_is_not_loaded",
        ],
    ),
    "R33": (
        "odd environments: .env unreadable or in UTF-16, empty variables and lists of numbers, proxies, a dumb "
        "terminal, another default dtype, a long TMPDIR, a library named like a script in launch/",
        [
            "runtime/test_env.py",
            "rollout/test_vllm_client.py::test_proxies_of_the_environment_are_not_asked",
            "runtime/test_terminal.py::test_a_terminal_that_cannot_move_its_cursor_gets_lines",
            "runtime/test_device.py::test_settings_of_the_calling_program_do_not_change_the_run",
            "rewards/test_workers.py::test_a_long_temporary_folder",
            "tools/test_cli.py::test_scripts_hide_no_library",
        ],
    ),
    "R34": (
        "data, base model or reference changed under the same name: said or refused on resume",
        ["run/test_contents.py"],
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
        "code in completions",
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
        "columns with names that rewards use",
        [
            "test_security.py::test_columns_that_rewards_would_confuse",
            "run/test_build.py::test_a_reward_that_needs_a_column_the_data_lacks",
        ],
    ),
    "X13": ("a reward file that has changed", ["run/test_resume.py::test_a_changed_reward_file_needs_a_flag"]),
    "X14": (
        "versions: pinned, and a lock file with hashes that agrees with them",
        [
            "test_security.py::test_requirements_are_pinned",
            "test_security.py::test_the_lock_holds_what_is_required_with_hashes",
        ],
    ),
}
NOT_HERE = {
    "X4": "no reward executes completions, so there is no sandbox to test (SECURITY.md)",
}
