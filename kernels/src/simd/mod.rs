//! Sixteen f32 lanes, on the widest registers that the processor has: what the kernels in Rust are written in.
//!
//! A kernel is a [`Task`], compiled once per instruction set, the best one chosen at run time. The sums
//! of products of one type are a [`Product`]: rows of the left operand are read where they lie, and widened in registers;
//! those of the right operand are packed before.
//!
//! Invariants: a sum of products has one order, whatever is computed beside it: lane `i` of an accumulator takes elements `i`,
//! `i + 16`, ... (bf16: pairs, the odd one first), then the lanes are summed as [`Isa::sums`] does. All instruction sets sum
//! in this order, with fused multiply-adds where the processor has them.
//!
//! Everything is `inline(always)`, and loops rather than closures: what is not inlined into the entry function of an
//! instruction set is compiled without its instructions.

pub mod chains;
#[cfg(target_arch = "x86_64")]
mod x86;

use half::bf16;

use crate::float::Float;

/// Lanes of a register.
pub const LANES: usize = 16;

/// Sixteen floats, or as many bytes of something narrower, aligned as registers load them.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub struct Register(pub [f32; LANES]);

impl Register {
    /// Zeros.
    pub const ZERO: Self = Self([0.0; LANES]);
}

/// An instruction set: a value of the type is a proof that the processor has it.
pub trait Isa: Copy {
    /// Sixteen f32 lanes.
    type Lanes: Copy;
    /// Columns whose sums of four rows (of two, where [`Self::FEW`] is one) are held in registers.
    const COLUMNS: usize;
    /// Columns that are so few that twice as many rows are taken, to hide what a multiply-add takes.
    const FEW: usize;

    /// One value in all lanes.
    fn splat(self, value: f32) -> Self::Lanes;
    /// Reads a register.
    fn load(self, from: &[f32; LANES]) -> Self::Lanes;
    /// Writes a register.
    fn store(self, lanes: Self::Lanes, to: &mut [f32; LANES]);
    /// Asks for the cache line of an address, which need not be one.
    fn fetch(self, address: *const u8) {
        let _ = address;
    }
    /// `a * b + c`
    fn fma(self, a: Self::Lanes, b: Self::Lanes, c: Self::Lanes) -> Self::Lanes;
    /// `a + b`
    fn add(self, a: Self::Lanes, b: Self::Lanes) -> Self::Lanes;
    /// The greater one of `a` and `b`, and `b` where one is NaN.
    fn max(self, a: Self::Lanes, b: Self::Lanes) -> Self::Lanes;
    /// `a * b`
    fn mul(self, a: Self::Lanes, b: Self::Lanes) -> Self::Lanes;
    /// The odd elements, and the even ones.
    ///
    /// # Safety
    /// 32 elements can be read.
    unsafe fn widen(self, from: *const bf16) -> [Self::Lanes; 2];
    /// Adds the products of 32 elements from `at` on with `right`, as [`widen`](Self::widen) has them, to a sum: the odd ones first.
    ///
    /// # Safety
    /// These elements can be read.
    #[inline(always)]
    unsafe fn widened_dot(self, row: *const bf16, at: usize, right: [Self::Lanes; 2], sum: Self::Lanes) -> Self::Lanes {
        // SAFETY: by contract.
        let left = unsafe { self.widen(row.add(at)) };
        self.fma(left[1], right[1], self.fma(left[0], right[0], sum))
    }
    /// Sixteen rows of sixteen floats as columns: column `i` goes to register [`chain(i)`](chains::chain)` * stride`.
    ///
    /// # Safety
    /// The rows can be read, and every `stride`th of `16 * stride` registers written.
    unsafe fn turn(self, rows: &[*const f32; LANES], to: *mut Register, stride: usize);
    /// The greatest of a register's lanes, none of which is NaN.
    #[inline(always)]
    fn most(self, of: Self::Lanes) -> f32 {
        let mut lanes = [0.0; LANES];
        self.store(of, &mut lanes);
        let mut most = lanes[0];
        for lane in lanes {
            most = if lane > most { lane } else { most };
        }
        most
    }
    /// The sum of each register's lanes: `(0 + 2) + (1 + 3)` within each four, then the fours in the same way.
    fn sums(self, of: [Self::Lanes; 4]) -> [f32; 4];
}

