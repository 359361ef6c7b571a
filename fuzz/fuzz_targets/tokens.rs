//! Tokens as somebody shows them: what is taken for one is exactly one, and can be written again.
#![no_main]

use everlit_api::auth::{is_user_name, split_token};
use everlit_api::ids::{Incarnation, JobId};
use everlit_api::join::{JoinToken, is_node_name, split_shown};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(token) = text.parse::<JoinToken>() {
        assert_eq!(token.to_string(), text.trim(), "there is one way to write it");
        assert_eq!(split_shown(&token.shown()), Some((token.id.as_str(), token.secret.as_str())));
    }
    if let Some((id, secret)) = split_shown(text) {
        assert_eq!(format!("{id}:{secret}"), text);
    }
    if let Some((id, secret)) = split_token(text) {
        assert!(text.ends_with(&format!("{id}_{secret}")) && id.is_ascii() && secret.is_ascii());
    }
    if is_user_name(text) || is_node_name(text) {
        assert!(!text.is_empty() && text.len() <= 256 && !text.contains(['/', '\0', '\n', ' ']));
    }
    if let Ok(job) = text.parse::<JobId>() {
        assert_eq!(job.to_string().parse::<JobId>(), Ok(job));
    }
    if let Ok(incarnation) = text.parse::<Incarnation>() {
        assert_eq!(incarnation.to_string().parse::<Incarnation>(), Ok(incarnation));
    }
});
