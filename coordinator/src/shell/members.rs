//! Who has joined, and who may: join tokens, the certificates of nodes, and the end of both.
//!
//! A use of a token counts at once and is durable before its node hears of it, together with the node. An answer that was lost may be asked
//! for again with the same key, for a while and until the node has connected; after that a request that is sent again is refused. The
//! certificates are known by their hash: what was not given out by this coordinator opens nothing, whatever it is signed with.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use everlit_api::ids::NodeId;
use everlit_api::join::{
    BadCertificate, BadJoin, ID_CHARS, JoinRequest, JoinToken, Joined, MadeNodeToken, NewNodeToken, NodeCertificate, NodeTokenView,
    SECRET_CHARS, split_shown, to_hex,
};
use everlit_api::problem::{Code, Problem};
use everlit_api::status::NodeView;
use everlit_api::time::{Millis, Timestamp};
use sha2::{Digest, Sha256};
use tokio::sync::oneshot;

use super::ca::{Ca, Request, Signed};
use super::control::{Coordinator, gone, no_node};
use super::driver::Input;
use super::store::{JoinTokenRow, MemberRow};
use super::tokens::{TOKENS_MAX, is_same};
use crate::engine::Event;
use crate::engine::placement::Node;

/// Nodes that may have joined at once.
const MEMBERS_MAX: usize = 10_000;
/// For so long an answer that was lost may be asked for again.
const REPEAT_MS: u64 = 10 * 60 * 1_000;

/// Join tokens, and the nodes that joined.
#[derive(Debug, Default)]
pub struct Members {
    state: RwLock<State>,
}

#[derive(Debug, Default)]
struct State {
    tokens: BTreeMap<String, JoinTokenRow>,
    nodes: BTreeMap<NodeId, MemberRow>,
    certificates: BTreeMap<[u8; 32], NodeId>,
}

/// What signs for nodes, and for how long.
pub struct Joining {
    /// The CA.
    pub ca: Ca,
    /// Life of a node's certificate.
    pub life: Millis,
}

impl std::fmt::Debug for Joining {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Joining").field("life", &self.life).finish_non_exhaustive()
    }
}

impl State {
    fn put(&mut self, row: MemberRow) {
        if let Some(before) = self.nodes.remove(&row.node) {
            for sum in std::iter::once(before.certificate).chain(before.previous) {
                self.certificates.remove(&sum);
            }
        }
        for sum in std::iter::once(row.certificate).chain(row.previous) {
            self.certificates.insert(sum, row.node.clone());
        }
        self.nodes.insert(row.node.clone(), row);
    }

    /// The token that this is, if it opens anything.
    fn token(&self, shown: &str, now: Timestamp) -> Result<&JoinTokenRow, BadJoin> {
        let (id, secret) = split_shown(shown).ok_or(BadJoin::Malformed)?;
        let row = self.tokens.get(id).filter(|row| is_same(&row.hash, &hash(secret))).ok_or(BadJoin::Unknown)?;
        if row.view.revoked_at.is_some() {
            return Err(BadJoin::Revoked);
        }
        if row.view.expires_at <= now { Err(BadJoin::Expired) } else { Ok(row) }
    }

    /// The token after one more use and the node that it makes, or the node alone where it asks again.
    fn admit(&self, asked: &Asked<'_>, now: Timestamp) -> Result<(Option<JoinTokenRow>, MemberRow), Problem> {
        let Asked { node, key, shown, signed } = asked;
        let refused = |detail: String| Err(Problem::new(Code::Conflict, detail));
        let row = self.token(shown, now).map_err(|bad| Problem::new(Code::Unauthorized, bad.detail()))?;
        if row.view.node.as_ref().is_some_and(|only| only != *node) {
            return refused(format!(
                "this join token is for another node than {node}: say --node with its name, or have one made for this one"
            ));
        }
        let member = MemberRow {
            node: (*node).clone(),
            key: *key,
            certificate: signed.sum,
            previous: None,
            expires_at: signed.expires_at,
            joined_at: now,
            token: row.view.id.clone(),
            linked: false,
            expelled_at: None,
        };
        if let Some(known) = self.nodes.get(*node).filter(|known| known.expelled_at.is_none()) {
            let asks_again = known.key == *key && known.token == row.view.id && now.since_ms(known.joined_at) < REPEAT_MS;
            if asks_again && !known.linked {
                return Ok((None, MemberRow { joined_at: known.joined_at, ..member }));
            }
            if asks_again {
                return refused(format!("node {node} has joined with this request already: it connects with the certificate that it got"));
            }
            return refused(format!(
                "a node named {node} has joined already: take another name with --node, or expel that one first: `everlit nodes expel {node}`"
            ));
        }
        if row.view.used >= row.view.uses {
            return refused("this join token was used already: `everlit node token create` makes another, with --uses for several".into());
        }
        if self.nodes.values().filter(|known| known.expelled_at.is_none()).count() >= MEMBERS_MAX {
            return refused(format!("there are {MEMBERS_MAX} nodes already: expel some that are gone"));
        }
        let mut token = row.clone();
        token.view.used += 1;
        Ok((Some(token), member))
    }
}

