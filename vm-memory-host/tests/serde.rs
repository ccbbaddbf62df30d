//! The layout as serialised data, and hostile input (feature `serde`).
#![cfg(all(target_os = "linux", feature = "serde"))]

use std::num::NonZeroU64;

use serde::de::DeserializeOwned;
use serde::Serialize;
use serde_json::{json, Value};
use test_support::{temp_file_of_len, MIB};
use vm_memory::{GuestAddress, GuestMemoryMmap};
use vm_memory_host::{
    describe, residency, Backing, Description, FileLayout, Lock, MemoryBuilder, NumaPolicy, Region,
    Span, TransparentHugePages, Unplugged,
};

fn read_again<T: Serialize + DeserializeOwned>(value: &T) -> T {
    serde_json::from_str(&serde_json::to_string(value).unwrap()).unwrap()
}

/// Builds regions with most options, and describes them.
fn description() -> Description {
    let region = |mib, backing| Region::new(GuestAddress(mib * MIB), 4 * MIB).backing(backing);
    let blocks = NonZeroU64::new(2 * MIB).unwrap();
    let memory: GuestMemoryMmap = MemoryBuilder::new()
        .region(region(0, Backing::Memfd).name("ram").lock(Lock::OnFault))
        .region(region(16, Backing::Memfd).blocks(blocks, Unplugged::Mapped))
        .region(region(32, Backing::private_file(temp_file_of_len(4 * MIB), 0)).core_dump(false))
        .region(
            region(64, Backing::Anonymous)
                .numa(NumaPolicy::Preferred(0))
                .mergeable(true)
                .transparent_huge_pages(TransparentHugePages::Off),
        )
        .build()
        .unwrap();
    vm_memory_host::plug(&memory, GuestAddress(18 * MIB), 2 * MIB).unwrap();
    describe(&memory).unwrap().0
}

#[test]
fn deserialize_of_serialized_layout_returns_it() {
    let description = description();
    assert_eq!(read_again(&description), description);
    let spans = [Span::from(0..0x1000), Span::from(0x4000..0x5000)];
    let layout = FileLayout::from_spans(spans).unwrap();
    assert_eq!(read_again(&layout), layout);
    let region = Region::new(GuestAddress(0), MIB);
    let memory: GuestMemoryMmap = MemoryBuilder::new().region(region).build().unwrap();
    let (_, usage) = residency(&memory).unwrap()[0];
    assert_eq!(read_again(&usage), usage);
    assert_eq!(read_again(&spans[1]), spans[1]);
}

#[test]
fn deserialize_of_description_without_regions_returns_it_and_build_returns_error() {
    let (empty, files) = describe(&GuestMemoryMmap::<()>::new()).unwrap();
    let received = read_again(&empty);
    assert_eq!(received, empty);
    let error = received.builder(files).unwrap().build::<()>().unwrap_err();
    assert!(error.to_string().contains("no regions"), "{error}");
}

/// Changes a serialised description, and returns the error of deserialising it.
fn error_after(change: impl FnOnce(&mut Value)) -> String {
    let mut value = serde_json::to_value(description()).unwrap();
    change(&mut value);
    match serde_json::from_value::<Description>(value) {
        Ok(description) => format!("accepted: {description}"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn deserialize_of_hostile_description_returns_error() {
    let (top, descriptor) = (u64::MAX, "/regions/0/backing/Descriptor");
    let name = json!("x\n");
    let cases = [
        ("/version", json!(2), "has version 2"),
        ("/regions/0/span/size", json!(0), "has size 0"),
        ("/regions/3/span/start", json!(top - 4095), "past the last"),
        ("/regions/0/span/size", json!(20 * MIB), "overlaps"),
        ("/regions/1/span/start", json!(MIB), "overlaps"),
        (
            "/regions/1/blocks/blocks/size",
            json!(3 * MIB),
            "power of two",
        ),
        ("/regions/1/blocks/blocks/size", json!(0), "nonzero"),
        (
            "/regions/1/blocks/blocks/size",
            json!(8 * MIB),
            "block size",
        ),
        ("/regions/1/blocks/plugged/0/0", json!(MIB), "whole blocks"),
        (
            "/regions/1/blocks/plugged/0/1",
            json!(top - 1),
            "whole blocks",
        ),
        (
            "/regions/1/blocks/plugged/0/1",
            json!(8 * MIB),
            "whole blocks",
        ),
        ("/regions/0/options/name", name, "printable"),
        ("/regions/3/options/numa", json!({"Bind": []}), "no nodes"),
        (
            "/regions/3/options/numa",
            json!({"Interleave": [1, 1]}),
            "twice",
        ),
        (
            "/regions/0/options/lock",
            json!("Always"),
            "unknown variant",
        ),
        (&format!("{descriptor}/index"), json!(1u64 << 32), "u32"),
        (&format!("{descriptor}/index"), json!(-1), "u32"),
        (&format!("{descriptor}/offset"), json!(top), "largest file"),
        (
            &format!("{descriptor}/offset"),
            json!(top >> 1),
            "largest file",
        ),
    ];
    for (place, value, part) in cases {
        let shown = format!("{place} = {value}");
        let error = error_after(|description| *description.pointer_mut(place).unwrap() = value);
        assert!(error.contains(part), "{shown}: {error}");
    }
    let plugged = json!([[0, 2 * MIB], [0, 2 * MIB]]);
    let error = error_after(|description| {
        description["regions"][1]["blocks"]["plugged"] = plugged;
    });
    assert!(error.contains("each block once"), "{error}");
}

#[test]
fn deserialize_of_unknown_field_returns_error() {
    for place in [
        "",
        "/regions/0",
        "/regions/0/span",
        "/regions/0/backing/Descriptor",
        "/regions/0/options",
        "/regions/1/blocks",
        "/regions/1/blocks/blocks",
    ] {
        let error = error_after(|description| {
            description.pointer_mut(place).unwrap()["secret"] = json!(true);
        });
        assert!(error.contains("unknown field"), "{place}: {error}");
    }
}

#[test]
fn deserialize_of_regions_in_any_order_sorts_them() {
    let sorted = description();
    let mut value = serde_json::to_value(&sorted).unwrap();
    value["regions"].as_array_mut().unwrap().reverse();
    let received: Description = serde_json::from_value(value).unwrap();
    assert_eq!(received, sorted);
}

#[test]
fn deserialize_of_hostile_file_layout_returns_error() {
    for (text, part) in [
        (r#"[{"start":0,"size":0}]"#, "empty"),
        (
            r#"[{"start":4096,"size":1},{"start":0,"size":1}]"#,
            "before the end",
        ),
        (r#"[{"start":18446744073709551615,"size":1}]"#, "2^64"),
        (
            r#"[{"start":0,"size":9223372036854775808}]"#,
            "largest length",
        ),
        (r#"[{"start":0}]"#, "missing field"),
    ] {
        let error = serde_json::from_str::<FileLayout>(text).unwrap_err();
        assert!(error.to_string().contains(part), "{text}: {error}");
    }
}
