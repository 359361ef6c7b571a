//! How a server becomes a node: the token that an admin hands over, what is asked with it, and what is answered.
//!
//! A join token is `K1<sha256 of the CA>::<id>:<secret>`. The hash is in it so that the coordinator is known before the secret is sent:
//! who answers with another CA never sees it. What the node gets for it is a certificate of that CA, for a key that it never shows.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::ids::NodeId;
use crate::time::{Millis, Timestamp};

/// What every join token begins with.
pub const JOIN_PREFIX: &str = "K1";
/// The name by which agents call the coordinator in TLS, whatever its address: its doors then show a certificate of its own CA.
pub const AGENTS_NAME: &str = "coordinator.everlit.internal";
/// Characters of a token's id and of its secret: hexadecimal.
pub const ID_CHARS: usize = 12;
/// 256 bits.
pub const SECRET_CHARS: usize = 64;
/// Bytes of a certificate request at most, as PEM.
pub const REQUEST_BYTES_MAX: usize = 8 * 1024;
/// Characters of a node's name at most.
pub const NODE_CHARS_MAX: usize = 63;
/// A join token lives this long unless told otherwise.
pub const JOIN_TTL_DEFAULT: Millis = Millis::secs(3_600);
/// The shortest and the longest life of a join token.
pub const JOIN_TTL: (Millis, Millis) = (Millis::secs(10), Millis::secs(365 * 86_400));
/// Nodes that one token may make at most.
pub const JOIN_USES_MAX: u32 = 10_000;

/// A token that lets a server join, whole.
#[derive(Clone, PartialEq, Eq)]
pub struct JoinToken {
    /// sha256 of the CA's certificate (DER).
    pub ca: [u8; 32],
    /// Which token; no secret.
    pub id: String,
    /// What proves it.
    pub secret: String,
}

impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JoinToken").field("id", &self.id).finish_non_exhaustive()
    }
}

/// A text that is no join token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadJoinToken {
    /// It begins like one of another kind.
    #[error("this is not a join token: it begins with K1 and is made by `everlit node token create`")]
    Foreign,
    /// It begins like one and is not whole.
    #[error(
        "this join token is cut off or damaged: it is K1, 64 hexadecimal characters, `::`, 12 and `:`, and 64 more; copy the whole line again"
    )]
    Cut,
}

impl FromStr for JoinToken {
    type Err = BadJoinToken;

    fn from_str(text: &str) -> Result<Self, BadJoinToken> {
        let rest = text.trim().strip_prefix(JOIN_PREFIX).ok_or(BadJoinToken::Foreign)?;
        let (ca, shown) = rest.split_once("::").ok_or(BadJoinToken::Cut)?;
        let (id, secret) = split_shown(shown).ok_or(BadJoinToken::Cut)?;
        Ok(Self { ca: from_hex(ca).ok_or(BadJoinToken::Cut)?, id: id.into(), secret: secret.into() })
    }
}

impl fmt::Display for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{JOIN_PREFIX}{}::{}", to_hex(&self.ca), self.shown())
    }
}

impl JoinToken {
    /// What the coordinator is shown of it, in `Authorization: Bearer`.
    pub fn shown(&self) -> String {
        format!("{}:{}", self.id, self.secret)
    }
}

/// Id and secret of what was shown; `None` when it is not written like that.
pub fn split_shown(text: &str) -> Option<(&str, &str)> {
    let (id, secret) = text.split_once(':')?;
    (is_hex(id, ID_CHARS) && is_hex(secret, SECRET_CHARS)).then_some((id, secret))
}

fn is_hex(text: &str, chars: usize) -> bool {
    text.len() == chars && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

/// Two lower-case digits for each byte.
pub fn to_hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn from_hex(text: &str) -> Option<[u8; 32]> {
    let mut bytes = [0; 32];
    if !is_hex(text, 64) {
        return None;
    }
    for (byte, at) in bytes.iter_mut().zip((0..).step_by(2)) {
        *byte = u8::from_str_radix(text.get(at..at + 2)?, 16).ok()?;
    }
    Some(bytes)
}

/// A node's name: as hosts are named, so that it can stand in a path, a label and a certificate.
pub fn is_node_name(text: &str) -> bool {
    let sane = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    let ends = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
    text.len() <= NODE_CHARS_MAX && text.chars().all(sane) && ends(text.chars().next()) && ends(text.chars().last())
}

/// `POST /nodes/tokens`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NewNodeToken {
    /// How long it lives, from 10 seconds to 1 year: 1 hour unless told otherwise.
    pub ttl: Millis,
    /// How many nodes may join with it: 1 unless told otherwise.
    pub uses: u32,
    /// Only a node of this name may.
    pub node: Option<NodeId>,
}

impl Default for NewNodeToken {
    fn default() -> Self {
        Self { ttl: JOIN_TTL_DEFAULT, uses: 1, node: None }
    }
}

