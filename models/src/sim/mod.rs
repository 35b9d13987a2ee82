//! `sim:roads`, the scene simulator: what a camera's sign detector would cut out while driving,
//! under light and weather, with the truth attached. Frame `i` is a function of the seed and `i`
//! alone, so that an agent killed at a frame resumes there and a held-out set is only another seed.

mod camera;
mod dice;
mod glyphs;
mod look;
mod pen;
mod scenery;
mod signs;

use camera::{Camera, View};
use dice::{Dice, DiceBox};
use look::Look;
use scenery::REACH;
use signs::{Atlas, COMMON, STYLES, Texture};
pub use signs::{CLASSES, LATE, RARE};

/// Consecutive frames that show one sign: encounter `e` is frames `5 e .. 5 e + 5`.
pub const FRAMES_PER_ENCOUNTER: u64 = 5;

/// The light outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Lighting {
    /// Full daylight, sometimes against the sun or in shadow; 55 % of encounters.
    Day,
    /// Dusk or dawn, 15 %.
    Dusk,
    /// Night: the sign stands in the headlights, or just outside; 30 %.
    Night,
}

/// The weather.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Weather {
    /// Dry and clear, 55 % of encounters.
    Clear,
    /// Rain streaks, drops on the lens, 15 %.
    Rain,
    /// Fog that swallows contrast, 20 %.
    Fog,
    /// Snowflakes, sometimes snow on the sign, 10 %.
    Snow,
}

impl Lighting {
    /// The name used in slices and reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Day => "day",
            Self::Dusk => "dusk",
            Self::Night => "night",
        }
    }
}

impl Weather {
    /// The name used in slices and reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Clear => "clear",
            Self::Rain => "rain",
            Self::Fog => "fog",
            Self::Snow => "snow",
        }
    }
}

/// Which conditions a stream holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Conditions {
    /// All lightings and weathers at their shares.
    All,
    /// Clear daylight only.
    ClearDay,
}

/// How often each class passes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mix {
    /// As on a road: rare classes at their share, the late class only from its frame on.
    Stream,
    /// Every class equally often, the late one included: in each run of `CLASSES.len()` encounters
    /// (from a multiple of it) every class stands exactly once.
    Balanced,
}

/// What a stream is made of.
#[derive(Clone, Debug, PartialEq)]
pub struct RoadsConfig {
    /// Streams of different seeds share nothing but the sign designs.
    pub seed: u64,
    /// Width and height of a frame in pixels, 16 to 256.
    pub size: u32,
    /// Share of encounters of *each* rare class.
    pub rare_share: f32,
    /// Share of encounters of the late class once it has appeared.
    pub late_share: f32,
    /// First frame at which the late class may appear.
    pub late_from: u64,
    /// Which lightings and weathers.
    pub conditions: Conditions,
    /// Class frequencies.
    pub mix: Mix,
}

impl Default for RoadsConfig {
    fn default() -> Self {
        Self {
            seed: 7,
            size: 32,
            rare_share: 0.008,
            late_share: 0.015,
            late_from: 5_000,
            conditions: Conditions::All,
            mix: Mix::Stream,
        }
    }
}

/// The truth about one frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scene {
    /// Which frame.
    pub frame: u64,
    /// Which encounter: frames of one encounter show the same sign and never belong in two splits.
    pub encounter: u64,
    /// Index into [`CLASSES`].
    pub class: usize,
    /// The light.
    pub lighting: Lighting,
    /// The weather.
    pub weather: Weather,
}

impl Scene {
    /// The class name.
    pub fn name(&self) -> &'static str {
        CLASSES[self.class]
    }
}

/// Why a simulator could not be made or could not draw.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum RoadsError {
    /// The frame size is out of range.
    #[error("sim:roads: size={0} is not between 16 and 256 pixels")]
    Size(u32),
    /// A share is out of range.
    #[error("sim:roads: {name}={value} is not a share between 0 and 1")]
    Share {
        /// Which parameter.
        name: &'static str,
        /// What it was.
        value: f32,
    },
    /// The shares leave nothing for the common classes.
    #[error(
        "sim:roads: rare={rare} for each of 3 classes and late={late} leave nothing for the common classes; lower them"
    )]
    Crowded {
        /// Share of each rare class.
        rare: f32,
        /// Share of the late class.
        late: f32,
    },
    /// The caller's buffer does not hold a frame.
    #[error("sim:roads: a frame takes {needed} bytes (size × size × 3), the buffer holds {got}")]
    Buffer {
        /// Bytes of one frame.
        needed: usize,
        /// Bytes of the buffer.
        got: usize,
    },
}

/// The simulator. Drawing reuses what frames of one encounter share, so frames in order are the
/// cheapest; the pixels do not depend on the order.
pub struct Roads {
    config: RoadsConfig,
    dice: DiceBox,
    camera: Camera,
    /// Rasterised at the first drawn frame: a labeller that only asks for truth never pays for it.
    atlas: Option<Atlas>,
    current: Option<Encounter>,
}

/// What the frames of one encounter share.
struct Encounter {
    number: u64,
    look: Look,
    sign: Texture,
    background: Texture,
    occluder: Option<Texture>,
    plate: bool,
}

