//! The table of the suites: targets, tools, and what runs there.

use anyhow::Result;

use super::harness::Harness;
use super::{own, windows, wine};
use crate::debian::{missing, tool, Tool, AARCH64_LINUX, CARGO, CROSS, RUSTC};

/// A target, and what runs on it.
pub(super) struct Suite {
    /// The name on the command line, and of the logs.
    pub(super) name: &'static str,
    /// The name in messages.
    pub(super) title: &'static str,
    /// The packages of Debian that it needs.
    pub(super) tools: &'static [&'static [Tool]],
    /// The tools that build programs and start them.
    pub(super) platform: Platform,
    /// The steps that CI runs: those that the target can break.
    pub(super) ci: &'static [Step],
    /// The steps of `--all`.
    pub(super) all: &'static [Step],
}

/// The settings with which cargo builds programs for a target, and starts them.
pub(super) struct Platform {
    /// The target, as rustc names it.
    pub(super) target: &'static str,
    /// The compiler, and the source of the standard library.
    pub(super) compiler: Compiler,
    /// The linker, if it is not that of this machine.
    pub(super) linker: Option<&'static str>,
    /// The program that starts the tests, if this processor cannot.
    pub(super) runner: Option<&'static str>,
    /// Variables of the environment.
    pub(super) variables: &'static [(&'static str, &'static str)],
}

/// The compiler of a suite.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Compiler {
    /// Debian's. The standard library is one of the suite's packages.
    Debian,
    /// The one of this checkout, with the standard library of rustup. Without that library, it is
    /// Debian's, which builds the library from its source.
    Rustup,
}

/// One run of cargo, or a check.
pub(super) enum Step {
    /// Tests of packages. The last arguments select tests.
    Tests(&'static [&'static str], &'static [&'static str]),
    /// `cargo check` of packages. The last arguments select what is checked.
    Check(&'static [&'static str], &'static [&'static str]),
    /// A check of its own, which returns a description of what it has found.
    Own(fn(&Harness, &Suite) -> Result<String>),
}

const LIBRARY: &[&str] = &["vm-memory"];
const LIBRARIES: &[&str] = &["vm-memory", "vm-memory-derive", "vm-memory-vhost"];

/// The unit tests, and the lines with which VMMs create regions. The other tests of the public API
/// depend on the system, which is Linux, rather than on the processor.
const UNITS: &[&str] = &["--lib", "--test", "lines_of_users"];

/// The unit tests, and the tests of faults, mappings and threads: what a processor with assembly
/// routines or another C library can break. The test of system calls is not among them: qemu does
/// not emulate the seccomp filters that record the calls.
const SYSTEM: &[&str] = &[
    "--lib",
    "--test=fault_handler_alone",
    "--test=faults",
    "--test=lines_of_users",
    "--test=plugged_blocks",
    "--test=slices_are_iovecs",
    "--test=threads",
];

/// The types of the crate that builds guest RAM, and of its tests.
const HOST_TYPES: Step = Step::Check(&["vm-memory-host"], &["--lib", "--tests"]);

/// The types of the libraries and of their tests.
const TYPES: Step = Step::Check(LIBRARIES, &["--lib", "--tests"]);

/// Debian's source of the standard library.
const SOURCE: &[Tool] = &[
    RUSTC,
    CARGO,
    tool(
        "/usr/lib/rustlib/src/rust/library/std/Cargo.toml",
        "rust-web-src",
    ),
];

/// Returns the emulator of a processor.
const fn qemu(file: &'static str) -> Tool {
    tool(file, "qemu-user-static")
}

/// A suite of Linux under emulation, with Debian's tools for the processor. The names are those of
/// qemu, rustc, gcc and Debian.
macro_rules! cross {
    ($qemu:literal, $rust:literal, $gcc:literal, $debian:literal, ci: $ci:expr, all: $all:expr) => {
        Suite {
            name: $qemu,
            title: concat!($qemu, " Linux, emulated"),
            tools: &[&[
                qemu(concat!("/usr/bin/qemu-", $qemu, "-static")),
                tool(
                    concat!("/usr/bin/", $gcc, "-linux-gnu-gcc"),
                    concat!("gcc-", $gcc, "-linux-gnu"),
                ),
                tool(
                    concat!("/usr/", $gcc, "-linux-gnu/lib/libc.so.6"),
                    concat!("libc6-dev-", $debian, "-cross"),
                ),
            ]],
            platform: Platform {
                target: concat!($rust, "-unknown-linux-gnu"),
                compiler: Compiler::Rustup,
                linker: Some(concat!($gcc, "-linux-gnu-gcc")),
                runner: Some(concat!("qemu-", $qemu, "-static")),
                variables: &[("QEMU_LD_PREFIX", concat!("/usr/", $gcc, "-linux-gnu"))],
            },
            ci: $ci,
            all: $all,
        }
    };
}

