"""The cache under arbitrary traffic, against a model of what every slot contains.

The model writes into a slot the prefix whose KV it would hold: the tenant, the resets of the prefix
cache so far, and the tokens up to here. A block manager is right if whatever it says is cached
reads back as exactly the prefix asked for.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

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

from outrider.cache.prefix_tree import Node, PrefixTree
from outrider.cache.table import BlockCopy, BlockManager, BlockTable, Prefix

Content: TypeAlias = tuple[str, int, tuple[int, ...]]

SALTS = ("", "acme")
NOTHING: Content = ("nothing", -1, ())
# Two tokens, and prompts of zeros then ones: prefixes of different sequences often agree.
tokens_strategy = st.integers(0, 1)
prompts = st.builds(
    lambda zeros, ones: [0] * zeros + [1] * ones, st.integers(1, 10), st.integers(0, 6)
)
drafts_strategy = st.lists(tokens_strategy, max_size=5)


@dataclass(eq=False)
class Session:
    """What a sequence knows: its tokens, how many have KV, and where."""

    salt: str
    tokens: list[int]
    num_cached: int
    table: BlockTable
    num_resets: int

    def content(self, tokens: list[int]) -> Content:
        """What the slot of the last of `tokens` holds."""
        return self.salt, self.num_resets, tuple(tokens)


class CacheMachine(RuleBasedStateMachine):
    """Sequences come, speculate, fork, rewind, and go; blocks are always short."""

    manager_type = BlockManager

    @initialize(
        num_blocks=st.integers(4, 14), block_size=st.integers(1, 4), is_caching=st.integers(0, 5)
    )
    def start(self, num_blocks: int, block_size: int, is_caching: int) -> None:
        self.manager = self.manager_type(num_blocks, block_size, bool(is_caching))
        self.sessions: list[Session] = []
        self.contents: dict[int, Content] = {}
        self.num_resets = 0
        self.looks: list[tuple[str, list[int], Prefix]] = []

    @rule(salt=st.sampled_from(SALTS), prompt=prompts, is_chunked=st.booleans())
    @precondition(lambda self: len(self.sessions) < 3)
    def open(self, salt: str, prompt: list[int], is_chunked: bool) -> None:
        """A request comes and starts its prefill; where there is no room, the oldest one goes."""
        num_matched = self.manager.match(prompt, salt)
        prefix = self.manager.look(prompt, salt)
        assert self.manager.is_current(prefix)
        assert len(prefix.nodes) * self.manager.block_size == num_matched
        self.looks = [*self.looks[-3:], (salt, list(prompt), prefix)]
        can_open = self.manager.can_open(prefix, len(prompt))
        table, num_cached = self.manager.open(prompt, salt)
        session = Session(salt, prompt, num_cached, table, self.num_resets)
        self.sessions.append(session)
        assert num_cached == num_matched, f"matched {num_matched}, opened {num_cached}"
        assert num_cached < len(prompt), "the last token has to run"
        self.check_contents(session)
        assert self.manager.can_reserve(table, len(prompt)) == can_open, "can_open was wrong"
        if not can_open:
            self.free(self.sessions[0])
        if session in self.sessions:
            self.prefill(session, (len(prompt) - num_cached) // 2 if is_chunked else None)

    @rule(data=st.data(), drafts=drafts_strategy, bonus=tokens_strategy)
    @precondition(lambda self: self.sessions)
    def step(self, data: st.DataObject, drafts: list[int], bonus: int) -> None:
        """Runs all tokens that have no KV, and a chain of drafts; accepts some of them."""
        session = self.pick(data)
        num_accepted = data.draw(st.integers(0, len(drafts)), label="accepted")
        run = session.tokens + drafts
        if not self.prepare(session, len(run)):
            return
        for position in range(session.num_cached, len(run)):
            self.write(session, position, run[: position + 1])
        session.num_cached = len(session.tokens) + num_accepted
        session.tokens += [*drafts[:num_accepted], bonus]
        self.commit(session, run)

    @rule(data=st.data(), trunk=drafts_strategy, branch=drafts_strategy)
    @precondition(lambda self: self.sessions)
    def step_with_a_tree(self, data: st.DataObject, trunk: list[int], branch: list[int]) -> None:
        """Two branches below the root; the second is accepted and moved to where it belongs."""
        session = self.pick(data)
        root = len(session.tokens)
        if root - session.num_cached > 1 or not self.prepare(session, root + len(trunk + branch)):
            return
        self.write(session, root - 1, session.tokens)
        paths = [trunk[:depth] for depth in range(1, len(trunk) + 1)]
        paths += [branch[:depth] for depth in range(1, len(branch) + 1)]
        for position, path in enumerate(paths, root):
            self.write(session, position, session.tokens + path)
        run = session.tokens + trunk
        start = root + len(trunk)
        sources = session.table.slots(start, start + len(branch))
        self.copy(session, sources, root)
        session.tokens += [*branch, data.draw(tokens_strategy, label="bonus")]
        session.num_cached = len(session.tokens) - 1
        self.commit(session, run)

    @rule(data=st.data(), token=tokens_strategy)
    @precondition(lambda self: self.written() and len(self.sessions) < 4)
    def fork(self, data: st.DataObject, token: int) -> None:
        parent = self.pick(data, self.written())
        num_tokens = data.draw(st.integers(1, parent.num_cached), label="num_tokens")
        num_free = self.manager.num_free
        forked = self.manager.fork(parent.table, num_tokens)
        if forked is None:
            assert num_free == 0
            return
        table, copies = forked
        tokens = [*parent.tokens[:num_tokens], token]
        child = Session(parent.salt, tokens, num_tokens, table, parent.num_resets)
        self.sessions.append(child)
        self.copy_blocks(copies)

    @rule(data=st.data(), token=tokens_strategy)
    @precondition(lambda self: self.written())
    def rewind(self, data: st.DataObject, token: int) -> None:
        """The user edits an earlier turn."""
        session = self.pick(data, self.written())
        num_tokens = data.draw(st.integers(0, session.num_cached - 1), label="num_tokens")
        self.manager.truncate(session.table, num_tokens)
        session.tokens = [*session.tokens[:num_tokens], token]
        session.num_cached = num_tokens

    @rule(data=st.data())
    @precondition(lambda self: self.written())
    def give_back_spare_blocks(self, data: st.DataObject) -> None:
        session = self.pick(data)
        hashed = session.table.num_hashed
        self.manager.truncate(session.table, session.num_cached)
        assert session.table.num_hashed == hashed

    @rule(data=st.data())
    @precondition(lambda self: self.written())
    def preempt_and_resume(self, data: st.DataObject) -> None:
        """Nothing came in between, so all that was hashed must be found."""
        session = self.pick(data, self.written())
        is_known = session.num_resets == self.num_resets
        num_hashed = session.table.num_hashed if is_known else 0
        self.manager.free(session.table)
        session.table, session.num_cached = self.manager.open(session.tokens, session.salt)
        session.num_resets = self.num_resets
        full = (len(session.tokens) - 1) // self.manager.block_size
        num_expected = min(num_hashed, full) * self.manager.block_size
        assert session.num_cached >= num_expected, "a hashed prefix was not found"

    @rule(data=st.data())
    @precondition(lambda self: len(self.sessions) > 1)
    def finish(self, data: st.DataObject) -> None:
        self.free(self.pick(data))

    @rule()
    @precondition(lambda self: len(self.manager.tree) > 4 and self.num_resets == 0)
    def reset(self) -> None:
        self.num_resets += 1
        self.manager.reset_prefix_cache()
        assert len(self.manager.tree) == 0

    @invariant()
    def books_are_in_order(self) -> None:
        self.manager.check_integrity([session.table for session in self.sessions])
        held = {block for session in self.sessions for block in session.table.blocks}
        assert self.manager.num_used == len(held)

    @invariant()
    def a_look_is_current_while_another_would_find_the_same(self) -> None:
        for salt, prompt, prefix in getattr(self, "looks", []):
            is_same = self.manager.look(prompt, salt) == prefix
            assert self.manager.is_current(prefix) == is_same

    @invariant()
    def every_sequence_reads_its_own_prefix(self) -> None:
        for session in self.sessions:
            assert session.num_cached < len(session.tokens), "the last token has to run"
            self.check_contents(session)

    @invariant()
    def every_cached_block_holds_what_its_hash_says(self) -> None:
        size = self.manager.block_size
        for node in self.manager.tree:
            slots = range(node.block * size, (node.block + 1) * size)
            salt, num_resets, tokens = self.contents.get(slots[-1], NOTHING)
            name = self.chain_hash(salt, tokens)
            assert node.hash == name, f"block {node.block} has a wrong name"
            assert num_resets == self.num_resets, f"block {node.block} is older than the reset"
            for slot in slots[:-1]:
                expected = (salt, num_resets, tokens[: len(tokens) + slot - slots[-1]])
                assert self.contents.get(slot) == expected, f"slot {slot} has a wrong name"

    @invariant()
    def tenants_never_share(self) -> None:
        held = {salt: set[int]() for salt in SALTS}
        for session in self.sessions:
            held[session.salt].update(session.table.blocks)
        assert not held[""] & held["acme"]

    def teardown(self) -> None:
        """Nothing leaks: all blocks can be had once nobody holds them."""
        if not hasattr(self, "manager"):
            return
        for session in list(self.sessions):
            self.free(session)
        self.manager.check_integrity([])
        assert self.manager.num_free == self.manager.num_blocks
        self.manager.reset_prefix_cache()
        self.manager.check_integrity([])
        table, _ = self.manager.open([0])
        assert self.manager.reserve(table, self.manager.num_blocks * self.manager.block_size)
        assert sorted(table.blocks) == list(range(self.manager.num_blocks))

    def prefill(self, session: Session, num_tokens: int | None) -> None:
        """Runs the next `num_tokens` of the prompt, or all but the last one."""
        last = len(session.tokens) - 1
        stop = last if num_tokens is None else session.num_cached + num_tokens
        if self.prepare(session, stop):
            for position in range(session.num_cached, stop):
                self.write(session, position, session.tokens[: position + 1])
            session.num_cached = stop
            self.commit(session, session.tokens[:stop])

    def pick(self, data: st.DataObject, among: list[Session] | None = None) -> Session:
        return data.draw(st.sampled_from(among or self.sessions), label="session")

    def written(self) -> list[Session]:
        """Sessions with KV; the others have nothing to lose."""
        return [session for session in self.sessions if session.num_cached]

    def prepare(self, session: Session, num_tokens: int) -> bool:
        """Slots for all positions, writable from the first without KV; else the session goes."""
        can_reserve = self.manager.can_reserve(session.table, num_tokens)
        assert self.manager.reserve(session.table, num_tokens) == can_reserve
        copies = self.manager.make_writable(session.table, session.num_cached)
        if not can_reserve or copies is None:
            self.free(session)
            return False
        self.copy_blocks(copies)
        return True

    def free(self, session: Session) -> None:
        self.sessions.remove(session)
        self.manager.free(session.table)

    def commit(self, session: Session, run: list[int]) -> None:
        """After `run` went through the model and the session took from it what was accepted."""
        self.manager.commit(session.table, session.tokens, session.num_cached)

    def write(self, session: Session, position: int, tokens: list[int]) -> None:
        slot = session.table.slots(position, position + 1)[0]
        self.check_write(slot // self.manager.block_size)
        self.contents[slot] = session.content(tokens)

    def copy(self, session: Session, sources: list[int], start: int) -> None:
        read = [self.contents[slot] for slot in sources]
        for position, content in enumerate(read, start):
            self.write(session, position, list(content[-1]))

    def copy_blocks(self, copies: list[BlockCopy]) -> None:
        size = self.manager.block_size
        for source, destination in copies:
            self.check_write(destination)
            for offset in range(size):
                content = self.contents.get(source * size + offset, NOTHING)
                self.contents[destination * size + offset] = content

    def check_write(self, block: int) -> None:
        num_holders = sum(block in session.table.blocks for session in self.sessions)
        assert num_holders == 1, f"{num_holders} tables hold block {block}, which is written"
        assert self.manager.tree.node_of(block) is None, f"cached block {block} is written"

    def check_contents(self, session: Session) -> None:
        for position, slot in enumerate(session.table.slots(0, session.num_cached)):
            expected = session.content(session.tokens[: position + 1])
            found = self.contents.get(slot)
            assert found == expected, f"position {position} of {session.tokens} reads {found}"

    def chain_hash(self, salt: str, tokens: tuple[int, ...]) -> bytes:
        size = self.manager.block_size
        assert len(tokens) % size == 0, f"block ends at token {len(tokens)}: it has a wrong name"
        node = PrefixTree.root(salt)
        for start in range(0, len(tokens), size):
            digest = self.manager.tree.hash_below(node, tokens[start : start + size])
            node = Node(hash=digest, block=-1, depth=0)
        return node.hash


TestCache = CacheMachine.TestCase
TestCache.settings = settings(
    max_examples=80,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)


class HashesDrafts(CacheMachine):
    """Commits whatever was run, accepted or not."""

    def commit(self, session: Session, run: list[int]) -> None:
        self.manager.commit(session.table, run, len(run))


class HashesBonusTokens(CacheMachine):
    """Takes the last token's KV for granted; its slot still holds a rejected draft, or nothing."""

    def commit(self, session: Session, run: list[int]) -> None:
        num_slots = len(session.table.blocks) * self.manager.block_size
        num_cached = min(len(session.tokens), num_slots)
        self.manager.commit(session.table, session.tokens, num_cached)


