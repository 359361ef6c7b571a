//! What must survive: SQLite in WAL mode with full sync, one writer. A transaction per batch, a statement per table.
//!
//! The engine's word is law here; this file decides nothing. Its one trap: a full disk. A ballast file is given up then, so that jobs can
//! still be stopped and deleted, and [`Store::is_low`] tells the doors to take no more jobs until there is room again.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use everlit_api::ids::JobId;
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqlitePoolOptions, SqliteSynchronous};

mod doors;
mod members;
mod read;
mod write;

pub use doors::{TOKEN_KEPT_MS, TokenRow};
pub use members::{JoinTokenRow, MemberRow};
pub use read::{JobFilter, StoredEvent};
pub use write::{Batch, Idempotency};

/// What is in the data folder; another number is refused.
const DATA_VERSION: &str = "everlit-data 1";
/// Given up when the disk is full.
const BALLAST_NAME: &str = "ballast";
const BALLAST_BYTES: u64 = 32 * 1024 * 1024;
/// Free space at which new jobs are taken again.
const ROOM_BYTES: u64 = 3 * BALLAST_BYTES;

/// Why the store can not be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The data folder is of another version, or not ours.
    #[error("{0}")]
    Refused(String),
    /// The disk is full even without the ballast.
    #[error("the disk of the data folder is full")]
    Full,
    /// Anything else that the database says.
    #[error("the store failed: {0}")]
    Database(#[from] sqlx::Error),
    /// A file beside the database.
    #[error("{0}: {1}")]
    File(PathBuf, std::io::Error),
}

/// The database and the ballast beside it.
#[derive(Debug)]
pub struct Store {
    writer: SqlitePool,
    readers: SqlitePool,
    dir: PathBuf,
    low: AtomicBool,
}

impl Store {
    /// Opens or makes the store of a data folder, and brings its tables up to date.
    pub async fn open(dir: &Path) -> Result<Self, StoreError> {
        check_version(dir)?;
        let file = dir.join("everlit.db");
        make_private(&file)?;
        let options = SqliteConnectOptions::new()
            .filename(&file)
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full)
            .busy_timeout(Duration::from_secs(5))
            .pragma("cache_size", "-4096")
            .pragma("wal_autocheckpoint", "2000");
        let writer = SqlitePoolOptions::new().max_connections(1).idle_timeout(None).max_lifetime(None);
        let damaged = |e: sqlx::Error| {
            StoreError::Refused(format!(
                "{} can not be opened: {e}. Nothing was changed. Restore it from a backup, or move it away to start empty",
                file.display()
            ))
        };
        let writer = writer.connect_with(options.clone()).await.map_err(damaged)?;
        let migrations = sqlx::migrate!("./migrations");
        let mut brought = migrations.run(&writer).await;
        // A later everlit may need a little room for what the one before did not have.
        if brought.as_ref().is_err_and(wants_room) && std::fs::remove_file(dir.join(BALLAST_NAME)).is_ok() {
            brought = migrations.run(&writer).await;
        }
        brought.map_err(|e| {
            let remedy = if wants_room(&e) { "Free some space, and start it again" } else { "Was it written by a later everlit?" };
            StoreError::Refused(format!("{} can not be brought up to date: {e}. {remedy}", file.display()))
        })?;
        let readers = SqlitePoolOptions::new().max_connections(2).idle_timeout(Some(Duration::from_secs(30)));
        let readers = readers.connect_with(options.read_only(true)).await?;
        let store = Self { writer, readers, dir: dir.to_owned(), low: AtomicBool::new(false) };
        store.restore_ballast();
        Ok(store)
    }

    /// The disk was full and there is no room yet: take no new jobs.
    pub fn is_low(&self) -> bool {
        self.low.load(Ordering::Relaxed)
    }

    /// Makes durable; on a full disk once more without the ballast.
    pub async fn commit(&self, batch: &Batch) -> Result<(), StoreError> {
        match self.try_commit(batch).await {
            Err(StoreError::Database(e)) if is_full(&e) => {
                let gave_up = std::fs::remove_file(self.ballast()).is_ok();
                self.low.store(true, Ordering::Relaxed);
                tracing::error!(gave_up, "the disk of the data folder is full: no new jobs are taken until there is room");
                match self.try_commit(batch).await {
                    Err(StoreError::Database(e)) if is_full(&e) => Err(StoreError::Full),
                    other => other,
                }
            }
            other => other,
        }
    }

    /// Called now and then: when there is room again, the ballast comes back and new jobs are taken.
    pub fn restore_ballast(&self) {
        let ballast = self.ballast();
        let whole = std::fs::metadata(&ballast).is_ok_and(|m| m.len() == BALLAST_BYTES);
        let room = crate::shell::disk_free(&self.dir).unwrap_or(0);
        if whole {
            self.low.store(false, Ordering::Relaxed);
        } else if room >= ROOM_BYTES {
            match write_ballast(&ballast) {
                Ok(()) => self.low.store(false, Ordering::Relaxed),
                Err(e) => tracing::warn!("no ballast file: {e}"),
            }
        } else if room < BALLAST_BYTES / 4 {
            self.low.store(true, Ordering::Relaxed);
        }
    }

    fn ballast(&self) -> PathBuf {
        self.dir.join(BALLAST_NAME)
    }

    /// The last words reach the disk and the log is folded in.
    pub async fn close(&self) {
        self.readers.close().await;
        self.writer.close().await;
    }
}

