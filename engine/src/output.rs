//! Where finished samples go: one JSONL file per host, which survives a crash at any moment.
//!
//! While a host runs, each finished sample is appended as one line to `host_0002_of_0004.jsonl.partial` and synced to
//! disk. When the share is complete, its lines are written in sample order to `host_0002_of_0004.jsonl` in one atomic
//! step, and the journal goes away: so a file with the final name is always whole. `host_0002_of_0004.run.json` says
//! which run the share belongs to, so that another run's samples are never taken for this one's. Hosts count from 0.
//!
//! A rerun finds what the journal holds and makes the rest. A last line without its newline was torn by a crash; it is
//! dropped, because its sample was never acknowledged. Nothing else is repaired: a journal's line carries a checksum of
//! its sample, `run.json` a digest of the complete file, and a line that was altered, or whose sample is none of the share,
//! ends the run with an error.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::config::Settings;
use crate::error::{Error, Result};
use crate::hosts::Share;
use crate::scheduler::Finished;
use crate::stop::FinishReason;
use crate::units::SampleId;

/// A finished sample as it is printed and stored.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// The prompt's place in the whole run's list.
    pub index: usize,
    /// Which repetition of the list; only in runs with several.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub round: Option<u32>,
    /// Which sample of the prompt; only in runs with several.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generation: Option<u32>,
    /// The prompt as given.
    pub prompt: String,
    /// Its tokens.
    pub prompt_tokens: Vec<u32>,
    /// The new tokens, the stopping one included.
    pub tokens: Vec<u32>,
    /// The new text, without the end-of-sequence token and the stop sequence.
    pub text: String,
    /// Why the sample ended.
    pub finish_reason: FinishReason,
}

impl Record {
    /// The record of a sample that the scheduler finished; `text` is that of its first `text_tokens` tokens.
    pub fn new(run: &Run, finished: Finished, prompt: String, text: String) -> Self {
        let Finished { id, prompt: tokens_of_prompt, tokens, reason: finish_reason, .. } = finished;
        let (round, generation) = run.labels(id);
        let prompt_tokens = tokens_of_prompt.to_vec();
        Self { index: id.index, round, generation, prompt, prompt_tokens, tokens, text, finish_reason }
    }

    /// Which sample of the run this is.
    pub fn id(&self) -> SampleId {
        SampleId { round: self.round.unwrap_or(0), index: self.index, generation: self.generation.unwrap_or(0) }
    }

    /// The record as one line of JSON, with its newline.
    pub fn line(&self) -> String {
        let mut line = serde_json::to_string(self).expect("text, numbers and lists are always JSON");
        line.push('\n');
        line
    }

    /// The line of a journal: the record's, with a checksum of it as its last key.
    fn sealed_line(&self) -> String {
        let line = self.line();
        let open = line.strip_suffix("}\n").expect("a record is a JSON object, and a line");
        format!("{open},\"checksum\":\"{}\"}}\n", fingerprint([line.as_bytes()]))
    }
}

/// What all hosts of a run agree on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Run {
    /// Everything that decides the texts (settings, prompts, model files), as a [`fingerprint`].
    pub identity: String,
    /// Prompts of the whole run.
    pub prompts: usize,
    /// Samples per prompt and round.
    pub generations: u32,
    /// Repetitions of the list.
    pub rounds: u32,
}

impl Run {
    /// The run of these settings on a model, which `model` identifies (see [`crate::model::identity`]).
    pub fn new(settings: &Settings, model: &str) -> Self {
        Self {
            identity: fingerprint([settings.identity().as_bytes(), model.as_bytes()]),
            prompts: settings.prompts.len(),
            generations: settings.n_generations as u32, // sizes of settings are within i32
            rounds: settings.n_rounds as u32,
        }
    }

    /// A host's samples, in the order in which they are printed and stored.
    pub fn samples(&self, share: Share) -> Vec<SampleId> {
        let prompts = share.prompts(self.prompts);
        let of_round = |round| {
            let of_prompt =
                move |index| (0..self.generations).map(move |generation| SampleId { round, index, generation });
            prompts.clone().flat_map(of_prompt)
        };
        (0..self.rounds).flat_map(of_round).collect()
    }

