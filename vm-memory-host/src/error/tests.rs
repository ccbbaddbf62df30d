//! The causes of errors: `source` returns each of them, and the message does not repeat it.

use std::error::Error;
use std::io;

use test_support::assert_causes_printed_once;
use vm_memory::listeners::ListenerError;
use vm_memory::mmap::{MmapRegionError, PluggedBlocksError};
use vm_memory::GuestRegionCollectionError;

use super::*;
use crate::region::Span;
use crate::{ArenaError, DescriptionError, ResidencyError};

const REGION: Span = Span {
    start: 0x1000,
    size: 0x2000,
};

fn system() -> io::Error {
    io::Error::from_raw_os_error(libc::ENOMEM)
}

/// Checks that an error has a cause, and that printing the error and its causes repeats none.
fn assert_printed_once(error: &dyn Error) {
    assert!(error.source().is_some(), "{error} has no cause");
    assert_causes_printed_once(error);
}

fn prefault_error() -> PrefaultError {
    PrefaultError::System {
        region: REGION,
        start: 0,
        len: 1,
        done: 0,
        total: 1,
        source: system(),
    }
}

/// Returns whether a variant has a cause. There is no wildcard, so that a new one is listed here.
fn build_error_has_cause(error: &BuildError) -> bool {
    use BuildError as E;
    match error {
        E::Blocks { .. }
        | E::System { .. }
        | E::Bitmap { .. }
        | E::Region { .. }
        | E::Collection(_) => true,
        E::Prefault(error) => error.source().is_some(),
        E::NoRegion
        | E::Empty { .. }
        | E::PastTop { .. }
        | E::Overlap { .. }
        | E::Misaligned { .. }
        | E::Plugged { .. }
        | E::PluggedTwice { .. }
        | E::TooManyRegions { .. }
        | E::SharedBytes { .. }
        | E::Memory { .. }
        | E::ControlGroup { .. }
        | E::NoSuchHugePage { .. }
        | E::HugePages { .. }
        | E::FileTooShort { .. }
        | E::FileOffset { .. }
        | E::NoSuchNode { .. }
        | E::NodeNotAllowed { .. }
        | E::NodeTwice { .. }
        | E::NoNode { .. }
        | E::TransparentHugePagesOff { .. }
        | E::NotAsDescribed { .. }
        | E::NotSealed { .. }
        | E::TooManyBlocks { .. }
        | E::Conflict { .. }
        | E::Name { .. } => false,
    }
}

/// Returns whether a variant has a cause. There is no wildcard, so that a new one is listed here.
fn change_error_has_cause(error: &ChangeError) -> bool {
    use ChangeError as E;
    match error {
        E::System { .. } | E::NoPages { .. } | E::Listener { .. } => true,
        E::Hole { .. }
        | E::PastTop { .. }
        | E::PageNumber { .. }
        | E::Empty { .. }
        | E::NotProvisioned(_)
        | E::OtherProcess(_)
        | E::Unaligned { .. }
        | E::ReadOnly { .. }
        | E::NoBlocks { .. }
        | E::ControlGroup { .. }
        | E::Memory { .. } => false,
    }
}

#[test]
fn build_error_prints_each_cause_once() {
    let region = REGION;
    let no_room = Vec::<u64>::new().try_reserve(usize::MAX).unwrap_err();
    let errors = [
        BuildError::Blocks {
            region,
            source: PluggedBlocksError::BlockSize { block_size: 3 },
        },
        BuildError::system(region, "map it", system(), "free memory"),
        BuildError::Bitmap {
            region,
            source: no_room,
        },
        BuildError::Region {
            region,
            source: MmapRegionError::Mmap(system()),
        },
        BuildError::Collection(GuestRegionCollectionError::MemoryRegionOverlap),
        BuildError::Prefault(prefault_error()),
    ];
    for error in &errors {
        assert!(build_error_has_cause(error));
        assert_printed_once(error);
    }
    assert!(BuildError::NoRegion.source().is_none());
}

