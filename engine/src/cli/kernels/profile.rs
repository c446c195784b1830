//! What a kernel moves and multiplies, and when it would: counts and a timeline, as one page.

use pagoda_ir::tile_machine::{Counts, Profile, Rates, Tally, Track};
use pagoda_kernels::chips::Chip;
use pagoda_kernels::vmem::Bytes;

use crate::error::{Error, Result};
use crate::report::{Block, Figure, Placed, Report, Section, Status, Table, TrackDrawing, Tracks, Value, Verdict};

/// Grid steps that a page lists.
const STEPS: usize = 24;
/// Sizes of DMAs that a page lists.
const SIZES: usize = 16;

/// The rates of a chip. Those of DMAs are libtpu 0.0.52's, taken from its static profiles of kernels that do nothing but one
/// copy.
///
/// # Errors
/// When libtpu has no static profile of the chip.
pub(super) fn rates(chip: Chip) -> Result<Rates> {
    let (dma_latency, dma_bytes_per_cycle) = match chip {
        Chip::V5e => (1143.0, 489.0),
        Chip::V5p => (678.0, 1236.0),
        Chip::V6e => (557.0, 772.0),
        Chip::V4 | Chip::Tpu7x => {
            let limit = "is a chip whose DMAs libtpu has no rates of";
            return Err(Error::setting("rates-of", chip.name(), limit, "use v5e, v5p or v6e"));
        }
    };
    let info = chip.info();
    Ok(Rates {
        clock: info.clock.0,
        dma_latency,
        dma_bytes_per_cycle,
        hbm_bytes_per_cycle: info.hbm_bandwidth.0 / info.clock.0,
        mxu: info.mxu,
        mxu_flop_per_cycle: info.peak_flop_per_cycle_and_core as f64,
    })
}

/// Counts and timeline of a finished profile.
pub(super) fn page(kernel: &str, chip: Chip, profile: &Profile) -> Report {
    let counts = profile.counts();
    let Counts { rates, grid_steps, ref total, .. } = counts;
    let seconds = |cycles: f64| cycles / rates.clock;
    let hbm: u64 =
        (total.moved.iter()).filter(|moved| moved.from == "hbm" || moved.to == "hbm").map(|moved| moved.bytes).sum();
    let waiting = if total.cycles > 0.0 { total.waited / total.cycles } else { 0.0 };
    let figure = |key, label: &str, value, note: String| Figure { key, label: label.to_owned(), value, note };
    let mxu = if total.cycles > 0.0 { total.multiplied.cycles / total.cycles } else { 0.0 };
    let figures = vec![
        figure(
            "cycles",
            "on the model's clock",
            Value::Cycles(total.cycles.round() as u64),
            Value::Seconds(seconds(total.cycles)).to_string(),
        ),
        figure("waiting", "of it waiting for DMAs and windows", Value::Share(waiting), String::new()),
        figure(
            "hbm_bytes",
            "moved from and to HBM",
            Value::Bytes(Bytes(hbm)),
            format!(
                "at {} alone: {}",
                info_rate(&rates),
                Value::Seconds(hbm as f64 / rates.hbm_bytes_per_cycle / rates.clock)
            ),
        ),
        figure(
            "mxu",
            "of it on the MXU",
            Value::Share(mxu),
            total
                .multiplied
                .utilisation
                .map_or_else(String::new, |share| format!("{} of the passes is not padding", Value::Share(share))),
        ),
    ];
    let sections = vec![
        Section::new("Timeline", vec![Block::Tracks(drawing(&profile.tracks(), seconds(1.0)))]),
        Section::new("Moved", vec![Block::Table(moved(total))]),
        Section::new("DMAs of the kernel", sizes(&counts)),
        Section::new("MXU", vec![Block::Table(multiplied(total))]),
        Section::new("Grid steps", steps(&counts)),
    ];
    Report {
        title: format!("{kernel} on {}", chip.name()),
        subtitle: format!("{grid_steps} grid steps, {} ops", total.ops),
        verdict: Verdict {
            status: if waiting > 0.25 { Status::Caution } else { Status::Good },
            headline: match waiting > 0.25 {
                true => format!("It waits for memory {} of the time.", Value::Share(waiting)),
                false => format!("It computes {} of the time.", Value::Share(1.0 - waiting)),
            },
            reasons: vec![],
        },
        figures,
        suggestions: vec![],
        sections,
        notes: vec![
            format!(
                "A model's clock, measured on no TPU: a DMA takes {} cycles and its bytes at {} a cycle, all that touch HBM share {:.0} bytes a cycle, \
                 the MXU does {} flop a cycle of products padded to 8 rows and {} columns, every other op a register of 1024 \
                 elements a cycle.",
                rates.dma_latency, rates.dma_bytes_per_cycle, rates.hbm_bytes_per_cycle, rates.mxu_flop_per_cycle, rates.mxu
            ),
            "Ops run one after another here; the compiler overlaps them, spills, and uses a second core. `pagoda certify` has its \
             static cycles."
                .to_owned(),
        ],
    }
}

