!hbm = memref<8x128xf32, "hbm">
!vmem = memref<8x128xf32, "vmem">
!dma = memref<!tpu.dma_semaphore, "semaphore_mem">
!tile = vector<8x128xf32>
// -----
// Nothing wrong: fetch, double, send.
// in f32[8,128] = wave 0
// out f32[8,128]
// run
// result 0: f32[8, 128]: 1.6435575 2.9968143 3.8207448 3.9698188 3.4177053 2.261924 0.70662 -0.97349405 ..., sum 0.11629, by place -9557.367
func.func @k(%x: !hbm, %out: !hbm, %a: !vmem, %b: !vmem, %s: !dma) attributes {scratch_operands = 3 : i64} {
  %c = arith.constant 0 : index
  "tpu.enqueue_dma"(%x, %a, %s) : (!hbm, !vmem, !dma) -> ()
  "tpu.wait_dma2"(%s, %x, %a) : (!dma, !hbm, !vmem) -> ()
  %v = vector.load %a[%c, %c] : !vmem, !tile
  %w = arith.addf %v, %v : !tile
  vector.store %w, %b[%c, %c] : !vmem, !tile
  "tpu.enqueue_dma"(%b, %out, %s) : (!vmem, !hbm, !dma) -> ()
  "tpu.wait_dma2"(%s, %b, %out) : (!dma, !vmem, !hbm) -> ()
  return
}
// -----
// The wait comes after the load.
// in f32[8,128] = wave 0
// out f32[8,128]
// run
// fault: read-in-flight: kernel `k`: read of a buffer whose DMA is in flight: vector.load at races.mlir:31, buffer `a` at [0, 0], grid step [], DMA from `x` to `a` started at races.mlir:30 in grid step []
func.func @k(%x: !hbm, %out: !hbm, %a: !vmem, %s: !dma) attributes {scratch_operands = 2 : i64} {
  %c = arith.constant 0 : index
  "tpu.enqueue_dma"(%x, %a, %s) : (!hbm, !vmem, !dma) -> ()
  %v = vector.load %a[%c, %c] : !vmem, !tile
  "tpu.wait_dma2"(%s, %x, %a) : (!dma, !hbm, !vmem) -> ()
  vector.store %v, %a[%c, %c] : !vmem, !tile
  return
}
// -----
// One row of the destination is written before the wait.
// in f32[8,128] = wave 0
// out f32[8,128]
// run
// fault: overwrite-in-flight: kernel `k`: overwrite of a buffer whose DMA is in flight: vector.store at races.mlir:47, buffer `a` at [7, 0], grid step [], DMA from `x` to `a` started at races.mlir:46 in grid step []
func.func @k(%x: !hbm, %out: !hbm, %a: !vmem, %s: !dma) attributes {scratch_operands = 2 : i64} {
  %c = arith.constant 0 : index
  %last = arith.constant 7 : index
  %row = arith.constant dense<0.0> : vector<1x128xf32>
  "tpu.enqueue_dma"(%x, %a, %s) : (!hbm, !vmem, !dma) -> ()
  vector.store %row, %a[%last, %c] : !vmem, vector<1x128xf32>
  "tpu.wait_dma2"(%s, %x, %a) : (!dma, !hbm, !vmem) -> ()
  return
}
// -----
// The source is written before the wait.
// out f32[8,128]
// run
// fault: overwrite-in-flight: kernel `k`: overwrite of a buffer whose DMA is in flight: vector.store at races.mlir:61, buffer `a` at [0, 0], grid step [], DMA from `a` to `out` started at races.mlir:60 in grid step []
func.func @k(%out: !hbm, %a: !vmem, %s: !dma) attributes {scratch_operands = 2 : i64} {
  %c = arith.constant 0 : index
  %v = arith.constant dense<1.0> : !tile
  vector.store %v, %a[%c, %c] : !vmem, !tile
  "tpu.enqueue_dma"(%a, %out, %s) : (!vmem, !hbm, !dma) -> ()
  vector.store %v, %a[%c, %c] : !vmem, !tile
  "tpu.wait_dma2"(%s, %a, %out) : (!dma, !vmem, !hbm) -> ()
  return
}
// -----
// Reading a source in flight is right.
// out f32[8,128]
// run
// result 0: f32[8, 128]: 1 1 1 1 1 1 1 1 ..., sum 1024.00000, by place 508641.000
func.func @k(%out: !hbm, %a: !vmem, %s: !dma) attributes {scratch_operands = 2 : i64} {
  %c = arith.constant 0 : index
  %v = arith.constant dense<1.0> : !tile
  vector.store %v, %a[%c, %c] : !vmem, !tile
  "tpu.enqueue_dma"(%a, %out, %s) : (!vmem, !hbm, !dma) -> ()
  %w = vector.load %a[%c, %c] : !vmem, !tile
  "tpu.wait_dma2"(%s, %a, %out) : (!dma, !vmem, !hbm) -> ()
  vector.store %w, %a[%c, %c] : !vmem, !tile
  return
}
// -----
// Two DMAs into one buffer.
// in f32[8,128] = wave 0
// in f32[8,128] = wave 1
// out f32[8,128]
// run
// fault: overwrite-in-flight: kernel `k`: overwrite of a buffer whose DMA is in flight: tpu.enqueue_dma at races.mlir:89, buffer `a` at [0, 0], grid step [], DMA from `x` to `a` started at races.mlir:88 in grid step []
func.func @k(%x: !hbm, %y: !hbm, %out: !hbm, %a: !vmem, %s: !dma, %t: !dma) attributes {scratch_operands = 3 : i64} {
  "tpu.enqueue_dma"(%x, %a, %s) : (!hbm, !vmem, !dma) -> ()
  "tpu.enqueue_dma"(%y, %a, %t) : (!hbm, !vmem, !dma) -> ()
  "tpu.wait_dma2"(%s, %x, %a) : (!dma, !hbm, !vmem) -> ()
  "tpu.wait_dma2"(%t, %x, %a) : (!dma, !hbm, !vmem) -> ()
  return
}
// -----
// Two DMAs on one semaphore: one wait is not enough to know which of them is there. Found by some orders.
// in f32[8,128] = wave 0
// out f32[8,128]
// run
// result 0 (early, late, random 1): f32[8, 128]: 0.8217788 1.4984071 1.9103724 1.9849094 1.7088526 1.130962 0.35331 -0.48674703 ..., sum 0.05815, by place -4778.684
// fault (random 0): read-in-flight: kernel `k`: read of a buffer whose DMA is in flight: vector.load at races.mlir:106, buffer `a` at [0, 0], grid step [], DMA from `x` to `a` started at races.mlir:103 in grid step []
func.func @k(%x: !hbm, %out: !hbm, %a: !vmem, %b: !vmem, %s: !dma) attributes {scratch_operands = 3 : i64} {
  %c = arith.constant 0 : index
  "tpu.enqueue_dma"(%x, %a, %s) : (!hbm, !vmem, !dma) -> ()
  "tpu.enqueue_dma"(%x, %b, %s) : (!hbm, !vmem, !dma) -> ()
  "tpu.wait_dma2"(%s, %x, %a) : (!dma, !hbm, !vmem) -> ()
  %v = vector.load %a[%c, %c] : !vmem, !tile
  "tpu.wait_dma2"(%s, %x, %b) : (!dma, !hbm, !vmem) -> ()
  vector.store %v, %b[%c, %c] : !vmem, !tile
  "tpu.enqueue_dma"(%b, %out, %s) : (!vmem, !hbm, !dma) -> ()
  "tpu.wait_dma2"(%s, %b, %out) : (!dma, !vmem, !hbm) -> ()
  return
}
// -----
// Two DMAs that bring the same bytes to the same place: whichever is last, these are there. Each is waited for.
// in f32[8,128] = wave 0
// out f32[8,128]
// run
// result 0: f32[8, 128]: 0.8217788 1.4984071 1.9103724 1.9849094 1.7088526 1.130962 0.35331 -0.48674703 ..., sum 0.05815, by place -4778.684
func.func @k(%x: !hbm, %out: !hbm, %a: !vmem, %s: !dma) attributes {scratch_operands = 2 : i64} {
  %c = arith.constant 0 : index
  "tpu.enqueue_dma"(%x, %a, %s) : (!hbm, !vmem, !dma) -> ()
  "tpu.enqueue_dma"(%x, %a, %s) : (!hbm, !vmem, !dma) -> ()
  "tpu.wait_dma2"(%s, %x, %a) : (!dma, !hbm, !vmem) -> ()
  "tpu.wait_dma2"(%s, %x, %a) : (!dma, !hbm, !vmem) -> ()
  %v = vector.load %a[%c, %c] : !vmem, !tile
  vector.store %v, %a[%c, %c] : !vmem, !tile
  "tpu.enqueue_dma"(%a, %out, %s) : (!vmem, !hbm, !dma) -> ()
  "tpu.wait_dma2"(%s, %a, %out) : (!dma, !vmem, !hbm) -> ()
  return
}
// -----
// As before, but one of them is still in flight when the place is read.
// in f32[8,128] = wave 0
// out f32[8,128]
// run
// fault (early, late, random 1): read-in-flight: kernel `k`: read of a buffer whose DMA is in flight: vector.load at races.mlir:143, buffer `a` at [0, 0], grid step [], DMA from `x` to `a` started at races.mlir:141 in grid step []
// fault (random 0): read-in-flight: kernel `k`: read of a buffer whose DMA is in flight: vector.load at races.mlir:143, buffer `a` at [0, 0], grid step [], DMA from `x` to `a` started at races.mlir:140 in grid step []
func.func @k(%x: !hbm, %out: !hbm, %a: !vmem, %s: !dma) attributes {scratch_operands = 2 : i64} {
  %c = arith.constant 0 : index
  "tpu.enqueue_dma"(%x, %a, %s) : (!hbm, !vmem, !dma) -> ()
  "tpu.enqueue_dma"(%x, %a, %s) : (!hbm, !vmem, !dma) -> ()
  "tpu.wait_dma2"(%s, %x, %a) : (!dma, !hbm, !vmem) -> ()
  %v = vector.load %a[%c, %c] : !vmem, !tile
  vector.store %v, %a[%c, %c] : !vmem, !tile
  "tpu.wait_dma2"(%s, %x, %a) : (!dma, !hbm, !vmem) -> ()
  return
}
// -----
// Waits as JAX 0.12 writes them: with the operands of the DMA.
// in f32[8,128] = wave 0
// out f32[8,128]
// run
// result 0: f32[8, 128]: 0.8217788 1.4984071 1.9103724 1.9849094 1.7088526 1.130962 0.35331 -0.48674703 ..., sum 0.05815, by place -4778.684
func.func @k(%x: !hbm, %out: !hbm, %a: !vmem, %s: !dma) attributes {scratch_operands = 2 : i64} {
  %c = arith.constant 0 : index
  "tpu.enqueue_dma"(%x, %a, %s) {operandSegmentSizes = array<i32: 1, 0, 1, 1, 0, 0, 0>} : (!hbm, !vmem, !dma) -> ()
  "tpu.wait_dma"(%x, %a, %s) {operandSegmentSizes = array<i32: 1, 0, 1, 1, 0, 0, 0>, wait_target = true} : (!hbm, !vmem, !dma) -> ()
  %v = vector.load %a[%c, %c] : !vmem, !tile
  vector.store %v, %a[%c, %c] : !vmem, !tile
  "tpu.enqueue_dma"(%a, %out, %s) {operandSegmentSizes = array<i32: 1, 0, 1, 1, 0, 0, 0>} : (!vmem, !hbm, !dma) -> ()
  "tpu.wait_dma"(%a, %out, %s) {operandSegmentSizes = array<i32: 1, 0, 1, 1, 0, 0, 0>, wait_target = true} : (!vmem, !hbm, !dma) -> ()
  return
}
