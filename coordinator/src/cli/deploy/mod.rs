//! `everlit node deploy`: servers become nodes over ssh, or those that are get the programs of this one.
//!
//! For each: look at it, make a join token for it alone, bring it the programs and `scripts/install-service.sh`, have that install and join, wait
//! until the coordinator sees the node. The secret goes through ssh's standard input, never into an argument or a file. A server that fails harms no
//! other, and a deploy that was cut off is repeated.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::Args;
use everlit_api::client::Client;
use everlit_api::ids::NodeId;
use everlit_api::join::{NewNodeToken, is_node_name};
use everlit_api::status::NodeState;
use everlit_api::time::Millis;
use futures_util::StreamExt;
use serde::Serialize;

use self::host::Host;
use self::programs::Programs;
use super::{Fail, Output, out};

mod host;
mod programs;

/// Servers that one call takes.
const HOSTS_MAX: usize = 1024;
/// Life of a server's token: as long as bringing the programs may take.
const TOKEN_TTL: Millis = Millis::secs(20 * 60);
/// Longest wait for the coordinator to see a node whose agent says that it is linked.
const SEEN_MAX: Duration = Duration::from_secs(30);
const SEEN_EVERY: Duration = Duration::from_millis(200);

/// `everlit node deploy`.
#[derive(Debug, Args)]
pub(super) struct DeployArgs {
    /// Servers, as ssh knows them
    #[arg(required = true, num_args = 1..=HOSTS_MAX, value_name = "USER@HOST", value_parser = host::name)]
    hosts: Vec<String>,
    /// The node's name, of one server [default: the server's name]
    #[arg(long, value_name = "NAME")]
    node: Option<String>,
    /// Where the servers reach the coordinator [default: --url]
    #[arg(long, value_name = "URL")]
    join_url: Option<String>,
    /// Where the programs for them are [default: beside this one]
    #[arg(long, value_name = "FOLDER")]
    from: Option<PathBuf>,
    /// Without systemd and root: as the user that ssh logs in, below ~/.local, in the background
    #[arg(long)]
    no_service: bool,
    /// Where libtorch is on the servers, for the built-in program
    #[arg(long, value_name = "FOLDER")]
    libtorch: Option<String>,
    /// ssh's port
    #[arg(long, value_name = "PORT")]
    port: Option<u16>,
    /// ssh's key
    #[arg(long, value_name = "FILE")]
    identity: Option<PathBuf>,
    /// An option for ssh, like `ProxyJump=gate`; several may be given
    #[arg(long = "ssh-option", value_name = "NAME=VALUE")]
    ssh_options: Vec<String>,
    /// Servers at once
    #[arg(long, value_name = "COUNT", default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..=64))]
    parallel: u16,
    /// Options of `everlit-agent run`, like `--label zone=a` [default: those that the server has]
    #[arg(last = true, value_name = "OPTION")]
    options: Vec<String>,
}

/// Why a server did not become a node, and what to do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{why}{}{remedy}", if .remedy.is_empty() { "" } else { ": " })]
struct Fault {
    why: String,
    remedy: String,
}

impl Fault {
    fn new(why: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { why: why.into(), remedy: remedy.into() }
    }
}

/// What became of a server.
#[derive(Debug, Serialize)]
struct Told {
    host: String,
    /// `joined`, `upgraded`, `failed`.
    state: &'static str,
    node: Option<String>,
    reason: Option<String>,
    seconds: f64,
}

/// What all servers have in common.
struct Deploy<'a> {
    client: &'a Client,
    args: &'a DeployArgs,
    url: String,
    programs: Programs,
}

/// Runs it for all; fails when any did.
pub(super) async fn deploy(client: &Client, args: &DeployArgs, url: &str, output: Output) -> Result<(), Fail> {
    if args.node.is_some() && args.hosts.len() > 1 {
        return Err(Fail::Usage("--node names one server: deploy them one at a time, or by the names that they have".into()));
    }
    if let Some(name) = args.node.as_ref().filter(|name| !is_node_name(name)) {
        return Err(Fail::Usage(format!("--node {name}: a node's name has letters, digits, `.`, `_` and `-`, at most 63")));
    }
    let url = reachable(args.join_url.as_deref().unwrap_or(url))?;
    let programs = Programs::find(args.from.as_deref()).map_err(|fault| Fail::Refused(fault.to_string()))?;
    // Whoever may not make tokens is told once.
    client.join_tokens().await?;
    let all = Deploy { client, args, url, programs };
    let mut each = futures_util::stream::iter(&args.hosts).map(|host| all.one(host)).buffer_unordered(args.parallel.into());
    let mut told = Vec::new();
    while let Some(one) = each.next().await {
        if output == Output::Text {
            out::line(&one.line())?;
        }
        told.push(one);
    }
    let failed = told.iter().filter(|one| one.state == "failed").count();
    if output == Output::Json {
        out::json(&told)?;
    }
    match failed {
        0 => Ok(()),
        1 if told.len() == 1 => Err(Fail::Told),
        _ => Err(Fail::Refused(format!("{failed} of {} servers failed: the same again does no harm to the others", told.len()))),
    }
}

