"""Steps: what each commit was made of, for clients that ask to see it (`outrider.step`)."""

from collections.abc import Sequence as Items
from typing import Any

from outrider.serve.logprobs import token_bytes
from outrider.stream.detokenize import Detokenizer
from outrider.stream.events import Committed
from outrider.tokenizer import Tokenizer

NUM_CONTEXT_TOKENS = 6


class Steps:
    """Of one completion: turns each commit into the member `step` of its chunk or event.

    `{"tokens": [...], "accepted": 2, "num_drafted": 4, "source": "draft_model"}`: the text of
    each token, how many of them (the first ones) were drafted, nodes drafted in the step, and who
    drafted. A token that ends inside a character has the text "", as a special token has. Joined,
    the texts are the text of the stream, save that what may begin a stop text is here at once.

    Where tokens have no text there is also `"without_text": {"0": "\\xe2\\x82"}`: by place, how
    such a token reads alone. With a tree in the event there is also
    `"tree": {"tokens", "parents", "accepted"}`: how each node reads alone, its parent (-1 the
    root), and the nodes of the accepted path.

    Alone, bytes that are no whole character read as escapes, and a special token as its name.

    Args:
        tokenizer: None tells counts without texts.
        prompt: token ids, whose end decides how the first token reads.
    """

    def __init__(self, tokenizer: Tokenizer | None, prompt: Items[int]) -> None:
        self._tokenizer = tokenizer
        context = tuple(prompt[-NUM_CONTEXT_TOKENS:])
        self._text = Detokenizer(tokenizer, context=context) if tokenizer else None

    def detail(self, event: Committed) -> dict[str, Any]:
        """The step of this event; call it for every event of the completion, in order."""
        pieces = self._pieces(event)
        found: dict[str, Any] = {
            "tokens": pieces,
            "accepted": event.num_from_draft,
            "num_drafted": event.num_drafted,
            "source": event.source,
        }
        silent = [place for place, text in enumerate(pieces) if not text]
        if silent and self._tokenizer is not None:
            found["without_text"] = {str(i): self._alone(event.token_ids[i]) for i in silent}
        tree = event.tree
        if tree is not None:
            found["tree"] = {
                "tokens": [self._alone(token) for token in tree.tokens],
                "parents": list(tree.parents),
                "accepted": list(tree.accepted),
            }
        return found

    def _pieces(self, event: Committed) -> list[str]:
        if self._text is None:
            return [""] * len(event.token_ids)
        pieces = []
        for token in event.token_ids:
            self._text.add((token,))
            pieces.append(self._text.take())
        if event.finish_reason is not None and pieces:
            pieces[-1] += self._text.take(is_last=True)
        return pieces

    def _alone(self, token: int) -> str:
        if self._tokenizer is None:
            return ""
        return token_bytes(self._tokenizer, token).decode(errors="backslashreplace")
