//! The built-in guest, on KVM and as a thread.

mod common;

use common::{arg, assert_refused, file, has_kvm, microvm, stdout, MICROVM};
use tempfile::TempDir;

const CHECKS: usize = 8;

fn assert_all_agrees(args: &[&str]) -> String {
    assert_agrees(args, CHECKS)
}

fn assert_agrees(args: &[&str], checks: usize) -> String {
    let output = microvm(args);
    let text = stdout(&output);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{text}{stderr}");
    assert!(stderr.is_empty(), "{stderr}");
    assert_eq!(
        text.lines().filter(|line| line.starts_with("  ok ")).count(),
        checks,
        "{text}"
    );
    assert!(
        text.contains("\nEverything agrees.\n") && !text.contains("WRONG"),
        "{text}"
    );
    // A path may be as long as it likes.
    for line in text.lines().filter(|line| !line.starts_with("Disk  ")) {
        assert!(line.chars().count() <= 80, "{line}");
    }
    text
}

#[test]
fn a_guest_on_kvm() {
    if !has_kvm("a_guest_on_kvm") {
        return;
    }
    let text = assert_all_agrees(&[]);
    for line in [
        "microvm: a 64-bit guest on /dev/kvm",
        "  | read   2048 sectors, checksum agrees",
        "  00000000-07ffffff : System RAM",
        "  100000000-107ffffff : System RAM",
        "Block device: 292 requests",
    ] {
        assert!(text.lines().any(|l| l == line), "{line:?} is not in {text}");
    }
}

#[test]
fn a_guest_on_kvm_with_a_small_disk_and_odd_memory() {
    if !has_kvm("a_guest_on_kvm_with_a_small_disk_and_odd_memory") {
        return;
    }
    let dir = TempDir::new().unwrap();
    let disk = file(&dir, "disk", &[0x5a; 9 * 512]);
    let text = assert_all_agrees(&["--mem", "7000004K", "--disk", arg(&disk)]);
    assert!(text.contains("  00000000-bfffffff : System RAM"), "{text}");
    assert!(text.contains("  | write  8 sectors from sector 1 on"), "{text}");
    assert_eq!(std::fs::read(&disk).unwrap(), [0x5a; 9 * 512]);
}

#[test]
fn a_driver_as_a_thread() {
    let text = assert_all_agrees(&["--no-kvm"]);
    let first = "microvm: no KVM (--no-kvm); the driver runs as a thread instead";
    assert_eq!(text.lines().next(), Some(first));
    assert!(text.contains("Dirty pages: 1845 of 65536"), "{text}");
}

#[test]
#[cfg(target_arch = "x86_64")]
fn without_the_device_it_says_so_and_runs() {
    let text = assert_all_agrees(&["--kvm", "/no/kvm"]);
    let first = text.lines().next().unwrap();
    assert!(
        first.starts_with("microvm: no KVM (there is no /no/kvm); "),
        "{first}"
    );
}

#[test]
#[cfg(target_arch = "x86_64")]
fn files_are_cut_under_a_guest_on_kvm() {
    if !has_kvm("files_are_cut_under_a_guest_on_kvm") {
        return;
    }
    let text = assert_agrees(&["--chaos"], CHECKS + 1);
    assert!(text.contains("\nChaos --seed "), "{text}");
    assert!(text.contains("  100000000-107ffffff : System RAM"), "{text}");
    assert!(text.contains("  140000000-14003ffff : System RAM"), "{text}");
    assert!(
        text.contains("  | storm  512 sectors from sector 2048 on"),
        "{text}"
    );
}

#[test]
#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
fn files_are_cut_under_a_driver_as_a_thread() {
    for seed in ["0", "1", "18446744073709551615"] {
        let text = assert_agrees(&["--no-kvm", "--chaos", "--seed", seed], CHECKS + 1);
        assert!(text.contains(&format!("\nChaos --seed {seed}\n")), "{text}");
        assert!(text.contains(" of 256 requests under "), "{text}");
    }
}

#[test]
fn a_disk_behind_an_iommu_whose_mappings_change_under_it() {
    for mem in ["64M", "6G"] {
        let text = assert_agrees(&["--iommu", "--mem", mem], CHECKS + 1);
        assert!(
            text.contains("no KVM (--iommu)") && text.contains("\nIOMMU: "),
            "{text}"
        );
        assert!(text.contains("the IOMMU has forgotten the "), "{text}");
    }
    assert_refused(&microvm(&["--iommu", "--chaos"]), &["--chaos"]);
}

#[test]
fn memory_of_any_size() {
    for mem in ["16M", "16388K", "100M", "3G", "8G", "64G"] {
        let text = assert_all_agrees(&["--no-kvm", "--mem", mem]);
        assert_eq!(text.matches(" : System RAM").count(), 2, "{text}");
    }
}

