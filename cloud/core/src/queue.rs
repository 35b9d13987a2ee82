//! The labelling queue as a state machine: a command at a time gives events or a typed refusal
//! ([`Queue::decide`]), and the state is the fold of the events ([`Queue::apply`]), so that the
//! stored log is the truth and a restarted server is where it was.
//!
//! An item is in exactly one state and has at most one holder. A lease is held while
//! `now < until`; afterwards anybody may be given the item, but until that happens the late worker's
//! label is still taken, since the work is done.

mod decide;
#[cfg(test)]
mod tests;

pub use decide::{Command, MAX_LEASE_MS, MAX_NEXT, QueueError};

use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use thiserror::Error;

/// The server's number for a sample.
pub type ItemId = u64;

/// The rank of an item that no ranking named: behind all that are ranked, in order of id.
pub const UNRANKED: u32 = u32::MAX;

/// What happened to the queue. Stored: variants are only ever added, at the end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Event {
    /// A new item waits.
    Enqueued {
        /// The item.
        item: ItemId,
    },
    /// The order in which waiting items are given out, replacing the one before.
    Ranked {
        /// Items, the most wanted first.
        order: Vec<ItemId>,
    },
    /// A worker holds the item; or holds it longer.
    Leased {
        /// The item.
        item: ItemId,
        /// Who holds it.
        worker: String,
        /// When the lease ends, in ms since the Unix epoch.
        until_ms: u64,
    },
    /// The item waits again, given back or expired.
    Released {
        /// The item.
        item: ItemId,
    },
    /// The item has a class.
    Labelled {
        /// The item.
        item: ItemId,
        /// Who said so.
        worker: String,
        /// The class name.
        class: String,
        /// When, in ms since the Unix epoch.
        at_ms: u64,
    },
    /// The item is out of the queue without a class.
    Skipped {
        /// The item.
        item: ItemId,
        /// Who said so.
        worker: String,
        /// Why, in the worker's words.
        reason: String,
    },
    /// A worker took back the label or skip; the item waits again.
    Undone {
        /// The item.
        item: ItemId,
    },
    /// A second worker looked at a label; the class given here stands.
    Reviewed {
        /// The item.
        item: ItemId,
        /// Who reviewed it.
        worker: String,
        /// The class name.
        class: String,
        /// When, in ms since the Unix epoch.
        at_ms: u64,
    },
    /// A class may be used before anything carries it.
    ClassAdded {
        /// The class name.
        class: String,
    },
}

/// Where an item stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Status {
    /// It waits.
    Pending {
        /// Who held it last; that worker's late label is still taken.
        last_holder: Option<String>,
    },
    /// Somebody has it.
    Leased {
        /// Who.
        worker: String,
        /// Until when, in ms since the Unix epoch.
        until_ms: u64,
    },
    /// It has a class.
    Labelled {
        /// The class name.
        class: String,
        /// Who gave it.
        worker: String,
        /// When, in ms since the Unix epoch.
        at_ms: u64,
        /// How often others reviewed it.
        reviews: u32,
    },
    /// It is set aside.
    Skipped {
        /// Who did.
        worker: String,
        /// Why.
        reason: String,
    },
}

/// An item of the queue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    /// Its place in the last ranking, 0 first, or [`UNRANKED`].
    pub rank: u32,
    /// Where it stands.
    pub status: Status,
}

/// What one worker did. Reviews and undone labels move the counts, so the sums match the queue.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerStats {
    /// Items held now.
    pub leased: u64,
    /// Labels that stand.
    pub labelled: u64,
    /// Skips that stand.
    pub skipped: u64,
    /// Reviews of others' labels.
    pub reviewed: u64,
}

/// The queue in numbers.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// Items that can be given out, expired leases included.
    pub pending: u64,
    /// Items held.
    pub leased: u64,
    /// Items with a class.
    pub labelled: u64,
    /// Items set aside.
    pub skipped: u64,
    /// By worker.
    pub workers: BTreeMap<String, WorkerStats>,
    /// Labels by class; known classes without one are listed with 0.
    pub classes: BTreeMap<String, u64>,
}

/// An event that can't follow from the state: the log is damaged or out of order.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("the queue's log does not fit its state at item {item}: {what}")]
pub struct Inconsistent {
    /// The item of the event.
    pub item: ItemId,
    /// What does not fit.
    pub what: &'static str,
}

