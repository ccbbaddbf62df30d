//! Kernels that are small enough to be written by the test: they print what they were given.
#![cfg(target_arch = "x86_64")]

mod common;
#[path = "common/images.rs"]
mod images;

use std::io::Write;
use std::process::{Command, Stdio};

use common::{arg, assert_refused, file, has_kvm, microvm, stdout, MICROVM};
use images::{bzimage, elf, pvh_code, ECHO};
use tempfile::TempDir;

#[test]
fn an_elf_kernel_boots_by_pvh() {
    if !has_kvm("an_elf_kernel_boots_by_pvh") {
        return;
    }
    let dir = TempDir::new().unwrap();
    let (kernel, initrd) = (
        file(&dir, "vmlinux", &elf(&pvh_code(0), true)),
        file(&dir, "initrd", b"my initrd\0"),
    );
    let base = ["--kernel", arg(&kernel), "--cmdline", "console=here quiet"];
    for (more, printed) in [
        (vec![], "console=here quiet\n"),
        (
            vec!["--initrd", arg(&initrd)],
            "console=here quiet\nmy initrd\n",
        ),
        (vec!["--mem", "5G"], "console=here quiet\n"),
    ] {
        let output = microvm(&[&base[..], &more].concat());
        let text = stdout(&output);
        assert_eq!(output.status.code(), Some(0), "{text}");
        assert!(text.contains("ELF, PVH entry at 0x100000"), "{text}");
        assert!(
            text.contains(&format!("RAM\n{printed}\nGuest memory\n")),
            "{text}"
        );
        assert!(text.contains("Everything agrees."), "{text}");
    }
}

#[test]
fn a_kernel_that_fails_is_a_failed_run() {
    if !has_kvm("a_kernel_that_fails_is_a_failed_run") {
        return;
    }
    let dir = TempDir::new().unwrap();
    let kernel = file(&dir, "vmlinux", &elf(&pvh_code(3), true));
    let output = microvm(&["--kernel", arg(&kernel)]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stdout(&output).contains("the guest's exit code is 3"));
}

#[test]
fn a_kernel_is_told_of_its_disk() {
    if !has_kvm("a_kernel_is_told_of_its_disk") {
        return;
    }
    let dir = TempDir::new().unwrap();
    let (kernel, disk) = (
        file(&dir, "vmlinux", &elf(&pvh_code(0), true)),
        file(&dir, "disk", &[0; 4096]),
    );
    let output = microvm(&[
        "--kernel",
        arg(&kernel),
        "--disk",
        arg(&disk),
        "--cmdline",
        "a",
    ]);
    let text = stdout(&output);
    assert_eq!(output.status.code(), Some(0), "{text}");
    assert!(
        text.contains("\na virtio_mmio.device=4K@0xd0000000:5\n"),
        "{text}"
    );
    assert!(
        text.contains("  d0000000-d0000fff : virtio-mmio block device"),
        "{text}"
    );
}

#[test]
fn a_bzimage_boots_in_64_bit_mode() {
    if !has_kvm("a_bzimage_boots_in_64_bit_mode") {
        return;
    }
    let dir = TempDir::new().unwrap();
    let (kernel, initrd) = (
        file(&dir, "bzImage", &bzimage(1)),
        file(&dir, "initrd", b"my initrd\0"),
    );
    let base = ["--kernel", arg(&kernel), "--cmdline", "console=there"];
    for (more, printed) in [
        (vec![], "console=there\n"),
        (vec!["--initrd", arg(&initrd)], "console=there\nmy initrd\n"),
    ] {
        let output = microvm(&[&base[..], &more].concat());
        let text = stdout(&output);
        assert_eq!(output.status.code(), Some(0), "{text}");
        assert!(text.contains("bzImage, 64-bit entry at 0x100200"), "{text}");
        assert!(
            text.contains(&format!("RAM\n{printed}\nGuest memory\n")),
            "{text}"
        );
    }
}

