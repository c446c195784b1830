//! Work that is cut into pieces, on threads that are lent for the duration of a call.
//!
//! Work comes in two kinds. What borrows from the caller ([`share`]) is waited for: a thread that was preempted with a piece
//! holds the caller up. The caller then sleeps, which leaves it its core, and remembers: for some multiple of what it lost, such
//! work stays on its own thread. What owns all that it reads ([`race`]) is not waited for: a piece that is late is done again by
//! the caller, and what comes of it elsewhere is dropped.
//!
//! A decode step calls hundreds of kernels, microseconds apart, and to wake a thread takes as long as a small one. So a thread
//! whose help is done stays for a moment, and takes what is lent next at once ([`Staying`]). Where pieces come late, others have use
//! for the core: then no thread stays, and a race of few pieces is the caller's alone.
//!
//! Invariants: [`share`] returns, or unwinds, only when no thread will look at the work any more; a panic in a piece becomes
//! a panic of the caller, after all pieces; a thread that comes late finds nothing left, and nobody waits for it.

use std::ffi::c_void;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use std::thread::Thread;
use std::time::{Duration, Instant};

use pagoda_kernels::threads::{Elsewhere, Threads};

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
        // Of a share of the machine (affinity, a container's quota) as many threads as it has cores.
        static CORES: LazyLock<usize> =
            LazyLock::new(|| std::thread::available_parallelism().map_or(usize::MAX, |cores| cores.get()));
        Self { raw, count: raw.thread_count().clamp(1, *CORES) }
    }

    /// Gives a helper to one of XLA's threads, if it takes it, and if those are not behind already: on a busy machine helpers
    /// would queue up, with what they hold, for threads that do not come to run.
    fn lend(&self, helper: Helper) {
        /// Helpers that have not begun.
        static QUEUED: AtomicUsize = AtomicUsize::new(0);
        /// # Safety
        /// `data` is a helper given away by `into_raw`.
        unsafe extern "C" fn help(data: *mut c_void) {
            QUEUED.fetch_sub(1, Ordering::Relaxed);
            // SAFETY: by contract.
            let mut helper = Some(unsafe { Helper::from_raw(data) });
            while let Some(lent) = helper {
                lent.work();
                let is_busy = CAUTION.lasts() || BUSY.lasts();
                helper = if is_busy { None } else { STAYING.next(Staying::TIME) };
            }
        }
        let Err(helper) = STAYING.give(helper) else { return };
        if QUEUED.fetch_add(1, Ordering::Relaxed) >= 2 * self.count {
            QUEUED.fetch_sub(1, Ordering::Relaxed);
            return;
        }
        let data = helper.into_raw();
        // SAFETY: the helper may be used once, at any time and by any thread.
        if !unsafe { self.raw.schedule(help, data) } {
            QUEUED.fetch_sub(1, Ordering::Relaxed);
            // SAFETY: the task was refused and will not run.
            drop(unsafe { Helper::from_raw(data) });
        }
    }
}

impl Threads for Pool<'_> {
    fn count(&self) -> usize {
        self.count
    }

    fn run(&self, count: usize, work: &(dyn Fn(usize) + Sync)) {
        let most = if CAUTION.lasts() { 0 } else { self.count - 1 };
        share(count, work, most, |helper| self.lend(helper));
    }

    fn race(&self, count: usize, work: Arc<Elsewhere>, take: &mut dyn FnMut(usize, Option<Vec<f32>>)) {
        let alone = count <= Staying::PIECES && BUSY.lasts();
        let most = if alone { 0 } else { self.count - 1 };
        race(count, work, take, most, |helper| self.lend(helper));
    }
}

/// Threads that wait for another helper. As many wait as are free and as there are helpers for.
struct Staying {
    free: AtomicUsize,
    given: Mutex<Vec<Helper>>,
    /// How many those are, to look at without the lock.
    pending: AtomicUsize,
}

static STAYING: Staying = Staying::new();

