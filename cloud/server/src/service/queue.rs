//! The labelling queue over stored samples: follows ingest, ranks what waits with the champion,
//! and keeps every event.
//!
//! An item is a distinct picture. Its number is the cursor of the first sample that carried it,
//! so that the queue needs no numbering of its own and numbers never change.

mod pseudo;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

use cloud_core::priority::{self, Candidate, Labelled, Options, Pool, Prediction, Strategy, Track};
use cloud_core::queue::{Command, Event, ItemId, Queue, QueueError, Status};
use flywheel_shared::ids::{DeviceId, Digest};

use super::catalog::{Catalog, QueueLabel};
use super::inference::{Inference, Scorer};
use super::registry::{ModelRecord, Registry};
use super::{Fault, blob, lock, now_ms};
use crate::api::types::{LabelRequest, NextRequest, QueueItem, QueueStats, SkipRequest, Split};
use crate::picture::Picture;
use crate::store::{SampleMeta, Store};

const EVENTS: &str = "queue";
/// How many samples are taken from the store at a time.
const FOLLOW_STEP: usize = 1024;
/// Default lease: long enough to look closely, short enough that a closed laptop blocks nobody.
const LEASE_S: u64 = 300;

/// How the queue ranks.
#[derive(Clone, Copy, Debug)]
pub struct Ranking {
    /// The strategy.
    pub strategy: Strategy,
    /// How many items are ranked at a time: about the labels of a round.
    pub batch: usize,
    /// Frames of one device this far apart at most show one thing; one item of it is ranked.
    pub track_reach: u64,
    /// Seed of every random choice.
    pub seed: u64,
}

/// The labelling queue.
pub struct Labelling {
    store: Arc<Store>,
    ranking: Ranking,
    state: Mutex<State>,
    /// What the champion says of each picture; also serialises ranking, which takes a second.
    scored: Mutex<Scored>,
}

#[derive(Default)]
struct State {
    queue: Queue,
    samples: BTreeMap<ItemId, SampleMeta>,
    by_digest: BTreeMap<Digest, ItemId>,
    cursor: u64,
    notes: BTreeMap<ItemId, Note>,
    ranked: Option<Ranked>,
}

/// What the ranking said of an item.
struct Note {
    guess: Option<(String, f32)>,
    why: String,
}

/// What a ranking was made from; another champion or a grown pool makes it stale.
struct Ranked {
    champion: Option<String>,
    pool: usize,
    order: BTreeSet<ItemId>,
}

#[derive(Default)]
struct Scored {
    model: Option<String>,
    answers: BTreeMap<Digest, Answer>,
    hashes: BTreeMap<Digest, u64>,
}

#[derive(Clone)]
struct Answer {
    embedding: Vec<f32>,
    prediction: Prediction,
}

/// Whether anybody may take an item: it waits, or who had it let the lease run out.
fn is_free(status: &Status, now_ms: u64) -> bool {
    match status {
        Status::Pending { .. } => true,
        Status::Leased { until_ms, .. } => *until_ms <= now_ms,
        Status::Labelled { .. } | Status::Skipped { .. } => false,
    }
}

impl Labelling {
    /// The queue in a store.
    ///
    /// # Errors
    /// If the log of events does not replay or the store can't be read.
    pub fn open(store: Arc<Store>, ranking: Ranking) -> Result<Self, Fault> {
        let mut state = State::default();
        for (_, event) in store.events::<Event>(EVENTS, 0)? {
            state
                .queue
                .apply(&event)
                .map_err(|error| Fault::Internal(error.to_string()))?;
        }
        let labelling = Self {
            store,
            ranking,
            state: Mutex::new(state),
            scored: Mutex::default(),
        };
        labelling.follow()?;
        Ok(labelling)
    }

    /// Takes in the samples that were committed since the last call.
    ///
    /// # Errors
    /// If the store fails.
    pub fn follow(&self) -> Result<(), Fault> {
        let mut state = lock(&self.state);
        loop {
            let batch = self.store.samples(state.cursor, FOLLOW_STEP)?;
            let Some((last, _)) = batch.last() else {
                return Ok(());
            };
            let next = *last;
            let mut new = Vec::new();
            for (cursor, sample) in batch {
                if let std::collections::btree_map::Entry::Vacant(entry) =
                    state.by_digest.entry(sample.blob)
                {
                    entry.insert(cursor);
                    new.push(cursor);
                    state.samples.insert(cursor, sample);
                }
            }
            self.execute(&mut state, &Command::Enqueue { items: new })?;
            state.cursor = next;
        }
    }

