"""docs/speed.md from the stored comparisons: numbers come from the JSON, never from here."""

from __future__ import annotations

from typing import Any

from cases import CASES

HEAD = """# A whole training step beside TRL's

<!-- written by benches/against_trl.py --page -->

Both sides take the same steps: the same weights, prompts (as token ids), forced completion lengths (end tokens
ignored), rewards (fair coins, so that exactly half of the groups carry a signal), LoRA on all linear layers, AdamW,
temperature 1, no KL term, mean over tokens, gradient clipped at 1. Two processes, each in its own environment, take
turns step by step, so that only one computes at a time and both see the same state of the machine; who begins
alternates. A ratio is TRL's median over ours, above 1 where ours is faster; the interval (95 %) is a bootstrap over
the pairs of steps. A step is everything from the sampler to the updated weights with each side's own metrics and log;
checkpoints and evaluation are off.

How TRL is given its best: `generate` with a cache for the whole batch at once, no gradient checkpointing, no
tokenising, no `min_new_tokens` (it would mask logits at every token; end tokens are switched off instead). The
setting of each run stands in its row, the settings tried beside each other further below: on these models a dynamic and
a static cache and split batches lie within the noise of each other, eager attention and continuous batching are slower.
Not every setting was tried on every workload. Where lengths differ, its completions are cut after generation:
`generate` computes finished rows until the longest ends, so nothing is added to its work. vLLM, which TRL can also
sample with, does not run on these machines: nothing is said here about TRL with vLLM.

What differs by design, and makes part of the ratio: TRL trains the groups whose rewards are all equal, which have no
gradient, computes the prompt once for every member, and scores the prompt's positions in the head.
"""


def gib(count: float) -> str:
    """Bytes in GiB."""
    return f"{count / 2**30:.2f}"


def ratio_of(value: float, pairs: int) -> str:
    """A ratio; in bold where it rests on at least five pairs."""
    return f"**{value:.2f}**" if pairs >= 5 else f"{value:.2f}"


def spread(interval: list[float], pairs: int) -> str:
    """An interval; of fewer than five pairs a bootstrap knows too little to state one."""
    return f"{interval[0]:.2f} to {interval[1]:.2f}" if pairs >= 5 else f"{pairs} pair(s)"


def setting(chosen: dict[str, Any]) -> str:
    """TRL's setting in words; {} is `generate` with a dynamic cache over the whole batch."""
    return ", ".join(f"{key} {value}" for key, value in chosen.items()) or "generate, dynamic cache"


def learning(record: dict[str, Any]) -> list[str]:
    """The section about equal learning."""
    found, shape = record["summary"], record["shape"]
    if not found:
        return []
    final, low, high = found["final"], *found["interval_90"]
    lines = [
        "",
        "## Equal learning",
        "",
        f"The embedded model on two-digit sums, {record['steps'][-1]} steps of {shape['groups']} x {shape['members']}, at most "
        f"{shape['max_tokens']} tokens, on one thread: the same",
        "tasks in the same order per seed, reward, advantage (reward minus its group's mean), loss, AdamW, warm-up and clipping.",
        f"Adapters of both are evaluated by one function on the same {record['evaluation']['tasks']} held-out problems, "
        f"{record['evaluation']['samples']} samples each.",
        "",
        "| | seeds | final accuracy | standard deviation | CPU s of all steps |",
        "| --- | --- | --- | --- | --- |",
    ]
    for side, name in (("trl", "TRL"), ("retrain", "ours")):
        f = final[side]
        lines.append(
            f"| {name} | {f['n']} | {f['mean']:.1%} | {f['sd']:.1%} | {found['cpu_s_of_all_steps'][side]['mean']:.0f} |"
        )
    verdict = "equivalent" if found["equivalent"] else "not shown to be equivalent"
    lines += [
        "",
        f"Difference (ours minus TRL's) {100 * found['difference']:+.1f} points, 90 % interval {100 * low:+.1f} to "
        f"{100 * high:+.1f}: **{verdict}** within {100 * found['margin']:.0f} points",
        f"(two one-sided Welch tests, p = {max(found['p_not_worse'], found['p_not_better']):.2g}).",
        "",
        f"| CPU seconds until accuracy {found['goal']:.0%} | TRL | ours | ratio | interval |",
        "| --- | --- | --- | --- | --- |",
    ]
    for key, name in (("cpu_s_to_goal", "training steps"), ("cpu_s_to_goal_with_startup", "with start-up")):
        of = found[key]
        sides = [f"{of[s]['mean']} ({of[s]['reached']} of {of[s]['of']} seeds)" for s in ("trl", "retrain")]
        low, high = of.get("ratio_interval", (float("nan"), float("nan")))
        lines.append(
            f"| {name} | {sides[0]} | {sides[1]} | **{of.get('ratio', float('nan')):.2f}** | {low:.2f} to {high:.2f} |"
        )
    return [
        *lines,
        "",
        f"Commit {record['commit']}; every curve is in `benches/results/equal_learning.json`.",
    ]


