!hbm = memref<8x128xf32, "hbm">
!slots = memref<2x8x128xf32, "hbm">
!one = memref<1x8x128xf32, "hbm">
!vmem = memref<8x128xf32, "vmem">
!dma = memref<!tpu.dma_semaphore, "semaphore_mem">
!sem = memref<!tpu.semaphore, "semaphore_mem">
// -----
// Everyone sends to the right.
// devices 4
// in f32[8,128] = wave 0
// out f32[8,128]
// run
// result 0 of device 0: f32[8, 128]: -0.55624074 1.0685899 -1.4966193 1.8065541 -1.9739381 1.9855635 -1.8405131 1.5502322 ..., sum -0.42563, by place -1002.819
// result 0 of device 1: f32[8, 128]: 0.8217788 1.4984071 1.9103724 1.9849094 1.7088526 1.130962 0.35331 -0.48674703 ..., sum 0.05815, by place -4778.684
// result 0 of device 2: f32[8, 128]: 1.9783223 0.5809704 -1.8077097 -1.1118374 1.4811983 1.5468183 -1.0269469 -1.8484 ..., sum -0.10043, by place 476.816
// result 0 of device 3: f32[8, 128]: 1.3160053 -1.9819452 1.6688657 -0.53141856 -0.8685328 1.839456 -1.9017452 1.0246315 ..., sum -0.25011, by place 703.049
func.func @k(%x: !hbm, %o: !hbm, %send: !dma, %recv: !dma) attributes {scratch_operands = 2 : i64} {
  %c0 = arith.constant 0 : i32
  %c1 = arith.constant 1 : i32
  %c2 = arith.constant 2 : i32
  %c4 = arith.constant 4 : i32
  %me = "tpu.device_id"() : () -> i32
  %up = arith.addi %me, %c1 : i32
  %right = arith.remsi %up, %c4 : i32
  %down = arith.addi %right, %c2 : i32
  %left = arith.remsi %down, %c4 : i32
  "tpu.enqueue_dma"(%x, %send, %o, %recv, %right) {operandSegmentSizes = array<i32: 1, 1, 1, 1, 1, 0, 0>} : (!hbm, !dma, !hbm, !dma, i32) -> ()
  "tpu.wait_dma2"(%send, %o, %x) : (!dma, !hbm, !hbm) -> ()
  "tpu.wait_dma2"(%recv, %x, %o) : (!dma, !hbm, !hbm) -> ()
  return
}
// -----
// A ring of one: a device sends to itself.
// devices 1
// in f32[8,128] = wave 0
// out f32[8,128]
// run
// result 0 of device 0: f32[8, 128]: 0.8217788 1.4984071 1.9103724 1.9849094 1.7088526 1.130962 0.35331 -0.48674703 ..., sum 0.05815, by place -4778.684
func.func @k(%x: !hbm, %o: !hbm, %send: !dma, %recv: !dma) attributes {scratch_operands = 2 : i64} {
  %c0 = arith.constant 0 : i32
  %c1 = arith.constant 1 : i32
  %c2 = arith.constant 2 : i32
  %c4 = arith.constant 4 : i32
  %me = "tpu.device_id"() : () -> i32
  %up = arith.addi %me, %c1 : i32
  %right = arith.remsi %up, %c4 : i32
  %down = arith.addi %right, %c2 : i32
  %left = arith.remsi %down, %c4 : i32
  "tpu.enqueue_dma"(%x, %send, %o, %recv, %c0) {operandSegmentSizes = array<i32: 1, 1, 1, 1, 1, 0, 0>} : (!hbm, !dma, !hbm, !dma, i32) -> ()
  "tpu.wait_dma2"(%send, %o, %x) : (!dma, !hbm, !hbm) -> ()
  "tpu.wait_dma2"(%recv, %x, %o) : (!dma, !hbm, !hbm) -> ()
  return
}
// -----
// Nobody waits for what arrives.
// devices 4
// in f32[8,128] = wave 0
// out f32[8,128]
// run
// fault: semaphore-unbalanced: kernel `k` on device 0: semaphore left unbalanced: tpu.enqueue_dma at devices.mlir:71, buffer `recv`, grid step [], DMA from device 3 to `o` started at devices.mlir:71 in grid step []: this device has not waited for all of a DMA from another at the end of the kernel
func.func @k(%x: !hbm, %o: !hbm, %send: !dma, %recv: !dma) attributes {scratch_operands = 2 : i64} {
  %c0 = arith.constant 0 : i32
  %c1 = arith.constant 1 : i32
  %c2 = arith.constant 2 : i32
  %c4 = arith.constant 4 : i32
  %me = "tpu.device_id"() : () -> i32
  %up = arith.addi %me, %c1 : i32
  %right = arith.remsi %up, %c4 : i32
  %down = arith.addi %right, %c2 : i32
  %left = arith.remsi %down, %c4 : i32
  "tpu.enqueue_dma"(%x, %send, %o, %recv, %right) {operandSegmentSizes = array<i32: 1, 1, 1, 1, 1, 0, 0>} : (!hbm, !dma, !hbm, !dma, i32) -> ()
  "tpu.wait_dma2"(%send, %o, %x) : (!dma, !hbm, !hbm) -> ()
  return
}
// -----
// Nobody waits for what was sent.
// devices 4
// in f32[8,128] = wave 0
// out f32[8,128]
// run
// fault: semaphore-unbalanced: kernel `k` on device 0: semaphore left unbalanced: tpu.enqueue_dma at devices.mlir:92, buffer `send`, grid step [], DMA from `x` to `o` of device 1 started at devices.mlir:92 in grid step []: a DMA was not waited for at the end of the kernel
func.func @k(%x: !hbm, %o: !hbm, %send: !dma, %recv: !dma) attributes {scratch_operands = 2 : i64} {
  %c0 = arith.constant 0 : i32
  %c1 = arith.constant 1 : i32
  %c2 = arith.constant 2 : i32
  %c4 = arith.constant 4 : i32
  %me = "tpu.device_id"() : () -> i32
  %up = arith.addi %me, %c1 : i32
  %right = arith.remsi %up, %c4 : i32
  %down = arith.addi %right, %c2 : i32
  %left = arith.remsi %down, %c4 : i32
  "tpu.enqueue_dma"(%x, %send, %o, %recv, %right) {operandSegmentSizes = array<i32: 1, 1, 1, 1, 1, 0, 0>} : (!hbm, !dma, !hbm, !dma, i32) -> ()
  "tpu.wait_dma2"(%recv, %x, %o) : (!dma, !hbm, !hbm) -> ()
  return
}
// -----
// The wait is on the other semaphore, and more than arrives there.
// devices 4
// in f32[8,128] = wave 0
// out f32[8,128]
// run
// fault: deadlock: kernel `k` on device 0: wait that is never satisfied: tpu.wait_dma2 at devices.mlir:115, buffer `send`, grid step []: 4096 bytes; device 1, device 2, device 3 wait for 4096 bytes on `send` at devices.mlir:115
func.func @k(%x: !hbm, %o: !hbm, %send: !dma, %recv: !dma) attributes {scratch_operands = 2 : i64} {
  %c0 = arith.constant 0 : i32
  %c1 = arith.constant 1 : i32
  %c2 = arith.constant 2 : i32
  %c4 = arith.constant 4 : i32
  %me = "tpu.device_id"() : () -> i32
  %up = arith.addi %me, %c1 : i32
  %right = arith.remsi %up, %c4 : i32
  %down = arith.addi %right, %c2 : i32
  %left = arith.remsi %down, %c4 : i32
  "tpu.enqueue_dma"(%x, %send, %o, %recv, %right) {operandSegmentSizes = array<i32: 1, 1, 1, 1, 1, 0, 0>} : (!hbm, !dma, !hbm, !dma, i32) -> ()
  "tpu.wait_dma2"(%send, %o, %x) : (!dma, !hbm, !hbm) -> ()
  "tpu.wait_dma2"(%send, %x, %o) : (!dma, !hbm, !hbm) -> ()
  return
}
// -----
// There is no device 4.
// devices 4
// in f32[8,128] = wave 0
// out f32[8,128]
// run
// fault: out-of-bounds: kernel `k` on device 3: access out of bounds: tpu.enqueue_dma at devices.mlir:135, grid step []: device 4; there are 4, counted from 0
func.func @k(%x: !hbm, %o: !hbm, %send: !dma, %recv: !dma) attributes {scratch_operands = 2 : i64} {
  %c0 = arith.constant 0 : i32
  %c1 = arith.constant 1 : i32
  %c2 = arith.constant 2 : i32
  %c4 = arith.constant 4 : i32
  %me = "tpu.device_id"() : () -> i32
  %up = arith.addi %me, %c1 : i32
  %right = arith.remsi %up, %c4 : i32
  %down = arith.addi %right, %c2 : i32
  %left = arith.remsi %down, %c4 : i32
  "tpu.enqueue_dma"(%x, %send, %o, %recv, %up) {operandSegmentSizes = array<i32: 1, 1, 1, 1, 1, 0, 0>} : (!hbm, !dma, !hbm, !dma, i32) -> ()
  "tpu.wait_dma2"(%send, %o, %x) : (!dma, !hbm, !hbm) -> ()
  "tpu.wait_dma2"(%recv, %x, %o) : (!dma, !hbm, !hbm) -> ()
  return
}
// -----
// There is one core.
// devices 4
// in f32[8,128] = wave 0
// out f32[8,128]
// run
// fault (early, random 0, random 1): out-of-bounds: kernel `k` on device 0: access out of bounds: tpu.enqueue_dma at devices.mlir:158, grid step []: core 1 of a device with one
// fault (late): out-of-bounds: kernel `k` on device 3: access out of bounds: tpu.enqueue_dma at devices.mlir:158, grid step []: core 1 of a device with one
func.func @k(%x: !hbm, %o: !hbm, %send: !dma, %recv: !dma) attributes {scratch_operands = 2 : i64} {
  %c0 = arith.constant 0 : i32
  %c1 = arith.constant 1 : i32
  %c2 = arith.constant 2 : i32
  %c4 = arith.constant 4 : i32
  %me = "tpu.device_id"() : () -> i32
  %up = arith.addi %me, %c1 : i32
  %right = arith.remsi %up, %c4 : i32
  %down = arith.addi %right, %c2 : i32
  %left = arith.remsi %down, %c4 : i32
  "tpu.enqueue_dma"(%x, %send, %o, %recv, %right, %c1) {operandSegmentSizes = array<i32: 1, 1, 1, 1, 1, 1, 0>} : (!hbm, !dma, !hbm, !dma, i32, i32) -> ()
  "tpu.wait_dma2"(%send, %o, %x) : (!dma, !hbm, !hbm) -> ()
  "tpu.wait_dma2"(%recv, %x, %o) : (!dma, !hbm, !hbm) -> ()
  return
}
// -----
// Device 0 sends nothing, and device 1 waits for it.
// devices 4
// in f32[8,128] = wave 0
// out f32[8,128]
// run
// fault: deadlock: kernel `k` on device 1: wait that is never satisfied: tpu.wait_dma2 at devices.mlir:185, buffer `recv`, grid step []: 4096 bytes; device 0, device 2, device 3 are at the end of the kernel
func.func @k(%x: !hbm, %o: !hbm, %send: !dma, %recv: !dma) attributes {scratch_operands = 2 : i64} {
  %c0 = arith.constant 0 : i32
  %c1 = arith.constant 1 : i32
  %c2 = arith.constant 2 : i32
  %c4 = arith.constant 4 : i32
  %me = "tpu.device_id"() : () -> i32
  %up = arith.addi %me, %c1 : i32
  %right = arith.remsi %up, %c4 : i32
  %down = arith.addi %right, %c2 : i32
  %left = arith.remsi %down, %c4 : i32
  %c = arith.cmpi ne, %me, %c0 : i32
  scf.if %c {
  "tpu.enqueue_dma"(%x, %send, %o, %recv, %right) {operandSegmentSizes = array<i32: 1, 1, 1, 1, 1, 0, 0>} : (!hbm, !dma, !hbm, !dma, i32) -> ()
  "tpu.wait_dma2"(%send, %o, %x) : (!dma, !hbm, !hbm) -> ()
  }
  "tpu.wait_dma2"(%recv, %x, %o) : (!dma, !hbm, !hbm) -> ()
  return
}
// -----
// Everyone sends to device 0.
// devices 4
// in f32[8,128] = wave 0
// out f32[8,128]
// run
// fault (early): device-race: kernel `k` on device 0: race between devices: tpu.enqueue_dma at devices.mlir:208, buffer `o` at [0, 0], grid step [], DMA from device 1 to `o` started at devices.mlir:208 in grid step []: device 0 writes there at devices.mlir:212, and nothing orders that before this DMA from device 1
// fault (late): device-race: kernel `k` on device 0: race between devices: tpu.enqueue_dma at devices.mlir:208, buffer `o` at [0, 0], grid step [], DMA from device 2 to `o` started at devices.mlir:208 in grid step []: another DMA is in flight there, from device 3 to `o` started at devices.mlir:208 in grid step [], and nothing orders that before this DMA from device 2
// fault (random 0): device-race: kernel `k` on device 0: race between devices: tpu.enqueue_dma at devices.mlir:208, buffer `o` at [0, 0], grid step [], DMA from device 2 to `o` started at devices.mlir:208 in grid step []: device 0 writes there at devices.mlir:212, and nothing orders that before this DMA from device 2
// fault (random 1): device-race: kernel `k` on device 0: race between devices: tpu.enqueue_dma at devices.mlir:208, buffer `o` at [0, 0], grid step [], DMA from device 3 to `o` started at devices.mlir:208 in grid step []: device 0 writes there at devices.mlir:212, and nothing orders that before this DMA from device 3
func.func @k(%x: !hbm, %o: !hbm, %send: !dma, %recv: !dma) attributes {scratch_operands = 2 : i64} {
  %c0 = arith.constant 0 : i32
  %c1 = arith.constant 1 : i32
  %c2 = arith.constant 2 : i32
  %c4 = arith.constant 4 : i32
  %me = "tpu.device_id"() : () -> i32
  %up = arith.addi %me, %c1 : i32
  %right = arith.remsi %up, %c4 : i32
  %down = arith.addi %right, %c2 : i32
  %left = arith.remsi %down, %c4 : i32
  "tpu.enqueue_dma"(%x, %send, %o, %recv, %c0) {operandSegmentSizes = array<i32: 1, 1, 1, 1, 1, 0, 0>} : (!hbm, !dma, !hbm, !dma, i32) -> ()
  "tpu.wait_dma2"(%send, %o, %x) : (!dma, !hbm, !hbm) -> ()
  %c = arith.cmpi eq, %me, %c0 : i32
  scf.if %c {
  "tpu.wait_dma2"(%recv, %x, %o) : (!dma, !hbm, !hbm) -> ()
  "tpu.wait_dma2"(%recv, %x, %o) : (!dma, !hbm, !hbm) -> ()
  "tpu.wait_dma2"(%recv, %x, %o) : (!dma, !hbm, !hbm) -> ()
  "tpu.wait_dma2"(%recv, %x, %o) : (!dma, !hbm, !hbm) -> ()
  }
  return
}
// -----
// A copy of what arrives before it is waited for.
// devices 4
// in f32[8,128] = wave 0
// out f32[8,128]
// out f32[8,128]
// run
// fault (early, random 0): read-in-flight: kernel `k` on device 0: read of a buffer whose DMA is in flight: tpu.enqueue_dma at devices.mlir:240, buffer `o` at [0, 0], grid step [], DMA from device 3 to `o` started at devices.mlir:239 in grid step []
// fault (late): read-in-flight: kernel `k` on device 3: read of a buffer whose DMA is in flight: tpu.enqueue_dma at devices.mlir:240, buffer `o` at [0, 0], grid step [], DMA from device 2 to `o` started at devices.mlir:239 in grid step []
// fault (random 1): read-in-flight: kernel `k` on device 2: read of a buffer whose DMA is in flight: tpu.enqueue_dma at devices.mlir:240, buffer `o` at [0, 0], grid step [], DMA from device 1 to `o` started at devices.mlir:239 in grid step []
func.func @k(%x: !hbm, %o: !hbm, %p: !hbm, %send: !dma, %recv: !dma, %copy: !dma) attributes {scratch_operands = 3 : i64} {
  %c0 = arith.constant 0 : i32
  %c1 = arith.constant 1 : i32
  %c2 = arith.constant 2 : i32
  %c4 = arith.constant 4 : i32
  %me = "tpu.device_id"() : () -> i32
  %up = arith.addi %me, %c1 : i32
  %right = arith.remsi %up, %c4 : i32
  %down = arith.addi %right, %c2 : i32
  %left = arith.remsi %down, %c4 : i32
  "tpu.enqueue_dma"(%x, %send, %o, %recv, %right) {operandSegmentSizes = array<i32: 1, 1, 1, 1, 1, 0, 0>} : (!hbm, !dma, !hbm, !dma, i32) -> ()
  "tpu.enqueue_dma"(%o, %p, %copy) : (!hbm, !hbm, !dma) -> ()
  "tpu.wait_dma2"(%copy, %o, %p) : (!dma, !hbm, !hbm) -> ()
  "tpu.wait_dma2"(%send, %o, %x) : (!dma, !hbm, !hbm) -> ()
  "tpu.wait_dma2"(%recv, %x, %o) : (!dma, !hbm, !hbm) -> ()
  return
}
// -----
// The source is overwritten before it is sent.
// devices 4
// in f32[8,128] = wave 0
// in f32[8,128] = wave 9
// out f32[8,128]
// run
// fault (early, random 0, random 1): overwrite-in-flight: kernel `k` on device 0: overwrite of a buffer whose DMA is in flight: tpu.enqueue_dma at devices.mlir:266, buffer `x` at [0, 0], grid step [], DMA from `x` to `o` of device 1 started at devices.mlir:265 in grid step []
// fault (late): overwrite-in-flight: kernel `k` on device 3: overwrite of a buffer whose DMA is in flight: tpu.enqueue_dma at devices.mlir:266, buffer `x` at [0, 0], grid step [], DMA from `x` to `o` of device 0 started at devices.mlir:265 in grid step []
func.func @k(%x: !hbm, %y: !hbm, %o: !hbm, %send: !dma, %recv: !dma, %copy: !dma) attributes {scratch_operands = 3 : i64} {
  %c0 = arith.constant 0 : i32
  %c1 = arith.constant 1 : i32
  %c2 = arith.constant 2 : i32
  %c4 = arith.constant 4 : i32
  %me = "tpu.device_id"() : () -> i32
  %up = arith.addi %me, %c1 : i32
  %right = arith.remsi %up, %c4 : i32
  %down = arith.addi %right, %c2 : i32
  %left = arith.remsi %down, %c4 : i32
  "tpu.enqueue_dma"(%x, %send, %o, %recv, %right) {operandSegmentSizes = array<i32: 1, 1, 1, 1, 1, 0, 0>} : (!hbm, !dma, !hbm, !dma, i32) -> ()
  "tpu.enqueue_dma"(%y, %x, %copy) : (!hbm, !hbm, !dma) -> ()
  "tpu.wait_dma2"(%copy, %y, %x) : (!dma, !hbm, !hbm) -> ()
  "tpu.wait_dma2"(%send, %o, %x) : (!dma, !hbm, !hbm) -> ()
  "tpu.wait_dma2"(%recv, %x, %o) : (!dma, !hbm, !hbm) -> ()
  return
}
// -----
// A barrier of the kernel's own, with both neighbours.
// devices 4
// in f32[8,128] = wave 0
// out f32[8,128]
// run
// result 0 of device 0: f32[8, 128]: -0.55624074 1.0685899 -1.4966193 1.8065541 -1.9739381 1.9855635 -1.8405131 1.5502322 ..., sum -0.42563, by place -1002.819
// result 0 of device 1: f32[8, 128]: 0.8217788 1.4984071 1.9103724 1.9849094 1.7088526 1.130962 0.35331 -0.48674703 ..., sum 0.05815, by place -4778.684
// result 0 of device 2: f32[8, 128]: 1.9783223 0.5809704 -1.8077097 -1.1118374 1.4811983 1.5468183 -1.0269469 -1.8484 ..., sum -0.10043, by place 476.816
// result 0 of device 3: f32[8, 128]: 1.3160053 -1.9819452 1.6688657 -0.53141856 -0.8685328 1.839456 -1.9017452 1.0246315 ..., sum -0.25011, by place 703.049
func.func @k(%x: !hbm, %o: !hbm, %send: !dma, %recv: !dma) attributes {scratch_operands = 2 : i64} {
  %c0 = arith.constant 0 : i32
  %c1 = arith.constant 1 : i32
  %c2 = arith.constant 2 : i32
  %c4 = arith.constant 4 : i32
  %me = "tpu.device_id"() : () -> i32
  %up = arith.addi %me, %c1 : i32
  %right = arith.remsi %up, %c4 : i32
  %down = arith.addi %right, %c2 : i32
  %left = arith.remsi %down, %c4 : i32
  %b = "tpu.sem_barrier"() : () -> !sem
  "tpu.sem_signal"(%b, %c1, %left) {operandSegmentSizes = array<i32: 1, 1, 1, 0, 0>} : (!sem, i32, i32) -> ()
  "tpu.sem_signal"(%b, %c1, %right) {operandSegmentSizes = array<i32: 1, 1, 1, 0, 0>} : (!sem, i32, i32) -> ()
  "tpu.sem_wait"(%b, %c2) : (!sem, i32) -> ()
  "tpu.enqueue_dma"(%x, %send, %o, %recv, %right) {operandSegmentSizes = array<i32: 1, 1, 1, 1, 1, 0, 0>} : (!hbm, !dma, !hbm, !dma, i32) -> ()
  "tpu.wait_dma2"(%send, %o, %x) : (!dma, !hbm, !hbm) -> ()
  "tpu.wait_dma2"(%recv, %x, %o) : (!dma, !hbm, !hbm) -> ()
  return
}
// -----
// A barrier with the left neighbour: the right one may not be there yet.
// devices 4
// in f32[8,128] = wave 0
// out f32[8,128]
// run
// fault (early, random 0): device-race: kernel `k` on device 1: race between devices: tpu.enqueue_dma at devices.mlir:322, grid step []: device 2 may not have entered the kernel: no wait on the barrier semaphore says so
// fault (late, random 1): device-race: kernel `k` on device 0: race between devices: tpu.enqueue_dma at devices.mlir:322, grid step []: device 1 may not have entered the kernel: no wait on the barrier semaphore says so
func.func @k(%x: !hbm, %o: !hbm, %send: !dma, %recv: !dma) attributes {scratch_operands = 2 : i64} {
  %c0 = arith.constant 0 : i32
  %c1 = arith.constant 1 : i32
  %c2 = arith.constant 2 : i32
  %c4 = arith.constant 4 : i32
  %me = "tpu.device_id"() : () -> i32
  %up = arith.addi %me, %c1 : i32
  %right = arith.remsi %up, %c4 : i32
  %down = arith.addi %right, %c2 : i32
  %left = arith.remsi %down, %c4 : i32
  %b = "tpu.sem_barrier"() : () -> !sem
  "tpu.sem_signal"(%b, %c1, %right) {operandSegmentSizes = array<i32: 1, 1, 1, 0, 0>} : (!sem, i32, i32) -> ()
  "tpu.sem_wait"(%b, %c1) : (!sem, i32) -> ()
  "tpu.enqueue_dma"(%x, %send, %o, %recv, %right) {operandSegmentSizes = array<i32: 1, 1, 1, 1, 1, 0, 0>} : (!hbm, !dma, !hbm, !dma, i32) -> ()
  "tpu.wait_dma2"(%send, %o, %x) : (!dma, !hbm, !hbm) -> ()
  "tpu.wait_dma2"(%recv, %x, %o) : (!dma, !hbm, !hbm) -> ()
  return
}
// -----
// A wait for one of two: it may have been the left neighbour.
// devices 4
// in f32[8,128] = wave 0
// out f32[8,128]
// run
// fault (early): device-race: kernel `k` on device 1: race between devices: tpu.enqueue_dma at devices.mlir:350, grid step []: device 2 may not have entered the kernel: no wait on the barrier semaphore says so
// fault (late, random 1): device-race: kernel `k` on device 0: race between devices: tpu.enqueue_dma at devices.mlir:350, grid step []: device 1 may not have entered the kernel: no wait on the barrier semaphore says so
// fault (random 0): device-race: kernel `k` on device 2: race between devices: tpu.enqueue_dma at devices.mlir:350, grid step []: device 3 may not have entered the kernel: no wait on the barrier semaphore says so
func.func @k(%x: !hbm, %o: !hbm, %send: !dma, %recv: !dma) attributes {scratch_operands = 2 : i64} {
  %c0 = arith.constant 0 : i32
  %c1 = arith.constant 1 : i32
  %c2 = arith.constant 2 : i32
  %c4 = arith.constant 4 : i32
  %me = "tpu.device_id"() : () -> i32
  %up = arith.addi %me, %c1 : i32
  %right = arith.remsi %up, %c4 : i32
  %down = arith.addi %right, %c2 : i32
  %left = arith.remsi %down, %c4 : i32
  %b = "tpu.sem_barrier"() : () -> !sem
  "tpu.sem_signal"(%b, %c1, %left) {operandSegmentSizes = array<i32: 1, 1, 1, 0, 0>} : (!sem, i32, i32) -> ()
  "tpu.sem_signal"(%b, %c1, %right) {operandSegmentSizes = array<i32: 1, 1, 1, 0, 0>} : (!sem, i32, i32) -> ()
  "tpu.sem_wait"(%b, %c1) : (!sem, i32) -> ()
  "tpu.enqueue_dma"(%x, %send, %o, %recv, %right) {operandSegmentSizes = array<i32: 1, 1, 1, 1, 1, 0, 0>} : (!hbm, !dma, !hbm, !dma, i32) -> ()
  "tpu.wait_dma2"(%send, %o, %x) : (!dma, !hbm, !hbm) -> ()
  "tpu.wait_dma2"(%recv, %x, %o) : (!dma, !hbm, !hbm) -> ()
  "tpu.sem_wait"(%b, %c1) : (!sem, i32) -> ()
  return
}
// -----
// A signal that nobody waits for.
// devices 4
// in f32[8,128] = wave 0
// out f32[8,128]
// run
// fault: semaphore-unbalanced: kernel `k` on device 0: semaphore left unbalanced: tpu.sem_signal at devices.mlir:376, buffer `s`, grid step []: it holds 1 at the end of the kernel
func.func @k(%x: !hbm, %o: !hbm, %send: !dma, %recv: !dma, %s: !sem) attributes {scratch_operands = 3 : i64} {
  %c0 = arith.constant 0 : i32
  %c1 = arith.constant 1 : i32
  %c2 = arith.constant 2 : i32
  %c4 = arith.constant 4 : i32
  %me = "tpu.device_id"() : () -> i32
  %up = arith.addi %me, %c1 : i32
  %right = arith.remsi %up, %c4 : i32
  %down = arith.addi %right, %c2 : i32
  %left = arith.remsi %down, %c4 : i32
  "tpu.enqueue_dma"(%x, %send, %o, %recv, %right) {operandSegmentSizes = array<i32: 1, 1, 1, 1, 1, 0, 0>} : (!hbm, !dma, !hbm, !dma, i32) -> ()
  "tpu.wait_dma2"(%send, %o, %x) : (!dma, !hbm, !hbm) -> ()
  "tpu.wait_dma2"(%recv, %x, %o) : (!dma, !hbm, !hbm) -> ()
  "tpu.sem_signal"(%s, %c1, %right) {operandSegmentSizes = array<i32: 1, 1, 1, 0, 0>} : (!sem, i32, i32) -> ()
  return
}
// -----
// A signal to nobody in particular is this device's own.
// devices 4
// in f32[8,128] = wave 0
// out f32[8,128]
// run
// result 0 of device 0: f32[8, 128]: -0.55624074 1.0685899 -1.4966193 1.8065541 -1.9739381 1.9855635 -1.8405131 1.5502322 ..., sum -0.42563, by place -1002.819
// result 0 of device 1: f32[8, 128]: 0.8217788 1.4984071 1.9103724 1.9849094 1.7088526 1.130962 0.35331 -0.48674703 ..., sum 0.05815, by place -4778.684
// result 0 of device 2: f32[8, 128]: 1.9783223 0.5809704 -1.8077097 -1.1118374 1.4811983 1.5468183 -1.0269469 -1.8484 ..., sum -0.10043, by place 476.816
// result 0 of device 3: f32[8, 128]: 1.3160053 -1.9819452 1.6688657 -0.53141856 -0.8685328 1.839456 -1.9017452 1.0246315 ..., sum -0.25011, by place 703.049
func.func @k(%x: !hbm, %o: !hbm, %send: !dma, %recv: !dma, %s: !sem) attributes {scratch_operands = 3 : i64} {
  %c0 = arith.constant 0 : i32
  %c1 = arith.constant 1 : i32
  %c2 = arith.constant 2 : i32
  %c4 = arith.constant 4 : i32
  %me = "tpu.device_id"() : () -> i32
  %up = arith.addi %me, %c1 : i32
  %right = arith.remsi %up, %c4 : i32
  %down = arith.addi %right, %c2 : i32
  %left = arith.remsi %down, %c4 : i32
  "tpu.sem_signal"(%s, %c1) : (!sem, i32) -> ()
  "tpu.sem_wait"(%s, %c1) : (!sem, i32) -> ()
  "tpu.enqueue_dma"(%x, %send, %o, %recv, %right) {operandSegmentSizes = array<i32: 1, 1, 1, 1, 1, 0, 0>} : (!hbm, !dma, !hbm, !dma, i32) -> ()
  "tpu.wait_dma2"(%send, %o, %x) : (!dma, !hbm, !hbm) -> ()
  "tpu.wait_dma2"(%recv, %x, %o) : (!dma, !hbm, !hbm) -> ()
  return
}
// -----
// Less is signalled than waited for.
// devices 4
// in f32[8,128] = wave 0
// out f32[8,128]
// run
// fault: deadlock: kernel `k` on device 0: wait that is never satisfied: tpu.sem_wait at devices.mlir:424, buffer `s`, grid step []: 2; device 1, device 2, device 3 wait for 2 on `s` at devices.mlir:424
func.func @k(%x: !hbm, %o: !hbm, %send: !dma, %recv: !dma, %s: !sem) attributes {scratch_operands = 3 : i64} {
  %c0 = arith.constant 0 : i32
  %c1 = arith.constant 1 : i32
  %c2 = arith.constant 2 : i32
  %c4 = arith.constant 4 : i32
  %me = "tpu.device_id"() : () -> i32
  %up = arith.addi %me, %c1 : i32
  %right = arith.remsi %up, %c4 : i32
  %down = arith.addi %right, %c2 : i32
  %left = arith.remsi %down, %c4 : i32
  "tpu.sem_signal"(%s, %c1, %right) {operandSegmentSizes = array<i32: 1, 1, 1, 0, 0>} : (!sem, i32, i32) -> ()
  "tpu.sem_wait"(%s, %c2) : (!sem, i32) -> ()
  "tpu.enqueue_dma"(%x, %send, %o, %recv, %right) {operandSegmentSizes = array<i32: 1, 1, 1, 1, 1, 0, 0>} : (!hbm, !dma, !hbm, !dma, i32) -> ()
  "tpu.wait_dma2"(%send, %o, %x) : (!dma, !hbm, !hbm) -> ()
  "tpu.wait_dma2"(%recv, %x, %o) : (!dma, !hbm, !hbm) -> ()
  return
}
// -----
// A slot is used again when its reader says so.
// devices 4
// in f32[8,128] = wave 0
// out f32[8,128]
// out f32[2,8,128]
// run allow_unwritten_outputs
// result 0 of device 0: f32[8, 128]: -0.55624074 1.0685899 -1.4966193 1.8065541 -1.9739381 1.9855635 -1.8405131 1.5502322 ..., sum -0.42563, by place -1002.819
// result 1 of device 0: f32[2, 8, 128]: -0.55624074 1.0685899 -1.4966193 1.8065541 -1.9739381 1.9855635 -1.8405131 1.5502322 ..., sum -0.42563, by place -1002.819, 1024 nan
// result 0 of device 1: f32[8, 128]: 0.8217788 1.4984071 1.9103724 1.9849094 1.7088526 1.130962 0.35331 -0.48674703 ..., sum 0.05815, by place -4778.684
// result 1 of device 1: f32[2, 8, 128]: 0.8217788 1.4984071 1.9103724 1.9849094 1.7088526 1.130962 0.35331 -0.48674703 ..., sum 0.05815, by place -4778.684, 1024 nan
// result 0 of device 2: f32[8, 128]: 1.9783223 0.5809704 -1.8077097 -1.1118374 1.4811983 1.5468183 -1.0269469 -1.8484 ..., sum -0.10043, by place 476.816
// result 1 of device 2: f32[2, 8, 128]: 1.9783223 0.5809704 -1.8077097 -1.1118374 1.4811983 1.5468183 -1.0269469 -1.8484 ..., sum -0.10043, by place 476.816, 1024 nan
// result 0 of device 3: f32[8, 128]: 1.3160053 -1.9819452 1.6688657 -0.53141856 -0.8685328 1.839456 -1.9017452 1.0246315 ..., sum -0.25011, by place 703.049
// result 1 of device 3: f32[2, 8, 128]: 1.3160053 -1.9819452 1.6688657 -0.53141856 -0.8685328 1.839456 -1.9017452 1.0246315 ..., sum -0.25011, by place 703.049, 1024 nan
func.func @k(%x: !hbm, %o: !hbm, %h: !slots, %send: !dma, %recv: !dma, %copy: !dma, %cap: !sem) attributes {scratch_operands = 4 : i64} {
  %c0 = arith.constant 0 : i32
  %c1 = arith.constant 1 : i32
  %c2 = arith.constant 2 : i32
  %c4 = arith.constant 4 : i32
  %me = "tpu.device_id"() : () -> i32
  %up = arith.addi %me, %c1 : i32
  %right = arith.remsi %up, %c4 : i32
  %down = arith.addi %right, %c2 : i32
  %left = arith.remsi %down, %c4 : i32
  %h01 = "tpu.memref_slice"(%h, %c0, %c0, %c0) : (!slots, i32, i32, i32) -> !one
  %h0 = "tpu.memref_squeeze"(%h01) : (!one) -> !hbm
  "tpu.enqueue_dma"(%x, %send, %h0, %recv, %right) {operandSegmentSizes = array<i32: 1, 1, 1, 1, 1, 0, 0>} : (!hbm, !dma, !hbm, !dma, i32) -> ()
  "tpu.wait_dma2"(%send, %h0, %x) : (!dma, !hbm, !hbm) -> ()
  "tpu.wait_dma2"(%recv, %x, %h0) : (!dma, !hbm, !hbm) -> ()
  "tpu.enqueue_dma"(%h0, %o, %copy) : (!hbm, !hbm, !dma) -> ()
  "tpu.wait_dma2"(%copy, %h0, %o) : (!dma, !hbm, !hbm) -> ()
  "tpu.sem_signal"(%cap, %c1, %left) {operandSegmentSizes = array<i32: 1, 1, 1, 0, 0>} : (!sem, i32, i32) -> ()
  "tpu.sem_wait"(%cap, %c1) : (!sem, i32) -> ()
  "tpu.enqueue_dma"(%x, %send, %h0, %recv, %right) {operandSegmentSizes = array<i32: 1, 1, 1, 1, 1, 0, 0>} : (!hbm, !dma, !hbm, !dma, i32) -> ()
  "tpu.wait_dma2"(%send, %h0, %x) : (!dma, !hbm, !hbm) -> ()
  "tpu.wait_dma2"(%recv, %x, %h0) : (!dma, !hbm, !hbm) -> ()
  "tpu.enqueue_dma"(%h0, %o, %copy) : (!hbm, !hbm, !dma) -> ()
  "tpu.wait_dma2"(%copy, %h0, %o) : (!dma, !hbm, !hbm) -> ()
  return
}
// -----
// A slot is used again while it may be read.
// devices 4
// in f32[8,128] = wave 0
// out f32[8,128]
// out f32[2,8,128]
// run allow_unwritten_outputs
// fault (early): device-race: kernel `k` on device 2: race between devices: tpu.enqueue_dma at devices.mlir:498, buffer `h` at [0, 0, 0], grid step [], DMA from device 1 to `h` started at devices.mlir:498 in grid step []: another DMA is in flight there, from device 1 to `h` started at devices.mlir:493 in grid step [], and nothing orders that before this DMA from device 1
// fault (late, random 1): device-race: kernel `k` on device 1: race between devices: tpu.enqueue_dma at devices.mlir:498, buffer `h` at [0, 0, 0], grid step [], DMA from device 0 to `h` started at devices.mlir:498 in grid step []: another DMA is in flight there, from device 0 to `h` started at devices.mlir:493 in grid step [], and nothing orders that before this DMA from device 0
// fault (random 0): device-race: kernel `k` on device 0: race between devices: tpu.enqueue_dma at devices.mlir:498, buffer `h` at [0, 0, 0], grid step [], DMA from device 3 to `h` started at devices.mlir:498 in grid step []: another DMA is in flight there, from device 3 to `h` started at devices.mlir:493 in grid step [], and nothing orders that before this DMA from device 3
func.func @k(%x: !hbm, %o: !hbm, %h: !slots, %send: !dma, %recv: !dma, %copy: !dma, %cap: !sem) attributes {scratch_operands = 4 : i64} {
  %c0 = arith.constant 0 : i32
  %c1 = arith.constant 1 : i32
  %c2 = arith.constant 2 : i32
  %c4 = arith.constant 4 : i32
  %me = "tpu.device_id"() : () -> i32
  %up = arith.addi %me, %c1 : i32
  %right = arith.remsi %up, %c4 : i32
  %down = arith.addi %right, %c2 : i32
  %left = arith.remsi %down, %c4 : i32
  %h01 = "tpu.memref_slice"(%h, %c0, %c0, %c0) : (!slots, i32, i32, i32) -> !one
  %h0 = "tpu.memref_squeeze"(%h01) : (!one) -> !hbm
  "tpu.enqueue_dma"(%x, %send, %h0, %recv, %right) {operandSegmentSizes = array<i32: 1, 1, 1, 1, 1, 0, 0>} : (!hbm, !dma, !hbm, !dma, i32) -> ()
  "tpu.wait_dma2"(%send, %h0, %x) : (!dma, !hbm, !hbm) -> ()
  "tpu.wait_dma2"(%recv, %x, %h0) : (!dma, !hbm, !hbm) -> ()
  "tpu.enqueue_dma"(%h0, %o, %copy) : (!hbm, !hbm, !dma) -> ()
  "tpu.wait_dma2"(%copy, %h0, %o) : (!dma, !hbm, !hbm) -> ()
  "tpu.enqueue_dma"(%x, %send, %h0, %recv, %right) {operandSegmentSizes = array<i32: 1, 1, 1, 1, 1, 0, 0>} : (!hbm, !dma, !hbm, !dma, i32) -> ()
  "tpu.wait_dma2"(%send, %h0, %x) : (!dma, !hbm, !hbm) -> ()
  "tpu.wait_dma2"(%recv, %x, %h0) : (!dma, !hbm, !hbm) -> ()
  "tpu.enqueue_dma"(%h0, %o, %copy) : (!hbm, !hbm, !dma) -> ()
  "tpu.wait_dma2"(%copy, %h0, %o) : (!dma, !hbm, !hbm) -> ()
  return
}
// -----
// A slot is given back before it is read.
// devices 4
// in f32[8,128] = wave 0
// out f32[8,128]
// out f32[2,8,128]
// run allow_unwritten_outputs
// fault (early): device-race: kernel `k` on device 1: race between devices: tpu.enqueue_dma at devices.mlir:535, buffer `h` at [0, 0, 0], grid step [], DMA from device 0 to `h` started at devices.mlir:535 in grid step []: device 1 reads there at devices.mlir:533, and nothing orders that before this DMA from device 0
// fault (late): device-race: kernel `k` on device 0: race between devices: tpu.enqueue_dma at devices.mlir:535, buffer `h` at [0, 0, 0], grid step [], DMA from device 3 to `h` started at devices.mlir:535 in grid step []: device 0 reads there at devices.mlir:533, and nothing orders that before this DMA from device 3
// fault (random 0): device-race: kernel `k` on device 3: race between devices: tpu.enqueue_dma at devices.mlir:535, buffer `h` at [0, 0, 0], grid step [], DMA from device 2 to `h` started at devices.mlir:535 in grid step []: device 3 reads there at devices.mlir:533, and nothing orders that before this DMA from device 2
// fault (random 1): device-race: kernel `k` on device 2: race between devices: tpu.enqueue_dma at devices.mlir:535, buffer `h` at [0, 0, 0], grid step [], DMA from device 1 to `h` started at devices.mlir:535 in grid step []: device 2 reads there at devices.mlir:533, and nothing orders that before this DMA from device 1
func.func @k(%x: !hbm, %o: !hbm, %h: !slots, %send: !dma, %recv: !dma, %copy: !dma, %cap: !sem) attributes {scratch_operands = 4 : i64} {
  %c0 = arith.constant 0 : i32
  %c1 = arith.constant 1 : i32
  %c2 = arith.constant 2 : i32
  %c4 = arith.constant 4 : i32
  %me = "tpu.device_id"() : () -> i32
  %up = arith.addi %me, %c1 : i32
  %right = arith.remsi %up, %c4 : i32
  %down = arith.addi %right, %c2 : i32
  %left = arith.remsi %down, %c4 : i32
  %h01 = "tpu.memref_slice"(%h, %c0, %c0, %c0) : (!slots, i32, i32, i32) -> !one
  %h0 = "tpu.memref_squeeze"(%h01) : (!one) -> !hbm
  "tpu.enqueue_dma"(%x, %send, %h0, %recv, %right) {operandSegmentSizes = array<i32: 1, 1, 1, 1, 1, 0, 0>} : (!hbm, !dma, !hbm, !dma, i32) -> ()
  "tpu.wait_dma2"(%send, %h0, %x) : (!dma, !hbm, !hbm) -> ()
  "tpu.wait_dma2"(%recv, %x, %h0) : (!dma, !hbm, !hbm) -> ()
  "tpu.sem_signal"(%cap, %c1, %left) {operandSegmentSizes = array<i32: 1, 1, 1, 0, 0>} : (!sem, i32, i32) -> ()
  "tpu.enqueue_dma"(%h0, %o, %copy) : (!hbm, !hbm, !dma) -> ()
  "tpu.wait_dma2"(%copy, %h0, %o) : (!dma, !hbm, !hbm) -> ()
  "tpu.sem_wait"(%cap, %c1) : (!sem, i32) -> ()
  "tpu.enqueue_dma"(%x, %send, %h0, %recv, %right) {operandSegmentSizes = array<i32: 1, 1, 1, 1, 1, 0, 0>} : (!hbm, !dma, !hbm, !dma, i32) -> ()
  "tpu.wait_dma2"(%send, %h0, %x) : (!dma, !hbm, !hbm) -> ()
  "tpu.wait_dma2"(%recv, %x, %h0) : (!dma, !hbm, !hbm) -> ()
  "tpu.enqueue_dma"(%h0, %o, %copy) : (!hbm, !hbm, !dma) -> ()
  "tpu.wait_dma2"(%copy, %h0, %o) : (!dma, !hbm, !hbm) -> ()
  return
}
// -----
// Two DMAs on one semaphore, and a wait for either.
// devices 4
// in f32[8,128] = wave 0
// out f32[8,128]
// out f32[2,8,128]
// run
// fault (early, random 0): read-in-flight: kernel `k` on device 1: read of a buffer whose DMA is in flight: tpu.enqueue_dma at devices.mlir:568, buffer `h` at [0, 0, 0], grid step [], DMA from device 0 to `h` started at devices.mlir:565 in grid step []
// fault (late, random 1): read-in-flight: kernel `k` on device 0: read of a buffer whose DMA is in flight: tpu.enqueue_dma at devices.mlir:568, buffer `h` at [0, 0, 0], grid step [], DMA from device 3 to `h` started at devices.mlir:565 in grid step []
func.func @k(%x: !hbm, %o: !hbm, %h: !slots, %send: !dma, %recv: !dma, %copy: !dma, %cap: !sem) attributes {scratch_operands = 4 : i64} {
  %c0 = arith.constant 0 : i32
  %c1 = arith.constant 1 : i32
  %c2 = arith.constant 2 : i32
  %c4 = arith.constant 4 : i32
  %me = "tpu.device_id"() : () -> i32
  %up = arith.addi %me, %c1 : i32
  %right = arith.remsi %up, %c4 : i32
  %down = arith.addi %right, %c2 : i32
  %left = arith.remsi %down, %c4 : i32
  %h01 = "tpu.memref_slice"(%h, %c0, %c0, %c0) : (!slots, i32, i32, i32) -> !one
  %h0 = "tpu.memref_squeeze"(%h01) : (!one) -> !hbm
  %h11 = "tpu.memref_slice"(%h, %c1, %c0, %c0) : (!slots, i32, i32, i32) -> !one
  %h1 = "tpu.memref_squeeze"(%h11) : (!one) -> !hbm
  "tpu.enqueue_dma"(%x, %send, %h0, %recv, %right) {operandSegmentSizes = array<i32: 1, 1, 1, 1, 1, 0, 0>} : (!hbm, !dma, !hbm, !dma, i32) -> ()
  "tpu.enqueue_dma"(%x, %send, %h1, %recv, %right) {operandSegmentSizes = array<i32: 1, 1, 1, 1, 1, 0, 0>} : (!hbm, !dma, !hbm, !dma, i32) -> ()
  "tpu.wait_dma2"(%recv, %x, %h0) : (!dma, !hbm, !hbm) -> ()
  "tpu.enqueue_dma"(%h0, %o, %copy) : (!hbm, !hbm, !dma) -> ()
  "tpu.wait_dma2"(%copy, %h0, %o) : (!dma, !hbm, !hbm) -> ()
  "tpu.wait_dma2"(%recv, %x, %h1) : (!dma, !hbm, !hbm) -> ()
  "tpu.wait_dma2"(%send, %h0, %x) : (!dma, !hbm, !hbm) -> ()
  "tpu.wait_dma2"(%send, %h0, %x) : (!dma, !hbm, !hbm) -> ()
  return
}
// -----
// Two DMAs on one semaphore, and waits for both.
// devices 4
// in f32[8,128] = wave 0
// out f32[8,128]
// out f32[2,8,128]
// run
// result 0 of device 0: f32[8, 128]: -0.55624074 1.0685899 -1.4966193 1.8065541 -1.9739381 1.9855635 -1.8405131 1.5502322 ..., sum -0.42563, by place -1002.819
// result 1 of device 0: f32[2, 8, 128]: -0.55624074 1.0685899 -1.4966193 1.8065541 -1.9739381 1.9855635 -1.8405131 1.5502322 ..., sum -0.85125, by place -1657.910
// result 0 of device 1: f32[8, 128]: 0.8217788 1.4984071 1.9103724 1.9849094 1.7088526 1.130962 0.35331 -0.48674703 ..., sum 0.05815, by place -4778.684
// result 1 of device 1: f32[2, 8, 128]: 0.8217788 1.4984071 1.9103724 1.9849094 1.7088526 1.130962 0.35331 -0.48674703 ..., sum 0.11629, by place -9609.099
// result 0 of device 2: f32[8, 128]: 1.9783223 0.5809704 -1.8077097 -1.1118374 1.4811983 1.5468183 -1.0269469 -1.8484 ..., sum -0.10043, by place 476.816
// result 1 of device 2: f32[2, 8, 128]: 1.9783223 0.5809704 -1.8077097 -1.1118374 1.4811983 1.5468183 -1.0269469 -1.8484 ..., sum -0.20085, by place 932.121
// result 0 of device 3: f32[8, 128]: 1.3160053 -1.9819452 1.6688657 -0.53141856 -0.8685328 1.839456 -1.9017452 1.0246315 ..., sum -0.25011, by place 703.049
// result 1 of device 3: f32[2, 8, 128]: 1.3160053 -1.9819452 1.6688657 -0.53141856 -0.8685328 1.839456 -1.9017452 1.0246315 ..., sum -0.50022, by place 1636.356
func.func @k(%x: !hbm, %o: !hbm, %h: !slots, %send: !dma, %recv: !dma, %copy: !dma, %cap: !sem) attributes {scratch_operands = 4 : i64} {
  %c0 = arith.constant 0 : i32
  %c1 = arith.constant 1 : i32
  %c2 = arith.constant 2 : i32
  %c4 = arith.constant 4 : i32
  %me = "tpu.device_id"() : () -> i32
  %up = arith.addi %me, %c1 : i32
  %right = arith.remsi %up, %c4 : i32
  %down = arith.addi %right, %c2 : i32
  %left = arith.remsi %down, %c4 : i32
  %h01 = "tpu.memref_slice"(%h, %c0, %c0, %c0) : (!slots, i32, i32, i32) -> !one
  %h0 = "tpu.memref_squeeze"(%h01) : (!one) -> !hbm
  %h11 = "tpu.memref_slice"(%h, %c1, %c0, %c0) : (!slots, i32, i32, i32) -> !one
  %h1 = "tpu.memref_squeeze"(%h11) : (!one) -> !hbm
  "tpu.enqueue_dma"(%x, %send, %h0, %recv, %right) {operandSegmentSizes = array<i32: 1, 1, 1, 1, 1, 0, 0>} : (!hbm, !dma, !hbm, !dma, i32) -> ()
  "tpu.enqueue_dma"(%x, %send, %h1, %recv, %right) {operandSegmentSizes = array<i32: 1, 1, 1, 1, 1, 0, 0>} : (!hbm, !dma, !hbm, !dma, i32) -> ()
  "tpu.wait_dma2"(%recv, %x, %h0) : (!dma, !hbm, !hbm) -> ()
  "tpu.wait_dma2"(%recv, %x, %h1) : (!dma, !hbm, !hbm) -> ()
  "tpu.enqueue_dma"(%h0, %o, %copy) : (!hbm, !hbm, !dma) -> ()
  "tpu.wait_dma2"(%copy, %h0, %o) : (!dma, !hbm, !hbm) -> ()
  "tpu.wait_dma2"(%send, %h0, %x) : (!dma, !hbm, !hbm) -> ()
  "tpu.wait_dma2"(%send, %h0, %x) : (!dma, !hbm, !hbm) -> ()
  return
}
// -----
// The first wait of device 0 has only seen the signal of device 1 in some orders, but it may as well have seen that of device 3.
// devices 4
// in f32[8,128] = wave 0
// out f32[8,128]
// run allow_unwritten_outputs
// fault: device-race: kernel `k` on device 1: race between devices: tpu.enqueue_dma at devices.mlir:633, buffer `o` at [0, 0], grid step [], DMA from device 0 to `o` started at devices.mlir:633 in grid step []: device 1 writes there at devices.mlir:640, and nothing orders that before this DMA from device 0
func.func @k(%x: !hbm, %o: !hbm, %send: !dma, %recv: !dma, %copy: !dma, %s: !sem, %t: !sem) attributes {scratch_operands = 5 : i64} {
  %c0 = arith.constant 0 : i32
  %c1 = arith.constant 1 : i32
  %c2 = arith.constant 2 : i32
  %c3 = arith.constant 3 : i32
  %me = "tpu.device_id"() : () -> i32
  %is0 = arith.cmpi eq, %me, %c0 : i32
  %is1 = arith.cmpi eq, %me, %c1 : i32
  %is2 = arith.cmpi eq, %me, %c2 : i32
  %is3 = arith.cmpi eq, %me, %c3 : i32
  scf.if %is0 {
    "tpu.sem_wait"(%s, %c1) : (!sem, i32) -> ()
    "tpu.enqueue_dma"(%x, %send, %o, %recv, %c1) {operandSegmentSizes = array<i32: 1, 1, 1, 1, 1, 0, 0>} : (!hbm, !dma, !hbm, !dma, i32) -> ()
    "tpu.wait_dma2"(%send, %o, %x) : (!dma, !hbm, !hbm) -> ()
    "tpu.sem_wait"(%s, %c1) : (!sem, i32) -> ()
  }
  scf.if %is1 {
    "tpu.sem_signal"(%t, %c1, %c2) {operandSegmentSizes = array<i32: 1, 1, 1, 0, 0>} : (!sem, i32, i32) -> ()
    "tpu.enqueue_dma"(%x, %o, %copy) : (!hbm, !hbm, !dma) -> ()
    "tpu.wait_dma2"(%copy, %x, %o) : (!dma, !hbm, !hbm) -> ()
    "tpu.sem_signal"(%s, %c1, %c0) {operandSegmentSizes = array<i32: 1, 1, 1, 0, 0>} : (!sem, i32, i32) -> ()
    "tpu.wait_dma2"(%recv, %x, %o) : (!dma, !hbm, !hbm) -> ()
  }
  scf.if %is2 {
    "tpu.sem_wait"(%t, %c1) : (!sem, i32) -> ()
    "tpu.sem_signal"(%t, %c1, %c3) {operandSegmentSizes = array<i32: 1, 1, 1, 0, 0>} : (!sem, i32, i32) -> ()
  }
  scf.if %is3 {
    "tpu.sem_wait"(%t, %c1) : (!sem, i32) -> ()
    "tpu.sem_signal"(%s, %c1, %c0) {operandSegmentSizes = array<i32: 1, 1, 1, 0, 0>} : (!sem, i32, i32) -> ()
  }
  return
}
// -----
// Semaphores that a scope allocates; a neighbour may be ahead of it.
// devices 4
// in f32[8,128] = wave 0
// out f32[8,128]
// run
// result 0 of device 0: f32[8, 128]: -0.55624074 1.0685899 -1.4966193 1.8065541 -1.9739381 1.9855635 -1.8405131 1.5502322 ..., sum -0.42563, by place -1002.819
// result 0 of device 1: f32[8, 128]: 0.8217788 1.4984071 1.9103724 1.9849094 1.7088526 1.130962 0.35331 -0.48674703 ..., sum 0.05815, by place -4778.684
// result 0 of device 2: f32[8, 128]: 1.9783223 0.5809704 -1.8077097 -1.1118374 1.4811983 1.5468183 -1.0269469 -1.8484 ..., sum -0.10043, by place 476.816
// result 0 of device 3: f32[8, 128]: 1.3160053 -1.9819452 1.6688657 -0.53141856 -0.8685328 1.839456 -1.9017452 1.0246315 ..., sum -0.25011, by place 703.049
func.func @k(%x: !hbm, %o: !hbm, %send: !dma, %recv: !dma) attributes {scratch_operands = 2 : i64} {
  %c0 = arith.constant 0 : i32
  %c1 = arith.constant 1 : i32
  %c2 = arith.constant 2 : i32
  %c4 = arith.constant 4 : i32
  %me = "tpu.device_id"() : () -> i32
  %up = arith.addi %me, %c1 : i32
  %right = arith.remsi %up, %c4 : i32
  %down = arith.addi %right, %c2 : i32
  %left = arith.remsi %down, %c4 : i32
  "tpu.region"() ({
    %t = "tpu.sem_alloc"() : () -> !sem
    "tpu.sem_signal"(%t, %c1, %left) {operandSegmentSizes = array<i32: 1, 1, 1, 0, 0>} : (!sem, i32, i32) -> ()
    "tpu.sem_signal"(%t, %c1, %right) {operandSegmentSizes = array<i32: 1, 1, 1, 0, 0>} : (!sem, i32, i32) -> ()
    "tpu.sem_wait"(%t, %c2) : (!sem, i32) -> ()
    "tpu.yield"() : () -> ()
  }) : () -> ()
  "tpu.enqueue_dma"(%x, %send, %o, %recv, %right) {operandSegmentSizes = array<i32: 1, 1, 1, 1, 1, 0, 0>} : (!hbm, !dma, !hbm, !dma, i32) -> ()
  "tpu.wait_dma2"(%send, %o, %x) : (!dma, !hbm, !hbm) -> ()
  "tpu.wait_dma2"(%recv, %x, %o) : (!dma, !hbm, !hbm) -> ()
  return
}
// -----
// A loop looks at a semaphore until its neighbour has signalled.
// devices 4
// in f32[8,128] = wave 0
// out f32[8,128]
// run
// result 0 of device 0: f32[8, 128]: -0.55624074 1.0685899 -1.4966193 1.8065541 -1.9739381 1.9855635 -1.8405131 1.5502322 ..., sum -0.42563, by place -1002.819
// result 0 of device 1: f32[8, 128]: 0.8217788 1.4984071 1.9103724 1.9849094 1.7088526 1.130962 0.35331 -0.48674703 ..., sum 0.05815, by place -4778.684
// result 0 of device 2: f32[8, 128]: 1.9783223 0.5809704 -1.8077097 -1.1118374 1.4811983 1.5468183 -1.0269469 -1.8484 ..., sum -0.10043, by place 476.816
// result 0 of device 3: f32[8, 128]: 1.3160053 -1.9819452 1.6688657 -0.53141856 -0.8685328 1.839456 -1.9017452 1.0246315 ..., sum -0.25011, by place 703.049
func.func @k(%x: !hbm, %o: !hbm, %send: !dma, %recv: !dma, %s: !sem) attributes {scratch_operands = 3 : i64} {
  %c0 = arith.constant 0 : i32
  %c1 = arith.constant 1 : i32
  %c2 = arith.constant 2 : i32
  %c4 = arith.constant 4 : i32
  %me = "tpu.device_id"() : () -> i32
  %up = arith.addi %me, %c1 : i32
  %right = arith.remsi %up, %c4 : i32
  %down = arith.addi %right, %c2 : i32
  %left = arith.remsi %down, %c4 : i32
  "tpu.sem_signal"(%s, %c1, %right) {operandSegmentSizes = array<i32: 1, 1, 1, 0, 0>} : (!sem, i32, i32) -> ()
  %w = scf.while (%v = %c0) : (i32) -> i32 {
    %more = arith.cmpi eq, %v, %c0 : i32
    scf.condition(%more) %v : i32
  } do {
  ^bb0(%v: i32):
    %now = "tpu.sem_read"(%s) : (!sem) -> i32
    scf.yield %now : i32
  }
  "tpu.sem_wait"(%s, %c1) : (!sem, i32) -> ()
  "tpu.enqueue_dma"(%x, %send, %o, %recv, %right) {operandSegmentSizes = array<i32: 1, 1, 1, 1, 1, 0, 0>} : (!hbm, !dma, !hbm, !dma, i32) -> ()
  "tpu.wait_dma2"(%send, %o, %x) : (!dma, !hbm, !hbm) -> ()
  "tpu.wait_dma2"(%recv, %x, %o) : (!dma, !hbm, !hbm) -> ()
  return
}
// -----
// The sender's own copy of its shard to where a neighbour writes.
// devices 4
// in f32[8,128] = wave 0
// out f32[8,128]
// run
// fault (early): device-race: kernel `k` on device 1: race between devices: tpu.enqueue_dma at devices.mlir:742, buffer `o` at [0, 0], grid step [], DMA from device 0 to `o` started at devices.mlir:742 in grid step []: device 1 writes there at devices.mlir:741, and nothing orders that before this DMA from device 0
// fault (late, random 1): device-race: kernel `k` on device 0: race between devices: tpu.enqueue_dma at devices.mlir:742, buffer `o` at [0, 0], grid step [], DMA from device 3 to `o` started at devices.mlir:742 in grid step []: device 0 writes there at devices.mlir:741, and nothing orders that before this DMA from device 3
// fault (random 0): device-race: kernel `k` on device 2: race between devices: tpu.enqueue_dma at devices.mlir:742, buffer `o` at [0, 0], grid step [], DMA from device 1 to `o` started at devices.mlir:742 in grid step []: device 2 writes there at devices.mlir:741, and nothing orders that before this DMA from device 1
func.func @k(%x: !hbm, %o: !hbm, %send: !dma, %recv: !dma, %copy: !dma) attributes {scratch_operands = 3 : i64} {
  %c0 = arith.constant 0 : i32
  %c1 = arith.constant 1 : i32
  %c2 = arith.constant 2 : i32
  %c4 = arith.constant 4 : i32
  %me = "tpu.device_id"() : () -> i32
  %up = arith.addi %me, %c1 : i32
  %right = arith.remsi %up, %c4 : i32
  %down = arith.addi %right, %c2 : i32
  %left = arith.remsi %down, %c4 : i32
  "tpu.enqueue_dma"(%x, %o, %copy) : (!hbm, !hbm, !dma) -> ()
  "tpu.wait_dma2"(%copy, %x, %o) : (!dma, !hbm, !hbm) -> ()
  "tpu.enqueue_dma"(%x, %send, %o, %recv, %right) {operandSegmentSizes = array<i32: 1, 1, 1, 1, 1, 0, 0>} : (!hbm, !dma, !hbm, !dma, i32) -> ()
  "tpu.wait_dma2"(%send, %o, %x) : (!dma, !hbm, !hbm) -> ()
  "tpu.wait_dma2"(%recv, %x, %o) : (!dma, !hbm, !hbm) -> ()
  return
}
// -----
// A DMA into memory that its scope has left.
// devices 4
// in f32[8,128] = wave 0
// out f32[8,128]
// run allow_unwritten_outputs
// fault (early): device-race: kernel `k` on device 1: race between devices: tpu.enqueue_dma at devices.mlir:768, grid step []: device 0 copies to device 1 what that has not allocated, or not any more
// fault (late, random 1): device-race: kernel `k` on device 0: race between devices: tpu.enqueue_dma at devices.mlir:768, grid step []: device 3 copies to device 0 what that has not allocated, or not any more
// fault (random 0): semaphore-unbalanced: kernel `k` on device 2: semaphore left unbalanced: tpu.enqueue_dma at devices.mlir:768, buffer `f32[8,128] allocated at devices.mlir:767`, grid step [], DMA from device 1 to `f32[8,128] allocated at devices.mlir:767` started at devices.mlir:768 in grid step []: this device has not waited for all of a DMA when the scope of its destination ended
func.func @k(%x: !hbm, %o: !hbm, %send: !dma, %recv: !dma) attributes {scratch_operands = 2 : i64} {
  %c0 = arith.constant 0 : i32
  %c1 = arith.constant 1 : i32
  %c2 = arith.constant 2 : i32
  %c4 = arith.constant 4 : i32
  %me = "tpu.device_id"() : () -> i32
  %up = arith.addi %me, %c1 : i32
  %right = arith.remsi %up, %c4 : i32
  %down = arith.addi %right, %c2 : i32
  %left = arith.remsi %down, %c4 : i32
  "tpu.region"() ({
    %t = memref.alloca() : !vmem
    "tpu.enqueue_dma"(%x, %send, %t, %recv, %right) {operandSegmentSizes = array<i32: 1, 1, 1, 1, 1, 0, 0>} : (!hbm, !dma, !vmem, !dma, i32) -> ()
    "tpu.wait_dma2"(%send, %t, %x) : (!dma, !vmem, !hbm) -> ()
    "tpu.yield"() : () -> ()
  }) : () -> ()
  "tpu.wait_dma2"(%recv, %x, %o) : (!dma, !hbm, !hbm) -> ()
  return
}
