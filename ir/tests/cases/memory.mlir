!hbm = memref<8x128xf32, "hbm">
!vmem = memref<8x128xf32, "vmem">
!dma = memref<!tpu.dma_semaphore, "semaphore_mem">
!tile = vector<8x128xf32>
!row = vector<1x128xf32>
// -----
// A load beyond the view.
// in f32[8,128] = wave 0
// run
// fault: out-of-bounds: kernel `k`: access out of bounds: vector.load at memory.mlir:14, buffer `x` at [4, 0], grid step []: element 11 of dimension 0 in a view of sizes [8, 128] (from [4, 0], sizes [8, 128])
func.func @k(%x: !vmem) {
  %c = arith.constant 0 : index
  %four = arith.constant 4 : index
  %v = vector.load %x[%four, %c] : !vmem, !tile
  vector.store %v, %x[%c, %c] : !vmem, !tile
  return
}
// -----
// A store at a negative index.
// run
// fault: out-of-bounds: kernel `k`: access out of bounds: vector.store at memory.mlir:26, buffer `a` at [-1, 0], grid step []: element -1 of dimension 0 in a view of sizes [8, 128] (from [-1, 0], sizes [1, 128])
func.func @k(%a: !vmem) attributes {scratch_operands = 1 : i64} {
  %c = arith.constant 0 : index
  %minus = arith.constant -1 : index
  %v = arith.constant dense<0.0> : !row
  vector.store %v, %a[%minus, %c] : !vmem, !row
  return
}
// -----
// A DMA from beyond the array.
// in f32[8,128] = wave 0
// run
// fault: out-of-bounds: kernel `k`: access out of bounds: tpu.memref_slice at memory.mlir:37, buffer `x` at [1, 0], grid step []: element 8 of dimension 0 in a view of sizes [8, 128] (from [1, 0], sizes [8, 128])
func.func @k(%x: !hbm, %a: !vmem, %s: !dma) attributes {scratch_operands = 2 : i64} {
  %c = arith.constant 0 : i32
  %one = arith.constant 1 : i32
  %beyond = "tpu.memref_slice"(%x, %one, %c) : (!hbm, i32, i32) -> !hbm
  "tpu.enqueue_dma"(%beyond, %a, %s) : (!hbm, !vmem, !dma) -> ()
  return
}
// -----
// One row of scratch is read before it is written. Poison comes out where that is allowed.
// out f32[8,128]
// run
// fault: unwritten-read: kernel `k`: read of unwritten memory: vector.load at memory.mlir:52, buffer `a` at [7, 0], grid step []
// run allow_unwritten_reads
// result 0: f32[8, 128]: 0 0 0 0 0 0 0 0 ..., sum 0.00000, by place 0.000, 128 nan
func.func @k(%out: !vmem, %a: !vmem) attributes {scratch_operands = 1 : i64} {
  %c = arith.constant 0 : index
  %seven = arith.constant dense<0.0> : vector<7x128xf32>
  vector.store %seven, %a[%c, %c] : !vmem, vector<7x128xf32>
  %v = vector.load %a[%c, %c] : !vmem, !tile
  vector.store %v, %out[%c, %c] : !vmem, !tile
  return
}
// -----
// Unwritten scratch is sent out.
// out f32[8,128]
// run
// fault: unwritten-read: kernel `k`: read of unwritten memory: tpu.enqueue_dma at memory.mlir:62, buffer `a` at [0, 0], grid step []
func.func @k(%out: !hbm, %a: !vmem, %s: !dma) attributes {scratch_operands = 2 : i64} {
  "tpu.enqueue_dma"(%a, %out, %s) : (!vmem, !hbm, !dma) -> ()
  "tpu.wait_dma2"(%s, %a, %out) : (!dma, !vmem, !hbm) -> ()
  return
}
// -----
// A masked store writes what its mask holds, and nothing else.
// out f32[8,128]
// run
// fault: output-never-written: kernel `k`: output element never written: pipeline at the kernel's grid, buffer `out` at [0, 2], grid step []
// run allow_unwritten_outputs
// result 0: f32[8, 128]: 1 1 NaN NaN NaN NaN NaN NaN ..., sum 16.00000, by place 7176.000, 1008 nan
func.func @k(%out: !vmem) {
  %c = arith.constant 0 : index
  %v = arith.constant dense<1.0> : !tile
  %lane = "tpu.iota"() {dimensions = array<i32: 1>} : () -> vector<8x128xi32>
  %two = arith.constant dense<2> : vector<8x128xi32>
  %mask = arith.cmpi slt, %lane, %two : vector<8x128xi32>
  "tpu.vector_store"(%v, %out, %c, %c, %mask) : (!tile, !vmem, index, index, vector<8x128xi1>) -> ()
  return
}
// -----
// The last row of an output is not written. In the memory of the input it stays what it was.
// in f32[8,128] = wave 0
// out f32[8,128]
// run
// fault: output-never-written: kernel `k`: output element never written: pipeline at the kernel's grid, buffer `out` at [7, 0], grid step []
// run allow_unwritten_outputs
// result 0: f32[8, 128]: 0.8217788 1.4984071 1.9103724 1.9849094 1.7088526 1.130962 0.35331 -0.48674703 ..., sum 8.76265, by place 3681.519, 128 nan
func.func @k(%x: !vmem, %out: !vmem) {
  %c = arith.constant 0 : index
  %v = vector.load %x[%c, %c] : !vmem, vector<7x128xf32>
  vector.store %v, %out[%c, %c] : !vmem, vector<7x128xf32>
  return
}
// -----
// in f32[8,128] = wave 0
// out f32[8,128]
// alias 0:0
// run
// result 0: f32[8, 128]: 7 7 7 7 7 7 7 7 ..., sum 6263.29550, by place 2798259.797
func.func @k(%x: !vmem, %out: !vmem) {
  %c = arith.constant 0 : index
  %v = arith.constant dense<7.0> : vector<7x128xf32>
  vector.store %v, %out[%c, %c] : !vmem, vector<7x128xf32>
  return
}
// -----
// Memories have limits: each is exceeded by one byte, and by none.
// in f32[8,128] = wave 0
// run vmem_bytes=4096 hbm_bytes=4096 semaphore_bytes=4
// ok
// run vmem_bytes=4095
// fault: memory-exceeded: kernel `k`: memory exceeded: pipeline at the kernel's grid, buffer `a`, grid step []: the kernel declares 4096 bytes of VMEM; the limit is 4095
// run hbm_bytes=4095
// fault: memory-exceeded: kernel `k`: memory exceeded: pipeline at the kernel's grid, buffer `x`, grid step []: the kernel declares 4096 bytes of HBM; the limit is 4095
// run semaphore_bytes=3
// fault: memory-exceeded: kernel `k`: memory exceeded: pipeline at the kernel's grid, buffer `s`, grid step []: the kernel declares 4 bytes of semaphore memory; the limit is 3
func.func @k(%x: !hbm, %a: !vmem, %s: !dma) attributes {scratch_operands = 2 : i64} { return }
// -----
// Nothing is allocated before: 4 TiB.
// run
// fault: memory-exceeded: kernel `k`: memory exceeded: pipeline at the kernel's grid, buffer `huge`, grid step []: the kernel declares 4398046515200 bytes of VMEM; the limit is 16777216
func.func @k(%small: !vmem, %huge: memref<1048576x1048576xf32, "vmem">) attributes {scratch_operands = 2 : i64} { return }
// -----
// run
// fault: memory-exceeded: kernel `k`: memory exceeded: pipeline at the kernel's grid, buffer `huge`, grid step []: the kernel declares 4294967296 bytes of SMEM; the limit is 1048576
func.func @k(%huge: memref<1073741824xi32, "smem">) attributes {scratch_operands = 1 : i64} { return }
// -----
// run
// fault: memory-exceeded: kernel `k`: memory exceeded: pipeline at the kernel's grid, buffer `huge`, grid step []: the kernel declares 4398046515200 bytes of HBM; the limit is 102005473280
func.func @k(%small: !hbm, %huge: memref<1048576x1048576xf32, "hbm">) attributes {scratch_operands = 2 : i64} { return }
// -----
// No sum of bytes holds it.
// run
// error: Mosaic kernel: @k: argument 0 of [4294967296, 4294967296] has more than 2^40 elements
func.func @k(%huge: memref<4294967296x4294967296xf32, "vmem">) attributes {scratch_operands = 1 : i64} { return }
// -----
// Words seen as halves, the low one first; and as words again.
// in i32[8,128] = 65538 196612 -1
// out i32[8,128]
// out i32[8,128]
// run
// result 0: i32[8, 128]: 2 4 -1 2 4 -1 2 4 ..., sum 1370.00000, by place 664330.000
// result 1: i32[8, 128]: 65538 196612 -1 65538 196612 -1 65538 196612 ..., sum 89458347.00000, by place 44401880269.000
func.func @k(%x: memref<8x128xi32, "vmem">, %low: memref<8x128xi32, "vmem">, %same: memref<8x128xi32, "vmem">) {
  %c = arith.constant 0 : index
  %i = arith.constant 0 : i32
  %four = arith.constant 4 : i32
  %halves = "tpu.memref_bitcast"(%x) : (memref<8x128xi32, "vmem">) -> memref<16x128xi16, "vmem">
  %all = vector.load %halves[%c, %c] : memref<16x128xi16, "vmem">, vector<16x128xi16>
  %some = vector.extract_strided_slice %all {offsets = [0, 0], sizes = [8, 128], strides = [1, 1]} : vector<16x128xi16> to vector<8x128xi16>
  %wide = arith.extsi %some : vector<8x128xi16> to vector<8x128xi32>
  vector.store %wide, %low[%c, %c] : memref<8x128xi32, "vmem">, vector<8x128xi32>
  %out = "tpu.memref_bitcast"(%same) : (memref<8x128xi32, "vmem">) -> memref<16x128xi16, "vmem">
  vector.store %all, %out[%c, %c] : memref<16x128xi16, "vmem">, vector<16x128xi16>
  return
}
// -----
// Half a word.
// in i32[8,128] = 65538 196612 -1
// run
// fault: out-of-bounds: kernel `k`: access out of bounds: vector.load at memory.mlir:168, buffer `x`, grid step []: elements [1, 0], [2, 128] of them, of i32 seen as i16: the tile machine takes whole i32
func.func @k(%x: memref<8x128xi32, "vmem">) {
  %c = arith.constant 0 : index
  %one = arith.constant 1 : index
  %halves = "tpu.memref_bitcast"(%x) : (memref<8x128xi32, "vmem">) -> memref<16x128xi16, "vmem">
  %v = vector.load %halves[%one, %c] : memref<16x128xi16, "vmem">, vector<2x128xi16>
  vector.store %v, %halves[%c, %c] : memref<16x128xi16, "vmem">, vector<2x128xi16>
  return
}
// -----
// A wait by a slice that hangs over: it counts bytes.
// in f32[8,128] = wave 0
// run
// ok
func.func @k(%x: !hbm, %a: !vmem, %s: !dma) attributes {scratch_operands = 2 : i64} {
  %c = arith.constant 0 : i32
  %four = arith.constant 4 : i32
  "tpu.enqueue_dma"(%x, %a, %s) : (!hbm, !vmem, !dma) -> ()
  %over = "tpu.memref_slice"(%a, %four, %c) : (!vmem, i32, i32) -> !vmem
  "tpu.wait_dma2"(%s, %x, %over) : (!dma, !hbm, !vmem) -> ()
  return
}
// -----
// A scalar from beyond an array, and one that is selected instead. What lies there is as unwritten memory, where that is allowed.
// out i32[8,128]
// run
// fault: out-of-bounds: kernel `k`: access out of bounds: memref.load at memory.mlir:198, buffer `a` at [4], grid step []: element 4 of dimension 0 in a view of sizes [4] (from [4], sizes [1])
// run ignore=out-of-bounds
// result 0: i32[8, 128]: 7 7 7 7 7 7 7 7 ..., sum 7168.00000, by place 3560487.000
func.func @k(%out: memref<8x128xi32, "vmem">, %a: memref<4xi32, "smem">) attributes {scratch_operands = 1 : i64} {
  %c = arith.constant 0 : index
  %four = arith.constant 4 : index
  %seven = arith.constant 7 : i32
  %is = arith.constant false
  memref.store %seven, %a[%c] : memref<4xi32, "smem">
  %beyond = memref.load %a[%four] : memref<4xi32, "smem">
  %x = arith.select %is, %beyond, %seven : i32
  %v = vector.broadcast %x : i32 to vector<8x128xi32>
  vector.store %v, %out[%c, %c] : memref<8x128xi32, "vmem">, vector<8x128xi32>
  return
}
// -----
// Of a vector, what is outside is a NaN: here the last row.
// in f32[8,128] = wave 0
// out f32[8,128]
// run ignore=out-of-bounds
// result 0: f32[8, 128]: -1.8749586 -1.9953847 -1.7633669 -1.2198863 -0.4609377 0.37942615 1.1527722 1.7225044 ..., sum -7.15117, by place -4100.791, 128 nan
func.func @k(%x: !vmem, %out: !vmem) {
  %c = arith.constant 0 : index
  %one = arith.constant 1 : index
  %v = vector.load %x[%one, %c] : !vmem, !tile
  vector.store %v, %out[%c, %c] : !vmem, !tile
  return
}
// -----
// A vector to there is a fault still.
// out f32[8,128]
// run ignore=out-of-bounds
// fault: out-of-bounds: kernel `k`: access out of bounds: vector.store at memory.mlir:226, buffer `out` at [1, 0], grid step []: element 8 of dimension 0 in a view of sizes [8, 128] (from [1, 0], sizes [8, 128])
func.func @k(%out: !vmem) {
  %c = arith.constant 0 : index
  %one = arith.constant 1 : index
  %v = arith.constant dense<1.0> : !tile
  vector.store %v, %out[%one, %c] : !vmem, !tile
  return
}
// -----
// No rows from before an array: kernels start such copies, which move nothing, before they know that there is something. One row is a
// in i32[1] = 0
// in f32[8,128] = wave 0
// run
// ok
func.func @rows(%n: memref<1xi32, "smem">, %x: memref<8x128xf32, "any">, %a: memref<8x128xf32, "vmem">, %sem: memref<i64, "semaphore_mem">)
    attributes {scalar_prefetch = 1 : i64, scratch_operands = 2 : i64} {
  %c = arith.constant 0 : index
  %zero = arith.constant 0 : i32
  %before = arith.constant -4 : i32
  %rows = memref.load %n[%c] : memref<1xi32, "smem">
  %from = "tpu.memref_slice"(%x, %before, %zero, %rows) {operandSegmentSizes = array<i32: 1, 2, 1>} : (memref<8x128xf32, "any">, i32, i32, i32) -> memref<?x128xf32, "any">
  %to = "tpu.memref_slice"(%a, %zero, %zero, %rows) {operandSegmentSizes = array<i32: 1, 2, 1>} : (memref<8x128xf32, "vmem">, i32, i32, i32) -> memref<?x128xf32, "vmem">
  "tpu.enqueue_dma"(%from, %to, %sem) {operandSegmentSizes = array<i32: 1, 0, 1, 1, 0, 0, 0>} : (memref<?x128xf32, "any">, memref<?x128xf32, "vmem">, memref<i64, "semaphore_mem">) -> ()
  "tpu.wait_dma2"(%sem, %from, %to) {operandSegmentSizes = array<i32: 1, 1, 1, 0, 0>} : (memref<i64, "semaphore_mem">, memref<?x128xf32, "any">, memref<?x128xf32, "vmem">) -> ()
  return
}
// -----
// in i32[1] = 1
// in f32[8,128] = wave 0
// run
// fault: out-of-bounds: kernel `rows`: access out of bounds: tpu.memref_slice at memory.mlir:258, buffer `x` at [-4, 0], grid step []: element -4 of dimension 0 in a view of sizes [8, 128] (from [-4, 0], sizes [1, 128])
func.func @rows(%n: memref<1xi32, "smem">, %x: memref<8x128xf32, "any">, %a: memref<8x128xf32, "vmem">, %sem: memref<i64, "semaphore_mem">)
    attributes {scalar_prefetch = 1 : i64, scratch_operands = 2 : i64} {
  %c = arith.constant 0 : index
  %zero = arith.constant 0 : i32
  %before = arith.constant -4 : i32
  %rows = memref.load %n[%c] : memref<1xi32, "smem">
  %from = "tpu.memref_slice"(%x, %before, %zero, %rows) {operandSegmentSizes = array<i32: 1, 2, 1>} : (memref<8x128xf32, "any">, i32, i32, i32) -> memref<?x128xf32, "any">
  %to = "tpu.memref_slice"(%a, %zero, %zero, %rows) {operandSegmentSizes = array<i32: 1, 2, 1>} : (memref<8x128xf32, "vmem">, i32, i32, i32) -> memref<?x128xf32, "vmem">
  "tpu.enqueue_dma"(%from, %to, %sem) {operandSegmentSizes = array<i32: 1, 0, 1, 1, 0, 0, 0>} : (memref<?x128xf32, "any">, memref<?x128xf32, "vmem">, memref<i64, "semaphore_mem">) -> ()
  "tpu.wait_dma2"(%sem, %from, %to) {operandSegmentSizes = array<i32: 1, 1, 1, 0, 0>} : (memref<i64, "semaphore_mem">, memref<?x128xf32, "any">, memref<?x128xf32, "vmem">) -> ()
  return
}
// -----
// A DMA from the padding of an array's tiles, which is there and undefined, and one back into it. What is of the array is copied.
// in f32[6,130] = wave 0
// out f32[6,130]
// run
// result 0: f32[6, 130]: 0.8217788 1.4984071 1.9103724 1.9849094 1.7088526 1.130962 0.35331 -0.48674703 ..., sum 8.52729, by place 3009.273
func.func @k(%x: memref<6x130xf32, "hbm">, %o: memref<6x130xf32, "hbm">, %a: memref<8x256xf32, "vmem">, %s: !dma) attributes {scratch_operands = 2 : i64} {
  %c = arith.constant 0 : i32
  %x0 = "tpu.memref_slice"(%x, %c, %c) : (memref<6x130xf32, "hbm">, i32, i32) -> memref<8x256xf32, "hbm">
  %o0 = "tpu.memref_slice"(%o, %c, %c) : (memref<6x130xf32, "hbm">, i32, i32) -> memref<8x256xf32, "hbm">
  "tpu.enqueue_dma"(%x0, %a, %s) : (memref<8x256xf32, "hbm">, memref<8x256xf32, "vmem">, !dma) -> ()
  "tpu.wait_dma2"(%s, %x0, %a) : (!dma, memref<8x256xf32, "hbm">, memref<8x256xf32, "vmem">) -> ()
  "tpu.enqueue_dma"(%a, %o0, %s) : (memref<8x256xf32, "vmem">, memref<8x256xf32, "hbm">, !dma) -> ()
  "tpu.wait_dma2"(%s, %a, %o0) : (!dma, memref<8x256xf32, "vmem">, memref<8x256xf32, "hbm">) -> ()
  return
}
// -----
// What came from the padding is a NaN that may be read, also of a slice that has little else.
// in f32[8,130] = 1 2 3
// out f32[8,256]
// run
// result 0: f32[8, 256]: 3 1 NaN NaN NaN NaN NaN NaN ..., sum 31.00000, by place 12272.000, 1008 nan
func.func @k(%x: memref<8x130xf32, "hbm">, %o: memref<8x256xf32, "vmem">, %s: !dma) attributes {scratch_operands = 1 : i64} {
  %c = arith.constant 0 : i32
  %lanes = arith.constant 128 : i32
  %i = arith.constant 0 : index
  %zero = arith.constant dense<0.0> : vector<8x256xf32>
  vector.store %zero, %o[%i, %i] : memref<8x256xf32, "vmem">, vector<8x256xf32>
  %x0 = "tpu.memref_slice"(%x, %c, %lanes) : (memref<8x130xf32, "hbm">, i32, i32) -> memref<8x128xf32, "hbm">
  %o0 = "tpu.memref_slice"(%o, %c, %c) : (memref<8x256xf32, "vmem">, i32, i32) -> !vmem
  "tpu.enqueue_dma"(%x0, %o0, %s) : (memref<8x128xf32, "hbm">, !vmem, !dma) -> ()
  "tpu.wait_dma2"(%s, %x0, %o0) : (!dma, memref<8x128xf32, "hbm">, !vmem) -> ()
  %v = vector.load %o[%i, %i] : memref<8x256xf32, "vmem">, !tile
  vector.store %v, %o[%i, %i] : memref<8x256xf32, "vmem">, !tile
  return
}
// -----
// Rows of which a tile has none: beyond the padding is beyond the array.
// in f32[6,130] = wave 0
// run
// fault: out-of-bounds: kernel `k`: access out of bounds: tpu.memref_slice at memory.mlir:307, buffer `x` at [0, 0], grid step []: element 8 of dimension 0 in a view of sizes [6, 130] (from [0, 0], sizes [9, 130])
func.func @k(%x: memref<6x130xf32, "hbm">, %a: memref<9x130xf32, "vmem">, %s: !dma) attributes {scratch_operands = 2 : i64} {
  %c = arith.constant 0 : i32
  %x0 = "tpu.memref_slice"(%x, %c, %c) : (memref<6x130xf32, "hbm">, i32, i32) -> memref<9x130xf32, "hbm">
  "tpu.enqueue_dma"(%x0, %a, %s) : (memref<9x130xf32, "hbm">, memref<9x130xf32, "vmem">, !dma) -> ()
  return
}
// -----
// A kernel writes to its input, with which an output shares memory that it does not name: a reference of Pallas's `core_map`.
// in i32[8] = 1 2 3
// out i32[8]
// alias 0:0
// run
// result 0: i32[8]: 1 9 3 1 2 3 1 2, sum 22.00000, by place 61.000
func.func @k(%x: memref<8xi32, "smem">, %o: memref<8xi32, "smem">) {
  %one = arith.constant 1 : index
  %seven = arith.constant 7 : i32
  %v = memref.load %x[%one] : memref<8xi32, "smem">
  %w = arith.addi %v, %seven : i32
  memref.store %w, %x[%one] : memref<8xi32, "smem">
  return
}
