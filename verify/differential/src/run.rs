//! Runs operations on two machines, and compares outcomes, memory and dirty bits.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::fmt;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::Once;

use fastrand::Rng;

use crate::context::Context;
use crate::gen;
use crate::machine::{Machine, State};
use crate::model::Prior;
use crate::op::Op;
use crate::out::{Out, PanicText};
use crate::rules::{wants_prior, Case, Facing, Rule, Then, RULES};

/// The number of operations before both machines restart.
const SEQUENCE: usize = 250;

/// The differences in memory and dirty bits.
#[derive(Clone, Debug, Default)]
pub struct StateDiff {
    /// Different regions, lengths, or bitmap sizes.
    pub shape: Option<String>,
    pub regions: Vec<RegionDiff>,
    /// Bits of the `IommuMemory`'s bitmap.
    pub iommu: Vec<BitDiff>,
}

/// The differences in one region.
#[derive(Clone, Debug)]
pub struct RegionDiff {
    /// Its index in [`State`].
    pub region: usize,
    pub base: u64,
    pub len: u64,
    pub bytes: Vec<ByteDiff>,
    pub bits: Vec<BitDiff>,
}

/// A byte that differs.
#[derive(Clone, Copy, Debug)]
pub struct ByteDiff {
    pub offset: usize,
    pub reference: u8,
    pub ours: u8,
}

/// A dirty bit that differs.
#[derive(Clone, Copy, Debug)]
pub struct BitDiff {
    pub index: usize,
    /// Set in ours and clear in the reference, or the reverse.
    pub in_ours: bool,
}

impl StateDiff {
    /// Compares two states.
    pub fn of(reference: &State, ours: &State) -> StateDiff {
        let mut diff = StateDiff {
            iommu: bit_diffs(&reference.iommu, &ours.iommu),
            ..StateDiff::default()
        };
        if reference.iommu.len() != ours.iommu.len() || reference.iommu.last() != ours.iommu.last()
        {
            diff.shape = Some("the bitmap of IommuMemory has another size".into());
        }
        if reference.regions.len() != ours.regions.len() {
            let (a, b) = (reference.regions.len(), ours.regions.len());
            diff.shape = Some(format!("the reference has {a} regions, ours {b}"));
            return diff;
        }
        for (index, (a, b)) in reference.regions.iter().zip(&ours.regions).enumerate() {
            if (a.base, a.len, a.memory.len()) != (b.base, b.len, b.memory.len())
                || (a.bits.len(), a.bits.last()) != (b.bits.len(), b.bits.last())
            {
                diff.shape = Some(format!(
                    "region {index} is {a:x?} in the reference, {b:x?} in ours"
                ));
            }
            let bytes: Vec<_> = a
                .memory
                .differences(&b.memory)
                .into_iter()
                .map(|offset| ByteDiff {
                    offset,
                    reference: a.memory.byte(offset),
                    ours: b.memory.byte(offset),
                })
                .collect();
            let bits = if a.bits == b.bits {
                Vec::new()
            } else {
                bit_diffs(&a.bits, &b.bits)
            };
            if !bytes.is_empty() || !bits.is_empty() {
                diff.regions.push(RegionDiff {
                    region: index,
                    base: a.base,
                    len: a.len,
                    bytes,
                    bits,
                });
            }
        }
        diff
    }

    /// Returns whether nothing differs.
    pub fn is_nothing(&self) -> bool {
        self.shape.is_none() && self.regions.is_empty() && self.iommu.is_empty()
    }
}

fn bit_diffs(reference: &[u64], ours: &[u64]) -> Vec<BitDiff> {
    let words = reference.len().min(ours.len()).saturating_sub(1);
    (0..words * 64)
        .filter(|i| (reference[i / 64] ^ ours[i / 64]) >> (i % 64) & 1 == 1)
        .map(|index| BitDiff {
            index,
            in_ours: ours[index / 64] >> (index % 64) & 1 == 1,
        })
        .collect()
}

impl fmt::Display for StateDiff {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 6;
        if self.is_nothing() {
            return f.write_str("  memory and dirty bits agree\n");
        }
        if let Some(shape) = &self.shape {
            writeln!(f, "  {shape}")?;
        }
        for region in &self.regions {
            writeln!(
                f,
                "  region {} at {:#x}, {:#x} bytes:",
                region.region, region.base, region.len
            )?;
            for byte in region.bytes.iter().take(SHOWN) {
                let ByteDiff {
                    offset,
                    reference,
                    ours,
                } = byte;
                writeln!(
                    f,
                    "    byte {offset:#x}: reference {reference:#04x}, ours {ours:#04x}"
                )?;
            }
            if region.bytes.len() > SHOWN {
                let last = region.bytes.last().map_or(0, |byte| byte.offset);
                writeln!(
                    f,
                    "    … {} bytes, the last at {last:#x}",
                    region.bytes.len()
                )?;
            }
            show_bits(f, &region.bits, SHOWN)?;
        }
        if !self.iommu.is_empty() {
            writeln!(f, "  bitmap of IommuMemory:")?;
            show_bits(f, &self.iommu, SHOWN)?;
        }
        Ok(())
    }
}

