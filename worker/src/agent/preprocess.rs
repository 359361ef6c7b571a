//! A rank of a `kind: preprocess` job: runs the job's program for each shard, or once for all of them, and ends when every output is in the
//! store.
//!
//! It runs as the rank, below the shim, so its end is the rank's end and says what it means: all that was asked of this rank is stored. It talks
//! to the agent by files alone ([`super::data`]) and says everything again until it is done, so agents may come and go. What is stored is never
//! made again; a rank that was killed does the shard again that it was at. The trap: a stop's signal reaches the program too, and this must not
//! end before it, or the program's last words are cut off.

use std::collections::{BTreeMap, VecDeque};
use std::ffi::OsString;
use std::fmt;
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, ExitStatus};
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use everlit_api::data::{DRAFT_END, Output, is_output_of, record_name, shard_number};
use everlit_api::job::{INPUT, OUTPUT};
use nix::libc;
use nix::sys::signal::{SigHandler, Signal, raise, signal};
use serde::Serialize;

use super::data::{DONE_NAME, HAVE_NAME, OUT_NAME, WANT_NAME, is_made, mark_of};
use super::effects::not_found_is_fine;

/// Between two looks at the program and at what was stored.
const LOOK_EVERY: Duration = Duration::from_millis(10);
/// Between two looks through all of `out`.
const SCAN_EVERY: Duration = Duration::from_millis(500);
/// Between two times that the same is asked.
const ASK_EVERY: Duration = Duration::from_secs(1);
/// Shards that are asked for before they are needed.
const AHEAD: usize = 2;
/// Outputs that may wait for the store before the next shard is begun.
const WAITING_MAX: usize = 4;
/// What another start can not mend.
const EXIT_CONFIG: u8 = 78;

/// A stop was asked for.
static STOPPED: AtomicBool = AtomicBool::new(false);
/// The program, for signals that only this process gets.
static PROGRAM: AtomicI32 = AtomicI32::new(0);

extern "C" fn on_stop(_: libc::c_int) {
    STOPPED.store(true, Ordering::Relaxed);
}

extern "C" fn pass_on(number: libc::c_int) {
    let program = PROGRAM.load(Ordering::Relaxed);
    if program > 0 {
        // SAFETY: a system call on numbers, which a handler may make.
        unsafe { libc::kill(program, number) };
    }
}

/// Why the rank fails.
#[derive(Debug)]
struct Failed {
    code: u8,
    /// What ended the program: its rank is to end in the same way.
    signal: Option<Signal>,
    why: String,
}

impl Failed {
    fn new(why: impl Into<String>) -> Self {
        Self { code: 1, signal: None, why: why.into() }
    }

    fn config(why: impl Into<String>) -> Self {
        Self { code: EXIT_CONFIG, signal: None, why: why.into() }
    }

    fn here(what: &str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let what = format!("could not {what} `{}`", path.display());
        move |error| Self::new(format!("{what}: {error}"))
    }
}

/// The whole program.
pub(super) fn run(command: &[String]) -> ExitCode {
    // SAFETY: the handlers do nothing but a store and a system call. A program that is started has the defaults again.
    unsafe {
        let _ = signal(Signal::SIGTERM, SigHandler::Handler(on_stop));
        let _ = signal(Signal::SIGINT, SigHandler::Handler(on_stop));
        let _ = signal(Signal::SIGUSR1, SigHandler::Handler(pass_on));
    }
    let Err(failed) = Share::of_environment().and_then(|share| share.work(command)) else { return ExitCode::SUCCESS };
    eprintln!("everlit-agent preprocess: {}", failed.why);
    if let Some(place) = variable("TORCHELASTIC_ERROR_FILE").filter(|_| !STOPPED.load(Ordering::Relaxed)) {
        // The program's own word says more.
        let record = serde_json::json!({"message": {"message": failed.why, "extraInfo": {}}});
        if !place.exists()
            && let Err(error) = fs::write(&place, record.to_string())
        {
            eprintln!("everlit-agent preprocess: could not write `{}`: {error}", place.display());
        }
    }
    if let Some(number) = failed.signal {
        // SAFETY: sets a disposition to a constant.
        let _ = unsafe { signal(number, SigHandler::SigDfl) };
        let _ = raise(number);
    }
    ExitCode::from(failed.code)
}

fn variable(name: &str) -> Option<PathBuf> {
    std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from)
}

fn number(name: &str) -> Result<u32, Failed> {
    let text = std::env::var(name).unwrap_or_default();
    text.parse().map_err(|_| Failed::config(format!("{name} is `{text}`, not a number: only an agent starts this")))
}

