//! Tokens and the audit log, as rows.

use everlit_api::auth::{AuditEntry, AuditView, TokenView};
use everlit_api::time::Timestamp;
use serde_json::json;
use sqlx::sqlite::SqliteRow;
use sqlx::{Row, SqliteConnection};

use super::write::text;
use super::{Batch, Store, StoreError};
use crate::config::AUDIT_KEPT;

/// A token as it is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenRow {
    /// All but the secret.
    pub view: TokenView,
    /// sha256 of the secret.
    pub hash: [u8; 32],
}

/// So long after its end a token is still listed.
pub const TOKEN_KEPT_MS: u64 = 90 * 24 * 3_600 * 1_000;

pub(super) fn decode(error: impl std::error::Error + Send + Sync + 'static) -> sqlx::Error {
    sqlx::Error::Decode(Box::new(error))
}

fn token_row(row: &SqliteRow) -> Result<TokenRow, sqlx::Error> {
    let hash: Vec<u8> = row.try_get(1)?;
    let (role, created_at, expires_at): (String, i64, i64) = (row.try_get(3)?, row.try_get(4)?, row.try_get(6)?);
    let revoked_at: Option<i64> = row.try_get(7)?;
    let view = TokenView {
        id: row.try_get(0)?,
        user: row.try_get(2)?,
        role: role.parse().map_err(|bad: String| decode(std::io::Error::other(bad)))?,
        created_at: Timestamp(created_at as u64),
        created_by: row.try_get(5)?,
        expires_at: Timestamp(expires_at as u64),
        revoked_at: revoked_at.map(|at| Timestamp(at as u64)),
    };
    Ok(TokenRow { view, hash: hash.try_into().map_err(|_| decode(std::io::Error::other("a hash of another length")))? })
}

