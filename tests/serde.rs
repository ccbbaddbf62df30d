//! Values that are serialised, and read again (feature `serde`).
#![cfg(all(feature = "serde", feature = "iommu"))]

use vm_memory::iommu::{IotlbCounters, IovaRange, MappedRange};
use vm_memory::{GuestAddress, MemoryRegionAddress, Permissions};

fn read_again<T: serde::Serialize + serde::de::DeserializeOwned>(value: &T) -> (T, String) {
    let text = serde_json::to_string(value).unwrap();
    (serde_json::from_str(&text).unwrap(), text)
}

#[test]
fn deserialize_of_serialized_value_returns_it() {
    let addr = GuestAddress(u64::MAX);
    assert_eq!(read_again(&addr), (addr, "18446744073709551615".to_owned()));
    let offset = MemoryRegionAddress(7);
    assert_eq!(read_again(&offset), (offset, "7".to_owned()));
    for permissions in [
        Permissions::No,
        Permissions::Read,
        Permissions::Write,
        Permissions::ReadWrite,
    ] {
        let text = format!("\"{permissions:?}\"");
        assert_eq!(read_again(&permissions), (permissions, text));
    }
    let (base, length) = (GuestAddress(0x1000), 0x2000);
    let (range, mapped) = (IovaRange { base, length }, MappedRange { base, length });
    let text = r#"{"base":4096,"length":8192}"#.to_owned();
    assert_eq!(read_again(&range), (range, text.clone()));
    assert_eq!(read_again(&mapped), (mapped, text));
    let mut counters = IotlbCounters::default();
    counters.hits = 3;
    assert_eq!(read_again(&counters).0, counters);
}

#[test]
fn deserialize_of_value_out_of_range_returns_error() {
    for text in ["-1", "18446744073709551616", "\"0x1000\"", "null"] {
        assert!(
            serde_json::from_str::<GuestAddress>(text).is_err(),
            "{text}"
        );
    }
    let text = r#"{"base":4096,"length":-1}"#;
    assert!(serde_json::from_str::<IovaRange>(text).is_err());
    assert!(serde_json::from_str::<Permissions>("\"Execute\"").is_err());
}
