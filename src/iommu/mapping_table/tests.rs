//! Compares tables with ordered sets, and checks what copies share.

use super::*;
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// Returns a source of random numbers below its argument.
fn numbers() -> impl FnMut(u64) -> u64 {
    let mut generator = fastrand::Rng::with_seed(1);
    move |below: u64| generator.u64(..below)
}

#[test]
fn ages_after_random_changes_agree_with_list() {
    let mut random = numbers();
    let (mut ages, mut list) = (Ages::default(), Vec::new());
    let steps = if cfg!(miri) { 500 } else { 20_000 };
    for step in 0..steps {
        let grows = step / 2_000 % 2 == 0;
        let at = random(list.len() as u64 + 1) as usize;
        let age = random(1_000);
        match random(10) {
            0..4 if grows => {
                ages.insert(at, age);
                list.insert(at, age);
            }
            0..4 => {
                let end = (at + random(3) as usize).min(list.len());
                ages.remove(at..end);
                list.drain(at..end);
            }
            4..6 => ages.lower(at, age),
            6..8 => ages.set(at, age),
            _ => {
                let end = at + random(40) as usize;
                let rest = list.iter().copied().enumerate();
                let expected = rest.filter(|(leaf, _)| !(at..end).contains(leaf));
                let expected = expected.min_by_key(|(_, age)| *age);
                assert_eq!(ages.oldest_except(at..end), expected);
            }
        }
        // `lower` or `set` may have changed this entry.
        if let (Some(entry), Some(now)) = (list.get_mut(at), ages.get(at)) {
            assert!(now == *entry || now == age);
            *entry = now;
        }
        assert_eq!(ages.len(), list.len());
    }
    let again = Ages::new(list.iter().copied());
    assert_eq!(ages.oldest_except(0..0), again.oldest_except(0..0));
}

#[test]
fn keep_newest_of_random_tables_equals_removals_of_oldest() {
    let mut random = numbers();
    for round in 0..if cfg!(miri) { 5 } else { 60 } {
        let mut table = MappingTable::default();
        for number in 0..random(600) {
            let start = (number * 16).wrapping_mul(0x9e3_7791) % (1 << 20);
            // Some have equal ages.
            let age = random(200);
            if table
                .last_at_or_before(start)
                .is_none_or(|it| it.1.start != start)
            {
                table.insert(IovaMapping::new(
                    start,
                    start + 9,
                    0,
                    Permissions::Read,
                    age,
                ));
            }
        }
        let (mut copy, kept) = (table.clone(), random(700) as usize);
        let mut removed = 0;
        while copy.len() > kept {
            copy.remove_oldest().unwrap();
            removed += 1;
        }
        assert_eq!(table.keep_newest(kept), removed);
        let contents = |table: &MappingTable| -> Vec<_> {
            table.iter().map(|it| (it.start, it.tag)).collect()
        };
        assert_eq!(contents(&table), contents(&copy), "round {round}");
        assert_eq!(table.len(), copy.len());
        // The table works as before.
        table.insert(IovaMapping::new(
            1 << 30,
            1 << 30,
            0,
            Permissions::Read,
            300,
        ));
        copy.insert(IovaMapping::new(
            1 << 30,
            1 << 30,
            0,
            Permissions::Read,
            300,
        ));
        while let Some(gone) = copy.remove_oldest() {
            assert_eq!(table.remove_oldest().map(|it| it.start), Some(gone.start));
        }
        assert_eq!(table.len(), 0);
    }
}