/// A join token without its secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NodeTokenView {
    /// Its id, which is no secret.
    pub id: String,
    /// When it was made.
    pub created_at: Timestamp,
    /// Who made it.
    pub created_by: Option<String>,
    /// When it expires.
    pub expires_at: Timestamp,
    /// How many nodes may join with it.
    pub uses: u32,
    /// How many have.
    pub used: u32,
    /// Only a node of this name may.
    pub node: Option<NodeId>,
    /// When it was revoked.
    pub revoked_at: Option<Timestamp>,
}

/// A join token that was just made: the only time that its secret is shown.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MadeNodeToken {
    /// What a server joins with: `K1…`. It is not kept: nobody can show it again.
    pub token: String,
    /// What is known of it.
    #[serde(flatten)]
    pub about: NodeTokenView,
}

impl fmt::Debug for MadeNodeToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MadeNodeToken").field("about", &self.about).finish_non_exhaustive()
    }
}

/// Why a join token opens nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BadJoin {
    /// It is not written like one.
    Malformed,
    /// No such token was ever made here, or its secret is another.
    Unknown,
    /// Its time is over.
    Expired,
    /// Somebody revoked it.
    Revoked,
}

impl BadJoin {
    /// What it is and what to do.
    pub fn detail(self) -> &'static str {
        match self {
            Self::Malformed => "this is not a join token: `everlit node token create` makes one",
            Self::Unknown => "this join token is not known here: is it of another coordinator? `everlit node token create` makes one",
            Self::Expired => "this join token has expired: `everlit node token create` makes another",
            Self::Revoked => "this join token was revoked: `everlit node token create` makes another",
        }
    }
}

/// `POST /nodes/join`, with the join token's id and secret as the bearer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct JoinRequest {
    /// The name that it wants.
    pub node: NodeId,
    /// A certificate request (PKCS #10, PEM), signed with the key that the certificate shall be for.
    pub request: String,
}

/// `POST /nodes/renew`, over a connection with the certificate that is to be replaced.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RenewRequest {
    /// A certificate request (PKCS #10, PEM), of the same key or a new one.
    pub request: String,
}

/// A node's certificate.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NodeCertificate {
    /// The node that it is for.
    pub node: NodeId,
    /// PEM.
    pub certificate: String,
    /// How long it lives from now on: a node's own clock may be off. To be renewed at two thirds.
    pub lives: Millis,
}

/// A node that joined, as far as its certificate goes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Joined {
    /// When it joined.
    pub at: Timestamp,
    /// The id of the token that it joined with.
    pub token: String,
    /// When its newest certificate ends.
    pub certificate_expires_at: Timestamp,
}

/// Why a certificate opens nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BadCertificate {
    /// It is of our CA and of no node that is known.
    Unknown,
    /// The node was expelled.
    Expelled,
}

impl BadCertificate {
    /// What it is and what to do.
    pub fn detail(self) -> &'static str {
        match self {
            Self::Unknown => "this certificate is of no node here: was its node removed? join again with a new token",
            Self::Expelled => "this node was expelled: an admin may let it join again with `everlit node token create`",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token() -> JoinToken {
        JoinToken { ca: [0xA7; 32], id: "00112233aabb".into(), secret: "5".repeat(64) }
    }

    #[test]
    fn a_join_token_reads_back_and_nothing_less_does() {
        let text = token().to_string();
        assert_eq!(text.parse(), Ok(token()));
        assert_eq!(format!(" {text}\n").parse(), Ok(token()), "as it comes out of a file");
        for cut in 0..text.len() {
            let bad = text[..cut].parse::<JoinToken>().expect_err("cut");
            assert_eq!(bad, if cut < 2 { BadJoinToken::Foreign } else { BadJoinToken::Cut }, "cut at {cut}");
        }
        for (foreign, bad) in [
            ("everlit_00112233aabb_55", BadJoinToken::Foreign),
            (&text.replace("K1", "K10"), BadJoinToken::Cut),
            (&text.replace("a7", "A7"), BadJoinToken::Cut),
            (&text.replace("::", ":"), BadJoinToken::Cut),
            (&format!("{text}5"), BadJoinToken::Cut),
            ("K1é::", BadJoinToken::Cut),
        ] {
            assert_eq!(foreign.parse::<JoinToken>(), Err(bad), "{foreign}");
        }
        assert!(!format!("{:?}", token()).contains("555"), "no secret in a log");
        assert_eq!(split_shown(&token().shown()), Some(("00112233aabb", "5".repeat(64).as_str())));
    }

    #[test]
    fn nodes_are_named_like_hosts() {
        for good in ["a", "gpu-07", "rack1.node_2", "A1", &"x".repeat(63)] {
            assert!(is_node_name(good), "{good}");
        }
        for bad in ["", "-a", "a-", ".", "..", "a/b", "a b", "ä", "a\n", &"x".repeat(64)] {
            assert!(!is_node_name(bad), "{bad}");
        }
    }
}
