//! Runners on a folder, with a stand-in for the agent.

use std::sync::Arc;
use std::thread::JoinHandle;

use nix::sys::stat::Mode;

use super::*;

struct Scene {
    dir: tempfile::TempDir,
}

impl Scene {
    fn new(shards: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        for folder in [HAVE_NAME, OUT_NAME, DONE_NAME] {
            fs::create_dir(dir.path().join(folder)).unwrap();
        }
        let scene = Self { dir };
        for name in shards {
            fs::write(scene.at(HAVE_NAME).join(name), format!("in {name}")).unwrap();
        }
        scene
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn share(&self, shards: &[&str]) -> Share {
        let list = self.at("shards.txt");
        let text: String = shards.iter().map(|name| format!("{}\n", self.at(HAVE_NAME).join(name).display())).collect();
        fs::write(&list, &text).unwrap();
        Share::new(self.dir.path().into(), list, &text, 0, 1).unwrap()
    }

    fn has_stored(&self, index: usize, name: &str) {
        let output = Output { name: name.into(), bytes: 1 };
        fs::write(self.at(DONE_NAME).join(mark_of(index)), serde_json::to_vec(&output).unwrap()).unwrap();
    }

    /// Stores what is named in the pipe, until a record comes; answers what it stored.
    fn agent(&self) -> JoinHandle<Vec<(String, String)>> {
        let want = self.at(WANT_NAME);
        nix::unistd::mkfifo(&want, Mode::S_IRUSR | Mode::S_IWUSR).unwrap();
        // Open at both ends before anything is said.
        let pipe = Arc::new(OpenOptions::new().read(true).write(true).open(want).unwrap());
        let (out, done) = (self.at(OUT_NAME), self.at(DONE_NAME));
        std::thread::spawn(move || {
            let mut stored = Vec::new();
            for line in io::BufRead::lines(io::BufReader::new(&*pipe)).map(Result::unwrap) {
                let Some(name) = line.strip_prefix('>') else { continue };
                let Ok(content) = fs::read_to_string(out.join(name)) else { continue };
                let index = shard_number(name).filter(|_| !name.starts_with("rank-"));
                let mark = index.map_or(name.into(), mark_of);
                let output = Output { name: name.into(), bytes: content.len() as u64 };
                fs::write(out.join("mark"), serde_json::to_vec(&output).unwrap()).unwrap();
                fs::rename(out.join("mark"), done.join(mark)).unwrap();
                fs::remove_file(out.join(name)).unwrap();
                stored.push((name.into(), content));
                if index.is_none() {
                    return stored;
                }
            }
            stored
        })
    }
}

fn words(text: &[&str]) -> Vec<String> {
    text.iter().map(ToString::to_string).collect()
}

const COPY: [&str; 3] = ["cp", "{input}", "{output}.copy"];

#[test]
fn each_shard_that_has_no_output_is_given_to_the_program() {
    let shards = ["000001-a", "000003-b", "000005-c"];
    let scene = Scene::new(&shards);
    scene.has_stored(3, "000003-b.copy");
    // Made by one before this, which did not live to see it stored.
    fs::write(scene.at(OUT_NAME).join("000005-c.copy"), "whole").unwrap();
    let agent = scene.agent();
    scene.share(&shards).work(&words(&COPY)).unwrap();
    let stored = agent.join().unwrap();
    let mut names: Vec<_> = stored.iter().map(|(name, content)| (name.as_str(), content.as_str())).collect();
    let (record, text) = names.pop().unwrap();
    names.sort_unstable();
    assert_eq!(names, [("000001-a.copy", "in 000001-a"), ("000005-c.copy", "whole")]);
    assert_eq!(record, "rank-00000-of-00001.json");
    let listed: Vec<serde_json::Value> = serde_json::from_str(text).unwrap();
    let outputs: Vec<_> = listed.iter().map(|line| (line["shard"].as_str().unwrap(), line["output"]["name"].as_str().unwrap())).collect();
    assert_eq!(outputs, [("000001-a", "000001-a.copy"), ("000003-b", "000003-b.copy"), ("000005-c", "000005-c.copy")]);
    assert_eq!(fs::read_dir(scene.at(OUT_NAME)).unwrap().count(), 0, "no draft is left");
}

#[test]
fn a_program_that_goes_through_the_list_is_told_what_is_left() {
    let shards = ["000000-a", "000001-b", "000002-c"];
    let scene = Scene::new(&shards);
    scene.has_stored(1, "000001-b");
    let agent = scene.agent();
    let script = r#"for path in $(cat "$EVERLIT_DATA_SHARDS"); do name=${path##*/}; cp "$path" "$EVERLIT_OUTPUT_DIR/$name.tmp"; mv "$EVERLIT_OUTPUT_DIR/$name.tmp" "$EVERLIT_OUTPUT_DIR/$name"; done"#;
    scene.share(&shards).work(&words(&["sh", "-c", script])).unwrap();
    let mut names: Vec<_> = agent.join().unwrap().into_iter().map(|(name, _)| name).collect();
    names.pop();
    names.sort_unstable();
    assert_eq!(names, ["000000-a", "000002-c"]);
}

#[test]
fn what_a_program_does_wrong_is_named() {
    let shards = ["000000-a", "000001-b"];
    let failed = |command: &[&str]| {
        let scene = Scene::new(&shards);
        let failed = scene.share(&shards).work(&words(command)).expect_err("it does it wrong");
        (failed.code, failed.why)
    };
    let check = |command: &[&str], code: u8, word: &str| {
        let (found, why) = failed(command);
        assert!(found == code && why.contains(word), "{found}: {why}");
    };
    check(&["sh", "-c", "exit 9", "{input}", "{output}"], 9, "shard 000000-a: sh ended with exit status: 9");
    check(&["sh", "-c", "kill -9 $$", "{input}", "{output}"], 137, "signal: 9");
    check(&["true", "{input}", "{output}"], 1, "wrote nothing");
    check(&["sh", "-c", "echo > $2.x; echo > $2.y", "sh", "{input}", "{output}"], 78, "each shard has one output");
    check(&["sh", "-c", "echo > ${2%/*}/x", "sh", "{input}", "{output}"], 78, "wrote `x`");
    check(&["mkdir", "{output}", "{input}.d"], 78, "not a file");
    check(&["/no/such/program", "{input}", "{output}"], 78, "could not run");
    check(&["true"], 1, "2 of its shards have no output");
    check(&["sh", "-c", "for end in x y; do echo > $EVERLIT_OUTPUT_DIR/000000-a.$end; done"], 78, "both outputs of one shard");
}

#[test]
fn what_the_agent_says_of_a_shard_ends_the_rank() {
    let scene = Scene::new(&[]);
    fs::write(scene.at(HAVE_NAME).join("000000-a.error"), "it changed").unwrap();
    let failed = scene.share(&["000000-a"]).work(&words(&COPY)).unwrap_err();
    assert_eq!((failed.code, failed.why.as_str()), (78, "shard 000000-a: it changed"));
    let listed = Share::new(scene.at("x"), scene.at("y"), "/some/file.txt\n", 0, 1).unwrap_err();
    assert!(listed.why.contains("which is no shard"), "{}", listed.why);
}
