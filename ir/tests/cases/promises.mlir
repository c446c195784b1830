// A false promise to the compiler.
// in i32[2] = 4 8
// run
// fault: broken-assumption: kernel `k`: broken promise to the compiler: tpu.assume_multiple at promises.mlir:8, grid step []: 4 is not a multiple of 8
func.func @k(%x: memref<2xi32, "smem">) {
  %c = arith.constant 0 : index
  %v = memref.load %x[%c] : memref<2xi32, "smem">
  %w = "tpu.assume_multiple"(%v) {multiple = 8 : i32} : (i32) -> i32
  return
}
// -----
// A true one.
// in i32[2] = 16 8
// run
// ok
func.func @k(%x: memref<2xi32, "smem">) {
  %c = arith.constant 0 : index
  %v = memref.load %x[%c] : memref<2xi32, "smem">
  %w = "tpu.assume_multiple"(%v) {multiple = 8 : i32} : (i32) -> i32
  return
}
// -----
// A division by zero.
// in i32[2] = 1 0
// out i32[2]
// run
// fault: division-by-zero: kernel `k`: integer division by zero: arith.divsi at promises.mlir:33, grid step []
func.func @k(%x: memref<2xi32, "smem">, %out: memref<2xi32, "smem">) {
  %c = arith.constant 0 : index
  %one = arith.constant 1 : index
  %v = memref.load %x[%c] : memref<2xi32, "smem">
  %w = memref.load %x[%one] : memref<2xi32, "smem">
  %d = arith.divsi %v, %w : i32
  memref.store %d, %out[%c] : memref<2xi32, "smem">
  return
}
// -----
// A loop without end.
// run
// fault: runaway: kernel `k`: too many ops or grid steps: scf.while at promises.mlir:43, grid step []: more than 10000 (`Machine::max_ops`): a loop that never ends?
func.func @k(%a: memref<1xi32, "smem">) attributes {scratch_operands = 1 : i64} {
  %one = arith.constant 1 : i32
  %i = scf.while (%i = %one) : (i32) -> i32 {
    %more = arith.cmpi sgt, %i, %one : i32
    %less = arith.cmpi sle, %i, %one : i32
    %always = arith.ori %more, %less : i1
    scf.condition(%always) %i : i32
  } do {
  ^bb0(%i: i32):
    %same = arith.muli %i, %one : i32
    scf.yield %same : i32
  }
  return
}
// -----
// Too many grid steps.
// run max_ops=100
// fault: runaway: kernel `k`: too many ops or grid steps: pipeline at the kernel's grid, grid step [0, 99]: a grid of 1000000 steps (`Machine::max_ops` is 100)
func.func @k(%i: i32, %j: i32, %a: memref<1xi32, "smem">)
  attributes {iteration_bounds = array<i64: 1000, 1000>, scratch_operands = 1 : i64} { return }
