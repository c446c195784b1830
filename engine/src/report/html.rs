//! A report as one HTML page: its style sheet and its drawings are in it, so that the file can be mailed or archived.
//!
//! Colours are the style sheet's (`k0` to `k7`), for light and dark; geometry is computed here.

use maud::{DOCTYPE, Markup, PreEscaped, html};

use super::{
    Bar, Block, Cell, Figure, HeatMap, MeshDrawing, Report, Roofline, RooflinePoint, Section, Share, Status,
    Suggestion, Table, Timeline, Tracks, Value, Verdict,
};

/// Colours of the style sheet.
const COLOURS: usize = 8;

/// The whole page.
pub(super) fn render(report: &Report) -> String {
    let page = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                title { (report.title) }
                style { (PreEscaped(include_str!("page.css"))) }
            }
            body {
                main {
                    h1 { (report.title) }
                    p.subtitle { (report.subtitle) }
                    (verdict(&report.verdict))
                    (figures(&report.figures))
                    (suggestions(&report.suggestions))
                    @for part in &report.sections { (section(part)) }
                    (notes(&report.notes))
                }
            }
        }
    };
    page.into_string()
}

fn verdict(verdict: &Verdict) -> Markup {
    let (class, word) = match verdict.status {
        Status::Good => ("good", "OK"),
        Status::Caution => ("caution", "CAUTION"),
        Status::Bad => ("bad", "NO"),
    };
    html! {
        div class=(format!("card verdict {class}")) {
            span.word { (word) }
            strong { (verdict.headline) }
            @if !verdict.reasons.is_empty() {
                ul { @for reason in &verdict.reasons { li { (reason) } } }
            }
        }
    }
}

fn figures(figures: &[Figure]) -> Markup {
    html! {
        @if !figures.is_empty() {
            div.figures {
                @for figure in figures {
                    div.figure {
                        div.label { (figure.label) }
                        div.value { (figure.value.to_string()) }
                        div.note { (figure.note) }
                    }
                }
            }
        }
    }
}

fn suggestions(suggestions: &[Suggestion]) -> Markup {
    html! {
        @if !suggestions.is_empty() {
            div.card {
                h2 { "What to change" }
                ol.suggestions {
                    @for suggestion in suggestions {
                        li {
                            span.kind { (suggestion.kind) }
                            (suggestion.change)
                            div.effect { (suggestion.effect) }
                        }
                    }
                }
            }
        }
    }
}

fn section(section: &Section) -> Markup {
    html! {
        section.card {
            h2 { (section.title) }
            @for block in &section.blocks {
                @match block {
                    Block::Text(text) => p { (text) },
                    Block::Table(table) => (self::table(table)),
                    Block::Bars(bars) => @for bar in bars { (self::bar(bar)) },
                    Block::Roofline(roofline) => (self::roofline(roofline)),
                    Block::Timeline(timeline) => (self::timeline(timeline)),
                    Block::Tracks(tracks) => (self::tracks(tracks)),
                    Block::Mesh(mesh) => (self::mesh(mesh)),
                    Block::Heat(map) => (self::heat(map)),
                    Block::Shares(shares) => (self::shares(shares)),
                }
            }
        }
    }
}

fn notes(notes: &[String]) -> Markup {
    html! {
        @if !notes.is_empty() {
            div."card"."notes" {
                h2 { "What this rests on" }
                ul { @for note in notes { li { (note) } } }
            }
        }
    }
}

fn table(table: &Table) -> Markup {
    let number = |at: usize| !table.rows.is_empty() && table.rows.iter().all(|row| row[at].is_number());
    let class = |at: usize| if number(at) { "number" } else { "" };
    html! {
        div.scroll {
            table {
                thead { tr { @for (at, name) in table.columns.iter().enumerate() { th class=(class(at)) { (name) } } } }
                tbody {
                    @for row in &table.rows {
                        tr { @for (at, value) in row.iter().enumerate() { td class=(class(at)) { (value.to_string()) } } }
                    }
                }
            }
        }
    }
}

