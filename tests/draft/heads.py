"""A tiny target, and small heads that are often right about it: one of each kind.

Bodies are random; the LM head is fitted by least squares to what the target says of its own text.
So drafts lean on the keys and values of a head, and are both taken and refused.

Shape legend: T positions, A boundaries, R rows, H hidden width, V vocabulary.
"""

from collections.abc import Callable, Sequence as Items
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from outrider.cache.pool import KVPool
from outrider.cache.table import BlockManager, BlockTable
from outrider.draft.block import BlockDrafter
from outrider.draft.eagle import EagleDrafter
from outrider.draft.kv_draft import KVDrafter
from outrider.draft.medusa import MedusaDrafter
from outrider.draft.mtp import MTPDrafter
from outrider.models.config import DecoderConfig
from outrider.models.decoder import Decoder
from outrider.models.heads.block_network import BlockNetwork
from outrider.models.heads.eagle_network import EagleNetwork
from outrider.models.heads.kv_network import KVNetwork, KVRunner
from outrider.models.heads.mtp_network import MTPNetwork
from outrider.models.heads.network import HeadPiece, HeadRunner, RowNetwork
from outrider.models.heads.spec import (
    Conventions,
    DecoderShape,
    Family,
    Head,
    HeadSpec,
    MarkovShape,
    MTPShape,
    Widths,
)
from outrider.models.rope_scaling import RopeConfig
from outrider.models.weights import tensor_shapes
from outrider.ops.base import Span
from outrider.ops.choose import choose
from outrider.request import SamplingParams
from outrider.step import EMPTY_TREE, DraftTree
from outrider.testing import run, tiny_engine
from outrider.testing.tiny import EOS, TINY
from tests.draft.draft_models import OFF, request
from tests.draft.test_medusa import fitted_head
from tests.models.heads.kv_heads import Prefilled, random_head
from tests.models.heads.layouts import Random

H, V, L = 32, 256, 2
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, INNER = 4, 2, 8, 48
BLOCK, RANK, MASK = 6, 5, 2
LOUD = (30, 48, 66, 84, 102)
NUM_TEXTS, NUM_TOKENS = 12, 60
Pairs: TypeAlias = list[tuple[Tensor, Tensor]]
Fitting: TypeAlias = Callable[[Head, Decoder], Pairs]


class Kind(NamedTuple):
    """One kind of head.

    Attributes:
        drafter: who runs it; engines hand it the head under its name.
        make: a head for a decoder of H, V and L, which is often right about it.
    """

    drafter: Any
    make: Callable[[Decoder], Head]


class Text(NamedTuple):
    """What the target said, and what it was like inside.

    Attributes:
        tapped_ATH: at all boundaries.
    """

    tokens: list[int]
    logits_TV: Tensor
    tapped_ATH: Tensor


@cache
def loud_target() -> Decoder:
    """Of H, V and L; it says a few tokens more often than others, so that heads can follow it."""
    values = {**TINY, "tie_word_embeddings": False, "max_position_embeddings": 1024}
    config = DecoderConfig.from_dict(values)
    generator = torch.Generator().manual_seed(4)
    tensors = {
        name: torch.ones(shape)
        if len(shape) == 1
        else torch.randn(shape, generator=generator) * 0.25
        for name, shape in tensor_shapes(config).items()
    }
    tensors["model.embed_tokens.weight"] *= 4.0
    is_quiet_V = torch.ones(V, dtype=torch.bool)
    is_quiet_V[list(LOUD)] = False
    tensors["lm_head.weight"][is_quiet_V] *= 0.3
    made = Decoder(config, tensors, choose(), name="loud", eos_token_ids=(EOS,))
    made.spec = replace(made.spec, fingerprint="loud")  # as one loaded from files has
    return made


@cache
def head(kind: str) -> Head:
    """That of a kind, for `loud_target`."""
    return KINDS[kind].make(loud_target())


def eagle1(target: Decoder) -> Head:
    random = Random(1)
    tensors = {"fc.weight": random(H, 2 * H) * 0.6, **_layer(random, reads=H)}
    del tensors["layers.0.input_layernorm.weight"]
    return _fitted(_spec(Family.EAGLE), tensors, target, _rows_of(EagleNetwork))


def eagle3(target: Decoder, **more: Any) -> Head:
    random = Random(2)
    tensors = {
        "fc.weight": random(H, 3 * H) * 0.5,
        "layers.0.hidden_norm.weight": random.gain(H),
        "norm.weight": random.gain(H),
        **_layer(random, reads=2 * H),
    }
    spec = _spec(Family.EAGLE3, num_features=3, feature_layers=(1, 0, L))
    if more:
        spec = replace(spec, **more)
        tensors["mask_feature"] = random(3 * H)
    return _fitted(spec, tensors, target, _rows_of(EagleNetwork))


def peagle(target: Decoder) -> Head:
    return eagle3(target, family=Family.PEAGLE, mask_token_id=MASK)


