// A grid whose sizes come with the call.
// run
// error: Mosaic kernel: @kd: grid dimension 1 is dynamic: the call gives its size; only grids of fixed sizes are read (at refused.mlir:4)
func.func @kd(%i: i32, %j: i32, %x: memref<8x128xf32, "vmem">)
  attributes {iteration_bounds = array<i64: 4, -9223372036854775808>} { return }
// -----
// run
// error: Mosaic kernel: @kd: grid dimension 0 is of size -3; sizes are 0 or more (at refused.mlir:9)
func.func @kd(%i: i32, %x: memref<8x128xf32, "vmem">) attributes {iteration_bounds = array<i64: -3>} { return }
// -----
// fp8, as an argument and as a value.
// run
// error: Mosaic kernel: @kf: argument 0: unknown element type in memref<32x128xf8E4M3FN, "vmem"> (at refused.mlir:14)
func.func @kf(%x: memref<32x128xf8E4M3FN, "vmem">, %o: memref<32x128xf32, "vmem">) { return }
// -----
// run
// error: arith.truncf: values of type vector<32x128xf8E5M2> are not supported (at refused.mlir:21)
func.func @kf(%o: memref<32x128xf32, "vmem">) {
  %c = arith.constant 0 : index
  %x = vector.load %o[%c, %c] : memref<32x128xf32, "vmem">, vector<32x128xf32>
  %n = arith.truncf %x : vector<32x128xf32> to vector<32x128xf8E5M2>
  return
}
// -----
// run
// error: Mosaic kernel: @kd: argument 0: memref<?x128xf32, "vmem"> has a dynamic size (at refused.mlir:27)
func.func @kd(%x: memref<?x128xf32, "vmem">) { return }