    /// A record's round and generation, which are written only in runs that have several.
    pub fn labels(&self, id: SampleId) -> (Option<u32>, Option<u32>) {
        ((self.rounds > 1).then_some(id.round), (self.generations > 1).then_some(id.generation))
    }
}

/// What a host's `run.json` holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Manifest {
    /// The run that the share belongs to.
    pub run: Run,
    /// A [`fingerprint`] of the complete share; set before the share gets its final name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
}

impl Manifest {
    fn write(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_string(self).expect("numbers and text are always JSON") + "\n";
        write_atomically(path, text.as_bytes())
    }

    /// Whether these are the bytes of the share `path` as they were written.
    pub(crate) fn check(&self, path: &Path, bytes: &[u8]) -> Result<()> {
        if self.digest.as_ref() == Some(&fingerprint([bytes])) {
            return Ok(());
        }
        let fix = "copy it again with its run.json, or delete it and run its host again";
        Err(Error::file(path, "its content is not what its host wrote", fix))
    }
}

/// A short name for what `parts` hold: the first 128 bits of SHA-256 over each part's length and bytes, in hexadecimal.
pub fn fingerprint<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    hash.finalize()[..16].iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The journal of one host's share.
#[derive(Debug)]
pub struct Journal {
    run: Run,
    share: Share,
    folder: PathBuf,
    /// `None` when the share was complete already.
    file: Option<File>,
    records: BTreeMap<SampleId, Record>,
}

impl Journal {
    /// Opens or creates the journal in `folder` and reads what earlier runs finished.
    ///
    /// # Errors
    /// When the folder holds this share of another run, another process writes it, or a finished line is damaged.
    pub fn open(folder: &Path, share: Share, run: Run) -> Result<Self> {
        fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
        let manifest = folder.join(share.file_name("run.json"));
        if manifest.exists() {
            if read_manifest(&manifest)?.run != run {
                let fix = "give another --out, or run with the settings, prompts and model of that run";
                return Err(Error::file(manifest, "it says that this folder holds samples of another run", fix));
            }
        } else {
            Manifest { run: run.clone(), digest: None }.write(&manifest)?;
        }

        let complete = folder.join(share.file_name("jsonl"));
        let (path, file) = if complete.exists() {
            (complete, None)
        } else {
            let path = folder.join(share.file_name("jsonl.partial"));
            let file = OpenOptions::new().create(true).append(true).open(&path).map_err(Error::io("open", &path))?;
            // Other failures mean a file system without locks, where the user keeps writers apart.
            if matches!(file.try_lock(), Err(TryLockError::WouldBlock)) {
                return Err(Error::file(path, "another process is writing it", "wait for it, or give another --out"));
            }
            sync_folder(folder)?;
            (path, Some(file))
        };
        let bytes = fs::read(&path).map_err(Error::io("read", &path))?;
        let (lines, torn) = split_lines(&bytes);
        match &file {
            Some(file) if torn > 0 => {
                log::warn!("{}: dropping the last line, which a crash left unfinished", path.display());
                file.set_len((bytes.len() - torn) as u64).map_err(Error::io("truncate", &path))?;
            }
            None if torn > 0 => return Err(torn_line(&path, lines.len() + 1)),
            _ => {}
        }
        let parsed = match &file {
            Some(_) => sealed_lines(&path, &lines)?,
            None => parse_lines(&path, &lines)?,
        };
        let expected: BTreeSet<_> = run.samples(share).into_iter().collect();
        let mut records = BTreeMap::new();
        for (at, record) in parsed.into_iter().enumerate() {
            let id = record.id();
            let known = expected.contains(&id) && run.labels(id) == (record.round, record.generation);
            if !known || records.insert(id, record).is_some() {
                let what = if known { "is there twice" } else { "is none of this share" };
                let problem = format!("line {}: the sample of {id} {what}", at + 1);
                return Err(Error::file(&path, problem, "delete the line, and run again"));
            }
        }
        if file.is_none() {
            read_manifest(&manifest)?.check(&path, &bytes)?;
        }
        Ok(Self { run, share, folder: folder.into(), file, records })
    }

