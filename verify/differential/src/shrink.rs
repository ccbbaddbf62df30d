//! Shrinks a failing sequence until it is readable.

use serde_json::Value;

use crate::machine::Machine;
use crate::op::Op;
use crate::run::{literal, replay_on, Difference};

/// The maximum number of replays while shrinking.
const MOST_ATTEMPTS: usize = 6000;

struct Shrinker<'a> {
    fails: &'a dyn Fn(&[Op]) -> Option<Box<Difference>>,
    attempts: usize,
    best: Vec<Op>,
    difference: Box<Difference>,
}

impl Shrinker<'_> {
    fn attempt(&mut self, candidate: Vec<Op>) -> bool {
        if self.attempts >= MOST_ATTEMPTS {
            return false;
        }
        self.attempts += 1;
        let Some(difference) = (self.fails)(&candidate) else {
            return false;
        };
        self.best = candidate;
        self.best.truncate(difference.index + 1);
        self.difference = difference;
        true
    }

    /// Delta debugging: removes shorter and shorter runs of operations.
    fn leave_out(&mut self) -> bool {
        let mut changed = false;
        let mut size = self.best.len() / 2;
        while size > 0 {
            let mut start = 0;
            while start < self.best.len() {
                let end = (start + size).min(self.best.len());
                let mut candidate = self.best.clone();
                candidate.drain(start..end);
                if self.attempt(candidate) {
                    changed = true;
                } else {
                    start = end;
                }
            }
            size /= 2;
        }
        changed
    }

    /// Makes numbers smaller and lists shorter, one at a time.
    fn simplify(&mut self) -> bool {
        let mut changed = false;
        for index in 0..self.best.len() {
            let mut place = 0;
            while index < self.best.len() {
                let Ok(value) = serde_json::to_value(&self.best[index]) else {
                    break;
                };
                let Some(candidates) = candidates(&value, place) else {
                    break;
                };
                let better = candidates.into_iter().any(|candidate| {
                    let Ok(op) = serde_json::from_value::<Op>(candidate) else {
                        return false;
                    };
                    let mut ops = self.best.clone();
                    if ops[index] == op {
                        return false;
                    }
                    ops[index] = op;
                    self.attempt(ops)
                });
                changed |= better;
                if !better {
                    place += 1;
                }
            }
        }
        changed
    }
}

/// Returns variants of `value` with a simpler node number `place`, or `None` if that node does not
/// exist.
fn candidates(value: &Value, place: usize) -> Option<Vec<Value>> {
    let mut count = place;
    let options = options_at(value, &mut count)?;
    Some(
        options
            .into_iter()
            .map(|option| {
                let mut changed = value.clone();
                let mut count = place;
                replace_at(&mut changed, &mut count, option);
                changed
            })
            .collect(),
    )
}

fn options_at(value: &Value, count: &mut usize) -> Option<Vec<Value>> {
    if *count == 0 {
        return Some(options(value));
    }
    *count -= 1;
    match value {
        Value::Array(items) => items.iter().find_map(|item| options_at(item, count)),
        Value::Object(fields) => fields.values().find_map(|field| options_at(field, count)),
        _ => None,
    }
}

fn replace_at(value: &mut Value, count: &mut usize, option: Value) -> bool {
    if *count == 0 {
        *value = option;
        return true;
    }
    *count -= 1;
    match value {
        Value::Array(items) => items
            .iter_mut()
            .any(|item| replace_at(item, count, option.clone())),
        Value::Object(fields) => fields
            .values_mut()
            .any(|field| replace_at(field, count, option.clone())),
        _ => false,
    }
}

fn options(value: &Value) -> Vec<Value> {
    match value {
        Value::Bool(true) => vec![Value::Bool(false)],
        Value::Array(items) => {
            let mut shorter: Vec<Value> = Vec::new();
            if items.len() > 3 {
                shorter.push(Value::Array(items[..items.len() / 2].to_vec()));
                shorter.push(Value::Array(items[items.len() / 2..].to_vec()));
            }
            for skipped in 0..items.len() {
                let mut fewer = items.clone();
                fewer.remove(skipped);
                shorter.push(Value::Array(fewer));
            }
            shorter
        }
        Value::Number(number) => {
            let Some(n) = number.as_u64() else {
                return Vec::new();
            };
            let mut smaller = vec![
                0,
                1,
                n / 2,
                n & !0xfff,
                n & !7,
                n.saturating_sub(n / 4),
                n.saturating_sub(1),
            ];
            smaller.retain(|&candidate| candidate < n);
            smaller.dedup();
            smaller.into_iter().map(Value::from).collect()
        }
        _ => Vec::new(),
    }
}

/// Shrinks a failing sequence. Returns the shortest one that still fails, and its difference.
pub fn shrink<A: Machine, B: Machine>(
    ops: Vec<Op>,
    difference: Box<Difference>,
    without: &[String],
) -> (Vec<Op>, Box<Difference>) {
    // Only differences of the same kind count, so that one bug does not hide another.
    let kind = difference.kind();
    let fails = |ops: &[Op]| {
        replay_on::<A, B>(ops, without)
            .err()
            .filter(|found| found.kind() == kind)
    };
    let mut shrinker = Shrinker {
        fails: &fails,
        attempts: 0,
        best: ops,
        difference,
    };
    while shrinker.leave_out() | shrinker.simplify() {}
    (shrinker.best, shrinker.difference)
}

/// Returns the difference, and the sequence as a test for `tests/found.rs`.
pub fn report(ops: &[Op], difference: &Difference) -> String {
    let mut text = format!("{difference}\n#[test]\nfn found_() {{\n    replay(&[\n");
    for op in ops {
        text.push_str(&format!("        {},\n", literal(op)));
    }
    text.push_str("    ]);\n}\n");
    text
}
