//! `everlit-agent stacks`: what the threads of any process are doing.

use std::process::{Command, Output};

fn stacks(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_everlit-agent")).arg("stacks").args(arguments).output().expect("the agent's program")
}

#[test]
fn a_process_is_told_of_to_be_read_and_as_json_and_one_that_is_gone_is_an_error() {
    let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
    let pid = child.id().to_string();
    let text = loop {
        let told = stacks(&[&pid]);
        let text = String::from_utf8(told.stdout).unwrap();
        assert!(told.status.success(), "{text}");
        // It may be about to begin still.
        if text.starts_with(&format!("process {pid} sleep: S (sleeping)")) && text.contains("sleeps") {
            break text;
        }
    };
    // A small program of C without symbols of its own, and libc's functions by name.
    assert!(!cfg!(target_arch = "x86_64") || (text.contains("nanosleep (libc") && text.contains("  sleep+0x")), "{text}");

    let told = stacks(&["--json", &pid, &pid]);
    let lines: Vec<serde_json::Value> =
        String::from_utf8(told.stdout).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!((lines.len(), &lines[0]["pid"]), (2, &serde_json::json!(child.id())));
    assert!(lines[0]["text"].as_str().unwrap().contains("sleeps"));
    // Nothing was done to it.
    assert!(child.try_wait().unwrap().is_none());
    child.kill().unwrap();
    child.wait().unwrap();

    let gone = stacks(&[&pid]);
    assert!(!gone.status.success());
    assert_eq!(String::from_utf8(gone.stderr).unwrap(), "everlit-agent: not all of these processes are there\n");
    assert_eq!(stacks(&["no number"]).status.code(), Some(2));
}
