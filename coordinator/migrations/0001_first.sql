-- Everything durable of a coordinator. Times are milliseconds since 1970. JSON columns carry a version inside where they may change.
CREATE TABLE jobs (
    job_id      TEXT PRIMARY KEY,
    state       TEXT NOT NULL,
    name        TEXT,
    finished_at INTEGER,
    spec        TEXT NOT NULL,
    body        TEXT NOT NULL,
    ranks       TEXT,
    series      TEXT
);
CREATE INDEX jobs_by_state ON jobs (state, job_id);
CREATE INDEX jobs_finished ON jobs (finished_at) WHERE finished_at IS NOT NULL;
CREATE INDEX jobs_by_name ON jobs (name, job_id) WHERE name IS NOT NULL;

CREATE TABLE events (
    seq    INTEGER PRIMARY KEY,
    job_id TEXT,
    time   INTEGER NOT NULL,
    event  TEXT NOT NULL,
    reason TEXT NOT NULL,
    data   TEXT NOT NULL
);
CREATE INDEX events_by_job ON events (job_id, seq);

CREATE TABLE attempts (
    job_id  TEXT NOT NULL,
    attempt INTEGER NOT NULL,
    body    TEXT NOT NULL,
    PRIMARY KEY (job_id, attempt)
) WITHOUT ROWID;

CREATE TABLE nodes (
    node     TEXT PRIMARY KEY,
    cordoned INTEGER NOT NULL
) WITHOUT ROWID;

CREATE TABLE idempotency (
    key        TEXT PRIMARY KEY,
    body_hash  BLOB NOT NULL,
    job_id     TEXT NOT NULL,
    created_at INTEGER NOT NULL
) WITHOUT ROWID;

-- Jobs that are gone here and whose files a node still has to remove.
CREATE TABLE removals (
    job_id TEXT NOT NULL,
    node   TEXT NOT NULL,
    PRIMARY KEY (job_id, node)
) WITHOUT ROWID;
