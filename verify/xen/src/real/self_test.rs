//! A test of [`Real`] itself: it must report the grants that are mapped by hand.

use std::sync::atomic::{AtomicU32, Ordering};

use super::gntdev::{read_by_copying, Mapped};
use super::Real;
use crate::environment::{mapped, Access, Environment};
use crate::outcome::Outcome;

/// Maps, reads, revokes and unmaps grants without the library.
///
/// # Errors
///
/// Returns the error of a device.
///
/// # Panics
///
/// Panics if the hypervisor or the audit does not report a mapped grant.
pub fn self_test(env: &mut Real) -> Outcome {
    static ROUND: AtomicU32 = AtomicU32::new(0x600d_0000);
    let value = ROUND.fetch_add(1, Ordering::Relaxed);
    let domain = env.domain();
    let device = env.gntdev()?;
    env.grant(40, 3, Access::ReadWrite);
    env.grant(41, 4, Access::ReadOnly);
    env.write(3, 0, &value.to_ne_bytes());
    env.write(4, 0, &(!value).to_ne_bytes());

    let first = Mapped::new(&device, domain, 40)?;
    let second = Mapped::new(&device, domain, 41)?;
    assert_eq!((first.read(), second.read()), (value, !value));
    assert_eq!(mapped(env), [40, 41]);
    assert!(env.in_use(40).reading && !env.in_use(40).writing);
    let wrong = env.audit();
    assert_eq!(wrong.len(), 3, "two grants and two mappings: {wrong:#?}");
    drop(second);
    env.revoke(40);
    assert_eq!(mapped(env), [40], "a grant in use was revoked");
    drop(first);
    assert_eq!(mapped(env), [0; 0]);
    let refused = Mapped::new(&device, domain, 40).map(|_| ());
    let errno = refused.err().and_then(|error| error.raw_os_error());
    assert_eq!(errno, Some(libc::EINVAL), "a revoked grant");

    let mut bytes = [0; 4];
    let id = u16::try_from(domain).expect("a domain has 16 bits");
    read_by_copying(&device, id, 41, 4, &mut bytes)?;
    assert_eq!(u32::from_ne_bytes(bytes), !value);
    assert!(read_by_copying(&device, id, 40, 4, &mut bytes).is_err());
    Ok(())
}
