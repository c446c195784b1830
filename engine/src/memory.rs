//! Whether the KV cache fits in memory: asked before it is allocated, because a host that runs out of memory ends the
//! process without a word.
//!
//! What is left is measured at the moment of asking, and others may take it afterwards: this check explains what is
//! clearly too large, and does not promise that what passes will be had.

use pagoda_ir::{Bytes, TensorType};
use sysinfo::System;

use crate::error::{Error, Result};
use crate::pjrt::Client;

/// Memory that is left for the buffers of one device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Room {
    /// How much.
    pub left: Bytes,
    /// Whose memory it is.
    pub owner: String,
}

impl Room {
    /// The room on each of some of the client's devices: what the plugin reports of the fullest, or a share of what the host
    /// has left where the devices' memory is the host's. `None` where neither is known.
    ///
    /// # Errors
    /// When the plugin fails.
    pub fn of(client: &Client, devices: &[usize]) -> Result<Option<Self>> {
        let reported = devices.iter().map(|&device| client.memory_left(device)).collect::<Result<Vec<_>, _>>()?;
        if let Some(left) = reported.into_iter().flatten().min() {
            return Ok(Some(Self { left, owner: "the device".into() }));
        }
        if client.platform().eq_ignore_ascii_case("cpu") {
            let owner = match devices.len() {
                0 | 1 => "the host".to_owned(),
                several => format!("the host, for each of {several} devices,"),
            };
            let share = |left: Bytes| Bytes(left.0 / devices.len().max(1) as u64);
            return Ok(host_memory_left().map(|left| Self { left: share(left), owner }));
        }
        Ok(None)
    }

    /// Whether a KV cache of `pages` pages per layer, an array of this type, fits.
    ///
    /// # Errors
    /// Names `engine.max_pages`, what it takes, what is left, and how many pages would fit.
    pub fn check(&self, pages: usize, cache: &TensorType) -> Result<()> {
        let needed =
            cache.dims.iter().fold(cache.element.bytes() as u64, |bytes, &dim| bytes.saturating_mul(dim as u64));
        if needed <= self.left.0 {
            return Ok(());
        }
        let per_page = needed / pages.max(1) as u64; // of a product with this factor: exact, or enormous
        let fix = match self.left.0 / per_page.max(1) {
            0 => "use a device with more memory, or lower engine.page_size".to_owned(),
            fitting => format!("lower it to {fitting} or less"),
        };
        let limit = format!("takes {} of KV cache, but {} has {} left", Bytes(needed), self.owner, self.left);
        Err(Error::setting("engine.max_pages", pages, limit, fix))
    }
}

/// What a process can still allocate without swapping, within its container's limit; `None` where it cannot be asked.
fn host_memory_left() -> Option<Bytes> {
    let mut system = System::new().ok()?;
    system.refresh_memory();
    let container = system.cgroup_limits().map_or(u64::MAX, |limits| {
        // Not its `free_memory`: that counts cached files as taken, which the system drops when memory runs short.
        limits.total_memory.saturating_sub(limits.rss)
    });
    let left = system.available_memory().min(container);
    (left > 0).then_some(Bytes(left))
}

#[cfg(test)]
mod tests {
    use pagoda_ir::Element;

    use super::*;

    #[test]
    fn a_cache_that_does_not_fit_is_explained() {
        let check = |pages: usize, left: u64| {
            // Two layers, pages of 4 KiB.
            let cache = TensorType::new(Element::Bf16, &[2 * pages, 16, 4, 32]);
            Room { left: Bytes(left), owner: "the host".into() }.check(pages, &cache).map_err(|error| error.to_string())
        };
        assert_eq!(check(128, 1 << 20), Ok(()));
        for (pages, left, message) in [
            (
                129,
                1 << 20,
                "engine.max_pages = 129 takes 1.01 MiB of KV cache, but the host has 1.00 MiB left: lower it to 128 or less",
            ),
            (1, 4096, "takes 8.00 KiB of KV cache, but the host has 4.00 KiB left: use a device with more memory"),
            (usize::MAX / 4, 1 << 40, "but the host has 1024.00 GiB left"),
        ] {
            let error = check(pages, left).unwrap_err();
            assert!(error.contains(message), "{error}");
        }
    }

    #[test]
    fn the_host_has_memory_left() {
        assert!(host_memory_left().expect("this system can be asked") > Bytes::mib(1));
    }
}
