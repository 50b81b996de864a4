"""What tests of heads over the target's KV share: random heads, one that copies its target, a twin.

Shape legend: T committed tokens, n frozen positions, H hidden width, J query heads, G key/value
heads, D head width, V vocabulary.
"""

import json
import math
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from outrider.cache.pool import KVPool
from outrider.cache.table import BlockManager
from outrider.models.config import DecoderConfig
from outrider.models.decoder import Decoder
from outrider.models.heads.given import Given
from outrider.models.heads.kv_head import (
    KVHeadShape,
    KVHeadSpec,
    read_kv,
    tensor_shapes,
    write_config,
)
from outrider.models.heads.spec import Conventions, Family, Head, TargetSpec, Widths
from outrider.models.rope_scaling import inverse_frequencies
from outrider.models.runner import Piece, Runner
from outrider.models.weights import tensor_shapes as target_shapes
from outrider.ops.choose import choose
from outrider.step import EMPTY_TREE
from outrider.testing.tiny import TINY

BLOCK = 4
DRAFT_IDS = (0, 3, 30, 31, 32, 40, 41, 42, 60, 61, 77, 90, 120, 200, 254)
NAMES = ("input_layernorm", "post_attention_layernorm")
COPIED = (
    *NAMES,
    *(f"self_attn.{part}_proj" for part in "qkvo"),
    *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
)


def random_head(
    target: Decoder,
    seed: int = 0,
    *,
    kv_layers: tuple[int, ...] = (0, 1),
    sees_drafts: bool = True,
    hidden: int | None = None,
    ids: tuple[int, ...] = (),
    scale: float = 0.25,
    **conventions: str,
) -> Head:
    """A random head; `ids` gives it an LM head over these tokens."""
    config = target.config
    shape = KVHeadShape(
        kv_layers=kv_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        key_width=config.head_dim,
        value_width=config.head_dim,
        intermediate_size=24,
        norm_eps=1e-5,
        has_qk_norm=config.has_qk_norm,
        sees_drafts=sees_drafts,
    )
    widths = Widths(
        target_hidden=config.hidden_size,
        hidden=hidden or config.hidden_size,
        vocab=config.vocab_size,
        draft_vocab=len(ids) or config.vocab_size,
    )
    chosen = {
        "feedback": "post-norm",
        "lm_head": "own" if ids else "target",
        "vocabulary_map": "absolute" if ids else "none",
        **conventions,
    }
    spec = KVHeadSpec(
        family=Family.KV,
        widths=widths,
        conventions=Conventions(rope_origin="target", **chosen),
        kv=shape,
    )
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randn(size, generator=generator) * scale + (len(size) == 1)
        for name, size in tensor_shapes(shape, widths, has_lm_head=bool(ids)).items()
    }
    if ids:
        tensors["target_ids"] = torch.tensor(ids)
    return Head(spec, tensors)


def copied_pair(kernels: str = "auto", seed: int = 0) -> tuple[Decoder, Head]:
    """A target and a head of all its layers, which says what the target says.

    Embeddings of root mean square 1 pass the head's norm as they are, and its features count for
    nothing.
    """
    config = DecoderConfig.from_dict({**TINY, "tie_word_embeddings": False})
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.ones(size) if len(size) == 1 else torch.randn(size, generator=generator) * 0.25
        for name, size in target_shapes(config).items()
    }
    embedding = tensors["model.embed_tokens.weight"]
    embedding /= embedding.square().mean(-1, keepdim=True).sqrt()
    target = Decoder(config, dict(tensors), choose(kernels), name="copied", eos_token_ids=(3,))
    head = random_head(target)
    head = head._replace(
        spec=replace(
            head.spec, kv=replace(head.spec.kv, intermediate_size=TINY["intermediate_size"])
        )
    )
    width = config.hidden_size
    copies = {
        f"layers.{i}.{part}.weight": tensors[f"model.layers.{i}.{part}.weight"]
        for i in range(2)
        for part in COPIED
    }
    copies |= {"fc.weight": torch.cat((torch.eye(width), torch.zeros(width, width)), dim=1)}
    copies |= {name: torch.ones(width) for name in ("embedding_norm.weight", "feature_norm.weight")}
    copies["norm.weight"] = tensors["model.norm.weight"]
    return target, Head(head.spec, copies)


def target_spec(target: Decoder) -> TargetSpec:
    spec = target.spec
    return TargetSpec(
        name="tiny",
        family=spec.family,
        hidden_size=spec.hidden_size,
        vocab_size=spec.vocab_size,
        num_layers=spec.num_layers,
    )


def given(head: Head, target: Decoder, *, pins: dict | None = None, **changed: object) -> Given:
    """As a folder with this head would be found; `changed` are other values of the config."""
    config = {**write_config(head.spec), **changed}
    return Given(
        source="kv",
        config={key: value for key, value in config.items() if value is not ...},
        tensors=dict(head.tensors),
        written={},
        target=target_spec(target),
        pinned=pins or {},
    )


def read(head: Head, target: Decoder, **changed: object) -> Head:
    return read_kv(given(head, target, **changed))