    /// Leases the next items, ranking first if the ranking is stale.
    ///
    /// # Errors
    /// If the request makes no sense or the store fails.
    pub fn next(
        &self,
        request: &NextRequest,
        registry: &Registry,
        catalog: &Catalog,
    ) -> Result<Vec<QueueItem>, Fault> {
        self.follow()?;
        self.rank_if_stale(registry, catalog)?;
        let mut state = lock(&self.state);
        let events = self.execute(
            &mut state,
            &Command::Next {
                worker: request.worker.clone(),
                count: request.count.unwrap_or(1) as usize,
                lease_ms: request.lease_s.unwrap_or(LEASE_S).saturating_mul(1000),
            },
        )?;
        events
            .iter()
            .filter_map(|event| match event {
                Event::Leased { item, .. } => Some(state.view(*item)),
                _ => None,
            })
            .collect()
    }

    /// Labels an item.
    ///
    /// # Errors
    /// If the worker does not hold it, or the class name breaks the rules.
    pub fn label(&self, request: &LabelRequest) -> Result<QueueItem, Fault> {
        let mut state = lock(&self.state);
        self.claim_if_free(&mut state, &request.worker, request.item)?;
        self.execute(
            &mut state,
            &Command::Label {
                worker: request.worker.clone(),
                item: request.item,
                class: request.class.clone(),
                allow_new_class: true,
            },
        )?;
        state.view(request.item)
    }

    /// Puts an item aside.
    ///
    /// # Errors
    /// If the worker does not hold it, or gives no reason.
    pub fn skip(&self, request: &SkipRequest) -> Result<QueueItem, Fault> {
        let mut state = lock(&self.state);
        self.claim_if_free(&mut state, &request.worker, request.item)?;
        self.execute(
            &mut state,
            &Command::Skip {
                worker: request.worker.clone(),
                item: request.item,
                reason: request.reason.clone(),
            },
        )?;
        state.view(request.item)
    }

    /// Items in the order in which they are handed out, those not waiting last.
    ///
    /// # Errors
    /// If `wanted` is no state.
    pub fn list(&self, wanted: Option<&str>, limit: usize) -> Result<Vec<QueueItem>, Fault> {
        if let Some(wanted) = wanted
            && !["pending", "leased", "labelled", "skipped"].contains(&wanted)
        {
            return Err(Fault::Invalid(format!(
                "there is no state `{wanted}`; use pending, leased, labelled or skipped"
            )));
        }
        self.follow()?;
        let state = lock(&self.state);
        let waiting = state.queue.waiting();
        let others = state
            .queue
            .items()
            .filter(|(_, item)| !matches!(item.status, Status::Pending { .. }))
            .map(|(id, _)| id);
        waiting
            .chain(others)
            .map(|id| state.view(id))
            .filter(|view| match (view, wanted) {
                (Ok(view), Some(wanted)) => view.state == wanted,
                _ => true,
            })
            .take(limit)
            .collect()
    }

    /// One item.
    ///
    /// # Errors
    /// If it is not in the queue.
    pub fn item(&self, id: ItemId) -> Result<QueueItem, Fault> {
        lock(&self.state).view(id)
    }

    /// The queue in numbers.
    ///
    /// # Errors
    /// If the store fails.
    pub fn stats(&self, registry: &Registry, catalog: &Catalog) -> Result<QueueStats, Fault> {
        self.follow()?;
        let mut classes = registry
            .classifier()?
            .map(|champion| champion.classes)
            .unwrap_or_default();
        let imported: BTreeSet<String> = catalog
            .imports(Split::Train)?
            .into_iter()
            .map(|import| import.class)
            .collect();
        let state = lock(&self.state);
        for class in imported.iter().chain(state.queue.classes()) {
            if !classes.contains(class) {
                classes.push(class.clone());
            }
        }
        let stats = state.queue.stats(now_ms());
        Ok(QueueStats {
            pending: stats.pending,
            leased: stats.leased,
            labelled: stats.labelled,
            skipped: stats.skipped,
            by_worker: stats
                .workers
                .into_iter()
                .map(|(worker, stats)| (worker, stats.labelled))
                .collect(),
            by_class: stats.classes,
            classes,
        })
    }