#[test]
fn the_terminal_reaches_the_serial_port() {
    if !has_kvm("the_terminal_reaches_the_serial_port") {
        return;
    }
    let dir = TempDir::new().unwrap();
    let kernel = file(&dir, "vmlinux", &elf(ECHO, true));
    let mut child = Command::new(MICROVM)
        .args(["--kernel", arg(&kernel)])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(b"hello\n").unwrap();
    let output = child.wait_with_output().unwrap();
    let text = stdout(&output);
    assert_eq!(output.status.code(), Some(0), "{text}");
    assert!(text.contains("RAM\nhello\n"), "{text}");
}

#[test]
fn what_is_no_kernel_is_one_line() {
    let dir = TempDir::new().unwrap();
    let text = file(&dir, "text", b"#!/bin/sh\necho I am no kernel\n");
    let empty = file(&dir, "empty", b"");
    let cut = file(&dir, "cut", &elf(&pvh_code(0), true)[..100]);
    let cut_image = file(&dir, "cut_image", &bzimage(1)[..0x210]);
    let no_note = file(&dir, "no_note", &elf(&pvh_code(0), false));
    let no_64 = file(&dir, "no_64", &bzimage(0));
    let missing = dir.path().join("missing");
    let kernel = file(&dir, "vmlinux", &elf(&pvh_code(0), true));
    let image = file(&dir, "image", &bzimage(1));
    let long = "x".repeat(5000);
    let large = file(&dir, "large", b"");
    std::fs::OpenOptions::new()
        .write(true)
        .open(&large)
        .unwrap()
        .set_len(1 << 30)
        .unwrap();
    // Program headers that point anywhere.
    let mut wild = elf(&pvh_code(0), true);
    wild[64 + 24..64 + 32].copy_from_slice(&u64::MAX.to_le_bytes());
    let wild = file(&dir, "wild", &wild);
    let mut huge = bzimage(1);
    huge[0x260..0x264].copy_from_slice(&u32::MAX.to_le_bytes());
    let huge = file(&dir, "huge", &huge);
    let cases: Vec<(Vec<&str>, Vec<&str>)> = vec![
        (
            vec![arg(&text)],
            vec!["text: neither an ELF file nor a bzImage", "vmlinux"],
        ),
        (vec![arg(&empty)], vec!["neither an ELF file nor a bzImage"]),
        (
            vec![arg(&cut)],
            vec!["cut: cannot be loaded", "check the file"],
        ),
        (vec![arg(&cut_image)], vec!["cut_image: "]),
        (vec![arg(&wild)], vec!["wild: cannot be loaded"]),
        (
            vec![arg(&huge)],
            vec!["huge: the kernel does not fit", "--mem"],
        ),
        (vec![arg(&no_note)], vec!["no PVH note", "CONFIG_PVH"]),
        (vec![arg(&no_64)], vec!["no 64-bit entry"]),
        (
            vec![arg(&missing)],
            vec!["--kernel", "missing: No such file"],
        ),
        (
            vec![arg(dir.path())],
            vec!["--kernel", "not a regular file"],
        ),
        (
            vec![arg(&kernel), "--initrd", arg(&missing)],
            vec!["--initrd", "No such file"],
        ),
        (
            vec![arg(&kernel), "--initrd", arg(&large)],
            vec!["--initrd", "do not fit", "--mem"],
        ),
        (
            vec![arg(&image), "--initrd", arg(&large)],
            vec!["--initrd", "do not fit", "--mem"],
        ),
        (
            vec![arg(&kernel), "--cmdline", &long],
            vec!["--cmdline", "4095"],
        ),
        (
            vec![arg(&kernel), "--kvm", "/nonexistent"],
            vec!["--kernel needs KVM"],
        ),
    ];
    for (args, words) in cases {
        assert_refused(&microvm(&[&["--kernel"][..], &args].concat()), &words);
    }
}
