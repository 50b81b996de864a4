"""What a response says of its cost and of how it was made: usage, metrics, exactness."""

from collections.abc import Sequence as Items
from dataclasses import replace
from itertools import zip_longest
from typing import Any

from outrider.draft.prediction import tokens_taken
from outrider.errors import RequestError
from outrider.request import SamplingParams, Speculation, SpeculationParams
from outrider.serve.base import Server
from outrider.serve.config import ServeConfig
from outrider.stream.events import RequestMetrics
from outrider.verify.base import Exactness
from outrider.verify.verifiers import verifier


def with_prediction_ids(server: Server, params: SpeculationParams) -> SpeculationParams:
    """A text that the answer will resemble, as token ids: what `resolve` and the engine take."""
    if params.prediction is None:
        return params
    ids = server.needed_tokenizer().encode(params.prediction, add_special_tokens=False)
    return replace(params, prediction=None, prediction_token_ids=tuple(ids))


def in_force(
    server: Server, params: SpeculationParams | None, sampling: SamplingParams
) -> Speculation:
    """Who drafts for a request and which rule decides, every default filled in.

    Args:
        params: None is the engine's default; a prediction must be token ids.

    Raises:
        RequestError, PairError: the engine cannot do it. RequestError: this server does not let
            requests ask for such a rule.
    """
    asked = server.llm.speculation if params is None else params
    found = server.llm.engine.resolve(asked, sampling)
    check_rule(server.config, found)
    return found


def check_rule(config: ServeConfig, speculation: Speculation) -> None:
    """RequestError where the rule does not keep to the model's law and the server insists on it."""
    kind = _rule(speculation).exactness
    is_allowed = {
        Exactness.LOSSY: config.allow_lossy,
        Exactness.SYNTHETIC: config.allow_synthetic,
    }
    if not is_allowed.get(kind, True):
        raise RequestError(
            f"verifier={speculation.verifier!r}: {kind} rules are not allowed on this server; use "
            f"verifier='sampled', or start it with --allow-{kind}"
        )


def exactness(
    speculation: Speculation, metrics: Items[RequestMetrics] | None = None
) -> dict[str, Any]:
    """`outrider.exactness` of a response; a rule that changes the law is named with its options.

    Args:
        metrics: of the completions, once they are complete: of a lossy rule they tell how many
            tokens stand only because of it.
    """
    rule = _rule(speculation)
    is_exact = rule.exactness in (Exactness.EXACT, Exactness.EXACT_GREEDY)
    options = {name: option.default for name, option in rule.options.items()}
    found = {
        "mode": str(rule.exactness),
        "method": None if is_exact else rule.name,
        "params": {} if is_exact else {**options, **dict(speculation.verifier_options)},
    }
    if metrics is not None and rule.exactness is Exactness.LOSSY:
        found["relaxed_tokens"] = sum(m.num_relaxed_tokens for m in metrics)
    return found


def usage(
    metrics: Items[RequestMetrics],
    *,
    prediction: Items[int] = (),
    answers: Items[Items[int]] = (),
) -> dict[str, Any]:
    """OpenAI's `usage` of the completions of one prompt.

    Args:
        prediction: the client's, as token ids. Each completion took some of these tokens and
            rejected the others, whoever drafted them and however often; rejected tokens are not
            among the completion tokens.
        answers: token ids of the completions, where there is a prediction.
    """
    num_prompt = metrics[0].num_prompt_tokens if metrics else 0
    num_completion = sum(m.num_generated_tokens for m in metrics)
    num_taken = sum(tokens_taken(prediction, answer) for answer in answers) if prediction else 0
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_completion,
        "total_tokens": num_prompt + num_completion,
        "prompt_tokens_details": {
            "cached_tokens": metrics[0].num_cached_tokens if metrics else 0,
            "audio_tokens": 0,
        },
        "completion_tokens_details": {
            "reasoning_tokens": 0,
            "audio_tokens": 0,
            "accepted_prediction_tokens": num_taken,
            "rejected_prediction_tokens": len(prediction) * len(metrics) - num_taken,
        },
    }


def usage_of_all(usages: Items[dict[str, Any]]) -> dict[str, Any]:
    """The sum over several prompts."""
    total = usages[0]
    for more in usages[1:]:
        total = {
            key: usage_of_all([value, more[key]]) if isinstance(value, dict) else value + more[key]
            for key, value in total.items()
        }
    return total


def metrics_of(metrics: Items[RequestMetrics], speculation: Speculation) -> dict[str, Any]:
    """`metrics` of a response: vLLM's names for what speculation did, summed over completions."""
    return {"speculative_decoding": speculative_decoding(metrics, speculation)}


def speculative_decoding(
    metrics: Items[RequestMetrics], speculation: Speculation
) -> dict[str, Any]:
    """Counts are of real proposals, also where K varies; `num_spec_tokens` is the most allowed.

    `policy` is who decided how far to draft in each step; None where nothing may be drafted.
    """
    num_drafts = sum(m.num_drafts for m in metrics)
    num_drafted = sum(m.num_draft_tokens for m in metrics)
    num_accepted = sum(m.num_accepted_tokens for m in metrics)
    columns = zip_longest(*(m.accepted_histogram for m in metrics), fillvalue=0)
    return {
        "mean_acceptance_length": 1.0 + num_accepted / num_drafts if num_drafts else 1.0,
        "draft_acceptance_rate": num_accepted / num_drafted if num_drafted else 0.0,
        "acceptance_histogram": [sum(column) for column in columns],
        "num_spec_steps": num_drafts,
        "num_accepted_draft_tokens": num_accepted,
        "num_draft_tokens": num_drafted,
        "num_spec_tokens": speculation.num_draft_tokens,
        "policy": speculation.policy if speculation.drafter else None,
    }


def timings(metrics: Items[RequestMetrics]) -> dict[str, int]:
    """llama.cpp's names for the same counts."""
    return {
        "draft_n": sum(m.num_draft_tokens for m in metrics),
        "draft_n_accepted": sum(m.num_accepted_tokens for m in metrics),
    }


def _rule(speculation: Speculation) -> Any:
    return verifier(speculation.verifier, speculation.verifier_options)
