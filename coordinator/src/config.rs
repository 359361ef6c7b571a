//! The settings of `everlit up`: flag, then environment `EVERLIT_<FLAG>`, then the TOML file, then the default.
//!
//! Nothing is bound or made here: a wrong setting is refused before anything happens. Every key of the file is a flag's name; one that is
//! not is an error that names it, for a misspelt setting must not be a default.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use clap::Args;
use clap::builder::BoolishValueParser;
use everlit_api::time::Millis;
use toml::Value;

/// The flags of `everlit up`; what is not given comes from the environment, the file or the defaults.
#[derive(Debug, Clone, Default, Args)]
pub struct UpArgs {
    /// Where the coordinator listens [default: 127.0.0.1:8000]
    #[arg(long, env = "EVERLIT_LISTEN", value_name = "ADDRESS:PORT")]
    pub listen: Option<Listen>,
    /// Folder for everything that is kept; made if missing [default: ~/.local/share/everlit]
    #[arg(long, env = "EVERLIT_DATA_DIR", value_name = "FOLDER")]
    pub data_dir: Option<PathBuf>,
    /// Time between an agent's reports [default: 1s]
    #[arg(long, env = "EVERLIT_REPORT_INTERVAL", value_name = "TIME")]
    pub report_interval: Option<Millis>,
    /// A node that is not heard of for this long is lost [default: 10s]
    #[arg(long, env = "EVERLIT_NODE_TIMEOUT", value_name = "TIME")]
    pub node_timeout: Option<Millis>,
    /// Ports that MASTER_PORT is taken from [default: 29500-29999]
    #[arg(long, env = "EVERLIT_RENDEZVOUS_PORTS", value_name = "FIRST-LAST")]
    pub rendezvous_ports: Option<PortRange>,
    /// What is logged: error, warn, info, debug, trace, or a filter like info,everlit=debug [default: info]
    #[arg(long, env = "EVERLIT_LOG", value_name = "FILTER")]
    pub log: Option<String>,
    /// Run no agent on this machine
    #[arg(long, env = "EVERLIT_NO_LOCAL_AGENT", num_args = 0..=1, default_missing_value = "true", value_parser = BoolishValueParser::new())]
    pub no_local_agent: Option<bool>,
    /// Final jobs are removed after this long [default: 30d]
    #[arg(long, env = "EVERLIT_RETAIN_JOBS", value_name = "TIME")]
    pub retain_jobs: Option<Millis>,
    /// A TOML file of settings, named like the flags
    #[arg(long, env = "EVERLIT_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
}

/// The settings of `everlit up`, complete and checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UpConfig {
    /// Where the coordinator listens.
    pub listen: SocketAddr,
    /// Folder for everything that is kept; absolute.
    pub data_dir: PathBuf,
    /// Time between an agent's reports.
    pub report_interval: Millis,
    /// A node that is not heard of for this long is lost.
    pub node_timeout: Millis,
    /// Ports that `MASTER_PORT` is taken from.
    pub rendezvous_ports: PortRange,
    /// Filter of the log.
    pub log: String,
    /// Run no agent on this machine.
    pub no_local_agent: bool,
    /// Final jobs are removed after this long.
    pub retain_jobs: Millis,
}

/// A setting that can not be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file can not be read.
    #[error("can not read the config file {0}: {1}")]
    Unreadable(PathBuf, String),
    /// A key of the file is not a setting.
    #[error("unknown key `{key}` in {file}: known are {known}")]
    UnknownKey {
        /// The key.
        key: String,
        /// The file.
        file: PathBuf,
        /// Every key.
        known: String,
    },
    /// A value can not be used.
    #[error("{name} {detail}")]
    Bad {
        /// The setting.
        name: &'static str,
        /// What is wrong with it.
        detail: String,
    },
}

/// An address to listen on; `localhost` is one too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Listen(pub SocketAddr);

impl FromStr for Listen {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let plain = text.strip_prefix("localhost:").map_or(text.into(), |port| format!("127.0.0.1:{port}"));
        plain.parse().map(Self).map_err(|_| "must be an address and a port, like 127.0.0.1:8000".into())
    }
}

