//! When registers die: an op that reads a tile for the last time works in its memory.

use std::collections::{HashMap, HashSet};

use super::program::{Code, Inst, Slot};

/// Marks where each register is read for the last time, and drops pure instructions that nobody reads.
pub(super) fn liveness(code: &mut Code) {
    mark_uses(code, true);
}

/// Marks where each register is read for the last time.
pub(super) fn mark(code: &mut Code) {
    mark_uses(code, false);
}

fn mark_uses(code: &mut Code, drops: bool) {
    let mut own: HashSet<Slot> = code.parameters.iter().copied().collect();
    own.extend(code.body.iter().flat_map(|inst| &inst.results));
    let mut read_later = HashSet::new();
    for read in code.yields.iter_mut().rev() {
        read.last = own.contains(&read.slot) && read_later.insert(read.slot);
    }
    let mut kept = Vec::with_capacity(code.body.len());
    for mut inst in std::mem::take(&mut code.body).into_iter().rev() {
        if drops && inst.pure && !inst.results.iter().any(|slot| read_later.contains(slot)) {
            continue;
        }
        inst.kills = inst.results.iter().copied().filter(|slot| !read_later.contains(slot)).collect();
        let mut nested = HashSet::new();
        inst.codes.iter().for_each(|code| outer_uses(code, &mut nested));
        for slot in nested {
            if own.contains(&slot) && read_later.insert(slot) {
                inst.kills.push(slot);
            }
        }
        mark_last(&mut inst, &own, &mut read_later);
        inst.codes.iter_mut().for_each(|code| mark_uses(code, drops));
        kept.push(inst);
    }
    kept.reverse();
    code.body = kept;
}

/// Of the operands that die here, the last occurrence of each is the last use.
fn mark_last(inst: &mut Inst, own: &HashSet<Slot>, read_later: &mut HashSet<Slot>) {
    let reads: Vec<Slot> = inst.operands.iter().map(|read| read.slot).collect();
    let dying: HashSet<Slot> =
        reads.iter().copied().filter(|slot| own.contains(slot) && read_later.insert(*slot)).collect();
    let last_read: HashMap<Slot, usize> = reads.iter().enumerate().map(|(at, &slot)| (slot, at)).collect();
    for (at, read) in inst.operands.iter_mut().enumerate() {
        read.last = dying.contains(&read.slot) && last_read[&read.slot] == at;
    }
}

/// Every register that `code` reads, or may.
pub(super) fn outer_uses(code: &Code, uses: &mut HashSet<Slot>) {
    for inst in &code.body {
        uses.extend(inst.operands.iter().map(|read| read.slot));
        inst.codes.iter().for_each(|code| outer_uses(code, uses));
    }
    uses.extend(code.yields.iter().map(|read| read.slot));
}
