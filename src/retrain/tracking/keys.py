"""Every key of metrics.jsonl with its unit and meaning, and the page of the docs that is made from it and from the core
metrics: ``python -m retrain.tracking.keys docs/metrics.md`` writes it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from retrain.tracking import judges, vitals

STEP_KEYS: tuple[tuple[str, str, str], ...] = (
    ("step", "", "0-based number of the step"),
    ("condition", "", "`advantage_mode+transform_mode`, or the algorithm's name"),
    ("advantage_mode", "", "as configured"),
    ("transform_mode", "", "as configured"),
    ("uncertainty_kind", "", "as configured"),
    ("batch_size", "tasks", "tasks sampled in this step: more than configured with `training.min_signal`"),
    ("group_size", "rollouts", "rollouts per task"),
    ("mean_reward", "", "mean reward"),
    ("rewards/<name>", "", "mean of a part that a reward named"),
    ("correct_rate", "share", "correct rollouts; null where rewards do not say"),
    ("running_correct_rate", "share", "mean of `correct_rate` over the steps so far"),
    ("mean_length", "tokens", "sampled tokens per rollout, end token included"),
    ("max_token_hit_rate", "share", "rollouts cut at `training.max_tokens`"),
    ("reward_error_rate", "share", "rollouts whose reward failed, of all"),
    ("rollout_error_rate", "share", "rollouts that broke before their reward, of all"),
    ("sources/<name>/mean_reward", "", "`mean_reward` of one source of a mixture; null in a step without it"),
    ("sources/<name>/correct_rate", "share", "`correct_rate` of one source"),
    ("sources/<name>/groups", "groups", "groups of one source"),
    ("skipped_errors", "groups", "not trained: fewer than two valid rollouts"),
    ("skipped_all_correct", "groups", "not trained: all rewards equal, all rollouts correct"),
    ("skipped_all_wrong", "groups", "not trained: all rewards equal, no rollout correct"),
    ("skipped_equal_rewards", "groups", "not trained: all rewards equal, where that does not say correct or wrong"),
    (
        "skipped_all_cut", "groups",
        'not trained: with `truncated = "mask"` every valid rollout was cut at `training.max_tokens`',
    ),
    ("entropy_mean", "nats", "entropy of the next-token distribution, over sampled tokens"),
    ("exec_surprisal_mean", "nats", "surprisal of execution tokens: mean"),
    ("exec_surprisal_var", "nats²", "the same: population variance"),
    ("plan_surprisal_mean", "nats", "surprisal of planning tokens: mean; null when there are none"),
    ("plan_surprisal_var", "nats²", "the same: population variance"),
    ("exec_entropy_mean", "nats", "entropy at execution tokens: mean"),
    ("exec_entropy_var", "nats²", "the same: population variance"),
    ("plan_entropy_mean", "nats", "entropy at planning tokens: mean; null when there are none"),
    ("plan_entropy_var", "nats²", "the same: population variance"),
    ("sepa_lambda", "0 to 1", "SEPA's weight in this step"),
    ("sepa_gate_open", "bool", "was SEPA's gate open before this step?"),
    ("num_datums", "rollouts", "rollouts trained on"),
    ("num_microbatches", "", "forward and backward passes that made the gradient"),
    ("loss", "", "the loss before the update; null for a step without signal"),
    ("loss_is_placeholder", "bool", "true where a learner does not report its loss (none in this version)"),
    ("lr", "", "learning rate of this step"),
    ("grad_norm", "", "gradient norm before clipping"),
    ("grad_clipped", "bool", "was it clipped?"),
    ("ratio_mean", "", "mean of exp(learner's - sampler's logprob) over trained tokens, before the update"),
    ("ratio_min", "", "the smallest of them"),
    ("ratio_max", "", "the largest of them"),
    (
        "approx_kl", "nats",
        "mean of ratio - 1 - log ratio: learner against sampler before the first update, hence about 0",
    ),
    ("gradient_hash", "", "digest of the first update's gradient, which `retrain replay --learner` reproduces"),
    ("num_updates", "", "optimizer updates of this step"),
    (
        "moved_kl", "nats",
        "`approx_kl` before the last update: how far the earlier ones moved the policy from the sampler",
    ),
    (
        "clip_share", "share",
        "tokens whose gradient (with cispo: whose weight) the loss cut, mean over the updates; null without clipping",
    ),
    ("tis_capped", "share", "tokens whose importance weight `loss.tis_cap` capped; null without"),
    ("kl_base", "nats", "estimated KL divergence from the base model, per token; null with `loss.kl = 0`"),
    ("policy_entropy", "nats", "entropy that the bonus acts on; null with `loss.entropy = 0`"),
    (
        "skipped_update", "bool",
        "loss or gradient of an update was not finite: it did not change the weights and was the step's last",
    ),
    ("step_time_s", "s", "the whole step, without evaluation and saving"),
    ("sync_time_s", "s", "handing over weights"),
    ("sample_time_s", "s", "sampling"),
    (
        "score_time_s", "s",
        "what scoring added after the last rollout: groups are scored while others are sampled",
    ),
    ("train_time_s", "s", "training"),
    ("tokens_sampled", "tokens", "sampled tokens of valid rollouts"),
    ("tokens_per_second", "tokens/s", "`tokens_sampled` / `sample_time_s`"),
    (
        "bp_action", "",
        "with back pressure, as all that follow: warm-up, grow, throttle, hold, probe or back off; it acts on the next step",
    ),
    ("bp_batch_size", "tasks", "batch size of the next step"),
    (
        "bp_p_star", "rollouts",
        "concurrency of the highest throughput; null without a fit, and where no peak is told from noise (bp_sigma is known)",
    ),
    ("bp_p_star_low", "rollouts", "lower end of its 95 % interval; null without a fit"),
    ("bp_p_star_high", "rollouts", "upper end of it; null without a fit, and where it is infinite"),
    ("bp_sigma", "share", "of work that waits for its turn; null without a fit"),
    ("bp_sigma_low", "share", "lower end of its 95 % interval; null without a fit"),
    ("bp_sigma_high", "share", "upper end of it; null without a fit, and where it is infinite"),
    ("bp_kappa", "", "cost of each pair that is kept in step; null without a fit"),
    ("bp_kappa_low", "", "lower end of its 95 % interval; null without a fit"),
    ("bp_kappa_high", "", "upper end of it; null without a fit, and where it is infinite"),
    ("bp_noise", "share", "standard deviation of one step's throughput around the fit; null where nothing tells it"),
    ("bp_throughput", "tokens/s", "moving average of `tokens_per_second`"),
    ("bp_regime", "", "compute or memory: the given peak that sampling came closer to; null without both"),
    ("bp_utilization", "share", "of that peak that sampling reached; null without peaks"),
    ("bp_drifted", "bool", "throughput left the fit, which starts anew"),
    ("bp_out_of_memory", "", "times that memory ran out in this step"),
    ("bp_put_back", "tasks", "drawn for this step, and left to the next because of that"),
    ("bp_ceiling", "tasks", "largest batch size since memory ran out; null before"),
)  # fmt: skip
"""Key, unit and meaning of a training step's row, in its order."""

