//! How one encounter looks: the light, the weather, the camera's state and the way past the sign,
//! all drawn once per encounter so that its frames belong together.

use super::dice::Dice;
use super::{Lighting, Weather};

/// Light on the sign and on what is around it, in linear units where a white sign under 1.0
/// comes out just below full scale.
pub(super) struct Light {
    pub(super) sign: f32,
    pub(super) around: f32,
    /// Change of the light across the sign, per sign radius.
    pub(super) slope: (f32, f32),
    /// A cast shadow: direction, distance of its edge from the centre, light left inside.
    pub(super) shadow: Option<((f32, f32), f32, f32)>,
    /// Colour cast, around 1 per channel.
    pub(super) tint: [f32; 3],
    /// 1 keeps colours, 0 is grey.
    pub(super) saturation: f32,
    /// Headlights: the beam's middle in sign units and how fast it falls off. None by day.
    pub(super) beam: Option<((f32, f32), f32)>,
    /// Lamps and headlights behind the sign.
    pub(super) lamps: Vec<Lamp>,
}

/// A blurred light in the background; screen units (the crop spans −1 to 1).
pub(super) struct Lamp {
    pub(super) at: (f32, f32),
    pub(super) radius: f32,
    pub(super) colour: [f32; 3],
}

/// What is in the air.
pub(super) struct Air {
    /// How fast light is lost on the way; 0 in clear air.
    pub(super) density: f32,
    /// Colour of the light that the air scatters in.
    pub(super) glow: [f32; 3],
    /// Rain streaks or snowflakes per frame, at 32×32.
    pub(super) particles: usize,
    /// Horizontal drift of the particles per unit of fall.
    pub(super) slant: f32,
    /// Chance that a drop stands on the lens in a frame.
    pub(super) lens_drop: f32,
}

/// The camera and its way past the sign.
pub(super) struct Camera {
    /// Sensor noise at zero light and its growth with light.
    pub(super) read_noise: f32,
    pub(super) shot_noise: f32,
    /// Gaussian blur in crop widths when far and when near.
    pub(super) soft: (f32, f32),
    /// Motion blur: length in crop widths, direction in radians.
    pub(super) motion: (f32, f32),
    /// Sign radius in crop half-widths in the first and the last frame.
    pub(super) radius: (f32, f32),
    /// Sign centre in the first and the last frame.
    pub(super) path: ((f32, f32), (f32, f32)),
    /// Yaw in the first and the last frame, pitch and roll, in radians.
    pub(super) yaw: (f32, f32),
    pub(super) pitch: f32,
    pub(super) roll: f32,
}

/// Everything about an encounter but what is drawn.
pub(super) struct Look {
    pub(super) light: Light,
    pub(super) air: Air,
    pub(super) camera: Camera,
}

impl Look {
    pub(super) fn draw(lighting: Lighting, weather: Weather, dice: &mut Dice) -> Self {
        let mut light = light(lighting, dice);
        if weather != Weather::Clear {
            // Overcast: flatter, darker, no hard shadow.
            light.shadow = None;
            light.around *= 0.8;
            if lighting != Lighting::Night {
                light.sign *= 0.75;
            }
        }
        let air = air(lighting, weather, light.sign, dice);
        let camera = camera(lighting, dice);
        Self { light, air, camera }
    }
}

fn light(lighting: Lighting, dice: &mut Dice) -> Light {
    let slope = (dice.within(-0.25, 0.25), dice.within(-0.25, 0.25));
    let angle = dice.within(0.0, std::f32::consts::TAU);
    let edge = dice.within(-0.5, 0.6);
    let shadow_left = dice.within(0.25, 0.55);
    let shadowed = dice.chance(0.2);
    match lighting {
        Lighting::Day => {
            let backlit = dice.chance(0.12);
            let sign = if backlit {
                dice.within(0.15, 0.32)
            } else {
                0.72 * dice.spread(0.4)
            };
            let warmth = dice.within(-0.06, 0.1);
            Light {
                sign,
                around: 0.75 * dice.spread(0.35) * if backlit { 1.5 } else { 1.0 },
                slope,
                shadow: (shadowed && !backlit).then_some((
                    (angle.cos(), angle.sin()),
                    edge,
                    shadow_left,
                )),
                tint: [1.0 + warmth, 1.0, 1.0 - warmth],
                saturation: dice.within(0.75, 1.05),
                beam: None,
                lamps: Vec::new(),
            }
        }
        Lighting::Dusk => {
            let orange = dice.chance(0.5);
            let cast = dice.within(0.05, 0.25);
            let lamps = dice.below(3);
            Light {
                sign: 0.26 * dice.spread(0.45),
                around: 0.17 * dice.spread(0.5),
                slope,
                shadow: None,
                tint: if orange {
                    [1.0 + cast, 1.0, 1.0 - 0.8 * cast]
                } else {
                    [1.0 - 0.5 * cast, 1.0 - 0.1 * cast, 1.0 + cast]
                },
                saturation: dice.within(0.5, 0.85),
                beam: None,
                lamps: (0..lamps).map(|_| lamp(dice, 0.35)).collect(),
            }
        }
        Lighting::Night => {
            let unlit = dice.chance(0.14);
            let sign = if unlit {
                dice.within(0.04, 0.08)
            } else {
                0.38 * dice.spread(0.55)
            };
            let sodium = dice.within(0.0, 0.3);
            let lamps = dice.below(4);
            let beam = (dice.within(-0.6, 0.6), dice.within(-0.4, 0.8));
            Light {
                sign,
                around: dice.within(0.006, 0.035),
                slope: (0.0, 0.0),
                shadow: None,
                tint: [1.0 + sodium, 1.0, 1.0 - sodium],
                saturation: dice.within(0.35, 0.8),
                beam: Some((beam, dice.within(0.1, 0.45))),
                lamps: (0..lamps).map(|_| lamp(dice, 0.6)).collect(),
            }
        }
    }
}

