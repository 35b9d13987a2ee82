//! A simulated person: takes items from the queue through the same API as people do, knows the
//! truth of the source, and errs at a stated rate.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use flywheel_agent::source::Source;
use flywheel_shared::ids::Digest;
use indicatif::ProgressBar;

use crate::api::types::{LabelRequest, NextRequest, QueueItem, SkipRequest};
use crate::client::{Client, ClientError};

/// Items leased at a time.
const LEASE: u32 = 25;

/// The simulated labeller.
pub struct Labeller {
    /// The source of each device, for its truth.
    pub sources: BTreeMap<String, Box<dyn Source>>,
    /// Every class that the source has.
    pub classes: Vec<String>,
    /// Share of wrong answers.
    pub error_rate: f64,
    /// Seed of the errors.
    pub seed: u64,
    /// What was answered, by device and frame.
    pub answers: BTreeMap<(String, u64), String>,
}

impl Labeller {
    /// Answers at most `limit` items; returns how many were labelled.
    ///
    /// # Errors
    /// If the server refuses for another reason than a lease that ended meanwhile.
    pub fn work(&mut self, client: &Client, limit: u32, bar: &ProgressBar) -> Result<u32> {
        let mut labelled = 0;
        while labelled < limit {
            let items: Vec<QueueItem> = client.post(
                "/v1/queue/next",
                &NextRequest {
                    worker: "simulated".to_owned(),
                    count: Some(LEASE.min(limit - labelled)),
                    lease_s: None,
                },
            )?;
            if items.is_empty() {
                break;
            }
            for item in items {
                labelled += u32::from(self.answer(client, &item)?);
                bar.set_position(u64::from(labelled));
            }
        }
        Ok(labelled)
    }

    /// Digest over all answers, in order of device and frame.
    pub fn digest(&self) -> Digest {
        let mut text = String::new();
        for ((device, frame), class) in &self.answers {
            text.push_str(&format!("{device} {frame} {class}\n"));
        }
        Digest::of(text.as_bytes())
    }

    fn answer(&mut self, client: &Client, item: &QueueItem) -> Result<bool> {
        let source = self
            .sources
            .get(&item.device)
            .with_context(|| format!("the demo has no device {}", item.device))?;
        let Some(truth) = source.truth(item.frame) else {
            let _: QueueItem = client.post(
                "/v1/queue/skip",
                &SkipRequest {
                    item: item.id,
                    worker: "simulated".to_owned(),
                    reason: "the source has no truth for this frame".to_owned(),
                },
            )?;
            return Ok(false);
        };
        let class = self.err(&truth, &item.device, item.frame);
        let request = LabelRequest {
            item: item.id,
            worker: "simulated".to_owned(),
            class: class.clone(),
        };
        match client.post::<_, QueueItem>("/v1/queue/label", &request) {
            Ok(_) => {}
            // The server was killed after it stored the label and before it answered.
            Err(ClientError::Refused {
                status: 409,
                message,
            }) if message.contains("labelled") => {}
            Err(error) => return Err(error.into()),
        }
        self.answers
            .insert((item.device.clone(), item.frame), class);
        Ok(true)
    }

    /// The truth, or another class at the error rate: a function of the picture, so that the same
    /// picture is always answered the same.
    fn err(&self, truth: &str, device: &str, frame: u64) -> String {
        let draw = Digest::of_parts(&[
            b"labeller",
            &self.seed.to_le_bytes(),
            device.as_bytes(),
            &frame.to_le_bytes(),
        ])
        .0;
        let [a, b, c, d, e, f, g, h, ..] = draw;
        let unit = f64::from(u32::from_le_bytes([a, b, c, d])) / f64::from(u32::MAX);
        let others: Vec<&String> = self
            .classes
            .iter()
            .filter(|class| *class != truth)
            .collect();
        if unit >= self.error_rate || others.is_empty() {
            return truth.to_owned();
        }
        others[u32::from_le_bytes([e, f, g, h]) as usize % others.len()].clone()
    }
}
