//! What the queue answers to a command: events or a refusal. Kept apart from the fold, so that an
//! old log replays the same whatever the rules for new commands are.

use super::{Event, Inconsistent, ItemId, Queue, Status};
use crate::class::{ClassNameError, class_name};
use std::collections::BTreeSet;
use thiserror::Error;

/// The longest lease: one day, in ms.
pub const MAX_LEASE_MS: u64 = 24 * 60 * 60 * 1000;
/// The most items that one `Next` gives.
pub const MAX_NEXT: usize = 1000;
/// The longest worker name or skip reason, in characters.
const MAX_TEXT_CHARS: usize = 200;

/// What somebody wants of the queue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Put items into the queue; those already there are left alone.
    Enqueue {
        /// The items.
        items: Vec<ItemId>,
    },
    /// Give out waiting items in this order from now on; unknown and finished ones are left out.
    Rank {
        /// Items, the most wanted first.
        order: Vec<ItemId>,
    },
    /// Lease the next waiting items, in order of rank.
    Next {
        /// Who asks.
        worker: String,
        /// How many, 1 to [`MAX_NEXT`]; fewer come when fewer wait.
        count: usize,
        /// For how long, 1 to [`MAX_LEASE_MS`] ms.
        lease_ms: u64,
    },
    /// Lease one certain item.
    Claim {
        /// Who asks.
        worker: String,
        /// The item.
        item: ItemId,
        /// For how long, 1 to [`MAX_LEASE_MS`] ms.
        lease_ms: u64,
    },
    /// Hold a leased item longer; a renewal never shortens a lease.
    Renew {
        /// The holder.
        worker: String,
        /// The item.
        item: ItemId,
        /// For how long from now, 1 to [`MAX_LEASE_MS`] ms.
        lease_ms: u64,
    },
    /// Give a leased item back.
    Release {
        /// The holder.
        worker: String,
        /// The item.
        item: ItemId,
    },
    /// Give the item its class.
    Label {
        /// The holder.
        worker: String,
        /// The item.
        item: ItemId,
        /// The class name.
        class: String,
        /// Whether a class that is not known yet is meant, not a slip of the pen.
        allow_new_class: bool,
    },
    /// Set the item aside without a class.
    Skip {
        /// The holder.
        worker: String,
        /// The item.
        item: ItemId,
        /// Why: "none of these", "blurred", …
        reason: String,
    },
    /// Take back one's own label or skip.
    Undo {
        /// Who labelled or skipped it.
        worker: String,
        /// The item.
        item: ItemId,
    },
    /// Check somebody else's label; the class given here stands.
    Review {
        /// Who checks.
        worker: String,
        /// The item.
        item: ItemId,
        /// The class name.
        class: String,
        /// Whether a class that is not known yet is meant.
        allow_new_class: bool,
    },
    /// Make a class known before anything carries it.
    AddClass {
        /// The class name.
        class: String,
    },
}

