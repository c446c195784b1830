//! Fuses elementwise ops: what stood one by one runs strip by strip, so that what is between them stays in the nearest cache.
//!
//! A group takes pure ops that cannot fault, of tiles of one size, from one block; it runs where its first result is needed. What
//! stands between may come before it, for a group sees no memory. The bits are those of the ops one by one: both run the loops of
//! [`lanes`]. Runs that are observed take the ops one by one ([`Observer::WATCHES`](super::Observer::WATCHES)).

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use super::{
    exec::Reg,
    lanes::{self, Arch},
    liveness::{mark, outer_uses},
    program::{Code, Inst, Op, Slot, Use},
    tile::{Binary, Compare, Conversion, Scalar, Tile, Unary},
};
use crate::element::Element;

/// Elements that a group takes at once.
const STRIP: usize = 1024;

/// What a register holds, if it is a tile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct TileType {
    pub(super) element: Element,
    pub(super) len: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Kind {
    Float,
    Int,
    Pred,
}

impl Kind {
    fn of(element: Element) -> Self {
        match element {
            Element::Pred => Self::Pred,
            element if element.is_float() => Self::Float,
            _ => Self::Int,
        }
    }
}

/// Where a strip is.
#[derive(Clone, Copy, Debug)]
enum Place {
    /// In an operand of the group, a tile of the group's size.
    Operand(u32),
    /// In a strip of the group's own.
    Strip(u32),
}

/// How a tile becomes a larger one: `repeats` times after each other, each run of `run` elements.
#[derive(Clone, Copy, Debug)]
struct Spread {
    repeats: usize,
    run: usize,
}

/// An op on strips; the kinds of its operands are known from it.
#[derive(Clone, Copy, Debug)]
enum Action {
    UnaryFloat(Unary, Element),
    UnaryInt(Unary, Element),
    BinaryFloat(Binary, Element),
    BinaryInt(Binary, Element),
    BinaryPred(Binary),
    CompareFloat(Compare),
    CompareInt(Compare),
    ComparePred(Compare),
    Weird,
    /// Condition, then, otherwise.
    Select(Kind),
    Round(Element),
    FloatToInt(Conversion),
    FloatToPred,
    IntToFloat(Conversion),
    IntToInt(Conversion),
    IntToPred,
    /// To what `true` becomes.
    PredToFloat(f32),
    PredToInt(i32),
    FloatBits,
    BitsFloat,
    /// Of the operand with this number, which is smaller than the group.
    Spread(Kind, u32, Spread),
}

impl Action {
    /// What it makes.
    fn kind(self) -> Kind {
        match self {
            Self::UnaryFloat(..) | Self::BinaryFloat(..) | Self::Round(_) | Self::IntToFloat(_) => Kind::Float,
            Self::PredToFloat(_) | Self::BitsFloat => Kind::Float,
            Self::UnaryInt(..) | Self::BinaryInt(..) | Self::FloatToInt(_) | Self::IntToInt(_) => Kind::Int,
            Self::PredToInt(_) | Self::FloatBits => Kind::Int,
            Self::BinaryPred(_) | Self::CompareFloat(_) | Self::CompareInt(_) | Self::ComparePred(_) => Kind::Pred,
            Self::Weird | Self::FloatToPred | Self::IntToPred => Kind::Pred,
            Self::Select(kind) | Self::Spread(kind, ..) => kind,
        }
    }
}

#[derive(Clone, Debug)]
struct Step {
    action: Action,
    operands: [Place; 3],
    to: u32,
}

/// Elementwise ops that run together.
#[derive(Clone, Debug)]
pub(super) struct Fused {
    len: usize,
    /// How many ops it stands for.
    pub(super) ops: u64,
    /// Strips that hold one number throughout: one that is known, or an operand.
    constants: Vec<(u32, Scalar)>,
    scalars: Vec<(u32, Kind, usize)>,
    steps: Vec<Step>,
    results: Vec<(Kind, Place)>,
    /// Operands that are spread: no result takes their memory.
    spread: Vec<usize>,
    /// How many strips of each kind.
    strips: [u32; 3],
}

// ---- making groups ----

/// A value of a group: an operand, or what an action made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Value {
    Operand(u32),
    Made(u32),
    Constant(u32),
    Scalar(u32),
}

