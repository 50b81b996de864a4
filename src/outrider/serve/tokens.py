"""/tokenize and /detokenize, in vLLM's shape."""

from collections.abc import Sequence as Items
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends
from pydantic import ConfigDict, Field

from outrider.errors import RequestError
from outrider.serve.base import Body, Server, server, tenant
from outrider.serve.chat import prompt_of
from outrider.serve.schemas_chat import ChatBody, ChatMessage, ChatTool

STRICT = ConfigDict(extra="forbid", strict=True)
OF_CHAT = ("tools", "tool_choice", "chat_template_kwargs")
router = APIRouter(tags=["tokens"], dependencies=[Depends(tenant)])


class TokenizeBody(Body):
    """A text, or a conversation, which becomes the prompt that chat would make of it."""

    model_config = STRICT

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    tools: list[ChatTool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: Literal[True] = True
    add_special_tokens: bool | None = Field(None, description="true for a prompt, if unset")
    return_token_strs: bool = False


class DetokenizeBody(Body):
    """Token ids."""

    model_config = STRICT

    model: str | None = None
    tokens: list[int]


@router.post("/tokenize")
async def tokenize(body: TokenizeBody, server: Server = Depends(server)) -> dict[str, Any]:
    """Token ids of a text, or of a conversation up to where the answer begins."""
    server.check_model(body.model)
    ids = _ids(body, server)
    tokenizer = server.needed_tokenizer()
    strings = [tokenizer.token_text(i) for i in ids] if body.return_token_strs else None
    return {
        "count": len(ids),
        "max_model_len": server.llm.engine.max_model_len,
        "tokens": ids,
        "token_strs": strings,
    }


@router.post("/detokenize")
async def detokenize(body: DetokenizeBody, server: Server = Depends(server)) -> dict[str, str]:
    """The text of token ids, special tokens included."""
    server.check_model(body.model)
    vocab_size = server.llm.engine.spec.vocab_size
    wrong = next((i for i in body.tokens if not 0 <= i < vocab_size), None)
    if wrong is not None:
        raise RequestError(f"tokens={wrong}: ids lie in [0, {vocab_size - 1}]")
    return {"prompt": server.needed_tokenizer().decode(body.tokens, skip_special_tokens=False)}


def _ids(body: TokenizeBody, server: Server) -> Items[int]:
    if (body.prompt is None) == (body.messages is None):
        raise RequestError("prompt=: give either prompt or messages")
    given = {name: getattr(body, name) for name in OF_CHAT if getattr(body, name) is not None}
    if body.prompt is None:
        if body.add_special_tokens:
            raise RequestError("add_special_tokens=True: the chat template brings its own; drop it")
        return prompt_of(server, ChatBody(messages=body.messages or [], **given))
    for name in given:
        raise RequestError(f"{name}=...: goes with messages, not with prompt")
    return server.needed_tokenizer().encode(body.prompt, body.add_special_tokens is not False)
