"""The error tree. Every error carries one line that names the place, a fix, and the exit code it causes.

RetrainError
├── UsageError (exit 2)         a wrong command line
├── ConfigError (exit 2)        a wrong value in a TOML file or flag; may hold several problems
│   └── NotInThisVersion        a known name that this version does not build
├── PluginError (exit 2)        a plug-in that cannot be imported or breaks its protocol
├── DataError (exit 2)          a dataset, field or file that is missing or malformed
├── ModelError (exit 2)         a model, tokenizer or adapter that cannot be loaded
├── ResumeError (exit 2)        a run directory that cannot be continued
└── RunError (exit 1)           a run that started and failed
    ├── RewardError             too many rewards of a step failed
    ├── EngineError             the sampler broke, hung, or is not the trained policy
    ├── OutOfMemory             a step does not fit; a smaller one may
    └── LearnerError            the learner cannot go on (three non-finite updates in a row)
"""

from __future__ import annotations

from collections.abc import Sequence


class RetrainError(Exception):
    """Base of everything a user can cause or must read. ``fix`` is a sentence that says what to do."""

    exit_code = 1

    def __init__(self, message: str, *, fix: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.fix = fix

    def __str__(self) -> str:
        gap = "" if self.message.endswith("\n") else " "
        return f"{self.message}{gap}Fix: {self.fix}" if self.fix else self.message


class UsageError(RetrainError):
    """A wrong command line."""

    exit_code = 2


class ConfigError(RetrainError):
    """One or more wrong settings. ``problems`` holds one complete line each, with place and fix."""

    exit_code = 2

    def __init__(self, message: str, *, fix: str = "", problems: Sequence[str] = ()) -> None:
        super().__init__(message, fix=fix)
        self.problems: tuple[str, ...] = tuple(problems)

    def __str__(self) -> str:
        return "\n".join(self.problems) if self.problems else super().__str__()


class NotInThisVersion(ConfigError):
    """A setting whose name is known and whose implementation this version does not hold."""


class PluginError(RetrainError):
    """A plug-in that cannot be imported, is unknown, or breaks its protocol."""

    exit_code = 2


class DataError(RetrainError):
    """A dataset, field or file that is missing or malformed."""

    exit_code = 2


class ModelError(RetrainError):
    """A model, tokenizer or adapter that cannot be loaded."""

    exit_code = 2


class ResumeError(RetrainError):
    """A run directory that cannot be continued, with what stands in the way."""

    exit_code = 2


class RunError(RetrainError):
    """A run that started and failed."""

    exit_code = 1


class RewardError(RunError):
    """Too many rewards of one step failed."""


class EngineError(RunError):
    """The sampler broke, hung past its deadline, or does not sample from the trained policy."""


class OutOfMemory(RunError):
    """Memory ran out in sampling or learning, and nothing was changed by it: the same with less may be tried.

    ``drawn``: tasks that had been drawn for the step whose sampling it ended, 0 where nobody said so.
    """

    drawn = 0


class LearnerError(RunError):
    """The learner cannot go on."""


_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "cublas_status_alloc_failed")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error``, of whatever library, says that memory ran out. Knows torch's own by its name."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if kinds & {"MemoryError", "OutOfMemoryError", "OutOfMemory"}:
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _NO_MEMORY)
