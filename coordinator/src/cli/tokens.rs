//! Who may what: `whoami`, `token` and `audit`.

use clap::{Args, Subcommand};
use everlit_api::auth::{AuditView, NewToken, Role, TOKEN_TTL_DEFAULT, TokenView};
use everlit_api::client::Client;
use everlit_api::time::{Millis, Timestamp};

use super::{Fail, Output, out};

/// `everlit token`.
#[derive(Debug, Args)]
pub struct TokenArgs {
    #[command(subcommand)]
    act: TokenAct,
}

#[derive(Debug, Subcommand)]
enum TokenAct {
    /// Make one, and print it: it is shown this once
    Create {
        /// Whose it is: jobs submitted with it are this user's
        #[arg(long, value_name = "NAME")]
        user: String,
        /// What it may: viewer, user, operator or admin
        #[arg(long, value_name = "ROLE")]
        role: Role,
        /// How long it lives
        #[arg(long, value_name = "TIME", default_value_t = TOKEN_TTL_DEFAULT)]
        ttl: Millis,
    },
    /// List them, newest first
    #[command(visible_alias = "list")]
    Ls,
    /// Have one open nothing any more
    Revoke {
        /// Its id
        id: String,
    },
}

/// `everlit audit`.
#[derive(Debug, Args)]
pub struct AuditArgs {
    /// Only of this user
    #[arg(long, value_name = "NAME")]
    user: Option<String>,
    /// How many lines, newest first
    #[arg(long, value_name = "COUNT", default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=500))]
    limit: u32,
}

fn state(token: &TokenView, now: Timestamp) -> &'static str {
    if token.revoked_at.is_some() {
        "revoked"
    } else if token.expires_at <= now {
        "expired"
    } else {
        "good"
    }
}

/// Makes, lists or revokes.
pub(super) async fn token(client: &Client, args: TokenArgs, output: Output) -> Result<(), Fail> {
    match args.act {
        TokenAct::Create { user, role, ttl } => {
            let made = client.create_token(&NewToken { user, role, ttl }).await?;
            if output == Output::Json {
                return out::json(&made);
            }
            out::line(&made.token)?;
            eprintln!(
                "a token of {} as {}, until {}: keep it, it is not shown again",
                made.about.user, made.about.role, made.about.expires_at
            );
            Ok(())
        }
        TokenAct::Ls => {
            let page = client.tokens().await?;
            if output == Output::Json {
                return out::json(&page);
            }
            let now = Timestamp::now();
            let row = |token: &TokenView| {
                let (user, role) = (token.user.clone(), token.role.to_string());
                vec![
                    token.id.clone(),
                    user,
                    role,
                    state(token, now).into(),
                    token.expires_at.to_string(),
                    out::or_dash(token.created_by.clone()),
                ]
            };
            out::table(&["ID", "USER", "ROLE", "STATE", "EXPIRES", "MADE BY"], page.data.iter().map(row).collect())
        }
        TokenAct::Revoke { id } => {
            let token = client.revoke_token(&id).await?;
            if output == Output::Json { out::json(&token) } else { out::line(&format!("{} revoked", token.id)) }
        }
    }
}

/// Prints the audit log.
pub(super) async fn audit(client: &Client, args: AuditArgs, output: Output) -> Result<(), Fail> {
    let page = client.audit(args.limit, args.user.as_deref()).await?;
    if output == Output::Json {
        return out::json(&page);
    }
    let row = |line: &AuditView| {
        let AuditView { time, entry, .. } = line;
        let (user, role) = (out::or_dash(entry.user.clone()), out::or_dash(entry.role));
        let let_in = if entry.allowed { "let in" } else { "refused" };
        vec![
            time.to_string(),
            user,
            role,
            out::or_dash(entry.address.clone()),
            let_in.into(),
            entry.operation.clone(),
            entry.target.clone(),
        ]
    };
    out::table(&["TIME", "USER", "ROLE", "FROM", "DOOR", "OPERATION", "TARGET"], page.data.iter().map(row).collect())
}

/// Says who this is.
pub(super) async fn whoami(client: &Client, output: Output) -> Result<(), Fail> {
    let me = client.whoami().await?;
    if output == Output::Json {
        return out::json(&me);
    }
    let until = me.expires_at.map(|at| format!(", until {at}")).unwrap_or_default();
    match &me.user {
        Some(user) => out::line(&format!("{user}, as {}{until}", me.role)),
        None => out::line(&format!("nobody in particular, as {}: no token was sent", me.role)),
    }
}
