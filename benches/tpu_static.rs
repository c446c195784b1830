//! Static cycles of our TPU kernels by the real compiler, beside the peers': `cargo bench --bench tpu_static [-- [matmul]
//! [grouped_matmul] [rpa] [--json]]`; and over the seeded grid: `cargo bench --bench tpu_static -- grid N [--seed S] [--chip
//! v5p|v6e] [--json]`.
//!
//! Nothing runs on a TPU and nothing is timed: libtpu compiles each kernel for v5p and estimates it, and the estimate is
//! the same every time. It knows matrix units, loads, stores and copies of one core; it does not know that two cores and
//! many copies share one HBM, so the table also gives the cycles that moving the bytes takes at least.
//!
//! Attention: what a core takes depends on the batch, so its lengths are constants of the kernel that is compiled, at the tiles
//! that the planner chooses for any batch, and for this one. Each of v5p's two cores has half of the heads, and the estimate is
//! of one core's launch of half the heads: the compiler cannot estimate strided copies (`dma-general`). The peers have all heads
//! on one core; half of their figures is what they would take on both.
//!
//! Grouped matmul: the groups' sizes are constants of the kernel that is compiled, as they are of the peer's list of work, on v5p
//! and v6e, each within the chip's default limit.
//!
//! The grid compares what a step pays: everything from the projections' outputs to the output projection's input. What the
//! compiler said of a program is kept in the user's cache, so a grid that was stopped goes on where it was.

use std::process::ExitCode;
use std::sync::Mutex;
use std::time::Duration;

use pagoda_engine::certify::batch::BatchCycles;
use pagoda_engine::certify::kernel::Certified;
use pagoda_engine::certify::{Certifier, run_if_asked};
use pagoda_engine::check::compile::{Cached, user_cache};
use pagoda_ir::Element;
use pagoda_kernels::chips::Chip;
use pagoda_kernels::grouped_matmul::{self, GroupedMatmul};
use pagoda_kernels::matmul::{self, Matmul};
use pagoda_kernels::plan::{Options, Plan};
use pagoda_kernels::random::Lengths;
use pagoda_kernels::rpa::{self, Kind, Rpa};
use pagoda_kernels::vmem::Bytes;
use pagoda_kernels::{Kernel, Problem};

#[path = "common/grid.rs"]
#[expect(dead_code, reason = "tests/peers.rs reads the rest")]
mod grid;
#[path = "common/peers.rs"]
mod peers;

use peers::{Case, Peers, Product, ProductFigures};

/// MiB of VMEM that the second line of our products may take.
const LARGER: u64 = 32;

fn main() -> ExitCode {
    if let Some(code) = run_if_asked() {
        return code;
    }
    let json = std::env::args().any(|argument| argument == "--json");
    let words: Vec<String> = std::env::args().skip(1).collect();
    let after = |word: &str| words.iter().position(|known| known == word).and_then(|at| words.get(at + 1));
    let outcome = match after("grid").map(|count| count.parse()) {
        None => measure(json),
        Some(Ok(count)) => {
            let seed = after("--seed").map_or(Ok(1), |seed| seed.parse());
            let chips =
                after("--chip").map_or(Ok(vec![Chip::V5p, Chip::V6e]), |chip| Chip::parse(chip).map(|chip| vec![chip]));
            match (seed, chips) {
                (Ok(seed), Ok(chips)) => chips.into_iter().try_for_each(|chip| over_grid(count, seed, chip, json)),
                _ => return usage(),
            }
        }
        Some(Err(_)) => return usage(),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::from(error.exit_code())
        }
    }
}

fn usage() -> ExitCode {
    eprintln!("error: write grid N [--seed S] [--chip v5p|v6e] [--json]");
    ExitCode::from(2)
}

/// A line of the grid.
struct Line {
    name: String,
    ours: std::result::Result<BatchCycles, String>,
    /// The peer's kernel and what stands around it; within any limit.
    peer: Option<(u64, u64)>,
    any: Option<u64>,
}

impl Line {
    fn total(&self) -> Option<u64> {
        self.ours.as_ref().ok()?.total()
    }

    fn ratio(&self) -> Option<f64> {
        let (kernel, around) = self.peer?;
        Some(self.total()? as f64 / (kernel + around) as f64)
    }

