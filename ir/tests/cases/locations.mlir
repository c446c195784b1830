// JAX's locations: a name around a call stack of named source lines. The innermost line counts.
// in f32[8,128] = 0
// out f32[8,128]
// run
// fault: out-of-bounds: kernel `kn`: access out of bounds: vector.load at kernel.py:7 in kn (get), buffer `x` at [1, 1], grid step []: element 8 of dimension 0 in a view of sizes [8, 128] (from [1, 1], sizes [8, 128])
func.func @kn(%x: memref<8x128xf32, "vmem">, %o: memref<8x128xf32, "vmem">) {
  %c = arith.constant 1 : index
  %x0 = vector.load %x[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
    loc("get:"(callsite("kn"("kernel.py":7:3) at callsite("wrapper"("caller.py":40:0) at "<module>"("run.py":1:0)))))
  vector.store %x0, %o[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
  return
}
// -----
// Where the innermost frame has no line, the one that called it does.
// in f32[8,128] = 0
// out f32[8,128]
// run
// fault: out-of-bounds: kernel `kn`: access out of bounds: vector.load at caller.py:40, buffer `x` at [1, 1], grid step []: element 8 of dimension 0 in a view of sizes [8, 128] (from [1, 1], sizes [8, 128])
func.func @kn(%x: memref<8x128xf32, "vmem">, %o: memref<8x128xf32, "vmem">) {
  %c = arith.constant 1 : index
  %x0 = vector.load %x[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
    loc(callsite(unknown at fused[unknown, "caller.py":40:0]))
  vector.store %x0, %o[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
  return
}
// -----
// in f32[8,128] = 0
// out f32[8,128]
// run
// fault: out-of-bounds: kernel `kn`: access out of bounds: vector.load at unknown, buffer `x` at [1, 1], grid step []: element 8 of dimension 0 in a view of sizes [8, 128] (from [1, 1], sizes [8, 128])
func.func @kn(%x: memref<8x128xf32, "vmem">, %o: memref<8x128xf32, "vmem">) {
  %c = arith.constant 1 : index
  %x0 = vector.load %x[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32> loc(unknown)
  vector.store %x0, %o[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
  return
}