/// A group that ops are still added to.
struct Open {
    len: usize,
    origin: u32,
    ops: u64,
    operands: Vec<Slot>,
    /// What the group's registers hold.
    values: HashMap<Slot, (Value, Kind)>,
    /// Registers that ops of the group define, in their order.
    defined: Vec<Slot>,
    /// How often ops of the group read each register.
    reads: HashMap<Slot, usize>,
    actions: Vec<(Action, Vec<Value>)>,
    constants: Vec<(Scalar, Kind)>,
    scalars: Vec<(u32, Kind)>,
    spread: Vec<usize>,
}

/// What a block's leaves are: cheap to make again wherever they are needed.
#[derive(Clone)]
enum Leaf {
    Constant(Scalar),
    /// A scalar register in every element.
    Splat(Slot),
    Spread(Slot, Spread),
}

/// The same code with its elementwise ops in groups. `types` are those of its registers.
pub(super) fn fuse(code: &Code, types: &[Option<TileType>]) -> Code {
    let mut fused = Fuser { types }.block(code, &HashMap::new());
    mark(&mut fused);
    fused
}

struct Fuser<'t> {
    types: &'t [Option<TileType>],
}

impl Fuser<'_> {
    fn tile(&self, slot: Slot) -> Option<TileType> {
        self.types[slot as usize]
    }

    /// `outer`: constants of the blocks around this one.
    fn block(&self, code: &Code, outer: &HashMap<Slot, Leaf>) -> Code {
        let mut leaves = outer.clone();
        let mut block = Block { body: vec![], open: vec![], reads: HashMap::new(), taken: HashMap::new() };
        let all = code.body.iter().flat_map(reads).chain(code.yields.iter().map(|read| read.slot));
        all.for_each(|slot| *block.reads.entry(slot).or_default() += 1);
        for inst in &code.body {
            if self.add(inst, &leaves, &mut block) {
                continue;
            }
            reads(inst).into_iter().for_each(|slot| block.close_for(slot));
            if let Some(leaf) = self.leaf(inst) {
                leaves.insert(inst.results[0], leaf);
            }
            let mut inst = inst.clone();
            if !inst.codes.is_empty() {
                let constants = leaves.iter().filter(|(_, leaf)| matches!(leaf, Leaf::Constant(_)));
                let constants = constants.map(|(&slot, leaf)| (slot, leaf.clone())).collect();
                inst.codes = inst.codes.iter().map(|code| self.block(code, &constants)).collect();
            }
            block.body.push(inst);
        }
        while !block.open.is_empty() {
            block.close(0);
        }
        // What only groups read they made themselves.
        let Block { mut body, reads, taken, .. } = block;
        let made_again = |slot: &Slot| taken.get(slot).is_some_and(|taken| reads.get(slot) == Some(taken));
        body.retain(|inst| !matches!(inst.op, Op::Broadcast { .. }) || !made_again(&inst.results[0]));
        Code { parameters: code.parameters.clone(), body, yields: code.yields.clone() }
    }

    fn leaf(&self, inst: &Inst) -> Option<Leaf> {
        match &inst.op {
            Op::Constant(tile) => splat_of(tile).map(Leaf::Constant),
            Op::Broadcast { from, to } => match self.tile(inst.operands[0].slot) {
                None => Some(Leaf::Splat(inst.operands[0].slot)),
                Some(_) => spread(from, to).map(|spread| Leaf::Spread(inst.operands[0].slot, spread)),
            },
            _ => None,
        }
    }

    /// Adds an op to the group of its size, if it can be in one.
    fn add(&self, inst: &Inst, leaves: &HashMap<Slot, Leaf>, block: &mut Block) -> bool {
        let (Some(made), Some(result)) = (self.made(inst), inst.results.first()) else { return false };
        let Some(TileType { element, len }) = self.tile(*result) else { return false };
        let mut at = block.open.iter().position(|open| open.len == len);
        // A new name is worth no group of its own.
        if matches!(made, Made::Same) && at.is_none_or(|at| !block.open[at].defined.contains(&inst.operands[0].slot)) {
            return false;
        }
        let at = *at.get_or_insert_with(|| {
            block.open.push(Open::new(len, inst.origin));
            block.open.len() - 1
        });
        let open = &mut block.open[at];
        open.ops += 1;
        let mut values = Vec::with_capacity(inst.operands.len());
        for &Use { slot, .. } in &inst.operands {
            let leaf = leaves.get(&slot);
            if matches!(leaf, Some(Leaf::Splat(_) | Leaf::Spread(..))) {
                let taken = block.taken.entry(slot).or_default();
                *taken += 1;
                open.ops += u64::from(*taken == block.reads[&slot]);
            }
            *open.reads.entry(slot).or_default() += 1;
            let kind = Kind::of(self.tile(slot).map_or(element, |tile| tile.element));
            values.push(open.value(slot, kind, leaf));
        }
        let value = match made {
            Made::Same => values[0],
            Made::Action(action) => open.act(action, values),
        };
        open.values.insert(*result, (value, Kind::of(element)));
        open.defined.push(*result);
        true
    }

    /// What an op is in a group; `None` where it cannot be in one.
    fn made(&self, inst: &Inst) -> Option<Made> {
        let result = self.tile(*inst.results.first()?)?;
        let operands = inst.operands.iter().map(|read| self.tile(read.slot)).collect::<Option<Vec<TileType>>>()?;
        let kind = Kind::of(operands.first()?.element);
        Some(Made::Action(match &inst.op {
            Op::Same => return Some(Made::Same),
            Op::Unary { op, element } => match kind {
                Kind::Float => Action::UnaryFloat(*op, *element),
                Kind::Int => Action::UnaryInt(*op, *element),
                Kind::Pred => return Some(Made::Same),
            },
            Op::Binary { op, element } => match kind {
                Kind::Float => Action::BinaryFloat(*op, *element),
                // It may divide by zero.
                Kind::Int if op.divides() => return None,
                Kind::Int => Action::BinaryInt(*op, *element),
                Kind::Pred => Action::BinaryPred(*op),
            },
            Op::Compare(op) => match kind {
                Kind::Float => Action::CompareFloat(*op),
                Kind::Int => Action::CompareInt(*op),
                Kind::Pred => Action::ComparePred(*op),
            },
            Op::Weird if kind == Kind::Float => Action::Weird,
            Op::Select if kind == Kind::Pred => Action::Select(Kind::of(result.element)),
            Op::Convert(how) => match (kind, Kind::of(how.to)) {
                // f32 holds what is narrower as it is.
                (Kind::Float, Kind::Float) if how.to == Element::F32 => return Some(Made::Same),
                (Kind::Float, Kind::Float) => Action::Round(how.to),
                (Kind::Float, Kind::Int) => Action::FloatToInt(*how),
                (Kind::Float, Kind::Pred) => Action::FloatToPred,
                (Kind::Int, Kind::Float) => Action::IntToFloat(*how),
                (Kind::Int, Kind::Int) => Action::IntToInt(*how),
                (Kind::Int, Kind::Pred) => Action::IntToPred,
                (Kind::Pred, Kind::Float) => Action::PredToFloat(if how.signed { -1.0 } else { 1.0 }),
                (Kind::Pred, Kind::Int) => Action::PredToInt(if how.signed { -1 } else { 1 }),
                (Kind::Pred, Kind::Pred) => return Some(Made::Same),
            },
            Op::Bitcast { from: Element::F32, to: Element::I32, .. } => Action::FloatBits,
            Op::Bitcast { from: Element::I32, to: Element::F32, .. } => Action::BitsFloat,
            _ => return None,
        }))
    }
}

