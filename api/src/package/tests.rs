use std::io::Write;
use std::os::unix::fs::PermissionsExt;

use expect_test::{Expect, expect};
use flate2::Compression;
use flate2::write::GzEncoder;
use proptest::prelude::*;
use tar::{Builder, Header};

use super::*;

/// An archive of whatever is put in, sound or not.
struct Forged(Builder<GzEncoder<Vec<u8>>>);

impl Forged {
    fn new() -> Self {
        Self(Builder::new(GzEncoder::new(Vec::new(), Compression::fast())))
    }

    /// An entry with a path that no well-behaved packer writes.
    fn with(mut self, kind: EntryType, path: &[u8], data: &[u8]) -> Self {
        let mut header = Header::new_gnu();
        header.as_old_mut().name[..path.len()].copy_from_slice(path);
        header.set_entry_type(kind);
        header.set_mode(0o4777);
        header.set_size(data.len() as u64);
        header.set_cksum();
        self.0.append(&header, data).expect("in memory");
        self
    }

    fn file(self, path: &str, data: &[u8]) -> Self {
        self.with(EntryType::Regular, path.as_bytes(), data)
    }

    fn done(self) -> Vec<u8> {
        self.0.into_inner().and_then(GzEncoder::finish).expect("in memory")
    }
}

fn told(packed: &[u8]) -> String {
    match check(packed) {
        Ok(contents) => format!("{contents:?}"),
        Err(UnpackError::Bad(bad)) => bad.to_string(),
        Err(other) => panic!("not the package's fault: {other}"),
    }
}

#[track_caller]
fn refused(packed: Vec<u8>, expected: Expect) {
    expected.assert_eq(&told(&packed));
    let (folder, beside) = (tempfile::tempdir().expect("a folder"), tempfile::tempdir().expect("a folder"));
    let into = folder.path().join("in/to");
    std::fs::create_dir_all(&into).expect("a folder");
    assert!(unpack(packed.as_slice(), &into).is_err(), "what is refused at the door is refused by agents");
    assert_eq!(std::fs::read_dir(folder.path().join("in")).expect("read").count(), 1, "nothing beside it");
    drop(beside);
}

#[test]
fn what_leaves_the_folder_is_refused() {
    refused(
        Forged::new().file("../x", b"1").done(),
        expect!["`../x` in it has `..` in its path: only what lies in the folder may be in it"],
    );
    refused(
        Forged::new().file("a/../../x", b"1").done(),
        expect!["`a/../../x` in it has `..` in its path: only what lies in the folder may be in it"],
    );
    refused(
        Forged::new().file("/etc/x", b"1").done(),
        expect!["`/etc/x` in it is an absolute path: only what lies in the folder may be in it"],
    );
    refused(
        Forged::new().with(EntryType::Directory, b"..", b"").done(),
        expect!["`..` in it has `..` in its path: only what lies in the folder may be in it"],
    );
    // A name that an extended header gives counts as any other.
    let long = |name: &[u8]| Forged::new().with(EntryType::GNULongName, b"././@LongLink", name).file("good", b"1").done();
    refused(long(b"../x\0"), expect!["`../x` in it has `..` in its path: only what lies in the folder may be in it"]);
    let pax = |text: &[u8]| Forged::new().with(EntryType::XHeader, b"x", text).file("good", b"1").done();
    refused(pax(b"13 path=../x\n"), expect!["`../x` in it has `..` in its path: only what lies in the folder may be in it"]);
}

#[test]
fn only_plain_files_and_folders_are_taken() {
    refused(
        Forged::new().with(EntryType::Symlink, b"a", b"").done(),
        expect!["`a` in it is a link: put what it points to in its place (`tar --dereference --hard-dereference`)"],
    );
    refused(
        Forged::new().with(EntryType::Link, b"a", b"").done(),
        expect!["`a` in it is a link: put what it points to in its place (`tar --dereference --hard-dereference`)"],
    );
    for device in [EntryType::Char, EntryType::Block, EntryType::Fifo] {
        refused(Forged::new().with(device, b"a", b"").done(), expect!["`a` in it is a device or a pipe: only files and folders are taken"]);
    }
    refused(
        Forged::new().with(EntryType::GNUSparse, b"a", b"").done(),
        expect!["`a` in it is of a kind that is not taken: only plain files and folders are"],
    );
    refused(Forged::new().with(EntryType::Directory, b"a", b"1").done(), expect!["`a` in it is a folder with bytes of its own"]);
    refused(Forged::new().file("a/", b"1").done(), expect!["`a/` in it is a file named like a folder"]);
    refused(Forged::new().file(".", b"1").done(), expect!["`.` in it is a file named like a folder"]);
}