def write(folder: Path, head: Head) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(write_config(head.spec)))
    tensors = {name: tensor.contiguous() for name, tensor in head.tensors.items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


class Prefilled:
    """A target after one pass over tokens; its KV by layer, and its states before the norm."""

    def __init__(self, target: Decoder, tokens: list[int], num_blocks: int = 64) -> None:
        spec = target.spec
        self.tokens = list(tokens)
        self.pool = KVPool(spec.kv_shapes, num_blocks, BLOCK, spec.dtype, spec.device)
        self.manager = BlockManager(num_blocks, BLOCK)
        self.runner = Runner(target, self.pool)
        self.table, _ = self.manager.open(self.tokens)
        self.manager.reserve(self.table, len(tokens) + 24)
        piece = Piece(self.table, 0, self.tokens, EMPTY_TREE, True)
        output = self.runner.run([piece], (spec.num_layers,))
        self.last_logits_V = output.logits_NV[-1]
        self.states_TH = output.states.tapped_AND[0].clone()

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        slots = torch.tensor(self.table.slots(0, len(self.tokens)))
        kv = self.pool.layers[index]
        return kv.keys[slots].clone(), kv.values[slots].clone()


class Twin:
    """The head from its definition: one path at a time, every product spelled out.

    Args:
        context: the target after the frozen tokens.
    """

    def __init__(self, head: Head, target: Decoder, context: Prefilled) -> None:
        self.spec, self.t = head
        self.target = target
        self.frozen = [context.layer(j) for j in self.spec.kv.kv_layers]
        self.num_keys = len(context.tokens)
        self.state_H = context.states_TH[-1]

    def path(self, tokens: list[int]) -> list[Tensor]:
        """logits_V after each token of a path that begins with the root."""
        chosen = self.spec.conventions
        fed = self.state_H
        if chosen.input_state == "normed":
            fed = self.target.final_norm(fed[None])[0]
        own: list[list[tuple[Tensor, Tensor]]] = [[] for _ in self.frozen]
        logits = []
        for depth, token in enumerate(tokens):
            embedded = self.target.embed(torch.tensor([token]))[0]
            both = [self.norm(embedded, "embedding_norm"), self.norm(fed, "feature_norm")]
            if chosen.concatenation == "feature-first":
                both.reverse()
            x = self.t["fc.weight"] @ torch.cat(both)
            for i in range(len(self.frozen)):
                x = self.layer(x, i, self.num_keys + depth, own[i])
            normed = self.norm(x, "norm")
            state = self.out(normed)
            fed = state if chosen.feedback == "post-norm" else self.out(x)
            logits.append(self.logits(state))
        return logits

    def layer(self, x: Tensor, i: int, position: int, own: list[tuple[Tensor, Tensor]]) -> Tensor:
        kv, config = self.spec.kv, self.target.config
        start = f"layers.{i}."
        n = self.norm(x, f"{start}input_layernorm")
        has_rope = config.layers[kv.kv_layers[i]].has_rope
        q = self.heads(n, start, "q", position if has_rope else None)
        if kv.sees_drafts:
            v = (self.t[f"{start}self_attn.v_proj.weight"] @ n).view(-1, kv.value_width)
            own.append((self.heads(n, start, "k", position if has_rope else None), v))
        keys, values = self.frozen[i]
        window = config.layers[kv.kv_layers[i]].window.sliding
        first = 0
        if window:
            stands = position if kv.sees_drafts else self.num_keys - 1
            first = max(0, stands - window + 1)
        keys = torch.stack([*keys[first:], *(k for k, _ in own)])
        values = torch.stack([*values[first:], *(v for _, v in own)])
        share = kv.num_heads // kv.num_kv_heads
        out = []
        for head in range(kv.num_heads):
            scores = keys[:, head // share] @ q[head] / math.sqrt(kv.key_width)
            out.append(scores.softmax(0) @ values[:, head // share])
        x = x + self.t[f"{start}self_attn.o_proj.weight"] @ torch.cat(out)
        n = self.norm(x, f"{start}post_attention_layernorm")
        gate = self.t[f"{start}mlp.gate_proj.weight"] @ n
        up = self.t[f"{start}mlp.up_proj.weight"] @ n
        return x + self.t[f"{start}mlp.down_proj.weight"] @ (gate / (1 + torch.exp(-gate)) * up)

    def heads(self, n: Tensor, start: str, part: str, position: int | None) -> Tensor:
        kv = self.spec.kv
        heads = (self.t[f"{start}self_attn.{part}_proj.weight"] @ n).view(-1, kv.key_width)
        if kv.has_qk_norm:
            heads = self.norm(heads, f"{start}self_attn.{part}_norm")
        if position is None:
            return heads
        angles = position * inverse_frequencies(self.target.config.rope)
        half = len(angles)
        first, second, rest = heads[:, :half], heads[:, half : 2 * half], heads[:, 2 * half :]
        turned = first * angles.cos() - second * angles.sin()
        return torch.cat((turned, second * angles.cos() + first * angles.sin(), rest), dim=-1)

    def norm(self, x: Tensor, name: str) -> Tensor:
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.spec.kv.norm_eps)
        return x * scale * self.t[f"{name}.weight"]

    def out(self, x: Tensor) -> Tensor:
        return self.t["output.weight"] @ x if "output.weight" in self.t else x

    def logits(self, state: Tensor) -> Tensor:
        if "lm_head.weight" not in self.t:
            return self.target.head(state[None])[0]
        logits_V = torch.full((self.spec.widths.vocab,), float("-inf"))
        logits_V[self.t["target_ids"]] = self.t["lm_head.weight"] @ state
        return logits_V