/// What an op is in a group.
enum Made {
    /// What it gets, under another name.
    Same,
    Action(Action),
}

/// Every register that an instruction reads, its regions included.
fn reads(inst: &Inst) -> Vec<Slot> {
    let mut all: HashSet<Slot> = HashSet::new();
    inst.codes.iter().for_each(|code| outer_uses(code, &mut all));
    inst.operands.iter().map(|read| read.slot).chain(all).collect()
}

/// The number that all elements are.
fn splat_of(tile: &Tile) -> Option<Scalar> {
    fn same<T: Copy>(x: &[T], bits: impl Fn(T) -> u32) -> bool {
        x.split_first().is_some_and(|(&first, rest)| rest.iter().all(|&other| bits(other) == bits(first)))
    }
    let same = match tile {
        Tile::Float(x) => same(x, f32::to_bits),
        Tile::Int(x) => same(x, i32::cast_unsigned),
        Tile::Pred(x) => same(x, u32::from),
    };
    same.then(|| tile.get(0))
}

/// How a tile of sizes `from` becomes one of sizes `to`, where the dimensions that grow follow each other.
fn spread(from: &[usize], to: &[usize]) -> Option<Spread> {
    let lead = to.len().checked_sub(from.len())?;
    let size = |dim: usize| dim.checked_sub(lead).map_or(1, |dim| from[dim]);
    let grows = |dim: &usize| size(*dim) != to[*dim];
    let (Some(first), Some(last)) = ((0..to.len()).find(grows), (0..to.len()).rfind(grows)) else {
        return Some(Spread { repeats: 1, run: to.iter().product() });
    };
    let together = (first..=last).all(|dim| size(dim) == 1);
    let sizes = |dims: std::ops::Range<usize>| to[dims].iter().product();
    together.then(|| Spread { repeats: sizes(first..last + 1), run: sizes(last + 1..to.len()) })
}

