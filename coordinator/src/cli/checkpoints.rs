//! `everlit checkpoints`: what there is of a job's checkpoints, and, in a store, reading back, fetching, putting and removing them.
//!
//! A job is asked of the coordinator; a place is opened from here, with the settings of this process (`AWS_…`, `GOOGLE_…`, `AZURE_…`).

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use clap::{Args, Subcommand};
use everlit_api::client::Client;
use everlit_api::manifest::{MANIFEST_BYTES_MAX, MANIFEST_NAME, Manifest, ManifestFile, folder_step, step_folder};
use everlit_api::store::{Begun, CheckedFile, Committed, Fault, Place, Sending, Settings, Shelf, Source, Store, Trouble, Window, digest};
use serde::Serialize;

use super::out::{age, size};
use super::{Fail, Output, find, out};

/// `everlit checkpoints`.
#[derive(Debug, Args)]
pub struct CheckpointsArgs {
    #[command(subcommand)]
    verb: CheckpointsVerb,
}

#[derive(Debug, Subcommand)]
enum CheckpointsVerb {
    /// List them: of a job wherever they are, or in a store
    Ls(Where),
    /// Read one in a store, and compare every byte with what was committed
    Verify(One),
    /// Bring one from a store into a folder, checked
    Fetch {
        #[command(flatten)]
        one: One,
        /// The folder that gets it, as `step-…`; made if missing
        #[arg(long, default_value = ".", value_name = "FOLDER")]
        into: PathBuf,
    },
    /// Put one that lies on this machine in a store, by the rules that jobs keep
    Put {
        /// The checkpoint's folder, which has a MANIFEST.json
        #[arg(value_name = "FOLDER")]
        from: PathBuf,
        #[command(flatten)]
        to: Where,
    },
    /// Remove one from a store
    Rm(Where),
}

#[derive(Debug, Args)]
struct Where {
    /// A job (its id, a part of it, its name, or `last`), or its folder in a store, like s3://bucket/runs/ID, or one checkpoint there, …/step-000000000100
    #[arg(value_name = "JOB|PLACE")]
    of: String,
}

#[derive(Debug, Args)]
struct One {
    #[command(flatten)]
    place: Where,
    /// Which [default: the newest that counts]
    #[arg(long)]
    step: Option<u64>,
}

/// A line of `ls` for a store.
#[derive(Debug, Serialize)]
struct Row {
    step: u64,
    attempt: u32,
    bytes: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    not_used: Option<String>,
}

impl From<Fault> for Fail {
    fn from(fault: Fault) -> Self {
        Self::Refused(fault.to_string())
    }
}

pub(super) async fn checkpoints(client: &Client, args: CheckpointsArgs, output: Output) -> Result<(), Fail> {
    match args.verb {
        CheckpointsVerb::Ls(of) => ls(client, &of, output).await,
        CheckpointsVerb::Verify(one) => {
            let (shelf, found) = one.find(client).await?;
            shelf.verify(&found).await?;
            let (step, bytes) = (found.manifest.step, found.manifest.bytes());
            told(output, &shelf, step, bytes, &format!("step {step} in {}: {} verified", shelf.place(), size(bytes)))
        }
        CheckpointsVerb::Fetch { one, into } => {
            let (shelf, found) = one.find(client).await?;
            let path = fetch(&shelf, &found, &into).await?;
            let (step, bytes) = (found.manifest.step, found.manifest.bytes());
            told(output, &shelf, step, bytes, &format!("{}: {} fetched and verified", path.display(), size(bytes)))
        }
        CheckpointsVerb::Put { from, to } => {
            let (shelf, _) = to.shelf(client).await?;
            let (step, bytes) = put(&shelf, &from).await?;
            told(output, &shelf, step, bytes, &format!("step {step} is in {}: {} sent and committed", shelf.place(), size(bytes)))
        }
        CheckpointsVerb::Rm(of) => {
            let (shelf, step) = of.shelf(client).await?;
            let step = step.ok_or_else(|| Fail::Usage("say which: give the place of one checkpoint, …/step-000000000100".into()))?;
            let found = shelf.read(step).await?;
            shelf.remove(step).await?;
            let bytes = found.map_or(0, |found| found.manifest.bytes());
            told(output, &shelf, step, bytes, &format!("step {step} in {} is removed", shelf.place()))
        }
    }
}

fn told(output: Output, shelf: &Shelf, step: u64, bytes: u64, text: &str) -> Result<(), Fail> {
    match output {
        Output::Json => out::json(&serde_json::json!({ "place": shelf.place(), "step": step, "bytes": bytes })),
        Output::Text => out::line(text),
    }
}

async fn ls(client: &Client, of: &Where, output: Output) -> Result<(), Fail> {
    if !is_place(&of.of) {
        let page = client.checkpoints(find::job(client, &of.of).await?).await?;
        if output == Output::Json {
            return out::json(&page);
        }
        let row = |c: &everlit_api::status::CheckpointView| {
            let nodes: Vec<&str> = c.nodes().map(|node| node.0.as_str()).collect();
            let verified = if c.verified { "yes" } else { "no" };
            let stored = c.stored.clone().unwrap_or_else(|| "-".into());
            vec![c.step.to_string(), c.attempt.to_string(), size(c.bytes), age(c.created_at), verified.into(), nodes.join(","), stored]
        };
        return out::table(&["STEP", "ATTEMPT", "SIZE", "AGE", "VERIFIED", "NODES", "STORE"], page.data.iter().map(row).collect());
    }
    let (shelf, only) = of.shelf(client).await?;
    let all = shelf.all().await?.into_iter().filter(|kept| only.is_none_or(|only| only == kept.step));
    let rows: Vec<Row> =
        all.map(|kept| Row { step: kept.step, attempt: kept.attempt, bytes: kept.bytes, not_used: kept.not_used }).collect();
    if output == Output::Json {
        return out::json(&serde_json::json!({ "data": rows }));
    }
    let row = |row: Row| vec![row.step.to_string(), row.attempt.to_string(), size(row.bytes), row.not_used.unwrap_or_else(|| "-".into())];
    out::table(&["STEP", "ATTEMPT", "SIZE", "NOT USED"], rows.into_iter().map(row).collect())
}