/// Sums of products of elements of one type, or of such elements with floats.
pub trait Product: Copy {
    /// Whose registers.
    type Isa: Isa;
    /// Of the left operand.
    type Element: Float;
    /// A step's elements of a row of the left operand, in registers.
    type Left: Copy;
    /// A step's elements of a column of the right operand, in registers.
    type Right: Copy;
    /// Elements of a step.
    const ELEMENTS: usize;
    /// Registers of a step of a packed column.
    const REGISTERS: usize;

    /// The instruction set.
    fn isa(self) -> Self::Isa;
    /// Reads a step of a row.
    ///
    /// # Safety
    /// [`Self::ELEMENTS`] elements can be read.
    unsafe fn left(self, from: *const Self::Element) -> Self::Left;
    /// Reads a step of a packed column.
    ///
    /// # Safety
    /// [`Self::REGISTERS`] registers can be read.
    unsafe fn right(self, from: *const Register) -> Self::Right;
    /// Adds a step's products to a sum.
    fn dot(self, left: Self::Left, right: Self::Right, sum: Lanes<Self>) -> Lanes<Self>;
    /// Adds a step's products, of elements from `at` on of a row, to a sum.
    ///
    /// # Safety
    /// As [`Self::left`].
    #[inline(always)]
    unsafe fn dot_of(self, row: *const Self::Element, at: usize, right: Self::Right, sum: Lanes<Self>) -> Lanes<Self> {
        // SAFETY: by contract.
        self.dot(unsafe { self.left(row.add(at)) }, right, sum)
    }
    /// Packs a step of a column, whose values are elements exactly; where it packs floats, any.
    fn pack(self, step: &[f32], to: &mut [Register]);
    /// Elements as floats, register by register, as [`Self::lane`] has them.
    ///
    /// # Safety
    /// As [`Self::left`].
    unsafe fn floats(self, from: *const Self::Element, to: &mut [Lanes<Self>; 2]);
    /// Registers of floats of a step.
    const FLOATS: usize = Self::ELEMENTS / LANES;
    /// Whether columns are packed as such registers.
    const PACKS_FLOATS: bool = Self::REGISTERS == Self::FLOATS;
    /// The register, and its lane, of an element of a step.
    fn lane(element: usize) -> [usize; 2];
}

/// A register of a product.
pub type Lanes<P> = <<P as Product>::Isa as Isa>::Lanes;

/// What is compiled for every instruction set.
pub trait Task<T> {
    /// What it yields.
    type Output;
    /// Does it. To be `inline(always)`.
    fn run<P: Product<Element = T>>(self, product: P) -> Self::Output;
}

/// Products of f32.
#[derive(Clone, Copy)]
pub struct Wide<I>(pub I);

impl<I: Isa> Product for Wide<I> {
    type Isa = I;
    type Element = f32;
    type Left = I::Lanes;
    type Right = I::Lanes;
    const ELEMENTS: usize = LANES;
    const REGISTERS: usize = 1;

    #[inline(always)]
    fn isa(self) -> I {
        self.0
    }

    #[inline(always)]
    unsafe fn left(self, from: *const f32) -> I::Lanes {
        // SAFETY: by contract.
        self.0.load(unsafe { &*from.cast() })
    }

    #[inline(always)]
    unsafe fn right(self, from: *const Register) -> I::Lanes {
        // SAFETY: by contract.
        self.0.load(unsafe { &(*from).0 })
    }

    #[inline(always)]
    fn dot(self, left: I::Lanes, right: I::Lanes, sum: I::Lanes) -> I::Lanes {
        self.0.fma(left, right, sum)
    }

    #[inline(always)]
    fn pack(self, step: &[f32], to: &mut [Register]) {
        to[0].0.copy_from_slice(step);
    }

    #[inline(always)]
    unsafe fn floats(self, from: *const f32, to: &mut [I::Lanes; 2]) {
        // SAFETY: by contract.
        to[0] = unsafe { self.left(from) };
    }

    #[inline(always)]
    fn lane(element: usize) -> [usize; 2] {
        [0, element]
    }
}

