//! The command line: every verb but `up` is a client of the REST API.
//!
//! Exit codes: 0 done, 1 refused or failed, 2 usage. Results go to stdout, remarks and errors to stderr; a closed pipe ends quietly.
//! `main` runs `up` and the process part of `down` itself.

use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand, ValueEnum};
use everlit_api::client::{Client, DEFAULT_URL, Error};

use crate::config::UpArgs;

mod act;
mod checkpoints;
mod deploy;
mod doctor;
mod find;
mod follow;
mod logs;
mod nodes;
mod out;
mod pack;
mod show;
mod simulate;
mod submit;
#[cfg(test)]
mod tests;
mod tokens;

pub use act::{DownArgs, stop_all_jobs};
use act::{PurgeArgs, RmArgs, StopArgs};
use checkpoints::CheckpointsArgs;
use doctor::DoctorArgs;
use logs::LogsArgs;
use nodes::NodesArgs;
use show::{LsArgs, MetricsArgs};
use simulate::SimulateArgs;
use submit::{ResumeArgs, SubmitArgs};
use tokens::{AuditArgs, TokenArgs};

/// everlit keeps AI training jobs alive.
#[derive(Debug, Parser)]
#[command(name = "everlit", version, about, propagate_version = true, arg_required_else_help = true)]
pub struct Cli {
    /// Where the coordinator is
    #[arg(long, global = true, env = "EVERLIT_URL", default_value = DEFAULT_URL, value_name = "URL")]
    pub url: String,
    /// The CA that the coordinator's certificate is of, PEM: its `ca/ca.pem` with --own-ca
    #[arg(long, global = true, env = "EVERLIT_CA_FILE", value_name = "FILE")]
    pub ca_file: Option<std::path::PathBuf>,
    /// How results are written
    #[arg(short, long, global = true, value_enum, default_value_t = Output::Text, value_name = "FORM")]
    pub output: Output,
    /// What to do.
    #[command(subcommand)]
    pub verb: Verb,
}

/// How results are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// For people.
    Text,
    /// For programs.
    Json,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Run the coordinator, with an agent on this machine
    Up(Box<UpArgs>),
    /// End the coordinator and the agent of this machine
    Down(DownArgs),
    /// Submit a job: the built-in model, a file of JSON, or a command after `--`
    Submit(Box<SubmitArgs>),
    /// List jobs, newest first
    #[command(visible_alias = "list")]
    Ls(LsArgs),
    /// Show a job: progress, ranks, restarts, where the time went
    Get(JobArg),
    /// Print a job's log
    Logs(LogsArgs),
    /// Stop a job; its state is saved
    Stop(StopArgs),
    /// Restart the gang of a job from its newest checkpoint
    Restart(JobArg),
    /// Have a running job save now and go on
    Checkpoint(JobArg),
    /// List checkpoints; verify, fetch, put or remove what a store has
    Checkpoints(CheckpointsArgs),
    /// Print a job's time series: loss, rates and whatever its program tells
    Metrics(MetricsArgs),
    /// Submit a job again, to go on from the newest checkpoint of an old one
    Resume(Box<ResumeArgs>),
    /// Remove a final job with its logs and checkpoints
    Rm(RmArgs),
    /// Remove final jobs that finished long ago
    Purge(PurgeArgs),
    /// List nodes, have servers join, or take a node out of use
    #[command(visible_alias = "node")]
    Nodes(NodesArgs),
    /// Show what the coordinator does
    Status,
    /// Make, list or revoke tokens
    Token(TokenArgs),
    /// Show who asked for what
    Audit(AuditArgs),
    /// Show who you are to the coordinator
    Whoami,
    /// What goodput a policy gives on a cluster, in virtual time
    Simulate(Box<SimulateArgs>),
    /// Check this machine
    Doctor(DoctorArgs),
    /// Print completions for a shell
    Completions {
        /// Which shell
        shell: clap_complete::Shell,
    },
}

/// A job.
#[derive(Debug, Clone, clap::Args)]
pub struct JobArg {
    /// Its id, the beginning or end of it, its name, or `last`
    #[arg(value_name = "JOB")]
    pub job: String,
}

