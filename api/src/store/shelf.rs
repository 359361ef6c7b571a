//! The checkpoints of one job in a store: what is committed there, by whom, and what goes.
//!
//! ```text
//! <place>/<job>/attempts/0000000002                        the lineage as attempt 2 knows it, put once before anything else of it
//! <place>/<job>/step-000000000100/<digest>/part-….safetensors   files, under a digest of the manifest that names them
//! <place>/<job>/step-000000000100/MANIFEST.json            put last, where none may be: the commit
//! <place>/<job>/LATEST                                     a hint for people, never read
//! ```
//!
//! Files of different attempts never meet, since their manifests differ. A manifest counts when the newest lineage says so, so an older
//! attempt that comes late commits nothing, even if its put arrives; where two want the same step the one that does not count makes room.

use std::collections::BTreeSet;

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use sha2::{Digest, Sha256};

use super::door::Store;
use super::fault::Fault;
use super::lineage::Lineage;
use super::trouble::Trouble;
use crate::join::to_hex;
use crate::manifest::{MANIFEST_BYTES_MAX, MANIFEST_NAME, Manifest, ManifestFile, folder_step, hex_sha256, step_folder};

/// Others that commit the same step at the same moment.
const COMMIT_TRIES: usize = 4;
const LINEAGE_BYTES_MAX: u64 = 64 * 1024;
const ATTEMPTS: &str = "attempts";

/// The checkpoints of one job.
#[derive(Debug, Clone)]
pub struct Shelf {
    store: Store,
}

/// A checkpoint that was committed, its files not looked at.
#[derive(Debug, Clone)]
pub struct Committed {
    /// What it says.
    pub manifest: Manifest,
    /// Its bytes.
    pub text: Bytes,
}

/// What is there of one step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kept {
    /// Updates done.
    pub step: u64,
    /// The attempt that wrote it.
    pub attempt: u32,
    /// Sum of its files.
    pub bytes: u64,
    /// Why nothing resumes from it; `None` when it can be resumed from, as far as names and lengths tell.
    pub not_used: Option<String>,
}

/// Why a checkpoint was not committed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotKept {
    /// A later attempt has left it behind, or another one of this step counts: nothing of it will ever be kept.
    #[error("attempt {attempt} may not commit step {step} in {place}: {why}")]
    Fenced {
        /// Whose it is.
        attempt: u32,
        /// Which.
        step: u64,
        /// Where.
        place: String,
        /// Who is in the way.
        why: String,
    },
    /// The store did not do it.
    #[error(transparent)]
    Fault(#[from] Fault),
}

/// Where the files of a manifest are, beside it.
pub fn digest(manifest_text: &[u8]) -> String {
    hex_sha256(manifest_text)[..16].to_string()
}

impl Shelf {
    /// Of the job whose folder in the store this is.
    pub fn new(store: Store) -> Self {
        Self { store }
    }

    pub(super) fn store(&self) -> &Store {
        &self.store
    }

    /// Where it is.
    pub fn place(&self) -> String {
        self.store.place().to_string()
    }

    /// What the newest attempt has said of those before it.
    pub async fn lineage(&self) -> Result<Lineage, Fault> {
        self.lineage_in(&self.store.list(ATTEMPTS).await?).await
    }

    async fn lineage_in(&self, all: &[(String, u64)]) -> Result<Lineage, Fault> {
        let Some((name, _)) = all.iter().rev().find(|(name, _)| attempt_of(name).is_some()) else { return Ok(Lineage::default()) };
        let text = self.store.get(name, LINEAGE_BYTES_MAX).await?;
        let known = text.and_then(|(text, _)| serde_json::from_slice::<Lineage>(&text).ok());
        known.filter(|known| known.is_sound() && known.newest() == attempt_of(name)).ok_or_else(|| {
            let why = "it is not what everlit has written; remove it only if no job writes there".to_string();
            Fault::new(Trouble::Damaged, format!("read {}/{name}", self.place()), why)
        })
    }

