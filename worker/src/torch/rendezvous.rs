//! How ranks find each other: a folder that the agent makes for each attempt, and in it one small file per key.
//!
//! A value appears by rename, whole or not at all, and stays when its writer dies. Keys live under the generation, so a
//! new membership never sees an old one's. Waiting is short polling: a rank waits here once per membership, for milliseconds.
//! Who is in a membership after the first the agent says, in one file; a wait for others ends when a later one is said.
//! Ranks of several nodes leave word in a store that the agent of the first keeps, instead. Gloo stores its addresses through this.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use everlit_api::agent::{MEMBERS_NAME, Members};

use everlit_worker::rendezvous::Client;

use super::TrainError;

/// Longest single wait at a store.
const WAIT_MAX: Duration = Duration::from_secs(1);
const POLL_FIRST: Duration = Duration::from_micros(500);
const POLL_MAX: Duration = Duration::from_millis(10);

/// Where the agent says who is in the newest membership.
#[derive(Debug, Clone)]
pub struct Meeting {
    file: PathBuf,
}

impl Meeting {
    /// From `dir:<path>`, as the agent gives it.
    pub fn at(address: &str) -> Result<Self, TrainError> {
        Ok(Self { file: folder_of(address)?.join(MEMBERS_NAME) })
    }

    /// The newest membership, if it came after `generation`.
    pub fn after(&self, generation: u32) -> Option<Members> {
        let members: Members = serde_json::from_slice(&fs::read(&self.file).ok()?).ok()?;
        (members.generation > generation).then_some(members)
    }
}

fn folder_of(address: &str) -> Result<&Path, TrainError> {
    let path = address.strip_prefix("dir:").filter(|path| !path.is_empty());
    path.map(Path::new).ok_or_else(|| TrainError::Config(format!("EVERLIT_RENDEZVOUS is `{address}`, not `dir:<path>`")))
}

/// A store that ranks of several nodes meet at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Server {
    /// `host:port`.
    pub address: String,
    /// What opens it.
    pub secret: String,
}

/// Where keys are.
#[derive(Debug)]
enum Place {
    Folder(PathBuf),
    Store { client: Client, prefix: String },
}

/// One rank's view of a membership.
#[derive(Debug)]
pub struct Rendezvous {
    place: Place,
    meeting: Meeting,
    generation: u32,
    rank: u32,
    world: u32,
}

impl Rendezvous {
    /// From `dir:<path>`, as the agent gives it.
    pub fn open(address: &str, generation: u32, rank: u32, world: u32) -> Result<Self, TrainError> {
        let folder = folder_of(address)?.join(format!("g{generation}"));
        fs::create_dir_all(&folder).map_err(|error| TrainError::failed(format!("could not create `{}`: {error}", folder.display())))?;
        Ok(Self { place: Place::Folder(folder), meeting: Meeting::at(address)?, generation, rank, world })
    }

    /// At a store, for one `purpose`; `address` as for [`Self::open`], for news of later memberships.
    pub fn at(server: &Server, purpose: &str, address: &str, generation: u32, rank: u32, world: u32) -> Result<Self, TrainError> {
        let place = Place::Store { client: Client::new(&server.address, &server.secret), prefix: format!("g{generation}/{purpose}/") };
        Ok(Self { place, meeting: Meeting::at(address)?, generation, rank, world })
    }

    /// This rank.
    pub fn rank(&self) -> u32 {
        self.rank
    }

    /// Ranks in all.
    pub fn world(&self) -> u32 {
        self.world
    }

    /// Writes a value; the last writer of a key wins.
    pub fn set(&self, key: &str, value: &[u8]) -> io::Result<()> {
        match &self.place {
            Place::Folder(folder) => {
                let draft = folder.join(format!(".{}.{}.tmp", file_name(key), std::process::id()));
                fs::write(&draft, value)?;
                fs::rename(&draft, folder.join(file_name(key)))
            }
            Place::Store { client, prefix } => client.put(&format!("{prefix}{key}"), value),
        }
    }

    /// Waits for a value; an error of kind `Interrupted` says that a later membership holds by now.
    pub fn get(&self, key: &str, timeout: Duration) -> io::Result<Vec<u8>> {
        let folder = match &self.place {
            Place::Folder(folder) => folder,
            Place::Store { client, prefix } => return self.get_from(client, &format!("{prefix}{key}"), timeout),
        };
        let path = folder.join(file_name(key));
        let deadline = Instant::now() + timeout;
        let mut pause = POLL_FIRST;
        loop {
            match fs::read(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                other => return other,
            }
            if Instant::now() >= deadline {
                return Err(io::ErrorKind::TimedOut.into());
            }
            if pause == POLL_MAX && self.meeting.after(self.generation).is_some() {
                return Err(io::ErrorKind::Interrupted.into());
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(POLL_MAX);
        }
    }

    fn get_from(&self, client: &Client, key: &str, timeout: Duration) -> io::Result<Vec<u8>> {
        let deadline = Instant::now() + timeout;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if let Some(value) = client.wait(key, left.min(WAIT_MAX))? {
                return Ok(value);
            }
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            if self.meeting.after(self.generation).is_some() {
                return Err(io::ErrorKind::Interrupted.into());
            }
        }
    }

