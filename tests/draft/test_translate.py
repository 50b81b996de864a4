"""A draft model of another vocabulary: the same tokens, true laws, draft KV that follows."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from outrider import LLM
from outrider.cache.pool import KVPool
from outrider.cache.table import BlockManager
from outrider.draft.base import ModelParts, Surroundings
from outrider.draft.translate import Strings, TokenCourse, TranslateDrafter
from outrider.draft.vocabulary_map import Dialect, VocabularyMap
from outrider.engine.config import EngineConfig
from outrider.engine.engine import Engine
from outrider.errors import ConfigError, RequestError
from outrider.models.runner import Piece, Runner
from outrider.request import Request, SamplingParams, SpeculationParams
from outrider.sampling.shaper import Shaper
from outrider.step import EMPTY_TREE, DraftTree
from outrider.testing import (
    ScriptedDrafter,
    ToyModel,
    bias,
    events,
    junk,
    run,
    speculate,
    tiny_decoder,
)
from outrider.verify.block import BlockVerifier
from outrider.verify.rejection import RejectionVerifier
from tests.draft.vocabularies import CODE, MANY_WORDS, TEXT, letters, merged, speaker
from tests.engine.tiny_checkpoint import write_checkpoint

OFF = SpeculationParams(method="off")
GREEDY = SamplingParams(max_tokens=30, ignore_eos=True)
SAMPLED = SamplingParams(max_tokens=30, temperature=0.9, ignore_eos=True)
SHAPED = SamplingParams(
    max_tokens=30,
    temperature=1.1,
    top_k=40,
    top_p=0.95,
    repetition_penalty=1.2,
    presence_penalty=0.3,
    logit_bias={65: 1.5, 66: -2.0, 70: -math.inf},
    ignore_eos=True,
)
KINDS = {"greedy": GREEDY, "sampled": SAMPLED, "shaped": SHAPED}
WAYS = ("tokens", "strings")
HALF_RIGHT = 0.01


def by(way, **more):
    return SpeculationParams(method="translate", drafter_options={"by": way}, **more)


def parts(network, tokenizer, num_blocks=256):
    spec = network.spec
    pool = KVPool(spec.kv_shapes, num_blocks, 4, spec.dtype, spec.device)
    return ModelParts(
        runner=Runner(network, pool), manager=BlockManager(num_blocks, 4), tokenizer=tokenizer
    )


def engine(target, draft, *, num_blocks=256, num_draft_blocks=256, **options):
    """Each of the two is (network, tokenizer)."""
    served = parts(*target, num_blocks)
    drafter = TranslateDrafter.build(
        Surroundings(target=served, draft=parts(*draft, num_draft_blocks), shares_vocabulary=False)
    )
    config = EngineConfig(**{"block_size": 4, "check_integrity": True, **options})
    return Engine(
        served.runner,
        served.manager,
        config,
        drafters=[drafter, ScriptedDrafter(junk(200))],
        default_drafter="translate",
        tokenizer=target[1],
    )


def twins(noise=HALF_RIGHT, **options):
    """One model of letters under two orders of the alphabet; the draft model errs by `noise`."""
    ours, theirs = letters(1), letters(2)
    return engine((speaker(ours), ours), (speaker(theirs, noise=noise), theirs), **options)


def refined(**options):
    """Random models; the target merges bytes that are tokens of the draft model."""
    ours, theirs = merged(TEXT), letters(2)
    return engine(
        (tiny_decoder(1, vocab_size=ours.vocab_size), ours),
        (tiny_decoder(2, vocab_size=theirs.vocab_size + 30), theirs),
        **options,
    )


def coarser(**options):
    """The target knows letters only; the draft model writes words."""
    ours, theirs = letters(1), merged(CODE, 330)
    return engine(
        (speaker(ours), ours), (tiny_decoder(2, vocab_size=theirs.vocab_size), theirs), **options
    )


PAIRS = {"twins": twins, "refined": refined, "coarser": coarser}


def requests(used, sampling, speculation, count=5, prompts=()):
    tokenizer = drafter_of(used).ways["strings"].target.tokenizer
    prompts = prompts or [TEXT[3 * i : 3 * i + 20 + 9 * i] + "é" * (i % 2) for i in range(count)]
    return [
        Request(
            id=f"r{i}",
            prompt_token_ids=tuple(tokenizer.encode(prompt)),
            sampling=sampling,
            speculation=speculation,
            seed=1000 + i,
        )
        for i, prompt in enumerate(prompts)
    ]


def drafter_of(used) -> TranslateDrafter:
    return used.drafters["translate"]


def acceptance(used):
    return used.stats.num_accepted_tokens / used.stats.num_draft_tokens


@pytest.fixture(scope="module")
def plain():
    made = {}
    for pair, make in PAIRS.items():
        for kind, sampling in KINDS.items():
            used = make()
            made[pair, kind] = run(used, requests(used, sampling, OFF))
    return made


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("way", WAYS)
def test_tokens_are_those_of_plain_decoding(plain, pair, kind, way):
    used = PAIRS[pair]()
    told = run(used, requests(used, KINDS[kind], by(way)))
    assert told == plain[pair, kind]
    assert used.stats.num_draft_tokens > 0
    if pair == "twins":
        assert 0 < acceptance(used) < 1, "what a rejection leaves in the KV must be seen"
    assert used.manager.num_used == drafter_of(used).manager.num_used == 0
    drafter_of(used).manager.check_integrity([])


@pytest.mark.parametrize("method", ["greedy", "probabilistic", "coupled"])
@pytest.mark.parametrize("way", WAYS)
def test_however_drafts_are_drawn(plain, way, method):
    used = twins()
    asked = by(way, draft_sample_method=method, num_draft_tokens=7)
    if way == "strings" and method != "greedy":
        message = f"{method}'.* greedy only with by='strings'; drop it, or use .*'by': 'auto'"
        with pytest.raises(RequestError, match=message):
            run(used, requests(used, SAMPLED, asked))
        return
    assert run(used, requests(used, SAMPLED, asked)) == plain["twins", "sampled"]


@pytest.mark.parametrize("kind", ["greedy", "shaped"])
@pytest.mark.parametrize("way", WAYS)
def test_with_preemption_chunks_and_few_draft_blocks(plain, kind, way):
    used = twins(
        num_blocks=40,
        num_draft_blocks=60,
        max_num_seqs=4,
        max_model_len=100,
        max_num_batched_tokens=24,
        long_prefill_token_threshold=7,
    )
    assert run(used, requests(used, KINDS[kind], by(way))) == plain["twins", kind]
    assert used.stats.num_preemptions > 0
    assert used.manager.num_used == drafter_of(used).manager.num_used == 0


@pytest.mark.parametrize("way", WAYS)
def test_completions_of_one_prompt(way):
    sampling = SamplingParams(max_tokens=12, temperature=1.0, n=3, ignore_eos=True)
    expected, used = twins(), twins()
    prompts = [TEXT * 2, TEXT[::-1] * 2]
    told = run(used, requests(used, sampling, by(way), prompts=prompts))
    assert told == run(expected, requests(expected, sampling, OFF, prompts=prompts))
    assert len({tuple(tokens) for tokens in told.values()}) == 6
    assert drafter_of(used).manager.hits > 0, "they share the draft KV of the prompt"
    assert drafter_of(used).manager.num_used == 0


@pytest.mark.parametrize("way", WAYS)
def test_tenants_share_no_draft_kv(way):
    used = twins()
    (first,) = requests(used, GREEDY, by(way), 1)
    for name in ("a", "b"):
        told = Request(
            id=name,
            prompt_token_ids=first.prompt_token_ids,
            sampling=GREEDY,
            speculation=by(way),
            tenant=name,
        )
        run(used, [told])
    assert drafter_of(used).manager.hits == 0


@pytest.mark.parametrize(
    ("way", "verifier", "temperature"),
    [
        ("tokens", "sampled", 0.0),
        ("tokens", "sampled", 1.0),
        ("tokens", "rejection", 1.0),
        ("tokens", "block", 1.0),
        ("strings", "sampled", 0.0),
    ],
)
def test_a_perfect_twin_is_accepted_in_full(way, verifier, temperature):
    """The same laws under other ids: K accepted in each step; strings are greedy guesses."""
    used = twins(noise=0.0)
    sampling = SamplingParams(max_tokens=31, temperature=temperature, ignore_eos=True)
    told = events(used, requests(used, sampling, by(way, verifier=verifier, num_draft_tokens=4)))
    for answer in told.values():
        metrics = answer[-1].metrics
        assert metrics.num_accepted_tokens == metrics.num_draft_tokens > 0
        assert metrics.acceptance_length > 4.5


def kv(runner, table, count):
    slots = torch.tensor(table.slots(0, count))
    return [part[slots] for layer in runner.pool.layers for part in layer]


def assert_kv_is_of_the_text(used):
    """Draft KV is that of a fresh prefill, of the draft log's ids; returns how much there was."""
    runner, num_compared = drafter_of(used).runner, 0
    for seq in used.scheduler.running:
        state = seq.drafter_state.get("translate")
        if state is None or not state.cached:
            continue
        fresh = parts(runner.network, None)
        table, _ = fresh.manager.open(state.cached)
        fresh.manager.reserve(table, len(state.cached))
        fresh.runner.run([Piece(table, 0, state.cached, EMPTY_TREE, False)])
        count = len(state.cached)
        log = state.log.tokens
        assert state.cached[: len(log)] == log[:count], seq.id
        shared = state.table.num_hashed * state.table.block_size
        assert shared <= max(0, state.log.num_settled - 1), "it may still be written"
        pairs = zip(kv(runner, state.table, count), kv(fresh.runner, table, count), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), seq.id
        num_compared += count
    return num_compared


