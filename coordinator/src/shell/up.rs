//! `everlit up`: read everything without binding anything, then open, serve, and end the way one was asked to.
//!
//! Ctrl-C drains this machine's agent and ends both; a second one ends at once and leaves ranks running. SIGTERM ends the coordinator
//! alone (in a container, whose processes end with it, it drains like Ctrl-C).

use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, bail};
use everlit_api::agent::ToAgent;
use everlit_api::auth::{NewToken, Role, TOKEN_TTL};
use everlit_api::ids::NodeId;
use everlit_api::join::AGENTS_NAME;
use everlit_api::server::Policy;
use everlit_api::service;
use everlit_api::time::{Millis, Timestamp};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};

use super::agents::Agents;
use super::ca::Ca;
use super::control::Coordinator;
use super::driver::{Driver, Handle, INPUTS_MAX, Input};
use super::local::{LocalAgent, beside, reached_at, try_lock};
use super::members::{Joining, Members};
use super::metrics::Metrics;
use super::packages::Packages;
use super::postmortems;
use super::serve::serve;
use super::store::{Store, TOKEN_KEPT_MS};
use super::tls::{Acceptor, Certificates, PlainListener, Source, TlsListener, own_names};
use super::tokens::{self, Tokens};
use crate::config::Tls;
use crate::engine::{self, Event};

/// Time for the first token to be durable.
const FIRST_TOKEN_MAX: Duration = Duration::from_secs(5);
/// However short the node timeout is, a link may be silent for so long.
const LINK_SILENCE_MIN: Millis = Millis::secs(1);
/// The first admin token, in the data folder.
const ADMIN_TOKEN: &str = "admin.token";
/// Between two looks at what is old.
const HOUSEKEEPING: Duration = Duration::from_secs(60);
/// For open answers to be finished at the end.
const CLOSE_WAIT: Duration = Duration::from_secs(2);

/// Everything that `up` may be told.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Where to listen.
    pub listen: SocketAddr,
    /// Everything durable.
    pub data_dir: PathBuf,
    /// Between two reports of a node.
    pub report_interval: Millis,
    /// Silence after which a node counts as lost.
    pub node_timeout: Millis,
    /// First and last port for `MASTER_PORT`.
    pub rendezvous_ports: (u16, u16),
    /// Final jobs go after this.
    pub retain_jobs: Millis,
    /// Run an agent on this machine.
    pub local_agent: bool,
    /// Where the doors' certificate comes from; `None`: no TLS.
    pub tls: Option<Tls>,
    /// Something in front of the doors ends TLS.
    pub insecure_http: bool,
    /// What callers without a token may, where it is given.
    pub anonymous: Option<Role>,
    /// Lines of the audit log go after this.
    pub retain_audit: Millis,
    /// Life of a node's certificate.
    pub node_certificate_ttl: Millis,
}

/// How it was asked to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// Save and end everything of this machine.
    Drain,
    /// End the coordinator alone.
    Leave,
}