fn colour(at: usize) -> String {
    format!("k{}", at % COLOURS)
}

/// A width in CSS.
fn percent(share: f64) -> String {
    format!("{:.3}%", 100.0 * share)
}

/// Segments of a memory. What does not fit stands beyond a mark.
fn bar(bar: &Bar) -> Markup {
    let (total, limit) = (bar.total(), bar.limit);
    let full = total.max(limit).0.max(1) as f64;
    let parts = || bar.parts.iter().filter(|part| part.bytes.0 > 0).enumerate();
    html! {
        div.bar {
            div.head {
                span { (bar.label) }
                span {
                    (total.to_string()) " of " (limit.to_string())
                    " (" (Value::Share(total.0 as f64 / limit.0.max(1) as f64).to_string()) ")"
                    @if total > limit { span.over { " " ((total - limit).to_string()) " too much" } }
                }
            }
            div.track {
                @for (at, part) in parts() {
                    i class=(colour(at)) style=(format!("width:{}", percent(part.bytes.0 as f64 / full)))
                        title=(format!("{}: {}", part.label, part.bytes)) {}
                }
                @if total > limit {
                    span.limit style=(format!("left:{}", percent(limit.0 as f64 / full))) {}
                }
            }
            div.legend {
                @for (at, part) in parts() { span { b class=(colour(at)) {} (part.label) " " (part.bytes.to_string()) } }
            }
        }
    }
}

fn timeline(timeline: &Timeline) -> Markup {
    let longest = timeline.lanes.iter().map(super::Lane::seconds).fold(f64::MIN_POSITIVE, f64::max);
    html! {
        @for lane in &timeline.lanes {
            div.bar {
                div.head { span { (lane.label) } span { (Value::Seconds(lane.seconds()).to_string()) } }
                div.track {
                    @for (at, span) in lane.spans.iter().enumerate() {
                        i class=(colour(at)) style=(format!("width:{}", percent(span.seconds / longest)))
                            title=(format!("{}: {}", span.label, Value::Seconds(span.seconds))) {}
                    }
                }
                div.legend {
                    @for (at, span) in lane.spans.iter().enumerate() {
                        span { b class=(colour(at)) {} (span.label) " " (Value::Seconds(span.seconds).to_string()) }
                    }
                }
            }
        }
    }
}

/// Spans at their places; of tracks with very many, those that last longest.
fn tracks(tracks: &Tracks) -> Markup {
    const WIDTH: f64 = 860.0;
    const ROW: f64 = 24.0;
    const MOST: usize = 1500;
    let end = tracks.end().max(f64::MIN_POSITIVE);
    // As wide as the longest label and its share are.
    let letters = tracks.tracks.iter().map(|track| track.label.chars().count() + 5).max().unwrap_or(0);
    let left = (letters as f64 * 7.0).clamp(150.0, 400.0);
    let x = |time: f64| left + time / end * (WIDTH - left);
    let rows = tracks.tracks.len() as f64;
    let ticks: Vec<f64> = (0..=4).map(|tick| end * f64::from(tick) / 4.0).collect();
    html! {
        svg viewBox=(format!("0 0 {WIDTH} {}", rows * ROW + 22.0)) role="img" aria-label="timeline" {
            @for tick in &ticks {
                line.grid x1=(format!("{:.1}", x(*tick))) x2=(format!("{:.1}", x(*tick))) y1="0" y2=(rows * ROW) {}
                text x=(format!("{:.1}", x(*tick).min(WIDTH - 2.0))) y=(rows * ROW + 16.0)
                    text-anchor=(if *tick == 0.0 { "start" } else { "end" }) { (Value::Seconds(*tick).to_string()) }
            }
            @for (row, track) in tracks.tracks.iter().enumerate() {
                @let y = row as f64 * ROW;
                @let mut shortest = track.spans.iter().map(|span| span.to - span.from).collect::<Vec<_>>();
                @let least = { shortest.sort_by(|a, b| b.total_cmp(a)); shortest.get(MOST).copied().unwrap_or(0.0) };
                text x="0" y=(format!("{:.1}", y + 15.0)) { (track.label) " " (Value::Share(track.busy() / end).to_string()) }
                @for span in track.spans.iter().filter(|span| span.to - span.from >= least).take(MOST) {
                    rect class=(colour(row)) x=(format!("{:.2}", x(span.from))) y=(format!("{:.1}", y + 3.0))
                        width=(format!("{:.2}", (x(span.to) - x(span.from)).max(0.6))) height=(format!("{:.1}", ROW - 7.0)) {
                        title { (span.label) ": " (Value::Seconds(span.to - span.from).to_string()) }
                    }
                }
            }
        }
    }
}

