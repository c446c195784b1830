//! The recorded certifications: each is of the body that is emitted today, and the estimate of spills that they make holds
//! for every one of them when it is left out. No compiler is asked.

use pagoda_kernels::{
    Kernel, Options, Plan, Problem,
    chips::Chip,
    evidence::{ENOUGH, spills, stale},
    vmem::Verdict,
};

fn every_record_is_of_the_body_that_is_emitted_today<K: Kernel>() {
    let stale = stale::<K>();
    let fix = "`PAGODA_RECORD=1 make certify-all` compiles them again";
    assert!(stale.is_empty(), "{} records certify nothing; {fix}:\n{}", stale.len(), stale.join("\n"));
}

fn the_estimate_holds_for_each_record_that_is_left_out<K: Kernel>() {
    let records = K::records().expect("a table");
    let (estimator, mut broken) = (records.estimator(), String::new());
    assert_eq!(estimator.points().len(), records.all().len(), "every record has a plan");
    let mut estimated = 0;
    for (index, point) in estimator.points().iter().enumerate() {
        let Some(estimate) = estimator.estimate_without(index, point.chip, &point.spilling) else { continue };
        estimated += 1;
        if point.spills > estimate {
            broken += &format!("{point:?}: estimated {estimate}\n");
        }
    }
    assert!(broken.is_empty(), "spills beyond their estimate:\n{broken}");
    assert!(estimated >= ENOUGH, "only {estimated} records can be estimated from the others");
}

/// What serving meets is on record for every chip at the tiles that the planner chooses, or its like is.
fn common_problems_fit<K: Kernel>() {
    let mut others = String::new();
    for chip in Chip::ALL {
        for spec in K::common() {
            let problem = Problem::new(spec).expect("a common problem is valid");
            let plan = Plan::<K>::new(problem, chip, Options::default()).expect("a common problem has a plan");
            let verdict = plan.verdict(spills(&plan));
            if !matches!(verdict, Verdict::Fits { .. } | Verdict::LikelyFits { .. }) {
                others += &format!("{} on {chip}, {}: {verdict}\n", plan.name(), plan.describe());
            }
        }
    }
    assert!(others.is_empty(), "{others}");
}

macro_rules! tests {
    ($($name:ident: $kernel:ty,)*) => {
        $(mod $name {
            #[test]
            fn every_record_is_of_the_body_that_is_emitted_today() {
                super::every_record_is_of_the_body_that_is_emitted_today::<$kernel>();
            }

            #[test]
            fn common_problems_fit() {
                super::common_problems_fit::<$kernel>();
            }

            #[test]
            fn the_estimate_holds_for_each_record_that_is_left_out() {
                super::the_estimate_holds_for_each_record_that_is_left_out::<$kernel>();
            }
        })*
    };
}
pagoda_kernels::for_each_kernel!(tests);