/// Ports from first to last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PortRange {
    /// The first.
    pub first: u16,
    /// The last, which is in it.
    pub last: u16,
}

impl FromStr for PortRange {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parse = || {
            let (first, last) = text.split_once('-')?;
            let range = Self { first: first.trim().parse().ok()?, last: last.trim().parse().ok()? };
            (range.first >= 1024 && range.first <= range.last).then_some(range)
        };
        parse().ok_or_else(|| "must be two ports from 1024 on, like 29500-29999".into())
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.first, self.last)
    }
}

const KEYS: [&str; 8] =
    ["listen", "data-dir", "report-interval", "node-timeout", "rendezvous-ports", "log", "no-local-agent", "retain-jobs"];

/// The settings of a TOML file, by flag name.
#[derive(Debug, Default)]
struct File {
    table: toml::Table,
}

impl File {
    fn read(path: &Path) -> Result<Self, ConfigError> {
        let unreadable = |why: String| ConfigError::Unreadable(path.into(), why);
        let text = std::fs::read_to_string(path).map_err(|error| unreadable(error.to_string()))?;
        let raw: toml::Table = text.parse().map_err(|error: toml::de::Error| unreadable(error.to_string().trim_end().into()))?;
        let mut table = toml::Table::new();
        for (key, value) in raw {
            let name = key.replace('_', "-");
            if !KEYS.contains(&name.as_str()) || table.contains_key(&name) {
                return Err(ConfigError::UnknownKey { key, file: path.into(), known: KEYS.join(", ") });
            }
            table.insert(name, value);
        }
        Ok(Self { table })
    }

    /// A setting through the same reader as its flag.
    fn get<T: FromStr<Err: fmt::Display>>(&self, name: &'static str) -> Result<Option<T>, ConfigError> {
        let text = match self.table.get(name) {
            None => return Ok(None),
            Some(Value::String(text)) => text.clone(),
            Some(Value::Integer(number)) => number.to_string(),
            Some(Value::Boolean(truth)) => truth.to_string(),
            Some(_) => return Err(ConfigError::Bad { name, detail: "must be one value in the config file".into() }),
        };
        text.parse().map(Some).map_err(|bad: T::Err| ConfigError::Bad { name, detail: bad.to_string() })
    }
}

/// Puts flags, environment (clap has read it into the flags), file and defaults together, and checks the whole.
pub fn load(args: &UpArgs) -> Result<UpConfig, ConfigError> {
    let file = args.config.as_deref().map_or(Ok(File::default()), File::read)?;
    let data_dir = args.data_dir.clone().map_or_else(|| file.get("data-dir"), |given| Ok(Some(given)))?;
    let config = UpConfig {
        listen: pick(args.listen, &file, "listen")?.unwrap_or(Listen(SocketAddr::from(([127, 0, 0, 1], 8000)))).0,
        data_dir: absolute(data_dir.unwrap_or_else(default_data_dir))?,
        report_interval: pick(args.report_interval, &file, "report-interval")?.unwrap_or(Millis::secs(1)),
        node_timeout: pick(args.node_timeout, &file, "node-timeout")?.unwrap_or(Millis::secs(10)),
        rendezvous_ports: pick(args.rendezvous_ports, &file, "rendezvous-ports")?.unwrap_or(PortRange { first: 29_500, last: 29_999 }),
        log: pick(args.log.clone(), &file, "log")?.unwrap_or_else(|| "info".into()),
        no_local_agent: pick(args.no_local_agent, &file, "no-local-agent")?.unwrap_or(false),
        retain_jobs: pick(args.retain_jobs, &file, "retain-jobs")?.unwrap_or(Millis::secs(30 * 86_400)),
    };
    check(config)
}

fn pick<T: FromStr<Err: fmt::Display>>(given: Option<T>, file: &File, name: &'static str) -> Result<Option<T>, ConfigError> {
    given.map_or_else(|| file.get(name), |given| Ok(Some(given)))
}