    /// What is finished, by sample.
    pub fn finished(&self) -> &BTreeMap<SampleId, Record> {
        &self.records
    }

    /// The samples that are still to be made, in order.
    pub fn missing(&self) -> Vec<SampleId> {
        let mut samples = self.run.samples(self.share);
        samples.retain(|id| !self.records.contains_key(id));
        samples
    }

    /// Stores a finished sample; when this returns, it survives a crash.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn append(&mut self, record: Record) -> Result<()> {
        let path = || self.folder.join(self.share.file_name("jsonl.partial"));
        if let Some(file) = &mut self.file {
            // One write: a crash leaves a prefix of the line, which has no newline.
            let written = file.write_all(record.sealed_line().as_bytes()).and_then(|()| file.sync_data());
            written.map_err(|error| Error::io("write", &path())(error))?;
        }
        self.records.insert(record.id(), record);
        Ok(())
    }

    /// Writes the complete share under its final name and removes the journal; answers the file.
    ///
    /// # Errors
    /// When samples are missing, or the file cannot be written; the journal is then kept.
    pub fn complete(self) -> Result<PathBuf> {
        let path = self.folder.join(self.share.file_name("jsonl"));
        if self.file.is_none() {
            return Ok(path);
        }
        let partial = self.folder.join(self.share.file_name("jsonl.partial"));
        let missing = self.missing().len();
        if missing > 0 {
            let problem = format!("{missing} of {} samples are missing", self.run.samples(self.share).len());
            return Err(Error::file(partial, problem, "run again with the same settings to make the rest"));
        }
        let text: String = self.records.values().map(Record::line).collect();
        // The digest first: after a crash in between, the journal is still there, and yields the same text.
        let digest = Some(fingerprint([text.as_bytes()]));
        Manifest { run: self.run, digest }.write(&self.folder.join(self.share.file_name("run.json")))?;
        write_atomically(&path, text.as_bytes())?;
        fs::remove_file(&partial).map_err(Error::io("remove", &partial))?;
        Ok(path)
    }
}

/// Puts records that finish in any order back into the order of samples, for printing as early as possible.
#[derive(Debug)]
pub struct InOrder {
    expected: VecDeque<SampleId>,
    waiting: BTreeMap<SampleId, Record>,
}

impl InOrder {
    /// Will answer exactly these samples, in this order.
    pub fn new(samples: Vec<SampleId>) -> Self {
        Self { expected: samples.into(), waiting: BTreeMap::new() }
    }

    /// Takes a record; answers those that can be printed now.
    pub fn push(&mut self, record: Record) -> Vec<Record> {
        self.waiting.insert(record.id(), record);
        let mut ready = Vec::new();
        while let Some(record) = self.expected.front().and_then(|id| self.waiting.remove(id)) {
            self.expected.pop_front();
            ready.push(record);
        }
        ready
    }

    /// What finished behind a sample that never did: for printing after an interruption.
    pub fn rest(self) -> Vec<Record> {
        self.waiting.into_values().collect()
    }
}

/// Complete lines without their newlines, and the length of what follows the last newline.
pub(crate) fn split_lines(bytes: &[u8]) -> (Vec<&[u8]>, usize) {
    let mut lines: Vec<_> = bytes.split(|&byte| byte == b'\n').collect();
    let torn = lines.pop().map_or(0, <[u8]>::len);
    (lines, torn)
}

pub(crate) fn torn_line(path: &Path, line: usize) -> Error {
    Error::file(path, format!("line {line} is torn"), "copy the file again, or delete it and run its host again")
}

pub(crate) fn parse_lines(path: &Path, lines: &[&[u8]]) -> Result<Vec<Record>> {
    let parse = |(at, line): (usize, &&[u8])| {
        serde_json::from_slice(line).map_err(|error| {
            let problem = format!("line {} is not a sample: {error}", at + 1);
            Error::file(path, problem, "copy the file again, or delete it and run its host again")
        })
    };
    lines.iter().enumerate().map(parse).collect()
}