class ForgetsCopies(CacheMachine):
    """Makes room to write but does not copy what stands before."""

    def copy_blocks(self, copies: list[BlockCopy]) -> None:
        pass


class OneTenant(BlockManager):
    """Forgets who asks."""

    def match(self, tokens: Sequence[int], salt: str = "") -> int:
        return super().match(tokens)

    def look(self, tokens: Sequence[int], salt: str = "") -> Prefix:
        return super().look(tokens)

    def open(self, tokens: Sequence[int], salt: str = "") -> tuple[BlockTable, int]:
        return super().open(tokens)


class WritesGuarded(BlockManager):
    """Never copies on write."""

    def make_writable(self, table: BlockTable, position: int) -> list[BlockCopy]:
        return []


class Leaks(BlockManager):
    """Loses the last block of what is given back."""

    def free(self, table: BlockTable) -> None:
        if len(table.blocks) > 1:
            table.cut(len(table.blocks) - 1)
        super().free(table)


class ParentsFirst(BlockManager):
    """Lets go of blocks in the wrong order."""

    def free(self, table: BlockTable) -> None:
        self._drop(table.cut(0)[::-1])
        super().free(table)


class KeepsVoidHashes(BlockManager):
    """Believes after a rewind that later blocks are still hashed."""

    def truncate(self, table: BlockTable, num_tokens: int) -> None:
        node = table.node
        super().truncate(table, num_tokens)
        table.node = node


