"""Ways: which logs a session alone stands on, against lists of tokens."""

import random

from outrider.session.log import SessionLog

A = "acme"


def test_a_way_ends_where_no_other_session_goes() -> None:
    log = SessionLog(":memory:", lambda: 0.0)
    head = log.append(A, log.create(A, "fp", [1, 2, 3]).session, [4, 5, 6])
    assert log.ways(A, head.session) == ((log.tokens(A, head), 0),)
    (fork,) = log.fork(A, head.session, 5)
    log.append(A, fork.session, [9])
    assert log.ways(A, head.session) == ((log.tokens(A, head), 5),)
    assert [(w.tokens.tolist(), w.num_shared) for w in log.ways(A, fork.session)] == [
        ([1, 2, 3, 4, 5, 9], 5)
    ]


def test_a_rewound_session_has_a_way_for_each_branch() -> None:
    log = SessionLog(":memory:", lambda: 0.0)
    head = log.append(A, log.create(A, "fp", [1, 2]).session, [3, 4])
    log.rewind(A, head.session, 2)
    log.append(A, head.session, [7])
    ways = {tuple(way.tokens): way.num_shared for way in log.ways(A, head.session)}
    assert ways == {(1, 2, 3, 4): 0, (1, 2, 7): 0}
    kept = {tuple(way.tokens): way.num_shared for way in log.ways(A, head.session, keep=3)}
    assert kept == {(1, 2, 3, 4): 2, (1, 2, 7): 3}


def test_one_that_expired_still_has_ways_and_is_nobody_elses() -> None:
    now = [0.0]
    log = SessionLog(":memory:", lambda: now[0])
    head = log.create(A, "fp", [1, 2], ttl_s=1)
    (fork,) = log.fork(A, head.session)
    now[0] = 1.0
    assert log.expired(1.0) == tuple(sorted([(A, head.session), (A, fork.session)]))
    for each in (head, fork):
        assert [way.num_shared for way in log.ways(A, each.session)] == [0]


def test_ways_of_random_trees() -> None:
    """Each token is new, so logs share what their lists share."""
    for seed in range(40):
        rng, tokens = random.Random(seed), iter(range(10_000))
        log = SessionLog(":memory:", lambda: 0.0)
        sessions = [log.create(A, "fp", [next(tokens), next(tokens)]).session]
        for _ in range(14):
            name = rng.choice(sessions)
            length = log.get(A, name).head.num_tokens
            match rng.randrange(4):
                case 0:
                    (fork,) = log.fork(A, name, rng.randint(0, length))
                    sessions.append(fork.session)
                case 1:
                    log.rewind(A, name, rng.randint(0, length), drop=rng.random() < 0.3)
                case _:
                    log.append(A, name, [next(tokens) for _ in range(rng.randint(1, 3))])
        for name in sessions:
            own = logs_of(log, name)
            others = [text for other in sessions if other != name for text in logs_of(log, other)]
            expected = {
                text: max((num_common(text, other) for other in others), default=0)
                for text in own
                if not any(other != text and other[: len(text)] == text for other in own)
            }
            assert {tuple(w.tokens): w.num_shared for w in log.ways(A, name)} == expected


def logs_of(log: SessionLog, session: str) -> set[tuple[int, ...]]:
    return {tuple(log.tokens(A, head)) for head in log.heads(A, session)}


def num_common(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