/// A join that is under way.
struct Asked<'a> {
    node: &'a NodeId,
    key: [u8; 32],
    shown: &'a str,
    signed: &'a Signed,
}

impl Members {
    /// What was stored.
    pub fn new(tokens: Vec<JoinTokenRow>, members: Vec<MemberRow>) -> Self {
        let mut state = State { tokens: tokens.into_iter().map(|row| (row.view.id.clone(), row)).collect(), ..State::default() };
        members.into_iter().for_each(|row| state.put(row));
        Self { state: RwLock::new(state) }
    }

    fn read(&self) -> RwLockReadGuard<'_, State> {
        // Each change is whole before anything can panic.
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whose certificate this is.
    pub fn node_of(&self, certificate: &[u8; 32]) -> Result<NodeId, BadCertificate> {
        let state = self.read();
        let node = state.certificates.get(certificate).ok_or(BadCertificate::Unknown)?;
        let is_out = state.nodes.get(node).is_none_or(|row| row.expelled_at.is_some());
        if is_out { Err(BadCertificate::Expelled) } else { Ok(node.clone()) }
    }

    /// The id of a token that opens something.
    pub fn token(&self, shown: &str, now: Timestamp) -> Result<String, BadJoin> {
        self.read().token(shown, now).map(|row| row.view.id.clone())
    }

    /// Newest first.
    pub fn tokens(&self) -> Vec<NodeTokenView> {
        let mut all: Vec<NodeTokenView> = self.read().tokens.values().map(|row| row.view.clone()).collect();
        all.sort_by(|a, b| (b.created_at, &b.id).cmp(&(a.created_at, &a.id)));
        all
    }

    /// Whether a name is that of a node that joined, and was not expelled.
    pub fn is_member(&self, node: &NodeId) -> bool {
        self.read().nodes.get(node).is_some_and(|row| row.expelled_at.is_none())
    }

    /// Fills in how nodes joined, and adds those that have never connected.
    pub fn complete(&self, views: &mut Vec<NodeView>) {
        for view in views.iter_mut() {
            view.joined = self.joined(&view.node);
        }
        let known: BTreeSet<NodeId> = views.iter().map(|view| view.node.clone()).collect();
        let missing: Vec<NodeId> = self.read().nodes.keys().filter(|node| !known.contains(node)).cloned().collect();
        for node in missing {
            if let Some(joined) = self.joined(&node) {
                views.push(NodeView { joined: Some(joined), ..Node::default().view(&node, Timestamp(0)) });
            }
        }
        views.sort_by(|a, b| a.node.cmp(&b.node));
    }

    /// How a node joined; `None` for one that did not, or was expelled.
    pub fn joined(&self, node: &NodeId) -> Option<Joined> {
        let state = self.read();
        let row = state.nodes.get(node).filter(|row| row.expelled_at.is_none())?;
        Some(Joined { at: row.joined_at, token: row.token.clone(), certificate_expires_at: row.expires_at })
    }

    /// A node has connected with this certificate: its row, when that is news.
    pub fn note_linked(&self, node: &NodeId, certificate: &[u8; 32]) -> Option<MemberRow> {
        let mut state = self.write();
        let row = state.nodes.get_mut(node).filter(|row| !row.linked && row.certificate == *certificate)?;
        row.linked = true;
        Some(row.clone())
    }

    /// Forgets tokens that were over before a time.
    pub fn forget_before(&self, time: Timestamp) {
        let over = |row: &JoinTokenRow| row.view.revoked_at.map_or(row.view.expires_at, |at| at.min(row.view.expires_at));
        self.write().tokens.retain(|_, row| over(row) >= time);
    }
}

fn hash(secret: &str) -> [u8; 32] {
    Sha256::digest(secret.as_bytes()).into()
}

