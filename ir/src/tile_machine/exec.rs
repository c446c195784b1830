//! The interpreter: runs instructions on registers, and hands memory to [`dma`](super::dma) and the grid to
//! [`pipeline`](super::pipeline).

use std::{collections::BTreeMap, sync::Arc};

use smallvec::SmallVec;

use super::{
    Counters, DmaOrder, Machine, Run,
    devices::Addressee,
    dma::{Dma, Semaphore},
    fabric::Link,
    fault::{Fault, FaultKind},
    fuse::Strips,
    lanes::Arch,
    memory::{Buffer, Outside, Region, View},
    mxu::Mxu,
    observer::{AccessEvent, MatmulEvent, Observer, OpEvent, Side},
    program::{Code, Extent, Inst, Mask, Op, Origin, Permutation, Program, Slot, Target, Use},
    sparse,
    tile::{self, Binary, MatmulShape, Scalar, Tile},
};
use crate::{
    element::Element,
    mosaic::{MemorySpace, RefElement, Semantics},
    random::SplitMix64,
    shape::TensorType,
    tensor::HostTensor,
};

pub(super) type Step<T> = Result<T, Box<Fault>>;

/// The indices of an access.
type Indices = SmallVec<[i64; 6]>;

/// DMAs of a device's core are numbered from its own number, shifted by so much, on.
pub(super) const FIRST_OF_CORE: u32 = 40;

/// What a register holds.
#[derive(Clone, Debug)]
pub(super) enum Reg {
    Empty,
    Scalar(Scalar),
    Tile(Tile),
    View(Arc<View>),
}

/// A run in progress.
pub(super) struct Executor<'p, 'i, O> {
    pub(super) program: &'p Program,
    pub(super) machine: &'p Machine,
    pub(super) observer: &'p mut O,
    pub(super) buffers: Vec<Buffer<'i>>,
    /// Outputs without windows: the buffer that the kernel sees, and the array.
    pub(super) whole_outputs: Vec<(usize, usize)>,
    /// Inputs without windows in VMEM or SMEM: the buffer that the kernel sees, and the array.
    pub(super) whole_inputs: Vec<(usize, usize)>,
    registers: Vec<Reg>,
    pub(super) dmas: Vec<Dma>,
    pub(super) next_dma: usize,
    pub(super) semaphores: BTreeMap<(usize, usize), Semaphore>,
    pub(super) random: SplitMix64,
    /// The grid step.
    pub(super) step: Vec<usize>,
    /// Its position along the parallel dimensions alone.
    pub(super) owner: u32,
    pub(super) counters: Counters,
    /// The sizes of the grid.
    pub(super) bounds: Vec<usize>,
    /// Bytes that are taken of each memory, by its name.
    pub(super) taken: BTreeMap<&'static str, usize>,
    /// The buffer of the barrier semaphore.
    pub(super) barrier: usize,
    /// What was read of arrays that have owners, if that is wanted.
    pub(super) reads: Option<Vec<Region>>,
    /// Matrix units that the kernel drives itself.
    pub(super) mxus: BTreeMap<usize, Mxu>,
    /// The kernel's random bits.
    prng: SplitMix64,
    arch: Arch,
    strips: Strips,
    /// Where faults of the pipeline come from.
    pub(super) pipeline: Origin,
    /// To other cores, if there may be any.
    pub(super) link: Option<Box<Link<'p, 'i>>>,
}

impl Program {
    /// Runs the kernel on `machine`. `inputs` are the prefetched arrays and the inputs, `outputs` the types of the
    /// results, as the custom call has them.
    ///
    /// # Errors
    /// The first fault.
    pub fn run(&self, machine: &Machine, inputs: &[HostTensor], outputs: &[TensorType]) -> Result<Run, Box<Fault>> {
        match self.run_halves(machine, inputs, outputs) {
            Some(run) => Ok(run),
            None => self.run_observed(machine, inputs, outputs, &mut ()),
        }
    }

    /// [`run`](Self::run), watched by `observer`. What it sees until a fault, it has seen.
    ///
    /// # Errors
    /// The first fault.
    pub fn run_observed<O: Observer + Send>(
        &self,
        machine: &Machine,
        inputs: &[HostTensor],
        outputs: &[TensorType],
        observer: &mut O,
    ) -> Result<Run, Box<Fault>> {
        match (self.cores(), self.communicates()) {
            (2.., _) => self.run_cores(machine, inputs, outputs, observer),
            // A device alone among others.
            (_, true) => self.run_alone(machine, inputs, outputs, observer),
            (_, false) => self.run_linked(machine, inputs, outputs, observer, None),
        }
    }

    /// A run, of one of several cores if `link` says so; the results are those of a device's first.
    pub(super) fn run_linked<'i, O: Observer>(
        &self,
        machine: &Machine,
        inputs: &'i [HostTensor],
        outputs: &[TensorType],
        observer: &mut O,
        link: Option<Box<Link<'_, 'i>>>,
    ) -> Result<Run, Box<Fault>> {
        let mut executor = self.executor(machine, observer, link);
        let signature = self.signature.clone().with_outputs(outputs.len());
        let mut call = executor.allocate(&signature.arguments, inputs, outputs)?;
        executor.observer.begin(&call.results);
        executor.share(&call);
        let steps = match &executor.link {
            Some(link) => link.steps(&executor.bounds),
            None => 0..executor.bounds.iter().product(),
        };
        executor.grid(&call.views, &mut call.windows, steps)?;
        executor.meet_others()?;
        executor.land_for_later()?;
        executor.check_settled("at the end of the kernel")?;
        executor.check_mxus()?;
        executor.put_whole_outputs();
        if executor.link.as_ref().is_some_and(|link| link.core() > 0) {
            return Ok(Run { outputs: vec![], counters: executor.counters });
        }
        executor.results(&call.results, outputs)
    }

    /// A run that has not begun.
    pub(super) fn executor<'p, 'i, O: Observer>(
        &'p self,
        machine: &'p Machine,
        observer: &'p mut O,
        link: Option<Box<Link<'p, 'i>>>,
    ) -> Executor<'p, 'i, O> {
        // Who watches several cores knows their DMAs by their numbers.
        let core = link.as_ref().map_or(0, |link| link.core());
        Executor {
            program: self,
            machine,
            observer,
            buffers: vec![],
            whole_outputs: vec![],
            whole_inputs: vec![],
            registers: vec![Reg::Empty; self.slots],
            dmas: vec![],
            next_dma: core << FIRST_OF_CORE,
            semaphores: BTreeMap::new(),
            random: SplitMix64::new(match machine.dma {
                DmaOrder::Random(seed) => seed,
                _ => 0,
            }),
            step: vec![],
            owner: 0,
            counters: Counters::default(),
            bounds: vec![],
            taken: BTreeMap::new(),
            barrier: 0,
            reads: None,
            mxus: BTreeMap::new(),
            prng: SplitMix64::new(machine.random_seed),
            arch: Arch::new(),
            strips: Strips::default(),
            pipeline: Origin {
                op: "pipeline".into(),
                location: "the kernel's grid".into(),
                frames: self.frames.clone(),
                elements: 0,
            },
            link,
        }
    }
}

