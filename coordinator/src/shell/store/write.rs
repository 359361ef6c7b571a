//! Writing: one transaction per batch, one statement per table whatever the number of rows (they travel as one JSON text).

use std::collections::BTreeMap;

use everlit_api::auth::AuditEntry;
use everlit_api::ids::{JobId, NodeId};
use everlit_api::status::AttemptView;
use everlit_api::time::Timestamp;
use serde_json::json;
use sqlx::{Connection, SqliteConnection};

use super::doors::{self, TokenRow};
use super::members::{self, JoinTokenRow, MemberRow};
use super::{Store, StoreError};
use crate::engine::{EventRow, Held, JobRow, Record};

/// A used `Idempotency-Key`.
#[derive(Debug, Clone)]
pub struct Idempotency {
    /// The key.
    pub key: String,
    /// sha256 of the body.
    pub body_hash: [u8; 32],
    /// What it made.
    pub job: JobId,
    /// When.
    pub at: Timestamp,
}

/// Many steps' records as one transaction. Of each job only the newest row is kept.
#[derive(Debug, Default)]
pub struct Batch {
    /// The engine's time at its newest step.
    at: Timestamp,
    jobs: BTreeMap<JobId, JobRow>,
    /// With their numbers.
    pub events: Vec<(u64, EventRow)>,
    attempts: BTreeMap<(JobId, u32), AttemptView>,
    cordons: BTreeMap<NodeId, bool>,
    blames: BTreeMap<NodeId, Held>,
    /// Nodes that were expelled.
    forgotten: Vec<NodeId>,
    /// Keys used by jobs of this batch.
    pub idempotency: Vec<Idempotency>,
    removed: BTreeMap<JobId, Vec<NodeId>>,
    /// Files that a node says are gone.
    pub cleared: Vec<(JobId, NodeId)>,
    /// Tokens as they are now.
    pub tokens: Vec<TokenRow>,
    /// Join tokens as they are now.
    pub join_tokens: Vec<JoinTokenRow>,
    /// Nodes that joined, as they are now.
    pub members: Vec<MemberRow>,
    /// New lines of the audit log.
    pub audit: Vec<(Timestamp, AuditEntry)>,
}

impl Batch {
    /// Nothing to write.
    pub fn is_empty(&self) -> bool {
        self.jobs.is_empty()
            && self.events.is_empty()
            && self.attempts.is_empty()
            && self.cordons.is_empty()
            && self.blames.is_empty()
            && self.idempotency.is_empty()
            && self.removed.is_empty()
            && self.cleared.is_empty()
            && self.tokens.is_empty()
            && self.join_tokens.is_empty()
            && self.members.is_empty()
            && self.forgotten.is_empty()
            && self.audit.is_empty()
    }

    /// Adds the record of a step at `now`; events are numbered by the caller.
    pub fn add(&mut self, now: Timestamp, record: Record, mut number: impl FnMut() -> u64) {
        self.at = self.at.max(now);
        for mut row in record.jobs {
            let before = self.jobs.remove(&row.id);
            if let Some(before) = before {
                row.spec = row.spec.or(before.spec);
                row.series = row.series.or(before.series);
                row.user = row.user.or(before.user);
                row.listing = row.listing.or(before.listing);
            }
            self.jobs.insert(row.id, row);
        }
        self.events.extend(record.events.into_iter().map(|e| (number(), e)));
        self.attempts.extend(record.attempts.into_iter().map(|(job, view)| ((job, view.attempt), view)));
        self.cordons.extend(record.cordons);
        self.blames.extend(record.blames);
        for node in record.forgotten {
            self.cordons.remove(&node);
            self.blames.remove(&node);
            self.forgotten.push(node);
        }
    }

    /// A job goes with everything that is known of it; its nodes are to remove its files.
    pub fn remove(&mut self, job: JobId, nodes: Vec<NodeId>) {
        self.jobs.remove(&job);
        self.attempts.retain(|(id, _), _| *id != job);
        self.removed.insert(job, nodes);
    }
}

impl Store {
    pub(super) async fn try_commit(&self, batch: &Batch) -> Result<(), StoreError> {
        let mut connection = self.writer.acquire().await?;
        let written = write(&mut connection, batch).await;
        if written.is_err() {
            // SQLite may have rolled back by itself (a full disk), and then the connection's count of open transactions is wrong for good:
            // the next one would be a part of none, and be lost without an error. A new connection begins at nothing.
            let _ = connection.close().await;
        }
        written
    }

    /// Forgets keys that are older than a day.
    pub async fn forget_keys(&self, now: Timestamp) -> Result<(), StoreError> {
        let day = 24 * 3_600 * 1_000;
        sqlx::query("DELETE FROM idempotency WHERE created_at < ?").bind(now.0.saturating_sub(day) as i64).execute(&self.writer).await?;
        Ok(())
    }
}