/// One shard of this rank.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Shard {
    index: usize,
    /// Its file's name.
    file: String,
}

impl fmt::Display for Shard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.file)
    }
}

/// What a rank has to do, and how far it is.
#[derive(Debug)]
struct Share {
    folder: PathBuf,
    /// The list that the program is told.
    list: PathBuf,
    rank: u32,
    world_size: u32,
    /// All of its shards.
    shards: BTreeMap<usize, Shard>,
    /// Outputs that are on their way, by their shards.
    leaving: BTreeMap<usize, String>,
    told_at: Option<Instant>,
    scanned_at: Option<Instant>,
    stored: usize,
}

/// A line of the record.
#[derive(Debug, Serialize)]
struct Recorded {
    shard: String,
    output: Output,
}

impl Share {
    fn of_environment() -> Result<Self, Failed> {
        let missing = |name: &str| Failed::config(format!("{name} is not set: only an agent starts this"));
        let list = variable("EVERLIT_DATA_SHARDS").ok_or_else(|| missing("EVERLIT_DATA_SHARDS"))?;
        let folder = variable("EVERLIT_SHARD_FEED").ok_or_else(|| missing("EVERLIT_SHARD_FEED"))?;
        let text = fs::read_to_string(&list).map_err(Failed::here("read", &list))?;
        Self::new(folder, list, &text, number("RANK")?, number("WORLD_SIZE")?)
    }

    fn new(folder: PathBuf, list: PathBuf, text: &str, rank: u32, world_size: u32) -> Result<Self, Failed> {
        let mut shards = BTreeMap::new();
        for line in text.lines() {
            let file = line.rsplit('/').next().unwrap_or_default();
            let index =
                shard_number(file).ok_or_else(|| Failed::config(format!("`{}` lists `{line}`, which is no shard", list.display())))?;
            shards.insert(index, Shard { index, file: file.into() });
        }
        Ok(Self { folder, list, rank, world_size, shards, leaving: BTreeMap::new(), told_at: None, scanned_at: None, stored: 0 })
    }

    fn out(&self) -> PathBuf {
        self.folder.join(OUT_NAME)
    }

    fn work(mut self, command: &[String]) -> Result<(), Failed> {
        self.stored = self.shards.keys().filter(|index| is_made(&self.folder, **index)).count();
        self.look()?;
        println!("everlit: {} of this rank's {} shards are done", self.stored, self.shards.len());
        self.tell_step();
        if command.iter().any(|argument| argument.contains(INPUT)) {
            self.each(command)?
        } else {
            self.all(command)?
        }
        self.wait_for_all()?;
        self.record()
    }

    /// Shards that have no output yet, neither stored nor on its way.
    fn left(&self) -> VecDeque<Shard> {
        let is_left = |shard: &&Shard| !self.leaving.contains_key(&shard.index) && !is_made(&self.folder, shard.index);
        self.shards.values().filter(is_left).cloned().collect()
    }

    /// The program runs once for each shard.
    fn each(&mut self, command: &[String]) -> Result<(), Failed> {
        let mut left = self.left();
        while let Some(shard) = left.pop_front() {
            for later in left.iter().take(AHEAD) {
                self.ask(&later.file);
            }
            let input = self.wait_for(&shard)?;
            while self.leaving.len() >= WAITING_MAX {
                self.turn()?;
            }
            let draft = self.out().join(format!("draft-{:06}", shard.index));
            fs::remove_dir_all(&draft).or_else(not_found_is_fine).map_err(Failed::here("remove", &draft))?;
            fs::create_dir_all(&draft).map_err(Failed::here("make", &draft))?;
            let output = draft.join(&shard.file);
            let fill = |argument: &String| argument.replace(INPUT, &input.to_string_lossy()).replace(OUTPUT, &output.to_string_lossy());
            let argv: Vec<String> = command.iter().map(fill).collect();
            let status = self.run(Command::new(&argv[0]).args(&argv[1..]), &argv[0])?;
            self.judge(status, &format!("shard {shard}: {}", argv[0]))?;
            let name = only_file(&draft, &shard)?;
            let place = self.out().join(&name);
            fs::rename(draft.join(&name), &place).map_err(Failed::here("make", &place))?;
            let _ = fs::remove_dir(&draft);
            self.leave(shard.index, name)?;
        }
        Ok(())
    }

