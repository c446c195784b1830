//! Arrays that stay where they are, unwritten, until they are let go of: weights. A thread that is late may read them after the
//! call that it helped.
//!
//! Invariants: what a guard was given for is alive and unwritten while the guard lives: a [`Resident`] goes only when it is the
//! last to hold its own.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use pagoda_kernels::threads::Guard;

/// Where resident arrays begin, how many bytes they have, and what keeps them.
static RESIDENT: RwLock<BTreeMap<usize, (usize, Guard)>> = RwLock::new(BTreeMap::new());

/// An array that stays. To be dropped before what it is in.
pub(super) struct Resident {
    start: usize,
}

impl Resident {
    /// # Safety
    /// The bytes stay allocated, and nobody writes them, while this lives.
    pub(super) unsafe fn new(start: usize, bytes: usize) -> Self {
        let mut resident = RESIDENT.write().unwrap_or_else(PoisonError::into_inner);
        resident.insert(start, (bytes, Arc::new(())));
        Self { start }
    }
}

impl Drop for Resident {
    /// Waits until nobody reads the array any more: a few milliseconds at most.
    fn drop(&mut self) {
        let removed = RESIDENT.write().unwrap_or_else(PoisonError::into_inner).remove(&self.start);
        while removed.as_ref().is_some_and(|(_, guard)| Arc::strong_count(guard) > 1) {
            std::thread::sleep(Duration::from_micros(50));
        }
    }
}

/// What keeps an array, if it lies in one that stays.
pub fn guard<T>(values: &[T]) -> Option<Guard> {
    let resident = RESIDENT.read().unwrap_or_else(PoisonError::into_inner);
    let start = values.as_ptr().addr();
    let (first, (bytes, guard)) = resident.range(..=start).next_back()?;
    (start + size_of_val(values) <= first + bytes).then(|| Arc::clone(guard))
}

#[cfg(test)]
mod tests {
    use std::thread::spawn;

    use super::*;

    #[test]
    fn what_lies_in_a_resident_array_is_kept_until_its_readers_are_gone() {
        let array = vec![1u32; 100];
        // SAFETY: the array outlives it.
        let resident = unsafe { Resident::new(array.as_ptr().addr(), 400) };
        assert!(guard(&array[10..20]).is_some() && guard(&[0u8; 10]).is_none());
        let reader = guard(&array);
        let goes = spawn(move || drop(resident));
        while guard(&array).is_some() {
            std::thread::yield_now();
        }
        assert!(!goes.is_finished());
        drop(reader);
        goes.join().unwrap();
    }
}
