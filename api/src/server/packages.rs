//! Folders that go with jobs: uploaded by those who submit, got by agents.
//!
//! A package is known by the sha256 of its bytes, so to say the name is to say what is in it: nobody replaces another's, and nobody but agents
//! reads one.

use std::time::Duration;

use axum::body::Body;
use axum::extract::State;
use axum::http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use axum::http::request::Parts;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use futures_util::StreamExt;

use super::Shared;
use super::agents::must_be_agent;
use super::answer::Refusal;
use super::extract::Params;
use crate::control::{Agent, PackageBytes, Upload};
use crate::job::is_package;
use crate::package::{PACKED_BYTES_MAX, PackageView};
use crate::problem::Code;

/// An upload that brings no byte for so long is given up.
const SILENCE_MAX: Duration = Duration::from_secs(60);

/// The package named in the path.
pub(super) struct Package(String);

impl<S: Send + Sync> axum::extract::FromRequestParts<S> for Package {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Refusal> {
        let named = axum::extract::Path::<String>::from_request_parts(parts, state).await.ok();
        let package = named.map(|axum::extract::Path(text)| text).filter(|text| is_package(text));
        let wrong = "a package is named by its sha256, 64 lower-case hexadecimal digits: /packages/$(sha256sum FILE | cut -d' ' -f1)";
        package.map(Self).ok_or_else(|| Refusal::new(Code::NotFound, wrong))
    }
}

/// Upload a packed folder (a gzipped tar of plain files and folders) under the sha256 of its bytes.
///
/// It is there when it is answered. A job names it as `package`. One that no active job names goes after a week without use, or earlier
/// where room is needed.
#[utoipa::path(put, path = "/packages/{id}", tag = "packages", operation_id = "put_package",
    params(("id" = String, Path, description = "sha256 of the body, as hexadecimal")),
    request_body(content = String, content_type = "application/gzip"),
    responses((status = 201, description = "It is kept", body = PackageView), (status = 200, description = "It was there", body = PackageView)))]
pub(super) async fn put(
    State(control): State<Shared>,
    Package(package): Package,
    params: Params,
    headers: HeaderMap,
    body: Body,
) -> Result<(StatusCode, Json<PackageView>), Refusal> {
    params.finish()?;
    let announced = headers.get(CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse::<u64>().ok());
    if announced.is_some_and(|bytes| bytes > PACKED_BYTES_MAX) {
        let most = PACKED_BYTES_MAX >> 20;
        return Err(Refusal::new(
            Code::BodyTooLarge,
            format!("a package may have at most {most} MiB: put data where all nodes can read it"),
        ));
    }
    let (kept, is_new) = control.keep_package(Upload { package, bytes: in_time(body) }).await?;
    Ok((if is_new { StatusCode::CREATED } else { StatusCode::OK }, Json(kept)))
}

/// The bytes of a body, which must keep coming.
fn in_time(body: Body) -> PackageBytes {
    let chunks = futures_util::stream::unfold(Some(body.into_data_stream()), |stream| async {
        let mut stream = stream?;
        match tokio::time::timeout(SILENCE_MAX, stream.next()).await {
            Ok(None) => None,
            Ok(Some(Ok(chunk))) => Some((Ok(chunk), Some(stream))),
            Ok(Some(Err(error))) => Some((Err(std::io::Error::other(error)), None)),
            Err(_) => Some((Err(std::io::ErrorKind::TimedOut.into()), None)),
        }
    });
    Box::pin(chunks)
}

/// Whether a package is there: 404 when it must be uploaded first.
#[utoipa::path(get, path = "/packages/{id}", tag = "packages", operation_id = "get_package",
    params(("id" = String, Path, description = "sha256 of its bytes, as hexadecimal")),
    responses((status = 200, description = "It is kept", body = PackageView)))]
pub(super) async fn one(State(control): State<Shared>, Package(package): Package, params: Params) -> Result<Json<PackageView>, Refusal> {
    params.finish()?;
    Ok(Json(control.package(package).await?))
}

/// The bytes of a package, for agents.
#[utoipa::path(get, path = "/agent/packages/{id}", tag = "agents", operation_id = "fetch_package",
    params(
        ("id" = String, Path, description = "sha256 of its bytes, as hexadecimal"),
        ("Authorization" = Option<String>, Header, description = "`Bearer` and the secret of this machine's own agent; a node that joined shows its certificate instead"),
    ),
    responses((status = 200, description = "A gzipped tar", body = String, content_type = "application/gzip")))]
pub(super) async fn fetch(
    State(control): State<Shared>,
    Extension(agent): Extension<Agent>,
    headers: HeaderMap,
    Package(package): Package,
    params: Params,
) -> Result<Response, Refusal> {
    must_be_agent(&control, &agent, &headers)?;
    params.finish()?;
    let (length, bytes) = control.read_package(package).await?;
    Ok(([(CONTENT_TYPE, "application/gzip".to_string()), (CONTENT_LENGTH, length.to_string())], Body::from_stream(bytes)).into_response())
}
