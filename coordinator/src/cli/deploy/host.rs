//! One server, by the system's own `ssh`, so that what its owner has set up there (keys, jump hosts, names) counts here, too.
//!
//! Every call has an end. The trap: what a server's shell prints at a login comes first in every answer, so only marked lines are read.

use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use everlit_api::join::is_node_name;
use tokio::io::AsyncWriteExt;
use tokio::process::{Child, Command};

use super::programs::{Programs, version};
use super::{DeployArgs, Fault, is_plain};

const LOOK_MAX: Duration = Duration::from_secs(30);
const BRING_MAX: Duration = Duration::from_secs(15 * 60);
const INSTALL_MAX: Duration = Duration::from_secs(180);
/// What begins a line that is meant for us.
const MARK: &str = "everlit-deploy:";

/// What is run on the server, with what belongs to it.
const INSTALL: &str = include_str!("../../../../scripts/install-service.sh");
const UNIT: &str = include_str!("../../../../scripts/systemd/everlit-agent.service");

/// Tells what the server is. `$1`: the data folder, empty without a service.
const LOOK: &str = r#"
say() { printf '%s\n' "everlit-deploy:$1=$2"; }
say machine "$(uname -m)"
say glibc "$(getconf GNU_LIBC_VERSION 2>/dev/null | sed 's/[^0-9.]*//')"
as=
if [ "$(id -u)" = 0 ]; then say root own; elif sudo -n true 2>/dev/null </dev/null; then say root sudo; as='sudo -n'; else say root none; fi
if [ -d /run/systemd/system ]; then say systemd yes; fi
say home "$HOME"
data=$1 lib=/usr/local
if [ -z "$data" ]; then data=${XDG_DATA_HOME:-$HOME/.local/share}/everlit-agent lib=$HOME; as=; fi
say node "$($as sed -n 's/.*"node": *"\([^"]*\)".*/\1/p' "$data/node.json" 2>/dev/null </dev/null)"
for folder in "$HOME" "$lib"; do say free "$(df -Pk "$folder" 2>/dev/null | sed -n 2p | awk '{print $4}') $folder"; done
"#;

/// What a server is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Look {
    /// As `uname -m` says it.
    pub machine: String,
    /// Its glibc.
    pub glibc: Option<(u32, u32)>,
    /// How commands are root's: `own`, `sudo`, `none`.
    pub root: String,
    /// It runs there.
    pub systemd: bool,
    /// Of the user that ssh logs in.
    pub home: String,
    /// The node that it is already.
    pub node: Option<String>,
    /// Bytes that are free, by folder.
    pub free: Vec<(String, u64)>,
}

impl Look {
    fn read(text: &str) -> Self {
        let mut look = Self::default();
        for (key, value) in text.lines().filter_map(|line| line.strip_prefix(MARK)?.split_once('=')) {
            match key {
                "machine" => look.machine = value.into(),
                "glibc" => look.glibc = version(value),
                "root" => look.root = value.into(),
                "systemd" => look.systemd = true,
                "home" => look.home = value.into(),
                "node" => look.node = Some(value.to_string()).filter(|name| !name.is_empty()),
                "free" => look.free.extend(
                    value
                        .split_once(' ')
                        .and_then(|(kib, folder)| Some((folder.to_string(), kib.parse::<u64>().ok()?.saturating_mul(1024)))),
                ),
                _ => {}
            }
        }
        look
    }
}

/// A server's name is ssh's own argument: it may not be another.
pub(super) fn name(text: &str) -> Result<String, String> {
    let good = |c: char| c.is_ascii_alphanumeric() || "@._-:[]%".contains(c);
    if text.is_empty() || text.starts_with('-') || !text.chars().all(good) {
        return Err("like host or user@host".into());
    }
    Ok(text.into())
}

/// A server and how it is reached.
pub(super) struct Host {
    name: String,
    options: Vec<String>,
}

/// What a call printed.
struct Answer {
    status: ExitStatus,
    stdout: String,
    stderr: String,
}

impl Host {
    pub(super) fn new(name: &str, args: &DeployArgs) -> Self {
        // The first value of an option counts: a caller's own before these.
        let own = args.ssh_options.iter().cloned();
        let set = ["BatchMode=yes", "ConnectTimeout=10", "ServerAliveInterval=10", "ServerAliveCountMax=3"].map(String::from);
        let mut options: Vec<String> = own.chain(set).flat_map(|option| ["-o".to_string(), option]).collect();
        options.extend(args.port.iter().flat_map(|port| ["-p".to_string(), port.to_string()]));
        options.extend(args.identity.iter().flat_map(|file| ["-i".to_string(), file.display().to_string()]));
        Self { name: name.into(), options }
    }

    fn ssh(&self, command: &str) -> Command {
        let mut ssh = Command::new("ssh");
        // Whatever shell its user has.
        let command = format!("sh -c {}", quoted(command));
        ssh.args(&self.options).args(["-T", "--", &self.name, &command]).kill_on_drop(true);
        ssh
    }

    /// What it is.
    pub(super) async fn look(&self, no_service: bool) -> Result<Look, Fault> {
        let data = if no_service { "" } else { "/var/lib/everlit-agent" };
        let answer = self.call(self.ssh(&format!("sh -s -- '{data}'")), LOOK.as_bytes(), LOOK_MAX, "looking at it").await?;
        let look = Look::read(&answer.stdout);
        if look.machine.is_empty() {
            return Err(refused(&answer, "it can not be looked at"));
        }
        Ok(look)
    }

    /// What makes a command root's, where that is needed.
    pub(super) fn root_for(&self, look: &Look, no_service: bool) -> Result<&'static str, Fault> {
        let how = "or --no-service, which needs neither root nor systemd";
        match (look.root.as_str(), look.systemd) {
            _ if no_service => Ok(""),
            (_, false) => Err(Fault::new("systemd does not run there", format!("take a server that has it, {how}"))),
            ("own", _) => Ok(""),
            ("sudo", _) => Ok("sudo -n"),
            _ => Err(Fault::new("a service takes root, and `sudo -n` is refused there", format!("log in as root, allow it, {how}"))),
        }
    }

    /// Brings the programs and what installs them; answers the folder there.
    pub(super) async fn bring(&self, programs: &Programs, look: &Look) -> Result<String, Fault> {
        let own = |error: std::io::Error| Fault::new(format!("a folder of this machine can not be written: {error}"), "");
        let folder = tempfile::tempdir().map_err(own)?;
        let file = |name: &str| -> PathBuf { folder.path().join(name) };
        std::fs::create_dir(file("systemd")).map_err(own)?;
        std::fs::write(file("install-service.sh"), INSTALL).map_err(own)?;
        std::fs::write(file("systemd/everlit-agent.service"), UNIT).map_err(own)?;
        let mut tar = Command::new("tar");
        tar.arg("-chf").arg("-").arg("-C").arg(folder.path()).args(["install-service.sh", "systemd", "-C"]);
        tar.arg(std::path::absolute(&programs.folder).map_err(own)?).args(&programs.names);
        let mut tar = tar
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(|error| Fault::new(format!("`tar` can not be started here: {error}"), "install it"))?;
        // Below the home folder: /tmp may be of a kind that nothing is started from.
        let command = r#"umask 077; cd && d=$(mktemp -d "$PWD/.everlit-deploy.XXXXXX") && printf '%s\n' "everlit-deploy:stage=$d" && if ! tar -xf - -C "$d"; then rm -rf "$d"; exit 1; fi"#;
        let mut ssh = self.ssh(command);
        if let Some(stdout) = tar.stdout.take() {
            ssh.stdin(TryInto::<Stdio>::try_into(stdout).map_err(own)?);
        }
        let answer = self.finish(start(ssh)?, BRING_MAX, "bringing the programs").await?;
        let packed = tar.wait().await.map_err(own)?;
        if !answer.status.success() {
            return Err(refused(&answer, &format!("the programs can not be written to {}", look.home)));
        }
        if !packed.success() {
            return Err(Fault::new("the programs can not be read", "is something else writing to their folder?"));
        }
        let stage = answer.stdout.lines().find_map(|line| line.strip_prefix(MARK)?.strip_prefix("stage="));
        let stage = stage.filter(|stage| is_plain(stage));
        stage.map(String::from).ok_or_else(|| Fault::new(format!("its home folder {} has a name that is not plain", look.home), ""))
    }

    /// Installs, with a token on standard input; answers the node's name.
    pub(super) async fn install(&self, command: &[String], stage: &str, token: &str) -> Result<String, Fault> {
        let words: Vec<String> = command.iter().map(|word| quoted(word)).collect();
        let line = format!("{}; code=$?; rm -rf {stage}; exit $code", words.join(" "));
        let answer = self.call(self.ssh(&line), token.as_bytes(), INSTALL_MAX, "installing").await?;
        if !answer.status.success() {
            return Err(refused(&answer, "it could not be installed"));
        }
        let node =
            answer.stdout.lines().rev().find_map(|line| line.strip_prefix("node ")?.split(' ').next().filter(|name| is_node_name(name)));
        node.map(String::from).ok_or_else(|| refused(&answer, "it does not say which node it is"))
    }

    async fn call(&self, mut command: Command, input: &[u8], most: Duration, what: &str) -> Result<Answer, Fault> {
        command.stdin(Stdio::piped());
        let mut child = start(command)?;
        if let Some(mut stdin) = child.stdin.take() {
            // Fewer bytes than a pipe holds. Who does not read them says why in its answer.
            let _ = stdin.write_all(input).await;
        }
        self.finish(child, most, what).await
    }

    async fn finish(&self, child: Child, most: Duration, what: &str) -> Result<Answer, Fault> {
        let late = |_| Fault::new(format!("{what} took longer than {} s", most.as_secs()), "look at the server, and try again");
        let done = tokio::time::timeout(most, child.wait_with_output()).await.map_err(late)?;
        let done = done.map_err(|error| Fault::new(format!("ssh: {error}"), ""))?;
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        let answer = Answer { status: done.status, stdout: text(done.stdout), stderr: text(done.stderr) };
        // ssh's own.
        if answer.status.code() == Some(255) { Err(unreached(&answer.stderr)) } else { Ok(answer) }
    }
}

