//! The instruction sets of x86-64.

use std::arch::x86_64::*;

use half::bf16;

use super::{Isa, LANES, Product, Register, Split, Task, chains::chain};

/// AVX2 with fused multiply-add: two registers.
#[derive(Clone, Copy)]
pub(super) struct Avx2(());

/// AVX-512: one register.
#[derive(Clone, Copy)]
pub(super) struct Avx512(());

/// AVX-512 with products of pairs of bf16.
#[derive(Clone, Copy)]
pub(super) struct Avx512Bf16(Avx512);

impl Avx2 {
    pub(super) fn detect() -> Option<Self> {
        (is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")).then_some(Self(()))
    }
}

impl Avx512 {
    pub(super) fn detect() -> Option<Self> {
        let has = Avx2::detect().is_some()
            && is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl");
        has.then_some(Self(()))
    }
}

impl Avx512Bf16 {
    pub(super) fn detect() -> Option<Self> {
        Avx512::detect().filter(|_| is_x86_feature_detected!("avx512bf16")).map(Self)
    }
}

/// # Safety
/// The processor has these instructions.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn with_avx2<P: Product, W: Task<P::Element>>(task: W, product: P) -> W::Output {
    task.run(product)
}

/// # Safety
/// The processor has these instructions.
#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) unsafe fn with_avx512<P: Product, W: Task<P::Element>>(task: W, product: P) -> W::Output {
    task.run(product)
}

/// # Safety
/// The processor has these instructions.
#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
pub(super) unsafe fn with_avx512_bf16<P: Product, W: Task<P::Element>>(task: W, product: P) -> W::Output {
    task.run(product)
}

// SAFETY, here and below: a value of the type proves that the processor has the instructions; loads and stores are of
// whole arrays, or by contract.

impl Isa for Avx2 {
    type Lanes = [__m256; 2];
    const COLUMNS: usize = 3;
    const FEW: usize = 1;

    #[inline(always)]
    fn splat(self, value: f32) -> [__m256; 2] {
        unsafe { [_mm256_set1_ps(value); 2] }
    }

    #[inline(always)]
    fn load(self, from: &[f32; LANES]) -> [__m256; 2] {
        unsafe { [_mm256_loadu_ps(from.as_ptr()), _mm256_loadu_ps(from.as_ptr().add(8))] }
    }

    #[inline(always)]
    fn store(self, lanes: [__m256; 2], to: &mut [f32; LANES]) {
        unsafe {
            _mm256_storeu_ps(to.as_mut_ptr(), lanes[0]);
            _mm256_storeu_ps(to.as_mut_ptr().add(8), lanes[1]);
        }
    }

