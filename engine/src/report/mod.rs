//! What a command found out, as one value that is shown in three ways: text for a terminal, JSON for machines, and one
//! HTML page. Whoever has something to say builds a [`Report`]; how it looks is decided here, once for all pages.
//!
//! Invariants: the three forms say the same; a number keeps its unit until it is shown ([`Value`]), so that no figure is
//! printed in two ways; nothing here computes a result, reads a file or asks a device. The HTML page loads nothing from
//! anywhere, and everything that is not markup is escaped.

mod html;
mod text;

use std::fmt;

use pagoda_ir::Bytes;
use serde::Serialize;

/// A page.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// What it is about, a few words.
    pub title: String,
    /// What was looked at, one line.
    pub subtitle: String,
    /// The answer.
    pub verdict: Verdict,
    /// The few numbers that matter most.
    pub figures: Vec<Figure>,
    /// What to change, the best first.
    pub suggestions: Vec<Suggestion>,
    /// The rest, in order.
    pub sections: Vec<Section>,
    /// What the numbers rest on, and what they leave out.
    pub notes: Vec<String>,
}

/// The answer, in a word and a sentence.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Verdict {
    /// How good it is.
    pub status: Status,
    /// One sentence.
    pub headline: String,
    /// What it rests on, a sentence each.
    pub reasons: Vec<String>,
}

/// How good an answer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// Nothing stands in the way.
    Good,
    /// It works, or may work, and something should be looked at.
    Caution,
    /// It does not work.
    Bad,
}

/// A number with its unit.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Value {
    /// Words.
    Text(String),
    /// A number of things.
    Count(u64),
    /// A number of bytes.
    Bytes(Bytes),
    /// Clock cycles.
    Cycles(u64),
    /// A time.
    Seconds(f64),
    /// Things per second.
    PerSecond(f64),
    /// A part of a whole, from 0 to 1.
    Share(f64),
    /// A factor.
    Times(f64),
    /// Not known.
    Missing,
}

impl Value {
    /// Whether it is written to the right of its column.
    fn is_number(&self) -> bool {
        !matches!(self, Self::Text(_))
    }
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl From<String> for Value {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

impl From<Bytes> for Value {
    fn from(bytes: Bytes) -> Self {
        Self::Bytes(bytes)
    }
}

impl From<usize> for Value {
    fn from(count: usize) -> Self {
        Self::Count(count as u64)
    }
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = match self {
            Self::Text(text) => text.clone(),
            Self::Count(count) | Self::Cycles(count) => grouped(*count),
            Self::Bytes(bytes) => bytes.to_string(),
            Self::Seconds(seconds) => duration(*seconds),
            Self::PerSecond(rate) if *rate >= 100.0 => grouped(rate.round() as u64),
            Self::PerSecond(rate) => format!("{rate:.1}"),
            Self::Share(share) => format!("{:.0}%", 100.0 * share),
            Self::Times(factor) => format!("{factor:.2}x"),
            Self::Missing => "-".to_owned(),
        };
        f.pad(&text)
    }
}

/// A number with a comma after every three digits.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let grouped = digits.chars().enumerate().flat_map(|(at, digit)| {
        let comma = at > 0 && (digits.len() - at).is_multiple_of(3);
        comma.then_some(',').into_iter().chain([digit])
    });
    grouped.collect()
}

/// A time in the unit that leaves one to three digits before the point.
fn duration(seconds: f64) -> String {
    match seconds {
        s if !s.is_finite() => "-".to_owned(),
        s if s < 0.9995e-3 => format!("{:.1} us", s * 1e6),
        s if s < 0.9995 => format!("{:.2} ms", s * 1e3),
        s if s < 119.5 => format!("{s:.1} s"),
        s if s < 7170.0 => format!("{:.1} min", s / 60.0),
        s => format!("{:.1} h", s / 3600.0),
    }
}

/// A number worth a large font.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Figure {
    /// Its name in JSON.
    pub key: &'static str,
    /// What it is.
    pub label: String,
    /// The number.
    pub value: Value,
    /// A few words more.
    pub note: String,
}

/// Something to change, and what that does.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Suggestion {
    /// What kind of setting it changes.
    pub kind: &'static str,
    /// The change, as it is typed.
    pub change: String,
    /// What it does, with the numbers before and after.
    pub effect: String,
}

/// A part of a page.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Section {
    /// Its heading.
    pub title: String,
    /// What it shows.
    pub blocks: Vec<Block>,
}

impl Section {
    /// A section of these blocks.
    pub fn new(title: impl Into<String>, blocks: Vec<Block>) -> Self {
        Self { title: title.into(), blocks }
    }
}

/// One thing to show.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Block {
    /// A paragraph.
    Text(String),
    /// Rows and columns.
    Table(Table),
    /// What memories are filled with.
    Bars(Vec<Bar>),
    /// Kernels below the limits of a chip.
    Roofline(Roofline),
    /// Spans of time, side by side.
    Timeline(Timeline),
    /// Spans at their places in time.
    Tracks(Tracks),
    /// Devices, hosts and replicas.
    Mesh(MeshDrawing),
    /// What was tried, along two settings.
    Heat(HeatMap),
    /// Parts of a whole, each on its own.
    Shares(Vec<Share>),
}

/// Rows and columns.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Table {
    /// Headings.
    pub columns: Vec<String>,
    /// As many values as columns, each.
    pub rows: Vec<Vec<Value>>,
}

