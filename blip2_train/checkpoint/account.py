"""What becomes of every weight when names change: nothing is lost, or taken, without a word."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor

from blip2_train.errors import UserError

# What can become of a weight. A missing one is named as the result calls it.
MAPPED, CONVERTED, DROPPED, MISSING, UNKNOWN = (
    "mapped", "converted", "dropped", "missing", "unknown",
)  # fmt: skip
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class Row:
    """What became of one weight.

    Attributes:
        status: mapped (renamed at most), converted (other numbers or another shape), dropped (on
            purpose), missing (the result has it, the source has not), unknown (no rule covers it).
        source: its name there; "" where it is missing.
        target: its name in the result; "" where it is dropped or unknown.
        why: what was done, or the reason.
    """

    status: str
    source: str
    target: str = ""
    why: str = ""


@dataclass
class KeyAccount:
    """Converted weights, and what became of every one of the source.

    Attributes:
        state: weights under their new names.
        rows: of every weight.
    """

    state: dict[str, Tensor] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)

    @property
    def dropped(self) -> dict[str, str]:
        """{name in the source: why it is not needed}."""
        return {row.source: row.why for row in self.rows if row.status == DROPPED}

    @property
    def unknown(self) -> list[str]:
        """Names in the source that no rule covers."""
        return [row.source for row in self.rows if row.status == UNKNOWN]

    @property
    def missing(self) -> list[str]:
        """Names that the result has and the source has not."""
        return [row.target for row in self.rows if row.status == MISSING]

    def take(self, source: str, target: str, value: Tensor, why: str = "") -> None:
        """Enters a weight; with a reason it was converted, else renamed."""
        self.state[target] = value
        self.rows.append(Row(CONVERTED if why else MAPPED, source, target, why))

    def drop(self, source: str, why: str) -> None:
        """Enters a weight that is left out on purpose."""
        self.rows.append(Row(DROPPED, source, why=why))

    def miss(self, target: str, why: str) -> None:
        """Enters a weight that the source has not."""
        self.rows.append(Row(MISSING, "", target, why))

    def refuse(self, source: str) -> None:
        """Enters a weight that no rule covers."""
        self.rows.append(Row(UNKNOWN, source))

    def update(self, other: "KeyAccount") -> None:
        """Takes over another account's weights and rows."""
        self.state |= other.state
        self.rows += other.rows

    def check(self, what: str) -> None:
        """Refuses weights that no rule covers.

        Args:
            what: the source, for the message.

        Raises:
            UserError: there are some.
        """
        if unknown := self.unknown:
            raise UserError(
                f"{what} has {len(unknown)} weight(s) that no rule covers, such as "
                f"{', '.join(unknown[:3])}; it is another kind of model, so nothing was written"
            )

    def __str__(self) -> str:
        return table(self.rows)


def table(rows: Iterable[Row]) -> str:
    """The account as lines; weights that differ in their layer's number share one.

    Args:
        rows: of every weight.
    """
    rows = list(rows)
    groups = Counter(
        (row.status, _pattern(row.source), _pattern(row.target), row.why) for row in rows
    )
    counts = Counter(row.status for row in rows)
    lines = [
        ", ".join(
            f"{counts[status]:,} {status}"
            for status in (MAPPED, CONVERTED, DROPPED, MISSING, UNKNOWN)
        )
    ]
    for (status, source, target, why), count in groups.items():
        names = f"{source} -> {target}" if source and target else source or target
        lines.append(f"  {status:<9} {count:>3} x {names}{f'  ({why})' if why else ''}")
    return "\n".join(lines)


def in_short(names: Iterable[str]) -> list[str]:
    """Names, of which those that differ in their layer's number are one, with their number."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_pattern(name), []).append(name)
    return [
        f"{pattern} x {len(group)}" if len(group) > 1 else group[0]
        for pattern, group in groups.items()
    ]


def _pattern(name: str) -> str:
    return _NUMBER.sub("{i}", name)
