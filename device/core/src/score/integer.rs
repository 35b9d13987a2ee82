//! Relative Mahalanobis distance in whole numbers, for machines without a floating-point unit and
//! for results that are the same to the bit on every machine by construction.
//!
//! The shared directions of the two distances cancel. In the basis that whitens the spread within
//! classes and makes the spread between them diagonal (Fisher's discriminants), with λᵢ the spread
//! between classes along i, only r ≤ K − 1 directions are left:
//!
//! minₖ Σᵢ (tᵢ − mₖᵢ)² − tᵢ²/(1 + λᵢ),  t = P·x − o,
//!
//! which is the distance of [`super::mahalanobis`] exactly. P and the means are kept as i8 with a
//! multiplier for each row.
//!
//! Byte form, little endian, behind the `f32` values of the parameters: shift F `u8`; multipliers
//! of the rows of P `i32` × r, offsets o `i32` × r, gains 2¹⁶/(1 + λ) `i32` × r; multipliers of the
//! means `i32` × K (−1: the class has no mean); P `i8` × r·d by rows; means `i8` × K·r by rows.

use crate::params::{Params, ParamsError, Shape};

/// Binary digits behind the point of t, o and the means.
pub const FRACTION: u32 = 12;
/// Binary digits behind the point of the gains.
pub const GAIN: u32 = 16;
/// Binary digits behind the point of the means' multipliers.
pub const MEAN: u32 = 20;
/// Multiplier of a class that has no mean.
pub const ABSENT: i32 = -1;
/// Largest shift F.
pub const MAX_SHIFT: u8 = 40;

/// The integer form, borrowed from the bytes of the parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Integer<'a> {
    dim: usize,
    rank: usize,
    shift: u8,
    scales: &'a [u8],
    offsets: &'a [u8],
    gains: &'a [u8],
    mean_scales: &'a [u8],
    rows: &'a [u8],
    means: &'a [u8],
}

/// Length of the byte form.
pub(crate) const fn encoded_len(classes: usize, dim: usize, rank: usize) -> usize {
    if rank == 0 {
        return 0;
    }
    1 + 4 * (3 * rank + classes) + rank * dim + classes * rank
}

impl<'a> Integer<'a> {
    /// Finds the integer form in the bytes of score parameters; `None` if they have none.
    ///
    /// # Errors
    /// [`ParamsError`] if the bytes are not score parameters, or F is over [`MAX_SHIFT`].
    pub fn parse(bytes: &'a [u8]) -> Result<Option<Self>, ParamsError> {
        let shape = Params::shape_of(bytes)?;
        let Shape {
            classes, dim, rank, ..
        } = shape;
        let (classes, dim, rank) = (usize::from(classes), usize::from(dim), usize::from(rank));
        if rank == 0 {
            return Ok(None);
        }
        let mut rest = &bytes[bytes.len() - encoded_len(classes, dim, rank)..];
        let mut take = |len: usize| {
            let (part, left) = rest.split_at(len);
            rest = left;
            part
        };
        let shift = take(1)[0];
        if shift > MAX_SHIFT {
            return Err(ParamsError::Shift(shift));
        }
        Ok(Some(Self {
            dim,
            rank,
            shift,
            scales: take(4 * rank),
            offsets: take(4 * rank),
            gains: take(4 * rank),
            mean_scales: take(4 * classes),
            rows: take(rank * dim),
            means: take(classes * rank),
        }))
    }

    /// Number of directions r; the scratch that [`Integer::novelty`] needs.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// The distance, in units of 2⁻¹², of an embedding that is quantised with any scale
    /// ([`super::quantise`]): only its direction counts. Higher is less familiar; what leaves the
    /// range of i32 saturates.
    ///
    /// `None` if `embedding` has not d values, `scratch` less than r, or no class has a mean.
    pub fn novelty(&self, embedding: &[i8], scratch: &mut [i32]) -> Option<i32> {
        if embedding.len() != self.dim || scratch.len() < self.rank {
            return None;
        }
        let square: u32 = embedding
            .iter()
            .map(|&x| u32::from(x.unsigned_abs()).pow(2))
            .sum();
        // ‖e‖ with 8 binary digits behind the point; an embedding of zeros stays one.
        let length = i64::from((u64::from(square) << 16).isqrt().max(1) as u32);
        let t = &mut scratch[..self.rank];
        let rows = self.rows.chunks_exact(self.dim);
        let row_numbers = words(self.scales).zip(words(self.offsets));
        for ((t, row), (scale, offset)) in t.iter_mut().zip(rows).zip(row_numbers) {
            let sum: i32 = row
                .iter()
                .zip(embedding)
                .map(|(&p, &x)| i32::from(p.cast_signed()) * i32::from(x))
                .sum();
            let scaled = (i64::from(sum) * i64::from(scale)).saturating_mul(1 << 8) / length;
            let value = (scaled >> self.shift) - i64::from(offset);
            *t = value.clamp(-MOST, MOST) as i32;
        }
        let background: i64 = t
            .iter()
            .zip(words(self.gains))
            .map(|(&t, gain)| {
                let gain = i64::from(gain.clamp(0, 1 << GAIN));
                (i64::from(t) * i64::from(t) * gain) >> GAIN
            })
            .sum();
        let means = self.means.chunks_exact(self.rank);
        let nearest = means
            .zip(words(self.mean_scales))
            .filter(|(_, scale)| *scale != ABSENT)
            .map(|(mean, scale)| {
                t.iter()
                    .zip(mean)
                    .map(|(&t, &m)| {
                        let product = i64::from(m.cast_signed()) * i64::from(scale);
                        let apart = i64::from(t) - (product >> (MEAN - FRACTION));
                        let apart = apart.clamp(-2 * MOST, 2 * MOST);
                        apart * apart
                    })
                    .sum::<i64>()
            })
            .min()?;
        let relative = (nearest - background) >> FRACTION;
        Some(relative.clamp(i64::from(i32::MIN), i64::from(i32::MAX)) as i32)
    }
}

/// Largest |t|: 2¹¹ in real terms, so that t² with a gain, and 1,024 squares of 2·t, fit i64.
const MOST: i64 = 1 << (FRACTION + 11);

fn words(bytes: &[u8]) -> impl Iterator<Item = i32> {
    bytes
        .chunks_exact(4)
        .map(|b| i32::from_le_bytes([b[0], b[1], b[2], b[3]]))
}
