//! Several hosts, each an independent replica that runs a contiguous share of the prompts, and the join of their files.
//!
//! A sample's text depends on the run and the sample alone, so the joined file is byte for byte what one host writes.
//! `merge` trusts nothing: every share must be there, complete, whole, of the same run, and hold exactly its samples.

use std::collections::BTreeSet;
use std::fmt::Display;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::output::{Manifest, Run, parse_lines, read_manifest, split_lines, torn_line, write_atomically};
use crate::units::SampleId;

/// Host `host` (from 0) of `hosts`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    host: usize,
    hosts: usize,
}

impl Share {
    /// The only host.
    pub const ALONE: Self = Self { host: 0, hosts: 1 };

    /// Host `host` of `hosts`.
    ///
    /// # Errors
    /// When there is no such host, or more hosts than file names can count.
    pub fn new(host: usize, hosts: usize) -> Result<Self> {
        if hosts == 0 || hosts > 9999 {
            return Err(Error::setting("--hosts", hosts, "is not between 1 and 9999", "give the number of hosts"));
        }
        if host >= hosts {
            let limit = format!("is not a host of {hosts}");
            return Err(Error::setting("--host-id", host, limit, format!("hosts count from 0 to {}", hosts - 1)));
        }
        Ok(Self { host, hosts })
    }

    /// This host, from 0.
    pub fn host(self) -> usize {
        self.host
    }

    /// How many there are.
    pub fn hosts(self) -> usize {
        self.hosts
    }

    /// This host's part of `prompts` prompts: contiguous, and at most one prompt larger than another's.
    pub fn prompts(self, prompts: usize) -> Range<usize> {
        let start = |host| prompts * host / self.hosts;
        start(self.host)..start(self.host + 1)
    }

    /// `host_0002_of_0004.EXTENSION`, as Levanter names per-host files.
    pub fn file_name(self, extension: impl Display) -> String {
        format!("host_{:04}_of_{:04}.{extension}", self.host, self.hosts)
    }

    /// The share that a file name belongs to, whatever its extension.
    fn of_file_name(name: &str) -> Option<Self> {
        let (numbers, _) = name.strip_prefix("host_")?.split_once('.')?;
        let (host, hosts) = numbers.split_once("_of_")?;
        Self::new(host.parse().ok()?, hosts.parse().ok()?).ok()
    }
}

/// What a merge wrote.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Merged {
    /// The joined file.
    pub path: PathBuf,
    /// Hosts joined.
    pub hosts: usize,
    /// Samples joined.
    pub samples: usize,
}

/// Joins all shares in `folder` in sample order into `all_hosts_merged_of_0004.jsonl`, Levanter's name for it.
///
/// # Errors
/// Names the share that is missing, unfinished, torn, of another run, or that lacks or repeats a sample; nothing is
/// written then.
pub fn merge(folder: &Path) -> Result<Merged> {
    let hosts = count_hosts(folder)?;
    let shares: Vec<_> = (0..hosts).map(|host| Share { host, hosts }).collect();
    let missing: Vec<_> = shares
        .iter()
        .map(|share| share.file_name("jsonl"))
        .filter(|name| !folder.join(name).exists() && !folder.join(format!("{name}.partial")).exists())
        .collect();
    if !missing.is_empty() {
        let problem = format!("of {hosts} shares, {} missing: {}", missing.len(), missing.join(", "));
        return Err(Error::file(folder, problem, "copy them here, or run their hosts"));
    }
    let mut first: Option<Run> = None;
    let mut lines = Vec::new();
    for share in shares {
        let manifest = folder.join(share.file_name("run.json"));
        let manifest_path = manifest;
        let manifest = read_manifest(&manifest_path)?;
        let run = manifest.run.clone();
        if first.get_or_insert_with(|| run.clone()) != &run {
            let problem = "its run is not that of host 0 (other settings, prompts or model)";
            return Err(Error::file(manifest_path, problem, "run all hosts with the same input"));
        }
        lines.extend(read_share(folder, share, &manifest)?);
    }
    lines.sort_by_key(|(id, _)| *id);
    let path = folder.join(format!("all_hosts_merged_of_{hosts:04}.jsonl"));
    let mut bytes = Vec::new();
    for (_, line) in &lines {
        bytes.extend_from_slice(line);
        bytes.push(b'\n');
    }
    write_atomically(&path, &bytes)?;
    Ok(Merged { path, hosts, samples: lines.len() })
}

