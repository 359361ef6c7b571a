//! The HTTP doors: one axum router over [`Control`], the same under `/` and `/api/v1`.
//!
//! Doors check syntax, sizes and where a request comes from, then ask; they decide nothing about jobs. Every route comes in through
//! `routes!`, so that none is missing from the OpenAPI document. Every error, axum's own too, leaves as a problem (see `guard`).

use std::sync::Arc;

use axum::Router;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::control::Control;

mod access;
mod acts;
mod agents;
mod answer;
mod docs;
mod events;
mod extract;
mod guard;
mod health;
mod history;
mod jobs;
mod join;
mod logs;
mod nodes;
mod packages;
mod peer;
mod postmortem;
mod rate;
mod sse;
#[cfg(test)]
mod tests;
mod tokens;

pub use guard::Policy;
pub use peer::Peer;
pub use postmortem::postmortem;
pub use rate::Limit;

/// Whoever is in control, as every door has it.
/// Who answers.
pub type Shared = Arc<dyn Control>;

/// The doors.
pub fn router(control: Arc<dyn Control>, policy: Policy) -> Router {
    let (doors, document) = described().split_for_parts();
    let mut document = docs::complete(&document);
    let access = access::Access::of(&mut document);
    let doors = doors.with_state(control.clone()).layer(axum::Extension(docs::Document::new(&document)));
    let all = doors.clone().nest("/api/v1", doors).fallback(answer::no_such_path);
    all.layer(axum::middleware::from_fn_with_state(Arc::new(guard::Gate::new(policy, access, control)), guard::doors))
}

/// The agents' doors alone, for one that comes in beside the others.
pub fn agents_only(control: Arc<dyn Control>) -> Router {
    let (doors, document) =
        OpenApiRouter::with_openapi(docs::skeleton()).routes(routes!(agents::link)).routes(routes!(packages::fetch)).split_for_parts();
    let access = access::Access::of(&mut docs::complete(&document));
    let gate = Arc::new(guard::Gate::new(Policy::loopback(), access, control.clone()));
    let doors = doors.with_state(control).fallback(answer::no_such_path);
    doors.layer(axum::middleware::from_fn_with_state(gate, guard::doors))
}

/// Every route with its description.
fn described() -> OpenApiRouter<Shared> {
    OpenApiRouter::with_openapi(docs::skeleton())
        .routes(routes!(jobs::list, jobs::submit))
        .routes(routes!(jobs::summaries))
        .routes(routes!(acts::purge))
        .routes(routes!(jobs::one, acts::delete))
        .routes(routes!(jobs::summary))
        .routes(routes!(acts::stop))
        .routes(routes!(acts::restart))
        .routes(routes!(acts::checkpoint))
        .routes(routes!(logs::text))
        .routes(routes!(logs::stream))
        .routes(routes!(events::of_job))
        .routes(routes!(events::stream_of_job))
        .routes(routes!(events::stream_of_all))
        .routes(routes!(history::attempts))
        .routes(routes!(postmortem::one))
        .routes(routes!(history::checkpoints))
        .routes(routes!(history::metrics))
        .routes(routes!(history::explain))
        .routes(routes!(nodes::list))
        .routes(routes!(nodes::one, nodes::expel))
        .routes(routes!(nodes::cordon))
        .routes(routes!(nodes::uncordon))
        .routes(routes!(nodes::drain))
        .routes(routes!(health::health))
        .routes(routes!(health::livez))
        .routes(routes!(health::readyz))
        .routes(routes!(health::status))
        .routes(routes!(health::metrics))
        .routes(routes!(docs::openapi))
        .routes(routes!(docs::viewer))
        .routes(routes!(docs::asset))
        .routes(routes!(tokens::whoami))
        .routes(routes!(tokens::list, tokens::create))
        .routes(routes!(tokens::revoke))
        .routes(routes!(tokens::audit))
        .routes(routes!(packages::one, packages::put))
        .routes(routes!(packages::fetch))
        .routes(routes!(agents::link))
        .routes(routes!(join::tokens, join::create))
        .routes(routes!(join::revoke))
        .routes(routes!(join::join))
        .routes(routes!(join::renew))
}
