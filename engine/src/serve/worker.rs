//! The one thread that owns the engine: jobs come in through a channel, tokens go out through one per job.
//!
//! Invariants: every job that was taken gets exactly one [`Event::Ended`] or [`Event::Failed`], as its last event, unless nobody
//! listens any more; a job that nobody listens to loses its slot and its pages before the next host call; an error of the device
//! ends the jobs that run and wait, not the server.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::Instant;

use tokio::sync::mpsc::UnboundedSender;

use super::metrics::Metrics;
use crate::error::Error;
use crate::generate::{Draw, Engine};
use crate::scheduler::{Finished, Request};
use crate::stop::FinishReason;
use crate::units::SampleId;

/// A sample that somebody waits for.
pub(super) struct Job {
    pub(super) prompt: Arc<[u32]>,
    pub(super) max_new_tokens: usize,
    pub(super) draw: Draw,
    /// Closed by whoever does not want it any more.
    pub(super) events: UnboundedSender<Event>,
}

/// What becomes of a job.
#[derive(Debug)]
pub(super) enum Event {
    /// Sampled since the last event, each with the logarithm of its probability where the job asks for it.
    Tokens(Vec<(u32, Option<f32>)>),
    /// It is done. Its end-of-text token was sampled, and is not part of the text.
    Ended { reason: FinishReason, sampled: usize },
    /// The device failed, or the request was refused.
    Failed(String),
}

/// A job that was submitted.
struct Live {
    events: UnboundedSender<Event>,
    /// Tokens that were sent.
    sent: usize,
    arrived: Instant,
    last: Instant,
}

/// Runs jobs until nobody can send any more, and all are done.
pub(super) fn work(mut engine: Engine, jobs: &Receiver<Vec<Job>>, metrics: &Metrics) {
    let mut live: HashMap<SampleId, Live> = HashMap::new();
    let mut count = 0;
    loop {
        let first = if live.is_empty() {
            metrics.pages.set(0);
            match jobs.recv() {
                Ok(jobs) => jobs,
                Err(_) => return,
            }
        } else {
            Vec::new()
        };
        for job in first.into_iter().chain(jobs.try_iter().flatten()) {
            let Job { prompt, max_new_tokens, draw, events } = job;
            let id = SampleId { round: 0, index: count, generation: 0 };
            count += 1;
            metrics.prompt_tokens.inc_by(prompt.len() as u64);
            match engine.submit_drawn(Request { id, prompt, max_new_tokens }, draw) {
                Ok(()) => {
                    let now = Instant::now();
                    live.insert(id, Live { events, sent: 0, arrived: now, last: now });
                }
                Err(error) => drop(events.send(Event::Failed(error.to_string()))),
            }
        }
        let gone: Vec<_> = live.iter().filter(|(_, job)| job.events.is_closed()).map(|(&id, _)| id).collect();
        for id in gone {
            live.remove(&id);
            engine.cancel(id);
            metrics.cancelled.inc();
        }
        match engine.poll() {
            Ok(finished) => {
                if finished.is_some() {
                    metrics.called(&engine.progress().step);
                }
                for (id, sampled) in engine.running() {
                    if let Some(job) = live.get_mut(&id) {
                        job.send(sampled, engine.log_probabilities(id), metrics);
                    }
                }
                for Finished { id, tokens, text_tokens, reason, .. } in finished.unwrap_or_default() {
                    let Some(mut job) = live.remove(&id) else { continue };
                    job.send(&tokens[..text_tokens.max(job.sent)], engine.log_probabilities(id), metrics);
                    // Whoever has gone away meanwhile does not mind.
                    let _ = job.events.send(Event::Ended { reason, sampled: tokens.len() });
                    metrics.finished.inc();
                }
            }
            Err(error) => fail(&mut live, &error, metrics),
        }
        let progress = engine.progress();
        metrics.running.set(progress.active as i64);
        metrics.waiting.set(progress.waiting as i64);
        metrics.pages.set(progress.pages_used as i64);
    }
}

fn fail(live: &mut HashMap<SampleId, Live>, error: &Error, metrics: &Metrics) {
    log::error!("{} requests are lost: {error}", live.len());
    for (_, job) in live.drain() {
        let _ = job.events.send(Event::Failed(error.to_string()));
        metrics.failed.inc();
    }
}

impl Live {
    /// Sends what is new of all `sampled` tokens.
    fn send(&mut self, sampled: &[u32], log_probabilities: &[f32], metrics: &Metrics) {
        let likely = |at| log_probabilities.get(at).copied();
        let new: Vec<_> = (self.sent..sampled.len()).map(|at| (sampled[at], likely(at))).collect();
        if new.is_empty() {
            return;
        }
        let now = Instant::now();
        if self.sent == 0 {
            metrics.first_token.observe((now - self.arrived).as_secs_f64());
        } else {
            // The tokens of one host call come together: each counts with its share of the time.
            let each = (now - self.last).as_secs_f64() / new.len() as f64;
            new.iter().for_each(|_| metrics.inter_token.observe(each));
        }
        metrics.tokens.inc_by(new.len() as u64);
        (self.sent, self.last) = (sampled.len(), now);
        let _ = self.events.send(Event::Tokens(new));
    }
}
