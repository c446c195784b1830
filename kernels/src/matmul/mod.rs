//! Matrix multiplication with f32 accumulation and an optional fused epilogue.
//!
//! One activation matrix `x` of `m` rows and `k` features, one weight `w` of `n` output features. [`Layout`] says how the
//! three arrays lie in memory; the product is the same.
pub mod mosaic;
pub mod native;
pub mod plan;
pub mod problem;
pub mod reference;
pub mod stablehlo;

use pagoda_ir::HostTensor;

pub use self::{
    problem::{Activation, Epilogue, Layout, Problem, Spec},
    reference::reference,
};

/// Host arrays for one launch; [`Problem::argument_types`] gives their types.
#[derive(Clone, Debug)]
pub struct Inputs {
    /// The activations.
    pub x: HostTensor,
    /// The weight.
    pub w: HostTensor,
    /// One value per column of the weight, where the epilogue adds one.
    pub bias: Option<HostTensor>,
    /// Has the output's type, where the epilogue adds it.
    pub residual: Option<HostTensor>,
}

impl Inputs {
    /// The kernel's arguments, in the order of [`Problem::argument_types`].
    pub fn to_tensors(&self) -> Vec<HostTensor> {
        [&self.x, &self.w].into_iter().chain(&self.bias).chain(&self.residual).cloned().collect()
    }
}
