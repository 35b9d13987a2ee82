//! The camera: puts background, sign and occluder together through a projection, in linear light,
//! then light, air, lens, sensor and tone curve, as in a real imaging chain.

use super::dice::Dice;
use super::look::{Air, Light, Look};
use super::scenery::REACH;
use super::signs::{EXTENT, Texture};

/// What the camera sees of one encounter.
pub(super) struct View<'a> {
    pub(super) look: &'a Look,
    pub(super) background: &'a Texture,
    pub(super) sign: &'a Texture,
    pub(super) occluder: Option<&'a Texture>,
    /// A second plate below the sign.
    pub(super) plate: bool,
    /// 0 in the first frame of the encounter, 1 in the last.
    pub(super) progress: f32,
}

/// A camera with its working buffers.
pub(super) struct Camera {
    size: usize,
    /// Linear light; the fourth lane is idle and makes a pixel one SIMD register.
    image: Vec<[f32; 4]>,
    spare: Vec<[f32; 4]>,
    tone: Vec<u8>,
}

/// Steps of the tone table; with sqrt spacing dark tones keep their resolution.
const TONES: usize = 1024;

impl Camera {
    pub(super) fn new(size: usize) -> Self {
        let encode = |c: f32| {
            if c <= 0.003_130_8 {
                12.92 * c
            } else {
                1.055 * c.powf(1.0 / 2.4) - 0.055
            }
        };
        let tone = (0..=TONES)
            .map(|i| {
                let root = i as f32 / TONES as f32;
                (encode(root * root) * 255.0).round() as u8
            })
            .collect();
        Self {
            size,
            image: vec![[0.0; 4]; size * size],
            spare: vec![[0.0; 4]; size * size],
            tone,
        }
    }

    /// Takes one frame into `rgb` (size × size × 3 bytes).
    pub(super) fn shoot(&mut self, view: &View<'_>, dice: &mut Dice, rgb: &mut [u8]) {
        self.compose(view, dice);
        let camera = &view.look.camera;
        let px = self.size as f32;
        let soft = camera.soft.0 + (camera.soft.1 - camera.soft.0) * view.progress;
        self.smear(
            camera.motion.0 * dice.within(0.7, 1.3) * px,
            camera.motion.1 + dice.within(-0.2, 0.2),
        );
        self.soften(soft * dice.within(0.85, 1.15) * px);
        self.precipitate(&view.look.air, view.look.light.beam.is_some(), dice);
        self.develop(view.look, dice, rgb);
    }

    fn compose(&mut self, view: &View<'_>, dice: &mut Dice) {
        let (light, air) = (&view.look.light, &view.look.air);
        let pose = Pose::at(view, dice);
        let drift = (
            dice.within(-0.03, 0.03) + 0.2 * (view.progress - 0.5),
            dice.within(-0.03, 0.03),
        );
        // The far scene grows more slowly than the sign.
        let zoom = 1.08 - 0.12 * view.progress;
        let distance = 1.25 - 0.65 * view.progress;
        let clear = (-air.density * distance).exp();
        let clear_far = clear * clear;
        let nearing = if light.beam.is_some() {
            0.75 + 0.5 * view.progress
        } else {
            1.0
        };
        let step = 2.0 / self.size as f32;
        let quarter = step / 4.0;
        for (i, pixel) in self.image.iter_mut().enumerate() {
            let x = ((i % self.size) as f32 + 0.5) * step - 1.0;
            let y = ((i / self.size) as f32 + 0.5) * step - 1.0;
            let (u, v, across) = pose.plane(x, y);
            let mut sign = [0.0; 4];
            if near_board(u, v) {
                // Four samples a pixel, the projection taken as linear within it.
                for (dx, dy) in [
                    (-quarter, -quarter),
                    (quarter, -quarter),
                    (-quarter, quarter),
                    (quarter, quarter),
                ] {
                    let du = across[0] * dx + across[1] * dy;
                    let dv = across[2] * dx + across[3] * dy;
                    board(view, u + du, v + dv, &mut sign);
                }
            }
            let lit = 0.25 * nearing * on_sign(light, u, v);
            let cover = 0.25 * sign[3];
            let mut behind = [0.0; 3];
            if cover < 0.999 {
                let [r, g, b, _] = view
                    .background
                    .sample((x * zoom + drift.0) / REACH, (y * zoom + drift.1) / REACH);
                behind = [r, g, b].map(|c| c * light.around);
                for lamp in &light.lamps {
                    let (dx, dy) = (x - lamp.at.0, y - lamp.at.1);
                    let near = (1.0 - (dx * dx + dy * dy) / (lamp.radius * lamp.radius)).max(0.0);
                    for (sum, c) in behind.iter_mut().zip(lamp.colour) {
                        *sum += c * near * near;
                    }
                }
            }
            for c in 0..3 {
                let front = sign[c] * lit * clear + air.glow[c] * (1.0 - clear) * cover;
                let back = behind[c] * clear_far + air.glow[c] * (1.0 - clear_far);
                pixel[c] = front + back * (1.0 - cover);
            }
            if let Some(occluder) = view.occluder {
                let shift = 0.3 * (view.progress - 0.5);
                let near = occluder.sample((x * 0.95 + shift) / REACH, y * 0.95 / REACH);
                let shade = light.around.min(light.sign);
                for c in 0..3 {
                    let haze = air.glow[c] * (1.0 - clear) * near[3];
                    pixel[c] = pixel[c] * (1.0 - near[3]) + near[c] * shade * clear + haze;
                }
            }
        }
    }