/// The records of a journal's lines, each as its checksum says that it was written.
fn sealed_lines(path: &Path, lines: &[&[u8]]) -> Result<Vec<Record>> {
    const KEY: &str = ",\"checksum\":\"";
    let unsealed = |(at, line): (usize, &&[u8])| {
        let altered = |problem: &str| {
            Error::file(
                path,
                format!("line {} {problem}", at + 1),
                "delete the line, and run again: its sample is made anew",
            )
        };
        let text = std::str::from_utf8(line).map_err(|_| altered("is not UTF-8 text"))?;
        let (open, seal) = text.rsplit_once(KEY).ok_or_else(|| altered("carries no checksum"))?;
        let record = format!("{open}}}\n");
        match seal.strip_suffix("\"}") {
            Some(checksum) if checksum == fingerprint([record.as_bytes()]) => Ok(record),
            _ => Err(altered("is not as it was written: its checksum differs")),
        }
    };
    let lines = lines.iter().enumerate().map(unsealed).collect::<Result<Vec<_>>>()?;
    parse_lines(path, &lines.iter().map(|line| line.trim_end().as_bytes()).collect::<Vec<_>>())
}

pub(crate) fn read_manifest(path: &Path) -> Result<Manifest> {
    let bytes = fs::read(path).map_err(Error::io("read", path))?;
    serde_json::from_slice(&bytes).map_err(|error| {
        Error::file(path, format!("it does not describe a run: {error}"), "delete the share and run it again")
    })
}

/// Writes a file so that its name holds the old content or the new one, whole, whatever happens.
pub(crate) fn write_atomically(path: &Path, bytes: &[u8]) -> Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut builder = tempfile::Builder::new();
    builder.prefix(".pagoda-");
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666)); // less the umask, as for any file
    let write = || {
        let mut file = builder.tempfile_in(folder)?;
        file.write_all(bytes)?;
        file.as_file().sync_all()?;
        file.persist(path).map_err(|error| error.error)
    };
    write().map_err(Error::io("write", path))?;
    sync_folder(folder)
}

