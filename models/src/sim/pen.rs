//! A thin drawing pen over tiny-skia: signs, scenery and occluders are all drawn in the units of
//! their own plane (x right, y down, origin in the middle), never in pixels.

use tiny_skia::{
    FillRule, LineCap, LineJoin, Paint, Path, PathBuilder, Pixmap, Rect, Stroke, Transform,
};

/// 8-bit sRGB.
pub(super) type Rgb = [u8; 3];

/// A point in the units of the plane drawn on.
pub(super) type Point = (f32, f32);

/// A square canvas and the scale from plane units to pixels.
pub(super) struct Pen {
    pixmap: Option<Pixmap>,
    view: Transform,
}

impl Pen {
    /// A transparent canvas of `px` × `px` pixels that shows the plane from −`extent` to +`extent`.
    pub(super) fn new(px: u32, extent: f32) -> Self {
        let scale = px as f32 / (2.0 * extent);
        Self {
            // None only for a zero or absurd size, which `Roads::new` has refused.
            pixmap: Pixmap::new(px, px),
            view: Transform::from_scale(scale, scale)
                .post_translate(px as f32 / 2.0, px as f32 / 2.0),
        }
    }

    /// Fills a path; a degenerate path (None) draws nothing.
    pub(super) fn fill(&mut self, rgb: Rgb, alpha: f32, path: Option<Path>) {
        if let (Some(pixmap), Some(path)) = (self.pixmap.as_mut(), path) {
            pixmap.fill_path(
                &path,
                &paint(rgb, alpha),
                FillRule::Winding,
                self.view,
                None,
            );
        }
    }

    /// Strokes a path with round caps and joins.
    pub(super) fn stroke(&mut self, rgb: Rgb, width: f32, path: Option<Path>) {
        self.stroke_capped(rgb, width, LineCap::Round, path);
    }

    /// Strokes a path with cut-off ends, as painted bars have.
    pub(super) fn bar(&mut self, rgb: Rgb, width: f32, path: Option<Path>) {
        self.stroke_capped(rgb, width, LineCap::Butt, path);
    }

    fn stroke_capped(&mut self, rgb: Rgb, width: f32, line_cap: LineCap, path: Option<Path>) {
        if let (Some(pixmap), Some(path)) = (self.pixmap.as_mut(), path) {
            let stroke = Stroke {
                width,
                line_cap,
                line_join: LineJoin::Round,
                ..Stroke::default()
            };
            pixmap.stroke_path(&path, &paint(rgb, 1.0), &stroke, self.view, None);
        }
    }

    /// Fills a polygon and rounds its corners by `round`.
    pub(super) fn plate(&mut self, rgb: Rgb, round: f32, corners: &[Point]) {
        self.fill(rgb, 1.0, polygon(corners));
        self.stroke(rgb, 2.0 * round, polygon(corners));
    }

    /// The canvas in linear light: premultiplied RGBA, row by row.
    pub(super) fn finish(self) -> Vec<[f32; 4]> {
        let Some(pixmap) = self.pixmap else {
            return Vec::new();
        };
        pixmap
            .pixels()
            .iter()
            .map(|p| {
                let c = p.demultiply();
                let a = f32::from(c.alpha()) / 255.0;
                let [r, g, b] = linear([c.red(), c.green(), c.blue()]);
                [r * a, g * a, b * a, a]
            })
            .collect()
    }
}

fn paint(rgb: Rgb, alpha: f32) -> Paint<'static> {
    let mut paint = Paint::default();
    paint.set_color_rgba8(
        rgb[0],
        rgb[1],
        rgb[2],
        (alpha.clamp(0.0, 1.0) * 255.0) as u8,
    );
    paint
}

/// sRGB to linear light (IEC 61966-2-1), through a table.
pub(super) fn linear(rgb: Rgb) -> [f32; 3] {
    static TABLE: std::sync::LazyLock<[f32; 256]> = std::sync::LazyLock::new(|| {
        std::array::from_fn(|i| {
            let c = i as f32 / 255.0;
            if c <= 0.04045 {
                c / 12.92
            } else {
                ((c + 0.055) / 1.055).powf(2.4)
            }
        })
    });
    rgb.map(|c| TABLE[usize::from(c)])
}

pub(super) fn polyline(points: &[Point]) -> Option<Path> {
    trace(points).finish()
}

pub(super) fn polygon(points: &[Point]) -> Option<Path> {
    let mut builder = trace(points);
    builder.close();
    builder.finish()
}

fn trace(points: &[Point]) -> PathBuilder {
    let mut builder = PathBuilder::new();
    for (i, &(x, y)) in points.iter().enumerate() {
        if i == 0 {
            builder.move_to(x, y);
        } else {
            builder.line_to(x, y);
        }
    }
    builder
}

pub(super) fn circle(x: f32, y: f32, r: f32) -> Option<Path> {
    PathBuilder::from_circle(x, y, r)
}

pub(super) fn oval(x: f32, y: f32, rx: f32, ry: f32) -> Option<Path> {
    PathBuilder::from_oval(Rect::from_ltrb(x - rx, y - ry, x + rx, y + ry)?)
}

pub(super) fn rect(left: f32, top: f32, right: f32, bottom: f32) -> Option<Path> {
    Some(PathBuilder::from_rect(Rect::from_ltrb(
        left, top, right, bottom,
    )?))
}

/// Points along a circular arc, angles in degrees clockwise from the x axis.
pub(super) fn arc(x: f32, y: f32, r: f32, from: f32, to: f32) -> Vec<Point> {
    const STEPS: usize = 12;
    (0..=STEPS)
        .map(|i| {
            let a = (from + (to - from) * i as f32 / STEPS as f32).to_radians();
            (x + r * a.cos(), y + r * a.sin())
        })
        .collect()
}