impl<O: Observer> Executor<'_, '_, O> {
    // ---- faults ----

    pub(super) fn fault(&self, kind: FaultKind, origin: &Origin, detail: String) -> Box<Fault> {
        Box::new(Fault {
            kind,
            kernel: self.program.signature.name.clone(),
            device: self.link.as_ref().and_then(|link| link.device_of_several()),
            core: self.link.as_ref().map_or(0, |link| link.core()),
            op: origin.op.clone(),
            location: origin.location.clone(),
            frames: origin.frames.clone(),
            buffer: None,
            index: vec![],
            cell: None,
            grid_step: self.step.clone(),
            dma: None,
            detail,
        })
    }

    pub(super) fn fault_at(&self, kind: FaultKind, origin: u32, detail: String) -> Box<Fault> {
        self.fault(kind, &self.program.origins[origin as usize], detail)
    }

    pub(super) fn in_buffer(&self, mut fault: Box<Fault>, buffer: usize, offset: usize) -> Box<Fault> {
        fault.buffer = Some(self.buffers[buffer].name.clone());
        fault.index = self.buffers[buffer].unravel(offset);
        fault.cell = Some((buffer, offset));
        fault
    }

    /// The source line of an instruction.
    pub(super) fn location(&self, origin: u32) -> &str {
        &self.program.origins[origin as usize].location
    }

    /// The position of the parallel grid dimensions that steps of `owner` have.
    pub(super) fn position(&self, owner: u32) -> String {
        let grid = self.program.signature.grid.iter().zip(&self.bounds);
        let parallel = grid.filter(|((_, how), _)| *how == Semantics::Parallel);
        let sizes: Vec<usize> = parallel.map(|(_, &size)| size.max(1)).collect();
        let at = sizes.iter().zip(tile::strides(&sizes)).map(|(size, stride)| owner as usize / stride % size);
        format!("{:?}", at.collect::<Vec<_>>())
    }

    // ---- registers ----

    pub(super) fn call(&mut self, code: &Code, arguments: Vec<Reg>) -> Step<Vec<Reg>> {
        for (&slot, argument) in code.parameters.iter().zip(arguments) {
            self.registers[slot as usize] = argument;
        }
        let first = self.buffers.len();
        for inst in &code.body {
            self.execute(inst)?;
        }
        if self.buffers.len() > first {
            self.end_scope(first)?;
        }
        Ok(code.yields.iter().map(|read| self.take(read)).collect())
    }

    /// The content of a register, which dies if this was its last use.
    fn take(&mut self, read: &Use) -> Reg {
        let register = &mut self.registers[read.slot as usize];
        if read.last { std::mem::replace(register, Reg::Empty) } else { register.clone() }
    }

    pub(super) fn tile(&mut self, read: &Use) -> Tile {
        match self.take(read) {
            Reg::Tile(tile) => tile,
            other => unreachable!("decoding gives a tile, not {other:?}"),
        }
    }

    fn scalar(&mut self, read: &Use) -> i32 {
        int(&self.take(read))
    }

    pub(super) fn view(&mut self, read: &Use) -> Arc<View> {
        match self.take(read) {
            Reg::View(view) => view,
            other => unreachable!("decoding gives a memref, not {other:?}"),
        }
    }

    fn set(&mut self, slot: Slot, value: Reg) {
        self.registers[slot as usize] = value;
    }

    // ---- instructions ----

    fn count_op(&mut self, origin: u32) -> Step<()> {
        self.count_ops(1, origin)?;
        let Origin { op, location, frames, elements } = &self.program.origins[origin as usize];
        self.observer.op(&OpEvent { number: origin, op, location, frames, elements: *elements });
        Ok(())
    }

    fn count_ops(&mut self, count: u64, origin: u32) -> Step<()> {
        self.counters.ops += count;
        if self.counters.ops > self.machine.max_ops {
            let detail = format!("more than {} (`Machine::max_ops`): a loop that never ends?", self.machine.max_ops);
            return Err(self.fault_at(FaultKind::Runaway, origin, detail));
        }
        Ok(())
    }

