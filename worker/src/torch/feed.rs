//! A rank's side of its agent's feed: asking for shards of a store, and waiting for one that it can not do without.
//!
//! An agent may end and another come in its place: what is waited for is asked for again and again.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::thread::sleep;
use std::time::{Duration, Instant};

use everlit_api::data::file_name;

use super::TrainError;
use everlit_worker::train_config::StoredData;

/// Between two looks for a shard, and two times that it is asked for.
const LOOK_EVERY: Duration = Duration::from_millis(5);
const ASK_EVERY: Duration = Duration::from_secs(1);
/// Looks at a full pipe before what is left unasked stays so.
const ASK_TRIES: u32 = 200;

/// Where shards are asked for.
#[derive(Debug)]
pub struct Feed {
    folder: PathBuf,
    names: Vec<String>,
}

impl Feed {
    /// Of a job's data.
    pub fn new(stored: &StoredData) -> Self {
        let names = stored.shards.iter().enumerate().map(|(index, shard)| file_name(index, &shard.name)).collect();
        Self { folder: stored.feed.clone(), names }
    }

    /// Where a shard is, once it is there.
    pub fn path(&self, index: usize) -> PathBuf {
        self.folder.join("have").join(&self.names[index])
    }

    /// Asks for shards, the first first; `urgent`: nothing goes on without them. That nobody hears it hurts only speed: what is needed is
    /// asked for again.
    pub fn ask(&self, shards: &[usize], urgent: bool) {
        // Without an agent there is nobody at the other end, and opening must not wait for one.
        let pipe = OpenOptions::new().write(true).custom_flags(nix::libc::O_NONBLOCK).open(self.folder.join("want"));
        let Ok(mut pipe) = pipe else { return };
        let mut tries = ASK_TRIES;
        for index in shards {
            // In one piece, so that what other ranks write does not come between.
            let line = format!("{}{}\n", if urgent { "!" } else { "" }, self.names[*index]);
            while let Err(why) = pipe.write_all(line.as_bytes()) {
                if why.kind() != io::ErrorKind::WouldBlock || tries == 0 {
                    return;
                }
                tries -= 1;
                sleep(LOOK_EVERY);
            }
        }
    }

    /// The shard, when it is there. Waits as long as that takes; ends with what the agent says when it can not be had.
    pub fn wait_for(&self, index: usize) -> Result<File, TrainError> {
        let place = self.path(index);
        let error = place.with_file_name(format!("{}.error", self.names[index]));
        let mut asked: Option<Instant> = None;
        loop {
            match File::open(&place) {
                Ok(file) => return Ok(file),
                Err(why) if why.kind() == io::ErrorKind::NotFound => {}
                Err(why) => return Err(TrainError::failed(format!("data `{}`: {why}", place.display()))),
            }
            if let Ok(why) = std::fs::read_to_string(&error) {
                return Err(TrainError::Config(format!("data: {why}")));
            }
            if asked.is_none_or(|at| at.elapsed() >= ASK_EVERY) {
                self.ask(&[index], true);
                asked = Some(Instant::now());
            }
            sleep(LOOK_EVERY);
        }
    }
}
