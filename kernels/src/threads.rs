//! Threads for the kernels in Rust, as their caller has them.
//!
//! A kernel splits its work into pieces that own their part of the result and asks [`Threads`] to run them; which thread
//! runs which piece never shows in the result.

use std::{
    any::Any,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

/// Something that runs pieces of work side by side.
pub trait Threads: Sync {
    /// How many pieces can run at once, the caller's own thread included.
    fn count(&self) -> usize;

    /// Calls `work` once for every piece in `0..pieces`, and returns when all are done.
    fn run(&self, pieces: usize, work: &(dyn Fn(usize) + Sync));

    /// Has the caller and whoever is free do the pieces `0..pieces`, and calls `take` once for each, on the caller's thread:
    /// with what `work` made of it elsewhere, or with nothing where the caller is to do it itself. Returns when all are taken,
    /// however late another thread is: that one's work is dropped.
    fn race(&self, pieces: usize, work: Arc<Elsewhere>, take: &mut dyn FnMut(usize, Option<Vec<f32>>)) {
        let _ = work;
        (0..pieces).for_each(|piece| take(piece, None));
    }
}

/// Makes a piece, and owns all that it reads: it may still run when nobody waits for it any more.
pub type Elsewhere = dyn Fn(usize) -> Vec<f32> + Send + Sync;

/// Keeps an array where it is, unwritten, for as long as it lives.
pub type Guard = Arc<dyn Any + Send + Sync>;

/// The caller's thread alone.
#[derive(Clone, Copy, Debug)]
pub struct Caller;

impl Threads for Caller {
    fn count(&self) -> usize {
        1
    }

    fn run(&self, pieces: usize, work: &(dyn Fn(usize) + Sync)) {
        (0..pieces).for_each(work);
    }
}

/// So many threads, started for every call: for tests and for callers without a pool.
#[derive(Clone, Copy, Debug)]
pub struct Scoped(pub usize);

impl Threads for Scoped {
    fn count(&self) -> usize {
        self.0
    }

    fn run(&self, pieces: usize, work: &(dyn Fn(usize) + Sync)) {
        let next = AtomicUsize::new(0);
        let take = || {
            while let Some(piece) = Some(next.fetch_add(1, Ordering::Relaxed)).filter(|piece| *piece < pieces) {
                work(piece);
            }
        };
        std::thread::scope(|scope| (0..self.0.min(pieces)).for_each(|_| drop(scope.spawn(take))));
    }

    /// Every other piece is made elsewhere, at the same time.
    fn race(&self, pieces: usize, work: Arc<Elsewhere>, take: &mut dyn FnMut(usize, Option<Vec<f32>>)) {
        std::thread::scope(|scope| {
            let work = &*work;
            let made: Vec<_> = (1..pieces).step_by(2).map(|piece| scope.spawn(move || work(piece))).collect();
            (0..pieces).step_by(2).for_each(|piece| take(piece, None));
            // A piece that panicked is the caller's, and panics there.
            made.into_iter().enumerate().for_each(|(index, made)| take(2 * index + 1, made.join().ok()));
        });
    }
}

/// Does `work` on every item.
pub fn for_each<T: Send>(threads: &dyn Threads, items: Vec<T>, work: impl Fn(T) + Sync) {
    if items.len() <= 1 {
        return items.into_iter().for_each(work);
    }
    // A lock per item, taken once: cheap beside what is worth a thread.
    let items: Vec<Mutex<Option<T>>> = items.into_iter().map(|item| Mutex::new(Some(item))).collect();
    threads.run(items.len(), &|piece| {
        let item = items[piece].lock().unwrap_or_else(PoisonError::into_inner).take();
        item.into_iter().for_each(&work);
    });
}
