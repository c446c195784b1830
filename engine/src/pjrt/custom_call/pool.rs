//! Work that is cut into pieces, on threads that are lent for the duration of a call.
//!
//! Invariants: [`share`] returns, or unwinds, only when no thread will look at the work any more; a panic in a piece becomes
//! a panic of the caller, after all pieces; a thread that comes late finds nothing left, and nobody waits for it.

use std::ffi::c_void;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use pagoda_kernels::threads::Threads;

use super::ffi::RawFrame;

/// XLA's intra-op threads, see [`Options::threads`](super::Options::threads).
pub struct Pool<'a> {
    raw: &'a RawFrame,
    count: usize,
}

// SAFETY: the frame is only read, and XLA's scheduling function may be called from any thread.
unsafe impl Sync for Pool<'_> {}

impl<'a> Pool<'a> {
    pub(super) fn of(raw: &'a RawFrame) -> Self {
        Self { raw, count: raw.thread_count().max(1) }
    }
}

impl Threads for Pool<'_> {
    fn count(&self) -> usize {
        self.count
    }

    fn run(&self, count: usize, work: &(dyn Fn(usize) + Sync)) {
        /// # Safety
        /// `data` is a helper given away by `into_raw`.
        unsafe extern "C" fn help(data: *mut c_void) {
            // SAFETY: by contract.
            unsafe { Helper::from_raw(data) }.work();
        }
        share(count, work, self.count - 1, |helper| {
            let data = helper.into_raw();
            // SAFETY: the helper may be used once, at any time and by any thread.
            if !unsafe { self.raw.schedule(help, data) } {
                // SAFETY: the task was refused and will not run.
                drop(unsafe { Helper::from_raw(data) });
            }
        });
    }
}

/// Runs `work(0)` to `work(count - 1)`, on this thread and on up to `most` others, to which `lend` gives helpers.
///
/// # Panics
/// When a piece does.
fn share(count: usize, work: &(dyn Fn(usize) + Sync), most: usize, mut lend: impl FnMut(Helper)) {
    // SAFETY: only the lifetime goes; the owner below does not let go of this frame before the last use, see `Pieces::work`.
    let work = unsafe {
        std::mem::transmute::<*const (dyn Fn(usize) + Sync + '_), *const (dyn Fn(usize) + Sync + 'static)>(work)
    };
    let (next, done) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let owner = Owner(Arc::new(Pieces { work, count, next, done, panicked: AtomicBool::new(false) }));
    for _ in 0..most.min(count.saturating_sub(1)) {
        lend(Helper(Arc::clone(&owner.0)));
    }
    let pieces = Arc::clone(&owner.0);
    drop(owner);
    assert!(!pieces.panicked.load(Ordering::Relaxed), "a piece of work panicked");
}

/// Pieces of work that threads take one after the other.
struct Pieces {
    /// What runs a piece. Alive while `done < count`: whoever has taken a piece keeps the owner waiting.
    work: *const (dyn Fn(usize) + Sync),
    count: usize,
    next: AtomicUsize,
    done: AtomicUsize,
    panicked: AtomicBool,
}

// SAFETY: `work` may be called from any thread; the rest is atomic.
unsafe impl Send for Pieces {}
// SAFETY: as above.
unsafe impl Sync for Pieces {}

impl Pieces {
    fn take_all(&self) {
        loop {
            let piece = self.next.fetch_add(1, Ordering::Relaxed);
            if piece >= self.count {
                return;
            }
            // SAFETY: this piece is not done yet, so the owner still waits, and what the work borrows is alive.
            let work = unsafe { &*self.work };
            if catch_unwind(AssertUnwindSafe(|| work(piece))).is_err() {
                self.panicked.store(true, Ordering::Relaxed);
            }
            self.done.fetch_add(1, Ordering::Release);
        }
    }
}

/// A thread's share of the work.
struct Helper(Arc<Pieces>);

impl Helper {
    fn work(self) {
        self.0.take_all();
    }

    fn into_raw(self) -> *mut c_void {
        Arc::into_raw(self.0).cast_mut().cast()
    }

    /// # Safety
    /// `data` came from [`into_raw`](Self::into_raw) and is not used again.
    unsafe fn from_raw(data: *mut c_void) -> Self {
        // SAFETY: by contract.
        Self(unsafe { Arc::from_raw(data.cast::<Pieces>()) })
    }
}

/// Whose work it is. It takes pieces too, and goes when all are done, also when `lend` panics.
struct Owner(Arc<Pieces>);

impl Drop for Owner {
    fn drop(&mut self) {
        self.0.take_all();
        let mut spins = 0_u32;
        while self.0.done.load(Ordering::Acquire) < self.0.count {
            spins = spins.wrapping_add(1);
            if spins.is_multiple_of(1024) { std::thread::yield_now() } else { std::hint::spin_loop() }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::thread::JoinHandle;

    use super::*;

    /// Runs `count` pieces with `most` helpers on threads of their own; how often each piece ran.
    fn shared(count: usize, most: usize, piece: impl Fn(usize) + Sync) -> Vec<usize> {
        let runs: Vec<_> = (0..count).map(|_| AtomicUsize::new(0)).collect();
        let threads: Mutex<Vec<JoinHandle<()>>> = Mutex::default();
        let work = |index: usize| {
            runs[index].fetch_add(1, Ordering::Relaxed);
            piece(index);
        };
        let lend = |helper: Helper| threads.lock().unwrap().push(std::thread::spawn(|| helper.work()));
        let outcome = catch_unwind(AssertUnwindSafe(|| share(count, &work, most, lend)));
        let late = threads.into_inner().unwrap();
        let runs = runs.iter().map(|runs| runs.load(Ordering::Relaxed)).collect();
        late.into_iter().for_each(|thread| thread.join().unwrap());
        outcome.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        runs
    }

    #[test]
    fn every_piece_runs_once_before_the_call_returns() {
        for (count, most) in [(0, 3), (1, 3), (2, 0), (7, 3), (100, 2)] {
            assert_eq!(shared(count, most, |_| ()), vec![1; count], "{count} pieces, {most} helpers");
        }
    }

    #[test]
    fn a_panic_is_the_callers_after_all_pieces() {
        let others = AtomicUsize::new(0);
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            shared(20, 3, |piece| {
                assert_ne!(piece, 3, "as asked");
                others.fetch_add(1, Ordering::Relaxed);
            })
        }));
        assert!(outcome.is_err());
        assert_eq!(others.into_inner(), 19);
    }

    #[test]
    fn refused_helpers_and_a_panicking_lender_leave_no_piece_behind() {
        let runs = AtomicUsize::new(0);
        let work = |_| {
            runs.fetch_add(1, Ordering::Relaxed);
        };
        share(5, &work, 4, drop);
        assert!(catch_unwind(AssertUnwindSafe(|| share(5, &work, 4, |_| panic!("as asked")))).is_err());
        assert_eq!(runs.into_inner(), 10);
    }
}
