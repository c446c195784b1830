//! A case drawn from numbers: a kernel's own [`Kernel::sample`], a chip, and inputs. What property tests check, for a
//! kernel inside or outside the registry.

use pagoda_ir::tile_machine::Run;

use crate::{
    check::{Case, CheckError, Runner, check_mosaic},
    chips::Chip,
    choices::Choices,
    kernel::Kernel,
    named::Arrays,
    plan::{Options, Plan},
    problem::Problem,
    random::Lengths,
};

/// A planned kernel with inputs, drawn.
#[derive(Debug)]
pub struct Drawn<K: Kernel> {
    /// The plan: of the drawn tiles, with all of the chip's VMEM.
    pub plan: Plan<K>,
    /// Inputs of the problem.
    pub inputs: Arrays,
    /// Lengths of a ragged batch, where the kernel works on one.
    pub batch: Option<Vec<Lengths>>,
    /// What the inputs, and one order of DMAs, were drawn from.
    pub seed: u64,
}

impl<K: Kernel> Drawn<K> {
    /// The case that `choices` stand for.
    ///
    /// # Panics
    /// When the kernel's sample is not valid: its problem, its tiles or its batch.
    pub fn new(mut choices: Choices) -> Self {
        let (seed, chip) = (choices.bits(), choices.one_of(&Chip::ALL));
        let sample = K::sample(&mut choices);
        let problem = Problem::new(sample.spec).unwrap_or_else(|invalid| panic!("the sample's problem: {invalid}"));
        // All of the chip's VMEM: whether tiles fit the default limit is not the question here.
        let options = Options { tiles: Some(sample.tiles), vmem_limit: Some(chip.info().vmem_per_core) };
        let inputs = K::draw(&problem, sample.batch.as_deref(), seed);
        let inputs = inputs.unwrap_or_else(|invalid| panic!("the sample's batch: {invalid}"));
        let plan = Plan::new(problem, chip, options).unwrap_or_else(|error| panic!("the sample's tiles: {error}"));
        Self { plan, inputs, batch: sample.batch, seed }
    }

    /// The plan and the inputs.
    pub fn case(&self) -> Case<'_, K> {
        Case::new(&self.plan, &self.inputs)
    }

    /// Checks the Mosaic form on the tile machine and, with a runner, the StableHLO form.
    ///
    /// # Errors
    /// As [`check_mosaic`].
    pub fn check(&self, stablehlo: Option<&dyn Runner>) -> Result<Run, CheckError> {
        check_mosaic(self.case(), self.seed, stablehlo)
    }
}
