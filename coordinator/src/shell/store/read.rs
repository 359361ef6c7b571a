//! Reading: pages by key, never a whole table, except of what is active at start.

use everlit_api::ids::{JobId, NodeId};
use everlit_api::status::{AttemptView, EventView, JobState, MetricPoint};
use everlit_api::time::Timestamp;
use sqlx::sqlite::SqliteRow;
use sqlx::{QueryBuilder, Row, Sqlite};

use super::{Store, StoreError, job_id};
use crate::engine::{StoredJob, StoredNode};

/// Which jobs of a list.
#[derive(Debug, Clone, Default)]
pub struct JobFilter {
    /// Only ids below this.
    pub before: Option<JobId>,
    /// Empty means all.
    pub states: Vec<JobState>,
    /// Only this name.
    pub name: Option<String>,
    /// Only with all these labels.
    pub labels: Vec<(String, String)>,
    /// Finished before this.
    pub finished_before: Option<Timestamp>,
    /// Only of this user.
    pub user: Option<String>,
}

/// An event with its number.
#[derive(Debug, Clone)]
pub struct StoredEvent {
    /// Position in the sequence.
    pub seq: u64,
    /// The event.
    pub view: EventView,
}

fn stored_job(row: &SqliteRow) -> Result<StoredJob, sqlx::Error> {
    let id: String = row.try_get(0)?;
    Ok(StoredJob {
        id: job_id(&id)?,
        spec: row.try_get(1)?,
        body: row.try_get(2)?,
        ranks: row.try_get(3)?,
        series: row.try_get(4)?,
        listing: row.try_get(5)?,
    })
}