impl Open {
    fn new(len: usize, origin: u32) -> Self {
        Self {
            len,
            origin,
            ops: 0,
            operands: vec![],
            values: HashMap::new(),
            defined: vec![],
            reads: HashMap::new(),
            actions: vec![],
            constants: vec![],
            scalars: vec![],
            spread: vec![],
        }
    }

    fn operand(&mut self, slot: Slot) -> u32 {
        let found = self.operands.iter().position(|&operand| operand == slot);
        found.unwrap_or_else(|| {
            self.operands.push(slot);
            self.operands.len() - 1
        }) as u32
    }

    /// What a register is in this group; a leaf is made anew in it.
    fn value(&mut self, slot: Slot, kind: Kind, leaf: Option<&Leaf>) -> Value {
        if let Some((value, _)) = self.values.get(&slot) {
            return *value;
        }
        let value = match leaf {
            Some(Leaf::Constant(scalar)) => {
                self.constants.push((*scalar, kind));
                Value::Constant(self.constants.len() as u32 - 1)
            }
            Some(Leaf::Splat(scalar)) => {
                let operand = self.operand(*scalar);
                self.scalars.push((operand, kind));
                Value::Scalar(self.scalars.len() as u32 - 1)
            }
            Some(Leaf::Spread(tile, spread)) => {
                let operand = self.operand(*tile);
                self.spread.push(operand as usize);
                self.act(Action::Spread(kind, operand, *spread), vec![])
            }
            None => Value::Operand(self.operand(slot)),
        };
        self.values.insert(slot, (value, kind));
        value
    }

    fn act(&mut self, action: Action, operands: Vec<Value>) -> Value {
        self.actions.push((action, operands));
        Value::Made(self.actions.len() as u32 - 1)
    }