    fn print(&self) {
        let number = |cycles: Option<u64>| cycles.map_or("none".into(), |cycles| cycles.to_string());
        let ours = match &self.ours {
            Ok(ours) => {
                let (device, around) = (number(ours.device_cycles), number(ours.around_cycles));
                let (floor, mib) = (ours.floor(), ours.vmem.as_mib());
                format!("{:>9} = {device} + {around} @ {mib:.1} ({}), floor {floor}", number(self.total()), ours.tiles)
            }
            Err(error) => format!("none: {error}"),
        };
        let peer = self
            .peer
            .map_or("not measured".into(), |(kernel, around)| format!("{} = {kernel} + {around}", kernel + around));
        let ratio = self.ratio().map_or("-".into(), |ratio| format!("{ratio:.2}"));
        let any = self.any.map_or(String::new(), |any| format!(", {any} at any limit"));
        println!("{:<44} | {ours:<64} | {peer}{any} | {ratio}", self.name);
    }
}

/// The first `count` points of the grid of `seed` on a chip.
fn over_grid(count: u64, seed: u64, chip: Chip, json: bool) -> pagoda_engine::Result<()> {
    let measured = grid::Measured::read().expect("a file that tests/peers.rs holds complete");
    let certifier =
        Certifier::of_this_executable()?.timeout(Duration::from_secs(900)).profile_timeout(Duration::from_secs(900));
    let library = pagoda_engine::pjrt::PluginChoice::Named(pagoda_engine::pjrt::Kind::Tpu).locate()?.path;
    let compiler = Cached::new(certifier, &library, &user_cache()?.join("kernels"))?;
    let next = Mutex::new(0..count);
    let lines = Mutex::new(Vec::new());
    if !json {
        println!(
            "{chip}, seed {seed}: what a step pays = kernel + around @ MiB (tiles) | v3's best within the default limit | ratio"
        );
    }
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                loop {
                    let Some(index) = next.lock().expect("no holder panics").next() else { break };
                    let point = grid::Point::drawn(seed, index);
                    let estimate = || {
                        let options = Options { tiles: None, vmem_limit: None };
                        let batches = [point.lengths.clone()];
                        let mut plans = point
                            .forms()
                            .into_iter()
                            .map(|spec| Plan::<Rpa>::over(Problem::new(spec)?, chip, options, &batches));
                        let refused = plans.next_back().expect("three forms");
                        let plan = plans.find_map(Result::ok).map_or(refused, Ok).map_err(|error| error.to_string())?;
                        let cycles = BatchCycles::new(&plan, Some(&point.lengths), &compiler);
                        cycles.map_err(|error| error.to_string())
                    };
                    let peer = measured.of(chip.name(), seed, index);
                    let around = peer.map_or(0, |peer| peer.around.before + peer.around.after);
                    let best = peer.and_then(|peer| peer.default_limit.as_ref().or(peer.any_limit.as_ref()));
                    let line = Line {
                        name: format!("{index} {}", point.name()),
                        ours: estimate(),
                        peer: best.map(|best| (best.cycles, around)),
                        any: peer.and_then(|peer| peer.any_limit.as_ref()).map(|best| best.cycles + around),
                    };
                    if !json {
                        line.print();
                    }
                    lines.lock().expect("no holder panics").push((index, point.batch(), line));
                }
            });
        }
    });
    let mut lines = lines.into_inner().expect("no holder panics");
    lines.sort_by_key(|(index, ..)| *index);
    if json {
        let lines = lines.iter().map(|(index, lengths, line)| {
            let Line { name, ours, peer, any } = line;
            let (ours, error) = (ours.as_ref().ok(), ours.as_ref().err());
            serde_json::json!({ "index": index, "name": name, "lengths": lengths, "ours": ours, "error": error,
                "peer_kernel": peer.map(|peer| peer.0), "peer_around": peer.map(|peer| peer.1),
                "peer_any_limit": any, "ratio": line.ratio() })
        });
        println!("{}", serde_json::json!({ "chip": chip, "seed": seed, "points": lines.collect::<Vec<_>>() }));
        return Ok(());
    }
    let mut ratios: Vec<_> =
        lines.iter().filter_map(|(_, _, line)| Some((line.ratio()?, line.name.as_str()))).collect();
    ratios.sort_by(|(one, _), (other, _)| one.total_cmp(other));
    if let Some(&(worst, name)) = ratios.last() {
        let at = |share: f64| ratios[((ratios.len() - 1) as f64 * share).round() as usize].0;
        println!(
            "{chip}: {} of {count} points have a peer's figure; ratio: median {:.2}, 90th percentile {:.2}, worst {worst:.2} ({name}); \
             {} above 1.0",
            ratios.len(),
            at(0.5),
            at(0.9),
            ratios.iter().filter(|(ratio, _)| *ratio > 1.0).count()
        );
    }
    let failed = lines.iter().filter(|(_, _, line)| line.total().is_none()).count();
    println!("{chip}: {failed} of {count} points without a figure of ours");
    Ok(())
}

