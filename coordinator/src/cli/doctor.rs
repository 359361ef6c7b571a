//! `everlit doctor`: whether this machine can run what is asked of it, each finding with its remedy.
//!
//! It changes nothing but a test file that it removes again, and asks nobody but the coordinator on the listen port.

use std::fs::File;
use std::io::Write;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Args;
use everlit_api::client::Client;
use everlit_api::ports::PortRange;
use nix::sys::resource::{Resource, getrlimit};
use nix::sys::statvfs::statvfs;
use serde::Serialize;

use super::{Fail, Output, out};
use crate::config::{self, Listen, UpArgs};

const TEST_BYTES: usize = 64 * 1024 * 1024;
const TEST_BLOCK: usize = 1024 * 1024;
const SYNCS: u32 = 16;
const GIB: u64 = 1 << 30;
const PROGRAM_TIME_MAX: Duration = Duration::from_secs(30);

/// `everlit doctor`.
#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// Where `up` would listen [default: 127.0.0.1:8000]
    #[arg(long, env = "EVERLIT_LISTEN", value_name = "ADDRESS:PORT")]
    listen: Option<Listen>,
    /// Where `up` would keep its data
    #[arg(long, env = "EVERLIT_DATA_DIR", value_name = "FOLDER")]
    data_dir: Option<PathBuf>,
    /// Ports that MASTER_PORT is taken from [default: 29500-29999]
    #[arg(long, env = "EVERLIT_RENDEZVOUS_PORTS", value_name = "FIRST-LAST")]
    rendezvous_ports: Option<PortRange>,
    /// The config file of `up`
    #[arg(long, env = "EVERLIT_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Verdict {
    Ok,
    Warn,
    Fail,
}

#[derive(Debug, Serialize)]
struct Finding {
    check: &'static str,
    verdict: Verdict,
    detail: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    remedy: Option<String>,
}

impl Finding {
    fn ok(check: &'static str, detail: impl Into<String>) -> Self {
        Self { check, verdict: Verdict::Ok, detail: detail.into(), remedy: None }
    }

    fn warn(check: &'static str, detail: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { check, verdict: Verdict::Warn, detail: detail.into(), remedy: Some(remedy.into()) }
    }

    fn fail(check: &'static str, detail: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { verdict: Verdict::Fail, ..Self::warn(check, detail, remedy) }
    }
}

/// Checks this machine.
pub(super) async fn doctor(args: &DoctorArgs, output: Output) -> Result<(), Fail> {
    let mut findings = Vec::new();
    let up = UpArgs {
        listen: args.listen,
        data_dir: args.data_dir.clone(),
        rendezvous_ports: args.rendezvous_ports,
        config: args.config.clone(),
        ..UpArgs::default()
    };
    match config::load(&up) {
        Ok(config) => {
            findings.push(listen_port(config.listen).await);
            findings.push(rendezvous(config.rendezvous_ports));
            findings.extend(data_folder(&config.data_dir));
        }
        Err(error) => findings.push(Finding::fail("settings", error.to_string(), "correct the setting")),
    }
    let beside = std::env::current_exe().ok().and_then(|exe| exe.parent().map(Path::to_path_buf)).unwrap_or_default();
    findings.extend(programs(&beside));
    findings.push(worker(&beside).await);
    findings.push(sample_text(&beside.join("sample-text")));
    findings.extend(limits());
    findings.push(shared_memory(Path::new("/dev/shm")));
    findings.push(gpus().await);
    let failed = findings.iter().any(|finding| finding.verdict == Verdict::Fail);
    if output == Output::Json {
        out::json(&serde_json::json!({"ok": !failed, "checks": findings}))?;
    } else {
        for finding in &findings {
            let mark = match finding.verdict {
                Verdict::Ok => "ok  ",
                Verdict::Warn => "warn",
                Verdict::Fail => "FAIL",
            };
            out::line(&format!("{mark}  {:<18} {}", finding.check, finding.detail))?;
            if let Some(remedy) = &finding.remedy {
                out::line(&format!("{:26}-> {remedy}", ""))?;
            }
        }
    }
    if failed { Err(Fail::Told) } else { Ok(()) }
}

async fn listen_port(address: SocketAddr) -> Finding {
    let check = "listen port";
    match TcpListener::bind(address) {
        Ok(_) => Finding::ok(check, format!("{address} is free")),
        Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => {
            let version = match Client::new(&format!("http://{address}"), None, None) {
                Ok(client) => tokio::time::timeout(Duration::from_secs(5), client.version()).await.ok().and_then(Result::ok),
                Err(_) => None,
            };
            match version {
                Some(version) => Finding::ok(check, format!("a coordinator {version} answers at {address}")),
                None => {
                    let remedy =
                        "end it, or give `up` another --listen; a coordinator with TLS is asked by `everlit --url https://… status`";
                    Finding::fail(check, format!("{address} is taken by another program, or by a coordinator with TLS"), remedy)
                }
            }
        }
        Err(error) => Finding::fail(check, format!("{address}: {error}"), "give `up` another --listen"),
    }
}