/// Runs until it is told to end.
pub async fn up(settings: Settings) -> anyhow::Result<()> {
    let dir = &settings.data_dir;
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .with_context(|| format!("--data-dir {} can not be made", dir.display()))?;
    let dir = std::fs::canonicalize(dir)?;
    let Some(lock) = try_lock(&dir.join("coordinator.lock")).with_context(|| format!("{}", dir.display()))? else {
        bail!("another coordinator runs on {}: end it, or use another --data-dir", dir.display());
    };
    let store = Arc::new(Store::open(&dir).await?);
    let metrics = Arc::new(Metrics::default());
    let silence_max = settings.node_timeout.max(LINK_SILENCE_MIN);
    let agents = Arc::new(Agents::new(settings.report_interval, silence_max));
    let config = engine::Config { node_timeout_ms: settings.node_timeout.0, ports: settings.rendezvous_ports, ..engine::Config::default() };
    let token: Arc<str> = agent_token(&dir)?.into();
    let (mut driver, clock, news) = Driver::load(config, store.clone(), agents.clone(), metrics.clone(), token.clone()).await?;

    let tls = settings.tls.clone().map(|tls| Doors::open(tls, &dir, &settings)).transpose()?;
    let listener = TcpListener::bind(settings.listen).await.with_context(|| {
        format!("{} can not be listened on: is another everlit or another program there? --listen takes another address", settings.listen)
    })?;
    let address = listener.local_addr()?;
    let own = OwnDoor::open(&settings).await?;
    let url = format!("{}://{address}", if tls.is_some() { "https" } else { "http" });
    let coordinator_file = dir.join("coordinator.json");
    write_whole(&coordinator_file, &serde_json::json!({ "url": own.url(&url), "token": &*token, "pid": std::process::id() }).to_string())?;

    let (inputs, input_queue) = mpsc::channel(INPUTS_MAX);
    let handle = Handle { inputs: inputs.clone(), news };
    let (postmortems, to_keep) = mpsc::channel(postmortems::WAITING_MAX);
    driver.keeps_postmortems(postmortems);
    let mut driving = tokio::spawn(driver.run(input_queue));
    let ready = Arc::new(AtomicBool::new(true));
    let coordinator = Coordinator {
        handle,
        store: store.clone(),
        agents: agents.clone(),
        metrics,
        clock,
        agent_token: token,
        tokens: Arc::new(Tokens::new(store.tokens().await?)),
        members: Arc::new(Members::new(store.join_tokens().await?, store.members().await?)),
        joining: tls.as_ref().map(|doors| doors.joining.clone()),
        agent_silence_max: silence_max.as_duration(),
        auth: auth(&settings).into(),
        packages: Arc::new(Packages::open(&dir).with_context(|| format!("the folder of packages in {}", dir.display()))?),
        ready: ready.clone(),
    };
    let keeping = tokio::spawn(postmortems::run(coordinator.clone(), to_keep));
    if let Err(error) = first_token(&coordinator, &dir).await {
        // Behind locks nobody could come in. Elsewhere nobody needs it, and a full disk keeps no coordinator from its start.
        if is_open(&settings) {
            return Err(error);
        }
        tracing::warn!("no admin token was made: {error:#}");
    }
    let reached_at = reached_at(address.ip());
    let local = LocalAgent { dir: dir.join("agent"), coordinator_file, program: beside("everlit-agent")?, address: reached_at };
    let keeper = settings.local_agent.then(|| {
        let local = local.clone();
        tokio::spawn(async move { local.keep().await })
    });
    let housekeeper = tokio::spawn(keep_house(coordinator.clone(), settings.retain_jobs, settings.retain_audit));

    println!("everlit {} listens on {url} (data in {})", env!("CARGO_PKG_VERSION"), dir.display());
    // Nothing is at an address that stands for all of them.
    let near =
        if address.ip().is_unspecified() { url.replace(&address.to_string(), &format!("localhost:{}", address.port())) } else { url };
    println!("{}", how_to_begin(&settings, &near, &dir));
    if let Some(role) = settings.anonymous {
        tracing::warn!("--anonymous: whoever comes without a token may what {role} may");
    }
    let policy = policy(&settings);
    let router = everlit_api::server::router(Arc::new(coordinator.clone()), policy);
    let (close, closing) = watch::channel(false);
    own.serve(&coordinator, closing.clone());
    let acceptor = tls.as_ref().map(|doors| doors.acceptor.clone());
    let renewing = tls.map(|doors| doors.certificates.map(|own| tokio::spawn(own.keep())));
    let mut serving = match acceptor {
        None => tokio::spawn(serve(PlainListener(listener), router, closing)),
        Some(acceptor) => tokio::spawn(serve(TlsListener::new(listener, acceptor)?, router, closing)),
    };

    let mut ends = Signals::new()?;
    service::ready();
    let end = tokio::select! {
        end = ends.next() => end,
        served = &mut serving => bail!("the server ended: {served:?}"),
        ended = &mut driving => bail!("the engine stopped, and ranks run on: {ended:?}"),
    };
    ready.store(false, Ordering::Relaxed);
    service::ending("ending");
    let drained = match end {
        End::Drain => tokio::select! {
            drained = drain(&coordinator) => drained,
            _ = ends.next() => false,
        },
        End::Leave => false,
    };
    housekeeper.abort();
    keeping.abort();
    renewing.iter().flatten().for_each(tokio::task::JoinHandle::abort);
    if let Some(keeper) = keeper {
        keeper.abort();
    }
    if drained {
        wait_for_agent(&local, &mut ends).await;
    }
    let _ = close.send(true);
    let _ = tokio::time::timeout(CLOSE_WAIT, &mut serving).await;
    serving.abort();
    drop((coordinator, inputs));
    driving.abort();
    let _ = driving.await;
    store.close().await;
    drop(lock);
    println!(
        "{}",
        if drained {
            "ended: jobs were saved and wait for the next `everlit up`"
        } else {
            "ended: ranks run on, the next `everlit up` adopts them"
        }
    );
    Ok(())
}