/// Makes new names in a folder survive a crash.
fn sync_folder(folder: &Path) -> Result<()> {
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(Error::io("sync", folder))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A run of `prompts` prompts, two samples each.
    pub(crate) fn run(prompts: usize) -> Run {
        Run { identity: fingerprint([b"x".as_slice()]), prompts, generations: 2, rounds: 1 }
    }

    pub(crate) fn record(run: &Run, id: SampleId) -> Record {
        let finished = Finished {
            id,
            prompt: [0, id.index as u32].into(),
            tokens: vec![5, 1],
            text_tokens: 1,
            reason: FinishReason::Stop,
        };
        Record::new(run, finished, format!("prompt \"{}\"\n", id.index), "שלום\u{2028}".into())
    }

    #[test]
    fn the_line_is_the_documented_object() {
        let run = Run { generations: 1, ..run(1) };
        let line = record(&run, run.samples(Share::ALONE)[0]).line();
        let expected = "{\"index\":0,\"prompt\":\"prompt \\\"0\\\"\\n\",\"prompt_tokens\":[0,0],\"tokens\":[5,1],\
                        \"text\":\"שלום\u{2028}\",\"finish_reason\":\"stop\"}\n";
        assert_eq!(line, expected);
    }

    /// A crash after any byte of the journal loses the line that was being written, and nothing else.
    #[test]
    fn a_crash_at_any_byte_keeps_the_finished_samples() {
        let folder = tempfile::tempdir().unwrap();
        let run = run(2);
        let samples = run.samples(Share::ALONE);
        let open = || Journal::open(folder.path(), Share::ALONE, run.clone());
        let mut journal = open().unwrap();
        for &id in samples.iter().rev() {
            journal.append(record(&run, id)).unwrap();
        }
        assert!(open().unwrap_err().to_string().contains("another process is writing it"));
        drop(journal);
        let partial = folder.path().join("host_0000_of_0001.jsonl.partial");
        let whole = fs::read(&partial).unwrap();
        // Every sync costs milliseconds, so not quite every byte: each newline's neighbours, and the rest in steps.
        let near_newline = |at: usize| whole[at.saturating_sub(2)..(at + 1).min(whole.len())].contains(&b'\n');
        for length in (0..=whole.len()).filter(|&at| at % 29 == 0 || near_newline(at)) {
            fs::write(&partial, &whole[..length]).unwrap();
            let kept = whole[..length].iter().filter(|&&byte| byte == b'\n').count();
            let mut journal = open().unwrap();
            assert_eq!(journal.finished().len(), kept, "after {length} bytes");
            assert_eq!(journal.missing(), samples[..samples.len() - kept]);
            for id in journal.missing().into_iter().rev() {
                journal.append(record(&run, id)).unwrap();
            }
            drop(journal);
            assert_eq!(fs::read(&partial).unwrap(), whole, "after {length} bytes");
        }
        let path = open().unwrap().complete().unwrap();
        let sorted: String = samples.iter().map(|&id| record(&run, id).line()).collect();
        assert_eq!(fs::read_to_string(&path).unwrap(), sorted);
        assert!(!partial.exists());
        // A rerun of a complete share has nothing to do and changes nothing.
        let journal = open().unwrap();
        assert!(journal.missing().is_empty());
        assert_eq!(journal.complete().unwrap(), path);
        assert_eq!(fs::read_to_string(&path).unwrap(), sorted);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2, "samples and manifest");
    }

    #[test]
    fn incomplete_damaged_and_foreign_shares_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let run = run(1);
        let open = |run: &Run| Journal::open(folder.path(), Share::ALONE, run.clone());
        let error = open(&run).unwrap().complete().unwrap_err().to_string();
        assert!(error.contains("2 of 2 samples are missing"), "{error}");
        let error = open(&Run { identity: "other".into(), ..run.clone() }).unwrap_err().to_string();
        assert!(error.contains("samples of another run: give another --out"), "{error}");

        let lines: Vec<_> = run.samples(Share::ALONE).into_iter().map(|id| record(&run, id).sealed_line()).collect();
        let other = Run { prompts: 2, ..run.clone() };
        let stranger = record(&other, other.samples(Share::ALONE)[2]).sealed_line();
        let altered = lines[1].replacen("[5,1]", "[5,2]", 1);
        assert_ne!(altered, lines[1]);
        for (journal, message) in [
            ("{}\n".to_owned(), "line 1 carries no checksum: delete the line, and run again"),
            (lines[0].clone() + &altered, "line 2 is not as it was written: its checksum differs"),
            (lines[0].replace("\"checksum\":\"", "\"checksum\":\"0"), "line 1 is not as it was written"),
            (lines[0].clone() + &stranger, "line 2: the sample of prompt 1, generation 0 is none of this share"),
            (lines[0].repeat(2), "line 2: the sample of prompt 0, generation 0 is there twice: delete the line"),
        ] {
            fs::write(folder.path().join("host_0000_of_0001.jsonl.partial"), journal).unwrap();
            let error = open(&run).unwrap_err();
            assert!(error.to_string().contains(message), "{error}");
            assert_eq!(error.exit_code(), 2);
        }
        fs::write(folder.path().join("host_0000_of_0001.jsonl.partial"), lines.concat()).unwrap();
        let path = open(&run).unwrap().complete().unwrap();
        let whole = fs::read_to_string(&path).unwrap();
        assert!(!whole.contains("checksum"));
        fs::write(&path, whole.replacen("[5,1]", "[5,2]", 1)).unwrap();
        let error = open(&run).unwrap_err().to_string();
        assert!(
            error.contains("host_0000_of_0001.jsonl: its content is not what its host wrote: copy it again"),
            "{error}"
        );
    }

    #[test]
    fn samples_are_printed_in_order() {
        let run = run(2);
        let ids = run.samples(Share::ALONE);
        let mut order = InOrder::new(ids.clone());
        let pushed: Vec<Vec<_>> =
            [1, 0, 3].map(|at| order.push(record(&run, ids[at])).iter().map(Record::id).collect()).into();
        assert_eq!(pushed, [vec![], vec![ids[0], ids[1]], vec![]]);
        assert_eq!(order.rest().iter().map(Record::id).collect::<Vec<_>>(), [ids[3]]);
    }
}
