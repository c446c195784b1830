//! scratch
fn main() -> Result<(), Box<dyn std::error::Error>> {
    use pagoda_engine::certify::{Certifier, run_if_asked, matmul::*};
    use pagoda_ir::Element;
    use pagoda_kernels::matmul::{Activation, Epilogue, Layout};
    if let Some(_code) = run_if_asked() {
        return Ok(());
    }
    for line in std::io::stdin().lines() {
        let line = line?;
        let words: Vec<&str> = line.split_whitespace().collect();
        if words.is_empty() { continue; }
        let number = |i: usize| words[i].parse::<usize>().unwrap();
        let flags: Vec<&str> = words.get(6).map(|w| w.split(',').collect()).unwrap_or_default();
        let has = |f: &str| flags.contains(&f);
        let mut request = Request::new(number(1), number(2), number(3), Element::Bf16, words[0]);
        let s = &mut request.spec;
        if has("wt") { s.layout = Layout::WeightTransposed } else if has("fm") { s.layout = Layout::FeatureMajor }
        let activation = if has("gate") { Activation::SiluGate } else { Activation::Identity };
        s.epilogue = Epilogue { bias: has("bias"), activation, residual: has("res") };
        if has("f32") { s.input = Element::F32; s.output = Element::F32; }
        request.tiles = words.get(4).filter(|w| **w != "-").map(|t| t.to_string());
        request.vmem_limit = words.get(5).filter(|w| **w != "-").map(|t| t.to_string());
        if std::env::var_os("PLAN_ONLY").is_some() { println!("{}", plan_matmul(&request)?); continue; }
        let certifier = Certifier::of_this_executable()?.timeout(std::time::Duration::from_secs(300));
        match certify_matmul(&request, &certifier) {
            Err(e) => println!("{line}: ERROR {e}"),
            Ok(c) => {
                if std::env::var_os("RECORD").is_some() {
                    println!("{}", serde_json::to_string(&c.record())?);
                    if !c.differences.is_empty() || !c.certificate.compiles() { println!("BAD {c}"); }
                } else {
                    println!("{line}: {} vmem {} spills {} cycles {:?} est {:.0} {:?} {:.1}s", c.plan.kernel, c.plan.total, c.certificate.spills(), c.certificate.kernel_cycles(), c.plan.estimate.cycles, c.certificate.profile, c.certificate.seconds);
                    if !c.differences.is_empty() || !c.certificate.compiles() { println!("{c}"); }
                }
            }
        }
    }
    Ok(())
}
