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
use everlit_api::auth::Role;
use everlit_api::ports::PortRange;
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
    /// The certificate of the doors, PEM, the server's own first
    #[arg(long, env = "EVERLIT_TLS_CERT", value_name = "FILE")]
    pub tls_cert: Option<PathBuf>,
    /// Its private key, PEM
    #[arg(long, env = "EVERLIT_TLS_KEY", value_name = "FILE")]
    pub tls_key: Option<PathBuf>,
    /// TLS with a CA that is made in the data folder (ca/ca.pem, which clients need)
    #[arg(long, env = "EVERLIT_OWN_CA", num_args = 0..=1, default_missing_value = "true", value_parser = BoolishValueParser::new())]
    pub own_ca: Option<bool>,
    /// With --own-ca: more names or addresses that this machine is called by, separated by commas
    #[arg(long, env = "EVERLIT_TLS_NAMES", value_name = "NAMES")]
    pub tls_names: Option<Names>,
    /// Other machines may call without TLS: something in front of this ends it. Tokens are still demanded
    #[arg(long, env = "EVERLIT_INSECURE_HTTP", num_args = 0..=1, default_missing_value = "true", value_parser = BoolishValueParser::new())]
    pub insecure_http: Option<bool>,
    /// What callers without a token may, for trials: viewer, user, operator or admin [default: admin on loopback, else nothing]
    #[arg(long, env = "EVERLIT_ANONYMOUS", value_name = "ROLE")]
    pub anonymous: Option<Role>,
    /// Lines of the audit log are removed after this long, at least 30d [default: 365d]
    #[arg(long, env = "EVERLIT_RETAIN_AUDIT", value_name = "TIME")]
    pub retain_audit: Option<Millis>,
    /// Certificates of nodes live this long, from 10s to 365d, and are renewed at two thirds of it [default: 7d]
    #[arg(long, env = "EVERLIT_NODE_CERTIFICATE_TTL", value_name = "TIME")]
    pub node_certificate_ttl: Option<Millis>,
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
    /// Where the doors' certificate comes from; `None`: no TLS.
    pub tls: Option<Tls>,
    /// Something in front of the doors ends TLS.
    pub insecure_http: bool,
    /// What callers without a token may, where it is given.
    pub anonymous: Option<Role>,
    /// Lines of the audit log are removed after this long.
    pub retain_audit: Millis,
    /// Life of a node's certificate.
    pub node_certificate_ttl: Millis,
}

/// Where the doors' certificate comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Tls {
    /// From files: the chain, and its key.
    Files(PathBuf, PathBuf),
    /// From a CA of our own, with these names beside the machine's.
    OwnCa(Vec<String>),
}

/// Names separated by commas.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Names(pub Vec<String>);

impl FromStr for Names {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let sane = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | ':' | '_');
        let names: Vec<String> = text.split(',').map(|name| name.trim().to_string()).collect();
        let fine = names.len() <= NAMES_MAX && names.iter().all(|name| !name.is_empty() && name.len() <= 253 && name.chars().all(sane));
        if fine {
            Ok(Self(names))
        } else {
            Err("must be names or addresses of hosts, separated by commas, like coordinator.example,10.0.0.5".into())
        }
    }
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

/// The audit log keeps so much whatever it is told; migration 0004 holds the same.
pub const AUDIT_KEPT: Millis = Millis::secs(30 * 86_400);
/// Names in a certificate at most.
const NAMES_MAX: usize = 100;

