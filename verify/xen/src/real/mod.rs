//! [`Real`]: a domain that the hypervisor created, and the devices of a kernel that runs on Xen.

#![expect(
    unsafe_code,
    reason = "hypercalls, and the memory and grant table of a domain"
)]

mod boot;
mod domain;
// It measures copies by the hypervisor.
#[cfg(feature = "additions")]
mod figures;
mod gntdev;
mod privcmd;
pub mod program;
mod self_test;

use std::fs::{self, File, OpenOptions};
use std::io;
use std::ops::Range;

use crate::environment::{Access, Environment, Host, InUse, PAGE, PAGES, REFERENCES};
use domain::{Domain, Kind};

#[cfg(feature = "additions")]
pub use figures::figures;
pub use self_test::self_test;

const GNTDEV: &str = "/dev/xen/gntdev";
const PRIVCMD: &str = "/dev/xen/privcmd";

/// A domain for one scenario, which is destroyed on drop, and the real devices.
#[derive(Debug)]
pub struct Real {
    host: Host,
    domain: Domain,
    /// The number of mappings of devices before the scenario.
    mappings: usize,
}

impl Real {
    /// Creates a domain.
    ///
    /// # Errors
    ///
    /// Returns an error if this is not domain 0 of the version of Xen that is supported.
    pub fn new() -> io::Result<Self> {
        let host = host()?;
        let kind = match host {
            Host::Pv => Kind::Paravirtual,
            Host::AutoTranslated => Kind::Translated,
        };
        let domain = Domain::new(kind, PAGES.ilog2())?;
        Ok(Self {
            host,
            domain,
            mappings: mappings()?,
        })
    }

    /// Returns the offset of a byte in the domain's memory.
    fn at(page: usize, offset: usize) -> usize {
        page * PAGE + offset
    }
}

impl Environment for Real {
    fn host(&self) -> Host {
        self.host
    }

    fn domain(&self) -> u32 {
        self.domain.id().into()
    }

    fn gntdev(&mut self) -> io::Result<File> {
        open(GNTDEV)
    }

    fn privcmd(&mut self) -> io::Result<File> {
        open(PRIVCMD)
    }

    fn frames(&self) -> Range<u64> {
        self.domain.frames()
    }

    fn grant(&mut self, reference: u32, page: usize, access: Access) {
        self.domain.grant(reference, page, access);
    }

    fn revoke(&mut self, reference: u32) {
        self.domain.revoke(reference);
    }

    fn in_use(&self, reference: u32) -> InUse {
        self.domain.in_use(reference)
    }

    fn read(&self, page: usize, offset: usize, bytes: &mut [u8]) {
        self.domain.read(Self::at(page, offset), bytes);
    }

    fn write(&mut self, page: usize, offset: usize, bytes: &[u8]) {
        self.domain.write(Self::at(page, offset), bytes);
    }

    fn audit(&mut self) -> Vec<String> {
        let used = REFERENCES.map(|reference| (reference, self.in_use(reference)));
        let mut wrong: Vec<_> = used
            .filter(|(_, in_use)| *in_use != InUse::default())
            .map(|(reference, in_use)| format!("grant {reference} is still mapped: {in_use:?}"))
            .collect();
        match mappings() {
            Ok(now) if now == self.mappings => {}
            now => wrong.push(format!(
                "{now:?} mappings of devices, {} before the scenario",
                self.mappings
            )),
        }
        wrong
    }
}

fn open(device: &str) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open(device)
}

/// Returns how this domain maps memory, as the kernel reports it.
fn host() -> io::Result<Host> {
    let kind = fs::read_to_string("/sys/hypervisor/guest_type")?;
    Ok(match kind.trim() {
        "PV" => Host::Pv,
        _ => Host::AutoTranslated,
    })
}

/// Counts the mappings of devices of Xen in this process.
fn mappings() -> io::Result<usize> {
    let maps = fs::read_to_string("/proc/self/maps")?;
    Ok(maps.lines().filter(|line| line.contains("/xen/")).count())
}