@pytest.mark.parametrize("pair", ["twins", "refined"])
@pytest.mark.parametrize("way", WAYS)
def test_after_every_step_the_draft_kv_is_that_of_a_fresh_prefill(pair, way):
    used = PAIRS[pair]()
    for asked in requests(used, SAMPLED, by(way), 3):
        used.add(asked)
    num_compared = 0
    while used.has_work():
        used.step()
        num_compared += assert_kv_is_of_the_text(used)
        states = [seq.drafter_state.get("translate") for seq in used.scheduler.running]
        drafter_of(used).manager.check_integrity([s.table for s in states if s is not None])
    assert num_compared > 1000


def test_after_a_draft_that_stood_only_what_is_new_is_run():
    """Full acceptance: the last draft and the bonus token; nothing of the prompt again."""
    used = twins(noise=0.0)
    used.add(requests(used, GREEDY, by("tokens"), 1)[0])
    sizes = []
    forward = drafter_of(used).runner.run

    def noted(pieces):
        sizes.append(sum(len(piece.chain) for piece in pieces))
        return forward(pieces)

    drafter_of(used).runner.run = noted
    for _ in range(3):
        used.step()
    assert sizes == [20, 1, 1, 1, 2, 1, 1, 1, 2, 1, 1, 1]


def test_catch_up_is_cut_into_passes_of_bounded_size(plain, monkeypatch):
    monkeypatch.setattr("outrider.draft.translate.MAX_CATCH_UP_TOKENS", 10)
    used = twins()
    sizes = []
    forward = drafter_of(used).runner.run

    def noted(pieces):
        sizes.append(sum(len(piece.chain) for piece in pieces))
        return forward(pieces)

    drafter_of(used).runner.run = noted
    assert run(used, requests(used, SAMPLED, by("tokens"))) == plain["twins", "sampled"]
    assert max(sizes) == 10