    /// Motion blur: the mean along a line of `length` pixels.
    fn smear(&mut self, length: f32, angle: f32) {
        if length < 0.4 {
            return;
        }
        let taps = (length.ceil() as usize + 1).min(8);
        let (dx, dy) = (length * angle.cos(), length * angle.sin());
        let offsets: Vec<(f32, f32)> = (0..taps)
            .map(|k| k as f32 / (taps - 1) as f32 - 0.5)
            .map(|t| (t * dx, t * dy))
            .collect();
        self.spare.fill([0.0; 4]);
        let (size, last) = (self.size, self.size as i32 - 1);
        let share = 1.0 / taps as f32;
        for (ox, oy) in offsets {
            let (ix, iy) = (ox.floor(), oy.floor());
            let (fx, fy) = (ox - ix, oy - iy);
            let weights = [
                (1.0 - fx) * (1.0 - fy),
                fx * (1.0 - fy),
                (1.0 - fx) * fy,
                fx * fy,
            ]
            .map(|w| w * share);
            for y in 0..size {
                let y0 = (y as i32 + iy as i32).clamp(0, last) as usize * size;
                let y1 = (y as i32 + iy as i32 + 1).clamp(0, last) as usize * size;
                for x in 0..size {
                    let x0 = (x as i32 + ix as i32).clamp(0, last) as usize;
                    let x1 = (x as i32 + ix as i32 + 1).clamp(0, last) as usize;
                    let around = [
                        &self.image[y0 + x0],
                        &self.image[y0 + x1],
                        &self.image[y1 + x0],
                        &self.image[y1 + x1],
                    ];
                    let out = &mut self.spare[y * size + x];
                    for (p, w) in around.into_iter().zip(weights) {
                        for c in 0..4 {
                            out[c] += p[c] * w;
                        }
                    }
                }
            }
        }
        std::mem::swap(&mut self.image, &mut self.spare);
    }

