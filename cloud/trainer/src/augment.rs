//! Distortion of training images: what a camera may do to a sight between one pass and the next.
//!
//! Works on pixels as a camera gives them, before preprocessing, so that the network sees only
//! inputs that the device's preprocessing can produce. Every image of every step has a seed of its
//! own; the outcome does not depend on which thread draws it.

use flywheel_models::NetConfig;
use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// How strongly each kind of distortion acts: 0 is off, 1 the usual amount, 2 the most.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Augment {
    /// Shift (up to 10 % of a side), rotation (12°), scale (18 %) and shear.
    pub geometry: f32,
    /// Gamma, contrast, brightness, colour cast, darkness, fog.
    pub light: f32,
    /// Blur and sensor noise.
    pub optics: f32,
    /// Opaque bars and patches.
    pub occlusion: f32,
    /// Mirror half of the images. Off by default: signs and digits mean another thing mirrored.
    pub mirror: bool,
}

impl Default for Augment {
    fn default() -> Self {
        Self {
            geometry: 1.0,
            light: 1.0,
            optics: 1.0,
            occlusion: 1.0,
            mirror: false,
        }
    }
}

impl Augment {
    /// No distortion at all.
    pub const NONE: Self = Self {
        geometry: 0.0,
        light: 0.0,
        optics: 0.0,
        occlusion: 0.0,
        mirror: false,
    };

    /// The first field that is not from 0 to 2, with its value.
    pub(crate) fn validate(&self) -> Result<(), (&'static str, f32)> {
        for (field, value) in [
            ("augment.geometry", self.geometry),
            ("augment.light", self.light),
            ("augment.optics", self.optics),
            ("augment.occlusion", self.occlusion),
        ] {
            if !(0.0..=2.0).contains(&value) {
                return Err((field, value));
            }
        }
        Ok(())
    }
}

