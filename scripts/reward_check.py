#!/usr/bin/env python3
"""What the built-in rewards say to every reference answer of real data, and what they cost.

    python scripts/reward_check.py [--shared DIR] [--every N] [--json]

Each reference is put into a box as a response. ``match`` and ``math`` score all of them as a run does; then
math-verify itself, without the shortcut for the reference's own text, compares each with itself. Prints every
reference that does not pass, the time per response, and what a hostile answer costs. Exit code 1 where less than
99.9 % of the references that are not empty pass.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from retrain import plugins
from retrain.config.schema import Config
from retrain.types import Message, Rollout, Score, Task

HOSTILE = "9^{9^{9^9}}"


def references(shared: Path) -> dict[str, list[str]]:
    """The reference answers of both training sets, in file order."""
    gsm8k = (shared / "data" / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = (shared / "data" / "math" / "math_train.jsonl").read_text(encoding="utf-8").splitlines()
    return {
        "gsm8k": [json.loads(r)["answer"].rpartition("####")[2].strip().replace(",", "") for r in gsm8k],
        "math": [json.loads(r)["answer"].strip() for r in rows],
    }


def rollout(text: str) -> Rollout:
    """A response that is nothing but its text."""
    ids, sampled = np.array([1, 2], np.int32), np.array([False, True])
    return Rollout("t", 0, ids, sampled, np.array([np.nan, -1], np.float32), None, text, "stop", 0)


def score(reward: Any, reference: str, *texts: str) -> list[Score]:
    """One group's scores."""
    task = Task("t", (Message("user", "q"),), reference, "t", 0)
    return asyncio.run(reward.score(task, [rollout(t) for t in texts]))


def measured(answers: list[str], judge: Callable[[str], bool | str]) -> dict[str, Any]:
    """How many pass, which do not (with the error, "" for a plain no), and milliseconds per answer."""
    failures: list[dict[str, str]] = []
    times: list[float] = []
    for answer in answers:
        started = time.perf_counter()
        verdict = judge(answer)
        times.append(1000 * (time.perf_counter() - started))
        if verdict is not True:
            failures.append({"reference": answer, "error": verdict if isinstance(verdict, str) else ""})
    return {
        "references": len(answers),
        "empty": sum(not a for a in answers),
        "passed": len(answers) - len(failures),
        "failures": failures,
        "ms_median": round(statistics.median(times), 3),
        "ms_mean": round(statistics.fmean(times), 3),
        "ms_max": round(max(times), 1),
    }


def boxed(reward: Any) -> Callable[[str], bool | str]:
    """Scores a reference in a box against itself."""

    def judge(answer: str) -> bool | str:
        (got,) = score(reward, answer, f"Therefore \\boxed{{{answer}}}.")
        return got.error or got.passed is True

    return judge


def itself(answer: str) -> bool | str:
    """What math-verify says to a reference and itself, in this process."""
    from retrain.rewards import math_child

    try:
        return bool(answer) and math_child.score(answer, answer, {"stage_s": 5})
    except BaseException as error:  # timeouts are BaseException there
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"{type(error).__name__}: {error}"


def checked(answers: list[str], match: Any, math: Any) -> dict[str, dict[str, Any]]:
    """One data set by every way to judge."""
    # A trailing point is the same number and another text, so this one takes the way through a child.
    numbers = [a for a in dict.fromkeys(answers) if a.lstrip("-").isdigit()][:300]

    def other_text(answer: str) -> bool | str:
        (got,) = score(math, answer, f"\\boxed{{{answer}.0}}")
        return got.error or got.passed is True

    return {
        "match": measured(answers, boxed(match)),
        "math": measured(answers, boxed(math)),
        "math-verify itself": measured(answers, itself),
        "math, other text": measured(numbers, other_text),
    }


def hostile(math: Any, timeout_s: float) -> dict[str, Any]:
    """Seconds that a group of eight equal hostile answers costs beside a right one."""
    started = time.perf_counter()
    *bad, good = score(math, "2", *[f"\\boxed{{{HOSTILE}}}"] * 8, "\\boxed{2.0}")
    return {
        "answer": HOSTILE,
        "timeout_s": timeout_s,
        "seconds": round(time.perf_counter() - started, 2),
        "errors": sum(bool(s.error) for s in bad),
        "right_one": good.reward,
        "error": bad[0].error,
    }


def main() -> int:
    """Measure, print, and say by the exit code whether enough pass."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    beside = Path(__file__).resolve().parents[2] / "shared"
    parser.add_argument("--shared", type=Path, default=Path(os.environ.get("RETRAIN_SHARED", beside)))
    parser.add_argument("--every", type=int, default=1, help="take every n-th reference only")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    report: dict[str, Any] = {"data": {}, "hostile": []}
    match = plugins.load("reward", "match")(Config(), None)
    for timeout_s in (30.0, 2.0):
        config = Config.model_validate({"reward": {"type": "math", "timeout_s": timeout_s}})
        math = plugins.load("reward", "math")(config, None)
        try:
            if not report["data"]:
                for name, answers in references(arguments.shared).items():
                    report["data"][name] = checked(answers[:: arguments.every], match, math)
            report["hostile"].append(hostile(math, timeout_s))
        finally:
            math.close()
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        show(report)
    shares = [
        r["passed"] / (r["references"] - r["empty"])
        for rewards in report["data"].values()
        for r in rewards.values()
    ]
    return int(min(shares) < 0.999)


def show(report: dict[str, Any]) -> None:
    """The report as lines."""
    for name, rewards in report["data"].items():
        for reward, r in rewards.items():
            print(
                f"{name:6} {reward:19} {r['passed']:5d} of {r['references']} pass ({r['empty']} are empty); "
                f"ms: median {r['ms_median']:.3f}, mean {r['ms_mean']:.3f}, longest {r['ms_max']:.1f}"
            )
            for failure in r["failures"]:
                if failure["reference"]:
                    print(f"       not: {failure['reference']!r} {failure['error']}")
    for r in report["hostile"]:
        print(
            f"{r['answer']} eight times at timeout_s = {r['timeout_s']:g}: {r['seconds']} s, {r['errors']} errors "
            f"({r['error']}); the right answer beside them: {r['right_one']:g}"
        )


if __name__ == "__main__":
    sys.exit(main())
