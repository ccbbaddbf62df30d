//! Messages about builds (feature `log`).
#![cfg(all(target_os = "linux", feature = "log"))]

use std::sync::Mutex;

use log::{Level, LevelFilter, Log, Metadata, Record};
use vm_memory::{GuestAddress, GuestMemoryMmap};
use vm_memory_host::{Backing, MemoryBuilder, Region};

/// Keeps all messages.
struct Messages(Mutex<Vec<(Level, String, String)>>);

impl Log for Messages {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        let message = (
            record.level(),
            record.target().to_owned(),
            record.args().to_string(),
        );
        self.0.lock().unwrap().push(message);
    }

    fn flush(&self) {}
}

static MESSAGES: Messages = Messages(Mutex::new(Vec::new()));

#[test]
fn build_and_install_write_messages_of_level_debug() {
    log::set_logger(&MESSAGES).unwrap();
    log::set_max_level(LevelFilter::Debug);
    vm_memory::fault::install().unwrap();
    let region = Region::new(GuestAddress(0x10_0000), 1 << 20).backing(Backing::Memfd);
    let memory: GuestMemoryMmap = MemoryBuilder::new().region(region).build().unwrap();
    let messages = MESSAGES.0.lock().unwrap().clone();
    let find = |part: &str| {
        let found = messages.iter().find(|(_, _, text)| text.contains(part));
        found.unwrap_or_else(|| panic!("{messages:?} lacks {part}"))
    };
    let (level, target, text) = find("region 0x100000-0x1fffff: mapped memfd memory");
    assert_eq!(
        (*level, target.starts_with("vm_memory_host::")),
        (Level::Debug, true)
    );
    assert!(text.contains("pages of 0x1000 bytes"), "{text}");
    let (level, target, _) = find("the fault handler is installed");
    assert_eq!(
        (*level, target.starts_with("vm_memory::")),
        (Level::Debug, true)
    );
    drop(memory);
}
