//! The sign designs: every class drawn with tiny-skia in a few national styles, rasterised once
//! into linear-light textures that the camera then samples.

use super::glyphs;
use super::pen::{Pen, Point, Rgb, arc, circle, rect};

/// The class names, in index order.
pub const CLASSES: [&str; 18] = [
    "stop",
    "yield",
    "no-entry",
    "priority-road",
    "speed-30",
    "speed-50",
    "speed-80",
    "no-overtaking",
    "roundabout",
    "turn-left",
    "turn-right",
    "ahead-only",
    "pedestrian-crossing",
    "danger",
    "children",
    "roadworks",
    "deer-crossing",
    "e-scooter-ban",
];

/// The classes that are rare in [`Mix::Stream`](super::Mix::Stream), as indices into [`CLASSES`].
pub const RARE: [usize; 3] = [14, 15, 16];

/// The class that a stream does not hold before its `late_from`, an index into [`CLASSES`].
pub const LATE: usize = 17;

/// How many classes are neither rare nor late; they stand first in [`CLASSES`].
pub(super) const COMMON: usize = CLASSES.len() - RARE.len() - 1;

/// Half the width of a texture in sign units: a sign has radius 1.
pub(super) const EXTENT: f32 = 1.1;

/// How many national styles each class is drawn in.
pub(super) const STYLES: usize = 3;

/// How a country paints its signs.
struct Style {
    red: Rgb,
    blue: Rgb,
    amber: Rgb,
    ink: Rgb,
    /// Ground of warning and prohibition signs: white, or yellow as in the north.
    ground: Rgb,
    /// Border width, in sign units.
    border: f32,
    /// Multiplies the stroke widths of glyphs.
    weight: f32,
    /// Multiplies the size of glyphs.
    glyph: f32,
}

const WHITE: Rgb = [238, 238, 236];

const COUNTRIES: [Style; STYLES] = [
    Style {
        red: [190, 22, 34],
        blue: [18, 70, 158],
        amber: [246, 184, 20],
        ink: [24, 24, 26],
        ground: WHITE,
        border: 0.2,
        weight: 1.0,
        glyph: 1.0,
    },
    Style {
        red: [206, 36, 30],
        blue: [0, 92, 178],
        amber: [240, 170, 0],
        ink: [34, 32, 34],
        ground: WHITE,
        border: 0.15,
        weight: 0.86,
        glyph: 1.08,
    },
    Style {
        red: [176, 26, 40],
        blue: [24, 58, 140],
        amber: [248, 196, 40],
        ink: [18, 18, 18],
        ground: [246, 204, 62],
        border: 0.24,
        weight: 1.12,
        glyph: 0.94,
    },
];

/// A square linear-light premultiplied RGBA picture of the sign plane from −[`EXTENT`] to +[`EXTENT`].
#[derive(Clone)]
pub(super) struct Texture {
    pub(super) side: usize,
    pub(super) texels: Vec<[f32; 4]>,
}

/// Every class in every style.
pub(super) struct Atlas(Vec<Texture>);

impl Atlas {
    /// Rasterises all classes at `side` × `side` texels.
    pub(super) fn draw(side: usize) -> Self {
        let mut textures = Vec::with_capacity(CLASSES.len() * STYLES);
        for class in 0..CLASSES.len() {
            for style in &COUNTRIES {
                // Twice the size, then averaged in linear light: tiny-skia's own antialiasing
                // blends in sRGB, which would darken thin strokes.
                let mut pen = Pen::new(2 * side as u32, EXTENT);
                sign(&mut pen, class, style);
                textures.push(halved(&pen.finish(), side));
            }
        }
        Self(textures)
    }

    /// The texture of a class in a style (both taken modulo what there is).
    pub(super) fn texture(&self, class: usize, style: usize) -> &Texture {
        &self.0[(class % CLASSES.len()) * STYLES + style % STYLES]
    }
}

