!a = memref<8x128xf32, "vmem">
!b = memref<128x128xf32, "vmem">
!ta = vector<8x128xf32>
!tb = vector<128x128xf32>
// -----
// A product of a matrix unit that the kernel drives itself: the same right side again, sums added up, and one turned.
// in f32[8,128] = wave 0
// in f32[128,128] = wave 1
// out f32[8,128]
// out f32[8,128]
// run
// result 0: f32[8, 128]: 16.056509 14.681686 -11.701355 -18.09322 6.5034103 19.905807 -0.5438595 -20.107449 ..., sum 0.01274, by place -32336.239
// result 1: f32[8, 128]: 1.8354902 1.8961067 1.9614344 2.0173583 2.0121021 2.0649748 2.0589275 2.1966393 ..., sum -23.88425, by place -104341.127
func.func @k(%x: !a, %y: !b, %o: !a, %p: !a) {
  %c = arith.constant 0 : index
  %l = vector.load %x[%c, %c] : !a, !ta
  %r = vector.load %y[%c, %c] : !b, !tb
  "tpu.matmul_push_rhs"(%r) {mxu_index = 0 : i32, staging_register = 0 : i32, transpose = false} : (!tb) -> ()
  "tpu.matmul_acc_lhs"(%l) {acc = 0 : i32, mxu_index = 0 : i32, load_staged_rhs = 0 : i32} : (!ta) -> ()
  "tpu.matmul_push_rhs"(%r) {mxu_index = 0 : i32, staging_register = 0 : i32, transpose = true} : (!tb) -> ()
  "tpu.matmul_acc_lhs"(%l) {acc = 0 : i32, mxu_index = 0 : i32} : (!ta) -> ()
  "tpu.matmul_acc_lhs"(%l) {acc = 64 : i32, mxu_index = 0 : i32, load_staged_rhs = 0 : i32} : (!ta) -> ()
  %twice = "tpu.matmul_pop"() {acc = 0 : i32, mxu_index = 0 : i32} : () -> !ta
  %turned = "tpu.matmul_pop"() {acc = 64 : i32, mxu_index = 0 : i32} : () -> !ta
  vector.store %twice, %o[%c, %c] : !a, !ta
  vector.store %turned, %p[%c, %c] : !a, !ta
  return
}
// -----
// As before, by products: the same numbers.
// in f32[8,128] = wave 0
// in f32[128,128] = wave 1
// out f32[8,128]
// out f32[8,128]
// run
// result 0: f32[8, 128]: 16.056509 14.681686 -11.701355 -18.09322 6.5034103 19.905807 -0.5438595 -20.107449 ..., sum 0.01274, by place -32336.239
// result 1: f32[8, 128]: 1.8354902 1.8961067 1.9614344 2.0173583 2.0121021 2.0649748 2.0589275 2.1966393 ..., sum -23.88425, by place -104341.127
func.func @k(%x: !a, %y: !b, %o: !a, %p: !a) {
  %c = arith.constant 0 : index
  %zero = arith.constant dense<0.0> : !ta
  %l = vector.load %x[%c, %c] : !a, !ta
  %r = vector.load %y[%c, %c] : !b, !tb
  %once = "tpu.matmul"(%l, %r, %zero) : (!ta, !tb, !ta) -> !ta
  %twice = "tpu.matmul"(%l, %r, %once) : (!ta, !tb, !ta) -> !ta
  %turned = "tpu.matmul"(%l, %r, %zero) {transpose_rhs = true} : (!ta, !tb, !ta) -> !ta
  vector.store %twice, %o[%c, %c] : !a, !ta
  vector.store %turned, %p[%c, %c] : !a, !ta
  return
}
// -----
// Two right sides into one register.
// in f32[128,128] = wave 1
// run
// fault: broken-assumption: kernel `k`: broken promise to the compiler: tpu.matmul_push_rhs at mxu.mlir:59, grid step []: matrix unit 1: staging register 0 holds what was not loaded
func.func @k(%y: !b) {
  %c = arith.constant 0 : index
  %r = vector.load %y[%c, %c] : !b, !tb
  "tpu.matmul_push_rhs"(%r) {mxu_index = 1 : i32, staging_register = 0 : i32} : (!tb) -> ()
  "tpu.matmul_push_rhs"(%r) {mxu_index = 1 : i32, staging_register = 0 : i32} : (!tb) -> ()
  return
}
// -----
// A sum that nobody takes.
// in f32[8,128] = wave 0
// in f32[128,128] = wave 1
// run
// fault: broken-assumption: kernel `k`: broken promise to the compiler: pipeline at the kernel's grid, grid step []: matrix unit 0: a sum at address 0 is left at the end of the kernel
func.func @k(%x: !a, %y: !b) {
  %c = arith.constant 0 : index
  %l = vector.load %x[%c, %c] : !a, !ta
  %r = vector.load %y[%c, %c] : !b, !tb
  "tpu.matmul_push_rhs"(%r) {mxu_index = 0 : i32, staging_register = 1 : i32} : (!tb) -> ()
  "tpu.matmul_acc_lhs"(%l) {acc = 0 : i32, mxu_index = 0 : i32, load_staged_rhs = 1 : i32} : (!ta) -> ()
  return
}
// -----
// A sum that is not there is zero.
// out f32[8,128]
// run
// result 0: f32[8, 128]: 0 0 0 0 0 0 0 0 ..., sum 0.00000, by place 0.000
func.func @k(%o: !a) {
  %c = arith.constant 0 : index
  %s = "tpu.matmul_pop"() {acc = 0 : i32, mxu_index = 0 : i32} : () -> !ta
  vector.store %s, %o[%c, %c] : !a, !ta
  return
}
// -----
// Integers are not added to a sum of floats.
// in f32[8,128] = wave 0
// in f32[128,128] = wave 1
// run
// fault: broken-assumption: kernel `k`: broken promise to the compiler: tpu.matmul_acc_lhs at mxu.mlir:102, grid step []: matrix unit 0: [8, 128] i32 are added to [8, 128] at address 0
func.func @k(%x: !a, %y: !b) {
  %c = arith.constant 0 : index
  %l = vector.load %x[%c, %c] : !a, !ta
  %r = vector.load %y[%c, %c] : !b, !tb
  %i = arith.constant dense<1> : vector<8x128xi8>
  %j = arith.constant dense<1> : vector<128x128xi8>
  "tpu.matmul_push_rhs"(%r) {mxu_index = 0 : i32, staging_register = 0 : i32} : (!tb) -> ()
  "tpu.matmul_acc_lhs"(%l) {acc = 0 : i32, mxu_index = 0 : i32, load_staged_rhs = 0 : i32} : (!ta) -> ()
  "tpu.matmul_push_rhs"(%j) {mxu_index = 0 : i32, staging_register = 0 : i32} : (vector<128x128xi8>) -> ()
  "tpu.matmul_acc_lhs"(%i) {acc = 0 : i32, mxu_index = 0 : i32, load_staged_rhs = 0 : i32} : (vector<8x128xi8>) -> ()
  return
}
// -----
// The steps of a parallel grid each take what the one before left: one thread runs them all.
// in f32[8,128] = wave 0
// in f32[128,128] = wave 1
// out f32[8,128]
// run
// result 0: f32[8, 128]: 16.056509 14.681686 -11.701355 -18.09322 6.5034103 19.905807 -0.5438595 -20.107449 ..., sum 0.01274, by place -32336.239
func.func @k(%g: i32, %x: !a, %y: !b, %o: memref<8x128xf32, "hbm">, %t: !a, %s: memref<!tpu.dma_semaphore, "semaphore_mem">) attributes {dimension_semantics = [#tpu.dimension_semantics<parallel>], iteration_bounds = array<i64: 2>, scratch_operands = 2 : i64, window_params = [{transform_indices = @w, window_bounds = array<i64: 8, 128>}, {transform_indices = @w, window_bounds = array<i64: 128, 128>}, {}]} {
  %c = arith.constant 0 : index
  %zero = arith.constant 0 : i32
  %l = vector.load %x[%c, %c] : !a, !ta
  %r = vector.load %y[%c, %c] : !b, !tb
  "tpu.matmul_push_rhs"(%r) {mxu_index = 0 : i32, staging_register = 0 : i32} : (!tb) -> ()
  "tpu.matmul_acc_lhs"(%l) {acc = 0 : i32, mxu_index = 0 : i32, load_staged_rhs = 0 : i32} : (!ta) -> ()
  %second = arith.cmpi ne, %g, %zero : i32
  scf.if %second {
    %sum = "tpu.matmul_pop"() {acc = 0 : i32, mxu_index = 0 : i32} : () -> !ta
    vector.store %sum, %t[%c, %c] : !a, !ta
    "tpu.enqueue_dma"(%t, %o, %s) : (!a, memref<8x128xf32, "hbm">, memref<!tpu.dma_semaphore, "semaphore_mem">) -> ()
    "tpu.wait_dma2"(%s, %t, %o) : (memref<!tpu.dma_semaphore, "semaphore_mem">, !a, memref<8x128xf32, "hbm">) -> ()
  }
  return
}
func.func @w(%g: i32) -> (i32, i32) {
  %c = arith.constant 0 : i32
  return %c, %c : i32, i32
}