#[test]
fn names_that_are_there_twice_or_can_not_be_shown_are_refused() {
    refused(Forged::new().file("a", b"1").file("./a", b"2").done(), expect!["`./a` in it is there twice"]);
    refused(Forged::new().file("a", b"1").file("a/b", b"2").done(), expect!["`a/b` in it lies in `a`, which is a file"]);
    refused(Forged::new().file("a/b", b"1").file("a", b"2").done(), expect!["`a` in it is there twice"]);
    let folder = |forged: Forged| forged.with(EntryType::Directory, b"a/", b"");
    refused(folder(folder(Forged::new())).done(), expect!["`a/` in it is there twice"]);
    refused(Forged::new().with(EntryType::Regular, b"a\xff", b"1").done(), expect!["`a\u{fffd}` in it has a name that is not UTF-8"]);
    refused(Forged::new().file("a\nb", b"1").done(), expect![[r"`a\nb` in it has a control character in its name"]]);
    let long = format!("{}\0", "d/".repeat(600));
    refused(
        Forged::new().with(EntryType::GNULongName, b"l", long.as_bytes()).file("x", b"").done(),
        expect![
            "`d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/…` in it has a path of more than 1024 bytes"
        ],
    );
    // In whatever order folders are named.
    assert_eq!(told(&folder(Forged::new().file("a/b", b"1")).done()), "Contents { files: 1, folders: 1, bytes: 1 }");
}

#[test]
fn what_two_readers_may_understand_differently_is_refused() {
    let pax = |text: &[u8]| Forged::new().with(EntryType::XHeader, b"x", text).file("good", b"1").done();
    refused(pax(b"9 size=9\n"), expect!["it has a `size` in an extended header"]);
    refused(pax(b"13 linkpath=x\n"), expect!["it is no gzipped tar, or is cut off or damaged (malformed pax extension)"]);
    refused(pax(b"14 linkpath=x\n"), expect!["it has a `linkpath` in an extended header"]);
    refused(pax(b"22 GNU.sparse.major=1\n"), expect!["it has a sparse file in it: pack it in full"]);
    refused(pax(b"9 path=a\n9 path=b\n"), expect!["it has a `path` in an extended header"]);
    let global = Forged::new().with(EntryType::XGlobalHeader, b"g", b"9 path=a\n").file("good", b"1").done();
    refused(global, expect!["it has a `path` in an extended header"]);
    let twice =
        Forged::new().with(EntryType::GNULongName, b"l", b"a\0").with(EntryType::GNULongName, b"l", b"b\0").file("good", b"1").done();
    refused(twice, expect!["it names one of its entries twice"]);
    refused(Forged::new().with(EntryType::GNULongName, b"l", b"a\0").done(), expect!["it ends with a name, and nothing of that name"]);
    assert_eq!(told(&pax(b"13 mtime=1.5\n")), "Contents { files: 1, folders: 0, bytes: 1 }", "what says nothing of it is passed over");
}