fn halved(fine: &[[f32; 4]], side: usize) -> Texture {
    let mut texels = vec![[0.0; 4]; side * side];
    for (i, texel) in texels.iter_mut().enumerate() {
        let (x, y) = (2 * (i % side), 2 * (i / side));
        for (dx, dy) in [(0, 0), (1, 0), (0, 1), (1, 1)] {
            if let Some(part) = fine.get((y + dy) * 2 * side + x + dx) {
                for (sum, p) in texel.iter_mut().zip(part) {
                    *sum += 0.25 * p;
                }
            }
        }
    }
    Texture { side, texels }
}

fn sign(pen: &mut Pen, class: usize, style: &Style) {
    let (ink, weight, glyph) = (style.ink, style.weight, style.glyph);
    match CLASSES[class] {
        "stop" => {
            let octagon = |r: f32| -> Vec<Point> {
                (0..8).map(|i| polar(r, 22.5 + 45.0 * i as f32)).collect()
            };
            pen.plate(WHITE, 0.03, &octagon(0.97));
            pen.plate(style.red, 0.03, &octagon(0.97 - 0.4 * style.border));
            glyphs::write(
                pen,
                WHITE,
                "STOP",
                (0.0, 0.0),
                (0.26 * glyph, 0.52 * glyph),
                0.115 * weight,
            );
        }
        "yield" => {
            pen.plate(
                style.red,
                0.1,
                &[(-0.88, -0.68), (0.88, -0.68), (0.0, 0.86)],
            );
            let inset = 1.0 - 2.2 * style.border;
            pen.plate(
                style.ground,
                0.04,
                &[
                    (-0.88 * inset, -0.6 * inset - 0.04),
                    (0.88 * inset, -0.6 * inset - 0.04),
                    (0.0, 0.9 * inset - 0.04),
                ],
            );
        }
        "no-entry" => {
            pen.fill(WHITE, 1.0, circle(0.0, 0.0, 1.0));
            pen.fill(style.red, 1.0, circle(0.0, 0.0, 0.95));
            pen.fill(
                WHITE,
                1.0,
                rect(-0.7 * glyph, -0.2 * weight, 0.7 * glyph, 0.2 * weight),
            );
        }
        "priority-road" => {
            let diamond = |r: f32| [(0.0, -r), (r, 0.0), (0.0, r), (-r, 0.0)];
            pen.plate(ink, 0.05, &diamond(0.95));
            pen.plate(WHITE, 0.04, &diamond(0.92));
            pen.plate(style.amber, 0.04, &diamond(0.88 - 1.4 * style.border));
        }
        "speed-30" => limit(pen, style, "30"),
        "speed-50" => limit(pen, style, "50"),
        "speed-80" => limit(pen, style, "80"),
        "no-overtaking" => {
            ban(pen, style);
            glyphs::car(pen, style.red, style.ground, (-0.32, 0.0), 1.05 * glyph);
            glyphs::car(pen, ink, style.ground, (0.32, 0.0), 1.05 * glyph);
        }
        "roundabout" => {
            order(pen, style);
            glyphs::circulating(pen, WHITE, 0.5 * glyph, 0.17 * weight);
        }
        "turn-left" => turn(pen, style, -1.0),
        "turn-right" => turn(pen, style, 1.0),
        "ahead-only" => {
            order(pen, style);
            glyphs::arrow(
                pen,
                WHITE,
                &[(0.0, 0.66 * glyph), (0.0, -0.22 * glyph)],
                0.22 * weight,
                0.4,
            );
        }
        "pedestrian-crossing" => {
            pen.plate(
                WHITE,
                0.08,
                &[(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)],
            );
            pen.plate(
                style.blue,
                0.08,
                &[(-0.76, -0.76), (0.76, -0.76), (0.76, 0.76), (-0.76, 0.76)],
            );
            pen.plate(WHITE, 0.03, &[(0.0, -0.62), (0.66, 0.54), (-0.66, 0.54)]);
            glyphs::walker(pen, ink, (0.0, 0.1), 0.68 * glyph, weight, 1.2);
            for x in [-0.3, -0.1, 0.1, 0.3] {
                pen.fill(ink, 1.0, rect(x - 0.05, 0.45, x + 0.05, 0.54));
            }
        }
        "danger" => {
            warn(pen, style);
            pen.stroke(
                ink,
                0.2 * weight,
                super::pen::polyline(&[(0.0, -0.22), (0.0, 0.16)]),
            );
            pen.fill(ink, 1.0, circle(0.0, 0.46, 0.12 * weight));
        }
        "children" => {
            warn(pen, style);
            glyphs::walker(pen, ink, (-0.15, 0.15), 0.88 * glyph, weight, 1.4);
            glyphs::walker(pen, ink, (0.29, 0.27), 0.64 * glyph, weight * 1.1, 1.5);
        }
        "roadworks" => {
            warn(pen, style);
            glyphs::digger(pen, ink, (-0.06, 0.15), 0.92 * glyph, weight);
        }
        "deer-crossing" => {
            warn(pen, style);
            glyphs::deer(pen, ink, (-0.02, 0.24), 0.82 * glyph, weight);
        }
        _ => {
            ban(pen, style);
            glyphs::scooter(pen, ink, (0.02, 0.02), 0.88 * glyph, weight);
        }
    }
}

