// An output that serves as scratch memory: each parallel step sums in its one block.
// in f32[16,256] = wave 0
// out f32[8,128]
// out f32[16,128]
// run
// fault: parallel-overlap: kernel `ks`: overlap of parallel grid steps: pipeline at the kernel's grid, buffer `sum` at [0, 0], grid step [1, 0]: block [0, 0] belongs to this step and to the one before it, at parallel position [0], now at [1]: a dimension that is declared parallel has steps that share a block
// run allow_parallel_overlaps
// result 0: f32[8, 128]: NaN NaN NaN NaN NaN NaN NaN NaN ..., sum 0.00000, by place 0.000, 1024 nan
// result 1: f32[16, 128]: -1.0531799 -0.49697757 0.14700544 0.7650231 1.2479149 1.5103881 1.5060822 1.2357574 ..., sum 0.30604, by place -9750.084
func.func @ks(%h: i32, %j: i32, %x: memref<8x128xf32, "vmem">, %sum: memref<8x128xf32, "vmem">, %o: memref<8x128xf32, "vmem">)
  attributes {iteration_bounds = array<i64: 2, 2>,
    dimension_semantics = [#tpu.dimension_semantics<parallel>, #tpu.dimension_semantics<arbitrary>], window_params = [
    {transform_indices = @of_x, window_bounds = array<i64: 8, 128>},
    {transform_indices = @of_sum, window_bounds = array<i64: 8, 128>},
    {transform_indices = @of_o, window_bounds = array<i64: 8, 128>}]} {
  %c = arith.constant 0 : index
  %zero = arith.constant 0 : i32
  %one = arith.constant 1 : i32
  %first = arith.cmpi eq, %j, %zero : i32
  scf.if %first {
    %z = arith.constant dense<0.0> : vector<8x128xf32>
    vector.store %z, %sum[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
  }
  %v = vector.load %x[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
  %w = vector.load %sum[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
  %s = arith.addf %v, %w : vector<8x128xf32>
  vector.store %s, %sum[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
  %last = arith.cmpi eq, %j, %one : i32
  scf.if %last {
    vector.store %s, %o[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
  }
  return
}
func.func @of_x(%h: i32, %j: i32) -> (i32, i32) { return %h, %j : i32, i32 }
func.func @of_sum(%h: i32, %j: i32) -> (i32, i32) { %c = arith.constant 0 : i32 return %c, %c : i32, i32 }
func.func @of_o(%h: i32, %j: i32) -> (i32, i32) { %c = arith.constant 0 : i32 return %h, %c : i32, i32 }
// -----
// Where nobody reads it, it is no fault and needs no flag.
// in f32[16,256] = wave 0
// out f32[8,128]
// out f32[16,128]
// unused 0
// run
// result 0: f32[8, 128]: NaN NaN NaN NaN NaN NaN NaN NaN ..., sum 0.00000, by place 0.000, 1024 nan
// result 1: f32[16, 128]: -1.0531799 -0.49697757 0.14700544 0.7650231 1.2479149 1.5103881 1.5060822 1.2357574 ..., sum 0.30604, by place -9750.084
func.func @ks(%h: i32, %j: i32, %x: memref<8x128xf32, "vmem">, %sum: memref<8x128xf32, "vmem">, %o: memref<8x128xf32, "vmem">)
  attributes {iteration_bounds = array<i64: 2, 2>,
    dimension_semantics = [#tpu.dimension_semantics<parallel>, #tpu.dimension_semantics<arbitrary>], window_params = [
    {transform_indices = @of_x, window_bounds = array<i64: 8, 128>},
    {transform_indices = @of_sum, window_bounds = array<i64: 8, 128>},
    {transform_indices = @of_o, window_bounds = array<i64: 8, 128>}]} {
  %c = arith.constant 0 : index
  %zero = arith.constant 0 : i32
  %one = arith.constant 1 : i32
  %first = arith.cmpi eq, %j, %zero : i32
  scf.if %first {
    %z = arith.constant dense<0.0> : vector<8x128xf32>
    vector.store %z, %sum[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
  }
  %v = vector.load %x[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
  %w = vector.load %sum[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
  %s = arith.addf %v, %w : vector<8x128xf32>
  vector.store %s, %sum[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
  %last = arith.cmpi eq, %j, %one : i32
  scf.if %last {
    vector.store %s, %o[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
  }
  return
}
func.func @of_x(%h: i32, %j: i32) -> (i32, i32) { return %h, %j : i32, i32 }
func.func @of_sum(%h: i32, %j: i32) -> (i32, i32) { %c = arith.constant 0 : i32 return %c, %c : i32, i32 }
func.func @of_o(%h: i32, %j: i32) -> (i32, i32) { %c = arith.constant 0 : i32 return %h, %c : i32, i32 }
// -----
// What another parallel step left in it is not there.
// in f32[16,256] = wave 0
// out f32[8,128]
// out f32[16,128]
// unused 0
// run
// fault: unwritten-read: kernel `ks`: read of unwritten memory: vector.load at scratch_outputs.mlir:97, buffer `sum` at [0, 0], grid step [1, 0]
func.func @ks(%h: i32, %j: i32, %x: memref<8x128xf32, "vmem">, %sum: memref<8x128xf32, "vmem">, %o: memref<8x128xf32, "vmem">)
  attributes {iteration_bounds = array<i64: 2, 2>,
    dimension_semantics = [#tpu.dimension_semantics<parallel>, #tpu.dimension_semantics<arbitrary>], window_params = [
    {transform_indices = @of_x, window_bounds = array<i64: 8, 128>},
    {transform_indices = @of_sum, window_bounds = array<i64: 8, 128>},
    {transform_indices = @of_o, window_bounds = array<i64: 8, 128>}]} {
  %c = arith.constant 0 : index
  %zero = arith.constant 0 : i32
  %one = arith.constant 1 : i32
  %both = arith.ori %h, %j : i32
  %first = arith.cmpi eq, %both, %zero : i32
  scf.if %first {
    %z = arith.constant dense<0.0> : vector<8x128xf32>
    vector.store %z, %sum[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
  }
  %v = vector.load %x[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
  %w = vector.load %sum[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
  %s = arith.addf %v, %w : vector<8x128xf32>
  vector.store %s, %sum[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
  %last = arith.cmpi eq, %j, %one : i32
  scf.if %last {
    vector.store %s, %o[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
  }
  return
}
func.func @of_x(%h: i32, %j: i32) -> (i32, i32) { return %h, %j : i32, i32 }
func.func @of_sum(%h: i32, %j: i32) -> (i32, i32) { %c = arith.constant 0 : i32 return %c, %c : i32, i32 }
func.func @of_o(%h: i32, %j: i32) -> (i32, i32) { %c = arith.constant 0 : i32 return %h, %c : i32, i32 }
