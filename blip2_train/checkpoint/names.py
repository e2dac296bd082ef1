"""Renaming by tables: one side's weight names are ours."""

import re
from dataclasses import dataclass

# The parts of a Q-Former block after the attentions, by the names of BERT: LAVIS's and HF's.
FEED_FORWARDS = [
    ("query_ffn.inner.", "intermediate_query.dense."),
    ("query_ffn.output.", "output_query.dense."),
    ("query_ffn.norm.", "output_query.LayerNorm."),
    ("text_ffn.inner.", "intermediate.dense."),
    ("text_ffn.output.", "output.dense."),
    ("text_ffn.norm.", "output.LayerNorm."),
]
OURS, THEIRS = 0, 1


@dataclass(frozen=True)
class Names:
    """A table of names.

    Attributes:
        whole: (ours, theirs); an entry that ends in a dot renames what starts with it, others are
            whole names.
        layers: the same inside a block of the Q-Former.
        blocks: how a name inside a block begins, (ours, theirs), in front of the block's number.
    """

    whole: list[tuple[str, str]]
    layers: list[tuple[str, str]]
    blocks: tuple[str, str]

    def theirs(self, name: str) -> str:
        """Our name -> theirs.

        Raises:
            KeyError: they have no such weight.
        """
        return self._rename(name, OURS, THEIRS)

    def ours(self, name: str) -> str:
        """Their name -> ours.

        Raises:
            KeyError: we have no such weight.
        """
        return self._rename(name, THEIRS, OURS)

    def _rename(self, name: str, old: int, new: int) -> str:
        table, start = self.whole, ""
        if match := re.match(re.escape(self.blocks[old]) + r"(\d+)\.", name):
            table, start = self.layers, f"{self.blocks[new]}{match[1]}."
            name = name[match.end() :]
        for entry in table:
            known = entry[old]
            if name == known or (known.endswith(".") and name.startswith(known)):
                return start + entry[new] + name[len(known) :]
        raise KeyError(start + name)


def attention(kind: str, theirs: str, projections: str) -> list[tuple[str, str]]:
    """Names of an attention's parts.

    Args:
        kind: our name of it.
        theirs: their name of it.
        projections: what stands between it and query, key and value.
    """
    parts = [
        (f"{kind}.{part}.", f"{theirs}.{projections}.{part}.") for part in ("query", "key", "value")
    ]
    return parts + [
        (f"{kind}.output.", f"{theirs}.output.dense."),
        (f"{kind}.norm.", f"{theirs}.output.LayerNorm."),
    ]
