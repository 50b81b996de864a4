"""The policies that measure nothing: as asked for, never, and by a table of batch sizes."""

import re
from collections.abc import Callable, Mapping, Sequence as Items
from functools import lru_cache
from typing import Any

from outrider.control.base import PLAIN, Load, Room, Step
from outrider.errors import RequestError
from outrider.request import MAX_DRAFT_TOKENS, Option
from outrider.step import RowPlan


class FixedPolicy:
    """K as asked for. A drafted token that could never be committed is not drafted."""

    name = "fixed"
    needs_clock = False
    options: Mapping[str, Option] = {}

    def rests(self, num_rows: int) -> bool:
        return False

    def plan(self, rooms: Items[Room], load: Callable[[], Load]) -> list[RowPlan]:
        return [room.plan(room.depth) for room in rooms]

    def observe(self, step: Step) -> None:
        """Nothing to learn."""

    def explain(self) -> dict[str, Any]:
        return {}


class OffPolicy(FixedPolicy):
    """Never drafts, while the drafter goes on learning from what is committed."""

    name = "off"

    def rests(self, num_rows: int) -> bool:
        return True

    def plan(self, rooms: Items[Room], load: Callable[[], Load]) -> list[RowPlan]:
        return [PLAIN] * len(rooms)


class TablePolicy(FixedPolicy):
    """K by the number of sequences that are decoding, from a table.

    As vLLM's `num_speculative_tokens_per_batch_size`, but sequences are counted that will be given
    a token, not prompts that are still being read. A gap carries on the K before it.
    """

    name = "table"
    options: Mapping[str, Option] = {
        "table": Option(
            "1-4:4,5-16:2,17-:0", "FROM-TO:K by sequences that decode, TO may be left out"
        )
    }

    def plan(self, rooms: Items[Room], load: Callable[[], Load]) -> list[RowPlan]:
        num_emitting = load().num_emitting
        return [self._row(room, num_emitting) for room in rooms]

    def check(self, options: Mapping[str, Any]) -> None:
        """RequestError for a table that cannot be read."""
        read_table(str(options["table"]))

    def most_depth(self, options: Mapping[str, Any]) -> int:
        """The largest K of the table."""
        return max(k for _, k in read_table(str(options["table"])))

    def _row(self, room: Room, num_emitting: int) -> RowPlan:
        table = read_table(str(room.seq.speculation.policy_options["table"]))
        depth = 0
        for first, k in table:
            if num_emitting < first:
                break
            depth = k
        return room.plan(depth) if depth else PLAIN


@lru_cache(maxsize=256)
def read_table(text: str) -> tuple[tuple[int, int], ...]:
    """(first batch size, K), rising; K holds until the next. RequestError if it is no table."""
    found: list[tuple[int, int]] = []
    last = 0
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(-(\d*))?\s*:\s*(\d+)\s*", part)
        if match is None:
            raise RequestError(f"table={text!r}: {part!r} is not FROM-TO:K, such as 1-4:4")
        first, end, k = int(match[1]), match[3], int(match[4])
        if first <= last or (end and int(end) < first):
            raise RequestError(f"table={text!r}: {part!r} does not follow the range before it")
        if k > MAX_DRAFT_TOKENS:
            raise RequestError(f"table={text!r}: K={k} is more than {MAX_DRAFT_TOKENS}")
        last = int(end) if end else first
        found.append((first, k))
    return tuple(found)