fn audit_row(row: &SqliteRow) -> Result<AuditView, sqlx::Error> {
    let (seq, time, body): (i64, i64, String) = (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
    let entry: AuditEntry = serde_json::from_str(&body).map_err(decode)?;
    Ok(AuditView { seq: seq as u64, time: Timestamp(time as u64), entry })
}

impl Store {
    /// Every token that is not long over.
    pub async fn tokens(&self) -> Result<Vec<TokenRow>, StoreError> {
        let rows = sqlx::query("SELECT id, hash, user, role, created_at, created_by, expires_at, revoked_at FROM tokens");
        let rows = rows.fetch_all(&self.readers).await?;
        Ok(rows.iter().map(token_row).collect::<Result<_, _>>()?)
    }

    /// A page of the audit log, newest first.
    pub async fn audit(&self, before: Option<u64>, user: Option<&str>, limit: u32) -> Result<Vec<AuditView>, StoreError> {
        let before = before.map_or(i64::MAX, |seq| i64::try_from(seq).unwrap_or(i64::MAX));
        let rows = match user {
            None => sqlx::query("SELECT seq, time, body FROM audit WHERE seq < ? ORDER BY seq DESC LIMIT ?").bind(before),
            Some(user) => sqlx::query("SELECT seq, time, body FROM audit WHERE user = ? AND seq < ? ORDER BY seq DESC LIMIT ?")
                .bind(user.to_string())
                .bind(before),
        };
        let rows = rows.bind(limit).fetch_all(&self.readers).await?;
        Ok(rows.iter().map(audit_row).collect::<Result<_, _>>()?)
    }

    /// Forgets lines of the audit log from before a time, and tokens that were over long before `now`.
    pub async fn forget_doors(&self, audit_before: Timestamp, now: Timestamp) -> Result<(), StoreError> {
        sqlx::query("DELETE FROM audit WHERE time < min(?, (SELECT max(time) FROM audit) - ?)")
            .bind(audit_before.0 as i64)
            .bind(AUDIT_KEPT.0 as i64)
            .execute(&self.writer)
            .await?;
        let old = now.0.saturating_sub(TOKEN_KEPT_MS) as i64;
        sqlx::query("DELETE FROM tokens WHERE min(expires_at, coalesce(revoked_at, expires_at)) < ?")
            .bind(old)
            .execute(&self.writer)
            .await?;
        Ok(())
    }
}

/// Tokens as they are now, and new lines of the audit log.
pub(super) async fn write(tx: &mut SqliteConnection, batch: &Batch) -> Result<(), StoreError> {
    for TokenRow { view, hash } in &batch.tokens {
        sqlx::query(
            "INSERT INTO tokens (id, hash, user, role, created_at, created_by, expires_at, revoked_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?)
             ON CONFLICT (id) DO UPDATE SET revoked_at = excluded.revoked_at",
        )
        .bind(&view.id)
        .bind(&hash[..])
        .bind(&view.user)
        .bind(view.role.as_str())
        .bind(view.created_at.0 as i64)
        .bind(&view.created_by)
        .bind(view.expires_at.0 as i64)
        .bind(view.revoked_at.map(|at| at.0 as i64))
        .execute(&mut *tx)
        .await?;
    }
    if !batch.audit.is_empty() {
        let row = |(at, entry): &(Timestamp, AuditEntry)| Ok(json!([at.0, entry.user, text(entry)?]));
        let rows = batch.audit.iter().map(row).collect::<Result<Vec<_>, StoreError>>()?;
        sqlx::query("INSERT INTO audit (time, user, body) SELECT value->>0, value->>1, value->>2 FROM json_each(?)")
            .bind(text(&rows)?)
            .execute(&mut *tx)
            .await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use everlit_api::auth::Role;

    use super::*;

    const DAY_MS: u64 = 24 * 3_600 * 1_000;

    fn entry(user: Option<&str>, target: &str) -> AuditEntry {
        AuditEntry {
            user: user.map(Into::into),
            role: Some(Role::User),
            token: None,
            address: Some("10.0.0.7".into()),
            operation: "stop_job".into(),
            target: target.into(),
            allowed: true,
            request_id: "r".into(),
        }
    }

    fn batch(tokens: Vec<TokenRow>, audit: Vec<(Timestamp, AuditEntry)>) -> Batch {
        let mut batch = Batch::default();
        (batch.tokens, batch.audit) = (tokens, audit);
        batch
    }

    async fn store() -> (tempfile::TempDir, Store) {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).await.unwrap();
        (dir, store)
    }

    #[tokio::test]
    async fn the_audit_log_is_append_only_and_forgets_only_what_is_old() {
        let (_dir, store) = store().await;
        let lines = [(1, entry(Some("a"), "/old")), (40 * DAY_MS, entry(Some("a"), "/a")), (60 * DAY_MS, entry(None, "/b"))];
        let audit = lines.map(|(at, entry)| (Timestamp(at), entry)).to_vec();
        store.commit(&batch(Vec::new(), audit)).await.unwrap();
        let targets = |lines: Vec<AuditView>| lines.into_iter().map(|line| (line.seq, line.entry.target)).collect::<Vec<_>>();
        let line = |seq, target: &str| (seq, target.to_string());
        assert_eq!(targets(store.audit(None, None, 2).await.unwrap()), [line(3, "/b"), line(2, "/a")]);
        assert_eq!(targets(store.audit(Some(2), None, 9).await.unwrap()), [line(1, "/old")]);
        assert_eq!(targets(store.audit(None, Some("a"), 9).await.unwrap()), [line(2, "/a"), line(1, "/old")]);
        assert_eq!(store.audit(None, Some("a"), 1).await.unwrap()[0].entry, entry(Some("a"), "/a"));
        let replace = "INSERT OR REPLACE INTO audit (seq, time, body) VALUES (3, 1, '{}')";
        for forbidden in ["UPDATE audit SET body = '{}'", "DELETE FROM audit", "DELETE FROM audit WHERE seq = 3", replace] {
            let refused = sqlx::query(forbidden).execute(&store.writer).await.expect_err(forbidden).to_string();
            assert!(refused.contains("the audit log"), "{refused}");
        }
        // Asked for more than may go: what may goes, and nothing else is held up by it.
        store.forget_doors(Timestamp(50 * DAY_MS), Timestamp(90 * DAY_MS)).await.unwrap();
        assert_eq!(targets(store.audit(None, None, 9).await.unwrap()), [line(3, "/b"), line(2, "/a")]);
        store.close().await;
    }

    #[tokio::test]
    async fn tokens_are_kept_with_their_hash_and_go_long_after_their_end() {
        let (_dir, store) = store().await;
        let row = |id: &str, expires_at| TokenRow {
            view: TokenView {
                id: id.into(),
                user: "a".into(),
                role: Role::Operator,
                created_at: Timestamp(1),
                created_by: Some("b".into()),
                expires_at: Timestamp(expires_at),
                revoked_at: None,
            },
            hash: [7; 32],
        };
        let (short, long) = (row("000000000001", 5), row("000000000002", 400 * DAY_MS));
        store.commit(&batch(vec![short.clone(), long.clone()], Vec::new())).await.unwrap();
        assert_eq!(store.tokens().await.unwrap(), [short, long.clone()]);
        let mut revoked = long.clone();
        revoked.view.revoked_at = Some(Timestamp(200 * DAY_MS));
        store.commit(&batch(vec![revoked.clone()], Vec::new())).await.unwrap();
        store.forget_doors(Timestamp(0), Timestamp(100 * DAY_MS)).await.unwrap();
        assert_eq!(store.tokens().await.unwrap(), [revoked]);
        store.forget_doors(Timestamp(0), Timestamp(300 * DAY_MS)).await.unwrap();
        assert_eq!(store.tokens().await.unwrap(), []);
        store.close().await;
    }
}