    fn execute(&mut self, inst: &Inst) -> Step<()> {
        match &inst.op {
            Op::RegionStart(name) => {
                self.observer.region_start(name);
                return Ok(());
            }
            Op::RegionStop => {
                self.observer.region_stop();
                return Ok(());
            }
            Op::Fused(group) => {
                self.count_ops(group.ops, inst.origin)?;
                let operands = inst.operands.iter().map(|read| self.take(read)).collect();
                let results = group.run(self.arch, operands, &mut self.strips);
                return self.finish(inst, results);
            }
            _ => self.count_op(inst.origin)?,
        }
        let (origin, operands) = (inst.origin, inst.operands.as_slice());
        let result = match &inst.op {
            Op::Scalar(scalar) => Reg::Scalar(*scalar),
            Op::Constant(tile) => Reg::Tile(tile.clone()),
            Op::Unary { op, element } => match self.take(&operands[0]) {
                Reg::Scalar(Scalar::Float(x)) => Reg::Scalar(Scalar::Float(tile::round(*element, op.float(x)))),
                Reg::Scalar(Scalar::Int(x)) => Reg::Scalar(Scalar::Int(tile::wrap(*element, op.int(*element, x)))),
                Reg::Tile(x) => Reg::Tile(tile::unary(*op, *element, x)),
                other => other,
            },
            Op::Binary { op, element } => {
                let (x, y) = (self.take(&operands[0]), self.take(&operands[1]));
                let by_zero = match &y {
                    Reg::Scalar(Scalar::Int(y)) => op.divides() && *y == 0,
                    Reg::Tile(y) => tile::divides_by_zero(*op, y),
                    _ => false,
                };
                if by_zero && !self.machine.ignored.contains(FaultKind::DivisionByZero) {
                    return Err(self.fault_at(FaultKind::DivisionByZero, origin, String::new()));
                }
                match (x, y) {
                    (Reg::Scalar(x), Reg::Scalar(y)) => Reg::Scalar(scalar_binary(*op, *element, x, y)),
                    (Reg::Tile(x), Reg::Tile(y)) => Reg::Tile(tile::binary(*op, *element, x, y)),
                    (x, y) => unreachable!("decoding gives operands of one shape, not {x:?} and {y:?}"),
                }
            }
            Op::Compare(op) => match (self.take(&operands[0]), self.take(&operands[1])) {
                (Reg::Tile(x), Reg::Tile(y)) => Reg::Tile(tile::compare(*op, &x, &y)),
                (Reg::Scalar(Scalar::Float(x)), Reg::Scalar(Scalar::Float(y))) => {
                    Reg::Scalar(Scalar::Pred(op.float(x, y)))
                }
                (x, y) => Reg::Scalar(Scalar::Pred(op.int(int(&x), int(&y)))),
            },
            Op::Weird => match self.take(&operands[0]) {
                Reg::Tile(x) => Reg::Tile(tile::weird(&x)),
                Reg::Scalar(x) => Reg::Scalar(tile::weird(&tile::splat(x, 1)).get(0)),
                other => other,
            },
            Op::Select => match (self.take(&operands[0]), self.take(&operands[1]), self.take(&operands[2])) {
                (Reg::Tile(condition), Reg::Tile(then), Reg::Tile(otherwise)) => {
                    Reg::Tile(tile::select(&condition, then, otherwise))
                }
                (condition, then, _) if int(&condition) != 0 => then,
                (_, _, otherwise) => otherwise,
            },
            Op::Convert(how) => match self.take(&operands[0]) {
                Reg::Tile(x) => Reg::Tile(tile::convert(*how, x)),
                Reg::Scalar(x) => Reg::Scalar(tile::convert(*how, tile::splat(x, 1)).get(0)),
                other => other,
            },
            Op::Broadcast { from, to } => match self.take(&operands[0]) {
                Reg::Scalar(x) => Reg::Tile(tile::splat(x, to.iter().product())),
                Reg::Tile(x) => Reg::Tile(tile::broadcast(&x, from, to)),
                other => other,
            },
            Op::Same => self.take(&operands[0]),
            Op::Transpose { dims, permutation } => {
                Reg::Tile(tile::transpose(&self.tile(&operands[0]), dims, permutation))
            }
            Op::Slice { dims, offsets, sizes, steps } => {
                Reg::Tile(tile::slice(&self.tile(&operands[0]), dims, offsets, sizes, steps))
            }
            Op::Concatenate { sizes, dim } => {
                let tiles: Vec<Tile> = operands.iter().map(|read| self.tile(read)).collect();
                let tiles: Vec<Tile> = tiles.iter().cycle().take(sizes.len()).cloned().collect();
                Reg::Tile(tile::concatenate(&tiles, sizes, *dim))
            }
            Op::Rotate { dims, dim, stride } => {
                let (x, amount) = (self.tile(&operands[0]), i64::from(self.scalar(&operands[1])));
                Reg::Tile(match stride {
                    None => tile::rotate(&x, dims, *dim, amount),
                    Some(stride) => tile::rotate_strided(&x, dims, *dim, amount, *stride),
                })
            }
            Op::Reduce { how, element, dims, over } => {
                let x = self.tile(&operands[0]);
                match self.take(&operands[1]) {
                    Reg::Scalar(initial) => {
                        let initial = tile::splat(initial, 1);
                        Reg::Scalar(tile::reduce(*how, *element, x, dims, over, initial).get(0))
                    }
                    Reg::Tile(initial) => Reg::Tile(tile::reduce(*how, *element, x, dims, over, initial)),
                    other => unreachable!("decoding gives a start, not {other:?}"),
                }
            }
            Op::ReduceIndex { dims, dim, greatest } => {
                let indices = tile::reduce_index(&self.tile(&operands[0]), dims, *dim, *greatest);
                if dims.len() == 1 { Reg::Scalar(indices.get(0)) } else { Reg::Tile(indices) }
            }
            Op::Gather { dims, over, index_dims } => {
                let (x, indices) = (self.tile(&operands[0]), self.tile(&operands[1]));
                Reg::Tile(tile::gather(&x, dims, over, &indices, index_dims))
            }
            Op::Pack { from, to, result, len } => {
                let sources: Vec<Tile> = operands.iter().map(|read| self.tile(read)).collect();
                Reg::Tile(tile::pack(&sources, *from, *to, *result, *len))
            }
            Op::Unpack { from, part, index, to } => {
                Reg::Tile(tile::unpack(&self.tile(&operands[0]), *from, *part, *index, *to))
            }
            Op::MultiplyInFull { element, signed } => {
                let results = match (self.take(&operands[0]), self.take(&operands[1])) {
                    (Reg::Tile(x), Reg::Tile(y)) => tile::multiply_in_full(*element, *signed, &x, &y).map(Reg::Tile),
                    (x, y) => {
                        let [x, y] = [x, y].map(|side| tile::splat(Scalar::Int(int(&side)), 1));
                        tile::multiply_in_full(*element, *signed, &x, &y).map(|half| Reg::Scalar(half.get(0)))
                    }
                };
                return self.finish(inst, results.into());
            }
            Op::ReducePrecision { exponent_bits, mantissa_bits } => match self.take(&operands[0]) {
                Reg::Tile(x) => Reg::Tile(tile::reduce_precision(&x, *exponent_bits, *mantissa_bits)),
                Reg::Scalar(x) => {
                    Reg::Scalar(tile::reduce_precision(&tile::splat(x, 1), *exponent_bits, *mantissa_bits).get(0))
                }
                other => other,
            },
            Op::RoundStochastically { to, as_bits } => {
                let (x, random) = (self.tile(&operands[0]), self.tile(&operands[1]));
                let rounded = tile::round_stochastically(*to, &x, &random);
                Reg::Tile(if *as_bits { tile::bits(&rounded, *to) } else { rounded })
            }
            Op::Seed => {
                let mut seed = self.machine.random_seed;
                for read in operands {
                    let part = u64::from(self.scalar(read).cast_unsigned());
                    seed = SplitMix64::new(seed.rotate_left(17) ^ part).bits();
                }
                self.prng = SplitMix64::new(seed);
                Reg::Empty
            }
            Op::RandomBits { element, len } => {
                Reg::Tile(tile::from_bits(*element, (0..*len).map(|_| self.prng.bits() as u32).collect()))
            }
            Op::Bitcast { dims, from, to } => match self.take(&operands[0]) {
                Reg::Scalar(x) => Reg::Scalar(tile::bitcast(&tile::splat(x, 1), &[1], *from, *to).get(0)),
                Reg::Tile(x) => Reg::Tile(tile::bitcast(&x, dims, *from, *to)),
                other => other,
            },
            Op::Extract { index } => Reg::Scalar(self.tile(&operands[0]).get(*index)),
            Op::Matmul { shape, round, arrange, elements: [left, right] } => {
                self.counters.mxu_flops += shape.flops();
                let MatmulShape { batch, m, n, k, .. } = *shape;
                let exact = *left == Element::F32 && !round[0];
                self.observer.matmul(&MatmulEvent { batch, m, n, k, lhs: *left, rhs: *right, exact });
                let [lhs, rhs] = [0, 1].map(|side| {
                    let x = self.tile(&operands[side]);
                    match &arrange[side] {
                        Some(Permutation { dims, order }) => tile::transpose(&x, dims, order),
                        None => x,
                    }
                });
                // A half of a grid has its thread already.
                let threads = self.reads.is_none();
                Reg::Tile(tile::matmul(shape, lhs, rhs, self.tile(&operands[2]), *round, threads))
            }
            Op::Mxu(op) => match self.drive_mxu(*op, operands, origin)? {
                Some(sum) => Reg::Tile(sum),
                None => Reg::Empty,
            },
            Op::Load { extent, to, mask: None } => {
                let (view, start) = self.place(operands);
                let ignored = self.machine.ignored.contains(FaultKind::OutOfBounds);
                match self.readable_at(&view, &start, extent, origin) {
                    Err(fault) if ignored && fault.kind == FaultKind::OutOfBounds => {
                        Reg::Tile(self.load_beyond(&view, &start, extent, *to, origin)?)
                    }
                    found => {
                        let region = found?;
                        self.observe_access(&region, false, None);
                        Reg::Tile(self.read(&region, extent, *to))
                    }
                }
            }
            Op::Load { extent, to, mask: Some(Mask::Gaps) } => {
                Reg::Tile(self.load_masked(operands, extent, *to, origin)?)
            }
            Op::Load { extent, to, mask: Some(Mask::Dense) } => {
                Reg::Tile(self.load_expanded(operands, extent, *to, origin)?)
            }
            Op::LoadIndexed { rank, to } => Reg::Tile(self.load_indexed(operands, *rank, *to, origin)?),
            Op::StoreIndexed { rank, add } => {
                self.store_indexed(operands, *rank, *add, origin)?;
                Reg::Empty
            }
            Op::Scan { how, element, lanes } => {
                let x = self.tile(&operands[0]);
                let mask = operands.get(1).map(|mask| self.tile(mask));
                Reg::Tile(sparse::scan(*how, *element, &x, *lanes, mask.as_ref()))
            }
            Op::Occurrences { lanes } => {
                let mask = self.tile(&operands[0]);
                let results = sparse::occurrences(&self.tile(&operands[1]), *lanes, &mask);
                return self.finish(inst, results.map(Reg::Tile).into());
            }
            Op::Sort { lanes, descending } => {
                let (keys, values) = (self.tile(&operands[0]), self.tile(&operands[1]));
                let mask = operands.get(2).map(|mask| self.tile(mask));
                let results = sparse::sort(&keys, &values, *lanes, mask.as_ref(), *descending);
                return self.finish(inst, results.map(Reg::Tile).into());
            }
            Op::OfMask { what, lanes } => Reg::Tile(sparse::of_mask(*what, &self.tile(&operands[0]), *lanes)),
            Op::PackLanes { positions, format, elements, len } => {
                let sources: Vec<Tile> = operands.iter().map(|read| self.tile(read)).collect();
                Reg::Tile(sparse::pack(&sources, positions, *format, *elements, *len))
            }
            Op::UnpackLanes { index, format, elements, signed } => {
                Reg::Tile(sparse::unpack(&self.tile(&operands[0]), *index, *format, *elements, *signed))
            }
            Op::LoadScalar { extent } => {
                let (view, start) = self.place(operands);
                let ignored = self.machine.ignored.contains(FaultKind::OutOfBounds);
                match (self.readable_at(&view, &start, extent, origin), view.element) {
                    (Err(fault), RefElement::Data(element)) if ignored && fault.kind == FaultKind::OutOfBounds => {
                        let space = self.buffers[view.buffer].space;
                        Reg::Scalar(Buffer::poisoned("", space, element, &[1]).read_scalar(0))
                    }
                    (found, _) => {
                        let region = found?;
                        self.observe_access(&region, false, None);
                        Reg::Scalar(self.buffers[region.buffer].read_scalar(region.start()))
                    }
                }
            }
            Op::Store { extent, add, mask } => {
                match mask {
                    Some(Mask::Dense) => self.store_compressed(operands, extent, *add, origin)?,
                    _ => self.store(operands, extent, *add, origin)?,
                }
                Reg::Empty
            }
            Op::StoreScalar { extent } => {
                let Reg::Scalar(value) = self.take(&operands[0]) else { unreachable!("decoding gives a scalar") };
                let (view, start) = self.place(&operands[1..]);
                let region = self.region(&view, &start, extent, origin)?;
                self.check_in_flight(&region, true, Some(origin))?;
                self.observe_access(&region, true, None);
                self.buffers[region.buffer].write_scalar(region.start(), value);
                Reg::Empty
            }
            Op::SliceRef { sizes } => {
                let (indices, given) = operands.split_at(1 + sizes.len());
                let (view, start) = self.place(indices);
                let mut given = given.iter().map(|read| i64::from(self.scalar(read)));
                let sizes: Vec<i64> =
                    sizes.iter().map(|size| size.map_or_else(|| given.next().unwrap_or(0), |n| n as i64)).collect();
                // A negative size is an access before the first element.
                let start_or_size = |dim: usize| if sizes[dim] < 0 { sizes[dim] } else { start[dim] };
                let start: Vec<i64> = (0..sizes.len()).map(start_or_size).collect();
                let negative = sizes.iter().any(|&size| size < 0);
                let extent = Extent { sizes: sizes.iter().map(|&size| size.max(0) as usize).collect(), steps: vec![] };
                self.check_words(&view, &start, &extent, origin)?;
                let sliced = match view.slice(&start, &extent.sizes) {
                    Ok(sliced) => sliced,
                    // A wait counts bytes, and takes a descriptor of any place: what is outside faults where it is accessed.
                    Err((dim, index)) if !negative => {
                        let why = self.out_of_bounds(&view, dim, index, &start, &extent, origin).detail;
                        let array = &self.buffers[view.buffer];
                        let is_tiled = array.space == MemorySpace::Hbm && view.element.data().is_some();
                        let padded = is_tiled.then(|| view.padded_slice(&array.dims, &start, &extent.sizes)).flatten();
                        padded.unwrap_or_else(|| (*view).clone()).beyond(&extent.sizes, Outside { origin, start, why })
                    }
                    Err((dim, index)) => return Err(self.out_of_bounds(&view, dim, index, &start, &extent, origin)),
                };
                Reg::View(Arc::new(sliced))
            }
            Op::SqueezeRef { keep } => Reg::View(Arc::new(self.view(&operands[0]).keep(keep))),
            Op::ReshapeRef { dims } => {
                let view = self.view(&operands[0]);
                self.recast(&view, view.reshape(dims), origin)?
            }
            Op::BitcastRef { to } => {
                let view = self.view(&operands[0]);
                self.recast(&view, view.bitcast(*to), origin)?
            }
            Op::Allocate { element, dims, space } => {
                let buffer = self.allocate_scoped(*element, dims, *space, origin)?;
                Reg::View(Arc::new(View::whole(buffer, *element, dims)))
            }
            Op::BarrierSemaphore => Reg::View(Arc::new(View::whole(self.barrier, RefElement::Semaphore, &[]))),
            Op::DeviceId => Reg::Scalar(Scalar::Int(self.link.as_ref().map_or(0, |link| link.device() as i32))),
            Op::GridSize(dim) => {
                let size = self.bounds.get(*dim).copied().unwrap_or(1);
                Reg::Scalar(Scalar::Int(size as i32))
            }
            Op::StartDma => {
                let (source, destination) = (self.view(&operands[0]), self.view(&operands[1]));
                let semaphore = self.view(&operands[2]);
                self.start_dma([&source, &destination], &semaphore, false, origin)?;
                Reg::Empty
            }
            Op::StartRemoteDma(target) => {
                let [source, own, destination, semaphore] = [0, 1, 2, 3].map(|at| self.view(&operands[at]));
                let target = self.target(*target, &operands[4..]);
                self.start_remote_dma([&source, &own], [&destination, &semaphore], &target, origin)?;
                Reg::Empty
            }
            Op::StartRowDmas(rows) => {
                let (source, destination) = (self.view(&operands[0]), self.view(&operands[1]));
                let numbers = match self.take(&operands[2]) {
                    Reg::View(view) => {
                        let extent = Extent { sizes: view.dims.to_vec(), steps: vec![] };
                        let region = self.readable_at(&view, &[0], &extent, origin)?;
                        self.read(&region, &extent, Element::I32)
                    }
                    Reg::Tile(tile) => tile,
                    _ => unreachable!("decoding gives rows as memory or as a tile"),
                };
                let (semaphore, none) = (self.view(&operands[3]), operands.get(4).map(|none| self.scalar(none)));
                self.start_row_dmas([&source, &destination], *rows, &numbers, none, &semaphore, origin)?;
                Reg::Empty
            }
            Op::WaitDma { semaphore, bytes_of } => {
                let (semaphore, bytes_of) = (self.view(&operands[*semaphore]), self.view(&operands[*bytes_of]));
                self.wait_dma(&semaphore, &bytes_of, origin)?;
                Reg::Empty
            }
            Op::Signal(target) => {
                let (semaphore, amount) = (self.view(&operands[0]), self.scalar(&operands[1]));
                let target = self.target(*target, &operands[2..]);
                self.signal_core(&semaphore, amount, &target, origin)?;
                Reg::Empty
            }
            Op::WaitSemaphore => {
                let (semaphore, amount) = (self.view(&operands[0]), self.scalar(&operands[1]));
                self.wait_semaphore(&semaphore, amount, origin)?;
                Reg::Empty
            }
            Op::Barrier => {
                let barrier = self.scalar(&operands[0]);
                self.meet(barrier, origin)?;
                Reg::Empty
            }
            Op::FetchAndAdd => {
                let (place, given) = operands.split_at(operands.len() - 2);
                let (view, start) = self.place(place);
                let [amount, subcore] = [0, 1].map(|at| self.scalar(&given[at]));
                let extent = Extent { sizes: vec![1; start.len()], steps: vec![] };
                let region = self.region(&view, &start, &extent, origin)?;
                Reg::Scalar(Scalar::Int(self.fetch_and_add(&region, amount, subcore, origin)?))
            }
            Op::ReadSemaphore => {
                let semaphore = self.view(&operands[0]);
                self.poll()?;
                Reg::Scalar(Scalar::Int(self.semaphore_value(&semaphore) as i32))
            }
            Op::AssumeMultiple(multiple) => {
                let x = self.scalar(&operands[0]);
                if x % multiple != 0 && !self.machine.ignored.contains(FaultKind::BrokenAssumption) {
                    let detail = format!("{x} is not a multiple of {multiple}");
                    return Err(self.fault_at(FaultKind::BrokenAssumption, origin, detail));
                }
                Reg::Scalar(Scalar::Int(x))
            }
            Op::Print { text, formatted } => {
                let values: Vec<Reg> = operands.iter().map(|read| self.take(read)).collect();
                if O::LISTENS {
                    let line = self.printed(text, *formatted, &values);
                    self.observer.print(&line);
                }
                Reg::Empty
            }
            Op::RegionStart(_) | Op::RegionStop | Op::Fused(_) => unreachable!("they have run"),
            Op::Assert(message) => {
                if self.scalar(&operands[0]) == 0 && !self.machine.ignored.contains(FaultKind::BrokenAssumption) {
                    return Err(self.fault_at(FaultKind::BrokenAssumption, origin, message.clone()));
                }
                Reg::Empty
            }
            Op::If => {
                let taken = usize::from(self.scalar(&operands[0]) == 0);
                let results = self.call(&inst.codes[taken], vec![])?;
                return self.finish(inst, results);
            }
            Op::For => {
                let [low, high, step] = [0, 1, 2].map(|at| self.scalar(&operands[at]));
                if step <= 0 {
                    return Err(self.fault_at(FaultKind::Runaway, origin, format!("a loop with step {step}")));
                }
                let mut carried: Vec<Reg> = operands[3..].iter().map(|read| self.take(read)).collect();
                let mut i = low;
                while i < high {
                    let mut arguments = Vec::with_capacity(1 + carried.len());
                    arguments.push(Reg::Scalar(Scalar::Int(i)));
                    arguments.append(&mut carried);
                    carried = self.call(&inst.codes[0], arguments)?;
                    i = i.saturating_add(step);
                }
                return self.finish(inst, carried);
            }
            Op::While => {
                let mut carried: Vec<Reg> = operands.iter().map(|read| self.take(read)).collect();
                loop {
                    let mut values = self.call(&inst.codes[0], carried)?;
                    self.count_op(origin)?;
                    let condition = values.remove(0);
                    if int(&condition) == 0 {
                        carried = values;
                        break;
                    }
                    carried = self.call(&inst.codes[1], values)?;
                }
                return self.finish(inst, carried);
            }
            Op::Region => {
                let results = self.call(&inst.codes[0], vec![])?;
                return self.finish(inst, results);
            }
        };
        if let Some(&slot) = inst.results.first() {
            self.set(slot, result);
        }
        for &slot in &inst.kills {
            self.set(slot, Reg::Empty);
        }
        Ok(())
    }