fn stored_event(row: &SqliteRow) -> Result<StoredEvent, sqlx::Error> {
    let (seq, job, time): (i64, Option<String>, i64) = (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
    let data: String = row.try_get(5)?;
    let view = EventView {
        id: seq.to_string(),
        job_id: job.map(|id| job_id(&id)).transpose()?,
        time: Timestamp(time as u64),
        event: row.try_get(3)?,
        reason: row.try_get(4)?,
        data: serde_json::from_str(&data).unwrap_or_default(),
    };
    Ok(StoredEvent { seq: seq as u64, view })
}

impl Store {
    /// Every job that is not final, oldest first.
    pub async fn active_jobs(&self) -> Result<Vec<StoredJob>, StoreError> {
        let rows = sqlx::query("SELECT job_id, spec, body, ranks, series, listing FROM jobs WHERE finished_at IS NULL ORDER BY job_id")
            .fetch_all(&self.readers)
            .await?;
        Ok(rows.iter().map(stored_job).collect::<Result<_, _>>()?)
    }

    /// Jobs that have ended since a time, and had not all of their logs in their stores then; newest first.
    pub async fn jobs_to_archive(&self, since: Timestamp, limit: u32) -> Result<Vec<StoredJob>, StoreError> {
        let rows = sqlx::query(
            "SELECT job_id, spec, body, ranks, NULL, NULL FROM jobs WHERE finished_at >= ? AND json_extract(body, '$.archiving') IS NOT NULL \
             ORDER BY job_id DESC LIMIT ?",
        );
        let rows = rows.bind(since.0 as i64).bind(limit).fetch_all(&self.readers).await?;
        Ok(rows.iter().map(stored_job).collect::<Result<_, _>>()?)
    }

    /// Every node that has a row.
    pub async fn nodes(&self) -> Result<Vec<StoredNode>, StoreError> {
        let rows = sqlx::query("SELECT node, cordoned, blames FROM nodes").fetch_all(&self.readers).await?;
        let read = |row: &SqliteRow| Ok(StoredNode { id: NodeId(row.try_get(0)?), cordoned: row.try_get(1)?, blames: row.try_get(2)? });
        Ok(rows.iter().map(read).collect::<Result<_, sqlx::Error>>()?)
    }

    /// One job.
    pub async fn job(&self, id: JobId) -> Result<Option<StoredJob>, StoreError> {
        let row = sqlx::query("SELECT job_id, spec, body, ranks, NULL, NULL FROM jobs WHERE job_id = ?");
        let row = row.bind(id.to_string()).fetch_optional(&self.readers).await?;
        Ok(row.as_ref().map(stored_job).transpose()?)
    }

    /// A final job's time series.
    pub async fn series(&self, id: JobId) -> Result<Vec<MetricPoint>, StoreError> {
        let row = sqlx::query("SELECT series FROM jobs WHERE job_id = ?").bind(id.to_string()).fetch_optional(&self.readers).await?;
        let text: Option<String> = row.map(|row| row.try_get(0)).transpose()?.flatten();
        Ok(text.and_then(|text| serde_json::from_str(&text).ok()).unwrap_or_default())
    }

    /// A page of jobs, newest first.
    pub async fn jobs(&self, filter: &JobFilter, limit: u32) -> Result<Vec<StoredJob>, StoreError> {
        let mut query = QueryBuilder::<Sqlite>::new("SELECT job_id, spec, body, ranks, NULL, NULL FROM jobs WHERE TRUE");
        if let Some(before) = filter.before {
            query.push(" AND job_id < ").push_bind(before.to_string());
        }
        if !filter.states.is_empty() {
            query.push(" AND state IN (");
            let mut states = query.separated(", ");
            for state in &filter.states {
                states.push_bind(state.as_str());
            }
            query.push(")");
        }
        if let Some(name) = &filter.name {
            query.push(" AND name = ").push_bind(name.clone());
        }
        if let Some(user) = &filter.user {
            query.push(" AND user = ").push_bind(user.clone());
        }
        if let Some(time) = filter.finished_before {
            query.push(" AND finished_at < ").push_bind(time.0 as i64);
        }
        for (key, value) in &filter.labels {
            query.push(" AND EXISTS (SELECT 1 FROM json_each(spec, '$.labels') AS l WHERE l.key = ").push_bind(key.clone());
            query.push(" AND l.value = ").push_bind(value.clone()).push(")");
        }
        query.push(" ORDER BY job_id DESC LIMIT ").push_bind(limit);
        let rows = query.build().fetch_all(&self.readers).await?;
        Ok(rows.iter().map(stored_job).collect::<Result<_, _>>()?)
    }

    /// Events after a number, oldest first.
    pub async fn events(&self, job: Option<JobId>, after: u64, limit: u32) -> Result<Vec<StoredEvent>, StoreError> {
        let rows = match job {
            None => sqlx::query("SELECT seq, job_id, time, event, reason, data FROM events WHERE seq > ? ORDER BY seq LIMIT ?")
                .bind(after as i64),
            Some(job) => {
                sqlx::query("SELECT seq, job_id, time, event, reason, data FROM events WHERE job_id = ? AND seq > ? ORDER BY seq LIMIT ?")
                    .bind(job.to_string())
                    .bind(after as i64)
            }
        };
        let rows = rows.bind(limit).fetch_all(&self.readers).await?;
        Ok(rows.iter().map(stored_event).collect::<Result<_, _>>()?)
    }

    /// A job's attempts, oldest first.
    pub async fn attempts(&self, job: JobId) -> Result<Vec<AttemptView>, StoreError> {
        let rows = sqlx::query("SELECT body FROM attempts WHERE job_id = ? ORDER BY attempt")
            .bind(job.to_string())
            .fetch_all(&self.readers)
            .await?;
        let read = |row: &SqliteRow| {
            let text: String = row.try_get(0)?;
            serde_json::from_str(&text).map_err(|e| sqlx::Error::Decode(Box::new(e)))
        };
        Ok(rows.iter().map(read).collect::<Result<_, _>>()?)
    }

    /// What a key was used for: hash of the body, and the job.
    pub async fn idempotency(&self, key: &str) -> Result<Option<(Vec<u8>, JobId)>, StoreError> {
        let row = sqlx::query("SELECT body_hash, job_id FROM idempotency WHERE key = ?").bind(key).fetch_optional(&self.readers).await?;
        let read = |row: SqliteRow| {
            let id: String = row.try_get(1)?;
            Ok::<_, sqlx::Error>((row.try_get(0)?, job_id(&id)?))
        };
        Ok(row.map(read).transpose()?)
    }

    /// Files that a node still has to remove.
    pub async fn removals(&self) -> Result<Vec<(JobId, NodeId)>, StoreError> {
        let rows = sqlx::query("SELECT job_id, node FROM removals").fetch_all(&self.readers).await?;
        let read = |row: &SqliteRow| {
            let id: String = row.try_get(0)?;
            Ok((job_id(&id)?, NodeId(row.try_get(1)?)))
        };
        Ok(rows.iter().map(read).collect::<Result<_, sqlx::Error>>()?)
    }

    /// Jobs by state; reads an index once, at start.
    pub async fn count_states(&self) -> Result<Vec<(JobState, u64)>, StoreError> {
        let rows = sqlx::query("SELECT state, count(*) FROM jobs GROUP BY state").fetch_all(&self.readers).await?;
        let read = |row: &SqliteRow| {
            let (state, count): (String, i64) = (row.try_get(0)?, row.try_get(1)?);
            Ok::<_, sqlx::Error>(JobState::from_name(&state).map(|state| (state, count as u64)))
        };
        Ok(rows.iter().filter_map(|row| read(row).transpose()).collect::<Result<_, _>>()?)
    }

    /// Where the sequences go on: the last event's number, the newest time of any transaction, the last job's id.
    pub async fn last(&self) -> Result<(u64, Timestamp, Option<JobId>), StoreError> {
        let event = sqlx::query("SELECT seq, time FROM events ORDER BY seq DESC LIMIT 1").fetch_optional(&self.readers).await?;
        let job = sqlx::query("SELECT job_id FROM jobs ORDER BY job_id DESC LIMIT 1").fetch_optional(&self.readers).await?;
        let (seq, time): (i64, i64) =
            event.map(|row| Ok::<_, sqlx::Error>((row.try_get(0)?, row.try_get(1)?))).transpose()?.unwrap_or_default();
        let job = job.map(|row| job_id(&row.try_get::<String, _>(0)?)).transpose()?;
        // Of a data folder from before the table `clock`, the last event is what there is.
        let clock = sqlx::query("SELECT time FROM clock").fetch_optional(&self.readers).await?;
        let clock: i64 = clock.map(|row| row.try_get(0)).transpose()?.unwrap_or_default();
        Ok((seq as u64, Timestamp(time.max(clock) as u64), job))
    }

    /// Answers when the database does.
    pub async fn ping(&self) -> Result<(), StoreError> {
        sqlx::query("SELECT 1").fetch_one(&self.readers).await?;
        Ok(())
    }
}
