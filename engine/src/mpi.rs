//! Several processes as one mesh: MPI, and its all-reduce in the middle of a program, as a custom call of the CPU plugin.
//!
//! The CPU plugin has collectives within a process only. On a TPU none of this is used: XLA's own collectives span the
//! slice.
//!
//! *Order.* Calls without a data dependence run at the same time, on several threads and in another order in every
//! process, which yields sums of the wrong arrays. So each call takes the last call's result as a second operand that
//! it does not read: the emitter builds that chain.
//!
//! *Agreement.* No process leads: each decides the same from the same inputs. [`World::agree`] checks that the inputs are
//! the same before anything depends on it.
//!
//! *Threads.* XLA calls from threads of its own, one call at a time (the chain): `MPI_THREAD_SERIALIZED` is asked for, and
//! less is refused. *End.* A process that succeeds drops its [`World`], which waits for the others; one that fails calls
//! [`World::abort`], or they would wait for ever.
//!
//! Without cargo feature `mpi` there is no [`World`], and asking for one is an error.

use crate::error::{Error, Result};
use crate::mesh::Mesh;

/// The custom call: operands `x f32[..]` and the last call's result (of any shape), result the sum of the replica's `x`.
pub const ALL_REDUCE: &str = "pagoda_mpi_all_reduce";

#[cfg(feature = "mpi")]
pub use with_mpi::World;
#[cfg(not(feature = "mpi"))]
pub use without_mpi::World;

/// The error of processes that are not those of the mesh.
#[cfg_attr(not(feature = "mpi"), allow(dead_code, reason = "only MPI counts processes"))]
fn check_size(mesh: Mesh, processes: usize) -> Result<()> {
    if mesh.devices() == processes {
        return Ok(());
    }
    let limit = format!("has {} devices, but {processes} processes of one device each were started", mesh.devices());
    let fix = format!("start {} processes, or give a mesh of {processes}", mesh.devices());
    Err(Error::setting("mesh", mesh, limit, fix))
}

#[cfg(feature = "mpi")]
mod with_mpi {
    use std::ffi::c_int;
    use std::sync::{Mutex, PoisonError};

    use mpi::Threading;
    use mpi::collective::SystemOperation;
    use mpi::environment::Universe;
    use mpi::topology::{Color, SimpleCommunicator};
    use mpi::traits::{Communicator, CommunicatorCollectives, Root};

    use super::{ALL_REDUCE, Error, Mesh, Result, check_size};
    use crate::pjrt::Plugin;
    use crate::pjrt::custom_call::{CustomCall, Frame, register};

    /// The processes of one replica of the model.
    struct Replica(SimpleCommunicator);

    // SAFETY: a communicator is a handle that MPI takes from any thread; with MPI_THREAD_SERIALIZED, which `World::start`
    // checks, calls must not be concurrent, and the mutex around it sees to that.
    unsafe impl Send for Replica {}

    /// What the handler reduces over: handlers have no state of their own.
    static REPLICA: Mutex<Option<Replica>> = Mutex::new(None);

    /// MPI, from its start to its end. Only one lives at a time.
    pub struct World {
        universe: Universe,
    }

    impl World {
        /// Starts MPI, and groups the processes by replica of `mesh`: one device each.
        ///
        /// # Errors
        /// When the processes are not as many as the mesh has devices, or MPI cannot be called from XLA's threads.
        pub fn start(mesh: Mesh) -> Result<Self> {
            let failed = |message: String| Error::runtime("starting MPI")(message);
            let (universe, threading) = mpi::initialize_with_threading(Threading::Serialized)
                .ok_or_else(|| failed("it was started before".into()))?;
            if threading < Threading::Serialized {
                return Err(failed(format!(
                    "it grants threads {threading:?}, not Serialized: use another MPI library"
                )));
            }
            let world = universe.world();
            let number = |value: c_int| usize::try_from(value).unwrap_or(0);
            check_size(mesh, number(world.size()))?;
            let (replica, _) = mesh.place(number(world.rank()));
            let color = c_int::try_from(replica).map_err(|_| failed(format!("replica {replica} is too many")))?;
            let group = world.split_by_color(Color::with_value(color)).map(Replica);
            *REPLICA.lock().unwrap_or_else(PoisonError::into_inner) = group;
            Ok(Self { universe })
        }