fn is_place(text: &str) -> bool {
    Place::is_url(text) || text.starts_with('/')
}

impl Where {
    /// The shelf that is meant, and the step if one is named. Nothing is sent to the store yet.
    async fn shelf(&self, client: &Client) -> Result<(Shelf, Option<u64>), Fail> {
        let place: Place = if is_place(&self.of) {
            self.of.parse().map_err(|why| Fail::Usage(format!("`{}` {why}", self.of)))?
        } else {
            let job = client.job(find::job(client, &self.of).await?).await?;
            let to = job
                .spec
                .and_then(|spec| spec.checkpoint.to)
                .ok_or_else(|| Fail::Refused(format!("job {} has no store (checkpoint.to)", job.job_id)))?;
            to.join(&job.job_id.to_string())
        };
        let step = folder_step(place.last());
        let shelf = step.and_then(|_| place.parent()).unwrap_or(place);
        Ok((Shelf::new(Store::open(&shelf, &Settings::of_process())?), step))
    }
}

impl One {
    async fn find(&self, client: &Client) -> Result<(Shelf, Committed), Fail> {
        let (shelf, named) = self.place.shelf(client).await?;
        let found = match self.step.or(named) {
            Some(step) => shelf.read(step).await?,
            None => shelf.newest(None).await?.0,
        };
        let found = found.ok_or_else(|| Fail::Refused(format!("there is no such checkpoint in {}", shelf.place())))?;
        Ok((shelf, found))
    }
}

/// A file on this machine, as it is sent.
struct Sent<'a>(CheckedFile<'a>);

impl Source for Sent<'_> {
    fn next(&mut self, bytes: usize) -> Result<Vec<u8>, Fault> {
        self.0.read(bytes)
    }

    fn wait_for_turn(&mut self, _: usize) -> Result<(), Fault> {
        Ok(())
    }
}

/// Puts a folder's checkpoint on a shelf; answers its step and its bytes.
async fn put(shelf: &Shelf, from: &Path) -> Result<(u64, u64), Fail> {
    let place = from.join(MANIFEST_NAME);
    let about = fs::metadata(&place).map_err(|error| Fail::Refused(format!("{} can not be read: {error}", place.display())))?;
    if about.len() > MANIFEST_BYTES_MAX {
        return Err(Fail::Refused(format!("{} has more than {MANIFEST_BYTES_MAX} bytes", place.display())));
    }
    let text = fs::read(&place)?;
    let manifest = Manifest::parse(&text).map_err(|error| Fail::Refused(format!("{}: {error}", from.display())))?;
    let (digest, text) = (digest(&text), Bytes::from(text));
    let open = |file: &ManifestFile| -> Result<Box<dyn Source + '_>, Fault> {
        let asked = || format!("read {}", from.display());
        let open = File::open(from.join(&file.name));
        let open = open.map_err(|error| Fault { trouble: Trouble::Damaged, asked: asked(), why: format!("{}: {error}", file.name) })?;
        Ok(Box::new(Sent(CheckedFile::new(open, from, file))))
    };
    let (window, begun, lacking) = (Window::default(), Begun::default(), shelf.lacking(&manifest, &text).await?);
    let sent = shelf.put_files(manifest.step, &digest, &lacking, &Sending { open: &open, window: &window, begun: &begun }).await;
    begun.abandon().await;
    sent?;
    shelf.commit(&manifest, &text).await.map_err(|error| Fail::Refused(error.to_string()))?;
    Ok((manifest.step, manifest.bytes()))
}

/// Brings a checkpoint into `into`; it is there under its name only once all of it is.
async fn fetch(shelf: &Shelf, found: &Committed, into: &Path) -> Result<PathBuf, Fail> {
    let name = step_folder(found.manifest.step);
    let (place, draft) = (into.join(&name), into.join(format!(".fetch-{name}-{}", std::process::id())));
    if place.exists() {
        return Err(Fail::Refused(format!("{} is there already", place.display())));
    }
    fs::create_dir_all(&draft)?;
    let fetched = async {
        for file in &found.manifest.files {
            let mut to = File::create_new(draft.join(&file.name))?;
            shelf.read_file(found, file, &mut |piece| to.write_all(piece)).await?;
            to.sync_all()?;
        }
        let mut manifest = File::create_new(draft.join(MANIFEST_NAME))?;
        manifest.write_all(&found.text)?;
        manifest.sync_all()?;
        fs::rename(&draft, &place)?;
        File::open(into)?.sync_all()?;
        Ok::<(), Fail>(())
    };
    let outcome = fetched.await;
    if outcome.is_err() {
        // What is left of it is of no use; that it can not be removed changes nothing.
        let _ = fs::remove_dir_all(&draft);
    }
    outcome.map(|()| place)
}
