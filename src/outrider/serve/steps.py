"""Steps: what each commit was made of, for clients that ask to see it (`outrider.step`)."""

from collections.abc import Sequence as Items
from typing import Any

from outrider.stream.detokenize import Decoder, Detokenizer
from outrider.stream.events import Committed

NUM_CONTEXT_TOKENS = 6


class Steps:
    """Of one completion: turns each commit into the member `step` of its chunk or event.

    `{"tokens": [...], "accepted": 2, "num_drafted": 4, "source": "draft_model"}`: the text of
    each token, how many of them (the first ones) were drafted, nodes drafted in the step, and who
    drafted. A token that ends inside a character has the text "". Joined, the texts are the text
    of the stream, save that what may begin a stop text is here at once.

    With a tree in the event there is also `"tree": {"tokens", "parents", "accepted"}`: the text of
    each node alone, its parent (-1 the root), and the nodes of the accepted path.

    Args:
        tokenizer: None tells counts without texts.
        prompt: token ids, whose end decides how the first token reads.
    """

    def __init__(self, tokenizer: Decoder | None, prompt: Items[int]) -> None:
        self._tokenizer = tokenizer
        context = tuple(prompt[-NUM_CONTEXT_TOKENS:])
        self._text = Detokenizer(tokenizer, context=context) if tokenizer else None

    def detail(self, event: Committed) -> dict[str, Any]:
        """The step of this event; call it for every event of the completion, in order."""
        found: dict[str, Any] = {
            "tokens": self._pieces(event),
            "accepted": event.num_from_draft,
            "num_drafted": event.num_drafted,
            "source": event.source,
        }
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
        return self._tokenizer.decode([token]) if self._tokenizer else ""