    /// The group as an instruction. `results`: the registers that others read.
    fn finish(self, results: Vec<Slot>) -> Inst {
        let made: Vec<(Value, Kind)> = results.iter().map(|slot| self.values[slot]).collect();
        // After which action each value is read for the last time.
        let mut last: HashMap<Value, usize> = HashMap::new();
        for (at, (_, operands)) in self.actions.iter().enumerate() {
            last.extend(operands.iter().map(|&value| (value, at)));
        }
        last.extend(made.iter().map(|&(value, _)| (value, usize::MAX)));
        let mut strips = [0_u32; 3];
        let mut free: [Vec<u32>; 3] = Default::default();
        let mut places: HashMap<Value, Place> = HashMap::new();
        let mut fresh = |kind: Kind| {
            strips[kind as usize] += 1;
            strips[kind as usize] - 1
        };
        let constants = self.constants.iter().enumerate().map(|(at, &(scalar, kind))| {
            let strip = fresh(kind);
            places.insert(Value::Constant(at as u32), Place::Strip(strip));
            (strip, scalar)
        });
        let constants = constants.collect();
        let scalars = self.scalars.iter().enumerate().map(|(at, &(operand, kind))| {
            let strip = fresh(kind);
            places.insert(Value::Scalar(at as u32), Place::Strip(strip));
            (strip, kind, operand as usize)
        });
        let scalars = scalars.collect();
        let place = |places: &HashMap<Value, Place>, value: Value| match value {
            Value::Operand(at) => Place::Operand(at),
            value => places[&value],
        };
        let kinds: Vec<Kind> = self.actions.iter().map(|(action, _)| action.kind()).collect();
        let mut steps = Vec::with_capacity(self.actions.len());
        for (at, (action, operands)) in self.actions.iter().enumerate() {
            let mut from = [Place::Operand(0); 3];
            operands.iter().zip(&mut from).for_each(|(&value, from)| *from = place(&places, value));
            let kind = kinds[at];
            let to = free[kind as usize].pop().unwrap_or_else(|| fresh(kind));
            places.insert(Value::Made(at as u32), Place::Strip(to));
            steps.push(Step { action: *action, operands: from, to });
            let mut dying: Vec<Value> = operands.clone();
            dying.push(Value::Made(at as u32));
            dying.dedup();
            for (index, &value) in dying.iter().enumerate() {
                let Value::Made(made) = value else { continue };
                let dies = last.get(&value).is_none_or(|&last| last == at);
                if dies && !dying[..index].contains(&value) {
                    let Place::Strip(strip) = places[&value] else { continue };
                    free[kinds[made as usize] as usize].push(strip);
                }
            }
        }
        let made = made.into_iter().map(|(value, kind)| (kind, place(&places, value))).collect();
        let operands = self.operands.iter().map(|&slot| Use { slot, last: false }).collect();
        let Self { len, ops, spread, origin, .. } = self;
        let fused = Fused { len, ops, constants, scalars, steps, results: made, spread, strips };
        Inst { op: Op::Fused(Box::new(fused)), pure: true, operands, results, codes: vec![], kills: vec![], origin }
    }
}

/// A block that is being rewritten.
struct Block {
    body: Vec<Inst>,
    open: Vec<Open>,
    /// How often each register is read in this block, and how often of that by groups that make it anew.
    reads: HashMap<Slot, usize>,
    taken: HashMap<Slot, usize>,
}

impl Block {
    /// Ends the group that makes `slot`.
    fn close_for(&mut self, slot: Slot) {
        if let Some(at) = self.open.iter().position(|open| open.defined.contains(&slot)) {
            self.close(at);
        }
    }

    fn close(&mut self, at: usize) {
        let open = self.open.remove(at);
        // Of the others nobody else wants to know.
        let wanted = |slot: &&Slot| self.reads.get(slot) > open.reads.get(slot);
        let results = open.defined.iter().filter(wanted).copied().collect();
        self.body.push(open.finish(results));
    }
}

// ---- running them ----

/// Strips that groups work in, one group after another.
#[derive(Debug, Default)]
pub(super) struct Strips {
    floats: Vec<Vec<f32>>,
    ints: Vec<Vec<i32>>,
    preds: Vec<Vec<bool>>,
}

/// What strips are made of.
trait Lane: Copy + Default {
    fn of(tile: &Tile) -> Option<&Arc<Vec<Self>>>;
    fn of_mut(tile: &mut Tile) -> Option<&mut Arc<Vec<Self>>>;
    fn tile(elements: Vec<Self>) -> Tile;
    fn scalar(scalar: Scalar) -> Self;
    fn strips(strips: &Strips) -> &Vec<Vec<Self>>;
    fn strips_mut(strips: &mut Strips) -> &mut Vec<Vec<Self>>;
}

macro_rules! lane {
    ($type:ty, $variant:ident, $field:ident, $scalar:pat => $value:expr) => {
        impl Lane for $type {
            fn of(tile: &Tile) -> Option<&Arc<Vec<Self>>> {
                if let Tile::$variant(x) = tile { Some(x) } else { None }
            }

            fn of_mut(tile: &mut Tile) -> Option<&mut Arc<Vec<Self>>> {
                if let Tile::$variant(x) = tile { Some(x) } else { None }
            }

            fn tile(elements: Vec<Self>) -> Tile {
                Tile::$variant(Arc::new(elements))
            }

            fn scalar(scalar: Scalar) -> Self {
                let $scalar = scalar else {
                    unreachable!("decoding gives a splat its element's scalar, not {scalar:?}")
                };
                $value
            }

            fn strips(strips: &Strips) -> &Vec<Vec<Self>> {
                &strips.$field
            }

            fn strips_mut(strips: &mut Strips) -> &mut Vec<Vec<Self>> {
                &mut strips.$field
            }
        }
    };
}

