//! A run as a timeline, as [`chrome_trace`](crate::chrome_trace) writes it.
//!
//! The machine does not model time: a microsecond of the timeline is one op, so that lengths show order and amount of work,
//! not duration on a chip. Grid steps, ops and the pipeline's blocks have a track each; a DMA is an arc from its start to
//! the wait that ends it, with a mark where it lands.

use std::{collections::BTreeMap, io};

use serde_json::{Value as Json, json};

use crate::chrome_trace::ChromeTrace;

use super::observer::{BlockEvent, DmaEvent, Observer, OpEvent};

/// The tracks.
const STEPS: u32 = 1;
const OPS: u32 = 2;
const BLOCKS: u32 = 3;

/// An [`Observer`] that keeps what it sees for [`write`](Self::write).
#[derive(Debug)]
pub struct Trace {
    kernel: String,
    op_limit: usize,
    /// Ops so far.
    now: u64,
    /// When each grid step began.
    steps: Vec<(u64, Vec<usize>)>,
    /// Names and source lines of the program's ops, by their number.
    names: BTreeMap<u32, (String, String)>,
    /// The number of each op that ran, up to the limit.
    ops: Vec<u32>,
    blocks: Vec<(u64, Json)>,
    dmas: Vec<Dma>,
}

#[derive(Debug)]
struct Dma {
    name: String,
    args: Json,
    started: u64,
    landed: Option<u64>,
    waited: Option<u64>,
}

impl Trace {
    /// An empty trace of the kernel `kernel`.
    pub fn new(kernel: &str) -> Self {
        Self {
            kernel: kernel.to_owned(),
            op_limit: 500_000,
            now: 0,
            steps: vec![],
            names: BTreeMap::new(),
            ops: vec![],
            blocks: vec![],
            dmas: vec![],
        }
    }

    /// Keeps the first `limit` ops (at first 500,000: some 50 MB of JSON). Of later ones only the time passes; the trace
    /// says so. Steps, blocks and DMAs are kept all.
    pub fn with_op_limit(self, limit: usize) -> Self {
        Self { op_limit: limit, ..self }
    }

    /// Writes what was seen, of a run that ended in a fault too, as JSON.
    ///
    /// # Errors
    /// Those of `to`.
    pub fn write(&self, to: impl io::Write) -> io::Result<()> {
        let kernel = format!("{} (1 us = 1 op)", self.kernel);
        let tracks = [(STEPS, "grid steps"), (OPS, "ops"), (BLOCKS, "pipeline")];
        let mut trace = ChromeTrace::new(to, &kernel, tracks)?;
        let ends = self.steps.iter().skip(1).map(|&(began, _)| began).chain([self.now]);
        for ((began, at), end) in self.steps.iter().zip(ends) {
            trace.span(STEPS, &format!("step {at:?}"), "step", *began, end - began, json!({}))?;
        }
        for (at, number) in self.ops.iter().enumerate() {
            let (name, location) = &self.names[number];
            trace.span(OPS, name, "op", at as u64, 1, json!({ "location": location }))?;
        }
        let kept = self.ops.len() as u64;
        if kept < self.now {
            let name = format!("{} ops are left out from here on", self.now - kept);
            trace.instant(OPS, &name, kept, json!({}))?;
        }
        for (at, args) in &self.blocks {
            let way = if args["written_back"] == true { "out" } else { "in" };
            let name = format!("{way} {} {}", args["array"].as_str().unwrap_or_default(), args["index"]);
            trace.instant(BLOCKS, &name, *at, args.clone())?;
        }
        for (id, dma) in self.dmas.iter().enumerate() {
            let phase = |phase: &str, at: u64, args: &Json| json!({ "name": dma.name, "cat": "dma", "ph": phase, "id": id, "ts": at, "pid": 1, "tid": OPS, "args": args });
            trace.event(phase("b", dma.started, &dma.args))?;
            if let Some(landed) = dma.landed {
                trace.event(phase("n", landed, &json!({ "landed": true })))?;
            }
            trace.event(phase("e", dma.waited.unwrap_or(self.now), &json!({ "waited_for": dma.waited.is_some() })))?;
        }
        trace.finish()
    }
}

impl Observer for Trace {
    fn step(&mut self, at: &[usize]) {
        self.steps.push((self.now, at.to_vec()));
    }

    fn resume(&mut self, at: &[usize]) {
        self.step(at);
    }

    fn op(&mut self, op: &OpEvent) {
        if self.ops.len() < self.op_limit {
            self.names.entry(op.number).or_insert_with(|| (op.op.to_owned(), op.location.to_owned()));
            self.ops.push(op.number);
        }
        self.now += 1;
    }

    fn block(&mut self, block: &BlockEvent) {
        let BlockEvent { array, index, bytes, written_back, .. } = *block;
        let args = json!({ "array": array, "index": index, "bytes": bytes, "written_back": written_back });
        self.blocks.push((self.now, args));
    }

    fn dma_start(&mut self, dma: &DmaEvent) {
        debug_assert_eq!(dma.id, self.dmas.len(), "a trace is of one run");
        let args = json!({ "bytes": dma.bytes, "location": dma.location });
        let name = format!("{} -> {}", dma.from, dma.to);
        self.dmas.push(Dma { name, args, started: self.now, landed: None, waited: None });
    }

    fn dma_land(&mut self, id: usize) {
        self.dmas[id].landed = Some(self.now);
    }

    fn dma_wait(&mut self, id: usize) {
        self.dmas[id].waited = Some(self.now);
    }
}