fn info_rate(rates: &Rates) -> String {
    format!("{:.0} GB/s", rates.hbm_bytes_per_cycle * rates.clock / 1e9)
}

fn drawing(tracks: &[Track], scale: f64) -> Tracks {
    let placed = |track: &Track| TrackDrawing {
        label: track.name.clone(),
        spans: track
            .spans
            .iter()
            .map(|span| Placed { label: span.name.clone(), from: span.from * scale, to: span.to * scale })
            .collect(),
    };
    Tracks { tracks: tracks.iter().map(placed).collect() }
}

fn moved(total: &Tally) -> Table {
    let mut table = Table::new(&["from", "to", "by", "copies", "bytes"]);
    for moved in &total.moved {
        table.row(vec![
            moved.from.into(),
            moved.to.into(),
            moved.by.into(),
            Value::Count(moved.count),
            Value::Bytes(Bytes(moved.bytes)),
        ]);
    }
    table
}

fn sizes(counts: &Counts) -> Vec<Block> {
    if counts.dma_sizes.is_empty() {
        return vec![Block::Text("It starts none.".to_owned())];
    }
    let mut table = Table::new(&["bytes of one", "DMAs", "bytes in all"]);
    let mut sizes: Vec<_> = counts.dma_sizes.iter().map(|(&size, &count)| (size, count)).collect();
    sizes.sort_by_key(|&(size, count)| std::cmp::Reverse(size * count));
    for &(size, count) in sizes.iter().take(SIZES) {
        table.row(vec![Value::Bytes(Bytes(size)), Value::Count(count), Value::Bytes(Bytes(size * count))]);
    }
    let more = sizes.len().checked_sub(SIZES).filter(|&more| more > 0);
    let more = more.map(|more| Block::Text(format!("... and {more} sizes more (in --json)")));
    [Block::Table(table)].into_iter().chain(more).collect()
}

fn multiplied(total: &Tally) -> Table {
    let mut table = Table::new(&["products", "Gflop", "passes", "cycles", "not padding"]);
    let of = &total.multiplied;
    table.row(vec![
        Value::Count(of.products),
        Value::Text(format!("{:.4}", of.flops as f64 / 1e9)),
        Value::Count(of.passes),
        Value::Cycles(of.cycles.round() as u64),
        of.utilisation.map_or(Value::Missing, Value::Share),
    ]);
    table
}

fn steps(counts: &Counts) -> Vec<Block> {
    let mut table = Table::new(&["step", "cycles", "waiting", "HBM in", "HBM out", "passes", "not padding", "ops"]);
    for step in counts.steps.iter().take(STEPS) {
        let tally = &step.tally;
        let hbm = |way: fn(&pagoda_ir::tile_machine::Moved) -> bool| {
            Value::Bytes(Bytes(tally.moved.iter().filter(|moved| way(moved)).map(|moved| moved.bytes).sum()))
        };
        table.row(vec![
            format!("{:?}", step.at).into(),
            Value::Cycles(tally.cycles.round() as u64),
            Value::Cycles(tally.waited.round() as u64),
            hbm(|moved| moved.from == "hbm"),
            hbm(|moved| moved.to == "hbm"),
            Value::Count(tally.multiplied.passes),
            tally.multiplied.utilisation.map_or(Value::Missing, Value::Share),
            Value::Count(tally.ops),
        ]);
    }
    let more = (counts.grid_steps as usize).checked_sub(STEPS).filter(|&more| more > 0);
    let more = more.map(|more| Block::Text(format!("... and {more} steps more (in --json)")));
    [Block::Table(table)].into_iter().chain(more).collect()
}
