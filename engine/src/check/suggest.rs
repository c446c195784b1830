//! What else could be done with the same prompts and lengths: other meshes, more sequences at once, more pages. Each is
//! planned and simulated as the job itself is, its launches by the planner's model, scaled by what the compiler's figures of
//! the job have shown of it ([`Calibration`]). Pure.
//!
//! Never here: a change of prompts, of their number, of lengths.

use std::num::NonZeroUsize;

use pagoda_kernels::vmem::Bytes;

use super::estimate::{Calibration, JobTime, job_time};
use super::plan::{Job, Plan, RESERVE, model_axes};
use crate::topology::{Topology, plural};

/// A change of one setting.
#[derive(Clone, Debug)]
pub struct Alternative {
    /// What kind of setting.
    pub kind: &'static str,
    /// The change, as it is typed.
    pub change: String,
    /// The job, changed so.
    pub plan: Plan,
    /// What it takes.
    pub time: JobTime,
    /// Why it is faster, or fits.
    pub why: String,
}

/// The least that a change must gain to be worth a line.
const WORTH: f64 = 1.03;

/// Bytes that a plan has for weights and pages.
fn room(plan: &Plan) -> Bytes {
    Bytes((plan.job.hbm.0 as f64 * (1.0 - RESERVE)) as u64)
}

/// Whether weights and pages fit, with something left for what only the compiler knows.
pub fn fits(plan: &Plan) -> bool {
    plan.memory.total() <= room(plan)
}

/// A changed job's time; `None` where a prompt can never run.
pub fn time_of(plan: &Plan, calibration: &Calibration) -> Option<JobTime> {
    job_time(plan, &calibration.costs(plan)).ok()
}

/// All changes that make the job fit, or faster by the same estimate; the best first.
pub fn alternatives(plan: &Plan, calibration: &Calibration) -> Vec<Alternative> {
    let Some(now) = time_of(plan, calibration) else { return vec![] };
    let now_fits = fits(plan);
    let candidates =
        [other_mesh(plan, calibration, now_fits), more_sequences(plan, calibration), fewer_pages(plan, calibration)];
    let better = |alternative: &Alternative| {
        fits(&alternative.plan) && (!now_fits || alternative.time.seconds * WORTH < now.seconds)
    };
    let mut better: Vec<_> = candidates.into_iter().flatten().filter(better).collect();
    better.sort_by(|a, b| a.time.seconds.total_cmp(&b.time.seconds));
    better
}

/// The smallest larger slice of the same generation that holds a job which no mesh of this one does.
pub fn larger_slice(plan: &Plan, calibration: &Calibration) -> Option<(Topology, Plan, JobTime)> {
    let job = &plan.job;
    let here = model_axes(&job.config, job.topology.devices()).into_iter();
    let mut here = here.filter_map(|axis| Plan::with_model_axis(job, NonZeroUsize::new(axis)?).ok());
    if here.any(|plan| fits(&plan)) {
        return None;
    }
    let larger = Topology::all(job.topology.chip()).into_iter().filter(|slice| slice.chips() > job.topology.chips());
    larger
        .filter_map(|slice| {
            let plan = Plan::new(&Job { topology: slice.clone(), ..job.clone() }, None).ok().filter(fits)?;
            let time = time_of(&plan, calibration)?;
            Some((slice, plan, time))
        })
        .next()
}

