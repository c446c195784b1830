//! A decoded kernel: instructions over registers. It holds no MLIR.

use std::collections::HashMap;

use super::fuse::Fused;
use super::mxu::MxuOp;
use super::sparse::{OfMask, PackFormat};
use super::tile::{Binary, Compare, Conversion, MatmulShape, Reduction, RotationStride, Scalar, Tile, Unary};
use crate::{
    element::Element,
    mosaic::{CoreType, Frame, MemorySpace, RefElement, Role, Signature},
};

/// A register.
pub(super) type Slot = u32;

/// A register that an instruction reads; `last` when nothing reads it afterwards.
#[derive(Clone, Copy, Debug)]
pub(super) struct Use {
    pub(super) slot: Slot,
    pub(super) last: bool,
}

/// A sequence of instructions with parameters and results.
#[derive(Clone, Debug, Default)]
pub(super) struct Code {
    pub(super) parameters: Vec<Slot>,
    pub(super) body: Vec<Inst>,
    pub(super) yields: Vec<Use>,
}

#[derive(Clone, Debug)]
pub(super) struct Inst {
    pub(super) op: Op,
    /// Whether dropping it changes nothing but its results.
    pub(super) pure: bool,
    /// In the order of the op's operands; they are read in this order, each at most once.
    pub(super) operands: Vec<Use>,
    pub(super) results: Vec<Slot>,
    /// The op's regions.
    pub(super) codes: Vec<Code>,
    /// Registers that die here without being an operand that dies.
    pub(super) kills: Vec<Slot>,
    /// Index into [`Program::origins`].
    pub(super) origin: u32,
}

/// Where an instruction comes from.
#[derive(Clone, Debug)]
pub(super) struct Origin {
    pub(super) op: String,
    pub(super) location: String,
    /// The source line and those that called it, the innermost first.
    pub(super) frames: Vec<Frame>,
    /// How many elements the first result has.
    pub(super) elements: usize,
}

/// The extent of a box in a memref: sizes, and steps where they are not 1.
#[derive(Clone, Debug)]
pub(super) struct Extent {
    pub(super) sizes: Vec<usize>,
    pub(super) steps: Vec<usize>,
}

/// A tile's sizes, and the order that its dimensions are to have.
#[derive(Clone, Debug)]
pub(super) struct Permutation {
    pub(super) dims: Vec<usize>,
    pub(super) order: Vec<usize>,
}

/// Which of device, core and subcore are operands of an op that goes to another.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Target {
    pub(super) device: bool,
    pub(super) core: bool,
    pub(super) subcore: bool,
    /// The kind of core that the memory is of, if it is not that of the kernel's own.
    pub(super) of: Option<CoreType>,
}

impl Target {
    /// Whether it may be another core.
    pub(super) fn is_a_core(self) -> bool {
        self.core || self.subcore || self.of.is_some()
    }
}

/// How rows are copied one by one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RowDmas {
    /// Whether the source is the side whose rows a list names.
    pub(super) gathers: bool,
    /// Whether rows are added to what is there.
    pub(super) adds: bool,
}

/// What a mask says of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mask {
    /// A lane has its place, which is left out with it.
    Gaps,
    /// The lanes that are not left out lie one after another.
    Dense,
}