#[test]
fn what_is_damaged_cut_off_or_followed_by_something_is_refused() {
    let good = Forged::new().file("a", &[7; 5000]).done();
    assert_eq!(told(&good), "Contents { files: 1, folders: 0, bytes: 5000 }");
    refused(b"hello".to_vec(), expect!["it is no gzipped tar, or is cut off or damaged (unexpected end of file)"]);
    refused(b"hello, this is no package".to_vec(), expect!["it is no gzipped tar, or is cut off or damaged (invalid gzip header)"]);
    for cut in 0..good.len() {
        assert!(check(&good[..cut]).is_err(), "cut off at {cut}");
    }
    let packed = |raw: &[u8]| {
        let mut packed = GzEncoder::new(Vec::new(), Compression::fast());
        packed.write_all(raw).and_then(|()| packed.finish()).expect("in memory")
    };
    let mut raw = Vec::new();
    GzDecoder::new(good.as_slice()).read_to_end(&mut raw).expect("good");
    refused(packed(&raw[..1024]), expect!["`a` in it is cut off"]);
    raw.extend([0; 9000]);
    assert_eq!(told(&packed(&raw)), "Contents { files: 1, folders: 0, bytes: 5000 }", "tar fills its last block");
    raw.push(1);
    refused(packed(&raw), expect!["it has something behind its last entry"]);
    raw.pop();
    raw.extend(vec![0; PADDING_BYTES_MAX as usize]);
    refused(packed(&raw), expect!["it has something behind its last entry"]);
    raw[0] ^= 1;
    refused(packed(&raw), expect!["it is no gzipped tar, or is cut off or damaged (archive header checksum mismatch)"]);
}