/// A new token with its secret; nothing is known of it yet.
fn make(wanted: NewNodeToken, by: Option<String>, now: Timestamp) -> std::io::Result<(String, JoinTokenRow)> {
    let mut bytes = [0u8; (ID_CHARS + SECRET_CHARS) / 2];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    let text = to_hex(&bytes);
    let (id, secret) = text.split_at(ID_CHARS);
    let view = NodeTokenView {
        id: id.into(),
        created_at: now,
        created_by: by,
        expires_at: Timestamp(now.0.saturating_add(wanted.ttl.0)),
        uses: wanted.uses,
        used: 0,
        node: wanted.node,
        revoked_at: None,
    };
    Ok((secret.into(), JoinTokenRow { view, hash: hash(secret) }))
}

impl Coordinator {
    fn joining(&self) -> Result<&Joining, Problem> {
        let why = "agents of other machines come in over TLS only: start `everlit up` with --own-ca (or --tls-cert and --tls-key) and a \
                   --listen address that they can reach";
        self.joining.as_deref().ok_or_else(|| Problem::new(Code::Conflict, why))
    }

    /// Makes rows durable; goes on to its end when nobody waits for it any more.
    async fn keep_members(&self, token: Option<JoinTokenRow>, member: Option<MemberRow>) -> Result<(), Problem> {
        let own = self.clone();
        let kept = tokio::spawn(async move {
            let (reply, done) = oneshot::channel();
            own.send(Input::Members { token: token.map(Box::new), member: member.map(Box::new), reply }).await?;
            done.await.map_err(|_| gone())
        });
        kept.await.map_err(|_| gone())?
    }

    /// Makes a join token; it counts once it is durable.
    pub(super) async fn make_join_token(&self, wanted: NewNodeToken, by: Option<String>) -> Result<MadeNodeToken, Problem> {
        let ca = self.joining()?.ca.sum();
        if self.members.read().tokens.len() >= TOKENS_MAX {
            let why = format!("there are {TOKENS_MAX} join tokens already: those that are over go after 90 days");
            return Err(Problem::new(Code::Conflict, why));
        }
        let made = make(wanted, by, self.clock.now());
        let (secret, row) = made.map_err(|e| Problem::new(Code::Internal, format!("no random bytes: {e}")))?;
        let about = row.view.clone();
        self.keep_members(Some(row.clone()), None).await?;
        self.members.write().tokens.insert(about.id.clone(), row);
        let token = JoinToken { ca, id: about.id.clone(), secret }.to_string();
        Ok(MadeNodeToken { token, about })
    }

    /// Has nobody join with a token from here on, whatever becomes of who asked; answers when that is durable.
    pub(super) async fn end_join_token(&self, id: String) -> Result<NodeTokenView, Problem> {
        let row = {
            let mut state = self.members.write();
            let found = state.tokens.get_mut(&id);
            let row =
                found.ok_or_else(|| Problem::new(Code::NotFound, format!("there is no join token {id}; GET /join-tokens lists them")))?;
            if row.view.revoked_at.is_some() {
                return Ok(row.view.clone());
            }
            row.view.revoked_at = Some(self.clock.now());
            row.clone()
        };
        let view = row.view.clone();
        self.keep_members(Some(row), None).await?;
        Ok(view)
    }

    /// Makes a node; answers when that is durable.
    pub(super) async fn admit(&self, wanted: JoinRequest, shown: String) -> Result<NodeCertificate, Problem> {
        let Joining { ca, life } = self.joining()?;
        let request = Request::read(&wanted.request).map_err(|why| Problem::new(Code::BadRequest, why))?;
        let (node, key, now) = (wanted.node, request.key(), self.clock.now());
        let name = node.clone();
        if !self.members.is_member(&node) && self.look(move |engine, _| engine.nodes().contains_key(&name)).await? {
            let why = format!(
                "the name {node} is that of the coordinator's own agent, or of one before it: take another with --node, or forget a \
                 node that is gone: `everlit nodes expel {node}`"
            );
            return Err(Problem::new(Code::Conflict, why));
        }
        let signed = ca.sign_node(request, &node, *life, now).map_err(|e| Problem::new(Code::Internal, format!("{e:#}")))?;
        let (token, member) = {
            let mut state = self.members.write();
            let (token, member) = state.admit(&Asked { node: &node, key, shown: &shown, signed: &signed }, now)?;
            if let Some(token) = &token {
                state.tokens.insert(token.view.id.clone(), token.clone());
            }
            state.put(member.clone());
            (token, member)
        };
        self.keep_members(token, Some(member)).await?;
        Ok(NodeCertificate { node, certificate: signed.pem, lives: *life })
    }

