"""Reader of multi-token-prediction modules, most of which ship inside their target's own files."""

import re
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

from outrider.errors import ConfigError, ModelError
from outrider.models.heads.detect import MTP_KEYS
from outrider.models.heads.given import Given, Shape, Shapes, adds_one_to_gain
from outrider.models.heads.pins import lay_down
from outrider.models.heads.spec import Conventions, Family, Head, HeadSpec, MTPShape, Widths
from outrider.models.weights import IGNORED_ENDINGS

LayerShapes = Mapping[str, Shape]

_LAYER = re.compile(r"(?:model\.|language_model\.)*layers\.(\d+)\.(.+)$")
_EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(gate|up|down)_proj\.weight$")
FUSED_EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
EXPERT_KEYS = ("num_experts", "n_routed_experts", "num_local_experts")


class Layout(NamedTuple):
    """How one lineage names and wires its modules.

    Attributes:
        module: pattern of a module's names; groups: its number, the rest.
        shared: pattern of names that all modules share; group: the rest.
        parts: the rest, by our name.
    """

    name: str
    module: re.Pattern[str]
    parts: Mapping[str, str]
    shared: re.Pattern[str] | None = None
    concatenation: Literal["embedding-first", "feature-first"] = "embedding-first"
    is_first_embedding_zero: bool = False


_PROJECTED = {
    "token_layernorm.weight": "embedding_norm.weight",
    "hidden_layernorm.weight": "feature_norm.weight",
    "input_proj.weight": "fc.weight",
    "final_layernorm.weight": "norm.weight",
}
QWEN = Layout(
    name="qwen",
    module=re.compile(r"mtp\.layers\.(\d+)\.(.+)$"),
    shared=re.compile(r"mtp\.(?!layers\.)(.+)$"),
    parts={
        "pre_fc_norm_embedding.weight": "embedding_norm.weight",
        "pre_fc_norm_hidden.weight": "feature_norm.weight",
        "fc.weight": "fc.weight",
        "norm.weight": "norm.weight",
    },
)
MIMO = Layout(
    name="mimo",
    module=re.compile(r"model\.mtp_layers\.(\d+)\.(.+)$"),
    parts=_PROJECTED,
    concatenation="feature-first",
    is_first_embedding_zero=True,
)
SPECULATORS = Layout(
    name="speculators", module=re.compile(r"mtp_layers\.(\d+)\.(.+)$"), parts=_PROJECTED
)
DEEPSEEK = Layout(
    name="deepseek",
    module=_LAYER,
    parts={
        "enorm.weight": "embedding_norm.weight",
        "hnorm.weight": "feature_norm.weight",
        "eh_proj.weight": "fc.weight",
        "embed_tokens.weight": "embed_tokens.weight",
        "shared_head.norm.weight": "norm.weight",
        "shared_head.head.weight": "lm_head.weight",
    },
    is_first_embedding_zero=True,
)
LAYOUTS = (QWEN, MIMO, SPECULATORS, DEEPSEEK)


class Modules(NamedTuple):
    """The MTP modules among the tensors of a checkpoint.

    Attributes:
        written: canonical name to name in the files.
        num_modules: how many.
        first: number of the first, in the files' counting.
    """

    layout: Layout
    written: dict[str, str]
    num_modules: int
    first: int


def find_modules(names: Iterable[str]) -> Modules:
    """The modules, by their names in the files. ModelError if their numbers have gaps."""
    names = [name for name in names if not name.endswith(IGNORED_ENDINGS)]
    layout = next(layout for layout in LAYOUTS if _numbers(layout, names))
    numbers = sorted(_numbers(layout, names))
    if numbers != list(range(numbers[0], numbers[0] + len(numbers))):
        raise ModelError(f"MTP modules are numbered {numbers}, with gaps: download them again")
    written: dict[str, str] = {}
    for name in names:
        for number, part in _parts(layout, name, numbers):
            written[f"modules.{number - numbers[0]}.{part}"] = name
    return Modules(layout, written, len(numbers), numbers[0])


def module_names(names: Iterable[str]) -> set[str]:
    """Those of MTP modules, of which a checkpoint may hold none."""
    names = list(names)
    if not any(_numbers(layout, names) for layout in LAYOUTS):
        return set()
    return set(find_modules(names).written.values())


def read_mtp(given: Given, modules: Modules, target_shapes: Mapping[str, Shape]) -> Head:
    """DeepSeek-V3 (2024, section 2.2), GLM, Qwen3-Next, MiMo, and speculators' modules.

    Args:
        target_shapes: of the target's tensors; a module's layer must be one of its layers.
    """
    _check_numbers(given, modules)
    hidden, vocab = given.target.hidden_size, given.target.vocab_size
    fc = "modules.0.fc.weight"
    given.agree_target("width", given.shape(fc)[0], hidden)
    layers = [_layer_of(given, index) for index in range(modules.num_modules)]
    template, number = _template(given, layers[0], target_shapes)
    required, optional = _shapes(given, modules, template, hidden, vocab)
    given.check(required, optional)
    has_head = "modules.0.lm_head.weight" in given.tensors
    has_embedding = "modules.0.embed_tokens.weight" in given.tensors
    layout = modules.layout
    assumed = {"feedback"} | ({"is_first_embedding_zero"} if layout is SPECULATORS else set())
    spec = HeadSpec(
        family=Family.MTP,
        widths=Widths(target_hidden=hidden, hidden=hidden, vocab=vocab, draft_vocab=vocab),
        conventions=Conventions(
            feedback="post-norm",
            concatenation=layout.concatenation,
            is_first_embedding_zero=layout.is_first_embedding_zero,
            norm_gain="one-plus-weight" if adds_one_to_gain(given.target.family) else "weight",
            rope_origin="target",
            lm_head="own" if has_head else "target",
            embedding="own" if has_embedding else "target",
        ),
        mtp=MTPShape(num_modules=modules.num_modules, layer=number),
        source=given.source,
        assumed=frozenset(assumed),
    )
    return Head(lay_down(given, spec), dict(given.tensors))