@pytest.mark.parametrize("way", WAYS)
def test_a_pool_or_a_window_too_small_means_plain_decoding(plain, way):
    small = twins(num_draft_blocks=6)
    assert run(small, requests(small, GREEDY, by(way))) == plain["twins", "greedy"]
    ours, theirs = letters(1), letters(2)
    short = speaker(theirs)
    short.spec = short.spec.__class__(**{**vars(short.spec), "max_positions": 30})
    used = engine((speaker(ours), ours), (short, theirs))
    assert run(used, requests(used, GREEDY, by(way))) == plain["twins", "greedy"]
    assert 0 < used.stats.num_draft_tokens < 60


COLLIDING = [(0, 2), (1, 0), (2, 2), (4, 0), (5, 2)]


def drafting(q, words, depth=2):
    """The drafter's own course over a toy law of six draft ids, temperature 1."""
    sampling = SamplingParams(temperature=1.0)
    shaper = Shaper(sampling, vocab_size=3, eos_token_ids=(), bad_words_ids=(), num_prompt=1)

    def draft(context, stream) -> DraftTree:
        spec = SimpleNamespace(draft_sample_method="probabilistic")
        seq = SimpleNamespace(shaper=shaper, speculation=spec, grammar=None, tokens=[0])
        course = TokenCourse(seq, None, depth, words, stream)
        while not course.is_done:
            course.take(q((*context, *course.tokens)).log(), 0)
        return course.tree("translate")

    return draft