/// The number of hosts that the file names in a folder agree on.
fn count_hosts(folder: &Path) -> Result<usize> {
    let mut counts = BTreeSet::new();
    for entry in fs::read_dir(folder).map_err(Error::io("read", folder))? {
        let name = entry.map_err(Error::io("read", folder))?.file_name();
        counts.extend(name.to_str().and_then(Share::of_file_name).map(|share| share.hosts));
    }
    match Vec::from_iter(counts)[..] {
        [hosts] => Ok(hosts),
        [] => Err(Error::file(folder, "it holds no host_*_of_*.jsonl", "give the --out folder of the hosts")),
        [a, b, ..] => {
            let problem = format!("it holds shares of runs on {a} and on {b} hosts");
            Err(Error::file(folder, problem, "keep the shares of one run only"))
        }
    }
}

/// The lines of a complete share, each with its sample.
fn read_share(folder: &Path, share: Share, manifest: &Manifest) -> Result<Vec<(SampleId, Vec<u8>)>> {
    let path = folder.join(share.file_name("jsonl"));
    let expected = manifest.run.samples(share);
    if !path.exists() {
        let partial = folder.join(share.file_name("jsonl.partial"));
        let bytes = fs::read(&partial).map_err(Error::io("read", &partial))?;
        let problem = format!("only {} of {} samples are finished", split_lines(&bytes).0.len(), expected.len());
        let fix = format!("run host {} of {} again: it makes the rest", share.host, share.hosts);
        return Err(Error::file(partial, problem, fix));
    }
    let bytes = fs::read(&path).map_err(Error::io("read", &path))?;
    let (lines, torn) = split_lines(&bytes);
    if torn > 0 {
        return Err(torn_line(&path, lines.len() + 1));
    }
    let ids: Vec<_> = parse_lines(&path, &lines)?.iter().map(crate::output::Record::id).collect();
    if ids != expected {
        let at = ids.iter().zip(&expected).take_while(|(found, expected)| found == expected).count();
        let name = |id: Option<&SampleId>| id.map_or("the end".to_owned(), SampleId::to_string);
        let problem = format!("line {} holds {}, not {}", at + 1, name(ids.get(at)), name(expected.get(at)));
        return Err(Error::file(&path, problem, "copy the file again, or delete it and run its host again"));
    }
    manifest.check(&path, &bytes)?;
    Ok(ids.into_iter().zip(lines.into_iter().map(<[u8]>::to_vec)).collect())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::output::Journal;
    use crate::output::tests::{record, run};

    fn write_share(folder: &Path, share: Share, run: &Run) -> PathBuf {
        let mut journal = Journal::open(folder, share, run.clone()).unwrap();
        for id in journal.missing() {
            journal.append(record(run, id)).unwrap();
        }
        journal.complete().unwrap()
    }

    proptest! {
        #[test]
        fn shares_tile_the_prompts(prompts in 0usize..200, hosts in 1usize..20) {
            let shares: Vec<_> = (0..hosts).map(|host| Share::new(host, hosts).unwrap().prompts(prompts)).collect();
            prop_assert_eq!(shares.iter().cloned().flatten().collect::<Vec<_>>(), (0..prompts).collect::<Vec<_>>());
            let lengths = shares.iter().map(Range::len);
            prop_assert!(lengths.clone().max().unwrap() - lengths.min().unwrap() <= 1);
        }
    }

    #[test]
    fn merged_shares_equal_one_host() {
        for rounds in [1, 2] {
            let run = Run { rounds, ..run(7) };
            let alone = tempfile::tempdir().unwrap();
            let alone = fs::read(write_share(alone.path(), Share::ALONE, &run)).unwrap();
            for hosts in [1, 2, 4, 9] {
                let folder = tempfile::tempdir().unwrap();
                for host in (0..hosts).rev() {
                    write_share(folder.path(), Share::new(host, hosts).unwrap(), &run);
                }
                let merged = merge(folder.path()).unwrap();
                assert_eq!((merged.hosts, merged.samples), (hosts, 14 * rounds as usize));
                assert_eq!(fs::read(&merged.path).unwrap(), alone, "{hosts} hosts");
                assert_eq!(merge(folder.path()).unwrap(), merged, "a merge can be repeated");
            }
        }
    }

    #[test]
    fn merge_refuses_what_is_not_whole() {
        let run = run(4);
        let share = |host| Share::new(host, 2).unwrap();
        // What is done to a good pair of shares, and what merge says.
        type Damage = fn(&Path);
        let cases: [(Damage, &str); 9] = [
            (
                |folder| fs::remove_file(folder.join("host_0001_of_0002.jsonl")).unwrap(),
                "of 2 shares, 1 missing: host_0001_of_0002.jsonl",
            ),
            (
                |folder| {
                    let path = folder.join("host_0001_of_0002.jsonl");
                    fs::rename(&path, folder.join("host_0001_of_0002.jsonl.partial")).unwrap();
                },
                "only 4 of 4 samples are finished: run host 1 of 2 again",
            ),
            (
                |folder| edit(folder, |bytes| bytes.truncate(bytes.len() - 1)),
                "host_0001_of_0002.jsonl: line 4 is torn: copy the file again",
            ),
            (
                |folder| {
                    edit(folder, |bytes| {
                        bytes.truncate(1 + bytes[..bytes.len() - 1].iter().rposition(|&b| b == b'\n').unwrap())
                    })
                },
                "line 4 holds the end, not prompt 3, generation 1",
            ),
            (
                |folder| edit(folder, |bytes| bytes.extend(bytes.clone())),
                "line 5 holds prompt 2, generation 0, not the end",
            ),
            (|folder| edit(folder, |bytes| bytes[0] = b'x'), "line 1 is not a sample"),
            (
                |folder| {
                    edit(folder, |bytes| {
                        let at = bytes.windows(5).position(|at| at == b"[5,1]").unwrap();
                        bytes[at + 3] = b'2';
                    })
                },
                "host_0001_of_0002.jsonl: its content is not what its host wrote",
            ),
            (
                |folder| {
                    let path = folder.join("host_0001_of_0002.run.json");
                    let text = fs::read_to_string(&path).unwrap().replace("\"prompts\":4", "\"prompts\":5");
                    fs::write(path, text).unwrap();
                },
                "its run is not that of host 0",
            ),
            (
                |folder| fs::write(folder.join("host_0001_of_0003.jsonl"), "").unwrap(),
                "it holds shares of runs on 2 and on 3 hosts",
            ),
        ];
        fn edit(folder: &Path, change: impl Fn(&mut Vec<u8>)) {
            let path = folder.join("host_0001_of_0002.jsonl");
            let mut bytes = fs::read(&path).unwrap();
            change(&mut bytes);
            fs::write(path, bytes).unwrap();
        }
        for (damage, message) in cases {
            let folder = tempfile::tempdir().unwrap();
            write_share(folder.path(), share(0), &run);
            write_share(folder.path(), share(1), &run);
            damage(folder.path());
            let error = merge(folder.path()).unwrap_err();
            assert!(error.to_string().contains(message), "{message}\n{error}");
            assert_eq!(error.exit_code(), 2);
            assert!(!folder.path().join("all_hosts_merged_of_0002.jsonl").exists());
        }
        let empty = tempfile::tempdir().unwrap();
        assert!(merge(empty.path()).unwrap_err().to_string().contains("it holds no host_*_of_*.jsonl"));
        assert!(merge(Path::new("nowhere")).unwrap_err().to_string().contains("cannot read nowhere"));
    }

    #[test]
    fn hosts_are_checked() {
        let error = Share::new(4, 4).unwrap_err().to_string();
        assert_eq!(error, "--host-id = 4 is not a host of 4: hosts count from 0 to 3");
        assert!(Share::new(0, 0).unwrap_err().to_string().contains("--hosts = 0"));
        assert_eq!(Share::new(2, 4).unwrap().file_name("jsonl"), "host_0002_of_0004.jsonl");
    }
}
