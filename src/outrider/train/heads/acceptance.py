"""How far drafts would stand on given text: by position, beside drafts that need no training.

Teacher-forced: at every position the draft is given the text up to there, and at depth k the text
up to there too, as if all drafted before had stood. A token drawn from q stands with probability
sum min(p, q) (Leviathan et al. 2023); a greedy one if both laws have the same likeliest token. On
text that the target itself has drawn, the product along a draft is what serving at temperature 1
accepts; on other text it is a guide.

Shape legend: N rows of a batch, M rows that are scored, K depths, R rows held at a time,
V vocabulary of the target, D of the draft.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from outrider.errors import ConfigError
from outrider.train.heads.pieces import Packed, Piece, batches_of
from outrider.train.heads.student import Student
from outrider.train.heads.teacher import Taught, Teacher

ROWS = 512
NGRAMS = (3, 2, 1)
NO_TOKEN = -1
LONGEST_PERIOD, LOOP_TOKENS = 8, 24
HEAD, COPY, NGRAM = "trained", "repeat last", "n-gram 3..1"


class Marks(NamedTuple):
    """Of every scored row and depth: the chance that a drawn token stands, and whether the
    likeliest one does, each given that all before it stood.
    """

    drawn_MK: Tensor
    greedy_MK: Tensor


class Scores(NamedTuple):
    """Marks of the head and of the baselines, by name, on the same rows.

    Attributes:
        unit_M: index into `units`, of the document that a row is of.
        is_loop_M: whether the text has been repeating itself up to that row.
    """

    marks: dict[str, Marks]
    unit_M: Tensor
    units: list[str]
    is_loop_M: Tensor

    def rates(self, name: str = HEAD, *, greedy: bool = False) -> "Rates":
        """Means over all rows."""
        given_MK = self.marks[name].greedy_MK if greedy else self.marks[name].drawn_MK
        joint_K = given_MK.cumprod(1).mean(0).tolist()
        before = [1.0, *joint_K[:-1]]
        conditional = [
            now / earlier if earlier else 0.0 for now, earlier in zip(joint_K, before, strict=True)
        ]
        return Rates(tuple(joint_K), tuple(conditional))

    @property
    def num_rows(self) -> int:
        return len(self.unit_M)

    @property
    def loop_share(self) -> float:
        """Of the rows; drafts are easy there, whoever makes them."""
        return float(self.is_loop_M.float().mean())


class Rates(NamedTuple):
    """By depth, the chance that a draft stands so far, and that a token does if all before did."""

    joint: tuple[float, ...]
    conditional: tuple[float, ...]

    @property
    def length(self) -> float:
        """Tokens per pass of the target, its own included, of drafts of all these depths."""
        return 1.0 + sum(self.joint)


@torch.no_grad()
def score(
    student: Student,
    teacher: Teacher,
    pieces: Sequence[Piece],
    num_depths: int,
    *,
    tokens_per_pass: int = 2048,
) -> Scores:
    """Every position of the pieces that has `num_depths` learned tokens before it.

    Raises:
        ConfigError: there is no such position.
    """
    student.eval()
    units: dict[str, int] = {}
    parts: list[dict[str, list[Tensor]]] = []
    where: list[tuple[Tensor, Tensor]] = []
    for few in batches_of(pieces, tokens_per_pass):
        batch = Packed(few, teacher.spec.device)
        rows_M = batch.rows(student.lead, num_depths - 1)
        taught = teacher.teach(batch, student.boundaries)
        is_half = batch.device.type != "cpu"
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=is_half):
            parts.append(_marks(student, teacher, batch, taught, rows_M, num_depths))
        of_piece = [units.setdefault(unit, len(units)) for unit in batch.units]
        unit_N = torch.tensor(of_piece).repeat_interleave(torch.tensor(batch.lengths))
        rows = rows_M.cpu()
        where.append((unit_N[rows], _loops(batch)[rows]))
    if not any(len(unit_M) for unit_M, _ in where):
        raise ConfigError(
            f"no held-out text has {num_depths} learned tokens in a row: give longer texts"
        )
    unit_M, is_loop_M = (torch.cat(part) for part in zip(*where, strict=True))
    marks = {
        name: Marks(*(torch.cat([part[name][kind] for part in parts]) for kind in (0, 1)))
        for name in parts[0]
    }
    return Scores(marks, unit_M, list(units), is_loop_M)


def _marks(
    student: Student,
    teacher: Teacher,
    batch: Packed,
    taught: Taught,
    rows_M: Tensor,
    num_depths: int,
) -> dict[str, list[Tensor]]:
    """By name, drawn_MK and greedy_MK on the CPU."""
    guesses = {name: g[rows_M] for name, g in _guesses(batch, student.lead, num_depths).items()}
    columns: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for depth, states_ND in enumerate(student.states(batch, taught, num_depths)):
        found: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for rows_R, at in _few(rows_M):
            p_RV = teacher.logits(taught.final_NH[rows_R + student.lead + depth]).softmax(-1)
            q_RD = student.logits(depth, states_ND[rows_R]).softmax(-1)
            found.setdefault(HEAD, []).append(_overlap(p_RV, q_RD, student.ids_D))
            for name, guess_MK in guesses.items():
                found.setdefault(name, []).append(_hit(p_RV, guess_MK[at, depth]))
        for name, pairs in found.items():
            drawn, greedy = (torch.cat(part).float().cpu() for part in zip(*pairs, strict=True))
            columns.setdefault(name, []).append((drawn, greedy))
    if not len(rows_M):
        empty = torch.empty(0, num_depths)
        return {name: [empty, empty] for name in (HEAD, *guesses)}
    return {
        name: [torch.stack(part, dim=1) for part in zip(*pairs, strict=True)]
        for name, pairs in columns.items()
    }


def _few(rows_M: Tensor) -> list[tuple[Tensor, slice]]:
    """Rows in portions, and where each portion stands among them."""
    starts = range(0, len(rows_M), ROWS)
    return [(rows_M[i : i + ROWS], slice(i, i + ROWS)) for i in starts]


def _overlap(p_RV: Tensor, q_RD: Tensor, ids_D: Tensor | None) -> tuple[Tensor, Tensor]:
    likeliest_R = q_RD.argmax(-1)
    if ids_D is None:
        return torch.minimum(p_RV, q_RD).sum(-1), likeliest_R == p_RV.argmax(-1)
    overlap_R = torch.minimum(p_RV[:, ids_D], q_RD).sum(-1)
    return overlap_R, ids_D[likeliest_R] == p_RV.argmax(-1)


def _hit(p_RV: Tensor, guess_R: Tensor) -> tuple[Tensor, Tensor]:
    """Of a single guess; q is one at it."""
    is_made_R = guess_R != NO_TOKEN
    chance_R = p_RV.gather(1, guess_R.clamp_min(0).unsqueeze(1)).squeeze(1)
    return chance_R * is_made_R, guess_R == p_RV.argmax(-1)


def _guesses(batch: Packed, lead: int, num_depths: int) -> dict[str, Tensor]:
    """By baseline, the guesses (N, K) after the last token that each row knows."""
    copied = batch.tokens_after(lead).unsqueeze(1).expand(-1, num_depths)
    looked_up: list[list[int]] = []
    for start, length in zip(batch.starts, batch.lengths, strict=True):
        tokens = batch.tokens_N[start : start + length].tolist()
        own = lookup(tokens, num_depths)
        looked_up += own[lead:] + [[NO_TOKEN] * num_depths] * min(lead, length)
    return {COPY: copied, NGRAM: torch.tensor(looked_up, device=batch.device)}


def lookup(tokens: Sequence[int], num_depths: int) -> list[list[int]]:
    """After each token: what followed the latest earlier occurrence of the last 3, 2 or 1."""
    ends: dict[tuple[int, ...], int] = {}
    guesses = []
    for stop in range(1, len(tokens) + 1):
        keys = [tuple(tokens[stop - size : stop]) for size in NGRAMS if size <= stop]
        found = next((ends[key] for key in keys if key in ends), stop)
        known = list(tokens[found : min(found + num_depths, stop)])
        guesses.append(known + [NO_TOKEN] * (num_depths - len(known)))
        ends.update(dict.fromkeys(keys, stop))
    return guesses


def _loops(batch: Packed) -> Tensor:
    """Rows up to which the last tokens repeat themselves with a short period."""
    is_loop_N = torch.zeros(len(batch), dtype=torch.bool)
    tokens_N, positions_N = batch.tokens_N.cpu(), batch.positions_N.cpu()
    index_N = torch.arange(len(batch))
    for period in range(1, LONGEST_PERIOD + 1):
        is_same_N = tokens_N == tokens_N[(index_N - period).clamp_min(0)]
        is_same_N &= positions_N >= period
        breaks_N = torch.where(is_same_N, -1, index_N).cummax(0).values
        is_loop_N |= index_N - breaks_N >= LOOP_TOKENS - period
    return is_loop_N