lane!(f32, Float, floats, Scalar::Float(x) => x);
lane!(i32, Int, ints, Scalar::Int(x) => x);
lane!(bool, Pred, preds, Scalar::Pred(x) => x);

macro_rules! by_kind {
    ($kind:expr, $function:ident($($argument:expr),*)) => {
        match $kind {
            Kind::Float => $function::<f32>($($argument),*),
            Kind::Int => $function::<i32>($($argument),*),
            Kind::Pred => $function::<bool>($($argument),*),
        }
    };
}

/// A strip of a tile.
fn of_operand<T: Lane>(operand: &Reg) -> &Arc<Vec<T>> {
    match operand {
        Reg::Tile(tile) => T::of(tile).expect("decoding gives a tile of its kind"),
        other => unreachable!("decoding gives a tile, not {other:?}"),
    }
}

/// The strip that is worked on: `len` elements from `at`.
#[derive(Clone, Copy)]
struct Window<'w> {
    operands: &'w [Reg],
    strips: &'w Strips,
    at: usize,
    len: usize,
}

impl<'w> Window<'w> {
    fn get<T: Lane>(self, place: Place) -> &'w [T] {
        match place {
            Place::Operand(operand) => &of_operand::<T>(&self.operands[operand as usize])[self.at..][..self.len],
            Place::Strip(strip) => &T::strips(self.strips)[strip as usize][..self.len],
        }
    }
}

fn make_strips<T: Lane>(strips: &mut Strips, count: u32) {
    let strips = T::strips_mut(strips);
    strips.resize_with(strips.len().max(count as usize), || vec![T::default(); STRIP]);
}

fn fill<T: Lane>(strips: &mut Strips, strip: u32, scalar: Scalar, len: usize) {
    T::strips_mut(strips)[strip as usize][..len].fill(T::scalar(scalar));
}

/// Elements `at ..` of what `tile` becomes.
fn spread_strip<T: Lane>(tile: &[T], Spread { repeats, run }: Spread, at: usize, out: &mut [T]) {
    let mut done = 0;
    while done < out.len() {
        let index = at + done;
        // Of `repeats` runs of the same elements, one follows the other; where a run is one element, all are the same.
        let (block, within) = (index / (repeats * run), index % run);
        if run == 1 {
            let count = ((block + 1) * repeats - index).min(out.len() - done);
            out[done..done + count].fill(tile[block]);
            done += count;
        } else {
            let count = (run - within).min(out.len() - done);
            out[done..done + count].copy_from_slice(&tile[block * run + within..][..count]);
            done += count;
        }
    }
}

/// Where a result is collected.
enum Target {
    /// In the memory of this operand, which dies.
    Operand(usize),
    Floats(Vec<f32>),
    Ints(Vec<i32>),
    Preds(Vec<bool>),
    /// It is this operand, or an earlier result.
    SameAsOperand(usize),
    SameAsResult(usize),
}

/// Whether nobody else has the memory of an operand that is a tile of `len` elements.
fn is_free<T: Lane>(operand: &mut Reg, len: usize) -> bool {
    let Reg::Tile(tile) = operand else { return false };
    T::of_mut(tile).and_then(Arc::get_mut).is_some_and(|elements| elements.len() == len)
}

fn put<T: Lane>(operand: &mut Reg, at: usize, strip: &[T]) {
    let Reg::Tile(tile) = operand else { return };
    if let Some(elements) = T::of_mut(tile).and_then(Arc::get_mut) {
        elements[at..at + strip.len()].copy_from_slice(strip);
    }
}

