//! How servers become nodes: join tokens, joining with one, renewing the certificate that one got.

use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode};
use axum::{Extension, Json};
use serde_json::Value;

use super::Shared;
use super::answer::Refusal;
use super::extract::{JsonBody, LIMIT_DEFAULT, LIMIT_MAX, Params, page};
use super::guard::bearer;
use crate::auth::Caller;
use crate::control::Agent;
use crate::ids::NodeId;
use crate::job::{Fault, FaultKind};
use crate::join::{
    BadJoin, JOIN_TTL, JOIN_USES_MAX, JoinRequest, MadeNodeToken, NODE_CHARS_MAX, NewNodeToken, NodeCertificate, NodeTokenView,
    REQUEST_BYTES_MAX, RenewRequest, is_node_name,
};
use crate::problem::Code;
use crate::status::Page;
use crate::time::Millis;

fn fault(pointer: &str, detail: String) -> Fault {
    Fault { pointer: pointer.into(), detail, kind: FaultKind::Invalid }
}

/// Make a join token. The answer is the only time that its secret is shown.
#[utoipa::path(post, path = "/join-tokens", tag = "nodes", operation_id = "create_join_token", request_body = NewNodeToken,
    responses((status = 201, description = "The token", body = MadeNodeToken)))]
pub(super) async fn create(
    State(control): State<Shared>,
    Extension(caller): Extension<Caller>,
    params: Params,
    body: JsonBody,
) -> Result<(StatusCode, Json<MadeNodeToken>), Refusal> {
    params.finish()?;
    let wanted = new_token(&body)?;
    Ok((StatusCode::CREATED, Json(control.create_join_token(wanted, caller.user).await?)))
}

fn new_token(body: &JsonBody) -> Result<NewNodeToken, Refusal> {
    let map = body.fields(&["ttl", "uses", "node"])?;
    let default = NewNodeToken::default();
    let (least, most) = JOIN_TTL;
    let ttl = match map.get("ttl") {
        None | Some(Value::Null) => Ok(default.ttl),
        Some(Value::String(text)) => match text.parse::<Millis>() {
            Ok(ttl) if (least..=most).contains(&ttl) => Ok(ttl),
            Ok(_) => Err("must be from \"10s\" to \"365d\"".into()),
            Err(bad) => Err(bad.to_string()),
        },
        Some(_) => Err("must be a duration with its unit in quotes, like \"1h\"".to_string()),
    };
    let uses = match map.get("uses") {
        None | Some(Value::Null) => Ok(default.uses),
        Some(given) => {
            let number = given.as_u64().and_then(|uses| u32::try_from(uses).ok()).filter(|uses| (1..=JOIN_USES_MAX).contains(uses));
            number.ok_or_else(|| format!("must be a number from 1 to {JOIN_USES_MAX}"))
        }
    };
    let node = match map.get("node") {
        None | Some(Value::Null) => Ok(None),
        Some(given) => node_name(given).map(Some),
    };
    match (ttl, uses, node) {
        (Ok(ttl), Ok(uses), Ok(node)) => Ok(NewNodeToken { ttl, uses, node }),
        (ttl, uses, node) => {
            let faults = [("/ttl", ttl.err()), ("/uses", uses.err()), ("/node", node.err())];
            Err(faults.into_iter().filter_map(|(at, detail)| Some(fault(at, detail?))).collect::<Vec<_>>().into())
        }
    }
}

fn node_name(given: &Value) -> Result<NodeId, String> {
    let named = given.as_str().filter(|name| is_node_name(name)).map(|name| NodeId(name.into()));
    named.ok_or_else(|| format!("must be the name of a node: 1 to {NODE_CHARS_MAX} letters, digits, \".\", \"_\" or \"-\""))
}

/// List join tokens, newest first, used, revoked and expired ones too.
#[utoipa::path(get, path = "/join-tokens", tag = "nodes", operation_id = "list_join_tokens", params(
        ("limit" = Option<u32>, Query, description = "Entries per page: 50, at most 500", minimum = 1, maximum = 500),
        ("after" = Option<String>, Query, description = "Go on after this cursor (`last_id` of the page before)"),
    ), responses((status = 200, description = "A page", body = Page<NodeTokenView>)))]
