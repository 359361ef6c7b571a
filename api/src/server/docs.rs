//! The OpenAPI document and its viewer, both served from the program itself: no page loads anything from elsewhere.
//!
//! Handlers describe their own answers; what is the same for all (problems, the request form of a job) is added here once.

use std::sync::{Arc, LazyLock};

use axum::Extension;
use axum::body::{Body, Bytes};
use axum::extract::{OriginalUri, Path};
use axum::http::StatusCode;
use axum::http::header::{CONTENT_ENCODING, CONTENT_SECURITY_POLICY, CONTENT_TYPE, LOCATION};
use axum::response::{IntoResponse, Response};
use serde_json::{Map, Value, json};
use utoipa::openapi::{InfoBuilder, LicenseBuilder, OpenApi, OpenApiBuilder, RefOr, schema::Schema};
use utoipa::{PartialSchema, ToSchema};
use utoipa_swagger_ui::Config;

use super::answer::{Refusal, for_status};
use crate::job::JobSpec;
use crate::problem::Problem;

/// What the viewer may load: itself. Its styles are inline.
const VIEWER_POLICY: &str =
    "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; connect-src 'self'; frame-ancestors 'none'";

/// A job as it is submitted: [`JobSpec`] with every field optional.
pub(super) struct JobRequest;

impl PartialSchema for JobRequest {
    fn schema() -> RefOr<Schema> {
        JobSpec::schema()
    }
}

impl ToSchema for JobRequest {
    fn schemas(schemas: &mut Vec<(String, RefOr<Schema>)>) {
        JobSpec::schemas(schemas);
    }
}

/// The document before any path.
pub(super) fn skeleton() -> OpenApi {
    let license = LicenseBuilder::new().name("Apache-2.0").identifier(Some("Apache-2.0")).build();
    let info = InfoBuilder::new()
        .title("everlit")
        .version(env!("CARGO_PKG_VERSION"))
        .description(Some(
            "Keeps AI training jobs alive. The same paths answer under /api/v1. Errors are application/problem+json with a stable `code`.",
        ))
        .license(Some(license));
    OpenApiBuilder::new().info(info).build()
}

/// The document as text.
#[derive(Clone)]
pub(super) struct Document(Bytes);

impl Document {
    pub(super) fn new(document: &Value) -> Self {
        Self(serde_json::to_vec(document).unwrap_or_default().into())
    }
}

/// The document with what is the same for all.
pub(super) fn complete(api: &OpenApi) -> Value {
    let mut document = serde_json::to_value(api).unwrap_or_default();
    add_problems(&mut document);
    add_job_request(&mut document);
    let token = json!({"type": "http", "scheme": "bearer", "description": "`everlit token create` makes one"});
    document["components"]["securitySchemes"] = json!({ "token": token });
    document
}

fn add_problems(document: &mut Value) {
    let schema = serde_json::to_value(Problem::schema()).unwrap_or_default();
    let parts = document.pointer_mut("/components/schemas").and_then(Value::as_object_mut);
    if let Some(parts) = parts {
        parts.insert("Problem".into(), schema);
        let mut needed = Vec::new();
        Problem::schemas(&mut needed);
        for (name, schema) in needed {
            parts.entry(name).or_insert_with(|| serde_json::to_value(schema).unwrap_or_default());
        }
    }
    let answer = |description: &str| json!({"description": description, "content": {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}});
    let Some(paths) = document.pointer_mut("/paths").and_then(Value::as_object_mut) else { return };
    for (path, item) in paths {
        for (method, operation) in item.as_object_mut().into_iter().flatten() {
            let Some(answers) = operation.get_mut("responses").and_then(Value::as_object_mut) else { continue };
            let mut add = |status: &str, description: &str| {
                answers.entry(status).or_insert_with(|| answer(description));
            };
            add("default", "Any other error; `code` tells which");
            add("401", "No token, or one that opens nothing");
            add("403", "The role does not allow it; or a web page from elsewhere, or a Host that is not loopback");
            add("429", "Too many requests, or bad tokens");
            if path.contains('{') {
                add("404", "There is no such job, node or package");
            }
            if method == "post" {
                add("413", "The body is larger than 1 MiB");
                add("415", "The body is not application/json");
                add("422", "Faults, all named at once in `errors`, or something that is not built");
            }
            if path == "/packages/{id}" && method == "put" {
                add("413", "The package is larger than 512 MiB");
                add("422", "The bytes are no package, have another hash, or have something in them that is not taken");
                add("503", "There is no room for it");
            }
            if path.starts_with("/jobs/{id}") && method != "get" {
                add("409", "The job's state does not allow it; the detail says what to do");
            }
            if path.starts_with("/join") || (path == "/nodes/{id}" && method == "delete") {
                add("409", "The token is used up or for another node, the name is taken, or the node is in use");
            }
            if path == "/jobs" && method == "post" {
                add("409", "A request with this Idempotency-Key is still running");
            }
        }
    }
}