async fn write(connection: &mut SqliteConnection, batch: &Batch) -> Result<(), StoreError> {
    let mut tx = connection.begin().await?;
    write_jobs(&mut tx, batch).await?;
    write_history(&mut tx, batch).await?;
    write_rest(&mut tx, batch).await?;
    doors::write(&mut tx, batch).await?;
    members::write(&mut tx, batch).await?;
    sqlx::query("INSERT INTO clock (id, time) VALUES (0, ?) ON CONFLICT (id) DO UPDATE SET time = max(time, excluded.time)")
        .bind(batch.at.0 as i64)
        .execute(&mut *tx)
        .await?;
    tx.commit().await?;
    Ok(())
}

async fn write_jobs(tx: &mut SqliteConnection, batch: &Batch) -> Result<(), StoreError> {
    let (fresh, known): (Vec<_>, Vec<_>) = batch.jobs.values().partition(|row| row.spec.is_some());
    if !fresh.is_empty() {
        let rows: Vec<_> = fresh.iter().map(|row| job_json(row)).collect();
        sqlx::query(
            "INSERT INTO jobs (job_id, state, finished_at, body, ranks, series, spec, name, user, listing)
             SELECT value->>0, value->>1, value->>2, value->>3, value->>4, value->>5, value->>6, value->>7, value->>8, value->>9 FROM json_each(?)",
        )
        .bind(text(&rows)?)
        .execute(&mut *tx)
        .await?;
    }
    if !known.is_empty() {
        let rows: Vec<_> = known.iter().map(|row| job_json(row)).collect();
        sqlx::query(
            "UPDATE jobs SET state = v.value->>1, finished_at = v.value->>2, body = v.value->>3, ranks = v.value->>4,
             series = coalesce(v.value->>5, series), listing = coalesce(v.value->>9, listing)
             FROM json_each(?) AS v WHERE jobs.job_id = v.value->>0",
        )
        .bind(text(&rows)?)
        .execute(&mut *tx)
        .await?;
    }
    Ok(())
}

/// Events and attempts.
async fn write_history(tx: &mut SqliteConnection, batch: &Batch) -> Result<(), StoreError> {
    if !batch.events.is_empty() {
        let row = |(seq, e): &(u64, EventRow)| {
            json!([seq, e.job.filter(|job| !batch.removed.contains_key(job)), e.time.0, e.event, e.reason, e.data.to_string()])
        };
        let rows: Vec<_> = batch.events.iter().map(row).collect();
        sqlx::query(
            "INSERT INTO events (seq, job_id, time, event, reason, data)
             SELECT value->>0, value->>1, value->>2, value->>3, value->>4, value->>5 FROM json_each(?)",
        )
        .bind(text(&rows)?)
        .execute(&mut *tx)
        .await?;
    }
    if !batch.attempts.is_empty() {
        let row = |((job, attempt), view): (&(JobId, u32), &AttemptView)| Ok(json!([job, attempt, text(view)?]));
        let rows = batch.attempts.iter().map(row).collect::<Result<Vec<_>, StoreError>>()?;
        sqlx::query("INSERT OR REPLACE INTO attempts (job_id, attempt, body) SELECT value->>0, value->>1, value->>2 FROM json_each(?)")
            .bind(text(&rows)?)
            .execute(&mut *tx)
            .await?;
    }
    Ok(())
}

/// Nodes, keys, and what is removed.
async fn write_rest(tx: &mut SqliteConnection, batch: &Batch) -> Result<(), StoreError> {
    // First: a node of the same name may have come since.
    for node in &batch.forgotten {
        sqlx::query("DELETE FROM nodes WHERE node = ?").bind(&node.0).execute(&mut *tx).await?;
    }
    for (node, cordoned) in &batch.cordons {
        sqlx::query("INSERT INTO nodes (node, cordoned) VALUES (?, ?) ON CONFLICT (node) DO UPDATE SET cordoned = excluded.cordoned")
            .bind(&node.0)
            .bind(cordoned)
            .execute(&mut *tx)
            .await?;
    }
    for (node, blames) in &batch.blames {
        sqlx::query(
            "INSERT INTO nodes (node, cordoned, blames) VALUES (?, 0, ?) ON CONFLICT (node) DO UPDATE SET blames = excluded.blames",
        )
        .bind(&node.0)
        .bind(text(blames)?)
        .execute(&mut *tx)
        .await?;
    }
    for used in &batch.idempotency {
        sqlx::query("INSERT OR IGNORE INTO idempotency (key, body_hash, job_id, created_at) VALUES (?, ?, ?, ?)")
            .bind(&used.key)
            .bind(&used.body_hash[..])
            .bind(used.job.to_string())
            .bind(used.at.0 as i64)
            .execute(&mut *tx)
            .await?;
    }
    if !batch.removed.is_empty() {
        let ids = text(&batch.removed.keys().collect::<Vec<_>>())?;
        let pairs: Vec<_> = batch.removed.iter().flat_map(|(job, nodes)| nodes.iter().map(move |node| json!([job, node]))).collect();
        sqlx::query("DELETE FROM jobs WHERE job_id IN (SELECT value FROM json_each(?))").bind(&ids).execute(&mut *tx).await?;
        sqlx::query("DELETE FROM attempts WHERE job_id IN (SELECT value FROM json_each(?))").bind(&ids).execute(&mut *tx).await?;
        sqlx::query("DELETE FROM idempotency WHERE job_id IN (SELECT value FROM json_each(?))").bind(&ids).execute(&mut *tx).await?;
        sqlx::query("DELETE FROM events WHERE job_id IN (SELECT value FROM json_each(?))").bind(&ids).execute(&mut *tx).await?;
        sqlx::query("INSERT OR IGNORE INTO removals (job_id, node) SELECT value->>0, value->>1 FROM json_each(?)")
            .bind(text(&pairs)?)
            .execute(&mut *tx)
            .await?;
    }
    for (job, node) in &batch.cleared {
        sqlx::query("DELETE FROM removals WHERE job_id = ? AND node = ?").bind(job.to_string()).bind(&node.0).execute(&mut *tx).await?;
    }
    Ok(())
}