fn check(config: UpConfig) -> Result<UpConfig, ConfigError> {
    let bad = |name, detail: String| Err(ConfigError::Bad { name, detail });
    if !config.listen.ip().is_loopback() {
        let ip = match config.listen.ip() {
            IpAddr::V4(_) => "127.0.0.1",
            IpAddr::V6(_) => "[::1]",
        };
        let detail =
            format!("{}: other machines could call it, which needs tokens and TLS, and they are not built: listen on {ip}", config.listen);
        return bad("listen", detail);
    }
    if !(100..=3_600_000).contains(&config.report_interval.0) {
        return bad("report-interval", "must be from 100ms to 1h".into());
    }
    if config.node_timeout.0 < 2 * config.report_interval.0 || config.node_timeout.0 > 86_400_000 {
        return bad("node-timeout", format!("must be from twice the report interval ({}) to 1d", config.report_interval));
    }
    if config.retain_jobs < Millis::secs(60) {
        return bad("retain-jobs", "must be at least 1m".into());
    }
    Ok(config)
}

/// Where data is kept unless told otherwise: the XDG data folder, or one below the current folder without a home.
pub fn default_data_dir() -> PathBuf {
    let folder = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let base = folder("XDG_DATA_HOME").or_else(|| folder("HOME").map(|home| home.join(".local/share")));
    base.map_or_else(|| PathBuf::from("everlit-data"), |base| base.join("everlit"))
}

fn absolute(path: PathBuf) -> Result<PathBuf, ConfigError> {
    std::path::absolute(&path).map_err(|error| ConfigError::Bad { name: "data-dir", detail: error.to_string() })
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn with_file(text: &str, args: UpArgs) -> Result<UpConfig, ConfigError> {
        let mut file = tempfile::NamedTempFile::new().expect("a file");
        file.write_all(text.as_bytes()).expect("written");
        load(&UpArgs { config: Some(file.path().into()), ..args })
    }

    #[test]
    fn flags_win_over_the_file_and_the_file_over_defaults() {
        let args = UpArgs { listen: Some("127.0.0.1:9000".parse().expect("an address")), ..UpArgs::default() };
        let text = "listen = \"127.0.0.1:7000\"\ndata_dir = \"/tmp/x\"\nrendezvous-ports = \"30000-30010\"\nno-local-agent = true\n";
        let config = with_file(text, args).expect("settings");
        assert_eq!(config.listen.port(), 9000);
        assert_eq!(config.data_dir, Path::new("/tmp/x"));
        assert_eq!(config.rendezvous_ports, PortRange { first: 30_000, last: 30_010 });
        assert!(config.no_local_agent);
        assert_eq!((config.report_interval, config.retain_jobs), (Millis::secs(1), Millis::secs(2_592_000)));
    }

    #[test]
    fn wrong_settings_are_named() {
        let none = UpArgs::default;
        for (text, part) in [
            ("lisen = 1", "unknown key `lisen`"),
            ("data-dir = \"/a\"\ndata_dir = \"/b\"", "unknown key `data_dir`"),
            ("listen = \"here\"", "listen must be an address"),
            ("listen = \"0.0.0.0:8000\"", "needs tokens and TLS"),
            ("listen = \"[::]:8000\"", "listen on [::1]"),
            ("report-interval = 5", "report-interval is not a duration"),
            ("report-interval = \"1ms\"", "from 100ms to 1h"),
            ("node-timeout = \"1s\"", "twice the report interval"),
            ("rendezvous-ports = \"1-2\"", "rendezvous-ports must be two ports"),
            ("no-local-agent = \"x\"", "no-local-agent"),
            ("retain-jobs = \"1s\"", "at least 1m"),
            ("log = [1]", "log must be one value"),
            ("= 1", "can not read the config file"),
        ] {
            let error = with_file(text, none()).expect_err(text).to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
        let missing = load(&UpArgs { config: Some("/does/not/exist.toml".into()), ..none() }).expect_err("no file");
        assert!(missing.to_string().contains("/does/not/exist.toml"), "{missing}");
    }
}
