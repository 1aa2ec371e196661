"""What a report of several sections is made of; the page and its Markdown twin write the same blocks down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from retrain.report.content import Fact, Table
from retrain.report.figures import Plot

Tone: TypeAlias = Literal["", "good", "bad", "warn"]


@dataclass(frozen=True, slots=True)
class Note:
    """A paragraph; ``loud`` is set as the text of the section instead of a remark."""

    text: str
    loud: bool = False


@dataclass(frozen=True, slots=True)
class Facts:
    """The headline: a value, what it is, and a remark, each in a box."""

    facts: tuple[Fact, ...]


@dataclass(frozen=True, slots=True)
class Item:
    """One entry of a list: what it is about, what is to be said of it, and how bad or good that is."""

    title: str
    text: str
    tone: Tone = ""


@dataclass(frozen=True, slots=True)
class Items:
    """A list of findings, one under the other."""

    items: tuple[Item, ...]


@dataclass(frozen=True, slots=True)
class Plots:
    """Plots side by side as far as they fit."""

    plots: tuple[Plot, ...]


@dataclass(frozen=True, slots=True)
class Shown:
    """A table under a heading of its own, where it has one; ``folded`` away until a reader of the page asks."""

    table: Table
    heading: str = ""
    folded: bool = False


Block: TypeAlias = Note | Facts | Items | Plots | Shown


@dataclass(frozen=True, slots=True)
class Section:
    """Blocks under a heading; ``name`` is its anchor in the page. The first of a report needs no heading."""

    name: str
    heading: str
    blocks: tuple[Block, ...]


def plots_in(sections: Sequence[Section]) -> list[Plot]:
    """Every plot of a report in its order."""
    return [
        plot for section in sections for block in section.blocks if isinstance(block, Plots) for plot in block.plots
    ]