impl Fused {
    /// Runs the group on its operands; its results.
    pub(super) fn run(&self, arch: Arch, mut operands: Vec<Reg>, strips: &mut Strips) -> Vec<Reg> {
        let [floats, ints, preds] = self.strips;
        make_strips::<f32>(strips, floats);
        make_strips::<i32>(strips, ints);
        make_strips::<bool>(strips, preds);
        let first = STRIP.min(self.len);
        for &(strip, scalar) in &self.constants {
            match scalar {
                Scalar::Float(_) => fill::<f32>(strips, strip, scalar, first),
                Scalar::Int(_) => fill::<i32>(strips, strip, scalar, first),
                Scalar::Pred(_) => fill::<bool>(strips, strip, scalar, first),
            }
        }
        for &(strip, kind, operand) in &self.scalars {
            let Reg::Scalar(scalar) = operands[operand] else { unreachable!("decoding gives a scalar to splat") };
            by_kind!(kind, fill(strips, strip, scalar, first));
        }
        let mut targets = self.targets(&mut operands);
        let mut at = 0;
        while at < self.len {
            let len = STRIP.min(self.len - at);
            for step in &self.steps {
                step.run(arch, &operands, strips, at, len);
            }
            for (target, &(kind, place)) in targets.iter_mut().zip(&self.results) {
                let Place::Strip(strip) = place else { continue };
                let strip = strip as usize;
                match (target, kind) {
                    (Target::Floats(all), _) => all.extend_from_slice(&strips.floats[strip][..len]),
                    (Target::Ints(all), _) => all.extend_from_slice(&strips.ints[strip][..len]),
                    (Target::Preds(all), _) => all.extend_from_slice(&strips.preds[strip][..len]),
                    (Target::Operand(operand), Kind::Float) => {
                        put(&mut operands[*operand], at, &strips.floats[strip][..len])
                    }
                    (Target::Operand(operand), Kind::Int) => {
                        put(&mut operands[*operand], at, &strips.ints[strip][..len])
                    }
                    (Target::Operand(operand), Kind::Pred) => {
                        put(&mut operands[*operand], at, &strips.preds[strip][..len])
                    }
                    (Target::SameAsOperand(_) | Target::SameAsResult(_), _) => {}
                }
            }
            at += len;
        }
        let mut results: Vec<Reg> = Vec::with_capacity(targets.len());
        for target in targets {
            results.push(match target {
                Target::Operand(operand) => std::mem::replace(&mut operands[operand], Reg::Empty),
                Target::Floats(all) => Reg::Tile(f32::tile(all)),
                Target::Ints(all) => Reg::Tile(i32::tile(all)),
                Target::Preds(all) => Reg::Tile(bool::tile(all)),
                Target::SameAsOperand(operand) => operands[operand].clone(),
                Target::SameAsResult(result) => results[result].clone(),
            });
        }
        results
    }

    fn targets(&self, operands: &mut [Reg]) -> Vec<Target> {
        let mut kept: Vec<usize> = self.spread.clone();
        kept.extend(self.results.iter().filter_map(|(_, place)| match place {
            Place::Operand(operand) => Some(*operand as usize),
            Place::Strip(_) => None,
        }));
        let mut targets = Vec::with_capacity(self.results.len());
        for (at, &(kind, place)) in self.results.iter().enumerate() {
            let strip = match place {
                Place::Operand(operand) => {
                    targets.push(Target::SameAsOperand(operand as usize));
                    continue;
                }
                Place::Strip(strip) => strip,
            };
            let same =
                |&(other, place): &(Kind, Place)| matches!(place, Place::Strip(of) if of == strip && other == kind);
            if let Some(earlier) = self.results[..at].iter().position(same) {
                targets.push(Target::SameAsResult(earlier));
                continue;
            }
            let free = (0..operands.len())
                .find(|operand| !kept.contains(operand) && by_kind!(kind, is_free(&mut operands[*operand], self.len)));
            targets.push(match (free, kind) {
                (Some(operand), _) => {
                    kept.push(operand);
                    Target::Operand(operand)
                }
                (None, Kind::Float) => Target::Floats(Vec::with_capacity(self.len)),
                (None, Kind::Int) => Target::Ints(Vec::with_capacity(self.len)),
                (None, Kind::Pred) => Target::Preds(Vec::with_capacity(self.len)),
            });
        }
        targets
    }
}

