//! A report as plain text: aligned columns, bars of block characters, no colours.

use std::fmt::Write as _;

use super::{
    Bar, Block, HeatMap, MeshDrawing, Report, Roofline, Section, Share, Status, Table, Timeline, Tracks, Value,
};

/// Characters of a full bar.
const BAR: usize = 40;
/// Columns of running text.
const WIDTH: usize = 110;

/// The whole report.
pub(super) fn render(report: &Report) -> String {
    let mut out = format!("{}\n{}\n\n", report.title, report.subtitle);
    let Report { verdict, figures, suggestions, sections, notes, .. } = report;
    let word = match verdict.status {
        Status::Good => "OK",
        Status::Caution => "CAUTION",
        Status::Bad => "NO",
    };
    wrapped(&mut out, &format!("{word}: "), &verdict.headline);
    verdict.reasons.iter().for_each(|reason| wrapped(&mut out, "  - ", reason));
    if !figures.is_empty() {
        out.push('\n');
        let [labels, values] = [
            figures.iter().map(|figure| figure.label.chars().count()).max().unwrap_or(0),
            figures.iter().map(|figure| figure.value.to_string().chars().count()).max().unwrap_or(0),
        ];
        for figure in figures {
            let line = format!("  {:<labels$}  {:>values$}  {}", figure.label, figure.value.to_string(), figure.note);
            let _ = writeln!(out, "{}", line.trim_end());
        }
    }
    if !suggestions.is_empty() {
        out.push_str("\nWhat to change\n");
        for (at, suggestion) in suggestions.iter().enumerate() {
            let lead = format!("  {}. ", at + 1);
            wrapped(&mut out, &lead, &format!("[{}] {}", suggestion.kind, suggestion.change));
            wrapped(&mut out, &" ".repeat(lead.len()), &suggestion.effect);
        }
    }
    sections.iter().for_each(|section| self::section(&mut out, section));
    if !notes.is_empty() {
        out.push_str("\nWhat this rests on\n");
        notes.iter().for_each(|note| wrapped(&mut out, "  - ", note));
    }
    out.truncate(out.trim_end().len());
    out
}

fn section(out: &mut String, section: &Section) {
    let _ = writeln!(out, "\n{}", section.title);
    for block in &section.blocks {
        match block {
            Block::Text(text) => wrapped(out, "  ", text),
            Block::Table(table) => self::table(out, table),
            Block::Bars(bars) => self::bars(out, bars),
            Block::Roofline(roofline) => self::roofline(out, roofline),
            Block::Timeline(timeline) => self::timeline(out, timeline),
            Block::Tracks(tracks) => self::tracks(out, tracks),
            Block::Mesh(mesh) => self::mesh(out, mesh),
            Block::Heat(map) => self::heat(out, map),
            Block::Shares(shares) => self::shares(out, shares),
        }
    }
}

/// A table of the numbers; the one that is used has a star.
fn heat(out: &mut String, map: &HeatMap) {
    let [rows, columns] = &map.axes;
    let corner = format!("{rows} \\ {columns}");
    let names: Vec<&str> = std::iter::once(corner.as_str()).chain(map.columns.iter().map(String::as_str)).collect();
    let mut table = Table::new(&names);
    for (name, cells) in &map.rows {
        let cells = cells.iter().map(|cell| match cell {
            None => Value::Text(String::new()),
            Some(cell) if cell.times_best.is_none() => "x".into(),
            Some(cell) => format!("{}{}", cell.value, if cell.chosen { "*" } else { "" }).into(),
        });
        table.row(std::iter::once(name.as_str().into()).chain(cells).collect());
    }
    self::table(out, &table);
}

fn shares(out: &mut String, shares: &[Share]) {
    let width = shares.iter().map(|share| share.label.chars().count()).max().unwrap_or(0);
    for Share { label, share, note } in shares {
        let bar = blocks(share.clamp(0.0, 1.0), BAR);
        let line = format!("  {label:<width$} {bar} {:>4}  {note}", Value::Share(*share).to_string());
        let _ = writeln!(out, "{}", line.trim_end());
    }
}

/// `lead` and then the words of `text`, further lines indented as far.
fn wrapped(out: &mut String, lead: &str, text: &str) {
    let indent = lead.chars().count();
    let mut line = lead.to_owned();
    let mut column = indent;
    for word in text.split(' ') {
        let length = word.chars().count();
        if column > indent && column + 1 + length > WIDTH {
            let _ = writeln!(out, "{}", line.trim_end());
            line = " ".repeat(indent);
            column = indent;
        }
        if column > indent {
            line.push(' ');
            column += 1;
        }
        line.push_str(word);
        column += length;
    }
    let _ = writeln!(out, "{}", line.trim_end());
}

fn table(out: &mut String, table: &Table) {
    let cells: Vec<Vec<String>> = table.rows.iter().map(|row| row.iter().map(Value::to_string).collect()).collect();
    let columns = table.columns.iter().enumerate().map(|(at, name)| {
        let width = cells.iter().map(|row| row[at].chars().count()).chain([name.chars().count()]).max().unwrap_or(0);
        let right = !table.rows.is_empty() && table.rows.iter().all(|row| row[at].is_number());
        (width, right)
    });
    let columns: Vec<(usize, bool)> = columns.collect();
    let mut line = |cells: &[String]| {
        let padded = cells.iter().zip(&columns).map(|(cell, &(width, right))| match right {
            true => format!("{cell:>width$}"),
            false => format!("{cell:<width$}"),
        });
        let _ = writeln!(out, "{}", format!("  {}", padded.collect::<Vec<_>>().join("  ")).trim_end());
    };
    line(&table.columns);
    cells.iter().for_each(|row| line(row));
}

