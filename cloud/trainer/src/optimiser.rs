//! AdamW over the flat weight vector (Loshchilov and Hutter 2019, 1711.05101).
//!
//! Written here rather than taken from burn because shards are averaged in the flat vector anyway,
//! and because the order of every addition is then fixed.

use flywheel_models::{Role, Slot, Weights};

use crate::TrainConfig;

const BETA_1: f32 = 0.9;
const BETA_2: f32 = 0.99;
const EPSILON: f32 = 1e-8;

/// Moments of every value, and the running average of the weights.
pub struct Optimiser {
    first: Vec<f32>,
    second: Vec<f32>,
    average: Vec<f32>,
    step: usize,
    config: TrainConfig,
}

impl Optimiser {
    /// Moments at zero, the average at the initial weights.
    pub fn new(config: &TrainConfig, weights: &Weights) -> Self {
        let len = weights.values().len();
        Self {
            first: vec![0.0; len],
            second: vec![0.0; len],
            average: weights.values().to_vec(),
            step: 0,
            config: config.clone(),
        }
    }

    /// One step along `harvest` (see [`Weights::harvest`]): gradients where trained, new values of
    /// running statistics elsewhere.
    pub fn step(&mut self, weights: &mut Weights, harvest: &[f32]) {
        let lr = learning_rate(&self.config, self.step);
        self.step += 1;
        let slots = weights.slots().to_vec();
        let fit = self.config.fit;
        let trains = |slot: &Slot| slot.role.trained() && fit.changes(slot);
        let trained = slots.iter().filter(|slot| trains(slot));
        let square: f64 = trained
            .flat_map(|slot| &harvest[slot.range.clone()])
            .map(|g| f64::from(*g) * f64::from(*g))
            .sum();
        let shrink = (f64::from(self.config.clip) / (square.sqrt() + 1e-12)).min(1.0) as f32;
        let correct_1 = 1.0 - BETA_1.powi(self.step as i32);
        let correct_2 = 1.0 - BETA_2.powi(self.step as i32);
        let values = weights.values_mut();
        for slot in &slots {
            if !trains(slot) {
                values[slot.range.clone()].copy_from_slice(&harvest[slot.range.clone()]);
                continue;
            }
            let decay = match slot.role {
                Role::Matrix => lr * self.config.weight_decay,
                _ => 0.0,
            };
            for i in slot.range.clone() {
                let gradient = harvest[i] * shrink;
                self.first[i] += (1.0 - BETA_1) * (gradient - self.first[i]);
                self.second[i] += (1.0 - BETA_2) * (gradient * gradient - self.second[i]);
                let scale = (self.second[i] / correct_2).sqrt() + EPSILON;
                values[i] -= decay * values[i] + lr * (self.first[i] / correct_1) / scale;
            }
        }
        // A short memory at first, so that the average does not cling to the initial weights.
        let warm = (1.0 + self.step as f32) / (10.0 + self.step as f32);
        let keep = self.config.ema.min(warm);
        for (average, value) in self.average.iter_mut().zip(values.iter()) {
            *average = keep * *average + (1.0 - keep) * value;
        }
    }

    /// Puts the running average into `weights`.
    pub fn finish(self, weights: &mut Weights) {
        // What did not change keeps its bits, which an average of itself need not.
        for slot in weights.slots().to_vec() {
            if self.config.fit.changes(&slot) {
                weights.values_mut()[slot.range.clone()].copy_from_slice(&self.average[slot.range]);
            }
        }
    }
}

/// Linear warm-up over 1/20 of the steps, then half a cosine down to 1 % of the peak.
fn learning_rate(config: &TrainConfig, step: usize) -> f32 {
    let warm = (config.steps / 20).max(1);
    if step < warm {
        return config.lr * (step + 1) as f32 / warm as f32;
    }
    let rest = (config.steps - warm).max(1) as f32;
    let done = ((step - warm) as f32 / rest).min(1.0);
    config.lr * (0.01 + 0.99 * 0.5 * (1.0 + (std::f32::consts::PI * done).cos()))
}