class Overwriting(VocabularyMap):
    """The mistake of overwriting where ids collide, in the law that is recorded."""

    def translate(self, logits):
        mapped = logits.new_full((self.num_target,), -math.inf)
        for draft, target in COLLIDING:
            mapped[target] = logits[draft]
        return mapped


@pytest.mark.parametrize("rule", [RejectionVerifier(), BlockVerifier()], ids=lambda rule: rule.name)
@pytest.mark.parametrize("seed", range(3))
def test_the_law_is_the_targets_with_colliding_tokens(rule, seed):
    words = VocabularyMap(COLLIDING, 6, 3)
    p, q = ToyModel(f"p{seed}", 3), ToyModel(f"q{seed}", 6)
    honest = drafting(q, words)
    assert bias(speculate(rule, p, honest), p, 4) < 1e-10

    def overwritten(context, stream):
        """Draws from the true law, but records the one of the mistake."""
        tree = honest(context, stream)
        paths = [(*context, *tree.tokens[:i]) for i in range(len(tree))]
        wrong = Overwriting(COLLIDING, 6, 3)
        laws = tuple(wrong.translate(q(path).log()).softmax(dim=0) for path in paths)
        return DraftTree.chain(tree.tokens, "toy", laws)

    assert bias(speculate(rule, p, overwritten), p, 4) > 1e-3


def test_the_recorded_law_is_over_the_targets_vocabulary_and_shaped_as_it_is():
    used = refined()
    made = []
    draft = drafter_of(used).draft

    def noted(rows, plan):
        made.extend(draft(rows, plan))
        return made[-len(rows) :]

    drafter_of(used).draft = noted
    run(used, requests(used, SHAPED, by("tokens", verifier="rejection"), 2))
    laws = [law for tree in made for law in tree.laws]
    assert len(laws) == sum(map(len, made)) > 0
    words = drafter_of(used).ways["tokens"].words
    unknown = torch.tensor([own < 0 for own in words.target_to_draft])
    assert unknown.any()
    for law_T in laws:
        assert law_T.shape == (words.num_target,)
        assert float(law_T.sum()) == pytest.approx(1.0)
        assert int((law_T > 0).sum()) <= 40
        assert float(law_T[unknown].sum()) == 0.0
        assert law_T[70] == 0.0, "logit_bias names target ids"


@pytest.fixture(scope="module")
def seam():
    """Target of words, draft model of letters."""
    target, draft = merged(TEXT), letters(2)
    return Strings(Dialect(target, target.vocab_size), Dialect(draft, draft.vocab_size))


def proposal(seam, committed, drafted, depth=16, is_ended=False):
    """Target ids proposed behind `committed` (text, or ids) for a drafted text."""
    log = seam.log()
    log.follow(seam.target.encode(committed) if isinstance(committed, str) else committed)
    course = seam.course(None, SimpleNamespace(log=log), depth)
    course.drafted = seam.draft.encode(drafted)
    course.is_ended = is_ended
    return course.tree("translate").tokens


def texts(seam, tokens):
    return [seam.target.tokenizer.decode([token]) for token in tokens]


def test_a_proposal_is_the_drafted_text_in_the_targets_tokens(seam):
    ids = seam.target.encode("the dog saw the cat")
    for start in range(1, len(ids) - 1):
        committed = ids[:start]
        rest = seam.target.tokenizer.decode(ids[start:])
        assert proposal(seam, committed, rest, is_ended=True) == tuple(ids[start:])
        assert proposal(seam, committed, rest) == tuple(ids[start:-1]), "the last is unstable"
        assert proposal(seam, committed, rest, depth=1) == (ids[start],)


