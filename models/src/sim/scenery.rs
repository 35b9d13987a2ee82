//! What is behind the sign, in front of it and on it: backgrounds, branches and poles, dirt, fading
//! and stickers. Drawn once per encounter.

use super::dice::Dice;
use super::pen::{Pen, Rgb, linear, oval, polygon, polyline, rect};
use super::signs::{EXTENT, Texture};

/// Half the width of a background in crop half-widths: wider than the crop, since it drifts and grows.
pub(super) const REACH: f32 = 1.4;

/// A background, from −[`REACH`] to +[`REACH`], opaque, `px` texels wide.
pub(super) fn background(px: u32, dice: &mut Dice) -> Texture {
    let mut pen = Pen::new(px, REACH);
    let ground = Rgb::from([dice.below(90) as u8 + 60; 3]);
    pen.fill(ground, 1.0, rect(-REACH, -REACH, REACH, REACH));
    match dice.below(6) {
        0 => woods(&mut pen, dice),
        1 => facade(&mut pen, dice),
        2 => road(&mut pen, dice),
        3 => sky(&mut pen, dice),
        4 => wall(&mut pen, dice),
        _ => city(&mut pen, dice),
    }
    texture(px, pen)
}

fn texture(px: u32, pen: Pen) -> Texture {
    Texture {
        side: px as usize,
        texels: pen.finish(),
    }
}

fn shade(dice: &mut Dice, base: Rgb, spread: f32) -> Rgb {
    let gain = dice.within(1.0 - spread, 1.0 + spread);
    base.map(|c| (f32::from(c) * gain + dice.within(-12.0, 12.0)).clamp(0.0, 255.0) as u8)
}

fn blob(pen: &mut Pen, dice: &mut Dice, rgb: Rgb, span: f32) {
    let at = (dice.within(-REACH, REACH), dice.within(-REACH, REACH));
    let size = (dice.within(0.3, 1.0) * span, dice.within(0.3, 1.0) * span);
    pen.fill(rgb, dice.within(0.6, 1.0), oval(at.0, at.1, size.0, size.1));
}

fn woods(pen: &mut Pen, dice: &mut Dice) {
    let autumn = dice.chance(0.25);
    for _ in 0..14 {
        let base = if autumn { [150, 92, 40] } else { [58, 88, 42] };
        let rgb = shade(dice, base, 0.6);
        blob(pen, dice, rgb, 0.6);
    }
    if dice.chance(0.6) {
        let x = dice.within(-REACH, REACH);
        let rgb = shade(dice, [70, 54, 42], 0.3);
        pen.stroke(
            rgb,
            dice.within(0.06, 0.2),
            polyline(&[(x, -REACH), (x + dice.within(-0.3, 0.3), REACH)]),
        );
    }
    for _ in 0..3 {
        let rgb = shade(dice, [196, 212, 226], 0.15);
        blob(pen, dice, rgb, 0.2);
    }
}

fn facade(pen: &mut Pen, dice: &mut Dice) {
    let bases: [Rgb; 4] = [
        [168, 150, 130],
        [150, 84, 66],
        [196, 190, 178],
        [120, 124, 132],
    ];
    let base = bases[dice.below(bases.len())];
    let rgb = shade(dice, base, 0.25);
    pen.fill(rgb, 1.0, rect(-REACH, -REACH, REACH, REACH));
    let (w, h) = (dice.within(0.25, 0.5), dice.within(0.3, 0.6));
    let (gap_x, gap_y) = (w * dice.within(1.5, 2.2), h * dice.within(1.3, 2.0));
    let (x0, y0) = (dice.within(-0.4, 0.0), dice.within(-0.4, 0.0));
    let glass = shade(dice, [62, 72, 84], 0.4);
    for i in -2..4 {
        for j in -2..4 {
            let (x, y) = (x0 + gap_x * i as f32, y0 + gap_y * j as f32);
            pen.fill(glass, 1.0, rect(x, y, x + w, y + h));
        }
    }
}

fn road(pen: &mut Pen, dice: &mut Dice) {
    let horizon = dice.within(-0.7, 0.3);
    let heaven = shade(dice, [186, 204, 224], 0.15);
    let grass = shade(dice, [92, 112, 58], 0.35);
    let tar = shade(dice, [92, 92, 96], 0.3);
    pen.fill(heaven, 1.0, rect(-REACH, -REACH, REACH, horizon));
    pen.fill(grass, 1.0, rect(-REACH, horizon, REACH, REACH));
    let vanish = (dice.within(-1.5, 1.5), horizon);
    let left = dice.within(-2.5, 0.5);
    let right = left + dice.within(0.8, 2.4);
    pen.fill(tar, 1.0, polygon(&[vanish, (right, REACH), (left, REACH)]));
    pen.stroke(
        [220, 220, 214],
        0.05,
        polyline(&[vanish, ((left + right) / 2.0, REACH)]),
    );
    for _ in 0..4 {
        let rgb = shade(dice, [52, 74, 40], 0.4);
        let (x, w) = (dice.within(-REACH, REACH), dice.within(0.15, 0.5));
        pen.fill(rgb, 1.0, oval(x, horizon, w, dice.within(0.1, 0.4)));
    }
}

