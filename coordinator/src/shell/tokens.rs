//! Who shows which token. What is known of tokens is held in memory; a new one, and the end of one, counts once it is durable.
//!
//! A secret is made here, goes out once in an answer, and is forgotten: what stays is its hash. It is random and long, so one round of
//! sha256 is enough; nobody guesses 256 bits.

use std::collections::BTreeMap;
use std::io::Read;
use std::sync::{PoisonError, RwLock};

use everlit_api::auth::{
    AuditView, BadToken, Caller, MadeToken, NewToken, Role, TOKEN_ID_CHARS, TOKEN_PREFIX, TOKEN_SECRET_CHARS, TokenView, split_token,
};
use everlit_api::problem::{Code, Problem};
use everlit_api::status::Page;
use everlit_api::time::Timestamp;
use sha2::{Digest, Sha256};
use tokio::sync::oneshot;

use super::control::{Coordinator, gone};
use super::driver::Input;
use super::store::TokenRow;

/// Tokens that may be known at once.
pub const TOKENS_MAX: usize = 10_000;

/// Every token of this coordinator.
#[derive(Debug, Default)]
pub struct Tokens {
    known: RwLock<BTreeMap<String, TokenRow>>,
}

impl Tokens {
    /// What was stored.
    pub fn new(rows: Vec<TokenRow>) -> Self {
        Self { known: RwLock::new(rows.into_iter().map(|row| (row.view.id.clone(), row)).collect()) }
    }

    fn known(&self) -> std::sync::RwLockReadGuard<'_, BTreeMap<String, TokenRow>> {
        // Each change is one insertion: a thread that panicked left nothing half done.
        self.known.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Who shows this token.
    pub fn caller(&self, token: &str, now: Timestamp) -> Result<Caller, BadToken> {
        let (id, secret) = split_token(token).ok_or(BadToken::Malformed)?;
        let known = self.known();
        let row = known.get(id).filter(|row| is_same(&row.hash, &hash(secret))).ok_or(BadToken::Unknown)?;
        let TokenView { user, role, expires_at, .. } = &row.view;
        if row.view.revoked_at.is_some() {
            return Err(BadToken::Revoked);
        }
        if *expires_at <= now {
            return Err(BadToken::Expired);
        }
        Ok(Caller { user: Some(user.clone()), role: *role, token: Some(id.into()), expires_at: Some(*expires_at) })
    }

    /// Newest first.
    pub fn list(&self) -> Vec<TokenView> {
        let mut all: Vec<TokenView> = self.known().values().map(|row| row.view.clone()).collect();
        all.sort_by(|a, b| (b.created_at, &b.id).cmp(&(a.created_at, &a.id)));
        all
    }

    /// One.
    pub fn get(&self, id: &str) -> Option<TokenRow> {
        self.known().get(id).cloned()
    }

    /// There is no room for another.
    pub fn is_full(&self) -> bool {
        self.known().len() >= TOKENS_MAX
    }

    /// Somebody can make tokens.
    pub fn has_admin(&self, now: Timestamp) -> bool {
        let opens = |row: &TokenRow| row.view.role == Role::Admin && row.view.revoked_at.is_none() && row.view.expires_at > now;
        self.known().values().any(opens)
    }

    /// What is durable now counts.
    pub fn put(&self, row: TokenRow) {
        self.known.write().unwrap_or_else(PoisonError::into_inner).insert(row.view.id.clone(), row);
    }

    /// Forgets what was over before a time.
    pub fn forget_before(&self, time: Timestamp) {
        let over = |row: &TokenRow| row.view.revoked_at.map_or(row.view.expires_at, |at| at.min(row.view.expires_at));
        self.known.write().unwrap_or_else(PoisonError::into_inner).retain(|_, row| over(row) >= time);
    }
}

impl Coordinator {
    /// Makes a token in the name of who asks; it counts once it is durable.
    pub(super) async fn make_token(&self, wanted: NewToken, by: Option<String>) -> Result<MadeToken, Problem> {
        if self.tokens.is_full() {
            return Err(Problem::new(
                Code::Conflict,
                format!("there are {TOKENS_MAX} tokens already: those that are over go after 90 days"),
            ));
        }
        let made = make(wanted, by, self.clock.now());
        let (token, row) = made.map_err(|e| Problem::new(Code::Internal, format!("no random bytes: {e}")))?;
        let about = row.view.clone();
        self.keep_token(row).await?;
        Ok(MadeToken { token, about })
    }

    /// Has a token open nothing from here on, whatever becomes of who asked; answers when that is durable.
    pub(super) async fn end_token(&self, id: String) -> Result<TokenView, Problem> {
        let found = self.tokens.get(&id);
        let mut row = found.ok_or_else(|| Problem::new(Code::NotFound, format!("there is no token {id}; GET /tokens lists them")))?;
        if row.view.revoked_at.is_none() {
            row.view.revoked_at = Some(self.clock.now());
            self.tokens.put(row.clone());
            self.keep_token(row.clone()).await?;
        }
        Ok(row.view)
    }

