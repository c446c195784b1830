//! The peers' figures that `make tpu-static` prints are all there, and each says where it comes from.

#[path = "../benches/common/peers.rs"]
#[expect(dead_code, reason = "that it parses is what counts here; the bench reads the rest")]
mod peers;

use serde_json::Value;

#[test]
fn every_figure_that_the_bench_prints_is_in_the_file_with_its_origin() {
    let read = peers::Peers::read().expect("benches/peers/tpu_static.json has what the bench prints");
    let products: Vec<_> = read.products.iter().map(|case| (&case.name, case.figures.xla.cycles)).collect();
    let batches: Vec<_> = read.batches.iter().map(|case| (&case.name, case.figures.v3_f32_16mib.cycles)).collect();
    assert_eq!((products.len(), batches.len()), (5, 4), "{products:?} {batches:?}");
    assert_eq!(read.batches.iter().filter(|case| case.shape.q_len == 1).count(), 1, "one batch is the decode kernel's");

    let file: Value = serde_json::from_str(peers::FILE).unwrap();
    for case in ["products", "batches"].iter().flat_map(|list| file[*list].as_array().unwrap()) {
        let figures = case["figures"].as_object().unwrap();
        for (name, figure) in figures.iter().filter(|(_, figure)| !figure.is_null()) {
            let what = format!("{} {name}: {figure}", case["name"]);
            assert!(figure["cycles"].as_u64().is_some_and(|cycles| cycles > 0), "{what}");
            assert!(["peer", "libtpu"].iter().all(|key| figure[key].as_str().is_some_and(|v| !v.is_empty())), "{what}");
            let from = figure["from"].as_str().unwrap_or_default();
            assert!(["scripts/peers.py", "earlier measurement"].contains(&from), "{what}");
            // What was measured by the script can be measured again.
            if from == "scripts/peers.py" && name != "xla" {
                assert!(figure["tiles"].is_array() && figure["mib"].is_number(), "{what}");
            }
            if name.ends_with("_16mib") {
                assert!(figure["mib"].as_f64().is_none_or(|mib| mib <= 16.0), "{what}");
                // More room is never slower.
                let any = &figures.get(&name.replace("_16mib", "_any")).unwrap_or(&Value::Null)["cycles"];
                assert!(any.as_u64().is_none_or(|any| any <= figure["cycles"].as_u64().unwrap()), "{what}");
            }
        }
    }
}
