"""What rliable says of a few arms, stored for tests/campaign/test_statistics.py: it needs older packages than a trainer has.

pip install rliable "pandas<3" && python benches/rliable_reference.py
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from rliable import library, metrics

OUT = Path(__file__).resolve().parents[1] / "tests" / "campaign" / "rliable.json"


def main() -> None:
    generator = np.random.default_rng(5)
    cases: list[dict[str, object]] = []
    for n, m in ((8, 8), (10, 7), (64, 64), (5, 4)):
        a = generator.normal(0.55, 0.03, (n, 1))
        b = 0.6 - generator.gamma(1.0, 0.05, (m, 1))
        random = np.random.RandomState(0)
        points, intervals = library.get_interval_estimates(
            {"difference": (a, b)},
            lambda x, y: np.array([metrics.aggregate_iqm(x) - metrics.aggregate_iqm(y)]),
            reps=50_000,
            random_state=random,
        )
        cases.append(
            {
                "a": a[:, 0].tolist(),
                "b": b[:, 0].tolist(),
                "iqm_a": float(metrics.aggregate_iqm(a)),
                "iqm_b": float(metrics.aggregate_iqm(b)),
                "difference": float(points["difference"][0]),
                "low": float(intervals["difference"][0, 0]),
                "high": float(intervals["difference"][1, 0]),
            }
        )
    OUT.write_text(json.dumps(cases, indent=1) + "\n")


if __name__ == "__main__":
    main()