const KEYS: [&str; 16] = [
    "listen",
    "data-dir",
    "report-interval",
    "node-timeout",
    "rendezvous-ports",
    "log",
    "no-local-agent",
    "retain-jobs",
    "tls-cert",
    "tls-key",
    "own-ca",
    "tls-names",
    "insecure-http",
    "anonymous",
    "retain-audit",
    "node-certificate-ttl",
];

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
    let doors = Doors {
        cert: args.tls_cert.clone().map_or_else(|| file.get("tls-cert"), |given| Ok(Some(given)))?,
        key: args.tls_key.clone().map_or_else(|| file.get("tls-key"), |given| Ok(Some(given)))?,
        own_ca: pick(args.own_ca, &file, "own-ca")?.unwrap_or(false),
        names: pick(args.tls_names.clone(), &file, "tls-names")?,
        insecure_http: pick(args.insecure_http, &file, "insecure-http")?.unwrap_or(false),
    };
    let listen = pick(args.listen, &file, "listen")?.unwrap_or(Listen(SocketAddr::from(([127, 0, 0, 1], 8000)))).0;
    let insecure_http = doors.insecure_http;
    let config = UpConfig {
        insecure_http,
        listen,
        tls: doors.check(listen)?,
        anonymous: pick(args.anonymous, &file, "anonymous")?,
        retain_audit: pick(args.retain_audit, &file, "retain-audit")?.unwrap_or(Millis::secs(365 * 86_400)),
        node_certificate_ttl: pick(args.node_certificate_ttl, &file, "node-certificate-ttl")?.unwrap_or(Millis::secs(7 * 86_400)),
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

/// What was said of TLS.
struct Doors {
    cert: Option<PathBuf>,
    key: Option<PathBuf>,
    own_ca: bool,
    names: Option<Names>,
    insecure_http: bool,
}

impl Doors {
    fn check(self, listen: SocketAddr) -> Result<Option<Tls>, ConfigError> {
        let bad = |name, detail: String| Err(ConfigError::Bad { name, detail });
        if self.names.is_some() && !self.own_ca {
            return bad("tls-names", "are for a certificate of our own: give --own-ca too".into());
        }
        let tls = match (self.cert, self.key, self.own_ca) {
            (None, None, false) => None,
            (Some(cert), Some(key), false) => Some(Tls::Files(cert, key)),
            (None, None, true) => Some(Tls::OwnCa(self.names.unwrap_or_default().0)),
            (Some(_), None, _) => return bad("tls-key", "is missing: --tls-cert needs its private key".into()),
            (None, Some(_), _) => return bad("tls-cert", "is missing: --tls-key needs its certificate".into()),
            (Some(_), Some(_), true) => return bad("own-ca", "is instead of --tls-cert and --tls-key: give one of both".into()),
        };
        if tls.is_some() && self.insecure_http {
            return bad("insecure-http", "is for doors without TLS: leave it out, or the certificate".into());
        }
        if !listen.ip().is_loopback() && tls.is_none() && !self.insecure_http {
            let ip = match listen.ip() {
                IpAddr::V4(_) => "127.0.0.1",
                IpAddr::V6(_) => "[::1]",
            };
            let ways =
                "--own-ca makes a certificate, --tls-cert and --tls-key name one, --insecure-http is for a proxy in front that ends TLS";
            return bad(
                "listen",
                format!(
                    "{listen}: other machines could call it, and tokens would cross the network in the clear: {ways}; or listen on {ip}"
                ),
            );
        }
        Ok(tls)
    }
}

fn check(config: UpConfig) -> Result<UpConfig, ConfigError> {
    let bad = |name, detail: String| Err(ConfigError::Bad { name, detail });
    if config.retain_audit < AUDIT_KEPT {
        return bad("retain-audit", "must be at least 30d".into());
    }
    if !(100..=3_600_000).contains(&config.report_interval.0) {
        return bad("report-interval", "must be from 100ms to 1h".into());
    }
    if config.node_timeout.0 < 2 * config.report_interval.0 || config.node_timeout.0 > 86_400_000 {
        return bad("node-timeout", format!("must be from twice the report interval ({}) to 1d", config.report_interval));
    }
    if !(Millis::secs(10)..=Millis::secs(365 * 86_400)).contains(&config.node_certificate_ttl) {
        return bad("node-certificate-ttl", "must be from 10s to 365d".into());
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
            ("listen = \"0.0.0.0:8000\"", "--own-ca makes a certificate"),
            ("tls-cert = \"c\"", "tls-key is missing"),
            ("tls-key = \"k\"", "tls-cert is missing"),
            ("tls-cert = \"c\"\ntls-key = \"k\"\nown-ca = true", "give one of both"),
            ("own-ca = true\ninsecure-http = true", "doors without TLS"),
            ("tls-names = \"a\"", "give --own-ca too"),
            ("own-ca = true\ntls-names = \"a b\"", "names or addresses of hosts"),
            ("anonymous = \"root\"", "must be one of viewer, user"),
            ("retain-audit = \"1d\"", "at least 30d"),
            ("node-certificate-ttl = \"1s\"", "from 10s to 365d"),
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
