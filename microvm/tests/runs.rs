//! The built-in guest, on KVM and as a thread.

mod common;
#[path = "common/huge_pages.rs"]
mod huge_pages;

use std::fs::OpenOptions;
use std::io::ErrorKind;
use std::path::Path;
use std::process::Output;

use common::{arg, assert_refused, file, has_kvm, microvm, skipped, stdout, MICROVM};
use huge_pages::HugePages;
use tempfile::TempDir;

const CHECKS: usize = 9;

fn assert_all_agrees(args: &[&str]) -> String {
    assert_agrees(args, CHECKS)
}

fn assert_agrees(args: &[&str], checks: usize) -> String {
    let (text, stderr) = assert_good(&microvm(args), checks);
    assert!(stderr.is_empty(), "{stderr}");
    text
}

/// A run in which everything agrees; both outputs.
fn assert_good(output: &Output, checks: usize) -> (String, String) {
    let text = stdout(output);
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(0), "{text}{stderr}");
    assert_eq!(
        text.lines()
            .filter(|line| line.starts_with("  ok "))
            .count(),
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
    (text, stderr)
}

/// Whether `text` has this line.
fn has_line(text: &str, line: &str) -> bool {
    text.lines().any(|l| l == line)
}

/// The ways to run a guest here: on KVM, if there is one, and as a thread.
fn ways(test: &str) -> Vec<Vec<&'static str>> {
    let kvm = has_kvm(test).then(Vec::new);
    kvm.into_iter().chain([vec!["--no-kvm"]]).collect()
}

/// A run with options that are refused. Where this user may not open /dev/kvm, which would be said first, it is as if there
/// were none.
fn refused(args: &[&str]) -> Output {
    let kvm = OpenOptions::new().read(true).write(true).open("/dev/kvm");
    let denied = kvm.is_err_and(|e| e.kind() == ErrorKind::PermissionDenied);
    if denied && cfg!(target_arch = "x86_64") && !args.contains(&"--kvm") {
        microvm(&[&["--kvm", "/dev/no-kvm"], args].concat())
    } else {
        microvm(args)
    }
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
    assert!(
        text.contains("  | write  8 sectors from sector 1 on"),
        "{text}"
    );
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
    assert!(
        text.contains("  100000000-107ffffff : System RAM"),
        "{text}"
    );
    assert!(
        text.contains("  140000000-14003ffff : System RAM"),
        "{text}"
    );
    assert!(
        text.contains("  | storm  512 sectors from sector 2048 on"),
        "{text}"
    );
}

#[test]
#[cfg(all(
    target_os = "linux",
    any(target_arch = "x86_64", target_arch = "aarch64")
))]
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
fn guest_memory_is_kept_in_what_was_asked_for() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("ram");
    let in_file = format!("file:{}", path.display());
    for way in ways("guest_memory_is_kept_in_what_was_asked_for") {
        let run = |backing: &str| {
            let args = [&["--mem", "32M", "--backing", backing], &way[..]].concat();
            assert_agrees(&args, CHECKS)
        };
        let text = run("memfd");
        let line = "  100000000-100ffffff : memfd \"microvm-ram\", descriptor 1 at 0x0";
        assert!(has_line(&text, line), "{text}");
        assert!(text.contains("guest memory is in memfds, "), "{text}");
        // The first time it is made; the second time it has rings and results of the first.
        for _ in 0..2 {
            let text = run(&in_file);
            let kind = kind_of_file(dir.path());
            for line in [
                format!("  00000000-00ffffff : {kind}, descriptor 0 at 0x0"),
                format!("  100000000-100ffffff : {kind}, descriptor 0 at 0x1000000"),
            ] {
                assert!(has_line(&text, &line), "{line:?} is not in {text}");
            }
            let bytes = std::fs::read(&path).unwrap();
            assert_eq!(bytes.len(), 32 << 20);
            // The parameters of the guest: its seed.
            assert_eq!(&bytes[0x8000..0x8008], b"!mvorcim");
        }
        if way.is_empty() {
            let text = run("anon");
            assert!(
                has_line(&text, "  100000000-100ffffff : anonymous"),
                "{text}"
            );
        }
    }
}

