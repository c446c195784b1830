//! Which of how many processes this one is: from the flags, or from what a launcher left in the environment.
//!
//! Every launcher is one line of `LAUNCHERS`, the innermost first: `mpirun` inside a Slurm job starts the processes, not
//! Slurm. A launcher that says which process this is, but not of how many, is an error without `--hosts`: a process
//! that took itself for the only one would run every prompt again.

use std::fmt;

use crate::error::{Error, Result};
use crate::hosts::Share;

/// How a launcher says how many processes there are.
enum Count {
    /// A variable that holds the number.
    Number(&'static str),
    /// A variable that holds their names, with commas between.
    Names(&'static str),
    /// It does not.
    Unsaid,
}

/// A launcher, and the variables that it sets.
struct Launcher {
    name: &'static str,
    id: &'static str,
    count: Count,
    /// Whether a missing count means that this launcher did not start the process. `sbatch` sets the id of its batch
    /// script, which nothing launched in parallel.
    counts_or_absent: bool,
}

const fn launcher(name: &'static str, id: &'static str, count: Count) -> Launcher {
    Launcher { name, id, count, counts_or_absent: false }
}

/// The launchers, the innermost first. Sources: Open MPI's `mpirun`, MPICH's and Intel's process manager interface,
/// `srun`, Cloud TPU VMs, Kubernetes' indexed jobs (and so JobSet).
const LAUNCHERS: [Launcher; 5] = [
    launcher("mpirun", "OMPI_COMM_WORLD_RANK", Count::Number("OMPI_COMM_WORLD_SIZE")),
    launcher("mpiexec", "PMI_RANK", Count::Number("PMI_SIZE")),
    Launcher { counts_or_absent: true, ..launcher("srun", "SLURM_PROCID", Count::Number("SLURM_STEP_NUM_TASKS")) },
    launcher("the TPU VM", "TPU_WORKER_ID", Count::Names("TPU_WORKER_HOSTNAMES")),
    launcher("the Kubernetes job", "JOB_COMPLETION_INDEX", Count::Unsaid),
];

/// A process among those that run one job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launched {
    /// This process, of how many.
    pub share: Share,
    /// Who says so: `--hosts`, a launcher, or nobody.
    by: Option<&'static str>,
}

impl Launched {
    /// Reads the flags `--host-id` and `--hosts`, and where one is missing the environment, through `variable`.
    ///
    /// # Errors
    /// When a number is missing, is not a number, or contradicts the other; when there is no such host.
    pub fn of(host_id: Option<usize>, hosts: Option<usize>, variable: impl Fn(&str) -> Option<String>) -> Result<Self> {
        if let (Some(id), Some(count)) = (host_id, hosts) {
            return Ok(Self { share: Share::new(id, count)?, by: Some("--hosts") });
        }
        let found = LAUNCHERS.iter().find_map(|launcher| launcher.read(&variable).transpose()).transpose()?;
        let Some(Found { launcher, id, count }) = found else {
            return match (host_id, hosts) {
                (None, None | Some(1)) => Ok(Self { share: Share::ALONE, by: None }),
                (Some(id), _) => Err(Error::setting("--host-id", id, "does not say of how many", "give --hosts too")),
                (None, Some(count)) => {
                    Share::new(0, count)?;
                    let fix = format!("give --host-id, 0 to {}, or start the processes with a launcher", count - 1);
                    Err(Error::setting("--hosts", count, "does not say which of them this is", fix))
                }
            };
        };
        let count = match (count, hosts) {
            (Some(count), Some(hosts)) if count != hosts => {
                let limit = format!("is not the {count} processes that {} started", launcher.name);
                return Err(Error::setting("--hosts", hosts, limit, "leave the flag out, or give --host-id too"));
            }
            (count, hosts) => count.or(hosts).ok_or_else(|| {
                let limit = "says which process this is, but not of how many";
                Error::setting(launcher.id, id, limit, "give --hosts")
            })?,
        };
        Ok(Self { share: Share::new(host_id.unwrap_or(id), count)?, by: Some(launcher.name) })
    }

    /// As [`of`](Self::of), in this process's environment.
    ///
    /// # Errors
    /// As [`of`](Self::of).
    pub fn here(host_id: Option<usize>, hosts: Option<usize>) -> Result<Self> {
        Self::of(host_id, hosts, |name| std::env::var(name).ok())
    }
}

/// What is printed at the start.
impl fmt::Display for Launched {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "host {} of {}", self.share.host(), self.share.hosts())?;
        self.by.map_or(Ok(()), |by| write!(f, ", says {by}"))
    }
}

