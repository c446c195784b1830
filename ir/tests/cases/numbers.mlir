// JAX lowers `!=` to `one`, and on a TPU NaN differs from everything.
// in f32[8,128] = 1 nan 2
// out i32[8,128]
// run
// result 0: i32[8, 128]: 0 1 0 0 1 0 0 1 ..., sum 341.00000, by place 169206.000
func.func @isnan(%x: memref<8x128xf32, "vmem">, %o: memref<8x128xi32, "vmem">) {
  %c = arith.constant 0 : index
  %x0 = vector.load %x[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
  %differs = arith.cmpf one, %x0, %x0 : vector<8x128xf32>
  %n = arith.extui %differs : vector<8x128xi1> to vector<8x128xi32>
  vector.store %n, %o[%c, %c] : memref<8x128xi32, "vmem">, vector<8x128xi32>
  return
}
// -----
// Floats saturate to narrow integers; wide integers wrap.
// in f32[32,128] = 300 -300 127.9 -128.5 nan inf -0.9 3e9
// out i8[32,128]
// out i8[32,128]
// run
// result 0: i8[32, 128]: 127 -128 127 -128 0 127 0 127 ..., sum 129024.00000, by place 64262314.000
// result 1: i8[32, 128]: 44 -44 127 -128 0 -1 0 -1 ..., sum -1536.00000, by place -678010.000
func.func @narrow(%x: memref<32x128xf32, "vmem">, %o: memref<32x128xi8, "vmem">, %w: memref<32x128xi8, "vmem">) {
  %c = arith.constant 0 : index
  %x0 = vector.load %x[%c, %c] : memref<32x128xf32, "vmem">, vector<32x128xf32>
  %n = arith.fptosi %x0 : vector<32x128xf32> to vector<32x128xi8>
  vector.store %n, %o[%c, %c] : memref<32x128xi8, "vmem">, vector<32x128xi8>
  %i = arith.fptosi %x0 : vector<32x128xf32> to vector<32x128xi32>
  %t = arith.trunci %i : vector<32x128xi32> to vector<32x128xi8>
  vector.store %t, %w[%c, %c] : memref<32x128xi8, "vmem">, vector<32x128xi8>
  return
}
// -----
// Unsigned arrays: memory holds bits, ops have the sign.
// in ui32[8,128] = 4294967295 7 2147483648
// out ui32[8,128]
// run
// result 0: u32[8, 128]: 2147483600 3 1073741800 2147483600 3 1073741800 2147483600 3 ..., sum 1100585370281.00000, by place 546881407362882.000
func.func @unsigned(%x: memref<8x128xi32, "vmem">, %o: memref<8x128xi32, "vmem">) {
  %c = arith.constant 0 : index
  %x0 = vector.load %x[%c, %c] : memref<8x128xi32, "vmem">, vector<8x128xi32>
  %one = arith.constant dense<1> : vector<8x128xi32>
  %half = arith.shrui %x0, %one : vector<8x128xi32>
  vector.store %half, %o[%c, %c] : memref<8x128xi32, "vmem">, vector<8x128xi32>
  return
}
// -----
// in ui8[32,128] = 255 1 128
// out ui8[32,128]
// run
// result 0: u8[32, 128]: 127 0 64 127 0 64 127 0 ..., sum 260842.00000, by place 129665070.000
func.func @unsigned_bytes(%x: memref<32x128xi8, "vmem">, %o: memref<32x128xi8, "vmem">) {
  %c = arith.constant 0 : index
  %x0 = vector.load %x[%c, %c] : memref<32x128xi8, "vmem">, vector<32x128xi8>
  %w = arith.extui %x0 : vector<32x128xi8> to vector<32x128xi32>
  %one = arith.constant dense<1> : vector<32x128xi32>
  %half = arith.shrui %w, %one : vector<32x128xi32>
  %n = arith.trunci %half : vector<32x128xi32> to vector<32x128xi8>
  vector.store %n, %o[%c, %c] : memref<32x128xi8, "vmem">, vector<32x128xi8>
  return
}
// -----
// `maxnumf` and `minnumf` give the number where the other is NaN, `maximumf` and `minimumf` the NaN.
// in f32[8,128] = nan 1 nan -3
// in f32[8,128] = 5 nan nan 4
// out f32[8,128]
// out f32[8,128]
// out f32[8,128]
// out f32[8,128]
// run
// result 0: f32[8, 128]: 5 1 NaN 4 5 1 NaN 4 ..., sum 2560.00000, by place 1273613.000, 256 nan
// result 1: f32[8, 128]: 5 1 NaN -3 5 1 NaN -3 ..., sum 768.00000, by place 382569.000, 256 nan
// result 2: f32[8, 128]: NaN NaN NaN 4 NaN NaN NaN 4 ..., sum 1024.00000, by place 509168.000, 768 nan
// result 3: f32[8, 128]: NaN NaN NaN -3 NaN NaN NaN -3 ..., sum -768.00000, by place -381876.000, 768 nan
func.func @larger(%x: memref<8x128xf32, "vmem">, %y: memref<8x128xf32, "vmem">, %a: memref<8x128xf32, "vmem">,
    %b: memref<8x128xf32, "vmem">, %d: memref<8x128xf32, "vmem">, %e: memref<8x128xf32, "vmem">) {
  %c = arith.constant 0 : index
  %x0 = vector.load %x[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
  %y0 = vector.load %y[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
  %0 = arith.maxnumf %x0, %y0 : vector<8x128xf32>
  %1 = arith.minnumf %x0, %y0 : vector<8x128xf32>
  %2 = arith.maximumf %x0, %y0 : vector<8x128xf32>
  %3 = arith.minimumf %x0, %y0 : vector<8x128xf32>
  vector.store %0, %a[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
  vector.store %1, %b[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
  vector.store %2, %d[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
  vector.store %3, %e[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
  return
}
// -----
// As reductions: a row of NaN but for one number.
// in f32[8,128] = nan nan nan nan nan nan 7 nan nan
// out f32[8,1]
// out f32[8,1]
// run
// result 0: f32[8, 1]: 7 7 7 7 7 7 7 7, sum 56.00000, by place 196.000
// result 1: f32[8, 1]: NaN NaN NaN NaN NaN NaN NaN NaN, sum 0.00000, by place 0.000, 8 nan
func.func @largest(%x: memref<8x128xf32, "vmem">, %a: memref<8x1xf32, "vmem">, %b: memref<8x1xf32, "vmem">) {
  %c = arith.constant 0 : index
  %low = arith.constant dense<0xFF800000> : vector<8xf32>
  %x0 = vector.load %x[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
  %0 = vector.multi_reduction <maxnumf>, %x0, %low [1] : vector<8x128xf32> to vector<8xf32>
  %1 = vector.multi_reduction <maximumf>, %x0, %low [1] : vector<8x128xf32> to vector<8xf32>
  %2 = vector.shape_cast %0 : vector<8xf32> to vector<8x1xf32>
  %3 = vector.shape_cast %1 : vector<8xf32> to vector<8x1xf32>
  vector.store %2, %a[%c, %c] : memref<8x1xf32, "vmem">, vector<8x1xf32>
  vector.store %3, %b[%c, %c] : memref<8x1xf32, "vmem">, vector<8x1xf32>
  return
}
// -----
// The error function keeps its relative error near 0: 2/sqrt(pi) x.
// in f32[8,128] = 1e-30 -1e-7 0.001 0.5 1 4 -0 nan
// out f32[8,128]
// run
// result 0: f32[8, 128]: 0.0000000000000000000000000000011283792 -0.00000011283792 0.0011283788 0.5204999 0.8427008 1 -0 NaN ..., sum 302.63410, by place 150238.532, 128 nan
func.func @erf(%x: memref<8x128xf32, "vmem">, %o: memref<8x128xf32, "vmem">) {
  %c = arith.constant 0 : index
  %x0 = vector.load %x[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
  %y = math.erf %x0 : vector<8x128xf32>
  vector.store %y, %o[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
  return
}
// -----
// Scales of microscaling formats are exponents: 2^(code - 127).
// in ui8[32,128] = 127 128 0 255 120
// out f32[32,128]
// out ui8[32,128]
// run
// result 0: f32[32, 128]: 1 2 0.000000000000000000000000000000000000005877472 NaN 0.0078125 1 2 0.000000000000000000000000000000000000005877472 ..., sum 2464.39844, by place 1225510.055, 819 nan
// result 1: u8[32, 128]: 127 128 0 255 120 127 128 0 ..., sum 516097.00000, by place 256503753.000
func.func @scales(%x: memref<32x128xi8, "vmem">, %o: memref<32x128xf32, "vmem">, %b: memref<32x128xi8, "vmem">) {
  %c = arith.constant 0 : index
  %x0 = vector.load %x[%c, %c] : memref<32x128xi8, "vmem">, vector<32x128xi8>
  %s = "tpu.bitcast"(%x0) : (vector<32x128xi8>) -> vector<32x128xf8E8M0FNU>
  %y = arith.extf %s : vector<32x128xf8E8M0FNU> to vector<32x128xf32>
  vector.store %y, %o[%c, %c] : memref<32x128xf32, "vmem">, vector<32x128xf32>
  %z = "tpu.bitcast"(%s) : (vector<32x128xf8E8M0FNU>) -> vector<32x128xi8>
  vector.store %z, %b[%c, %c] : memref<32x128xi8, "vmem">, vector<32x128xi8>
  return
}
// -----
// A logistic function, and numbers with 4 bits of exponent and 3 of mantissa: halves go to the even one, 250 is too large, 0.001 too small.
// in f32[8,128] = 0 1 -30 17 19 250 0.001 -inf nan
// out f32[8,128]
// out f32[8,128]
// run
// result 0: f32[8, 128]: 0.5 0.7310586 0.000000000000093576236 1 1 1 0.50025 0 ..., sum 539.36918, by place 267019.458, 113 nan
// result 1: f32[8, 128]: 0 1 -30 16 20 inf 0 -inf ..., sum 798.00000, by place 399523.000, 113 nan
func.func @k(%x: memref<8x128xf32, "vmem">, %o: memref<8x128xf32, "vmem">, %p: memref<8x128xf32, "vmem">) {
  %c = arith.constant 0 : index
  %v = vector.load %x[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
  %l = "tpu.logistic"(%v) : (vector<8x128xf32>) -> vector<8x128xf32>
  vector.store %l, %o[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
  %r = "tpu.reduce_precision"(%v) {exponent_bits = 4 : i32, mantissa_bits = 3 : i32} : (vector<8x128xf32>) -> vector<8x128xf32>
  vector.store %r, %p[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
  return
}
// -----
// Logarithms to base 2, and the high halves of products, with a sign and without.
// in f32[8,128] = 8 1 0.5 10 0 -1 inf
// in i32[8,128] = 1000000 -1000000 -1 2147483647 3
// out f32[8,128]
// out i32[8,128]
// out i32[8,128]
// run
// result 0: f32[8, 128]: 3 0 -1 3.321928 -inf NaN inf 3 ..., sum 780.00149, by place 387817.611, 146 nan
// result 1: i32[8, 128]: 232 232 0 1073741800 0 232 232 0 ..., sum 220117168835.00000, by place 109669889471806.000
// result 2: i32[8, 128]: 232 -1999768 -2 1073741800 0 232 -1999768 -2 ..., sum 219707168425.00000, by place 109466433267940.000
func.func @k(%x: memref<8x128xf32, "vmem">, %y: memref<8x128xi32, "vmem">, %o: memref<8x128xf32, "vmem">, %p: memref<8x128xi32, "vmem">, %q: memref<8x128xi32, "vmem">) {
  %c = arith.constant 0 : index
  %v = vector.load %x[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
  %l = math.log2 %v : vector<8x128xf32>
  %again = memref.memory_space_cast %o : memref<8x128xf32, "vmem"> to memref<8x128xf32, "vmem">
  vector.store %l, %again[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
  %i = vector.load %y[%c, %c] : memref<8x128xi32, "vmem">, vector<8x128xi32>
  %low, %high = arith.mulsi_extended %i, %i : vector<8x128xi32>
  %ulow, %uhigh = arith.mului_extended %i, %i : vector<8x128xi32>
  vector.store %high, %p[%c, %c] : memref<8x128xi32, "vmem">, vector<8x128xi32>
  vector.store %uhigh, %q[%c, %c] : memref<8x128xi32, "vmem">, vector<8x128xi32>
  return
}
