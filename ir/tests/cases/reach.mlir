// Narrow floats, through memory and back.
// in f32[32,128] = 1.06 -3.3 449 500 0.001 60000 nan -0.0
// out f32[32,128]
// out f8E5M2[32,128]
// out f8E4M3B11FNUZ[32,128]
// out f16[32,128]
// run
// result 0: f32[32, 128]: 1 -3.25 448 NaN 0.001953125 NaN NaN -0 ..., sum 228225.00000, by place 113433442.336, 1536 nan
// result 1: f8e5m2[32, 128]: 1 -3.5 448 512 0.0009765625 57344 NaN -0 ..., sum 29850368.50000, by place 14808554347.043, 512 nan
// result 2: f8e4m3b11fnuz[32, 128]: 1 -3.25 NaN NaN 0.0009765625 NaN NaN 0 ..., sum -1151.50000, by place -572949.207, 2048 nan
// result 3: f16[32, 128]: 1.0595703 -3.3007813 449 500 0.0010004044 60000 NaN -0 ..., sum 31204741.01221, by place 15480440449.434, 512 nan
func.func @narrow_floats(%x: memref<32x128xf32, "vmem">, %o: memref<32x128xf32, "vmem">, %a: memref<32x128xf8E5M2, "vmem">,
    %b: memref<32x128xf8E4M3B11FNUZ, "vmem">, %h: memref<32x128xf16, "vmem">, %t: memref<32x128xf8E4M3FN, "vmem">)
    attributes {scratch_operands = 1 : i64} {
  %c = arith.constant 0 : index
  %x0 = vector.load %x[%c, %c] : memref<32x128xf32, "vmem">, vector<32x128xf32>
  %n = arith.truncf %x0 : vector<32x128xf32> to vector<32x128xf8E4M3FN>
  vector.store %n, %t[%c, %c] : memref<32x128xf8E4M3FN, "vmem">, vector<32x128xf8E4M3FN>
  %n0 = vector.load %t[%c, %c] : memref<32x128xf8E4M3FN, "vmem">, vector<32x128xf8E4M3FN>
  %w = arith.extf %n0 : vector<32x128xf8E4M3FN> to vector<32x128xf32>
  vector.store %w, %o[%c, %c] : memref<32x128xf32, "vmem">, vector<32x128xf32>
  %n1 = arith.truncf %x0 : vector<32x128xf32> to vector<32x128xf8E5M2>
  vector.store %n1, %a[%c, %c] : memref<32x128xf8E5M2, "vmem">, vector<32x128xf8E5M2>
  %n2 = arith.truncf %x0 : vector<32x128xf32> to vector<32x128xf8E4M3B11FNUZ>
  vector.store %n2, %b[%c, %c] : memref<32x128xf8E4M3B11FNUZ, "vmem">, vector<32x128xf8E4M3B11FNUZ>
  %n3 = arith.truncf %x0 : vector<32x128xf32> to vector<32x128xf16>
  vector.store %n3, %h[%c, %c] : memref<32x128xf16, "vmem">, vector<32x128xf16>
  return
}
// -----
// Narrow integers: they wrap, and shifts and divisions without a sign see their own bits.
// in i4[64,128] = 7 -8 -1 3
// out i32[64,128]
// out i4[64,128]
// run
// result 0: i32[64, 128]: 7 -8 -1 3 7 -8 -1 3 ..., sum 2048.00000, by place 1018782.000
// result 1: i4[64, 128]: -4 -3 4 -8 -4 -3 4 -8 ..., sum -22528.00000, by place -11207502.000
func.func @nibbles(%x: memref<64x128xi4, "vmem">, %o: memref<64x128xi32, "vmem">, %n: memref<64x128xi4, "vmem">) {
  %c = arith.constant 0 : index
  %x0 = vector.load %x[%c, %c] : memref<64x128xi4, "vmem">, vector<64x128xi4>
  %w = arith.extsi %x0 : vector<64x128xi4> to vector<64x128xi32>
  vector.store %w, %o[%c, %c] : memref<64x128xi32, "vmem">, vector<64x128xi32>
  %five = arith.constant dense<5> : vector<64x128xi32>
  %s = arith.addi %w, %five : vector<64x128xi32>
  %t = arith.trunci %s : vector<64x128xi32> to vector<64x128xi4>
  vector.store %t, %n[%c, %c] : memref<64x128xi4, "vmem">, vector<64x128xi4>
  return
}
// -----
// in i8[32,128] = -1 -128 7 100
// out i8[32,128]
// out i8[32,128]
// out i8[32,128]
// run
// result 0: i8[32, 128]: 36 18 1 14 36 18 1 14 ..., sum 70656.00000, by place 35118894.000
// result 1: i8[32, 128]: 3 2 0 2 3 2 0 2 ..., sum 7168.00000, by place 3562812.000
// result 2: i8[32, 128]: 127 64 3 50 127 64 3 50 ..., sum 249856.00000, by place 124188564.000
func.func @unsigned_bytes(%x: memref<32x128xi8, "vmem">, %d: memref<32x128xi8, "vmem">, %r: memref<32x128xi8, "vmem">,
    %m: memref<32x128xi8, "vmem">) {
  %c = arith.constant 0 : index
  %x0 = vector.load %x[%c, %c] : memref<32x128xi8, "vmem">, vector<32x128xi8>
  %seven = arith.constant dense<7> : vector<32x128xi8>
  %q = arith.divui %x0, %seven : vector<32x128xi8>
  vector.store %q, %d[%c, %c] : memref<32x128xi8, "vmem">, vector<32x128xi8>
  %rem = arith.remui %x0, %seven : vector<32x128xi8>
  vector.store %rem, %r[%c, %c] : memref<32x128xi8, "vmem">, vector<32x128xi8>
  %max = arith.maxui %x0, %seven : vector<32x128xi8>
  %one = arith.constant dense<1> : vector<32x128xi8>
  %half = arith.shrui %max, %one : vector<32x128xi8>
  vector.store %half, %m[%c, %c] : memref<32x128xi8, "vmem">, vector<32x128xi8>
  return
}
// -----
// in f32[8,128] = 0.5 -1.5 2.5 nan inf 7
// in i32[8,128] = 1 0 -1 65535
// out f32[8,128]
// out i32[8,128]
// out i32[8,128]
// run
// result 0: f32[8, 128]: 1 -2 3 NaN inf 7 1 -2 ..., sum 1532.00000, by place 765213.000, 171 nan
// result 1: i32[8, 128]: 0 0 0 1 1 0 0 0 ..., sum 341.00000, by place 169548.000
// result 2: i32[8, 128]: 3101 3200 32 1616 3101 3200 32 1616 ..., sum 2034944.00000, by place 1010944857.000
func.func @elementwise(%x: memref<8x128xf32, "vmem">, %i: memref<8x128xi32, "vmem">, %o: memref<8x128xf32, "vmem">,
    %w: memref<8x128xi32, "vmem">, %b: memref<8x128xi32, "vmem">) {
  %c = arith.constant 0 : index
  %x0 = vector.load %x[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
  %i0 = vector.load %i[%c, %c] : memref<8x128xi32, "vmem">, vector<8x128xi32>
  %r = math.round %x0 : vector<8x128xf32>
  vector.store %r, %o[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
  %weird = "tpu.weird"(%x0) : (vector<8x128xf32>) -> vector<8x128xi1>
  %wi = arith.extui %weird : vector<8x128xi1> to vector<8x128xi32>
  vector.store %wi, %w[%c, %c] : memref<8x128xi32, "vmem">, vector<8x128xi32>
  %lz = math.ctlz %i0 : vector<8x128xi32>
  %ones = math.ctpop %i0 : vector<8x128xi32>
  %hundred = arith.constant dense<100> : vector<8x128xi32>
  %scaled = arith.muli %lz, %hundred : vector<8x128xi32>
  %both = arith.addi %scaled, %ones : vector<8x128xi32>
  vector.store %both, %b[%c, %c] : memref<8x128xi32, "vmem">, vector<8x128xi32>
  return
}
// -----
// The first of the greatest along the rows; elements picked by index, counted again from the first after the last.
// in f32[8,128] = 3 9 9 1 nan 2 7
// in i32[8,128] = 5 -1 8
// out i32[128]
// out f32[8,128]
// out f32[8,128]
// run
// result 0: i32[128]: 2 5 1 4 0 3 6 2 ..., sum 385.00000, by place 24638.000
// result 1: f32[8, 128]: 1 9 9 7 NaN 2 9 3 ..., sum 4527.00000, by place 2243861.000, 147 nan
// result 2: f32[8, 128]: 3 9 3 9 9 1 NaN 2 ..., sum 4538.00000, by place 2251184.000, 146 nan
func.func @picked(%x: memref<8x128xf32, "vmem">, %i: memref<8x128xi32, "vmem">, %o: memref<128xi32, "vmem">,
    %g: memref<8x128xf32, "vmem">, %r: memref<8x128xf32, "vmem">) {
  %c = arith.constant 0 : index
  %x0 = vector.load %x[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
  %i0 = vector.load %i[%c, %c] : memref<8x128xi32, "vmem">, vector<8x128xi32>
  %at = "tpu.reduce_index"(%x0) {axis = 0 : i32, kind = #tpu.reduction_kind<arg_max>} : (vector<8x128xf32>) -> vector<128xi32>
  vector.store %at, %o[%c] : memref<128xi32, "vmem">, vector<128xi32>
  %picked = "tpu.dynamic_gather"(%x0, %i0) {dimensions = array<i32: 0>} : (vector<8x128xf32>, vector<8x128xi32>) -> vector<8x128xf32>
  vector.store %picked, %g[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
  %two = arith.constant 2 : i32
  %turned = "tpu.dynamic_rotate"(%x0, %two) {dimension = 1 : si32, stride = 1 : si32, stride_dimension = 0 : si32} : (vector<8x128xf32>, i32) -> vector<8x128xf32>
  vector.store %turned, %r[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
  return
}
// -----
// Two halves in a word, and out of it; random bits that are zeros truncate, ones round up.
// in f32[8,128] = 1.003 -2.25 0.1
// out i32[8,128]
// out f32[8,128]
// out f32[8,128]
// out f32[8,128]
// run
// result 0: i32[8, 128]: 1073758100 -1064255500 1045249500 1073758100 -1064255500 1045249500 1073758100 -1064255500 ..., sum 360744221793.00000, by place 179559115733103.000
// result 1: f32[8, 128]: 2 -4.5 0.20019531 2 -4.5 0.20019531 2 -4.5 ..., sum -782.23340, by place -387708.485
// result 2: f32[8, 128]: 1 -2.25 0.099609375 1 -2.25 0.099609375 1 -2.25 ..., sum -391.28320, by place -193937.029
// result 3: f32[8, 128]: 1.125 -2.25 0.1015625 1.125 -2.25 0.1015625 1.125 -2.25 ..., sum -347.86719, by place -172369.883
func.func @packed(%x: memref<8x128xf32, "vmem">, %o: memref<8x128xi32, "vmem">, %u: memref<8x128xf32, "vmem">,
    %low: memref<8x128xf32, "vmem">, %high: memref<8x128xf32, "vmem">) {
  %c = arith.constant 0 : index
  %x0 = vector.load %x[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
  %y = arith.addf %x0, %x0 : vector<8x128xf32>
  %p = "tpu.pack_elementwise"(%x0, %y) {target_type = bf16} : (vector<8x128xf32>, vector<8x128xf32>) -> vector<8x128xi32>
  vector.store %p, %o[%c, %c] : memref<8x128xi32, "vmem">, vector<8x128xi32>
  %part = "tpu.unpack_elementwise"(%p) {source_type = bf16, index = 1 : i32} : (vector<8x128xi32>) -> vector<8x128xf32>
  vector.store %part, %u[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
  %zero = arith.constant dense<0> : vector<8x128xi32>
  %down = "tpu.stochastic_convert"(%x0, %zero) : (vector<8x128xf32>, vector<8x128xi32>) -> vector<8x128xbf16>
  %down32 = arith.extf %down : vector<8x128xbf16> to vector<8x128xf32>
  vector.store %down32, %low[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
  %ones = arith.constant dense<-1> : vector<8x128xi32>
  %up = "tpu.stochastic_convert"(%x0, %ones) : (vector<8x128xf32>, vector<8x128xi32>) -> vector<8x128xf8E4M3FN>
  %up32 = arith.extf %up : vector<8x128xf8E4M3FN> to vector<8x128xf32>
  vector.store %up32, %high[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
  return
}
// -----
// Buffers and semaphores of a scope, once per iteration.
// in f32[32,128] = wave 0
// out f32[32,128]
// run
// result 0: f32[32, 128]: 1.6435575 2.9968143 3.8207448 3.9698188 3.4177053 2.261924 0.70662 -0.97349405 ..., sum 0.61209, by place -38365.116
// run vmem_bytes=8000
// fault: memory-exceeded: kernel `scoped`: memory exceeded: memref.alloca at reach.mlir:181, buffer `f32[8,128] allocated at reach.mlir:181`, grid step []: the kernel takes 8192 bytes of VMEM with this; the limit is 8000
func.func @scoped(%x: memref<32x128xf32, "any">, %o: memref<32x128xf32, "any">) {
  %c = arith.constant 0 : index
  %zero = arith.constant 0 : i32
  %one = arith.constant 1 : i32
  %four = arith.constant 4 : i32
  %eight = arith.constant 8 : i32
  scf.for %i = %zero to %four step %one : i32 {
    %at = arith.muli %i, %eight : i32
    "tpu.region"() ({
      %buffer = memref.alloca() : memref<8x128xf32, "vmem">
      %sem = "tpu.sem_alloc"() : () -> memref<i64, "semaphore_mem">
      %from = "tpu.memref_slice"(%x, %at, %zero) {operandSegmentSizes = array<i32: 1, 2, 0>} : (memref<32x128xf32, "any">, i32, i32) -> memref<8x128xf32, "any">
      "tpu.enqueue_dma"(%from, %buffer, %sem) {operandSegmentSizes = array<i32: 1, 0, 1, 1, 0, 0, 0>} : (memref<8x128xf32, "any">, memref<8x128xf32, "vmem">, memref<i64, "semaphore_mem">) -> ()
      "tpu.wait_dma2"(%sem, %from, %buffer) {operandSegmentSizes = array<i32: 1, 1, 1, 0, 0>} : (memref<i64, "semaphore_mem">, memref<8x128xf32, "any">, memref<8x128xf32, "vmem">) -> ()
      %v = vector.load %buffer[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
      %twice = arith.addf %v, %v : vector<8x128xf32>
      %out = memref.alloca() : memref<8x128xf32, "vmem">
      vector.store %twice, %out[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
      %to = "tpu.memref_slice"(%o, %at, %zero) {operandSegmentSizes = array<i32: 1, 2, 0>} : (memref<32x128xf32, "any">, i32, i32) -> memref<8x128xf32, "any">
      "tpu.enqueue_dma"(%out, %to, %sem) {operandSegmentSizes = array<i32: 1, 0, 1, 1, 0, 0, 0>} : (memref<8x128xf32, "vmem">, memref<8x128xf32, "any">, memref<i64, "semaphore_mem">) -> ()
      "tpu.wait_dma"(%sem, %to) : (memref<i64, "semaphore_mem">, memref<8x128xf32, "any">) -> ()
      "tpu.yield"() : () -> ()
    }) : () -> ()
    scf.yield
  }
  return
}
// -----
// A buffer of a scope is unwritten every time.
// out f32[8,128]
// run
// fault: unwritten-read: kernel `scoped_unwritten`: read of unwritten memory: vector.load at reach.mlir:201, buffer `f32[8,128] allocated at reach.mlir:200` at [0, 0], grid step []
func.func @scoped_unwritten(%o: memref<8x128xf32, "vmem">) {
  %c = arith.constant 0 : index
  "tpu.region"() ({
    %buffer = memref.alloca() : memref<8x128xf32, "vmem">
    %v = vector.load %buffer[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
    vector.store %v, %o[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
    "tpu.yield"() : () -> ()
  }) : () -> ()
  return
}
// -----
// A DMA outlives the scope of its semaphore; a semaphore holds something when its scope ends.
// in f32[8,128] = 1
// out f32[8,128]
// run
// fault: semaphore-unbalanced: kernel `outlives`: semaphore left unbalanced: tpu.enqueue_dma at reach.mlir:216, buffer `dma_semaphore[] allocated at reach.mlir:215`, grid step [], DMA from `x` to `o` started at reach.mlir:216 in grid step []: a DMA was not waited for when the scope of its buffer or semaphore ended
func.func @outlives(%x: memref<8x128xf32, "any">, %o: memref<8x128xf32, "vmem">) {
  "tpu.region"() ({
    %sem = "tpu.sem_alloc"() : () -> memref<i64, "semaphore_mem">
    "tpu.enqueue_dma"(%x, %o, %sem) {operandSegmentSizes = array<i32: 1, 0, 1, 1, 0, 0, 0>} : (memref<8x128xf32, "any">, memref<8x128xf32, "vmem">, memref<i64, "semaphore_mem">) -> ()
    "tpu.yield"() : () -> ()
  }) : () -> ()
  return
}
// -----
// run
// fault: semaphore-unbalanced: kernel `left_over`: semaphore left unbalanced: tpu.sem_signal at reach.mlir:228, buffer `semaphore[] allocated at reach.mlir:227`, grid step []: it holds 1 when its scope ends
func.func @left_over() {
  %one = arith.constant 1 : i32
  "tpu.region"() ({
    %sem = "tpu.sem_alloc"() : () -> memref<i32, "semaphore_mem">
    "tpu.sem_signal"(%sem, %one) {operandSegmentSizes = array<i32: 1, 1, 0, 0, 0>} : (memref<i32, "semaphore_mem">, i32) -> ()
    "tpu.yield"() : () -> ()
  }) : () -> ()
  return
}
// -----
// Scalars of any type in SMEM.
// in i8[2,4] = 1 -2 3 -4 5 -6 7 -8
// out i32[1]
// run
// result 0: i32[1]: -8, sum -8.00000, by place 0.000
func.func @bytes_in_smem(%x: memref<2x4xi8, "smem">, %o: memref<1xi32, "smem">) {
  %zero = arith.constant 0 : index
  %one = arith.constant 1 : index
  %three = arith.constant 3 : index
  %a = memref.load %x[%one, %three] : memref<2x4xi8, "smem">
  %b = arith.extsi %a : i8 to i32
  memref.store %b, %o[%zero] : memref<1xi32, "smem">
  return
}
// -----
// The call gives the size of the grid, and the kernel asks for it.
// in i32[] = 3
// in f32[32,128] = 1
// out f32[32,128]
// run allow_unwritten_outputs
// result 0: f32[32, 128]: 4 4 4 4 4 4 4 4 ..., sum 12288.00000, by place 6106392.000, 1024 nan
func.func @dynamic(%i: i32, %x: memref<8x128xf32, "vmem">, %o: memref<8x128xf32, "vmem">) attributes {
    iteration_bounds = array<i64: -9223372036854775808>, dimension_semantics = [#tpu.dimension_semantics<arbitrary>],
    window_params = [{transform_indices = @t, window_bounds = array<i64: 8, 128>}, {transform_indices = @t, window_bounds = array<i64: 8, 128>}]} {
  %c = arith.constant 0 : index
  %x0 = vector.load %x[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
  %n = "tpu.iteration_bound"() {dim = 0 : i32} : () -> i32
  %f = arith.sitofp %n : i32 to f32
  %v = vector.broadcast %f : f32 to vector<8x128xf32>
  %s = arith.addf %x0, %v : vector<8x128xf32>
  vector.store %s, %o[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
  return
}
func.func @t(%i: i32) -> (i32, i32) {
  %zero = arith.constant 0 : i32
  return %i, %zero : i32, i32
}
// -----
// Sizes that are known at run time: some rows are copied; none are; too many are; a number of them that is negative.
// in i32[1] = 3
// in f32[8,128] = 1 2 3
// out f32[8,128]
// run allow_unwritten_outputs
// result 0: f32[8, 128]: 1 2 3 1 2 3 1 2 ..., sum 768.00000, by place 147328.000, 640 nan
func.func @rows(%n: memref<1xi32, "smem">, %x: memref<8x128xf32, "any">, %o: memref<8x128xf32, "any">, %sem: memref<i64, "semaphore_mem">)
    attributes {scalar_prefetch = 1 : i64, scratch_operands = 1 : i64} {
  %c = arith.constant 0 : index
  %zero = arith.constant 0 : i32
  %rows = memref.load %n[%c] : memref<1xi32, "smem">
  %from = "tpu.memref_slice"(%x, %zero, %zero, %rows) {operandSegmentSizes = array<i32: 1, 2, 1>} : (memref<8x128xf32, "any">, i32, i32, i32) -> memref<?x128xf32, "any">
  %to = "tpu.memref_slice"(%o, %zero, %zero, %rows) {operandSegmentSizes = array<i32: 1, 2, 1>} : (memref<8x128xf32, "any">, i32, i32, i32) -> memref<?x128xf32, "any">
  "tpu.enqueue_dma"(%from, %to, %sem) {operandSegmentSizes = array<i32: 1, 0, 1, 1, 0, 0, 0>} : (memref<?x128xf32, "any">, memref<?x128xf32, "any">, memref<i64, "semaphore_mem">) -> ()
  "tpu.wait_dma2"(%sem, %from, %to) {operandSegmentSizes = array<i32: 1, 1, 1, 0, 0>} : (memref<i64, "semaphore_mem">, memref<?x128xf32, "any">, memref<?x128xf32, "any">) -> ()
  return
}
// -----
// in i32[1] = 0
// in f32[8,128] = 1 2 3
// out f32[8,128]
// run allow_unwritten_outputs
// result 0: f32[8, 128]: NaN NaN NaN NaN NaN NaN NaN NaN ..., sum 0.00000, by place 0.000, 1024 nan
func.func @rows(%n: memref<1xi32, "smem">, %x: memref<8x128xf32, "any">, %o: memref<8x128xf32, "any">, %sem: memref<i64, "semaphore_mem">)
    attributes {scalar_prefetch = 1 : i64, scratch_operands = 1 : i64} {
  %c = arith.constant 0 : index
  %zero = arith.constant 0 : i32
  %rows = memref.load %n[%c] : memref<1xi32, "smem">
  %from = "tpu.memref_slice"(%x, %zero, %zero, %rows) {operandSegmentSizes = array<i32: 1, 2, 1>} : (memref<8x128xf32, "any">, i32, i32, i32) -> memref<?x128xf32, "any">
  %to = "tpu.memref_slice"(%o, %zero, %zero, %rows) {operandSegmentSizes = array<i32: 1, 2, 1>} : (memref<8x128xf32, "any">, i32, i32, i32) -> memref<?x128xf32, "any">
  "tpu.enqueue_dma"(%from, %to, %sem) {operandSegmentSizes = array<i32: 1, 0, 1, 1, 0, 0, 0>} : (memref<?x128xf32, "any">, memref<?x128xf32, "any">, memref<i64, "semaphore_mem">) -> ()
  "tpu.wait_dma2"(%sem, %from, %to) {operandSegmentSizes = array<i32: 1, 1, 1, 0, 0>} : (memref<i64, "semaphore_mem">, memref<?x128xf32, "any">, memref<?x128xf32, "any">) -> ()
  return
}
// -----
// in i32[1] = 9
// in f32[8,128] = 1
// out f32[8,128]
// run
// fault: out-of-bounds: kernel `too_many`: access out of bounds: tpu.memref_slice at reach.mlir:317, buffer `x` at [0, 0], grid step []: element 8 of dimension 0 in a view of sizes [8, 128] (from [0, 0], sizes [9, 128])
func.func @too_many(%n: memref<1xi32, "smem">, %x: memref<8x128xf32, "any">, %o: memref<8x128xf32, "vmem">)
    attributes {scalar_prefetch = 1 : i64} {
  %c = arith.constant 0 : index
  %zero = arith.constant 0 : i32
  %rows = memref.load %n[%c] : memref<1xi32, "smem">
  %from = "tpu.memref_slice"(%x, %zero, %zero, %rows) {operandSegmentSizes = array<i32: 1, 2, 1>} : (memref<8x128xf32, "any">, i32, i32, i32) -> memref<?x128xf32, "any">
  %sem = "tpu.sem_alloc"() : () -> memref<i64, "semaphore_mem">
  "tpu.enqueue_dma"(%from, %from, %sem) {operandSegmentSizes = array<i32: 1, 0, 1, 1, 0, 0, 0>} : (memref<?x128xf32, "any">, memref<?x128xf32, "any">, memref<i64, "semaphore_mem">) -> ()
  return
}
// -----
// in i32[1] = -1
// in f32[8,128] = 1
// out f32[8,128]
// run
// fault: out-of-bounds: kernel `negative`: access out of bounds: tpu.memref_slice at reach.mlir:333, buffer `x` at [-1, 0], grid step []: element -1 of dimension 0 in a view of sizes [8, 128] (from [-1, 0], sizes [0, 128])
func.func @negative(%n: memref<1xi32, "smem">, %x: memref<8x128xf32, "any">, %o: memref<8x128xf32, "vmem">)
    attributes {scalar_prefetch = 1 : i64} {
  %c = arith.constant 0 : index
  %zero = arith.constant 0 : i32
  %rows = memref.load %n[%c] : memref<1xi32, "smem">
  %from = "tpu.memref_slice"(%x, %zero, %zero, %rows) {operandSegmentSizes = array<i32: 1, 2, 1>} : (memref<8x128xf32, "any">, i32, i32, i32) -> memref<?x128xf32, "any">
  %sem = "tpu.sem_alloc"() : () -> memref<i64, "semaphore_mem">
  "tpu.wait_dma2"(%sem, %from, %from) {operandSegmentSizes = array<i32: 1, 1, 1, 0, 0>} : (memref<i64, "semaphore_mem">, memref<?x128xf32, "any">, memref<?x128xf32, "any">) -> ()
  return
}
// -----
// Products: a vector and a matrix, floats and integers, two free dimensions.
// in f32[128] = 1 -1 2
// in f32[128,128] = 1 2 3 4
// in bf16[16,128] = 1 -1 0.5
// in i8[128,128] = 3 -2
// in bf16[2,8,128] = 1 2
// out f32[128]
// out f32[16,128]
// out f32[2,8,128]
// run
// result 0: f32[128]: 84 168 252 336 84 168 252 336 ..., sum 26880.00000, by place 1720320.000
// result 1: f32[16, 128]: 63 -42 63 -42 63 -42 63 -42 ..., sum 21824.00000, by place 10864364.500
// result 2: f32[2, 8, 128]: 576 -384 576 -384 576 -384 576 -384 ..., sum 196608.00000, by place 97673472.000
func.func @products(%v: memref<128xf32, "vmem">, %m: memref<128x128xf32, "vmem">, %a: memref<16x128xbf16, "vmem">,
    %w: memref<128x128xi8, "vmem">, %t: memref<2x8x128xbf16, "vmem">, %o: memref<128xf32, "vmem">, %p: memref<16x128xf32, "vmem">,
    %q: memref<2x8x128xf32, "vmem">) {
  %c = arith.constant 0 : index
  %v0 = vector.load %v[%c] : memref<128xf32, "vmem">, vector<128xf32>
  %m0 = vector.load %m[%c, %c] : memref<128x128xf32, "vmem">, vector<128x128xf32>
  %z1 = arith.constant dense<0.0> : vector<128xf32>
  %vm = "tpu.matmul"(%v0, %m0, %z1) {dimension_numbers = #tpu.dot_dimension_numbers<[0], [0], [], [1], [1, 1], [], []>} : (vector<128xf32>, vector<128x128xf32>, vector<128xf32>) -> vector<128xf32>
  vector.store %vm, %o[%c] : memref<128xf32, "vmem">, vector<128xf32>
  %a0 = vector.load %a[%c, %c] : memref<16x128xbf16, "vmem">, vector<16x128xbf16>
  %w0 = vector.load %w[%c, %c] : memref<128x128xi8, "vmem">, vector<128x128xi8>
  %z2 = arith.constant dense<0.0> : vector<16x128xf32>
  %aw = "tpu.matmul"(%a0, %w0, %z2) {dimension_numbers = #tpu.dot_dimension_numbers<[1], [0], [0], [1], [0, 0, 1, 1], [], []>} : (vector<16x128xbf16>, vector<128x128xi8>, vector<16x128xf32>) -> vector<16x128xf32>
  vector.store %aw, %p[%c, %c] : memref<16x128xf32, "vmem">, vector<16x128xf32>
  %t0 = vector.load %t[%c, %c, %c] : memref<2x8x128xbf16, "vmem">, vector<2x8x128xbf16>
  %z3 = arith.constant dense<0.0> : vector<2x8x128xf32>
  %tw = "tpu.matmul"(%t0, %w0, %z3) {dimension_numbers = #tpu.dot_dimension_numbers<[2], [0], [0, 1], [1], [0, 0, 0, 1, 1, 1], [], []>} : (vector<2x8x128xbf16>, vector<128x128xi8>, vector<2x8x128xf32>) -> vector<2x8x128xf32>
  vector.store %tw, %q[%c, %c, %c] : memref<2x8x128xf32, "vmem">, vector<2x8x128xf32>
  return
}
// -----
// Windows that count elements: blocks of 16 rows every 8, padded by 8 rows in front. What is in front may be read.
// in f32[24,128] = 1
// out f32[32,128]
// run
// result 0: f32[32, 128]: 1 1 1 1 1 1 1 1 ..., sum 3072.00000, by place 1526598.000
func.func @elements(%i: i32, %x: memref<16x128xf32, "vmem">, %o: memref<8x128xf32, "vmem">) attributes {
    iteration_bounds = array<i64: 4>, dimension_semantics = [#tpu.dimension_semantics<arbitrary>],
    window_params = [{transform_indices = @rows, window_bounds = array<i64: 16, 128>, window_kind = #tpu.element_window<[8, 0],[8, 0]>}, {transform_indices = @t, window_bounds = array<i64: 8, 128>}]} {
  %c = arith.constant 0 : index
  %x0 = vector.load %x[%c, %c] : memref<16x128xf32, "vmem">, vector<16x128xf32>
  %c8 = arith.constant 8 : index
  %x1 = vector.load %x[%c8, %c] : memref<16x128xf32, "vmem">, vector<8x128xf32>
  %zero = arith.constant dense<0.0> : vector<8x128xf32>
  %last = arith.constant 3 : i32
  %inside = arith.cmpi slt, %i, %last : i32
  %y = arith.select %inside, %x1, %zero : vector<8x128xf32>
  vector.store %y, %o[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
  return
}
func.func @rows(%i: i32) -> (i32, i32) {
  %zero = arith.constant 0 : i32
  %eight = arith.constant 8 : i32
  %at = arith.muli %i, %eight : i32
  return %at, %zero : i32, i32
}
func.func @t(%i: i32) -> (i32, i32) {
  %zero = arith.constant 0 : i32
  return %i, %zero : i32, i32
}
// -----
// A seed gives the same bits again, another seed others.
// out i32[2]
// run
// result 0: i32[2]: 0 -1, sum -1.00000, by place -1.000
func.func @random(%o: memref<2xi32, "smem">) {
  %zero = arith.constant 0 : index
  %one = arith.constant 1 : index
  %seed = arith.constant 7 : i32
  %other = arith.constant 8 : i32
  "tpu.prng_set_seed_32"(%seed, %other) : (i32, i32) -> ()
  %a = "tpu.prng_random_bits"() : () -> vector<8x128xi32>
  "tpu.prng_set_seed_32"(%seed, %other) : (i32, i32) -> ()
  %b = "tpu.prng_random_bits"() : () -> vector<8x128xi32>
  "tpu.prng_set_seed_32"(%other, %seed) : (i32, i32) -> ()
  %d = "tpu.prng_random_bits"() : () -> vector<8x128xi32>
  %ab = arith.xori %a, %b : vector<8x128xi32>
  %ad = arith.xori %a, %d : vector<8x128xi32>
  %start = arith.constant 0 : i32
  %same = vector.multi_reduction <or>, %ab, %start [0, 1] : vector<8x128xi32> to i32
  %differs = vector.multi_reduction <or>, %ad, %start [0, 1] : vector<8x128xi32> to i32
  memref.store %same, %o[%zero] : memref<2xi32, "smem">
  memref.store %differs, %o[%one] : memref<2xi32, "smem">
  return
}
// -----
// run
// fault: broken-assumption: kernel `asserted`: broken promise to the compiler: cf.assert at reach.mlir:432, grid step []: "the index is inside the page"
func.func @asserted() {
  %false = arith.constant false
  cf.assert %false, "the index is inside the page"
  return
}
// -----
// An integer divided by zero, and what XLA makes of it where that is no fault.
// in i32[8,128] = 7
// out i32[8,128]
// run
// fault: division-by-zero: kernel `by_zero`: integer division by zero: arith.divsi at reach.mlir:447, grid step []
// run ignore=division-by-zero
// result 0: i32[8, 128]: -1 -1 -1 -1 -1 -1 -1 -1 ..., sum -1024.00000, by place -508641.000
func.func @by_zero(%x: memref<8x128xi32, "vmem">, %o: memref<8x128xi32, "vmem">) {
  %c = arith.constant 0 : index
  %x0 = vector.load %x[%c, %c] : memref<8x128xi32, "vmem">, vector<8x128xi32>
  %z = arith.constant dense<0> : vector<8x128xi32>
  %q = arith.divsi %x0, %z : vector<8x128xi32>
  vector.store %q, %o[%c, %c] : memref<8x128xi32, "vmem">, vector<8x128xi32>
  return
}
// -----
// A load whose step is 0 reads one row again and again.
// in f32[1,1,128] = 1 2 3
// out f32[1,8,128]
// run
// result 0: f32[1, 8, 128]: 1 2 3 1 2 3 1 2 ..., sum 2040.00000, by place 1013362.000
func.func @repeated(%x: memref<1x1x128xf32, "vmem">, %o: memref<1x8x128xf32, "vmem">) {
  %c = arith.constant 0 : index
  %v = "tpu.strided_load"(%x, %c, %c, %c) {strides = array<i32: 1, 0, 1>} : (memref<1x1x128xf32, "vmem">, index, index, index) -> vector<1x8x128xf32>
  vector.store %v, %o[%c, %c, %c] : memref<1x8x128xf32, "vmem">, vector<1x8x128xf32>
  return
}
