//! How a store is reached and what opens it: the variables that every tool of that store knows (`AWS_…`, `GOOGLE_…`, `AZURE_…`), from a job,
//! from the process's own environment, or from files.
//!
//! What a job brings comes first, and never half: with keys of its own it gets nothing of the process's credentials. No value is ever
//! printed; where the credentials are from is.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use super::place::Scheme;

const PREFIXES: [&str; 3] = ["AWS_", "GOOGLE_", "AZURE_"];
/// Variables that say who one is. A job that sets one of a store's brings all that it needs for that store.
const CREDENTIALS: [&str; 22] = [
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_SKIP_SIGNATURE",
    "AWS_ROLE_ARN",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "GOOGLE_SERVICE_ACCOUNT",
    "GOOGLE_SERVICE_ACCOUNT_PATH",
    "GOOGLE_SERVICE_ACCOUNT_KEY",
    "GOOGLE_APPLICATION_CREDENTIALS",
    "GOOGLE_SKIP_SIGNATURE",
    "AZURE_STORAGE_ACCOUNT_KEY",
    "AZURE_STORAGE_SAS_KEY",
    "AZURE_STORAGE_TOKEN",
    "AZURE_STORAGE_CLIENT_ID",
    "AZURE_STORAGE_CLIENT_SECRET",
    "AZURE_STORAGE_TENANT_ID",
    "AZURE_FEDERATED_TOKEN_FILE",
    "AZURE_USE_AZURE_CLI",
    "AZURE_SKIP_SIGNATURE",
];
/// A file that holds a credential is no larger.
const FILE_BYTES_MAX: u64 = 64 * 1024;

/// Variables by name, and where the credentials among them are from.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Settings {
    values: BTreeMap<String, String>,
    from: BTreeMap<&'static str, String>,
}

// No value is printed.
impl fmt::Debug for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.values.keys()).finish()
    }
}

impl Settings {
    /// Of this process: its environment; `NAME_FILE` for a file that holds `NAME`; and the file of shared AWS credentials.
    pub fn of_process() -> Self {
        Self::read(&std::env::vars().collect(), &|path| small_file(path))
    }

    fn read(env: &BTreeMap<String, String>, read_file: &dyn Fn(&Path) -> Option<String>) -> Self {
        let mut own = Self::default();
        for (name, value) in env.iter().filter(|(name, value)| is_ours(name) && !value.is_empty()) {
            own.set(name, value.clone(), "the environment");
        }
        for name in CREDENTIALS {
            if let Some(path) = env.get(&format!("{name}_FILE")).filter(|_| !own.values.contains_key(name))
                && let Some(text) = read_file(Path::new(path))
            {
                own.set(name, text.trim().into(), path);
            }
        }
        let profile = env.get("AWS_PROFILE").map_or("default", String::as_str);
        let place = env.get("AWS_SHARED_CREDENTIALS_FILE").map(PathBuf::from);
        let place = place.or_else(|| Some(Path::new(env.get("HOME")?).join(".aws/credentials")));
        if !own.brings("AWS_")
            && let Some(path) = place
            && let Some(text) = read_file(&path)
        {
            for (name, value) in profile_of(&text, profile) {
                own.set(&name, value, &format!("profile {profile} of {}", path.display()));
            }
        }
        own
    }

    /// The same for a job: its own variables come first.
    pub fn with_job(mut self, env: &BTreeMap<String, String>) -> Self {
        let mut job = Self::default();
        for (name, value) in env.iter().filter(|(name, _)| is_ours(name)) {
            job.set(name, value.clone(), "the job's env and secrets");
        }
        for prefix in PREFIXES {
            if job.brings(prefix) {
                self.values.retain(|name, _| !(name.starts_with(prefix) && CREDENTIALS.contains(&name.as_str())));
                self.from.remove(prefix);
            }
        }
        self.values.extend(job.values);
        self.from.extend(job.from);
        self
    }

    fn set(&mut self, name: &str, value: String, from: &str) {
        if CREDENTIALS.contains(&name)
            && let Some(prefix) = PREFIXES.into_iter().find(|prefix| name.starts_with(prefix))
        {
            self.from.insert(prefix, from.into());
        }
        self.values.insert(name.into(), value);
    }

    fn brings(&self, prefix: &str) -> bool {
        self.from.contains_key(prefix)
    }

    /// What `scheme` is opened with.
    pub(super) fn of(&self, scheme: Scheme) -> impl Iterator<Item = (&str, &str)> {
        let prefix = prefix(scheme);
        self.values.iter().filter(move |(name, _)| !prefix.is_empty() && name.starts_with(prefix)).map(|(name, value)| (&**name, &**value))
    }

    /// One of them.
    pub(super) fn get(&self, name: &str) -> Option<&str> {
        self.values.get(name).map(String::as_str)
    }

