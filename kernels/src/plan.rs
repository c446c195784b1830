//! A planned kernel: every tile and every VMEM buffer named, before anything is compiled.
//!
//! Pure, and a matter of milliseconds. A plan is legal by construction: tiles that no layout allows are refused with the
//! rule they break. Whether the kernel *fits* is the separate question that [`Plan::verdict`] answers, from evidence.

use pagoda_ir::{
    Context, Element,
    mosaic::{self, tile_padded_bytes},
    stablehlo::Module,
    tile_machine::Machine,
};

use crate::{
    chips::Chip,
    cost,
    error::Invalid,
    kernel::{self, Kernel, ProblemOf},
    named::{Arguments, Role},
    random::Lengths,
    vmem::{Bytes, Spills, Suggestion, Verdict, VmemReport},
};

/// What the user may fix; the planner chooses the rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options<T> {
    /// Tiles, instead of the planner's choice.
    pub tiles: Option<T>,
    /// Scoped VMEM limit, instead of the chip's default.
    pub vmem_limit: Option<Bytes>,
}

impl<T> Default for Options<T> {
    fn default() -> Self {
        Self { tiles: None, vmem_limit: None }
    }
}

/// Why a plan cannot be made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{key} = {value} {limit}: {fix}")]
pub struct PlanError {
    /// The setting.
    pub key: &'static str,
    /// Its value.
    pub value: String,
    /// What it breaks.
    pub limit: String,
    /// What to do.
    pub fix: String,
}

/// What follows from a problem and legal tiles on a chip.
#[derive(Clone, Debug, PartialEq)]
pub struct Layout<D> {
    /// Name of the kernel, tiles in it: `rpa-p128-bq128-kv4`.
    pub name: String,
    /// Steps of each grid dimension, the outermost first.
    pub grid: Vec<usize>,
    /// Every VMEM buffer, in the order of the kernel's operands.
    pub vmem: VmemReport,
    /// SMEM that the prefetched arrays take.
    pub smem: Bytes,
    /// What the spills of the kernel depend on.
    pub spilling: Spilling,
    /// What else the kernel's emission and its report need.
    pub details: D,
}

/// What decides how much a kernel spills, as far as a planner can know it: [`crate::evidence`] estimates from it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spilling {
    /// What decides the kernel's text beside sizes: kernels of one family spill alike.
    pub family: String,
    /// Bytes of the values that the body holds at once, roughly: spills of a family grow with it.
    pub live: Bytes,
}

/// A kernel planned for a chip.
#[derive(Debug)]
pub struct Plan<K: Kernel> {
    problem: ProblemOf<K>,
    chip: Chip,
    tiles: K::Tiles,
    limit: Bytes,
    layout: Layout<K::Details>,
}

impl<K: Kernel> Clone for Plan<K> {
    fn clone(&self) -> Self {
        let Self { problem, chip, tiles, limit, layout } = self;
        Self { problem: problem.clone(), chip: *chip, tiles: *tiles, limit: *limit, layout: layout.clone() }
    }
}

impl<K: Kernel> Plan<K> {
    /// Plans `problem` on `chip`: with the given tiles, or with the best ones that fit the limit.
    ///
    /// # Errors
    /// When the limit passes the chip's VMEM, the kernel cannot be planned for the problem, the tiles are illegal, or no
    /// tiles fit the limit.
    pub fn new(problem: ProblemOf<K>, chip: Chip, options: Options<K::Tiles>) -> Result<Self, PlanError> {
        Self::over(problem, chip, options, &[])
    }

    /// As [`Plan::new`], with the best tiles for launches over `batches`; where there are none, over the kernel's spread.
    ///
    /// # Errors
    /// As [`Plan::new`], and when a batch is not one of the problem.
    pub fn over(
        problem: ProblemOf<K>,
        chip: Chip,
        options: Options<K::Tiles>,
        batches: &[Vec<Lengths>],
    ) -> Result<Self, PlanError> {
        batches.iter().try_for_each(|batch| K::check_batch(&problem, Some(batch)))?;
        let limit = scoped_limit(chip, options.vmem_limit)?;
        K::plannable(&problem, chip)?;
        let tiles = match options.tiles {
            Some(tiles) => {
                K::legal(&problem, chip, tiles)?;
                tiles
            }
            None => K::choose(&problem, chip, limit, batches).ok_or_else(|| PlanError {
                key: "vmem-limit",
                value: limit.to_string(),
                limit: format!("holds no legal tiles of {} {}", K::NAME, K::describe(&problem)),
                fix: format!("raise it, up to {} on {chip}", chip.info().vmem_per_core),
            })?,
        };
        Ok(Self::with(problem, chip, tiles, limit))
    }

