//! A version that the list keeps alive, as a snapshot of an IOTLB, is out of use when it has no
//! readers.

use std::sync::Arc as Memory;

use loom::cell::UnsafeCell;
use loom::thread;

use super::list::{RetiredList, Version};
use super::sync::{lock, Arc, Mutex};
use crate::harness::{choose, Run};

/// A page that readers of version 0 may read. loom reports a read that is concurrent with a write.
#[derive(Debug)]
struct Page(UnsafeCell<()>);

impl Version for Arc<u64> {
    const SPARES: usize = 1;

    fn number(&self) -> u64 {
        **self
    }

    fn readers(&self) -> usize {
        Arc::strong_count(self) - 1
    }
}

struct Versions {
    current: Mutex<Arc<u64>>,
    retired: RetiredList<Arc<u64>>,
}

impl Versions {
    fn replace(&self, number: u64) {
        let old = core::mem::replace(&mut *lock(&self.current), Arc::new(number));
        drop(self.retired.retire(old));
    }
}

/// Explores a reader of version 0, a thread that replaces it, and another thread on the list.
#[expect(
    clippy::arc_with_non_send_sync,
    reason = "loom runs the threads of a model one at a time"
)]
fn readers_before_returning_zero_orders_readers(other: Option<fn(&Versions)>) {
    loom::model(move || {
        let page = Memory::new(Page(UnsafeCell::new(())));
        let versions = Memory::new(Versions {
            current: Mutex::new(Arc::new(0)),
            retired: RetiredList::new(),
        });
        let reader = {
            let (versions, page) = (Memory::clone(&versions), Memory::clone(&page));
            thread::spawn(move || {
                let version = Arc::clone(&lock(&versions.current));
                if *version == 0 {
                    page.0.with(|_| ());
                }
            })
        };
        versions.replace(1);
        let other = other.map(|other| {
            let versions = Memory::clone(&versions);
            thread::spawn(move || other(&versions))
        });
        if versions.retired.readers_before(1) == 0 {
            page.0.with_mut(|_| ());
        }
        reader.join().unwrap();
        if let Some(other) = other {
            other.join().unwrap();
        }
    });
}

pub(super) fn readers_before_orders_readers() {
    readers_before_returning_zero_orders_readers(None);
}

/// Creates two tests of each model, one for each kind of load.
macro_rules! models {
    ($($name:ident: $other:expr;)*) => {
        mod plain {
            $(
                #[test]
                fn $name() {
                    super::readers_before_returning_zero_orders_readers($other);
                }
            )*
        }

        mod loads_modify {
            $(
                #[test]
                fn $name() {
                    super::choose(super::Run { loads_modify: true, ..Default::default() });
                    super::readers_before_returning_zero_orders_readers($other);
                }
            )*
        }
    };
}

models! {
    readers_before_alone_orders_readers: None;
    readers_before_after_readers_before_orders_readers: Some(|versions| {
        versions.retired.readers_before(1);
    });
    readers_before_after_take_unread_orders_readers: Some(|versions| {
        drop(versions.retired.take_unread());
    });
    readers_before_after_retire_orders_readers: Some(|versions| versions.replace(2));
}
