"""RequestOutput: what a blocking call returns, gathered from events."""

from dataclasses import dataclass, field

from outrider.stream.events import Committed, RequestMetrics, TokenLogprob


@dataclass(kw_only=True)
class Completion:
    """One of the n answers to a prompt.

    Attributes:
        text: of `token_ids`, without the stop text.
        finish_reason: "stop", "length", "abort" or "error".
        error: why, when the finish reason is "error".
    """

    index: int = 0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    error: str = ""
    metrics: RequestMetrics = RequestMetrics()

    def take(self, event: Committed) -> None:
        self.text += event.text
        self.token_ids += event.token_ids
        self.logprobs += event.logprobs
        if event.finish_reason is not None:
            self.finish_reason = event.finish_reason
            self.stop_reason = event.stop_reason
            self.error = event.error
            self.metrics = event.metrics or RequestMetrics()


@dataclass(kw_only=True)
class RequestOutput:
    """All answers to one prompt; the attributes of the first are at hand directly.

    Attributes:
        time_to_first_token_s, latency_s: seconds from the call to the first token and the last.
    """

    request_id: str
    prompt_token_ids: list[int]
    completions: list[Completion]
    time_to_first_token_s: float | None = None
    latency_s: float | None = None

    @property
    def text(self) -> str:
        return self.completions[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.completions[0].token_ids

    @property
    def finish_reason(self) -> str | None:
        return self.completions[0].finish_reason

    @property
    def error(self) -> str:
        return self.completions[0].error

    @property
    def metrics(self) -> RequestMetrics:
        return self.completions[0].metrics

    def take(self, event: Committed) -> None:
        self.completions[event.index].take(event)
