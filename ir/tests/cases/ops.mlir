// Ops of one float.
// in f32[8,128] = 0.5 2.5 1 -0.25 4
// out f32[8,128]
// out f32[8,128]
// out f32[8,128]
// out f32[8,128]
// out f32[8,128]
// out f32[8,128]
// out f32[8,128]
// out f32[8,128]
// out f32[8,128]
// out f32[8,128]
// out f32[8,128]
// out f32[8,128]
// out f32[8,128]
// out f32[8,128]
// out f32[8,128]
// run
// result 0: f32[8, 128]: -0.5 -2.5 -1 0.25 -4 -0.5 -2.5 -1 ..., sum -1584.75000, by place -786756.000
// result 1: f32[8, 128]: 0.5 2.5 1 0.25 4 0.5 2.5 1 ..., sum 1687.25000, by place 837825.000
// result 2: f32[8, 128]: 1.6487212 12.182494 2.7182817 0.7788008 54.59815 1.6487212 12.182494 2.7182817 ..., sum 14690.32333, by place 7295141.451
// result 3: f32[8, 128]: 1.4142135 5.656854 2 0.8408964 16 1.4142135 5.656854 2 ..., sum 5295.95264, by place 2629893.140
// result 4: f32[8, 128]: -0.6931472 0.91629076 0 NaN 1.3862944 -0.6931472 0.91629076 0 ..., sum 328.54848, by place 163300.004, 205 nan
// result 5: f32[8, 128]: 0.4054651 1.252763 0.6931472 -0.28768206 1.609438 0.4054651 1.252763 0.6931472 ..., sum 751.38246, by place 372943.056
// result 6: f32[8, 128]: 0.46211717 0.9866143 0.7615942 -0.24491866 0.9993293 0.46211717 0.9866143 0.7615942 ..., sum 606.77161, by place 301148.945
// result 7: f32[8, 128]: 0.47942555 0.5984721 0.84147096 -0.24740396 -0.7568025 0.47942555 0.5984721 0.84147096 ..., sum 188.36505, by place 93379.932
// result 8: f32[8, 128]: 0.87758255 -0.8011436 0.5403023 0.9689124 -0.6536436 0.87758255 -0.8011436 0.5403023 ..., sum 191.71570, by place 95406.971
// result 9: f32[8, 128]: 0.5463025 -0.74702233 1.5574077 -0.25534192 1.1578213 0.5463025 -0.74702233 1.5574077 ..., sum 461.97147, by place 229449.607
// result 10: f32[8, 128]: 0.70710677 1.5811388 1 NaN 2 0.70710677 1.5811388 1 ..., sum 1082.09035, by place 537204.693, 205 nan
// result 11: f32[8, 128]: 1.4142135 0.6324555 1 NaN 0.5 1.4142135 0.6324555 1 ..., sum 726.56716, by place 360506.137, 205 nan
// result 12: f32[8, 128]: 0 2 1 -1 4 0 2 1 ..., sum 1226.00000, by place 608527.000
// result 13: f32[8, 128]: 1 3 1 -0 4 1 3 1 ..., sum 1841.00000, by place 913916.000
// result 14: f32[8, 128]: 0 2 1 -0 4 0 2 1 ..., sum 1431.00000, by place 710665.000
func.func @of_one(%x0: memref<8x128xf32, "vmem">, %o0: memref<8x128xf32, "vmem">, %o1: memref<8x128xf32, "vmem">, %o2: memref<8x128xf32, "vmem">, %o3: memref<8x128xf32, "vmem">, %o4: memref<8x128xf32, "vmem">, %o5: memref<8x128xf32, "vmem">, %o6: memref<8x128xf32, "vmem">, %o7: memref<8x128xf32, "vmem">, %o8: memref<8x128xf32, "vmem">, %o9: memref<8x128xf32, "vmem">, %o10: memref<8x128xf32, "vmem">, %o11: memref<8x128xf32, "vmem">, %o12: memref<8x128xf32, "vmem">, %o13: memref<8x128xf32, "vmem">, %o14: memref<8x128xf32, "vmem">) {
  %c = arith.constant 0 : index
  %v0 = vector.load %x0[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
  %r0 = arith.negf %v0 : vector<8x128xf32>
  vector.store %r0, %o0[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
  %r1 = math.absf %v0 : vector<8x128xf32>
  vector.store %r1, %o1[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
  %r2 = math.exp %v0 : vector<8x128xf32>
  vector.store %r2, %o2[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
  %r3 = math.exp2 %v0 : vector<8x128xf32>
  vector.store %r3, %o3[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
  %r4 = math.log %v0 : vector<8x128xf32>
  vector.store %r4, %o4[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
  %r5 = math.log1p %v0 : vector<8x128xf32>
  vector.store %r5, %o5[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
  %r6 = math.tanh %v0 : vector<8x128xf32>
  vector.store %r6, %o6[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
  %r7 = math.sin %v0 : vector<8x128xf32>
  vector.store %r7, %o7[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
  %r8 = math.cos %v0 : vector<8x128xf32>
  vector.store %r8, %o8[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
  %r9 = math.tan %v0 : vector<8x128xf32>
  vector.store %r9, %o9[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
  %r10 = math.sqrt %v0 : vector<8x128xf32>
  vector.store %r10, %o10[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
  %r11 = math.rsqrt %v0 : vector<8x128xf32>
  vector.store %r11, %o11[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
  %r12 = math.floor %v0 : vector<8x128xf32>
  vector.store %r12, %o12[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
  %r13 = math.ceil %v0 : vector<8x128xf32>
  vector.store %r13, %o13[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
  %r14 = math.roundeven %v0 : vector<8x128xf32>
  vector.store %r14, %o14[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
  return
}
// -----
// Ops of two floats.
// in f32[8,128] = 5.5 -2 1 -0.25 4
// in f32[8,128] = 2 -3 0.5
// out f32[8,128]
// out f32[8,128]
// out f32[8,128]
// out f32[8,128]
// out f32[8,128]
// out f32[8,128]
// run
// result 0: f32[8, 128]: 3.5 1 0.5 -2.25 7 5 -4 4 ..., sum 1855.75000, by place 919663.500
// result 1: f32[8, 128]: 11 6 0.5 -0.5 -12 2.75 -4 -3 ..., sum -263.50000, by place -127399.625
// result 2: f32[8, 128]: 2.75 0.6666667 2 -0.125 -1.3333334 11 -1 -0.33333334 ..., sum 1220.79166, by place 606068.164
// result 3: f32[8, 128]: 1.5 -2 0 -0.25 1 0 -0 1 ..., sum 288.25000, by place 142886.500
// result 4: f32[8, 128]: 30.25 -0.125 1 0.0625 0.015625 2.345208 4 1 ..., sum -407.11715, by place -222941.147, 136 nan
// result 5: f32[8, 128]: 1.2220253 -2.55359 1.1071488 -0.124354996 2.2142975 1.4801364 -0.7853982 2.819842 ..., sum 381.78204, by place 187966.038
func.func @of_two(%x0: memref<8x128xf32, "vmem">, %x1: memref<8x128xf32, "vmem">, %o0: memref<8x128xf32, "vmem">, %o1: memref<8x128xf32, "vmem">, %o2: memref<8x128xf32, "vmem">, %o3: memref<8x128xf32, "vmem">, %o4: memref<8x128xf32, "vmem">, %o5: memref<8x128xf32, "vmem">) {
  %c = arith.constant 0 : index
  %v0 = vector.load %x0[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
  %v1 = vector.load %x1[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
  %r0 = arith.subf %v0, %v1 : vector<8x128xf32>
  vector.store %r0, %o0[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
  %r1 = arith.mulf %v0, %v1 : vector<8x128xf32>
  vector.store %r1, %o1[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
  %r2 = arith.divf %v0, %v1 : vector<8x128xf32>
  vector.store %r2, %o2[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
  %r3 = arith.remf %v0, %v1 : vector<8x128xf32>
  vector.store %r3, %o3[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
  %m0 = math.powf %v0, %v1 : vector<8x128xf32>
  vector.store %m0, %o4[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
  %m1 = math.atan2 %v0, %v1 : vector<8x128xf32>
  vector.store %m1, %o5[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
  return
}
// -----
// Ops of integers.
// in i32[8,128] = 7 -7 100 -1 -2147483648
// in i32[8,128] = 2 3 33
// out i32[8,128]
// out i32[8,128]
// out i32[8,128]
// out i32[8,128]
// out i32[8,128]
// out i32[8,128]
// out i32[8,128]
// out i32[8,128]
// out f32[8,128]
// run
// result 0: i32[8, 128]: 1 -1 1 -1 -2 7 -1 1 ..., sum -340.00000, by place -171927.000
// result 1: i32[8, 128]: 7 3 100 2 3 33 2 100 ..., sum 31460.00000, by place 15640622.000
// result 2: i32[8, 128]: 2 -7 33 -1 -2147483600 7 -7 3 ..., sum -438086662397.00000, by place -217580894840162.000
// result 3: i32[8, 128]: 2 3 33 2 3 7 2 3 ..., sum 11192.00000, by place 5571419.000
// result 4: i32[8, 128]: 2 1 32 2 0 1 0 0 ..., sum 7517.00000, by place 3738017.000
// result 5: i32[8, 128]: 28 -56 0 -4 0 0 -28 800 ..., sum 80752.00000, by place 40084720.000
// result 6: i32[8, 128]: 1 -1 0 -1 -268435460 0 -2 12 ..., sum -54760830985.00000, by place -27106342895722.000
// result 7: i32[8, 128]: 7 7 100 1 -2147483600 7 7 100 ..., sum -438086640617.00000, by place -217580884013517.000
// result 8: f32[8, 128]: 0.00000000000000000000000000000000000000000001 NaN 0.00000000000000000000000000000000000000000014 NaN -0 0.00000000000000000000000000000000000000000001 NaN 0.00000000000000000000000000000000000000000014 ..., sum 0.00000, by place 0.000, 410 nan
func.func @of_integers(%x0: memref<8x128xi32, "vmem">, %x1: memref<8x128xi32, "vmem">, %o0: memref<8x128xi32, "vmem">, %o1: memref<8x128xi32, "vmem">, %o2: memref<8x128xi32, "vmem">, %o3: memref<8x128xi32, "vmem">, %o4: memref<8x128xi32, "vmem">, %o5: memref<8x128xi32, "vmem">, %o6: memref<8x128xi32, "vmem">, %o7: memref<8x128xi32, "vmem">, %o8: memref<8x128xf32, "vmem">) {
  %c = arith.constant 0 : index
  %v0 = vector.load %x0[%c, %c] : memref<8x128xi32, "vmem">, vector<8x128xi32>
  %v1 = vector.load %x1[%c, %c] : memref<8x128xi32, "vmem">, vector<8x128xi32>
  %r0 = arith.remsi %v0, %v1 : vector<8x128xi32>
  vector.store %r0, %o0[%c, %c] : memref<8x128xi32, "vmem">, vector<8x128xi32>
  %r1 = arith.maxsi %v0, %v1 : vector<8x128xi32>
  vector.store %r1, %o1[%c, %c] : memref<8x128xi32, "vmem">, vector<8x128xi32>
  %r2 = arith.minsi %v0, %v1 : vector<8x128xi32>
  vector.store %r2, %o2[%c, %c] : memref<8x128xi32, "vmem">, vector<8x128xi32>
  %r3 = arith.minui %v0, %v1 : vector<8x128xi32>
  vector.store %r3, %o3[%c, %c] : memref<8x128xi32, "vmem">, vector<8x128xi32>
  %r4 = arith.andi %v0, %v1 : vector<8x128xi32>
  vector.store %r4, %o4[%c, %c] : memref<8x128xi32, "vmem">, vector<8x128xi32>
  %r5 = arith.shli %v0, %v1 : vector<8x128xi32>
  vector.store %r5, %o5[%c, %c] : memref<8x128xi32, "vmem">, vector<8x128xi32>
  %r6 = arith.shrsi %v0, %v1 : vector<8x128xi32>
  vector.store %r6, %o6[%c, %c] : memref<8x128xi32, "vmem">, vector<8x128xi32>
  %a = math.absi %v0 : vector<8x128xi32>
  vector.store %a, %o7[%c, %c] : memref<8x128xi32, "vmem">, vector<8x128xi32>
  %bits = arith.bitcast %v0 : vector<8x128xi32> to vector<8x128xf32>
  vector.store %bits, %o8[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
  return
}
// -----
// Conversions, those of the tpu dialect with their rounding.
// in f32[8,128] = 2.5 -2.5 3.5 1.003 5e9 -1 nan
// in i32[8,128] = 7 -1
// out f32[8,128]
// out i32[8,128]
// out f32[8,128]
// out i32[8,128]
// out i32[8,128]
// out f32[8,128]
// out f32[8,128]
// out i32[8,128]
// run
// result 0: f32[8, 128]: 7 4294967300 7 4294967300 7 4294967300 7 4294967300 ..., sum 2199023259136.00000, by place 1091230932611295.000
// result 1: i32[8, 128]: 2 0 3 1 -1 0 0 2 ..., sum 732.00000, by place 363159.000
// result 2: f32[8, 128]: 2.5 -2.5 3.5 1 4999610400 -1 NaN 2.5 ..., sum 729943114239.00000, by place 363276689204402.500, 146 nan
// result 3: i32[8, 128]: 2 -2 4 1 2147483600 -1 0 2 ..., sum 313532613046.00000, by place 156038309565575.000
// result 4: i32[8, 128]: 2 0 3 1 -1 0 0 2 ..., sum 732.00000, by place 363159.000
// result 5: f32[8, 128]: 7 -1 7 -1 7 -1 7 -1 ..., sum 3072.00000, by place 1527911.000
// result 6: f32[8, 128]: 7 4294967300 7 4294967300 7 4294967300 7 4294967300 ..., sum 2199023259136.00000, by place 1091230932611295.000
// result 7: i32[8, 128]: 16416 49184 16480 16256 20373 49024 32704 16416 ..., sum 29329402.00000, by place 14559810585.000
func.func @conversions(%x0: memref<8x128xf32, "vmem">, %x1: memref<8x128xi32, "vmem">, %o0: memref<8x128xf32, "vmem">, %o1: memref<8x128xi32, "vmem">, %o2: memref<8x128xf32, "vmem">, %o3: memref<8x128xi32, "vmem">, %o4: memref<8x128xi32, "vmem">, %o5: memref<8x128xf32, "vmem">, %o6: memref<8x128xf32, "vmem">, %o7: memref<8x128xi32, "vmem">) {
  %c = arith.constant 0 : index
  %v0 = vector.load %x0[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
  %v1 = vector.load %x1[%c, %c] : memref<8x128xi32, "vmem">, vector<8x128xi32>
  %u = arith.uitofp %v1 : vector<8x128xi32> to vector<8x128xf32>
  vector.store %u, %o0[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
  %w = arith.fptoui %v0 : vector<8x128xf32> to vector<8x128xi32>
  vector.store %w, %o1[%c, %c] : memref<8x128xi32, "vmem">, vector<8x128xi32>
  %h = "tpu.truncf"(%v0) {rounding_mode = #tpu.rounding_mode<to_nearest_even>} : (vector<8x128xf32>) -> vector<8x128xbf16>
  %f = "tpu.extf"(%h) : (vector<8x128xbf16>) -> vector<8x128xf32>
  vector.store %f, %o2[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
  %s = "tpu.fptosi"(%v0) {rounding_mode = #tpu.rounding_mode<to_nearest_even>} : (vector<8x128xf32>) -> vector<8x128xi32>
  vector.store %s, %o3[%c, %c] : memref<8x128xi32, "vmem">, vector<8x128xi32>
  %t = "tpu.fptoui"(%v0) {rounding_mode = #tpu.rounding_mode<towards_zero>} : (vector<8x128xf32>) -> vector<8x128xi32>
  vector.store %t, %o4[%c, %c] : memref<8x128xi32, "vmem">, vector<8x128xi32>
  %y = "tpu.sitofp"(%v1) {rounding_mode = #tpu.rounding_mode<to_nearest_even>} : (vector<8x128xi32>) -> vector<8x128xf32>
  vector.store %y, %o5[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
  %z = "tpu.uitofp"(%v1) {rounding_mode = #tpu.rounding_mode<to_nearest_even>} : (vector<8x128xi32>) -> vector<8x128xf32>
  vector.store %z, %o6[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
  %random = arith.constant dense<0> : vector<8x128xi32>
  %p = "tpu.stochastic_convert_elementwise"(%v0, %random) {dst_type = bf16} : (vector<8x128xf32>, vector<8x128xi32>) -> vector<8x128xi32>
  vector.store %p, %o7[%c, %c] : memref<8x128xi32, "vmem">, vector<8x128xi32>
  return
}
// -----
// Tiles as wholes.
// in f32[8,128] = wave 1
// out f32[8,128]
// out f32[8,128]
// out f32[8,128]
// out f32[16,128]
// run
// result 0: f32[8, 128]: 1.9783223 0.5809704 -1.8077097 -1.1118374 1.4811983 1.5468183 -1.0269469 -1.8484 ..., sum -0.10043, by place 476.816
// result 1: f32[8, 128]: -1.9763083 -0.5937915 1.8019307 1.1229613 -1.4721526 -1.5552858 1.0154146 1.8534808 ..., sum -38.84511, by place -18357.111
// result 2: f32[8, 128]: 1.9649076 0.65748453 -1.7718253 -1.1778134 1.4259388 1.5965663 -0.95707804 -1.8776298 ..., sum -0.10134, by place 352.967
// result 3: f32[16, 128]: 1.9783223 0.5809704 -1.8077097 -1.1118374 1.4811983 1.5468183 -1.0269469 -1.8484 ..., sum -0.20085, by place 802.866
func.func @shapes(%x0: memref<8x128xf32, "vmem">, %o0: memref<8x128xf32, "vmem">, %o1: memref<8x128xf32, "vmem">, %o2: memref<8x128xf32, "vmem">, %o3: memref<16x128xf32, "vmem">) {
  %c = arith.constant 0 : index
  %v0 = vector.load %x0[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
  %i = arith.index_cast %c : index to i32
  %j = arith.index_castui %i : i32 to index
  %r = "tpu.reshape"(%v0) : (vector<8x128xf32>) -> vector<16x64xf32>
  %r1 = vector.shape_cast %r : vector<16x64xf32> to vector<8x128xf32>
  %l = "tpu.relayout"(%r1) : (vector<8x128xf32>) -> vector<8x128xf32>
  %t = vector.transpose %l, [1, 0] : vector<8x128xf32> to vector<128x8xf32>
  %u = "tpu.transpose"(%t) {permutation = array<i64: 1, 0>} : (vector<128x8xf32>) -> vector<8x128xf32>
  vector.store %u, %o0[%j, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
  %s = vector.extract_strided_slice %v0 {offsets = [0, 64], sizes = [8, 64], strides = [1, 1]} : vector<8x128xf32> to vector<8x64xf32>
  %d = "tpu.repeat"(%s) {dimension = 1 : i32, times = 2 : i32} : (vector<8x64xf32>) -> vector<8x128xf32>
  vector.store %d, %o1[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
  %row = vector.extract %v0[3] : vector<128xf32> from vector<8x128xf32>
  %all = vector.broadcast %row : vector<128xf32> to vector<8x128xf32>
  vector.store %all, %o2[%c, %c] : memref<8x128xf32, "vmem">, vector<8x128xf32>
  "tpu.strided_store"(%v0, %o3, %c, %c) {strides = array<i32: 2, 1>} : (vector<8x128xf32>, memref<16x128xf32, "vmem">, index, index) -> ()
  %rest = arith.constant 1 : index
  "tpu.strided_store"(%v0, %o3, %rest, %c) {strides = array<i32: 2, 1>} : (vector<8x128xf32>, memref<16x128xf32, "vmem">, index, index) -> ()
  return
}
// -----
// Views of views, one device, and what is for profilers.
// in f32[2,8,128] = wave 2
// out f32[8,128]
// run
// result 0: f32[8, 128]: 1.6661777 -1.9825919 1.3196673 -0.004868279 -1.3123356 1.9812865 -1.6715437 0.5361103 ..., sum -0.20595, by place 461.782
func.func @views(%x0: memref<2x8x128xf32, "any">, %o0: memref<8x128xf32, "vmem">) {
  %c = arith.constant 0 : index
  %zero = arith.constant 0 : i32
  %one = arith.constant 1 : i32
  %device = "tpu.device_id"() : () -> i32
  "tpu.trace_start"() {level = 10 : i32, message = "copy"} : () -> ()
  "tpu.trace_value"(%zero) {label = "n"} : (i32) -> ()
  "tpu.delay"(%one) : (i32) -> ()
  "tpu.log"(%one) {tag = "one"} : (i32) -> ()
  "tpu.log_buffer"(%x0) {shape = array<i64: 2, 8, 128>, tag = "x"} : (memref<2x8x128xf32, "any">) -> ()
  %part = "tpu.memref_slice"(%x0, %one, %device, %zero) {operandSegmentSizes = array<i32: 1, 3, 0>} : (memref<2x8x128xf32, "any">, i32, i32, i32) -> memref<1x8x128xf32, "any">
  %rows = "tpu.memref_squeeze"(%part) : (memref<1x8x128xf32, "any">) -> memref<8x128xf32, "any">
  %plain = "tpu.erase_memref_layout"(%rows) : (memref<8x128xf32, "any">) -> memref<8x128xf32, "any">
  %same = "tpu.assume_layout"(%plain) : (memref<8x128xf32, "any">) -> memref<8x128xf32, "any">
  %wide = memref.cast %same : memref<8x128xf32, "any"> to memref<?x128xf32, "any">
  %again = memref.cast %wide : memref<?x128xf32, "any"> to memref<8x128xf32, "any">
  %folded = "tpu.memref_reshape"(%again) : (memref<8x128xf32, "any">) -> memref<2x4x128xf32, "any">
  %to = "tpu.memref_reshape"(%o0) : (memref<8x128xf32, "vmem">) -> memref<2x4x128xf32, "vmem">
  "tpu.trace"() ({
    %sem = "tpu.sem_alloc"() : () -> memref<i64, "semaphore_mem">
    "tpu.enqueue_dma"(%folded, %to, %sem) {operandSegmentSizes = array<i32: 1, 0, 1, 1, 0, 0, 0>} : (memref<2x4x128xf32, "any">, memref<2x4x128xf32, "vmem">, memref<i64, "semaphore_mem">) -> ()
    "tpu.wait_dma2"(%sem, %folded, %to) {operandSegmentSizes = array<i32: 1, 1, 1, 0, 0>} : (memref<i64, "semaphore_mem">, memref<2x4x128xf32, "any">, memref<2x4x128xf32, "vmem">) -> ()
    "tpu.yield"() : () -> ()
  }) {level = 10 : i32, message = "dma"} : () -> ()
  %barrier = "tpu.sem_barrier"() : () -> memref<i32, "semaphore_mem">
  "tpu.sem_signal"(%barrier, %one) {operandSegmentSizes = array<i32: 1, 1, 0, 0, 0>} : (memref<i32, "semaphore_mem">, i32) -> ()
  "tpu.sem_wait"(%barrier, %one) : (memref<i32, "semaphore_mem">, i32) -> ()
  "tpu.trace_stop"() : () -> ()
  return
}
// -----
// Rows that a list names are gathered into VMEM, and scattered from there; what the list leaves out stays.
// in f32[8,128] = wave 0
// in f32[8,128] = 5
// out f32[8,128]
// alias 1:0
// run
// result 0: f32[8, 128]: -0.6716944 0.16167314 0.9664844 1.6005859 1.9519767 1.9585905 1.6192592 0.993919 ..., sum 3219.25233, by place 1848513.053
func.func @rows(%x: memref<8x128xf32, "hbm">, %y: memref<8x128xf32, "hbm">, %o: memref<8x128xf32, "hbm">, %a: memref<4x128xf32, "vmem">, %s: memref<!tpu.dma_semaphore, "semaphore_mem">) attributes {scratch_operands = 2 : i64} {
  %from = arith.constant dense<[6, 0, 6, 3]> : vector<4xi32>
  %to = arith.constant dense<[1, -1, 7, 0]> : vector<4xi32>
  %none = arith.constant -1 : i32
  "tpu.enqueue_indirect_dma"(%x, %a, %from, %s) {add = false} : (memref<8x128xf32, "hbm">, memref<4x128xf32, "vmem">, vector<4xi32>, memref<!tpu.dma_semaphore, "semaphore_mem">) -> ()
  "tpu.wait_indirect_dma"(%s, %x, %a) : (memref<!tpu.dma_semaphore, "semaphore_mem">, memref<8x128xf32, "hbm">, memref<4x128xf32, "vmem">) -> ()
  "tpu.enqueue_indirect_dma"(%a, %o, %to, %s, %none) {add = false} : (memref<4x128xf32, "vmem">, memref<8x128xf32, "hbm">, vector<4xi32>, memref<!tpu.dma_semaphore, "semaphore_mem">, i32) -> ()
  "tpu.wait_indirect_dma"(%s, %a, %o) : (memref<!tpu.dma_semaphore, "semaphore_mem">, memref<4x128xf32, "vmem">, memref<8x128xf32, "hbm">) -> ()
  return
}
// -----
// A row that there is not.
// in f32[8,128] = wave 0
// run
// fault: out-of-bounds: kernel `row`: access out of bounds: tpu.enqueue_indirect_dma at ops.mlir:291, buffer `x`, grid step []: row 8 of 8
func.func @row(%x: memref<8x128xf32, "hbm">, %a: memref<4x128xf32, "vmem">, %s: memref<!tpu.dma_semaphore, "semaphore_mem">) attributes {scratch_operands = 2 : i64} {
  %from = arith.constant dense<[6, 0, 8, 3]> : vector<4xi32>
  "tpu.enqueue_indirect_dma"(%x, %a, %from, %s) {add = false} : (memref<8x128xf32, "hbm">, memref<4x128xf32, "vmem">, vector<4xi32>, memref<!tpu.dma_semaphore, "semaphore_mem">) -> ()
  return
}
