//! Join tokens and the nodes that joined, as rows.

use everlit_api::ids::NodeId;
use everlit_api::join::NodeTokenView;
use everlit_api::time::Timestamp;
use sqlx::sqlite::SqliteRow;
use sqlx::{Row, SqliteConnection};

use super::doors::decode;
use super::{Batch, Store, StoreError, TOKEN_KEPT_MS};

/// A join token as it is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JoinTokenRow {
    /// All but the secret.
    pub view: NodeTokenView,
    /// sha256 of the secret.
    pub hash: [u8; 32],
}

/// A node that joined.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemberRow {
    /// Its name.
    pub node: NodeId,
    /// sha256 of the public key that its newest certificate is for.
    pub key: [u8; 32],
    /// sha256 of its newest certificate.
    pub certificate: [u8; 32],
    /// sha256 of the one before, which opens as much: the newest may not have reached it.
    pub previous: Option<[u8; 32]>,
    /// When the newest ends.
    pub expires_at: Timestamp,
    /// When it joined.
    pub joined_at: Timestamp,
    /// With which token.
    pub token: String,
    /// It has connected since.
    pub linked: bool,
    /// When it was expelled.
    pub expelled_at: Option<Timestamp>,
}

fn time(at: i64) -> Timestamp {
    Timestamp(at as u64)
}

fn sum(row: &SqliteRow, at: usize) -> Result<[u8; 32], sqlx::Error> {
    let bytes: Vec<u8> = row.try_get(at)?;
    bytes.try_into().map_err(|_| decode(std::io::Error::other("a hash of another length")))
}

fn token_row(row: &SqliteRow) -> Result<JoinTokenRow, sqlx::Error> {
    let (node, revoked_at): (Option<String>, Option<i64>) = (row.try_get(7)?, row.try_get(8)?);
    let view = NodeTokenView {
        id: row.try_get(0)?,
        created_at: time(row.try_get(2)?),
        created_by: row.try_get(3)?,
        expires_at: time(row.try_get(4)?),
        uses: row.try_get(5)?,
        used: row.try_get(6)?,
        node: node.map(NodeId),
        revoked_at: revoked_at.map(time),
    };
    Ok(JoinTokenRow { view, hash: sum(row, 1)? })
}

fn member_row(row: &SqliteRow) -> Result<MemberRow, sqlx::Error> {
    let has_previous = row.try_get::<Option<Vec<u8>>, _>(3)?.is_some();
    let expelled_at: Option<i64> = row.try_get(8)?;
    Ok(MemberRow {
        node: NodeId(row.try_get(0)?),
        key: sum(row, 1)?,
        certificate: sum(row, 2)?,
        previous: has_previous.then(|| sum(row, 3)).transpose()?,
        expires_at: time(row.try_get(4)?),
        joined_at: time(row.try_get(5)?),
        token: row.try_get(6)?,
        linked: row.try_get(7)?,
        expelled_at: expelled_at.map(time),
    })
}

impl Store {
    /// Every join token that is not long over.
    pub async fn join_tokens(&self) -> Result<Vec<JoinTokenRow>, StoreError> {
        let rows = sqlx::query("SELECT id, hash, created_at, created_by, expires_at, uses, used, node, revoked_at FROM join_tokens");
        Ok(rows.fetch_all(&self.readers).await?.iter().map(token_row).collect::<Result<_, _>>()?)
    }

    /// Every node that joined, expelled ones too.
    pub async fn members(&self) -> Result<Vec<MemberRow>, StoreError> {
        let rows = sqlx::query("SELECT node, key, certificate, previous, expires_at, joined_at, token, linked, expelled_at FROM members");
        Ok(rows.fetch_all(&self.readers).await?.iter().map(member_row).collect::<Result<_, _>>()?)
    }

    /// Forgets join tokens that were over long before `now`.
    pub async fn forget_join_tokens(&self, now: Timestamp) -> Result<(), StoreError> {
        let old = now.0.saturating_sub(TOKEN_KEPT_MS) as i64;
        let over = sqlx::query("DELETE FROM join_tokens WHERE min(expires_at, coalesce(revoked_at, expires_at)) < ?").bind(old);
        over.execute(&self.writer).await?;
        Ok(())
    }
}

