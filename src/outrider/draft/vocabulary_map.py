"""Two vocabularies side by side: Dialect (one tokenizer, bytes per token) and VocabularyMap.

Shape legend: R rows, D ids of the draft model, T ids of the target, C tokens in common.
"""

import re
from collections.abc import Callable, Iterable, Sequence as Items

import torch
from torch import Tensor

from outrider.errors import TokenizerError
from outrider.tokenizer import Tokenizer

PROBE = "a b"
ANCHORS = ("\n", ".", "a")
WORD_START = "\u2581"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Dialect:
    """How one tokenizer writes text: the bytes of every token, and ids of text in mid-document.

    Attributes:
        spellings: per id the bytes it stands for inside a text; None for special, unknown and
            padding ids.
        num_tokens: ids that have a spelling.
        opening: ids that the tokenizer puts before every document.
        adds_space: whether it writes a space before the first word of a document.

    Args:
        num_ids: width of the model's logits.

    Raises:
        TokenizerError: its tokens are written neither plainly, nor with U+2581 and <0xNN>
            (SentencePiece), nor byte by byte (GPT-2, where a space is U+0120).
    """

    def __init__(self, tokenizer: Tokenizer, num_ids: int) -> None:
        self.tokenizer = tokenizer
        self.num_ids = num_ids
        ids = tokenizer.encode(PROBE, add_special_tokens=False)
        probe = [tokenizer.token_text(token) for token in ids]
        spell = _spelling(probe)
        self.spellings = _spell_all(tokenizer, num_ids, spell)
        self.adds_space = b"".join(map(spell, probe)).startswith(b" ")
        self.opening = _opening(tokenizer)
        self.num_tokens = sum(spelling is not None for spelling in self.spellings)

    def bytes_of(self, token: int) -> bytes:
        """b"" for what stands for no text."""
        known = self.spellings[token] if 0 <= token < self.num_ids else None
        return known or b""

    def encode(self, text: str) -> list[int]:
        """Ids of a text that opens a document, those of the model alone."""
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return [token for token in ids if token < self.num_ids]

    def go_on(self, text: str) -> list[int]:
        """Ids of a text that others precede: none is put before its first word.

        It is encoded behind a short anchor, whose ids are then taken off; an anchor that merges
        with the text gives way to the next.
        """
        for anchor in ANCHORS:
            head, ids = self.encode(anchor), self.encode(anchor + text)
            if ids[: len(head)] == head:
                return ids[len(head) :]
        return self.encode(text)


class VocabularyMap:
    """Which draft ids stand for which target ids; several may stand for one.

    Attributes:
        draft_to_target_D: int64, -1 where the target has no such token.
        target_to_draft: per target id the draft id to read in its place, -1 where there is none.
        num_common: target ids that can be drafted.

    Args:
        pairs: (draft id, target id), each draft id at most once; of those that stand for one
            target id the first is the one to read.
    """

    def __init__(
        self,
        pairs: Iterable[tuple[int, int]],
        num_draft: int,
        num_target: int,
        device: torch.device | None = None,
    ) -> None:
        self.num_target = num_target
        self.target_to_draft = [-1] * num_target
        self.draft_to_target_D = torch.full((num_draft,), -1, dtype=torch.long)
        rounds: list[list[tuple[int, int]]] = []
        uses = [0] * num_target
        for draft, target in pairs:
            self.draft_to_target_D[draft] = target
            if uses[target] == 0:
                self.target_to_draft[target] = draft
            if uses[target] == len(rounds):
                rounds.append([])
            rounds[uses[target]].append((draft, target))
            uses[target] += 1
        self.num_common = sum(use > 0 for use in uses)
        # One pair per target id in each round, so that a round is one indexed operation.
        self._rounds = [torch.tensor(pairs, device=device).T for pairs in rounds]

    @classmethod
    def between(cls, draft: Dialect, target: Dialect, device: torch.device) -> "VocabularyMap":
        """Pairs of equal bytes; a byte token (<0x41>) gives way to a piece ("A") on both sides."""
        place = {
            spelling: token
            for token in reversed(_by_preference(target))
            if (spelling := target.spellings[token]) is not None
        }
        pairs = [
            (token, place[spelling])
            for token in _by_preference(draft)
            if (spelling := draft.spellings[token]) in place
        ]
        return cls(pairs, draft.num_ids, target.num_ids, device)

    def translate(self, logits: Tensor) -> Tensor:
        """Rows (or one row) of draft logits over the target's vocabulary; -inf elsewhere.

        Their softmax is the draft law given that its token is one of the target's: where draft ids
        stand for one target id their probabilities add up.
        """
        shape = (*logits.shape[:-1], self.num_target)
        mapped = logits.new_full(shape, float("-inf"))
        for drafts_C, targets_C in self._rounds:
            added = logits[..., drafts_C]
            mapped[..., targets_C] = torch.logaddexp(mapped[..., targets_C], added)
        return mapped


def _by_preference(dialect: Dialect) -> list[int]:
    """Ids that stand for text, byte tokens last."""
    ids = [token for token, spelling in enumerate(dialect.spellings) if spelling is not None]
    text = dialect.tokenizer.token_text
    return sorted(ids, key=lambda token: (_BYTE_TOKEN.fullmatch(text(token)) is not None, token))


def _spell_all(
    tokenizer: Tokenizer, num_ids: int, spell: Callable[[str], bytes]
) -> list[bytes | None]:
    spellings: list[bytes | None] = [None] * num_ids
    for text, token in tokenizer.vocabulary().items():
        if token < num_ids and text and not _is_special(tokenizer, token):
            spellings[token] = spell(text)
    return spellings


def _is_special(tokenizer: Tokenizer, token: int) -> bool:
    """Roles and the like need not be among the tokenizer's special ids; their text tells."""
    if token in tokenizer.special_ids:
        return True
    is_silent = not tokenizer.decode([token])
    return is_silent and bool(tokenizer.decode([token], skip_special_tokens=False))


def _spelling(probe: Items[str]) -> Callable[[str], bytes]:
    """How tokens are written, by what the probe looks like in them."""
    for spell in (str.encode, _spell_pieces, _spell_bytes):
        if b"".join(map(spell, probe)).strip() == PROBE.encode():
            return spell
    raise TokenizerError(
        f"the tokenizer writes {PROBE!r} as {list(probe)!r}, which cannot be compared with other "
        "vocabularies: use a draft model of the same family"
    )


def _spell_pieces(text: str) -> bytes:
    """SentencePiece: U+2581 for a space, <0xNN> for a byte."""
    found = _BYTE_TOKEN.fullmatch(text)
    return bytes.fromhex(found[1]) if found else text.replace(WORD_START, " ").encode()


def _spell_bytes(text: str) -> bytes:
    """GPT-2: one character per byte; what was added to such a vocabulary is plain text."""
    try:
        return bytes(_ALPHABET[character] for character in text)
    except KeyError:
        return text.encode()


def _alphabet() -> dict[str, int]:
    """GPT-2's character of each byte: itself if it prints, else one from U+0100 on, in order."""
    printing = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printing]
    characters = {chr(byte): byte for byte in printing}
    return characters | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_ALPHABET = _alphabet()


def _opening(tokenizer: Tokenizer) -> list[int]:
    """What stands before the ids of a text when special tokens are wanted."""
    whole, bare = tokenizer.encode(PROBE), tokenizer.encode(PROBE, add_special_tokens=False)
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start]
    return []
