!hbm = memref<8x128xf32, "hbm">
!vmem = memref<8x128xf32, "vmem">
!half = memref<4x128xf32, "vmem">
!dma = memref<!tpu.dma_semaphore, "semaphore_mem">
!count = memref<!tpu.semaphore, "semaphore_mem">
// -----
// No wait at all.
// in f32[8,128] = wave 0
// run
// fault: semaphore-unbalanced: kernel `k`: semaphore left unbalanced: tpu.enqueue_dma at semaphores.mlir:12, buffer `s`, grid step [], DMA from `x` to `a` started at semaphores.mlir:12 in grid step []: a DMA was not waited for at the end of the kernel
func.func @k(%x: !hbm, %a: !vmem, %s: !dma) attributes {scratch_operands = 2 : i64} {
  "tpu.enqueue_dma"(%x, %a, %s) : (!hbm, !vmem, !dma) -> ()
  return
}
// -----
// The wait is on the other semaphore.
// in f32[8,128] = wave 0
// run
// fault: deadlock: kernel `k`: wait that is never satisfied: tpu.wait_dma2 at semaphores.mlir:22, buffer `t`, grid step []: 4096 bytes are waited for, 0 arrived and no other DMA was started on it
func.func @k(%x: !hbm, %a: !vmem, %s: !dma, %t: !dma) attributes {scratch_operands = 3 : i64} {
  "tpu.enqueue_dma"(%x, %a, %s) : (!hbm, !vmem, !dma) -> ()
  "tpu.wait_dma2"(%t, %x, %a) : (!dma, !hbm, !vmem) -> ()
  return
}
// -----
// The DMA was never started.
// in f32[8,128] = wave 0
// run
// fault: deadlock: kernel `k`: wait that is never satisfied: tpu.wait_dma2 at semaphores.mlir:31, buffer `s`, grid step []: 4096 bytes are waited for, 0 arrived and no other DMA was started on it
func.func @k(%x: !hbm, %a: !vmem, %s: !dma) attributes {scratch_operands = 2 : i64} {
  "tpu.wait_dma2"(%s, %x, %a) : (!dma, !hbm, !vmem) -> ()
  return
}
// -----
// The wait is for half of the DMA.
// in f32[8,128] = wave 0
// run
// fault: semaphore-unbalanced: kernel `k`: semaphore left unbalanced: tpu.enqueue_dma at semaphores.mlir:41, buffer `s`, grid step [], DMA from `x` to `a` started at semaphores.mlir:41 in grid step []: a DMA was not waited for at the end of the kernel
func.func @k(%x: !hbm, %a: !vmem, %s: !dma) attributes {scratch_operands = 2 : i64} {
  %c = arith.constant 0 : i32
  "tpu.enqueue_dma"(%x, %a, %s) : (!hbm, !vmem, !dma) -> ()
  %half = "tpu.memref_slice"(%a, %c, %c) : (!vmem, i32, i32) -> !half
  "tpu.wait_dma2"(%s, %x, %half) : (!dma, !hbm, !half) -> ()
  return
}
// -----
// Two waits for half of it are one for the whole.
// in f32[8,128] = wave 0
// run
// ok
func.func @k(%x: !hbm, %a: !vmem, %s: !dma) attributes {scratch_operands = 2 : i64} {
  %c = arith.constant 0 : i32
  "tpu.enqueue_dma"(%x, %a, %s) : (!hbm, !vmem, !dma) -> ()
  %half = "tpu.memref_slice"(%a, %c, %c) : (!vmem, i32, i32) -> !half
  "tpu.wait_dma2"(%s, %x, %half) : (!dma, !hbm, !half) -> ()
  "tpu.wait_dma2"(%s, %x, %half) : (!dma, !hbm, !half) -> ()
  return
}
// -----
// A counting semaphore is left over.
// run
// fault: semaphore-unbalanced: kernel `k`: semaphore left unbalanced: tpu.sem_signal at semaphores.mlir:66, buffer `s`, grid step []: it holds 1 at the end of the kernel
func.func @k(%s: !count) attributes {scratch_operands = 1 : i64} {
  %three = arith.constant 3 : i32
  %two = arith.constant 2 : i32
  "tpu.sem_signal"(%s, %three) : (!count, i32) -> ()
  "tpu.sem_wait"(%s, %two) : (!count, i32) -> ()
  return
}
// -----
// A counting semaphore never gets there.
// run
// fault: deadlock: kernel `k`: wait that is never satisfied: tpu.sem_wait at semaphores.mlir:78, buffer `s`, grid step []: 2 is waited for and it holds 1
func.func @k(%s: !count) attributes {scratch_operands = 1 : i64} {
  %one = arith.constant 1 : i32
  %two = arith.constant 2 : i32
  "tpu.sem_signal"(%s, %one) : (!count, i32) -> ()
  "tpu.sem_wait"(%s, %two) : (!count, i32) -> ()
  return
}
// -----
// A wait for a negative amount does not signal.
// run
// fault: semaphore-unbalanced: kernel `k`: semaphore left unbalanced: tpu.sem_wait at semaphores.mlir:88, buffer `s`, grid step []: -1 is waited for; a wait takes 0 or more
func.func @k(%s: !count) attributes {scratch_operands = 1 : i64} {
  %one = arith.constant 1 : i32
  %minus = arith.constant -1 : i32
  "tpu.sem_wait"(%s, %minus) : (!count, i32) -> ()
  "tpu.sem_wait"(%s, %one) : (!count, i32) -> ()
  return
}
// -----
// Nothing wrong.
// run
// ok
func.func @k(%s: !count) attributes {scratch_operands = 1 : i64} {
  %one = arith.constant 1 : i32
  %two = arith.constant 2 : i32
  "tpu.sem_signal"(%s, %two) : (!count, i32) -> ()
  "tpu.sem_wait"(%s, %one) : (!count, i32) -> ()
  %left = "tpu.sem_read"(%s) : (!count) -> i32
  "tpu.sem_wait"(%s, %left) : (!count, i32) -> ()
  return
}
// -----
// A DMA that another call waits for: its semaphore is a result.
// in f32[8,128] = wave 0
// out f32[8,128]
// out i32[]
// run
// result 0: f32[8, 128]: 0.8217788 1.4984071 1.9103724 1.9849094 1.7088526 1.130962 0.35331 -0.48674703 ..., sum 0.05815, by place -4778.684
// result 1: i32[]: 4096, sum 4096.00000, by place 0.000
func.func @k(%x: !hbm, %o: !hbm, %s: !dma) {
  "tpu.enqueue_dma"(%x, %o, %s) : (!hbm, !hbm, !dma) -> ()
  return
}
// -----
// The call that waits for it.
// in f32[8,128] = wave 0
// in i32[] = 4096
// out f32[8,128]
// alias 0:0
// run
// result 0: f32[8, 128]: 0.8217788 1.4984071 1.9103724 1.9849094 1.7088526 1.130962 0.35331 -0.48674703 ..., sum 0.05815, by place -4778.684
func.func @k(%x: !hbm, %s: !dma, %o: !hbm) {
  "tpu.wait_dma2"(%s, %x, %x) : (!dma, !hbm, !hbm) -> ()
  return
}
