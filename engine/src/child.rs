//! Child processes for work that may crash, hang, or take all the memory there is: libtpu, and MLIR's bytecode reader on
//! damaged files. The child is an executable of ours again, started with a hidden argument that its `main` looks for first
//! ([`asked`]).
//!
//! Invariants: a child never outlives [`run`], whatever ends it; how it ended is a value. What it found out it leaves in
//! files: nothing is piped, so that nothing can block.

use std::ffi::OsStr;
use std::io::Result;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

/// What a child may take.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Time, from its start.
    pub time: Duration,
    /// Resident memory in bytes, as the system counts it. It is looked at every few milliseconds: a child that wants a hard
    /// limit sets one itself ([`limit_memory`]).
    pub memory: u64,
}

/// How a child ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// By itself: it returned, or it crashed.
    Exited(ExitStatus),
    /// It was stopped at its limit of time.
    OutOfTime,
    /// It was stopped at its limit of memory.
    OutOfMemory,
}

/// Runs a child and waits for its end.
///
/// # Errors
/// When the system cannot start it, or not wait for it.
pub fn run(command: &mut Command, limits: Limits) -> Result<Ended> {
    /// A child that goes when it is let go of. It may have ended before: both calls may fail then.
    struct Owned(Child);
    impl Drop for Owned {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    const LONGEST_NAP: Duration = Duration::from_millis(20);
    let started = Instant::now();
    let mut child = Owned(command.spawn()?);
    let mut nap = Duration::from_millis(1);
    loop {
        if let Some(status) = child.0.try_wait()? {
            return Ok(Ended::Exited(status));
        }
        if started.elapsed() >= limits.time {
            return Ok(Ended::OutOfTime);
        }
        if resident(child.0.id()) > limits.memory {
            return Ok(Ended::OutOfMemory);
        }
        std::thread::sleep(nap);
        nap = (nap * 2).min(LONGEST_NAP);
    }
}

/// Bytes of resident memory of a process; 0 where the system does not say.
fn resident(process: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib: Option<u64> = line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse().ok());
    kib.unwrap_or(0) << 10
}

/// The path that follows `hidden`, if that is the first argument of this process: it is a child then.
pub fn asked(hidden: &str) -> Option<PathBuf> {
    let mut arguments = std::env::args_os().skip(1);
    (arguments.next().as_deref() == Some(OsStr::new(hidden))).then(|| arguments.next().unwrap_or_default().into())
}

/// Lets no allocation of this process succeed that would take its address space beyond `bytes`.
///
/// # Errors
/// When the system refuses.
pub fn limit_memory(bytes: u64) -> Result<()> {
    let limit = rustix::process::Rlimit { current: Some(bytes), maximum: Some(bytes) };
    Ok(rustix::process::setrlimit(rustix::process::Resource::As, limit)?)
}

#[cfg(test)]
mod tests {
    use std::process::Stdio;

    use super::*;

    const LIMITS: Limits = Limits { time: Duration::from_secs(600), memory: 256 << 20 };

    fn run(program: &str, argument: &str, limits: Limits) -> Ended {
        let mut command = Command::new(program);
        command.arg(argument).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        super::run(&mut command, limits).unwrap()
    }

    #[test]
    fn how_a_child_ends_is_a_value() {
        for (argument, success) in [("/", true), ("/nowhere", false)] {
            let ended = run("ls", argument, LIMITS);
            assert!(matches!(ended, Ended::Exited(status) if status.success() == success), "{argument}: {ended:?}");
        }
        assert_eq!(run("sleep", "600", Limits { time: Duration::ZERO, ..LIMITS }), Ended::OutOfTime);
        assert_eq!(run("tail", "/dev/zero", LIMITS), Ended::OutOfMemory, "it keeps all of its last line");
        assert!(super::run(&mut Command::new("/nowhere/program"), LIMITS).is_err());
    }
}