/// Servers must find it: over TLS, and not where each finds itself.
fn reachable(url: &str) -> Result<String, Fail> {
    let near = ["localhost", "127.", "[::1]", "0.0.0.0", "[::]"].iter().any(|host| url.contains(&format!("//{host}")));
    let wrong =
        |why: &str| Err(Fail::Usage(format!("{url} {why}: say --join-url https://NAME:PORT, where the servers reach the coordinator")));
    match url.starts_with("https://") {
        true if near => wrong("is another machine to each server"),
        true => Ok(url.trim_end_matches('/').into()),
        false => wrong("is not TLS, and servers join over TLS only (`everlit up --own-ca`)"),
    }
}

impl Told {
    fn line(&self) -> String {
        let Self { host, state, node, reason, seconds } = self;
        let node = node.as_deref().unwrap_or("-");
        match reason {
            Some(reason) => format!("{host}: failed: {reason}"),
            None if *state == "joined" => format!("{host}: node {node} joined ({seconds:.1} s)"),
            None => format!("{host}: node {node} upgraded, its ranks run on ({seconds:.1} s)"),
        }
    }
}

impl Deploy<'_> {
    async fn one(&self, name: &str) -> Told {
        let begun = Instant::now();
        let done = self.try_one(name).await;
        let seconds = begun.elapsed().as_secs_f64();
        let host = name.to_string();
        match done {
            Ok((node, true)) => Told { host, state: "upgraded", node: Some(node), reason: None, seconds },
            Ok((node, false)) => Told { host, state: "joined", node: Some(node), reason: None, seconds },
            Err(fault) => Told { host, state: "failed", node: None, reason: Some(fault.to_string()), seconds },
        }
    }

    /// The node's name, and whether it was one before.
    async fn try_one(&self, name: &str) -> Result<(String, bool), Fault> {
        let host = Host::new(name, self.args);
        let look = host.look(self.args.no_service).await?;
        self.programs.suit(&look)?;
        let with_root = host.root_for(&look, self.args.no_service)?;
        if let (Some(is), Some(wanted)) = (&look.node, &self.args.node)
            && is != wanted
        {
            return Err(Fault::new(format!("it is node {is} already"), "leave out --node, or expel that node and remove its data folder"));
        }
        // Before anything is brought there: who may not make one is told at once. A node needs none any more, but it tells whose it is.
        let wanted = NewNodeToken { ttl: TOKEN_TTL, uses: 1, node: self.args.node.clone().map(NodeId) };
        let made = self.client.create_join_token(&wanted).await.map_err(|error| Fault::new(error.to_string(), ""))?;
        let installed = async {
            let stage = host.bring(&self.programs, &look).await?;
            host.install(&self.install(&stage, with_root), &stage, &made.token).await
        };
        let installed = installed.await;
        if installed.is_err() || look.node.is_some() {
            // Nobody needs it any more. It ends by itself, too.
            let _ = self.client.revoke_join_token(&made.about.id).await;
        }
        self.seen(installed?, look.node.is_some()).await
    }

    /// What the server runs.
    fn install(&self, stage: &str, with_root: &str) -> Vec<String> {
        let words = |text: &str| text.split(' ').filter(|word| !word.is_empty()).map(String::from).collect::<Vec<_>>();
        let mut command = words(with_root);
        command.extend(["sh".into(), format!("{stage}/install-service.sh"), "agent".into(), "--from".into(), stage.into()]);
        command.extend(["--join".into(), self.url.clone()]);
        command.extend(words("--token-file -"));
        let pairs = [("--node", &self.args.node), ("--libtorch", &self.args.libtorch)];
        for (flag, value) in pairs.into_iter().filter_map(|(flag, value)| Some((flag, value.as_ref()?))) {
            command.extend([flag.into(), value.clone()]);
        }
        if self.args.no_service {
            command.push("--no-service".into());
        }
        if !self.args.options.is_empty() {
            command.push("--".into());
            command.extend(self.args.options.iter().cloned());
        }
        command
    }

    /// Until the coordinator sees it.
    async fn seen(&self, node: String, before: bool) -> Result<(String, bool), Fault> {
        let until = Instant::now() + SEEN_MAX;
        loop {
            let nodes = self.client.nodes().await.map_err(|error| Fault::new(error.to_string(), ""))?;
            if nodes.data.iter().any(|own| own.node.0 == node && own.state != NodeState::Lost) {
                return Ok((node, before));
            }
            if Instant::now() > until {
                let why = format!("its agent says that it is linked, and the coordinator does not see node {node}");
                return Err(Fault::new(
                    why,
                    "is it another coordinator that it joined? `everlit-agent health` there, and its node.json, tell",
                ));
            }
            tokio::time::sleep(SEEN_EVERY).await;
        }
    }
}

/// A path that is as good in a shell as anywhere else.
fn is_plain(path: &str) -> bool {
    path.starts_with('/') && path.chars().all(|c| c.is_ascii_alphanumeric() || "_./@+-".contains(c))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_are_sent_where_they_can_reach() {
        assert_eq!(reachable("https://train.example:8000/").expect("good"), "https://train.example:8000");
        for (url, why) in [
            ("http://train.example:8000", "is not TLS"),
            ("https://localhost:8000", "another machine"),
            ("https://127.0.0.1:8000", "another machine"),
            ("https://0.0.0.0:8000", "another machine"),
        ] {
            assert!(reachable(url).expect_err("refused").to_string().contains(why), "{url}");
        }
    }

    #[test]
    fn a_path_that_a_shell_would_read_otherwise_is_none() {
        assert!(is_plain("/home/a-b/.everlit-deploy.Xy12"));
        for path in ["relative", "/a b", "/a;b", "/$x", "/a'b", ""] {
            assert!(!is_plain(path), "{path}");
        }
    }
}
