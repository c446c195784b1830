//! What `/metrics` shows: counts, gauges and latencies, in Prometheus' text format.

use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

use crate::generate::StepReport;

/// 0.1 ms to about 100 s.
fn latency() -> Histogram {
    Histogram::new(exponential_buckets(1e-4, 2.0, 20))
}

/// `kind`, and which.
type ByKind = [(&'static str, &'static str); 1];

/// The metrics of a server.
pub(super) struct Metrics {
    registry: Registry,
    pub(super) running: Gauge,
    pub(super) waiting: Gauge,
    pub(super) pages: Gauge,
    pub(super) prompt_tokens: Counter,
    pub(super) tokens: Counter,
    pub(super) finished: Counter,
    pub(super) cancelled: Counter,
    pub(super) failed: Counter,
    pub(super) rejected: Counter,
    pub(super) first_token: Histogram,
    pub(super) inter_token: Histogram,
    host_calls: Family<ByKind, Histogram, fn() -> Histogram>,
}

impl Metrics {
    pub(super) fn new(slots: usize, pages: usize) -> Self {
        let mut metrics = Self {
            registry: Registry::with_prefix("pagoda"),
            running: Gauge::default(),
            waiting: Gauge::default(),
            pages: Gauge::default(),
            prompt_tokens: Counter::default(),
            tokens: Counter::default(),
            finished: Counter::default(),
            cancelled: Counter::default(),
            failed: Counter::default(),
            rejected: Counter::default(),
            first_token: latency(),
            inter_token: latency(),
            host_calls: Family::new_with_constructor(latency),
        };
        let (all_slots, all_pages) = (Gauge::<i64>::default(), Gauge::<i64>::default());
        all_slots.set(slots as i64);
        all_pages.set(pages as i64);
        let registry = &mut metrics.registry;
        registry.register("slots", "Sequences that can run at once", all_slots);
        registry.register("pages", "Pages of the KV cache", all_pages);
        registry.register("sequences_running", "Sequences that have a slot", metrics.running.clone());
        registry.register("sequences_waiting", "Sequences that wait for a slot", metrics.waiting.clone());
        registry.register("pages_used", "Pages that are reserved", metrics.pages.clone());
        registry.register("prompt_tokens", "Tokens of all prompts", metrics.prompt_tokens.clone());
        registry.register("generated_tokens", "Tokens sampled, as texts have them", metrics.tokens.clone());
        registry.register("sequences_finished", "Sequences that came to their end", metrics.finished.clone());
        registry.register("sequences_cancelled", "Sequences whose client went away", metrics.cancelled.clone());
        registry.register("sequences_failed", "Sequences that an error of the device ended", metrics.failed.clone());
        registry.register("requests_rejected", "Requests that met a full queue", metrics.rejected.clone());
        registry.register("time_to_first_token_seconds", "From arrival on", metrics.first_token.clone());
        registry.register("inter_token_latency_seconds", "Between tokens", metrics.inter_token.clone());
        registry.register("host_call_seconds", "Of each call of the engine, by its kind", metrics.host_calls.clone());
        metrics
    }

    /// Counts a call of the engine.
    pub(super) fn called(&self, step: &StepReport) {
        self.host_calls.get_or_create(&[("kind", step.kind.name())]).observe(step.total_s());
    }

    /// All of them, as text.
    pub(super) fn text(&self) -> String {
        let mut text = String::new();
        encode(&mut text, &self.registry).expect("a string takes any text");
        text
    }
}