    /// The labels that stand, and those that follow from them: an unlabelled picture of a track
    /// in which people agree on a class shows the same thing and gets the same class. What was
    /// put aside stays out.
    pub fn labels(&self) -> Vec<QueueLabel> {
        let state = lock(&self.state);
        // `None` where people disagree within a track.
        let mut tracks: BTreeMap<_, Option<(&str, u64)>> = BTreeMap::new();
        for (id, class, at_ms) in state.queue.labels() {
            if let Some(sample) = state.samples.get(&id) {
                tracks
                    .entry(track_of(sample))
                    .and_modify(|known| {
                        if known.is_some_and(|(other, _)| other != class) {
                            *known = None;
                        }
                    })
                    .or_insert(Some((class, at_ms)));
            }
        }
        state
            .queue
            .items()
            .filter_map(|(id, item)| {
                let sample = state.samples.get(&id)?;
                let (class, at_ms) = match &item.status {
                    Status::Labelled { class, at_ms, .. } => (class.as_str(), *at_ms),
                    Status::Skipped { .. } => return None,
                    _ => (*tracks.get(&track_of(sample))?)?,
                };
                Some(QueueLabel {
                    digest: sample.blob,
                    class: class.to_owned(),
                    track: track_name(sample),
                    at_ms,
                })
            })
            .collect()
    }

    /// The first sample that carried a picture.
    pub fn sample_of(&self, digest: &Digest) -> Option<SampleMeta> {
        let state = lock(&self.state);
        state.samples.get(state.by_digest.get(digest)?).cloned()
    }

    /// Leases an item that nobody holds, so that one can be answered by number.
    fn claim_if_free(&self, state: &mut State, worker: &str, item: ItemId) -> Result<(), Fault> {
        let known = state.queue.item(item);
        if known.is_some_and(|item| is_free(&item.status, now_ms())) {
            self.execute(
                state,
                &Command::Claim {
                    worker: worker.to_owned(),
                    item,
                    lease_ms: LEASE_S * 1000,
                },
            )?;
        }
        Ok(())
    }

    fn execute(&self, state: &mut State, command: &Command) -> Result<Vec<Event>, Fault> {
        let events = state
            .queue
            .decide(now_ms(), command)
            .map_err(|error| match error {
                QueueError::Unknown { .. } => Fault::NotFound(error.to_string()),
                QueueError::Log(_) => Fault::Internal(error.to_string()),
                QueueError::ClassName(_) | QueueError::Field { .. } => {
                    Fault::Invalid(error.to_string())
                }
                _ => Fault::Conflict(error.to_string()),
            })?;
        // Stored first: what is answered to a person is never taken back by a crash.
        self.store.append_events(EVENTS, &events)?;
        for event in &events {
            state
                .queue
                .apply(event)
                .map_err(|error| Fault::Internal(error.to_string()))?;
        }
        Ok(events)
    }

