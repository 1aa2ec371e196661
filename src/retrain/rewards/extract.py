"""Where an answer stands in a response, for the rewards that read one."""

from __future__ import annotations

from retrain.boxed import last_boxed

_THINK = "</think>"


def after_thinking(text: str) -> str:
    """What follows the last ``</think>``, the whole text without one."""
    return text.rpartition(_THINK)[2]


def boxed_answer(text: str) -> str | None:
    """Content of the last box after the last ``</think>``, without outer spaces; None without a box there."""
    box = last_boxed(after_thinking(text))
    return None if box is None else box.strip()


def stated_answer(text: str) -> str:
    """The answer that a response gives in one of three ways, "" for an empty response.

    After the last ``</think>``: the content of the last closed ``<answer>...</answer>``; without one, that of
    the last box; without one, the last line that is not empty.
    """
    text = after_thinking(text)
    end = text.rfind("</answer>")
    begin = text.rfind("<answer>", 0, end) if end >= 0 else -1
    if begin >= 0:
        return text[begin + len("<answer>") : end].strip()
    box = last_boxed(text)
    if box is not None:
        return box.strip()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""