        /// Makes the all-reduce known to a plugin.
        ///
        /// # Errors
        /// When the plugin takes no custom calls.
        pub fn register(&self, plugin: &Plugin) -> Result<()> {
            Ok(register::<AllReduce>(plugin)?)
        }

        /// Waits for all processes, and checks that they decide from the same `what`, of which `digest` is a digest.
        ///
        /// # Errors
        /// Names the first process whose digest is another, on every process alike.
        pub fn agree(&self, what: &str, digest: &[u8]) -> Result<()> {
            let world = self.universe.world();
            let mut all = vec![0; digest.len() * usize::try_from(world.size()).unwrap_or(0)];
            world.all_gather_into(digest, &mut all[..]);
            let differs = all.chunks_exact(digest.len().max(1)).position(|other| other != &all[..digest.len()]);
            match differs {
                None => Ok(()),
                Some(rank) => {
                    let limit = "is not that of process 0";
                    let fix = "give every process the same config, model, flags and --out folder";
                    Err(Error::setting(format!("{what} of process {rank}"), "another", limit, fix))
                }
            }
        }

        /// Gives every process of a replica the bytes of its first shard's.
        pub fn as_first_shard(&self, bytes: &mut [u8]) {
            let replica = REPLICA.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(Replica(processes)) = &*replica {
                processes.process_at_rank(0).broadcast_into(bytes);
            }
        }

        /// Ends all processes, this one with exit code `code`.
        pub fn abort(&self, code: u8) -> ! {
            self.universe.world().abort(c_int::from(code))
        }
    }

    impl Drop for World {
        fn drop(&mut self) {
            // Communicators go before MPI ends, which is when `universe` is dropped.
            REPLICA.lock().unwrap_or_else(PoisonError::into_inner).take();
        }
    }

    /// The handler of [`ALL_REDUCE`].
    struct AllReduce;

    impl CustomCall for AllReduce {
        const TARGET: &'static str = ALL_REDUCE;

        fn call(frame: Frame<'_>) -> std::result::Result<(), String> {
            let Frame { operands, results, .. } = frame;
            let x = operands.get(0)?.values::<f32>()?;
            let [sum] = results.values::<f32, 1>()?;
            if x.len() != sum.len() {
                return Err(format!("the result has {} elements, the operand {}", sum.len(), x.len()));
            }
            let replica = REPLICA.lock().unwrap_or_else(PoisonError::into_inner);
            let replica = replica.as_ref().ok_or("MPI was not started, or has ended")?;
            replica.0.all_reduce_into(x, sum, SystemOperation::sum());
            Ok(())
        }
    }
}

#[cfg(not(feature = "mpi"))]
mod without_mpi {
    use super::{Error, Mesh, Result};
    use crate::pjrt::Plugin;

    /// There is none in this build.
    pub enum World {}

    impl World {
        /// Says how to get a build with MPI.
        ///
        /// # Errors
        /// Always.
        pub fn start(mesh: Mesh) -> Result<Self> {
            let limit = "spans several processes, and this build has no MPI";
            let fix = "build with `--features mpi` (`make multihost` shows how), or use inference_mode: \
                       host_data_parallel";
            Err(Error::setting("mesh", mesh, limit, fix))
        }

        /// Never called.
        ///
        /// # Errors
        /// Never.
        pub fn register(&self, _: &Plugin) -> Result<()> {
            match *self {}
        }

        /// Never called.
        ///
        /// # Errors
        /// Never.
        pub fn agree(&self, _: &str, _: &[u8]) -> Result<()> {
            match *self {}
        }

        /// Never called.
        pub fn as_first_shard(&self, _: &mut [u8]) {
            match *self {}
        }

        /// Never called.
        pub fn abort(&self, _: u8) -> ! {
            match *self {}
        }
    }
}