fn measure(json: bool) -> pagoda_engine::Result<()> {
    // The largest product's profile takes minutes.
    let certifier =
        Certifier::of_this_executable()?.timeout(Duration::from_secs(900)).profile_timeout(Duration::from_secs(900));
    // All, or those that are named.
    let named = |kernel: &str| std::env::args().any(|argument| argument == kernel);
    let wanted = |kernel| named(kernel) || !["matmul", "grouped_matmul", "rpa"].into_iter().any(named);
    let peers = Peers::read().expect("a file that tests/peers.rs holds complete");
    let matmul = if wanted("matmul") { matmuls(&peers, json, &certifier)? } else { vec![] };
    let grouped = if wanted("grouped_matmul") { grouped_matmuls(&peers, json, &certifier)? } else { vec![] };
    let rpa = if wanted("rpa") { attentions(&peers, json, &certifier)? } else { vec![] };
    if json {
        println!("{}", serde_json::json!({ "matmul": matmul, "grouped_matmul": grouped, "rpa": rpa }));
    }
    Ok(())
}

fn attentions(peers: &Peers, json: bool, certifier: &Certifier) -> pagoda_engine::Result<Vec<serde_json::Value>> {
    let mut lines = Vec::new();
    if !json {
        println!(
            "\nbatch (kernel)      | ours, per core @ MiB (tiles)     | tiles for   | matrix unit | bytes  | v2 best, <= 16 MiB  | v3 best, <= 16 MiB  | v3 f32"
        );
    }
    let mixed = peers.batches.iter().map(|case| (case, Kind::Mixed));
    let decode = peers.batches.iter().filter(|case| case.shape.q_len == 1).map(|case| (case, Kind::Decode));
    for (Case { name, shape: batch, figures }, kind) in mixed.chain(decode) {
        let v2 = [figures.v2_any.cycles, figures.v2_16mib.cycles];
        let v3 = [figures.v3_any.cycles, figures.v3_16mib.cycles];
        let v3_f32 = figures.v3_f32_16mib.cycles;
        let (tokens, kernel) = if kind == Kind::Decode { (8, "decode") } else { (1024, "mixed") };
        let problem = Problem::new(rpa::Spec { tokens, kind, ..Rpa::common().remove(0) }).expect("a problem");
        let lengths = vec![Lengths { q_len: batch.q_len, kv_len: batch.kv_len }; batch.sequences];
        let plan_over = |batches: &[Vec<Lengths>]| {
            Plan::<Rpa>::over(problem.clone(), Chip::V5p, Options::default(), batches).expect("a plan")
        };
        let (any, own) = (plan_over(&[]), plan_over(std::slice::from_ref(&lengths)));
        let same = any.tiles() == own.tiles();
        let plans = [("any batch", any), ("this batch", own)];
        for (of, plan) in plans.into_iter().take(if same { 1 } else { 2 }) {
            let (ours, certificate) = BatchCycles::of_launch(&plan, Some(&lengths), certifier)?;
            if json {
                lines.push(serde_json::json!({ "batch": name, "kernel": kernel, "tiles_for": of, "ours": ours,
                    "spills": certificate.spills(), "v2": v2, "v3": v3, "v3_f32": v3_f32 }));
                continue;
            }
            let cycles = ours.core_cycles.map_or("none".into(), |cycles| cycles.to_string());
            println!(
                "{:<19} | {:<32} | {of:<11} | {:<11} | {:<6} | {:<19} | {:<19} | {v3_f32}",
                format!("{name} ({kernel})"),
                format!("{cycles} @ {:.1} ({})", ours.vmem.as_mib(), ours.tiles),
                ours.mxu_floor_cycles,
                ours.hbm_floor_cycles,
                format!("{}, {}", v2[0], v2[1]),
                format!("{}, {}", v3[0], v3[1]),
            );
        }
    }
    Ok(lines)
}