    #[inline(always)]
    fn fetch(self, address: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T1>(address.cast()) }
    }

    #[inline(always)]
    fn fma(self, a: [__m256; 2], b: [__m256; 2], c: [__m256; 2]) -> [__m256; 2] {
        unsafe { [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])] }
    }

    #[inline(always)]
    fn add(self, a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        unsafe { [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])] }
    }

    #[inline(always)]
    fn max(self, a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        unsafe { [_mm256_max_ps(a[0], b[0]), _mm256_max_ps(a[1], b[1])] }
    }

    #[inline(always)]
    fn mul(self, a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        unsafe { [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])] }
    }

    #[inline(always)]
    unsafe fn widen(self, from: *const bf16) -> [[__m256; 2]; 2] {
        unsafe {
            let high = _mm256_set1_epi32(0xffff_0000_u32 as i32);
            let pairs = [_mm256_loadu_si256(from.cast()), _mm256_loadu_si256(from.add(LANES).cast())];
            let odd = |pair| _mm256_castsi256_ps(_mm256_and_si256(pair, high));
            let even = |pair| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(pair));
            [[odd(pairs[0]), odd(pairs[1])], [even(pairs[0]), even(pairs[1])]]
        }
    }

    #[inline(always)]
    unsafe fn widened_dot(self, row: *const bf16, at: usize, right: [[__m256; 2]; 2], sum: [__m256; 2]) -> [__m256; 2] {
        unsafe { widened_dot(row, at, right, sum) }
    }

    #[inline(always)]
    #[expect(clippy::needless_range_loop, reason = "indices of registers, each loop unrolled")]
    unsafe fn turn(self, rows_at: &[*const f32; LANES], to: *mut Register, stride: usize) {
        for half in 0..2 {
            for quarter in 0..4 {
                unsafe {
                    // Four columns of rows four apart.
                    let [mut rows, mut pairs] = [[_mm256_setzero_ps(); 4]; 2];
                    for at in 0..4 {
                        let [low, high] = [at, at + 4].map(|at| _mm_loadu_ps(rows_at[8 * half + at].add(4 * quarter)));
                        rows[at] = _mm256_insertf128_ps::<1>(_mm256_castps128_ps256(low), high);
                    }
                    for at in 0..2 {
                        let [a, b] = [rows[2 * at], rows[2 * at + 1]];
                        (pairs[at], pairs[2 + at]) = (_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
                    }
                    for at in 0..2 {
                        let [a, b] = [_mm256_castps_pd(pairs[2 * at]), _mm256_castps_pd(pairs[2 * at + 1])];
                        let columns = [_mm256_unpacklo_pd(a, b), _mm256_unpackhi_pd(a, b)];
                        for (lane, column) in columns.into_iter().enumerate() {
                            let to = to.add(chain(4 * quarter + 2 * at + lane) * stride);
                            _mm256_storeu_ps(to.cast::<f32>().add(8 * half), _mm256_castpd_ps(column));
                        }
                    }
                }
            }
        }
    }

    #[inline(always)]
    fn sums(self, of: [[__m256; 2]; 4]) -> [f32; 4] {
        unsafe {
            let mut halves = [_mm256_setzero_ps(); 2];
            for half in 0..2 {
                let [a, b, c, d] = [of[0][half], of[1][half], of[2][half], of[3][half]];
                let ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
                let cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
                let [ab, cd] = [_mm256_castps_pd(ab), _mm256_castps_pd(cd)];
                let low = _mm256_castpd_ps(_mm256_unpacklo_pd(ab, cd));
                halves[half] = _mm256_add_ps(low, _mm256_castpd_ps(_mm256_unpackhi_pd(ab, cd)));
            }
            fold(_mm256_add_ps(halves[0], halves[1]))
        }
    }
}

/// In so many instructions, as the compiler takes more registers for it than there are, and a sum that waits in memory takes three
/// times as long.
///
/// # Safety
/// The processor has the instructions, and 32 elements can be read.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn widened_dot(row: *const bf16, at: usize, right: [[__m256; 2]; 2], mut sum: [__m256; 2]) -> [__m256; 2] {
    unsafe {
        std::arch::asm!(
            "vmovdqu {even}, [{row} + 2 * {at}]",
            "vpand {odd}, {even}, {high_half}",
            "vpslld {even}, {even}, 16",
            "vfmadd231ps {low}, {odd}, {odd_low}",
            "vfmadd231ps {low}, {even}, {even_low}",
            "vmovdqu {even}, [{row} + 2 * {at} + 32]",
            "vpand {odd}, {even}, {high_half}",
            "vpslld {even}, {even}, 16",
            "vfmadd231ps {high}, {odd}, {odd_high}",
            "vfmadd231ps {high}, {even}, {even_high}",
            row = in(reg) row,
            at = in(reg) at,
            high_half = in(ymm_reg) _mm256_set1_epi32(0xffff_0000_u32 as i32),
            odd_low = in(ymm_reg) right[0][0],
            odd_high = in(ymm_reg) right[0][1],
            even_low = in(ymm_reg) right[1][0],
            even_high = in(ymm_reg) right[1][1],
            odd = out(ymm_reg) _,
            even = out(ymm_reg) _,
            low = inout(ymm_reg) sum[0],
            high = inout(ymm_reg) sum[1],
            options(pure, readonly, nostack, preserves_flags),
        );
    }
    sum
}