fn show_bits(f: &mut fmt::Formatter<'_>, bits: &[BitDiff], shown: usize) -> fmt::Result {
    for bit in bits.iter().take(shown) {
        let (set, clear) = if bit.in_ours {
            ("ours", "the reference")
        } else {
            ("the reference", "ours")
        };
        writeln!(
            f,
            "    dirty bit {}: set in {set}, clear in {clear}",
            bit.index
        )?;
    }
    match bits.last() {
        Some(last) if bits.len() > shown => {
            writeln!(f, "    … {} bits, the last is {}", bits.len(), last.index)
        }
        _ => Ok(()),
    }
}

/// A difference that no rule allows.
#[derive(Clone, Debug)]
pub struct Difference {
    /// The index of the operation in its sequence.
    pub index: usize,
    pub op: Op,
    pub reference: Out,
    pub ours: Out,
    pub diff: StateDiff,
}

impl Difference {
    /// Returns the kind of the difference. Many differences have the same kind.
    pub fn kind(&self) -> String {
        let place = match &self.diff {
            diff if diff.shape.is_some() => "; another shape",
            diff if diff.regions.iter().any(|region| !region.bytes.is_empty()) => "; bytes differ",
            diff if !diff.is_nothing() => "; dirty bits differ",
            _ => "",
        };
        format!(
            "{}: reference {}, ours {}{place}",
            name(&self.op),
            class(&self.reference),
            class(&self.ours)
        )
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "operation {}: {}", self.index, literal(&self.op))?;
        writeln!(f, "  reference: {}", literal(&self.reference))?;
        writeln!(f, "  ours:      {}", literal(&self.ours))?;
        write!(f, "{}", self.diff)
    }
}

/// Formats the value as one line of Rust, with hexadecimal numbers.
pub fn literal(value: &impl fmt::Debug) -> String {
    let mut line = String::new();
    for part in format!("{value:#x?}").lines().map(str::trim) {
        let closes = part.starts_with([']', ')', '}']);
        if closes && line.ends_with(',') {
            line.pop();
        }
        if (line.ends_with([',', '{']) || part.starts_with('}')) && !line.ends_with("{}") {
            line.push(' ');
        }
        line.push_str(part);
    }
    line
}

/// The uses of each rule.
pub type Fired = BTreeMap<&'static str, u64>;

/// Two machines that run step by step.
pub struct Pair<A, B> {
    reference: A,
    ours: B,
    context: Context,
    without: Vec<String>,
    pub fired: Fired,
}

impl<A: Machine, B: Machine> Pair<A, B> {
    /// Creates two empty machines, without the rules in `without`.
    pub fn new(without: &[String]) -> Self {
        Pair {
            reference: A::fresh(),
            ours: B::fresh(),
            context: Context::default(),
            without: without.to_vec(),
            fired: Fired::new(),
        }
    }

    /// Returns the tracked state.
    pub fn context(&self) -> &Context {
        &self.context
    }

    fn restart(&mut self) {
        self.reference = A::fresh();
        self.ours = B::fresh();
        self.context = Context::default();
    }

    /// Runs the operation on both.
    ///
    /// # Errors
    ///
    /// Returns a difference that no rule allows.
    pub fn step(&mut self, index: usize, op: &Op) -> Result<(), Box<Difference>> {
        let prior = wants_prior(op, &self.context).then(|| Prior::of(&self.reference.state()));
        let reference = guarded(&mut self.reference, op);
        let ours = guarded(&mut self.ours, op);
        let (state_a, state_b) = (self.reference.state(), self.ours.state());
        let diff = StateDiff::of(&state_a, &state_b);
        if reference != ours || !diff.is_nothing() {
            let facts = Facing {
                reference: &self.reference,
                ours: RefCell::new(&mut self.ours),
                prior,
                state: &state_b,
                before: &self.context,
            };
            let case = Case {
                op,
                before: &self.context,
                reference: &reference,
                ours: &ours,
                diff: &diff,
                facts: &facts,
            };
            let allowed = RULES
                .iter()
                .filter(|rule| !self.without.iter().any(|row| row == rule.row))
                .find_map(|rule: &Rule| (rule.allows)(&case).map(|then| (rule.row, then)));
            let Some((row, then)) = allowed else {
                return Err(Box::new(Difference {
                    index,
                    op: op.clone(),
                    reference,
                    ours,
                    diff,
                }));
            };
            *self.fired.entry(row).or_default() += 1;
            match then {
                Then::Restart => {
                    self.restart();
                    return Ok(());
                }
                Then::Sync | Then::ForgetMappings { .. } if diff.shape.is_some() => {
                    self.restart();
                    return Ok(());
                }
                Then::Sync => {
                    for region in &diff.regions {
                        let index = region.region;
                        let (mut to, from) =
                            (state_a.regions[index].memory, state_b.regions[index].memory);
                        to.copy_from(&from);
                        self.reference.set_bits(index, &state_b.regions[index].bits);
                    }
                    if !diff.iommu.is_empty() {
                        self.reference.set_iommu_bits(&state_b.iommu);
                    }
                }
                Then::ForgetMappings { alone } => {
                    self.reference.forget_mappings(alone);
                    self.ours.forget_mappings(alone);
                    let model = if alone {
                        &mut self.context.alone
                    } else {
                        &mut self.context.tlb
                    };
                    model.mappings.clear();
                    return Ok(());
                }
            }
        }
        let extents = self.ours.extents();
        self.context.note(op, &ours, extents);
        Ok(())
    }
}

