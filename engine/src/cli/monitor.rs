//! A run as its user sees it: a progress bar or lines of progress while it goes, where the time went when it is over, and an
//! end to a step that hangs.

use std::cell::RefCell;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};

use crate::error::{Error, Result};
use crate::generate::{Progress, StepKind};
use crate::output::write_atomically;
use crate::timeline::{StartUp, Timeline};
use crate::watchdog::Watchdog;

/// What is written about a run, and how long its steps may take.
#[derive(Debug, Args)]
pub(super) struct MonitorArgs {
    /// Write where the time went, under the names of Levanter's "Decode perf summary", to this JSON file.
    #[arg(long, value_name = "FILE")]
    summary: Option<PathBuf>,
    /// Write the host's timeline to this file, which ui.perfetto.dev and chrome://tracing open.
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// End the run when a step on the device takes longer; finished samples are kept.
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    step_timeout: Option<Duration>,
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().ok().filter(|seconds: &f64| (1e-9..1e9).contains(seconds));
    seconds
        .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
        .ok_or_else(|| "is not a number of seconds above 0".into())
}

impl MonitorArgs {
    /// A watchdog that ends the process, if steps have a limit.
    pub(super) fn watchdog(&self) -> Option<Arc<Watchdog>> {
        let limit = self.step_timeout?;
        Some(Watchdog::new(limit, move |step| {
            eprintln!(
                "error: {step}: not done within --step-timeout {} s, the device does not answer; what was finished is \
                 kept: run the same command again to go on",
                limit.as_secs_f64(),
            );
            // SAFETY: ends the process. Not `exit`: that runs the plugin's own clean-up, which may wait for the step.
            unsafe { libc::_exit(1) }
        }))
    }
}

/// Watches a run.
pub(super) struct Monitor {
    timeline: RefCell<Timeline>,
    bar: ProgressBar,
    samples: usize,
    /// Pages of all engines.
    pages: usize,
    /// Decode calls between two lines of progress; 0 for none.
    every: usize,
    started: Instant,
}

impl Monitor {
    /// The monitor of a run of `samples` samples; the bar is drawn on stderr, and only where that is a terminal.
    ///
    /// # Errors
    /// When the bar cannot be drawn.
    pub(super) fn new(samples: usize) -> Result<Self> {
        let bar = ProgressBar::new(samples as u64);
        let style = ProgressStyle::with_template("{bar:30} {pos}/{len} samples, {msg} [{elapsed}]");
        bar.set_style(style.map_err(Error::runtime("drawing the progress bar"))?);
        Ok(Self { timeline: RefCell::default(), bar, samples, pages: 0, every: 0, started: Instant::now() })
    }

    /// The run begins, after `start_up`, on engines of `pages` pages together. Where stderr is no terminal, a line is printed
    /// every `every` decode calls.
    pub(super) fn begin(&mut self, start_up: StartUp, pages: usize, every: usize) {
        self.timeline.get_mut().start_up = start_up;
        let every = if std::io::stderr().is_terminal() { 0 } else { every };
        (self.pages, self.every, self.started) = (pages, every, Instant::now());
    }

    /// Hides the bar while `print` prints.
    pub(super) fn suspend<T>(&self, print: impl FnOnce() -> T) -> T {
        self.bar.suspend(print)
    }

    /// After a host call.
    pub(super) fn step(&self, progress: &Progress) {
        self.timeline.borrow_mut().record(progress);
        let rate = progress.tokens as f64 / self.started.elapsed().as_secs_f64().max(1e-9);
        let Progress { tokens, pages_used, .. } = *progress;
        let state = format!("{tokens} tokens, {rate:.0} tokens/s, {pages_used} of {} KV pages", self.pages);
        let calls = self.timeline.borrow().decode_calls();
        if self.every > 0 && progress.step.kind == StepKind::Decode && calls.is_multiple_of(self.every) {
            let Progress { finished, active, waiting, .. } = *progress;
            eprintln!("# {finished} of {} samples, {state}, {active} run, {waiting} wait", self.samples);
        }
        self.bar.set_message(state);
        self.bar.set_position(progress.finished as u64);
    }

    /// Does `work` for a finished sample, and takes down how long it took.
    pub(super) fn assemble<T>(&self, work: impl FnOnce() -> T) -> T {
        let started = Instant::now();
        let outcome = work();
        self.timeline.borrow_mut().assembled(started.elapsed());
        outcome
    }

    /// The run is over: prints where the time went, if `print` says so, and if this process `writes`, puts it and the timeline
    /// into the files that were asked for, and into `of_run`.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub(super) fn end(&self, args: &MonitorArgs, writes: bool, print: bool, of_run: Option<&Path>) -> Result<()> {
        self.bar.finish_and_clear();
        let timeline = self.timeline.borrow();
        let summary = timeline.summary();
        if print {
            eprint!("{summary}");
        }
        if !writes {
            return Ok(());
        }
        let json = format!("{:#}\n", summary.to_json());
        args.summary
            .as_deref()
            .into_iter()
            .chain(of_run)
            .try_for_each(|path| write_atomically(path, json.as_bytes()))?;
        if let Some(path) = &args.trace {
            let mut bytes = Vec::new();
            timeline.write(&mut bytes).expect("memory takes what is written to it");
            write_atomically(path, &bytes)?;
            eprintln!("# wrote {}: open it at ui.perfetto.dev", path.display());
        }
        Ok(())
    }
}