fn sky(pen: &mut Pen, dice: &mut Dice) {
    let blue = shade(dice, [146, 186, 228], 0.25);
    pen.fill(blue, 1.0, rect(-REACH, -REACH, REACH, REACH));
    for _ in 0..5 {
        let rgb = shade(dice, [228, 232, 238], 0.1);
        blob(pen, dice, rgb, 0.8);
    }
    if dice.chance(0.5) {
        for _ in 0..6 {
            let rgb = shade(dice, [48, 66, 38], 0.4);
            let (x, w) = (dice.within(-REACH, REACH), dice.within(0.2, 0.6));
            pen.fill(rgb, 1.0, oval(x, REACH, w, dice.within(0.3, 1.2)));
        }
    }
    if dice.chance(0.3) {
        let y = dice.within(-1.0, 1.0);
        pen.stroke(
            [60, 60, 64],
            0.03,
            polyline(&[(-REACH, y), (REACH, y + dice.within(-0.4, 0.4))]),
        );
    }
}

fn wall(pen: &mut Pen, dice: &mut Dice) {
    let base = shade(dice, [150, 146, 140], 0.4);
    pen.fill(base, 1.0, rect(-REACH, -REACH, REACH, REACH));
    for _ in 0..6 {
        let rgb = shade(dice, base, 0.2);
        blob(pen, dice, rgb, 0.7);
    }
    let y = dice.within(-0.8, 0.8);
    let rgb = shade(dice, [80, 78, 76], 0.3);
    pen.stroke(
        rgb,
        dice.within(0.03, 0.1),
        polyline(&[(-REACH, y), (REACH, y)]),
    );
}

fn city(pen: &mut Pen, dice: &mut Dice) {
    let sky = shade(dice, [190, 200, 214], 0.2);
    pen.fill(sky, 1.0, rect(-REACH, -REACH, REACH, REACH));
    for _ in 0..6 {
        let rgb = shade(dice, [112, 106, 104], 0.5);
        let (x, w) = (dice.within(-REACH, REACH), dice.within(0.2, 0.7));
        pen.fill(rgb, 1.0, rect(x - w, dice.within(-1.2, 0.6), x + w, REACH));
    }
    // Cars, shop signs and hoardings in the very colours that traffic signs use.
    let loud: [Rgb; 6] = [
        [188, 30, 34],
        [30, 70, 160],
        [236, 190, 30],
        [240, 240, 240],
        [30, 130, 70],
        [20, 20, 24],
    ];
    for _ in 0..4 {
        let base = loud[dice.below(loud.len())];
        let rgb = shade(dice, base, 0.2);
        if dice.chance(0.5) {
            blob(pen, dice, rgb, 0.45);
        } else {
            let (x, y) = (dice.within(-REACH, REACH), dice.within(-REACH, REACH));
            pen.fill(
                rgb,
                1.0,
                rect(x, y, x + dice.within(0.2, 0.8), y + dice.within(0.15, 0.6)),
            );
        }
    }
}

/// Something in front of the sign, same plane and size as a background, mostly transparent.
pub(super) fn occluder(px: u32, dice: &mut Dice) -> Texture {
    let mut pen = Pen::new(px, REACH);
    match dice.below(4) {
        0 | 1 => branch(&mut pen, dice),
        2 => {
            let x = dice.within(-0.7, 0.7);
            let rgb = shade(dice, [96, 98, 102], 0.5);
            let lean = dice.within(-0.25, 0.25);
            let path = polyline(&[(x - lean, -REACH), (x + lean, REACH)]);
            pen.bar(rgb, dice.within(0.08, 0.24), path);
        }
        _ => {
            // The edge of a lorry, a hedge or the next sign.
            let rgb = shade(dice, [110, 112, 118], 0.7);
            let angle = dice.within(0.0, std::f32::consts::TAU);
            let (c, s) = (angle.cos(), angle.sin());
            let edge = dice.within(0.3, 0.75);
            let spin = |x: f32, y: f32| (x * c - y * s, x * s + y * c);
            let corners = [
                spin(edge, -3.0),
                spin(3.0, -3.0),
                spin(3.0, 3.0),
                spin(edge + 0.2, 3.0),
            ];
            pen.fill(rgb, 1.0, polygon(&corners));
        }
    }
    texture(px, pen)
}

