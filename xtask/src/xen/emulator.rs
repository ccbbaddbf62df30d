//! The machine, which QEMU emulates without hardware virtualization.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::packages::Boot;
use super::report::Report;
use super::Environment;
use crate::debian::succeed;

/// The time limit of a machine. timeout(1) enforces it even if this program has been killed.
const LIMIT_SECONDS: &str = "600";
/// The time limit of a machine whose domain 0 has not started its program. A start takes 7 to 15 s
/// on an idle machine.
const START: Duration = Duration::from_secs(90);
/// The pause between two reads of the console.
const PAUSE: Duration = Duration::from_millis(200);

/// Runs a machine until it turns itself off or exceeds its time limit, and returns its console.
///
/// # Errors
///
/// Returns an error if the machine cannot be started or its log cannot be written.
pub fn run(env: Environment, boot: &Boot, initramfs: &Path, log: &Path) -> Result<String> {
    let file = File::create(log).with_context(|| format!("cannot write {}", log.display()))?;
    let mut command = Command::new("timeout");
    command.args(["--kill-after=5", LIMIT_SECONDS]);
    match env {
        Environment::Arm64 => arm(&mut command, boot, initramfs),
        Environment::X86Pv | Environment::X86Pvh => x86(&mut command, env, boot, initramfs),
    }
    let started = Instant::now();
    let mut machine = command
        .args(["-nodefaults", "-nographic", "-no-reboot"])
        .args(["-serial", "stdio"])
        .stdin(Stdio::null())
        .stdout(file.try_clone()?)
        .stderr(file)
        .spawn()
        .context("cannot start timeout(1)")?;
    let read = || -> Result<String> {
        let console = fs::read(log).with_context(|| format!("cannot read {}", log.display()))?;
        Ok(String::from_utf8_lossy(&console).into_owned())
    };
    let mut may_start = true;
    while machine.try_wait()?.is_none() {
        if may_start && started.elapsed() > START {
            may_start = false;
            if !Report::read(&read()?).begun {
                // timeout(1) passes the signal on to the emulator.
                succeed(Command::new("kill").arg(machine.id().to_string()))?;
            }
        }
        sleep(PAUSE);
    }
    read()
}

/// Options of the hypervisor. Errors that scenarios provoke must not break the lines of the report.
const HYPERVISOR: &str = "dom0_max_vcpus=1 loglvl=warning guest_loglvl=error";
/// Options of the kernel. It restarts after a panic, which ends the emulator.
const KERNEL: &str = "console=hvc0 rdinit=/init quiet loglevel=4 panic=-1";

fn arm(command: &mut Command, boot: &Boot, initramfs: &Path) {
    command
        .arg("qemu-system-aarch64")
        .args(["-machine", "virt,virtualization=on,gic-version=3"])
        .args(["-cpu", "cortex-a57", "-smp", "1", "-m", "2048"])
        .arg("-kernel")
        .arg(&boot.hypervisor)
        .arg("-append")
        .arg(format!("{HYPERVISOR} dom0_mem=768M console=dtuart"))
        .arg("-device")
        .arg(format!(
            "guest-loader,addr=0x49000000,kernel={},bootargs={KERNEL}",
            boot.kernel.display()
        ))
        .arg("-device")
        .arg(format!(
            "guest-loader,addr=0x4d000000,initrd={}",
            initramfs.display()
        ));
}

/// Adds the arguments of an x86 machine.
///
/// With supervisor-mode access prevention, QEMU's processor crashes domain 0 at its first upcall.
/// A PVH domain 0 needs an IOMMU, and a processor without `rdtscp`, which QEMU does not intercept
/// as Xen expects. With two processors, it sometimes hangs while it starts.
fn x86(command: &mut Command, env: Environment, boot: &Boot, initramfs: &Path) {
    command
        .arg("qemu-system-x86_64")
        .args(["-accel", "tcg", "-smp", "1", "-m", "1536"]);
    let mode = if env == Environment::X86Pvh {
        command
            .args(["-machine", "q35", "-device", "amd-iommu"])
            .args(["-cpu", "max,-smap,-smep,-pku,-rdtscp"]);
        "dom0=pvh"
    } else {
        command
            .args(["-machine", "pc"])
            .args(["-cpu", "max,-smap,-smep,-pku"]);
        "dom0=pv"
    };
    command
        .arg("-kernel")
        .arg(&boot.hypervisor)
        .arg("-append")
        .arg(format!(
            "{HYPERVISOR} {mode} dom0_mem=640M,max:640M console=com1 com1=115200,8n1"
        ))
        .arg("-initrd")
        .arg(format!(
            "{} {KERNEL},{}",
            boot.kernel.display(),
            initramfs.display()
        ));
}