pub(super) async fn tokens(State(control): State<Shared>, mut params: Params) -> Result<Json<Page<NodeTokenView>>, Refusal> {
    let (limit, after) = (params.limit(LIMIT_DEFAULT, LIMIT_MAX), params.one("after"));
    params.finish()?;
    page(control.join_tokens(), limit, after.as_deref(), |one| one.id.clone()).map(Json)
}

/// Revoke a join token: nobody joins with it from now on. Who has joined stays. Revoking it twice is no error.
#[utoipa::path(delete, path = "/join-tokens/{id}", tag = "nodes", operation_id = "revoke_join_token",
    params(("id" = String, Path, description = "Token id")),
    responses((status = 200, description = "The token", body = NodeTokenView)))]
pub(super) async fn revoke(
    State(control): State<Shared>,
    id: Result<Path<String>, axum::extract::rejection::PathRejection>,
    params: Params,
) -> Result<Json<NodeTokenView>, Refusal> {
    let Path(id) = id.map_err(|_| Refusal::new(Code::NotFound, "the path is not valid UTF-8"))?;
    params.finish()?;
    Ok(Json(control.revoke_join_token(id).await?))
}

/// Become a node: a certificate for the key that the request is signed with. Asked again with the same key before the node has
/// connected, it is answered again.
#[utoipa::path(post, path = "/join", tag = "agents", operation_id = "join_node", request_body = JoinRequest,
    params(("Authorization" = String, Header, description = "`Bearer` and the join token's `id:secret`")),
    responses((status = 201, description = "The certificate", body = NodeCertificate)))]
pub(super) async fn join(
    State(control): State<Shared>,
    headers: HeaderMap,
    params: Params,
    body: JsonBody,
) -> Result<(StatusCode, Json<NodeCertificate>), Refusal> {
    params.finish()?;
    let map = body.fields(&["node", "request"])?;
    let (node, request) = (node_name(map.get("node").unwrap_or(&Value::Null)), certificate_request(map.get("request")));
    let wanted = match (node, request) {
        (Ok(node), Ok(request)) => JoinRequest { node, request },
        (node, request) => {
            let faults = [("/node", node.err()), ("/request", request.err())];
            return Err(faults.into_iter().filter_map(|(at, detail)| Some(fault(at, detail?))).collect::<Vec<_>>().into());
        }
    };
    let shown = bearer(&headers).flatten().ok_or_else(|| Refusal::new(Code::Unauthorized, BadJoin::Malformed.detail()))?;
    Ok((StatusCode::CREATED, Json(control.join(wanted, shown.into()).await?)))
}

fn certificate_request(given: Option<&Value>) -> Result<String, String> {
    let text = given.and_then(Value::as_str).filter(|text| text.len() <= REQUEST_BYTES_MAX && text.contains("CERTIFICATE REQUEST"));
    text.map(Into::into).ok_or_else(|| format!("must be a certificate request, as PEM of at most {REQUEST_BYTES_MAX} bytes"))
}

/// Renew the certificate of the node that asks.
#[utoipa::path(post, path = "/join/renew", tag = "agents", operation_id = "renew_certificate", request_body = RenewRequest,
    responses((status = 200, description = "The certificate", body = NodeCertificate)))]
pub(super) async fn renew(
    State(control): State<Shared>,
    Extension(agent): Extension<Agent>,
    params: Params,
    body: JsonBody,
) -> Result<Json<NodeCertificate>, Refusal> {
    params.finish()?;
    let map = body.fields(&["request"])?;
    let request = certificate_request(map.get("request")).map_err(|detail| vec![fault("/request", detail)])?;
    match agent {
        Agent::Node { node, certificate } => Ok(Json(control.renew(node, certificate, request).await?)),
        Agent::Local => Err(Refusal::new(Code::Forbidden, "this machine's own agent has no certificate: only nodes that joined renew one")),
    }
}
