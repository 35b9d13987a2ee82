//! What stands on the signs: digits and letters as strokes, people, vehicles, a deer, arrows.

use super::pen::{Pen, Point, Rgb, arc, circle, oval, polygon, polyline, rect};
use tiny_skia::{Path, PathBuilder, Transform};

/// Writes `text` centred on (x, y); each character is `w` × `h`, strokes `weight` wide.
/// Characters other than the digits 0, 3, 5, 8 and the letters of STOP leave a gap.
pub(super) fn write(pen: &mut Pen, rgb: Rgb, text: &str, at: Point, size: Point, weight: f32) {
    let (w, h) = size;
    let pitch = w + weight * 1.7;
    let left = at.0 - pitch * (text.chars().count() as f32 - 1.0) / 2.0 - w / 2.0;
    for (i, c) in text.chars().enumerate() {
        let place =
            Transform::from_scale(w, h).post_translate(left + pitch * i as f32, at.1 - h / 2.0);
        for path in strokes(c) {
            pen.stroke(rgb, weight, path.and_then(|p| p.transform(place)));
        }
    }
}

/// The strokes of one character in the unit box.
fn strokes(c: char) -> Vec<Option<Path>> {
    match c {
        '0' => vec![pill(0.0, 1.0)],
        '8' => vec![pill(0.0, 0.47), pill(0.47, 1.0)],
        '3' => vec![curve(
            (0.05, 0.1),
            &[
                [(0.3, -0.08), (0.95, -0.05), (0.92, 0.24)],
                [(0.9, 0.44), (0.6, 0.46), (0.4, 0.47)],
                [(0.65, 0.47), (0.98, 0.5), (0.97, 0.74)],
                [(0.96, 1.08), (0.3, 1.06), (0.02, 0.9)],
            ],
        )],
        '5' => vec![
            polyline(&[(0.9, 0.0), (0.18, 0.0), (0.1, 0.48)]),
            curve(
                (0.1, 0.48),
                &[
                    [(0.4, 0.3), (0.97, 0.36), (0.96, 0.68)],
                    [(0.95, 1.06), (0.35, 1.08), (0.02, 0.9)],
                ],
            ),
        ],
        'S' => vec![curve(
            (0.92, 0.12),
            &[
                [(0.7, -0.06), (0.08, -0.06), (0.08, 0.26)],
                [(0.08, 0.56), (0.94, 0.44), (0.94, 0.76)],
                [(0.94, 1.06), (0.3, 1.06), (0.05, 0.88)],
            ],
        )],
        'T' => vec![
            polyline(&[(0.0, 0.0), (1.0, 0.0)]),
            polyline(&[(0.5, 0.0), (0.5, 1.0)]),
        ],
        'O' => vec![pill(0.0, 1.0)],
        'P' => vec![
            polyline(&[(0.1, 1.0), (0.1, 0.0)]),
            curve((0.1, 0.0), &[[(1.15, -0.06), (1.15, 0.58), (0.1, 0.54)]]),
        ],
        _ => Vec::new(),
    }
}

fn pill(top: f32, bottom: f32) -> Option<Path> {
    oval(0.5, (top + bottom) / 2.0, 0.48, (bottom - top) / 2.0)
}

fn curve(start: Point, cubics: &[[Point; 3]]) -> Option<Path> {
    let mut builder = PathBuilder::new();
    builder.move_to(start.0, start.1);
    for [a, b, end] in cubics {
        builder.cubic_to(a.0, a.1, b.0, b.1, end.0, end.1);
    }
    builder.finish()
}

/// Maps points drawn about the origin to a place at a size.
fn placed(points: &[Point], at: Point, scale: f32) -> Vec<Point> {
    points
        .iter()
        .map(|&(x, y)| (at.0 + x * scale, at.1 + y * scale))
        .collect()
}

fn limbs(pen: &mut Pen, rgb: Rgb, at: Point, scale: f32, width: f32, lines: &[&[Point]]) {
    for line in lines {
        pen.stroke(rgb, width * scale, polyline(&placed(line, at, scale)));
    }
}

/// Somebody walking; about one unit tall at scale 1. `stride` widens the step (1 walks, 1.6 runs).
pub(super) fn walker(pen: &mut Pen, rgb: Rgb, at: Point, scale: f32, weight: f32, stride: f32) {
    pen.fill(
        rgb,
        1.0,
        circle(at.0 + 0.03 * scale, at.1 - 0.4 * scale, 0.11 * scale),
    );
    limbs(
        pen,
        rgb,
        at,
        scale,
        0.17 * weight,
        &[&[(0.0, -0.2), (-0.02, 0.1)]],
    );
    limbs(
        pen,
        rgb,
        at,
        scale,
        0.11 * weight,
        &[
            &[(-0.02, 0.1), (0.13 * stride, 0.26), (0.18 * stride, 0.5)],
            &[(-0.02, 0.1), (-0.1 * stride, 0.3), (-0.24 * stride, 0.48)],
        ],
    );
    limbs(
        pen,
        rgb,
        at,
        scale,
        0.08 * weight,
        &[
            &[(0.0, -0.22), (0.17 * stride, -0.02)],
            &[(0.0, -0.22), (-0.17 * stride, 0.0)],
        ],
    );
}