/// A part of a bar of `length` characters, at least one where there is anything.
fn blocks(share: f64, length: usize) -> String {
    let filled = (share * length as f64).round() as usize;
    let filled = filled.clamp(usize::from(share > 0.0), length);
    "\u{2588}".repeat(filled) + &"\u{2591}".repeat(length - filled)
}

/// A few bars with their parts; of many, one line each.
fn bars(out: &mut String, bars: &[Bar]) {
    const FEW: usize = 2;
    let width = bars.iter().map(|bar| bar.label.chars().count()).max().unwrap_or(0);
    bars.iter().for_each(|bar| self::bar(out, bar, width, bars.len() <= FEW));
}

fn bar(out: &mut String, bar: &Bar, width: usize, with_parts: bool) {
    let (total, limit) = (bar.total(), bar.limit);
    let share = total.0 as f64 / limit.0.max(1) as f64;
    let too_much = if total > limit { format!("  {} too much", total - limit) } else { String::new() };
    let _ = writeln!(
        out,
        "  {:<width$} {}  {total} of {limit} ({}){too_much}",
        bar.label,
        blocks(share.min(1.0), BAR),
        Value::Share(share)
    );
    if !with_parts {
        return;
    }
    let parts = bar.parts.iter().filter(|part| part.bytes.0 > 0);
    let width = parts.clone().map(|part| part.label.chars().count()).max().unwrap_or(0);
    for part in parts {
        let share = part.bytes.0 as f64 / total.0.max(1) as f64;
        let _ = writeln!(out, "    {:<width$} {:>12}  {:>4}", part.label, part.bytes, Value::Share(share).to_string());
    }
}

fn roofline(out: &mut String, roofline: &Roofline) {
    let mut rows = Table::new(&["kernel", "flop per byte", "of peak", "of bandwidth", "bound by"]);
    for point in &roofline.points {
        let (compute, memory) = (point.flops / roofline.peak_flops, point.bytes / roofline.bandwidth);
        rows.row(vec![
            format!("{} {}", point.group, point.label).into(),
            Value::PerSecond(point.flops / point.bytes.max(1.0)),
            Value::Share(compute / point.seconds),
            Value::Share(memory / point.seconds),
            if compute > memory { "matrix units" } else { "HBM" }.into(),
        ]);
    }
    table(out, &rows);
}

fn timeline(out: &mut String, timeline: &Timeline) {
    let longest = timeline.lanes.iter().map(super::Lane::seconds).fold(0.0, f64::max);
    for lane in &timeline.lanes {
        let total = lane.seconds();
        let _ = writeln!(out, "  {} {}", lane.label, Value::Seconds(total));
        let width = lane.spans.iter().map(|span| span.label.chars().count()).max().unwrap_or(0);
        for span in &lane.spans {
            let share = if longest > 0.0 { span.seconds / longest } else { 0.0 };
            let _ = writeln!(
                out,
                "    {:<width$} {} {:>10}  {:>4}",
                span.label,
                blocks(share, BAR / 2),
                Value::Seconds(span.seconds).to_string(),
                Value::Share(if total > 0.0 { span.seconds / total } else { 0.0 }).to_string(),
            );
        }
    }
}

/// Each track as one line: where it is busy, and how much of the time.
fn tracks(out: &mut String, tracks: &Tracks) {
    const WIDTH: usize = 60;
    let end = tracks.end();
    let names = tracks.tracks.iter().map(|track| track.label.chars().count()).max().unwrap_or(0);
    for track in &tracks.tracks {
        let mut line = ['\u{2591}'; WIDTH];
        let at = |time: f64| if end > 0.0 { (time / end * WIDTH as f64) as usize } else { 0 };
        for span in track.spans.iter().filter(|span| span.to > span.from) {
            let first = at(span.from).min(WIDTH - 1);
            let last = (at(span.to).max(first + 1)).min(WIDTH);
            line[first..last].fill('\u{2588}');
        }
        let share = if end > 0.0 { track.busy() / end } else { 0.0 };
        let line: String = line.iter().collect();
        let _ = writeln!(out, "  {:<names$} {line} {:>4}", track.label, Value::Share(share).to_string());
    }
}

/// Hosts as lines of devices, a letter per replica; a slice of many is cut short.
fn mesh(out: &mut String, mesh: &MeshDrawing) {
    const LINES: usize = 8;
    let name = |replica: usize| format!("{replica:>3}");
    for host in 0..mesh.hosts.min(LINES) {
        let devices =
            (0..mesh.devices_per_host).map(|device| name((host * mesh.devices_per_host + device) / mesh.model));
        let _ = writeln!(out, "  host {host:<3} [{} ]", devices.collect::<Vec<_>>().join(" "));
    }
    if mesh.hosts > LINES {
        let _ = writeln!(out, "  ... and {} hosts more", mesh.hosts - LINES);
    }
}