/// Products of bf16, as floats: odd elements, then even ones.
#[derive(Clone, Copy)]
pub struct Split<I>(pub I);

impl<I: Isa> Product for Split<I> {
    type Isa = I;
    type Element = bf16;
    type Left = [I::Lanes; 2];
    type Right = [I::Lanes; 2];
    const ELEMENTS: usize = 2 * LANES;
    const REGISTERS: usize = 2;

    #[inline(always)]
    fn isa(self) -> I {
        self.0
    }

    #[inline(always)]
    unsafe fn left(self, from: *const bf16) -> [I::Lanes; 2] {
        // SAFETY: by contract.
        unsafe { self.0.widen(from) }
    }

    #[inline(always)]
    unsafe fn right(self, from: *const Register) -> [I::Lanes; 2] {
        // SAFETY: by contract.
        unsafe { [self.0.load(&(*from).0), self.0.load(&(*from.add(1)).0)] }
    }

    #[inline(always)]
    fn dot(self, left: [I::Lanes; 2], right: [I::Lanes; 2], sum: I::Lanes) -> I::Lanes {
        self.0.fma(left[1], right[1], self.0.fma(left[0], right[0], sum))
    }

    #[inline(always)]
    unsafe fn dot_of(self, row: *const bf16, at: usize, right: [I::Lanes; 2], sum: I::Lanes) -> I::Lanes {
        // SAFETY: by contract.
        unsafe { self.0.widened_dot(row, at, right, sum) }
    }

    #[inline(always)]
    fn pack(self, step: &[f32], to: &mut [Register]) {
        for lane in 0..LANES {
            (to[0].0[lane], to[1].0[lane]) = (step[2 * lane + 1], step[2 * lane]);
        }
    }

    #[inline(always)]
    unsafe fn floats(self, from: *const bf16, to: &mut [I::Lanes; 2]) {
        // SAFETY: by contract.
        *to = unsafe { self.0.widen(from) };
    }

    #[inline(always)]
    fn lane(element: usize) -> [usize; 2] {
        [1 - element % 2, element / 2]
    }
}

/// Any processor: what the compiler makes of arrays.
#[derive(Clone, Copy)]
pub struct Portable;

/// `a * b + c`; fused where that is an instruction, as a call for every lane would be slow.
#[inline(always)]
fn fused(a: f32, b: f32, c: f32) -> f32 {
    if cfg!(any(target_arch = "aarch64", target_feature = "fma")) { a.mul_add(b, c) } else { a * b + c }
}

impl Isa for Portable {
    type Lanes = [f32; LANES];
    const COLUMNS: usize = 2;
    const FEW: usize = 1;

    #[inline(always)]
    fn splat(self, value: f32) -> [f32; LANES] {
        [value; LANES]
    }

    #[inline(always)]
    fn load(self, from: &[f32; LANES]) -> [f32; LANES] {
        *from
    }

    #[inline(always)]
    fn store(self, lanes: [f32; LANES], to: &mut [f32; LANES]) {
        *to = lanes;
    }

    #[inline(always)]
    fn fma(self, a: [f32; LANES], b: [f32; LANES], mut c: [f32; LANES]) -> [f32; LANES] {
        for lane in 0..LANES {
            c[lane] = fused(a[lane], b[lane], c[lane]);
        }
        c
    }

    #[inline(always)]
    fn add(self, a: [f32; LANES], mut b: [f32; LANES]) -> [f32; LANES] {
        for lane in 0..LANES {
            b[lane] += a[lane];
        }
        b
    }

    #[inline(always)]
    fn max(self, a: [f32; LANES], mut b: [f32; LANES]) -> [f32; LANES] {
        for lane in 0..LANES {
            b[lane] = if a[lane] > b[lane] { a[lane] } else { b[lane] };
        }
        b
    }

    #[inline(always)]
    fn mul(self, a: [f32; LANES], mut b: [f32; LANES]) -> [f32; LANES] {
        for lane in 0..LANES {
            b[lane] *= a[lane];
        }
        b
    }