/// The fastest other model axis that fits.
fn other_mesh(plan: &Plan, calibration: &Calibration, now_fits: bool) -> Option<Alternative> {
    let (job, model) = (&plan.job, plan.mesh.model.get());
    let per_host = job.topology.devices_per_host();
    let axes = model_axes(&job.config, job.topology.devices()).into_iter();
    // Across hosts only where nothing within one fits.
    let axes = axes.filter(|&axis| axis != model && (axis <= per_host || !now_fits));
    let plans = axes.filter_map(|axis| Plan::with_model_axis(job, NonZeroUsize::new(axis)?).ok());
    let timed = plans.filter(fits).filter_map(|other| Some((time_of(&other, calibration)?, other)));
    let (time, other) = timed.min_by(|(a, _), (b, _)| a.seconds.total_cmp(&b.seconds))?;
    let (before, after) = (plan.mesh, other.mesh);
    let why = if after.model < before.model {
        format!(
            "{} instead of {} share the prompts, and each step has fewer sums over devices, at the price of more \
             weight bytes a device",
            plural(after.data.get(), "engine"),
            before.data
        )
    } else {
        format!(
            "a step reads {} of weights a device instead of {}, and the prompts of {} still run at once",
            other.memory.weights,
            plan.memory.weights,
            plural(after.data.get(), "engine")
        )
    };
    Some(Alternative { kind: "mesh", change: format!("--mesh {after}"), plan: other, time, why })
}

/// As many sequences at once as a replica has prompts, or as its memory has pages for.
fn more_sequences(plan: &Plan, calibration: &Calibration) -> Option<Alternative> {
    let job = &plan.job;
    let share = plan.shares().iter().map(Vec::len).max()?;
    let longest = job.longest_prompt() + job.max_new_tokens;
    let pages_each = job.limits.page_size.pages_for(longest);
    let most_pages = room(plan).saturating_sub(plan.memory.weights).0 / plan.memory.page.0.max(1);
    let slots = share.min(most_pages as usize / pages_each.max(1));
    let (slots_now, pages_now) = (job.limits.max_seqs, job.limits.max_pages);
    let pages = pages_now.max(slots * pages_each);
    if slots <= slots_now && pages <= pages_now {
        return None;
    }
    let slots = slots.max(slots_now);
    let mut job = job.clone();
    (job.limits.max_seqs, job.limits.max_pages) = (slots, pages);
    // Batches of fewer prompts would leave slots idle.
    let batch = job.prompts_per_batch.filter(|&prompts| prompts < slots).map(|_| slots);
    job.prompts_per_batch = batch.or(job.prompts_per_batch);
    let other = Plan::on(&job, plan.mesh, plan.chosen).ok()?;
    let time = time_of(&other, calibration)?;
    let mut change = Vec::new();
    if slots > slots_now {
        change.push(format!("engine.max_seqs: {slots}"));
    }
    if pages > pages_now {
        change.push(format!("engine.max_pages: {pages}"));
    }
    change.extend(batch.map(|prompts| format!("max_prompts_per_batch: {prompts}")));
    let why = format!(
        "a step reads the weights once for {} instead of {}; the pages take {} of HBM instead of {}",
        plural(slots, "sequence"),
        slots_now.min(pages_now / pages_each.max(1)),
        other.memory.kv,
        plan.memory.kv
    );
    let kind = if slots > slots_now { "batch" } else { "pages" };
    Some(Alternative { kind, change: change.join(", "), plan: other, time, why })
}

/// As many pages as fit, where more are asked for; at least one sequence's.
fn fewer_pages(plan: &Plan, calibration: &Calibration) -> Option<Alternative> {
    if fits(plan) {
        return None;
    }
    let mut job = plan.job.clone();
    let most = room(plan).saturating_sub(plan.memory.weights).0 / plan.memory.page.0.max(1);
    let longest = job.longest_prompt() + job.max_new_tokens;
    let pages = most as usize;
    if pages < job.limits.page_size.pages_for(longest) {
        return None;
    }
    job.limits.max_pages = pages;
    let other = Plan::on(&job, plan.mesh, plan.chosen).ok()?;
    let time = time_of(&other, calibration)?;
    let why =
        format!("the pages take {} instead of {}, and the device has {}", other.memory.kv, plan.memory.kv, job.hbm);
    Some(Alternative { kind: "pages", change: format!("engine.max_pages: {pages}"), plan: other, time, why })
}
