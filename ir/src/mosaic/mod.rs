//! Mosaic: TPU kernels as MLIR, built with a vocabulary that a Pallas author knows.
//!
//! [`kernel`] opens a kernel; its closure declares the grid, the operands and the scratch memory on a [`Builder`] and
//! then writes the body with [`Value`]s (scalars and whole tiles) and [`Ref`]s (views of HBM, VMEM, SMEM and semaphore
//! memory):
//!
//! ```
//! use pagoda_ir::{Context, Element, mosaic::{self, MemorySpace, Semantics, Window}};
//!
//! let context = Context::new();
//! // C[m, n] = A[m, k] B[k, n], one 128 x 128 tile of C at a time.
//! let matmul = mosaic::kernel(&context, "matmul", |k| {
//!     let [_, _, step] = k.grid([(4, Semantics::Parallel), (4, Semantics::Parallel), (2, Semantics::Arbitrary)]);
//!     let a = k.input("a", Element::Bf16, &[512, 512], Window::blocks(&[128, 256], |t| [t.grid(0), t.grid(2)]));
//!     let b = k.input("b", Element::Bf16, &[512, 512], Window::blocks(&[256, 128], |t| [t.grid(2), t.grid(1)]));
//!     let c = k.output("c", Element::F32, &[512, 512], Window::blocks(&[128, 128], |t| [t.grid(0), t.grid(1)]));
//!     let sum = k.scratch("sum", MemorySpace::Vmem, Element::F32, &[128, 128]);
//!     k.when(step.equals(0), || sum.store(0.0));
//!     sum.store(k.matmul(a.load(), b.load(), sum.load()));
//!     k.when(step.equals(1), || c.store(sum.load()));
//! })?;
//! assert!(matmul.text().contains("tpu.matmul"));
//! # Ok::<(), pagoda_ir::Error>(())
//! ```
//!
//! # Errors
//! No op returns a `Result`, so that a body reads like the algorithm: the first op whose shapes, element types, tiling
//! or memory spaces do not fit is remembered with its name and its source line, later ops see a placeholder of the
//! expected type, and [`kernel`] returns that first error. A kernel that is returned has passed MLIR's verifier.
//!
//! # Invariants
//! - Every op is the true Mosaic op: upstream dialects (`arith`, `math`, `scf`, `vector`, `memref`, `func`) as MLIR
//!   knows them, `tpu.*` unregistered with exactly the attributes that libtpu expects (form of `stable_mosaic` version
//!   15, [`wire::VERSION`]).
//! - Every op carries the source line of the kernel that built it: the compiler's errors and the tile machine's faults
//!   point there.
//! - Scalars are `i32` (or a float); `index` appears only as the index of a load or store.
//! - The builder never reorders, folds or drops what the kernel says.
//!
//! Source of op names, operands and attributes: the `tpu` dialect of `jaxlib/mosaic` and modules lowered by JAX 0.10.2.

mod builder;
mod bytecode;
mod debug;
pub mod hosted;
mod location;
mod memref;
mod signature;
pub mod text;
pub mod tiling;
mod value;
pub mod wire;

pub use builder::{Builder, Carry, Cost, Kernel, Operand, Role, Semantics, Transform, Window, kernel};
pub use location::Frame;
pub(crate) use location::{Place, describe_function, place_of_function};
pub(crate) use memref::describe as describe_memref;
pub use memref::{Dma, IntoIndices, MemorySpace, Ref, RefElement};
pub use signature::{Argument, CoreType, Signature, WindowParams};
pub(crate) use signature::{
    countable, first_block, functions, i64_array, kernel_functions, op_name, read_memref, symbol,
};
pub use tiling::tile_padded_bytes;
pub use value::{DotDims, IntoOperand, Literal, Precision, Value};
pub(crate) use value::{scalar_element, vector_dims};
