"""The session log under arbitrary traffic, against lists of tokens and a mark-and-sweep model.

In the model a head simply has its tokens; the parts that it stands on are kept beside them to know
what is stored: each part once, as long as something stands on it.
"""

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings, strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from outrider.errors import QuotaExceeded, SessionConflict, SessionNotFound
from outrider.session import ledger, segments
from outrider.session.ledger import Ledger
from outrider.session.log import SessionLog
from outrider.session.records import Head, Quota

TENANTS = ("acme", "bell")
LIMIT = 30
runs = st.lists(st.integers(0, 2**31 - 1), max_size=6)


@dataclass(eq=False)
class Part:
    """Tokens behind some of another part's."""

    parent: "Part | None"
    start: int
    tokens: list[int]


@dataclass(eq=False)
class Place:
    """A head, or a turn that is to become one."""

    id: str
    part: Part | None
    tokens: list[int]
    response_id: str | None = None


@dataclass(eq=False)
class Branch:
    """A session."""

    id: str
    tenant: str
    ttl_s: float | None
    expires_at: float
    heads: list[Place] = field(default_factory=list)
    turns: list[tuple[Place, list[int]]] = field(default_factory=list)


def part_at(part: Part | None, num_tokens: int) -> Part | None:
    """The part in which the last of the first `num_tokens` tokens is."""
    while part and part.start >= num_tokens:
        part = part.parent
    return part


def way(part: Part | None) -> set[Part]:
    found = set()
    while part:
        found.add(part)
        part = part.parent
    return found