    /// Gaussian blur of `sigma` pixels, one axis after the other.
    fn soften(&mut self, sigma: f32) {
        if sigma < 0.15 {
            return;
        }
        let reach = ((2.2 * sigma).ceil() as usize).clamp(1, 6);
        let mut kernel: Vec<f32> = (0..=2 * reach)
            .map(|k| {
                let d = (k as f32 - reach as f32) / sigma;
                (-0.5 * d * d).exp()
            })
            .collect();
        let total: f32 = kernel.iter().sum();
        kernel.iter_mut().for_each(|w| *w /= total);
        let (size, last) = (self.size, self.size - 1);
        for (i, out) in self.spare.iter_mut().enumerate() {
            let row = i - i % size;
            let mut sum = [0.0; 4];
            for (k, w) in kernel.iter().enumerate() {
                let x = (i % size + k).saturating_sub(reach).min(last);
                for (s, p) in sum.iter_mut().zip(self.image[row + x]) {
                    *s += w * p;
                }
            }
            *out = sum;
        }
        self.image.fill([0.0; 4]);
        for (k, w) in kernel.iter().enumerate() {
            for y in 0..size {
                let from = (y + k).saturating_sub(reach).min(last) * size;
                let (source, target) = (
                    &self.spare[from..from + size],
                    &mut self.image[y * size..(y + 1) * size],
                );
                for (t, s) in target.iter_mut().zip(source) {
                    for c in 0..4 {
                        t[c] += w * s[c];
                    }
                }
            }
        }
    }

    /// Rain streaks or snowflakes between lens and sign, and drops on the lens.
    fn precipitate(&mut self, air: &Air, night: bool, dice: &mut Dice) {
        let px = self.size as f32;
        let unit = px / 32.0;
        let snow = air.particles >= 1 && air.lens_drop < 0.2;
        // At night flakes and drops flare up in the headlights.
        let flare = if night { 2.2 } else { 1.15 };
        let colour = air.glow.map(|c| (c * flare + 0.08).min(0.95));
        for _ in 0..air.particles {
            let (x, y) = (dice.within(-2.0, px + 2.0), dice.within(-4.0, px + 2.0));
            let strength = dice.within(0.3, 1.0);
            if snow {
                let radius = dice.within(0.35, 0.95) * unit;
                self.streak(
                    (x, y),
                    (air.slant * radius, radius * 1.2),
                    0.85 * strength,
                    &colour,
                );
                self.streak(
                    (x + 0.7 * radius, y),
                    (0.0, radius),
                    0.6 * strength,
                    &colour,
                );
            } else {
                let length = dice.within(3.0, 9.0) * unit;
                self.streak(
                    (x, y),
                    (air.slant * length, length),
                    0.34 * strength,
                    &colour,
                );
            }
        }
        if dice.chance(air.lens_drop) {
            for _ in 0..=dice.below(2) {
                let at = (dice.within(0.0, px), dice.within(0.0, px));
                self.drop_on_lens(at, dice.within(2.0, 5.0) * unit);
            }
        }
    }

    fn streak(&mut self, from: (f32, f32), along: (f32, f32), alpha: f32, colour: &[f32; 3]) {
        let steps = (along.0.hypot(along.1) * 1.5).ceil().max(1.0) as usize;
        for k in 0..=steps {
            let t = k as f32 / steps as f32;
            let (x, y) = (from.0 + along.0 * t, from.1 + along.1 * t);
            let (x0, y0) = (x.floor(), y.floor());
            let (fx, fy) = (x - x0, y - y0);
            for (dx, dy, w) in [
                (0, 0, (1.0 - fx) * (1.0 - fy)),
                (1, 0, fx * (1.0 - fy)),
                (0, 1, (1.0 - fx) * fy),
                (1, 1, fx * fy),
            ] {
                let (xi, yi) = (x0 as i32 + dx, y0 as i32 + dy);
                if (0..self.size as i32).contains(&xi) && (0..self.size as i32).contains(&yi) {
                    let pixel = &mut self.image[yi as usize * self.size + xi as usize];
                    for (p, c) in pixel.iter_mut().zip(colour) {
                        *p += (c - *p) * alpha * w;
                    }
                }
            }
        }
    }

    /// A drop shows the scene behind it small and upside down.
    fn drop_on_lens(&mut self, at: (f32, f32), radius: f32) {
        let last = self.size as f32 - 1.0;
        self.spare.copy_from_slice(&self.image);
        for (i, pixel) in self.image.iter_mut().enumerate() {
            let (dx, dy) = ((i % self.size) as f32 - at.0, (i / self.size) as f32 - at.1);
            let inside = 1.0 - (dx * dx + dy * dy) / (radius * radius);
            if inside > 0.0 {
                let x = (at.0 - 1.3 * dx).clamp(0.0, last) as usize;
                let y = (at.1 - 1.3 * dy).clamp(0.0, last) as usize;
                let mix = (2.0 * inside).min(0.8);
                for (p, s) in pixel.iter_mut().zip(self.spare[y * self.size + x]) {
                    *p += (s * 1.1 - *p) * mix;
                }
            }
        }
    }