impl Roads {
    /// Checks the configuration.
    ///
    /// # Errors
    /// A size or share out of range, or shares that leave nothing for the common classes.
    pub fn new(config: RoadsConfig) -> Result<Self, RoadsError> {
        if !(16..=256).contains(&config.size) {
            return Err(RoadsError::Size(config.size));
        }
        for (name, value) in [("rare", config.rare_share), ("late", config.late_share)] {
            if !(0.0..=1.0).contains(&value) {
                return Err(RoadsError::Share { name, value });
            }
        }
        if config.rare_share * RARE.len() as f32 + config.late_share >= 1.0 {
            return Err(RoadsError::Crowded {
                rare: config.rare_share,
                late: config.late_share,
            });
        }
        let dice = DiceBox::new(config.seed);
        let camera = Camera::new(config.size as usize);
        Ok(Self {
            config,
            dice,
            camera,
            atlas: None,
            current: None,
        })
    }

    /// The configuration.
    pub fn config(&self) -> &RoadsConfig {
        &self.config
    }

    /// Bytes of one frame: size × size × 3, HWC, RGB.
    pub fn frame_len(&self) -> usize {
        self.config.size as usize * self.config.size as usize * 3
    }

    /// The truth about a frame, without drawing it.
    pub fn scene(&self, frame: u64) -> Scene {
        self.meet(frame).0
    }

    /// The scene and the encounter's dice, ready for the look.
    fn meet(&self, frame: u64) -> (Scene, Dice) {
        let encounter = frame / FRAMES_PER_ENCOUNTER;
        let mut dice = self.dice.encounter(encounter);
        // Three draws in every case, so that `conditions` and `mix` never shift what follows.
        let (kind, light, air) = (dice.unit(), dice.unit(), dice.unit());
        let class = match self.config.mix {
            Mix::Stream => self.passing(kind, encounter),
            Mix::Balanced => self.dealt(encounter),
        };
        let (lighting, weather) = match self.config.conditions {
            Conditions::ClearDay => (Lighting::Day, Weather::Clear),
            Conditions::All => (
                if light < 0.55 {
                    Lighting::Day
                } else if light < 0.7 {
                    Lighting::Dusk
                } else {
                    Lighting::Night
                },
                if air < 0.55 {
                    Weather::Clear
                } else if air < 0.7 {
                    Weather::Rain
                } else if air < 0.9 {
                    Weather::Fog
                } else {
                    Weather::Snow
                },
            ),
        };
        (
            Scene {
                frame,
                encounter,
                class,
                lighting,
                weather,
            },
            dice,
        )
    }

    fn passing(&self, kind: f32, encounter: u64) -> usize {
        let late = if encounter.saturating_mul(FRAMES_PER_ENCOUNTER) >= self.config.late_from {
            self.config.late_share
        } else {
            0.0
        };
        let mut left = kind;
        for (class, share) in RARE
            .map(|class| (class, self.config.rare_share))
            .into_iter()
            .chain([(LATE, late)])
        {
            if left < share {
                return class;
            }
            left -= share;
        }
        let common = 1.0 - late - self.config.rare_share * RARE.len() as f32;
        ((left / common * COMMON as f32) as usize).min(COMMON - 1)
    }

    /// The class of an encounter when every run of encounters is a shuffled deck of all classes.
    fn dealt(&self, encounter: u64) -> usize {
        const N: usize = CLASSES.len();
        let mut deck: [usize; N] = std::array::from_fn(|i| i);
        // Dealt from the far end of the frame streams, which no frame number reaches.
        let mut dice = self.dice.frame(u64::MAX / 2 - encounter / N as u64);
        for i in (1..N).rev() {
            deck.swap(i, dice.below(i + 1));
        }
        deck[(encounter % N as u64) as usize]
    }

    /// Draws a frame into `rgb` (HWC, RGB, exactly [`Self::frame_len`] bytes).
    ///
    /// # Errors
    /// The buffer has another length.
    pub fn render(&mut self, frame: u64, rgb: &mut [u8]) -> Result<Scene, RoadsError> {
        if rgb.len() != self.frame_len() {
            return Err(RoadsError::Buffer {
                needed: self.frame_len(),
                got: rgb.len(),
            });
        }
        let (scene, dice) = self.meet(frame);
        let encounter = match self.current.take() {
            Some(current) if current.number == scene.encounter => current,
            _ => self.stage(&scene, dice),
        };
        let view = View {
            look: &encounter.look,
            background: &encounter.background,
            sign: &encounter.sign,
            occluder: encounter.occluder.as_ref(),
            plate: encounter.plate,
            progress: (frame % FRAMES_PER_ENCOUNTER) as f32 / (FRAMES_PER_ENCOUNTER - 1) as f32,
        };
        self.camera.shoot(&view, &mut self.dice.frame(frame), rgb);
        self.current = Some(encounter);
        Ok(scene)
    }

    fn stage(&mut self, scene: &Scene, mut dice: Dice) -> Encounter {
        // One and a half texels a pixel: the camera supersamples twice over.
        let px = self.config.size + self.config.size / 2;
        let atlas = self.atlas.get_or_insert_with(|| Atlas::draw(px as usize));
        let look = Look::draw(scene.lighting, scene.weather, &mut dice);
        let mut sign = atlas.texture(scene.class, dice.below(STYLES)).clone();
        let snowed = scene.weather == Weather::Snow && dice.chance(0.25);
        scenery::weather_sign(&mut sign, snowed, &mut dice);
        let plate = dice.chance(0.2);
        // Backgrounds are out of focus: a pixel a texel is enough.
        let scene_px = (self.config.size as f32 * REACH) as u32;
        let background = scenery::background(scene_px, &mut dice);
        let occluder = dice
            .chance(0.2)
            .then(|| scenery::occluder(scene_px, &mut dice));
        Encounter {
            number: scene.encounter,
            look,
            sign,
            background,
            occluder,
            plate,
        }
    }
}

#[cfg(test)]
mod tests;