fn rendezvous(range: PortRange) -> Finding {
    let check = "rendezvous ports";
    let all = usize::from(range.last - range.first) + 1;
    let free = (range.first..=range.last).filter(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok()).count();
    let detail = format!("{free} of {all} free in {range}");
    match free {
        0 => Finding::fail(check, detail, "give `up` other --rendezvous-ports"),
        _ if free < 16.min(all) => Finding::warn(check, detail, "each attempt of a gang takes one: give `up` more --rendezvous-ports"),
        _ => Finding::ok(check, detail),
    }
}

/// The folder itself, or the first folder above it that is there.
fn existing(folder: &Path) -> PathBuf {
    folder.ancestors().find(|path| path.exists()).map_or_else(|| PathBuf::from("/"), Path::to_path_buf)
}

fn data_folder(folder: &Path) -> Vec<Finding> {
    let place = existing(folder);
    let mut findings = Vec::new();
    let name = format!(".everlit-doctor-{}", std::process::id());
    let file = place.join(name);
    let measured = measure(&file);
    // It may not have come to be.
    let _ = std::fs::remove_file(&file);
    match measured {
        Err(error) => {
            let remedy = "give it to this user, or give `up` another --data-dir";
            findings.push(Finding::fail("data folder", format!("{}: {error}", place.display()), remedy));
        }
        Ok((rate, sync)) => {
            findings.push(Finding::ok("data folder", format!("{} can be written", place.display())));
            let detail = format!("{rate:.0} MB/s written and synced, {:.2} ms per sync", sync.as_secs_f64() * 1000.0);
            let slow = rate < 50.0 || sync > Duration::from_millis(20);
            let remedy = "checkpoints and submissions wait for it: put --data-dir on a local disk";
            findings.push(if slow { Finding::warn("disk speed", detail, remedy) } else { Finding::ok("disk speed", detail) });
        }
    }
    if let Ok(disk) = statvfs(&place) {
        let free = disk.blocks_available() * disk.fragment_size();
        let detail = format!("{} free", out::size(free));
        findings.push(match free {
            _ if free < GIB => Finding::fail("disk space", detail, "free some, or give `up` another --data-dir"),
            _ if free < 10 * GIB => Finding::warn("disk space", detail, "checkpoints of larger models need more"),
            _ => Finding::ok("disk space", detail),
        });
    }
    findings
}

/// Megabytes per second for a large write with its sync, and the median time of a small write with its sync.
fn measure(path: &Path) -> std::io::Result<(f64, Duration)> {
    let mut file = File::create(path)?;
    let block: Vec<u8> = (0..TEST_BLOCK).map(|i| (i * 31 % 251) as u8).collect();
    let begun = Instant::now();
    for _ in 0..TEST_BYTES / TEST_BLOCK {
        file.write_all(&block)?;
    }
    file.sync_all()?;
    let rate = TEST_BYTES as f64 / 1e6 / begun.elapsed().as_secs_f64();
    let mut times = Vec::new();
    for _ in 0..SYNCS {
        let begun = Instant::now();
        file.write_all(&block[..4096])?;
        file.sync_data()?;
        times.push(begun.elapsed());
    }
    times.sort();
    Ok((rate, times[times.len() / 2]))
}

fn programs(beside: &Path) -> Vec<Finding> {
    let one = |check: &'static str| {
        let path = beside.join(check);
        let remedy = "run scripts/build.sh: all programs are built side by side and find each other there";
        if is_program(&path) {
            Finding::ok(check, path.display().to_string())
        } else {
            Finding::fail(check, format!("{} is missing", path.display()), remedy)
        }
    };
    vec![one("everlit-agent"), one("everlit-shim")]
}

