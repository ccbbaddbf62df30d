//! Runs of the built-in guest, and options that are refused.

mod common;

use std::process::{Command, Stdio};

use common::{arg, assert_refused, file, has_kvm, microvm, report, MICROVM};
use serde_json::json;
use tempfile::TempDir;
use test_support::HugePages;

const DISK: usize = 1 << 20;

#[test]
fn guest_passes_every_check_and_is_reported() {
    if !has_kvm("guest_passes_every_check_and_is_reported") {
        return;
    }
    let report = report(&[]);
    let low = json!({"start": 0, "len": 128 << 20, "host": "anonymous"});
    let high = json!({"start": 1_u64 << 32, "len": 128 << 20, "host": "anonymous"});
    for (region, expected) in [low, high].iter().enumerate() {
        for (key, value) in expected.as_object().unwrap() {
            assert_eq!(report["memory"][region][key], *value);
        }
    }
    assert_eq!(report["requests"]["reads"], 64);
    assert_eq!(report["requests"]["bytes_written"], 512 << 10);
    assert_eq!(report["requests"]["refused"], 1);
    assert_eq!(report["notifications"], 130);
    assert_eq!(report["dirty"]["device"].as_array().unwrap().len(), 131);
    assert_eq!(report["checks"].as_array().unwrap().len(), 5);
    assert!(report["console"]
        .as_str()
        .unwrap()
        .starts_with("64-bit guest\n"));
}

#[test]
fn guest_output_and_report_are_text_by_default() {
    if !has_kvm("guest_output_and_report_are_text_by_default") {
        return;
    }
    let output = microvm(&["--mem", "16M"]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(0), "{text}");
    assert!(text.starts_with("64-bit guest\n"), "{text}");
    assert!(text.contains("\nChecks\n  ok "), "{text}");
    assert!(
        text.lines().all(|line| line.chars().count() <= 100),
        "{text}"
    );
}

#[test]
fn guest_with_any_backing_passes_every_check() {
    let test = "guest_with_any_backing_passes_every_check";
    if !has_kvm(test) {
        return;
    }
    let dir = TempDir::new().unwrap();
    let in_file = format!("file:{}", dir.path().join("ram").display());
    // The second run finds the rings of the first in the file.
    for backing in ["anon", "memfd", &in_file, &in_file] {
        let report = report(&["--mem", "32M", "--backing", backing, "--prefault"]);
        for region in report["memory"].as_array().unwrap() {
            assert_eq!(region["resident"], 16 << 20);
        }
    }
    if let Some(_pages) = HugePages::reserve(8, test) {
        let report = report(&["--mem", "16M", "--backing", "hugetlb"]);
        let host = report["memory"][0]["host"].as_str().unwrap();
        assert!(host.starts_with("hugetlb"), "{host}");
    }
}

#[test]
fn guest_with_any_ram_size_passes_every_check() {
    if !has_kvm("guest_with_any_ram_size_passes_every_check") {
        return;
    }
    for mem in ["16M", "16388K", "7000004K"] {
        report(&["--mem", mem]);
    }
}

#[test]
fn disk_changes_only_with_disk_write() {
    if !has_kvm("disk_changes_only_with_disk_write") {
        return;
    }
    let dir = TempDir::new().unwrap();
    let bytes: Vec<u8> = (0..DISK).map(|n| (n / 7) as u8).collect();
    let disk = file(&dir, "disk", &bytes);
    report(&["--disk", arg(&disk)]);
    assert_eq!(std::fs::read(&disk).unwrap(), bytes);
    report(&["--disk", arg(&disk), "--disk-write"]);
    let after = std::fs::read(&disk).unwrap();
    assert_eq!(after[..DISK / 2], bytes[..DISK / 2]);
    assert_eq!(after[DISK / 2..], bytes[..DISK / 2]);
}