    /// Another certificate for a node; answers when it counts.
    pub(super) async fn renew_certificate(&self, node: NodeId, certificate: [u8; 32], text: String) -> Result<NodeCertificate, Problem> {
        let Joining { ca, life } = self.joining()?;
        let request = Request::read(&text).map_err(|why| Problem::new(Code::BadRequest, why))?;
        let key = request.key();
        let signed = ca.sign_node(request, &node, *life, self.clock.now()).map_err(|e| Problem::new(Code::Internal, format!("{e:#}")))?;
        let row = {
            let mut state = self.members.write();
            let expelled = || Problem::new(Code::Forbidden, BadCertificate::Expelled.detail());
            let known = state.nodes.get(&node).filter(|row| row.expelled_at.is_none()).ok_or_else(expelled)?;
            // What it has just shown stays good until the next renewal: the answer may not reach it.
            let row = MemberRow {
                key,
                certificate: signed.sum,
                previous: Some(certificate),
                expires_at: signed.expires_at,
                linked: true,
                ..known.clone()
            };
            state.put(row.clone());
            row
        };
        self.keep_members(None, Some(row)).await?;
        Ok(NodeCertificate { node, certificate: signed.pem, lives: *life })
    }

    /// Has a node's certificates open nothing, and the node forgotten.
    pub(super) async fn expel_node(&self, node: NodeId, force: bool) -> Result<NodeView, Problem> {
        let is_member = self.members.is_member(&node);
        let name = node.clone();
        let found = self.look(move |engine, now| engine.nodes().get(&name).map(|own| (own.view(&name, now), own.linked))).await?;
        let (mut view, linked) = match found {
            Some(found) => found,
            None if is_member => (Node::default().view(&node, self.clock.now()), false),
            None => return Err(no_node(&node)),
        };
        if linked && !is_member {
            let why = format!("{node} is the coordinator's own agent: start `everlit up` with --no-local-agent to be without it");
            return Err(Problem::new(Code::Conflict, why));
        }
        if view.ranks > 0 && !force {
            let why =
                format!("{} ranks are placed on {node}: drain it first (POST /nodes/{node}/drain), or ?force=true loses them", view.ranks);
            return Err(Problem::new(Code::Conflict, why));
        }
        view.joined = self.members.joined(&node);
        let row = {
            let mut state = self.members.write();
            state.nodes.get_mut(&node).map(|row| {
                row.expelled_at = Some(self.clock.now());
                row.clone()
            })
        };
        self.keep_members(None, row).await?;
        self.send(Input::Wish(Event::NodeExpelled { node: node.clone(), force: true })).await?;
        // Everything that it is told before this is on its way.
        self.look(|_, _| ()).await?;
        self.agents.expel(&node, BadCertificate::Expelled.detail());
        Ok(view)
    }