#[test]
fn a_bomb_is_refused_before_it_is_unpacked() {
    let few = Limits { entries: 3, unpacked: 1000, ..Limits::default() };
    let told = |packed: Vec<u8>| check_within(packed.as_slice(), few).expect_err("refused").to_string();
    assert_eq!(
        told(Forged::new().file("a", &[0; 600]).file("b", &[0; 600]).done()),
        "it unpacks to more than a job may bring with it (4 GiB)"
    );
    let deep = Forged::new().file("a/b/c/d", b"").done();
    assert_eq!(told(deep), "it has more than 3 files and folders, or longer paths than are taken");
    // A size that is only claimed is refused as it is read, before any byte of it.
    let mut header = Header::new_gnu();
    header.set_path("a").expect("short");
    header.set_size(UNPACKED_BYTES_MAX + 1);
    header.set_cksum();
    let mut forged = Forged::new();
    forged.0.append(&header, io::empty()).expect("in memory");
    refused(forged.done(), expect!["it unpacks to more than a job may bring with it (4 GiB)"]);
    let wide = Forged::new().with(EntryType::GNULongName, b"l", &vec![b'a'; 1 << 20]).done();
    refused(wide, expect!["it has an extended header of 1048576 bytes"]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn any_bytes_are_answered(raw in prop::collection::vec(any::<u8>(), 0..2048), gzipped in any::<bool>()) {
        let packed = if gzipped {
            let mut packed = GzEncoder::new(Vec::new(), Compression::fast());
            packed.write_all(&raw).and_then(|()| packed.finish()).expect("in memory")
        } else { raw };
        prop_assert!(matches!(check(packed.as_slice()), Ok(_) | Err(UnpackError::Bad(_))));
    }

    #[test]
    fn a_path_that_is_taken_stays_in_the_folder(raw in "[a./\\\\ -]{0,20}") {
        if let Ok(path) = clean(raw.as_bytes()) {
            prop_assert!(Path::new(&path).components().all(|part| matches!(part, std::path::Component::Normal(_))), "{raw} {path}");
        }
    }
}

#[test]
fn bits_that_give_rights_are_dropped() {
    let folder = tempfile::tempdir().expect("a folder");
    unpack(Forged::new().file("d/a", b"x").done().as_slice(), folder.path()).expect("good");
    let mode = |path: &str| std::fs::metadata(folder.path().join(path)).expect("there").permissions().mode() & 0o7777;
    assert_eq!((mode("d/a") & 0o7022, mode("d/a") & 0o700, mode("d") & 0o7022), (0, 0o700, 0));
}

#[cfg(feature = "client")]
mod packing {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::package::pack::pack_within;

    fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().expect("a folder");
        for (path, text) in files {
            let place = folder.path().join(path);
            fs::create_dir_all(place.parent().expect("below")).expect("a folder");
            fs::write(place, text).expect("written");
        }
        folder
    }

    /// What is in a package, as it comes out of it.
    fn inside(packed: &mut Packed) -> String {
        let into = tempfile::tempdir().expect("a folder");
        let contents = unpack(&mut packed.file, into.path()).expect("good");
        assert_eq!(contents, packed.contents);
        let mut lines = Vec::new();
        let mut open = vec![into.path().to_path_buf()];
        while let Some(next) = open.pop() {
            for entry in fs::read_dir(next).expect("read") {
                let path = entry.expect("read").path();
                let shown = path.strip_prefix(into.path()).expect("below").display().to_string();
                let own = fs::symlink_metadata(&path).expect("there");
                if own.is_dir() {
                    lines.push(format!("{shown}/"));
                    open.push(path);
                } else {
                    let run = if own.permissions().mode() & 0o100 == 0 { "" } else { "*" };
                    lines.push(format!("{shown}{run} {}", fs::read_to_string(&path).expect("text")));
                }
            }
        }
        lines.sort();
        lines.join("\n")
    }

    #[test]
    fn a_folder_comes_out_as_it_went_in() {
        let long = format!("{}/{}", "d".repeat(90), "f".repeat(120));
        let from = folder(&[("train.py", "print()"), ("lib/a.py", "a"), ("run.sh", "#!/bin/sh"), ("naïve name", "ü"), (&long, "long")]);
        fs::create_dir(from.path().join("empty")).expect("a folder");
        fs::set_permissions(from.path().join("run.sh"), fs::Permissions::from_mode(0o4711)).expect("set");
        let mut packed = pack(from.path()).expect("packed");
        assert_eq!((packed.contents.files, packed.contents.folders, packed.left_out.len()), (5, 3, 0));
        let expected =
            format!("{}/\n{long} long\nempty/\nlib/\nlib/a.py a\nnaïve name ü\nrun.sh* #!/bin/sh\ntrain.py print()", "d".repeat(90));
        assert_eq!(inside(&mut packed), expected);
    }

    #[test]
    fn the_same_files_are_the_same_package() {
        let files = [("b", "2"), ("a/x", "1"), ("a.b", "3")];
        let (one, mut other) = (folder(&files), files);
        other.reverse();
        let other = folder(&other);
        let times = fs::FileTimes::new().set_modified(std::time::UNIX_EPOCH);
        File::options().write(true).open(other.path().join("b")).and_then(|file| file.set_times(times)).expect("set");
        fs::set_permissions(other.path().join("b"), fs::Permissions::from_mode(0o600)).expect("set");
        let (one, mut other) = (pack(one.path()).expect("packed"), pack(other.path()).expect("packed"));
        assert_eq!((&one.package, one.bytes), (&other.package, other.bytes));
        let mut bytes = Vec::new();
        other.file.read_to_end(&mut bytes).expect("read");
        assert_eq!(bytes.len() as u64, other.bytes);
        let hash = <sha2::Sha256 as sha2::Digest>::digest(&bytes).iter().map(|b| format!("{b:02x}")).collect::<String>();
        assert!(hash == other.package && crate::job::is_package(&hash));
        // In the order of their paths, whatever order the file system has.
        let many: Vec<String> = (0..40).map(|n| format!("f{:02}/{}", n * 7 % 10, n * 11 % 40)).collect();
        let many = folder(&many.iter().map(|path| (path.as_str(), "")).collect::<Vec<_>>());
        let mut packed = Archive::new(GzDecoder::new(pack(many.path()).expect("packed").file));
        let paths: Vec<String> =
            packed.entries().expect("good").map(|entry| entry.expect("good").path().expect("a path").display().to_string()).collect();
        assert!(paths.len() == 50 && paths.is_sorted_by_key(|path| path.trim_end_matches('/')), "{paths:?}");
        assert_ne!(pack(folder(&[("b", "2")]).path()).expect("packed").package, one.package);
    }

    #[test]
    fn what_is_ignored_stays_out() {
        let from = folder(&[
            ("train.py", "1"),
            (".gitignore", "*.pt\n/data/\n"),
            (".everlitignore", "notes\n!data/\n"),
            ("model.pt", "x"),
            ("data/set", "kept by the rule that comes later"),
            ("notes", "x"),
            (".git/HEAD", "x"),
            (".venv/bin/python", "x"),
            ("lib/__pycache__/a.pyc", "x"),
            ("target/CACHEDIR.TAG", "x"),
            ("target/a", "x"),
            ("env/pyvenv.cfg", "x"),
            (".config/a", "hidden is not ignored"),
            ("sub/.gitignore", "b\n"),
            ("sub/b", "x"),
        ]);
        let expected = ".config/\n.config/a hidden is not ignored\n.everlitignore notes\n!data/\n\n.gitignore *.pt\n/data/\n\ndata/\ndata/set kept by the rule that comes later\nlib/\nsub/\nsub/.gitignore b\n\ntrain.py 1";
        assert_eq!(inside(&mut pack(from.path()).expect("packed")), expected);
        // A part of a repository knows the rules above it, and they end with the repository.
        let above = folder(&[
            (".gitignore", "*"),
            ("repository/.git/HEAD", ""),
            ("repository/.gitignore", "*.pt"),
            ("repository/sub/a.pt", ""),
            ("repository/sub/b", "1"),
        ]);
        assert_eq!(inside(&mut pack(&above.path().join("repository/sub")).expect("packed")), "b 1");
        fs::remove_dir_all(above.path().join("repository/.git")).expect("removed");
        assert_eq!(inside(&mut pack(&above.path().join("repository/sub")).expect("packed")), "a.pt \nb 1");
    }

    #[test]
    fn links_within_are_followed_and_others_refused() {
        let from = folder(&[("a", "1"), ("d/b", "2")]);
        symlink("a", from.path().join("to-a")).expect("a link");
        symlink("../d", from.path().join("d/../to-d")).expect("a link");
        fs::remove_file(from.path().join("to-d")).expect("removed");
        symlink("d", from.path().join("to-d")).expect("a link");
        symlink("nowhere", from.path().join("dangles")).expect("a link");
        drop(std::os::unix::net::UnixListener::bind(from.path().join("socket")).expect("a socket"));
        let mut packed = pack(from.path()).expect("packed");
        assert_eq!(inside(&mut packed), "a 1\nd/\nd/b 2\nto-a 1\nto-d/\nto-d/b 2");
        packed.left_out.sort();
        assert_eq!(packed.left_out, ["dangles: a link to what is not there", "socket: neither a file nor a folder"]);

        let refused = |to: &str, expected: Expect| {
            let link = from.path().join("d/link");
            symlink(to, &link).expect("a link");
            let told = pack(from.path()).expect_err("refused").to_string();
            expected.assert_eq(&told);
            fs::remove_file(link).expect("removed");
        };
        refused(
            "/etc/passwd",
            expect!["`d/link` is a link that leads out of the folder: copy what it points to, or name it in .everlitignore"],
        );
        refused("../..", expect!["`d/link` is a link that leads out of the folder: copy what it points to, or name it in .everlitignore"]);
        refused("..", expect!["`d/link` is a link to `.`, in which it lies: remove it, or name it in .everlitignore"]);
    }

    #[test]
    fn what_is_too_large_is_refused_with_the_largest() {
        let from = folder(&[("big", &"x".repeat(900)), ("d/small", "1"), ("d/other", "22")]);
        let refused =
            |limits: Limits, expected: Expect| expected.assert_eq(&pack_within(from.path(), limits).expect_err("refused").to_string());
        refused(
            Limits { unpacked: 800, ..Limits::default() },
            expect![
                "it has 903 bytes of files, and at most 800 bytes can go with a job. Largest: big (900 bytes), d/other (2 bytes), d/small (1 bytes). Put data where all nodes can read it, and leave it out (.everlitignore)"
            ],
        );
        refused(
            Limits { packed: 50, ..Limits::default() },
            expect![
                "it is more than 50 bytes as packed, and no more can go with a job. Largest: big (900 bytes), d/other (2 bytes), d/small (1 bytes). Put data where all nodes can read it, and leave it out (.everlitignore)"
            ],
        );
        let told = pack_within(from.path(), Limits { entries: 3, ..Limits::default() }).expect_err("refused").to_string();
        assert!(told.starts_with("it has more than 3 files and folders. Most are in ") && told.contains("d (2 and more)"), "{told}");
        let told = |path: &Path| pack(path).expect_err("refused").to_string();
        assert!(told(&from.path().join("none")).contains("can not be packed: No such file"));
        assert!(told(&from.path().join("big")).contains("is no folder"));
        assert!(told(folder(&[(".gitignore", "*")]).path()).contains("nothing to pack in it"));
    }
}
