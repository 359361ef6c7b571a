//! Nodes: what they have, what they do, and taking them out of use.

use axum::extract::State;
use axum::{Extension, Json};
use serde_json::Value;

use super::Shared;
use super::answer::Refusal;
use super::extract::{JsonBody, LIMIT_DEFAULT, LIMIT_MAX, Node, Params, page};
use crate::auth::Caller;
use crate::job::{Fault, FaultKind};
use crate::request::DrainRequest;
use crate::status::{NodeView, Page};
use crate::time::Millis;

/// The longest that a drain may give what it stops.
const DEADLINE_MAX: Millis = Millis::secs(86_400);

/// What is held against a node names jobs, of which a user sees its own only.
fn shown(mut node: NodeView, caller: &Caller) -> NodeView {
    if caller.only().is_some() {
        node.blames.clear();
        node.gpu_blames.clear();
    }
    node
}

/// List nodes in name order; a user is not told of the failures that are held against them.
#[utoipa::path(get, path = "/nodes", tag = "nodes", operation_id = "list_nodes", params(
        ("limit" = Option<u32>, Query, description = "Entries per page: 50, at most 500", minimum = 1, maximum = 500),
        ("after" = Option<String>, Query, description = "Go on after this cursor (`last_id` of the page before)"),
    ), responses((status = 200, description = "A page", body = Page<NodeView>)))]
pub(super) async fn list(
    State(control): State<Shared>,
    Extension(caller): Extension<Caller>,
    mut params: Params,
) -> Result<Json<Page<NodeView>>, Refusal> {
    let (limit, after) = (params.limit(LIMIT_DEFAULT, LIMIT_MAX), params.one("after"));
    params.finish()?;
    let all = control.nodes().await?.into_iter().map(|node| shown(node, &caller)).collect();
    page(all, limit, after.as_deref(), |one| one.node.to_string()).map(Json)
}

/// One node.
#[utoipa::path(get, path = "/nodes/{id}", tag = "nodes", operation_id = "get_node", params(("id" = String, Path, description = "Node name")),
    responses((status = 200, description = "The node", body = NodeView)))]
pub(super) async fn one(
    State(control): State<Shared>,
    Extension(caller): Extension<Caller>,
    Node(id): Node,
    params: Params,
) -> Result<Json<NodeView>, Refusal> {
    params.finish()?;
    Ok(Json(shown(control.node(id).await?, &caller)))
}

/// Expel a node: its certificate opens nothing from now on, and it is forgotten. 409 while ranks are placed there, unless `force`: then
/// they count as lost, and their jobs go on elsewhere.
#[utoipa::path(delete, path = "/nodes/{id}", tag = "nodes", operation_id = "expel_node", params(("id" = String, Path, description = "Node name"),
        ("force" = Option<bool>, Query, description = "Also while ranks are placed there")),
    responses((status = 200, description = "The node as it was", body = NodeView)))]
pub(super) async fn expel(State(control): State<Shared>, Node(id): Node, mut params: Params) -> Result<Json<NodeView>, Refusal> {
    let force = params.flag("force");
    params.finish()?;
    Ok(Json(control.expel(id, force).await?))
}

/// Give a node no new ranks.
#[utoipa::path(post, path = "/nodes/{id}/cordon", tag = "nodes", operation_id = "cordon_node", params(("id" = String, Path, description = "Node name")),
    responses((status = 200, description = "The node", body = NodeView)))]
pub(super) async fn cordon(
    State(control): State<Shared>,
    Node(id): Node,
    params: Params,
    body: JsonBody,
) -> Result<Json<NodeView>, Refusal> {
    params.finish()?;
    body.fields(&[])?;
    Ok(Json(control.cordon(id, true).await?))
}

/// Give a node new ranks again.
#[utoipa::path(post, path = "/nodes/{id}/uncordon", tag = "nodes", operation_id = "uncordon_node", params(("id" = String, Path, description = "Node name")),
    responses((status = 200, description = "The node", body = NodeView)))]
pub(super) async fn uncordon(
    State(control): State<Shared>,
    Node(id): Node,
    params: Params,
    body: JsonBody,
) -> Result<Json<NodeView>, Refusal> {
    params.finish()?;
    body.fields(&[])?;
    Ok(Json(control.cordon(id, false).await?))
}

/// Cordon a node, stop its ranks with their grace, within the deadline if there is one, and put their jobs back in the queue.
#[utoipa::path(post, path = "/nodes/{id}/drain", tag = "nodes", operation_id = "drain_node", request_body(content = Option<DrainRequest>), params(("id" = String, Path, description = "Node name")),
    responses((status = 200, description = "The node", body = NodeView)))]
pub(super) async fn drain(
    State(control): State<Shared>,
    Node(id): Node,
    params: Params,
    body: JsonBody,
) -> Result<Json<NodeView>, Refusal> {
    params.finish()?;
    let deadline = deadline(body.fields(&["deadline"])?.get("deadline"))
        .map_err(|detail| vec![Fault { pointer: "/deadline".into(), detail, kind: FaultKind::Invalid }])?;
    Ok(Json(control.drain(id, deadline).await?))
}

fn deadline(value: Option<&Value>) -> Result<Option<Millis>, String> {
    let text = match value {
        None | Some(Value::Null) => return Ok(None),
        Some(value) => value.as_str().ok_or("must be a duration with its unit in quotes, like \"5m\"")?,
    };
    let deadline: Millis = text.parse().map_err(|bad: crate::time::BadDuration| bad.to_string())?;
    if deadline <= DEADLINE_MAX { Ok(Some(deadline)) } else { Err(format!("must be at most {DEADLINE_MAX}")) }
}
