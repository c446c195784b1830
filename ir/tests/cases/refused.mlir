// run
// error: Mosaic kernel: @kd: grid dimension 0 is of size -3; sizes are 0 or more (at refused.mlir:3)
func.func @kd(%i: i32, %x: memref<8x128xf32, "vmem">) attributes {iteration_bounds = array<i64: -3>} { return }
// -----
// A float that no TPU has, as an argument and as a value.
// run
// error: Mosaic kernel: @kf: argument 0: unknown element type in memref<32x128xf8E3M4, "vmem"> (at refused.mlir:8)
func.func @kf(%x: memref<32x128xf8E3M4, "vmem">, %o: memref<32x128xf32, "vmem">) { return }
// -----
// run
// error: arith.truncf: values of type vector<32x128xf8E3M4> are not supported (at refused.mlir:15)
func.func @kf(%o: memref<32x128xf32, "vmem">) {
  %c = arith.constant 0 : index
  %x = vector.load %o[%c, %c] : memref<32x128xf32, "vmem">, vector<32x128xf32>
  %n = arith.truncf %x : vector<32x128xf32> to vector<32x128xf8E3M4>
  return
}
// -----
// run
// error: Mosaic kernel: @kd: argument 0: memref<?x128xf32, "vmem"> has a dynamic size (at refused.mlir:21)
func.func @kd(%x: memref<?x128xf32, "vmem">) { return }
// -----
// An op that the machine does not know.
// run
// fault: bad-call: kernel `k`: arguments do not fit the kernel: pipeline at the kernel's grid, grid step []: 0 inputs and 0 outputs for a kernel with 2 and 0
func.func @k(%x: memref<8x128xf32, "vmem">, %h: memref<8x128xf32, "any">) {
  %i = arith.constant 0 : i32
  %c = arith.constant 0 : index
  %v = arith.constant dense<0.0> : vector<8x128xf32>
  %n = arith.constant dense<0> : vector<8x128xi32>
  "tpu.prng_set_seed_32"() : () -> ()
  return
}
// -----
// Ops that MLIR does not know and so did not check: no indices.
// run
// error: tpu.vector_load: (memref<8x128xf32, "vmem">) -> (vector<8x128xf32>) do not fit together (at refused.mlir:43)
func.func @k(%x: memref<8x128xf32, "vmem">, %h: memref<8x128xf32, "any">) {
  %i = arith.constant 0 : i32
  %c = arith.constant 0 : index
  %v = arith.constant dense<0.0> : vector<8x128xf32>
  %n = arith.constant dense<0> : vector<8x128xi32>
  %0 = "tpu.vector_load"(%x) : (memref<8x128xf32, "vmem">) -> vector<8x128xf32>
  return
}
// -----
// A step of 0.
// run
// fault: bad-call: kernel `k`: arguments do not fit the kernel: pipeline at the kernel's grid, grid step []: 0 inputs and 0 outputs for a kernel with 2 and 0
func.func @k(%x: memref<8x128xf32, "vmem">, %h: memref<8x128xf32, "any">) {
  %i = arith.constant 0 : i32
  %c = arith.constant 0 : index
  %v = arith.constant dense<0.0> : vector<8x128xf32>
  %n = arith.constant dense<0> : vector<8x128xi32>
  %0 = "tpu.strided_load"(%x, %c, %c) {strides = array<i32: 0, 1>} : (memref<8x128xf32, "vmem">, index, index) -> vector<8x128xf32>
  return
}
// -----
// A memref that is not a semaphore.
// run
// error: tpu.enqueue_dma: (memref<8x128xf32, "vmem">, memref<8x128xf32, "vmem">, memref<8x128xf32, "vmem">) -> () do not fit together (at refused.mlir:67)
func.func @k(%x: memref<8x128xf32, "vmem">, %h: memref<8x128xf32, "any">) {
  %i = arith.constant 0 : i32
  %c = arith.constant 0 : index
  %v = arith.constant dense<0.0> : vector<8x128xf32>
  %n = arith.constant dense<0> : vector<8x128xi32>
  "tpu.enqueue_dma"(%x, %x, %x) : (memref<8x128xf32, "vmem">, memref<8x128xf32, "vmem">, memref<8x128xf32, "vmem">) -> ()
  return
}
// -----
// A load from HBM.
// run
// error: tpu.vector_load: (memref<8x128xf32, "any">, index, index) -> (vector<8x128xf32>) do not fit together (at refused.mlir:79)
func.func @k(%x: memref<8x128xf32, "vmem">, %h: memref<8x128xf32, "any">) {
  %i = arith.constant 0 : i32
  %c = arith.constant 0 : index
  %v = arith.constant dense<0.0> : vector<8x128xf32>
  %n = arith.constant dense<0> : vector<8x128xi32>
  %0 = "tpu.vector_load"(%h, %c, %c) : (memref<8x128xf32, "any">, index, index) -> vector<8x128xf32>
  return
}
// -----
// A scalar of VMEM.
// run
// error: memref.load: (memref<8x128xf32, "vmem">, index, index) -> (f32) do not fit together (at refused.mlir:91)
func.func @k(%x: memref<8x128xf32, "vmem">, %h: memref<8x128xf32, "any">) {
  %i = arith.constant 0 : i32
  %c = arith.constant 0 : index
  %v = arith.constant dense<0.0> : vector<8x128xf32>
  %n = arith.constant dense<0> : vector<8x128xi32>
  %0 = memref.load %x[%c, %c] : memref<8x128xf32, "vmem">
  return
}
// -----
// A sum of other sizes.
// run
// error: tpu.matmul: (vector<8x128xf32>, vector<8x128xf32>, vector<8x128xf32>) -> (vector<16x128xf32>) do not fit together (at refused.mlir:103)
func.func @k(%x: memref<8x128xf32, "vmem">, %h: memref<8x128xf32, "any">) {
  %i = arith.constant 0 : i32
  %c = arith.constant 0 : index
  %v = arith.constant dense<0.0> : vector<8x128xf32>
  %n = arith.constant dense<0> : vector<8x128xi32>
  %0 = "tpu.matmul"(%v, %v, %v) : (vector<8x128xf32>, vector<8x128xf32>, vector<8x128xf32>) -> vector<16x128xf32>
  return
}
// -----
// The reciprocal of an integer.
// run
// error: tpu.reciprocal: (vector<8x128xi32>) -> (vector<8x128xi32>) do not fit together (at refused.mlir:115)
func.func @k(%x: memref<8x128xf32, "vmem">, %h: memref<8x128xf32, "any">) {
  %i = arith.constant 0 : i32
  %c = arith.constant 0 : index
  %v = arith.constant dense<0.0> : vector<8x128xf32>
  %n = arith.constant dense<0> : vector<8x128xi32>
  %0 = "tpu.reciprocal"(%n) : (vector<8x128xi32>) -> vector<8x128xi32>
  return
}
// -----
// A multiple of 0.
// run
// error: tpu.assume_multiple: (i32) -> (i32) do not fit together (at refused.mlir:127)
func.func @k(%x: memref<8x128xf32, "vmem">, %h: memref<8x128xf32, "any">) {
  %i = arith.constant 0 : i32
  %c = arith.constant 0 : index
  %v = arith.constant dense<0.0> : vector<8x128xf32>
  %n = arith.constant dense<0> : vector<8x128xi32>
  %0 = "tpu.assume_multiple"(%i) {multiple = 0 : i32} : (i32) -> i32
  return
}
// -----
// Sides that do not fit.
// run
// error: tpu.matmul: [8, 128] x [8, 128] + [8, 128] with dimension numbers [[1], [0], [0], [1], [0, 0, 1, 1], [], []] (at refused.mlir:139)
func.func @k(%x: memref<8x128xf32, "vmem">, %h: memref<8x128xf32, "any">) {
  %i = arith.constant 0 : i32
  %c = arith.constant 0 : index
  %v = arith.constant dense<0.0> : vector<8x128xf32>
  %n = arith.constant dense<0> : vector<8x128xi32>
  %0 = "tpu.matmul"(%v, %v, %v) : (vector<8x128xf32>, vector<8x128xf32>, vector<8x128xf32>) -> vector<8x128xf32>
  return
}
// -----
// No such dimension.
// run
// error: tpu.concatenate: (vector<8x128xf32>, vector<8x128xf32>) -> (vector<16x128xf32>) do not fit together (at refused.mlir:151)
func.func @k(%x: memref<8x128xf32, "vmem">, %h: memref<8x128xf32, "any">) {
  %i = arith.constant 0 : i32
  %c = arith.constant 0 : index
  %v = arith.constant dense<0.0> : vector<8x128xf32>
  %n = arith.constant dense<0> : vector<8x128xi32>
  %0 = "tpu.concatenate"(%v, %v) {dimension = 2 : i32} : (vector<8x128xf32>, vector<8x128xf32>) -> vector<16x128xf32>
  return
}
// -----
// Half of the bits.
// run
// error: tpu.bitcast: (vector<8x128xf32>) -> (vector<8x128xbf16>) do not fit together (at refused.mlir:163)
func.func @k(%x: memref<8x128xf32, "vmem">, %h: memref<8x128xf32, "any">) {
  %i = arith.constant 0 : i32
  %c = arith.constant 0 : index
  %v = arith.constant dense<0.0> : vector<8x128xf32>
  %n = arith.constant dense<0> : vector<8x128xi32>
  %0 = "tpu.bitcast"(%v) : (vector<8x128xf32>) -> vector<8x128xbf16>
  return
}
// -----
// A narrower view, of other lanes.
// run
// error: tpu.memref_bitcast: (memref<8x128xf32, "vmem">) -> (memref<8x256xbf16, "vmem">) do not fit together (at refused.mlir:175)
func.func @k(%x: memref<8x128xf32, "vmem">, %h: memref<8x128xf32, "any">) {
  %i = arith.constant 0 : i32
  %c = arith.constant 0 : index
  %v = arith.constant dense<0.0> : vector<8x128xf32>
  %n = arith.constant dense<0> : vector<8x128xi32>
  %0 = "tpu.memref_bitcast"(%x) : (memref<8x128xf32, "vmem">) -> memref<8x256xbf16, "vmem">
  return
}
// -----
// A type that TPUs do not have.
// run
// error: arith.constant: values of type f64 are not supported (at refused.mlir:187)
func.func @k(%x: memref<8x128xf32, "vmem">, %h: memref<8x128xf32, "any">) {
  %i = arith.constant 0 : i32
  %c = arith.constant 0 : index
  %v = arith.constant dense<0.0> : vector<8x128xf32>
  %n = arith.constant dense<0> : vector<8x128xi32>
  %0 = arith.constant 1.0 : f64
  return
}
// -----
// Functions that do not take what they are called with.
// run
// error: func.func: @k: its grid indices are not all i32 (at refused.mlir:194)
func.func @k(%i: f32, %x: memref<8x128xf32, "vmem">) attributes {iteration_bounds = array<i64: 1>,
    window_params = [{transform_indices = @t, window_bounds = array<i64: 8, 128>}]} { return }