#[test]
fn error_of_operation_prints_each_cause_once() {
    let (region, what, source) = (REGION, "discard", system());
    let (start, len, done) = (0x1000, 0x1000, 0);
    let refused = ChangeError::System {
        region,
        what,
        start,
        len,
        done,
        source,
    };
    let no_pages = ChangeError::NoPages {
        region,
        start,
        len,
        wanted: 1,
        free: 0,
        page_size: 2 << 20,
        done,
        source: system(),
    };
    let listener = ChangeError::Listener {
        region,
        start,
        len,
        done,
        source: Box::new(ListenerError::InListener),
    };
    for error in [&refused, &no_pages, &listener] {
        assert!(change_error_has_cause(error));
        assert_printed_once(error);
    }
    let source = refused;
    assert_printed_once(&RefusedPage { page: 1, source });
    assert_printed_once(&prefault_error());
    let source = system();
    assert_printed_once(&ResidencyError::System { region, source });
    assert_printed_once(&ArenaError::System {
        what,
        offset: 0,
        len,
        source: system(),
    });
}

#[test]
fn change_error_is_shortage_only_if_pages_for_a_plug_are_short() {
    let (region, start, len, done, wanted) = (REGION, 0x1000, 0x1000, 0, 1);
    let system = |what, error| ChangeError::System {
        region,
        what,
        start,
        len,
        done,
        source: io::Error::from_raw_os_error(error),
    };
    let no_memory = ChangeError::Memory {
        region,
        start,
        len,
        wanted,
        available: 0,
        done,
    };
    let no_pages = ChangeError::NoPages {
        region,
        start,
        len,
        wanted,
        free: 0,
        page_size: 2 << 20,
        done,
        source: io::Error::from_raw_os_error(libc::EFAULT),
    };
    assert!(no_memory.is_shortage() && no_pages.is_shortage());
    for error in [libc::EFAULT, libc::ENOMEM, libc::ENOSPC, libc::EDQUOT] {
        assert!(system("plug", error).is_shortage(), "{error}");
        assert!(!system("discard", error).is_shortage(), "{error}");
    }
    for error in [libc::EACCES, libc::EHWPOISON, libc::EIO] {
        assert!(!system("plug", error).is_shortage(), "{error}");
    }
    assert!(!ChangeError::NoBlocks { region }.is_shortage());
    assert!(!ChangeError::Hole { addr: 0 }.is_shortage());
}

#[test]
fn error_of_build_is_shortage_only_if_pages_or_memory_are_short() {
    let (region, wanted, available) = (REGION, 2, 1);
    let system = |number| {
        BuildError::system(
            region,
            "map it",
            io::Error::from_raw_os_error(number),
            "wait",
        )
    };
    let no_pages = BuildError::HugePages {
        region,
        page_size: 2 << 20,
        wanted,
        free: 0,
        nodes: Vec::new(),
    };
    let no_memory = BuildError::Memory {
        region,
        wanted,
        available,
    };
    let no_room = Vec::<u64>::new().try_reserve(usize::MAX).unwrap_err();
    let no_bitmap = BuildError::Bitmap {
        region,
        source: no_room,
    };
    let prefault = BuildError::Prefault(prefault_error());
    let plug = ChangeError::Memory {
        region,
        start: 0,
        len: 1,
        wanted,
        available,
        done: 0,
    };
    assert!(DescriptionError::Change(plug).is_shortage());
    for error in [no_pages, no_memory, no_bitmap, prefault] {
        assert!(error.is_shortage(), "{error}");
        assert!(DescriptionError::Layout(error).is_shortage());
    }
    for number in [libc::EFAULT, libc::ENOMEM, libc::ENOSPC, libc::EDQUOT] {
        assert!(system(number).is_shortage(), "{number}");
    }
    let cancelled = PrefaultError::Cancelled { done: 0, total: 1 };
    let read_only = DescriptionError::Change(ChangeError::ReadOnly { region });
    assert!(!read_only.is_shortage() && !DescriptionError::Version { version: 2 }.is_shortage());
    for error in [
        system(libc::EACCES),
        BuildError::NoRegion,
        BuildError::NotSealed { region },
        BuildError::Prefault(cancelled),
    ] {
        assert!(!error.is_shortage(), "{error}");
        assert!(!DescriptionError::Layout(error).is_shortage());
    }
}

#[test]
fn error_that_wraps_another_one_repeats_no_message() {
    // A transparent error has the message and the cause of the inner one.
    let error = NotProvisioned { region: REGION };
    assert_causes_printed_once(&PrefaultError::NotProvisioned(error));
    assert_causes_printed_once(&ChangeError::NotProvisioned(error));
    assert_causes_printed_once(&ResidencyError::NotProvisioned(error));
    let error = OtherProcess { region: REGION };
    assert_causes_printed_once(&PrefaultError::OtherProcess(error));
    assert_causes_printed_once(&ChangeError::OtherProcess(error));
    assert_causes_printed_once(&ResidencyError::OtherProcess(error));
}
