//! Where the time of a run went: every host call as the engine reports it, summed up for people and machines, and as a
//! timeline that Perfetto opens. Both are read from one record.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, Write};
use std::time::Duration;

use pagoda_ir::chrome_trace::ChromeTrace;
use serde::Serialize;
use serde_json::{Value, json};

use crate::generate::{Progress, StepKind, StepReport};

/// What happened, call by call.
#[derive(Clone, Debug, Default)]
pub struct Timeline {
    calls: Vec<Call>,
    decode_calls: usize,
    assembly: Duration,
    /// What came before the first call.
    pub start_up: StartUp,
}

/// A host call, and the engine after it.
#[derive(Clone, Copy, Debug)]
struct Call {
    step: StepReport,
    active: usize,
    waiting: usize,
    pages_used: usize,
}

/// Seconds from the start of the process to the first call, by what they went into.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct StartUp {
    /// Loading the plugin and creating its client.
    pub plugin_s: f64,
    /// Moving the weights to the device.
    pub load_s: f64,
    /// Emitting and compiling the step programs.
    pub compile_s: f64,
}

impl StartUp {
    /// All of them.
    pub fn total_s(&self) -> f64 {
        self.plugin_s + self.load_s + self.compile_s
    }
}

impl Timeline {
    /// Takes down a host call.
    pub fn record(&mut self, progress: &Progress) {
        let Progress { step, active, waiting, pages_used, .. } = *progress;
        self.decode_calls += usize::from(step.kind == StepKind::Decode);
        self.calls.push(Call { step, active, waiting, pages_used });
    }

    /// Adds the time that a finished sample took to become text, be stored and printed.
    pub fn assembled(&mut self, took: Duration) {
        self.assembly += took;
    }

    /// Decode calls so far.
    pub fn decode_calls(&self) -> usize {
        self.decode_calls
    }

    fn steps(&self, decode: bool) -> impl Iterator<Item = &StepReport> {
        self.calls.iter().map(|call| &call.step).filter(move |step| (step.kind == StepKind::Decode) == decode)
    }

    /// The run in numbers.
    pub fn summary(&self) -> Summary {
        let steps = || self.calls.iter().map(|call| &call.step);
        // Engines run side by side: what they took is what the longest took.
        let sum = |of: fn(&StepReport) -> f64, decode| {
            let mut engines = BTreeMap::<usize, f64>::new();
            for step in self.steps(decode) {
                *engines.entry(step.engine).or_default() += of(step);
            }
            engines.into_values().fold(0.0, f64::max)
        };
        let tokens = |decode| self.steps(decode).map(|step| step.tokens).sum::<usize>();
        let begins = steps().map(|step| step.start_s).fold(f64::INFINITY, f64::min);
        let ends = steps().map(|step| step.start_s + step.total_s()).fold(0.0, f64::max);
        let round_total_s = if begins.is_finite() { ends - begins } else { 0.0 };
        let first = steps().filter(|step| step.tokens > 0).map(|step| step.start_s + step.total_s());
        let spread = |of: fn(&StepReport) -> f64| Spread::of(self.steps(true).map(of).collect());
        let decode_total_s = sum(StepReport::total_s, true);
        let per_second = |tokens: usize, seconds: f64| if seconds > 0.0 { tokens as f64 / seconds } else { 0.0 };
        let generated = tokens(true) + tokens(false);
        let totals = Totals {
            decode_iters: self.decode_calls,
            decode_new_tokens: tokens(true),
            decode_total_s,
            decode_avg_tok_s: per_second(tokens(true), decode_total_s),
            round_total_generated: generated,
            round_total_s,
            round_avg_tok_s: per_second(generated, round_total_s),
            prefill_iters: self.steps(false).count(),
            prefill_total_s: sum(StepReport::total_s, false),
            prefill_extract_s: sum(|step| step.extract_s, false),
            assembly_s: self.assembly.as_secs_f64(),
            first_token_s: self.start_up.total_s() + first.fold(f64::INFINITY, f64::min).min(ends),
            start_up: self.start_up,
            decode_steps: sum(|step| step.rounds as f64, true) as usize,
            max_pages_used: self.calls.iter().map(|call| call.pages_used).max().unwrap_or(0),
        };
        let spreads = [
            ("iter_total", spread(StepReport::total_s)),
            ("submit", spread(|step| step.submit_s)),
            ("extract", spread(|step| step.extract_s)),
            ("host", spread(|step| step.plan_s)),
            ("device", spread(|step| step.device_s)),
        ];
        Summary { totals, spreads }
    }

