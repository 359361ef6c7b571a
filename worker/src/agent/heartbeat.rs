//! Reading `HEARTBEAT`: a file that any program may write, so everything about it is checked.
//!
//! Only a regular file of at most 4 KiB is read, without following links and without waiting (a fifo must not hold the agent up). It is
//! a heartbeat of this incarnation when it says nothing else about its rank and attempt; whether its `seq` is new the engine knows.

use std::fs::OpenOptions;
use std::io::Read;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use everlit_api::agent::Beat;
use everlit_api::ids::Incarnation;
use everlit_api::manifest::{HEARTBEAT_BYTES_MAX, Phase, SaveError};
use nix::libc;

use super::folders::HEARTBEAT_NAME;
use super::limits::{METRIC_NAME_MAX, METRICS_MAX, SAVE_ERROR_CHARS_MAX};

/// Which version of the file was read: a file that did not change is not read again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Seen(u64, i64, i64);

/// A heartbeat.
#[derive(Debug)]
pub(super) struct Heard {
    /// Its number in the order of this incarnation.
    pub seq: u64,
    /// What it says of progress.
    pub beat: Box<Beat>,
    /// The newest save that failed.
    pub save_error: Option<SaveError>,
}

/// What a look at the file found.
#[derive(Debug)]
pub(super) enum Look {
    /// Nothing, or what was there before.
    Nothing,
    /// A heartbeat.
    Beat(Seen, Heard),
    /// Something else; it is ignored and counted.
    Bad(Option<Seen>, &'static str),
}

/// Looks at the heartbeat file of a run folder. `seen`: what the last look found.
pub(super) fn look(run_folder: &Path, incarnation: Incarnation, seen: Option<Seen>) -> Look {
    let options = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY).clone();
    let file = match options.open(run_folder.join(HEARTBEAT_NAME)) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Look::Nothing,
        Err(_) => return Look::Bad(None, "it can not be opened"),
    };
    let Ok(about) = file.metadata() else { return Look::Bad(None, "it can not be read") };
    let now = Seen(about.ino(), about.mtime(), about.mtime_nsec());
    if seen == Some(now) {
        return Look::Nothing;
    }
    if !about.is_file() {
        return Look::Bad(Some(now), "it is not a regular file");
    }
    let mut text = Vec::new();
    if file.take(HEARTBEAT_BYTES_MAX + 1).read_to_end(&mut text).is_err() {
        return Look::Bad(Some(now), "it can not be read");
    }
    match parse(&text, incarnation) {
        Ok(heard) => Look::Beat(now, heard),
        Err(why) => Look::Bad(Some(now), why),
    }
}

/// Reads the text of a heartbeat field by field, so that one bad field costs only itself.
pub(super) fn parse(text: &[u8], incarnation: Incarnation) -> Result<Heard, &'static str> {
    if text.len() as u64 > HEARTBEAT_BYTES_MAX {
        return Err("it is longer than 4 KiB");
    }
    let value: serde_json::Value = serde_json::from_slice(text).map_err(|_| "it is not JSON")?;
    let seq = value["seq"].as_u64().ok_or("it has no `seq`")?;
    // A process that took another's place has that one's rank, and says so.
    let place = if value["seat"].is_null() { "rank" } else { "seat" };
    for (name, own) in [(place, incarnation.rank), ("attempt", incarnation.attempt)] {
        match &value[name] {
            serde_json::Value::Null => {}
            other if other.as_u64() == Some(u64::from(own)) => {}
            _ => return Err("it is of another rank or attempt"),
        }
    }
    let count = |name: &str| value[name].as_u64();
    let metrics = value["metrics"].as_object().into_iter().flatten();
    let metrics = metrics.filter(|(name, _)| !name.is_empty() && name.chars().count() <= METRIC_NAME_MAX);
    let beat = Beat {
        incarnation: Some(incarnation),
        heartbeat: true,
        generation: count("generation").and_then(|n| u32::try_from(n).ok()).unwrap_or(0),
        phase: serde_json::from_value::<Option<Phase>>(value["phase"].clone()).unwrap_or_default(),
        step: count("step"),
        total_steps: count("total_steps"),
        samples: count("samples"),
        loss: value["loss"].as_f64().filter(|loss| loss.is_finite()),
        metrics: metrics
            .filter_map(|(name, number)| Some((name.clone(), number.as_f64().filter(|n| n.is_finite())?)))
            .take(METRICS_MAX)
            .collect(),
        saves_on_signal: value["saves_on_signal"] == true,
        in_place: value["in_place"].as_bool(),
        age_ms: 0,
    };
    let reason = || {
        let text = value["save_error"]["reason"].as_str().unwrap_or("it did not say why");
        text.chars().take(SAVE_ERROR_CHARS_MAX).collect()
    };
    let save_error = value["save_error"]["step"].as_u64().map(|step| SaveError { step, reason: reason() });
    Ok(Heard { seq, beat: Box::new(beat), save_error })
}