    /// Says that an attempt has begun, before anything of it is kept. Answers what counts from now on.
    pub async fn begin(&self, lineage: &Lineage) -> Result<Lineage, NotKept> {
        let known = self.lineage().await?;
        let Some(attempt) = lineage.newest().filter(|own| known.newest().is_none_or(|newest| newest < *own)) else { return Ok(known) };
        let text = serde_json::to_vec(lineage).unwrap_or_default();
        match self.store.create(&format!("{ATTEMPTS}/{attempt:010}"), text.into()).await {
            Ok(()) => {}
            // It was said already, by this node a moment ago or by another one of the gang.
            Err(fault) if fault.trouble == Trouble::Conflict => {}
            Err(fault) => return Err(fault.into()),
        }
        // A listing may not have it yet.
        Ok(newer(self.lineage().await?, lineage))
    }

    /// Steps with a manifest, newest first.
    pub async fn steps(&self) -> Result<Vec<u64>, Fault> {
        Ok(steps_in(&self.store.list("").await?))
    }

    /// The manifest of a step. `None`: there is none. `Damaged`: it is none.
    pub async fn read(&self, step: u64) -> Result<Option<Committed>, Fault> {
        let name = format!("{}/{MANIFEST_NAME}", step_folder(step));
        let Some((text, _)) = self.store.get(&name, MANIFEST_BYTES_MAX).await? else { return Ok(None) };
        let damaged = |why: String| Fault::new(Trouble::Damaged, format!("read {}/{name}", self.place()), why);
        let manifest = Manifest::parse(&text).map_err(|error| damaged(error.to_string()))?;
        if manifest.step != step {
            return Err(damaged(format!("it is of step {}", manifest.step)));
        }
        Ok(Some(Committed { manifest, text }))
    }