def page(stored: dict[str, Any], learned: dict[str, Any] | None = None) -> str:
    """The whole page; ``learned`` is what ``equal_learning.py`` stored."""
    runs = sorted(
        stored["runs"].values(), key=lambda r: (list(CASES).index(r["case"]), r["dtype"], r["threads"])
    )
    lines = [HEAD]
    lines += ["## Steps", ""]
    lines += [
        "| workload | dtype | threads | TRL s | ours s | ratio | interval | CPU ratio | interval | TRL GiB "
        "| ours GiB | share |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for run in runs:
        theirs, ours, ratio = run["sides"]["TRL"], run["sides"]["retrain"], run["ratios"]
        wall, cpu = ratio["wall_interval"], ratio["cpu_interval"]
        lines.append(
            f"| {run['case']} | {run['dtype']} | {run['threads']} | {theirs['wall_s']:.2f} | {ours['wall_s']:.2f} "
            f"| {ratio_of(ratio['wall'], run['pairs'])} | {spread(wall, run['pairs'])} "
            f"| {ratio_of(ratio['cpu'], run['pairs'])} | {spread(cpu, run['pairs'])} "
            f"| {gib(theirs['peak_bytes'])} | {gib(ours['peak_bytes'])} | {ratio['peak']:.0%} |"
        )
    lines += [
        "",
        "GiB: largest resident size of the whole process over the measured steps, libraries and weights included.",
        *(
            [
                "",
                "bf16 rows: this processor has no bf16 instructions and emulates them, which no user would choose here; compare",
                "our bf16 step with TRL's fp32 step as well.",
            ]
            if any(
                r["dtype"] == "bf16" and not {"amx_bf16", "avx512_bf16"} & {*r["machine"]["features"]}
                for r in runs
            )
            else []
        ),
        "",
        "| workload | dtype | threads | steps | completion tokens | TRL: sample / forward | ours: sample / train "
        "| cores used by others | TRL's setting | commit |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for run in runs:
        theirs, ours = run["sides"]["TRL"]["parts_s"], run["sides"]["retrain"]["parts_s"]
        lines.append(
            f"| {run['case']} | {run['dtype']} | {run['threads']} | {run['pairs']} | {run['completion_tokens']:,} "
            f"| {theirs.get('sample', 0):.2f} / {theirs.get('forward', 0):.2f} s "
            f"| {ours.get('sample', 0):.2f} / {ours.get('train', 0):.2f} s "
            f"| {run['cores_used_by_others']:.2f} | {setting(run['trl_settings'])} | {run['commit']} |"
        )
    lines += [
        "",
        "Seconds of a part are wall clock and medians; the rest of TRL's step is its backward pass and update. Where other",
        "programs used cores meanwhile, seconds are too large on both sides, and the ratio of CPU times is the safer one.",
        "",
        "## Workloads",
        "",
        "| name | model | prompts x members | prompt tokens | completion tokens |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name in dict.fromkeys(run["case"] for run in runs):
        case = CASES[name]
        drawn = (
            f"log-normal, median {case.length}, p95 {case.spread}, at most {case.cap}"
            if case.spread
            else str(case.length)
        )
        lines.append(
            f"| {name} | {case.model} | {case.groups} x {case.members} | {case.prompt[0]} to {case.prompt[1]} | {drawn} |"
        )
    lines += [
        "",
        "tiny is the embedded model (hidden 96, 3 layers, vocabulary 384); medium is a Qwen3 layout with random weights:",
        "hidden 512, 8 layers, 8 heads, 4 key/value heads of 64, intermediate 1,536, vocabulary 151,936, tied. LoRA rank 16,",
        "alpha 32. The log-normal has the shape of a reasoning model's lengths (median 700, p95 2,048), scaled down.",
    ]
    for search in sorted(stored["searches"].values(), key=lambda s: (s["case"], s["dtype"], s["threads"])):
        lines += [
            "",
            f"## TRL's settings on {search['case']}, {search['dtype']}, {search['threads']} thread(s)",
            "",
            "| setting | s | CPU s | sampling s | GiB |",
            "| --- | --- | --- | --- | --- |",
        ]
        for name, tried in sorted(search["tried"].items(), key=lambda item: item[1].get("cpu_s", 1e9)):
            if "failed" in tried:
                lines.append(f"| {name} | did not run | | | |")
            else:
                lines.append(
                    f"| {name} | {tried['wall_s']:.2f} | {tried['cpu_s']:.2f} | {tried['sample_s']:.2f} "
                    f"| {gib(tried['peak_bytes'])} |"
                )
    if learned:
        lines += learning(learned)
    machines = {
        f"{m['processor']} ({m['cores']} cores, {', '.join(m['features'])}, {m['memory_gib']:.0f} GiB)"
        for m in (run["machine"] for run in runs)
    }
    packages = {
        f"{side}: " + ", ".join(f"{k} {v}" for k, v in of.items())
        for run in runs
        for side, of in run["versions"].items()
    }
    lines += [
        "",
        "## Machine and versions",
        "",
        *(f"- {m}" for m in sorted(machines)),
        *(f"- {p}" for p in sorted(packages)),
    ]
    lines += [
        "",
        "## Again",
        "",
        "```bash",
        "benches/make_peer_env.sh /path/of/env",
        "PEER=/path/of/env/bin/python",
        "python benches/against_trl.py --peer-python $PEER --workload medium --dtype fp32 --threads 2 --pairs 5",
        "python benches/against_trl.py --page",
        "```",
        "",
        "Everything above is in `benches/results/against_trl.json`, each step's time included.",
    ]
    return "\n".join(lines) + "\n"
