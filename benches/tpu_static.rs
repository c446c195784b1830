//! Static cycles of our TPU kernels by the real compiler, beside the peers': `cargo bench --bench tpu_static [-- --json]`.
//!
//! Nothing runs on a TPU and nothing is timed: libtpu compiles each kernel for v5p and estimates it, and the estimate is
//! the same every time. It knows matrix units, loads, stores and copies of one core; it does not know that two cores and
//! many copies share one HBM, so the table also gives the cycles that moving the bytes takes at least.

use std::process::ExitCode;

use pagoda_engine::certify::matmul::{Certified, Request, certify_matmul};
use pagoda_engine::certify::{Certifier, run_if_asked};
use pagoda_ir::Element;
use pagoda_kernels::chips::Chip;

/// A product and the peers' static cycles for it, libtpu 0.0.52 on v5p, bf16: XLA's own dot, and JAX Pallas's matmul at
/// the best tiles within 16 MiB and within any limit.
struct Product {
    sizes: [usize; 3],
    xla: u64,
    pallas: Option<u64>,
    pallas_any: Option<u64>,
    /// The limit of our second line.
    larger: &'static str,
}

const PRODUCTS: [Product; 5] = [
    Product { sizes: [1024, 1024, 1024], xla: 11193, pallas: Some(11367), pallas_any: None, larger: "32MiB" },
    Product {
        sizes: [4096, 4096, 4096],
        xla: 539_689,
        pallas: Some(561_141),
        pallas_any: Some(539_041),
        larger: "32MiB",
    },
    Product { sizes: [8, 4096, 14336], xla: 38713, pallas: Some(38745), pallas_any: None, larger: "32MiB" },
    Product {
        sizes: [512, 4096, 14336],
        xla: 239_329,
        pallas: Some(248_519),
        pallas_any: Some(238_359),
        larger: "32MiB",
    },
    Product { sizes: [4096, 4096, 14336], xla: 1_883_057, pallas: None, pallas_any: Some(1_862_470), larger: "32MiB" },
];

fn main() -> ExitCode {
    if let Some(code) = run_if_asked() {
        return code;
    }
    match measure(std::env::args().any(|argument| argument == "--json")) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::from(error.exit_code())
        }
    }
}

fn measure(json: bool) -> pagoda_engine::Result<()> {
    let certifier = Certifier::of_this_executable()?;
    let mut lines = Vec::new();
    if !json {
        println!(
            "m x k x n          | ours @ 16 MiB                    | ours, larger limit               | XLA     | Pallas @ 16 MiB | Pallas, any | bytes"
        );
    }
    for Product { sizes: [m, k, n], xla, pallas, pallas_any, larger } in PRODUCTS {
        let mut ours: Vec<Certified> = Vec::new();
        for limit in [None, Some(larger.to_owned())] {
            let request = Request { vmem_limit: limit, ..Request::new(m, k, n, Element::Bf16, Chip::V5p.name()) };
            ours.push(certify_matmul(&request, &certifier)?);
        }
        if json {
            lines.push(serde_json::json!({ "m": m, "k": k, "n": n, "ours": ours,
                "xla": xla, "pallas_16mib": pallas, "pallas_any": pallas_any }));
            continue;
        }
        let tell = |certified: &Certified| {
            let cycles = certified.certificate.kernel_cycles().map_or("none".into(), |cycles| cycles.to_string());
            let taken = certified.plan.total + certified.certificate.spills();
            format!("{cycles} @ {:.1} ({})", taken.as_mib(), certified.plan.tiles)
        };
        let peer = |cycles: Option<u64>| cycles.map_or("-".into(), |cycles| cycles.to_string());
        let floor = ours[0].plan.particulars.estimate.bytes_moved as f64 / Chip::V5p.info().hbm_bytes_per_cycle();
        println!(
            "{:<18} | {:<32} | {:<32} | {xla:<7} | {:<15} | {:<11} | {floor:.0}",
            format!("{m} x {k} x {n}"),
            tell(&ours[0]),
            tell(&ours[1]),
            peer(pallas),
            peer(pallas_any),
        );
    }
    if json {
        println!("{}", serde_json::Value::Array(lines));
    }
    Ok(())
}