    /// The program goes through the list by itself.
    fn all(&mut self, command: &[String]) -> Result<(), Failed> {
        let left = self.left();
        if left.is_empty() {
            return Ok(());
        }
        let list = self.list.with_file_name("left.txt");
        let have = self.folder.join(HAVE_NAME);
        let text: String = left.iter().map(|shard| format!("{}\n", have.join(&shard.file).display())).collect();
        fs::write(&list, text).map_err(Failed::here("write", &list))?;
        let mut program = Command::new(&command[0]);
        program.args(&command[1..]).env("EVERLIT_DATA_SHARDS", &list).env("EVERLIT_OUTPUT_DIR", self.out());
        let status = self.run(&mut program, &command[0])?;
        self.judge(status, &command[0])?;
        self.scan()?;
        let without = self.left();
        match without.front() {
            Some(first) => Err(Failed::new(format!(
                "{} ended well, but {} of its shards have no output in EVERLIT_OUTPUT_DIR, the first of them {first}: write one file for each, named like the shard (more may follow the name), as NAME{DRAFT_END} first and renamed when it is whole",
                command[0],
                without.len()
            ))),
            None => Ok(()),
        }
    }

    /// Runs a program to its end, and looks after the outputs meanwhile.
    fn run(&mut self, program: &mut Command, name: &str) -> Result<ExitStatus, Failed> {
        let found = |error: io::Error| {
            let why = format!("could not run {name}: {error}");
            if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied) {
                Failed::config(why)
            } else {
                Failed::new(why)
            }
        };
        let mut child: Child = program.spawn().map_err(found)?;
        PROGRAM.store(child.id() as i32, Ordering::Relaxed);
        let status = loop {
            match child.try_wait() {
                Ok(Some(status)) => break status,
                Ok(None) => {}
                Err(error) => return Err(Failed::new(format!("could not wait for {name}: {error}"))),
            }
            self.look()?;
            sleep(LOOK_EVERY);
        };
        PROGRAM.store(0, Ordering::Relaxed);
        Ok(status)
    }

    fn judge(&self, status: ExitStatus, what: &str) -> Result<(), Failed> {
        if status.success() && !STOPPED.load(Ordering::Relaxed) {
            return Ok(());
        }
        let number = status.signal().unwrap_or(if status.success() { libc::SIGTERM } else { 0 });
        let code = status.code().filter(|_| !status.success()).unwrap_or(128 + number);
        let why = format!("{what} ended with {status}");
        Err(Failed { code: u8::try_from(code).unwrap_or(1), signal: Signal::try_from(number).ok(), why })
    }

    /// Whatever is waited for.
    fn turn(&mut self) -> Result<(), Failed> {
        if STOPPED.load(Ordering::Relaxed) {
            let why = "stopped before all of its outputs were stored".into();
            return Err(Failed { code: 128 + libc::SIGTERM as u8, signal: Some(Signal::SIGTERM), why });
        }
        self.look()?;
        sleep(LOOK_EVERY);
        Ok(())
    }

    /// Takes up what is new in `out` and what was stored, and says again what is not.
    fn look(&mut self) -> Result<(), Failed> {
        if self.scanned_at.is_none_or(|at| at.elapsed() >= SCAN_EVERY) {
            self.scan()?;
        }
        let folder = self.folder.clone();
        let before = self.leaving.len();
        self.leaving.retain(|index, _| !is_made(&folder, *index));
        if self.leaving.len() < before {
            self.stored += before - self.leaving.len();
            self.tell_step();
        }
        if self.told_at.is_none_or(|at| at.elapsed() >= ASK_EVERY) && !self.leaving.is_empty() {
            self.leaving.values().for_each(|name| self.ask(&format!(">{name}")));
            self.told_at = Some(Instant::now());
        }
        Ok(())
    }

    /// Finds whole files in `out`, whoever put them there.
    fn scan(&mut self) -> Result<(), Failed> {
        self.scanned_at = Some(Instant::now());
        let out = self.out();
        for entry in fs::read_dir(&out).map_err(Failed::here("read", &out))? {
            let Ok(name) = entry.map_err(Failed::here("read", &out))?.file_name().into_string() else { continue };
            let own = shard_number(&name).and_then(|index| self.shards.get(&index)).filter(|shard| is_output_of(&name, &shard.file));
            let Some(index) = own.map(|shard| shard.index) else { continue };
            match stored(&self.folder, index)? {
                None => self.leave(index, name)?,
                // It is about to be removed.
                Some(known) if known.name == name => {}
                Some(known) => return Err(twice(&known.name, &name)),
            }
        }
        Ok(())
    }

    /// An output is whole: the agent is told.
    fn leave(&mut self, index: usize, name: String) -> Result<(), Failed> {
        match self.leaving.get(&index) {
            Some(other) if *other == name => Ok(()),
            Some(other) => Err(twice(other, &name)),
            None => {
                self.ask(&format!(">{name}"));
                self.leaving.insert(index, name);
                Ok(())
            }
        }
    }

    /// The agent hears it, or hears it when it is said again.
    fn ask(&self, line: &str) {
        // Without an agent there is nobody at the other end, and opening must not wait for one.
        let pipe = OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK).open(self.folder.join(WANT_NAME));
        if let Ok(mut pipe) = pipe {
            let _ = pipe.write_all(format!("{line}\n").as_bytes());
        }
    }

    /// The shard's file, once it is there.
    fn wait_for(&mut self, shard: &Shard) -> Result<PathBuf, Failed> {
        let place = self.folder.join(HAVE_NAME).join(&shard.file);
        let error = place.with_file_name(format!("{}.error", shard.file));
        let mut asked: Option<Instant> = None;
        while !place.exists() {
            if let Ok(why) = fs::read_to_string(&error) {
                return Err(Failed::config(format!("shard {shard}: {why}")));
            }
            if asked.is_none_or(|at| at.elapsed() >= ASK_EVERY) {
                self.ask(&format!("!{}", shard.file));
                asked = Some(Instant::now());
            }
            self.turn()?;
        }
        Ok(place)
    }

    fn wait_for_all(&mut self) -> Result<(), Failed> {
        while !self.leaving.is_empty() {
            self.turn()?;
        }
        self.look()
    }

    /// Puts beside the outputs which of them are this rank's, and of what: who has only the store knows by these whether all are there.
    fn record(&mut self) -> Result<(), Failed> {
        let mut lines = Vec::with_capacity(self.shards.len());
        for shard in self.shards.values() {
            let output = stored(&self.folder, shard.index)?;
            let output = output.ok_or_else(|| Failed::new(format!("shard {shard} has no output, though it had one before")))?;
            lines.push(Recorded { shard: shard.file.clone(), output });
        }
        let name = record_name(self.rank, self.world_size);
        let (mark, place) = (self.folder.join(DONE_NAME).join(&name), self.out().join(&name));
        let draft = self.out().join(format!("{name}{DRAFT_END}"));
        fs::remove_file(&mark).or_else(not_found_is_fine).map_err(Failed::here("remove", &mark))?;
        let text = serde_json::to_vec(&lines).map_err(|error| Failed::new(error.to_string()))?;
        fs::write(&draft, text).and_then(|()| fs::rename(&draft, &place)).map_err(Failed::here("write", &place))?;
        let mut asked: Option<Instant> = None;
        while !mark.exists() {
            if asked.is_none_or(|at| at.elapsed() >= ASK_EVERY) {
                self.ask(&format!(">{name}"));
                asked = Some(Instant::now());
            }
            self.turn()?;
        }
        println!("everlit: all {} outputs of this rank are stored", self.shards.len());
        Ok(())
    }

    /// In the form that progress is read in.
    fn tell_step(&self) {
        println!("everlit: step {}/{}", self.stored, self.shards.len());
    }
}