/// What a file in this directory is called: one of tmpfs is as good as a memfd.
fn kind_of_file(directory: &Path) -> &'static str {
    // statfs(2), TMPFS_MAGIC.
    match rustix::fs::statfs(directory).map(|fs| fs.f_type) {
        Ok(0x0102_1994) => "memfd",
        _ => "file",
    }
}

#[test]
fn guest_memory_in_huge_pages() {
    let test = "guest_memory_in_huge_pages";
    // 16 MiB of guest memory, and 8 that are plugged.
    let Some(_pages) = HugePages::reserve(12, test) else {
        return;
    };
    let base = ["--backing", "hugetlb", "--mem", "16M", "--plug"];
    for way in ways(test) {
        let text = assert_agrees(&[&base[..], &way].concat(), CHECKS + 1);
        let line = "  100000000-1007fffff : hugetlb 2048 KiB \"microvm-ram\", descriptor 1 at 0x0";
        assert!(has_line(&text, line), "{text}");
        assert!(
            text.contains("in memory, 8 MiB mapped here, 8 MiB in huge pages"),
            "{text}"
        );
        assert!(
            text.contains("ok     8 MiB came, were used and went"),
            "{text}"
        );
    }
    let odd = microvm(&["--backing", "hugetlb", "--mem", "16388K"]);
    assert_refused(
        &odd,
        &["region 100000000-", "not a multiple of its pages' 0x200000"],
    );
    // Too few, which is told with their number before the guest begins.
    let output = microvm(&["--backing", "hugetlb", "--mem", "64G"]);
    assert_refused(&output, &["huge pages of 0x200000 bytes", "are free; add "]);
}

#[test]
fn a_backing_that_cannot_be_had_is_one_line() {
    let dir = TempDir::new().unwrap();
    let short = file(&dir, "short", &[0; 4096]);
    let of_file = |path: &Path| format!("file:{}", path.display());
    let (folder, missing) = (of_file(dir.path()), of_file(&dir.path().join("a/b")));
    let short = of_file(&short);
    let cases: &[(&[&str], &[&str])] = &[
        (
            &["--no-kvm", "--backing", "anon"],
            &["second mapping", "--backing memfd"],
        ),
        (&["--iommu", "--backing", "anon"], &["--backing memfd"]),
        (&["--backing", "disk"], &["--backing", "file:PATH"]),
        (
            &["--backing", &folder],
            &["--backing", "not a regular file"],
        ),
        (&["--backing", &missing], &["a/b: No such file"]),
        (
            &["--backing", &short],
            &["needs a file of 0x8000000 bytes", "truncate --size"],
        ),
        (&["--plug", "--kernel", "x"], &["cannot be used with"]),
        (
            &["--disk-io", "io_uring", "--chaos"],
            &["cannot be used with"],
        ),
        (&["--disk-io", "aio"], &["--disk-io", "aio"]),
    ];
    for (args, words) in cases {
        assert_refused(&refused(args), words);
    }
}

#[test]
fn all_of_guest_memory_is_there_before_the_guest() {
    for way in ways("all_of_guest_memory_is_there_before_the_guest") {
        let args = [&["--prefault", "--mem", "80M"], &way[..]].concat();
        let (text, stderr) = assert_good(&microvm(&args), CHECKS + 1);
        // No bar where there is no terminal, but one line.
        assert_eq!(stderr.lines().count(), 1, "{stderr}");
        let told = stderr.strip_prefix("microvm: ").unwrap().trim_end();
        assert!(
            told.starts_with("prefault: 80 MiB in ") && told.ends_with(" ms by 2 threads"),
            "{told}"
        );
        assert!(has_line(&text, &format!("  {told}")), "{text}");
        assert_eq!(
            text.matches("    40 MiB in memory, 40 MiB mapped here")
                .count(),
            2,
            "{text}"
        );
    }
}