#[cfg(test)]
mod tests {
    use super::*;
    use everlit_api::ids::JobId;

    fn own() -> Incarnation {
        Incarnation { job: JobId::from_parts(1, 2), attempt: 1, rank: 3 }
    }

    #[test]
    fn the_contracts_example_is_read() {
        let text = br#"{"seq":17,"pid":4242,"rank":3,"attempt":1,"phase":"train","step":120,"total_steps":2000,"samples":7680,"loss":2.31,
            "metrics":{"lr":0.0003},"time":"2026-01-01T00:00:00Z"}"#;
        let Heard { seq, beat, save_error } = parse(text, own()).unwrap();
        assert_eq!((beat.saves_on_signal, save_error), (false, None));
        assert_eq!((seq, beat.phase, beat.step, beat.loss, beat.metrics["lr"]), (17, Some(Phase::Train), Some(120), Some(2.31), 0.0003));
    }

    #[test]
    fn one_bad_field_costs_only_itself() {
        let many: Vec<String> = (0..100).map(|n| format!("\"m{n}\":{n}")).collect();
        let long = "n".repeat(65);
        let text = format!(r#"{{"seq":1,"step":-5,"loss":"NaN","phase":"dance","metrics":{{"{long}":1,"x":null,{}}}}}"#, many.join(","));
        let beat = parse(text.as_bytes(), own()).unwrap().beat;
        assert_eq!((beat.step, beat.loss, beat.phase, beat.metrics.len()), (None, None, None, METRICS_MAX));
        assert!(parse(br#"{"seq":1,"loss":1e999}"#, own()).is_err());
    }

    #[test]
    fn failed_saves_and_the_word_that_a_signal_saves_are_read() {
        let save_error = |text: &str| parse(text.as_bytes(), own()).unwrap().save_error;
        let long = "x".repeat(600);
        let told = save_error(&format!(r#"{{"seq":1,"save_error":{{"step":50,"reason":"{long}"}}}}"#)).unwrap();
        assert_eq!((told.step, told.reason.len()), (50, SAVE_ERROR_CHARS_MAX));
        assert_eq!(save_error(r#"{"seq":1,"save_error":{"step":7}}"#).unwrap().reason, "it did not say why");
        for none in [r#"{"seq":1,"save_error":null}"#, r#"{"seq":1,"save_error":{"reason":"x"}}"#, r#"{"seq":1,"save_error":"x"}"#] {
            assert_eq!(save_error(none), None, "{none}");
        }
        assert!(parse(br#"{"seq":1,"saves_on_signal":true}"#, own()).unwrap().beat.saves_on_signal);
        assert!(!parse(br#"{"seq":1,"saves_on_signal":"yes"}"#, own()).unwrap().beat.saves_on_signal);
    }

    #[test]
    fn foreign_and_torn_texts_are_refused() {
        let texts = [
            r#"{"seq":1,"rank":4}"#,
            r#"{"seq":1,"rank":-3}"#,
            r#"{"seq":1,"attempt":2}"#,
            r#"{"seq":-1}"#,
            r#"{"step":1}"#,
            r#"{"seq":1"#,
            "[]",
            "",
        ];
        for text in texts {
            assert!(parse(text.as_bytes(), own()).is_err(), "{text}");
        }
        assert!(parse(&[b' '; 5000], own()).is_err());
    }

    #[test]
    fn only_a_regular_file_is_read_and_only_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(HEARTBEAT_NAME);
        let look = |seen| super::look(dir.path(), own(), seen);
        assert!(matches!(look(None), Look::Nothing));
        std::fs::write(&path, r#"{"seq":1}"#).unwrap();
        let Look::Beat(seen, Heard { seq: 1, .. }) = look(None) else { panic!("not read") };
        assert!(matches!(look(Some(seen)), Look::Nothing));
        std::fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("/etc/hostname", &path).unwrap();
        assert!(matches!(look(None), Look::Bad(None, _)));
        std::fs::remove_file(&path).unwrap();
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(matches!(look(None), Look::Bad(Some(_), _)));
        std::fs::remove_file(&path).unwrap();
        std::fs::create_dir(&path).unwrap();
        assert!(matches!(look(None), Look::Bad(..)));
        std::fs::remove_dir(&path).unwrap();
        std::fs::File::create(&path).unwrap().set_len(1 << 30).unwrap();
        assert!(matches!(look(None), Look::Bad(Some(_), "it is longer than 4 KiB")));
    }
}