/// The variables that make libtpu take the chips of one host of a slice for a slice of its own, so that hosts need no
/// traffic between them. Source: PyTorch/XLA's maintainers; it has not run on TPU hardware, so the caller checks how many
/// devices the client has.
///
/// # Errors
/// When the environment does not say how the host's chips lie.
pub fn one_host_slice(variable: impl Fn(&str) -> Option<String>) -> Result<[(&'static str, String); 5]> {
    const CHIPS: &str = "TPU_CHIPS_PER_HOST_BOUNDS";
    let chips = variable(CHIPS).filter(|bounds| !bounds.is_empty()).ok_or_else(|| {
        let limit = "does not say how the chips of a host lie";
        Error::setting(CHIPS, "unset", limit, "set it, as 2,2,1 for the four chips of a v4 or v5p host")
    })?;
    let fixed = |value: &str| value.to_owned();
    Ok([
        ("TPU_SKIP_MDS_QUERY", fixed("1")),
        ("TPU_HOST_BOUNDS", fixed("1,1,1")),
        (CHIPS, chips),
        ("TPU_WORKER_HOSTNAMES", fixed("localhost")),
        ("TPU_WORKER_ID", fixed("0")),
    ])
}

/// What a launcher says.
struct Found {
    launcher: &'static Launcher,
    id: usize,
    count: Option<usize>,
}

impl Launcher {
    /// What this launcher says, if it started the process.
    fn read(&'static self, variable: &impl Fn(&str) -> Option<String>) -> Result<Option<Found>> {
        let Some(id) = variable(self.id) else { return Ok(None) };
        let count = match self.count {
            Count::Number(name) => variable(name).map(|value| number(name, &value)).transpose()?,
            Count::Names(name) => variable(name).map(|names| names.split(',').count()),
            Count::Unsaid => None,
        };
        if count.is_none() && self.counts_or_absent {
            return Ok(None);
        }
        Ok(Some(Found { launcher: self, id: number(self.id, &id)?, count }))
    }
}

fn number(name: &str, value: &str) -> Result<usize> {
    let fix = "unset it, or give --host-id and --hosts";
    value.trim().parse().map_err(|_| Error::setting(name, format!("{value:?}"), "is not a number", fix))
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    fn of(host_id: Option<usize>, hosts: Option<usize>, environment: &str) -> Result<String, String> {
        let variables: HashMap<&str, &str> =
            environment.split(' ').filter_map(|variable| variable.split_once('=')).collect();
        let launched = Launched::of(host_id, hosts, |name| variables.get(name).map(ToString::to_string));
        launched.map(|launched| launched.to_string()).map_err(|error| error.to_string())
    }

    #[test]
    fn launchers_are_read_innermost_first() {
        let slurm = "SLURM_PROCID=2 SLURM_STEP_NUM_TASKS=8 SLURM_NTASKS=8";
        let mpi = "OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=4";
        let cases = [
            ("", "host 0 of 1"),
            (mpi, "host 1 of 4, says mpirun"),
            ("PMI_RANK=3 PMI_SIZE=4", "host 3 of 4, says mpiexec"),
            (slurm, "host 2 of 8, says srun"),
            (&format!("{slurm} {mpi}"), "host 1 of 4, says mpirun"),
            // The batch script itself is not a task.
            ("SLURM_PROCID=0 SLURM_NTASKS=8", "host 0 of 1"),
            ("SLURM_PROCID=0 SLURM_NTASKS=8 TPU_WORKER_ID=1 TPU_WORKER_HOSTNAMES=a,b", "host 1 of 2, says the TPU VM"),
            ("TPU_WORKER_ID=0 TPU_WORKER_HOSTNAMES=localhost", "host 0 of 1, says the TPU VM"),
        ];
        for (environment, expected) in cases {
            assert_eq!(of(None, None, environment).as_deref(), Ok(expected), "{environment}");
        }
    }

    #[test]
    fn flags_win_and_complete() {
        let mpi = "OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=4";
        assert_eq!(of(Some(2), Some(3), mpi).as_deref(), Ok("host 2 of 3, says --hosts"));
        assert_eq!(of(Some(2), None, mpi).as_deref(), Ok("host 2 of 4, says mpirun"));
        assert_eq!(of(None, Some(4), mpi).as_deref(), Ok("host 1 of 4, says mpirun"));
        assert_eq!(of(None, Some(8), "JOB_COMPLETION_INDEX=5").as_deref(), Ok("host 5 of 8, says the Kubernetes job"));
        assert_eq!(of(None, Some(1), "").as_deref(), Ok("host 0 of 1"));
    }

    #[test]
    fn contradictions_are_named() {
        let mpi = "OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=4";
        let cases = [
            (None, None, "JOB_COMPLETION_INDEX=5", "JOB_COMPLETION_INDEX = 5 says which process this is, but not of"),
            (None, None, "TPU_WORKER_ID=1", "TPU_WORKER_ID = 1 says which process this is, but not of how many"),
            (None, None, "PMI_RANK=x PMI_SIZE=4", "PMI_RANK = \"x\" is not a number: unset it, or give --host-id"),
            (None, None, "PMI_RANK=4 PMI_SIZE=4", "--host-id = 4 is not a host of 4"),
            (None, Some(8), mpi, "--hosts = 8 is not the 4 processes that mpirun started: leave the flag out"),
            (Some(3), None, "", "--host-id = 3 does not say of how many: give --hosts too"),
            (None, Some(3), "", "--hosts = 3 does not say which of them this is: give --host-id, 0 to 2"),
            (None, Some(0), "", "--hosts = 0 is not between 1 and 9999"),
        ];
        for (host_id, hosts, environment, expected) in cases {
            let error = of(host_id, hosts, environment).unwrap_err();
            assert!(error.contains(expected), "{environment}\n{error}");
        }
    }
}
