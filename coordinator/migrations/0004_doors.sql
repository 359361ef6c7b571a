-- Whose token submitted a job; null without one.
ALTER TABLE jobs ADD COLUMN user TEXT;
CREATE INDEX jobs_by_user ON jobs (user, job_id) WHERE user IS NOT NULL;

-- Tokens: sha256 of the secret, never the secret.
CREATE TABLE tokens (
    id         TEXT PRIMARY KEY,
    hash       BLOB NOT NULL,
    user       TEXT NOT NULL,
    role       TEXT NOT NULL,
    created_at INTEGER NOT NULL,
    created_by TEXT,
    expires_at INTEGER NOT NULL,
    revoked_at INTEGER
) WITHOUT ROWID;

-- What was asked for, by whom. Append-only: nothing is changed, and nothing of the last thirty days is removed.
CREATE TABLE audit (
    seq  INTEGER PRIMARY KEY AUTOINCREMENT,
    time INTEGER NOT NULL,
    user TEXT,
    body TEXT NOT NULL
);
CREATE INDEX audit_by_user ON audit (user, seq) WHERE user IS NOT NULL;
CREATE INDEX audit_by_time ON audit (time);
CREATE TRIGGER audit_is_not_changed BEFORE UPDATE ON audit
BEGIN
    SELECT raise(ABORT, 'the audit log is append-only');
END;
CREATE TRIGGER audit_is_not_replaced BEFORE INSERT ON audit
WHEN EXISTS (SELECT 1 FROM audit WHERE seq = NEW.seq)
BEGIN
    SELECT raise(ABORT, 'the audit log is append-only');
END;
CREATE TRIGGER audit_is_kept BEFORE DELETE ON audit
WHEN OLD.time > (SELECT max(time) FROM audit) - 2592000000
BEGIN
    SELECT raise(ABORT, 'the audit log keeps thirty days at least');
END;
