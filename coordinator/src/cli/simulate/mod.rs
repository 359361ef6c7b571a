//! `everlit simulate`: what a policy gives on a cluster, before it costs anything. It asks the coordinator only for `--from-job`.

use everlit_api::client::Client;

use super::{Fail, Output, out};
use crate::simulate::{study, svg};

mod args;
mod measure;
mod text;

pub(super) use args::SimulateArgs;

/// Answers the question that the flags make.
pub(super) async fn simulate(client: &Client, args: &SimulateArgs, output: Output) -> Result<(), Fail> {
    let measured = match &args.from_job {
        Some(job) => Some(measure::measure(client, job).await?),
        None => None,
    };
    let question = args.question(measured.as_ref())?;
    let report = study::study(&question);
    if let Some(file) = &args.svg {
        let written = std::fs::write(file, svg(&report));
        written.map_err(|error| Fail::Refused(format!("can not write {}: {error}", file.display())))?;
    }
    let lines = measured.map(|measured| measured.lines).unwrap_or_default();
    if args.json || output == Output::Json {
        let mut value = serde_json::to_value(&report).map_err(|error| Fail::Refused(error.to_string()))?;
        value["measured"] = lines.into();
        return out::json(&value);
    }
    text::print(&report, &lines)
}
