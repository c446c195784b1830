//! Every test of this crate that needs no private item, as one binary: each links all of MLIR.

mod cases;
mod fused;
mod mosaic;
mod orders;
mod states;
mod tile_machine;
mod trace;