    /// What a kernel prints: a text with its values in it, or behind it.
    fn printed(&self, text: &str, formatted: bool, values: &[Reg]) -> String {
        if !formatted {
            let values: Vec<String> = values.iter().map(|value| self.in_words(value)).collect();
            return format!("{text}{}{}", if text.ends_with([' ', '\n']) { "" } else { " " }, values.join(" "));
        }
        // `$0`, by later versions `$s0`, or `$x0` in hexadecimal.
        values.iter().enumerate().rev().fold(text.to_owned(), |line, (at, value)| {
            let hexadecimal = if let Reg::Scalar(Scalar::Int(x)) = value { format!("{x:x}") } else { String::new() };
            line.replace(&format!("$x{at}"), &hexadecimal)
                .replace(&format!("$s{at}"), &self.in_words(value))
                .replace(&format!("${at}"), &self.in_words(value))
        })
    }

    fn in_words(&self, value: &Reg) -> String {
        const MOST: usize = 64;
        let scalar = |value: Scalar| match value {
            Scalar::Float(x) => x.to_string(),
            Scalar::Int(x) => x.to_string(),
            Scalar::Pred(x) => x.to_string(),
        };
        let all = |tile: &Tile, dims: &[usize]| {
            let len = dims.iter().product::<usize>();
            let mut some: Vec<String> = (0..len.min(MOST)).map(|at| scalar(tile.get(at))).collect();
            some.extend((len > MOST).then(|| "...".to_owned()));
            format!("{dims:?} [{}]", some.join(" "))
        };
        match value {
            Reg::Scalar(value) => scalar(*value),
            Reg::Tile(tile) => {
                let len = match tile {
                    Tile::Float(x) => x.len(),
                    Tile::Int(x) => x.len(),
                    Tile::Pred(x) => x.len(),
                };
                all(tile, &[len])
            }
            Reg::View(view) if view.outside.is_none() && matches!(view.element, RefElement::Data(_)) => {
                all(&self.buffers[view.buffer].read(&view.all()), &view.dims)
            }
            Reg::View(_) | Reg::Empty => "nothing".to_owned(),
        }
    }