/// Makes every field of the request form optional, with the default that is really filled in.
fn add_job_request(document: &mut Value) {
    let defaults = serde_json::to_value(JobSpec::default_for(1)).unwrap_or_default();
    let Some(parts) = document.pointer_mut("/components/schemas").and_then(Value::as_object_mut) else { return };
    let mut added = Map::new();
    relax("JobSpec", "JobRequest", &defaults, parts, &mut added);
    if let Some(memory) = added.get_mut("ResourcesRequest").and_then(|s| s.pointer_mut("/properties/memory")) {
        *memory = json!({"description": "Bytes of memory, or a size like \"2Gi\", \"500Mi\", \"2G\".", "default": 0,
            "oneOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": "^[0-9.]+([KMGT]i?)?B?$"}]});
    }
    if let Some(batch) =
        added.get_mut("WorkerSpecRequest").and_then(|s| s.pointer_mut("/properties/batch_size")).and_then(Value::as_object_mut)
    {
        batch.remove("default");
        batch.insert(
            "description".into(),
            "Samples per update over all ranks, at least the world size, or \"auto\": as many as fit in memory. 8 per rank by default."
                .into(),
        );
    }
    parts.extend(added);
}

fn relax(from: &str, to: &str, defaults: &Value, parts: &Map<String, Value>, added: &mut Map<String, Value>) {
    let Some(mut schema) = parts.get(from).cloned() else { return };
    let Some(object) = schema.as_object_mut() else { return };
    object.remove("required");
    object.insert("additionalProperties".into(), false.into());
    for (name, property) in object.get_mut("properties").and_then(Value::as_object_mut).into_iter().flatten() {
        let default = defaults.get(name).cloned();
        let own = default.clone().unwrap_or_default();
        if let Some(target) = sub_object(property, parts) {
            let renamed = format!("{target}Request");
            relax(&target, &renamed, &own, parts, added);
            point_at(property, &target, &renamed);
        } else if let (Some(property), Some(default)) = (property.as_object_mut(), default) {
            property.insert("default".into(), default);
        }
    }
    added.insert(to.into(), schema);
}

const PREFIX: &str = "#/components/schemas/";

/// The object that a property refers to, directly or as an alternative to null.
fn sub_object(property: &Value, parts: &Map<String, Value>) -> Option<String> {
    let alternatives = property.get("oneOf").and_then(Value::as_array).into_iter().flatten();
    let reference = std::iter::once(property).chain(alternatives).find_map(|p| p.get("$ref")?.as_str()?.strip_prefix(PREFIX))?;
    parts.get(reference)?.get("properties").map(|_| reference.into())
}

fn point_at(property: &mut Value, from: &str, to: &str) {
    let old = format!("{PREFIX}{from}");
    let turn = |one: &mut Value| {
        if one.get("$ref").and_then(Value::as_str) == Some(&old) {
            one["$ref"] = format!("{PREFIX}{to}").into();
        }
    };
    turn(property);
    property.get_mut("oneOf").and_then(Value::as_array_mut).into_iter().flatten().for_each(turn);
}

/// This document.
#[utoipa::path(get, path = "/openapi.json", tag = "docs", operation_id = "openapi",
    responses((status = 200, description = "OpenAPI 3.1", body = Object, content_type = "application/json")))]
pub(super) async fn openapi(Extension(document): Extension<Document>) -> Response {
    ([(CONTENT_TYPE, "application/json")], document.0).into_response()
}

/// The viewer of this document.
#[utoipa::path(get, path = "/docs", tag = "docs", operation_id = "docs", responses((status = 308, description = "To `/docs/index.html`")))]
pub(super) async fn viewer(OriginalUri(uri): OriginalUri) -> Response {
    (StatusCode::PERMANENT_REDIRECT, [(LOCATION, format!("{}/index.html", uri.path()))]).into_response()
}

/// A file of the viewer.
#[utoipa::path(get, path = "/docs/{file}", tag = "docs", operation_id = "docs_file", params(("file" = String, Path, description = "File name")),
    responses((status = 200, description = "The file", body = String, content_type = "text/html")))]
pub(super) async fn asset(OriginalUri(uri): OriginalUri, Path(file): Path<String>) -> Result<Response, Refusal> {
    static CONFIG: LazyLock<Arc<Config<'static>>> = LazyLock::new(|| Arc::new(Config::from("../openapi.json").validator_url("none")));
    let missing = || Refusal::from(for_status(StatusCode::NOT_FOUND, "GET", uri.path()));
    let found = utoipa_swagger_ui::serve(&file, CONFIG.clone()).ok().flatten().ok_or_else(missing)?;
    let mut response = Response::builder().header(CONTENT_TYPE, found.content_type).header(CONTENT_SECURITY_POLICY, VIEWER_POLICY);
    if found.gzpipped {
        response = response.header(CONTENT_ENCODING, "gzip");
    }
    response.body(Body::from(found.bytes.into_owned())).map_err(|_| missing())
}
