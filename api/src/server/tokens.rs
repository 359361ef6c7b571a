//! Tokens and the audit log: making, listing, revoking, and who one is.

use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::{Extension, Json};
use serde_json::Value;

use super::Shared;
use super::answer::Refusal;
use super::extract::{JsonBody, LIMIT_DEFAULT, LIMIT_MAX, Params, page};
use crate::auth::{AuditView, Caller, MadeToken, NewToken, Role, TOKEN_TTL, TOKEN_TTL_DEFAULT, TokenView, USER_CHARS_MAX, is_user_name};
use crate::job::{Fault, FaultKind};
use crate::problem::Code;
use crate::status::Page;
use crate::time::Millis;

/// Who this caller is, and what it may.
#[utoipa::path(get, path = "/whoami", tag = "auth", operation_id = "whoami", responses((status = 200, description = "The caller", body = Caller)))]
pub(super) async fn whoami(Extension(caller): Extension<Caller>, params: Params) -> Result<Json<Caller>, Refusal> {
    params.finish()?;
    Ok(Json(caller))
}

/// Make a token. The answer is the only time that its secret is shown.
#[utoipa::path(post, path = "/tokens", tag = "auth", operation_id = "create_token", request_body = NewToken,
    responses((status = 201, description = "The token", body = MadeToken)))]
pub(super) async fn create(
    State(control): State<Shared>,
    Extension(caller): Extension<Caller>,
    params: Params,
    body: JsonBody,
) -> Result<(StatusCode, Json<MadeToken>), Refusal> {
    params.finish()?;
    let wanted = new_token(&body)?;
    Ok((StatusCode::CREATED, Json(control.create_token(wanted, caller.user).await?)))
}

fn new_token(body: &JsonBody) -> Result<NewToken, Refusal> {
    let map = body.fields(&["user", "role", "ttl"])?;
    let fault = |pointer: &str, detail: String| Fault { pointer: pointer.into(), detail, kind: FaultKind::Invalid };
    let user = match map.get("user").and_then(Value::as_str) {
        Some(name) if is_user_name(name) => Ok(name.to_string()),
        _ => Err(fault("/user", format!("must be a name of 1 to {USER_CHARS_MAX} letters, digits, \".\", \"_\", \"-\" or \"@\""))),
    };
    let role = match map.get("role").and_then(Value::as_str).map(str::parse::<Role>) {
        Some(Ok(role)) => Ok(role),
        _ => Err(fault("/role", format!("must be one of {}", Role::ALL.map(|role| format!("\"{role}\"")).join(", ")))),
    };
    let (least, most) = TOKEN_TTL;
    let ttl = match map.get("ttl") {
        None | Some(Value::Null) => Ok(TOKEN_TTL_DEFAULT),
        Some(Value::String(text)) => text.parse::<Millis>().map_err(|bad| fault("/ttl", bad.to_string())),
        Some(_) => Err(fault("/ttl", "must be a duration with its unit in quotes, like \"90d\"".into())),
    };
    let ttl =
        ttl.and_then(
            |ttl| {
                if (least..=most).contains(&ttl) { Ok(ttl) } else { Err(fault("/ttl", "must be from \"1m\" to \"3650d\"".into())) }
            },
        );
    match (user, role, ttl) {
        (Ok(user), Ok(role), Ok(ttl)) => Ok(NewToken { user, role, ttl }),
        (user, role, ttl) => Err(user.err().into_iter().chain(role.err()).chain(ttl.err()).collect::<Vec<_>>().into()),
    }
}

/// List tokens, newest first, revoked and expired ones too.
#[utoipa::path(get, path = "/tokens", tag = "auth", operation_id = "list_tokens", params(
        ("limit" = Option<u32>, Query, description = "Entries per page: 50, at most 500", minimum = 1, maximum = 500),
        ("after" = Option<String>, Query, description = "Go on after this cursor (`last_id` of the page before)"),
    ), responses((status = 200, description = "A page", body = Page<TokenView>)))]
pub(super) async fn list(State(control): State<Shared>, mut params: Params) -> Result<Json<Page<TokenView>>, Refusal> {
    let (limit, after) = (params.limit(LIMIT_DEFAULT, LIMIT_MAX), params.one("after"));
    params.finish()?;
    page(control.tokens(), limit, after.as_deref(), |one| one.id.clone()).map(Json)
}

/// Revoke a token: it opens nothing from now on. Revoking it twice is no error.
#[utoipa::path(delete, path = "/tokens/{id}", tag = "auth", operation_id = "revoke_token", params(("id" = String, Path, description = "Token id")),
    responses((status = 200, description = "The token", body = TokenView)))]
pub(super) async fn revoke(
    State(control): State<Shared>,
    id: Result<Path<String>, axum::extract::rejection::PathRejection>,
    params: Params,
) -> Result<Json<TokenView>, Refusal> {
    let Path(id) = id.map_err(|_| Refusal::new(Code::NotFound, "the path is not valid UTF-8"))?;
    params.finish()?;
    Ok(Json(control.revoke_token(id).await?))
}

/// What was asked for, by whom, newest first.
#[utoipa::path(get, path = "/audit", tag = "auth", operation_id = "list_audit", params(
        ("limit" = Option<u32>, Query, description = "Entries per page: 50, at most 500", minimum = 1, maximum = 500),
        ("after" = Option<String>, Query, description = "Go on after this cursor (`last_id` of the page before)"),
        ("user" = Option<String>, Query, description = "Only of this user"),
    ), responses((status = 200, description = "A page", body = Page<AuditView>)))]
pub(super) async fn audit(State(control): State<Shared>, mut params: Params) -> Result<Json<Page<AuditView>>, Refusal> {
    let limit = params.limit(LIMIT_DEFAULT, LIMIT_MAX);
    let (before, user) = (params.parsed("after", "must be the `last_id` of a page before"), params.one("user"));
    params.finish()?;
    Ok(Json(control.audit_log(before, user, limit).await?))
}