impl Table {
    /// An empty table.
    pub fn new(columns: &[&str]) -> Self {
        Self { columns: columns.iter().map(|&name| name.to_owned()).collect(), rows: Vec::new() }
    }

    /// Adds a row.
    ///
    /// # Panics
    /// When it has another number of values than there are columns.
    pub fn row(&mut self, values: Vec<Value>) {
        assert_eq!(values.len(), self.columns.len(), "a value per column");
        self.rows.push(values);
    }
}

/// A memory and what it holds.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Bar {
    /// Whose memory it is.
    pub label: String,
    /// What there is.
    pub limit: Bytes,
    /// What is in it, the largest usually first. Parts of zero bytes are not drawn.
    pub parts: Vec<Part>,
}

impl Bar {
    /// All parts together.
    pub fn total(&self) -> Bytes {
        self.parts.iter().map(|part| part.bytes).sum()
    }
}

/// A part of a memory.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Part {
    /// What it is.
    pub label: String,
    /// How much it takes.
    pub bytes: Bytes,
}

/// Kernels by what they compute per byte that they move.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Roofline {
    /// Floating-point operations per second that the chip can do.
    pub peak_flops: f64,
    /// Bytes per second that its memory can move.
    pub bandwidth: f64,
    /// The kernels.
    pub points: Vec<RooflinePoint>,
}

/// One kernel.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RooflinePoint {
    /// What it is part of: points of one group have one shape.
    pub group: String,
    /// Its name: points of one name have one colour.
    pub label: String,
    /// Floating-point operations of a launch.
    pub flops: f64,
    /// Bytes that a launch moves.
    pub bytes: f64,
    /// Seconds of a launch.
    pub seconds: f64,
}

/// A number for each pair of two settings.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct HeatMap {
    /// The setting of the rows, and that of the columns.
    pub axes: [String; 2],
    /// Its values.
    pub columns: Vec<String>,
    /// The other's values, each with a cell per column.
    pub rows: Vec<(String, Vec<Option<Cell>>)>,
}

/// A cell of a heat map.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Cell {
    /// The number; [`Value::Missing`] where there is none.
    pub value: Value,
    /// A few words more.
    pub note: String,
    /// How many times the best one it is; `None` where it does not count.
    pub times_best: Option<f64>,
    /// Whether it is the one that is used.
    pub chosen: bool,
}

/// A part of a whole.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Share {
    /// What it is.
    pub label: String,
    /// From 0 to 1.
    pub share: f64,
    /// A few words more.
    pub note: String,
}

/// Spans of time in lanes below each other, all from 0.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Timeline {
    /// The lanes.
    pub lanes: Vec<Lane>,
}

/// One lane.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Lane {
    /// What it shows.
    pub label: String,
    /// What follows upon each other in it.
    pub spans: Vec<Span>,
}

impl Lane {
    /// All spans together.
    fn seconds(&self) -> f64 {
        self.spans.iter().map(|span| span.seconds).sum()
    }
}

/// One span.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Span {
    /// What takes the time.
    pub label: String,
    /// How long it takes.
    pub seconds: f64,
}

/// Tracks below each other, all from 0.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Tracks {
    /// The tracks.
    pub tracks: Vec<TrackDrawing>,
}

impl Tracks {
    /// When the last span ends.
    fn end(&self) -> f64 {
        self.tracks.iter().flat_map(|track| &track.spans).map(|span| span.to).fold(0.0, f64::max)
    }
}

/// One track.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TrackDrawing {
    /// What it shows.
    pub label: String,
    /// In the order in which they begin; they may overlap.
    pub spans: Vec<Placed>,
}

impl TrackDrawing {
    /// How long at least one span lasts.
    fn busy(&self) -> f64 {
        let (mut busy, mut end) = (0.0, 0.0_f64);
        for Placed { from, to, .. } in &self.spans {
            busy += (to - from.max(end)).max(0.0);
            end = end.max(*to);
        }
        busy
    }
}

/// A span of a track, in seconds.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Placed {
    /// What takes the time.
    pub label: String,
    /// When it begins.
    pub from: f64,
    /// When it ends.
    pub to: f64,
}

/// Replicas and hosts of a slice.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MeshDrawing {
    /// Hosts.
    pub hosts: usize,
    /// Devices of each.
    pub devices_per_host: usize,
    /// Devices of one replica.
    pub model: usize,
}

impl Report {
    /// As text, for a terminal.
    pub fn text(&self) -> String {
        text::render(self)
    }

    /// As one HTML page that loads nothing.
    pub fn html(&self) -> String {
        html::render(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_shown_with_their_units() {
        let shown = [
            Value::Count(409_600),
            Value::Cycles(999),
            Value::Seconds(3.2e-6),
            Value::Seconds(0.0072),
            Value::Seconds(61.0),
            Value::Seconds(600.0),
            Value::Seconds(9000.0),
            Value::PerSecond(12345.6),
            Value::PerSecond(7.25),
            Value::Share(0.214),
            Value::Times(3.5),
            Value::Missing,
        ];
        let shown: Vec<_> = shown.iter().map(Value::to_string).collect();
        let expected = [
            "409,600", "999", "3.2 us", "7.20 ms", "61.0 s", "10.0 min", "2.5 h", "12,346", "7.2", "21%", "3.50x", "-",
        ];
        assert_eq!(shown, expected);
    }
}
