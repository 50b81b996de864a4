"""From a folder or hub id to a draft head: one description and one naming for every layout.

Canonical names of tensors, all weights [outputs, inputs] in the dtype they are stored in:

EAGLE-1/2: `fc.weight`, `fc.bias`, `layers.{i}.*` as Llama's, `embedding_norm.weight` and
`feature_norm.weight` (of the two inputs). EAGLE-3, P-EAGLE: `fc.weight`, `input_norm.weight` or
`fc_norm.{feature}.weight`, `layers.0.input_layernorm.weight` (of the embedding) and
`layers.0.hidden_norm.weight` (of the feature), `layers.{i}.*`, `norm.weight`, `mask_feature`.
Block: `fc.weight`, `hidden_norm.weight`, `layers.{i}.*`, `norm.weight`, `mask_embedding`,
`markov.{w1,w2}`, `markov.{gate,joint}.weight`, `confidence.{weight,bias}`. Medusa:
`heads.{i}.blocks.{j}.{weight,bias}`, `heads.{i}.lm_head.weight`. MTP, per module:
`modules.{i}.{embedding_norm,feature_norm,fc,norm,embed_tokens,lm_head}.weight` and
`modules.{i}.layer.*` with the names of a layer of the target. KV: `embedding_norm.weight` and
`feature_norm.weight` (of the two inputs), `fc.weight`, `layers.{i}.*` as Llama's but for keys and
values that are the target's, `norm.weight`, `output.weight` (to the target's width); shapes are in
`kv_head`. All but Medusa, MTP and KV may have `embed_tokens.weight`, all but Medusa and MTP
`lm_head.weight`; where they have none, the target's is meant.
`target_ids`, int64: the target's token for each draft id; absent where they are the same.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from outrider.errors import ConfigError
from outrider.models.checkpoint import read_config
from outrider.models.heads.block import read_block
from outrider.models.heads.detect import detect
from outrider.models.heads.eagle import read_eagle, read_eagle3, read_peagle
from outrider.models.heads.files import HeadFiles
from outrider.models.heads.given import Given, Shape
from outrider.models.heads.kv_head import read_kv
from outrider.models.heads.medusa import heads_in_target, read_medusa
from outrider.models.heads.mtp import find_modules, read_mtp
from outrider.models.heads.names import canonical
from outrider.models.heads.pins import check_pins, read_pins
from outrider.models.heads.spec import (
    Conventions,
    Family,
    Head,
    HeadSpec,
    TargetSpec,
    Widths,
)
from outrider.models.hub import resolve

READERS = {
    Family.EAGLE: read_eagle,
    Family.EAGLE3: read_eagle3,
    Family.PEAGLE: read_peagle,
    Family.MEDUSA: read_medusa,
    Family.KV: read_kv,
}
NOT_SERVED = {
    Family.PARD2: "delete warp_model.bin and 'pard2' from config.json to run it as a PARD model",
    Family.HYDRA: "use a Medusa or EAGLE head of that target",
    Family.MLP_SPECULATOR: "use a Medusa or EAGLE head of that target",
    Family.DRAFT_MODEL: "it is a full decoder: load it as a draft model, not as a head",
}


def load_head(
    source: Path | str,
    target: TargetSpec,
    *,
    revision: str | None = None,
    pins: Mapping[str, Any] | None = None,
) -> Head:
    """The head in a folder or on the hub, checked against its target.

    Args:
        source: folder, or hub id; for native MTP modules the target's own.
        pins: conventions to run it with, instead of those in the folder's `outrider.json`.

    Returns:
        The description, and all tensors by canonical name. A PARD model has no tensors here: it
        is an ordinary decoder and is loaded as one.

    Raises:
        ConfigError: config and tensors contradict each other, or the head is not served.
        PairError: it was made for a target of other sizes.
        ModelError: tensors are missing, unknown, misshapen or quantised, a vocabulary map is
            wrong, or a file cannot be read.
    """
    folder = source if isinstance(source, Path) else resolve(source, revision)
    config, files = read_config(folder), HeadFiles(folder)
    family = detect(config, files.shapes)
    if family is Family.DRAFT_MODEL and folder == target.folder:
        raise ConfigError(
            f"the files of {target.name!r} hold no MTP modules and no Medusa heads of its own: "
            "name the folder or hub id of a head instead"
        )
    if family in NOT_SERVED:
        raise ConfigError(
            f"{str(source)!r} is of the family {family}, which is not served as a head: "
            f"{NOT_SERVED[family]}"
        )
    laid_down = read_pins(folder) if pins is None else check_pins(pins)
    if family is Family.PARD:
        if laid_down:
            raise ConfigError(
                f"conventions {dict(laid_down)!r}: {str(source)!r} is a whole model (PARD), which "
                "follows none: drop them"
            )
        return _pard(str(source), config, target)
    if family is Family.MTP:
        return _mtp(str(source), config, files, target, laid_down)
    written: Mapping[str, str] = canonical(family, files.shapes)
    if family is Family.MEDUSA:
        written = heads_in_target(written, folder, target)
    given = _given(str(source), config, files, written, target, laid_down)
    if family is Family.BLOCK:
        return read_block(given, files.mask_embedding())
    return READERS[family](given)


def _given(
    source: str,
    config: Mapping[str, Any],
    files: HeadFiles,
    written: Mapping[str, str],
    target: TargetSpec,
    pins: Mapping[str, Any],
) -> Given:
    loaded = files.load(dict.fromkeys(written.values()))
    return Given(
        source=source,
        config=config,
        tensors={ours: loaded[name] for ours, name in written.items()},
        written=written,
        target=target,
        pinned=pins,
    )


def _mtp(
    source: str,
    config: Mapping[str, Any],
    files: HeadFiles,
    target: TargetSpec,
    pins: Mapping[str, Any],
) -> Head:
    modules = find_modules(files.shapes)
    given = _given(source, config, files, modules.written, target, pins)
    return read_mtp(given, modules, _target_shapes(given, files, target))


def _target_shapes(given: Given, files: HeadFiles, target: TargetSpec) -> Mapping[str, Shape]:
    """Of native modules the files they came in, else the target's."""
    if not given.is_speculators:
        return files.shapes
    if target.folder is None:
        raise ConfigError(
            f"the MTP modules in {given.source!r} are checked against their target's layers: "
            "name the target's folder"
        )
    return HeadFiles(target.folder).shapes


def _pard(source: str, config: Mapping[str, Any], target: TargetSpec) -> Head:
    token, vocab = config.get("pard_token"), config.get("vocab_size")
    if not isinstance(vocab, int) or not isinstance(token, int) or not 0 <= token < vocab:
        raise ConfigError(f"config.json: pard_token={token!r} must be below vocab_size={vocab!r}")
    hidden = config.get("hidden_size")
    spec = HeadSpec(
        family=Family.PARD,
        widths=Widths(
            target_hidden=target.hidden_size,
            hidden=hidden if isinstance(hidden, int) else 0,
            vocab=target.vocab_size,
            draft_vocab=vocab,
        ),
        conventions=Conventions(lm_head="own", embedding="own"),
        mask_token_id=token,
        source=source,
    )
    return Head(spec, {})
