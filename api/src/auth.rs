//! Who calls, and what they may: four roles, tokens, and the log of what was asked for.
//!
//! A token is `everlit_<id>_<secret>`: the id finds it, the secret proves it, and only a hash of the secret is ever kept. The prefix is
//! there for scanners that look for leaked secrets. What each role may is said by the doors, operation by operation (`x-role` in the
//! OpenAPI document).

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::time::{Millis, Timestamp};

/// What every token begins with.
pub const TOKEN_PREFIX: &str = "everlit_";
/// Characters of a token's id: hexadecimal.
pub const TOKEN_ID_CHARS: usize = 12;
/// Characters of a token's secret: hexadecimal, 256 bits.
pub const TOKEN_SECRET_CHARS: usize = 64;
/// Characters of a user's name at most.
pub const USER_CHARS_MAX: usize = 64;
/// A token lives this long unless told otherwise.
pub const TOKEN_TTL_DEFAULT: Millis = Millis(90 * 24 * 3_600 * 1_000);
/// The shortest and the longest life of a token.
pub const TOKEN_TTL: (Millis, Millis) = (Millis(60 * 1_000), Millis(10 * 365 * 24 * 3_600 * 1_000));

/// What a caller may do; each may what those before it may, but that a `user` sees no jobs of others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Sees every job and node, changes nothing.
    Viewer,
    /// Submits jobs; sees, stops and removes its own.
    User,
    /// Sees and acts on every job and node.
    Operator,
    /// Makes and revokes tokens, reads the audit log.
    Admin,
}

impl Role {
    /// Every role, from the least on.
    pub const ALL: [Self; 4] = [Self::Viewer, Self::User, Self::Operator, Self::Admin];

    /// As it is written.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Viewer => "viewer",
            Self::User => "user",
            Self::Operator => "operator",
            Self::Admin => "admin",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Role {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|role| role.as_str() == text);
        found.ok_or_else(|| format!("must be one of {}", Self::ALL.map(Self::as_str).join(", ")))
    }
}

/// Who calls; also the answer of `GET /whoami`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Caller {
    /// Whose token it was; null: no token was shown, and none was needed.
    pub user: Option<String>,
    /// What they may.
    pub role: Role,
    /// The token's id.
    pub token: Option<String>,
    /// When the token expires.
    pub expires_at: Option<Timestamp>,
}

impl Caller {
    /// Whoever comes without a token where none is needed.
    pub fn anonymous(role: Role) -> Self {
        Self { user: None, role, token: None, expires_at: None }
    }

    /// The user to whose jobs this caller is kept.
    pub fn only(&self) -> Option<&str> {
        match self.role {
            // Without a name there is nothing of its own; an empty one is nobody's.
            Role::User => Some(self.user.as_deref().unwrap_or_default()),
            Role::Viewer | Role::Operator | Role::Admin => None,
        }
    }
}

/// Why a token opens nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BadToken {
    /// It is not written like one: cut off, or something else.
    Malformed,
    /// No such token was ever made here, or its secret is another.
    Unknown,
    /// Its time is over.
    Expired,
    /// Somebody revoked it.
    Revoked,
}

impl BadToken {
    /// What it is and what to do.
    pub fn detail(self) -> &'static str {
        match self {
            Self::Malformed => {
                "this is not a token of everlit: it is `everlit_`, 12 and 64 hexadecimal characters; was it cut off when it was copied?"
            }
            Self::Unknown => "this token is not known here: is it for another coordinator? an admin makes one with `everlit token create`",
            Self::Expired => "this token has expired: an admin makes another with `everlit token create`",
            Self::Revoked => "this token was revoked: an admin makes another with `everlit token create`",
        }
    }
}

/// Both halves of a token as it was shown; `None` when it is not written like one.
pub fn split_token(text: &str) -> Option<(&str, &str)> {
    let (id, secret) = text.strip_prefix(TOKEN_PREFIX)?.split_once('_')?;
    let is_hex = |part: &str, chars: usize| part.len() == chars && part.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
    (is_hex(id, TOKEN_ID_CHARS) && is_hex(secret, TOKEN_SECRET_CHARS)).then_some((id, secret))
}

/// A user's name: letters, digits and `.`, `_`, `-`, `@`.
pub fn is_user_name(text: &str) -> bool {
    let sane = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-' | '@');
    !text.is_empty() && text.len() <= USER_CHARS_MAX && text.chars().all(sane)
}