fn is_program(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    path.metadata().is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

/// The built-in program starts, which it does only when it finds libtorch.
async fn worker(beside: &Path) -> Finding {
    let check = "everlit-worker";
    let path = beside.join(check);
    let remedy = "run scripts/build.sh, which fetches libtorch; jobs with a command of their own run without it";
    if !is_program(&path) {
        return Finding::warn(check, format!("{} is missing: the built-in model can not train", path.display()), remedy);
    }
    let mut command = tokio::process::Command::new(&path);
    command.arg("--version").stdin(std::process::Stdio::null()).kill_on_drop(true);
    match tokio::time::timeout(PROGRAM_TIME_MAX, command.output()).await {
        Ok(Ok(done)) if done.status.success() => Finding::ok(check, String::from_utf8_lossy(&done.stdout).trim().to_string()),
        Ok(Ok(done)) => {
            let why = String::from_utf8_lossy(&done.stderr).trim().lines().next().unwrap_or("no message").to_string();
            Finding::warn(check, format!("does not start: {why}"), remedy)
        }
        Ok(Err(error)) => Finding::warn(check, format!("does not start: {error}"), remedy),
        Err(_) => Finding::warn(check, format!("does not answer within {} s", PROGRAM_TIME_MAX.as_secs()), remedy),
    }
}

fn sample_text(folder: &Path) -> Finding {
    let check = "sample text";
    let files =
        std::fs::read_dir(folder).map(|entries| entries.flatten().filter(|e| e.path().extension().is_some_and(|x| x == "txt")).count());
    let remedy = "run scripts/build.sh, which fetches it; jobs with `worker.data` or a command of their own need none";
    match files {
        Ok(count) if count > 0 => Finding::ok(check, format!("{count} files in {}", folder.display())),
        _ => Finding::warn(check, format!("none in {}", folder.display()), remedy),
    }
}

fn limits() -> Vec<Finding> {
    let one = |check, resource, least: u64, remedy: &str| {
        let (soft, hard) = getrlimit(resource).unwrap_or((u64::MAX, u64::MAX));
        let text = |limit: u64| if limit == u64::MAX { "unlimited".to_string() } else { limit.to_string() };
        let detail = format!("{} (at most {})", text(soft), text(hard));
        if soft < least { Finding::warn(check, detail, remedy) } else { Finding::ok(check, detail) }
    };
    vec![
        one("open files", Resource::RLIMIT_NOFILE, 4096, "raise it with `ulimit -n 65536`: each rank takes a few"),
        one("processes", Resource::RLIMIT_NPROC, 4096, "raise it with `ulimit -u`: each rank is a process with many threads"),
    ]
}

fn shared_memory(path: &Path) -> Finding {
    let check = "shared memory";
    let remedy = "in a container give more: `docker run --shm-size 2g`, or a memory volume at /dev/shm";
    match statvfs(path) {
        Err(error) => Finding::warn(check, format!("{}: {error}", path.display()), remedy),
        Ok(memory) => {
            let all = memory.blocks() * memory.fragment_size();
            let free = memory.blocks_available() * memory.fragment_size();
            let detail = format!("{} free of {} in {}", out::size(free), out::size(all), path.display());
            if free < GIB { Finding::warn(check, detail, remedy) } else { Finding::ok(check, detail) }
        }
    }
}

async fn gpus() -> Finding {
    let check = "gpus";
    let ask = tokio::process::Command::new("nvidia-smi").arg("-L").stdin(std::process::Stdio::null()).kill_on_drop(true).output();
    match tokio::time::timeout(PROGRAM_TIME_MAX, ask).await {
        Ok(Ok(done)) if done.status.success() => {
            let count = String::from_utf8_lossy(&done.stdout).lines().filter(|line| line.starts_with("GPU ")).count();
            Finding::ok(check, format!("nvidia-smi lists {count}"))
        }
        Ok(Err(error)) if error.kind() == std::io::ErrorKind::NotFound => Finding::ok(check, "no nvidia-smi here: ranks use the CPU"),
        _ => Finding::warn(check, "nvidia-smi does not answer", "check the driver: `nvidia-smi` must list the GPUs"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_writable_folder_is_measured_and_left_clean() {
        let folder = tempfile::tempdir().expect("a folder");
        let findings = data_folder(&folder.path().join("not/made/yet"));
        assert_eq!(findings[0].verdict, Verdict::Ok, "{findings:?}");
        assert_eq!(findings[1].check, "disk speed");
        assert_eq!(std::fs::read_dir(folder.path()).expect("a folder").count(), 0);
    }

    #[test]
    fn missing_programs_are_told_with_the_remedy() {
        let folder = tempfile::tempdir().expect("a folder");
        let findings = programs(folder.path());
        assert!(findings.iter().all(|f| f.verdict == Verdict::Fail && f.remedy.as_deref().is_some_and(|r| r.contains("scripts/build.sh"))));
    }

    #[tokio::test]
    async fn a_taken_port_is_told_from_a_free_one() {
        let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = taken.local_addr().expect("an address");
        assert_eq!(listen_port(address).await.verdict, Verdict::Fail);
        drop(taken);
        assert_eq!(listen_port(address).await.verdict, Verdict::Ok);
    }
}
