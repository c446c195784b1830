!hbm = memref<8x128xf32, "hbm">
!vmem = memref<8x128xf32, "vmem">
!dma = memref<!tpu.dma_semaphore, "semaphore_mem">
// -----
// Sent from an input's window in step 0, waited for in step 2, whose block has the same buffer.
// in f32[24,128] = wave 0
// out f32[8,128]
// run
// fault (early, random 0, random 1): overwrite-in-flight: kernel `k`: overwrite of a buffer whose DMA is in flight: pipeline at the kernel's grid, buffer `x` at [0, 0], grid step [1], DMA from `x` to `out` started at windows.mlir:17 in grid step [0]
// fault (late): overwrite-in-flight: kernel `k`: overwrite of a buffer whose DMA is in flight: pipeline at the kernel's grid, buffer `x` at [0, 0], grid step [2], DMA from `x` to `out` started at windows.mlir:17 in grid step [0]
func.func @k(%i: i32, %x: !vmem, %out: !hbm, %s: !dma) attributes {iteration_bounds = array<i64: 3>,
    scratch_operands = 1 : i64, window_params = [{transform_indices = @t, window_bounds = array<i64: 8, 128>}, {}]} {
  %zero = arith.constant 0 : i32
  %two = arith.constant 2 : i32
  %first = arith.cmpi eq, %i, %zero : i32
  %last = arith.cmpi eq, %i, %two : i32
  scf.if %first { "tpu.enqueue_dma"(%x, %out, %s) : (!vmem, !hbm, !dma) -> () }
  scf.if %last { "tpu.wait_dma2"(%s, %x, %out) : (!dma, !vmem, !hbm) -> () }
  return
}
func.func @t(%i: i32) -> (i32, i32) { %c = arith.constant 0 : i32 return %i, %c : i32, i32 }
// -----
// Fetched into an output's window, which goes out before anybody waited.
// in f32[8,128] = wave 0
// out f32[16,128]
// run
// fault: read-in-flight: kernel `k`: read of a buffer whose DMA is in flight: pipeline at the kernel's grid, buffer `out` at [0, 0], grid step [0], DMA from `x` to `out` started at windows.mlir:33 in grid step [0]
func.func @k(%i: i32, %x: !hbm, %out: !vmem, %s: !dma) attributes {iteration_bounds = array<i64: 2>,
    scratch_operands = 1 : i64, window_params = [{}, {transform_indices = @t, window_bounds = array<i64: 8, 128>}]} {
  %zero = arith.constant 0 : i32
  %first = arith.cmpi eq, %i, %zero : i32
  scf.if %first {
    "tpu.enqueue_dma"(%x, %out, %s) : (!hbm, !vmem, !dma) -> ()
  } else {
    "tpu.wait_dma2"(%s, %x, %out) : (!dma, !hbm, !vmem) -> ()
  }
  return
}
func.func @t(%i: i32) -> (i32, i32) { %c = arith.constant 0 : i32 return %i, %c : i32, i32 }
// -----
// Sent from an output's window, which is another block's two steps later.
// out f32[24,128]
// out f32[8,128]
// run
// fault: overwrite-in-flight: kernel `k`: overwrite of a buffer whose DMA is in flight: pipeline at the kernel's grid, buffer `out` at [0, 0], grid step [2], DMA from `out` to `other` started at windows.mlir:55 in grid step [0]
func.func @k(%i: i32, %out: !vmem, %other: !hbm, %s: !dma) attributes {iteration_bounds = array<i64: 3>,
    scratch_operands = 1 : i64, window_params = [{transform_indices = @t, window_bounds = array<i64: 8, 128>}, {}]} {
  %c = arith.constant 0 : index
  %v = arith.constant dense<1.0> : vector<8x128xf32>
  vector.store %v, %out[%c, %c] : !vmem, vector<8x128xf32>
  %zero = arith.constant 0 : i32
  %two = arith.constant 2 : i32
  %first = arith.cmpi eq, %i, %zero : i32
  %last = arith.cmpi eq, %i, %two : i32
  scf.if %first { "tpu.enqueue_dma"(%out, %other, %s) : (!vmem, !hbm, !dma) -> () }
  scf.if %last { "tpu.wait_dma2"(%s, %out, %other) : (!dma, !vmem, !hbm) -> () }
  return
}
func.func @t(%i: i32) -> (i32, i32) { %c = arith.constant 0 : i32 return %i, %c : i32, i32 }
// -----
// A block that starts outside its array.
// in f32[16,128] = wave 0
// run
// fault (early, random 0): out-of-bounds: kernel `k`: access out of bounds: pipeline at the kernel's grid, buffer `x` at [16, 0], grid step [1]: block [2, 0] of sizes [8, 128] starts outside the array of sizes [16, 128]
// fault (late, random 1): out-of-bounds: kernel `k`: access out of bounds: pipeline at the kernel's grid, buffer `x` at [16, 0], grid step [2]: block [2, 0] of sizes [8, 128] starts outside the array of sizes [16, 128]
func.func @k(%i: i32, %x: !vmem) attributes {iteration_bounds = array<i64: 3>,
    window_params = [{transform_indices = @t, window_bounds = array<i64: 8, 128>}]} { return }
func.func @t(%i: i32) -> (i32, i32) { %c = arith.constant 0 : i32 return %i, %c : i32, i32 }
// -----
// What a window left unwritten in place is unwritten where the block is fetched again.
// in f32[16,128] = wave 0
// out f32[16,128]
// alias 0:0
// run
// fault: unwritten-read: kernel `k`: read of unwritten memory: vector.load at windows.mlir:79, buffer `x` at [1, 0], grid step [1, 0]
func.func @k(%j: i32, %i: i32, %x: !vmem, %out: !vmem) attributes {iteration_bounds = array<i64: 2, 2>, window_params = [
    {transform_indices = @t, window_bounds = array<i64: 8, 128>}, {transform_indices = @t, window_bounds = array<i64: 8, 128>}]} {
  %c = arith.constant 0 : index
  %v = vector.load %x[%c, %c] : !vmem, vector<8x128xf32>
  %row = vector.load %x[%c, %c] : !vmem, vector<1x128xf32>
  vector.store %row, %out[%c, %c] : !vmem, vector<1x128xf32>
  vector.store %v, %x[%c, %c] : !vmem, vector<8x128xf32>
  return
}
func.func @t(%j: i32, %i: i32) -> (i32, i32) { %c = arith.constant 0 : i32 return %i, %c : i32, i32 }