/// What an instruction does to its operands, which are those of the MLIR op that it was decoded from.
#[derive(Clone, Debug)]
pub(super) enum Op {
    Scalar(Scalar),
    Constant(Tile),
    Unary {
        op: Unary,
        element: Element,
    },
    Binary {
        op: Binary,
        element: Element,
    },
    Compare(Compare),
    /// Whether numbers are infinite or NaN.
    Weird,
    Select,
    Convert(Conversion),
    Broadcast {
        from: Vec<usize>,
        to: Vec<usize>,
    },
    /// The same elements under other sizes.
    Same,
    Transpose {
        dims: Vec<usize>,
        permutation: Vec<usize>,
    },
    Slice {
        dims: Vec<usize>,
        offsets: Vec<usize>,
        sizes: Vec<usize>,
        steps: Vec<usize>,
    },
    /// Tiles of these sizes after each other along `dim`: the operands, and again from the first until there is one for
    /// each.
    Concatenate {
        sizes: Vec<Vec<usize>>,
        dim: usize,
    },
    Rotate {
        dims: Vec<usize>,
        dim: usize,
        stride: Option<RotationStride>,
    },
    ReduceIndex {
        dims: Vec<usize>,
        dim: usize,
        greatest: bool,
    },
    Gather {
        dims: Vec<usize>,
        over: Vec<usize>,
        index_dims: Vec<usize>,
    },
    Pack {
        from: Element,
        to: Element,
        result: Element,
        len: usize,
    },
    Unpack {
        from: Element,
        part: Element,
        index: usize,
        to: Element,
    },
    /// Results: the low and the high half of a product.
    MultiplyInFull {
        element: Element,
        signed: bool,
    },
    /// `exponent_bits` where they are fewer than the type has.
    ReducePrecision {
        exponent_bits: Option<u32>,
        mantissa_bits: u32,
    },
    RoundStochastically {
        to: Element,
        /// As bits in the low places of a 32-bit integer.
        as_bits: bool,
    },
    /// Seeds the generator of random bits with its operands.
    Seed,
    RandomBits {
        element: Element,
        len: usize,
    },
    Reduce {
        how: Reduction,
        element: Element,
        dims: Vec<usize>,
        over: Vec<usize>,
    },
    Bitcast {
        dims: Vec<usize>,
        from: Element,
        to: Element,
    },
    Extract {
        index: usize,
    },
    Matmul {
        shape: MatmulShape,
        round: [bool; 2],
        /// What the two sides hold.
        elements: [Element; 2],
        /// Of the sides that must be transposed first.
        arrange: [Option<Permutation>; 2],
    },
    /// A matrix unit that the kernel drives itself.
    Mxu(MxuOp),
    /// With a mask as its last operand, if there is one.
    Load {
        extent: Extent,
        to: Element,
        mask: Option<Mask>,
    },
    /// As a load.
    Store {
        extent: Extent,
        add: bool,
        mask: Option<Mask>,
    },
    /// Each lane from where its indices say. Operands: the memref, a tile of indices for each dimension, perhaps a mask.
    LoadIndexed {
        rank: usize,
        to: Element,
    },
    /// Operands: the tile, then as `LoadIndexed`.
    StoreIndexed {
        rank: usize,
        add: bool,
    },
    /// The lanes of each row up to each one. Operands: the tile, perhaps a mask.
    Scan {
        how: Reduction,
        element: Element,
        lanes: usize,
    },
    /// How often a value has been there. Operands: mask, tile.
    Occurrences {
        lanes: usize,
    },
    /// Operands: keys, values, perhaps a mask.
    Sort {
        lanes: usize,
        descending: bool,
    },
    /// The same number in all of `lanes` lanes. Operand: a mask.
    OfMask {
        what: OfMask,
        lanes: usize,
    },
    PackLanes {
        positions: Vec<usize>,
        format: PackFormat,
        elements: [Element; 2],
        len: usize,
    },
    UnpackLanes {
        index: usize,
        format: PackFormat,
        elements: [Element; 2],
        signed: bool,
    },
    LoadScalar {
        extent: Extent,
    },
    StoreScalar {
        extent: Extent,
    },
    /// Operands: the memref, an index per dimension, a size for each that is not known.
    SliceRef {
        sizes: Vec<Option<usize>>,
    },
    /// The dimensions that stay.
    SqueezeRef {
        keep: Vec<usize>,
    },
    ReshapeRef {
        dims: Vec<Option<usize>>,
    },
    BitcastRef {
        to: Element,
    },
    /// A buffer that lives until the end of the block that it is in.
    Allocate {
        element: RefElement,
        dims: Vec<usize>,
        space: MemorySpace,
    },
    /// The semaphore that the devices of a program share.
    BarrierSemaphore,
    /// The number of this device.
    DeviceId,
    /// The size of a dimension of the grid.
    GridSize(usize),
    /// Operands: source, destination, semaphore.
    StartDma,
    /// A DMA with a semaphore on either side. Operands: source, its semaphore, destination, its semaphore, and as far as they
    /// are given the device and its core.
    StartRemoteDma(Target),
    /// Copies of single rows, of one side those that a list of numbers says, of the other one after another. Operands: source,
    /// destination, the list (a tile, or memory), semaphore, and as far as it is given the number that stands for no row.
    StartRowDmas(RowDmas),
    /// A wait for as many bytes as one operand has, on the semaphore that another is.
    WaitDma {
        semaphore: usize,
        bytes_of: usize,
    },
    /// Operands: semaphore, amount, and as far as they are given the device and its core.
    Signal(Target),
    WaitSemaphore,
    ReadSemaphore,
    /// All subcores of a SparseCore meet. Operand: which barrier.
    Barrier,
    /// Adds to a number in another subcore's memory, and gives what was there. Operands: the memref, its indices, the amount, the
    /// subcore.
    FetchAndAdd,
    AssumeMultiple(i32),
    /// Prints a text and the operands, which stand in the text where it is `formatted` for them: `$0`, `$1`.
    Print {
        text: String,
        formatted: bool,
    },
    /// A named region begins. Profilers' marks count as no ops.
    RegionStart(String),
    RegionStop,
    /// A condition that must hold, and what is wrong where it does not.
    Assert(String),
    If,
    For,
    While,
    Region,
    /// Elementwise ops that run together.
    Fused(Box<Fused>),
}

