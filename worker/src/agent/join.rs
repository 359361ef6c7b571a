//! Joining: a server with a token becomes a node, and stays one by having its certificate renewed in time.

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use anyhow::{Context, bail};
use everlit_api::ids::NodeId;
use everlit_api::join::{JoinRequest, JoinToken, NodeCertificate, RenewRequest, is_node_name};
use everlit_api::time::Timestamp;
use rcgen::{CertificateParams, KeyPair};
use tokio::time::{sleep, timeout};

use super::dial::{Dialer, Stranger};
use super::identity::{self, Identity};
use super::limits::{ASK_MAX, RENEW_LOOK_MAX, RENEW_RETRY};

/// This host's name.
pub(super) fn host_name() -> NodeId {
    NodeId(std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default().trim().to_string())
}

/// Makes a node of this folder, unless it is one already.
pub(super) async fn join(dir: &Path, url: &str, node: Option<&str>, token: Option<&str>) -> anyhow::Result<Identity> {
    let token = token.map(str::parse::<JoinToken>).transpose()?;
    std::fs::create_dir_all(dir).with_context(|| format!("could not make `{}`", dir.display()))?;
    if let Some(own) = Identity::load(dir)? {
        return stay(own, dir, url, node, token.as_ref());
    }
    let token = token.context("a join token is needed, in EVERLIT_JOIN_TOKEN or --token-file: `everlit node token create` makes one")?;
    let node = node.map_or_else(host_name, |name| NodeId(name.into()));
    if !is_node_name(&node.0) {
        bail!("`{node}` can not be the name of a node (letters, digits, `.`, `_` and `-`, at most 63): say --node with another");
    }
    let key = identity::join_key(dir)?;
    let wanted = JoinRequest { node, request: request(&key)? };
    let stranger = Stranger::new(token.ca)?;
    let shown = token.shown();
    let asked = stranger.dialer.ask(url, "/join", Some(&shown), &wanted);
    let made: NodeCertificate = timeout(ASK_MAX, asked).await.with_context(|| format!("{url} does not answer"))??;
    let ca = stranger.ca().context("the coordinator showed no CA")?;
    let own = Identity::joined(url.trim_end_matches('/'), &key, &ca, made);
    own.save(dir)?;
    Ok(own)
}

/// The folder is a node's already: that is no error, unless another was meant.
fn stay(mut own: Identity, dir: &Path, url: &str, node: Option<&str>, token: Option<&JoinToken>) -> anyhow::Result<Identity> {
    if node.is_some_and(|name| name != own.node.0) {
        bail!("`{}` is the folder of node {}: another node on this machine takes another --data-dir", dir.display(), own.node);
    }
    if token.is_some_and(|token| !own.is_of(token)) {
        bail!(
            "`{}` is the folder of node {} of another coordinator, {}: take another --data-dir, or remove its node.json to leave that one",
            dir.display(),
            own.node,
            own.coordinator
        );
    }
    // The coordinator may have moved; who it is, its CA tells.
    if own.coordinator != url.trim_end_matches('/') {
        own.coordinator = url.trim_end_matches('/').into();
        own.save(dir)?;
    }
    Ok(own)
}

fn request(key: &KeyPair) -> anyhow::Result<String> {
    Ok(CertificateParams::default().serialize_request(key)?.pem()?)
}

/// A node's identity, as it is now.
pub(super) type Shared = Arc<RwLock<Identity>>;

/// What it is now.
pub(super) fn current(shared: &Shared) -> Identity {
    shared.read().unwrap_or_else(PoisonError::into_inner).clone()
}

/// Renews the certificate in time, for ever. What fails is tried again while there is a certificate left to ask with.
pub(super) async fn keep(shared: Shared, dir: PathBuf) {
    loop {
        let own = current(&shared);
        let due = own.due_in(Timestamp::now()).as_duration();
        if !due.is_zero() {
            // The clock may be set meanwhile.
            sleep(due.min(RENEW_LOOK_MAX)).await;
            continue;
        }
        match renew(&own, &dir).await {
            Ok(next) => {
                *shared.write().unwrap_or_else(PoisonError::into_inner) = next;
                tracing::info!("this node's certificate was renewed");
            }
            Err(error) => {
                tracing::warn!("this node's certificate can not be renewed, and is tried again: {error:#}");
                sleep(RENEW_RETRY).await;
            }
        }
        // However short a life it was given.
        sleep(Duration::from_secs(1)).await;
    }
}

async fn renew(own: &Identity, dir: &Path) -> anyhow::Result<Identity> {
    let key = KeyPair::generate()?;
    let wanted = RenewRequest { request: request(&key)? };
    let dialer = Dialer::of(own)?;
    let asked = dialer.ask(&own.coordinator, "/join/renew", None, &wanted);
    let made = timeout(ASK_MAX, asked).await.context("no answer in time")??;
    let next = own.renewed(&key, made);
    next.save(dir)?;
    Ok(next)
}
