//! The whole-number form of the relative Mahalanobis distance ([`device_core::score::integer`]).

use device_core::score::integer::{ABSENT, FRACTION, GAIN, MAX_SHIFT, MEAN};

use super::Gaussians;
use super::directions::{Directions, dot};

/// The byte form, which goes behind the `f32` values.
pub(super) fn encode(directions: &Directions, gaussians: &Gaussians) -> Vec<u8> {
    let Directions { rows, gains, means } = directions;
    let offsets = rows.iter().map(|row| dot(row, &gaussians.centre));
    let step = |row: &[f64]| row.iter().fold(0.0f64, |max, x| max.max(x.abs())) / 127.0;
    let largest = rows.iter().map(|row| step(row)).fold(0.0, f64::max);
    let one = f64::from(1u32 << FRACTION);
    // The largest multiplier fills 30 bits.
    let shift = (30.0 - (largest * one).log2())
        .floor()
        .clamp(0.0, f64::from(MAX_SHIFT));
    let word =
        |x: f64| (x.round().clamp(f64::from(i32::MIN), f64::from(i32::MAX)) as i32).to_le_bytes();
    let code = |x: f64, step: f64| {
        let code = if step > 0.0 { (x / step).round() } else { 0.0 };
        (code.clamp(-127.0, 127.0) as i8).cast_unsigned()
    };
    let mut bytes = vec![shift as u8];
    bytes.extend(
        rows.iter()
            .flat_map(|row| word(step(row) * one * shift.exp2())),
    );
    bytes.extend(offsets.flat_map(|offset| word(offset * one)));
    let gain = |gain: &f64| word(f64::from(1u32 << GAIN) * gain);
    bytes.extend(gains.iter().flat_map(gain));
    for (mean, present) in means.iter().zip(&gaussians.present) {
        bytes.extend(if *present {
            word(step(mean) * f64::from(1u32 << MEAN))
        } else {
            ABSENT.to_le_bytes()
        });
    }
    for row in rows.iter().chain(means) {
        bytes.extend(row.iter().map(|&x| code(x, step(row))));
    }
    bytes
}
