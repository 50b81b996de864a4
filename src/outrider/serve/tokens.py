"""/tokenize and /detokenize, in vLLM's shape."""

from typing import Any, Literal

from fastapi import APIRouter, Depends
from pydantic import Field

from outrider.errors import RequestError
from outrider.serve.base import Body, Server, server, tenant

router = APIRouter(tags=["tokens"], dependencies=[Depends(tenant)])


class TokenizeBody(Body):
    """A text, or a conversation that the chat template turns into one."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: Literal[True] = True
    add_special_tokens: bool | None = Field(None, description="true for a prompt, if unset")
    return_token_strs: bool = False


class DetokenizeBody(Body):
    """Token ids."""

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


def _ids(body: TokenizeBody, server: Server) -> list[int]:
    if (body.prompt is None) == (body.messages is None):
        raise RequestError("prompt=: give either prompt or messages")
    tokenizer = server.needed_tokenizer()
    if body.prompt is not None:
        for name in ("tools", "chat_template_kwargs"):
            if getattr(body, name) is not None:
                raise RequestError(f"{name}=...: goes with messages, not with prompt")
        return tokenizer.encode(body.prompt, body.add_special_tokens is not False)
    if body.add_special_tokens:
        raise RequestError("add_special_tokens=True: the chat template brings its own; drop it")
    tools = {} if body.tools is None else {"tools": body.tools}
    return tokenizer.apply_chat_template(
        body.messages or [], {**tools, **(body.chat_template_kwargs or {})}
    )
