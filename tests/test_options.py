"""Every option and argument of every command has a test that fails when it is ignored.

TESTS says which; ignore_option.py proves it, by ignoring one after another. Here it is only held to
name all that there is, and nothing that is gone.
"""

import ast
import re
from collections import defaultdict

import click
from conftest import ROOT

from mpd_data.cli import cli as gen
from mpd_rounds.cli import cli as rounds
from mpd_rounds.report.cli import cli as report
from mpd_train.cli import cli as train
from mpd_train.export_cli import cli as export

# A test, and the options of commands (arguments in capitals) that it is the one for.
TESTS = """
test_env_names_versions_and_machine_and_loads_no_engine: mpd-gen env --json
test_a_run_goes_on_without_it: mpd-train --compile
test_a_teacher_is_taken_to_the_cpu_when_told: mpd-train --teacher-offload
test_the_command_reports_what_it_found: mpd-gen contamination --prompts --against --prompt-column
    --id-column --against-prompt-column --against-id-column --n --fail-above --json
test_a_student_that_has_moved_is_named: mpd-export CHECKPOINT --out --student
test_an_export_is_pushed_as_a_private_model: mpd-export --push-to-hub
test_refilter_chooses_anew_and_goes_back_without_scoring: mpd-gen rewrite --refilter
test_scores_are_over_the_vocabulary_of_the_model_that_is_trained: mpd-gen rewrite --student
test_stats_agree_with_the_rows: mpd-gen stats ROUNDS --json --plot
test_validate_judges_each_round_that_it_is_given: mpd-gen validate ROUNDS
test_a_dataset_of_the_hub_needs_test_prompts: mpd-gen init FOLDER
test_columns_are_those_that_are_named: mpd-gen init --prompt-column --answer-column --id-column
test_sampling_is_the_makers: mpd-gen init --student
test_test_prompts_may_have_columns_of_their_own: mpd-gen init --prompts --test
test_thinking_is_set_where_there_is_a_switch: mpd-gen init --teacher
test_job_scripts_are_written_when_asked_for: mpd-gen init --slurm
test_what_is_lost_without_gold_answers_is_said: mpd-gen init --checker
test_compare_by_a_metadata_key: mpd-gen compare BASE NEW --json --by
test_what_is_served_are_the_rollouts: mpd-gen compare --serve
test_stats_by_a_metadata_key: mpd-gen stats --by
test_a_server_that_dies_ends_the_job_and_the_rest_follows: mpd-gen rollouts --base-url
    --served-model
test_rewrites_are_those_of_an_engine_here: mpd-gen rewrite --base-url --served-model
test_a_cpu_cannot_run_the_kernels: mpd-train --liger-kernel
test_a_student_answers_at_its_token_budget: mpd-gen rollouts --token-budget --budget-text
test_a_hopeless_job_stops_early: mpd-gen rollouts --max-error-rate
test_a_hopeless_rewrite_stops_early: mpd-gen rewrite --max-error-rate
test_a_scheduler_that_ends_a_job_loses_no_finished_row: mpd-gen status FOLDERS --json
test_watch_ends_with_the_work: mpd-gen status --watch
test_answers_lost_stand_side_by_side: mpd-gen view ROUNDS --evaluations --out
test_a_page_holds_no_more_rows_than_asked_and_says_so: mpd-gen view --rows
test_rows_are_in_order_of_what_the_training_found: mpd-gen view --training
test_a_server_has_the_port_that_it_is_told: mpd-gen view --serve --port
test_one_part_after_another_makes_the_round: mpd-gen rollouts/rewrite --shard-index --num-shards
test_workers_make_the_rows_of_one_process: mpd-gen rollouts/rewrite --workers
test_a_budget_that_does_not_hold_is_said: mpd-rounds --set
test_a_finished_round_has_nothing_to_do_and_stays_as_it_is: mpd-gen rewrite --dry-run --json
test_a_limited_run_says_what_the_rest_takes: mpd-gen rollouts/rewrite --limit
test_a_new_round_is_planned_and_not_made: mpd-gen rollouts --dry-run --json
test_a_later_round_is_planned_from_the_first: mpd-rounds PIPELINE --out
test_a_pipeline_is_planned_at_given_rates: mpd-rounds --rate
test_a_training_is_planned: mpd-train --dry-run --json
test_the_qwen3_pipeline_is_sound_in_every_stage: mpd-rounds --dry-run --json
test_two_nodes_make_the_rows_of_one_process: mpd-gen rollouts/rewrite --ray
test_several_runs_are_compared: mpd-report PATHS
test_the_example_runs_from_the_wheel: mpd-rounds --example
test_the_same_run_gives_the_same_bytes: mpd-report --out
test_seeds_are_run_apart_and_compared: mpd-rounds --seeds
test_a_choice_of_one_token_is_greedy: mpd-gen rewrite --top-p --top-k --min-p
test_a_gpu_is_filled_as_told: mpd-gen rollouts/rewrite --gpu-memory-utilization
test_answers_are_read_in_the_declared_formats_only: mpd-gen rollouts --answer-formats
test_candidates_their_choice_and_their_seed: mpd-gen rewrite --num-candidates --choose --seed
test_checks_have_their_processes_and_their_time: mpd-gen rollouts --checker --checker-timeout
    --checker-processes; mpd-gen rewrite --checker-timeout --checker-processes
test_each_rule_rejects_rewrites_of_a_round: mpd-gen rewrite --drafts --max-ratio --min-ratio
    --max-repetition
test_hard_problems_get_the_room_they_are_given: mpd-gen rewrite --max-ratio-hard --min-ratio-hard
test_greedy_by_each_of_four_ways: mpd-gen rollouts --temperature --top-p --top-k --min-p
test_a_round_is_pushed_as_a_private_dataset_and_opens_there: mpd-gen push FOLDER REPOSITORY
test_a_model_is_pushed_whole: mpd-gen push --public
test_penalties_are_the_engines: mpd-gen rollouts/rewrite --presence-penalty --repetition-penalty
test_vllm_gets_its_own_arguments: mpd-gen rollouts/rewrite --engine-kwargs
test_models_are_had_in_the_revision_that_is_asked_for: mpd-gen rollouts --revision; mpd-gen rewrite
    --revision; mpd-train --revision --teacher-revision
test_overwrite_of_rewrites: mpd-gen rewrite --overwrite
test_overwrite_of_rollouts: mpd-gen rollouts --overwrite
test_rewrites_are_cut_at_their_limit: mpd-gen rewrite --max-tokens
test_rewrites_are_sampled_when_told: mpd-gen rewrite --temperature
test_rewrites_take_what_they_are_told: mpd-gen rewrite --teacher --shards --template --score-context
    --num-logprobs --score-template-kwargs --rows-per-shard
test_rollouts_take_what_they_are_told: mpd-gen rollouts --model --prompts --out --round
    --num-samples --num-prompts --prompt-column --id-column --answer-column --metadata-columns
    --duplicates --prompt-template --system-prompt --examples --examples-column --thinking
    --template-kwargs --max-tokens --rows-per-shard
test_unreadable_gold_answers_are_named_before_the_first_sample: mpd-gen rollouts
    --max-unreadable-answers
test_what_is_measured_is_kept_and_shown: mpd-gen rewrite --support
test_a_limit_rejects_what_is_below_it: mpd-gen rewrite --min-support --min-step
test_rules_that_are_dropped_let_rewrites_in: mpd-gen rewrite --keep-answer --require-correct
test_corrections_of_wrong_drafts_are_kept_when_told: mpd-gen rewrite --corrections
test_copies_are_rejected_and_counted: mpd-gen rewrite --max-overlap
test_drafts_that_were_cut_off_are_rewritten_when_told: mpd-gen rewrite --cut-drafts
test_shards_close_by_age: mpd-gen rollouts --seconds-per-shard
test_shards_of_rewrites_close_by_age: mpd-gen rewrite --seconds-per-shard
test_the_engine_is_the_one_asked_for: mpd-gen rollouts/rewrite --backend
test_the_engine_runs_as_it_is_told: mpd-gen rollouts/rewrite --trust-remote-code --dtype
    --max-model-len --max-num-seqs --max-num-batched-tokens --kv-cache-gib
test_the_engine_shares_a_model_as_it_is_told: mpd-gen rollouts/rewrite --tensor-parallel-size
test_a_pipeline_is_refused_on_a_cpu: mpd-gen rollouts/rewrite --pipeline-parallel-size
test_the_seed_decides_prompts_and_samples: mpd-gen rollouts --seed
test_the_teacher_thinks_when_told: mpd-gen rewrite --thinking
test_the_teachers_template_has_its_own_settings: mpd-gen rewrite --template-kwargs
test_tensorboard_holds_the_metrics: mpd-train --report-to
test_a_loss_out_of_bounds_stops: mpd-train --max-loss
test_a_teacher_in_the_process_is_the_one_learned_from: mpd-train --teacher
test_accumulated_packs_are_one_step: mpd-train --gradient-accumulation-steps
test_adapters_are_as_told: mpd-train --lora-r --lora-alpha --lora-dropout --lora-target-modules
test_bfloat16_computes_in_bfloat16: mpd-train --dtype
test_checkpoints_are_as_frequent_as_told: mpd-train --save-steps
test_code_that_ships_with_a_model_runs_when_told: mpd-train --trust-remote-code
test_gradient_checkpointing_runs_each_layer_twice: mpd-train --gradient-checkpointing
test_gradients_are_clipped_to_the_norm_given: mpd-train --max-grad-norm
test_overwrite_of_a_run: mpd-train --overwrite
test_packs_epochs_and_steps_are_as_told: mpd-train --shards --student --out --epochs --pack-length
    --seed
test_a_number_of_steps_takes_the_passes_that_it_needs: mpd-train --max-steps
test_schedule_and_warm_up_are_as_told: mpd-train --lr-schedule --warmup-ratio
test_the_device_is_the_one_given: mpd-train --device
test_the_learning_rate_is_the_one_given: mpd-train --learning-rate
test_the_loss_is_the_one_asked_for: mpd-train --divergence --beta --alpha --ce-weight
    --divergence-clip --entry-clip
test_stop_strings_end_a_rewrite: mpd-gen rewrite --stop
test_stop_strings_end_a_sample: mpd-gen rollouts --stop
test_targets_are_those_asked_for: mpd-train --targets --leak-nats
test_without_the_tail_the_top_k_are_renormalised: mpd-train --tail
test_the_second_moment_decays_as_told: mpd-train --adam-beta2
test_validation_is_held_and_ended_as_told: mpd-train --validation-fraction --eval-steps
    --early-stopping-patience
test_the_temperature_divides_both_models_logits: mpd-train --kl-temperature
test_activations_are_kept_in_the_cpus_memory_when_told: mpd-train --activation-offload
test_attention_is_the_one_asked_for: mpd-train --attn-implementation
test_weight_decay_shrinks_matrices: mpd-train --weight-decay
"""
FILES = {
    node.name: f"tests/{path.name}"
    for path in sorted((ROOT / "tests").glob("test_*.py"))
    for node in ast.parse(path.read_text(encoding="utf-8")).body
    if isinstance(node, ast.FunctionDef)
}
# (command, option) -> the tests that fail when it is ignored. A test that is gone is a KeyError.
EXERCISED: dict[tuple[str, str], list[str]] = defaultdict(list)
for line in TESTS.replace("\n    ", " ").strip().splitlines():
    function, _, uses = line.partition(": ")
    for use in uses.split("; "):
        commands, *options = re.split(r" (?=--|[A-Z])", use)
        program, _, names = commands.partition(" ")
        for name in names.split("/"):
            for option in options:
                EXERCISED[f"{program} {name}".strip(), option].append(
                    f"{FILES[function]}::{function}"
                )

COMMANDS = {f"mpd-gen {name}": command for name, command in gen.commands.items()}
COMMANDS |= {"mpd-gen": gen, "mpd-train": train, "mpd-export": export}
COMMANDS |= {"mpd-rounds": rounds, "mpd-report": report}


def spelled(parameter):
    """Return its name as --help shows it."""
    if isinstance(parameter, click.Argument):
        return parameter.name.upper()
    return next(name for name in parameter.opts if name.startswith("--"))


def test_every_option_has_its_test_and_every_test_its_option():
    there = {
        (name, spelled(parameter))
        for name, command in COMMANDS.items()
        for parameter in command.params
    }
    there -= {(name, "--version") for name in COMMANDS}
    assert len(there) > 100
    assert there - EXERCISED.keys() == set(), "add them to TESTS, beside a test that needs them"
    assert EXERCISED.keys() - there == set(), "no command has these"