    /// Whether a key has a value.
    pub fn has(&self, key: &str) -> bool {
        match &self.place {
            Place::Folder(folder) => folder.join(file_name(key)).exists(),
            Place::Store { client, prefix } => client.has(&format!("{prefix}{key}")).unwrap_or(false),
        }
    }

    /// Says `what` with a text and waits until every rank has said it too; answers all texts in rank order.
    pub fn gather(&self, what: &str, text: &str, timeout: Duration) -> Result<Vec<String>, TrainError> {
        let key = |rank: u32| format!("{what}/{rank}");
        self.set(&key(self.rank), text.as_bytes())
            .map_err(|error| TrainError::PeerLost(format!("rendezvous: could not say `{what}`: {error}")))?;
        let deadline = Instant::now() + timeout;
        let mut texts = Vec::new();
        let mut missing = Vec::new();
        for rank in 0..self.world {
            match self.get(&key(rank), deadline.saturating_duration_since(Instant::now())) {
                Ok(text) => texts.push(String::from_utf8_lossy(&text).into_owned()),
                Err(error) if error.kind() == io::ErrorKind::TimedOut => missing.push(rank),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {
                    return Err(TrainError::PeerLost(format!("rendezvous: another membership holds, rank {rank} did not say `{what}`")));
                }
                Err(error) => return Err(TrainError::PeerLost(format!("rendezvous: could not read rank {rank}'s {what}: {error}"))),
            }
        }
        if missing.is_empty() {
            return Ok(texts);
        }
        let named: Vec<String> = missing.iter().take(8).map(u32::to_string).collect();
        let more = if missing.len() > 8 { " and more" } else { "" };
        Err(TrainError::PeerLost(format!(
            "rendezvous: {} of {} ranks did not say `{what}` within {} s: {}{more}",
            missing.len(),
            self.world,
            timeout.as_secs(),
            named.join(", "),
        )))
    }
}

/// A file name per key, one to one.
fn file_name(key: &str) -> String {
    key.bytes().fold(String::new(), |mut name, byte| {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' => name.push(byte.into()),
            other => name.push_str(&format!("%{other:02X}")),
        }
        name
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_have_names_of_their_own_inside_the_folder() {
        assert_eq!(file_name("hello/0"), "hello%2F0");
        assert_eq!(file_name("../x%"), "%2E%2E%2Fx%25");
    }

    #[test]
    fn ranks_meet_and_the_missing_one_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let address = format!("dir:{}", dir.path().display());
        let open = |rank| Rendezvous::open(&address, 0, rank, 3).unwrap();
        let threads: Vec<_> = (0..2)
            .map(|rank| {
                let own = open(rank);
                std::thread::spawn(move || own.gather("hello", &rank.to_string(), Duration::from_millis(100)))
            })
            .collect();
        for thread in threads {
            assert!(thread.join().unwrap().unwrap_err().to_string().ends_with("within 0 s: 2"));
        }
        assert_eq!(open(2).gather("hello", "2", Duration::from_millis(100)).unwrap(), ["0", "1", "2"]);
        assert!(!Rendezvous::open(&address, 1, 0, 3).unwrap().has("hello/0"), "a generation sees only its own");
    }

    #[test]
    fn a_wait_ends_when_a_later_membership_holds() {
        let dir = tempfile::tempdir().unwrap();
        let address = format!("dir:{}", dir.path().display());
        let write = |generation| {
            let members = serde_json::to_vec(&Members { generation, seats: vec![0, 2] }).unwrap();
            fs::write(dir.path().join(MEMBERS_NAME), members).unwrap();
        };
        write(1);
        let own = Rendezvous::open(&address, 1, 0, 2).unwrap();
        assert!(own.gather("hello", "", Duration::from_millis(50)).unwrap_err().to_string().contains("within 0 s: 1"));
        write(2);
        assert!(own.gather("hello", "", Duration::from_secs(600)).unwrap_err().to_string().contains("another membership"));
        assert_eq!(Meeting::at(&address).unwrap().after(1).unwrap().generation, 2);
        assert_eq!(Meeting::at(&address).unwrap().after(2), None);
    }
}