fn branch(pen: &mut Pen, dice: &mut Dice) {
    let side = if dice.chance(0.5) { 1.0 } else { -1.0 };
    let start = (side * REACH, dice.within(-1.2, 0.8));
    let end = (
        side * dice.within(-0.3, 0.5),
        start.1 + dice.within(-0.2, 0.9),
    );
    let bark = shade(dice, [74, 60, 44], 0.3);
    pen.stroke(bark, dice.within(0.03, 0.07), polyline(&[start, end]));
    let bare = dice.chance(0.2);
    let leaves = if bare { 0 } else { 7 + dice.below(9) };
    for _ in 0..leaves {
        let along = dice.unit();
        let at = (
            start.0 + (end.0 - start.0) * along + dice.within(-0.22, 0.22),
            start.1 + (end.1 - start.1) * along + dice.within(-0.22, 0.22),
        );
        let rgb = shade(dice, [66, 104, 44], 0.5);
        pen.fill(
            rgb,
            1.0,
            oval(at.0, at.1, dice.within(0.05, 0.16), dice.within(0.04, 0.12)),
        );
    }
    for _ in 0..3 {
        let along = dice.unit();
        let at = (
            start.0 + (end.0 - start.0) * along,
            start.1 + (end.1 - start.1) * along,
        );
        let tip = (at.0 + dice.within(-0.4, 0.4), at.1 + dice.within(-0.5, 0.5));
        pen.stroke(bark, 0.025, polyline(&[at, tip]));
    }
}

/// A coarse random field over the sign, for dirt and snow.
struct Field([f32; Field::SIDE * Field::SIDE]);

impl Field {
    const SIDE: usize = 6;

    fn draw(dice: &mut Dice) -> Self {
        Self(std::array::from_fn(|_| dice.unit()))
    }

    /// The field at (u, v) in [0, 1]², smoothly interpolated, in [0, 1].
    fn at(&self, u: f32, v: f32) -> f32 {
        let split = |t: f32| {
            let t = t.clamp(0.0, 1.0) * (Self::SIDE - 1) as f32;
            let i = (t as usize).min(Self::SIDE - 2);
            let f = t - i as f32;
            (i, f * f * (3.0 - 2.0 * f))
        };
        let ((x, fx), (y, fy)) = (split(u), split(v));
        let row = |y: usize| {
            let (a, b) = (self.0[y * Self::SIDE + x], self.0[y * Self::SIDE + x + 1]);
            a + (b - a) * fx
        };
        let (top, bottom) = (row(y), row(y + 1));
        top + (bottom - top) * fy
    }
}

/// Ages a sign: uneven print, fading, dirt, a sticker; `snowed` leaves snow on it.
pub(super) fn weather_sign(sign: &mut Texture, snowed: bool, dice: &mut Dice) {
    let print: [f32; 3] = std::array::from_fn(|_| dice.within(0.85, 1.12));
    let faded = if dice.chance(0.3) {
        dice.within(0.1, 0.45)
    } else {
        0.0
    };
    let pale = linear([188, 182, 168]);
    let mud = linear([94, 80, 60]);
    let dirty = if dice.chance(0.3) {
        dice.within(0.3, 0.75)
    } else {
        0.0
    };
    let dirt = Field::draw(dice);
    let snow_line = dice.within(0.55, 0.8);
    let snow = Field::draw(dice);
    let white = linear([236, 240, 246]);
    let sticker = dice.chance(0.1).then(|| {
        let loud: [Rgb; 4] = [
            [240, 240, 240],
            [30, 30, 34],
            [40, 140, 80],
            [220, 120, 170],
        ];
        let rgb = linear(loud[dice.below(loud.len())]);
        let angle = dice.within(0.0, std::f32::consts::TAU);
        let half = (dice.within(0.1, 0.3), dice.within(0.08, 0.2));
        (
            (dice.within(-0.6, 0.6), dice.within(-0.6, 0.6)),
            (angle.cos(), angle.sin()),
            half,
            rgb,
        )
    });
    let side = sign.side;
    for (i, texel) in sign.texels.iter_mut().enumerate() {
        if texel[3] <= 0.0 {
            continue;
        }
        let at = |k: usize| (k as f32 + 0.5) / side as f32;
        let (u, v) = (at(i % side), at(i / side));
        let alpha = texel[3];
        let mut stain = 0.0;
        if dirty > 0.0 {
            stain = dirty * ((dirt.at(u, v) - 0.45) * 3.0).clamp(0.0, 1.0);
        }
        let mut cover = 0.0;
        if snowed {
            // Snow gathers from above, where the field runs high.
            let height = snow.at(u, v) + 0.35 * (1.0 - 2.0 * v);
            cover = ((height - snow_line) * 6.0).clamp(0.0, 1.0);
        }
        let stuck = sticker.filter(|((x, y), (c, s), (w, h), _)| {
            let (dx, dy) = ((2.0 * u - 1.0) * EXTENT - x, (2.0 * v - 1.0) * EXTENT - y);
            (dx * c + dy * s).abs() < *w && (dy * c - dx * s).abs() < *h
        });
        for (c, value) in texel.iter_mut().take(3).enumerate() {
            let mut x = *value / alpha * print[c];
            x += (pale[c] - x) * faded;
            x += (mud[c] - x) * stain;
            if let Some((.., rgb)) = stuck {
                x = rgb[c];
            }
            x += (white[c] - x) * cover;
            *value = x.clamp(0.0, 1.0) * alpha;
        }
    }
}