fn mesh(mesh: &MeshDrawing) -> Markup {
    const MOST: usize = 64;
    html! {
        div.mesh {
            @for host in 0..mesh.hosts.min(MOST) {
                div.host {
                    "host " (host)
                    div.chips {
                        @for device in 0..mesh.devices_per_host {
                            @let replica = (host * mesh.devices_per_host + device) / mesh.model;
                            i class=(colour(replica)) title=(format!("replica {replica}")) { (replica) }
                        }
                    }
                }
            }
        }
        @if mesh.hosts > MOST { p { "... and " (mesh.hosts - MOST) " hosts more" } }
    }
}

/// The best is filled with the colour, one that takes three times as long with none of it.
fn heat(map: &HeatMap) -> Markup {
    let tone = |cell: &Cell| match cell.times_best {
        Some(times) => format!("--heat:{}", percent((1.0 - (times.max(1.0).log2() / 3f64.log2())).clamp(0.0, 1.0))),
        None => String::new(),
    };
    let class = |cell: &Cell| match (cell.times_best, cell.chosen) {
        (None, _) => "cell out",
        (_, true) => "cell chosen",
        _ => "cell",
    };
    let [rows, columns] = &map.axes;
    html! {
        div.scroll {
            table.heat {
                thead { tr { th { (rows) " \\ " (columns) } @for name in &map.columns { th { (name) } } } }
                tbody {
                    @for (name, cells) in &map.rows {
                        tr {
                            th { (name) }
                            @for cell in cells {
                                @match cell {
                                    None => td {},
                                    Some(cell) => td class=(class(cell)) style=(tone(cell)) title=(cell.note) {
                                        b { (cell.value.to_string()) }
                                        small { (cell.note) }
                                    },
                                }
                            }
                        }
                    }
                }
            }
        }
    }
}

fn shares(shares: &[Share]) -> Markup {
    html! {
        @for (at, share) in shares.iter().enumerate() {
            div.bar {
                div.head { span { (share.label) } span { (Value::Share(share.share).to_string()) " " (share.note) } }
                div.track { i class=(colour(at)) style=(format!("width:{}", percent(share.share.clamp(0.0, 1.0)))) {} }
            }
        }
    }
}

