// A kernel that comes back to blocks of its output: out[:, i] += x[j, i], i inside j. What was written comes back.
// in f32[16,256] = wave 0
// out f32[8,256]
// run
// result 0: f32[8, 256]: 1.8280768 3.1260152 3.8718066 3.9337225 3.3008265 2.084907 0.5007313 -1.1718885 ..., sum 0.30605, by place -18898.516
func.func @kr(%j: i32, %i: i32, %x: memref<8x128xf32, "vmem">, %o: memref<8x128xf32, "vmem">)
  attributes {iteration_bounds = array<i64: 2, 2>, window_params = [
    {transform_indices = @of_x, window_bounds = array<i64: 8, 128>},
    {transform_indices = @of_o, window_bounds = array<i64: 8, 128>, pipeline_mode = #tpu.pipeline_mode<synchronous>,
     revisit_mode = #tpu.revisit_mode<any>}]} {
  %c = arith.constant 0 : index
  %zero = arith.constant 0 : i32
  %v = vector.load %x[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
  %first = arith.cmpi eq, %j, %zero : i32
  scf.if %first {
    vector.store %v, %o[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
  } else {
    %w = vector.load %o[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
    %sum = arith.addf %v, %w : vector<8x128xf32>
    vector.store %sum, %o[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
  }
  return
}
func.func @of_x(%j: i32, %i: i32) -> (i32, i32) { return %j, %i : i32, i32 }
func.func @of_o(%j: i32, %i: i32) -> (i32, i32) { %c = arith.constant 0 : i32 return %c, %i : i32, i32 }
// -----
// Without the mode, nothing comes back.
// in f32[16,256] = wave 0
// out f32[8,256]
// run
// fault: unwritten-read: kernel `kr`: read of unwritten memory: vector.load at revisits.mlir:43, buffer `o` at [0, 0], grid step [1, 0]
func.func @kr(%j: i32, %i: i32, %x: memref<8x128xf32, "vmem">, %o: memref<8x128xf32, "vmem">)
  attributes {iteration_bounds = array<i64: 2, 2>, window_params = [
    {transform_indices = @of_x, window_bounds = array<i64: 8, 128>},
    {transform_indices = @of_o, window_bounds = array<i64: 8, 128>}]} {
  %c = arith.constant 0 : index
  %zero = arith.constant 0 : i32
  %v = vector.load %x[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
  %first = arith.cmpi eq, %j, %zero : i32
  scf.if %first {
    vector.store %v, %o[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
  } else {
    %w = vector.load %o[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
    %sum = arith.addf %v, %w : vector<8x128xf32>
    vector.store %sum, %o[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
  }
  return
}
func.func @of_x(%j: i32, %i: i32) -> (i32, i32) { return %j, %i : i32, i32 }
func.func @of_o(%j: i32, %i: i32) -> (i32, i32) { %c = arith.constant 0 : i32 return %c, %i : i32, i32 }
// -----
// A block that comes back brings along what was not written in it.
// out f32[8,256]
// run
// fault: unwritten-read: kernel `kr`: read of unwritten memory: vector.load at revisits.mlir:67, buffer `o` at [7, 0], grid step [1, 0]
func.func @kr(%j: i32, %i: i32, %o: memref<8x128xf32, "vmem">)
  attributes {iteration_bounds = array<i64: 2, 2>, window_params = [
    {transform_indices = @of_o, window_bounds = array<i64: 8, 128>, revisit_mode = #tpu.revisit_mode<any>}]} {
  %c = arith.constant 0 : index
  %last = arith.constant 7 : index
  %row = arith.constant dense<1.0> : vector<1x128xf32>
  vector.store %row, %o[%c, %c] : memref<8x128xf32, "vmem">, vector<1x128xf32>
  %again = vector.load %o[%c, %c] : memref<8x128xf32, "vmem">, vector<1x128xf32>
  %zero = arith.constant 0 : i32
  %later = arith.cmpi ne, %j, %zero : i32
  scf.if %later {
    %w = vector.load %o[%last, %c] : memref<8x128xf32, "vmem">, vector<1x128xf32>
    vector.store %w, %o[%c, %c] : memref<8x128xf32, "vmem">, vector<1x128xf32>
  }
  return
}
func.func @of_o(%j: i32, %i: i32) -> (i32, i32) { %c = arith.constant 0 : i32 return %c, %i : i32, i32 }