def test_what_would_merge_across_the_seam_stands_by_itself(seam):
    """The log ends inside a word: its tokens stand, and the rest of the word is encoded alone."""
    whole, half = seam.target.encode(" the dog")[0], seam.target.encode(" th")
    assert seam.target.tokenizer.decode([whole]) == " the"
    assert texts(seam, proposal(seam, half, "e dog", is_ended=True))[0] == "e"


def test_a_begun_character_is_not_proposed_twice(seam):
    ids = seam.target.encode("a🐈 b")
    cat = next(i for i, token in enumerate(ids) if seam.target.bytes_of(token)[:1] == b"\xf0")
    assert proposal(seam, ids[: cat + 2], "🐈 b", is_ended=True) == tuple(ids[cat + 2 :])
    assert proposal(seam, ids[: cat + 2], "x b", is_ended=True) == (), "it cannot follow"


def test_a_character_that_the_draft_has_only_begun_is_left_out(seam):
    log = seam.log()
    log.follow(seam.target.encode("the"))
    course = seam.course(None, SimpleNamespace(log=log), 16)
    course.drafted = seam.draft.encode(" cat é")[:-1]
    assert "".join(texts(seam, course.tree("").tokens)) == " cat"


def test_special_tokens_are_kept_out_of_proposals(seam):
    """Letters that spell one end the proposal; drafting one ends the draft."""
    assert texts(seam, proposal(seam, "the", " cat<|user|> sat", is_ended=True)) == [" cat"]
    log = seam.log()
    log.follow(seam.target.encode("the"))
    course = seam.course(None, SimpleNamespace(log=log), 3)
    course.take(torch.zeros(0), seam.draft.encode("x")[0])
    assert not course.is_done
    course.take(torch.zeros(0), seam.draft.tokenizer.eos_token_id)
    assert course.is_done
    assert len(course.drafted) == 1


def test_letters_are_drafted_until_there_are_words_enough(seam):
    log = seam.log()
    ids = seam.target.encode(TEXT)
    log.follow(ids)
    ratio = len(TEXT) / len(ids)
    assert ratio > 2
    assert seam.num_steps(log, 4) == math.ceil(4 * ratio) + 1


def test_token_by_token_what_the_draft_model_lacks_is_spelled_out():
    ours, theirs = merged(TEXT), letters(2)
    words = refined_words(ours, theirs)
    log = words.log()
    ids = [*ours.encode("the cat 🐈"), ours.eos_token_id]
    log.follow(ids)
    assert theirs.decode(log.tokens) == "the cat 🐈"
    assert len(log.tokens) == len("the cat 🐈".encode()) > len(ids)


def refined_words(ours, theirs):
    made = parts(tiny_decoder(1, vocab_size=ours.vocab_size), ours)
    draft = parts(tiny_decoder(1, vocab_size=theirs.vocab_size), theirs)
    return TranslateDrafter.build(Surroundings(target=made, draft=draft)).ways["tokens"]


def test_auto_takes_tokens_where_the_vocabularies_are_close():
    small, large = merged(TEXT, 290), merged(MANY_WORDS, 600)
    assert large.vocab_size == 600
    for ours, theirs, way in [
        (small, letters(2), "tokens"),
        (large, letters(2), "strings"),
        (letters(2), large, "strings"),
    ]:
        ways = drafter_of(
            engine(
                (tiny_decoder(1, vocab_size=ours.vocab_size), ours),
                (tiny_decoder(1, vocab_size=theirs.vocab_size), theirs),
            )
        ).ways
        assert ways["auto"] is ways[way]


def test_few_common_tokens_are_warned_of(caplog):
    ours, theirs = merged(TEXT), letters(2)
    served = parts(tiny_decoder(1, vocab_size=ours.vocab_size), ours)
    narrow = parts(tiny_decoder(1, vocab_size=60), theirs)
    ways = TranslateDrafter.build(Surroundings(target=served, draft=narrow)).ways
    assert ways["auto"] is ways["strings"]
    assert "only 60 tokens in common" in caplog.text