    /// The files of a checkpoint that are not there with their length. A listing may name what is gone: what it names is asked for.
    pub async fn lacking<'a>(&self, manifest: &'a Manifest, text: &[u8]) -> Result<Vec<&'a ManifestFile>, Fault> {
        let folder = format!("{}/{}", step_folder(manifest.step), digest(text));
        let there = self.store.list(&folder).await?;
        let mut lacking = Vec::new();
        for file in &manifest.files {
            let name = format!("{folder}/{}", file.name);
            if !has(&there, &name, file.bytes) || self.store.size(&name).await? != Some(file.bytes) {
                lacking.push(file);
            }
        }
        Ok(lacking)
    }

    /// Everything that is there, newest first.
    pub async fn all(&self) -> Result<Vec<Kept>, Fault> {
        let there = self.store.list("").await?;
        let lineage = self.lineage_in(&there).await?;
        let mut kept = Vec::new();
        for step in steps_in(&there) {
            match self.look(step, &lineage, &there).await {
                Ok(None) => {}
                Ok(Some((found, not_used))) => {
                    kept.push(Kept { step, attempt: found.manifest.attempt, bytes: found.manifest.bytes(), not_used });
                }
                Err(fault) if fault.trouble == Trouble::Damaged => {
                    kept.push(Kept { step, attempt: 0, bytes: 0, not_used: Some(fault.why) });
                }
                Err(fault) => return Err(fault),
            }
        }
        Ok(kept)
    }

    async fn look(&self, step: u64, lineage: &Lineage, there: &[(String, u64)]) -> Result<Option<(Committed, Option<String>)>, Fault> {
        let Some(found) = self.read(step).await? else { return Ok(None) };
        if !lineage.counts(found.manifest.attempt, step) {
            let why = "it was committed when a later attempt had begun elsewhere".to_string();
            return Ok(Some((found, Some(why))));
        }
        let folder = format!("{}/{}", step_folder(step), digest(&found.text));
        for file in &found.manifest.files {
            let name = format!("{folder}/{}", file.name);
            // A listing may lack what was put a moment ago.
            if !has(there, &name, file.bytes) && self.store.size(&name).await? != Some(file.bytes) {
                let why = format!("{} is missing, or has another length than its manifest says", file.name);
                return Ok(Some((found, Some(why))));
            }
        }
        Ok(Some((found, None)))
    }

    /// The newest that counts and is there, up to step `max`, and what was passed over.
    pub async fn newest(&self, max: Option<u64>) -> Result<(Option<Committed>, Vec<(u64, String)>), Fault> {
        let there = self.store.list("").await?;
        let lineage = self.lineage_in(&there).await?;
        let mut passed = Vec::new();
        for step in steps_in(&there).into_iter().filter(|step| max.is_none_or(|max| *step <= max)) {
            match self.look(step, &lineage, &there).await {
                Ok(None) => {}
                Ok(Some((found, None))) => return Ok((Some(found), passed)),
                Ok(Some((_, Some(why)))) => passed.push((step, why)),
                Err(fault) if fault.trouble == Trouble::Damaged => passed.push((step, fault.why)),
                Err(fault) => return Err(fault),
            }
        }
        Ok((None, passed))
    }

    /// All files are there: the manifest makes it a checkpoint, unless it must not be one.
    pub async fn commit(&self, manifest: &Manifest, text: &Bytes) -> Result<(), NotKept> {
        let (attempt, step) = (manifest.attempt, manifest.step);
        let fenced = |why: String| NotKept::Fenced { attempt, step, place: self.place(), why };
        let name = format!("{}/{MANIFEST_NAME}", step_folder(step));
        let mut conflict = None;
        for _ in 0..COMMIT_TRIES {
            let lineage = self.lineage().await?;
            if !lineage.counts(attempt, step) {
                return Err(fenced(format!("attempt {} has begun before that step", lineage.newest().unwrap_or_default())));
            }
            let put = match &conflict {
                None => self.store.create(&name, text.clone()).await,
                Some(read) => self.store.replace(&name, text.clone(), read).await,
            };
            match put {
                Ok(()) => {
                    // For people; that it is missing or old hurts nobody.
                    let _ = self.store.put("LATEST", format!("{}\n", step_folder(step)).into()).await;
                    return Ok(());
                }
                Err(fault) if matches!(fault.trouble, Trouble::Conflict | Trouble::NotFound) => {}
                Err(fault) => return Err(fault.into()),
            }
            let Some((there, written)) = self.store.get(&name, MANIFEST_BYTES_MAX).await? else {
                conflict = None;
                continue;
            };
            if there == *text {
                // An answer was lost, or another node of the gang was first.
                return Ok(());
            }
            if let Ok(other) = Manifest::parse(&there)
                && other.step == step
                && lineage.counts(other.attempt, step)
                && (other.attempt, other.generation) >= (attempt, manifest.generation)
            {
                return Err(fenced(format!("one of attempt {} is there", other.attempt)));
            }
            conflict = Some(written);
        }
        Err(Fault::new(Trouble::Conflict, format!("put {}/{name}", self.place()), "others commit that step again and again").into())
    }

    /// Removes all but the newest `keep` that count, and files that no manifest names of steps before the newest. Answers what is kept.
    /// `step` was just committed, under `lineage`: a listing and what it leads to may be older than both.
    pub async fn prune(&self, keep: usize, step: u64, lineage: &Lineage) -> Result<Vec<u64>, Fault> {
        let there = self.store.list("").await?;
        let lineage = newer(self.lineage_in(&there).await?, lineage);
        let mut steps: BTreeSet<u64> = steps_in(&there).into_iter().collect();
        steps.insert(step);
        let (mut kept, mut whole, mut gone) = (Vec::new(), BTreeSet::new(), Vec::new());
        for step in steps.into_iter().rev() {
            match self.look(step, &lineage, &there).await {
                Ok(Some((found, None))) if kept.len() < keep.max(1) => {
                    kept.push(step);
                    whole.insert(format!("{}/{}", step_folder(step), digest(&found.text)));
                }
                Ok(_) => gone.push(step),
                // What can not be read may be of a later build: it stays, with its files.
                Err(fault) if fault.trouble == Trouble::Damaged => {
                    whole.insert(step_folder(step));
                }
                Err(fault) => return Err(fault),
            }
        }
        let Some(newest) = kept.first().copied() else { return Ok(kept) };
        for step in gone {
            self.store.remove(&format!("{}/{MANIFEST_NAME}", step_folder(step))).await?;
        }
        for (name, _) in there {
            let mut parts = name.splitn(3, '/');
            let (Some(folder), Some(digest), Some(_)) = (parts.next(), parts.next(), parts.next()) else { continue };
            let is_named = whole.contains(folder) || whole.contains(&format!("{folder}/{digest}"));
            if folder_step(folder).is_some_and(|step| step < newest) && !is_named {
                self.store.remove(&name).await?;
            }
        }
        Ok(kept)
    }

    /// Removes a checkpoint: first what makes it one.
    pub async fn remove(&self, step: u64) -> Result<(), Fault> {
        let folder = step_folder(step);
        self.store.remove(&format!("{folder}/{MANIFEST_NAME}")).await?;
        for (name, _) in self.store.list(&folder).await? {
            self.store.remove(&name).await?;
        }
        Ok(())
    }

    /// A file of a checkpoint as it comes, and its length; nothing of it is checked.
    pub async fn open(&self, found: &Committed, file: &ManifestFile) -> Result<(u64, BoxStream<'static, Result<Bytes, Fault>>), Fault> {
        self.store.stream(&format!("{}/{}/{}", step_folder(found.manifest.step), digest(&found.text), file.name)).await
    }

    /// Reads a whole checkpoint and checks every chunk.
    pub async fn verify(&self, found: &Committed) -> Result<(), Fault> {
        for file in &found.manifest.files {
            self.read_file(found, file, &mut |_| Ok(())).await?;
        }
        Ok(())
    }

    /// Reads a file of a checkpoint, checks every chunk, and hands on what it reads: until this is done, it may be wrong.
    pub async fn read_file(
        &self,
        found: &Committed,
        file: &ManifestFile,
        take: &mut (dyn FnMut(&[u8]) -> std::io::Result<()> + Send),
    ) -> Result<(), Fault> {
        let asked = || format!("read {} of step {} in {}", file.name, found.manifest.step, self.place());
        let (_, mut pieces) = self.open(found, file).await?;
        let (mut chunk, mut hasher, mut left, mut of_chunk) = (0, Sha256::new(), file.bytes, file.chunk_bytes.min(file.bytes));
        while let Some(piece) = pieces.next().await {
            let mut piece = piece?;
            if piece.len() as u64 > left {
                return Err(Fault::new(Trouble::Damaged, asked(), "it is longer than its manifest says"));
            }
            take(&piece).map_err(|error| Fault::new(Trouble::Other, asked(), format!("it could not be taken here: {error}")))?;
            left -= piece.len() as u64;
            while !piece.is_empty() {
                let part = piece.split_to(piece.len().min(usize::try_from(of_chunk).unwrap_or(usize::MAX)));
                hasher.update(&part);
                of_chunk -= part.len() as u64;
                if of_chunk == 0 {
                    check(&asked, file, chunk, std::mem::take(&mut hasher))?;
                    chunk += 1;
                    of_chunk = file.chunk_bytes.min(left + piece.len() as u64);
                }
            }
        }
        if left > 0 {
            return Err(Fault::new(Trouble::Damaged, asked(), format!("it ends {left} bytes early")));
        }
        if file.bytes == 0 { check(&asked, file, 0, hasher) } else { Ok(()) }
    }
}