/// Puts every job of this machine's own agents back in the queue; other nodes do not notice. True once nothing runs here any more.
async fn drain(coordinator: &Coordinator) -> bool {
    let nodes = coordinator.agents.local();
    println!("saving jobs and ending (Ctrl-C again leaves them running) …");
    for node in &nodes {
        if coordinator
            .handle
            .inputs
            .send(Input::Wish(Event::NodeDraining { node: node.clone(), cordon: false, deadline: None }))
            .await
            .is_err()
        {
            return false;
        }
    }
    let mut news = coordinator.handle.news.subscribe();
    loop {
        let all: Vec<NodeId> = nodes.clone();
        match coordinator.look(move |engine, _| all.iter().all(|node| engine.node_is_empty(node))).await {
            Ok(true) => break,
            Ok(false) => drop(tokio::time::timeout(Duration::from_millis(200), news.recv()).await),
            Err(_) => return false,
        }
    }
    for node in &nodes {
        coordinator.agents.tell(node, &ToAgent::Shutdown);
    }
    true
}

async fn wait_for_agent(local: &LocalAgent, ends: &mut Signals) {
    let gone = async {
        while local.is_alive().unwrap_or(false) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::select! {
        () = gone => {}
        _ = ends.next() => {}
        () = tokio::time::sleep(Duration::from_secs(5)) => tracing::warn!("this machine's agent did not end in time"),
    }
}

async fn keep_house(coordinator: Coordinator, retain: Millis, retain_audit: Millis) {
    let mut tick = tokio::time::interval(HOUSEKEEPING);
    loop {
        tick.tick().await;
        coordinator.store.restore_ballast();
        let now = coordinator.clock.now();
        if let Err(e) = coordinator.store.forget_keys(now).await {
            tracing::warn!("old keys stay: {e}");
        }
        if let Err(e) = coordinator.store.forget_doors(Timestamp(now.0.saturating_sub(retain_audit.0)), now).await {
            tracing::warn!("old tokens and lines of the audit log stay: {e}");
        }
        if let Err(e) = coordinator.store.forget_join_tokens(now).await {
            tracing::warn!("old join tokens stay: {e}");
        }
        coordinator.members.forget_before(Timestamp(now.0.saturating_sub(TOKEN_KEPT_MS)));
        coordinator.tokens.forget_before(Timestamp(now.0.saturating_sub(TOKEN_KEPT_MS)));
        coordinator.sweep_packages().await;
        match coordinator.purge_before(Timestamp(now.0.saturating_sub(retain.0)), Vec::new(), false).await {
            Ok(ids) if !ids.is_empty() => tracing::info!(count = ids.len(), "final jobs older than --retain-jobs were removed"),
            Ok(_) => {}
            Err(e) => tracing::warn!("old jobs stay: {e}"),
        }
    }
}

/// Where this machine's own agent comes in: through the doors where they are on loopback and in the clear, else through one of its own, on
/// loopback, that leads nowhere else.
enum OwnDoor {
    Main,
    Beside(TcpListener, SocketAddr),
}

impl OwnDoor {
    async fn open(settings: &Settings) -> anyhow::Result<Self> {
        if !is_open(settings) {
            return Ok(Self::Main);
        }
        let beside = TcpListener::bind("127.0.0.1:0").await.context("no port of loopback for this machine's agent")?;
        let address = beside.local_addr()?;
        Ok(Self::Beside(beside, address))
    }

    fn url(&self, main: &str) -> String {
        match self {
            Self::Main => main.into(),
            Self::Beside(_, address) => format!("http://{address}"),
        }
    }

    /// Serves it until the program ends.
    fn serve(self, coordinator: &Coordinator, closing: watch::Receiver<bool>) {
        let Self::Beside(listener, _) = self else { return };
        let router = everlit_api::server::agents_only(Arc::new(coordinator.clone()));
        drop(tokio::spawn(serve(PlainListener(listener), router, closing)));
    }
}

/// Doors that end TLS themselves, for callers and for the agents of other machines.
struct Doors {
    /// For everybody, and for agents.
    certificates: [Arc<Certificates>; 2],
    acceptor: Acceptor,
    joining: Arc<Joining>,
}

impl Doors {
    fn open(tls: Tls, dir: &Path, settings: &Settings) -> anyhow::Result<Self> {
        let (ca_dir, now) = (dir.join("ca"), Timestamp::now());
        let ca = Ca::open(&ca_dir, now)?;
        let source = match tls {
            Tls::Files(cert, key) => Source::Files { cert, key },
            Tls::OwnCa(more) => {
                Source::OwnCa { dir: ca_dir.clone(), names: own_names(settings.listen.ip()).into_iter().chain(more).collect() }
            }
        };
        let for_agents = Source::OwnCa { dir: ca_dir, names: vec![AGENTS_NAME.into()] };
        let certificates = [Certificates::open(source, now)?, Certificates::open(for_agents, now)?];
        let acceptor = Acceptor::new(&certificates[0], &certificates[1], ca.certificate())?;
        Ok(Self { certificates, acceptor, joining: Arc::new(Joining { ca, life: settings.node_certificate_ttl }) })
    }
}

/// Others than programs of this machine come in: by another address, by TLS, or through a proxy in front.
fn is_open(settings: &Settings) -> bool {
    !settings.listen.ip().is_loopback() || settings.tls.is_some() || settings.insecure_http
}

fn policy(settings: &Settings) -> Policy {
    let all = if is_open(settings) { Policy::open() } else { Policy::loopback() };
    Policy { tls: settings.tls.is_some(), anonymous: settings.anonymous.or(all.anonymous), ..all }
}

/// How callers are known, for `GET /status`.
fn auth(settings: &Settings) -> String {
    match settings.anonymous {
        Some(role) => format!("anonymous {role}"),
        None if is_open(settings) => "tokens".into(),
        None => "loopback".into(),
    }
}

fn how_to_begin(settings: &Settings, url: &str, dir: &Path) -> String {
    if !is_open(settings) {
        return format!("submit a job:  curl -s -X POST {url}/jobs -H 'Content-Type: application/json' -d '{{\"world_size\": 2}}'");
    }
    // Not by curl: its arguments can be read by every user of the machine.
    let ca = match settings.tls {
        Some(Tls::OwnCa(_)) => format!(" EVERLIT_CA_FILE={}", dir.join("ca/ca.pem").display()),
        Some(Tls::Files(..)) | None => String::new(),
    };
    let token = dir.join(ADMIN_TOKEN);
    format!("submit a job:  EVERLIT_URL={url}{ca} EVERLIT_TOKEN_FILE={} everlit submit --world-size 2", token.display())
}

/// Where nobody can make tokens, one is made who can, and written to the data folder: who can read that is an admin anyway.
async fn first_token(coordinator: &Coordinator, dir: &Path) -> anyhow::Result<()> {
    if coordinator.tokens.has_admin(coordinator.clock.now()) {
        return Ok(());
    }
    let wanted = NewToken { user: "admin".into(), role: Role::Admin, ttl: TOKEN_TTL.1 };
    let (token, row) = tokens::make(wanted, None, coordinator.clock.now())?;
    let path = dir.join(ADMIN_TOKEN);
    // The file first: a token that counts and that nobody has would be the last.
    write_whole(&path, &token)?;
    let kept = tokio::time::timeout(FIRST_TOKEN_MAX, coordinator.keep_token(row)).await;
    kept.with_context(|| format!("the store does not take the token of {}: is its disk full?", path.display()))??;
    tracing::info!(path = %path.display(), "the first admin token was made");
    Ok(())
}

struct Signals {
    interrupt: tokio::signal::unix::Signal,
    terminate: tokio::signal::unix::Signal,
    in_container: bool,
}

impl Signals {
    fn new() -> anyhow::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            in_container: std::process::id() == 1,
        })
    }

    async fn next(&mut self) -> End {
        tokio::select! {
            _ = self.interrupt.recv() => End::Drain,
            _ = self.terminate.recv() => if self.in_container { End::Drain } else { End::Leave },
        }
    }
}

/// The secret that only who can read the data folder knows; made once.
fn agent_token(dir: &Path) -> anyhow::Result<String> {
    let path = dir.join("agent.token");
    if let Ok(text) = std::fs::read_to_string(&path)
        && text.trim().len() == 64
    {
        return Ok(text.trim().to_string());
    }
    let mut bytes = [0u8; 32];
    std::io::Read::read_exact(&mut std::fs::File::open("/dev/urandom")?, &mut bytes)?;
    let token: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
    write_whole(&path, &token)?;
    Ok(token)
}

/// Replaces a small private file as a whole.
pub(super) fn write_whole(path: &Path, text: &str) -> anyhow::Result<()> {
    let draft = path.with_extension("new");
    let mut file = std::fs::OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&draft)?;
    std::io::Write::write_all(&mut file, text.as_bytes())?;
    file.sync_all()?;
    std::fs::rename(&draft, path).with_context(|| format!("{}", path.display()))
}