    /// Makes a token durable as it is now; then it counts. Goes on to its end when nobody waits for it any more.
    pub(super) async fn keep_token(&self, row: TokenRow) -> Result<(), Problem> {
        let own = self.clone();
        let kept = tokio::spawn(async move {
            let (reply, done) = oneshot::channel();
            own.send(Input::Token { row: row.clone(), reply }).await?;
            done.await.map_err(|_| gone())?;
            own.tokens.put(row);
            Ok(())
        });
        kept.await.map_err(|_| gone())?
    }

    /// A page of the audit log, newest first; what was let in before is in it.
    pub(super) async fn audit_page(&self, before: Option<u64>, user: Option<String>, limit: u32) -> Result<Page<AuditView>, Problem> {
        self.look(|_, _| ()).await?;
        let mut data = self.store.audit(before, user.as_deref(), limit + 1).await?;
        let has_more = data.len() > limit as usize;
        data.truncate(limit as usize);
        let (first_id, last_id) = (data.first().map(|line| line.seq.to_string()), data.last().map(|line| line.seq.to_string()));
        Ok(Page { data, first_id, last_id, has_more })
    }
}

/// A new token with its secret; nothing is known of it yet.
pub fn make(wanted: NewToken, by: Option<String>, now: Timestamp) -> std::io::Result<(String, TokenRow)> {
    let mut bytes = [0u8; (TOKEN_ID_CHARS + TOKEN_SECRET_CHARS) / 2];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    let text: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    let (id, secret) = text.split_at(TOKEN_ID_CHARS);
    let view = TokenView {
        id: id.into(),
        user: wanted.user,
        role: wanted.role,
        created_at: now,
        created_by: by,
        expires_at: Timestamp(now.0.saturating_add(wanted.ttl.0)),
        revoked_at: None,
    };
    Ok((format!("{TOKEN_PREFIX}{id}_{secret}"), TokenRow { view, hash: hash(secret) }))
}

fn hash(secret: &str) -> [u8; 32] {
    Sha256::digest(secret.as_bytes()).into()
}

/// In the same time whatever they are.
pub(super) fn is_same(a: &[u8; 32], b: &[u8; 32]) -> bool {
    a.iter().zip(b).fold(0, |differ, (a, b)| differ | (a ^ b)) == 0
}

#[cfg(test)]
mod tests {
    use everlit_api::time::Millis;

    use super::*;

    fn wanted(role: Role) -> NewToken {
        NewToken { user: "alice".into(), role, ttl: Millis::secs(60) }
    }

    #[test]
    fn a_token_opens_until_it_expires_or_is_revoked_and_only_whole() {
        let tokens = Tokens::default();
        let (text, row) = make(wanted(Role::User), Some("ada".into()), Timestamp(1_000)).unwrap();
        assert_eq!(tokens.caller(&text, Timestamp(1_000)), Err(BadToken::Unknown), "not durable yet");
        tokens.put(row.clone());
        let id = row.view.id.clone();
        let alice = Caller { user: Some("alice".into()), role: Role::User, token: Some(id.clone()), expires_at: Some(Timestamp(61_000)) };
        assert_eq!(tokens.caller(&text, Timestamp(60_999)), Ok(alice));
        assert_eq!(tokens.caller(&text, Timestamp(61_000)), Err(BadToken::Expired));
        assert_eq!(tokens.caller(&text[..text.len() - 1], Timestamp(1_000)), Err(BadToken::Malformed));
        let (other, _) = make(wanted(Role::User), None, Timestamp(1_000)).unwrap();
        let secret = other.rsplit('_').next().unwrap();
        assert_eq!(tokens.caller(&format!("everlit_{id}_{secret}"), Timestamp(1_000)), Err(BadToken::Unknown), "another's secret");
        let mut revoked = tokens.get(&id).unwrap();
        revoked.view.revoked_at = Some(Timestamp(2_000));
        tokens.put(revoked);
        assert_eq!(tokens.caller(&text, Timestamp(70_000)), Err(BadToken::Revoked), "before expired: somebody meant it");
        tokens.forget_before(Timestamp(2_001));
        assert_eq!(tokens.caller(&text, Timestamp(1_000)), Err(BadToken::Unknown));
    }

    #[test]
    fn an_admin_counts_only_while_its_token_opens() {
        let tokens = Tokens::default();
        tokens.put(make(wanted(Role::Operator), None, Timestamp(0)).unwrap().1);
        assert!(!tokens.has_admin(Timestamp(0)));
        let (_, mut admin) = make(wanted(Role::Admin), None, Timestamp(0)).unwrap();
        tokens.put(admin.clone());
        assert!(tokens.has_admin(Timestamp(59_999)) && !tokens.has_admin(Timestamp(60_000)));
        admin.view.revoked_at = Some(Timestamp(1));
        tokens.put(admin);
        assert!(!tokens.has_admin(Timestamp(2)));
    }

    #[test]
    fn what_is_kept_has_no_secret() {
        let (text, row) = make(wanted(Role::Viewer), None, Timestamp(0)).unwrap();
        let secret = text.rsplit('_').next().unwrap();
        assert!(!format!("{row:?}").contains(secret) && split_token(&text).is_some());
        let (again, _) = make(wanted(Role::Viewer), None, Timestamp(0)).unwrap();
        assert_ne!(text, again);
    }
}