/// A decoded kernel. It holds no MLIR, so that it can be sent to and shared with other threads.
#[derive(Debug)]
pub struct Program {
    pub(super) signature: Signature,
    /// Its ops one by one, which observers see, and in groups.
    pub(super) body: Code,
    pub(super) fused: Code,
    /// The transform of each argument's window.
    pub(super) transforms: Vec<Option<Code>>,
    pub(super) origins: Vec<Origin>,
    /// Whether it prints anything.
    pub(super) prints: bool,
    /// Elements that the ops of a grid step make, each run once.
    pub(super) work: u64,
    pub(super) slots: usize,
    pub(super) aliases: Vec<(usize, usize)>,
    pub(super) unused_outputs: Vec<usize>,
    /// Where the kernel function is, as far as its module says.
    pub(super) frames: Vec<Frame>,
    /// Where the transform of each argument's window is.
    pub(super) transform_frames: Vec<Vec<Frame>>,
    /// What it says to other devices, and cores.
    pub(super) communication: Communication,
    /// What the other kinds of cores run at the same time.
    pub(super) partners: Vec<Program>,
    /// Arguments that the kernel does not name.
    pub(super) unnamed: Vec<usize>,
}

impl Code {
    /// Whether an op in it prints.
    pub(super) fn prints(&self) -> bool {
        let of = |inst: &Inst| matches!(inst.op, Op::Print { .. }) || inst.codes.iter().any(Self::prints);
        self.body.iter().any(of)
    }

    /// Parameters that no op in it reads, the first `rank` aside.
    pub(super) fn unnamed(&self, rank: usize) -> Vec<usize> {
        fn reads(code: &Code, slot: Slot) -> bool {
            let of = |inst: &Inst| {
                inst.operands.iter().any(|read| read.slot == slot) || inst.codes.iter().any(|code| reads(code, slot))
            };
            code.yields.iter().any(|read| read.slot == slot) || code.body.iter().any(of)
        }
        let parameters = self.parameters.iter().skip(rank).enumerate();
        parameters.filter(|&(_, &slot)| !reads(self, slot)).map(|(at, _)| at).collect()
    }
}

/// What a kernel says to other devices, and where they may write.
#[derive(Debug, Default)]
pub(super) struct Communication {
    /// Whether there is any.
    pub(super) any: bool,
    /// Whether it names the barrier semaphore. Where no kernel does, devices enter it together.
    pub(super) own_barrier: bool,
    /// Arguments that DMAs of other devices write to.
    pub(super) arguments: Vec<usize>,
    /// Ops that allocate such memory.
    pub(super) allocations: Vec<u32>,
    /// Whether they may write anywhere: it is not known where.
    pub(super) anywhere: bool,
    /// Whether cores of one device wait for each other.
    pub(super) meets: bool,
    /// Whether it allocates memory that others reach in other ways than by DMAs: what subcores share, and what they add to.
    pub(super) allocates_common: bool,
}