#[test]
fn a_disk_is_left_alone_unless_it_may_be_written() {
    let dir = TempDir::new().unwrap();
    let bytes: Vec<u8> = (0..100 * 512_u32).map(|n| (n / 7) as u8).collect();
    let disk = file(&dir, "disk", &bytes);
    assert_all_agrees(&["--no-kvm", "--disk", arg(&disk)]);
    assert_eq!(std::fs::read(&disk).unwrap(), bytes);
    assert_all_agrees(&["--no-kvm", "--disk", arg(&disk), "--disk-write"]);
    let after = std::fs::read(&disk).unwrap();
    assert_eq!(after.len(), bytes.len());
    // 12 chunks of 8 sectors at the end of the 100.
    assert_eq!(after[..4 * 512], bytes[..4 * 512]);
    let changed = after
        .chunks(512)
        .zip(bytes.chunks(512))
        .skip(4)
        .filter(|(a, b)| a != b);
    assert_eq!(changed.count(), 96);
}

#[test]
fn bad_options_are_one_line() {
    let dir = TempDir::new().unwrap();
    let missing = dir.path().join("missing");
    let (odd, tiny, empty) = (
        file(&dir, "odd", &[0; 1000]),
        file(&dir, "tiny", &[0; 512]),
        file(&dir, "empty", &[]),
    );
    let folder = arg(dir.path());
    let cases: Vec<(Vec<&str>, Vec<&str>)> = vec![
        (
            vec!["--mem", "0"],
            vec!["--mem 0: too small", "at least 16 MiB", "256M"],
        ),
        (vec!["--mem", "1M"], vec!["--mem 1M: too small"]),
        (vec!["--mem", "1000G"], vec!["--mem 1000G: too large", "64 GiB"]),
        (vec!["--mem", "lots"], vec!["--mem lots: unknown suffix"]),
        (vec!["--mem", "16777217"], vec!["not a multiple of the page size"]),
        (vec!["--mem"], vec!["--mem <SIZE>", "--help"]),
        (
            vec!["--disk", arg(&missing)],
            vec!["--disk", "missing: No such file", "check the path"],
        ),
        (
            vec!["--disk", folder],
            vec!["--disk", "neither a regular file nor a block device"],
        ),
        (
            vec!["--disk", arg(&odd)],
            vec!["1000 bytes", "512-byte sectors", "truncate -s %512"],
        ),
        (vec!["--disk", arg(&tiny)], vec!["512 bytes is too small", "4096"]),
        (vec!["--disk", arg(&empty)], vec!["0 bytes is too small"]),
        (vec!["--disk-write"], vec!["--disk <FILE>"]),
        (vec!["--initrd", "x"], vec!["--kernel <FILE>"]),
        (
            vec!["--no-kvm", "--kernel", "x"],
            vec!["--no-kvm", "cannot be used with", "--kernel"],
        ),
        (vec!["--seed", "1"], vec!["--chaos"]),
        (vec!["--chaos", "--disk", "x"], vec!["cannot be used with"]),
        (vec!["--nonsense"], vec!["unexpected argument '--nonsense'"]),
        (vec!["--kvm", "/dev/null"], vec!["/dev/null: ", "--no-kvm"]),
        (vec!["--kvm", folder], vec!["directory", "--no-kvm"]),
    ];
    for (args, words) in cases {
        if args.contains(&"--kvm") && !cfg!(target_arch = "x86_64") {
            continue;
        }
        assert_refused(&microvm(&args), &words);
    }
}

#[test]
#[cfg(target_arch = "x86_64")]
fn kvm_without_permission_is_one_line() {
    use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
    use std::os::unix::process::CommandExt;

    use common::skipped;

    let test = "kvm_without_permission_is_one_line";
    let Some(kvm) = std::fs::metadata("/dev/kvm")
        .ok()
        .filter(|m| m.file_type().is_char_device())
    else {
        return skipped(test, "no /dev/kvm");
    };
    let dir = TempDir::new().unwrap();
    let root = std::fs::metadata(dir.path()).unwrap().uid() == 0;
    if !root || kvm.permissions().mode() & 0o006 != 0 {
        return skipped(test, "needs root, and a /dev/kvm that not everyone may open");
    }
    // A copy where an unprivileged user may run it.
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let copy = dir.path().join("microvm");
    std::fs::copy(MICROVM, &copy).unwrap();
    let mut command = std::process::Command::new(copy);
    match command.uid(65534).gid(65534).output() {
        Ok(output) => {
            assert_refused(&output, &["/dev/kvm: Permission denied", "group", "--no-kvm"]);
        }
        Err(e) => skipped(test, &format!("cannot run as another user: {e}")),
    }
}

#[test]
fn help_and_version_are_no_errors() {
    for option in ["--help", "-h", "--version"] {
        let output = microvm(&[option]);
        assert_eq!((output.status.code(), output.stderr.len()), (Some(0), 0));
        assert!(stdout(&output).lines().all(|line| line.chars().count() <= 80));
    }
}

#[test]
fn a_closed_pipe_is_no_panic() {
    use std::process::{Command, Stdio};

    let mut child = Command::new(MICROVM)
        .arg("--no-kvm")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert!(output.stderr.is_empty());
}