/// The output of a shard that is in the store.
fn stored(folder: &Path, index: usize) -> Result<Option<Output>, Failed> {
    let mark = folder.join(DONE_NAME).join(mark_of(index));
    match fs::read(&mark) {
        Ok(text) => serde_json::from_slice(&text).map(Some).map_err(|error| Failed::new(format!("`{}`: {error}", mark.display()))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Failed::here("read", &mark)(error)),
    }
}

fn twice(one: &str, other: &str) -> Failed {
    Failed::config(format!("`{one}` and `{other}` are both outputs of one shard: write one file for each"))
}

/// The one output that a program has left in its folder.
fn only_file(draft: &Path, shard: &Shard) -> Result<String, Failed> {
    let mut names: Vec<OsString> = Vec::new();
    for entry in fs::read_dir(draft).map_err(Failed::here("read", draft))? {
        names.push(entry.map_err(Failed::here("read", draft))?.file_name());
    }
    match names.as_slice() {
        [] => Err(Failed::new(format!("shard {shard}: its program ended well and wrote nothing at {OUTPUT}"))),
        [one] => match one.to_str().filter(|name| is_output_of(name, &shard.file) && draft.join(name).is_file()) {
            Some(name) => Ok(name.into()),
            None => Err(Failed::config(format!(
                "shard {shard}: its program wrote `{}`, not a file named {OUTPUT} with at most a few characters after it",
                one.to_string_lossy()
            ))),
        },
        [one, other, ..] => Err(Failed::config(format!(
            "shard {shard}: its program wrote `{}` and `{}`: each shard has one output",
            one.to_string_lossy(),
            other.to_string_lossy()
        ))),
    }
}

#[cfg(test)]
mod tests;
