fn main() -> Result<(), Box<dyn std::error::Error>> {
    use pagoda_engine::certify::{Certifier, Program, run_if_asked};
    use pagoda_ir::{Context, Element};
    use pagoda_kernels::{
        chips::Chip,
        matmul::{
            Activation, Epilogue, Layout, Problem, Spec, mosaic,
            plan::{Options, Plan, Tiles},
        },
        vmem::Bytes,
    };
    if let Some(_code) = run_if_asked() {
        return Ok(());
    }
    let context = Context::new();
    for line in std::io::stdin().lines() {
        let line = line?;
        let words: Vec<&str> = line.split_whitespace().collect();
        if words.is_empty() {
            continue;
        }
        let number = |i: usize| words[i].parse::<usize>().unwrap();
        let chip = Chip::parse(words[0])?;
        let flags: Vec<&str> = words.get(7).map(|w| w.split(',').collect()).unwrap_or_default();
        let has = |f: &str| flags.contains(&f);
        let layout = if has("wt") {
            Layout::WeightTransposed
        } else if has("fm") {
            Layout::FeatureMajor
        } else {
            Layout::RowMajor
        };
        let activation = if has("gate") { Activation::SiluGate } else { Activation::Identity };
        let epilogue = Epilogue { bias: has("bias"), activation, residual: has("res") };
        let input = if has("f32") { Element::F32 } else { Element::Bf16 };
        let output = if has("f32") || has("out32") { Element::F32 } else { Element::Bf16 };
        let spec = Spec { m: number(1), k: number(2), n: number(3), input, output, layout, epilogue };
        let problem = Problem::new(spec)?;
        let tiles = words.get(4).filter(|w| **w != "-").map(|t| Tiles::parse(t)).transpose()?;
        let limit = words.get(5).filter(|w| **w != "-").map(|t| Bytes::parse(t)).transpose()?;
        let plan = Plan::new(problem, chip, Options { tiles, vmem_limit: limit })?;
        if std::env::var_os("PLAN_ONLY").is_some() { println!("{line}: {} {} {:?} grid {:?} est {:.0} mxu {:.0} MB {}", plan.name(), plan.vmem().total(), plan.order(), plan.grid(), plan.estimate().cycles, plan.estimate().mxu_cycles, plan.estimate().bytes_moved>>20); continue; }
        let module = mosaic::module(&context, &plan)?;
        let mut certifier = Certifier::of_this_executable()?;
        if let Ok(d) = std::env::var("DUMPS") {
            certifier = certifier.keep_dumps(d);
        }
        let answer = certifier.certify(chip.info().topology, Program { module: &module.bytecode(), replicas: 1 });
        println!(
            "{line}: {} order {:?} chunk {:?} plan {} est {:.0}",
            plan.name(),
            plan.order(),
            plan.chunk(),
            plan.vmem().total().0,
            plan.estimate().cycles
        );
        println!("   bytes {} mxu {:.0}", plan.estimate().bytes_moved, plan.estimate().mxu_cycles);
        match answer {
            Ok(c) => {
                for k in &c.kernels {
                    println!("   compiled {} spills {} ", k.without_spills().0, k.spills());
                    if k.without_spills() != plan.vmem().total() {
                        print!("{k}{}\n", plan.vmem());
                    }
                }
                println!(
                    "   cycles {:?} {:?} {:.1}s {}",
                    c.kernel_cycles(),
                    c.profile,
                    c.seconds,
                    if c.compiles() { String::new() } else { format!("{:?}", c.verdict) }
                );
            }
            Err(e) => println!("   ERROR {e}"),
        }
    }
    Ok(())
}