/// Returns the kind of an operation.
fn name(op: &Op) -> String {
    fn first(value: &impl fmt::Debug) -> String {
        format!("{value:?}")
            .chars()
            .take_while(|c| c.is_alphanumeric())
            .collect()
    }
    match op {
        Op::Touch { on, access, .. } => format!("{} {}", first(on), first(access)),
        Op::Ask { on, question } => format!("{} {}", first(on), first(question)),
        Op::AskRegion { question, .. } => first(question),
        Op::Volatile { act, .. } => format!("slice {}", first(act)),
        Op::Bits { act, .. } => first(act),
        Op::Tlb { act, .. } => first(act),
        Op::Calculate { what, .. } => first(what),
        Op::Value { what, .. } => first(what),
        Op::Map(spec) => first(&spec.how),
        op => first(op),
    }
}

fn class(out: &Out) -> String {
    match out {
        Out::All(parts) => match parts.first() {
            Some(first @ (Out::Failed(_) | Out::Panicked(_) | Out::All(_))) => class(first),
            _ => "ok".into(),
        },
        Out::Failed(fault) => format!("{fault:?}")
            .chars()
            .take_while(|c| c.is_alphanumeric())
            .collect(),
        Out::Panicked(_) => "panic".into(),
        Out::NotApplicable => "not applicable".into(),
        Out::Absent => "none".into(),
        _ => "ok".into(),
    }
}

thread_local! {
    static CATCHING: Cell<bool> = const { Cell::new(false) };
    static LAST_PANIC: RefCell<String> = const { RefCell::new(String::new()) };
}

fn install_hook() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let usual = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if CATCHING.get() {
                LAST_PANIC.set(info.to_string().replace('\n', " "));
            } else {
                usual(info);
            }
        }));
    });
}

/// Runs the operation, and turns a panic into an outcome.
fn guarded(machine: &mut impl Machine, op: &Op) -> Out {
    install_hook();
    CATCHING.set(true);
    let out = catch_unwind(AssertUnwindSafe(|| machine.apply(op)));
    CATCHING.set(false);
    out.unwrap_or_else(|_| Out::Panicked(PanicText(LAST_PANIC.take())))
}

/// Runs the operations on a fresh pair.
///
/// # Errors
///
/// Returns the first difference that no rule allows.
pub fn replay_on<A: Machine, B: Machine>(
    ops: &[Op],
    without: &[String],
) -> Result<Fired, Box<Difference>> {
    let mut pair = Pair::<A, B>::new(without);
    for (index, op) in ops.iter().enumerate() {
        pair.step(index, op)?;
    }
    Ok(pair.fired)
}

/// A sequence, and the difference at its end.
pub type Failure = (Vec<Op>, Box<Difference>);

/// A long run.
pub struct Soak {
    pub seed: u64,
    pub ops: u64,
    pub without: Vec<String>,
    pub deadline: Option<std::time::Instant>,
}

/// The result of a long run.
#[derive(Debug, Default)]
pub struct Seen {
    pub ops: u64,
    pub fired: Fired,
}

impl Soak {
    /// Runs until the end, or until the first difference.
    ///
    /// # Errors
    ///
    /// Returns the sequence that led to the first difference that no rule allows. It is not shrunk.
    pub fn run<A: Machine, B: Machine>(&self) -> Result<Seen, Failure> {
        let mut rng = Rng::with_seed(self.seed);
        let mut seen = Seen::default();
        while seen.ops < self.ops
            && self
                .deadline
                .is_none_or(|end| std::time::Instant::now() < end)
        {
            let mut pair = Pair::<A, B>::new(&self.without);
            let mut done: Vec<Op> = Vec::with_capacity(SEQUENCE);
            for index in 0..SEQUENCE {
                let op = match index {
                    0 => gen::first(&mut rng, pair.context()),
                    _ => gen::next(&mut rng, pair.context()),
                };
                done.push(op);
                seen.ops += 1;
                if let Err(difference) = pair.step(index, &done[index]) {
                    return Err((done, difference));
                }
            }
            for (row, times) in pair.fired {
                *seen.fired.entry(row).or_default() += times;
            }
        }
        Ok(seen)
    }
}