/// The state of the queue: a fold of its events.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Queue {
    items: BTreeMap<ItemId, Item>,
    /// Waiting items, the next one first.
    pending: BTreeSet<(u32, ItemId)>,
    /// Leases, the first to end first.
    expiry: BTreeSet<(u64, ItemId)>,
    /// Items with a rank, so that a new ranking touches only those and its own.
    ranked: BTreeSet<ItemId>,
    /// Known classes in order of first appearance, and how many labels each has.
    order: Vec<String>,
    classes: BTreeMap<String, u64>,
    workers: BTreeMap<String, WorkerStats>,
    labelled: u64,
    skipped: u64,
}

impl Queue {
    /// The state after `events`.
    ///
    /// # Errors
    /// [`Inconsistent`] at the first event that does not fit.
    pub fn replay<'a>(events: impl IntoIterator<Item = &'a Event>) -> Result<Self, Inconsistent> {
        let mut queue = Self::default();
        for event in events {
            queue.apply(event)?;
        }
        Ok(queue)
    }

    /// Decides `command` at `now_ms` and applies what follows; the events are to be stored.
    ///
    /// # Errors
    /// The refusal, with the state unchanged.
    pub fn execute(&mut self, now_ms: u64, command: &Command) -> Result<Vec<Event>, QueueError> {
        let events = self.decide(now_ms, command)?;
        for event in &events {
            self.apply(event)?;
        }
        Ok(events)
    }

    /// Adds `event` to the state.
    ///
    /// # Errors
    /// [`Inconsistent`], with the state unchanged, when the event can't follow from it.
    pub fn apply(&mut self, event: &Event) -> Result<(), Inconsistent> {
        match event {
            Event::Enqueued { item } => self.enqueue(*item),
            Event::Ranked { order } => self.rank(order),
            Event::Leased {
                item,
                worker,
                until_ms,
            } => {
                let free = match self.status(*item)? {
                    Status::Pending { .. } => true,
                    Status::Leased { worker: holder, .. } => holder == worker,
                    _ => false,
                };
                require(free, *item, "leased while somebody else has it, or done")?;
                self.replace(
                    *item,
                    Status::Leased {
                        worker: worker.clone(),
                        until_ms: *until_ms,
                    },
                )
            }
            Event::Released { item } => {
                let Status::Leased { worker, .. } = self.status(*item)? else {
                    return require(false, *item, "released while not leased");
                };
                let last_holder = Some(worker.clone());
                self.replace(*item, Status::Pending { last_holder })
            }
            Event::Labelled {
                item,
                worker,
                class,
                at_ms,
            } => {
                require(self.is_open(*item)?, *item, "labelled when done already")?;
                self.learn(class);
                self.replace(
                    *item,
                    Status::Labelled {
                        class: class.clone(),
                        worker: worker.clone(),
                        at_ms: *at_ms,
                        reviews: 0,
                    },
                )
            }
            Event::Skipped {
                item,
                worker,
                reason,
            } => {
                require(self.is_open(*item)?, *item, "skipped when done already")?;
                self.replace(
                    *item,
                    Status::Skipped {
                        worker: worker.clone(),
                        reason: reason.clone(),
                    },
                )
            }
            Event::Undone { item } => {
                let last_holder = match self.status(*item)? {
                    Status::Labelled { worker, .. } | Status::Skipped { worker, .. } => {
                        Some(worker.clone())
                    }
                    _ => return require(false, *item, "undone while not done"),
                };
                self.replace(*item, Status::Pending { last_holder })
            }
            Event::Reviewed {
                item,
                worker,
                class,
                at_ms,
            } => {
                let Status::Labelled {
                    worker: labeller,
                    reviews,
                    ..
                } = self.status(*item)?
                else {
                    return require(false, *item, "reviewed without a label");
                };
                let status = Status::Labelled {
                    class: class.clone(),
                    worker: labeller.clone(),
                    at_ms: *at_ms,
                    reviews: reviews + 1,
                };
                self.learn(class);
                self.worker(worker).reviewed += 1;
                self.replace(*item, status)
            }
            Event::ClassAdded { class } => {
                self.learn(class);
                Ok(())
            }
        }
    }

    /// The item, if it was ever enqueued.
    #[must_use]
    pub fn item(&self, item: ItemId) -> Option<&Item> {
        self.items.get(&item)
    }

    /// Every item, in order of id.
    pub fn items(&self) -> impl Iterator<Item = (ItemId, &Item)> {
        self.items.iter().map(|(id, item)| (*id, item))
    }

    /// Waiting items, the next one first. Expired leases join them when somebody asks for work.
    pub fn waiting(&self) -> impl Iterator<Item = ItemId> + '_ {
        self.pending.iter().map(|(_, item)| *item)
    }

    /// Labels that stand, in order of item: `(item, class, when in ms)`.
    pub fn labels(&self) -> impl Iterator<Item = (ItemId, &str, u64)> {
        self.items().filter_map(|(id, item)| match &item.status {
            Status::Labelled { class, at_ms, .. } => Some((id, class.as_str(), *at_ms)),
            _ => None,
        })
    }

    /// Known classes in order of first appearance.
    #[must_use]
    pub fn classes(&self) -> &[String] {
        &self.order
    }

    /// The queue in numbers, as of `now_ms`.
    #[must_use]
    pub fn stats(&self, now_ms: u64) -> Stats {
        let expired = self.expiry.range(..=(now_ms, ItemId::MAX)).count() as u64;
        Stats {
            pending: self.pending.len() as u64 + expired,
            leased: self.expiry.len() as u64 - expired,
            labelled: self.labelled,
            skipped: self.skipped,
            workers: self.workers.clone(),
            classes: self.classes.clone(),
        }
    }

    fn status(&self, item: ItemId) -> Result<&Status, Inconsistent> {
        self.items
            .get(&item)
            .map(|x| &x.status)
            .ok_or(Inconsistent {
                item,
                what: "it was never enqueued",
            })
    }

    fn is_open(&self, item: ItemId) -> Result<bool, Inconsistent> {
        Ok(matches!(
            self.status(item)?,
            Status::Pending { .. } | Status::Leased { .. }
        ))
    }

    fn enqueue(&mut self, item: ItemId) -> Result<(), Inconsistent> {
        require(!self.items.contains_key(&item), item, "enqueued twice")?;
        self.items.insert(
            item,
            Item {
                rank: UNRANKED,
                status: Status::Pending { last_holder: None },
            },
        );
        self.pending.insert((UNRANKED, item));
        Ok(())
    }

    fn rank(&mut self, order: &[ItemId]) -> Result<(), Inconsistent> {
        for &item in order {
            self.status(item)?;
        }
        for item in std::mem::take(&mut self.ranked) {
            self.set_rank(item, UNRANKED);
        }
        for (rank, &item) in (0..UNRANKED).zip(order) {
            // The first mention counts, should an item be named twice.
            if self.ranked.insert(item) {
                self.set_rank(item, rank);
            }
        }
        Ok(())
    }

    fn set_rank(&mut self, id: ItemId, rank: u32) {
        if let Some(item) = self.items.get_mut(&id) {
            if self.pending.remove(&(item.rank, id)) {
                self.pending.insert((rank, id));
            }
            item.rank = rank;
        }
    }

    fn learn(&mut self, class: &str) {
        if !self.classes.contains_key(class) {
            self.classes.insert(class.to_owned(), 0);
            self.order.push(class.to_owned());
        }
    }

    fn worker(&mut self, name: &str) -> &mut WorkerStats {
        self.workers.entry(name.to_owned()).or_default()
    }

    /// Puts the item into `status`; every index and count is moved here and nowhere else.
    fn replace(&mut self, id: ItemId, status: Status) -> Result<(), Inconsistent> {
        let Some(item) = self.items.get_mut(&id) else {
            return require(false, id, "it was never enqueued");
        };
        let rank = item.rank;
        let before = std::mem::replace(&mut item.status, status.clone());
        self.count(id, rank, &before, false);
        self.count(id, rank, &status, true);
        Ok(())
    }

    fn count(&mut self, id: ItemId, rank: u32, status: &Status, enters: bool) {
        let step = |count: &mut u64| {
            if enters {
                *count += 1;
            } else {
                *count -= 1;
            }
        };
        match status {
            Status::Pending { .. } => {
                if enters {
                    self.pending.insert((rank, id));
                } else {
                    self.pending.remove(&(rank, id));
                }
            }
            Status::Leased { worker, until_ms } => {
                if enters {
                    self.expiry.insert((*until_ms, id));
                } else {
                    self.expiry.remove(&(*until_ms, id));
                }
                step(&mut self.worker(worker).leased);
            }
            Status::Labelled { class, worker, .. } => {
                step(&mut self.labelled);
                step(self.classes.entry(class.clone()).or_default());
                step(&mut self.worker(worker).labelled);
            }
            Status::Skipped { worker, .. } => {
                step(&mut self.skipped);
                step(&mut self.worker(worker).skipped);
            }
        }
    }
}

fn require(holds: bool, item: ItemId, what: &'static str) -> Result<(), Inconsistent> {
    if holds {
        Ok(())
    } else {
        Err(Inconsistent { item, what })
    }
}