    /// A node has connected: from here on its join request is not answered again.
    pub(super) fn note_member_linked(&self, node: &NodeId, certificate: &[u8; 32]) {
        if let Some(row) = self.members.note_linked(node, certificate) {
            let own = self.clone();
            tokio::spawn(async move { own.keep_members(None, Some(row)).await });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Timestamp = Timestamp(1_000_000);

    fn signed(sum: u8) -> Signed {
        Signed { pem: String::new(), sum: [sum; 32], expires_at: Timestamp(NOW.0 + 90_000) }
    }

    /// Members with one token, and that token as it is shown.
    fn with_token(wanted: NewNodeToken) -> (Members, String) {
        let (secret, row) = make(wanted, None, NOW).unwrap();
        let shown = format!("{}:{secret}", row.view.id);
        (Members::new(vec![row], Vec::new()), shown)
    }

    /// Joins; answers whether a use was counted.
    fn join(members: &Members, shown: &str, node: &str, key: u8, sum: u8, now: Timestamp) -> Result<bool, String> {
        let mut state = members.write();
        let asked = Asked { node: &NodeId(node.into()), key: [key; 32], shown, signed: &signed(sum) };
        let (token, member) = state.admit(&asked, now).map_err(|problem| problem.detail)?;
        let counted = token.is_some();
        state.tokens.extend(token.map(|row| (row.view.id.clone(), row)));
        state.put(member);
        Ok(counted)
    }

    #[test]
    fn a_token_makes_as_many_nodes_as_it_may() {
        let (members, shown) = with_token(NewNodeToken { uses: 2, ..NewNodeToken::default() });
        assert_eq!(join(&members, &shown, "a", 1, 1, NOW), Ok(true));
        assert!(join(&members, &shown, "a", 2, 2, NOW).unwrap_err().contains("a node named a has joined already"));
        assert_eq!(join(&members, &shown, "b", 2, 2, NOW), Ok(true));
        assert!(join(&members, &shown, "c", 3, 3, NOW).unwrap_err().contains("used already"));
        assert_eq!(members.tokens()[0].used, 2);
        assert_eq!(members.node_of(&[2; 32]), Ok(NodeId("b".into())));
        assert_eq!(members.node_of(&[3; 32]), Err(BadCertificate::Unknown));
        let (members, shown) = with_token(NewNodeToken { node: Some(NodeId("a".into())), ..NewNodeToken::default() });
        assert!(join(&members, &shown, "b", 1, 1, NOW).unwrap_err().contains("another node than b"));
        assert_eq!(join(&members, &shown, "a", 1, 1, NOW), Ok(true));
    }

    #[test]
    fn a_lost_answer_is_given_again_to_the_same_key_for_a_while_until_the_node_connects() {
        let (members, shown) = with_token(NewNodeToken::default());
        assert_eq!(join(&members, &shown, "a", 1, 1, NOW), Ok(true));
        assert_eq!(join(&members, &shown, "a", 1, 2, Timestamp(NOW.0 + REPEAT_MS - 1)), Ok(false));
        assert_eq!(members.node_of(&[1; 32]), Err(BadCertificate::Unknown), "the one before is of no use to anybody");
        let late = Timestamp(NOW.0 + REPEAT_MS);
        assert!(join(&members, &shown, "a", 1, 3, late).unwrap_err().contains("take another name"), "from the first time on");
        assert!(members.note_linked(&NodeId("a".into()), &[1; 32]).is_none());
        assert!(members.note_linked(&NodeId("a".into()), &[2; 32]).unwrap().linked);
        assert!(members.note_linked(&NodeId("a".into()), &[2; 32]).is_none(), "no news");
        assert!(join(&members, &shown, "a", 1, 3, NOW).unwrap_err().contains("with this request already"));
    }

    #[test]
    fn who_was_expelled_is_out_until_a_new_token_lets_its_name_in_again() {
        let (members, shown) = with_token(NewNodeToken { uses: 2, ..NewNodeToken::default() });
        join(&members, &shown, "a", 1, 1, NOW).unwrap();
        let name = NodeId("a".into());
        members.write().nodes.get_mut(&name).unwrap().expelled_at = Some(NOW);
        assert_eq!(members.node_of(&[1; 32]), Err(BadCertificate::Expelled));
        assert!(!members.is_member(&name) && members.joined(&name).is_none());
        let rows = members.read().nodes.values().cloned().collect();
        assert_eq!(Members::new(Vec::new(), rows).node_of(&[1; 32]), Err(BadCertificate::Expelled), "after a restart, too");
        assert_eq!(join(&members, &shown, "a", 1, 2, NOW), Ok(true), "that costs a use");
        assert_eq!((members.node_of(&[2; 32]), members.node_of(&[1; 32])), (Ok(name), Err(BadCertificate::Unknown)));
    }

    #[test]
    fn tokens_that_open_nothing_are_told_apart() {
        let (members, shown) = with_token(NewNodeToken { ttl: Millis::secs(60), ..NewNodeToken::default() });
        assert!(members.token(&shown, Timestamp(NOW.0 + 59_999)).is_ok());
        assert_eq!(members.token(&shown, Timestamp(NOW.0 + 60_000)), Err(BadJoin::Expired));
        assert_eq!(members.token(&shown[1..], NOW), Err(BadJoin::Malformed));
        let (_, other) = with_token(NewNodeToken::default());
        assert_eq!(members.token(&other, NOW), Err(BadJoin::Unknown));
        let mixed = format!("{}{}", &shown[..13], &other[13..]);
        assert_eq!(members.token(&mixed, NOW), Err(BadJoin::Unknown), "another's secret");
        members.write().tokens.values_mut().for_each(|row| row.view.revoked_at = Some(NOW));
        assert_eq!(members.token(&shown, NOW), Err(BadJoin::Revoked));
        members.forget_before(Timestamp(NOW.0 + 1));
        assert_eq!(members.token(&shown, NOW), Err(BadJoin::Unknown));
    }
}