fn grouped_matmuls(peers: &Peers, json: bool, certifier: &Certifier) -> pagoda_engine::Result<Vec<serde_json::Value>> {
    let mut lines = Vec::new();
    if !json {
        println!(
            "\nexperts, m x k x n                            | ours @ MiB (tiles)               | megablox | ratio | floor"
        );
    }
    for Case { name, shape, figures } in &peers.groups {
        for (chip, peer) in [(Chip::V5p, figures.v5p.cycles), (Chip::V6e, figures.v6e.cycles)] {
            let peers::Groups { m, k, n, transposed, ref sizes } = *shape;
            let layout = match transposed {
                true => grouped_matmul::Layout::WeightTransposed,
                false => grouped_matmul::Layout::RowMajor,
            };
            let spec =
                grouped_matmul::Spec { layout, ..grouped_matmul::Spec::new([m, k, n], sizes.len(), Element::Bf16) };
            let groups: Vec<_> = sizes.iter().map(|&rows| Lengths { q_len: rows, kv_len: rows }).collect();
            let problem = Problem::new(spec).expect("a problem");
            let batches = std::slice::from_ref(&groups);
            let plan = Plan::<GroupedMatmul>::over(problem, chip, Options::default(), batches).expect("a plan");
            let (ours, _) = BatchCycles::of_launch(&plan, Some(&groups), certifier)?;
            let ratio = ours.device_cycles.map(|cycles| cycles as f64 / peer as f64);
            if json {
                lines.push(
                    serde_json::json!({ "name": name, "chip": chip, "ours": ours, "peer": peer, "ratio": ratio }),
                );
                continue;
            }
            println!(
                "{:<45} | {:<32} | {peer:<8} | {:<5} | {}",
                format!("{name} on {chip}: {} of {m} x {k} x {n}", sizes.len()),
                format!(
                    "{} @ {:.1} ({})",
                    ours.device_cycles.map_or("none".into(), |cycles| cycles.to_string()),
                    ours.vmem.as_mib(),
                    ours.tiles
                ),
                ratio.map_or("-".into(), |ratio| format!("{ratio:.2}")),
                ours.floor()
            );
        }
    }
    Ok(lines)
}

/// The planner's kernel on v5p.
fn plan<K: Kernel>(spec: K::Spec, vmem_limit: Option<Bytes>) -> Plan<K> {
    let problem = Problem::new(spec).expect("a problem");
    Plan::new(problem, Chip::V5p, Options { tiles: None, vmem_limit }).expect("a plan")
}

fn matmuls(peers: &Peers, json: bool, certifier: &Certifier) -> pagoda_engine::Result<Vec<serde_json::Value>> {
    let mut lines = Vec::new();
    if !json {
        println!(
            "m x k x n          | ours @ 16 MiB                    | ours, larger limit               | XLA     | Pallas @ 16 MiB | Pallas, any | bytes"
        );
    }
    for Case { shape, figures, .. } in &peers.products {
        let Product { m, k, n } = *shape;
        let ProductFigures { xla: peers::Figure { cycles: xla }, pallas_16mib, pallas_any } = figures;
        let [pallas, pallas_any] = [pallas_16mib, pallas_any].map(|figure| figure.as_ref().map(|figure| figure.cycles));
        let mut ours: Vec<Certified<Matmul>> = Vec::new();
        for limit in [None, Some(LARGER)] {
            let spec = matmul::Spec::new([m, k, n], Element::Bf16);
            ours.push(Certified::new(&plan(spec, limit.map(Bytes::mib)), certifier)?);
        }
        if json {
            lines.push(serde_json::json!({ "m": m, "k": k, "n": n, "ours": ours,
                "xla": xla, "pallas_16mib": pallas, "pallas_any": pallas_any }));
            continue;
        }
        let line = |certified: &Certified<Matmul>| {
            let cycles = certified.certificate.kernel_cycles().map_or("none".into(), |cycles| cycles.to_string());
            let taken = certified.plan.total + certified.certificate.spills();
            format!("{cycles} @ {:.1} ({})", taken.as_mib(), certified.plan.tiles)
        };
        let peer = |cycles: Option<u64>| cycles.map_or("-".into(), |cycles| cycles.to_string());
        let floor = ours[0].plan.details.estimate.bytes_moved as f64 / Chip::V5p.info().hbm_bytes_per_cycle();
        println!(
            "{:<18} | {:<32} | {:<32} | {xla:<7} | {:<15} | {:<11} | {floor:.0}",
            format!("{m} x {k} x {n}"),
            line(&ours[0]),
            line(&ours[1]),
            peer(pallas),
            peer(pallas_any),
        );
    }
    Ok(lines)
}
