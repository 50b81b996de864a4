"""ServerFacts: what a server tells of itself, and its speculation counters."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

from outrider.bench.target import Acceptance
from outrider.errors import ConfigError

OUTRIDER, VLLM, SGLANG, LLAMA_CPP = "outrider", "vllm", "sglang", "llama.cpp"
# How they sign their models.
OWNERS = {"outrider": OUTRIDER, "vllm": VLLM, "sglang": SGLANG, "llamacpp": LLAMA_CPP}
# Where each tells its version, and under which key.
VERSION_AT = {
    OUTRIDER: ("/version", "version"),
    VLLM: ("/version", "version"),
    SGLANG: ("/server_info", "version"),
    LLAMA_CPP: ("/props", "build_info"),
}
SAMPLE = re.compile(r"^(?P<name>[\w:]+)(?:\{(?P<labels>.*)\})?\s+(?P<value>\S+)", re.MULTILINE)
POSITION = re.compile(r'position="(\d+)"')
DRAFTS = "vllm:spec_decode_num_drafts"
DRAFT_TOKENS = "vllm:spec_decode_num_draft_tokens"
ACCEPTED = "vllm:spec_decode_num_accepted_tokens"
ACCEPTED_AT = "vllm:spec_decode_num_accepted_tokens_per_pos"
STEPS = "outrider_completion_steps"
GAUGES = "sglang:spec_"


@dataclass(frozen=True, kw_only=True)
class ServerFacts:
    """What a server says of itself.

    Attributes:
        kind: "outrider", "vllm", "sglang", "llama.cpp"; "" for any other.
        model: the name that requests carry. root: what was loaded under it, where told.
        gauges: of speculation, over windows of the server's own: nothing to compute with.
    """

    kind: str
    model: str
    root: str = ""
    version: str = ""
    max_model_len: int | None = None
    gauges: Mapping[str, float] = field(default_factory=dict)


async def look(http: httpx.AsyncClient, model: str | None) -> ServerFacts:
    """Asks who is there.

    Raises:
        ConfigError: nobody, or somebody who refuses the key or does not know the model.
    """
    cards = await _cards(http)
    card = _chosen(cards, model, str(http.base_url))
    owner = str(card.get("owned_by", "")).lower()
    kind = OWNERS.get(owner, "")
    told = card.get("max_model_len") or (card.get("meta") or {}).get("n_ctx_train")
    return ServerFacts(
        kind=kind,
        model=str(card["id"]),
        root=str(card.get("root") or ""),
        version=await _version(http, kind),
        max_model_len=int(told) if told else None,
        gauges=await _gauges(http) if kind == SGLANG else {},
    )


async def counters(http: httpx.AsyncClient) -> Acceptance | None:
    """From the server's Prometheus page; None where it tells nothing of drafts."""
    page = await _text(http, "/metrics")
    return None if page is None else read_counters(page)


def read_counters(page: str) -> Acceptance | None:
    """vLLM's names, which we have too; several engines behind one page are added up."""
    sums: dict[str, float] = {}
    beyond: dict[int, float] = {}
    for match in SAMPLE.finditer(page):
        name, value = match["name"].removesuffix("_total"), float(match["value"])
        sums[name] = sums.get(name, 0.0) + value
        position = POSITION.search(match["labels"] or "")
        if name == ACCEPTED_AT and position is not None:
            beyond[int(position[1])] = beyond.get(int(position[1]), 0.0) + value
    if DRAFTS not in sums:
        return None
    num_drafts = int(sums[DRAFTS])
    return Acceptance(
        num_steps=int(sums.get(STEPS, 0)),
        num_drafts=num_drafts,
        num_draft_tokens=int(sums.get(DRAFT_TOKENS, 0)),
        num_accepted_tokens=int(sums.get(ACCEPTED, 0)),
        histogram=_histogram(num_drafts, beyond),
    )


def _histogram(num_drafts: int, beyond: Mapping[int, float]) -> tuple[int, ...]:
    """Drafts by accepted tokens, from the drafts that stood beyond each position."""
    if not beyond:
        return ()
    at_least = [num_drafts, *(int(beyond.get(i, 0)) for i in range(max(beyond) + 1)), 0]
    return tuple(at_least[i] - at_least[i + 1] for i in range(len(at_least) - 1))


async def _cards(http: httpx.AsyncClient) -> list[dict[str, Any]] | None:
    """Of the models that are served; None where the server has no such list."""
    try:
        response = await http.get("/v1/models")
    except httpx.RequestError as error:
        raise ConfigError(
            f"no server answers at {http.base_url} ({type(error).__name__}: {error}): start it, or "
            "correct the URL"
        ) from error
    if response.status_code in (401, 403):
        raise ConfigError(
            f"{http.base_url} refuses the API key (status {response.status_code}): give the right "
            "one (OPENAI_API_KEY)"
        )
    try:
        listed = response.raise_for_status().json()["data"]
        return [card for card in listed if isinstance(card, dict) and card.get("id")]
    except (httpx.HTTPStatusError, ValueError, LookupError, TypeError):
        return None


def _chosen(cards: list[dict[str, Any]] | None, model: str | None, url: str) -> dict[str, Any]:
    if cards is None or not cards:
        if model is None:
            raise ConfigError(f"{url} does not list its models: name the one to ask for (MODEL)")
        return {"id": model}
    if model is None:
        return cards[0]
    found = next((card for card in cards if card["id"] == model), None)
    if found is None:
        names = ", ".join(repr(card["id"]) for card in cards)
        raise ConfigError(f"model {model!r} is not served at {url}: it has {names}")
    return found


async def _version(http: httpx.AsyncClient, kind: str) -> str:
    if kind not in VERSION_AT:
        return ""
    path, key = VERSION_AT[kind]
    try:
        return str((await http.get(path)).raise_for_status().json()[key])
    except (httpx.HTTPError, ValueError, LookupError, TypeError):
        return ""


async def _gauges(http: httpx.AsyncClient) -> dict[str, float]:
    page = await _text(http, "/metrics") or ""
    matches = SAMPLE.finditer(page)
    return {m["name"]: float(m["value"]) for m in matches if m["name"].startswith(GAUGES)}


async def _text(http: httpx.AsyncClient, path: str) -> str | None:
    """None for a page that is not there."""
    try:
        return (await http.get(path)).raise_for_status().text
    except httpx.HTTPError:
        return None