fn start(mut command: Command) -> Result<Child, Fault> {
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().map_err(|error| Fault::new(format!("`ssh` can not be started: {error}"), "install it (Debian package openssh-client)"))
}

/// For the server's shell.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// The last thing that was said, without what a program puts before it.
fn last_line(text: &str) -> String {
    let line = text.lines().rev().map(str::trim).find(|line| !line.is_empty()).unwrap_or_default();
    line.chars().filter(|c| !c.is_control()).take(500).collect()
}

/// Why ssh did not come there.
fn unreached(stderr: &str) -> Fault {
    let said = last_line(stderr);
    let said = said.trim_start_matches("ssh: ").trim_end_matches('.');
    let knows = |words: &[&str]| words.iter().any(|word| stderr.contains(word));
    let remedy = if knows(&["Host key verification failed", "IDENTIFICATION HAS CHANGED"]) {
        "connect to it by hand once, or --ssh-option StrictHostKeyChecking=accept-new"
    } else if knows(&["Permission denied", "Too many authentication failures"]) {
        "no password is asked for: bring a key there (ssh-copy-id), or say another user or --identity"
    } else {
        "is it up, and is this its name and --port?"
    };
    Fault::new(format!("ssh: {said}"), remedy)
}

/// What the server itself said.
fn refused(answer: &Answer, what: &str) -> Fault {
    let is_news = |line: &&str| !line.is_empty() && !["-- ", "Warning: ", "tar: Exiting"].iter().any(|other| line.starts_with(other));
    let lines: Vec<&str> = answer.stderr.lines().map(str::trim).filter(is_news).collect();
    // The installer's last line says what failed, and the one before it why.
    let said = match lines.as_slice() {
        [.., why, last] if last.starts_with("FAILED: ") => {
            format!("{}: {}", last.trim_start_matches("FAILED: "), why.trim_start_matches("everlit-agent: "))
        }
        [.., last] => last.trim_start_matches("FAILED: ").to_string(),
        [] => format!("exit {}", answer.status.code().unwrap_or(-1)),
    };
    Fault::new(format!("{what}: {}", last_line(&said)), "")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_marked_lines_of_an_answer_count() {
        let text = "Welcome!\nmachine=none\neverlit-deploy:machine=x86_64\neverlit-deploy:glibc=2.36\neverlit-deploy:root=sudo\n\
                    everlit-deploy:systemd=yes\neverlit-deploy:home=/home/a\neverlit-deploy:node=\neverlit-deploy:free=12 /home/a\neverlit-deploy:free= /x\n";
        let look = Look::read(text);
        assert_eq!((look.machine.as_str(), look.glibc, look.node.clone(), look.systemd), ("x86_64", Some((2, 36)), None, true));
        assert_eq!(look.free, [("/home/a".to_string(), 12 * 1024)]);
        assert_eq!(Look::read("everlit-deploy:node=gpu-1\n").node.as_deref(), Some("gpu-1"));
    }

    #[test]
    fn no_option_of_ssh_is_taken_for_a_server() {
        assert!(name("root@10.0.0.1").is_ok() && name("gpu-1").is_ok() && name("a@[fe80::1%eth0]").is_ok());
        for text in ["-oProxyCommand=sh", "", "a b", "a;b", "a$(b)"] {
            assert!(name(text).is_err(), "{text}");
        }
    }

    #[test]
    fn words_reach_the_server_as_they_are() {
        assert_eq!(quoted("a b"), "'a b'");
        assert_eq!(quoted("it's $HOME"), r"'it'\''s $HOME'");
    }

    #[test]
    fn of_what_a_server_says_the_reason_is_told() {
        let told = |stderr: &str| {
            let answer = Answer { status: ExitStatus::default(), stdout: String::new(), stderr: stderr.into() };
            refused(&answer, "it failed").why
        };
        let known = "Warning: Permanently added 'x' (ED25519) to the list of known hosts.\n-- joining\n";
        assert_eq!(told(&format!("{known}everlit-agent: no answer\nFAILED: did not join\n")), "it failed: did not join: no answer");
        assert_eq!(told(&format!("{known}FAILED: systemd does not run here\n")), "it failed: systemd does not run here");
        assert_eq!(told(&format!("{known}sh: 1: tar: not found\n")), "it failed: sh: 1: tar: not found");
        assert_eq!(told(known), "it failed: exit 0");
    }

    #[test]
    fn who_is_not_reached_is_told_what_to_do() {
        let told = |text: &str| unreached(text).to_string();
        assert!(told("x: Permission denied (publickey).\r\n").contains("ssh-copy-id"));
        assert!(told("Host key verification failed.\n").contains("accept-new"));
        assert!(told("ssh: connect to host x port 22: Connection refused\n").contains("port 22: Connection refused: is it up"));
        assert!(told("ssh: connect to host x port 22: Connection refused\n").starts_with("ssh: connect to host"));
    }
}