/// Join tokens and members as they are now.
pub(super) async fn write(tx: &mut SqliteConnection, batch: &Batch) -> Result<(), StoreError> {
    for JoinTokenRow { view, hash } in &batch.join_tokens {
        sqlx::query(
            "INSERT INTO join_tokens (id, hash, created_at, created_by, expires_at, uses, used, node, revoked_at)
             VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)
             ON CONFLICT (id) DO UPDATE SET used = max(used, excluded.used), revoked_at = coalesce(revoked_at, excluded.revoked_at)",
        )
        .bind(&view.id)
        .bind(&hash[..])
        .bind(view.created_at.0 as i64)
        .bind(&view.created_by)
        .bind(view.expires_at.0 as i64)
        .bind(view.uses)
        .bind(view.used)
        .bind(view.node.as_ref().map(|node| &node.0))
        .bind(view.revoked_at.map(|at| at.0 as i64))
        .execute(&mut *tx)
        .await?;
    }
    for row in &batch.members {
        sqlx::query(
            "INSERT OR REPLACE INTO members (node, key, certificate, previous, expires_at, joined_at, token, linked, expelled_at)
             VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        )
        .bind(&row.node.0)
        .bind(&row.key[..])
        .bind(&row.certificate[..])
        .bind(row.previous.as_ref().map(|sum| &sum[..]))
        .bind(row.expires_at.0 as i64)
        .bind(row.joined_at.0 as i64)
        .bind(&row.token)
        .bind(row.linked)
        .bind(row.expelled_at.map(|at| at.0 as i64))
        .execute(&mut *tx)
        .await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn tokens_and_members_are_read_back_as_they_are_now() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).await.unwrap();
        let view = NodeTokenView {
            id: "00112233aabb".into(),
            created_at: Timestamp(1),
            created_by: Some("ada".into()),
            expires_at: Timestamp(50),
            uses: 3,
            used: 0,
            node: Some(NodeId("gpu-1".into())),
            revoked_at: None,
        };
        let token = JoinTokenRow { view, hash: [7; 32] };
        let member = MemberRow {
            node: NodeId("gpu-1".into()),
            key: [1; 32],
            certificate: [2; 32],
            previous: None,
            expires_at: Timestamp(9),
            joined_at: Timestamp(3),
            token: "00112233aabb".into(),
            linked: false,
            expelled_at: None,
        };
        let batch = |token: &JoinTokenRow, member: &MemberRow| {
            let mut batch = Batch::default();
            (batch.join_tokens, batch.members) = (vec![token.clone()], vec![member.clone()]);
            assert!(!batch.is_empty());
            batch
        };
        store.commit(&batch(&token, &member)).await.unwrap();
        assert_eq!((store.join_tokens().await.unwrap(), store.members().await.unwrap()), (vec![token.clone()], vec![member.clone()]));
        let mut used = token.clone();
        (used.view.used, used.view.revoked_at) = (2, Some(Timestamp(4)));
        let renewed = MemberRow { previous: Some([2; 32]), certificate: [3; 32], linked: true, expelled_at: Some(Timestamp(8)), ..member };
        store.commit(&batch(&used, &renewed)).await.unwrap();
        assert_eq!((store.join_tokens().await.unwrap(), store.members().await.unwrap()), (vec![used.clone()], vec![renewed.clone()]));
        // Written late, it takes back neither a use nor an end.
        store.commit(&batch(&token, &renewed)).await.unwrap();
        assert_eq!(store.join_tokens().await.unwrap(), vec![used]);
        store.forget_join_tokens(Timestamp(TOKEN_KEPT_MS + 3)).await.unwrap();
        assert_eq!(store.join_tokens().await.unwrap().len(), 1);
        store.forget_join_tokens(Timestamp(TOKEN_KEPT_MS + 5)).await.unwrap();
        assert_eq!(store.join_tokens().await.unwrap(), []);
        store.close().await;
    }
}