#[test]
fn option_with_bad_value_is_refused() {
    let dir = TempDir::new().unwrap();
    let missing = dir.path().join("missing");
    let (odd, tiny) = (
        file(&dir, "odd", &[0; DISK + 1]),
        file(&dir, "tiny", &[0; 512]),
    );
    let short = format!("file:{}", file(&dir, "short", &[0; 4096]).display());
    let (folder, in_folder) = (arg(dir.path()), format!("file:{}", dir.path().display()));
    let cases: &[(&[&str], &[&str])] = &[
        (&["--mem", "0"], &["--mem", "from 16 MiB to 64 GiB"]),
        (&["--mem", "1000G"], &["--mem", "from 16 MiB to 64 GiB"]),
        (&["--mem", "lots"], &["--mem", "such as 256M"]),
        (&["--mem", "16777217"], &["multiple of 4096"]),
        (&["--backing", "disk"], &["--backing", "file:PATH"]),
        (&["--disk-write"], &["--disk <FILE>"]),
        (&["--initrd", "x"], &["--kernel <FILE>"]),
        (&["--nonsense"], &["--nonsense"]),
    ];
    for (args, words) in cases {
        assert_refused(&microvm(args), words);
    }
    if !has_kvm("option_with_bad_value_is_refused, files and devices") {
        return;
    }
    let cases: &[(&[&str], &[&str])] = &[
        (&["--backing", &short], &["cannot map guest memory"]),
        (&["--backing", &in_folder], &["--backing", "Is a directory"]),
        (
            &["--mem", "16388K", "--backing", "hugetlb"],
            &["cannot map guest memory"],
        ),
        (
            &["--disk", arg(&missing)],
            &[
                "--disk",
                "missing: cannot use the file",
                "No such file",
                "check the path",
            ],
        ),
        (
            &["--disk", folder, "--disk-write"],
            &["--disk", "Is a directory"],
        ),
        (
            &["--disk", arg(&odd)],
            &["1048577 bytes", "multiple of 512"],
        ),
        (&["--disk", arg(&tiny)], &["512 bytes", "at least 1048576"]),
        (
            &["--kvm", "/dev/null"],
            &["/dev/null: ", "cargo test -p e2e"],
        ),
        (&["--kvm", folder], &["directory", "cargo test -p e2e"]),
    ];
    for (args, words) in cases {
        assert_refused(&microvm(args), words);
    }
}

#[test]
fn missing_kvm_device_error_names_it_and_the_remedy() {
    let words = [
        "/no/kvm: cannot open it",
        "No such file",
        "load kvm_intel or kvm_amd",
        "cargo test -p e2e",
    ];
    if cfg!(target_arch = "x86_64") {
        assert_refused(&microvm(&["--kvm", "/no/kvm"]), &words);
    } else {
        assert_refused(&microvm(&[]), &["x86_64", "cargo test -p e2e"]);
    }
}

#[test]
#[cfg(target_arch = "x86_64")]
fn kvm_device_without_permission_error_names_it_and_the_remedy() {
    use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
    use std::os::unix::process::CommandExt;
    use test_support::skipped;

    let test = "kvm_device_without_permission_error_names_it_and_the_remedy";
    let kvm = std::fs::metadata("/dev/kvm").ok();
    let Some(kvm) = kvm.filter(|kvm| kvm.file_type().is_char_device()) else {
        return skipped(test, "no /dev/kvm");
    };
    let dir = TempDir::new().unwrap();
    let root = std::fs::metadata(dir.path()).unwrap().uid() == 0;
    if !root || kvm.permissions().mode() & 0o006 != 0 {
        return skipped(test, "needs root and a /dev/kvm that not everyone may open");
    }
    // A copy in a directory that an unprivileged user may search.
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let copy = dir.path().join("microvm");
    std::fs::copy(MICROVM, &copy).unwrap();
    match Command::new(copy).uid(65534).gid(65534).output() {
        Ok(output) => assert_refused(
            &output,
            &["/dev/kvm: cannot open it", "Permission denied", "group"],
        ),
        Err(e) => skipped(test, format!("cannot run as another user: {e}")),
    }
}

#[test]
fn help_and_version_succeed() {
    for option in ["--help", "-h", "--version"] {
        let output = microvm(&[option]);
        assert_eq!((output.status.code(), output.stderr.len()), (Some(0), 0));
    }
}

#[test]
fn closed_standard_output_does_not_fail_the_run() {
    if !has_kvm("closed_standard_output_does_not_fail_the_run") {
        return;
    }
    let mut child = Command::new(MICROVM)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert!(output.stderr.is_empty());
}
