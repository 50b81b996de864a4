"""Options that several commands share, and how their texts become settings."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer

from outrider.control.policies import DEFAULT
from outrider.engine.llm import LLM
from outrider.errors import ConfigError, RequestError, unknown
from outrider.ops.choose import KERNELS
from outrider.quant.schemes import SCHEMES
from outrider.registry import POLICIES
from outrider.request import SpeculationParams

Model: TypeAlias = Annotated[
    str, typer.Argument(help='Hub id, folder, or "demo" (the shipped pair).', metavar="MODEL")
]
DraftModel: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--draft-model",
        help="Smaller model, best of the same vocabulary, or a draft head of the model (EAGLE, "
        'Medusa, ...; "native" for modules in its own files); "off" declines the demo\'s own.',
    ),
]
SpeculationJSON: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--speculation",
        help='"off", a method\'s name, or JSON such as '
        '\'{"method": "ngram", "num_speculative_tokens": 5}\'.',
    ),
]
Policy: TypeAlias = Annotated[
    str,
    typer.Option(
        help="Who decides how far to draft where nothing says so: adaptive (as far as pays), "
        "fixed, off, table, or a plug-in's name."
    ),
]
MaxTokens: TypeAlias = Annotated[int, typer.Option(help="Most tokens to generate.")]
Temperature: TypeAlias = Annotated[float, typer.Option(help="0 is greedy.")]
TopK: TypeAlias = Annotated[int, typer.Option(help="Keep the k likeliest tokens; 0 keeps all.")]
TopP: TypeAlias = Annotated[float, typer.Option(help="Keep the smallest set with this mass.")]
MinP: TypeAlias = Annotated[
    float, typer.Option(help="Drop tokens below this share of the likeliest.")
]
Seed: TypeAlias = Annotated[int | None, typer.Option(help="Same seed, same tokens.")]
Dtype: TypeAlias = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Device: TypeAlias = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")]
Kernels: TypeAlias = Annotated[
    str, typer.Option(help=f"{', '.join(KERNELS)}; auto is cpu (C++) where it serves.")
]
Quantization: TypeAlias = Annotated[
    str | None,
    typer.Option(help=f"Weights of products, quantised at loading: {', '.join(SCHEMES)}."),
]
DraftQuantization: TypeAlias = Annotated[
    str | None, typer.Option(help="The same for the draft model; as the target if unset.")
]
Datastore: TypeAlias = Annotated[
    str | None,
    typer.Option(help='Folder written by `outrider index build`, for method "rest".'),
]
DrafterSettings: TypeAlias = Annotated[
    str | None,
    typer.Option(
        help='What drafters are made with, as JSON: \'{"suffix": {"max_shared_tokens": 200000}}\'.',
    ),
]
MaxModelLen: TypeAlias = Annotated[
    int | None, typer.Option(help="Longest prompt and answer, in tokens; the model's own if unset.")
]
KVCacheMemoryBytes: TypeAlias = Annotated[
    int | None,
    typer.Option(help="Bytes of KV for the target, and again for the draft model."),
]


def read_speculation(text: str | None) -> SpeculationParams:
    """From "off", a method's name, or a JSON object; None leaves it to the engine."""
    if text is None:
        return SpeculationParams()
    if not text.lstrip().startswith("{"):
        return SpeculationParams(method=text.strip())
    example = '{"method": "draft_model", "num_speculative_tokens": 4}'
    return SpeculationParams.from_dict(_read_object("--speculation", text, example))


def check_policy(name: str) -> None:
    """ConfigError where there is no such policy, before a model is loaded."""
    if name not in POLICIES.names():
        raise ConfigError(unknown("policy", name, POLICIES.names()))


def read_drafter_settings(text: str | None) -> dict[str, Any]:
    """By drafter, from a JSON object."""
    example = '{"suffix": {"max_shared_tokens": 200000}}'
    return {} if text is None else _read_object("--drafter-settings", text, example)


def read_sampling(text: str | None, named: Collection[str]) -> dict[str, Any]:
    """Sampling parameters from a JSON object; those in `named` have options of their own."""
    if text is None:
        return {}
    values = _read_object("--sampling", text, '{"repetition_penalty": 1.2}')
    for key in values:
        if key in named:
            raise RequestError(f"--sampling: {key} has an option of its own: --{_dashed(key)}")
    if isinstance(values.get("logit_bias"), dict):  # JSON has no integer keys
        values["logit_bias"] = {int(k): v for k, v in values["logit_bias"].items()}
    return values


def _dashed(key: str) -> str:
    return key.replace("_", "-")


def _read_object(option: str, text: str, example: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise RequestError(
            f"{option} {text!r} is no JSON ({error.msg} at {error.pos}): write it like {example}"
        ) from None
    if not isinstance(values, dict):
        raise RequestError(f"{option} {text!r} is no JSON object: write it like {example}")
    return values


def read_stop(stop: list[str] | None) -> tuple[str, ...]:
    return tuple(stop or ())


def load(
    model: str,
    draft_model: str | None,
    speculation: SpeculationParams,
    dtype: str,
    device: str,
    kernels: str,
    quantization: str | None,
    draft_quantization: str | None,
    datastore: str | None = None,
    drafter_settings: str | None = None,
    policy: str = DEFAULT,
    **engine: int | None,
) -> LLM:
    """The engine; a draft model named inside --speculation is loaded too, as vLLM's key does.

    Args:
        engine: fields of `EngineConfig`; None leaves the default.
    """
    check_policy(policy)
    if speculation.model is not None and draft_model is None:
        draft_model = speculation.model
    given: dict[str, Any] = {name: value for name, value in engine.items() if value is not None}
    return LLM(
        model,
        draft_model=draft_model,
        speculation=speculation,
        dtype=dtype,
        device=device,
        kernels=kernels,
        quantization=quantization,
        draft_quantization=draft_quantization,
        datastore=datastore,
        drafter_settings=read_drafter_settings(drafter_settings),
        policy=policy,
        **given,
    )


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """From --prompt, --file, or standard input (`-`)."""
    if prompt is not None and file is not None:
        raise RequestError("--prompt and --file exclude each other: give one")
    if file is not None and str(file) != "-":
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RequestError(f"--file {str(file)!r} cannot be read: {error}") from None
    if prompt is not None and prompt != "-":
        return prompt
    if file is None and prompt is None and typer.get_text_stream("stdin").isatty():
        raise RequestError("no prompt: give --prompt TEXT, --file PATH, or text on standard input")
    try:
        return typer.get_text_stream("stdin").read()
    except UnicodeDecodeError as error:
        raise RequestError(f"standard input is not UTF-8 text: {error}") from None