fn polar(r: f32, degrees: f32) -> Point {
    (
        r * degrees.to_radians().cos(),
        r * degrees.to_radians().sin(),
    )
}

/// A red ring: what it holds is forbidden.
fn ban(pen: &mut Pen, style: &Style) {
    pen.fill(WHITE, 1.0, circle(0.0, 0.0, 1.0));
    pen.fill(style.red, 1.0, circle(0.0, 0.0, 0.97));
    pen.fill(style.ground, 1.0, circle(0.0, 0.0, 0.97 - style.border));
}

fn limit(pen: &mut Pen, style: &Style, digits: &str) {
    ban(pen, style);
    let size = (0.43 * style.glyph, 0.84 * style.glyph);
    glyphs::write(
        pen,
        style.ink,
        digits,
        (0.0, 0.0),
        size,
        0.165 * style.weight,
    );
}

/// A blue disc: what it shows must be done.
fn order(pen: &mut Pen, style: &Style) {
    pen.fill(WHITE, 1.0, circle(0.0, 0.0, 1.0));
    pen.fill(style.blue, 1.0, circle(0.0, 0.0, 0.94));
}

/// Straight on, then to a side (−1 left, +1 right).
fn turn(pen: &mut Pen, style: &Style, side: f32) {
    order(pen, style);
    let (corner, r) = (-0.12, 0.24);
    let mut shaft = vec![
        (-0.34 * side, 0.6 * style.glyph),
        (-0.34 * side, corner + r),
    ];
    let bend = if side > 0.0 {
        arc(-0.34 + r, corner + r, r, 180.0, 270.0)
    } else {
        arc(0.34 - r, corner + r, r, 0.0, -90.0)
    };
    shaft.extend(bend);
    shaft.push((0.22 * side * style.glyph, corner));
    glyphs::arrow(pen, WHITE, &shaft, 0.21 * style.weight, 0.36);
}

/// An upright triangle with a red border: it warns.
fn warn(pen: &mut Pen, style: &Style) {
    pen.plate(style.red, 0.1, &[(0.0, -0.86), (0.88, 0.68), (-0.88, 0.68)]);
    let inset = 1.0 - 2.0 * style.border;
    pen.plate(
        style.ground,
        0.04,
        &[
            (0.0, -0.9 * inset + 0.03),
            (0.9 * inset, 0.6 * inset + 0.06),
            (-0.9 * inset, 0.6 * inset + 0.06),
        ],
    );
}