/// The seed of image `index` of step `step`: SplitMix64's mixing of all three.
pub(crate) fn seed_of(seed: u64, step: usize, index: usize) -> u64 {
    let mut z = seed
        ^ (step as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15)
        ^ (index as u64 + 1).wrapping_mul(0xd1b5_4a32_d192_ed03);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Scratch memory for images of one size.
pub(crate) struct Canvas {
    width: usize,
    height: usize,
    channels: usize,
    /// Values 0 to 255, HWC.
    image: Vec<f32>,
    spare: Vec<f32>,
    pixels: Vec<u8>,
}

impl Canvas {
    pub fn new(net: &NetConfig) -> Self {
        Self {
            width: net.width,
            height: net.height,
            channels: net.channels,
            image: vec![0.0; net.input_len()],
            spare: vec![0.0; net.input_len()],
            pixels: vec![0; net.input_len()],
        }
    }

    /// The distorted version of `source` (u8, HWC, of the canvas's size) that belongs to `seed`.
    pub fn draw(&mut self, source: &[u8], augment: &Augment, seed: u64) -> &[u8] {
        for (value, pixel) in self.image.iter_mut().zip(source) {
            *value = f32::from(*pixel);
        }
        let mut dice = Dice(ChaCha8Rng::seed_from_u64(seed));
        if augment.mirror && dice.chance(0.5) {
            self.mirror();
        }
        // Some images stay undistorted, so that clean inputs do not become the strange ones.
        if !dice.chance(0.1) {
            if augment.geometry > 0.0 {
                self.warp(augment.geometry, &mut dice);
            }
            if dice.chance(0.3 * augment.occlusion) {
                self.occlude(&mut dice);
            }
            let dark = augment.light > 0.0 && self.relight(augment.light, &mut dice);
            if dice.chance(0.4 * augment.optics) {
                self.blur(augment.optics, &mut dice);
            }
            if augment.optics > 0.0 && dice.chance(0.6) {
                let most = if dark { 18.0 } else { 10.0 };
                self.noise(augment.optics * most * dice.unit(), &mut dice);
            }
        }
        for (pixel, value) in self.pixels.iter_mut().zip(&self.image) {
            *pixel = (value + 0.5).clamp(0.0, 255.0) as u8;
        }
        &self.pixels
    }

    fn mirror(&mut self) {
        let row = self.width * self.channels;
        for line in self.image.chunks_exact_mut(row) {
            for x in 0..self.width / 2 {
                for c in 0..self.channels {
                    line.swap(
                        x * self.channels + c,
                        (self.width - 1 - x) * self.channels + c,
                    );
                }
            }
        }
    }

    /// An affine map around the centre, bilinear, edges repeated.
    fn warp(&mut self, amount: f32, dice: &mut Dice) {
        let angle = amount * 0.21 * dice.signed();
        let scale = (amount * 0.18 * dice.signed()).exp();
        let stretch = (amount * 0.08 * dice.signed()).exp();
        let shear = amount * 0.08 * dice.signed();
        let (w, h) = (self.width as f32, self.height as f32);
        let shift = [
            amount * 0.1 * w * dice.signed(),
            amount * 0.1 * h * dice.signed(),
        ];
        let (sin, cos) = angle.sin_cos();
        // Rows of the map from target to source.
        let a = [scale * stretch * cos, scale * (shear - sin)];
        let b = [scale * sin, scale / stretch * cos];
        let (cx, cy) = ((w - 1.0) / 2.0, (h - 1.0) / 2.0);
        let channels = self.channels;
        for y in 0..self.height {
            for x in 0..self.width {
                let (dx, dy) = (x as f32 - cx, y as f32 - cy);
                let sx = (a[0] * dx + a[1] * dy + cx + shift[0]).clamp(0.0, w - 1.0);
                let sy = (b[0] * dx + b[1] * dy + cy + shift[1]).clamp(0.0, h - 1.0);
                let (x0, y0) = (sx as usize, sy as usize);
                let x1 = (x0 + 1).min(self.width - 1);
                let y1 = (y0 + 1).min(self.height - 1);
                let (fx, fy) = (sx - x0 as f32, sy - y0 as f32);
                let at =
                    |x: usize, y: usize, c: usize| self.image[(y * self.width + x) * channels + c];
                for c in 0..channels {
                    let top = at(x0, y0, c) + fx * (at(x1, y0, c) - at(x0, y0, c));
                    let low = at(x0, y1, c) + fx * (at(x1, y1, c) - at(x0, y1, c));
                    self.spare[(y * self.width + x) * channels + c] = top + fy * (low - top);
                }
            }
        }
        std::mem::swap(&mut self.image, &mut self.spare);
    }

    /// A bar across the image or a patch, in one colour.
    fn occlude(&mut self, dice: &mut Dice) {
        let colour = [0, 1, 2].map(|_| 255.0 * dice.unit());
        let (w, h) = (self.width as f32, self.height as f32);
        let (x, y) = (w * dice.unit(), h * dice.unit());
        let bar = dice.chance(0.4);
        let (half_w, half_h) = match bar {
            true => (w * (0.03 + 0.05 * dice.unit()), 2.0 * h),
            false => (
                w * (0.06 + 0.14 * dice.unit()),
                h * (0.06 + 0.14 * dice.unit()),
            ),
        };
        let (sin, cos) = (0.6 * dice.signed()).sin_cos();
        for py in 0..self.height {
            for px in 0..self.width {
                let (dx, dy) = (px as f32 - x, py as f32 - y);
                let (u, v) = (cos * dx + sin * dy, cos * dy - sin * dx);
                if u.abs() <= half_w && v.abs() <= half_h {
                    let start = (py * self.width + px) * self.channels;
                    self.image[start..start + self.channels]
                        .copy_from_slice(&colour[..self.channels]);
                }
            }
        }
    }

    /// Light, weather and the camera's response; tells whether the scene became dark.
    fn relight(&mut self, amount: f32, dice: &mut Dice) -> bool {
        let gamma = (amount * 0.45 * dice.signed()).exp();
        let contrast = (amount * 0.35 * dice.signed()).exp();
        let lift = amount * 28.0 * dice.signed();
        let cast = [0, 1, 2].map(|_| (amount * 0.14 * dice.signed()).exp());
        let dark = dice.chance(0.3 * amount);
        let gain = if dark { 0.15 + 0.5 * dice.unit() } else { 1.0 };
        let fog = match dice.chance(0.25 * amount) {
            true => 0.2 + 0.55 * dice.unit(),
            false => 0.0,
        };
        let air = 255.0 * gain * (0.5 + 0.45 * dice.unit());
        let fade = match dice.chance(0.2 * amount) {
            true => 0.8 * dice.unit(),
            false => 0.0,
        };
        let mean = self.image.iter().sum::<f32>() / self.image.len() as f32;
        for pixel in self.image.chunks_exact_mut(self.channels) {
            let gray = pixel.iter().sum::<f32>() / self.channels as f32;
            for (value, cast) in pixel.iter_mut().zip(cast) {
                let faded = *value + fade * (gray - *value);
                let stretched = (mean + contrast * (faded - mean) + lift).clamp(0.0, 255.0);
                let seen = gain * cast * 255.0 * (stretched / 255.0).powf(gamma);
                *value = seen + fog * (air - seen);
            }
        }
        dark
    }

    /// A Gaussian, or a straight motion.
    fn blur(&mut self, amount: f32, dice: &mut Dice) {
        if dice.chance(0.35) {
            let angle = std::f32::consts::PI * dice.unit();
            let reach = amount * (0.5 + 2.0 * dice.unit());
            let (dy, dx) = angle.sin_cos();
            let taps: Vec<(isize, isize, f32)> = (-3..=3)
                .map(|i| {
                    let t = reach * i as f32 / 3.0;
                    (
                        (dx * t).round() as isize,
                        (dy * t).round() as isize,
                        1.0 / 7.0,
                    )
                })
                .collect();
            self.convolve(&taps);
            return;
        }
        let sigma = 0.4 + amount * 0.9 * dice.unit();
        let bell: Vec<f32> = (-3..=3)
            .map(|i| (-0.5 * (i as f32 / sigma).powi(2)).exp())
            .collect();
        let sum: f32 = bell.iter().sum();
        let tap = |i: usize| (i as isize - 3, bell[i] / sum);
        let across: Vec<_> = (0..7).map(tap).map(|(i, w)| (i, 0, w)).collect();
        let down: Vec<_> = (0..7).map(tap).map(|(i, w)| (0, i, w)).collect();
        self.convolve(&across);
        self.convolve(&down);
    }

    /// A sum of shifted images, edges repeated.
    fn convolve(&mut self, taps: &[(isize, isize, f32)]) {
        self.spare.fill(0.0);
        let (w, h, row) = (self.width, self.height, self.width * self.channels);
        for &(dx, dy, weight) in taps {
            for y in 0..h {
                let from = &self.image[y.saturating_add_signed(dy).min(h - 1) * row..][..row];
                let to = &mut self.spare[y * row..][..row];
                for (x, to) in to.chunks_exact_mut(self.channels).enumerate() {
                    let x = x.saturating_add_signed(dx).min(w - 1) * self.channels;
                    for (to, from) in to.iter_mut().zip(&from[x..]) {
                        *to += weight * from;
                    }
                }
            }
        }
        std::mem::swap(&mut self.image, &mut self.spare);
    }

    /// Near-Gaussian noise (the sum of four uniform values), the same for no two channels.
    fn noise(&mut self, sigma: f32, dice: &mut Dice) {
        // Four uniform 16-bit values have a standard deviation of √(4/12) · 2¹⁶.
        let scale = sigma / ((4.0f32 / 12.0).sqrt() * 65_536.0);
        for value in &mut self.image {
            let bits = dice.0.next_u64();
            let sum = [0, 16, 32, 48].map(|shift| (bits >> shift & 0xffff) as f32);
            *value += scale * (sum.iter().sum::<f32>() - 2.0 * 65_535.0);
        }
    }
}

/// Draws in the few forms that distortions need.
struct Dice(ChaCha8Rng);

impl Dice {
    /// Uniform in [0, 1).
    fn unit(&mut self) -> f32 {
        self.0.random()
    }

    /// Uniform in [−1, 1).
    fn signed(&mut self) -> f32 {
        2.0 * self.unit() - 1.0
    }

    fn chance(&mut self, probability: f32) -> bool {
        self.unit() < probability
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NET: NetConfig = NetConfig {
        channels: 3,
        width: 32,
        height: 24,
        classes: 2,
        embedding: 64,
    };

    fn source() -> Vec<u8> {
        (0..NET.input_len()).map(|i| (i * 37 % 256) as u8).collect()
    }

    #[test]
    fn without_augmentation_pixels_pass_through() {
        let source = source();
        let mut canvas = Canvas::new(&NET);
        for seed in 0..20 {
            assert_eq!(canvas.draw(&source, &Augment::NONE, seed), source);
        }
    }

    #[test]
    fn a_seed_gives_one_image_whatever_was_drawn_before() {
        let source = source();
        let (mut one, mut other) = (Canvas::new(&NET), Canvas::new(&NET));
        let expected = one.draw(&source, &Augment::default(), 5).to_vec();
        for seed in 0..10 {
            other.draw(&source, &Augment::default(), seed);
        }
        assert_eq!(other.draw(&source, &Augment::default(), 5), expected);
        assert_ne!(other.draw(&source, &Augment::default(), 6), expected);
    }

    #[test]
    fn mirroring_twice_is_the_identity() {
        let mut canvas = Canvas::new(&NET);
        canvas.image = source().iter().map(|p| f32::from(*p)).collect();
        let before = canvas.image.clone();
        canvas.mirror();
        assert_ne!(canvas.image, before);
        canvas.mirror();
        assert_eq!(canvas.image, before);
    }

    #[test]
    fn blur_and_noise_keep_the_mean() {
        let mut canvas = Canvas::new(&NET);
        let mut dice = Dice(ChaCha8Rng::seed_from_u64(1));
        canvas.image.fill(100.0);
        canvas.blur(1.0, &mut dice);
        assert!(canvas.image.iter().all(|v| (v - 100.0).abs() < 0.01));
        canvas.noise(10.0, &mut dice);
        let n = canvas.image.len() as f32;
        let mean = canvas.image.iter().sum::<f32>() / n;
        let var = canvas.image.iter().map(|v| (v - mean).powi(2)).sum::<f32>() / n;
        assert!((mean - 100.0).abs() < 1.0);
        assert!((var.sqrt() - 10.0).abs() < 1.0);
    }

    #[test]
    fn seeds_of_neighbours_differ() {
        let mut seeds: Vec<u64> = (0..100)
            .flat_map(|step| (0..64).map(move |index| seed_of(7, step, index)))
            .collect();
        seeds.sort_unstable();
        seeds.dedup();
        assert_eq!(seeds.len(), 6400);
    }
}
