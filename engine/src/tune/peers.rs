//! What peers take for the work that is tuned, from the files of `scripts/peers.py`.

use std::path::Path;

use pagoda_kernels::random::{Lengths, batch_text};
use serde_json::Value as Json;

use super::{PeerLine, Tuned};
use crate::error::{Error, Result};

/// The lines of `path` that are of the tuned problem, chip and batches: points of the grid, batches, products.
///
/// # Errors
/// When the file cannot be read, or is not JSON.
pub fn read(path: &Path, tuned: &Tuned) -> Result<Vec<PeerLine>> {
    let text = std::fs::read_to_string(path).map_err(Error::io("read", path))?;
    let file: Json = serde_json::from_str(&text)
        .map_err(|error| Error::file(path, error, "give benches/peers/grid.json or tpu_static.json"))?;
    Ok(lines(&file, tuned))
}

fn lines(file: &Json, tuned: &Tuned) -> Vec<PeerLine> {
    let of_chip = |chip: &Json| chip.as_str() == Some(tuned.chip.name());
    let list = |key: &str| file[key].as_array().into_iter().flatten();
    // Every size that the case names is the problem's.
    let same = |sizes: &Json, keys: &[&str]| keys.iter().all(|key| sizes[key] == tuned.spec[key]);
    let attention = ["q_heads", "kv_heads", "head_dim", "page_size"];
    let mut found = Vec::new();
    for point in list("points").filter(|point| of_chip(&point["chip"]) && same(point, &attention)) {
        let lengths = point["lengths"].as_str().unwrap_or_default();
        let figure = |key: &str| Some((point[key]["peer"].as_str()?.to_owned(), point[key]["cycles"].as_u64()?));
        for (key, words) in [("default_limit", "within the default limit"), ("any_limit", "within any limit")] {
            for batch in tuned.batches_of(lengths) {
                let Some((peer, cycles)) = figure(key) else { continue };
                found.push(PeerLine { batch, peer: format!("{peer} of tpu-inference, {words}, one core"), cycles });
            }
        }
    }
    if !of_chip(&file["chip"]) {
        return found;
    }
    let figures = |case: &Json, batch: &str| -> Vec<PeerLine> {
        let figures = case["figures"].as_object().into_iter().flatten();
        let line = |(name, figure): (&String, &Json)| {
            let cycles = figure["cycles"].as_u64()?;
            Some(PeerLine { batch: batch.to_owned(), peer: name.clone(), cycles })
        };
        figures.filter_map(line).collect()
    };
    let model = serde_json::json!({ "q_heads": 32, "kv_heads": 8, "head_dim": 128, "page_size": 128 });
    if same(&model, &attention) {
        for case in list("batches") {
            let number = |key: &str| case["shape"][key].as_u64().unwrap_or(0) as usize;
            let one = Lengths { q_len: number("q_len"), kv_len: number("kv_len") };
            let lengths = batch_text(&vec![one; number("sequences")]);
            found.extend(tuned.batches_of(&lengths).iter().flat_map(|batch| figures(case, batch)));
        }
    }
    for case in list("products").filter(|case| same(&case["shape"], &["m", "k", "n"])) {
        found.extend(tuned.batch_names().flat_map(|batch| figures(case, batch)));
    }
    found
}