    #[inline(always)]
    unsafe fn widen(self, from: *const bf16) -> [[f32; LANES]; 2] {
        // SAFETY: by contract.
        let from = unsafe { &*from.cast::<[bf16; 2 * LANES]>() };
        let mut floats = [[0.0; LANES]; 2];
        for lane in 0..LANES {
            (floats[0][lane], floats[1][lane]) = (from[2 * lane + 1].widen(), from[2 * lane].widen());
        }
        floats
    }

    #[inline(always)]
    unsafe fn turn(self, rows: &[*const f32; LANES], to: *mut Register, stride: usize) {
        for (at, row) in rows.iter().enumerate() {
            for lane in 0..LANES {
                // SAFETY: by contract.
                unsafe { (*to.add(chains::chain(lane) * stride)).0[at] = *row.add(lane) };
            }
        }
    }

    #[inline(always)]
    fn sums(self, of: [[f32; LANES]; 4]) -> [f32; 4] {
        let mut sums = [0.0; 4];
        for (sum, lanes) in sums.iter_mut().zip(&of) {
            let mut fours = [0.0; 4];
            for (four, x) in fours.iter_mut().zip(lanes.as_chunks::<4>().0) {
                *four = (x[0] + x[2]) + (x[1] + x[3]);
            }
            *sum = (fours[0] + fours[2]) + (fours[1] + fours[3]);
        }
        sums
    }
}

/// Runs a task on f32 with the best instructions that the processor has.
pub(crate) fn with_f32<W: Task<f32>>(task: W) -> W::Output {
    #[cfg(target_arch = "x86_64")]
    {
        if let Some(isa) = x86::Avx512::detect() {
            // SAFETY: the processor has it.
            return unsafe { x86::with_avx512(task, Wide(isa)) };
        }
        if let Some(isa) = x86::Avx2::detect() {
            // SAFETY: as above.
            return unsafe { x86::with_avx2(task, Wide(isa)) };
        }
    }
    task.run(Wide(Portable))
}

/// As [`with_f32`], on bf16.
pub(crate) fn with_bf16<W: Task<bf16>>(task: W) -> W::Output {
    #[cfg(target_arch = "x86_64")]
    if let Some(isa) = x86::Avx512Bf16::detect() {
        // SAFETY: the processor has it.
        return unsafe { x86::with_avx512_bf16(task, isa) };
    }
    with_widened(task)
}

/// As [`with_f32`], on bf16 that become floats before they are multiplied: what is beside them may be any floats.
pub(crate) fn with_widened<W: Task<bf16>>(task: W) -> W::Output {
    #[cfg(target_arch = "x86_64")]
    {
        if let Some(isa) = x86::Avx512::detect() {
            // SAFETY: the processor has it.
            return unsafe { x86::with_avx512(task, Split(isa)) };
        }
        if let Some(isa) = x86::Avx2::detect() {
            // SAFETY: as above.
            return unsafe { x86::with_avx2(task, Split(isa)) };
        }
    }
    task.run(Split(Portable))
}

/// Elements that are asked for ahead of their use: in each step `R` of them, so many behind those of the last step.
#[derive(Clone, Copy)]
pub struct Ahead<T, const R: usize> {
    /// In the first step. They need not be there.
    pub at: [*const T; R],
    /// From one step to the next.
    pub stride: usize,
}

impl<T, const R: usize> Ahead<T, R> {
    /// What [`multiply`] takes where it asks for nothing.
    #[inline(always)]
    pub fn nothing(at: [*const T; R]) -> Self {
        Self { at, stride: 0 }
    }
}

