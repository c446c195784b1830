//! Timelines in Chrome's trace format, which [Perfetto](https://ui.perfetto.dev) opens.
//!
//! Times and lengths are microseconds of the timeline, whatever those mean to the writer.
//!
//! Source of the format: "Trace Event Format" of the Chromium project.

use std::io::{Result, Write};

use serde_json::{Value as Json, json};

/// Writes a timeline, event by event.
#[derive(Debug)]
pub struct ChromeTrace<W> {
    to: W,
    first: bool,
}

impl<W: Write> ChromeTrace<W> {
    /// Begins the timeline of a process, named `process`, with these tracks.
    ///
    /// # Errors
    /// Those of `to`, as everywhere here.
    pub fn new<'a>(mut to: W, process: &str, tracks: impl IntoIterator<Item = (u32, &'a str)>) -> Result<Self> {
        write!(to, "{{\"displayTimeUnit\":\"ms\",\"traceEvents\":[")?;
        let mut trace = Self { to, first: true };
        trace.event(json!({ "name": "process_name", "ph": "M", "pid": 1, "args": { "name": process } }))?;
        for (track, name) in tracks {
            trace
                .event(json!({ "name": "thread_name", "ph": "M", "pid": 1, "tid": track, "args": { "name": name } }))?;
        }
        Ok(trace)
    }

    /// Writes an event as it is.
    ///
    /// # Errors
    /// Those of the writer.
    pub fn event(&mut self, event: Json) -> Result<()> {
        self.to.write_all(if std::mem::take(&mut self.first) { b"\n" } else { b",\n" })?;
        Ok(serde_json::to_writer(&mut self.to, &event)?)
    }

    /// Something that lasts.
    ///
    /// # Errors
    /// Those of the writer.
    pub fn span(
        &mut self,
        track: u32,
        name: &str,
        category: &str,
        at: impl Into<Json>,
        length: impl Into<Json>,
        args: Json,
    ) -> Result<()> {
        let (at, length) = (at.into(), length.into());
        self.event(
            json!({ "name": name, "cat": category, "ph": "X", "ts": at, "dur": length, "pid": 1, "tid": track, "args": args }),
        )
    }

    /// Something that happens.
    ///
    /// # Errors
    /// Those of the writer.
    pub fn instant(&mut self, track: u32, name: &str, at: impl Into<Json>, args: Json) -> Result<()> {
        self.event(json!({ "name": name, "ph": "i", "s": "t", "ts": at.into(), "pid": 1, "tid": track, "args": args }))
    }

    /// Values from here on, drawn as one chart: `{"name": value}`.
    ///
    /// # Errors
    /// Those of the writer.
    pub fn counter(&mut self, name: &str, at: impl Into<Json>, values: Json) -> Result<()> {
        self.event(json!({ "name": name, "ph": "C", "ts": at.into(), "pid": 1, "args": values }))
    }

    /// Ends the timeline.
    ///
    /// # Errors
    /// Those of the writer.
    pub fn finish(mut self) -> Result<()> {
        writeln!(self.to, "\n]}}")
    }
}