impl Staying {
    /// Somewhat longer than what runs on one thread between two kernels: attention, in a decode step of one sequence.
    const TIME: Duration = Duration::from_micros(100);
    /// How long a time of caution is after a piece that was late: a host's other guest comes and goes, a busy neighbour stays.
    const AFTER_LATE: [Duration; 2] = [Duration::from_millis(5), Duration::from_millis(100)];
    /// Pieces, of some microseconds each, that are not worth waking a thread.
    const PIECES: usize = 4;

    const fn new() -> Self {
        Self { free: AtomicUsize::new(0), given: Mutex::new(Vec::new()), pending: AtomicUsize::new(0) }
    }

    /// Makes a free thread one that there is a helper for, or that goes.
    fn take_free(&self) -> bool {
        let one_less = |free: usize| free.checked_sub(1);
        self.free.fetch_update(Ordering::AcqRel, Ordering::Relaxed, one_less).is_ok()
    }

    /// Gives a helper to a thread that waits, or back.
    fn give(&self, helper: Helper) -> Result<(), Helper> {
        if !self.take_free() {
            return Err(helper);
        }
        self.given.lock().unwrap_or_else(PoisonError::into_inner).push(helper);
        self.pending.fetch_add(1, Ordering::Release);
        Ok(())
    }

    /// Waits for a helper; after `time`, for none that is not on its way.
    fn next(&self, time: Duration) -> Option<Helper> {
        /// Looks that are cheaper than one at the clock.
        const LOOKS: u32 = 32;
        let started = Instant::now();
        self.free.fetch_add(1, Ordering::AcqRel);
        loop {
            for _ in 0..LOOKS {
                if self.pending.load(Ordering::Acquire) > 0
                    && let Some(helper) = self.given.lock().unwrap_or_else(PoisonError::into_inner).pop()
                {
                    self.pending.fetch_sub(1, Ordering::Relaxed);
                    return Some(helper);
                }
                std::hint::spin_loop();
            }
            if started.elapsed() > time && self.take_free() {
                return None;
            }
        }
    }
}

/// A time of caution, that may last.
struct Caution {
    since: LazyLock<Instant>,
    /// Nanoseconds since then.
    until: AtomicU64,
    /// How long the last one was, in nanoseconds.
    length: AtomicU64,
}

/// While it lasts, work that is waited for stays on the caller's thread.
static CAUTION: Caution = Caution::new();

/// While it lasts, threads do not stay: a piece of a race came late, so others have use for the core.
static BUSY: Caution = Caution::new();

impl Caution {
    /// What is no preemption: a piece that takes long, or a thread that wakes up.
    const TOLERATED: Duration = Duration::from_micros(500);
    /// How many times what was lost is waited.
    const TIMES: u32 = 8;

    const fn new() -> Self {
        Self { since: LazyLock::new(Instant::now), until: AtomicU64::new(0), length: AtomicU64::new(0) }
    }

    fn now(&self) -> u64 {
        Self::nanoseconds(self.since.elapsed())
    }

    fn lasts(&self) -> bool {
        let until = self.until.load(Ordering::Relaxed);
        until > 0 && self.now() < until
    }

    fn was_held_up(&self, lost: Duration) {
        if lost > Self::TOLERATED {
            self.begin(lost * Self::TIMES);
        }
    }

    fn begin(&self, time: Duration) {
        let time = Self::nanoseconds(time);
        self.length.store(time, Ordering::Relaxed);
        self.until.store(self.now().saturating_add(time), Ordering::Relaxed);
    }

    /// Begins one of the least length, or of twice the last one's where that has ended no longer ago than it lasted.
    fn begin_anew(&self, [least, most]: [Duration; 2]) {
        let (until, length) = (self.until.load(Ordering::Relaxed), self.length.load(Ordering::Relaxed));
        let again = length > 0 && self.now() < until.saturating_add(length);
        self.begin(if again { Duration::from_nanos(length).saturating_mul(2).clamp(least, most) } else { least });
    }

