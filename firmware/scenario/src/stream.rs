//! A synthetic stream of model answers: things that stay in view for a while, day and night, a
//! rare class and one that the model does not know. Pure `f32` additions and multiplications on a
//! linear congruential generator, so it is the same to the bit on every machine.

/// Classes that the model knows; the last is rare.
pub const CLASSES: usize = 8;
/// Values of an embedding.
pub const DIM: usize = 16;
/// The class that the model does not know.
pub const LATE: usize = CLASSES;
/// The model's logits are this many times too large: the temperature that calibrates them.
pub const GAIN: f32 = 2.0;
/// Noise of neighbouring embedding values: xᵢ = eᵢ + CORRELATION·xᵢ₋₁ with e of variance 1.
const CORRELATION: f32 = 0.5;

/// Frames for which one thing stays in view.
const TRACK: u32 = 8;

/// Knuth's MMIX generator; the upper half of the state is the output.
#[derive(Clone, Debug)]
struct Lcg(u64);

impl Lcg {
    fn draw(&mut self) -> u32 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 32) as u32
    }

    /// Uniform in [0, 1), 24 bits.
    fn unit(&mut self) -> f32 {
        (self.draw() >> 8) as f32 / (1u32 << 24) as f32
    }

    /// Nearly Gaussian, mean 0 and variance 1: three uniforms on ±1.
    fn noise(&mut self) -> f32 {
        (0..3).map(|_| 2.0 * self.unit() - 1.0).sum()
    }
}

/// Where each class lies in the embedding space, and the model that tells them apart.
#[derive(Clone, Debug)]
pub struct World {
    means: [[f32; DIM]; CLASSES + 1],
}

impl Default for World {
    fn default() -> Self {
        Self::new()
    }
}

impl World {
    /// The world of every scenario.
    pub fn new() -> Self {
        let mut lcg = Lcg(0x5EED);
        Self {
            means: core::array::from_fn(|_| core::array::from_fn(|_| 3.0 * lcg.unit() - 1.5)),
        }
    }

    /// Centre of a class, `0..=LATE`.
    pub fn mean(&self, class: usize) -> &[f32; DIM] {
        &self.means[class]
    }

    /// The model: logit k = GAIN·(⟨x, μₖ⟩ − |μₖ|²/2), the linear discriminant for white noise.
    pub fn logits(&self, embedding: &[f32; DIM]) -> [f32; CLASSES] {
        core::array::from_fn(|k| {
            let terms = embedding.iter().zip(&self.means[k]);
            GAIN * terms.map(|(x, mean)| (x - 0.5 * mean) * mean).sum::<f32>()
        })
    }

    /// The embedding of a golden frame: a pixel of 128 is 0, and 32 levels are 1.
    pub fn embedding_of(pixels: &[u8; DIM]) -> [f32; DIM] {
        pixels.map(|pixel| (f32::from(pixel) - 128.0) / 32.0)
    }
}

/// What the camera looks at.
#[derive(Clone, Copy, Debug)]
pub struct Scene {
    /// Size of the noise; 1 by day.
    pub spread: f32,
    /// Whether things of the unknown class turn up.
    pub late: bool,
}

impl Scene {
    /// Daylight, known things only: what the model was calibrated on.
    pub const DAY: Self = Self {
        spread: 1.0,
        late: false,
    };
    /// The same at night.
    pub const NIGHT: Self = Self {
        spread: 1.8,
        late: false,
    };
    /// Daylight with the unknown class.
    pub const LATE: Self = Self {
        spread: 1.0,
        late: true,
    };
}

/// One answer of the model.
#[derive(Clone, Copy, Debug)]
pub struct Frame {
    /// What it is, `0..=LATE`.
    pub class: usize,
    /// What the model makes of it.
    pub logits: [f32; CLASSES],
    /// Its embedding.
    pub embedding: [f32; DIM],
}

/// The stream.
#[derive(Clone, Debug)]
pub struct Stream {
    world: World,
    lcg: Lcg,
    class: usize,
    look: [f32; DIM],
    left: u32,
}

impl Stream {
    /// A stream of its own for each seed.
    pub fn new(seed: u64) -> Self {
        Self {
            world: World::new(),
            lcg: Lcg(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15)),
            class: 0,
            look: [0.0; DIM],
            left: 0,
        }
    }

    /// The next frame: the thing in view, seen a little differently, or a new thing.
    pub fn frame(&mut self, scene: Scene) -> Frame {
        if self.left == 0 {
            self.left = TRACK;
            self.class = self.pick(scene);
            self.look = self.noise();
        }
        self.left -= 1;
        let fresh = self.noise();
        // 0.8² + 0.6² = 1, so one frame alone is as spread as the calibration expects.
        let noise: [f32; DIM] = core::array::from_fn(|i| 0.8 * self.look[i] + 0.6 * fresh[i]);
        self.seen(&noise, scene.spread)
    }

    /// A frame of a thing of its own, as in a data set.
    pub fn fresh(&mut self, scene: Scene) -> Frame {
        self.left = 0;
        self.class = self.pick(scene);
        let noise = self.noise();
        self.seen(&noise, scene.spread)
    }

    /// 32 random bits.
    pub fn draw(&mut self) -> u32 {
        self.lcg.draw()
    }

    fn pick(&mut self, scene: Scene) -> usize {
        let lot = (self.lcg.draw() >> 8) % 100;
        match lot {
            0 => CLASSES - 1,
            1..=5 if scene.late => LATE,
            _ => lot as usize % (CLASSES - 1),
        }
    }

    fn noise(&mut self) -> [f32; DIM] {
        let mut before = 0.0;
        core::array::from_fn(|_| {
            before = self.lcg.noise() + CORRELATION * before;
            before
        })
    }

    fn seen(&self, noise: &[f32; DIM], spread: f32) -> Frame {
        let mean = self.world.mean(self.class);
        let embedding = core::array::from_fn(|i| mean[i] + spread * noise[i]);
        Frame {
            class: self.class,
            logits: self.world.logits(&embedding),
            embedding,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_model_knows_its_classes_by_day_and_less_at_night() {
        let right = |scene| {
            let mut stream = Stream::new(3);
            let hits = (0..1000).filter(|_| {
                let frame = stream.fresh(scene);
                let best = frame.logits.iter().copied().fold(f32::MIN, f32::max);
                frame.logits[frame.class] == best
            });
            hits.count()
        };
        let (day, night) = (right(Scene::DAY), right(Scene::NIGHT));
        // Chance is 1 in 8; the model ignores the noise's correlation, so it is not perfect.
        assert!(day > 850, "{day}");
        assert!(night < day - 50, "{night} {day}");
    }

    #[test]
    fn the_unknown_class_comes_only_when_asked_for_and_the_rare_one_rarely() {
        let mut stream = Stream::new(4);
        let mut seen = [0; CLASSES + 1];
        for _ in 0..4000 {
            seen[stream.frame(Scene::DAY).class] += 1;
        }
        assert_eq!(seen[LATE], 0);
        assert!((1..200).contains(&seen[CLASSES - 1]), "{seen:?}");
        assert!((0..4000).any(|_| stream.frame(Scene::LATE).class == LATE));
    }
}
