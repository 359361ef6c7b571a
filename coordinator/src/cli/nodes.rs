//! Nodes: listing them, having servers join, and taking nodes out of use.

use clap::{Args, Subcommand};
use everlit_api::client::Client;
use everlit_api::ids::NodeId;
use everlit_api::join::{JOIN_TTL_DEFAULT, JOIN_USES_MAX, NewNodeToken, NodeTokenView};
use everlit_api::time::{Millis, Timestamp};

use super::{Fail, Output, deploy, out, show};

/// `everlit nodes`.
#[derive(Debug, Args)]
pub struct NodesArgs {
    #[command(subcommand)]
    act: Option<NodeAct>,
}

#[derive(Debug, Subcommand)]
enum NodeAct {
    /// Give it no new ranks
    Cordon {
        /// The node's name
        name: String,
    },
    /// Give it new ranks again
    Uncordon {
        /// The node's name
        name: String,
    },
    /// Cordon it, stop its ranks with their grace, put their jobs back in the queue
    Drain {
        /// The node's name
        name: String,
        /// Kill what still lives after so long, whatever grace its job has
        #[arg(long, value_name = "TIME")]
        deadline: Option<Millis>,
    },
    /// Have its certificate open nothing any more, and forget it
    Expel {
        /// The node's name
        name: String,
        /// Also while ranks are placed there: they are lost, and their jobs go on elsewhere
        #[arg(long)]
        force: bool,
    },
    /// Make, list or revoke tokens that servers join with
    Token(TokenArgs),
    /// Make servers nodes over ssh, or bring those that are the programs of this machine; ranks run on
    Deploy(Box<deploy::DeployArgs>),
}

/// `everlit node token`.
#[derive(Debug, Args)]
struct TokenArgs {
    #[command(subcommand)]
    act: TokenAct,
}

#[derive(Debug, Subcommand)]
enum TokenAct {
    /// Make one, and print the line to run on a server: its secret is shown this once
    Create {
        /// How long it lives
        #[arg(long, value_name = "TIME", default_value_t = JOIN_TTL_DEFAULT)]
        ttl: Millis,
        /// How many servers may join with it
        #[arg(long, value_name = "COUNT", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=i64::from(JOIN_USES_MAX)))]
        uses: u32,
        /// Only a node of this name may
        #[arg(long, value_name = "NAME")]
        node: Option<String>,
    },
    /// List them, newest first
    #[command(visible_alias = "list")]
    Ls,
    /// Have nobody join with one any more
    Revoke {
        /// Its id
        id: String,
    },
}

/// Lists nodes, or does something about one.
pub(super) async fn nodes(client: &Client, args: NodesArgs, url: &str, output: Output) -> Result<(), Fail> {
    let node = match args.act {
        None => {
            let page = client.nodes().await?;
            return if output == Output::Json { out::json(&page) } else { show::nodes(&page.data) };
        }
        Some(NodeAct::Token(TokenArgs { act })) => return tokens(client, act, url, output).await,
        Some(NodeAct::Deploy(args)) => return deploy::deploy(client, &args, url, output).await,
        Some(NodeAct::Expel { name, force }) => {
            let node = client.expel(&NodeId(name), force).await?;
            return if output == Output::Json { out::json(&node) } else { out::line(&format!("{} expelled", node.node)) };
        }
        Some(NodeAct::Cordon { name }) => client.cordon(&NodeId(name)).await?,
        Some(NodeAct::Uncordon { name }) => client.uncordon(&NodeId(name)).await?,
        Some(NodeAct::Drain { name, deadline }) => client.drain(&NodeId(name), deadline).await?,
    };
    if output == Output::Json { out::json(&node) } else { show::nodes(&[node]) }
}

fn state(token: &NodeTokenView, now: Timestamp) -> &'static str {
    if token.revoked_at.is_some() {
        "revoked"
    } else if token.expires_at <= now {
        "expired"
    } else if token.used >= token.uses {
        "used"
    } else {
        "good"
    }
}

async fn tokens(client: &Client, act: TokenAct, url: &str, output: Output) -> Result<(), Fail> {
    match act {
        TokenAct::Create { ttl, uses, node } => {
            let made = client.create_join_token(&NewNodeToken { ttl, uses, node: node.map(NodeId) }).await?;
            if output == Output::Json {
                return out::json(&made);
            }
            // In the environment: arguments can be read by every user of a machine.
            let own = made.about.node.as_ref().map(|node| format!(" --node {node}")).unwrap_or_default();
            out::line(&format!("EVERLIT_JOIN_TOKEN={} everlit-agent join {url}{own}", made.token))?;
            eprintln!("run this on the server, until {}: the token is not shown again", made.about.expires_at);
            if ["localhost", "127.0.0.1", "[::1]"].iter().any(|host| url.contains(&format!("//{host}"))) {
                eprintln!("put a name or address of this machine that the server can reach in place of the one in {url}");
            }
            Ok(())
        }
        TokenAct::Ls => {
            let page = client.join_tokens().await?;
            if output == Output::Json {
                return out::json(&page);
            }
            let now = Timestamp::now();
            let row = |token: &NodeTokenView| {
                vec![
                    token.id.clone(),
                    state(token, now).into(),
                    format!("{}/{}", token.used, token.uses),
                    out::or_dash(token.node.clone()),
                    token.expires_at.to_string(),
                    out::or_dash(token.created_by.clone()),
                ]
            };
            out::table(&["ID", "STATE", "USED", "NODE", "EXPIRES", "MADE BY"], page.data.iter().map(row).collect())
        }
        TokenAct::Revoke { id } => {
            let token = client.revoke_join_token(&id).await?;
            if output == Output::Json { out::json(&token) } else { out::line(&format!("{} revoked", token.id)) }
        }
    }
}
