//! Ragged paged attention: every sequence of a batch attends, causally, over its own pages of a shared KV cache.
//!
//! Row `i` of a sequence stands at position `kv_len - q_len + i`. It sees the keys `j <= position` and, with a window
//! of `w`, `j > position - w`. Logits are scaled, then soft-capped, then masked; softmax over the keys; weighted sum of
//! the values. Query heads share KV heads in groups (GQA). Rows from `cu_q_lens[num_seqs]` on are padding, and their
//! results must not be used.
//!
//! Invariant of every form: memory outside the live sequences (other pages, the tail of a partial page, padding rows) may
//! hold anything, NaN included, and never reaches the result of a live row.
pub mod batch;
pub mod kv_write;
pub mod mosaic;
pub mod native;
pub mod plan;
pub mod problem;
pub mod reference;
pub mod stablehlo;

use pagoda_ir::HostTensor;

pub use self::{
    batch::{Batch, Sequence},
    problem::{Kind, Problem, Spec},
    reference::reference,
};

/// Host arrays for one launch.
#[derive(Clone, Debug)]
pub struct Inputs {
    /// `[tokens, q_heads, head_dim]`
    pub q: HostTensor,
    /// `[layers * pages, page_size, 2 * kv_heads, head_dim]`
    pub kv_pages: HostTensor,
    /// The ragged metadata.
    pub batch: Batch,
    /// The layer whose pages are read; below `layers`.
    pub layer: usize,
}

impl Inputs {
    /// The kernel's arguments, in the order of [`Problem::argument_types`].
    pub fn to_tensors(&self, problem: &Problem) -> Vec<HostTensor> {
        let mut tensors = vec![self.q.clone(), self.kv_pages.clone()];
        tensors.extend(self.batch.to_tensors());
        if problem.layers > 1 {
            tensors.push(HostTensor::scalar((self.layer * problem.pages) as i32));
        }
        tensors
    }
}