    fn finish(&mut self, inst: &Inst, results: Vec<Reg>) -> Step<()> {
        for (&slot, result) in inst.results.iter().zip(results) {
            self.set(slot, result);
        }
        for &slot in &inst.kills {
            self.set(slot, Reg::Empty);
        }
        Ok(())
    }

    // ---- loads and stores ----

    /// A memref and the indices that follow it.
    pub(super) fn place(&mut self, operands: &[Use]) -> (Arc<View>, Indices) {
        let view = self.view(&operands[0]);
        (view, operands[1..].iter().map(|index| i64::from(self.scalar(index))).collect())
    }

    /// Whom an op goes to, as far as it says so.
    fn target(&mut self, target: Target, operands: &[Use]) -> Addressee {
        let mut given = operands.iter();
        let named = [target.device, target.core, target.subcore];
        let [device, core, subcore] =
            named.map(|is| if is { given.next().map(|read| self.scalar(read)) } else { None });
        Addressee { device, core, subcore, of: target.of }
    }

    fn out_of_bounds(
        &self,
        view: &View,
        dim: usize,
        index: i64,
        start: &[i64],
        extent: &Extent,
        origin: u32,
    ) -> Box<Fault> {
        let detail = format!(
            "element {index} of dimension {dim} in a view of sizes {:?} (from {start:?}, sizes {:?})",
            view.dims, extent.sizes
        );
        let mut fault = self.fault_at(FaultKind::OutOfBounds, origin, detail);
        fault.buffer = Some(self.buffers[view.buffer].name.clone());
        fault.index = start.to_vec();
        fault
    }

