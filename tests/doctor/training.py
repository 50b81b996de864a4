"""A tiny target, and heads trained on it for a moment: enough that their conventions matter.

Forwards are written from the formulas, over whole batches, with every step's rows seeing what a
drafted row sees; they are plain torch, so that they can be trained.

Shape legend: B texts, T tokens, N = T - 1 rows, S slots of a block, K depths, H width,
V vocabulary, J heads, W width of a head, M keys.
"""

import json
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from outrider.doctor.evidence import look
from outrider.doctor.texts import Text
from outrider.engine.llm import LLM
from outrider.models.heads.spec import Conventions
from outrider.request import SamplingParams
from tests.models.heads.layouts import Random, write
from tests.models.tiny import write_tiny

H, V, L, INNER = 32, 32, 6, 48
HEADS, KV_HEADS, WIDTH, THETA = 4, 2, 8, 100.0
BLOCK, MASK, DEPTHS = 6, V - 1, 3
BOUNDARIES = (1, 3, 5)
IDS = tuple(token for token in range(V) if token % 8 != 5)
DECODER: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": H,
    "intermediate_size": INNER,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": WIDTH,
    "vocab_size": V,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
    "rope_theta": THETA,
    "hidden_act": "silu",
}
NUM_TEXTS, NUM_TOKENS, NUM_STEPS = 160, 24, 130
BATCH, RATE, MARGIN = 12, 8e-3, 1.0
LEANING: dict[str, tuple[dict[str, Any], ...]] = {
    "eagle3": ({"feedback": "pre-norm"}, {"norm_before_residual": False}),
    "mtp": ({"feedback": "pre-norm"},),
    "block": ({"block_masks": ("causal",)},),
}
Tensors = dict[str, Tensor]


def write_target(folder: Path, **options: Any) -> Path:
    """A random model whose laws are sharp, and simple enough to be learned in a moment.

    Little is done by its feed-forward layers, so that the last state is nearly a linear function of
    the last embeddings; every layer adds as much as the embedding, so that none is like the next.
    """
    usual = {
        "vocab_size": V,
        "hidden_size": H,
        "intermediate_size": INNER,
        "num_hidden_layers": L,
        "head_dim": WIDTH,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 40.0},
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    write_tiny(folder, **{**usual, **options})
    path, random = folder / "model.safetensors", Random(2)
    tensors = {
        name: random.gain(len(tensor))
        if tensor.dim() == 1
        else random(*tensor.shape) * _scale(name)
        for name, tensor in load_file(path).items()
    }
    tensors["model.norm.weight"] = uneven(random, len(tensors["model.norm.weight"]), 2.0)
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def _scale(name: str) -> float:
    """Of a matrix, beside the usual 0.3."""
    scales = {"embed_tokens": 3.0, "lm_head": 1.5, "q_proj": 0.3, "k_proj": 0.3, "down_proj": 0.3}
    return next((scale for part, scale in scales.items() if part in name), 0.9)


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """What heads learn from: texts, the target's laws, its states, and its two tables."""

    tokens_BT: Tensor
    laws_BTV: Tensor
    states_ABTH: Tensor
    embedding_VH: Tensor
    lm_head_VH: Tensor
    final_gain_H: Tensor

    def normed(self, states_BTH: Tensor) -> Tensor:
        return rms(states_BTH, self.final_gain_H)

    def take(self, picked: Tensor) -> "Lesson":
        return Lesson(
            **{
                **vars(self),
                "tokens_BT": self.tokens_BT[picked],
                "laws_BTV": self.laws_BTV[picked],
                "states_ABTH": self.states_ABTH[:, picked],
            }
        )


def open_target(folder: Path) -> LLM:
    return LLM(str(folder), load_tokenizer=False, drafters=(), block_size=8)


def make_lesson(llm: LLM, folder: Path) -> Lesson:
    generator = torch.Generator().manual_seed(3)
    prompts = torch.randint(V, (NUM_TEXTS, 4), generator=generator).tolist()
    sampling = [
        SamplingParams(max_tokens=NUM_TOKENS - 4, temperature=1.0, seed=seed)
        for seed in range(NUM_TEXTS)
    ]
    outputs = llm.generate(prompts, sampling, "off")
    texts = [
        Text(number, (*prompt, *output.token_ids), 0, is_sampled=True)
        for number, (prompt, output) in enumerate(zip(prompts, outputs, strict=True))
    ]
    seen = look(llm.engine.runner.network, texts, range(L + 1))
    held = load_file(folder / "model.safetensors")
    return Lesson(
        tokens_BT=torch.tensor([text.tokens for text in texts]),
        laws_BTV=torch.stack([one.laws_GV for one in seen]).clone(),
        states_ABTH=torch.stack(
            [torch.stack([one.states[j] for one in seen]) for j in range(L + 1)]
        ).clone(),
        embedding_VH=held["model.embed_tokens.weight"],
        lm_head_VH=held["lm_head.weight"],
        final_gain_H=held["model.norm.weight"],
    )