    fn rank_if_stale(&self, registry: &Registry, catalog: &Catalog) -> Result<(), Fault> {
        let champion = registry.classifier()?;
        let mut scored = lock(&self.scored);
        let pending: Vec<(ItemId, SampleMeta)> = {
            let state = lock(&self.state);
            if !state.is_stale(champion.as_ref()) {
                return Ok(());
            }
            let mut pending: Vec<_> = state
                .queue
                .waiting()
                .filter_map(|id| Some((id, state.samples.get(&id)?.clone())))
                .collect();
            // Commit order depends on the network; the frames themselves do not.
            pending.sort_by(|a, b| {
                (&a.1.device, a.1.frame, a.1.blob).cmp(&(&b.1.device, b.1.frame, b.1.blob))
            });
            pending
        };
        if pending.is_empty() {
            return Ok(());
        }
        let mut labelled: Vec<(Digest, String)> = catalog
            .imports(Split::Train)?
            .into_iter()
            .map(|import| (import.digest, import.class))
            .collect();
        labelled.extend(
            self.labels()
                .into_iter()
                .map(|label| (label.digest, label.class)),
        );
        labelled.sort();
        self.score(
            &mut scored,
            champion.as_ref(),
            pending
                .iter()
                .map(|(_, sample)| sample.blob)
                .chain(labelled.iter().map(|(digest, _)| *digest)),
            catalog,
        )?;

        let classes = champion
            .as_ref()
            .map(|champion| champion.classes.clone())
            .unwrap_or_default();
        let index = |class: &str| {
            classes
                .iter()
                .position(|known| known == class)
                .unwrap_or(classes.len()) as u32
        };
        let mut class_counts = vec![0u32; classes.len()];
        for (_, class) in &labelled {
            if let Some(count) = class_counts.get_mut(index(class) as usize) {
                *count += 1;
            }
        }
        let candidates: Vec<Candidate<'_>> = pending
            .iter()
            .map(|(_, sample)| {
                let answer = scored.answers.get(&sample.blob);
                Candidate {
                    embedding: answer.map_or(&[], |answer| answer.embedding.as_slice()),
                    prediction: answer.map(|answer| answer.prediction),
                    lane: sample.lane,
                    track: Some(Track {
                        device: sample.device.as_str(),
                        frame: sample.frame,
                    }),
                    phash: scored.hashes.get(&sample.blob).copied(),
                }
            })
            .collect();
        let known: Vec<Labelled<'_>> = labelled
            .iter()
            .map(|(digest, class)| Labelled {
                embedding: scored
                    .answers
                    .get(digest)
                    .map_or(&[], |answer| answer.embedding.as_slice()),
                class: index(class),
            })
            .collect();
        let picks = priority::rank(
            &Pool {
                candidates: &candidates,
                labelled: &known,
                class_counts: &class_counts,
            },
            &Options {
                strategy: self.ranking.strategy,
                budget: self.ranking.batch,
                track_reach: self.ranking.track_reach,
                seed: self.ranking.seed ^ known.len() as u64,
                ..Options::default()
            },
        )
        .map_err(|error| Fault::Internal(error.to_string()))?;

        let mut state = lock(&self.state);
        let order: Vec<ItemId> = picks.iter().map(|pick| pending[pick.index].0).collect();
        self.execute(
            &mut state,
            &Command::Rank {
                order: order.clone(),
            },
        )?;
        state.notes.clear();
        for (id, sample) in &pending {
            if let Some(answer) = scored.answers.get(&sample.blob) {
                let guess = classes
                    .get(answer.prediction.top as usize)
                    .map(|class| (class.clone(), answer.prediction.confidence));
                state.notes.insert(
                    *id,
                    Note {
                        guess,
                        why: String::new(),
                    },
                );
            }
        }
        for pick in &picks {
            let id = pending[pick.index].0;
            state
                .notes
                .entry(id)
                .or_insert(Note {
                    guess: None,
                    why: String::new(),
                })
                .why = pick.why.to_string();
        }
        state.ranked = Some(Ranked {
            champion: champion.map(|champion| champion.id),
            pool: pending.len(),
            order: order.into_iter().collect(),
        });
        Ok(())
    }

    /// Makes sure that every picture has the champion's answer and a perceptual hash.
    fn score(
        &self,
        scored: &mut Scored,
        champion: Option<&ModelRecord>,
        digests: impl Iterator<Item = Digest>,
        catalog: &Catalog,
    ) -> Result<(), Fault> {
        let id = champion.map(|champion| champion.id.clone());
        if scored.model != id {
            scored.answers.clear();
            scored.model = id;
        }
        let mut engine = match champion {
            Some(champion) => Some((
                Inference::load(&self.store, champion)?,
                Scorer::load(&self.store, champion)?,
            )),
            None => None,
        };
        for digest in digests {
            let hashed = scored.hashes.contains_key(&digest);
            let answered = engine.is_none() || scored.answers.contains_key(&digest);
            if hashed && answered {
                continue;
            }
            let picture = match self.picture(&digest, catalog) {
                Ok(picture) => picture,
                Err(fault) => {
                    // Left in the queue unranked: a person may still see what it is.
                    tracing::warn!(%digest, %fault, "a picture can't be scored");
                    continue;
                }
            };
            if !hashed {
                scored.hashes.insert(digest, picture.dhash());
            }
            if let Some((inference, scorer)) = &mut engine
                && !answered
            {
                let scored_now = inference
                    .run(&picture)
                    .and_then(|_| scorer.score(&inference.logits, &inference.embedding));
                let scores = match scored_now {
                    Ok(scores) => scores,
                    Err(fault) => {
                        tracing::warn!(%digest, %fault, "a picture can't be scored");
                        continue;
                    }
                };
                scored.answers.insert(
                    digest,
                    Answer {
                        embedding: inference.embedding.clone(),
                        prediction: Prediction {
                            top: u32::from(scores.top1),
                            runner_up: u32::from(scores.top2),
                            confidence: scores.confidence,
                            margin: scores.margin,
                            novelty: scores.u_novel,
                            rarity: scores.rarity,
                        },
                    },
                );
            }
        }
        Ok(())
    }