fn job_json(row: &JobRow) -> serde_json::Value {
    let spec = row.spec.as_ref().and_then(|spec| serde_json::to_string(&**spec).ok());
    let name = row.spec.as_ref().and_then(|spec| spec.name.clone());
    json!([row.id, row.state.as_str(), row.finished_at.map(|t| t.0), row.body, row.ranks, row.series, spec, name, row.user, row.listing])
}

pub(super) fn text<T: serde::Serialize>(value: &T) -> Result<String, StoreError> {
    serde_json::to_string(value).map_err(|e| StoreError::Database(sqlx::Error::Encode(Box::new(e))))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use everlit_api::job::JobSpec;
    use everlit_api::status::JobState;

    use super::*;

    fn row(fresh: bool, series: Option<&str>) -> Record {
        let (id, state) = (JobId::from_u128(1), JobState::Running);
        let spec = fresh.then(|| Arc::new(JobSpec::default_for(1)));
        let series = series.map(Into::into);
        let row = JobRow {
            id,
            state,
            finished_at: None,
            spec,
            user: None,
            body: "{}".into(),
            listing: series.clone(),
            ranks: None,
            series,
            delete: false,
        };
        Record { jobs: vec![row], ..Record::default() }
    }

    #[tokio::test]
    async fn what_is_held_against_a_node_and_its_cordon_do_not_overwrite_each_other() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).await.unwrap();
        let node = |name: &str| NodeId(name.into());
        let blame = crate::engine::Blame { at: Timestamp(5), job: JobId::from_u128(1), cause: everlit_api::rank::Cause::Stuck };
        let held = |blames: &[crate::engine::Blame]| Held { node: blames.to_vec(), gpus: Vec::new() };
        let mut seen = Vec::new();
        for record in [
            Record { blames: vec![(node("a"), held(&[blame]))], ..Record::default() },
            Record { cordons: vec![(node("a"), true), (node("b"), true)], ..Record::default() },
            Record { blames: vec![(node("b"), held(&[blame])), (node("a"), held(&[]))], ..Record::default() },
        ] {
            let mut batch = Batch::default();
            batch.add(Timestamp(7), record, || 0);
            assert!(!batch.is_empty());
            store.commit(&batch).await.unwrap();
            let rows = store.nodes().await.unwrap();
            seen.push(rows.iter().map(|row| (row.id.0.clone(), row.cordoned, row.blames.clone())).collect::<Vec<_>>());
        }
        let one = serde_json::to_string(&[blame]).unwrap();
        assert_eq!(seen[0], [("a".to_string(), false, Some(one.clone()))]);
        assert_eq!(seen[1], [("a".to_string(), true, Some(one.clone())), ("b".to_string(), true, None)]);
        assert_eq!(seen[2], [("a".to_string(), true, Some("[]".to_string())), ("b".to_string(), true, Some(one))]);
        store.close().await;
    }

    #[tokio::test]
    async fn a_series_stays_until_a_newer_one_is_written() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).await.unwrap();
        for (rows, kept) in [
            (vec![row(true, None)], None),
            // Many steps of one job in one transaction: what any of them wrote stays.
            (vec![row(false, Some("[1]")), row(false, None)], Some("[1]")),
            (vec![row(false, None)], Some("[1]")),
            (vec![row(false, Some("[2]"))], Some("[2]")),
        ] {
            let mut batch = Batch::default();
            rows.into_iter().for_each(|record| batch.add(Timestamp(7), record, || 0));
            store.commit(&batch).await.unwrap();
            let job = &store.active_jobs().await.unwrap()[0];
            assert_eq!((job.series.as_deref(), job.listing.as_deref()), (kept, kept));
        }
        let mut older = Batch::default();
        older.add(Timestamp(5), row(false, None), || 0);
        store.commit(&older).await.unwrap();
        assert_eq!(store.last().await.unwrap().1, Timestamp(7), "rows without an event count too, and time never goes back");
        store.close().await;
    }
}