    fn nanoseconds(time: Duration) -> u64 {
        u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
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
    let (panicked, caller) = (AtomicBool::new(false), std::thread::current());
    let owner = Owner(Arc::new(Pieces { work, count, next, done, panicked, caller }));
    for _ in 0..most.min(count.saturating_sub(1)) {
        lend(Helper::Shared(Arc::clone(&owner.0)));
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
    caller: Thread,
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
            if self.done.fetch_add(1, Ordering::Release) + 1 == self.count {
                self.caller.unpark();
            }
        }
    }
}

/// A thread's share of the work.
enum Helper {
    Shared(Arc<Pieces>),
    Racing(Arc<Race>),
}

impl Helper {
    fn work(self) {
        match self {
            Self::Shared(pieces) => pieces.take_all(),
            Self::Racing(race) => race.make_all(),
        }
    }

    fn into_raw(self) -> *mut c_void {
        Box::into_raw(Box::new(self)).cast()
    }

    /// # Safety
    /// `data` came from [`into_raw`](Self::into_raw) and is not used again.
    unsafe fn from_raw(data: *mut c_void) -> Self {
        // SAFETY: by contract.
        *unsafe { Box::from_raw(data.cast::<Self>()) }
    }
}

/// Whose work it is. It takes pieces too, and goes when all are done, also when `lend` panics.
struct Owner(Arc<Pieces>);

impl Drop for Owner {
    fn drop(&mut self) {
        /// A piece that runs is done within this time more often than not; asleep, the caller would be woken late.
        const SPINS: u32 = 1 << 12;
        self.0.take_all();
        let all_done = || self.0.done.load(Ordering::Acquire) >= self.0.count;
        for _ in 0..SPINS {
            if all_done() {
                return;
            }
            std::hint::spin_loop();
        }
        let started = Instant::now();
        while !all_done() {
            // Asleep, it leaves its core to whoever has the piece.
            std::thread::park_timeout(Duration::from_millis(1));
        }
        CAUTION.was_held_up(started.elapsed());
    }
}

/// Has up to `most` others, to which `lend` gives helpers, make pieces, while this thread takes the others with `take(piece,
/// None)`; then takes those over that were made, and all that are late.
fn race(
    count: usize,
    work: Arc<Elsewhere>,
    take: &mut dyn FnMut(usize, Option<Vec<f32>>),
    most: usize,
    mut lend: impl FnMut(Helper),
) {
    let made = (0..count).map(|_| Mutex::new(Made::Open)).collect();
    let race = Arc::new(Race { work, next: AtomicUsize::new(0), made });
    for _ in 0..most.min(count.saturating_sub(1)) {
        lend(Helper::Racing(Arc::clone(&race)));
    }
    let started = Instant::now();
    let mut own = vec![false; count];
    while let Some(piece) = race.next_piece() {
        own[piece] = true;
        take(piece, None);
    }
    let done = own.iter().filter(|&&own| own).count();
    // As long as a piece takes here it may still come from elsewhere.
    let deadline = started.elapsed() + started.elapsed() / done.max(1) as u32;
    for piece in (0..count).filter(|&piece| !own[piece]) {
        let made = loop {
            let mut slot = race.made[piece].lock().unwrap_or_else(PoisonError::into_inner);
            let late = started.elapsed() > deadline;
            match std::mem::replace(&mut *slot, if late { Made::Late } else { Made::Open }) {
                Made::Done(made) => break Some(made),
                _ if late => {
                    BUSY.begin_anew(Staying::AFTER_LATE);
                    break None;
                }
                _ => drop(slot),
            }
            std::hint::spin_loop();
        };
        take(piece, made);
    }
}

/// Pieces that others make.
struct Race {
    work: Arc<Elsewhere>,
    next: AtomicUsize,
    made: Vec<Mutex<Made>>,
}

/// What has become of a piece.
enum Made {
    /// Nothing yet.
    Open,
    Done(Vec<f32>),
    /// The caller does it: what comes is dropped.
    Late,
}

impl Race {
    fn next_piece(&self) -> Option<usize> {
        Some(self.next.fetch_add(1, Ordering::Relaxed)).filter(|&piece| piece < self.made.len())
    }