/// The database holds secrets of jobs: nobody else reads it, whatever the folder allows. What SQLite puts beside it is as private.
fn make_private(file: &Path) -> Result<(), StoreError> {
    use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
    let made = std::fs::OpenOptions::new().append(true).create(true).mode(0o600).open(file);
    let private = made.and_then(|made| made.set_permissions(std::fs::Permissions::from_mode(0o600)));
    match private {
        // A folder that can not be written is told by the database itself, with the way back.
        Err(error) if matches!(error.kind(), std::io::ErrorKind::PermissionDenied | std::io::ErrorKind::ReadOnlyFilesystem) => Ok(()),
        other => other.map_err(|error| StoreError::File(file.into(), error)),
    }
}

fn write_ballast(path: &Path) -> std::io::Result<()> {
    let file = std::fs::File::create(path)?;
    nix::fcntl::posix_fallocate(&file, 0, BALLAST_BYTES as i64)?;
    file.sync_all()
}

fn wants_room(error: &sqlx::migrate::MigrateError) -> bool {
    use sqlx::migrate::MigrateError::{Execute, ExecuteMigration};
    matches!(error, Execute(inner) | ExecuteMigration(inner, _) if is_full(inner))
}

fn is_full(error: &sqlx::Error) -> bool {
    // SQLITE_FULL, and SQLITE_IOERR_WRITE, which a full quota gives.
    error.as_database_error().and_then(|e| e.code()).is_some_and(|code| code == "13" || code == "778")
}

fn check_version(dir: &Path) -> Result<(), StoreError> {
    let path = dir.join("VERSION");
    match std::fs::read_to_string(&path) {
        Ok(text) if text.trim() == DATA_VERSION => Ok(()),
        Ok(text) => {
            let found: String = text.trim().chars().take(60).collect();
            Err(StoreError::Refused(format!(
                "{} says \"{found}\", this everlit reads \"{DATA_VERSION}\": use the everlit that wrote it, or another --data-dir",
                path.display()
            )))
        }
        Err(e) if e.kind() == std::io::ErrorKind::NotFound && dir.join("everlit.db").exists() => {
            Err(StoreError::Refused(format!("{} is missing beside everlit.db: is this an everlit data folder?", path.display())))
        }
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            std::fs::write(&path, format!("{DATA_VERSION}\n")).map_err(|e| StoreError::File(path, e))
        }
        Err(e) => Err(StoreError::File(path, e)),
    }
}

fn job_id(text: &str) -> Result<JobId, sqlx::Error> {
    text.parse().map_err(|e| sqlx::Error::Decode(Box::new(e)))
}
