"""Log-probabilities on the wire: of chat (with bytes) and of legacy completions (with offsets)."""

import re
from functools import cache
from typing import Any

from outrider.stream.detokenize import Detokenizer
from outrider.stream.events import TokenLogprob
from outrider.tokenizer import Tokenizer

NUM_CONTEXT_TOKENS = 6
LEAST = -9999.0  # JSON has no infinity; OpenAI writes this for "never"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def token_bytes(tokenizer: Tokenizer, token_id: int) -> bytes:
    """The bytes that a token stands for inside a text; special tokens as they are written."""
    text = tokenizer.token_text(token_id)
    if token_id in tokenizer.special_ids:
        return text.encode()
    byte = _BYTE_TOKEN.fullmatch(text)
    if byte:
        return bytes.fromhex(byte.group(1))
    decoded = tokenizer.decode([token_id], skip_special_tokens=False)
    if "\ufffd" in decoded and all(char in _byte_alphabet() for char in text):
        return bytes(_byte_alphabet()[char] for char in text)
    if text.startswith("▁") and not decoded.startswith(" "):
        decoded = " " + decoded  # a decoder drops the blank at the beginning of a text
    return decoded.encode()


def token_string(found: bytes) -> str:
    """A token as text; half characters as OpenAI writes them."""
    try:
        return found.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in found)


def chat_logprobs(tokenizer: Tokenizer, tokens: tuple[TokenLogprob, ...]) -> dict[str, Any]:
    """`choices[i].logprobs` of chat: per token its text, bytes, logprob and the likeliest."""
    return {"content": [chat_logprob(tokenizer, token) for token in tokens], "refusal": None}


def chat_logprob(tokenizer: Tokenizer, token: TokenLogprob) -> dict[str, Any]:
    """One token of `content`, the likeliest ones in falling order."""
    top = sorted(token.top.items(), key=lambda pair: -pair[1])
    return {
        **_entry(tokenizer, token.token_id, token.logprob),
        "top_logprobs": [_entry(tokenizer, token_id, logprob) for token_id, logprob in top],
    }


class LegacyLogprobs:
    """`choices[i].logprobs` of /v1/completions, for one completion, commit by commit.

    A token that ends inside a character has the offset of that character.

    Args:
        context: token ids before the completion; the last of them are read.
        start: characters before it in the text that is sent.
    """

    def __init__(self, tokenizer: Tokenizer, context: tuple[int, ...], start: int = 0) -> None:
        self._tokenizer = tokenizer
        self._text = Detokenizer(tokenizer, context=context[-NUM_CONTEXT_TOKENS:])
        self._offset = start

    def take(self, tokens: tuple[TokenLogprob, ...]) -> dict[str, Any]:
        """Of the tokens that come next."""
        strings = [self._string(token.token_id) for token in tokens]
        pairs = zip(tokens, strings, strict=True)
        return {
            "tokens": strings,
            "token_logprobs": [finite(token.logprob) for token in tokens],
            "top_logprobs": [self._top(token) for token in tokens],
            "text_offset": [self._place(token.token_id, string) for token, string in pairs],
        }

    def _place(self, token_id: int, string: str) -> int:
        """Where the token begins; what was left of a broken character comes with the next token."""
        start = self._offset
        self._text.add((token_id,))
        new = self._text.take()
        self._offset += len(new)
        return self._offset - len(string) if new.endswith(string) else start

    def _string(self, token_id: int) -> str:
        return token_string(token_bytes(self._tokenizer, token_id))

    def _top(self, token: TokenLogprob) -> dict[str, float]:
        """The likeliest tokens and the emitted one, as OpenAI has it."""
        found = {**token.top, token.token_id: token.logprob}
        return {self._string(token_id): finite(logprob) for token_id, logprob in found.items()}


def finite(logprob: float) -> float:
    return max(logprob, LEAST)


def _entry(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    found = token_bytes(tokenizer, token_id)
    return {"token": token_string(found), "logprob": finite(logprob), "bytes": list(found)}


@cache
def _byte_alphabet() -> dict[str, int]:
    """How byte-level BPE spells bytes: printable ones as they are, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    spelled = {chr(0x100 + place): byte for place, byte in enumerate(others)}
    return spelled | {chr(byte): byte for byte in printable}
