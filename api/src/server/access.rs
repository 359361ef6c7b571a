//! Who may what: the least role that each operation needs, all in one place. What is not in the table is for nobody but admins.
//!
//! The table goes into the OpenAPI document too (`x-role`), and what a request needs is looked up by what the document says of its path, so
//! that the two can not differ.

use std::collections::BTreeMap;

use axum::http::Method;
use serde_json::Value;

use crate::auth::Role;

/// What a caller must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Needs {
    /// Anybody, without a token.
    Nothing,
    /// An agent: a node by its certificate, this machine's own by a secret at its door.
    Agent,
    /// A server that has a join token.
    JoinToken,
    /// This role at least.
    Role(Role),
}

impl Needs {
    fn as_str(self) -> &'static str {
        match self {
            Self::Nothing => "none",
            Self::Agent => "agent",
            Self::JoinToken => "join token",
            Self::Role(role) => role.as_str(),
        }
    }
}

const ANYBODY: Needs = Needs::Nothing;
const VIEWER: Needs = Needs::Role(Role::Viewer);
const USER: Needs = Needs::Role(Role::User);
const OPERATOR: Needs = Needs::Role(Role::Operator);
const ADMIN: Needs = Needs::Role(Role::Admin);

/// By operation id.
const TABLE: [(&str, Needs); 48] = [
    ("health", ANYBODY),
    ("livez", ANYBODY),
    ("readyz", ANYBODY),
    // In short without a token.
    ("status", ANYBODY),
    ("agent_link", Needs::Agent),
    ("renew_certificate", Needs::Agent),
    ("fetch_package", Needs::Agent),
    ("join_node", Needs::JoinToken),
    ("list_jobs", VIEWER),
    ("list_summaries", VIEWER),
    ("get_job", VIEWER),
    ("get_summary", VIEWER),
    ("get_logs", VIEWER),
    ("stream_logs", VIEWER),
    ("list_events", VIEWER),
    ("stream_job_events", VIEWER),
    ("stream_events", VIEWER),
    ("list_attempts", VIEWER),
    ("get_postmortem", VIEWER),
    ("list_checkpoints", VIEWER),
    ("list_metrics", VIEWER),
    ("explain_job", VIEWER),
    ("list_nodes", VIEWER),
    ("get_node", VIEWER),
    ("metrics", VIEWER),
    ("openapi", VIEWER),
    ("docs", VIEWER),
    ("docs_file", VIEWER),
    ("whoami", VIEWER),
    ("submit_job", USER),
    ("put_package", USER),
    ("get_package", USER),
    ("stop_job", USER),
    ("restart_job", USER),
    ("checkpoint_job", USER),
    ("delete_job", USER),
    ("purge_jobs", OPERATOR),
    ("cordon_node", OPERATOR),
    ("uncordon_node", OPERATOR),
    ("drain_node", OPERATOR),
    ("expel_node", ADMIN),
    ("list_join_tokens", ADMIN),
    ("create_join_token", ADMIN),
    ("revoke_join_token", ADMIN),
    ("list_tokens", ADMIN),
    ("create_token", ADMIN),
    ("revoke_token", ADMIN),
    ("list_audit", ADMIN),
];

/// What an operation needs.
fn needs(operation: &str) -> Needs {
    TABLE.iter().find(|(id, _)| *id == operation).map_or(ADMIN, |(_, needs)| *needs)
}

/// A door as the document knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Door {
    /// The operation's id.
    pub(super) operation: String,
    /// Who may.
    pub(super) needs: Needs,
    /// The path names a job.
    pub(super) of_job: bool,
}

/// Every door by its method and path.
#[derive(Debug, Clone)]
pub(super) struct Access(BTreeMap<(String, String), Door>);

impl Access {
    /// Reads the document, and writes into it what each operation needs.
    pub(super) fn of(document: &mut Value) -> Self {
        let mut doors = BTreeMap::new();
        for (path, item) in document.pointer_mut("/paths").and_then(Value::as_object_mut).into_iter().flatten() {
            for (method, described) in item.as_object_mut().into_iter().flatten() {
                let operation = described["operationId"].as_str().unwrap_or_default().to_string();
                let needs = needs(&operation);
                described["x-role"] = needs.as_str().into();
                described["security"] = match needs {
                    Needs::Nothing => serde_json::json!([{}, { "token": [] }]),
                    Needs::Agent | Needs::JoinToken | Needs::Role(_) => serde_json::json!([{ "token": [] }]),
                };
                let of_job = path.starts_with("/jobs/{id}");
                doors.insert((method.to_uppercase(), path.clone()), Door { operation, needs, of_job });
            }
        }
        Self(doors)
    }

    /// The door of a request, by the path as it was matched; `None`: that path does not take this method.
    pub(super) fn door(&self, method: &Method, matched: &str) -> Option<&Door> {
        let method = if method == Method::HEAD { Method::GET } else { method.clone() };
        let path = matched.strip_prefix("/api/v1").unwrap_or(matched);
        self.0.get(&(method.to_string(), path.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_nobody_thought_of_is_for_admins() {
        let mut document = json!({"paths": {"/new/{id}": {"post": {"operationId": "new_thing"}}, "/jobs/{id}/stop": {"post": {"operationId": "stop_job"}}}});
        let access = Access::of(&mut document);
        let door = access.door(&Method::POST, "/api/v1/new/{id}").expect("known");
        assert_eq!((door.needs, door.of_job), (ADMIN, false));
        assert_eq!(document["paths"]["/new/{id}"]["post"]["x-role"], "admin");
        let door = access.door(&Method::POST, "/jobs/{id}/stop").expect("known");
        assert_eq!((door.needs, door.of_job, door.operation.as_str()), (USER, true, "stop_job"));
        assert_eq!(access.door(&Method::PUT, "/jobs/{id}/stop"), None);
    }
}