    /// Every plan of `problem` on `chip` within the limit that is worth a compilation, the cheapest over `batches` by the
    /// kernel's model first. The planner's choice for them is among them.
    ///
    /// # Errors
    /// As [`Plan::over`].
    pub fn all(
        problem: &ProblemOf<K>,
        chip: Chip,
        vmem_limit: Option<Bytes>,
        batches: &[Vec<Lengths>],
    ) -> Result<Vec<Self>, PlanError> {
        let chosen = Self::over(problem.clone(), chip, Options { tiles: None, vmem_limit }, batches)?;
        let others = K::candidates(problem, chip, chosen.limit).into_iter().filter(|&tiles| tiles != chosen.tiles);
        let others = others.map(|tiles| Self::with(problem.clone(), chip, tiles, chosen.limit));
        let plans: Vec<Self> = std::iter::once(chosen.clone()).chain(others).collect();
        let mut scored: Vec<_> = cost::scores(&plans.iter().map(|plan| plan.modelled(batches)).collect::<Vec<_>>())
            .into_iter()
            .zip(plans)
            .collect();
        scored.sort_by(|(one, _), (other, _)| one.total_cmp(other));
        Ok(scored.into_iter().map(|(_, plan)| plan).collect())
    }

    /// Cycles by the kernel's model: of a launch over each of `batches`; of one launch, where there are none.
    fn modelled(&self, batches: &[Vec<Lengths>]) -> Vec<f64> {
        let of = |batch: Option<&[Lengths]>| K::model(self, batch).unwrap_or(1.0);
        if batches.is_empty() { vec![of(None)] } else { batches.iter().map(|batch| of(Some(batch))).collect() }
    }

    /// The plan with legal tiles.
    pub(crate) fn with(problem: ProblemOf<K>, chip: Chip, tiles: K::Tiles, limit: Bytes) -> Self {
        let layout = K::layout(&problem, chip, tiles);
        Self { problem, chip, tiles, limit, layout }
    }

    /// The same plan with another layout: that of a part of it.
    pub(crate) fn laid_out(self, layout: Layout<K::Details>) -> Self {
        Self { layout, ..self }
    }

    /// The problem.
    pub fn problem(&self) -> &ProblemOf<K> {
        &self.problem
    }

    /// The chip that it is for.
    pub fn chip(&self) -> Chip {
        self.chip
    }

    /// The tiles.
    pub fn tiles(&self) -> K::Tiles {
        self.tiles
    }

    /// The scoped VMEM limit that the kernel asks for.
    pub fn limit(&self) -> Bytes {
        self.limit
    }

    /// Name of the kernel, tiles in it.
    pub fn name(&self) -> &str {
        &self.layout.name
    }

    /// The problem in words.
    pub fn describe(&self) -> String {
        K::describe(&self.problem)
    }

    /// Steps of each grid dimension, the outermost first.
    pub fn grid(&self) -> &[usize] {
        &self.layout.grid
    }

    /// Every VMEM buffer.
    pub fn vmem(&self) -> &VmemReport {
        &self.layout.vmem
    }

    /// SMEM that the prefetched arrays take.
    pub fn smem(&self) -> Bytes {
        self.layout.smem
    }

    /// What its spills depend on.
    pub fn spilling(&self) -> &Spilling {
        &self.layout.spilling
    }

    /// What only plans of this kernel have.
    pub fn details(&self) -> &K::Details {
        &self.layout.details
    }

    /// The plan of the same problem with the tiles that the planner would choose within the same limit, for the kernel's
    /// spread of batches.
    pub fn replanned(&self) -> Option<Self> {
        let tiles = K::choose(&self.problem, self.chip, self.limit, &[])?;
        Some(Self::with(self.problem.clone(), self.chip, tiles, self.limit))
    }

