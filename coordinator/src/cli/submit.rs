//! `everlit submit` and `everlit resume`: build the JSON of a job from a file and flags, and send it.
//!
//! Nothing is checked here that the coordinator checks: its faults name the fields. Secrets are named on the command line, never written
//! there: their values come from the environment of this program.

use std::io::Read;

use clap::Args;
use everlit_api::client::Client;
use everlit_api::job::JobSpec;
use everlit_api::package::Packed;
use everlit_api::status::JobView;
use serde_json::{Map, Value};

use super::{Fail, Output, find, follow, out, pack};

/// Bytes of a job's file at most; the coordinator takes less.
const FILE_BYTES_MAX: u64 = 16 * 1024 * 1024;

/// What `submit` and `resume` share.
#[derive(Debug, Default, Args)]
pub(super) struct Changes {
    /// Set any field: a path and JSON or a text, like worker.steps=500 or checkpoint.keep=5; may be repeated
    #[arg(long, value_name = "FIELD=VALUE", value_parser = pair)]
    set: Vec<(String, String)>,
    /// A variable for each rank; may be repeated
    #[arg(long, value_name = "NAME=VALUE", value_parser = pair)]
    env: Vec<(String, String)>,
    /// A secret variable for each rank, by name: its value is taken from the environment of this command; may be repeated
    #[arg(long, value_name = "NAME")]
    secret: Vec<String>,
    /// A name for people
    #[arg(long)]
    name: Option<String>,
    /// Show progress until it is final; the exit code tells whether it succeeded
    #[arg(long)]
    follow: bool,
}

/// `everlit submit`.
#[derive(Debug, Args)]
pub struct SubmitArgs {
    /// A file of JSON to begin with; `-` for standard input
    #[arg(short, long, value_name = "FILE")]
    file: Option<String>,
    /// Ranks
    #[arg(short = 'n', long)]
    world_size: Option<u32>,
    /// low, normal, high or critical
    #[arg(long)]
    priority: Option<String>,
    /// A label for filters; may be repeated
    #[arg(long, value_name = "KEY=VALUE", value_parser = pair)]
    label: Vec<(String, String)>,
    /// GPUs per rank
    #[arg(long)]
    gpus: Option<u32>,
    /// Pack this folder of yours and start each rank in a copy of it; without this a command starts where you stand, in the same path on each node
    #[arg(long, value_name = "FOLDER")]
    workdir: Option<String>,
    /// A job id or a checkpoint's path to start from
    #[arg(long, value_name = "JOB|PATH")]
    resume_from: Option<String>,
    /// A key of your choice: the same call with the same key makes one job
    #[arg(long, value_name = "KEY")]
    idempotency_key: Option<String>,
    /// Answer what would happen, and submit nothing
    #[arg(long, conflicts_with = "follow")]
    dry_run: bool,
    #[command(flatten)]
    changes: Changes,
    /// A program and its arguments, instead of the built-in model
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<String>,
}

/// `everlit resume`.
#[derive(Debug, Args)]
pub struct ResumeArgs {
    /// The old job's id, the beginning or end of it, its name, or `last`
    #[arg(value_name = "JOB")]
    job: String,
    /// Pack this folder of yours and start each rank in a copy of it, in place of the old job's
    #[arg(long, value_name = "FOLDER")]
    workdir: Option<String>,
    /// Go on without the old job's secrets
    #[arg(long)]
    without_secrets: bool,
    #[command(flatten)]
    changes: Changes,
}

/// `name=value` as an argument.
pub(super) fn pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.into(), value.into())),
        _ => Err("write it as NAME=VALUE".into()),
    }
}

/// Submits a job.
pub(super) async fn submit(client: &Client, args: SubmitArgs, output: Output) -> Result<(), Fail> {
    let packed = package(args.workdir.as_deref()).await?;
    let mut job = body(&args, packed.as_ref().map(|packed| packed.package.as_str()))?;
    if args.dry_run {
        if let Some(packed) = &packed {
            pack::planned(client, packed, &mut job).await?;
        }
        let plan = client.plan(&job).await?;
        if output == Output::Json {
            return out::json(&plan);
        }
        let rows = plan.placement.iter().map(|part| {
            let gpus = part.gpus.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
            vec![part.node.to_string(), part.first_rank.to_string(), part.count.to_string(), gpus]
        });
        out::line(&format!("{}: {}", if plan.fits_now { "fits now" } else { "waits" }, plan.reason))?;
        return if plan.placement.is_empty() { Ok(()) } else { out::table(&["NODE", "FIRST RANK", "RANKS", "GPUS"], rows.collect()) };
    }
    if let Some(packed) = packed {
        pack::upload(client, packed).await?;
    }
    let job = client.submit(&job, args.idempotency_key.as_deref()).await?;
    submitted(client, &job, args.changes.follow, output).await
}