func.func @t(%i: i32) -> (i32, i32) { %c = arith.constant 0 : i32 return %c, %c : i32, i32 }
// -----
// run
// error: func.func: @t does not take (i32) (at refused.mlir:202)
func.func @k(%i: i32, %x: memref<8x128xf32, "vmem">) attributes {iteration_bounds = array<i64: 1>,
    window_params = [{transform_indices = @t, window_bounds = array<i64: 8, 128>}]} { return }
func.func @t(%i: i32, %x: i32) -> (i32, i32) { %c = arith.constant 0 : i32 return %c, %c : i32, i32 }
// -----
// run
// error: func.func: @t yields 1 indices for blocks of rank 2 (at refused.mlir:208)
func.func @k(%i: i32, %x: memref<8x128xf32, "vmem">) attributes {iteration_bounds = array<i64: 1>,
    window_params = [{transform_indices = @t, window_bounds = array<i64: 8, 128>}]} { return }
func.func @t(%i: i32) -> i32 { return %i : i32 }
// -----
// All that is not known, at once.
// run
// error: 3 ops are not supported:
// error:   tpu.first: the tile machine does not know this op (at refused.mlir:217)
// error:   tpu.second: the tile machine does not know this op (at refused.mlir:219)
// error:   tpu.first: the tile machine does not know this op (at refused.mlir:222)
func.func @several() {
  "tpu.first"() : () -> ()
  "tpu.region"() ({
    "tpu.second"() : () -> ()
    "tpu.yield"() : () -> ()
  }) : () -> ()
  "tpu.first"() : () -> ()
  return
}
