//! What the scheduler costs per step, with 1,000 to 1,000,000 requests in its queue: the same, or planning would come to
//! cost more than the device. Each request that finishes is replaced by a new one, so the queue keeps its length.

use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion};
use pagoda_engine::scheduler::{Limits, Request, Scheduler, Step};
use pagoda_engine::stop::StopRule;
use pagoda_engine::units::{PageSize, SampleId, Slot};

/// Levanter's default engine: 256 slots.
const SLOTS: usize = 256;

/// Prompts of 100 to 199 tokens in groups of four samples, each of up to 64 new tokens.
fn request(number: usize) -> Request {
    let index = number / 4;
    Request {
        id: SampleId { round: 0, index, generation: (number % 4) as u32 },
        prompt: (0..100 + index % 100).map(|at| (index + at) as u32).collect(),
        max_new_tokens: 1 + number % 64,
    }
}

fn scheduler(queued: usize) -> Scheduler {
    let page_size = PageSize::new(128).expect("not zero");
    let limits = Limits {
        max_seq_len: 512,
        max_seqs: SLOTS,
        max_pages: SLOTS * page_size.pages_for(512),
        page_size,
        max_seqs_in_prefill: 16,
        max_prefill_size: 1024,
        max_rounds: 32,
    };
    let mut scheduler = Scheduler::new(limits, StopRule::default()).with_mixed_steps(true);
    (0..queued).for_each(|number| scheduler.push(request(number)).expect("it fits"));
    scheduler
}

/// Plans a step and records what it would sample; `next` is the number of the next request.
fn step(scheduler: &mut Scheduler, next: &mut usize) {
    let sampled: Vec<(Slot, usize)> = match scheduler.next() {
        Step::Done => Vec::new(),
        Step::Prefill(rows) => rows.iter().filter(|row| row.samples).map(|row| (row.slot, 1)).collect(),
        Step::Decode { rows, rounds } => rows.iter().map(|row| (row.slot, rounds)).collect(),
    };
    for (slot, tokens) in sampled {
        if scheduler.record(slot, &vec![7; tokens]).is_some() {
            scheduler.push(request(*next)).expect("it fits");
            *next += 1;
        }
    }
}

fn main() {
    let mut criterion =
        Criterion::default().sample_size(10).measurement_time(Duration::from_secs(3)).configure_from_args();
    let mut group = criterion.benchmark_group("scheduler step");
    for queued in [1_000, 100_000, 1_000_000] {
        let (mut scheduler, mut next) = (scheduler(queued), queued);
        (0..100).for_each(|_| step(&mut scheduler, &mut next));
        group.bench_function(BenchmarkId::from_parameter(queued), |bencher| {
            bencher.iter_custom(|iterations| {
                let started = Instant::now();
                (0..iterations).for_each(|_| step(&mut scheduler, &mut next));
                started.elapsed()
            });
        });
    }
    group.finish();
    criterion.final_summary();
}
