//! A vhost-user front end and back end, whose rings and buffers are granted pages.
//!
//! ```text
//!   Driver, the guest: its own view of its pages, and its grant table
//!      │  rings, buffers                ▲ used ring
//!      ▼                                │
//!   pages of the domain ◄── gntdev ── back end: vhost-user-backend, virtio-queue, this crate
//!                                       ▲
//!                 front end: vhost ─────┘  regions, ring addresses, eventfds, on a socket
//! ```
//!
//! The back end consists of crates from the registry and a device of a few lines, like those of
//! vhost-device.

mod device;
mod driver;

use std::io::ErrorKind;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, RwLock};
use std::time::{Duration, Instant};

use vhost::vhost_user::message::{
    VhostUserHeaderFlag, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Error as MessageError, Frontend, Listener, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vhost_user_backend::{Error as BackEndError, VhostUserDaemon};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap, MmapXenFlags};
use vmm_sys_util::eventfd::{EventFd, EFD_NONBLOCK};

use crate::environment::{mapped, Environment};
use crate::outcome::{Outcome, Stop};
use device::Device;
use driver::{Driver, Missing, RINGS};

/// The requests of a run. The rings wrap around several times.
const REQUESTS: u32 = 40;
/// The size of the region of buffers, of which few pages are granted at a time.
const BUFFERS: u64 = 1 << 30;
/// The maximum time that a condition may take.
const CONDITION_TIMEOUT: Duration = Duration::from_secs(20);

/// The moment when the back end maps the rings.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Rings {
    /// When the front end sends their regions.
    InAdvance,
    /// At each access, like the buffers.
    OnDemand,
}

/// Runs requests, some of which name a page that is not granted.
///
/// # Errors
///
/// Returns the error of a device, or of vhost-user.
///
/// # Panics
///
/// Panics if a request is not completed or its data is wrong, or if a buffer is still mapped when
/// the driver revokes its grants.
pub fn requests_complete(env: &mut dyn Environment, rings: Rings) -> Outcome {
    let socket = socket_path();
    let mut listener = Listener::new(&socket, true).map_err(other)?;
    let stream = UnixStream::connect(&socket)?;
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    let device = Arc::new(RwLock::new(Device::new()?));
    let mut daemon = VhostUserDaemon::new("device".to_owned(), device, memory).map_err(other)?;
    daemon.start(&mut listener).map_err(other)?;
    let front_end = Frontend::from_stream(stream, 1);

    let mut driver = Driver::new(env);
    let (kick, call) = (EventFd::new(EFD_NONBLOCK)?, EventFd::new(EFD_NONBLOCK)?);
    connect(&front_end, &mut driver, rings, &kick, &call)?;
    for number in 0..REQUESTS {
        // The device cannot serve some requests, and writes nothing.
        let missing = match number % 8 {
            3 => Missing::EndOfWritable,
            5 => Missing::Readable,
            _ => Missing::Nothing,
        };
        driver.offer(number, missing);
        kick.write(1)?;
        wait(&call)?;
        driver.check(number, missing);
        let expected = match rings {
            Rings::InAdvance => driver.ring_references(),
            Rings::OnDemand => Vec::new(),
        };
        // After its signal, the device reads the rings once more.
        until("more is mapped after a request than the rings", || {
            Ok(mapped(driver.env()) == expected)
        })?;
    }
    drop(front_end);
    match daemon.wait() {
        Ok(()) | Err(BackEndError::HandleRequest(MessageError::Disconnected)) => {}
        Err(error) => return Err(other(error)),
    }
    drop(daemon);
    assert_eq!(
        mapped(driver.env()),
        [0; 0],
        "after the end of the back end"
    );
    Ok(())
}

/// Does what a front end does before the first request.
fn connect(
    front_end: &Frontend,
    driver: &mut Driver<'_>,
    rings: Rings,
    kick: &EventFd,
    call: &EventFd,
) -> Outcome {
    let mut front_end = front_end.clone();
    front_end.set_owner().map_err(other)?;
    let features = front_end.get_features().map_err(other)?;
    front_end.set_features(features).map_err(other)?;
    assert_ne!(
        features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits(),
        0
    );
    let wanted = VhostUserProtocolFeatures::XEN_MMAP | VhostUserProtocolFeatures::REPLY_ACK;
    assert!(front_end
        .get_protocol_features()
        .map_err(other)?
        .contains(wanted));
    front_end.set_protocol_features(wanted).map_err(other)?;
    // Errors of the back end become errors of the calls here.
    front_end.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);

    let device = driver.device()?;
    // A front end that has not mapped the guest's memory sends guest addresses as its own.
    let region = |at: u64, size: u64, flags: MmapXenFlags| VhostUserMemoryRegionInfo {
        guest_phys_addr: at,
        memory_size: size,
        userspace_addr: at,
        mmap_offset: 0,
        mmap_handle: device.as_raw_fd(),
        xen_mmap_flags: flags.bits(),
        xen_mmap_data: driver.env().domain(),
    };
    let ring_flags = match rings {
        Rings::InAdvance => MmapXenFlags::GRANT,
        Rings::OnDemand => MmapXenFlags::GRANT | MmapXenFlags::NO_ADVANCE_MAP,
    };
    let mut regions: Vec<_> = RINGS
        .map(|(offset, size)| region(driver.ring_address(offset), size, ring_flags))
        .into();
    let on_demand = MmapXenFlags::GRANT | MmapXenFlags::NO_ADVANCE_MAP;
    regions.push(region(driver.buffer_address(), BUFFERS, on_demand));
    front_end.set_mem_table(&regions).map_err(other)?;

    let [descriptors, available, used] = RINGS.map(|(offset, _)| driver.ring_address(offset));
    front_end.set_vring_num(0, driver::SIZE).map_err(other)?;
    let addresses = VringConfigData {
        queue_max_size: driver::SIZE,
        queue_size: driver::SIZE,
        flags: 0,
        desc_table_addr: descriptors,
        used_ring_addr: used,
        avail_ring_addr: available,
        log_addr: None,
    };
    front_end.set_vring_addr(0, &addresses).map_err(other)?;
    front_end.set_vring_base(0, 0).map_err(other)?;
    front_end.set_vring_call(0, call).map_err(other)?;
    front_end.set_vring_kick(0, kick).map_err(other)?;
    front_end.set_vring_enable(0, true).map_err(other)
}

/// Waits until the device has signalled.
fn wait(call: &EventFd) -> Outcome {
    until("the device does not signal", || match call.read() {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(false),
        Err(error) => Err(error.into()),
    })
}

/// Waits for a condition.
fn until(otherwise: &str, condition: impl Fn() -> Outcome<bool>) -> Outcome {
    let begun = Instant::now();
    while !condition()? {
        assert!(begun.elapsed() < CONDITION_TIMEOUT, "{otherwise}");
        std::thread::sleep(Duration::from_micros(200));
    }
    Ok(())
}

/// Returns a path that no other run uses.
fn socket_path() -> PathBuf {
    static RUNS: AtomicU32 = AtomicU32::new(0);
    let run = RUNS.fetch_add(1, Ordering::Relaxed);
    std::env::temp_dir().join(format!("verify-xen-{}-{run}", std::process::id()))
}

fn other(error: impl std::fmt::Display) -> Stop {
    std::io::Error::other(error.to_string()).into()
}