class LogMachine(RuleBasedStateMachine):
    """Sessions of two tenants are made, grow, fork, rewind, expire and go; the log is reopened."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.now = 0.0
        self.branches: list[Branch] = []
        self.num_responses = 0
        self.open()

    @initialize()
    def begin(self) -> None:
        self.create("acme", [1, 2], None)
        self.create("bell", [3, 4], 3.0)

    def open(self) -> None:
        path = Path(self.folder.name) / "log.db"
        self.log = SessionLog(path, lambda: self.now, quota=Quota(tokens=LIMIT))

    def teardown(self) -> None:
        self.log.close()
        self.folder.cleanup()

    @property
    def living(self) -> list[Branch]:
        """Those that have not expired; one in which a response is being made does not."""
        return [branch for branch in self.branches if branch.expires_at > self.now or branch.turns]

    def pick(self, data: st.DataObject) -> tuple[Branch, Place]:
        """A session that has not expired, and one of its heads; most often its last."""
        branch = data.draw(st.sampled_from(self.living), label="session")
        return branch, data.draw(st.sampled_from([branch.heads[-1], *branch.heads]), label="head")

    def stored(self, tenant: str, branches: list[Branch] | None = None) -> int:
        """Tokens stored: each part on which a head stands once, and all turns."""
        parts: set[Part] = set()
        num_made = 0
        for branch in self.branches if branches is None else branches:
            if branch.tenant == tenant:
                parts = parts.union(*(way(head.part) for head in branch.heads))
                num_made += sum(len(tokens) for _, tokens in branch.turns)
        return num_made + sum(len(part.tokens) for part in parts)

    def attempt(self, tenant: str, num_more: int, call: Callable[[], object]) -> object | None:
        """What the call returns; None if it is over the quota, and then it has to be refused.

        What has expired does not count.
        """
        if num_more and self.stored(tenant, self.living) + num_more > LIMIT:
            with pytest.raises(QuotaExceeded):
                call()
            return None
        return call()

    def respond(self) -> str:
        self.num_responses += 1
        return f"r{self.num_responses}"

    def settle(self, branch: Branch, head: object, place: Place, tokens: list[int]) -> None:
        """Enters a head behind `place` in the model."""
        assert isinstance(head, Head)
        part = Part(place.part, len(place.tokens), tokens) if tokens else place.part
        branch.heads.append(Place(head.id, part, place.tokens + tokens, head.response_id))

    def split(self, parent: Branch, session: str, place: Place, head: str) -> Branch:
        """Enters a fork in the model."""
        expires_at = self.now + parent.ttl_s if parent.ttl_s else float("inf")
        fork = Branch(session, parent.tenant, parent.ttl_s, expires_at)
        fork.heads.append(Place(head, place.part, place.tokens))
        self.branches.append(fork)
        return fork

    def touch(self, branch: Branch) -> None:
        branch.expires_at = self.now + branch.ttl_s if branch.ttl_s else float("inf")

    @rule(tenant=st.sampled_from(TENANTS), tokens=runs, ttl_s=st.sampled_from([None, None, 3.0]))
    @precondition(lambda self: len(self.branches) < 6)
    def create(self, tenant: str, tokens: list[int], ttl_s: float | None) -> None:
        create = self.attempt(
            tenant, len(tokens), lambda: self.log.create(tenant, "fp", tokens, ttl_s=ttl_s)
        )
        if isinstance(create, Head):
            branch = Branch(create.session, tenant, ttl_s, 0.0)
            self.touch(branch)
            self.settle(branch, create, Place("", None, []), tokens)
            self.branches.append(branch)

    @rule(data=st.data(), tokens=runs, forks=st.booleans())
    @precondition(lambda self: self.living)
    def append(self, data: st.DataObject, tokens: list[int], forks: bool) -> None:
        branch, place = self.pick(data)
        is_stale = place is not branch.heads[-1]

        def call() -> Head:
            return self.log.append(
                branch.tenant,
                branch.id,
                tokens,
                if_head=place.id,
                on_conflict="fork" if forks else "error",
                response_id=response_id,
            )

        response_id = self.respond()
        if is_stale and not forks:
            with pytest.raises(SessionConflict) as caught:
                call()
            assert caught.value.head == branch.heads[-1].id
            return
        head = self.attempt(branch.tenant, len(tokens), call)
        if isinstance(head, Head):
            assert (head.session != branch.id) == is_stale
            self.touch(branch)
            target = branch
            if is_stale:
                first = self.log.heads(branch.tenant, head.session)[0]
                target = self.split(branch, head.session, place, first.id)
            self.settle(target, head, place, tokens)

    @rule(data=st.data(), n=st.integers(1, 2), by_number=st.booleans())
    @precondition(lambda self: 0 < len(self.living) < 6)
    def fork(self, data: st.DataObject, n: int, by_number: bool) -> None:
        branch, place, at = self.pick_place(data, by_number)
        for head in self.log.fork(branch.tenant, branch.id, at, n):
            self.split(branch, head.session, place, head.id)
        self.touch(branch)

    @rule(data=st.data(), drop=st.booleans(), by_number=st.booleans())
    @precondition(lambda self: self.living)
    def rewind(self, data: st.DataObject, drop: bool, by_number: bool) -> None:
        branch, place, at = self.pick_place(data, by_number)
        head = self.log.rewind(branch.tenant, branch.id, at, drop)
        self.touch(branch)
        self.settle(branch, head, place, [])
        if drop:
            kept = way(place.part) | {None}
            branch.heads = [
                head
                for head in branch.heads
                if head.part in kept and place.tokens[: len(head.tokens)] == head.tokens
            ]

    def pick_place(self, data: st.DataObject, by_number: bool) -> tuple[Branch, Place, str | int]:
        branch, place = self.pick(data)
        if not by_number:
            return branch, place, place.id
        last = branch.heads[-1]
        number = data.draw(st.integers(0, len(last.tokens)), label="tokens")
        return branch, Place("", part_at(last.part, number), last.tokens[:number]), number

    @rule(data=st.data(), tokens=runs)
    @precondition(lambda self: self.living)
    def begin_turn(self, data: st.DataObject, tokens: list[int]) -> None:
        branch, _ = self.pick(data)
        response_id = self.respond()
        begun = self.attempt(
            branch.tenant,
            len(tokens),
            lambda: self.log.turns.begin(branch.tenant, branch.id, tokens, response_id=response_id),
        )
        if begun:
            base = branch.heads[-1]
            branch.turns.append((Place(base.id, base.part, base.tokens, response_id), tokens))
            self.touch(branch)

    @rule(data=st.data(), tokens=runs, end=st.sampled_from(["commit", "abort"]))
    @precondition(lambda self: any(branch.turns for branch in self.living))
    def go_on_with_turn(self, data: st.DataObject, tokens: list[int], end: str) -> None:
        busy = [branch for branch in self.living if branch.turns]
        branch = data.draw(st.sampled_from(busy), label="session")
        base, made = data.draw(st.sampled_from(branch.turns), label="turn")
        tenant, name = branch.tenant, str(base.response_id)
        turns = self.log.turns
        if end == "abort":
            turns.abort(tenant, name)
            branch.turns.remove((base, made))
        elif base.id != branch.heads[-1].id:
            with pytest.raises(SessionConflict):
                turns.commit(tenant, name, tokens)
        else:
            head = self.attempt(tenant, len(tokens), lambda: turns.commit(tenant, name, tokens))
            if head:
                branch.turns.remove((base, made))
                self.settle(branch, head, base, made + tokens)
                self.touch(branch)

    @rule(data=st.data())
    @precondition(lambda self: self.living)
    def delete(self, data: st.DataObject) -> None:
        branch, _ = self.pick(data)
        self.log.delete(branch.tenant, branch.id)
        self.branches.remove(branch)

    @rule(seconds=st.sampled_from([0.5, 1.5, 3.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def expire(self) -> None:
        gone = {branch.id for branch in self.branches if branch not in self.living}
        assert set(self.log.expire(self.now)) == gone
        self.branches = self.living

    @rule()
    def reopen(self) -> None:
        self.log.close()
        self.open()

    @invariant()
    def every_head_has_its_tokens(self) -> None:
        for branch in self.living:
            heads = self.log.heads(branch.tenant, branch.id)
            assert [(head.id, head.response_id) for head in heads] == [
                (head.id, head.response_id) for head in branch.heads
            ]
            for head in branch.heads:
                assert self.log.tokens(branch.tenant, head.id).tolist() == head.tokens
            assert self.log.get(branch.tenant, branch.id).head == heads[-1]
            assert [head.seq for head in heads] == sorted({head.seq for head in heads})

    @invariant()
    def each_token_is_stored_once_and_no_longer_than_needed(self) -> None:
        for tenant in TENANTS:
            mine = [branch for branch in self.branches if branch.tenant == tenant]
            assert self.log.usage(tenant) == (
                self.stored(tenant),
                len(mine),
                sum(len(branch.heads) for branch in mine),
            )

    @invariant()
    def tenants_see_their_own(self) -> None:
        for tenant, other in zip(TENANTS, reversed(TENANTS), strict=True):
            seen = {session.id for session in self.log.list(tenant).sessions}
            assert seen == {branch.id for branch in self.living if branch.tenant == tenant}
            for session in seen:
                with pytest.raises(SessionNotFound):
                    self.log.get(other, session)

    @invariant()
    def turns_wait(self) -> None:
        waiting = {turn.response_id: turn.tokens.tolist() for turn in self.log.turns.unfinished()}
        turns = [turn for branch in self.branches for turn in branch.turns]
        assert waiting == {base.response_id: tokens for base, tokens in turns}


class LogInMemory(LogMachine):
    """The same without a disk."""

    def open(self) -> None:
        self.log = SessionLog(":memory:", lambda: self.now, quota=Quota(tokens=LIMIT))

    @rule()
    def reopen(self) -> None:
        pass


def machine_settings(
    num_examples: int, phases: Iterable[Phase] = tuple(Phase), derandomize: bool = False
) -> settings:
    return settings(
        max_examples=num_examples,
        stateful_step_count=25,
        derandomize=derandomize,
        database=None,
        deadline=None,
        phases=phases,
        suppress_health_check=list(HealthCheck),
    )


TestLog = LogMachine.TestCase
TestLog.settings = machine_settings(30)


def forget_children(db: object, segment: int) -> bool:
    """A segment is needed only by heads: what forks stand on goes."""
    query = "SELECT EXISTS (SELECT 1 FROM head WHERE segment = ?)"
    return bool(db.execute(query, (segment,)).fetchone()[0])  # type: ignore[attr-defined]


def keep_all(db: object, parts: Iterable[int | None]) -> None:
    """Nothing is ever freed."""


def whole_segments(db: object, place: segments.Place) -> dict[int | None, int]:
    """A drop that looks at segments and not at where the way leaves them."""
    return dict.fromkeys(PARTS(db, place), 2**31)  # type: ignore[arg-type]


def never_touch(self: Ledger, session: object) -> None:
    """The time to live counts from the creation."""


PARTS = segments.parts
MUTANTS = {
    "prunes what children stand on": (segments, "_is_needed", forget_children),
    "leaks": (segments, "prune", keep_all),
    "drops too little": (segments, "parts", whole_segments),
    "ages": (Ledger, "touch", never_touch),
    "reads of all tenants": (
        ledger,
        "SESSION",
        ledger.SESSION.replace("session.tenant = :tenant", "(session.tenant = :tenant OR 1)"),
    ),
    "reads whole segments": (
        segments,
        "PATH",
        segments.PATH.replace("segment.start, path.start", "segment.start, 1000000"),
    ),
    "finds what has expired": (
        ledger,
        "SESSION",
        ledger.SESSION.replace("expires_at > :now", "expires_at > 0"),
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_the_machine_finds(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It fails on logs that are wrong in one thing."""
    monkeypatch.setattr(*MUTANTS[name])
    plan = machine_settings(200, [Phase.generate], derandomize=True)
    with pytest.raises((Exception, pytest.fail.Exception)):
        run_state_machine_as_test(LogInMemory, settings=plan)