EVALUATION_KEYS: tuple[tuple[str, str, str], ...] = (
    ("step", "", "completed steps"),
    ("eval/source", "", "source and split"),
    ("eval/accuracy", "share", "correct rollouts; one that failed counts as wrong; null where rewards do not say"),
    ("eval/accuracy_low", "share", "lower end of the 95 % interval, clustered by task"),
    ("eval/accuracy_high", "share", "upper end of it"),
    ("eval/tasks", "tasks", "held-out tasks"),
    ("eval/samples", "rollouts", "rollouts per task"),
    ("eval/mean_reward", "", "mean reward of valid rollouts"),
    ("eval/mean_length", "tokens", "their sampled tokens"),
    ("eval/max_token_hit_rate", "share", "those cut at `training.max_tokens`"),
    ("eval/errors", "rollouts", "rollouts or rewards that failed"),
    ("eval/time_s", "s", "sampling and scoring"),
    ("eval/mean@<n>", "share", "correct rollouts of tasks whose n samples are all valid"),
    ("eval/pass@<k>", "share", "chance that one of k samples is correct, for powers of two up to `eval.samples`"),
    ("eval/<suite>/<key>", "", "the same of one of `eval.suites`"),
)  # fmt: skip
"""Key, unit and meaning of an evaluation's row."""