/// Why a verb did not do it.
#[derive(Debug, thiserror::Error)]
pub enum Fail {
    /// The coordinator refused, or can not be reached.
    #[error(transparent)]
    Client(#[from] Error),
    /// It did not come out well.
    #[error("{0}")]
    Refused(String),
    /// It was asked for in a wrong way.
    #[error("{0}")]
    Usage(String),
    /// Nobody reads what is printed.
    #[error("nobody reads this")]
    Pipe,
    /// It was told already; only the exit code is left.
    #[error("told")]
    Told,
}

impl From<std::io::Error> for Fail {
    fn from(error: std::io::Error) -> Self {
        if error.kind() == std::io::ErrorKind::BrokenPipe { Self::Pipe } else { Self::Refused(error.to_string()) }
    }
}

/// The client for these settings; the token comes from `EVERLIT_TOKEN` or the file `EVERLIT_TOKEN_FILE` names, never from argv.
pub fn client(url: &str, ca_file: Option<&std::path::Path>) -> Result<Client, Fail> {
    let token = match (std::env::var("EVERLIT_TOKEN"), std::env::var("EVERLIT_TOKEN_FILE")) {
        (Ok(token), _) => Some(token),
        (_, Ok(file)) => {
            let read = std::fs::read_to_string(&file);
            Some(read.map_err(|error| Fail::Usage(format!("can not read EVERLIT_TOKEN_FILE {file}: {error}")))?.trim().into())
        }
        _ => None,
    };
    let read = |file: &std::path::Path| {
        std::fs::read(file).map_err(|error| Fail::Usage(format!("can not read --ca-file {}: {error}", file.display())))
    };
    let ca = ca_file.map(read).transpose()?;
    Client::new(url, token, ca.as_deref()).map_err(|error| Fail::Usage(error.to_string()))
}

/// Runs any verb but `up`; of `down` only the part that is a call (stopping jobs when asked).
pub async fn run_verb(cli: Cli) -> ExitCode {
    let json = cli.output == Output::Json;
    match run(cli).await {
        Ok(()) | Err(Fail::Pipe) => ExitCode::SUCCESS,
        Err(Fail::Told) => ExitCode::FAILURE,
        Err(Fail::Usage(text)) => {
            eprintln!("error: {text}");
            ExitCode::from(2)
        }
        Err(fail) => {
            match &fail {
                Fail::Client(error) if json && error.problem().is_some() => {
                    eprintln!("{}", serde_json::to_string(&error.problem()).unwrap_or_default());
                }
                _ => eprintln!("error: {fail}"),
            }
            ExitCode::FAILURE
        }
    }
}

async fn run(cli: Cli) -> Result<(), Fail> {
    let client = client(&cli.url, cli.ca_file.as_deref())?;
    let output = cli.output;
    match cli.verb {
        Verb::Up(_) => Err(Fail::Usage("`up` is run by the program itself".into())),
        Verb::Down(args) => act::down(&client, &args).await,
        Verb::Submit(args) => submit::submit(&client, *args, output).await,
        Verb::Ls(args) => show::ls(&client, &args, output).await,
        Verb::Get(args) => show::get(&client, &args.job, output).await,
        Verb::Logs(args) => logs::logs(&client, &args, output).await,
        Verb::Stop(args) => act::stop(&client, &args, output).await,
        Verb::Restart(args) => act::restart(&client, &args.job, output).await,
        Verb::Checkpoint(args) => act::checkpoint(&client, &args.job, output).await,
        Verb::Checkpoints(args) => checkpoints::checkpoints(&client, args, output).await,
        Verb::Metrics(args) => show::metrics(&client, &args, output).await,
        Verb::Resume(args) => submit::resume(&client, *args, output).await,
        Verb::Rm(args) => act::rm(&client, &args, output).await,
        Verb::Purge(args) => act::purge(&client, args, output).await,
        Verb::Nodes(args) => nodes::nodes(&client, args, &cli.url, output).await,
        Verb::Status => show::status(&client, output).await,
        Verb::Token(args) => tokens::token(&client, args, output).await,
        Verb::Audit(args) => tokens::audit(&client, args, output).await,
        Verb::Whoami => tokens::whoami(&client, output).await,
        Verb::Simulate(args) => simulate::simulate(&client, &args, output).await,
        Verb::Doctor(args) => doctor::doctor(&args, output).await,
        Verb::Completions { shell } => completions(shell),
    }
}

fn completions(shell: clap_complete::Shell) -> Result<(), Fail> {
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "everlit", &mut text);
    out::bytes(&text)
}

#[cfg(test)]
mod usage {
    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn completions_are_made_for_every_shell() {
        for shell in clap_complete::Shell::value_variants() {
            let mut text = Vec::new();
            clap_complete::generate(*shell, &mut Cli::command(), "everlit", &mut text);
            assert!(String::from_utf8_lossy(&text).contains("submit"), "{shell}");
        }
    }

    #[test]
    fn wrong_usage_is_told_from_right_usage() {
        for good in [
            "everlit up --listen 127.0.0.1:9 --no-local-agent --report-interval 2s",
            "everlit submit -n 4 --follow",
            "everlit submit --env A=B --set worker.steps=3 -- python train.py --lr 1",
            "everlit logs -f --rank 0 --tail 5 last",
            "everlit -o json get abc",
            "everlit get abc -o json",
            "everlit checkpoint last",
            "everlit checkpoints ls last",
            "everlit checkpoints verify s3://bucket/runs/x --step 100",
            "everlit checkpoints fetch /mnt/runs/x/step-000000000100 --into here",
            "everlit checkpoints put ./step-000000000100 s3://bucket/runs/x",
            "everlit checkpoints rm s3://bucket/runs/x/step-000000000100",
            "everlit metrics last --since-step 100",
            "everlit nodes drain here",
            "everlit node token create --ttl 2h --uses 8",
            "everlit node token ls",
            "everlit nodes expel gpu-1 --force",
            "everlit node deploy root@a b --parallel 2 --ssh-option ProxyJump=gate -- --label zone=a",
            "everlit purge --older-than 7d --state failed --dry-run",
            "everlit completions bash",
            "everlit token create --user alice --role user --ttl 30d",
            "everlit --ca-file ca.pem token ls",
            "everlit audit --user alice --limit 5",
            "everlit up --listen 0.0.0.0:8000 --own-ca --tls-names a.example,10.0.0.5 --anonymous viewer",
            "everlit simulate --nodes 4 --duration 2d --failure nic=3 --checkpoint-every auto --spares 2 --policy recovery=in-place,every=5m",
        ] {
            assert!(Cli::try_parse_from(good.split(' ')).is_ok(), "{good}");
        }
        for bad in [
            "everlit",
            "everlit fly",
            "everlit get",
            "everlit purge",
            "everlit up --listen x",
            "everlit submit python x.py",
            "everlit nodes melt x",
            "everlit node token create --uses many",
            "everlit token create --user alice",
            "everlit token create --user alice --role root",
            "everlit audit --limit 0",
            "everlit simulate --duration never",
            "everlit simulate --failure nic=many",
            "everlit simulate --recovery prayer",
            "everlit simulate --runs 0",
        ] {
            assert_eq!(Cli::try_parse_from(bad.split(' ')).expect_err(bad).exit_code(), 2, "{bad}");
        }
    }
}