    /// Writes the run as a timeline: per engine a track of its calls and what they consist of, and charts of sequences, pages
    /// and tokens.
    ///
    /// # Errors
    /// Those of `to`.
    pub fn write(&self, to: impl Write) -> io::Result<()> {
        let engines = self.calls.iter().map(|call| call.step.engine).max().map_or(0, |last| last + 1);
        let names: Vec<_> = (0..engines).map(|engine| format!("engine {engine}")).collect();
        let tracks = names.iter().enumerate().map(|(engine, name)| (track(engine), name.as_str()));
        let mut trace = ChromeTrace::new(to, "pagoda sample", tracks)?;
        let mut tokens = 0;
        for call in &self.calls {
            let (step, track) = (&call.step, track(call.step.engine));
            let name = format!("{} {}", step.kind.name(), step.sequences);
            let args = json!({
                "sequences": step.sequences, "rows": step.rows, "rounds": step.rounds, "tokens": step.tokens,
            });
            trace.span(track, &name, "call", micros(step.start_s), micros(step.total_s()), args)?;
            let parts = [
                ("plan", step.plan_s),
                ("submit", step.submit_s),
                ("device wait", step.device_s),
                ("extract and bookkeeping", step.extract_s),
            ];
            let mut at = step.start_s;
            for (name, length) in parts {
                trace.span(track, name, "part", micros(at), micros(length), json!({}))?;
                at += length;
            }
            tokens += step.tokens;
            trace.counter("sequences", micros(at), json!({ "active": call.active, "waiting": call.waiting }))?;
            trace.counter("KV pages", micros(at), json!({ "used": call.pages_used }))?;
            trace.counter("tokens", micros(at), json!({ "sampled": tokens }))?;
        }
        trace.finish()
    }
}

fn track(engine: usize) -> u32 {
    1 + u32::try_from(engine).unwrap_or(u32::MAX - 1)
}

fn micros(seconds: f64) -> f64 {
    (seconds * 1e9).round() / 1e3
}

/// A run in numbers, under the names of Levanter's "Decode perf summary", and some more.
#[derive(Clone, Copy, Debug)]
pub struct Summary {
    /// Sums over the run.
    pub totals: Totals,
    /// How the time of decode calls, and of what each consists of, is distributed.
    pub spreads: [(&'static str, Spread); 5],
}

/// Sums over a run. An iteration is a host call; a round is the whole run here, as nothing is reset in between. Times are in
/// seconds. Where engines ran side by side, calls and tokens are those of all of them, times and steps those of the engine that
/// took longest.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Totals {
    /// Decode calls.
    pub decode_iters: usize,
    /// Tokens sampled by them.
    pub decode_new_tokens: usize,
    /// Time spent in them.
    pub decode_total_s: f64,
    /// Tokens per second of it.
    pub decode_avg_tok_s: f64,
    /// All tokens sampled.
    pub round_total_generated: usize,
    /// From the first call to the end of the last.
    pub round_total_s: f64,
    /// Tokens per second of it.
    pub round_avg_tok_s: f64,
    /// Prefill calls.
    pub prefill_iters: usize,
    /// Time spent in them.
    pub prefill_total_s: f64,
    /// Of that, taking the tokens to their sequences.
    pub prefill_extract_s: f64,
    /// Turning finished samples into text, storing and printing them.
    pub assembly_s: f64,
    /// From the start of the process to the first token.
    pub first_token_s: f64,
    /// What came before the first call.
    #[serde(flatten)]
    pub start_up: StartUp,
    /// Decode steps on the device, of all decode calls.
    pub decode_steps: usize,
    /// The most pages in use.
    pub max_pages_used: usize,
}

/// How a time is distributed over decode calls, in seconds: the value that half, or nine tenths, do not exceed, and the
/// largest.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Spread {
    /// The median.
    pub p50: f64,
    /// The ninth decile.
    pub p90: f64,
    /// The largest.
    pub max: f64,
}