    /// Faults when a box of a view of narrow elements takes parts of a word.
    fn check_words(&self, view: &View, start: &[i64], extent: &Extent, origin: u32) -> Step<()> {
        if !view.splits_a_word(start, &extent.sizes, &extent.steps) {
            return Ok(());
        }
        let (element, stored) = (view.element, self.buffers[view.buffer].data.element());
        let detail = format!(
            "elements {start:?}, {:?} of them, of {stored} seen as {element}: the tile machine takes whole {stored}",
            extent.sizes
        );
        let mut fault = self.fault_at(FaultKind::OutOfBounds, origin, detail);
        fault.buffer = Some(self.buffers[view.buffer].name.clone());
        Err(fault)
    }

    /// Faults when a view is outside the memory that it is of. One of no elements is nowhere.
    pub(super) fn check_inside(&self, view: &View) -> Step<()> {
        let Some(outside) = view.outside.as_ref().filter(|_| !view.dims.contains(&0)) else { return Ok(()) };
        let mut fault = self.fault_at(FaultKind::OutOfBounds, outside.origin, outside.why.clone());
        fault.buffer = Some(self.buffers[view.buffer].name.clone());
        fault.index.clone_from(&outside.start);
        Err(fault)
    }

    fn region(&self, view: &View, start: &[i64], extent: &Extent, origin: u32) -> Step<Region> {
        self.check_inside(view)?;
        self.check_words(view, start, extent, origin)?;
        view.region(start, &extent.sizes, &extent.steps)
            .map_err(|(dim, index)| self.out_of_bounds(view, dim, index, start, extent, origin))
    }

