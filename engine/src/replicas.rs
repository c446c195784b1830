//! Data parallelism in one process: independent engines, one per replica of the model, over the devices of one client.
//!
//! Each engine runs in a thread of its own, with its own scheduler, pages and KV, and takes requests from one queue. A
//! sample's text depends on its id alone, so it does not matter which engine makes it.
//!
//! Invariants: every request ends in exactly one [`Finished`], or the run in an error; the caller's functions are called on
//! the caller's thread; when one engine fails, the others end after their current call.

use std::collections::VecDeque;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use crate::error::{Error, Result};
use crate::generate::{Engine, EngineOptions, Progress, StepReport, Timing};
use crate::llama::{DeviceModel, Group};
use crate::mesh::Mesh;
use crate::model::ModelSpec;
use crate::model::weights::Weights;
use crate::pjrt::Client;
use crate::scheduler::{Finished, Request};
use crate::watchdog::Watchdog;

/// The engines of a mesh's replicas.
pub struct Replicas {
    engines: Vec<Engine>,
}

/// What an engine reports to the caller's thread.
enum Event {
    /// After a host call of an engine.
    Step { engine: usize, finished: Vec<Finished>, progress: Progress },
    /// An engine failed.
    Failed(Error),
}

impl Replicas {
    /// Loads the model onto every replica of `mesh` over the client's devices, and compiles its step programs there.
    ///
    /// # Errors
    /// When the model cannot be split like this, or one of the engines cannot be made ([`Engine::new`]).
    pub fn load(
        client: &Client,
        config: &ModelSpec,
        weights: &Weights,
        mesh: Mesh,
        options: &EngineOptions,
    ) -> Result<Self> {
        let groups = (0..mesh.data.get()).map(|replica| Group::replica(mesh, replica));
        Self::of_groups(client, config, weights, groups, options)
    }

    /// As [`load`](Self::load), of groups on devices that no other has.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn of_groups(
        client: &Client,
        config: &ModelSpec,
        weights: &Weights,
        groups: impl IntoIterator<Item = Group>,
        options: &EngineOptions,
    ) -> Result<Self> {
        let engine = |group: Group| {
            let shape = options.shape(group.parallel());
            let model = DeviceModel::load_group(client, config, weights, &shape, group)?;
            Engine::new(client, model, options.clone())
        };
        // Compilation takes most of the time, on a thread each.
        let engines = thread::scope(|scope| {
            let threads: Vec<_> = groups.into_iter().map(|group| scope.spawn(|| engine(group))).collect();
            threads.into_iter().map(join).collect::<Result<_>>()
        })?;
        Ok(Self { engines })
    }

    /// The engines.
    pub fn engines(&self) -> &[Engine] {
        &self.engines
    }

    /// The longest time that an engine spent emitting and compiling its step programs.
    pub fn compile_time(&self) -> Duration {
        self.engines.iter().map(Engine::compile_time).max().unwrap_or_default()
    }

    /// Has the steps of all engines watched ([`Engine::watch`]).
    pub fn watch(&mut self, watchdog: &Arc<Watchdog>) {
        self.engines.iter_mut().for_each(|engine| engine.watch(watchdog));
    }

    /// As [`Engine::run`], over all engines.
    ///
    /// # Errors
    /// As there: when a request can never run (then none does), or a device fails, or `finished` does.
    pub fn run(
        &mut self,
        requests: impl IntoIterator<Item = Request>,
        cancel: &AtomicBool,
        finished: impl FnMut(Finished) -> Result<()>,
        progress: impl FnMut(&Progress),
    ) -> Result<Timing> {
        self.run_batches([requests], cancel, finished, progress)
    }

    /// As [`Engine::run_batches`], over all engines: a batch begins when the last one is done on all of them.
    ///
    /// # Errors
    /// As [`run`](Self::run); a request that can never run ends the run when its batch begins.
    pub fn run_batches(
        &mut self,
        batches: impl IntoIterator<Item = impl IntoIterator<Item = Request>>,
        cancel: &AtomicBool,
        mut finished: impl FnMut(Finished) -> Result<()>,
        mut progress: impl FnMut(&Progress),
    ) -> Result<Timing> {
        let mut batches = batches.into_iter().take_while(|_| !cancel.load(Ordering::Relaxed));
        let outcome = batches.try_for_each(|batch| {
            let requests = VecDeque::from_iter(batch);
            requests.iter().try_for_each(|request| self.engines[0].check(request))?;
            self.run_batch(requests, cancel, &mut finished, &mut progress)
        });
        self.engines.iter_mut().for_each(Engine::clear);
        let timings: Vec<Timing> = self.engines.iter_mut().map(Engine::take_timing).collect();
        outcome.map(|()| timings.into_iter().fold(Timing::default(), Timing::beside))
    }

    fn run_batch(
        &mut self,
        requests: VecDeque<Request>,
        cancel: &AtomicBool,
        finished: &mut impl FnMut(Finished) -> Result<()>,
        progress: &mut impl FnMut(&Progress),
    ) -> Result<()> {
        // A short queue is shared out evenly, rather than filling the slots of the first engine.
        let most = NonZeroUsize::new(requests.len().div_ceil(self.engines.len())).unwrap_or(NonZeroUsize::MIN);
        let (queue, stopped) = (Mutex::new(requests), AtomicBool::new(false));
        let (send, receive) = mpsc::channel();
        let mut states: Vec<Progress> = self.engines.iter().map(|engine| *engine.progress()).collect();
        thread::scope(|scope| {
            for (at, engine) in self.engines.iter_mut().enumerate() {
                let (send, queue, stopped) = (send.clone(), &queue, &stopped);
                let ends = move || cancel.load(Ordering::Relaxed) || stopped.load(Ordering::Relaxed);
                scope.spawn(move || {
                    if let Err(error) = drive(engine, at, most, queue, ends, &send) {
                        stopped.store(true, Ordering::Relaxed);
                        // Nobody listens any more: then the run has failed before.
                        let _ = send.send(Event::Failed(error));
                    }
                });
            }
            drop(send);
            let mut outcome = Ok(());
            for event in receive {
                let next = match event {
                    _ if outcome.is_err() => continue,
                    Event::Failed(error) => Err(error),
                    Event::Step { engine, finished: samples, progress: state } => {
                        states[engine] = state;
                        let step = StepReport { engine, ..state.step };
                        let done = samples.into_iter().try_for_each(&mut *finished);
                        progress(&Progress::beside(&states, step));
                        done
                    }
                };
                if next.is_err() {
                    stopped.store(true, Ordering::Relaxed);
                }
                outcome = next;
            }
            outcome
        })
    }
}

/// Runs an engine on what it takes from the queue, `most` requests at a time, until that is empty and all it took is done.
fn drive(
    engine: &mut Engine,
    at: usize,
    most: NonZeroUsize,
    queue: &Mutex<VecDeque<Request>>,
    ends: impl Fn() -> bool,
    send: &Sender<Event>,
) -> Result<()> {
    while !ends() {
        {
            let mut queue = queue.lock().unwrap_or_else(PoisonError::into_inner);
            while engine.free_slots() > 0
                && engine.unfinished() < most.get()
                && let Some(request) = queue.pop_front()
            {
                engine.submit(request)?;
            }
        }
        let Some(finished) = engine.poll()? else { break };
        if send.send(Event::Step { engine: at, finished, progress: *engine.progress() }).is_err() {
            break;
        }
    }
    Ok(())
}

/// The result of a thread; its panic is the caller's.
fn join<T>(thread: thread::ScopedJoinHandle<'_, T>) -> T {
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}
