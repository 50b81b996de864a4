-- The session log, schema 1. Times are seconds of the log's clock; tokens are little-endian int32.

CREATE TABLE IF NOT EXISTS version (version INTEGER NOT NULL);
INSERT INTO version SELECT 1 WHERE NOT EXISTS (SELECT 1 FROM version);

CREATE TABLE IF NOT EXISTS session (
    id TEXT PRIMARY KEY,
    tenant TEXT NOT NULL,
    root TEXT NOT NULL,  -- the session that this one descends from by forks; it may be gone
    conversation TEXT,   -- the client's own name for it
    fingerprint TEXT NOT NULL,
    created REAL NOT NULL,
    ttl_s REAL,          -- NULL: kept until deleted
    expires_at REAL,
    settings TEXT NOT NULL,
    UNIQUE (tenant, conversation)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS session_in_order ON session (tenant, created, id);
CREATE INDEX IF NOT EXISTS session_of_root ON session (tenant, root);
CREATE INDEX IF NOT EXISTS session_by_expiry ON session (expires_at) WHERE expires_at IS NOT NULL;

-- A run of tokens, never changed once written. It outlives the session that wrote it as long as a
-- head or another segment stands on it, so it belongs to the tenant. `tokens` is the last column:
-- walking along parents then reads no tokens.
CREATE TABLE IF NOT EXISTS segment (
    id INTEGER PRIMARY KEY,
    tenant TEXT NOT NULL,
    parent INTEGER REFERENCES segment (id),
    start INTEGER NOT NULL,
    tokens BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS segment_of_parent ON segment (parent) WHERE parent IS NOT NULL;

-- What its owner says of a log from `stop` tokens on, which end in this segment: JSON.
CREATE TABLE IF NOT EXISTS note (
    segment INTEGER NOT NULL REFERENCES segment (id) ON DELETE CASCADE,
    stop INTEGER NOT NULL,
    json TEXT NOT NULL,
    PRIMARY KEY (segment, stop)
) WITHOUT ROWID;

-- A place in the tree of segments: `stop` tokens, the last of them in `segment` (NULL: no tokens).
-- A session is at its head of the highest `seq`.
CREATE TABLE IF NOT EXISTS head (
    id TEXT PRIMARY KEY,
    tenant TEXT NOT NULL,
    session TEXT NOT NULL REFERENCES session (id) ON DELETE CASCADE,
    segment INTEGER REFERENCES segment (id),
    stop INTEGER NOT NULL,
    seq INTEGER NOT NULL,
    response_id TEXT,
    UNIQUE (session, seq),
    UNIQUE (tenant, response_id)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS head_of_segment ON head (segment) WHERE segment IS NOT NULL;

-- A response in the making: durable, but no part of its session before it is committed.
CREATE TABLE IF NOT EXISTS turn (
    tenant TEXT NOT NULL,
    response_id TEXT NOT NULL,
    session TEXT NOT NULL REFERENCES session (id) ON DELETE CASCADE,
    head TEXT NOT NULL,
    request TEXT NOT NULL,
    tokens BLOB NOT NULL,
    PRIMARY KEY (tenant, response_id)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS turn_of_session ON turn (session);

CREATE TABLE IF NOT EXISTS stats (
    session TEXT NOT NULL REFERENCES session (id) ON DELETE CASCADE,
    drafter TEXT NOT NULL,
    json TEXT NOT NULL,
    PRIMARY KEY (session, drafter)
) WITHOUT ROWID;

-- What a tenant stores, kept by the triggers below: a quota is checked without counting.
CREATE TABLE IF NOT EXISTS usage (
    tenant TEXT PRIMARY KEY,
    tokens INTEGER NOT NULL DEFAULT 0,
    sessions INTEGER NOT NULL DEFAULT 0,
    heads INTEGER NOT NULL DEFAULT 0
) WITHOUT ROWID;

CREATE TRIGGER IF NOT EXISTS session_comes AFTER INSERT ON session BEGIN
    INSERT INTO usage (tenant) VALUES (new.tenant) ON CONFLICT DO NOTHING;
    UPDATE usage SET sessions = sessions + 1 WHERE tenant = new.tenant;
END;
CREATE TRIGGER IF NOT EXISTS session_goes AFTER DELETE ON session BEGIN
    UPDATE usage SET sessions = sessions - 1 WHERE tenant = old.tenant;
END;
CREATE TRIGGER IF NOT EXISTS head_comes AFTER INSERT ON head BEGIN
    UPDATE usage SET heads = heads + 1 WHERE tenant = new.tenant;
END;
CREATE TRIGGER IF NOT EXISTS head_goes AFTER DELETE ON head BEGIN
    UPDATE usage SET heads = heads - 1 WHERE tenant = old.tenant;
END;
CREATE TRIGGER IF NOT EXISTS segment_comes AFTER INSERT ON segment BEGIN
    UPDATE usage SET tokens = tokens + length(new.tokens) / 4 WHERE tenant = new.tenant;
END;
CREATE TRIGGER IF NOT EXISTS segment_goes AFTER DELETE ON segment BEGIN
    UPDATE usage SET tokens = tokens - length(old.tokens) / 4 WHERE tenant = old.tenant;
END;
CREATE TRIGGER IF NOT EXISTS turn_comes AFTER INSERT ON turn BEGIN
    UPDATE usage SET tokens = tokens + length(new.tokens) / 4 WHERE tenant = new.tenant;
END;
CREATE TRIGGER IF NOT EXISTS turn_grows AFTER UPDATE OF tokens ON turn BEGIN
    UPDATE usage SET tokens = tokens + (length(new.tokens) - length(old.tokens)) / 4
    WHERE tenant = new.tenant;
END;
CREATE TRIGGER IF NOT EXISTS turn_goes AFTER DELETE ON turn BEGIN
    UPDATE usage SET tokens = tokens - length(old.tokens) / 4 WHERE tenant = old.tenant;
END;