    /// The region that a load of `operands` reads: inside its view, written, and not in flight.
    pub(super) fn readable(&mut self, operands: &[Use], extent: &Extent, origin: u32) -> Step<Region> {
        let (view, start) = self.place(operands);
        self.readable_at(&view, &start, extent, origin)
    }

    pub(super) fn readable_at(&mut self, view: &View, start: &[i64], extent: &Extent, origin: u32) -> Step<Region> {
        let region = self.region(view, start, extent, origin)?;
        self.check_in_flight(&region, false, Some(origin))?;
        self.check_written(&region, origin)?;
        Ok(region)
    }

    fn recast(&self, view: &View, recast: Option<View>, origin: u32) -> Step<Reg> {
        let message =
            || format!("a view of sizes {:?} and strides {:?} cannot be seen like this", view.dims, view.strides);
        let recast = recast.ok_or_else(|| self.fault_at(FaultKind::OutOfBounds, origin, message()))?;
        Ok(Reg::View(Arc::new(recast)))
    }

    pub(super) fn read(&self, region: &Region, extent: &Extent, to: Element) -> Tile {
        let buffer = &self.buffers[region.buffer];
        let stored = buffer.data.element();
        let tile = buffer.read(region);
        if stored == to {
            return tile;
        }
        // A view of narrow elements as wider ones reads them row by row.
        tile::bitcast(&tile, &extent.sizes, stored, to)
    }

    /// A load that reaches outside its view: garbage there.
    fn load_beyond(&mut self, view: &View, start: &[i64], extent: &Extent, to: Element, origin: u32) -> Step<Tile> {
        let rank = extent.sizes.len();
        let step = |dim: usize| extent.steps.get(dim).copied().unwrap_or(1);
        // Along each dimension, the first of the load's elements that are inside, and how many are.
        let inside = (0..rank).map(|dim| {
            let is_inside = |&at: &usize| (0..view.dims[dim] as i64).contains(&(start[dim] + (at * step(dim)) as i64));
            let first = (0..extent.sizes[dim]).find(is_inside).unwrap_or(0);
            (first, (first..extent.sizes[dim]).take_while(is_inside).count())
        });
        let (first, sizes): (Vec<usize>, Vec<usize>) = inside.unzip();
        let all: usize = extent.sizes.iter().product();
        let mut scalars = vec![sparse::garbage(to); all];
        if view.outside.is_none() && !sizes.contains(&0) {
            let start: Vec<i64> = (0..rank).map(|dim| start[dim] + (first[dim] * step(dim)) as i64).collect();
            let part = Extent { sizes: sizes.clone(), steps: extent.steps.clone() };
            let region = self.readable_at(view, &start, &part, origin)?;
            self.observe_access(&region, false, None);
            let loaded = self.read(&region, &part, to);
            let (of_part, of_all) = (tile::strides(&sizes), tile::strides(&extent.sizes));
            for from in 0..part.sizes.iter().product() {
                let at = (0..rank).map(|dim| (first[dim] + from / of_part[dim] % sizes[dim]) * of_all[dim]);
                scalars[at.sum::<usize>()] = loaded.get(from);
            }
        }
        Ok(sparse::of_scalars(to, &scalars))
    }

