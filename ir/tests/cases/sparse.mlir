!vmem = memref<16xi32, "vmem">
!lanes = vector<8xi32>
!mask = vector<8xi1>
// -----
// Running sums and maxima of the lanes that a mask has; before the first of them a lane is as it is. Integers have no sign.
// in i32[16] = 5 3 -1 4 1 9 2 6 0 0 1 1 0 1 0 1
// out i32[16]
// run
// result 0: i32[16]: 5 3 -1 3 3 12 12 18 ..., sum 57.00000, by place 272.000
func.func @k(%x: !vmem, %out: !vmem) attributes {tpu.core_type = #tpu.core_type<sc_vector_subcore>} {
  %c0 = arith.constant 0 : index
  %c8 = arith.constant 8 : index
  %zero = arith.constant dense<0> : !lanes
  %v = vector.load %x[%c0] : !vmem, !lanes
  %bits = vector.load %x[%c8] : !vmem, !lanes
  %m = arith.cmpi ne, %bits, %zero : !lanes
  %sum = "tpu.scan"(%v, %m) {kind = #tpu.reduction_kind<sum>} : (!lanes, !mask) -> !lanes
  %max = "tpu.scan"(%v, %m) {kind = #tpu.reduction_kind<max>} : (!lanes, !mask) -> !lanes
  vector.store %sum, %out[%c0] : !vmem, !lanes
  vector.store %max, %out[%c8] : !vmem, !lanes
  return
}
// -----
// How often a value has been there; how many lanes are true, and the first; keys are sorted, and equal ones keep their order.
// in i32[16] = 7 8 7 7 8 2 9 2 0 1 2 3 4 5 6 7
// out i32[16]
// out i32[16]
// run
// result 0: i32[16]: 4 4 4 3 2 4 1 2 ..., sum 56.00000, by place 437.000
// result 1: i32[16]: 8 8 9 7 7 7 2 2 ..., sum 78.00000, by place 478.000
func.func @k(%x: !vmem, %out: !vmem, %sorted: !vmem) attributes {tpu.core_type = #tpu.core_type<sc_vector_subcore>} {
  %c0 = arith.constant 0 : index
  %c8 = arith.constant 8 : index
  %seven = arith.constant dense<7> : !lanes
  %v = vector.load %x[%c0] : !vmem, !lanes
  %number = vector.load %x[%c8] : !vmem, !lanes
  %m = arith.cmpi sgt, %v, %seven : !lanes
  %all = arith.constant dense<true> : !mask
  %last, %counts = "tpu.scan_count"(%all, %v) : (!mask, !lanes) -> (!mask, !lanes)
  %many = "tpu.all_reduce"(%m) {dim = 0 : i64, kind = #tpu.reduction_kind<sum>} : (!mask) -> !lanes
  %first = "tpu.all_reduce"(%m) {dim = 0 : i64, kind = #tpu.reduction_kind<find_first_set>} : (!mask) -> !lanes
  %both = arith.addi %many, %first : !lanes
  %marked = arith.select %last, %counts, %both : !mask, !lanes
  vector.store %marked, %out[%c0] : !vmem, !lanes
  vector.store %both, %out[%c8] : !vmem, !lanes
  %mask, %keys, %values = "tpu.sort"(%v, %number, %m) {descending = false} : (!lanes, !lanes, !mask) -> (!mask, !lanes, !lanes)
  vector.store %keys, %sorted[%c0] : !vmem, !lanes
  vector.store %values, %sorted[%c8] : !vmem, !lanes
  return
}
// -----
// A masked load takes one element after another into the lanes of the mask, and a masked store puts them there so.
// in i32[16] = 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16
// out i32[16]
// run
// result 0: i32[16]: 9 2 10 4 11 6 12 8 ..., sum 78.00000, by place 398.000
func.func @k(%x: !vmem, %out: !vmem) attributes {tpu.core_type = #tpu.core_type<sc_vector_subcore>} {
  %c0 = arith.constant 0 : index
  %c8 = arith.constant 8 : index
  %zero = arith.constant dense<0> : !lanes
  %one = arith.constant dense<1> : !lanes
  vector.store %zero, %out[%c8] : !vmem, !lanes
  %v = vector.load %x[%c0] : !vmem, !lanes
  %odd = arith.andi %v, %one : !lanes
  %m = arith.cmpi ne, %odd, %zero : !lanes
  %dense = "tpu.vector_expand_load"(%x, %c8, %m) {expand_dim = 0 : i64} : (!vmem, index, !mask) -> !lanes
  %w = arith.select %m, %dense, %v : !mask, !lanes
  vector.store %w, %out[%c0] : !vmem, !lanes
  "tpu.vector_compress_store"(%v, %out, %c8, %m) {compress_dim = 0 : i64, add = true} : (!lanes, !vmem, index, !mask) -> ()
  return
}
// -----
// Lane by lane from memory and to it, with a mask, and added where two lanes go to one place.
// in i32[16] = 3 1 2 3 0 5 6 3 10 20 30 40 50 60 70 80
// out i32[16]
// run
// result 0: i32[16]: 3 1 2 3 3 5 6 3 ..., sum 256.00000, by place 2418.000
func.func @k(%x: !vmem, %out: !vmem) attributes {tpu.core_type = #tpu.core_type<sc_vector_subcore>} {
  %c0 = arith.constant 0 : index
  %c8 = arith.constant 8 : index
  %zero = arith.constant dense<0> : !lanes
  %three = arith.constant dense<3> : !lanes
  %eight = arith.constant dense<8> : !lanes
  vector.store %zero, %out[%c8] : !vmem, !lanes
  %i = vector.load %x[%c0] : !vmem, !lanes
  %v = vector.load %x[%c8] : !vmem, !lanes
  %gathered = "tpu.vector_load_idx"(%x, %i) {operandSegmentSizes = array<i32: 1, 1, 0>} : (!vmem, !lanes) -> !lanes
  vector.store %gathered, %out[%c0] : !vmem, !lanes
  %m = arith.cmpi sle, %i, %three : !lanes
  %j = arith.addi %i, %eight : !lanes
  "tpu.vector_store_idx"(%v, %out, %j, %m) {add = true, operandSegmentSizes = array<i32: 1, 1, 1, 1>} : (!lanes, !vmem, !lanes, !mask) -> ()
  return
}
// -----
// A lane's index is outside.
// in i32[16] = 3 1 2 16 0 5 6 3 10 20 30 40 50 60 70 80
// out i32[16]
// run
// fault: out-of-bounds: kernel `k`: access out of bounds: tpu.vector_load_idx at sparse.mlir:103, buffer `x` at [16], grid step []: element 16 of dimension 0 in a view of sizes [16] (from [16], sizes [1])
func.func @k(%x: !vmem, %out: !vmem) attributes {tpu.core_type = #tpu.core_type<sc_vector_subcore>} {
  %c0 = arith.constant 0 : index
  %i = vector.load %x[%c0] : !vmem, !lanes
  %gathered = "tpu.vector_load_idx"(%x, %i) {operandSegmentSizes = array<i32: 1, 1, 0>} : (!vmem, !lanes) -> !lanes
  vector.store %gathered, %out[%c0] : !vmem, !lanes
  return
}
// -----
// Two tiles of 32 bits in one of 16, as they are and in turn, and back; bits of lanes as wider ones.
// in i32[16] = 1 -2 3 -4 5 -6 7 -8 90 91 92 93 94 95 96 97
// out i32[16]
// out i32[16]
// run
// result 0: i32[16]: 5898241 6029310 6029315 6160380 6160389 6291450 6291463 6422520 ..., sum 49283064.00000, by place 175374240.000
// result 1: i32[16]: 1 -2 3 -4 5 -6 7 -8 ..., sum 744.00000, by place 8612.000
func.func @k(%x: !vmem, %out: !vmem, %other: !vmem) attributes {tpu.core_type = #tpu.core_type<sc_vector_subcore>} {
  %c0 = arith.constant 0 : index
  %c8 = arith.constant 8 : index
  %a = vector.load %x[%c0] : !vmem, !lanes
  %b = vector.load %x[%c8] : !vmem, !lanes
  %turns = "tpu.pack_subelements"(%a, %b) {pack_format = #tpu.pack_format<interleaved>, positions = array<i32: 0, 1>} : (!lanes, !lanes) -> vector<16xi16>
  %words = vector.bitcast %turns : vector<16xi16> to !lanes
  vector.store %words, %out[%c0] : !vmem, !lanes
  %back = "tpu.unpack_subelements"(%turns) {index = 0 : i32, pack_format = #tpu.pack_format<interleaved>} : (vector<16xi16>) -> !lanes
  vector.store %back, %out[%c8] : !vmem, !lanes
  %after = "tpu.pack_subelements"(%a, %b) {pack_format = #tpu.pack_format<compressed>, positions = array<i32: 0, 1>} : (!lanes, !lanes) -> vector<8x2xi16>
  %first = "tpu.unpack_subelements"(%after) {index = 0 : i32, pack_format = #tpu.pack_format<compressed>} : (vector<8x2xi16>) -> !lanes
  %second = "tpu.unpack_subelements"(%after) {index = 1 : i32, pack_format = #tpu.pack_format<compressed>} : (vector<8x2xi16>) -> !lanes
  vector.store %first, %other[%c0] : !vmem, !lanes
  vector.store %second, %other[%c8] : !vmem, !lanes
  return
}
// -----
// The same by registers, whole ones too.
// in i32[16] = 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16
// out i32[16]
// run
// result 0: i32[16]: 9 2 10 4 11 6 12 8 ..., sum 78.00000, by place 398.000
func.func @k(%x: !vmem, %out: !vmem) attributes {tpu.core_type = #tpu.core_type<sc_vector_subcore>} {
  %c0 = arith.constant 0 : index
  %c8 = arith.constant 8 : index
  %zero = arith.constant dense<0> : !lanes
  %one = arith.constant dense<1> : !lanes
  vector.store %zero, %out[%c8] : !vmem, !lanes
  %v = "tpu.load"(%x, %c0) {sublane_mask = array<i1: true>, sublane_stride = 1 : i32} : (!vmem, index) -> !lanes
  %odd = arith.andi %v, %one : !lanes
  %m = arith.cmpi ne, %odd, %zero : !lanes
  %dense = "tpu.expand_load_vreg"(%x, %c8, %m) : (!vmem, index, !mask) -> !lanes
  %w = arith.select %m, %dense, %v : !mask, !lanes
  "tpu.store"(%w, %out, %c0) {add = false, operandSegmentSizes = array<i32: 1, 1, 1, 0>, sublane_mask = array<i1: true>, sublane_stride = 1 : i32} : (!lanes, !vmem, index) -> ()
  "tpu.compress_store_vreg"(%v, %out, %c8, %m) {add = false} : (!lanes, !vmem, index, !mask) -> ()
  return
}
// -----
// Rows are added to what is there, two of them to one place, in whatever order.
// in f32[8,128] = wave 0
// out f32[8,128]
// run
// result 0: f32[8, 128]: 0.8217788 1.4984071 1.9103724 1.9849094 1.7088526 1.130962 0.35331 -0.48674703 ..., sum 18.61333, by place 8961.795
func.func @k(%x: memref<8x128xf32, "hbm">, %o: memref<8x128xf32, "hbm">, %a: memref<4x128xf32, "vmem_shared">, %s: memref<!tpu.dma_semaphore, "semaphore_mem">) attributes {scratch_operands = 2 : i64} {
  %z = arith.constant 0 : i32
  %j4 = arith.constant 4 : i32
  %from = arith.constant dense<[0, 1, 2, 3]> : vector<4xi32>
  %to = arith.constant dense<[5, 7, 5, 6]> : vector<4xi32>
  %half = "tpu.memref_slice"(%x, %z, %z) : (memref<8x128xf32, "hbm">, i32, i32) -> memref<4x128xf32, "hbm">
  "tpu.enqueue_dma"(%half, %a, %s) : (memref<4x128xf32, "hbm">, memref<4x128xf32, "vmem_shared">, memref<!tpu.dma_semaphore, "semaphore_mem">) -> ()
  "tpu.wait_dma2"(%s, %half, %a) : (memref<!tpu.dma_semaphore, "semaphore_mem">, memref<4x128xf32, "hbm">, memref<4x128xf32, "vmem_shared">) -> ()
  "tpu.enqueue_indirect_dma"(%x, %a, %from, %s) {add = true} : (memref<8x128xf32, "hbm">, memref<4x128xf32, "vmem_shared">, vector<4xi32>, memref<!tpu.dma_semaphore, "semaphore_mem">) -> ()
  "tpu.wait_indirect_dma"(%s, %x, %a) : (memref<!tpu.dma_semaphore, "semaphore_mem">, memref<8x128xf32, "hbm">, memref<4x128xf32, "vmem_shared">) -> ()
  "tpu.enqueue_dma"(%x, %o, %s) : (memref<8x128xf32, "hbm">, memref<8x128xf32, "hbm">, memref<!tpu.dma_semaphore, "semaphore_mem">) -> ()
  "tpu.wait_dma2"(%s, %x, %o) : (memref<!tpu.dma_semaphore, "semaphore_mem">, memref<8x128xf32, "hbm">, memref<8x128xf32, "hbm">) -> ()
  "tpu.enqueue_indirect_dma"(%a, %o, %to, %s) {add = true} : (memref<4x128xf32, "vmem_shared">, memref<8x128xf32, "hbm">, vector<4xi32>, memref<!tpu.dma_semaphore, "semaphore_mem">) -> ()
  "tpu.wait_indirect_dma"(%s, %a, %o) : (memref<!tpu.dma_semaphore, "semaphore_mem">, memref<4x128xf32, "vmem_shared">, memref<8x128xf32, "hbm">) -> ()
  return
}
// -----
// Rows from VMEM into memory that subcores share are scattered, and gathered from there, of whichever there are more.
// in f32[8,128] = wave 0
// out f32[8,128]
// run
// result 0: f32[8, 128]: -1.8575271 -1.9995803 -1.7884488 -1.2614241 -0.51159465 0.32859755 1.1107498 1.6967105 ..., sum 8.14593, by place 5220.373
func.func @k(%x: memref<8x128xf32, "hbm">, %o: memref<8x128xf32, "hbm">, %a: memref<8x128xf32, "vmem">, %b: memref<4x128xf32, "vmem_shared">, %s: memref<!tpu.dma_semaphore, "semaphore_mem">) attributes {scratch_operands = 3 : i64} {
  %z = arith.constant 0 : i32
  %to = arith.constant dense<[3, 1, 0, 2, 3, 1, 0, 2]> : vector<8xi32>
  %from = arith.constant dense<[1, 1, 2, 3, 0, 0, 1, 2]> : vector<8xi32>
  %half = "tpu.memref_slice"(%x, %z, %z) : (memref<8x128xf32, "hbm">, i32, i32) -> memref<4x128xf32, "hbm">
  "tpu.enqueue_dma"(%half, %b, %s) : (memref<4x128xf32, "hbm">, memref<4x128xf32, "vmem_shared">, memref<!tpu.dma_semaphore, "semaphore_mem">) -> ()
  "tpu.wait_dma2"(%s, %half, %b) : (memref<!tpu.dma_semaphore, "semaphore_mem">, memref<4x128xf32, "hbm">, memref<4x128xf32, "vmem_shared">) -> ()
  "tpu.enqueue_dma"(%x, %a, %s) : (memref<8x128xf32, "hbm">, memref<8x128xf32, "vmem">, memref<!tpu.dma_semaphore, "semaphore_mem">) -> ()
  "tpu.wait_dma2"(%s, %x, %a) : (memref<!tpu.dma_semaphore, "semaphore_mem">, memref<8x128xf32, "hbm">, memref<8x128xf32, "vmem">) -> ()
  "tpu.enqueue_indirect_dma"(%a, %b, %to, %s) {add = true} : (memref<8x128xf32, "vmem">, memref<4x128xf32, "vmem_shared">, vector<8xi32>, memref<!tpu.dma_semaphore, "semaphore_mem">) -> ()
  "tpu.wait_indirect_dma"(%s, %a, %b) : (memref<!tpu.dma_semaphore, "semaphore_mem">, memref<8x128xf32, "vmem">, memref<4x128xf32, "vmem_shared">) -> ()
  "tpu.enqueue_indirect_dma"(%b, %a, %from, %s) {add = false} : (memref<4x128xf32, "vmem_shared">, memref<8x128xf32, "vmem">, vector<8xi32>, memref<!tpu.dma_semaphore, "semaphore_mem">) -> ()
  "tpu.wait_indirect_dma"(%s, %b, %a) : (memref<!tpu.dma_semaphore, "semaphore_mem">, memref<4x128xf32, "vmem_shared">, memref<8x128xf32, "vmem">) -> ()
  "tpu.enqueue_dma"(%a, %o, %s) : (memref<8x128xf32, "vmem">, memref<8x128xf32, "hbm">, memref<!tpu.dma_semaphore, "semaphore_mem">) -> ()
  "tpu.wait_dma2"(%s, %a, %o) : (memref<!tpu.dma_semaphore, "semaphore_mem">, memref<8x128xf32, "vmem">, memref<8x128xf32, "hbm">) -> ()
  return
}
