//! What semaphores were sent and what waits took: which sendings a wait is sure of, and so what comes before it.

use std::collections::HashSet;

/// The last epoch of every core that is known to be over.
pub(super) type Clock = Vec<u32>;

/// Takes over what another clock knows.
pub(super) fn join(clock: &mut Clock, other: &Clock) {
    for (mine, theirs) in clock.iter_mut().zip(other) {
        *mine = (*mine).max(*theirs);
    }
}

/// A sending: its core, and which of its sendings.
pub(super) type Sending = (usize, u32);

/// What adds to a semaphore.
#[derive(Clone, Debug)]
pub(super) struct Increment {
    pub(super) id: Sending,
    pub(super) amount: i64,
    /// Its sender's clock; the sender's own component is the epoch that ended with it.
    pub(super) clock: Clock,
    /// Whether it is a DMA: its bytes come one by one, and in no order with anything else of its sender.
    pub(super) is_dma: bool,
}

impl Increment {
    /// Whether this was sent by one who knew of `earlier`.
    pub(super) fn follows(&self, earlier: &Self) -> bool {
        self.id != earlier.id && self.clock[earlier.id.0] >= earlier.clock[earlier.id.0]
    }

    /// Whether a wait that `slack` less would have satisfied needed this; `weight` is what would have been missing without it.
    pub(super) fn is_certain(&self, weight: i64, slack: i64) -> bool {
        if self.is_dma { slack == 0 } else { weight > slack }
    }
}

/// What was sent to a semaphore and taken from it.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    /// All that was sent so far; a DMA counts from its start.
    pub(super) sent: i64,
    pub(super) taken: i64,
    /// Sendings of other cores that no wait is sure of.
    pub(super) pending: Vec<Increment>,
    /// Waits that were sure of something, in their order.
    pub(super) waits: Vec<Waited>,
}

#[derive(Debug)]
pub(super) struct Waited {
    /// Which of the core's waits.
    pub(super) number: u32,
    pub(super) epoch: u32,
    /// What may be missing of all that was sent, and may have come before it, without holding it up.
    pub(super) slack: i64,
    /// What it was sure of, and what would be missing without it.
    pub(super) acquired: Vec<(Increment, i64)>,
}

/// That a wait, by its core and number, was not sure of a sending.
pub(super) type Uncertain = (usize, u32, Sending);

impl Ledger {
    /// Another sending. What earlier waits were sure of only as it had not come: a wait that it is not ordered after may have
    /// taken it.
    pub(super) fn add(&mut self, sending: Increment, me: usize) -> Vec<Uncertain> {
        self.sent += sending.amount;
        let mut uncertain = vec![];
        for wait in self.waits.iter_mut().rev().take_while(|wait| sending.clock[me] < wait.epoch) {
            wait.slack += sending.amount;
            for (known, weight) in &mut wait.acquired {
                if sending.follows(known) {
                    *weight += sending.amount;
                }
                if !known.is_certain(*weight, wait.slack) {
                    uncertain.push((me, wait.number, known.id));
                }
            }
        }
        self.pending.push(sending);
        uncertain
    }

    /// What a wait for `amount` is sure of.
    pub(super) fn take(
        &mut self,
        amount: i64,
        wait: (usize, u32),
        epoch: u32,
        uncertain: &HashSet<Uncertain>,
    ) -> Vec<Increment> {
        self.taken += amount;
        let slack = self.sent - self.taken;
        let weight = |one: &Increment| {
            let later = self.pending.iter().filter(|other| other.follows(one));
            one.amount + later.map(|other| other.amount).sum::<i64>()
        };
        let weights: Vec<i64> = self.pending.iter().map(weight).collect();
        let (mut acquired, mut pending) = (vec![], vec![]);
        for (one, weight) in std::mem::take(&mut self.pending).into_iter().zip(weights) {
            match one.is_certain(weight, slack) && !uncertain.contains(&(wait.0, wait.1, one.id)) {
                true => acquired.push((one, weight)),
                false => pending.push(one),
            }
        }
        self.pending = pending;
        let sure_of = acquired.iter().map(|(one, _)| one.clone()).collect();
        if !acquired.is_empty() {
            self.waits.push(Waited { number: wait.1, epoch, slack, acquired });
        }
        sure_of
    }
}