fn check(asked: &dyn Fn() -> String, file: &ManifestFile, chunk: usize, hasher: Sha256) -> Result<(), Fault> {
    let is_right = file.sha256.get(chunk).is_some_and(|wanted| to_hex(&hasher.finalize()).eq_ignore_ascii_case(wanted));
    if is_right { Ok(()) } else { Err(Fault::new(Trouble::Damaged, asked(), format!("chunk {chunk} has another sha256 than committed"))) }
}

/// Steps with a manifest, newest first.
fn steps_in(there: &[(String, u64)]) -> Vec<u64> {
    let mut steps: Vec<u64> =
        there.iter().filter_map(|(name, _)| folder_step(name.strip_suffix(MANIFEST_NAME)?.strip_suffix('/')?)).collect();
    steps.sort_unstable_by(|a, b| b.cmp(a));
    steps
}

fn has(there: &[(String, u64)], name: &str, bytes: u64) -> bool {
    there.binary_search_by(|(own, _)| own.as_str().cmp(name)).is_ok_and(|at| there[at].1 == bytes)
}

/// The one that knows more attempts.
fn newer(read: Lineage, known: &Lineage) -> Lineage {
    if read.newest() < known.newest() { known.clone() } else { read }
}

fn attempt_of(name: &str) -> Option<u32> {
    let digits = name.strip_prefix(ATTEMPTS)?.strip_prefix('/')?;
    if digits.len() == 10 { digits.parse().ok() } else { None }
}