#[test]
fn memory_comes_while_the_guest_runs_and_goes_again() {
    let dir = TempDir::new().unwrap();
    let in_file = format!("file:{}", dir.path().join("ram").display());
    for way in ways("memory_comes_while_the_guest_runs_and_goes_again") {
        for more in [&[][..], &["--backing", "memfd"], &["--backing", &in_file]] {
            let args = [&["--plug", "--mem", "32M"], more, &way].concat();
            let text = assert_agrees(&args, CHECKS + 1);
            for line in [
                "  | plug   8 MiB came, were written and read",
                "  | unplug half of them, then all",
                "  200000000-200ffffff : came and went",
                "  ok     8 MiB came, were used and went",
                "    - 2048 bytes at 0x200000000 are not guest memory",
            ] {
                assert!(has_line(&text, line), "{line:?} is not in {text}");
            }
            // A disk that is small, so that requests go by one.
            if !args.contains(&"--backing") {
                let disk = file(&dir, "disk", &[0x5a; 9 * 512]);
                assert_agrees(&[&args[..], &["--disk", arg(&disk)]].concat(), CHECKS + 1);
            }
        }
    }
    let text = assert_agrees(&["--iommu", "--plug", "--mem", "64G"], CHECKS + 2);
    assert!(
        text.contains("  1200000000-1200ffffff : came and went"),
        "{text}"
    );
}

#[test]
#[cfg(all(
    target_os = "linux",
    any(target_arch = "x86_64", target_arch = "aarch64")
))]
fn memory_comes_while_files_are_cut() {
    for way in ways("memory_comes_while_files_are_cut") {
        let args = [&["--chaos", "--plug", "--seed", "3"], &way[..]].concat();
        let text = assert_agrees(&args, CHECKS + 2);
        assert!(
            text.contains("  200000000-200ffffff : came and went"),
            "{text}"
        );
    }
}

/// Whether the kernel has io_uring for this process; if not, says so aloud.
fn has_io_uring(test: &str) -> bool {
    let refused = io_uring::IoUring::new(1).err();
    if let Some(e) = &refused {
        skipped(test, &format!("no io_uring: {e}"));
    }
    refused.is_none()
}

#[test]
fn the_disk_by_io_uring() {
    let test = "the_disk_by_io_uring";
    if !has_io_uring(test) {
        return;
    }
    let dir = TempDir::new().unwrap();
    let bytes: Vec<u8> = (0..100 * 512_u32).map(|n| (n / 7) as u8).collect();
    let disk = file(&dir, "disk", &bytes);
    for way in ways(test) {
        let base = [&["--disk-io", "io_uring", "--mem", "32M"], &way[..]].concat();
        let text = assert_agrees(&base, CHECKS);
        let line = "  by io_uring: 288 operations, 8 at a time at most, 0 went on";
        assert!(has_line(&text, line), "{text}");
        // To an overlay, to the file itself, and into memory that comes and goes.
        assert_agrees(&[&base[..], &["--disk", arg(&disk)]].concat(), CHECKS);
        assert_eq!(std::fs::read(&disk).unwrap(), bytes);
        assert_agrees(
            &[&base[..], &["--disk", arg(&disk), "--disk-write"]].concat(),
            CHECKS,
        );
        assert_ne!(std::fs::read(&disk).unwrap(), bytes);
        std::fs::write(&disk, &bytes).unwrap();
        let text = assert_agrees(&[&base[..], &["--plug"]].concat(), CHECKS + 1);
        assert!(text.contains("  by io_uring: 304 operations, "), "{text}");
    }
}

#[test]
fn the_disk_by_io_uring_behind_an_iommu() {
    if !has_io_uring("the_disk_by_io_uring_behind_an_iommu") {
        return;
    }
    for more in [&[][..], &["--plug", "--prefault"]] {
        let args = [&["--iommu", "--disk-io", "io_uring", "--mem", "64M"], more].concat();
        let (text, _) = assert_good(&microvm(&args), CHECKS + 1 + more.len());
        assert!(text.contains("  by io_uring: "), "{text}");
        assert!(text.contains("the IOMMU has forgotten the "), "{text}");
    }
}

