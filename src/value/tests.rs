use super::*;
use crate::bytes::Bytes;

#[test]
fn from_slice_with_wrong_size_or_alignment_returns_none() {
    let mut storage = [0u64; 2];
    let bytes = storage.as_mut_slice();
    let bytes = bytes.first_mut().unwrap().as_mut_slice();
    bytes.copy_from_slice(&[1, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(u64::from_slice(bytes).map(|v| v.to_le()), Some(1));
    assert!(u32::from_slice(bytes).is_none());
    assert!(u16::from_slice(&bytes[1..3]).is_none());
    assert!(<[u8; 0]>::from_slice(&[]).is_none());
}

#[test]
fn from_mut_slice_with_wrong_alignment_returns_none() {
    let mut storage = 1u64.to_le();
    let bytes = storage.as_mut_slice();
    *u32::from_mut_slice(&mut bytes[4..]).unwrap() = 2u32.to_le();
    assert_eq!(bytes, [1, 0, 0, 0, 2, 0, 0, 0]);
    assert!(u32::from_mut_slice(&mut bytes[3..7]).is_none());
}

#[test]
fn write_all_to_then_read_exact_from_returns_same_value() {
    let mut stream = Vec::new();
    0x0102_0304u32.write_all_to(&mut stream).unwrap();
    assert_eq!(
        u32::read_exact_from(stream.as_slice()).unwrap(),
        0x0102_0304
    );
}

#[test]
fn read_exact_from_short_source_returns_unexpected_eof() {
    let short = u64::read_exact_from([1u8; 4].as_slice()).unwrap_err();
    assert_eq!(short.kind(), std::io::ErrorKind::UnexpectedEof);
}

#[test]
fn as_bytes_write_changes_value() {
    let mut value = 0u32;
    value.as_bytes().write_slice(&[1, 2, 3, 4], 0).unwrap();
    assert_eq!(value, u32::from_ne_bytes([1, 2, 3, 4]));
}
