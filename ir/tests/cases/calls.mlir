!hbm = memref<32x128xf32, "hbm">
!out = memref<8x128xf32, "hbm">
// -----
// Arguments that do not fit.
// out f32[8,128]
// run
// fault: bad-call: kernel `k`: arguments do not fit the kernel: pipeline at the kernel's grid, grid step []: 0 inputs and 1 outputs for a kernel with 1 and 1
func.func @k(%x: !hbm, %o: !out) { return }
// -----
// in bf16[32,128] = 0
// out f32[8,128]
// run
// fault: bad-call: kernel `k`: arguments do not fit the kernel: pipeline at the kernel's grid, grid step []: `x` takes f32[32, 128], not bf16[32,128]
func.func @k(%x: !hbm, %o: !out) { return }
// -----
// in f32[31,128] = 0
// out f32[8,128]
// run
// fault: bad-call: kernel `k`: arguments do not fit the kernel: pipeline at the kernel's grid, grid step []: `x` takes f32[32, 128], not f32[31,128]
func.func @k(%x: !hbm, %o: !out) { return }
// -----
// in f32[32,128] = 0
// out f32[8,128]
// alias 0:0
// run
// fault: bad-call: kernel `k`: arguments do not fit the kernel: pipeline at the kernel's grid, grid step []: input 0 and output `o` cannot share memory
func.func @k(%x: !hbm, %o: !out) { return }
// -----
// Two outputs in one memory.
// in f32[8,128] = 0
// out f32[8,128]
// out f32[8,128]
// alias 0:0
// alias 0:1
// run
// fault: bad-call: kernel `k`: arguments do not fit the kernel: pipeline at the kernel's grid, grid step []: output `p` shares an input's memory with another output
func.func @k(%x: !out, %o: !out, %p: !out) { return }
