use proptest::prelude::*;
use proptest::test_runner::TestCaseResult;

use super::*;

#[derive(Clone, Debug)]
enum Step {
    Push(u64, usize),
    Split(usize),
    SplitTo(usize),
    Truncate(usize),
    CopyFrom(usize, Vec<u8>),
    CopyTo(usize, usize),
}

fn step() -> impl Strategy<Value = Step> {
    let near = || prop_oneof![4 => 0usize..600, 1 => any::<usize>()];
    prop_oneof![
        (prop_oneof![4 => 0u64..0x2c0, 1 => any::<u64>()], near())
            .prop_map(|(a, n)| Step::Push(a, n)),
        near().prop_map(Step::Split),
        near().prop_map(Step::SplitTo),
        near().prop_map(Step::Truncate),
        (near(), prop::collection::vec(any::<u8>(), 0..200))
            .prop_map(|(o, bytes)| Step::CopyFrom(o, bytes)),
        (near(), 0usize..300).prop_map(|(o, n)| Step::CopyTo(o, n)),
    ]
}

/// Returns the host address of each byte of a buffer.
fn bytes_of(vectors: &[libc::iovec]) -> Vec<usize> {
    let bytes = |vector: &libc::iovec| {
        let start = vector.iov_base as usize;
        start..start + vector.iov_len
    };
    vectors.iter().flat_map(bytes).collect()
}

fn check_buffer(steps: Vec<Step>, written: usize) -> TestCaseResult {
    // Three regions, with a hole before the last one.
    let bases = [(0u64, 0x100u64), (0x100, 0x100), (0x240, 0x80)];
    let ranges: Vec<_> = bases
        .iter()
        .map(|(base, len)| (GuestAddress(*base), *len as usize))
        .collect();
    // Each region is smaller than a page of its bitmap, so marks are compared region by region.
    let memory = Arc::new(Memory::from_ranges(&ranges).unwrap());
    let is_mapped = |address: u64| {
        bases
            .iter()
            .any(|(base, len)| (*base..base + len).contains(&address))
    };
    let host_of = |address| memory.get_host_address(GuestAddress(address)).unwrap() as usize;
    let mut bytes = vec![0u8; 0x300];
    let mut buffer = IoBuffer::new(Arc::clone(&memory), Permissions::ReadWrite);
    let mut model: Vec<u64> = Vec::new();
    for step in steps {
        match step {
            Step::Push(address, count) => {
                let end = u128::from(address) + count as u128;
                let reachable = end <= 0x300 && (address..end as u64).all(is_mapped);
                prop_assert_eq!(
                    buffer.push(GuestAddress(address), count).is_ok(),
                    reachable || count == 0
                );
                if reachable {
                    model.extend(address..end as u64);
                }
            }
            Step::Split(at) => {
                let rest = buffer.split_off(at);
                prop_assert_eq!(rest.is_some(), at <= model.len());
                if let Some(rest) = rest {
                    prop_assert_eq!(rest.len(), model.len() - at);
                    prop_assert_eq!(bytes_of(rest.vectors()).len(), rest.len());
                    model.truncate(at);
                }
            }
            Step::SplitTo(at) => {
                let front = buffer.split_to(at);
                prop_assert_eq!(front.is_some(), at <= model.len());
                if let Some(front) = front {
                    prop_assert_eq!(front.len(), at);
                    let expected: Vec<_> = model.drain(..at).map(host_of).collect();
                    prop_assert_eq!(bytes_of(front.vectors()), expected);
                }
            }
            Step::Truncate(len) => {
                buffer.truncate(len);
                model.truncate(len);
            }
            Step::CopyFrom(offset, put) => {
                let fits = model.len().saturating_sub(offset).min(put.len());
                prop_assert_eq!(buffer.copy_from(offset, &put).unwrap(), fits);
                for (index, byte) in put[..fits].iter().enumerate() {
                    bytes[model[offset + index] as usize] = *byte;
                }
            }
            Step::CopyTo(offset, count) => {
                let fits = model.len().saturating_sub(offset).min(count);
                let mut seen = vec![0xaa; count];
                prop_assert_eq!(buffer.copy_to(offset, &mut seen).unwrap(), fits);
                for (index, byte) in seen[..fits].iter().enumerate() {
                    prop_assert_eq!(bytes[model[offset + index] as usize], *byte);
                }
                prop_assert!(seen[fits..].iter().all(|byte| *byte == 0xaa));
                let mut exact = vec![0xaa; count];
                let all = offset
                    .checked_add(count)
                    .is_some_and(|end| end <= model.len());
                prop_assert_eq!(buffer.read_slice(&mut exact, offset).is_ok(), all);
                prop_assert_eq!(exact, if all { seen } else { vec![0xaa; count] });
            }
        }
        prop_assert_eq!(buffer.len(), model.len());
        // Byte by byte, the vectors are the addresses.
        let expected: Vec<_> = model.iter().copied().map(host_of).collect();
        prop_assert_eq!(bytes_of(buffer.vectors()), expected);
    }
    dirty(&memory);
    let marked = buffer.complete(written);
    prop_assert_eq!(marked, written.min(model.len()));
    let region_of = |address: u64| bases.iter().rfind(|(base, _)| *base <= address).unwrap().0;
    let mut expected: Vec<u64> = model.iter().map(|address| region_of(*address)).collect();
    expected.sort_unstable();
    expected.dedup();
    prop_assert_eq!(dirty(&memory), expected);
    Ok(())
}

proptest! {
    #[test]
    fn io_buffer_agrees_with_list_of_addresses(
        steps in prop::collection::vec(step(), 1..30),
        written in 0usize..800,
    ) {
        check_buffer(steps, written)?;
    }
}