    /// Whose credentials they are, for people: what of them may be shown, and where they are from.
    pub(super) fn who(&self, scheme: Scheme) -> String {
        if scheme == Scheme::Folder {
            return "the user it runs as".into();
        }
        let from = self.from.get(prefix(scheme));
        let Some(from) = from else { return "no credentials but those of the machine's role, if it has one".into() };
        match (scheme, self.get("AWS_ACCESS_KEY_ID")) {
            (Scheme::S3, Some(key)) => format!("access key {}… from {from}", key.chars().take(4).collect::<String>()),
            _ => format!("credentials from {from}"),
        }
    }
}

fn prefix(scheme: Scheme) -> &'static str {
    match scheme {
        Scheme::S3 => "AWS_",
        Scheme::Gcs => "GOOGLE_",
        Scheme::Azure => "AZURE_",
        Scheme::Folder => "",
    }
}

fn is_ours(name: &str) -> bool {
    PREFIXES.iter().any(|prefix| name.starts_with(prefix))
}

fn small_file(path: &Path) -> Option<String> {
    let text = std::fs::metadata(path).ok().filter(|about| about.len() <= FILE_BYTES_MAX).and_then(|_| std::fs::read_to_string(path).ok());
    if text.is_none() && path.exists() {
        tracing::warn!(path = %path.display(), "a file of credentials could not be read");
    }
    text
}

/// The variables of one profile in a file of shared credentials.
fn profile_of(text: &str, profile: &str) -> Vec<(String, String)> {
    let mut inside = false;
    let mut found = Vec::new();
    for line in text.lines().map(str::trim) {
        if let Some(name) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            inside = name.trim() == profile;
        } else if inside && let Some((name, value)) = line.split_once('=') {
            let name = name.trim().to_ascii_uppercase();
            if is_ours(&name) {
                found.push((name, value.trim().to_string()));
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect()
    }

    fn shown(settings: &Settings) -> String {
        let all: Vec<String> = settings.of(Scheme::S3).map(|(name, value)| format!("{name}={value}")).collect();
        format!("{} | {}", all.join(" "), settings.who(Scheme::S3))
    }

    #[test]
    fn credentials_come_from_the_environment_else_from_files() {
        let files = |path: &Path| {
            match path.to_str() {
            Some("/run/key") => Some("  file-secret\n".into()),
            Some("/home/a/.aws/credentials") => Some(
                "# x\n[default]\naws_access_key_id = AKIADEFAULT\naws_secret_access_key=d=1\nregion = nowhere\n[other]\naws_access_key_id=AKIAOTHER".into(),
            ),
            _ => None,
        }
        };
        let read = |pairs: &[(&str, &str)]| shown(&Settings::read(&map(pairs), &files));
        assert_eq!(
            read(&[("AWS_ACCESS_KEY_ID", "AKIAENV"), ("AWS_SECRET_ACCESS_KEY", "s"), ("PATH", "/bin"), ("HOME", "/home/a")]),
            "AWS_ACCESS_KEY_ID=AKIAENV AWS_SECRET_ACCESS_KEY=s | access key AKIA… from the environment"
        );
        assert_eq!(
            read(&[("AWS_ACCESS_KEY_ID", "AKIAENV"), ("AWS_SECRET_ACCESS_KEY_FILE", "/run/key"), ("AWS_REGION", "")]),
            "AWS_ACCESS_KEY_ID=AKIAENV AWS_SECRET_ACCESS_KEY=file-secret AWS_SECRET_ACCESS_KEY_FILE=/run/key | access key AKIA… from /run/key"
        );
        assert_eq!(
            read(&[("HOME", "/home/a")]),
            "AWS_ACCESS_KEY_ID=AKIADEFAULT AWS_SECRET_ACCESS_KEY=d=1 | access key AKIA… from profile default of /home/a/.aws/credentials"
        );
        assert!(read(&[("HOME", "/home/a"), ("AWS_PROFILE", "other")]).starts_with("AWS_ACCESS_KEY_ID=AKIAOTHER AWS_PROFILE=other |"));
        assert_eq!(read(&[]), " | no credentials but those of the machine's role, if it has one");
    }

    #[test]
    fn a_job_with_keys_of_its_own_gets_nothing_of_the_node_s() {
        let node = Settings::read(
            &map(&[("AWS_ACCESS_KEY_ID", "NODE"), ("AWS_SECRET_ACCESS_KEY", "n"), ("AWS_SESSION_TOKEN", "t"), ("AWS_REGION", "r")]),
            &|_| None,
        );
        let job = node.clone().with_job(&map(&[("AWS_ACCESS_KEY_ID", "JOBKEY"), ("AWS_SECRET_ACCESS_KEY", "j"), ("OTHER", "x")]));
        assert_eq!(
            shown(&job),
            "AWS_ACCESS_KEY_ID=JOBKEY AWS_REGION=r AWS_SECRET_ACCESS_KEY=j | access key JOBK… from the job's env and secrets"
        );
        let elsewhere = node.with_job(&map(&[("AWS_ENDPOINT_URL", "http://s3")]));
        assert!(shown(&elsewhere).ends_with("| access key NODE… from the environment"), "{}", shown(&elsewhere));
        assert!(!format!("{elsewhere:?}").contains("NODE"), "no value is printed");
    }
}
