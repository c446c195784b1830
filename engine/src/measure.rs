//! Times: a call repeated until its median is known well enough, and what a machine can do at most.

use std::sync::Arc;
use std::time::{Duration, Instant};

use pagoda_ir::Element;
use pagoda_kernels::chips::Chip;
use pagoda_kernels::rates;
use pagoda_kernels::threads::{Elsewhere, Threads};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// When a measurement ends.
#[derive(Clone, Copy, Debug)]
pub struct Until {
    /// Width of the median's interval, of the median.
    pub relative: f64,
    /// Runs, at least.
    pub least: usize,
    /// Time of all runs, beyond the least.
    pub budget: Duration,
}

/// Times of runs, in seconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Times {
    /// How many.
    pub runs: usize,
    /// The median.
    pub median: f64,
    /// Where the median of all runs lies at 95%, from the order of these.
    pub interval: [f64; 2],
    /// The shortest.
    pub least: f64,
    /// The longest.
    pub most: f64,
    /// A quarter is below the first, a quarter above the second.
    pub quartiles: [f64; 2],
    /// Whether the interval became as narrow as was asked for.
    pub narrow: bool,
}

impl Times {
    /// Of seconds in any order, at least one.
    fn of(mut seconds: Vec<f64>, relative: f64) -> Self {
        seconds.sort_by(f64::total_cmp);
        let runs = seconds.len();
        let at = |place: f64| seconds[(place.max(0.0) as usize).min(runs - 1)];
        // How many of the runs are below the true median is binomial: 1.96 standard deviations either way.
        let (half, reach) = (runs as f64 / 2.0, 0.98 * (runs as f64).sqrt());
        let median = (seconds[(runs - 1) / 2] + seconds[runs / 2]) / 2.0;
        let interval = [at((half - reach).floor()), at((half + reach).ceil())];
        let (least, most) = (seconds[0], seconds[runs - 1]);
        let quartiles = [at(runs as f64 * 0.25), at(runs as f64 * 0.75)];
        Self { runs, median, interval, least, most, quartiles, narrow: interval[1] - interval[0] <= relative * median }
    }
}

/// Runs `once` a few times, then until its median is known well enough, or the time is spent.
///
/// # Errors
/// The first of `once`.
pub fn times(until: Until, mut once: impl FnMut() -> Result<Duration>) -> Result<Times> {
    const WARM_UP: usize = 3;
    for _ in 0..WARM_UP {
        once()?;
    }
    let (started, mut seconds) = (Instant::now(), Vec::new());
    loop {
        seconds.push(once()?.as_secs_f64());
        // Sorting after every run would cost more than short runs.
        let due =
            seconds.len() >= until.least.max(1) && seconds.len().is_power_of_two() || started.elapsed() >= until.budget;
        if due && seconds.len() >= until.least {
            let times = Times::of(seconds.clone(), until.relative);
            if times.narrow || started.elapsed() >= until.budget {
                return Ok(times);
            }
        }
    }
}

/// What a device can do at most.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Rates {
    /// Floating-point operations a second.
    pub flop_s: f64,
    /// Bytes of memory read a second.
    pub byte_s: f64,
    /// Where the figures come from.
    pub from: String,
}

impl Rates {
    /// The vendor's.
    pub fn of_chip(chip: Chip) -> Self {
        let info = chip.info();
        let (flop_s, byte_s) = (info.peak_flops(), info.hbm_bandwidth.0);
        Self { flop_s, byte_s, from: format!("{chip}: the vendor's, bf16") }
    }