def mtp(target: Decoder, num_modules: int = 1) -> Head:
    random, tensors = Random(3), {}
    for number in range(num_modules):
        start = f"modules.{number}."
        for name in ("embedding_norm", "feature_norm", "norm"):
            tensors[f"{start}{name}.weight"] = random.gain(H)
        tensors[f"{start}fc.weight"] = random(H, 2 * H)
        for name, tensor in _layer(random, reads=H, inner=64).items():
            tensors[f"{start}layer.{name.removeprefix('layers.0.')}"] = tensor
    spec = _spec(
        Family.MTP,
        feedback="post-norm",
        rope_origin="target",
        mtp=MTPShape(num_modules=num_modules, layer=1),
    )

    rows = _rows_of(lambda head, target: MTPNetwork(head, target, target.ops))
    return _fitted(spec, tensors, target, rows, [f"modules.{n}." for n in range(num_modules)])


def dflash(target: Decoder, **more: Any) -> Head:
    random = Random(6)
    tensors = {
        "fc.weight": random(H, 2 * H),
        "hidden_norm.weight": random.gain(H),
        "norm.weight": random.gain(H),
        **_layer(random, reads=H),
        **_layer(random, reads=H, index=1),
    }
    spec = _spec(
        Family.BLOCK,
        num_layers=2,
        num_features=2,
        feature_layers=(L, 1),
        block_masks=("bidirectional", "causal"),
        mask_token_id=MASK,
        block_size=BLOCK,
    )
    head = _fitted(spec, tensors, target, _slots)
    if more:
        head.tensors["markov.w1"] = random(V, RANK)
        head.tensors["markov.w2"] = random(V, RANK) * 0.5
        head.tensors["markov.joint.weight"] = random(3 * RANK, 2 * RANK + H)
        head.tensors["confidence.weight"] = random(1, H) * 0.3
        head.tensors["confidence.bias"] = torch.zeros(1)
    return head._replace(spec=replace(spec, **more))


def dspark(target: Decoder) -> Head:
    return dflash(target, markov=MarkovShape(kind="rnn", rank=RANK, confidence="state"))


def kv_draft(target: Decoder) -> Head:
    head = random_head(target, 5, ids=tuple(range(V)))
    shown = head._replace(tensors={**head.tensors, "lm_head.weight": torch.eye(V, H)})
    return head._replace(tensors=_with_lm_heads(head.tensors, _roots(shown, target)))


KINDS = {
    "medusa": Kind(MedusaDrafter, fitted_head),
    "eagle1": Kind(EagleDrafter, eagle1),
    "eagle3": Kind(EagleDrafter, eagle3),
    "peagle": Kind(EagleDrafter, peagle),
    "mtp": Kind(MTPDrafter, mtp),
    "mtp of two": Kind(MTPDrafter, lambda target: mtp(target, 2)),
    "dflash": Kind(BlockDrafter, dflash),
    "dspark": Kind(BlockDrafter, dspark),
    "kv_draft": Kind(KVDrafter, kv_draft),
}


def _spec(
    family: Family,
    *,
    num_features: int = 0,
    num_layers: int = 1,
    mtp: MTPShape | None = None,
    mask_token_id: int | None = None,
    block_size: int | None = None,
    **conventions: Any,
) -> HeadSpec:
    rope = RopeConfig(
        kind="default", theta=700.0, width=8, max_positions=1024, original_max_positions=1024
    )
    decoder = DecoderShape(
        family="llama",
        num_layers=num_layers,
        num_heads=NUM_HEADS,
        num_kv_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
        intermediate_size=INNER,
        has_qkv_bias=False,
        has_output_bias=False,
        has_qk_norm=False,
        norm_eps=1e-5,
        rope=rope,
        windows=(0,) * num_layers,
    )
    return HeadSpec(
        family=family,
        widths=Widths(target_hidden=H, hidden=H, vocab=V, draft_vocab=V, num_features=num_features),
        conventions=Conventions(lm_head="own", **conventions),
        decoder=decoder,
        mtp=mtp,
        mask_token_id=mask_token_id,
        block_size=block_size,
    )


def _layer(random: Random, *, reads: int, index: int = 0, inner: int = INNER) -> dict[str, Tensor]:
    query, key = NUM_HEADS * HEAD_DIM, NUM_KV_HEADS * HEAD_DIM
    shapes = {
        "self_attn.q_proj": (query, reads),
        "self_attn.k_proj": (key, reads),
        "self_attn.v_proj": (key, reads),
        "self_attn.o_proj": (H, query),
        "mlp.gate_proj": (inner, H),
        "mlp.up_proj": (inner, H),
        "mlp.down_proj": (H, inner),
    }
    start = f"layers.{index}."
    tensors = {f"{start}{name}.weight": random(*shape) * 0.7 for name, shape in shapes.items()}
    for name in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"{start}{name}.weight"] = random.gain(H)
    return tensors