/// Both axes logarithmic: flop per byte to the right, flop per second upwards.
fn roofline(roofline: &Roofline) -> Markup {
    const WIDTH: f64 = 860.0;
    const HEIGHT: f64 = 380.0;
    const LEFT: f64 = 64.0;
    const RIGHT: f64 = 16.0;
    const TOP: f64 = 16.0;
    const BOTTOM: f64 = 44.0;
    let points: Vec<_> = roofline
        .points
        .iter()
        .filter(|point| point.flops > 0.0 && point.bytes > 0.0 && point.seconds > 0.0)
        .map(|point| (point, point.flops / point.bytes, point.flops / point.seconds))
        .collect();
    let distinct = |name: fn(&RooflinePoint) -> &str| {
        let mut names = Vec::new();
        for (point, ..) in &points {
            if !names.contains(&name(point)) {
                names.push(name(point));
            }
        }
        names
    };
    let (groups, labels) = (distinct(|point| &point.group), distinct(|point| &point.label));
    let place = |names: &[&str], name: &str| names.iter().position(|known| *known == name).unwrap_or(0);
    let ridge = roofline.peak_flops / roofline.bandwidth;
    let decades = |values: &mut dyn Iterator<Item = f64>| {
        let (low, high) = values.fold((f64::MAX, f64::MIN), |(low, high), x| (low.min(x.log10()), high.max(x.log10())));
        ((low - 0.15).floor(), (high + 0.15).ceil())
    };
    let (x0, x1) = decades(&mut points.iter().map(|point| point.1).chain([ridge]));
    let (y0, y1) = decades(&mut points.iter().map(|point| point.2).chain([roofline.peak_flops]));
    let x = |intensity: f64| LEFT + (intensity.log10() - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT);
    let y = |flops: f64| HEIGHT - BOTTOM - (flops.log10() - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM);
    let bottom = 10f64.powf(y0);
    // Where the slope of the memory enters the drawing.
    let entry = 10f64.powf(x0).max(bottom / roofline.bandwidth);
    let roof = format!(
        "{:.1},{:.1} {:.1},{:.1} {:.1},{:.1}",
        x(entry),
        y(entry * roofline.bandwidth),
        x(ridge),
        y(roofline.peak_flops),
        x(10f64.powf(x1)),
        y(roofline.peak_flops)
    );
    let ticks = |from: f64, to: f64| (from as i32..=to as i32).map(|power| 10f64.powi(power));
    let number = |value: f64| if value >= 1.0 { format!("{value:.0}") } else { format!("{value}") };
    html! {
        svg viewBox=(format!("0 0 {WIDTH} {HEIGHT}")) role="img" aria-label="roofline" {
            @for tick in ticks(x0, x1) {
                line.grid x1=(x(tick)) x2=(x(tick)) y1=(TOP) y2=(HEIGHT - BOTTOM) {}
                text x=(x(tick)) y=(HEIGHT - BOTTOM + 18.0) text-anchor="middle" { (number(tick)) }
            }
            @for tick in ticks(y0, y1) {
                line.grid x1=(LEFT) x2=(WIDTH - RIGHT) y1=(y(tick)) y2=(y(tick)) {}
                text x=(LEFT - 8.0) y=(y(tick) + 4.0) text-anchor="end" { (number(tick / 1e12)) }
            }
            text x=((LEFT + WIDTH) / 2.0) y=(HEIGHT - 8.0) text-anchor="middle" { "flop per byte of HBM" }
            text x="14" y=(HEIGHT / 2.0) text-anchor="middle" transform=(format!("rotate(-90 14 {})", HEIGHT / 2.0)) {
                "TFLOP/s"
            }
            polyline.roof points=(roof) {}
            @for (point, intensity, flops) in &points {
                (mark(place(&groups, &point.group), &colour(place(&labels, &point.label)), x(*intensity), y(*flops),
                    &format!("{} {}", point.group, point.label)))
            }
        }
        div.legend {
            @for (at, label) in labels.iter().enumerate() { span { b class=(colour(at)) {} (label) } }
            @for (at, group) in groups.iter().enumerate() {
                span { svg.key viewBox="0 0 14 14" { (mark(at, "ink", 7.0, 7.0, group)) } (group) }
            }
        }
    }
}

/// A point of a drawing: each group has a shape.
fn mark(shape: usize, class: &str, x: f64, y: f64, title: &str) -> Markup {
    let class = format!("mark {class}");
    let corner = |dx: f64, dy: f64| format!("{:.1},{:.1}", x + dx, y + dy);
    html! {
        @if shape == 0 {
            circle class=(class) cx=(format!("{x:.1}")) cy=(format!("{y:.1}")) r="6" { title { (title) } }
        } @else {
            polygon class=(class)
                points=([corner(0.0, -7.0), corner(7.0, 0.0), corner(0.0, 7.0), corner(-7.0, 0.0)].join(" ")) {
                title { (title) }
            }
        }
    }
}
