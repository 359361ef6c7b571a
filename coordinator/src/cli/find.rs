//! Finds the job that a person means: an id, the beginning or end of one, a name, or `last`.
//!
//! Never a guess: when several jobs fit, it lists them and does nothing.

use everlit_api::client::{Client, ListRequest};
use everlit_api::ids::JobId;
use everlit_api::status::JobView;

use super::Fail;

/// A part of an id must be this long.
const PART_CHARS_MIN: usize = 4;
/// Jobs that are looked through for a part of an id at most.
const JOBS_MAX: usize = 20_000;

/// The one job that `text` names.
pub(super) async fn job(client: &Client, text: &str) -> Result<JobId, Fail> {
    if let Ok(id) = text.parse() {
        return Ok(id);
    }
    if text == "last" {
        let newest = client.jobs(&ListRequest { limit: Some(1), ..ListRequest::default() }).await?.data;
        return newest.first().map(|job| job.job_id).ok_or_else(|| Fail::Refused("there is no job yet".into()));
    }
    let named = client.jobs(&ListRequest { limit: Some(10), name: Some(text.into()), ..ListRequest::default() }).await?.data;
    if !named.is_empty() {
        return only(text, &named);
    }
    let part = text.to_ascii_lowercase();
    let could_be_part = part.len() >= PART_CHARS_MIN && part.len() < ulid::ULID_LEN && part.bytes().all(|b| b.is_ascii_alphanumeric());
    if !could_be_part {
        return Err(none(text));
    }
    let fits = |job: &JobView| {
        let id = job.job_id.to_string();
        id.starts_with(&part) || id.ends_with(&part)
    };
    let mut found = Vec::new();
    let mut list = ListRequest { limit: Some(500), ..ListRequest::default() };
    for _ in 0..JOBS_MAX / 500 {
        let page = client.jobs(&list).await?;
        found.extend(page.data.into_iter().filter(fits));
        list.after = page.last_id;
        if !page.has_more || list.after.is_none() || found.len() > 10 {
            break;
        }
    }
    only(text, &found)
}

fn only(text: &str, found: &[JobView]) -> Result<JobId, Fail> {
    match found {
        [] => Err(none(text)),
        [one] => Ok(one.job_id),
        several => {
            let mut message = format!("`{text}` names more than one job; give the id:");
            for job in several.iter().take(10) {
                message.push_str(&format!("\n  {}  {}  {}", job.job_id, job.state, job.name.as_deref().unwrap_or("-")));
            }
            Err(Fail::Refused(message))
        }
    }
}

fn none(text: &str) -> Fail {
    Fail::Refused(format!("no job is named `{text}` or has an id that begins or ends so: `everlit ls` lists them"))
}