/// The sums of both halves.
#[inline(always)]
unsafe fn fold(of: __m256) -> [f32; 4] {
    let mut sums = [0.0; 4];
    unsafe {
        let sum = _mm_add_ps(_mm256_castps256_ps128(of), _mm256_extractf128_ps::<1>(of));
        _mm_storeu_ps(sums.as_mut_ptr(), sum);
    }
    sums
}

impl Isa for Avx512 {
    type Lanes = __m512;
    const COLUMNS: usize = 6;
    const FEW: usize = 2;

    #[inline(always)]
    fn splat(self, value: f32) -> __m512 {
        unsafe { _mm512_set1_ps(value) }
    }

    #[inline(always)]
    fn load(self, from: &[f32; LANES]) -> __m512 {
        unsafe { _mm512_loadu_ps(from.as_ptr()) }
    }

    #[inline(always)]
    fn store(self, lanes: __m512, to: &mut [f32; LANES]) {
        unsafe { _mm512_storeu_ps(to.as_mut_ptr(), lanes) }
    }

    #[inline(always)]
    fn fetch(self, address: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T1>(address.cast()) }
    }

    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_add_ps(a, b) }
    }

    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_max_ps(a, b) }
    }

    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_mul_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn widen(self, from: *const bf16) -> [__m512; 2] {
        unsafe {
            let pairs = _mm512_loadu_si512(from.cast());
            let odd = _mm512_and_si512(pairs, _mm512_set1_epi32(0xffff_0000_u32 as i32));
            [_mm512_castsi512_ps(odd), _mm512_castsi512_ps(_mm512_slli_epi32::<16>(pairs))]
        }
    }

    #[inline(always)]
    unsafe fn turn(self, rows: &[*const f32; LANES], to: *mut Register, stride: usize) {
        unsafe { Avx2(()).turn(rows, to, stride) }
    }

    #[inline(always)]
    fn sums(self, of: [__m512; 4]) -> [f32; 4] {
        unsafe {
            let [a, b, c, d] = of;
            let ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
            let cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
            let [ab, cd] = [_mm512_castps_pd(ab), _mm512_castps_pd(cd)];
            let low = _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd));
            let fours = _mm512_add_ps(low, _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
            fold(_mm256_add_ps(_mm512_castps512_ps256(fours), _mm512_extractf32x8_ps::<1>(fours)))
        }
    }
}

/// Products of bf16 as the processor has them: pairs as they lie, the odd elements' first.
impl Product for Avx512Bf16 {
    type Isa = Avx512;
    type Element = bf16;
    type Left = __m512bh;
    type Right = __m512bh;
    const ELEMENTS: usize = 2 * LANES;
    const REGISTERS: usize = 1;

    #[inline(always)]
    fn isa(self) -> Avx512 {
        self.0
    }

    #[inline(always)]
    unsafe fn left(self, from: *const bf16) -> __m512bh {
        unsafe { std::mem::transmute(_mm512_loadu_si512(from.cast())) }
    }

    #[inline(always)]
    unsafe fn right(self, from: *const Register) -> __m512bh {
        unsafe { std::mem::transmute(_mm512_loadu_si512(from.cast())) }
    }

    #[inline(always)]
    fn dot(self, left: __m512bh, right: __m512bh, sum: __m512) -> __m512 {
        unsafe { _mm512_dpbf16_ps(sum, left, right) }
    }

    #[inline(always)]
    fn pack(self, step: &[f32], to: &mut [Register]) {
        for lane in 0..LANES {
            let pair = step[2 * lane].to_bits() >> 16 | step[2 * lane + 1].to_bits() & 0xffff_0000;
            to[0].0[lane] = f32::from_bits(pair);
        }
    }

    #[inline(always)]
    unsafe fn floats(self, from: *const bf16, to: &mut [__m512; 2]) {
        *to = unsafe { self.0.widen(from) };
    }

    #[inline(always)]
    fn lane(element: usize) -> [usize; 2] {
        Split::<Avx512>::lane(element)
    }
}