def _fitted(
    spec: HeadSpec,
    tensors: dict[str, Tensor],
    target: Decoder,
    told: Fitting,
    starts: Items[str] = ("",),
) -> Head:
    """With LM heads that say what the target says, as far as states tell.

    Args:
        told: states_RH, as an LM head of ones in its diagonal hands them out, and the target's
            logits_RV after the same text; of some texts.
        starts: of the LM heads' names.
    """
    names = [f"{start}lm_head.weight" for start in starts]
    shown = Head(spec, {**tensors, **dict.fromkeys(names, torch.eye(V, H))})
    return Head(spec, _with_lm_heads(tensors, told(shown, target), names))


def _with_lm_heads(
    tensors: dict[str, Tensor], pairs: Pairs, names: Items[str] = ("lm_head.weight",)
) -> dict[str, Tensor]:
    x_RH = torch.cat([states[:, :H] for states, _ in pairs]).double()
    y_RV = torch.cat([logits for _, logits in pairs]).double()
    ridge_HH = x_RH.T @ x_RH + 1e-3 * torch.eye(H, dtype=torch.float64)
    lm_head = torch.linalg.solve(ridge_HH, x_RH.T @ y_RV).T.float().contiguous()
    return {**tensors, **dict.fromkeys(names, lm_head)}


def _rows_of(make: Callable[[Head, Decoder], RowNetwork]) -> Fitting:
    """One pass over each text; row t speaks of the token at t + 2."""

    def told(head: Head, target: Decoder) -> Pairs:
        network = make(head, target)
        found = []
        for tokens, logits_TV, tapped_ATH in texts(target):
            runner, table = _room(network, len(tokens))
            inputs_RD = network.read(tapped_ATH[list(network.boundaries), :-1])
            nodes = DraftTree.chain(tokens[2:], "")  # nodes have logits, rows of a chain have not
            piece = HeadPiece(table, 0, tokens[1:2], nodes, inputs_RD, True)
            output, _ = runner.run([piece])
            found.append((output.logits_NV, logits_TV[1:]))
        return found

    return told


def _slots(head: Head, target: Decoder) -> Pairs:
    """A block behind every few tokens of each text."""
    network = BlockNetwork(head, target, target.ops)
    found = []
    for tokens, logits_TV, tapped_ATH in texts(target):
        runner, table = _room(network, len(tokens))
        inputs_RD = network.read(tapped_ATH[list(network.boundaries), :-1])
        runner.run([HeadPiece(table, 0, tokens[1:], EMPTY_TREE, inputs_RD, False)])
        ends = range(6, len(tokens) - BLOCK)
        drafts = network.draft(
            [tokens[end] for end in ends],
            [table for _ in ends],
            list(ends),
            network.num_drafts,
            runner.pool.layers,
        )
        rows = [end + depth for end in ends for depth in range(network.num_drafts)]
        found.append((drafts.logits_RU, logits_TV[rows]))
    return found


def _roots(head: Head, target: Decoder) -> Pairs:
    """The root alone behind every few tokens of each text, the longest prefix first.

    For its own keys and values stand where the target's were.
    """
    network = KVNetwork(head, target)
    found = []
    for tokens, logits_TV, tapped_ATH in texts(target):
        prefilled = Prefilled(target, tokens)
        runner = KVRunner(network, prefilled.pool)
        for end in range(len(tokens) - 1, 2, -3):
            fed_1H = network.read(tapped_ATH[L, end - 1 : end])
            piece = HeadPiece(prefilled.table, end, tokens[end : end + 1], EMPTY_TREE, fed_1H, True)
            output, _ = runner.run([piece], [end])
            found.append((output.logits_NV, logits_TV[end : end + 1]))
    return found


def _room(network: RowNetwork, num_rows: int) -> tuple[HeadRunner, BlockTable]:
    spec = network.spec
    pool = KVPool(spec.kv_shapes, num_rows, 1, spec.dtype, spec.device)
    manager = BlockManager(num_rows, 1)
    table, _ = manager.open([1])
    assert manager.reserve(table, num_rows)
    return HeadRunner(network, pool), table


@cache
def texts(target: Decoder) -> tuple[Text, ...]:
    """What the target says when it always takes the likeliest token."""
    sampling = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)
    asked = [request(f"{i}", OFF, sampling, seed=i) for i in range(NUM_TEXTS)]
    told = run(tiny_engine(target=target, draft_seed=None), asked)
    logs = [[*each.prompt_token_ids, *told[each.id, 0]] for each in asked]
    return tuple(Text(log, *_passed(target, log)) for log in logs)


@torch.inference_mode()
def _passed(target: Decoder, tokens: list[int]) -> tuple[Tensor, Tensor]:
    spec, count = target.spec, len(tokens)
    pool = KVPool(spec.kv_shapes, count, 1, spec.dtype, spec.device)
    layout = target.ops.layout([Span(range(count), 0, count)], spec.device)
    passed = target.forward_tapped(
        torch.tensor(tokens), layout, pool.layers, torch.arange(count), range(L + 1)
    )
    return passed.logits_RV, passed.tapped_AND