impl Step {
    /// Runs it on elements `at .. at + len`.
    fn run(&self, arch: Arch, operands: &[Reg], strips: &mut Strips, at: usize, len: usize) {
        fn into<T: Lane>(strips: &mut Strips, to: u32, len: usize, work: impl FnOnce(&Strips, &mut [T])) {
            let mut out = std::mem::take(&mut T::strips_mut(strips)[to as usize]);
            work(strips, &mut out[..len]);
            T::strips_mut(strips)[to as usize] = out;
        }
        let &Self { action, operands: [x, y, z], to } = self;
        match action.kind() {
            Kind::Float => into::<f32>(strips, to, len, |strips, out| {
                let of = Window { operands, strips, at, len };
                match action {
                    Action::UnaryFloat(op, element) => {
                        lanes::unary_float(arch, op, of.get(x), out);
                        lanes::round(arch, element, out);
                    }
                    Action::BinaryFloat(op, element) => {
                        lanes::binary_float(arch, op, of.get(x), of.get(y), out);
                        lanes::round(arch, element, out);
                    }
                    Action::Select(_) => lanes::select(arch, of.get(x), of.get(y), of.get(z), out),
                    Action::Round(element) => {
                        out.copy_from_slice(of.get(x));
                        lanes::round(arch, element, out);
                    }
                    Action::IntToFloat(how) => lanes::int_to_float(arch, how, of.get(x), out),
                    Action::PredToFloat(one) => lanes::map(arch, of.get(x), out, |x: bool| if x { one } else { 0.0 }),
                    Action::BitsFloat => lanes::map(arch, of.get(x), out, |x: i32| f32::from_bits(x.cast_unsigned())),
                    Action::Spread(_, operand, spread) => {
                        spread_strip(of_operand::<f32>(&operands[operand as usize]), spread, at, out);
                    }
                    other => unreachable!("{other:?} makes no floats"),
                }
            }),
            Kind::Int => into::<i32>(strips, to, len, |strips, out| {
                let of = Window { operands, strips, at, len };
                match action {
                    Action::UnaryInt(op, element) => lanes::unary_int(arch, op, element, of.get(x), out),
                    Action::BinaryInt(op, element) => lanes::binary_int(arch, op, element, of.get(x), of.get(y), out),
                    Action::Select(_) => lanes::select(arch, of.get(x), of.get(y), of.get(z), out),
                    Action::FloatToInt(how) => lanes::float_to_int(arch, how, of.get(x), out),
                    Action::IntToInt(how) => lanes::int_to_int(arch, how, of.get(x), out),
                    Action::PredToInt(one) => lanes::map(arch, of.get(x), out, |x: bool| if x { one } else { 0 }),
                    Action::FloatBits => lanes::map(arch, of.get(x), out, |x: f32| x.to_bits().cast_signed()),
                    Action::Spread(_, operand, spread) => {
                        spread_strip(of_operand::<i32>(&operands[operand as usize]), spread, at, out);
                    }
                    other => unreachable!("{other:?} makes no integers"),
                }
            }),
            Kind::Pred => into::<bool>(strips, to, len, |strips, out| {
                let of = Window { operands, strips, at, len };
                match action {
                    Action::BinaryPred(op) => lanes::binary_pred(arch, op, of.get(x), of.get(y), out),
                    Action::CompareFloat(op) => lanes::compare_float(arch, op, of.get(x), of.get(y), out),
                    Action::CompareInt(op) => lanes::compare_int(arch, op, of.get(x), of.get(y), out),
                    Action::ComparePred(op) => lanes::compare_pred(op, of.get(x), of.get(y), out),
                    Action::Weird => lanes::map(arch, of.get(x), out, |x: f32| !x.is_finite()),
                    Action::Select(_) => lanes::select(arch, of.get(x), of.get(y), of.get(z), out),
                    Action::FloatToPred => lanes::map(arch, of.get(x), out, |x: f32| x != 0.0),
                    Action::IntToPred => lanes::map(arch, of.get(x), out, |x: i32| x & 1 != 0),
                    Action::Spread(_, operand, spread) => {
                        spread_strip(of_operand::<bool>(&operands[operand as usize]), spread, at, out);
                    }
                    other => unreachable!("{other:?} makes no predicates"),
                }
            }),
        }
    }
}
