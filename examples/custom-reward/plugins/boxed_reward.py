"""A reward of one's own: most of it for the right answer, a little for an answer in the asked form."""

import re

BOX = re.compile(r"\\boxed\{\s*(-?\d+)\s*\}")


def score(response: str, reference: str) -> dict[str, float]:
    """Named parts, which are logged as they are; ``reward`` is what trains."""
    boxes = BOX.findall(response)
    correct = float(bool(boxes) and boxes[-1] == reference.strip())
    one_box = float(len(boxes) == 1)
    return {"reward": 0.9 * correct + 0.1 * one_box, "correct": correct, "one_box": one_box}