impl Communication {
    /// That of the kernel `body`, whose first parameters are the grid's indices, `rank` of them.
    pub(super) fn of(body: &Code, rank: usize) -> Self {
        let mut found = Self::default();
        let mut roots: HashMap<Slot, Root> = HashMap::new();
        roots.extend(body.parameters.iter().skip(rank).enumerate().map(|(at, &slot)| (slot, Root::Argument(at))));
        found.read(body, &mut roots);
        found
    }

    fn read(&mut self, code: &Code, roots: &mut HashMap<Slot, Root>) {
        for inst in &code.body {
            let first = inst.operands.first().and_then(|read| roots.get(&read.slot).copied());
            let root = match inst.op {
                Op::Allocate { .. } => Some(Root::Allocation(inst.origin)),
                Op::SliceRef { .. } | Op::SqueezeRef { .. } | Op::ReshapeRef { .. } | Op::BitcastRef { .. } => first,
                Op::Same => first,
                _ => None,
            };
            roots.extend(root.zip(inst.results.first()).map(|(root, &slot)| (slot, root)));
            match inst.op {
                Op::BarrierSemaphore => self.own_barrier = true,
                Op::Signal(target) => {
                    self.any |= target.device;
                    self.meets |= target.is_a_core();
                }
                Op::Barrier => self.meets = true,
                Op::Allocate { space: MemorySpace::VmemShared, .. } => self.allocates_common = true,
                Op::FetchAndAdd => {
                    self.meets = true;
                    match first {
                        Some(Root::Argument(at)) => self.arguments.push(at),
                        _ => self.allocates_common = true,
                    }
                }
                Op::StartRemoteDma(target) => {
                    self.any = true;
                    self.meets |= target.is_a_core();
                    match roots.get(&inst.operands[2].slot) {
                        Some(&Root::Argument(at)) => self.arguments.push(at),
                        Some(&Root::Allocation(origin)) => self.allocations.push(origin),
                        None => self.anywhere = true,
                    }
                }
                _ => {}
            }
            inst.codes.iter().for_each(|code| self.read(code, roots));
        }
    }
}

/// What a view is of.
#[derive(Clone, Copy)]
enum Root {
    Argument(usize),
    Allocation(u32),
}

impl Program {
    /// Lets output `output` live in the memory of input `input`, as the custom call says (both counted from 0).
    pub fn with_aliases(mut self, aliases: &[(usize, usize)]) -> Self {
        self.aliases = aliases.to_vec();
        self.partners = self.partners.into_iter().map(|partner| partner.with_aliases(aliases)).collect();
        self
    }

    /// Says which outputs (counted from 0) nobody reads after the call: a kernel may use them as scratch memory. What
    /// they hold at the end is not a fault, be it unwritten or written by several `parallel` steps.
    pub fn with_unused_outputs(mut self, outputs: &[usize]) -> Self {
        self.unused_outputs = outputs.to_vec();
        self.partners = self.partners.into_iter().map(|partner| partner.with_unused_outputs(outputs)).collect();
        self
    }

    /// Gives the arguments other names, as many as there are: those that the kernel's author gave them.
    pub fn with_names(mut self, names: &[String]) -> Self {
        for (argument, name) in self.signature.arguments.iter_mut().zip(names) {
            argument.name.clone_from(name);
        }
        self.partners = self.partners.into_iter().map(|partner| partner.with_names(names)).collect();
        self
    }

    /// Whether the kernel prints anything: an [observer](super::Observer) hears it.
    pub fn prints(&self) -> bool {
        self.prints || self.partners.iter().any(Self::prints)
    }

    /// The source line of the kernel function, or of its first op that has one, and those that called it.
    pub fn frames(&self) -> &[Frame] {
        &self.frames
    }

    /// Whether semaphores are among its operands and results.
    pub(super) fn has_semaphores_of_the_call(&self) -> bool {
        self.signature
            .arguments
            .iter()
            .any(|argument| argument.element.data().is_none() && argument.role != Role::Scratch)
    }

    /// The kernel's grid and arguments.
    pub fn signature(&self) -> &Signature {
        &self.signature
    }
}