/// Somebody digging, and the heap.
pub(super) fn digger(pen: &mut Pen, rgb: Rgb, at: Point, scale: f32, weight: f32) {
    let head = placed(&[(0.0, -0.42)], at, scale)[0];
    pen.fill(rgb, 1.0, circle(head.0, head.1, 0.11 * scale));
    limbs(
        pen,
        rgb,
        at,
        scale,
        0.18 * weight,
        &[&[(-0.07, -0.2), (-0.22, 0.12)]],
    );
    limbs(
        pen,
        rgb,
        at,
        scale,
        0.12 * weight,
        &[
            &[(-0.22, 0.12), (-0.06, 0.28), (-0.12, 0.5)],
            &[(-0.22, 0.12), (-0.46, 0.5)],
        ],
    );
    limbs(
        pen,
        rgb,
        at,
        scale,
        0.08 * weight,
        &[
            &[(-0.05, -0.2), (0.16, 0.02)],
            &[(-0.1, -0.14), (0.04, 0.1)],
            &[(-0.1, -0.02), (0.36, 0.3)],
        ],
    );
    pen.fill(
        rgb,
        1.0,
        polygon(&placed(
            &[(0.14, 0.54), (0.44, 0.16), (0.72, 0.54)],
            at,
            scale,
        )),
    );
}

/// A deer in mid leap, facing right.
pub(super) fn deer(pen: &mut Pen, rgb: Rgb, at: Point, scale: f32, weight: f32) {
    let body = [
        (-0.44, 0.1),
        (-0.3, -0.08),
        (0.1, -0.16),
        (0.26, -0.44),
        (0.32, -0.5),
        (0.54, -0.36),
        (0.5, -0.3),
        (0.38, -0.3),
        (0.28, 0.06),
        (0.0, 0.12),
        (-0.3, 0.22),
    ];
    pen.fill(rgb, 1.0, polygon(&placed(&body, at, scale)));
    limbs(
        pen,
        rgb,
        at,
        scale,
        0.08 * weight,
        &[
            &[(0.22, 0.0), (0.52, 0.02), (0.56, 0.2)],
            &[(0.16, 0.06), (0.4, 0.2), (0.38, 0.36)],
            &[(-0.38, 0.1), (-0.5, 0.36), (-0.7, 0.46)],
            &[(-0.3, 0.16), (-0.36, 0.42), (-0.54, 0.54)],
            &[(-0.42, 0.04), (-0.52, 0.0)],
        ],
    );
    limbs(
        pen,
        rgb,
        at,
        scale,
        0.055 * weight,
        &[
            &[(0.3, -0.48), (0.2, -0.74)],
            &[(0.24, -0.62), (0.08, -0.66)],
            &[(0.34, -0.48), (0.42, -0.74)],
            &[(0.38, -0.62), (0.54, -0.7)],
        ],
    );
}

/// A car seen from behind, half a unit wide at scale 1.
pub(super) fn car(pen: &mut Pen, rgb: Rgb, glass: Rgb, at: Point, scale: f32) {
    let s = |points: &[Point]| placed(points, at, scale);
    pen.plate(
        rgb,
        0.03 * scale,
        &s(&[(-0.26, -0.02), (0.26, -0.02), (0.26, 0.18), (-0.26, 0.18)]),
    );
    pen.plate(
        rgb,
        0.03 * scale,
        &s(&[(-0.22, 0.0), (-0.15, -0.2), (0.15, -0.2), (0.22, 0.0)]),
    );
    pen.fill(
        glass,
        1.0,
        polygon(&s(&[
            (-0.15, -0.03),
            (-0.11, -0.15),
            (0.11, -0.15),
            (0.15, -0.03),
        ])),
    );
    for side in [-0.19, 0.19] {
        let tyre = s(&[(side - 0.06, 0.16), (side + 0.06, 0.28)]);
        pen.fill(rgb, 1.0, rect(tyre[0].0, tyre[0].1, tyre[1].0, tyre[1].1));
    }
}

/// A kick scooter from the side.
pub(super) fn scooter(pen: &mut Pen, rgb: Rgb, at: Point, scale: f32, weight: f32) {
    for x in [-0.46, 0.4] {
        let hub = placed(&[(x, 0.42)], at, scale)[0];
        pen.stroke(
            rgb,
            0.09 * weight * scale,
            circle(hub.0, hub.1, 0.13 * scale),
        );
    }
    limbs(
        pen,
        rgb,
        at,
        scale,
        0.13 * weight,
        &[&[(-0.46, 0.3), (-0.3, 0.34), (0.18, 0.34), (0.3, 0.2)]],
    );
    limbs(
        pen,
        rgb,
        at,
        scale,
        0.1 * weight,
        &[&[(0.4, 0.4), (0.16, -0.52)], &[(0.3, -0.56), (0.0, -0.5)]],
    );
}

/// An arrow along a polyline, its head (width 2 × `head`) at the last point.
pub(super) fn arrow(pen: &mut Pen, rgb: Rgb, shaft: &[Point], width: f32, head: f32) {
    let [.., from, tip] = shaft else { return };
    let (dx, dy) = (tip.0 - from.0, tip.1 - from.1);
    let length = dx.hypot(dy).max(1e-6);
    let (ux, uy) = (dx / length, dy / length);
    pen.bar(rgb, width, polyline(shaft));
    let ahead = (tip.0 + ux * head, tip.1 + uy * head);
    let left = (
        tip.0 - uy * head - ux * 0.1 * head,
        tip.1 + ux * head - uy * 0.1 * head,
    );
    let right = (
        tip.0 + uy * head - ux * 0.1 * head,
        tip.1 - ux * head - uy * 0.1 * head,
    );
    pen.fill(rgb, 1.0, polygon(&[ahead, left, right]));
}

/// Three arrows that chase each other round a circle, as before a roundabout.
pub(super) fn circulating(pen: &mut Pen, rgb: Rgb, radius: f32, width: f32) {
    for start in [30.0, 150.0, 270.0] {
        // Clockwise on screen is how traffic that keeps left goes round; this sign keeps right.
        let shaft = arc(0.0, 0.0, radius, start, start - 68.0);
        arrow(pen, rgb, &shaft, width, width * 1.25);
    }
}
