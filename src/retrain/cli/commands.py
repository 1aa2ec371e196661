"""Names of the commands: what this version builds, and what it only knows."""

from __future__ import annotations

COMMANDS = {
    "demo": ("retrain.cli.run:demo", "train the embedded model on the CPU, in a few minutes"),
    "eval": ("retrain.cli.use:evaluate", "accuracy of a run, an adapter or a model on held-out tasks"),
    "sample": ("retrain.cli.use:sample", "talk to a run's checkpoint, an adapter or a model"),
    "export": ("retrain.cli.use:export", "write a run's adapter, or the whole model, for other programs"),
    "bench": ("retrain.cli.bench:bench", "time a configuration's training step against what the device allows"),
    "init": ("retrain.cli.create:init", "write a configuration from a template"),
    "man": ("retrain.cli.manual:man", "show the manual, or one topic of it"),
}
"""Built commands: what implements them, and what they do. Anything else is a run."""

LATER = (
    "init-plugin",
    "explain",
    "trace",
    "doctor",
    "resume-check",
    "status",
    "top",
    "diff",
    "report",
    "replay",
    "why",
    "squeeze",
    "backends",
    "plugins",
    "schema",
)
"""Known commands that this version does not build."""