    /// The Mosaic kernel.
    ///
    /// # Errors
    /// None, unless MLIR fails.
    pub fn kernel<'c>(&self, context: &'c Context) -> pagoda_ir::Result<mosaic::Kernel<'c>> {
        self.kernel_by(context, |k| K::mosaic(k, self))
    }

    /// As [`Plan::kernel`], with a body of the caller's: a variant of the kernel that asks for the same VMEM.
    ///
    /// # Errors
    /// The first op that cannot be built.
    pub fn kernel_by<'c>(
        &self,
        context: &'c Context,
        body: impl for<'a> FnOnce(&'a mosaic::Builder<'a>),
    ) -> pagoda_ir::Result<mosaic::Kernel<'c>> {
        mosaic::kernel(context, self.name(), |k| {
            body(k);
            k.vmem_limit(self.limit.0 as usize);
            k.cost(K::cost(&self.problem));
            kernel::aliases::<K>(&self.problem, self.chip)
                .into_iter()
                .for_each(|(operand, result)| k.alias(operand, result));
        })
    }

    /// A StableHLO module whose `main` takes the problem's arguments and runs the Mosaic kernel on them.
    ///
    /// # Errors
    /// As [`Plan::kernel`].
    pub fn module<'c>(&self, context: &'c Context) -> pagoda_ir::Result<Module<'c>> {
        kernel::mosaic_module(context, self, &self.kernel(context)?)
    }

    /// A tile machine with the chip's memories, VMEM limited as the plan says.
    pub fn machine(&self) -> Machine {
        let info = self.chip.info();
        let [vmem_bytes, smem_bytes, hbm_bytes] =
            [self.limit, info.smem_per_core, info.hbm].map(|bytes| bytes.0 as usize);
        Machine { vmem_bytes, smem_bytes, hbm_bytes, ..Machine::default() }
    }

    /// Whether it fits, given what is known of its spills. Suggestions change tiles or the limit, never the problem.
    pub fn verdict(&self, spills: Spills) -> Verdict {
        let (total, vmem) = (self.vmem().total(), self.chip.info().vmem_per_core);
        let known = spills.bytes().unwrap_or_default();
        Verdict::new(total, spills, self.limit, || {
            let smaller = self.replanned().map(|plan| (plan.tiles().to_string(), plan.vmem().total()));
            let tiles = smaller.filter(|&(_, bytes)| bytes < total);
            let limit = (total + known <= vmem).then_some(Suggestion::Limit { bytes: total + known, chip: vmem });
            tiles.map(|(tiles, bytes)| Suggestion::Tiles { tiles, bytes }).into_iter().chain(limit).collect()
        })
    }
}

impl From<Invalid> for PlanError {
    /// What is not a problem cannot be planned.
    fn from(invalid: Invalid) -> Self {
        Self { key: "problem", value: invalid.key + " = " + &invalid.value, limit: invalid.limit, fix: invalid.fix }
    }
}

/// The scoped VMEM limit of a kernel on `chip`: the one that was asked for, or the chip's default.
///
/// # Errors
/// When it is zero or passes the chip's VMEM.
fn scoped_limit(chip: Chip, asked: Option<Bytes>) -> Result<Bytes, PlanError> {
    let info = chip.info();
    let limit = asked.unwrap_or(info.default_scoped_limit);
    if limit > info.vmem_per_core || limit.0 == 0 {
        return Err(PlanError {
            key: "vmem-limit",
            value: limit.to_string(),
            limit: format!("is not within the {} of VMEM that a core of {chip} has", info.vmem_per_core),
            fix: format!("give at most {}", info.vmem_per_core),
        });
    }
    Ok(limit)
}

/// SMEM that the prefetched ones of `arguments` take: tiles of 128 lanes and up to 8 rows, as in VMEM (seen with libtpu
/// 0.0.52, which takes 509 x 128 pages of 3 sequences as of 4, 127 x 128 of 10 as of 16, and none more).
pub fn smem(arguments: &Arguments) -> Bytes {
    let padded = |dims: &[usize]| tile_padded_bytes(Element::I32, if dims.is_empty() { &[1] } else { dims }) as u64;
    let scalars = arguments.iter().filter(|argument| argument.role == Role::Prefetch);
    Bytes(scalars.map(|argument| padded(&argument.ty.dims)).sum())
}

/// The positive numbers of `text`, as tiles are written: `512,512,1024`.
///
/// # Errors
/// When the text is not `N` positive numbers; `form` and `example` say how to write them.
pub fn positive_numbers<const N: usize>(text: &str, form: &str, example: &str) -> Result<[usize; N], PlanError> {
    let numbers: Option<Vec<usize>> = text.split(',').map(|part| part.trim().parse().ok()).collect();
    let numbers = numbers.filter(|numbers| numbers.iter().all(|&number| number > 0));
    numbers.and_then(|numbers| numbers.try_into().ok()).ok_or_else(|| PlanError {
        key: "tiles",
        value: text.to_owned(),
        limit: format!("is not {form}"),
        fix: format!("write e.g. {example}, or leave the tiles to the planner"),
    })
}