    /// Colour cast, saturation, sensor noise, tone curve, eight bits.
    fn develop(&self, look: &Look, dice: &mut Dice, rgb: &mut [u8]) {
        let (light, camera) = (&look.light, &look.camera);
        for (pixel, out) in self.image.iter().zip(rgb.chunks_exact_mut(3)) {
            let tinted: [f32; 3] = std::array::from_fn(|c| pixel[c] * light.tint[c]);
            let grey = 0.3 * tinted[0] + 0.59 * tinted[1] + 0.11 * tinted[2];
            // Sensors are denoised harder in colour than in brightness.
            let shared = 0.8 * dice.grain();
            for (value, byte) in tinted.into_iter().zip(out) {
                let clean = (grey + (value - grey) * light.saturation).max(0.0);
                let noise = camera.read_noise + camera.shot_noise * clean.sqrt();
                let seen = (clean + noise * (shared + 0.6 * dice.grain())).clamp(0.0, 1.0);
                *byte = self.tone[(seen.sqrt() * TONES as f32 + 0.5) as usize];
            }
        }
    }
}

impl Texture {
    /// Bilinear sample; (s, t) span −1 to 1 over the texture, transparent black beyond.
    fn sample(&self, s: f32, t: f32) -> [f32; 4] {
        let half = self.side as f32 * 0.5;
        let (x, y) = ((s + 1.0) * half - 0.5, (t + 1.0) * half - 0.5);
        let limit = self.side as f32 - 1.0;
        // Written so that NaN is out, too.
        if !(x >= 0.0 && y >= 0.0 && x < limit && y < limit) {
            return [0.0; 4];
        }
        // By way of i32: the conversions that every CPU has, and this is the innermost loop.
        let (xi, yi) = (x as i32, y as i32);
        let (fx, fy) = (x - xi as f32, y - yi as f32);
        let at = yi as usize * self.side + xi as usize;
        let (a, b) = (&self.texels[at], &self.texels[at + 1]);
        let (c, d) = (
            &self.texels[at + self.side],
            &self.texels[at + self.side + 1],
        );
        std::array::from_fn(|i| {
            let top = a[i] + (b[i] - a[i]) * fx;
            let bottom = c[i] + (d[i] - c[i]) * fx;
            top + (bottom - top) * fy
        })
    }
}

/// Whether a pixel around (u, v) can show any of [`board`].
fn near_board(u: f32, v: f32) -> bool {
    let margin = EXTENT + 0.15;
    u.abs() < margin && v > -margin && (v < margin || u.abs() < 0.8)
}

/// Adds what stands at (u, v) of the sign plane: the sign, its plate, its pole.
fn board(view: &View<'_>, u: f32, v: f32, sum: &mut [f32; 4]) {
    let texel = if u.abs() < EXTENT && v.abs() < EXTENT {
        view.sign.sample(u / EXTENT, v / EXTENT)
    } else {
        [0.0; 4]
    };
    let mut bare = 1.0 - texel[3];
    for (s, c) in sum.iter_mut().zip(texel) {
        *s += c;
    }
    if bare > 0.0 && v > 0.0 {
        if view.plate && u.abs() < 0.62 && (1.06..1.5).contains(&v) {
            let ink = u.abs() < 0.5 && (1.2..1.34).contains(&v);
            let white = if ink { 0.15 } else { 0.75 };
            for (s, c) in sum.iter_mut().zip([white, white, white, 1.0]) {
                *s += c * bare;
            }
            bare = 0.0;
        }
        if u.abs() < 0.07 {
            for (s, c) in sum.iter_mut().zip([0.22, 0.22, 0.23, 1.0]) {
                *s += c * bare;
            }
        }
    }
}