/// The suites, in the order in which they run.
pub(super) static SUITES: &[Suite] = &[
    Suite {
        name: "aarch64",
        title: "aarch64 Linux, emulated",
        tools: &[&CROSS, AARCH64_QEMU],
        platform: AARCH64,
        ci: &[
            Step::Tests(LIBRARY, SYSTEM),
            Step::Own(own::has_fault_table),
        ],
        all: &[Step::Tests(LIBRARIES, &[]), Step::Own(own::has_fault_table)],
    },
    Suite {
        name: "aarch64-lse",
        title: "aarch64 Linux with LSE, emulated",
        tools: &[&CROSS, AARCH64_QEMU],
        platform: AARCH64,
        // Few builds have it, and all crates are built again.
        ci: &[],
        all: &[Step::Own(own::aarch64_lse)],
    },
    cross!("riscv64", "riscv64gc", "riscv64", "riscv64",
        ci: &[Step::Tests(LIBRARY, UNITS), HOST_TYPES],
        all: &[Step::Tests(LIBRARIES, &[]), HOST_TYPES]),
    // Big-endian.
    cross!("s390x", "s390x", "s390x", "s390x",
        ci: &[Step::Tests(&["vm-memory", "vm-memory-vhost"], UNITS), HOST_TYPES],
        all: &[Step::Tests(LIBRARIES, &[]), HOST_TYPES]),
    cross!("ppc64le", "powerpc64le", "powerpc64le", "ppc64el",
        ci: &[Step::Check(LIBRARIES, &["--lib"])],
        all: &[Step::Tests(LIBRARIES, &[])]),
    Suite {
        name: "musl",
        title: "x86_64 Linux with musl",
        tools: &[],
        platform: native("x86_64-unknown-linux-musl", Compiler::Rustup),
        ci: &[
            Step::Tests(LIBRARY, SYSTEM),
            Step::Tests(LIBRARY, &["--test=system_calls"]),
        ],
        all: &[Step::Tests(LIBRARIES, &[])],
    },
    Suite {
        name: "windows",
        title: "x86_64 Windows, under Wine",
        tools: &[&[
            tool("/usr/bin/x86_64-w64-mingw32-gcc", "gcc-mingw-w64-x86-64"),
            tool(wine::PROGRAM, "wine64"),
        ]],
        platform: WINDOWS,
        ci: &[
            Step::Own(windows::tests_of_ci),
            Step::Own(windows::interface),
            Step::Own(windows::differential),
            Step::Own(windows::check_msvc),
        ],
        all: &[
            Step::Own(windows::all_tests),
            Step::Own(windows::doc_tests),
            Step::Own(windows::interface),
            Step::Own(windows::differential),
            Step::Own(windows::check_msvc),
        ],
    },
    Suite {
        name: "windows-wine10",
        title: "x86_64 Windows, under Wine 10 of Debian 13",
        tools: &[&[
            tool("/usr/bin/x86_64-w64-mingw32-gcc", "gcc-mingw-w64-x86-64"),
            tool(wine::DEBOOTSTRAP, "debootstrap"),
        ]],
        platform: WINDOWS,
        ci: &[Step::Own(windows::tests_of_wine_10)],
        all: &[Step::Own(windows::tests_of_wine_10)],
    },
    Suite {
        name: "macos-aarch64",
        title: "macOS on aarch64, built",
        tools: &[&CROSS],
        platform: native("aarch64-apple-darwin", Compiler::Rustup),
        ci: &[TYPES, Step::Own(own::same_routines)],
        all: &[TYPES, Step::Own(own::same_routines)],
    },
    Suite {
        name: "macos-x86-64",
        title: "macOS on x86_64, built",
        tools: &[&[RUSTC, CARGO]],
        platform: native("x86_64-apple-darwin", Compiler::Rustup),
        ci: &[Step::Own(own::same_routines)],
        all: &[TYPES, Step::Own(own::same_routines)],
    },
    Suite {
        name: "i686",
        title: "i686 Linux, which is refused",
        tools: &[],
        platform: native("i686-unknown-linux-gnu", Compiler::Rustup),
        ci: &[Step::Own(own::refused)],
        all: &[Step::Own(own::refused)],
    },
];

const AARCH64_QEMU: &[Tool] = &[qemu("/usr/bin/qemu-aarch64-static")];
const AARCH64: Platform = Platform {
    target: AARCH64_LINUX,
    compiler: Compiler::Debian,
    linker: Some("aarch64-linux-gnu-gcc"),
    // Tests that start themselves again read this variable; qemu reads QEMU_CPU.
    runner: Some("qemu-aarch64-static"),
    variables: &[("QEMU_CPU", own::BASE_PROCESSOR)],
};

/// The steps choose the Wine that starts the programs.
const WINDOWS: Platform = Platform {
    target: "x86_64-pc-windows-gnu",
    compiler: Compiler::Rustup,
    linker: Some(wine::LINKER),
    runner: None,
    variables: &[],
};

/// Returns a platform whose programs are linked and started as those of this machine, or not at
/// all.
pub(super) const fn native(target: &'static str, compiler: Compiler) -> Platform {
    Platform {
        target,
        compiler,
        linker: None,
        runner: None,
        variables: &[],
    }
}

impl Suite {
    /// Returns the packages that are not installed, and that the steps need.
    ///
    /// Without a `library` of rustup for the target, its source is needed.
    pub(super) fn missing(&self, steps: &[Step], library: bool) -> Vec<&'static str> {
        let source = match self.platform.compiler {
            Compiler::Rustup if !library => SOURCE,
            _ => &[],
        };
        // `cargo check` neither links nor runs anything.
        let links = steps.iter().any(|step| !matches!(step, Step::Check(..)));
        let tools = if links { self.tools } else { &[] };
        missing(tools.iter().copied().flatten().chain(source))
    }
}
