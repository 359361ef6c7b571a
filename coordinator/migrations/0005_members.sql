-- Tokens that servers join with: sha256 of the secret, never the secret.
CREATE TABLE join_tokens (
    id         TEXT PRIMARY KEY,
    hash       BLOB NOT NULL,
    created_at INTEGER NOT NULL,
    created_by TEXT,
    expires_at INTEGER NOT NULL,
    uses       INTEGER NOT NULL,
    used       INTEGER NOT NULL,
    node       TEXT,
    revoked_at INTEGER
) WITHOUT ROWID;

-- Nodes that joined: sha256 of the key and of the certificates that open the agents' doors for them.
CREATE TABLE members (
    node        TEXT PRIMARY KEY,
    key         BLOB NOT NULL,
    certificate BLOB NOT NULL,
    previous    BLOB,
    expires_at  INTEGER NOT NULL,
    joined_at   INTEGER NOT NULL,
    token       TEXT NOT NULL,
    linked      INTEGER NOT NULL,
    expelled_at INTEGER
) WITHOUT ROWID;