#[test]
fn remove_oldest_after_random_changes_agrees_with_model() {
    let mut random = numbers();
    // The ages by start, and the starts by age.
    let (mut table, mut model) = (MappingTable::default(), BTreeMap::new());
    let mut ages = BTreeSet::new();
    let (mut copy, mut model_of_copy) = (MappingTable::default(), Vec::new());
    let contents = |table: &MappingTable| -> Vec<(u64, u64)> {
        table
            .iter()
            .map(|mapping| (mapping.start, mapping.age()))
            .collect()
    };
    let steps: u64 = if cfg!(miri) { 2_000 } else { 60_000 };
    for step in 0..steps {
        let start = random(1 << 13) * 16;
        match random(100) {
            // Grows to thousands of mappings, and shrinks to none.
            0..=79 if step / 10_000 % 2 == 0 => {
                if let Entry::Vacant(free) = model.entry(start) {
                    // Some have equal ages, and some are older than earlier ones.
                    let age = (step / 3).saturating_sub(random(2) * random(100));
                    table.insert(IovaMapping::new(
                        start,
                        start + 9,
                        0,
                        Permissions::Read,
                        age,
                    ));
                    free.insert(age);
                    ages.insert((age, start));
                }
            }
            0..=59 => {
                let oldest = table
                    .remove_oldest()
                    .map(|mapping| (mapping.age(), mapping.start));
                assert_eq!(oldest, ages.pop_first());
                model.remove(&oldest.unwrap_or_default().1);
            }
            60..=89 => {
                let end = start + 16 * random(20);
                table.remove_within(start, end);
                model.retain(|at, age| {
                    let stays = *at < start || at + 9 > end;
                    if !stays {
                        ages.remove(&(*age, *at));
                    }
                    stays
                });
            }
            _ if step % 50 == 0 => {
                copy.clone_from(&table);
                model_of_copy = contents(&table);
            }
            _ => {
                let found = table
                    .last_at_or_before(start)
                    .map(|(_, mapping)| mapping.start);
                let expected = model.range(..=start).next_back().map(|(start, _)| *start);
                assert_eq!(found, expected);
            }
        }
        assert_eq!(table.len(), model.len());
        if step % 500 == 0 {
            let all: Vec<_> = model.iter().map(|(start, age)| (*start, *age)).collect();
            assert_eq!(contents(&table), all);
            assert_eq!(contents(&copy), model_of_copy);
            assert_eq!(table.oldest.len(), table.leaves.len());
            for pair in table.leaves.windows(2) {
                assert!(
                    pair[0].len + pair[1].len > JOINED,
                    "two leaves could be joined"
                );
            }
        }
    }
}

#[test]
fn insert_that_splits_leaf_joins_half_to_neighbor() {
    let mut table = MappingTable::default();
    let mapping = |start: u64| IovaMapping::new(start, start + 9, 0, Permissions::Read, start);
    for start in 0..256u64 {
        table.insert(mapping(start * 32));
    }
    table.remove_within(133 * 32, u64::MAX);
    let lens =
        |table: &MappingTable| -> Vec<usize> { table.leaves.iter().map(|leaf| leaf.len).collect() };
    assert_eq!(lens(&table), [128, 5]);
    table.insert(mapping(3 * 32 + 16));
    assert_eq!(lens(&table), [65, 69]);
}

#[test]
fn clone_from_changed_table_shares_all_leaves() {
    let mut table = MappingTable::default();
    for start in 0..1000u64 {
        table.insert(IovaMapping::new(
            start * 16,
            start * 16 + 9,
            0,
            Permissions::Read,
            start,
        ));
    }
    let mut copy = table.clone();
    let counts = |table: &MappingTable| -> Vec<usize> {
        table
            .leaves
            .iter()
            .map(|leaf| Arc::strong_count(&leaf.mappings))
            .collect()
    };
    assert_eq!(counts(&table), [2; 8]);
    table.remove_within(16 * 130, 16 * 130 + 9);
    assert_eq!(counts(&table), [2, 1, 2, 2, 2, 2, 2, 2]);
    assert_eq!((table.len(), copy.len()), (999, 1000));
    copy.clone_from(&table);
    assert_eq!(counts(&table), [2; 8]);
    assert_eq!(copy.len(), 999);
    drop(copy);
    assert_eq!(counts(&table), [1; 8]);
}

/// The two tables then share the leaf, with different numbers of mappings.
#[test]
fn clone_from_after_removal_at_end_of_leaf_finds_hole() {
    let mut table = MappingTable::default();
    let page = |number: u64| {
        let start = number * 0x1000;
        IovaMapping::new(start, start + 0xfff, number, Permissions::Read, number)
    };
    (0..1_000).for_each(|number| table.insert(page(number)));
    let covers = |table: &MappingTable, first: u64| {
        let (position, _) = table.last_at_or_before(first).unwrap();
        table.cover(position, first, 999 * 0x1000, Permissions::Read)
    };
    let mut copy = table.clone();
    assert!(covers(&table, 0) && covers(&copy, 0));
    // Not the first leaf, which a search does not skip.
    let last = table.leaves[1].mappings().last().unwrap().start;
    table.remove_within(last, last + 0xfff);
    assert!(Arc::ptr_eq(
        &table.leaves[1].mappings,
        &copy.leaves[1].mappings
    ));
    copy.clone_from(&table);
    for table in [&table, &copy] {
        assert_eq!(
            (covers(table, 0), covers(table, last + 0x1000)),
            (false, true)
        );
    }
}