    fn picture(&self, digest: &Digest, catalog: &Catalog) -> Result<Picture, Fault> {
        let (codec, width, height) = if let Some(sample) = self.sample_of(digest) {
            (
                sample.codec,
                u32::from(sample.width),
                u32::from(sample.height),
            )
        } else if let Some(import) = catalog.find_import(digest)? {
            (import.codec, import.width, import.height)
        } else {
            return Err(Fault::NotFound(format!("there is no picture {digest}")));
        };
        Ok(Picture::decode(
            codec,
            width,
            height,
            &blob(&self.store, digest)?,
        )?)
    }
}

/// A track holds within one start of the agent: afterwards its source may be another.
fn track_of(sample: &SampleMeta) -> (DeviceId, u32, u64) {
    (sample.device.clone(), sample.epoch, sample.track)
}

fn track_name(sample: &SampleMeta) -> String {
    format!("{}/{}/{}", sample.device, sample.epoch, sample.track)
}

impl State {
    fn is_stale(&self, champion: Option<&ModelRecord>) -> bool {
        let Some(ranked) = &self.ranked else {
            return true;
        };
        if ranked.champion.as_deref() != champion.map(|champion| champion.id.as_str()) {
            return true;
        }
        let waiting: Vec<ItemId> = self.queue.waiting().collect();
        // A tenth more to choose from may hold better items; so does a used-up ranking.
        waiting.len() > ranked.pool + ranked.pool / 10
            || !waiting.iter().any(|id| ranked.order.contains(id))
    }

    fn view(&self, id: ItemId) -> Result<QueueItem, Fault> {
        let missing = || Fault::NotFound(format!("item {id} is not in the queue"));
        let item = self.queue.item(id).ok_or_else(missing)?;
        let sample = self.samples.get(&id).ok_or_else(missing)?;
        let note = self.notes.get(&id);
        let (state, worker, class, lease_until_ms) = match &item.status {
            Status::Pending { .. } => ("pending", None, None, None),
            Status::Leased { worker, until_ms } => {
                ("leased", Some(worker.clone()), None, Some(*until_ms))
            }
            Status::Labelled { class, worker, .. } => {
                ("labelled", Some(worker.clone()), Some(class.clone()), None)
            }
            Status::Skipped { worker, .. } => ("skipped", Some(worker.clone()), None, None),
        };
        Ok(QueueItem {
            id,
            picture: format!("/v1/pictures/{}", sample.blob),
            width: u32::from(sample.width),
            height: u32::from(sample.height),
            device: sample.device.to_string(),
            frame: sample.frame,
            captured_ms: sample.captured_ms,
            lane: sample.lane.name().to_owned(),
            guess: note
                .and_then(|note| note.guess.clone())
                .map(|guess| guess.0),
            confidence: note
                .and_then(|note| note.guess.as_ref())
                .map(|guess| guess.1),
            why: note.map(|note| note.why.clone()).unwrap_or_default(),
            state: state.to_owned(),
            worker,
            class,
            lease_until_ms,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_that_ran_out_holds_nothing() {
        let leased = Status::Leased {
            worker: "ann".to_owned(),
            until_ms: 1000,
        };
        assert!(!is_free(&leased, 999));
        assert!(is_free(&leased, 1000));
        assert!(is_free(&Status::Pending { last_holder: None }, 0));
        let skipped = Status::Skipped {
            worker: "ann".to_owned(),
            reason: "dark".to_owned(),
        };
        assert!(!is_free(&skipped, u64::MAX));
    }
}