fn lamp(dice: &mut Dice, strength: f32) -> Lamp {
    let palette = [
        [1.0, 0.75, 0.4],
        [1.0, 0.95, 0.85],
        [1.0, 0.15, 0.1],
        [0.8, 0.9, 1.0],
    ];
    let colour = palette[dice.below(palette.len())];
    let power = strength * dice.within(0.3, 1.0);
    Lamp {
        at: (dice.within(-1.0, 1.0), dice.within(-1.0, 1.0)),
        radius: dice.within(0.1, 0.4),
        colour: colour.map(|c| c * power),
    }
}

fn air(lighting: Lighting, weather: Weather, sign: f32, dice: &mut Dice) -> Air {
    let daylight = match lighting {
        Lighting::Day => (sign * dice.within(0.7, 1.2)).clamp(0.25, 0.8),
        Lighting::Dusk => sign * dice.within(0.55, 1.0),
        // At night the air only throws back the headlights.
        Lighting::Night => 0.01 + sign * dice.within(0.1, 0.3),
    };
    let chill = dice.within(-0.04, 0.06);
    let glow = [daylight * (1.0 - chill), daylight, daylight * (1.0 + chill)];
    let slant = dice.within(-0.5, 0.5);
    let (density, particles, lens_drop) = match weather {
        Weather::Clear => (0.0, 0, 0.0),
        Weather::Rain => (dice.within(0.1, 0.4), 6 + dice.below(14), 0.35),
        Weather::Fog => (dice.within(0.5, 1.25), 0, 0.05),
        Weather::Snow => (dice.within(0.1, 0.45), 6 + dice.below(16), 0.1),
    };
    Air {
        density,
        glow,
        particles,
        slant,
        lens_drop,
    }
}

fn camera(lighting: Lighting, dice: &mut Dice) -> Camera {
    let (read, shot, shake) = match lighting {
        Lighting::Day => (0.004, 0.018, 0.018),
        Lighting::Dusk => (0.0045, 0.022, 0.032),
        Lighting::Night => (0.005, 0.028, 0.042),
    };
    let iso = dice.spread(0.35);
    let near = dice.within(0.68, 0.95);
    let far = near * dice.within(0.7, 0.88);
    let defocus = 0.015 * dice.spread(0.4);
    let start = (
        0.12 * dice.normal().clamp(-1.6, 1.6),
        0.1 * dice.normal().clamp(-1.6, 1.6),
    );
    let drift = (dice.within(-0.12, 0.12), dice.within(-0.08, 0.08));
    let yaw = dice.within(-0.55, 0.55);
    let sideways = if dice.chance(0.7) {
        0.0
    } else {
        dice.within(0.0, std::f32::consts::PI)
    };
    Camera {
        read_noise: read * iso,
        shot_noise: shot * iso,
        soft: (defocus * dice.within(1.1, 1.6), defocus),
        motion: (shake * dice.normal().abs().min(2.2), sideways),
        radius: (far, near),
        path: (start, (start.0 + drift.0, start.1 + drift.1)),
        yaw: (
            yaw,
            yaw + dice.within(-0.05, 0.35) * if yaw < 0.0 { -1.0 } else { 1.0 },
        ),
        pitch: 0.12 * dice.normal().clamp(-2.0, 2.0),
        roll: 0.1 * dice.normal().clamp(-2.2, 2.2),
    }
}