async fn package(folder: Option<&str>) -> Result<Option<Packed>, Fail> {
    match folder {
        Some(folder) => pack::packed(folder).await.map(Some),
        None => Ok(None),
    }
}

async fn submitted(client: &Client, job: &JobView, follow: bool, output: Output) -> Result<(), Fail> {
    if output == Output::Json {
        out::json(job)?;
    } else {
        out::line(&job.job_id.to_string())?;
    }
    if follow { follow::follow(client, job.job_id, output).await } else { Ok(()) }
}

/// Submits an old job again.
pub(super) async fn resume(client: &Client, args: ResumeArgs, output: Output) -> Result<(), Fail> {
    let id = find::job(client, &args.job).await?;
    let old = client.job(id).await?.spec.ok_or_else(|| Fail::Refused(format!("the coordinator did not tell what job {id} was")))?;
    let packed = package(args.workdir.as_deref()).await?;
    let job = resumed(old, &id.to_string(), packed.as_ref().map(|packed| packed.package.as_str()), &args)?;
    if let Some(packed) = packed {
        pack::upload(client, packed).await?;
    }
    let job = client.submit(&job, None).await?;
    submitted(client, &job, args.changes.follow, output).await
}

fn resumed(mut old: JobSpec, id: &str, package: Option<&str>, args: &ResumeArgs) -> Result<Value, Fail> {
    let missing: Vec<&str> =
        old.secrets.keys().map(String::as_str).filter(|name| !args.changes.secret.iter().any(|given| given == name)).collect();
    if !missing.is_empty() && !args.without_secrets {
        return Err(Fail::Refused(format!(
            "secrets are never shown again, so they can not be copied: give each with --secret NAME (its value is taken from your \
             environment), or go on with --without-secrets. Missing: {}",
            missing.join(", ")
        )));
    }
    old.secrets.clear();
    old.resume_from = Some(id.into());
    let mut job = serde_json::to_value(old).map_err(|error| Fail::Refused(error.to_string()))?;
    if let Some(package) = package {
        pack::name(&mut job, package);
    }
    apply(&mut job, &args.changes)?;
    Ok(job)
}

/// The JSON of a job; `package`: what `--workdir` was packed into.
fn body(args: &SubmitArgs, package: Option<&str>) -> Result<Value, Fail> {
    let mut job = args.file.as_deref().map_or_else(|| Ok(Value::Object(Map::new())), read)?;
    let texts = [("priority", &args.priority), ("resume_from", &args.resume_from)];
    for (field, value) in texts {
        if let Some(value) = value {
            set(&mut job, &[field], value.clone().into())?;
        }
    }
    if let Some(ranks) = args.world_size {
        set(&mut job, &["world_size"], ranks.into())?;
    }
    if let Some(gpus) = args.gpus {
        set(&mut job, &["resources", "gpus"], gpus.into())?;
    }
    for (key, value) in &args.label {
        set(&mut job, &["labels", key], value.clone().into())?;
    }
    if !args.command.is_empty() {
        set(&mut job, &["command"], args.command.clone().into())?;
        if package.is_none() && job.get("workdir").is_none() && job.get("package").is_none() {
            let here = std::env::current_dir()?.to_string_lossy().into_owned();
            set(&mut job, &["workdir"], here.into())?;
        }
    }
    if let Some(package) = package {
        pack::name(&mut job, package);
    }
    apply(&mut job, &args.changes)?;
    Ok(job)
}

fn apply(job: &mut Value, changes: &Changes) -> Result<(), Fail> {
    if let Some(name) = &changes.name {
        set(job, &["name"], name.clone().into())?;
    }
    for (name, value) in &changes.env {
        set(job, &["env", name], value.clone().into())?;
    }
    for name in &changes.secret {
        let value =
            std::env::var(name).map_err(|_| Fail::Usage(format!("--secret {name}: there is no variable {name} in this environment")))?;
        set(job, &["secrets", name], value.into())?;
    }
    for (field, text) in &changes.set {
        let value = serde_json::from_str(text).unwrap_or_else(|_| text.clone().into());
        let parts: Vec<&str> = field.trim_start_matches('/').split(['.', '/']).collect();
        set(job, &parts, value)?;
    }
    Ok(())
}