    /// Operands: the memref, its indices, the mask. What the mask leaves out need not be written, and is garbage.
    fn load_masked(&mut self, operands: &[Use], extent: &Extent, to: Element, origin: u32) -> Step<Tile> {
        let (indices, mask) = operands.split_at(1 + extent.sizes.len());
        let (view, start) = self.place(indices);
        let Tile::Pred(mask) = self.tile(&mask[0]) else { unreachable!("decoding gives a pred mask") };
        let region = self.region(&view, &start, extent, origin)?;
        self.check_in_flight(&region, false, Some(origin))?;
        let buffer = &self.buffers[region.buffer];
        if let (Some(offset), false) = (buffer.unwritten_in(&region), self.machine.reads_unwritten()) {
            let ratio = (region.len() / mask.len().max(1)).max(1);
            let lanes = extent.sizes.last().copied().unwrap_or(1);
            let stored: Vec<bool> = mask.chunks(lanes).flat_map(|row| row.repeat(ratio)).collect();
            if buffer.garbage_in(&region).iter().zip(&stored).any(|(garbage, read)| *garbage && *read) {
                let fault = self.fault_at(FaultKind::UnwrittenRead, origin, String::new());
                return Err(self.in_buffer(fault, region.buffer, offset));
            }
        }
        self.observe_access(&region, false, None);
        let tile = self.read(&region, extent, to);
        let garbage = tile::splat(sparse::garbage(to), mask.len());
        Ok(tile::select(&Tile::Pred(mask), tile, garbage))
    }

    /// Operands: the tile, the memref, its indices, perhaps a mask.
    fn store(&mut self, operands: &[Use], extent: &Extent, add: bool, origin: u32) -> Step<()> {
        let value = self.tile(&operands[0]);
        let (indices, mask) = operands[1..].split_at(1 + extent.sizes.len());
        let (view, start) = self.place(indices);
        let mask = match mask.first().map(|mask| self.tile(mask)) {
            Some(Tile::Pred(mask)) => Some(mask.as_ref().clone()),
            _ => None,
        };
        self.store_at(value, (&view, &start), extent, mask, add, origin)
    }

    /// Stores to a place of a view what a mask, if there is one, does not leave out.
    pub(super) fn store_at(
        &mut self,
        mut value: Tile,
        (view, start): (&View, &[i64]),
        extent: &Extent,
        mut mask: Option<Vec<bool>>,
        add: bool,
        origin: u32,
    ) -> Step<()> {
        let region = self.region(view, start, extent, origin)?;
        self.check_in_flight(&region, true, Some(origin))?;
        let RefElement::Data(element) = view.element else { unreachable!("decoding gives memory of numbers") };
        let stored = self.buffers[region.buffer].data.element();
        if add {
            self.check_written(&region, origin)?;
            let old = self.read(&region, extent, element);
            value = tile::binary(Binary::Add, element, old, value);
        }
        if element.bits() < stored.bits()
            && let Some(mask) = mask.take()
        {
            let old = self.read(&region, extent, element);
            value = tile::select(&Tile::Pred(Arc::new(mask)), value, old);
        }
        if stored != element {
            let ratio = (element.bits() / stored.bits()).max(1);
            value = tile::bitcast(&value, &extent.sizes, element, stored);
            let lanes = extent.sizes.last().copied().unwrap_or(1);
            mask = mask.map(|mask| mask.chunks(lanes).flat_map(|row| row.repeat(ratio)).collect());
        }
        self.observe_access(&region, true, mask.as_deref());
        self.buffers[region.buffer].write(&region, &value, mask.as_deref());
        Ok(())
    }

    pub(super) fn observe_access(&mut self, region: &Region, write: bool, mask: Option<&[bool]>) {
        let bytes = (region.len() * self.buffers[region.buffer].data.element().bytes()) as u64;
        self.observer.access(&AccessEvent { side: side(&self.buffers, region), bytes, write, mask });
    }
}

/// A region as observers see it.
pub(super) fn side<'s>(buffers: &'s [Buffer], region: &'s Region) -> Side<'s> {
    let Buffer { name, space, .. } = &buffers[region.buffer];
    Side { buffer: region.buffer, name, space: *space, region }
}

/// A scalar register as an integer.
pub(super) fn int(register: &Reg) -> i32 {
    match register {
        Reg::Scalar(Scalar::Int(x)) => *x,
        Reg::Scalar(Scalar::Pred(x)) => i32::from(*x),
        other => unreachable!("decoding gives an integer scalar, not {other:?}"),
    }
}

fn scalar_binary(op: Binary, element: Element, x: Scalar, y: Scalar) -> Scalar {
    match (x, y) {
        (Scalar::Float(x), Scalar::Float(y)) => Scalar::Float(tile::round(element, op.float(x, y))),
        (Scalar::Pred(x), Scalar::Pred(y)) => Scalar::Pred(op.int(Element::Pred, i32::from(x), i32::from(y)) & 1 != 0),
        (Scalar::Int(x), Scalar::Int(y)) => Scalar::Int(tile::wrap(element, op.int(element, x, y))),
        _ => unreachable!("decoding gives both sides one type"),
    }
}
