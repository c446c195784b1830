//! Ends a process whose device does not answer: a step that takes longer than it may is reported by name.
//!
//! Nothing can be done for the step itself. Its thread hangs in the plugin, and no plugin can be unloaded; so what to do is
//! the caller's, who ends the process. Finished samples are in the journal by then.

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Watches the steps of all engines of a process.
#[derive(Debug)]
pub struct Watchdog {
    limit: Duration,
    steps: Mutex<Steps>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Steps {
    next: u64,
    /// Deadline and name of each step that runs, in the order in which they began: the first is the first that is due.
    running: BTreeMap<u64, (Instant, String)>,
}

/// A step that runs: it has ended when this is dropped.
#[derive(Debug)]
pub struct Watched<'w> {
    watchdog: &'w Watchdog,
    step: u64,
}

impl Watchdog {
    /// A watchdog that calls `overdue` with the name of the first step that takes longer than `limit`, once, from a thread
    /// of its own.
    pub fn new(limit: Duration, overdue: impl FnOnce(&str) + Send + 'static) -> Arc<Self> {
        let watchdog = Arc::new(Self { limit, steps: Mutex::default(), changed: Condvar::new() });
        let watched = Arc::downgrade(&watchdog);
        thread::spawn(move || {
            // Ends with the watchdog, at the latest one limit after it.
            while let Some(watchdog) = watched.upgrade() {
                if let Some(name) = watchdog.wait() {
                    return overdue(&name);
                }
            }
        });
        watchdog
    }

    /// Says that a step begins.
    pub fn step(&self, name: impl Into<String>) -> Watched<'_> {
        let mut steps = self.steps.lock().unwrap_or_else(PoisonError::into_inner);
        let step = steps.next;
        steps.next += 1;
        steps.running.insert(step, (Instant::now() + self.limit, name.into()));
        self.changed.notify_one();
        Watched { watchdog: self, step }
    }

    /// Waits for a change, or for the first deadline: the step that missed it.
    fn wait(&self) -> Option<String> {
        let steps = self.steps.lock().unwrap_or_else(PoisonError::into_inner);
        let due = steps.running.first_key_value().map(|(_, (due, _))| *due);
        let left = due.map_or(self.limit, |due| due.saturating_duration_since(Instant::now()));
        let (steps, _) = self.changed.wait_timeout(steps, left).unwrap_or_else(PoisonError::into_inner);
        let (due, name) = steps.running.first_key_value()?.1;
        (*due <= Instant::now()).then(|| name.clone())
    }
}

impl Drop for Watched<'_> {
    fn drop(&mut self) {
        let mut steps = self.watchdog.steps.lock().unwrap_or_else(PoisonError::into_inner);
        steps.running.remove(&self.step);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn a_step_that_hangs_is_named() {
        let (send, overdue) = mpsc::channel();
        let watchdog = Watchdog::new(Duration::from_millis(100), move |name| send.send(name.to_owned()).unwrap());
        for step in 0..5 {
            let _in_time = watchdog.step(format!("step {step}"));
            thread::sleep(Duration::from_millis(30));
        }
        assert_eq!(overdue.try_recv(), Err(mpsc::TryRecvError::Empty));
        let hangs = watchdog.step("step 5");
        drop(watchdog.step("step 6"));
        assert_eq!(overdue.recv_timeout(Duration::from_secs(10)).unwrap(), "step 5");
        drop(hangs);
    }
}