    fn make_all(&self) {
        while let Some(piece) = self.next_piece() {
            // A piece that panics is late: the caller does it, and panics.
            let Ok(made) = catch_unwind(AssertUnwindSafe(|| (self.work)(piece))) else { return };
            let mut slot = self.made[piece].lock().unwrap_or_else(PoisonError::into_inner);
            if matches!(*slot, Made::Open) {
                *slot = Made::Done(made);
            }
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

    /// Helpers that are on time, that come too late, that never return, and that panic.
    #[test]
    fn a_race_takes_every_piece_once_whoever_is_late() {
        let hang: Arc<Mutex<()>> = Arc::default();
        let held = hang.lock().unwrap();
        type Work = fn(usize, &Mutex<()>);
        let works: [Work; 3] =
            [|_, _| (), |piece, _| assert_ne!(piece % 3, 1, "as asked"), |_, hang| drop(hang.lock())];
        for (count, most, work) in [(0, 3, 0), (1, 3, 0), (7, 0, 2), (50, 3, 0), (50, 3, 1), (9, 2, 2)] {
            let mut taken = vec![0; count];
            let (seen, threads) = (Arc::clone(&hang), Mutex::new(Vec::new()));
            let made: Arc<Elsewhere> = Arc::new(move |piece| {
                works[work](piece, &seen);
                vec![piece as f32]
            });
            let mut take = |piece: usize, made: Option<Vec<f32>>| {
                taken[piece] += 1;
                assert!(made.is_none_or(|made| made == [piece as f32]));
            };
            let lend = |helper: Helper| threads.lock().unwrap().push(std::thread::spawn(|| helper.work()));
            race(count, made, &mut take, most, lend);
            assert_eq!(taken, vec![1; count], "{count} pieces, {most} helpers, work {work}");
        }
        drop(held);
    }

    #[test]
    fn who_was_held_up_is_alone_for_a_while() {
        let caution = Caution::new();
        caution.was_held_up(Caution::TOLERATED);
        assert!(!caution.lasts());
        caution.was_held_up(Duration::from_secs(100));
        assert!(caution.lasts());
    }

    #[test]
    fn caution_grows_while_what_it_is_for_comes_back() {
        let caution = Caution::new();
        let length = || caution.length.load(Ordering::Relaxed) / 1_000_000;
        let lengths: Vec<_> = (0..5)
            .map(|_| {
                caution.begin_anew([Duration::from_millis(200), Duration::from_secs(1)]);
                length()
            })
            .collect();
        assert_eq!(lengths, [200, 400, 800, 1000, 1000]);
        let caution = Caution::new();
        caution.begin(Duration::from_nanos(1));
        std::thread::sleep(Duration::from_millis(1));
        caution.begin_anew([Duration::from_millis(200), Duration::from_secs(1)]);
        assert_eq!(caution.length.load(Ordering::Relaxed), 200_000_000, "what is over does not count");
    }

    /// Threads that come and go, and helpers that are given to them: none is lost, and no thread is kept.
    #[test]
    fn what_is_given_to_threads_that_stay_is_done() {
        let (staying, runs) = (Staying::new(), AtomicUsize::new(0));
        let work = |_| {
            runs.fetch_add(1, Ordering::Relaxed);
        };
        let mut given = 0;
        std::thread::scope(|scope| {
            let stay = |time| {
                let staying = &staying;
                move || std::iter::from_fn(|| staying.next(Duration::from_micros(time))).for_each(Helper::work)
            };
            (0..3).for_each(|_| drop(scope.spawn(stay(20_000))));
            let end = Instant::now() + Duration::from_millis(60);
            while Instant::now() < end {
                share(4, &work, 3, |helper| given += usize::from(staying.give(helper).is_ok()));
            }
        });
        assert!(given > 0 && runs.into_inner().is_multiple_of(4));
        assert!(staying.next(Duration::ZERO).is_none() && !staying.take_free(), "nobody stays, nothing is left");
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
