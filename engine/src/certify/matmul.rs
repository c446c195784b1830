//! Planning and certifying matmuls: what `pagoda plan matmul` and `pagoda certify matmul` answer.

use pagoda_ir::Element;
use pagoda_kernels::matmul::plan::{Plan, Tiles};
use pagoda_kernels::matmul::{Epilogue, Layout, Problem, Spec};

use super::Certifier;
use super::kernel::{invalid, options, refused};
use crate::error::Result;

/// A matmul's plan, told.
pub type Planned = super::kernel::Planned<Plan>;
/// A matmul's plan and the compiler's answer to it.
pub type Certified = super::kernel::Certified<Plan>;

/// A matmul to plan, as the command line takes it.
#[derive(Clone, Debug)]
pub struct Request {
    /// The problem.
    pub spec: Spec,
    /// The chip's name.
    pub chip: String,
    /// Scoped VMEM limit, `16MiB`; the chip's default if absent.
    pub vmem_limit: Option<String>,
    /// Tiles `M,N,K`; the planner's choice if absent.
    pub tiles: Option<String>,
}

impl Request {
    /// A product of the given sizes and type, row-major, with nothing fused, on `chip`.
    pub fn new(m: usize, k: usize, n: usize, element: Element, chip: &str) -> Self {
        let spec =
            Spec { m, k, n, input: element, output: element, layout: Layout::RowMajor, epilogue: Epilogue::NONE };
        Self { spec, chip: chip.to_owned(), vmem_limit: None, tiles: None }
    }

    /// Plans it.
    ///
    /// # Errors
    /// A [`crate::Error::Setting`] for the first value that cannot work.
    pub fn plan(&self) -> Result<Plan> {
        let (limit, tiles) = (self.vmem_limit.as_deref(), self.tiles.as_deref());
        let (chip, options) = options(&self.chip, limit, tiles, Tiles::parse)?;
        Plan::new(Problem::new(self.spec).map_err(invalid)?, chip, options).map_err(refused)
    }
}

/// Plans a matmul and judges the plan by the recorded certifications.
///
/// # Errors
/// As [`Request::plan`].
pub fn plan_matmul(request: &Request) -> Result<Planned> {
    Ok(Planned::new(&request.plan()?))
}

/// Plans a matmul, has the real compiler compile it for one host of the chip, and compares.
///
/// # Errors
/// As [`Request::plan`]; and when the compiler is missing, crashes, takes too long or refuses the kernel.
pub fn certify_matmul(request: &Request, certifier: &Certifier) -> Result<Certified> {
    Certified::new(&request.plan()?, certifier)
}
