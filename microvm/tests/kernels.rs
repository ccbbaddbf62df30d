//! Small kernels that the tests assemble. They print their command line and initrd.
#![cfg(target_arch = "x86_64")]

mod common;
#[path = "common/images.rs"]
mod images;

use std::io::Write;
use std::process::{Command, Stdio};

use common::{arg, assert_refused, file, has_kvm, microvm, report, MICROVM};
use images::{bzimage, elf, pvh_code, ECHO};
use tempfile::TempDir;

const DEVICE: &str = "virtio_mmio.device=4K@0xd0000000:5";

#[test]
fn elf_with_pvh_note_boots_with_command_line_and_initrd() {
    if !has_kvm("elf_with_pvh_note_boots_with_command_line_and_initrd") {
        return;
    }
    let dir = TempDir::new().unwrap();
    let kernel = file(&dir, "vmlinux", &elf(&pvh_code(0), true));
    let initrd = file(&dir, "initrd", b"my initrd\0");
    let base = ["--kernel", arg(&kernel), "--cmdline", "console=here quiet"];
    let line = format!("console=here quiet {DEVICE}\n");
    for (more, printed) in [
        (vec![], line.clone()),
        (vec!["--initrd", arg(&initrd)], format!("{line}my initrd\n")),
        (vec!["--mem", "5G"], line.clone()),
    ] {
        assert_eq!(report(&[&base[..], &more].concat())["console"], printed);
    }
}

#[test]
fn kernel_with_exit_code_fails_the_run() {
    if !has_kvm("kernel_with_exit_code_fails_the_run") {
        return;
    }
    let dir = TempDir::new().unwrap();
    let kernel = file(&dir, "vmlinux", &elf(&pvh_code(3), true));
    let output = microvm(&["--kernel", arg(&kernel), "--format", "json"]);
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("ended with code 3"), "{text}");
}

#[test]
fn bzimage_boots_in_64_bit_mode() {
    if !has_kvm("bzimage_boots_in_64_bit_mode") {
        return;
    }
    let dir = TempDir::new().unwrap();
    let kernel = file(&dir, "bzImage", &bzimage(1));
    let initrd = file(&dir, "initrd", b"my initrd\0");
    let disk = file(&dir, "disk", &[0; 4096]);
    let base = ["--kernel", arg(&kernel), "--cmdline", "console=there"];
    let line = format!("console=there {DEVICE}\n");
    for (more, printed) in [
        (vec!["--disk", arg(&disk)], line.clone()),
        (vec!["--initrd", arg(&initrd)], format!("{line}my initrd\n")),
    ] {
        assert_eq!(report(&[&base[..], &more].concat())["console"], printed);
    }
}

#[test]
fn standard_input_reaches_the_serial_port() {
    if !has_kvm("standard_input_reaches_the_serial_port") {
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
    // More than the FIFO of the UART holds.
    let line = format!("{}\n", "hello ".repeat(50));
    child
        .stdin
        .take()
        .unwrap()
        .write_all(line.as_bytes())
        .unwrap();
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(0), "{text}");
    assert!(text.starts_with(&line), "{text}");
}

#[test]
fn file_that_does_not_boot_is_refused() {
    if !has_kvm("file_that_does_not_boot_is_refused") {
        return;
    }
    let dir = TempDir::new().unwrap();
    let text = file(&dir, "text", b"#!/bin/sh\necho I am not a kernel\n");
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
    std::fs::File::options()
        .write(true)
        .open(&large)
        .unwrap()
        .set_len(1 << 30)
        .unwrap();
    // A program header with an invalid address.
    let mut wild = elf(&pvh_code(0), true);
    wild[64 + 24..64 + 32].copy_from_slice(&u64::MAX.to_le_bytes());
    let wild = file(&dir, "wild", &wild);
    let mut huge = bzimage(1);
    huge[0x260..0x264].copy_from_slice(&u32::MAX.to_le_bytes());
    let huge = file(&dir, "huge", &huge);
    let cases: Vec<(Vec<&str>, Vec<&str>)> = vec![
        (vec![arg(&text)], vec!["neither an ELF file nor a bzImage"]),
        (vec![arg(&empty)], vec!["neither an ELF file nor a bzImage"]),
        (vec![arg(&cut)], vec!["--kernel: "]),
        (vec![arg(&cut_image)], vec!["--kernel: "]),
        (vec![arg(&wild)], vec!["--kernel: "]),
        (vec![arg(&huge)], vec!["the kernel does not fit", "--mem"]),
        (vec![arg(&no_note)], vec!["no PVH note", "CONFIG_PVH"]),
        (vec![arg(&no_64)], vec!["no 64-bit entry point"]),
        (
            vec![arg(&missing)],
            vec!["--kernel", "missing: cannot use the file", "No such file"],
        ),
        (vec![arg(dir.path())], vec!["--kernel"]),
        (
            vec![arg(&kernel), "--initrd", arg(&missing)],
            vec!["--initrd", "No such file"],
        ),
        (
            vec![arg(&kernel), "--initrd", arg(&large)],
            vec!["initrd does not fit", "--mem"],
        ),
        (
            vec![arg(&image), "--initrd", arg(&large)],
            vec!["initrd does not fit", "--mem"],
        ),
        (vec![arg(&kernel), "--cmdline", &long], vec!["--kernel: "]),
    ];
    for (args, words) in cases {
        assert_refused(&microvm(&[&["--kernel"][..], &args].concat()), &words);
    }
}
