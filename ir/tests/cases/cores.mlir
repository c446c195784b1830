!rows = memref<4x8xi32, "hbm">
!row = memref<1x8xi32, "hbm">
!hbm = memref<8xi32, "hbm">
!shared = memref<4x8xi32, "vmem_shared">
!shared_row = memref<1x8xi32, "vmem_shared">
!vmem = memref<1x8xi32, "vmem">
!list = memref<4xi32, "vmem">
!mine = memref<4x8xi32, "vmem">
!smem = memref<1xi32, "smem">
!dma = memref<!tpu.dma_semaphore, "semaphore_mem">
!sem = memref<!tpu.semaphore, "semaphore_mem">
!of_vectors = memref<!tpu.semaphore, #tpu.memory_space<semaphore_mem, sc_vector_subcore>>
!of_scalar = memref<!tpu.semaphore, #tpu.memory_space<semaphore_mem, sc_scalar_subcore>>
// -----
// Every subcore leaves a row in memory that they share, and after the barrier takes its neighbour's.
// in i32[4,8] = 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15
// out i32[4,8]
// run
// result 0: i32[4, 8]: 8 9 10 11 12 13 14 15 ..., sum 240.00000, by place 3376.000
func.func @k(%core: i32, %me: i32, %x: !rows, %o: !rows, %all: !shared, %copy: !dma) attributes {iteration_bounds = array<i64: 1, 4>, dimension_semantics = [#tpu.dimension_semantics<core_parallel>, #tpu.dimension_semantics<subcore_parallel>], scratch_operands = 2 : i64, tpu.core_type = #tpu.core_type<sc_vector_subcore>} {
  %c0 = arith.constant 0 : i32
  %c1 = arith.constant 1 : i32
  %c4 = arith.constant 4 : i32
  %b = arith.constant 0 : index
  %up = arith.addi %me, %c1 : i32
  %right = arith.remsi %up, %c4 : i32
  %from = "tpu.memref_slice"(%x, %me, %c0) {operandSegmentSizes = array<i32: 1, 2, 0>} : (!rows, i32, i32) -> !row
  %own = "tpu.memref_slice"(%all, %me, %c0) {operandSegmentSizes = array<i32: 1, 2, 0>} : (!shared, i32, i32) -> !shared_row
  "tpu.enqueue_dma"(%from, %own, %copy) : (!row, !shared_row, !dma) -> ()
  "tpu.wait_dma2"(%copy, %from, %own) : (!dma, !row, !shared_row) -> ()
  "tpu.barrier"(%b) : (index) -> ()
  %next = "tpu.memref_slice"(%all, %right, %c0) {operandSegmentSizes = array<i32: 1, 2, 0>} : (!shared, i32, i32) -> !shared_row
  %to = "tpu.memref_slice"(%o, %me, %c0) {operandSegmentSizes = array<i32: 1, 2, 0>} : (!rows, i32, i32) -> !row
  "tpu.enqueue_dma"(%next, %to, %copy) : (!shared_row, !row, !dma) -> ()
  "tpu.wait_dma2"(%copy, %next, %to) : (!dma, !shared_row, !row) -> ()
  return
}
// -----
// The barrier comes too late: a neighbour may not have written its row.
// in i32[4,8] = 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15
// out i32[4,8]
// run
// fault (early): parallel-overlap: kernel `k`: overlap of parallel grid steps: tpu.enqueue_dma at cores.mlir:63, buffer `all` at [1, 0], grid step [0, 0]: vector subcore 1 of core 0 writes there at cores.mlir:59, and nothing orders that before or after this
// fault (late): parallel-overlap: kernel `k`: overlap of parallel grid steps: tpu.enqueue_dma at cores.mlir:63, buffer `all` at [0, 0], grid step [0, 3]: vector subcore 0 of core 0 writes there at cores.mlir:59, and nothing orders that before or after this
// fault (random 0): parallel-overlap: kernel `k`: overlap of parallel grid steps: tpu.enqueue_dma at cores.mlir:63, buffer `all` at [0, 0], grid step [0, 3]: vector subcore 0 of core 0 writes there at cores.mlir:60, and nothing orders that before or after this
// fault (random 1): parallel-overlap: kernel `k`: overlap of parallel grid steps: tpu.enqueue_dma at cores.mlir:59, buffer `all` at [1, 0], grid step [0, 1]: vector subcore 0 of core 0 reads there at cores.mlir:63, and nothing orders that before or after this
// run allow_parallel_overlaps allow_unwritten_reads
// result 0 (early, late): i32[4, 8]: 8 9 10 11 12 13 14 15 ..., sum 240.00000, by place 3376.000
// result 0 (random 0, random 1): i32[4, 8]: 1515870800 1515870800 1515870800 1515870800 1515870800 1515870800 1515870800 1515870800 ..., sum 12126966628.00000, by place 42444385692.000
func.func @k(%core: i32, %me: i32, %x: !rows, %o: !rows, %all: !shared, %copy: !dma) attributes {iteration_bounds = array<i64: 1, 4>, dimension_semantics = [#tpu.dimension_semantics<core_parallel>, #tpu.dimension_semantics<subcore_parallel>], scratch_operands = 2 : i64, tpu.core_type = #tpu.core_type<sc_vector_subcore>} {
  %c0 = arith.constant 0 : i32
  %c1 = arith.constant 1 : i32
  %c4 = arith.constant 4 : i32
  %b = arith.constant 0 : index
  %up = arith.addi %me, %c1 : i32
  %right = arith.remsi %up, %c4 : i32
  %from = "tpu.memref_slice"(%x, %me, %c0) {operandSegmentSizes = array<i32: 1, 2, 0>} : (!rows, i32, i32) -> !row
  %own = "tpu.memref_slice"(%all, %me, %c0) {operandSegmentSizes = array<i32: 1, 2, 0>} : (!shared, i32, i32) -> !shared_row
  "tpu.enqueue_dma"(%from, %own, %copy) : (!row, !shared_row, !dma) -> ()
  "tpu.wait_dma2"(%copy, %from, %own) : (!dma, !row, !shared_row) -> ()
  %next = "tpu.memref_slice"(%all, %right, %c0) {operandSegmentSizes = array<i32: 1, 2, 0>} : (!shared, i32, i32) -> !shared_row
  %to = "tpu.memref_slice"(%o, %me, %c0) {operandSegmentSizes = array<i32: 1, 2, 0>} : (!rows, i32, i32) -> !row
  "tpu.enqueue_dma"(%next, %to, %copy) : (!shared_row, !row, !dma) -> ()
  "tpu.wait_dma2"(%copy, %next, %to) : (!dma, !shared_row, !row) -> ()
  "tpu.barrier"(%b) : (index) -> ()
  return
}
// -----
// The DMA that fills the row is waited for after the barrier.
// in i32[4,8] = 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15
// out i32[4,8]
// run
// fault (early): parallel-overlap: kernel `k`: overlap of parallel grid steps: tpu.enqueue_dma at cores.mlir:90, buffer `all` at [0, 0], grid step [0, 3]: vector subcore 0 of core 0 has a DMA in flight there, started at cores.mlir:85, and nothing orders that before or after this
// fault (late, random 0): parallel-overlap: kernel `k`: overlap of parallel grid steps: tpu.enqueue_dma at cores.mlir:90, buffer `all` at [1, 0], grid step [0, 0]: vector subcore 1 of core 0 has a DMA in flight there, started at cores.mlir:85, and nothing orders that before or after this
// fault (random 1): parallel-overlap: kernel `k`: overlap of parallel grid steps: tpu.enqueue_dma at cores.mlir:90, buffer `all` at [2, 0], grid step [0, 1]: vector subcore 2 of core 0 has a DMA in flight there, started at cores.mlir:85, and nothing orders that before or after this
func.func @k(%core: i32, %me: i32, %x: !rows, %o: !rows, %all: !shared, %copy: !dma) attributes {iteration_bounds = array<i64: 1, 4>, dimension_semantics = [#tpu.dimension_semantics<core_parallel>, #tpu.dimension_semantics<subcore_parallel>], scratch_operands = 2 : i64, tpu.core_type = #tpu.core_type<sc_vector_subcore>} {
  %c0 = arith.constant 0 : i32
  %c1 = arith.constant 1 : i32
  %c4 = arith.constant 4 : i32
  %b = arith.constant 0 : index
  %up = arith.addi %me, %c1 : i32
  %right = arith.remsi %up, %c4 : i32
  %from = "tpu.memref_slice"(%x, %me, %c0) {operandSegmentSizes = array<i32: 1, 2, 0>} : (!rows, i32, i32) -> !row
  %own = "tpu.memref_slice"(%all, %me, %c0) {operandSegmentSizes = array<i32: 1, 2, 0>} : (!shared, i32, i32) -> !shared_row
  "tpu.enqueue_dma"(%from, %own, %copy) : (!row, !shared_row, !dma) -> ()
  "tpu.barrier"(%b) : (index) -> ()
  "tpu.wait_dma2"(%copy, %from, %own) : (!dma, !row, !shared_row) -> ()
  %next = "tpu.memref_slice"(%all, %right, %c0) {operandSegmentSizes = array<i32: 1, 2, 0>} : (!shared, i32, i32) -> !shared_row
  %to = "tpu.memref_slice"(%o, %me, %c0) {operandSegmentSizes = array<i32: 1, 2, 0>} : (!rows, i32, i32) -> !row
  "tpu.enqueue_dma"(%next, %to, %copy) : (!shared_row, !row, !dma) -> ()
  "tpu.wait_dma2"(%copy, %next, %to) : (!dma, !shared_row, !row) -> ()
  return
}
// -----
// One subcore leaves the barrier out.
// out i32[4,8]
// run allow_unwritten_outputs
// fault: deadlock: kernel `k`: wait that is never satisfied: tpu.barrier at cores.mlir:104, grid step [0, 0]: all 4 subcores of this core are waited for; vector subcore 2 of core 0 is at the end of the kernel; vector subcore 1 of core 0, vector subcore 3 of core 0 wait for barrier 0 at cores.mlir:104
func.func @k(%core: i32, %me: i32, %o: !rows) attributes {iteration_bounds = array<i64: 1, 4>, dimension_semantics = [#tpu.dimension_semantics<core_parallel>, #tpu.dimension_semantics<subcore_parallel>], tpu.core_type = #tpu.core_type<sc_vector_subcore>} {
  %c2 = arith.constant 2 : i32
  %b = arith.constant 0 : index
  %comes = arith.cmpi ne, %me, %c2 : i32
  scf.if %comes {
    "tpu.barrier"(%b) : (index) -> ()
  }
  return
}
// -----
// Two cores' subcores: a barrier is one core's, and so is what its subcores share.
// in i32[4,8] = 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15
// out i32[4,8]
// run
// result 0: i32[4, 8]: 8 9 10 11 12 13 14 15 ..., sum 240.00000, by place 3376.000
func.func @k(%core: i32, %me: i32, %x: !rows, %o: !rows, %all: !shared, %copy: !dma) attributes {iteration_bounds = array<i64: 2, 2>, dimension_semantics = [#tpu.dimension_semantics<core_parallel>, #tpu.dimension_semantics<subcore_parallel>], scratch_operands = 2 : i64, tpu.core_type = #tpu.core_type<sc_vector_subcore>} {
  %c0 = arith.constant 0 : i32
  %c1 = arith.constant 1 : i32
  %c2 = arith.constant 2 : i32
  %b = arith.constant 0 : index
  %right = arith.subi %c1, %me : i32
  %before = arith.muli %core, %c2 : i32
  %at = arith.addi %before, %me : i32
  %from = "tpu.memref_slice"(%x, %at, %c0) {operandSegmentSizes = array<i32: 1, 2, 0>} : (!rows, i32, i32) -> !row
  %own = "tpu.memref_slice"(%all, %me, %c0) {operandSegmentSizes = array<i32: 1, 2, 0>} : (!shared, i32, i32) -> !shared_row
  "tpu.enqueue_dma"(%from, %own, %copy) : (!row, !shared_row, !dma) -> ()
  "tpu.wait_dma2"(%copy, %from, %own) : (!dma, !row, !shared_row) -> ()
  "tpu.barrier"(%b) : (index) -> ()
  %next = "tpu.memref_slice"(%all, %right, %c0) {operandSegmentSizes = array<i32: 1, 2, 0>} : (!shared, i32, i32) -> !shared_row
  %to = "tpu.memref_slice"(%o, %at, %c0) {operandSegmentSizes = array<i32: 1, 2, 0>} : (!rows, i32, i32) -> !row
  "tpu.enqueue_dma"(%next, %to, %copy) : (!shared_row, !row, !dma) -> ()
  "tpu.wait_dma2"(%copy, %next, %to) : (!dma, !shared_row, !row) -> ()
  return
}
// -----
// All add to the same rows at once, which is no race; and a number in a neighbour's memory.
// in i32[4,8] = 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15
// in i32[4] = 3 1 0 2
// out i32[4,8]
// run
// result 0: i32[4, 8]: 11 16 21 26 31 36 41 46 ..., sum 1616.00000, by place 26656.000
func.func @k(%core: i32, %me: i32, %x: !rows, %numbers: memref<4xi32, "hbm">, %o: !rows, %all: !shared, %own: !mine, %list: !list, %s: !smem, %copy: !dma) attributes {iteration_bounds = array<i64: 1, 4>, dimension_semantics = [#tpu.dimension_semantics<core_parallel>, #tpu.dimension_semantics<subcore_parallel>], scratch_operands = 5 : i64, tpu.core_type = #tpu.core_type<sc_vector_subcore>} {
  %c0 = arith.constant 0 : i32
  %c1 = arith.constant 1 : i32
  %c4 = arith.constant 4 : i32
  %c10 = arith.constant 10 : i32
  %i0 = arith.constant 0 : index
  memref.store %me, %s[%i0] : !smem
  %first = arith.cmpi eq, %me, %c0 : i32
  scf.if %first {
    "tpu.enqueue_dma"(%x, %all, %copy) : (!rows, !shared, !dma) -> ()
    "tpu.wait_dma2"(%copy, %x, %all) : (!dma, !rows, !shared) -> ()
  }
  "tpu.enqueue_dma"(%x, %own, %copy) : (!rows, !mine, !dma) -> ()
  "tpu.wait_dma2"(%copy, %x, %own) : (!dma, !rows, !mine) -> ()
  "tpu.enqueue_dma"(%numbers, %list, %copy) : (memref<4xi32, "hbm">, !list, !dma) -> ()
  "tpu.wait_dma2"(%copy, %numbers, %list) : (!dma, memref<4xi32, "hbm">, !list) -> ()
  "tpu.barrier"(%i0) : (index) -> ()
  "tpu.enqueue_indirect_dma"(%own, %all, %list, %copy) {add = true} : (!mine, !shared, !list, !dma) -> ()
  "tpu.wait_indirect_dma"(%copy, %own, %all) : (!dma, !mine, !shared) -> ()
  %up = arith.addi %me, %c1 : i32
  %right = arith.remsi %up, %c4 : i32
  %was = "tpu.fetch_and_add_sync"(%s, %c0, %c10, %right) : (!smem, i32, i32, i32) -> i32
  "tpu.barrier"(%i0) : (index) -> ()
  %now = memref.load %s[%i0] : !smem
  %sum = arith.addi %was, %now : i32
  %from = "tpu.memref_slice"(%all, %me, %c0) {operandSegmentSizes = array<i32: 1, 2, 0>} : (!shared, i32, i32) -> !shared_row
  %at = "tpu.memref_slice"(%own, %c0, %c0) {operandSegmentSizes = array<i32: 1, 2, 0>} : (!mine, i32, i32) -> !vmem
  "tpu.enqueue_dma"(%from, %at, %copy) : (!shared_row, !vmem, !dma) -> ()
  "tpu.wait_dma2"(%copy, %from, %at) : (!dma, !shared_row, !vmem) -> ()
  %row = "tpu.vector_load"(%at, %i0, %i0) {strides = array<i32>} : (!vmem, index, index) -> vector<1x8xi32>
  %more = vector.broadcast %sum : i32 to vector<1x8xi32>
  %all_of_it = arith.addi %row, %more : vector<1x8xi32>
  "tpu.vector_store"(%all_of_it, %at, %i0, %i0) {strides = array<i32>} : (vector<1x8xi32>, !vmem, index, index) -> ()
  %to = "tpu.memref_slice"(%o, %me, %c0) {operandSegmentSizes = array<i32: 1, 2, 0>} : (!rows, i32, i32) -> !row
  "tpu.enqueue_dma"(%at, %to, %copy) : (!vmem, !row, !dma) -> ()
  "tpu.wait_dma2"(%copy, %at, %to) : (!dma, !vmem, !row) -> ()
  return
}
// -----
// The number is read with nothing that orders it after the neighbour's addition.
// out i32[4,8]
// run allow_unwritten_outputs
// fault (early, random 0): parallel-overlap: kernel `k`: overlap of parallel grid steps: memref.load at cores.mlir:195, buffer `s` at [0], grid step [0, 0]: vector subcore 3 of core 0 adds there at cores.mlir:194, and nothing orders that before or after this
// fault (late): parallel-overlap: kernel `k`: overlap of parallel grid steps: memref.load at cores.mlir:195, buffer `s` at [0], grid step [0, 3]: vector subcore 2 of core 0 adds there at cores.mlir:194, and nothing orders that before or after this
// fault (random 1): parallel-overlap: kernel `k`: overlap of parallel grid steps: memref.load at cores.mlir:195, buffer `s` at [0], grid step [0, 2]: vector subcore 1 of core 0 adds there at cores.mlir:194, and nothing orders that before or after this
func.func @k(%core: i32, %me: i32, %o: !rows, %s: !smem) attributes {iteration_bounds = array<i64: 1, 4>, dimension_semantics = [#tpu.dimension_semantics<core_parallel>, #tpu.dimension_semantics<subcore_parallel>], scratch_operands = 1 : i64, tpu.core_type = #tpu.core_type<sc_vector_subcore>} {
  %c0 = arith.constant 0 : i32
  %c1 = arith.constant 1 : i32
  %c4 = arith.constant 4 : i32
  %i0 = arith.constant 0 : index
  memref.store %me, %s[%i0] : !smem
  "tpu.barrier"(%i0) : (index) -> ()
  %up = arith.addi %me, %c1 : i32
  %right = arith.remsi %up, %c4 : i32
  %was = "tpu.fetch_and_add_sync"(%s, %c0, %c1, %right) : (!smem, i32, i32, i32) -> i32
  %now = memref.load %s[%i0] : !smem
  memref.store %now, %s[%i0] : !smem
  "tpu.barrier"(%i0) : (index) -> ()
  return
}
// -----
// Two TensorCores exchange signals, then what the other wrote.
// in i32[8] = 1 2 3 4 5 6 7 8
// out i32[4,8]
// run allow_unwritten_outputs
// result 0: i32[4, 8]: 1 2 3 4 5 6 7 8 ..., sum 144.00000, by place 2400.000
func.func @k(%me: i32, %x: !hbm, %o: !rows, %s: !sem, %copy: !dma) attributes {iteration_bounds = array<i64: 2>, dimension_semantics = [#tpu.dimension_semantics<parallel>], scratch_operands = 2 : i64} {
  %c0 = arith.constant 0 : i32
  %c1 = arith.constant 1 : i32
  %c2 = arith.constant 2 : i32
  %other = arith.subi %c1, %me : i32
  %row = "tpu.memref_slice"(%o, %me, %c0) {operandSegmentSizes = array<i32: 1, 2, 0>} : (!rows, i32, i32) -> !row
  %own = "tpu.memref_squeeze"(%row) : (!row) -> !hbm
  "tpu.enqueue_dma"(%x, %own, %copy) : (!hbm, !hbm, !dma) -> ()
  "tpu.wait_dma2"(%copy, %x, %own) : (!dma, !hbm, !hbm) -> ()
  "tpu.sem_signal"(%s, %c1, %other) {operandSegmentSizes = array<i32: 1, 1, 0, 1, 0>} : (!sem, i32, i32) -> ()
  "tpu.sem_wait"(%s, %c1) : (!sem, i32) -> ()
  %theirs = "tpu.memref_slice"(%o, %other, %c0) {operandSegmentSizes = array<i32: 1, 2, 0>} : (!rows, i32, i32) -> !row
  %below = arith.addi %me, %c2 : i32
  %to = "tpu.memref_slice"(%o, %below, %c0) {operandSegmentSizes = array<i32: 1, 2, 0>} : (!rows, i32, i32) -> !row
  "tpu.enqueue_dma"(%theirs, %to, %copy) : (!row, !row, !dma) -> ()
  "tpu.wait_dma2"(%copy, %theirs, %to) : (!dma, !row, !row) -> ()
  return
}
// -----
// The signal comes before the DMA is over.
// in i32[8] = 1 2 3 4 5 6 7 8
// out i32[4,8]
// run allow_unwritten_outputs
// fault (early): parallel-overlap: kernel `k`: overlap of parallel grid steps: tpu.enqueue_dma at cores.mlir:246, buffer `o` at [1, 0], grid step [0]: core 1 has a DMA in flight there, started at cores.mlir:239, and nothing orders that before or after this
// fault (late): parallel-overlap: kernel `k`: overlap of parallel grid steps: tpu.enqueue_dma at cores.mlir:246, buffer `o` at [0, 0], grid step [1]: core 0 has a DMA in flight there, started at cores.mlir:239, and nothing orders that before or after this
// fault (random 0, random 1): parallel-overlap: kernel `k`: overlap of parallel grid steps: tpu.enqueue_dma at cores.mlir:246, buffer `o` at [0, 0], grid step [1]: core 0 writes there at cores.mlir:241, and nothing orders that before or after this
func.func @k(%me: i32, %x: !hbm, %o: !rows, %s: !sem, %copy: !dma) attributes {iteration_bounds = array<i64: 2>, dimension_semantics = [#tpu.dimension_semantics<parallel>], scratch_operands = 2 : i64} {
  %c0 = arith.constant 0 : i32
  %c1 = arith.constant 1 : i32
  %c2 = arith.constant 2 : i32
  %other = arith.subi %c1, %me : i32
  %row = "tpu.memref_slice"(%o, %me, %c0) {operandSegmentSizes = array<i32: 1, 2, 0>} : (!rows, i32, i32) -> !row
  %own = "tpu.memref_squeeze"(%row) : (!row) -> !hbm
  "tpu.enqueue_dma"(%x, %own, %copy) : (!hbm, !hbm, !dma) -> ()
  "tpu.sem_signal"(%s, %c1, %other) {operandSegmentSizes = array<i32: 1, 1, 0, 1, 0>} : (!sem, i32, i32) -> ()
  "tpu.wait_dma2"(%copy, %x, %own) : (!dma, !hbm, !hbm) -> ()
  "tpu.sem_wait"(%s, %c1) : (!sem, i32) -> ()
  %theirs = "tpu.memref_slice"(%o, %other, %c0) {operandSegmentSizes = array<i32: 1, 2, 0>} : (!rows, i32, i32) -> !row
  %below = arith.addi %me, %c2 : i32
  %to = "tpu.memref_slice"(%o, %below, %c0) {operandSegmentSizes = array<i32: 1, 2, 0>} : (!rows, i32, i32) -> !row
  "tpu.enqueue_dma"(%theirs, %to, %copy) : (!row, !row, !dma) -> ()
  "tpu.wait_dma2"(%copy, %theirs, %to) : (!dma, !row, !row) -> ()
  return
}
// -----
// A core that there is not; a core whose signal nobody waits for.
// out i32[4,8]
// run allow_unwritten_outputs
// fault (early, random 0, random 1): out-of-bounds: kernel `k`: access out of bounds: tpu.sem_signal at cores.mlir:259, grid step [0]: core 2, of 2 that run this kernel
// fault (late): out-of-bounds: kernel `k`: access out of bounds: tpu.sem_signal at cores.mlir:259, grid step [1]: core 2, of 2 that run this kernel
func.func @k(%me: i32, %o: !rows, %s: !sem) attributes {iteration_bounds = array<i64: 2>, dimension_semantics = [#tpu.dimension_semantics<parallel>], scratch_operands = 1 : i64} {
  %c1 = arith.constant 1 : i32
  %c2 = arith.constant 2 : i32
  "tpu.sem_signal"(%s, %c1, %c2) {operandSegmentSizes = array<i32: 1, 1, 0, 1, 0>} : (!sem, i32, i32) -> ()
  return
}
// -----
// out i32[4,8]
// run allow_unwritten_outputs
// fault: semaphore-unbalanced: kernel `k`: semaphore left unbalanced: tpu.sem_signal at cores.mlir:268, buffer `s`, grid step [1]: it holds 2 at the end of the kernel
func.func @k(%me: i32, %o: !rows, %s: !sem) attributes {iteration_bounds = array<i64: 2>, dimension_semantics = [#tpu.dimension_semantics<parallel>], scratch_operands = 1 : i64} {
  %c1 = arith.constant 1 : i32
  "tpu.sem_signal"(%s, %c1, %c1) {operandSegmentSizes = array<i32: 1, 1, 0, 1, 0>} : (!sem, i32, i32) -> ()
  return
}
// -----
// A DMA to the other core's memory.
// in i32[4,8] = 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15
// out i32[4,8]
// run allow_unwritten_outputs
// result 0: i32[4, 8]: 8 9 10 11 12 13 14 15 ..., sum 24253933080.00000, by place 569967425288.000
func.func @k(%me: i32, %x: !rows, %o: !rows, %v: !vmem, %send: !dma, %recv: !dma) attributes {iteration_bounds = array<i64: 2>, dimension_semantics = [#tpu.dimension_semantics<parallel>], scratch_operands = 3 : i64} {
  %c0 = arith.constant 0 : i32
  %c1 = arith.constant 1 : i32
  %other = arith.subi %c1, %me : i32
  %from = "tpu.memref_slice"(%x, %me, %c0) {operandSegmentSizes = array<i32: 1, 2, 0>} : (!rows, i32, i32) -> !row
  "tpu.enqueue_dma"(%from, %send, %v, %recv, %other) {operandSegmentSizes = array<i32: 1, 1, 1, 1, 0, 1, 0>} : (!row, !dma, !vmem, !dma, i32) -> ()
  "tpu.wait_dma2"(%send, %from, %v) : (!dma, !row, !vmem) -> ()
  "tpu.wait_dma2"(%recv, %from, %v) : (!dma, !row, !vmem) -> ()
  %to = "tpu.memref_slice"(%o, %me, %c0) {operandSegmentSizes = array<i32: 1, 2, 0>} : (!rows, i32, i32) -> !row
  "tpu.enqueue_dma"(%v, %to, %send) : (!vmem, !row, !dma) -> ()
  "tpu.wait_dma2"(%send, %v, %to) : (!dma, !vmem, !row) -> ()
  return
}
// -----
// Two functions: the scalar subcore copies the upper half, says so, and its vector subcores copy that to the lower one.
// in i32[4,8] = 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15
// out i32[4,8]
// run
// result 0: i32[4, 8]: 0 1 2 3 4 5 6 7 ..., sum 240.00000, by place 4400.000
func.func @vectors(%core: i32, %me: i32, %x: !rows, %o: !rows, %s: !sem, %done: !of_scalar) attributes {iteration_bounds = array<i64: 1, 2>, dimension_semantics = [#tpu.dimension_semantics<core_parallel>, #tpu.dimension_semantics<subcore_parallel>], scratch_operands = 2 : i64, tpu.core_type = #tpu.core_type<sc_vector_subcore>} {
  %c0 = arith.constant 0 : i32
  %c1 = arith.constant 1 : i32
  %c2 = arith.constant 2 : i32
  "tpu.sem_wait"(%s, %c1) : (!sem, i32) -> ()
  %from = "tpu.memref_slice"(%o, %me, %c0) {operandSegmentSizes = array<i32: 1, 2, 0>} : (!rows, i32, i32) -> !row
  %below = arith.addi %me, %c2 : i32
  %to = "tpu.memref_slice"(%o, %below, %c0) {operandSegmentSizes = array<i32: 1, 2, 0>} : (!rows, i32, i32) -> !row
  "tpu.region"() ({
    %copy = "tpu.sem_alloc"() : () -> !dma
    "tpu.enqueue_dma"(%from, %to, %copy) : (!row, !row, !dma) -> ()
    "tpu.wait_dma2"(%copy, %from, %to) : (!dma, !row, !row) -> ()
    "tpu.yield"() : () -> ()
  }) : () -> ()
  "tpu.sem_signal"(%done, %c1, %core) {operandSegmentSizes = array<i32: 1, 1, 0, 1, 0>} : (!of_scalar, i32, i32) -> ()
  return
}
func.func @scalar(%core: i32, %x: !rows, %o: !rows, %s: !of_vectors, %done: !sem) attributes {iteration_bounds = array<i64: 1>, dimension_semantics = [#tpu.dimension_semantics<core_parallel>], scratch_operands = 2 : i64, tpu.core_type = #tpu.core_type<sc_scalar_subcore>} {
  %c0 = arith.constant 0 : i32
  %c1 = arith.constant 1 : i32
  %c2 = arith.constant 2 : i32
  %from = "tpu.memref_slice"(%x, %c0, %c0) {operandSegmentSizes = array<i32: 1, 2, 0>} : (!rows, i32, i32) -> memref<2x8xi32, "hbm">
  %to = "tpu.memref_slice"(%o, %c0, %c0) {operandSegmentSizes = array<i32: 1, 2, 0>} : (!rows, i32, i32) -> memref<2x8xi32, "hbm">
  "tpu.region"() ({
    %copy = "tpu.sem_alloc"() : () -> !dma
    "tpu.enqueue_dma"(%from, %to, %copy) : (memref<2x8xi32, "hbm">, memref<2x8xi32, "hbm">, !dma) -> ()
    "tpu.wait_dma2"(%copy, %from, %to) : (!dma, memref<2x8xi32, "hbm">, memref<2x8xi32, "hbm">) -> ()
    "tpu.yield"() : () -> ()
  }) : () -> ()
  "tpu.sem_signal"(%s, %c1, %core, %c0) {operandSegmentSizes = array<i32: 1, 1, 0, 1, 1>} : (!of_vectors, i32, i32, i32) -> ()
  "tpu.sem_signal"(%s, %c1, %core, %c1) {operandSegmentSizes = array<i32: 1, 1, 0, 1, 1>} : (!of_vectors, i32, i32, i32) -> ()
  "tpu.sem_wait"(%done, %c2) : (!sem, i32) -> ()
  return
}
// -----
// What another function sent is that function's.
// out i32[4,8]
// run allow_unwritten_outputs
// fault: semaphore-unbalanced: kernel `vectors`: semaphore left unbalanced: tpu.sem_signal at cores.mlir:341, buffer `s`, grid step [0, 0]: it holds 1 at the end of the kernel
func.func @vectors(%core: i32, %me: i32, %o: !rows, %s: !sem) attributes {iteration_bounds = array<i64: 1, 1>, dimension_semantics = [#tpu.dimension_semantics<core_parallel>, #tpu.dimension_semantics<subcore_parallel>], tpu.core_type = #tpu.core_type<sc_vector_subcore>, scratch_operands = 1 : i64} {
  return
}
func.func @scalar(%core: i32, %o: !rows, %s: !of_vectors) attributes {iteration_bounds = array<i64: 1>, dimension_semantics = [#tpu.dimension_semantics<core_parallel>], tpu.core_type = #tpu.core_type<sc_scalar_subcore>, scratch_operands = 1 : i64} {
  %c0 = arith.constant 0 : i32
  %c1 = arith.constant 1 : i32
  "tpu.sem_signal"(%s, %c1, %c0, %c0) {operandSegmentSizes = array<i32: 1, 1, 0, 1, 1>} : (!of_vectors, i32, i32, i32) -> ()
  return
}
// -----
// Functions that have an operand in different memories.
// out i32[4,8]
// run
// error: Mosaic kernel: @vectors and @scalar run at the same time and do not have the same arguments
func.func @vectors(%core: i32, %me: i32, %o: !rows, %s: !sem) attributes {iteration_bounds = array<i64: 1, 1>, dimension_semantics = [#tpu.dimension_semantics<core_parallel>, #tpu.dimension_semantics<subcore_parallel>], tpu.core_type = #tpu.core_type<sc_vector_subcore>, scratch_operands = 1 : i64} {
  return
}
func.func @scalar(%core: i32, %o: memref<4x8xi32, "smem">, %s: !of_vectors) attributes {iteration_bounds = array<i64: 1>, dimension_semantics = [#tpu.dimension_semantics<core_parallel>], tpu.core_type = #tpu.core_type<sc_scalar_subcore>, scratch_operands = 1 : i64} {
  return
}
// -----
// Steps that the call counts, on each of two cores.
// in i32[] = 2
// out i32[4,8]
// run allow_unwritten_outputs
// result 0: i32[4, 8]: 1515870800 1515870800 1515870800 1515870800 1515870800 1515870800 1515870800 1515870800 ..., sum 48507865920.00000, by place 751871921760.000
func.func @k(%me: i32, %step: i32, %o: !rows, %s: !sem) attributes {iteration_bounds = array<i64: 2, -9223372036854775808>, dimension_semantics = [#tpu.dimension_semantics<parallel>, #tpu.dimension_semantics<arbitrary>], scratch_operands = 1 : i64} {
  %c1 = arith.constant 1 : i32
  %other = arith.subi %c1, %me : i32
  "tpu.sem_signal"(%s, %c1, %other) {operandSegmentSizes = array<i32: 1, 1, 0, 1, 0>} : (!sem, i32, i32) -> ()
  "tpu.sem_wait"(%s, %c1) : (!sem, i32) -> ()
  return
}
// -----
// More cores than there can be; none; and subcores that do not say which they are.
// out i32[4,8]
// run
// error: Mosaic kernel: @k: its cores wait for each other: there are 1073741824, and may be 256
func.func @k(%me: i32, %o: !rows, %s: !sem) attributes {iteration_bounds = array<i64: 1073741824>, dimension_semantics = [#tpu.dimension_semantics<parallel>], scratch_operands = 1 : i64} {
  %c0 = arith.constant 0 : i32
  "tpu.sem_signal"(%s, %c0, %c0) {operandSegmentSizes = array<i32: 1, 1, 0, 1, 0>} : (!sem, i32, i32) -> ()
  return
}
// -----
// out i32[4,8]
// run allow_unwritten_outputs
// result 0: i32[4, 8]: 1515870800 1515870800 1515870800 1515870800 1515870800 1515870800 1515870800 1515870800 ..., sum 48507865920.00000, by place 751871921760.000
func.func @k(%me: i32, %o: !rows, %s: !sem) attributes {iteration_bounds = array<i64: 0>, dimension_semantics = [#tpu.dimension_semantics<parallel>], scratch_operands = 1 : i64} {
  %c0 = arith.constant 0 : i32
  "tpu.sem_signal"(%s, %c0, %c0) {operandSegmentSizes = array<i32: 1, 1, 0, 1, 0>} : (!sem, i32, i32) -> ()
  return
}
// -----
// out i32[4,8]
// run
// error: Mosaic kernel: @k: its cores wait for each other: a parallel dimension is neither that of cores nor that of subcores
func.func @k(%core: i32, %me: i32, %more: i32, %o: !rows) attributes {iteration_bounds = array<i64: 1, 2, 2>, dimension_semantics = [#tpu.dimension_semantics<core_parallel>, #tpu.dimension_semantics<subcore_parallel>, #tpu.dimension_semantics<parallel>], tpu.core_type = #tpu.core_type<sc_vector_subcore>} {
  %b = arith.constant 0 : index
  "tpu.barrier"(%b) : (index) -> ()
  return
}
// -----
// One adds to a number of one's own that a DMA is on its way to.
// in i32[1] = 5
// out i32[4,8]
// run allow_unwritten_outputs
// fault (early, random 0, random 1): overwrite-in-flight: kernel `k`: overwrite of a buffer whose DMA is in flight: tpu.fetch_and_add_sync at cores.mlir:407, buffer `s` at [0], grid step [0, 0], DMA from `x` to `s` started at cores.mlir:406 in grid step [0, 0]
// fault (late): overwrite-in-flight: kernel `k`: overwrite of a buffer whose DMA is in flight: tpu.fetch_and_add_sync at cores.mlir:407, buffer `s` at [0], grid step [0, 1], DMA from `x` to `s` started at cores.mlir:406 in grid step [0, 1]
func.func @k(%core: i32, %me: i32, %x: memref<1xi32, "hbm">, %o: !rows, %s: !smem, %copy: !dma) attributes {iteration_bounds = array<i64: 1, 2>, dimension_semantics = [#tpu.dimension_semantics<core_parallel>, #tpu.dimension_semantics<subcore_parallel>], tpu.core_type = #tpu.core_type<sc_vector_subcore>, scratch_operands = 2 : i64} {
  %c0 = arith.constant 0 : i32
  %c1 = arith.constant 1 : i32
  "tpu.enqueue_dma"(%x, %s, %copy) : (memref<1xi32, "hbm">, !smem, !dma) -> ()
  %was = "tpu.fetch_and_add_sync"(%s, %c0, %c1, %me) : (!smem, i32, i32, i32) -> i32
  "tpu.wait_dma2"(%copy, %x, %s) : (!dma, memref<1xi32, "hbm">, !smem) -> ()
  return
}
// -----
// What is added to is allocated while the kernel runs.
// out i32[4,8]
// run
// error: Mosaic kernel: @k: its cores wait for each other: what they share, or add to, is an argument, and not allocated while they run
func.func @k(%core: i32, %me: i32, %o: !rows) attributes {iteration_bounds = array<i64: 1, 2>, dimension_semantics = [#tpu.dimension_semantics<core_parallel>, #tpu.dimension_semantics<subcore_parallel>], tpu.core_type = #tpu.core_type<sc_vector_subcore>} {
  %c0 = arith.constant 0 : i32
  %s = memref.alloca() : !smem
  %was = "tpu.fetch_and_add_sync"(%s, %c0, %c0, %c0) : (!smem, i32, i32, i32) -> i32
  return
}
// -----
// Both write an output that nobody uses; or read it, too.
// in i32[4,8] = 1 2 3
// out i32[4,8]
// unused 0
// run
// result 0: i32[4, 8]: 1 2 3 1 2 3 1 2 ..., sum 63.00000, by place 982.000
func.func @k(%core: i32, %me: i32, %x: !rows, %o: !rows, %copy: !dma) attributes {iteration_bounds = array<i64: 1, 2>, dimension_semantics = [#tpu.dimension_semantics<core_parallel>, #tpu.dimension_semantics<subcore_parallel>], tpu.core_type = #tpu.core_type<sc_vector_subcore>, scratch_operands = 1 : i64} {
  %b = arith.constant 0 : index
  "tpu.barrier"(%b) : (index) -> ()
  "tpu.enqueue_dma"(%x, %o, %copy) : (!rows, !rows, !dma) -> ()
  "tpu.wait_dma2"(%copy, %x, %o) : (!dma, !rows, !rows) -> ()
  return
}
// -----
// in i32[4,8] = 1 2 3
// out i32[4,8]
// out i32[4,8]
// unused 0
// run
// fault (early, random 1): parallel-overlap: kernel `k`: overlap of parallel grid steps: tpu.enqueue_dma at cores.mlir:452, buffer `o` at [0, 0], grid step [0, 0]: vector subcore 1 of core 0 writes there at cores.mlir:449, and nothing orders that before or after this
// fault (late, random 0): parallel-overlap: kernel `k`: overlap of parallel grid steps: tpu.enqueue_dma at cores.mlir:452, buffer `o` at [0, 0], grid step [0, 0]: vector subcore 1 of core 0 writes there at cores.mlir:448, and nothing orders that before or after this
func.func @k(%core: i32, %me: i32, %x: !rows, %o: !rows, %p: !rows, %copy: !dma) attributes {iteration_bounds = array<i64: 1, 2>, dimension_semantics = [#tpu.dimension_semantics<core_parallel>, #tpu.dimension_semantics<subcore_parallel>], tpu.core_type = #tpu.core_type<sc_vector_subcore>, scratch_operands = 1 : i64} {
  %c0 = arith.constant 0 : i32
  %b = arith.constant 0 : index
  "tpu.barrier"(%b) : (index) -> ()
  "tpu.enqueue_dma"(%x, %o, %copy) : (!rows, !rows, !dma) -> ()
  "tpu.wait_dma2"(%copy, %x, %o) : (!dma, !rows, !rows) -> ()
  %first = arith.cmpi eq, %me, %c0 : i32
  scf.if %first {
    "tpu.enqueue_dma"(%o, %p, %copy) : (!rows, !rows, !dma) -> ()
    "tpu.wait_dma2"(%copy, %o, %p) : (!dma, !rows, !rows) -> ()
  }
  return
}
// -----
// A core waits by looking at a number again and again: at one that others add to, at a semaphore.
// out i32[4,8]
// run allow_unwritten_outputs
// result 0: i32[4, 8]: 1515870800 1515870800 1515870800 1515870800 1515870800 1515870800 1515870800 1515870800 ..., sum 48507865920.00000, by place 751871921760.000
func.func @k(%core: i32, %me: i32, %o: !rows, %s: !smem) attributes {iteration_bounds = array<i64: 1, 2>, dimension_semantics = [#tpu.dimension_semantics<core_parallel>, #tpu.dimension_semantics<subcore_parallel>], tpu.core_type = #tpu.core_type<sc_vector_subcore>, scratch_operands = 1 : i64} {
  %c0 = arith.constant 0 : i32
  %c1 = arith.constant 1 : i32
  %i0 = arith.constant 0 : index
  memref.store %c0, %s[%i0] : !smem
  "tpu.barrier"(%i0) : (index) -> ()
  %first = arith.cmpi eq, %me, %c0 : i32
  scf.if %first {
    scf.while : () -> () {
      %was = "tpu.fetch_and_add_sync"(%s, %c0, %c0, %c1) : (!smem, i32, i32, i32) -> i32
      %more = arith.cmpi eq, %was, %c0 : i32
      scf.condition(%more)
    } do {
      scf.yield
    }
  } else {
    %was = "tpu.fetch_and_add_sync"(%s, %c0, %c1, %c1) : (!smem, i32, i32, i32) -> i32
  }
  return
}
// -----
// in i32[4,8] = 1 2 3
// out i32[4,8]
// run allow_unwritten_outputs
// result 0: i32[4, 8]: 1515870800 1515870800 1515870800 1515870800 1515870800 1515870800 1515870800 1515870800 ..., sum 48507865920.00000, by place 751871921760.000
func.func @k(%me: i32, %x: !rows, %o: !rows, %v: !mine, %s: !sem, %send: !dma, %recv: !dma) attributes {iteration_bounds = array<i64: 2>, dimension_semantics = [#tpu.dimension_semantics<parallel>], scratch_operands = 4 : i64} {
  %c0 = arith.constant 0 : i32
  %c1 = arith.constant 1 : i32
  %first = arith.cmpi eq, %me, %c0 : i32
  scf.if %first {
    "tpu.enqueue_dma"(%x, %send, %v, %recv, %c1) {operandSegmentSizes = array<i32: 1, 1, 1, 1, 0, 1, 0>} : (!rows, !dma, !mine, !dma, i32) -> ()
    scf.while : () -> () {
      %has = "tpu.sem_read"(%s) : (!sem) -> i32
      %more = arith.cmpi eq, %has, %c0 : i32
      scf.condition(%more)
    } do {
      scf.yield
    }
    "tpu.sem_wait"(%s, %c1) : (!sem, i32) -> ()
    "tpu.wait_dma2"(%send, %x, %v) : (!dma, !rows, !mine) -> ()
  } else {
    "tpu.wait_dma2"(%recv, %x, %v) : (!dma, !rows, !mine) -> ()
    "tpu.sem_signal"(%s, %c1, %c0) {operandSegmentSizes = array<i32: 1, 1, 0, 1, 0>} : (!sem, i32, i32) -> ()
  }
  return
}
// -----
// A DMA that has not left when its semaphore is gone.
// in i32[4,8] = 1 2 3
// out i32[4,8]
// run allow_unwritten_outputs ignore=semaphore-unbalanced
// result 0: i32[4, 8]: 1515870800 1515870800 1515870800 1515870800 1515870800 1515870800 1515870800 1515870800 ..., sum 48507865920.00000, by place 751871921760.000
func.func @k(%me: i32, %x: !rows, %o: !rows, %v: !mine, %recv: !dma) attributes {iteration_bounds = array<i64: 2>, dimension_semantics = [#tpu.dimension_semantics<parallel>], scratch_operands = 2 : i64} {
  %c1 = arith.constant 1 : i32
  %other = arith.subi %c1, %me : i32
  "tpu.region"() ({
    %send = "tpu.sem_alloc"() : () -> !dma
    "tpu.enqueue_dma"(%x, %send, %v, %recv, %other) {operandSegmentSizes = array<i32: 1, 1, 1, 1, 0, 1, 0>} : (!rows, !dma, !mine, !dma, i32) -> ()
    "tpu.yield"() : () -> ()
  }) : () -> ()
  "tpu.wait_dma2"(%recv, %x, %v) : (!dma, !rows, !mine) -> ()
  return
}
// -----
// A row that is left out counts with the others: the DMA that follows on the semaphore is waited for for certain.
// in i32[4,8] = 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15
// in i32[4] = 3 1 0 -1
// out i32[4,8]
// run allow_unwritten_outputs
// result 0: i32[4, 8]: 1515870800 1515870800 1515870800 1515870800 1515870800 1515870800 1515870800 1515870800 ..., sum 48507865920.00000, by place 751871921760.000
func.func @k(%core: i32, %me: i32, %x: !rows, %numbers: memref<4xi32, "hbm">, %o: !rows, %own: !mine, %v: !mine, %list: !list, %copy: !dma, %send: !dma, %recv: !dma) attributes {iteration_bounds = array<i64: 1, 2>, dimension_semantics = [#tpu.dimension_semantics<core_parallel>, #tpu.dimension_semantics<subcore_parallel>], tpu.core_type = #tpu.core_type<sc_vector_subcore>, scratch_operands = 6 : i64} {
  %c1 = arith.constant 1 : i32
  %none = arith.constant -1 : i32
  %b = arith.constant 0 : index
  "tpu.enqueue_dma"(%numbers, %list, %copy) : (memref<4xi32, "hbm">, !list, !dma) -> ()
  "tpu.wait_dma2"(%copy, %numbers, %list) : (!dma, memref<4xi32, "hbm">, !list) -> ()
  "tpu.enqueue_indirect_dma"(%x, %own, %list, %recv, %none) : (!rows, !mine, !list, !dma, i32) -> ()
  "tpu.wait_indirect_dma"(%recv, %x, %own) : (!dma, !rows, !mine) -> ()
  "tpu.barrier"(%b) : (index) -> ()
  %other = arith.subi %c1, %me : i32
  "tpu.enqueue_dma"(%x, %send, %v, %recv, %other) {operandSegmentSizes = array<i32: 1, 1, 1, 1, 0, 0, 1>} : (!rows, !dma, !mine, !dma, i32) -> ()
  "tpu.wait_dma2"(%send, %x, %v) : (!dma, !rows, !mine) -> ()
  "tpu.wait_dma2"(%recv, %x, %v) : (!dma, !rows, !mine) -> ()
  return
}
