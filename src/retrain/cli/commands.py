"""Names of the commands: what implements each, and what it does. Anything else is a run.

A command's module holds its help text as ``USAGE``: a text, or a mapping from command to text. It imports nothing heavy
at its top, because help is read from it.
"""

from __future__ import annotations

COMMANDS = {
    "demo": ("retrain.cli.run:demo", "train the embedded model on the CPU, in a few minutes"),
    "init": ("retrain.cli.create:init", "write a configuration from a template, or by questions"),
    "init-plugin": ("retrain.cli.scaffold:init_plugin", "write a plug-in that runs as it is, with its test"),
    "explain": ("retrain.cli.explain:explain", "what a configuration will do, need and cost, before it runs"),
    "trace": ("retrain.cli.examine:trace", "follow one task through a step, without a model"),
    "doctor": ("retrain.cli.examine:doctor", "check this machine, or a configuration on it"),
    "resume-check": ("retrain.cli.examine:resume_check", "can a run be continued, and will it be byte-exact?"),
    "status": ("retrain.cli.watch:status", "how runs are doing"),
    "top": ("retrain.cli.watch:top", "how runs are doing, live"),
    "report": ("retrain.cli.report:report", "a run as one HTML file, and as Markdown"),
    "diff": ("retrain.cli.compare:diff", "what differs between two runs or configurations"),
    "why": ("retrain.cli.compare:why", "what a step trained on, what it dropped, and why"),
    "replay": ("retrain.cli.compare:replay", "credit of stored rollouts under another algorithm, without an engine"),
    "eval": ("retrain.cli.use:evaluate", "accuracy of a run, an adapter or a model on held-out tasks"),
    "sample": ("retrain.cli.use:sample", "talk to a run's checkpoint, an adapter or a model"),
    "export": ("retrain.cli.use:export", "write a run's adapter, or the whole model, for other programs"),
    "squeeze": ("retrain.cli.squeeze:squeeze", "which rank an adapter needs, and the adapter at that rank"),
    "bench": ("retrain.cli.bench:bench", "time a configuration's training step against what the device allows"),
    "backends": ("retrain.cli.examine:backends", "backends and engines: what is built, and what is installed"),
    "plugins": ("retrain.cli.examine:plugins", "everything that a configuration can name"),
    "schema": ("retrain.cli.manual:schema", "a JSON Schema of the configuration, for editors"),
    "completion": ("retrain.cli.manual:completion", "shell completion for bash, zsh or fish"),
    "man": ("retrain.cli.manual:man", "show the manual, or one topic of it"),
}

LATER: tuple[str, ...] = ()
"""Known commands that this version does not build."""
