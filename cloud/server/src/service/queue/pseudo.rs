//! Pseudo-labels: what the champion is sure of among the pictures that nobody has labelled (Lee
//! 2013; with strong augmentation of what is learnt from them, Sohn et al. 2020, 2001.07685).
//! Devices upload several times more than people label; this lets a round learn from the rest.

use std::collections::BTreeSet;

use cloud_core::queue::{ItemId, Status};

use super::super::catalog::{Catalog, QueueLabel};
use super::super::registry::Registry;
use super::super::{Fault, lock};
use super::{Labelling, track_name, track_of};
use crate::store::SampleMeta;

/// Largest conformal novelty: what looks unlike the training data may be of a class that the
/// champion does not know, however sure it is.
const MAX_NOVELTY: f32 = 0.95;

impl Labelling {
    /// Classes of unlabelled pictures to which the champion gives a calibrated probability of at
    /// least `above`; none without a champion or from 1 on. Pictures that people put aside, and
    /// those of a track that people labelled, stay out.
    ///
    /// # Errors
    /// If `above` is not from 0 to 1 or the store fails.
    pub fn pseudo_labels(
        &self,
        registry: &Registry,
        catalog: &Catalog,
        above: f32,
    ) -> Result<Vec<QueueLabel>, Fault> {
        if !(0.0..=1.0).contains(&above) {
            return Err(Fault::Invalid(format!(
                "pseudo_above is {above}; give a probability from 0 to 1, where 1 takes none"
            )));
        }
        self.follow()?;
        let Some(champion) = registry.classifier()?.filter(|_| above < 1.0) else {
            return Ok(Vec::new());
        };
        let mut scored = lock(&self.scored);
        let open = self.unlabelled();
        let digests = open.iter().map(|(_, sample)| sample.blob);
        self.score(&mut scored, Some(&champion), digests, catalog)?;
        let label = |(_, sample): &(ItemId, SampleMeta)| {
            let prediction = scored.answers.get(&sample.blob)?.prediction;
            let sure = prediction.confidence >= above && prediction.novelty <= MAX_NOVELTY;
            Some(QueueLabel {
                digest: sample.blob,
                class: champion
                    .classes
                    .get(prediction.top as usize)
                    .filter(|_| sure)?
                    .clone(),
                track: track_name(sample),
                at_ms: 0,
            })
        };
        Ok(open.iter().filter_map(label).collect())
    }

    /// Items that wait, of tracks in which nobody has labelled anything.
    fn unlabelled(&self) -> Vec<(ItemId, SampleMeta)> {
        let state = lock(&self.state);
        let labelled = state.queue.labels().map(|(id, _, _)| id);
        let known: BTreeSet<_> = labelled
            .filter_map(|id| state.samples.get(&id).map(track_of))
            .collect();
        let waits =
            |status: &Status| matches!(status, Status::Pending { .. } | Status::Leased { .. });
        state
            .queue
            .items()
            .filter(|(_, item)| waits(&item.status))
            .filter_map(|(id, _)| Some((id, state.samples.get(&id)?.clone())))
            .filter(|(_, sample)| !known.contains(&track_of(sample)))
            .collect()
    }
}
