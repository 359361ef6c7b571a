//! The `everlit` program: settings are read before anything is touched, then one verb runs, and the exit code says how it ended.

use std::process::ExitCode;

use clap::Parser;
use everlit_coordinator::cli::{Cli, Verb, run_verb};
use everlit_coordinator::config::{UpArgs, default_data_dir, load};
use everlit_coordinator::shell::{down, up};
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let mut cli = Cli::parse();
    match cli.verb {
        Verb::Up(args) => run_up(*args),
        verb => {
            let down = if let Verb::Down(args) = &verb { Some(args.data_dir.clone()) } else { None };
            cli.verb = verb;
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let runtime = runtime.expect("a runtime needs nothing but a few file descriptors");
            match down {
                None => runtime.block_on(run_verb(cli)),
                Some(data_dir) => {
                    let code = runtime.block_on(run_verb(cli));
                    let dir = data_dir.unwrap_or_else(default_data_dir);
                    if code == ExitCode::SUCCESS { finish(down::down(&dir)) } else { code }
                }
            }
        }
    }
}

fn run_up(args: UpArgs) -> ExitCode {
    let config = match load(&args) {
        Ok(config) => config,
        Err(error) => {
            eprintln!("error: {error}");
            return ExitCode::from(2);
        }
    };
    let filter = EnvFilter::try_new(&config.log).unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        // A log that can not be written (its disk is full) is no reason to end.
        .log_internal_errors(false)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .init();
    let settings = up::Settings {
        listen: config.listen,
        data_dir: config.data_dir,
        report_interval: config.report_interval,
        node_timeout: config.node_timeout,
        rendezvous_ports: (config.rendezvous_ports.first, config.rendezvous_ports.last),
        retain_jobs: config.retain_jobs,
        tls: config.tls,
        insecure_http: config.insecure_http,
        anonymous: config.anonymous,
        retain_audit: config.retain_audit,
        node_certificate_ttl: config.node_certificate_ttl,
        local_agent: !config.no_local_agent,
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    finish(runtime.map_err(Into::into).and_then(|runtime| runtime.block_on(up::up(settings))))
}

fn finish(result: anyhow::Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
