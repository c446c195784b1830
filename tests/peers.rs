//! The peers' figures that `make tpu-static` prints are all there, and each says where it comes from.

#[path = "../benches/common/grid.rs"]
#[expect(dead_code, reason = "the bench reads the rest")]
mod grid;
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

    assert!(read.groups.len() >= 4);
    let rows = |groups: &peers::Groups| groups.sizes.iter().sum::<usize>() == groups.m;
    assert!(
        read.groups.iter().all(|case| rows(&case.shape) && case.figures.v5p.cycles > 0),
        "rows are those of the groups"
    );

    let file: Value = serde_json::from_str(peers::FILE).unwrap();
    for case in ["products", "batches", "groups"].iter().flat_map(|list| file[*list].as_array().unwrap()) {
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

#[test]
fn the_grid_is_drawn_alike_here_and_by_the_script() {
    let measured = grid::Measured::read().expect("benches/peers/grid.json has what the bench prints");
    assert!(!measured.points.is_empty() && !measured.libtpu.is_empty());
    for peer in &measured.points {
        let point = grid::Point::drawn(peer.seed, peer.index);
        let text = |lengths: &str| pagoda_kernels::random::parse_batch(lengths).unwrap();
        let drawn = (peer.kind.as_str(), peer.q_heads, peer.kv_heads, peer.head_dim, peer.page_size);
        assert_eq!(
            drawn,
            (point.kind, point.q_heads, point.kv_heads, point.head_dim, point.page_size),
            "{}",
            peer.index
        );
        assert_eq!(text(&peer.lengths), point.lengths, "{}", peer.index);
        pagoda_kernels::Problem::new(point.spec()).unwrap();
        for best in [&peer.default_limit, &peer.any_limit].into_iter().flatten() {
            // Heads of 64 have two sizes instead of four: fewer choices differ.
            let least = if peer.head_dim == 64 { 4 } else { 6 };
            assert!(best.cycles > 0 && best.mib > 0.0 && best.points >= least, "{}: {}", point.name(), best.points);
        }
        assert!(peer.total() >= peer.any_limit.as_ref().map(|any| any.cycles), "more room is never slower");
    }
}
