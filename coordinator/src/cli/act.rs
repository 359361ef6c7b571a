//! Acting: `stop`, `restart`, `checkpoint`, `rm`, `purge`, nodes, and the calls of `down`.

use std::collections::BTreeSet;
use std::time::Duration;

use clap::{Args, Subcommand};
use everlit_api::client::{Client, Error, ListRequest};
use everlit_api::ids::{JobId, NodeId};
use everlit_api::problem::Code;
use everlit_api::request::PurgeRequest;
use everlit_api::status::{JobState, JobView};
use everlit_api::time::Millis;

use super::{Fail, Output, find, out, show};

/// How often a state that is waited for is asked for.
const ASK_EVERY: Duration = Duration::from_millis(200);

/// `everlit down`.
#[derive(Debug, Clone, Args)]
pub struct DownArgs {
    /// Stop every job for good first; else jobs are saved and go back in the queue, to resume at the next `up`
    #[arg(long)]
    pub stop_jobs: bool,
    /// Folder of what is to end, as given to `up` [default: ~/.local/share/everlit]
    #[arg(long, env = "EVERLIT_DATA_DIR", value_name = "FOLDER")]
    pub data_dir: Option<std::path::PathBuf>,
}

/// `everlit stop`.
#[derive(Debug, Args)]
pub struct StopArgs {
    /// The job's id, the beginning or end of it, its name, or `last`
    #[arg(value_name = "JOB")]
    job: String,
    /// Kill at once: nothing is saved
    #[arg(long)]
    force: bool,
    /// Wait until it is final
    #[arg(long)]
    wait: bool,
}

/// `everlit rm`.
#[derive(Debug, Args)]
pub struct RmArgs {
    /// The job's id, the beginning or end of it, its name, or `last`
    #[arg(value_name = "JOB")]
    job: String,
    /// Stop it first when it is active
    #[arg(long)]
    stop_first: bool,
    /// With --stop-first: kill at once
    #[arg(long, requires = "stop_first")]
    force: bool,
}

/// `everlit purge`.
#[derive(Debug, Args)]
pub struct PurgeArgs {
    /// Finished at least this long ago, like 7d; 0s for all
    #[arg(long, value_name = "TIME")]
    older_than: Millis,
    /// Only these final states, separated by commas
    #[arg(long, value_delimiter = ',', value_parser = show::state)]
    state: Vec<JobState>,
    /// Tell, but remove nothing
    #[arg(long)]
    dry_run: bool,
}

/// `everlit nodes`.
#[derive(Debug, Args)]
pub struct NodesArgs {
    #[command(subcommand)]
    act: Option<NodeAct>,
}

#[derive(Debug, Subcommand)]
enum NodeAct {
    /// Give it no new ranks
    Cordon {
        /// The node's name
        name: String,
    },
    /// Give it new ranks again
    Uncordon {
        /// The node's name
        name: String,
    },
    /// Cordon it, stop its ranks with their grace, put their jobs back in the queue
    Drain {
        /// The node's name
        name: String,
        /// Kill what still lives after so long, whatever grace its job has
        #[arg(long, value_name = "TIME")]
        deadline: Option<Millis>,
    },
}

fn told(job: &JobView, output: Output, what: &str) -> Result<(), Fail> {
    if output == Output::Json { out::json(job) } else { out::line(&format!("{} {what}", job.job_id)) }
}

/// Stops a job.
pub(super) async fn stop(client: &Client, args: &StopArgs, output: Output) -> Result<(), Fail> {
    let id = find::job(client, &args.job).await?;
    let mut job = client.stop(id, args.force).await?;
    while args.wait && !job.state.is_final() {
        tokio::time::sleep(ASK_EVERY).await;
        job = client.job(id).await?;
    }
    told(&job, output, job.state.as_str())
}

/// Restarts a gang.
pub(super) async fn restart(client: &Client, job: &str, output: Output) -> Result<(), Fail> {
    let id = find::job(client, job).await?;
    told(&client.restart(id).await?, output, "restarts")
}

/// Has a job save.
pub(super) async fn checkpoint(client: &Client, job: &str, output: Output) -> Result<(), Fail> {
    let id = find::job(client, job).await?;
    told(&client.checkpoint(id).await?, output, "was told to save")
}

/// Removes a job.
pub(super) async fn rm(client: &Client, args: &RmArgs, output: Output) -> Result<(), Fail> {
    let id = find::job(client, &args.job).await?;
    told(&client.delete(id, args.stop_first, args.force).await?, output, "removed")
}

/// Removes old jobs.
pub(super) async fn purge(client: &Client, args: PurgeArgs, output: Output) -> Result<(), Fail> {
    if let Some(state) = args.state.iter().find(|state| !state.is_final()) {
        return Err(Fail::Usage(format!("--state {state}: only final jobs can be removed (succeeded, failed, stopped)")));
    }
    let purged = client.purge(&PurgeRequest { older_than: args.older_than, states: args.state, dry_run: args.dry_run }).await?;
    if output == Output::Json {
        return out::json(&purged);
    }
    for id in &purged.removed {
        out::line(&id.to_string())?;
    }
    eprintln!("{} {}", purged.removed.len(), if purged.dry_run { "would be removed" } else { "removed" });
    Ok(())
}

/// Lists nodes or acts on one.
pub(super) async fn nodes(client: &Client, args: NodesArgs, output: Output) -> Result<(), Fail> {
    let node = match args.act {
        None => {
            let page = client.nodes().await?;
            return if output == Output::Json { out::json(&page) } else { show::nodes(&page.data) };
        }
        Some(NodeAct::Cordon { name }) => client.cordon(&NodeId(name)).await?,
        Some(NodeAct::Uncordon { name }) => client.uncordon(&NodeId(name)).await?,
        Some(NodeAct::Drain { name, deadline }) => client.drain(&NodeId(name), deadline).await?,
    };
    if output == Output::Json { out::json(&node) } else { show::nodes(&[node]) }
}

/// The calls of `down`.
pub(super) async fn down(client: &Client, args: &DownArgs) -> Result<(), Fail> {
    if args.stop_jobs {
        let stopped = stop_all_jobs(client).await?;
        eprintln!("{stopped} jobs stopped");
    }
    Ok(())
}

/// Stops every active job and waits until each is final; answers how many there were.
pub async fn stop_all_jobs(client: &Client) -> Result<usize, Fail> {
    let states = JobState::ALL.into_iter().filter(|state| !state.is_final()).collect::<Vec<_>>();
    let mut told = BTreeSet::new();
    loop {
        let mut list = ListRequest { limit: Some(500), states: states.clone(), ..ListRequest::default() };
        let mut active = 0;
        loop {
            let page = client.jobs(&list).await?;
            active += page.data.len();
            for job in &page.data {
                // A job that is stopping stays in the list until it is final.
                if told.insert(job.job_id) {
                    stop_if_active(client, job.job_id).await?;
                }
            }
            list.after = page.last_id;
            if !page.has_more || list.after.is_none() {
                break;
            }
        }
        if active == 0 {
            return Ok(told.len());
        }
        tokio::time::sleep(ASK_EVERY).await;
    }
}

async fn stop_if_active(client: &Client, id: JobId) -> Result<(), Fail> {
    match client.stop(id, false).await {
        Ok(_) => Ok(()),
        // It became final, or was removed, in between.
        Err(Error::Problem(problem)) if matches!(problem.code, Code::Conflict | Code::NotFound) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
