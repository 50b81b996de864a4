"""Engine: the loop. schedule, plan, draft, forward, verify, commit, stream."""

from collections.abc import Callable, Mapping, Sequence as Items

from outrider.cache.table import BlockManager
from outrider.control.base import StepTimes
from outrider.control.controller import Controller
from outrider.draft.base import Drafter
from outrider.draft.drafters import Drafters
from outrider.engine.commit import Committer
from outrider.engine.config import EngineConfig
from outrider.engine.resolve import NO_HEADS, resolve
from outrider.engine.scheduler import Scheduler
from outrider.engine.stats import EngineStats
from outrider.errors import RequestError
from outrider.models.runner import Runner
from outrider.request import Request, SamplingParams, Speculation, SpeculationParams
from outrider.sampling.grammar import GrammarCompiler
from outrider.sampling.rng import fold
from outrider.sampling.shaper import Shaper
from outrider.sequence import Sequence, Status
from outrider.step import Commit
from outrider.stream.detokenize import Decoder
from outrider.stream.events import Event
from outrider.stream.streamer import Streamer
from outrider.verify.verifiers import Verifiers, verifier


class Engine:
    """One target, its drafters, and all requests in flight. No clock, thread, socket or print.

    Args:
        runner: the target and its KV pool; `manager` hands out the pool's blocks.
        drafters: what requests may ask for; `default_drafter` serves those that do not ask.
        tokenizer: None serves token ids without text.
        grammars: None refuses constrained output.
        draft_model: name of the loaded draft model, for requests that insist on one.
        heads: likewise of the loaded draft heads, by the drafter that runs each.
        controller: who decides how far to draft; None drafts as far as requests ask.
        draft_fingerprint: of that model's weights.
        clock: seconds, for policies that go by time; the engine itself looks at none.
    """

    def __init__(
        self,
        runner: Runner,
        manager: BlockManager,
        config: EngineConfig,
        *,
        drafters: Items[Drafter] = (),
        default_drafter: str = "",
        tokenizer: Decoder | None = None,
        grammars: GrammarCompiler | None = None,
        draft_model: str = "",
        heads: Mapping[str, str] = NO_HEADS,
        controller: Controller | None = None,
        clock: Callable[[], float] | None = None,
        draft_fingerprint: str = "",
    ) -> None:
        self.runner = runner
        self.manager = manager
        self.config = config
        self.spec = runner.network.spec
        self.max_model_len = config.model_len(self.spec)
        self.drafters = Drafters(drafters)
        self.default_drafter = default_drafter
        self.draft_model = draft_model
        self.heads = heads
        self.draft_fingerprint = draft_fingerprint
        self.grammars = grammars
        self.has_tokenizer = tokenizer is not None
        self.scheduler = Scheduler(config, manager, self.drafters.first_missing)
        self.controller = controller or Controller(self.max_model_len)
        self._clock = clock
        self._ended: float | None = None  # of the last step, where this one follows at once
        self.has_prices = False  # of passes and drafting, from a calibration
        self.verifiers = Verifiers()
        self.streamer = Streamer(tokenizer, _exactness)
        self.committer = Committer(
            manager, runner.pool, self.streamer, self.spec.eos_token_ids, self.max_model_len
        )
        self.stats = EngineStats()
        self._groups: dict[str, list[Sequence]] = {}
        self._unforked: dict[str, list[Sequence]] = {}
        self._aborted: list[Sequence] = []
        self._num_arrived = 0

    def step(self) -> list[Event]:
        """One pass of the target for whoever is due; returns what the clients may know."""
        began = self._now()
        events = self._farewells()
        resting = self.controller.resting(len(self.scheduler.running))
        batch = self.scheduler.schedule(resting)
        for seq in batch.preempted:
            self.drafters.close(seq)
            self.drafters.open(seq)
        if not batch.rows:
            self._ended = None
            return events
        plan = self.controller.plan(batch)
        started = self._now()
        drafts = self.drafters.draft(batch, plan)
        drafted = self._now()
        events += self.streamer.provisional(batch, drafts)
        output = self.runner.forward(batch, drafts, self.drafters.taps())
        ran = self._now()
        verdicts = self.verifiers.verify(batch, drafts, output)
        commits = self.committer.commit(batch, drafts, verdicts, output)
        self.drafters.observe(commits, output)
        self.stats.observe(batch, commits)
        events += self.streamer.verified(commits)
        times = self._times(began, started, drafted, ran)
        tried = self.drafters.followed(plan, drafts)
        self.controller.observe(batch, tried, commits, times if self._clock else None)
        self._fork_siblings(commits)
        self._release(commits)
        if self.config.check_integrity:
            self.check_integrity()
        return events

    def _now(self) -> float:
        return self._clock() if self._clock else 0.0

    def _times(self, began: float, started: float, drafted: float, ran: float) -> StepTimes:
        """Of a step that ends now; what its caller did since the last one belongs to it, too.

        Whoever streams and counts does so after every step, so fewer steps spare that as well.
        """
        ended, forward = self._now(), ran - drafted
        between = 0.0 if self._ended is None else min(began - self._ended, forward)
        self._ended = ended
        return StepTimes(drafted - started, forward, ended - ran + started - began + between)

    def add(self, request: Request) -> None:
        """Queues a request. RequestError if it cannot be served as asked; then nothing changed."""
        if not self.has_work():
            self._ended = None  # nobody waited for a step since
        if request.id in self._groups:
            raise RequestError(f"request id {request.id!r} is in use: choose another")
        self._check_prompt(request)
        sequences = [self._sequence(request, index) for index in range(request.sampling.n)]
        self._groups[request.id] = sequences
        for seq in sequences:
            self.streamer.open(seq)
            self.drafters.open(seq)
        self.scheduler.add(sequences[0])
        if len(sequences) > 1:
            self._unforked[sequences[0].id] = sequences[1:]

    def resolve(self, params: SpeculationParams, sampling: SamplingParams) -> Speculation:
        """What would be in force for a request; RequestError or PairError if it is refused."""
        return resolve(
            params,
            sampling,
            self.drafters,
            self.default_drafter,
            self.draft_model,
            self.controller,
            self.heads,
        )

    def abort(self, request_id: str) -> None:
        """Ends a request, wherever it is; its last event comes with the next step."""
        for seq in self._groups.get(request_id, []):
            if not seq.is_finished:
                seq.finish_reason = "abort"
                self._aborted.append(seq)
                self._finish(seq)

    def has_work(self) -> bool:
        return self.scheduler.has_work() or bool(self._aborted)

    def check_integrity(self) -> None:
        """AssertionError where a KV block is lost, shared wrongly, or held by the dead."""
        tables = [seq.table for group in self._groups.values() for seq in group if seq.table]
        self.manager.check_integrity(tables)
        for seq in self.scheduler.running:
            assert 0 <= seq.num_cached < len(seq.tokens), f"{seq.id}: KV beyond the token log"

    def _check_prompt(self, request: Request) -> None:
        prompt, vocab_size = request.prompt_token_ids, self.spec.vocab_size
        if not prompt:
            raise RequestError("the prompt is empty: give at least one token")
        wrong = next((t for t in prompt if not 0 <= t < vocab_size), None)
        if wrong is not None:
            raise RequestError(
                f"prompt token id {wrong}: {self.spec.name} knows ids 0 to {vocab_size - 1}"
            )
        ids = request.speculation.prediction_token_ids or ()
        wrong = next((t for t in ids if not 0 <= t < vocab_size), None)
        if wrong is not None:
            raise RequestError(
                f"prediction token id {wrong}: {self.spec.name} knows ids 0 to {vocab_size - 1}"
            )
        if len(prompt) >= self.max_model_len:
            raise RequestError(
                f"the prompt has {len(prompt)} tokens; at most {self.max_model_len - 1} leave room "
                f"for an answer (max_model_len={self.max_model_len}): shorten it"
            )
        sampling = request.sampling
        if sampling.stop and not self.has_tokenizer:
            raise RequestError(f"stop={sampling.stop!r}: needs a tokenizer; use stop_token_ids")
        if sampling.bad_words and not request.bad_words_ids:
            raise RequestError(f"bad_words={sampling.bad_words!r}: needs a tokenizer")

    def _sequence(self, request: Request, index: int) -> Sequence:
        sampling = request.sampling
        self._num_arrived += 1
        return Sequence(
            id=f"{request.id}#{index}",
            request=request,
            index=index,
            tokens=list(request.prompt_token_ids),
            seed=fold(request.seed, index),
            arrival=self._num_arrived,
            arrived_s=self._now(),
            speculation=self.resolve(request.speculation, sampling),
            shaper=Shaper(
                sampling,
                vocab_size=self.spec.vocab_size,
                eos_token_ids=self.spec.eos_token_ids,
                bad_words_ids=request.bad_words_ids,
                num_prompt=len(request.prompt_token_ids),
            ),
            grammar=self._grammar(request),
        )

    def _grammar(self, request: Request) -> object:
        if not request.sampling.is_constrained:
            return None
        if self.grammars is None:
            raise RequestError("constrained output needs a tokenizer: this engine has none")
        return self.grammars.compile(request.sampling)

    def _fork_siblings(self, commits: list[Commit]) -> None:
        """Further completions start from the first one's prompt KV, once it is there."""
        if not self._unforked:
            return
        for commit in commits:
            seq = commit.seq
            if seq.id not in self._unforked or not (commit.tokens or commit.finish_reason):
                continue
            for sibling in self._unforked.pop(seq.id):
                if not self._fork(seq, sibling):
                    self.scheduler.add(sibling)

    def _fork(self, seq: Sequence, sibling: Sequence) -> bool:
        if len(self.scheduler.running) >= self.config.max_num_seqs:
            return False
        num_shared = seq.num_prompt - 1
        forked = self.manager.fork(seq.table, num_shared)
        if forked is None:
            return False
        sibling.table, copies = forked
        for copy in copies:
            self.runner.pool.copy_block(copy.source, copy.destination)
        sibling.num_cached = sibling.num_prefix_hits = num_shared
        return self.scheduler.adopt(sibling)

    def _release(self, commits: list[Commit]) -> None:
        for commit in commits:
            if commit.finish_reason is not None and not commit.seq.is_finished:
                self._finish(commit.seq)
                self._forget(commit.seq)

    def _finish(self, seq: Sequence) -> None:
        seq.status = Status.FINISHED
        self.drafters.close(seq)
        self.scheduler.release(seq)
        for sibling in self._unforked.pop(seq.id, []):
            if sibling.finish_reason is None:
                self.scheduler.add(sibling)

    def _forget(self, seq: Sequence) -> None:
        group = self._groups[seq.request.id]
        if all(member.is_finished for member in group):
            del self._groups[seq.request.id]

    def _farewells(self) -> list[Event]:
        """The last events of aborted sequences."""
        if not self._aborted:
            return []
        aborted, self._aborted = self._aborted, []
        events = self.streamer.verified([Commit(seq=s, finish_reason="abort") for s in aborted])
        for seq in aborted:
            if seq.request.id in self._groups:
                self._forget(seq)
        return events


def _exactness(name: str) -> str:
    return str(verifier(name).exactness.value)
