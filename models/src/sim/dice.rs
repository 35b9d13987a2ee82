//! The simulator's randomness: one ChaCha key per seed, one ChaCha *stream* per encounter or frame,
//! so that any frame can be drawn without drawing those before it.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// The generator of one seed, from which the dice of every encounter and frame are split.
#[derive(Clone)]
pub(super) struct DiceBox(ChaCha8Rng);

impl DiceBox {
    pub(super) fn new(seed: u64) -> Self {
        Self(ChaCha8Rng::seed_from_u64(seed))
    }

    /// The dice of one encounter (even streams).
    pub(super) fn encounter(&self, encounter: u64) -> Dice {
        self.stream(encounter.wrapping_mul(2))
    }

    /// The dice of one frame (odd streams).
    pub(super) fn frame(&self, frame: u64) -> Dice {
        self.stream(frame.wrapping_mul(2).wrapping_add(1))
    }

    fn stream(&self, stream: u64) -> Dice {
        let mut rng = self.0.clone();
        rng.set_stream(stream);
        Dice(rng)
    }
}

/// Seeded draws in the few shapes that the simulator needs.
pub(super) struct Dice(ChaCha8Rng);

impl Dice {
    /// Uniform in [0, 1).
    pub(super) fn unit(&mut self) -> f32 {
        (self.0.next_u32() >> 8) as f32 * (1.0 / 16_777_216.0)
    }

    /// Uniform in [lo, hi).
    pub(super) fn within(&mut self, lo: f32, hi: f32) -> f32 {
        lo + (hi - lo) * self.unit()
    }

    pub(super) fn chance(&mut self, p: f32) -> bool {
        self.unit() < p
    }

    /// Uniform in 0..n; 0 when n is 0.
    pub(super) fn below(&mut self, n: usize) -> usize {
        ((u64::from(self.0.next_u32()) * n as u64) >> 32) as usize
    }

    /// Standard normal by Box and Muller.
    pub(super) fn normal(&mut self) -> f32 {
        let radius = (-2.0 * (1.0 - self.unit()).ln()).sqrt();
        radius * (std::f32::consts::TAU * self.unit()).cos()
    }

    /// exp(N(0, sigma)), kept within two sigma: a multiplicative spread without freak values.
    pub(super) fn spread(&mut self, sigma: f32) -> f32 {
        (self.normal().clamp(-2.0, 2.0) * sigma).exp()
    }

    /// Nearly normal (four bytes summed, Irwin and Hall), unit variance: cheap enough for every pixel.
    pub(super) fn grain(&mut self) -> f32 {
        let [a, b, c, d] = self.0.next_u32().to_le_bytes().map(i32::from);
        (a + b + c + d - 510) as f32 * (1.0 / 147.8)
    }
}