class ForgetsResets(BlockManager):
    """Lets tables from before a reset register blocks."""

    def _registers(self, table: BlockTable) -> bool:
        return self.enable_prefix_caching


class FindsTooMuch(BlockManager):
    """Leaves nothing to run when the whole prompt is cached."""

    def _walk(self, root: Node, tokens: Sequence[int]) -> Iterator[Node]:
        return super()._walk(root, [*tokens, 0])


def mutate(manager: type[BlockManager]) -> type[CacheMachine]:
    return type(f"{manager.__name__}Machine", (CacheMachine,), {"manager_type": manager})


READS_WRONG = "position .* reads|has a wrong name"
HOLDS_WRONG = "hashed block .* is not block|are shared but not|is older than the reset"


@pytest.mark.parametrize(
    ("mutant", "text"),
    [
        (HashesDrafts, READS_WRONG),
        (HashesBonusTokens, READS_WRONG),
        (ForgetsCopies, READS_WRONG),
        (mutate(OneTenant), READS_WRONG),
        (mutate(WritesGuarded), "is written"),
        (mutate(Leaks), "references but . tables hold it"),
        (mutate(ParentsFirst), "would be evicted before its child|must be exactly one of"),
        (mutate(KeepsVoidHashes), HOLDS_WRONG),
        (mutate(ForgetsResets), HOLDS_WRONG),
        (mutate(FindsTooMuch), "the last token has to run"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_the_machine_catches(mutant: type[CacheMachine], text: str) -> None:
    hunt = settings(
        max_examples=1000,
        stateful_step_count=40,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    with pytest.raises(AssertionError, match=text):
        run_state_machine_as_test(mutant, settings=hunt)