/// The kernel refuses io_uring to a process with a seccomp filter, as in many containers.
#[test]
#[expect(unsafe_code, reason = "a filter is put between fork and exec")]
fn where_io_uring_is_refused_it_says_so_and_goes_on() {
    use std::os::unix::process::CommandExt;

    for errno in [libc::EPERM, libc::ENOSYS] {
        let mut command = std::process::Command::new(MICROVM);
        command.args(["--no-kvm", "--mem", "32M", "--disk-io", "io_uring"]);
        let refuse = move || refuse_io_uring(errno);
        // SAFETY: the closure makes two system calls and uses its own stack, which a child may before it executes another program.
        unsafe { command.pre_exec(refuse) };
        let output = command.output().unwrap();
        let (text, stderr) = assert_good(&output, CHECKS);
        let why = std::io::Error::from_raw_os_error(errno);
        let line = format!(
            "microvm: --disk-io io_uring: the kernel refuses it ({why}); going on with sync\n"
        );
        assert_eq!(stderr, line);
        assert!(
            has_line(&text, "  by preadv and pwritev, one after the other"),
            "{text}"
        );
    }
}

/// From now on `io_uring_setup` answers `errno` to this process.
#[expect(unsafe_code, reason = "prctl takes a pointer")]
fn refuse_io_uring(errno: i32) -> std::io::Result<()> {
    let statement = |code: u32, jt: u8, jf: u8, k: u32| libc::sock_filter {
        code: code as u16,
        jt,
        jf,
        k,
    };
    let setup = u32::try_from(libc::SYS_io_uring_setup).unwrap_or(0);
    let mut filter = [
        // The number of the system call is the first word of struct seccomp_data.
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, setup),
        statement(
            libc::BPF_RET | libc::BPF_K,
            0,
            0,
            libc::SECCOMP_RET_ERRNO | errno as u32,
        ),
        statement(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog {
        len: filter.len() as u16,
        filter: filter.as_mut_ptr(),
    };
    // SAFETY: sets a flag of this process.
    let first = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
    // SAFETY: the kernel reads the program and its statements, which live until after the call.
    let second = unsafe {
        libc::prctl(
            libc::PR_SET_SECCOMP,
            libc::SECCOMP_MODE_FILTER,
            &raw const program,
        )
    };
    match (first, second) {
        (0, 0) => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
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
        (
            vec!["--mem", "1000G"],
            vec!["--mem 1000G: too large", "64 GiB"],
        ),
        (vec!["--mem", "lots"], vec!["--mem lots: unknown suffix"]),
        (
            vec!["--mem", "16777217"],
            vec!["not a multiple of the page size"],
        ),
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
        (
            vec!["--disk", arg(&tiny)],
            vec!["512 bytes is too small", "4096"],
        ),
        (vec!["--disk", arg(&empty)], vec!["0 bytes is too small"]),
        (vec!["--disk-write"], vec!["--disk <FILE>"]),
        (vec!["--initrd", "x"], vec!["--kernel <FILE>"]),
        (
            vec!["--no-kvm", "--initrd", "x"],
            vec!["cannot be used with", "--no-kvm"],
        ),
        (
            vec!["--no-kvm", "--cmdline", "x"],
            vec!["cannot be used with", "--no-kvm"],
        ),
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
        assert_refused(&refused(&args), &words);
    }
}

#[test]
#[cfg(target_arch = "x86_64")]
fn kvm_without_permission_is_one_line() {
    use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
    use std::os::unix::process::CommandExt;

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
        return skipped(
            test,
            "needs root, and a /dev/kvm that not everyone may open",
        );
    }
    // A copy where an unprivileged user may run it.
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let copy = dir.path().join("microvm");
    std::fs::copy(MICROVM, &copy).unwrap();
    let mut command = std::process::Command::new(copy);
    match command.uid(65534).gid(65534).output() {
        Ok(output) => {
            assert_refused(
                &output,
                &["/dev/kvm: Permission denied", "group", "--no-kvm"],
            );
        }
        Err(e) => skipped(test, &format!("cannot run as another user: {e}")),
    }
}

#[test]
fn help_and_version_are_no_errors() {
    for option in ["--help", "-h", "--version"] {
        let output = microvm(&[option]);
        assert_eq!((output.status.code(), output.stderr.len()), (Some(0), 0));
        assert!(stdout(&output)
            .lines()
            .all(|line| line.chars().count() <= 80));
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