def _numbers(layout: Layout, names: list[str]) -> set[int]:
    found = {(int(m[1]), m[2]) for name in names if (m := layout.module.match(name))}
    if layout is DEEPSEEK:
        return {number for number, rest in found if rest == "eh_proj.weight"}
    return {number for number, _ in found}


def _parts(layout: Layout, name: str, numbers: list[int]) -> list[tuple[int, str]]:
    """The places of one tensor: module number and canonical name within the module."""
    match = layout.module.match(name)
    if match and int(match[1]) in numbers:
        rest = match[2]
        ours = None if layout.shared else layout.parts.get(rest)
        return [(int(match[1]), ours or f"layer.{rest}")]
    match = layout.shared.match(name) if layout.shared else None
    if match:
        return [(number, layout.parts.get(match[1], match[1])) for number in numbers]
    return []


def _check_numbers(given: Given, modules: Modules) -> None:
    for key in MTP_KEYS:
        said = given.count(key) if given.values.get(key) else None
        if said not in (None, modules.num_modules):
            raise ConfigError(
                f"config.json says {key}={said}, but the files hold {modules.num_modules} MTP "
                "modules: take all files of one checkpoint"
            )
    if modules.layout is DEEPSEEK:
        given.agree_target("its first MTP module at layer", modules.first, given.target.num_layers)


def _layer_of(given: Given, index: int) -> LayerShapes:
    start = f"modules.{index}.layer."
    return {
        name.removeprefix(start): tuple(tensor.shape)
        for name, tensor in given.tensors.items()
        if name.startswith(start)
    }


def _template(
    given: Given, layer: LayerShapes, target_shapes: Mapping[str, Shape]
) -> tuple[LayerShapes, int]:
    """The target's layer with most tensors in common, and its number; of equals the last."""
    layers: dict[int, Shapes] = {}
    for name, shape in target_shapes.items():
        match = None if name.endswith(IGNORED_ENDINGS) else _LAYER.match(name)
        if match and int(match[1]) < given.target.num_layers:
            layers.setdefault(int(match[1]), {})[match[2]] = shape
    if not layers:
        raise ModelError(
            f"the files of target {given.target.name!r} hold no layers to compare MTP modules with"
        )
    ours = _without_experts(layer).items()
    number = max(layers, key=lambda n: (len(ours & _without_experts(layers[n]).items()), n))
    return _with_experts_as(given, layers[number], layer), number


def _with_experts_as(given: Given, template: Shapes, layer: LayerShapes) -> LayerShapes:
    """The template with experts stored one by one where the module stores them so."""
    is_split = any(_EXPERT.match(name) for name in layer)
    if not is_split or any(_EXPERT.match(name) for name in template):
        return template
    counts = [template[name][0] for name in FUSED_EXPERTS if name in template]
    counts += [count for key in EXPERT_KEYS if (count := given.count(key))]
    inner, hidden = next(
        (shape for name, shape in layer.items() if (m := _EXPERT.match(name)) and m[2] == "gate"),
        (0, 0),
    )
    shapes = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    split: Shapes = {
        f"mlp.experts.{expert}.{name}_proj.weight": shape
        for expert in range(counts[0] if counts else 0)
        for name, shape in shapes.items()
    }
    return {**_without_experts(template), **split}


def _without_experts(layer: LayerShapes) -> dict[str, Shape]:
    return {
        name: shape
        for name, shape in layer.items()
        if not _EXPERT.match(name) and name not in FUSED_EXPERTS
    }


def _shapes(
    given: Given, modules: Modules, template: LayerShapes, hidden: int, vocab: int
) -> tuple[Shapes, Shapes]:
    """Required and optional tensors."""
    required: Shapes = {}
    optional: Shapes = {}
    for index in range(modules.num_modules):
        start = f"modules.{index}."
        required |= {f"{start}{name}.weight": (hidden,) for name in ("embedding_norm", "norm")}
        required |= {f"{start}feature_norm.weight": (hidden,)}
        required |= {f"{start}fc.weight": (hidden, 2 * hidden)}
        required |= {f"{start}layer.{name}": shape for name, shape in template.items()}
        if modules.layout is DEEPSEEK:
            names = ("embed_tokens", "lm_head")
            optional |= {f"{start}{name}.weight": (vocab, hidden) for name in names}
    return required, optional
