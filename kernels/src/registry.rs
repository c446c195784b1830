//! The list of kernels: the one place that names them all. Whatever is done for every kernel goes through it.

/// Calls the macro `with!` with the list of kernels, `name: type` each.
#[macro_export]
macro_rules! for_each_kernel {
    ($with:ident) => {
        $with! {
            matmul: $crate::matmul::Matmul,
            grouped_matmul: $crate::grouped_matmul::GroupedMatmul,
            rpa: $crate::rpa::Rpa,
            rms_norm: $crate::rms_norm::RmsNorm,
        }
    };
}