_HEAD = """\
# Metrics

What `metrics.jsonl` holds and how to read it. The first table is the core: `retrain status`, `retrain top`, the report
and the alarms all use these {count} metrics and ranges. An alarm is one line, `alarm: ...`, on the console and in
`events.log`, with what was seen and what to do. It comes when a metric leaves its healthy range, and again only after
{well} healthy steps in a row.

Ranges are judged over the last steps, not over one: shares over at least {rollouts} rollouts or {groups} groups (in a run
with few of them per step, over up to {window} steps), changes between the first {base} and the last {settled} of the last
{longest} steps, and only where they are larger than the steps' own noise. What has changed so stays marked until it is back
at its level before, also when that lies further behind; length and entropy also count as well once rewards are as good as
then. The correct rate is also compared with its best level and, in the first steps, with the run's beginning: below half of
it, with completions or entropy twice or half of what they were, the policy has collapsed, and the alarm says so. Held-out
accuracy is judged when it is measured, against the evaluation before the first step. Two ranges would
depend on the number format: in float32 sampler and learner agree to about 1e-5, in bf16 single tokens differ by a
hundredth on the embedded model and by more on large ones. They are therefore also compared with the run's own median,
so that a sudden disagreement is seen in both.

## Core metrics

| Metric | Unit | Healthy | Outside it |
|---|---|---|---|
"""

_STEPS = """
## Keys of a training step

`step` is 0-based in a step's row, and the number of completed steps in an evaluation's. What is unknown is null. Rollouts
are valid when neither environment, sampler nor reward failed; means are over valid rollouts.

| Key | Unit | Meaning |
|---|---|---|
"""

_EVALUATIONS = """
## Keys of an evaluation

| Key | Unit | Meaning |
|---|---|---|
"""

_FOOT = """
How to read the ratio: sampler and learner score the same tokens with the same weights, so it is 1 up to numerics (about
1e-5 in float32; more in bf16). A larger distance means that what is trained is not what was sampled.
"""


def page() -> str:
    """docs/metrics.md."""
    head = _HEAD.format(
        count=len(vitals.VITALS), well=vitals.WELL, rollouts=judges.ENOUGH_ROLLOUTS, groups=judges.ENOUGH_GROUPS,
        window=judges.WINDOW, base=judges.BASE, settled=judges.SETTLED, longest=judges.WINDOW + 1,
    )  # fmt: skip
    core = [f"| {v.title} (`{v.name}`) | {v.unit} | {v.healthy} | {v.advice} |" for v in vitals.VITALS]
    core = [line.replace("<", "&lt;").replace(" |log ratio| ", r" \|log ratio\| ") for line in core]
    return "".join(
        [head, _lines(core), _STEPS, _table(STEP_KEYS), _FOOT, _EVALUATIONS, _table(EVALUATION_KEYS)]
    )


def _table(keys: tuple[tuple[str, str, str], ...]) -> str:
    return _lines([f"| `{key}` | {unit} | {meaning} |" for key, unit, meaning in keys])


def _lines(lines: list[str]) -> str:
    return "".join(f"{line}\n" for line in lines)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