/// Sets a field of a field; objects on the way are made.
fn set(job: &mut Value, path: &[&str], value: Value) -> Result<(), Fail> {
    let mut place = job;
    for part in path {
        if place.is_null() {
            *place = Value::Object(Map::new());
        }
        let Some(map) = place.as_object_mut() else {
            return Err(Fail::Usage(format!("{}: `{part}` is inside of something that is not an object", path.join("."))));
        };
        place = map.entry(*part).or_insert(Value::Null);
    }
    *place = value;
    Ok(())
}

fn read(file: &str) -> Result<Value, Fail> {
    let bad = |why: String| Fail::Usage(format!("{}: {why}", if file == "-" { "standard input" } else { file }));
    let mut text = String::new();
    let source: Box<dyn Read> =
        if file == "-" { Box::new(std::io::stdin()) } else { Box::new(std::fs::File::open(file).map_err(|error| bad(error.to_string()))?) };
    source.take(FILE_BYTES_MAX).read_to_string(&mut text).map_err(|error| bad(error.to_string()))?;
    serde_json::from_str(&text).map_err(|error| bad(format!("is not JSON: {error}")))
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use expect_test::{Expect, expect};

    use super::super::{Cli, Verb};
    use super::*;

    fn check(line: &[&str], expected: Expect) {
        let Verb::Submit(args) = Cli::try_parse_from([&["everlit", "submit"], line].concat()).expect("sound").verb else {
            unreachable!("submit")
        };
        let package = args.workdir.as_ref().map(|_| "ab");
        expected.assert_eq(&body(&args, package).map_or_else(|fail| fail.to_string(), |job| job.to_string()));
    }

    #[test]
    fn flags_become_a_job() {
        check(&[], expect!["{}"]);
        check(&["-n", "4", "--name", "12", "--priority", "high"], expect![[r#"{"name":"12","priority":"high","world_size":4}"#]]);
        check(
            &["--workdir", ".", "--env", "A=b=c", "--label", "team=x", "--gpus", "2", "--", "python", "train.py", "--env", "x"],
            expect![[
                r#"{"command":["python","train.py","--env","x"],"env":{"A":"b=c"},"labels":{"team":"x"},"package":"ab","resources":{"gpus":2}}"#
            ]],
        );
        check(&["--workdir", ".", "--set", "workdir=sub", "--", "x"], expect![[r#"{"command":["x"],"package":"ab","workdir":"sub"}"#]]);
        check(
            &["--set", "worker.steps=500", "--set", "/restart/backoff/max=10s", "--set", "data.shards=[\"/a\"]"],
            expect![[r#"{"data":{"shards":["/a"]},"restart":{"backoff":{"max":"10s"}},"worker":{"steps":500}}"#]],
        );
        check(&["--set", "name=x", "--set", "name.first=y"], expect!["name.first: `first` is inside of something that is not an object"]);
        check(
            &["--secret", "EVERLIT_NO_SUCH_VARIABLE"],
            expect!["--secret EVERLIT_NO_SUCH_VARIABLE: there is no variable EVERLIT_NO_SUCH_VARIABLE in this environment"],
        );
        check(&["-f", "/does/not/exist"], expect!["/does/not/exist: No such file or directory (os error 2)"]);
    }

    #[test]
    fn a_command_starts_where_the_caller_stands() {
        let Verb::Submit(args) = Cli::try_parse_from(["everlit", "submit", "--", "true"]).expect("sound").verb else {
            unreachable!("submit")
        };
        let here = std::env::current_dir().expect("a folder");
        assert_eq!(body(&args, None).expect("a job")["workdir"], here.to_string_lossy().as_ref());
    }

    #[test]
    fn an_old_job_is_submitted_again_without_its_secrets() {
        let mut old = JobSpec::default_for(2);
        old.secrets.insert("PATH".into(), "***".into());
        old.workdir = Some("/on/the/nodes".into());
        let args = |secret: &[&str], without_secrets| ResumeArgs {
            job: "last".into(),
            workdir: None,
            without_secrets,
            changes: Changes { secret: secret.iter().map(|s| (*s).into()).collect(), ..Changes::default() },
        };
        let refused = resumed(old.clone(), "ID", None, &args(&[], false)).expect_err("a secret is missing").to_string();
        assert!(refused.contains("--secret NAME") && refused.ends_with("Missing: PATH"), "{refused}");
        let bare = resumed(old.clone(), "ID", None, &args(&[], true)).expect("a job");
        assert_eq!((bare.get("secrets"), &bare["resume_from"]), (None, &"ID".into()));
        let full = resumed(old, "ID", Some("cd"), &args(&["PATH"], false)).expect("a job");
        assert_ne!(full["secrets"]["PATH"], "***");
        assert_eq!((&full["package"], full.get("workdir")), (&"cd".into(), None), "a folder of the nodes gives way to a packed one");
    }
}