/// `POST /tokens`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NewToken {
    /// Whose it is: jobs that it submits are this user's.
    pub user: String,
    /// What it may.
    pub role: Role,
    /// How long it lives, from 1 minute to 10 years: 90 days unless told otherwise.
    pub ttl: Millis,
}

/// A token without its secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TokenView {
    /// Its id, which is no secret.
    pub id: String,
    /// Whose it is.
    pub user: String,
    /// What it may.
    pub role: Role,
    /// When it was made.
    pub created_at: Timestamp,
    /// Who made it; null for the first one, and for who needed no token.
    pub created_by: Option<String>,
    /// When it expires.
    pub expires_at: Timestamp,
    /// When it was revoked.
    pub revoked_at: Option<Timestamp>,
}

/// A token that was just made: the only time that its secret is shown.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MadeToken {
    /// What goes into the `Authorization: Bearer` header, and into `EVERLIT_TOKEN`. It is not kept: nobody can show it again.
    pub token: String,
    /// What is known of it.
    #[serde(flatten)]
    pub about: TokenView,
}

impl fmt::Debug for MadeToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MadeToken").field("about", &self.about).finish_non_exhaustive()
    }
}

/// What was asked for, by whom, and whether the door let it in. What came of it is among the events.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AuditEntry {
    /// Whose token it was; null without one.
    pub user: Option<String>,
    /// What they may; null for who was not let in for want of a token.
    pub role: Option<Role>,
    /// The token's id.
    pub token: Option<String>,
    /// Where the request came from.
    pub address: Option<String>,
    /// The operation's id in the OpenAPI document, like `stop_job`.
    pub operation: String,
    /// What it was about: the path and the query.
    pub target: String,
    /// True when it was let in.
    pub allowed: bool,
    /// The request's id, as in `x-request-id`.
    pub request_id: String,
}

/// One line of the audit log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AuditView {
    /// Grows by one.
    pub seq: u64,
    /// When.
    pub time: Timestamp,
    /// What.
    #[serde(flatten)]
    pub entry: AuditEntry,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_read_whole_or_not_at_all() {
        let (id, secret) = ("0123456789ab", "0f".repeat(32));
        let whole = format!("everlit_{id}_{secret}");
        assert_eq!(split_token(&whole), Some((id, secret.as_str())));
        for cut in 0..whole.len() {
            assert_eq!(split_token(&whole[..cut]), None, "{cut}");
        }
        for other in
            [format!("{whole}0"), whole.to_uppercase(), whole.replace('f', "g"), format!(" {whole}"), format!("everlit_{secret}_{id}")]
        {
            assert_eq!(split_token(&other), None, "{other}");
        }
    }

    #[test]
    fn roles_and_names_are_read_as_written() {
        for role in Role::ALL {
            assert_eq!(role.to_string().parse(), Ok(role));
            assert_eq!(serde_json::to_value(role).expect("plain"), role.as_str());
        }
        assert_eq!("Admin".parse::<Role>(), Err("must be one of viewer, user, operator, admin".into()));
        assert!(Role::ALL.is_sorted());
        for name in ["a", "alice@example.com", "ci-bot_2.x"] {
            assert!(is_user_name(name), "{name}");
        }
        for name in ["", "a b", "é", "a/b", "x\n", &"a".repeat(65)] {
            assert!(!is_user_name(name), "{name:?}");
        }
    }

    #[test]
    fn a_made_token_never_shows_its_secret_by_chance() {
        let about = TokenView {
            id: "0123456789ab".into(),
            user: "a".into(),
            role: Role::User,
            created_at: Timestamp(1),
            created_by: None,
            expires_at: Timestamp(2),
            revoked_at: None,
        };
        assert!(!format!("{:?}", MadeToken { token: "everlit_hidden".into(), about }).contains("hidden"));
    }

    #[test]
    fn only_a_user_is_kept_to_its_own_jobs() {
        let caller = |role| Caller { user: Some("a".into()), ..Caller::anonymous(role) };
        assert_eq!(Role::ALL.map(|role| caller(role).only().map(String::from)), [None, Some("a".into()), None, None]);
        assert_eq!(Caller::anonymous(Role::User).only(), Some(""), "nobody's jobs are not everybody's");
    }
}