/// The products of `R` rows with `C` packed columns (`[steps, C, REGISTERS]`), added to `sums`. With `AHEAD`, what that says is
/// fetched into the cache.
///
/// # Safety
/// `steps` steps of every row, and of `C` columns, can be read.
#[inline(always)]
#[expect(clippy::needless_range_loop, reason = "indices of registers, each loop unrolled")]
pub unsafe fn multiply<P: Product, const R: usize, const C: usize, const AHEAD: bool>(
    p: P,
    rows: [*const P::Element; R],
    columns: *const Register,
    steps: usize,
    mut sums: [[Lanes<P>; C]; R],
    ahead: &Ahead<P::Element, R>,
) -> [[Lanes<P>; C]; R] {
    for step in 0..steps {
        if AHEAD {
            for at in ahead.at {
                p.isa().fetch(at.wrapping_add(step * ahead.stride).cast());
            }
        }
        // SAFETY: by contract.
        unsafe {
            if C == 1 {
                let right = p.right(columns.add(step * P::REGISTERS));
                for row in 0..R {
                    sums[row][0] = p.dot_of(rows[row], step * P::ELEMENTS, right, sums[row][0]);
                }
                continue;
            }
            let mut left = [p.left(rows[0].add(step * P::ELEMENTS)); R];
            for row in 1..R {
                left[row] = p.left(rows[row].add(step * P::ELEMENTS));
            }
            for column in 0..C {
                let right = p.right(columns.add((step * C + column) * P::REGISTERS));
                for row in 0..R {
                    sums[row][column] = p.dot(left[row], right, sums[row][column]);
                }
            }
        }
    }
    sums
}

/// As [`multiply`], of rows whose steps are registers of floats, as [`Product::lane`] has them, and the columns' are.
///
/// # Safety
/// As there.
#[inline(always)]
#[expect(clippy::needless_range_loop, reason = "indices of registers, each loop unrolled")]
pub unsafe fn multiply_floats<P: Product, const R: usize, const C: usize>(
    p: P,
    rows: [*const Register; R],
    columns: *const Register,
    steps: usize,
    mut sums: [[Lanes<P>; C]; R],
) -> [[Lanes<P>; C]; R] {
    let isa = p.isa();
    for step in 0..steps {
        for register in 0..P::FLOATS {
            // SAFETY: by contract.
            unsafe {
                let mut left = [isa.splat(0.0); R];
                for row in 0..R {
                    left[row] = isa.load(&(*rows[row].add(step * P::FLOATS + register)).0);
                }
                for column in 0..C {
                    let right = isa.load(&(*columns.add((step * C + column) * P::FLOATS + register)).0);
                    for row in 0..R {
                        sums[row][column] = isa.fma(left[row], right, sums[row][column]);
                    }
                }
            }
        }
    }
    sums
}

/// As [`multiply`], of what is left of rows of `length` elements behind their last whole step; columns are packed with zeros
/// there.
///
/// # Safety
/// As there, for rows of `length` elements.
#[inline(always)]
pub unsafe fn multiply_rest<P: Product, const R: usize, const C: usize>(
    p: P,
    rows: [*const P::Element; R],
    columns: *const Register,
    length: usize,
    sums: [[Lanes<P>; C]; R],
) -> [[Lanes<P>; C]; R] {
    let (steps, rest) = (length / P::ELEMENTS, length % P::ELEMENTS);
    if rest == 0 {
        return sums;
    }
    let mut filled = [[P::Element::narrow(0.0); 2 * LANES]; R];
    let mut pointers = rows;
    for row in 0..R {
        // SAFETY: by contract; the copy has room for a step.
        unsafe { std::ptr::copy_nonoverlapping(rows[row].add(steps * P::ELEMENTS), filled[row].as_mut_ptr(), rest) };
        pointers[row] = filled[row].as_ptr();
    }
    // SAFETY: by contract, one step of the copies.
    unsafe {
        multiply::<P, R, C, false>(p, pointers, columns.add(steps * C * P::REGISTERS), 1, sums, &Ahead::nothing(rows))
    }
}

/// The sums of the lanes.
#[inline(always)]
pub fn sums<P: Product, const R: usize, const C: usize>(p: P, lanes: &[[Lanes<P>; C]; R]) -> [[f32; C]; R] {
    let isa = p.isa();
    let mut result = [[0.0; C]; R];
    let mut at = 0;
    while at < R * C {
        let mut four = [isa.splat(0.0); 4];
        for (index, lane) in four.iter_mut().enumerate() {
            if at + index < R * C {
                *lane = lanes[(at + index) / C][(at + index) % C];
            }
        }
        let summed = isa.sums(four);
        for (index, sum) in summed.into_iter().enumerate() {
            if at + index < R * C {
                result[(at + index) / C][(at + index) % C] = sum;
            }
        }
        at += 4;
    }
    result
}
