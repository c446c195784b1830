!hbm = memref<8x128xf32, "hbm">
!half = memref<4x128xf32, "hbm">
!vmem = memref<8x128xf32, "vmem">
!part = memref<4x128xf32, "vmem">
!dma = memref<!tpu.dma_semaphore, "semaphore_mem">
!count = memref<!tpu.semaphore, "semaphore_mem">
#parallel = #tpu.dimension_semantics<parallel>
#arbitrary = #tpu.dimension_semantics<arbitrary>
// -----
// Parallel steps write the same output. With the flag what both wrote alike is known.
// out f32[8,128]
// run
// fault: parallel-overlap: kernel `k`: overlap of parallel grid steps: tpu.enqueue_dma at parallel.mlir:21, buffer `out` at [0, 0], grid step [1], DMA from `a` to `out` started at parallel.mlir:21 in grid step [1]: it was already written at parallel position [0], now at [1]
// run allow_parallel_overlaps
// result 0: f32[8, 128]: 1 1 1 1 1 1 1 1 ..., sum 1024.00000, by place 508641.000
func.func @k(%i: i32, %out: !hbm, %a: !vmem, %s: !dma)
  attributes {iteration_bounds = array<i64: 2>, dimension_semantics = [#parallel], scratch_operands = 2 : i64} {
  %c = arith.constant 0 : index
  %v = arith.constant dense<1.0> : vector<8x128xf32>
  vector.store %v, %a[%c, %c] : !vmem, vector<8x128xf32>
  "tpu.enqueue_dma"(%a, %out, %s) : (!vmem, !hbm, !dma) -> ()
  "tpu.wait_dma2"(%s, %a, %out) : (!dma, !vmem, !hbm) -> ()
  return
}
// -----
// Where they wrote different numbers it is not: who was last is unknown.
// out f32[8,128]
// run
// fault: parallel-overlap: kernel `k`: overlap of parallel grid steps: tpu.enqueue_dma at parallel.mlir:38, buffer `out` at [0, 0], grid step [1], DMA from `a` to `out` started at parallel.mlir:38 in grid step [1]: it was already written at parallel position [0], now at [1]
// run allow_parallel_overlaps
// result 0: f32[8, 128]: NaN NaN NaN NaN NaN NaN NaN NaN ..., sum 0.00000, by place 0.000, 1024 nan
func.func @k(%i: i32, %out: !hbm, %a: !vmem, %s: !dma)
  attributes {iteration_bounds = array<i64: 2>, dimension_semantics = [#parallel], scratch_operands = 2 : i64} {
  %c = arith.constant 0 : index
  %x = arith.sitofp %i : i32 to f32
  %v = vector.broadcast %x : f32 to vector<8x128xf32>
  vector.store %v, %a[%c, %c] : !vmem, vector<8x128xf32>
  "tpu.enqueue_dma"(%a, %out, %s) : (!vmem, !hbm, !dma) -> ()
  "tpu.wait_dma2"(%s, %a, %out) : (!dma, !vmem, !hbm) -> ()
  return
}
// -----
// A half each is right.
// out f32[8,128]
// run
// result 0: f32[8, 128]: 0 0 0 0 0 0 0 0 ..., sum 512.00000, by place 377825.000
func.func @k(%i: i32, %out: !hbm, %a: !part, %s: !dma)
  attributes {iteration_bounds = array<i64: 2>, dimension_semantics = [#parallel], scratch_operands = 2 : i64} {
  %c = arith.constant 0 : index
  %zero = arith.constant 0 : i32
  %four = arith.constant 4 : i32
  %row = arith.muli %i, %four : i32
  %x = arith.sitofp %i : i32 to f32
  %v = vector.broadcast %x : f32 to vector<4x128xf32>
  vector.store %v, %a[%c, %c] : !part, vector<4x128xf32>
  %half = "tpu.memref_slice"(%out, %row, %zero) : (!hbm, i32, i32) -> !half
  "tpu.enqueue_dma"(%a, %half, %s) : (!part, !half, !dma) -> ()
  "tpu.wait_dma2"(%s, %a, %half) : (!dma, !part, !half) -> ()
  return
}
// -----
// A parallel step reads what another one wrote, flag or not.
// out f32[8,128]
// run
// fault: parallel-overlap: kernel `k`: overlap of parallel grid steps: tpu.enqueue_dma at parallel.mlir:80, buffer `out` at [0, 0], grid step [1]: it was written at parallel position [0] and is read at [1]
// run allow_parallel_overlaps
// fault: parallel-overlap: kernel `k`: overlap of parallel grid steps: tpu.enqueue_dma at parallel.mlir:80, buffer `out` at [0, 0], grid step [1]: it was written at parallel position [0] and is read at [1]
func.func @k(%i: i32, %out: !hbm, %a: !part, %b: !part, %s: !dma)
  attributes {iteration_bounds = array<i64: 2>, dimension_semantics = [#parallel], scratch_operands = 3 : i64} {
  %c = arith.constant 0 : index
  %zero = arith.constant 0 : i32
  %four = arith.constant 4 : i32
  %row = arith.muli %i, %four : i32
  %v = arith.constant dense<1.0> : vector<4x128xf32>
  vector.store %v, %a[%c, %c] : !part, vector<4x128xf32>
  %half = "tpu.memref_slice"(%out, %row, %zero) : (!hbm, i32, i32) -> !half
  "tpu.enqueue_dma"(%a, %half, %s) : (!part, !half, !dma) -> ()
  "tpu.wait_dma2"(%s, %a, %half) : (!dma, !part, !half) -> ()
  %first = "tpu.memref_slice"(%out, %zero, %zero) : (!hbm, i32, i32) -> !half
  "tpu.enqueue_dma"(%first, %b, %s) : (!half, !part, !dma) -> ()
  "tpu.wait_dma2"(%s, %first, %b) : (!dma, !half, !part) -> ()
  return
}
// -----
// A parallel step uses what another one left in scratch.
// run
// fault: unwritten-read: kernel `k`: read of unwritten memory: vector.load at parallel.mlir:97, buffer `a` at [0, 0], grid step [1]
func.func @k(%i: i32, %a: !vmem)
  attributes {iteration_bounds = array<i64: 2>, dimension_semantics = [#parallel], scratch_operands = 1 : i64} {
  %c = arith.constant 0 : index
  %zero = arith.constant 0 : i32
  %first = arith.cmpi eq, %i, %zero : i32
  scf.if %first {
    %v = arith.constant dense<1.0> : vector<8x128xf32>
    vector.store %v, %a[%c, %c] : !vmem, vector<8x128xf32>
  }
  %w = vector.load %a[%c, %c] : !vmem, vector<8x128xf32>
  vector.store %w, %a[%c, %c] : !vmem, vector<8x128xf32>
  return
}
// -----
// A step that is not parallel may.
// run
// ok
func.func @k(%i: i32, %a: !vmem)
  attributes {iteration_bounds = array<i64: 2>, dimension_semantics = [#arbitrary], scratch_operands = 1 : i64} {
  %c = arith.constant 0 : index
  %zero = arith.constant 0 : i32
  %first = arith.cmpi eq, %i, %zero : i32
  scf.if %first {
    %v = arith.constant dense<1.0> : vector<8x128xf32>
    vector.store %v, %a[%c, %c] : !vmem, vector<8x128xf32>
  }
  %w = vector.load %a[%c, %c] : !vmem, vector<8x128xf32>
  vector.store %w, %a[%c, %c] : !vmem, vector<8x128xf32>
  return
}
// -----
// A DMA is in flight between parallel steps.
// in f32[8,128] = wave 0
// run
// fault: semaphore-unbalanced: kernel `k`: semaphore left unbalanced: tpu.enqueue_dma at parallel.mlir:128, buffer `s`, grid step [1], DMA from `x` to `a` started at parallel.mlir:128 in grid step [0]: a DMA was not waited for before a parallel grid step that may run on another core
func.func @k(%i: i32, %x: !hbm, %a: !vmem, %s: !dma)
  attributes {iteration_bounds = array<i64: 2>, dimension_semantics = [#parallel], scratch_operands = 2 : i64} {
  %zero = arith.constant 0 : i32
  %first = arith.cmpi eq, %i, %zero : i32
  scf.if %first {
    "tpu.enqueue_dma"(%x, %a, %s) : (!hbm, !vmem, !dma) -> ()
  } else {
    "tpu.wait_dma2"(%s, %x, %a) : (!dma, !hbm, !vmem) -> ()
  }
  return
}
// -----
// A signal between parallel steps.
// run
// fault: semaphore-unbalanced: kernel `k`: semaphore left unbalanced: tpu.sem_signal at parallel.mlir:144, buffer `s`, grid step [1]: it holds 1 before a parallel grid step that may run on another core
func.func @k(%i: i32, %s: !count)
  attributes {iteration_bounds = array<i64: 2>, dimension_semantics = [#parallel], scratch_operands = 1 : i64} {
  %zero = arith.constant 0 : i32
  %one = arith.constant 1 : i32
  %first = arith.cmpi eq, %i, %zero : i32
  scf.if %first {
    "tpu.sem_signal"(%s, %one) : (!count, i32) -> ()
  } else {
    "tpu.sem_wait"(%s, %one) : (!count, i32) -> ()
  }
  return
}
// -----
// One array in VMEM for steps of two cores.
// out f32[8,128]
// run
// fault: bad-call: kernel `k`: arguments do not fit the kernel: pipeline at the kernel's grid, grid step []: `out` is one array for steps that may run on different cores
func.func @k(%i: i32, %out: !vmem) attributes {iteration_bounds = array<i64: 2>, dimension_semantics = [#parallel]} {
  return
}
// -----
// Windows of parallel steps: consecutive steps with the same block.
// out f32[16,128]
// run
// fault: parallel-overlap: kernel `k`: overlap of parallel grid steps: pipeline at the kernel's grid, buffer `out` at [0, 0], grid step [0, 1]: block [0, 0] belongs to this step and to the one before it, at parallel position [0, 0], now at [0, 1]: a dimension that is declared parallel has steps that share a block
func.func @k(%i: i32, %j: i32, %out: !vmem) attributes {iteration_bounds = array<i64: 2, 2>,
    dimension_semantics = [#parallel, #parallel], window_params = [{transform_indices = @t, window_bounds = array<i64: 8, 128>}]} {
  %c = arith.constant 0 : index
  %v = arith.constant dense<1.0> : vector<8x128xf32>
  vector.store %v, %out[%c, %c] : !vmem, vector<8x128xf32>
  return
}
func.func @t(%i: i32, %j: i32) -> (i32, i32) { %c = arith.constant 0 : i32 return %i, %c : i32, i32 }
// -----
// Steps that are apart.
// out f32[16,128]
// run
// fault: parallel-overlap: kernel `k`: overlap of parallel grid steps: pipeline at the kernel's grid, buffer `out` at [0, 0], grid step [1, 0]: block [0, 0] was already written at parallel position [0, 0], now at [1, 0]
func.func @k(%i: i32, %j: i32, %out: !vmem) attributes {iteration_bounds = array<i64: 2, 2>,
    dimension_semantics = [#parallel, #parallel], window_params = [{transform_indices = @t, window_bounds = array<i64: 8, 128>}]} {
  %c = arith.constant 0 : index
  %v = arith.constant dense<1.0> : vector<8x128xf32>
  vector.store %v, %out[%c, %c] : !vmem, vector<8x128xf32>
  return
}
func.func @t(%i: i32, %j: i32) -> (i32, i32) { %c = arith.constant 0 : i32 return %j, %c : i32, i32 }
// -----
// Blocks that are read and written in place belong to one parallel position, whichever step fetched them.
// in f32[16,128] = wave 0
// out f32[16,128]
// alias 0:0
// run
// result 0: f32[16, 128]: 3.287115 5.9936285 7.6414895 7.9396377 6.8354106 4.523848 1.41324 -1.9469881 ..., sum 0.51468, by place -38279.506
func.func @own(%i: i32, %j: i32, %x: !vmem, %out: !vmem) attributes {iteration_bounds = array<i64: 2, 2>,
    dimension_semantics = [#arbitrary, #parallel], window_params = [
      {transform_indices = @t, window_bounds = array<i64: 8, 128>}, {transform_indices = @t, window_bounds = array<i64: 8, 128>}]} {
  %c = arith.constant 0 : index
  %v = vector.load %x[%c, %c] : !vmem, vector<8x128xf32>
  %w = arith.addf %v, %v : vector<8x128xf32>
  vector.store %w, %out[%c, %c] : !vmem, vector<8x128xf32>
  return
}
func.func @t(%i: i32, %j: i32) -> (i32, i32) { %c = arith.constant 0 : i32 return %j, %c : i32, i32 }
// -----
// in f32[16,128] = wave 0
// out f32[16,128]
// alias 0:0
// run
// fault (early): parallel-overlap: kernel `others`: overlap of parallel grid steps: pipeline at the kernel's grid, buffer `x` at [0, 0], grid step [1, 0]: it was written at parallel position [0] and is read at [1]
// fault (late, random 0, random 1): parallel-overlap: kernel `others`: overlap of parallel grid steps: pipeline at the kernel's grid, buffer `x` at [0, 0], grid step [0, 1]: it was written at parallel position [0] and is read at [1]
func.func @others(%i: i32, %j: i32, %x: !vmem, %out: !vmem) attributes {iteration_bounds = array<i64: 2, 2>,
    dimension_semantics = [#arbitrary, #parallel], window_params = [
      {transform_indices = @t, window_bounds = array<i64: 8, 128>}, {transform_indices = @u, window_bounds = array<i64: 8, 128>}]} {
  %c = arith.constant 0 : index
  %v = vector.load %x[%c, %c] : !vmem, vector<8x128xf32>
  %w = arith.addf %v, %v : vector<8x128xf32>
  vector.store %w, %out[%c, %c] : !vmem, vector<8x128xf32>
  return
}
func.func @t(%i: i32, %j: i32) -> (i32, i32) {
  %c = arith.constant 0 : i32
  %one = arith.constant 1 : i32
  %other = arith.subi %one, %j : i32
  return %other, %c : i32, i32
}
func.func @u(%i: i32, %j: i32) -> (i32, i32) { %c = arith.constant 0 : i32 return %j, %c : i32, i32 }