def layer(random: Random, reads: int = H, norms: tuple[str, ...] = ()) -> Tensors:
    """With queries and keys so large that attention is never flat."""
    query, key = HEADS * WIDTH, KV_HEADS * WIDTH
    made = {f"{name}.weight": uneven(random, H) for name in norms}
    made["self_attn.q_proj.weight"] = random(query, reads)
    made["self_attn.k_proj.weight"] = random(key, reads)
    made["self_attn.v_proj.weight"] = random(key, reads) * 0.8
    made["self_attn.o_proj.weight"] = random(H, query) * 0.8
    made["mlp.gate_proj.weight"] = random(INNER, H) * 0.5
    made["mlp.up_proj.weight"] = random(INNER, H) * 0.5
    made["mlp.down_proj.weight"] = random(H, INNER) * 0.2
    return made


def uneven(random: Random, width: int, how: float = 3.0) -> Tensor:
    """A gain as training leaves them: far from ones, so that leaving it out is seen."""
    return (how * random(width)).exp()


def prefixed(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def fresh(family: str, lesson: Lesson, ids: tuple[int, ...] = IDS) -> Tensors:
    """Random, by canonical names; heads of their own start from the target's."""
    random, own = Random(11), {"lm_head.weight": lesson.lm_head_VH.clone()}
    norms = ("input_layernorm", "post_attention_layernorm")
    if family == "eagle":
        first = layer(random, norms=norms[1:])
        return {"fc.weight": random(H, 2 * H) * 0.5} | prefixed("layers.0.", first)
    if family == "eagle3":
        first = layer(random, 2 * H, ("hidden_norm", *norms))
        tensors = {"fc.weight": random(H, 3 * H), "norm.weight": uneven(random, H)}
        own["lm_head.weight"] = own["lm_head.weight"][list(ids)]
        return tensors | prefixed("layers.0.", first) | own
    if family == "mtp":
        names = ("embedding_norm", "feature_norm", "norm")
        tensors = {f"{name}.weight": uneven(random, H) for name in names}
        tensors |= {"fc.weight": random(H, 2 * H) * 0.5} | prefixed(
            "layer.", layer(random, norms=norms)
        )
        return tensors
    if family == "block":
        tensors = {"fc.weight": random(H, 2 * H) * 0.5, "hidden_norm.weight": uneven(random, H)}
        made = layer(random, norms=norms)
        made |= {f"self_attn.{name}_norm.weight": 1.5 * random.gain(WIDTH) for name in "qk"}
        tensors |= prefixed("layers.0.", made)
        return tensors | {"norm.weight": uneven(random, H)}
    assert family == "medusa"
    return {
        name: tensor
        for index in range(DEPTHS)
        for name, tensor in (
            (f"heads.{index}.blocks.0.weight", random(H, H) * 0.5),
            (f"heads.{index}.blocks.0.bias", random(H)),
            (f"heads.{index}.lm_head.weight", lesson.lm_head_VH.clone()),
        )
    }


def guesses(family: str, t: Tensors, chosen: Conventions, lesson: Lesson) -> list[Tensor]:
    """Per depth d logits_BNV of rows 0 to N - 1, of token t + 2 + d; the last d mean nothing."""
    if family == "medusa":
        return _medusa(t, chosen, lesson)
    if family == "block":
        return _block(t, chosen, lesson)
    return _rows(family, t, chosen, lesson)


def train(
    family: str,
    chosen: Conventions,
    lesson: Lesson,
    *,
    num_steps: int = NUM_STEPS,
    ids: tuple[int, ...] = IDS,
) -> Tensors:
    """A head that runs by these conventions, and clearly worse by those it is to tell apart.

    A moment of training leaves a head indifferent to some of them, as a long one does not. So the
    loss by a wrong one, of each in turn, has to be larger by a margin.
    """
    tensors = {name: t.requires_grad_() for name, t in fresh(family, lesson, ids).items()}
    optimiser = torch.optim.Adam(tensors.values(), lr=RATE)
    generator = torch.Generator().manual_seed(5)
    for step in range(num_steps):
        for group in optimiser.param_groups:
            group["lr"] = RATE * min(1.0, 2.0 * (1.0 - step / num_steps))
        part = lesson.take(torch.randperm(NUM_TEXTS, generator=generator)[:BATCH])
        loss = _loss(guesses(family, tensors, chosen, part), part, ids)
        wrong = LEANING.get(family, ())
        if wrong and step % 2:
            other = replace(chosen, **wrong[step // 2 % len(wrong)])
            worse = _loss(guesses(family, tensors, other, part), part, ids) - loss
            loss = loss + F.relu(MARGIN - worse)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(tensors.values(), 1.0)
        optimiser.step()
    return {name: t.detach().clone() for name, t in tensors.items()}


def _loss(logits: list[Tensor], lesson: Lesson, ids: tuple[int, ...]) -> Tensor:
    total = torch.zeros(())
    for depth, logits_BNV in enumerate(logits):
        stop = logits_BNV.shape[1] - depth
        p_BNV = lesson.laws_BTV[:, 1 + depth :]
        if logits_BNV.shape[-1] < V:
            p_BNV = p_BNV[..., list(ids)]
            p_BNV = p_BNV / p_BNV.sum(-1, keepdim=True)
        q_BNV = logits_BNV[:, :stop].log_softmax(-1)
        total = total - (p_BNV * q_BNV).sum(-1).mean()
    return total


def _rows(family: str, t: Tensors, chosen: Conventions, lesson: Lesson) -> list[Tensor]:
    num_rows = lesson.tokens_BT.shape[1] - 1
    start = {"eagle": "layers.0.", "eagle3": "layers.0.", "mtp": "layer."}[family]
    inputs = _features(family, t, chosen, lesson)
    keys: list[Tensor] = []
    values: list[Tensor] = []
    logits = []
    for depth in range(DEPTHS):
        at = (torch.arange(num_rows) + 1 + depth).clamp_max(num_rows)
        e = lesson.embedding_VH[lesson.tokens_BT[:, at]]
        residual, read = _entered(family, t, chosen, e, inputs)
        q, k, v = _heads(t, f"{start}self_attn.", read, read, chosen)
        positions_N = torch.arange(num_rows) + depth
        keys.append(turned(k, positions_N, chosen))
        values.append(v)
        seen = [torch.ones(num_rows, num_rows).tril()]
        seen += [torch.eye(num_rows)] * depth
        mixed = attend(
            turned(q, positions_N, chosen),
            torch.cat(keys, 1),
            torch.cat(values, 1),
            torch.cat(seen, 1) > 0,
        )
        u = residual + mixed @ t[f"{start}self_attn.o_proj.weight"].T
        y = u + mlp(t, start, rms(u, t[f"{start}post_attention_layernorm.weight"]))
        if family == "eagle":
            is_raw = chosen.input_state == "raw"
            logits.append((lesson.normed(y) if is_raw else y) @ lesson.lm_head_VH.T)
            inputs = y
            continue
        s = rms(y, t["norm.weight"])
        table = t.get("lm_head.weight", lesson.lm_head_VH)
        logits.append(s @ table.T)
        inputs = s if chosen.feedback == "post-norm" else y
    return logits


def _features(family: str, t: Tensors, chosen: Conventions, lesson: Lesson) -> Tensor:
    if family == "eagle3":
        states = [lesson.states_ABTH[j][:, :-1] for j in chosen.feature_layers]
        return torch.cat(states, -1) @ t["fc.weight"].T
    raw = lesson.states_ABTH[L][:, :-1]
    return raw if chosen.input_state == "raw" else lesson.normed(raw)


def _entered(
    family: str, t: Tensors, chosen: Conventions, e: Tensor, inputs: Tensor
) -> tuple[Tensor, Tensor]:
    """The residual stream before the first layer, and what its attention reads."""
    is_first = chosen.concatenation == "embedding-first"
    if family == "eagle3":
        e = rms(e, t["layers.0.input_layernorm.weight"])
        n = rms(inputs, t["layers.0.hidden_norm.weight"])
        return (n if chosen.norm_before_residual else inputs), torch.cat([e, n], -1)
    if family == "mtp":
        if chosen.is_first_embedding_zero:
            e = torch.cat([torch.zeros_like(e[:, :1]), e[:, 1:]], 1)
        e, f = rms(e, t["embedding_norm.weight"]), rms(inputs, t["feature_norm.weight"])
        x = torch.cat([e, f] if is_first else [f, e], -1) @ t["fc.weight"].T
        return x, rms(x, t["layer.input_layernorm.weight"])
    x = torch.cat([e, inputs] if is_first else [inputs, e], -1) @ t["fc.weight"].T
    return x, x


def _medusa(t: Tensors, chosen: Conventions, lesson: Lesson) -> list[Tensor]:
    raw = lesson.states_ABTH[L][:, :-1]
    f = raw if chosen.input_state == "raw" else lesson.normed(raw)
    logits = []
    for index in range(DEPTHS):
        block = f @ t[f"heads.{index}.blocks.0.weight"].T + t[f"heads.{index}.blocks.0.bias"]
        logits.append((f + F.silu(block)) @ t[f"heads.{index}.lm_head.weight"].T)
    return logits


def _block(t: Tensors, chosen: Conventions, lesson: Lesson) -> list[Tensor]:
    num_texts, num_rows = len(lesson.tokens_BT), lesson.tokens_BT.shape[1] - 1
    states = [lesson.states_ABTH[j][:, :-1] for j in chosen.feature_layers]
    c = rms(torch.cat(states, -1) @ t["fc.weight"].T, t["hidden_norm.weight"])
    slots_BNS = torch.full((num_texts, num_rows, BLOCK), MASK)
    slots_BNS[..., 0] = lesson.tokens_BT[:, 1:]
    x = lesson.embedding_VH[slots_BNS].flatten(1, 2)
    row_R = torch.arange(num_rows).repeat_interleave(BLOCK)
    slot_R = torch.arange(BLOCK).repeat(num_rows)
    positions_R = row_R + 1 + slot_R
    sees_context_RN = torch.arange(num_rows) <= row_R[:, None]
    same_RR = row_R[:, None] == row_R
    for index, mask in enumerate(chosen.block_masks):
        start = f"layers.{index}."
        before_RR = slot_R <= slot_R[:, None]
        own_RR = same_RR & before_RR if mask == "causal" else same_RR
        v_in = rms(x, t[f"{start}input_layernorm.weight"])
        q, k, v = _heads(t, f"{start}self_attn.", v_in, torch.cat([c, v_in], 1), chosen)
        places = torch.cat([torch.arange(num_rows), positions_R])
        mixed = attend(
            turned(q, positions_R, chosen),
            turned(k, places, chosen),
            v,
            torch.cat([sees_context_RN, own_RR], 1),
        )
        x = x + mixed @ t[f"{start}self_attn.o_proj.weight"].T
        x = x + mlp(t, start, rms(x, t[f"{start}post_attention_layernorm.weight"]))
    logits = rms(x, t["norm.weight"]) @ lesson.lm_head_VH.T
    logits_BNSV = logits.unflatten(1, (num_rows, BLOCK))
    first = 0 if chosen.sample_from_anchor else 1
    return [logits_BNSV[:, :, first + depth] for depth in range(DEPTHS)]


def _heads(
    t: Tensors, start: str, asks: Tensor, tells: Tensor, chosen: Conventions
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of what asks; keys and values of what tells."""
    q = (asks @ t[f"{start}q_proj.weight"].T).unflatten(-1, (HEADS, WIDTH))
    k = (tells @ t[f"{start}k_proj.weight"].T).unflatten(-1, (KV_HEADS, WIDTH))
    v = (tells @ t[f"{start}v_proj.weight"].T).unflatten(-1, (KV_HEADS, WIDTH))
    if f"{start}q_norm.weight" in t:
        q, k = rms(q, t[f"{start}q_norm.weight"]), rms(k, t[f"{start}k_norm.weight"])
    return q, k, v


def attend(q_BNJW: Tensor, k_BMGW: Tensor, v_BMGW: Tensor, seen_NM: Tensor) -> Tensor:
    repeats = q_BNJW.shape[2] // k_BMGW.shape[2]
    q, k, v = (
        heads.transpose(1, 2)
        for heads in (
            q_BNJW,
            k_BMGW.repeat_interleave(repeats, 2),
            v_BMGW.repeat_interleave(repeats, 2),
        )
    )
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen_NM).transpose(1, 2).flatten(2)


def turned(heads: Tensor, positions_N: Tensor, chosen: Conventions) -> Tensor:
    theta = 40.0 if chosen.rope_origin == "target" else THETA
    angles = positions_N[:, None] * theta ** -(torch.arange(0, WIDTH, 2) / WIDTH)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    if chosen.rope_style == "interleaved":
        a, b = heads[..., 0::2], heads[..., 1::2]
        return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    a, b = heads.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def mlp(t: Tensors, start: str, x: Tensor) -> Tensor:
    gate, up, down = (t[f"{start}mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


def rms(x: Tensor, gain: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain


# What heads are trained with, and then declared as, unless a test says otherwise.
TRUTH: dict[str, Conventions] = {
    "eagle": Conventions(),
    "eagle3": Conventions(
        feature_layers=BOUNDARIES,
        norm_before_residual=True,
        feedback="post-norm",
        lm_head="own",
        vocabulary_map="offset",
    ),
    "mtp": Conventions(feedback="post-norm", rope_origin="target"),
    "block": Conventions(feature_layers=(2, 4), block_masks=("bidirectional",)),
    "medusa": Conventions(lm_head="own"),
}


def write_head(
    folder: Path,
    family: str,
    tensors: Tensors,
    chosen: Conventions,
    target: Path,
    *,
    ids: tuple[int, ...] = IDS,
) -> Path:
    """A published layout of the family, that says what its files have words for; pins the rest."""
    if family == "eagle3":
        tensors = tensors | {"d2t": torch.tensor(ids) - torch.arange(len(ids))}
    write_one = {
        "eagle": _write_eagle,
        "eagle3": _write_eagle3,
        "mtp": _write_mtp,
        "block": _write_block,
        "medusa": _write_medusa,
    }[family]
    pins = write_one(folder, tensors, chosen, target)
    usual = TRUTH[family]
    pinned = {name: getattr(chosen, name) for name in pins if _differs(name, chosen, usual)}
    if pinned:
        (folder / "outrider.json").write_text(json.dumps({"conventions": pinned}))
    return folder


def _differs(name: str, one: Conventions, other: Conventions) -> bool:
    return getattr(one, name) != getattr(other, name)


def _write_eagle(folder: Path, t: Tensors, chosen: Conventions, target: Path) -> tuple[str, ...]:
    config = {**DECODER, "architectures": ["LlamaForCausalLM"], "bias": False}
    write(folder, config, t, "pytorch_model.bin")
    return ("input_state", "concatenation", "rope_style", "rope_origin")


def _write_eagle3(folder: Path, t: Tensors, chosen: Conventions, target: Path) -> tuple[str, ...]:
    config = {
        "speculators_model_type": "eagle3",
        "transformer_layer_config": DECODER,
        "draft_vocab_size": len(t["d2t"]),
        "eagle_aux_hidden_state_layer_ids": list(chosen.feature_layers),
        "norm_before_residual": chosen.norm_before_residual,
        "norm_before_fc": False,
        "norm_output": chosen.feedback == "post-norm",
        "is_neox_style": chosen.rope_style == "half-split",
    }
    write(folder, config, t)
    return ("vocabulary_map", "rope_origin")


def _write_mtp(folder: Path, t: Tensors, chosen: Conventions, target: Path) -> tuple[str, ...]:
    parts = {
        "embedding_norm.": "token_layernorm.",
        "feature_norm.": "hidden_layernorm.",
        "fc.": "input_proj.",
        "norm.": "final_layernorm.",
        "layer.": "",
    }
    named = {}
    for name, tensor in t.items():
        start = next(start for start in parts if name.startswith(start))
        named[f"mtp_layers.0.{parts[start]}{name.removeprefix(start)}"] = tensor
    inner = json.loads((target / "config.json").read_text())
    config = {
        "speculators_model_type": "mtp",
        "transformer_layer_config": inner,
        "num_nextn_predict_layers": 1,
    }
    write(folder, config, named)
    return ("feedback", "concatenation", "input_state", "is_first_embedding_zero", "rope_style")


def _write_block(folder: Path, t: Tensors, chosen: Conventions, target: Path) -> tuple[str, ...]:
    config = {
        "speculators_model_type": "dflash",
        "transformer_layer_config": {**DECODER, "model_type": "qwen3"},
        "aux_hidden_state_layer_ids": list(chosen.feature_layers),
        "block_size": BLOCK,
        "mask_token_id": MASK,
        "sample_from_anchor": chosen.sample_from_anchor,
        "is_causal": chosen.block_masks[0] == "causal",
        "is_neox_style": chosen.rope_style == "half-split",
    }
    write(folder, config, t)
    return ("rope_origin",)


def _write_medusa(folder: Path, t: Tensors, chosen: Conventions, target: Path) -> tuple[str, ...]:
    named = {
        name.replace("heads.", "").replace(".blocks.0.", ".0.linear.").replace("lm_head", "1"): x
        for name, x in t.items()
    }
    write(folder, {"medusa_num_heads": DEPTHS}, named, "medusa_lm_head.safetensors")
    return ("input_state",)


@cache
def prompts(count: int = 24) -> list[list[int]]:
    """Other ones than heads were trained on."""
    generator = torch.Generator().manual_seed(77)
    return torch.randint(V, (count, 5), generator=generator).tolist()