/// The light that falls on (and comes back from) a point of the sign.
fn on_sign(light: &Light, u: f32, v: f32) -> f32 {
    let (u, v) = (u.clamp(-2.0, 2.0), v.clamp(-2.0, 2.0));
    let mut lit = light.sign * (1.0 + light.slope.0 * u + light.slope.1 * v).max(0.1);
    if let Some(((nx, ny), edge, left)) = light.shadow {
        let inside = ((nx * u + ny * v - edge) * 6.0 + 0.5).clamp(0.0, 1.0);
        lit *= 1.0 - inside * (1.0 - left);
    }
    if let Some(((bu, bv), falloff)) = light.beam {
        let (du, dv) = (u - bu, v - bv);
        lit /= 1.0 + falloff * (du * du + dv * dv);
    }
    lit
}

/// Maps the screen to the sign plane: the inverse of a pinhole projection.
struct Pose([[f32; 3]; 3]);

/// Distance from camera to sign in crop half-widths: sets how strong perspective is.
const DISTANCE: f32 = 3.5;

impl Pose {
    fn at(view: &View<'_>, dice: &mut Dice) -> Self {
        let camera = &view.look.camera;
        let t = view.progress;
        let lerp = |(a, b): (f32, f32)| a + (b - a) * t;
        let (start, end) = camera.path;
        let cx = lerp((start.0, end.0)) + dice.within(-0.04, 0.04);
        let cy = lerp((start.1, end.1)) + dice.within(-0.04, 0.04);
        let r = lerp(camera.radius) * dice.within(0.96, 1.04);
        let (sy, cyaw) = (lerp(camera.yaw) + dice.within(-0.03, 0.03)).sin_cos();
        let (sp, cp) = camera.pitch.sin_cos();
        let (sr, cr) = (camera.roll + dice.within(-0.03, 0.03)).sin_cos();
        // Columns of Rz(roll)·Ry(yaw)·Rx(pitch) that the plane's two axes go to.
        let right = [cr * cyaw, sr * cyaw, -sy];
        let down = [cr * sy * sp - sr * cp, sr * sy * sp + cr * cp, cyaw * sp];
        let k = 1.0 / DISTANCE;
        let h = [
            [
                r * (right[0] + cx * right[2] * k),
                r * (down[0] + cx * down[2] * k),
                cx,
            ],
            [
                r * (right[1] + cy * right[2] * k),
                r * (down[1] + cy * down[2] * k),
                cy,
            ],
            [r * right[2] * k, r * down[2] * k, 1.0],
        ];
        Self(adjugate(&h))
    }

    /// The point (u, v) of the plane seen at (x, y), and du/dx, du/dy, dv/dx, dv/dy there.
    fn plane(&self, x: f32, y: f32) -> (f32, f32, [f32; 4]) {
        let [a, b, c] = &self.0;
        let inverse = 1.0 / (c[0] * x + c[1] * y + c[2]);
        let u = (a[0] * x + a[1] * y + a[2]) * inverse;
        let v = (b[0] * x + b[1] * y + b[2]) * inverse;
        let across = [
            a[0] - u * c[0],
            a[1] - u * c[1],
            b[0] - v * c[0],
            b[1] - v * c[1],
        ];
        (u, v, across.map(|d| d * inverse))
    }
}

/// The inverse up to a factor, which a projection does not feel.
fn adjugate(m: &[[f32; 3]; 3]) -> [[f32; 3]; 3] {
    let minor =
        |r0: usize, r1: usize, c0: usize, c1: usize| m[r0][c0] * m[r1][c1] - m[r0][c1] * m[r1][c0];
    [
        [minor(1, 2, 1, 2), -minor(0, 2, 1, 2), minor(0, 1, 1, 2)],
        [-minor(1, 2, 0, 2), minor(0, 2, 0, 2), -minor(0, 1, 0, 2)],
        [minor(1, 2, 0, 1), -minor(0, 2, 0, 1), minor(0, 1, 0, 1)],
    ]
}