@pytest.mark.parametrize(("missing", "match"), [
    ("draft", "needs a draft model: give draft_model="),
    ("target tokenizer", "needs the tokenizer of the model: put its tokenizer.json"),
    ("draft tokenizer", "needs the tokenizer of the draft model: put"),
])  # fmt: skip
def test_build_refuses_what_it_cannot_translate(missing, match):
    network, tokenizer = tiny_decoder(vocab_size=258), letters()
    served = parts(network, None if missing == "target tokenizer" else tokenizer)
    draft = parts(network, None if missing == "draft tokenizer" else tokenizer)
    surroundings = Surroundings(target=served, draft=None if missing == "draft" else draft)
    with pytest.raises(ConfigError, match=match):
        TranslateDrafter.build(surroundings)


@pytest.mark.parametrize(
    ("pair", "way", "verifier", "method"),
    [
        ("twins", "auto", None, "coupled"),
        ("twins", "auto", "rejection", "probabilistic"),
        ("coarser", "tokens", None, "coupled"),
        ("coarser", "strings", None, "greedy"),
        ("coarser", "strings", "rejection", "greedy"),
    ],
)
def test_without_a_word_drafts_are_drawn_as_the_way_allows(pair, way, verifier, method):
    """And what is in force is what the sequence says."""
    used = PAIRS[pair]()
    used.add(requests(used, SAMPLED, by(way, verifier=verifier), 1)[0])
    used.step()
    (seq,) = used.scheduler.running
    assert seq.speculation.draft_sample_method == method


def test_a_method_of_another_part_is_picked_for_here():
    """A cascade may ask for chains that this drafter cannot draw: none without its law."""
    used = twins()
    used.add(requests(used, SAMPLED, by("tokens"), 1)[0])
    used.step()
    (seq,) = used.scheduler.running
    for method, is_picked in (("independent", True), ("probabilistic", False)):
        seq.speculation = replace(seq.speculation, draft_sample_method=method)
        course = drafter_of(used).ways["tokens"].course(seq, None, 3)
        assert (course.stream is None) == is_picked


def test_options_are_checked():
    used = twins()
    (asked,) = requests(used, GREEDY, by("words"), 1)
    with pytest.raises(RequestError, match=r"'by'\]='words': must be one of auto, tokens, strings"):
        used.add(asked)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two checkpoints whose tokenizers differ."""
    target = write_checkpoint(tmp_path_factory.mktemp("target"))
    draft = write_checkpoint(
        tmp_path_factory.mktemp("draft"), text=TEXT, num_hidden_layers=1, vocab_size=300
    )
    return str(target), str(draft)


@pytest.mark.parametrize("sampling", [
    SamplingParams(max_tokens=20, ignore_eos=True),
    SamplingParams(max_tokens=20, temperature=0.8, seed=4, ignore_eos=True),
], ids=["greedy", "sampled"])  # fmt: skip
def test_from_folders_translation_is_what_such_a_pair_does(folders, sampling):
    target, draft = folders
    prompts = ["def main(", "the quick cat 🐈"]
    expected = LLM(target).generate(prompts, sampling)
    llm = LLM(target, draft_model=draft, policy="fixed")
    for way in (None, by("strings")):
        told = llm.generate(prompts, sampling, speculation=way)
        assert [a.token_ids for a in told] == [a.token_ids for a in expected]
        assert [a.text for a in told] == [a.text for a in expected]
        assert all(answer.metrics.num_drafts > 0 for answer in told)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "draft", "way", "least"),
    [("stories260K", "chars940K", "auto", 2.0), ("chars940K", "stories260K", "auto", 1.7),
     ("stories260K", "chars940K", "tokens", 1.1)],
)  # fmt: skip
def test_real_models_speed_each_other_up(shared_data, target, draft, way, least):
    folder = shared_data / "weights"
    prompts = ["Once upon a time", "The little dog was", "Lily and Tom"]
    for sampling in (SamplingParams(max_tokens=80), SamplingParams(temperature=0.8, seed=3)):
        expected = LLM(str(folder / target)).generate(prompts, sampling)
        llm = LLM(str(folder / target), draft_model=str(folder / draft), policy="fixed")
        told = llm.generate(prompts, sampling, speculation=by(way))
        assert [a.text for a in told] == [a.text for a in expected]
        lengths = [answer.metrics.acceptance_length for answer in told]
        assert sum(lengths) / len(lengths) > least