    /// This machine's, measured now: multiply-adds of `element` in registers, and memory that is read, on all cores.
    pub fn of_this_machine(element: Element) -> Self {
        /// Far more than the caches hold.
        const WORDS: usize = 64 << 20;
        /// The best counts: others use the machine, too.
        const TIMES: usize = 16;
        let rounds = 1 << 20;
        let cores = rayon::current_num_threads();
        let best = |work: &dyn Fn() -> f64| {
            let rate = |_| {
                let started = Instant::now();
                work() / started.elapsed().as_secs_f64()
            };
            (0..TIMES).map(rate).fold(0.0, f64::max)
        };
        let multiply_adds = || {
            let of_core = |_| match element {
                Element::Bf16 => rates::multiply_adds_bf16(rounds),
                _ => rates::multiply_adds_f32(rounds),
            };
            (0..cores).into_par_iter().map(of_core).sum::<u64>() as f64
        };
        let words = vec![1.0_f32; WORDS];
        let part = WORDS / cores.max(1) / 64 * 64;
        let read = || {
            let sum: f32 = words.par_chunks_exact(part).map(rates::read).sum();
            std::hint::black_box(sum);
            (cores * part * size_of::<f32>()) as f64
        };
        let (flop_s, byte_s) = (best(&multiply_adds), best(&read));
        Self {
            flop_s,
            byte_s,
            from: format!("measured: {element} multiply-adds in registers, memory read; {cores} cores"),
        }
    }

    /// Seconds that so much work takes at least.
    pub fn floor(&self, flops: f64, bytes: f64) -> f64 {
        (flops / self.flop_s).max(bytes / self.byte_s)
    }
}

/// The threads of a pool of this process, one per core.
#[derive(Clone, Copy, Debug)]
pub struct Cores;

impl Threads for Cores {
    fn count(&self) -> usize {
        rayon::current_num_threads()
    }

    fn run(&self, pieces: usize, work: &(dyn Fn(usize) + Sync)) {
        (0..pieces).into_par_iter().with_max_len(1).for_each(work);
    }

    fn race(&self, pieces: usize, work: Arc<Elsewhere>, take: &mut dyn FnMut(usize, Option<Vec<f32>>)) {
        let made: Vec<Vec<f32>> = (0..pieces).into_par_iter().with_max_len(1).map(|piece| work(piece)).collect();
        made.into_iter().enumerate().for_each(|(piece, made)| take(piece, Some(made)));
    }
}

/// Time without runs is a setting that cannot work.
///
/// # Errors
/// When `seconds` is no positive number.
pub fn budget(key: &str, seconds: f64) -> Result<Duration> {
    let positive = Duration::try_from_secs_f64(seconds).ok().filter(|time| !time.is_zero());
    positive
        .ok_or_else(|| Error::setting(key, seconds, "leaves no time to measure", "give a positive number of seconds"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interval_narrows_with_the_runs() {
        let few = Times::of((0..9).map(f64::from).collect(), 0.1);
        assert_eq!((few.median, few.interval, few.least, few.most), (4.0, [1.0, 8.0], 0.0, 8.0));
        let many = Times::of((0..1001).map(|run| 100.0 + f64::from(run % 11)).collect(), 0.1);
        assert!(many.narrow && many.interval == [105.0, 105.0] && many.quartiles == [102.0, 108.0], "{many:?}");
        assert_eq!(Times::of(vec![3.0], 0.1).interval, [3.0, 3.0]);
    }

    #[test]
    fn a_measurement_ends_when_it_is_narrow_or_out_of_time() {
        let until = Until { relative: 0.05, least: 10, budget: Duration::from_secs(60) };
        let steady = times(until, || Ok(Duration::from_millis(3))).unwrap();
        assert_eq!((steady.runs, steady.median, steady.narrow), (16, 0.003, true));
        let mut calls = 0;
        let wild = times(Until { budget: Duration::ZERO, ..until }, || {
            calls += 1;
            Ok(Duration::from_secs(1 << (calls % 7)))
        });
        assert_eq!((wild.unwrap().runs, calls), (10, 13));
        assert!(budget("--seconds", 0.0).is_err() && budget("--seconds", f64::NAN).is_err());
    }

    #[test]
    fn the_larger_of_two_floors_counts() {
        let rates = Rates { flop_s: 10.0, byte_s: 2.0, from: String::new() };
        assert_eq!((rates.floor(100.0, 2.0), rates.floor(1.0, 8.0)), (10.0, 4.0));
    }
}