impl Spread {
    fn of(mut values: Vec<f64>) -> Self {
        values.sort_unstable_by(f64::total_cmp);
        // The nearest rank.
        let at =
            |share: f64| values.get(((values.len() as f64 * share).ceil() as usize).max(1) - 1).copied().unwrap_or(0.0);
        Self { p50: at(0.5), p90: at(0.9), max: at(1.0) }
    }
}

impl Summary {
    /// As one flat object: `{"decode_iters": 5, ..., "submit_s_p50": 0.001, ...}`.
    pub fn to_json(&self) -> Value {
        let mut all = serde_json::to_value(self.totals).expect("numbers are always JSON");
        for (name, Spread { p50, p90, max }) in self.spreads {
            for (rank, seconds) in [("p50", p50), ("p90", p90), ("max", max)] {
                all[format!("{name}_s_{rank}")] = seconds.into();
            }
        }
        all
    }
}

impl fmt::Display for Summary {
    /// Lines that begin with `#`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let totals = &self.totals;
        let StartUp { plugin_s, load_s, compile_s } = totals.start_up;
        writeln!(
            f,
            "# Decode perf summary: decode_iters={} decode_new_tokens={} decode_total_s={:.3} decode_avg_tok_s={:.1}",
            totals.decode_iters, totals.decode_new_tokens, totals.decode_total_s, totals.decode_avg_tok_s,
        )?;
        writeln!(
            f,
            "#   round_total_generated={} round_total_s={:.3} round_avg_tok_s={:.1} prefill_iters={} prefill_total_s={:.3} \
             prefill_extract_s={:.3} assembly_s={:.3}",
            totals.round_total_generated,
            totals.round_total_s,
            totals.round_avg_tok_s,
            totals.prefill_iters,
            totals.prefill_total_s,
            totals.prefill_extract_s,
            totals.assembly_s,
        )?;
        writeln!(
            f,
            "#   first_token_s={:.3} plugin_s={plugin_s:.3} load_s={load_s:.3} compile_s={compile_s:.3} decode_steps={} \
             ({:.3} ms a step) max_pages_used={}",
            totals.first_token_s,
            totals.decode_steps,
            1e3 * totals.decode_total_s / totals.decode_steps.max(1) as f64,
            totals.max_pages_used,
        )?;
        writeln!(f, "#   {:<13}{:>10}{:>10}{:>10}", "ms a call", "p50", "p90", "max")?;
        for (name, Spread { p50, p90, max }) in self.spreads {
            let name = format!("{name}_s");
            writeln!(f, "#   {name:<13}{:>10.3}{:>10.3}{:>10.3}", 1e3 * p50, 1e3 * p90, 1e3 * max)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A prefill call of 8 ms, then ten decode calls of 10, 20, ... 100 ms, one after the other.
    fn timeline() -> Timeline {
        let mut timeline =
            Timeline { start_up: StartUp { plugin_s: 1.0, load_s: 2.0, compile_s: 3.0 }, ..Timeline::default() };
        let mut start_s = 0.0;
        for call in 0..=10 {
            let ms = if call == 0 { 8.0 } else { 10.0 * f64::from(call) };
            let step = StepReport {
                kind: if call == 0 { StepKind::Prefill } else { StepKind::Decode },
                sequences: 2,
                rows: 2,
                rounds: if call == 0 { 1 } else { 4 },
                tokens: if call == 0 { 2 } else { 8 },
                start_s,
                plan_s: 0.1e-3 * ms,
                submit_s: 0.2e-3 * ms,
                device_s: 0.6e-3 * ms,
                extract_s: 0.1e-3 * ms,
                ..StepReport::default()
            };
            timeline.record(&Progress { pages_used: call as usize, active: 2, step, ..Progress::default() });
            start_s += step.total_s();
        }
        timeline.assembled(Duration::from_millis(5));
        timeline
    }

    #[test]
    fn the_summary_has_levanters_names() {
        let summary = timeline().summary();
        let json = summary.to_json();
        let near = |key: &str, expected: f64| {
            let found = json[key].as_f64().unwrap_or_else(|| panic!("{key} is missing"));
            assert!((found - expected).abs() < 1e-9 * expected.max(1.0), "{key} = {found}, not {expected}");
        };
        for (key, expected) in [
            ("decode_iters", 10.0),
            ("decode_new_tokens", 80.0),
            ("decode_total_s", 0.55),
            ("decode_avg_tok_s", 80.0 / 0.55),
            ("round_total_generated", 82.0),
            ("round_total_s", 0.558),
            ("round_avg_tok_s", 82.0 / 0.558),
            ("prefill_iters", 1.0),
            ("prefill_total_s", 0.008),
            ("prefill_extract_s", 0.0008),
            ("assembly_s", 0.005),
            ("first_token_s", 6.008),
            ("load_s", 2.0),
            ("decode_steps", 40.0),
            ("max_pages_used", 10.0),
        ] {
            near(key, expected);
        }
        for (name, share) in [("iter_total", 1.0), ("submit", 0.2), ("extract", 0.1), ("host", 0.1), ("device", 0.6)] {
            for (rank, ms) in [("p50", 50.0), ("p90", 90.0), ("max", 100.0)] {
                near(&format!("{name}_s_{rank}"), share * ms / 1e3);
            }
        }
        assert_eq!(json.as_object().unwrap().len(), 17 + 15);
        let text = summary.to_string();
        assert!(text.lines().all(|line| line.starts_with('#')), "{text}");
        assert!(text.contains("submit_s         10.000    18.000    20.000"), "{text}");
        // The same calls on two engines side by side: twice the tokens in the same time.
        let mut both = timeline();
        both.calls.extend(timeline().calls.into_iter().map(|mut call| {
            call.step.engine = 1;
            call
        }));
        let (one, two) = (timeline().summary().totals, both.summary().totals);
        assert_eq!((two.decode_new_tokens, two.decode_steps), (2 * one.decode_new_tokens, one.decode_steps));
        assert!((two.decode_avg_tok_s / one.decode_avg_tok_s - 2.0).abs() < 1e-9, "{two:?}");
        // A run that had nothing to do.
        let nothing = Timeline::default().summary().to_json();
        assert!(nothing.as_object().unwrap().values().all(|value| value.as_f64() == Some(0.0)), "{nothing}");
    }

    /// The parts of a call fill it, and calls do not overlap.
    #[test]
    fn the_trace_tiles_the_calls() {
        let mut bytes = Vec::new();
        timeline().write(&mut bytes).unwrap();
        let trace: Value = serde_json::from_slice(&bytes).unwrap();
        let events = trace["traceEvents"].as_array().unwrap();
        let spans = |category: &str| -> Vec<(f64, f64)> {
            let spans = events.iter().filter(|event| event["cat"] == category);
            spans.map(|span| (span["ts"].as_f64().unwrap(), span["dur"].as_f64().unwrap())).collect()
        };
        let (calls, parts) = (spans("call"), spans("part"));
        assert_eq!((calls.len(), parts.len()), (11, 44));
        let ends = |spans: &[(f64, f64)], from: f64| {
            spans.iter().fold(from, |at, &(ts, dur)| {
                assert!((ts - at).abs() < 0.01, "a span begins at {ts}, not at {at}");
                ts + dur
            })
        };
        assert!((ends(&calls, 0.0) - 558e3).abs() < 0.1);
        assert!((ends(&parts, 0.0) - 558e3).abs() < 0.1);
        assert_eq!(events.iter().filter(|event| event["ph"] == "C").count(), 33);
    }
}
