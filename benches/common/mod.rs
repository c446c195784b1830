//! What the criterion benches share.

use std::time::{Duration, Instant};

use criterion::Bencher;

/// A routine for criterion that does `work`, and leaves in `mean` the mean time of what ran last: to be printed beside a
/// bound or another measurement.
pub fn timed<'m>(mean: &'m mut Duration, mut work: impl FnMut() + 'm) -> impl FnMut(&mut Bencher) + 'm {
    move |bencher| {
        bencher.iter_custom(|iterations| {
            let start = Instant::now();
            (0..iterations).for_each(|_| work());
            let elapsed = start.elapsed();
            *mean = elapsed / u32::try_from(iterations).unwrap_or(u32::MAX);
            elapsed
        });
    }
}