/// Why a command was refused. Nothing has changed.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum QueueError {
    /// No such item.
    #[error("item {item} is not in the queue")]
    Unknown {
        /// The item.
        item: ItemId,
    },
    /// Somebody else has it.
    #[error("item {item} is held by {holder} until {until_ms}; take another or wait")]
    Held {
        /// The item.
        item: ItemId,
        /// Who.
        holder: String,
        /// Until when, in ms since the Unix epoch.
        until_ms: u64,
    },
    /// The worker does not hold it.
    #[error("item {item} is not leased to {worker}; somebody else has it; take another")]
    NotHolder {
        /// The item.
        item: ItemId,
        /// Who asked.
        worker: String,
    },
    /// It has a class already.
    #[error("item {item} is labelled `{class}` by {worker} already")]
    AlreadyLabelled {
        /// The item.
        item: ItemId,
        /// Its class.
        class: String,
        /// Who labelled it.
        worker: String,
    },
    /// It was set aside.
    #[error("item {item} was skipped by {worker} ({reason})")]
    AlreadySkipped {
        /// The item.
        item: ItemId,
        /// Who skipped it.
        worker: String,
        /// Why.
        reason: String,
    },
    /// There is nothing of this worker's to undo.
    #[error("item {item} has no label or skip by {worker} to undo")]
    NothingToUndo {
        /// The item.
        item: ItemId,
        /// Who asked.
        worker: String,
    },
    /// A review needs a label to look at.
    #[error("item {item} has no label to review")]
    NothingToReview {
        /// The item.
        item: ItemId,
    },
    /// A review of one's own label.
    #[error("item {item} was labelled by {worker}, who can undo it but not review it")]
    OwnReview {
        /// The item.
        item: ItemId,
        /// Who asked.
        worker: String,
    },
    /// The class is not known and a new one was not asked for.
    #[error("class `{class}` is not known; check the spelling, or say that it is new")]
    NewClass {
        /// The class name.
        class: String,
    },
    /// The class name breaks the rules.
    #[error(transparent)]
    ClassName(#[from] ClassNameError),
    /// A number or text of the command is out of bounds.
    #[error("{field} must be {want}")]
    Field {
        /// Which.
        field: &'static str,
        /// What would be right.
        want: &'static str,
    },
    /// The log and the state disagree.
    #[error(transparent)]
    Log(#[from] Inconsistent),
}

impl Queue {
    /// The events that follow from `command` at `now_ms` (ms since the Unix epoch).
    ///
    /// # Errors
    /// [`QueueError`] says why the command is refused.
    pub fn decide(&self, now_ms: u64, command: &Command) -> Result<Vec<Event>, QueueError> {
        match command {
            Command::Enqueue { items } => {
                let new: BTreeSet<ItemId> = items.iter().copied().collect();
                Ok(new
                    .into_iter()
                    .filter(|item| self.item(*item).is_none())
                    .map(|item| Event::Enqueued { item })
                    .collect())
            }
            Command::Rank { order } => {
                let mut seen = BTreeSet::new();
                let open = |item: &ItemId| matches!(self.is_open(*item), Ok(true));
                let order = order
                    .iter()
                    .copied()
                    .filter(|item| open(item) && seen.insert(*item))
                    .collect();
                Ok(vec![Event::Ranked { order }])
            }
            Command::Next {
                worker,
                count,
                lease_ms,
            } => self.next(now_ms, worker, *count, *lease_ms),
            Command::Claim {
                worker,
                item,
                lease_ms,
            } => self.claim(now_ms, worker, *item, *lease_ms),
            Command::Renew {
                worker,
                item,
                lease_ms,
            } => {
                let until_ms = lease_end(now_ms, *lease_ms)?;
                match self.existing(*item)? {
                    Status::Leased {
                        worker: holder,
                        until_ms: old,
                    } if holder == worker => Ok(vec![leased(*item, worker, until_ms.max(*old))]),
                    _ => Err(not_holder(*item, worker)),
                }
            }
            Command::Release { worker, item } => match self.existing(*item)? {
                Status::Leased { worker: holder, .. } if holder == worker => {
                    Ok(vec![Event::Released { item: *item }])
                }
                _ => Err(not_holder(*item, worker)),
            },
            Command::Label {
                worker,
                item,
                class,
                allow_new_class,
            } => {
                self.may_finish(*item, worker)?;
                let class = self.known_class(class, *allow_new_class)?;
                Ok(vec![Event::Labelled {
                    item: *item,
                    worker: worker.clone(),
                    class,
                    at_ms: now_ms,
                }])
            }
            Command::Skip {
                worker,
                item,
                reason,
            } => {
                self.may_finish(*item, worker)?;
                Ok(vec![Event::Skipped {
                    item: *item,
                    worker: worker.clone(),
                    reason: text("reason", reason)?.to_owned(),
                }])
            }
            Command::Undo { worker, item } => match self.existing(*item)? {
                Status::Labelled { worker: by, .. } | Status::Skipped { worker: by, .. }
                    if by == worker =>
                {
                    Ok(vec![Event::Undone { item: *item }])
                }
                _ => Err(QueueError::NothingToUndo {
                    item: *item,
                    worker: worker.clone(),
                }),
            },
            Command::Review {
                worker,
                item,
                class,
                allow_new_class,
            } => {
                text("worker", worker)?;
                match self.existing(*item)? {
                    Status::Labelled { worker: by, .. } if by == worker => {
                        Err(QueueError::OwnReview {
                            item: *item,
                            worker: worker.clone(),
                        })
                    }
                    Status::Labelled { .. } => Ok(vec![Event::Reviewed {
                        item: *item,
                        worker: worker.clone(),
                        class: self.known_class(class, *allow_new_class)?,
                        at_ms: now_ms,
                    }]),
                    _ => Err(QueueError::NothingToReview { item: *item }),
                }
            }
            Command::AddClass { class } => {
                let class = class_name(class)?;
                Ok(if self.classes.contains_key(class) {
                    Vec::new()
                } else {
                    vec![Event::ClassAdded {
                        class: class.to_owned(),
                    }]
                })
            }
        }
    }

    fn next(
        &self,
        now_ms: u64,
        worker: &str,
        count: usize,
        lease_ms: u64,
    ) -> Result<Vec<Event>, QueueError> {
        text("worker", worker)?;
        let until_ms = lease_end(now_ms, lease_ms)?;
        if count == 0 || count > MAX_NEXT {
            return Err(QueueError::Field {
                field: "count",
                want: "from 1 to 1000",
            });
        }
        // Expired leases go back into the order of rank with everything else that waits.
        let mut free: Vec<(u32, ItemId)> = self.pending.iter().take(count).copied().collect();
        let mut events = Vec::new();
        for &(_, item) in self.expiry.range(..=(now_ms, ItemId::MAX)) {
            events.push(Event::Released { item });
            free.push((self.item(item).map_or(super::UNRANKED, |x| x.rank), item));
        }
        free.sort_unstable();
        let given = free.into_iter().take(count);
        events.extend(given.map(|(_, item)| leased(item, worker, until_ms)));
        Ok(events)
    }

    fn claim(
        &self,
        now_ms: u64,
        worker: &str,
        item: ItemId,
        lease_ms: u64,
    ) -> Result<Vec<Event>, QueueError> {
        text("worker", worker)?;
        let until_ms = lease_end(now_ms, lease_ms)?;
        match self.existing(item)? {
            Status::Leased {
                worker: holder,
                until_ms: old,
            } if holder == worker => Ok(vec![leased(item, worker, until_ms.max(*old))]),
            Status::Leased {
                worker: holder,
                until_ms: old,
            } if *old > now_ms => Err(QueueError::Held {
                item,
                holder: holder.clone(),
                until_ms: *old,
            }),
            Status::Leased { .. } => Ok(vec![
                Event::Released { item },
                leased(item, worker, until_ms),
            ]),
            Status::Pending { .. } => Ok(vec![leased(item, worker, until_ms)]),
            done => Err(done_already(item, done)),
        }
    }

    fn existing(&self, item: ItemId) -> Result<&Status, QueueError> {
        self.item(item)
            .map(|x| &x.status)
            .ok_or(QueueError::Unknown { item })
    }

    /// Whether `worker` may label or skip the item: its holder, or its last one while nobody else
    /// got it.
    fn may_finish(&self, item: ItemId, worker: &str) -> Result<(), QueueError> {
        let mine = match self.existing(item)? {
            Status::Leased { worker: holder, .. } => holder == worker,
            Status::Pending { last_holder } => last_holder.as_deref() == Some(worker),
            done => return Err(done_already(item, done)),
        };
        if mine {
            Ok(())
        } else {
            Err(not_holder(item, worker))
        }
    }

    fn known_class(&self, class: &str, allow_new: bool) -> Result<String, QueueError> {
        let class = class_name(class)?.to_owned();
        if allow_new || self.classes.contains_key(&class) {
            Ok(class)
        } else {
            Err(QueueError::NewClass { class })
        }
    }
}

fn leased(item: ItemId, worker: &str, until_ms: u64) -> Event {
    Event::Leased {
        item,
        worker: worker.to_owned(),
        until_ms,
    }
}

fn not_holder(item: ItemId, worker: &str) -> QueueError {
    QueueError::NotHolder {
        item,
        worker: worker.to_owned(),
    }
}

fn done_already(item: ItemId, status: &Status) -> QueueError {
    match status {
        Status::Labelled { class, worker, .. } => QueueError::AlreadyLabelled {
            item,
            class: class.clone(),
            worker: worker.clone(),
        },
        Status::Skipped { worker, reason } => QueueError::AlreadySkipped {
            item,
            worker: worker.clone(),
            reason: reason.clone(),
        },
        Status::Leased { .. } | Status::Pending { .. } => QueueError::Unknown { item },
    }
}

fn lease_end(now_ms: u64, lease_ms: u64) -> Result<u64, QueueError> {
    if lease_ms == 0 || lease_ms > MAX_LEASE_MS {
        return Err(QueueError::Field {
            field: "lease_ms",
            want: "from 1 to 86400000 (one day)",
        });
    }
    Ok(now_ms.saturating_add(lease_ms))
}

fn text<'a>(field: &'static str, text: &'a str) -> Result<&'a str, QueueError> {
    let text = text.trim();
    let fits = !text.is_empty()
        && text.chars().count() <= MAX_TEXT_CHARS
        && !text.chars().any(char::is_control);
    if fits {
        Ok(text)
    } else {
        Err(QueueError::Field {
            field,
            want: "one line of 1 to 200 characters",
        })
    }
}
