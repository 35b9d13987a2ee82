//! The parameters of [`crate::score`] and their byte form, the part
//! [`PartKind::Scores`](flywheel_shared::trust::PartKind::Scores) of a model package.
//!
//! They stand apart from the scoring itself because two programs meet here: the cloud computes and
//! writes them, devices of any age read them. All numbers lie in one run of `f32`, so that a device
//! needs a single buffer for them.
//!
//! Byte form, little endian: `FWSP`, version `u16`, classes `u16` (K), dim `u16` (d), table `u16`
//! (m); from version 2 also flags `u16` (1: head), prototypes `u16` (P), rank `u16` (r); then the
//! `f32` values in the order of [`Layout`], then the integer form ([`crate::score::integer`]) if
//! r > 0. Nothing follows. Parameters without any of the optional sections are written as version
//! 1, which older devices read.

use core::fmt;
use core::ops::Range;

/// First bytes of the byte form.
pub const MAGIC: [u8; 4] = *b"FWSP";
/// Newest version of the byte form that this code reads and writes; it also reads and writes 1.
pub const VERSION: u16 = 2;
/// Bytes in front of the values in version 1.
pub const HEADER: usize = 12;
/// Bytes in front of the values in version 2.
pub const HEADER_2: usize = 18;
/// Flag of the head section.
const HEAD: u16 = 1;
/// Most classes, embedding values and table knots; it bounds what a damaged header can ask for.
pub const MAX_SIDE: u16 = 1024;

/// The sizes that everything else follows from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Number of logits, 1 to [`MAX_SIDE`].
    pub classes: u16,
    /// Number of embedding values, 0 (no embedding) to [`MAX_SIDE`].
    pub dim: u16,
    /// Knots in each conformal table, 2 to [`MAX_SIDE`].
    pub table: u16,
    /// Whether the head's section is there, which needs an embedding; see [`Layout::head_mean`].
    pub head: bool,
    /// P: number of prototypes, 0 (no section) to [`MAX_SIDE`]; they need an embedding.
    pub prototypes: u16,
    /// r: directions of the integer form, 0 (no section) to d.
    pub rank: u16,
}

/// Where each parameter lies in the run of `f32`. Parts about the embedding are empty if d = 0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Temperature T > 0 that logits are divided by.
    pub temperature: usize,
    /// Number n ≥ 1 of held-out items behind the tables.
    pub calibrated: usize,
    /// K: training items of each class; a class with 0 has no mean and is left out.
    pub counts: Range<usize>,
    /// d: mean of the class means of embeddings at unit length ([`crate::score::normalise`]),
    /// subtracted before either whitening.
    pub centre: Range<usize>,
    /// d(d+1)/2: lower triangle by rows of the whitening within classes, the inverse of the
    /// Cholesky factor of the shared class-conditional covariance.
    pub within: Range<usize>,
    /// d(d+1)/2: the same for the background, whose covariance ignores classes.
    pub background: Range<usize>,
    /// K × d: class means, centred and whitened by `within`.
    pub means: Range<usize>,
    /// m ascending knots of −margin; see [`crate::score::conformal`].
    pub unsure: Range<usize>,
    /// m ascending knots of novelty.
    pub novel: Range<usize>,
    /// d: mean of the raw training embeddings; empty without the head's section.
    pub head_mean: Range<usize>,
    /// K(K−1)/2: 1/‖wₐ − w_b‖ of the head's weights of each pair of classes, in the order of
    /// [`crate::score::boundary::pair`]; 0 where they are equal. Empty without the head's section.
    pub head_inverse: Range<usize>,
    /// P × d: prototypes at unit length.
    pub prototypes: Range<usize>,
    /// m ascending knots of the distance to the nearest prototype; empty without prototypes.
    pub near: Range<usize>,
    /// m ascending knots of [`crate::score::fused`]; empty without prototypes.
    pub fused: Range<usize>,
}

impl Shape {
    /// The sizes of parameters without optional sections.
    pub const fn plain(classes: u16, dim: u16, table: u16) -> Self {
        Self {
            classes,
            dim,
            table,
            head: false,
            prototypes: 0,
            rank: 0,
        }
    }

    /// Checks the sizes against their limits.
    pub fn check(self) -> Result<Self, ParamsError> {
        let fits = (1..=MAX_SIDE).contains(&self.classes)
            && self.dim <= MAX_SIDE
            && (2..=MAX_SIDE).contains(&self.table)
            && self.prototypes <= MAX_SIDE
            && self.rank <= self.dim
            && (self.dim > 0 || (!self.head && self.prototypes == 0));
        if fits {
            Ok(self)
        } else {
            Err(ParamsError::Shape(self))
        }
    }

    /// Where each parameter lies.
    pub fn layout(self) -> Layout {
        let (k, d, m, p) = (
            usize::from(self.classes),
            usize::from(self.dim),
            usize::from(self.table),
            usize::from(self.prototypes),
        );
        let head = usize::from(self.head);
        let near = if p > 0 { m } else { 0 };
        let triangle = d * (d + 1) / 2;
        let mut end = 2;
        let mut next = |len: usize| {
            let range = end..end + len;
            end += len;
            range
        };
        Layout {
            temperature: 0,
            calibrated: 1,
            counts: next(k),
            centre: next(d),
            within: next(triangle),
            background: next(triangle),
            means: next(k * d),
            unsure: next(m),
            novel: next(m),
            head_mean: next(head * d),
            head_inverse: next(head * (k * (k - 1) / 2)),
            prototypes: next(p * d),
            near: next(near),
            fused: next(near),
        }
    }

    /// Number of `f32` values.
    pub fn values(self) -> usize {
        self.layout().fused.end
    }

    /// The oldest version of the byte form that holds it.
    pub fn version(self) -> u16 {
        if self == Self::plain(self.classes, self.dim, self.table) {
            1
        } else {
            2
        }
    }

    /// Bytes in front of the values.
    pub fn header(self) -> usize {
        if self.version() == 1 {
            HEADER
        } else {
            HEADER_2
        }
    }

    /// Length of the byte form up to the integer form.
    pub fn front_len(self) -> usize {
        self.header() + 4 * self.values()
    }

    /// Length of the integer form; 0 without it.
    pub fn integer_len(self) -> usize {
        let [k, d, r] = [self.classes, self.dim, self.rank].map(usize::from);
        crate::score::integer::encoded_len(k, d, r)
    }

    /// Length of the whole byte form.
    pub fn encoded_len(self) -> usize {
        self.front_len() + self.integer_len()
    }

    /// Length of the scratch buffer, in `f32` values, that [`crate::score::score`] needs: 2·d.
    pub fn scratch(self) -> usize {
        2 * usize::from(self.dim)
    }
}

/// Why bytes or values are not score parameters.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum ParamsError {
    /// The bytes do not begin with the header of score parameters.
    Magic,
    /// Another version of the byte form.
    Version(u16),
    /// Sizes out of their limits.
    Shape(Shape),
    /// A wrong number of bytes (byte form) or values (view).
    Length {
        /// What the shape asks for.
        expected: usize,
        /// What is there.
        found: usize,
    },
    /// The caller's buffer is too small.
    Buffer {
        /// What it must hold.
        expected: usize,
        /// What it holds.
        found: usize,
    },
    /// The shift of the integer form is over its limit.
    Shift(u8),
    /// Flags of sections that this program does not know.
    Flags(u16),
    /// A value is NaN or infinite.
    NotFinite {
        /// Its position in the run of values.
        index: usize,
    },
    /// The temperature is not greater than 0, or no item was calibrated on, or a count or an
    /// inverse distance is negative.
    Range {
        /// Its position in the run of values.
        index: usize,
    },
    /// A conformal table does not ascend.
    Table {
        /// Position of the first knot that is smaller than the one before it.
        index: usize,
    },
}

impl fmt::Display for ParamsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Magic => f.write_str("the bytes are not score parameters (no FWSP header)"),
            Self::Version(found) => write!(
                f,
                "score parameters of version {found}; this program reads versions 1 to {VERSION}"
            ),
            Self::Shift(found) => write!(
                f,
                "the integer form's shift is {found}; at most {} is possible",
                crate::score::integer::MAX_SHIFT
            ),
            Self::Flags(found) => write!(
                f,
                "score parameters with unknown sections (flags {found:#06x}); update this program"
            ),
            Self::Shape(Shape {
                classes,
                dim,
                table,
                prototypes,
                rank,
                ..
            }) => write!(
                f,
                "sizes out of range: {classes} classes, {dim} embedding values, {table} knots \
                 (limits 1..={MAX_SIDE}, 0..={MAX_SIDE}, 2..={MAX_SIDE}), {prototypes} prototypes, \
                 {rank} directions, the last two only with an embedding"
            ),
            Self::Length { expected, found } => {
                write!(f, "the length is {found} where {expected} is needed")
            }
            Self::Buffer { expected, found } => {
                write!(f, "the buffer holds {found} where {expected} are needed")
            }
            Self::NotFinite { index } => write!(f, "value {index} is not a finite number"),
            Self::Range { index } => write!(f, "value {index} is out of its range"),
            Self::Table { index } => write!(f, "the table does not ascend at value {index}"),
        }
    }
}

impl core::error::Error for ParamsError {}

/// Score parameters over values that the caller owns.
///
/// Keep the [`Shape`] and the values, and make a view per frame: that costs a few comparisons.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Params<'a> {
    shape: Shape,
    values: &'a [f32],
}

impl<'a> Params<'a> {
    /// Reads the shape from the byte form and checks that the length fits it.
    pub fn shape_of(bytes: &[u8]) -> Result<Shape, ParamsError> {
        let Some((head, rest)) = bytes.split_first_chunk::<HEADER>() else {
            return Err(ParamsError::Magic);
        };
        let [m0, m1, m2, m3, v0, v1, k0, k1, d0, d1, t0, t1] = *head;
        if [m0, m1, m2, m3] != MAGIC {
            return Err(ParamsError::Magic);
        }
        let mut shape = Shape::plain(
            u16::from_le_bytes([k0, k1]),
            u16::from_le_bytes([d0, d1]),
            u16::from_le_bytes([t0, t1]),
        );
        let version = u16::from_le_bytes([v0, v1]);
        match version {
            1 => {}
            2 => {
                let Some(&[f0, f1, p0, p1, r0, r1]) = rest.first_chunk() else {
                    return Err(ParamsError::Magic);
                };
                let flags = u16::from_le_bytes([f0, f1]);
                if flags & !HEAD != 0 {
                    return Err(ParamsError::Flags(flags));
                }
                shape.head = flags & HEAD != 0;
                shape.prototypes = u16::from_le_bytes([p0, p1]);
                shape.rank = u16::from_le_bytes([r0, r1]);
            }
            other => return Err(ParamsError::Version(other)),
        }
        let shape = shape.check()?;
        // One spelling for each content: version 2 only where version 1 can't hold it.
        if version != shape.version() {
            return Err(ParamsError::Version(version));
        }
        if bytes.len() != shape.encoded_len() {
            return Err(ParamsError::Length {
                expected: shape.encoded_len(),
                found: bytes.len(),
            });
        }
        Ok(shape)
    }

    /// Number of `f32` values that [`Params::parse`] writes for these bytes.
    pub fn len_f32(bytes: &[u8]) -> Result<usize, ParamsError> {
        Self::shape_of(bytes).map(Shape::values)
    }

    /// Reads the byte form into the first [`Params::len_f32`] values of `out` and checks every
    /// one of them.
    pub fn parse(bytes: &[u8], out: &'a mut [f32]) -> Result<Self, ParamsError> {
        let shape = Self::shape_of(bytes)?;
        let (expected, found) = (shape.values(), out.len());
        let Some(values) = out.get_mut(..expected) else {
            return Err(ParamsError::Buffer { expected, found });
        };
        for (value, raw) in values
            .iter_mut()
            .zip(bytes[shape.header()..].chunks_exact(4))
        {
            *value = f32::from_le_bytes([raw[0], raw[1], raw[2], raw[3]]);
        }
        Self::checked(shape, values)
    }

    /// A view over values, every one of them checked.
    pub fn checked(shape: Shape, values: &'a [f32]) -> Result<Self, ParamsError> {
        let params = Self::view(shape, values)?;
        if let Some(index) = values.iter().position(|value| !value.is_finite()) {
            return Err(ParamsError::NotFinite { index });
        }
        let layout = shape.layout();
        if let Some(at) = params.counts().iter().position(|&count| count < 0.0) {
            return Err(ParamsError::Range {
                index: layout.counts.start + at,
            });
        }
        let inverse = &values[layout.head_inverse.clone()];
        if let Some(at) = inverse.iter().position(|&inverse| inverse < 0.0) {
            return Err(ParamsError::Range {
                index: layout.head_inverse.start + at,
            });
        }
        for table in [layout.unsure, layout.novel, layout.near, layout.fused] {
            let falls = |pair: &[f32]| pair[0] > pair[1];
            if let Some(at) = values[table.clone()].windows(2).position(falls) {
                return Err(ParamsError::Table {
                    index: table.start + at + 1,
                });
            }
        }
        Ok(params)
    }

    /// A view over values that were checked before, when they were parsed: looks at their number,
    /// the temperature and the calibration count only.
    pub fn view(shape: Shape, values: &'a [f32]) -> Result<Self, ParamsError> {
        let expected = shape.check()?.values();
        if values.len() != expected {
            return Err(ParamsError::Length {
                expected,
                found: values.len(),
            });
        }
        let params = Self { shape, values };
        for (index, legal) in [
            (0, params.temperature() > 0.0),
            (1, params.calibrated() >= 1.0),
        ] {
            if !values[index].is_finite() {
                return Err(ParamsError::NotFinite { index });
            }
            if !legal {
                return Err(ParamsError::Range { index });
            }
        }
        Ok(params)
    }

    /// Writes the byte form, but for the integer form, into the front of `out`; returns its length,
    /// [`Shape::front_len`].
    pub fn encode(&self, out: &mut [u8]) -> Result<usize, ParamsError> {
        let shape = self.shape;
        let (expected, found) = (shape.front_len(), out.len());
        let Some(out) = out.get_mut(..expected) else {
            return Err(ParamsError::Buffer { expected, found });
        };
        let (head, body) = out.split_at_mut(shape.header());
        head[..4].copy_from_slice(&MAGIC);
        let words = [
            shape.version(),
            shape.classes,
            shape.dim,
            shape.table,
            if shape.head { HEAD } else { 0 },
            shape.prototypes,
            shape.rank,
        ];
        for (place, word) in head[4..].chunks_exact_mut(2).zip(words) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        for (place, value) in body.chunks_exact_mut(4).zip(self.values) {
            place.copy_from_slice(&value.to_le_bytes());
        }
        Ok(expected)
    }

    /// The sizes.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// T.
    pub fn temperature(&self) -> f32 {
        self.values[0]
    }

    /// Number of held-out items behind the tables.
    pub fn calibrated(&self) -> f32 {
        self.values[1]
    }

    /// Training items of each class, K values.
    pub fn counts(&self) -> &'a [f32] {
        &self.values[self.shape.layout().counts]
    }

    /// Mean of the class means, d values.
    pub fn centre(&self) -> &'a [f32] {
        &self.values[self.shape.layout().centre]
    }

    /// Mean of the raw training embeddings (d values), and [`Layout::head_inverse`]; `None` without
    /// the head's section.
    pub fn head(&self) -> Option<(&'a [f32], &'a [f32])> {
        let layout = self.shape.layout();
        let values = self.values;
        self.shape
            .head
            .then(|| (&values[layout.head_mean], &values[layout.head_inverse]))
    }

    /// Prototypes at unit length, P × d values; empty without their section.
    pub fn prototypes(&self) -> &'a [f32] {
        &self.values[self.shape.layout().prototypes]
    }

    /// All values, for [`Layout`].
    pub fn values(&self) -> &'a [f32] {
        self.values
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::score::integer::Integer;
    use proptest::prelude::*;
    use std::vec;
    use std::vec::Vec;

    fn sample(shape: Shape) -> Vec<f32> {
        let mut values: Vec<f32> = (0..shape.values()).map(|i| i as f32 * 0.25).collect();
        values[0] = 1.5;
        values[1] = 40.0;
        values
    }

    proptest! {
        #[test]
        fn round_trip_and_no_prefix_is_accepted(
            (classes, dim, table) in (1u16..9, 0u16..9, 2u16..9),
            (head, prototypes, rank) in (any::<bool>(), 0u16..5, 0u16..9),
            cut in any::<prop::sample::Index>(),
        ) {
            let shape = Shape {
                head: head && dim > 0,
                prototypes: if dim > 0 { prototypes } else { 0 },
                rank: rank.min(dim),
                ..Shape::plain(classes, dim, table)
            };
            let values = sample(shape);
            let params = Params::checked(shape, &values).unwrap();
            let mut bytes = vec![0u8; shape.encoded_len()];
            prop_assert_eq!(params.encode(&mut bytes), Ok(shape.front_len()));
            let mut out = vec![f32::NAN; Params::len_f32(&bytes).unwrap()];
            prop_assert_eq!(Params::parse(&bytes, &mut out), Ok(params));
            prop_assert!(Params::parse(&bytes[..cut.index(bytes.len())], &mut out).is_err());
            let integer = Integer::parse(&bytes).unwrap();
            prop_assert_eq!(integer.map_or(0, |integer| integer.rank()), usize::from(shape.rank));
            bytes.push(0);
            prop_assert!(Params::parse(&bytes, &mut out).is_err());
            prop_assert!(Integer::parse(&bytes).is_err());
        }

        #[test]
        fn arbitrary_bytes_never_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..200), version in 0u8..3) {
            if version > 0 && bytes.len() >= 18 {
                bytes[..6].copy_from_slice(&[b'F', b'W', b'S', b'P', version, 0]);
                for word in bytes[6..18].chunks_exact_mut(2) {
                    word[0] %= 4;
                    word[1] = 0;
                }
            }
            let mut out = vec![0.0; 64];
            let _ = Params::parse(&bytes, &mut out);
            if let Ok(Some(integer)) = Integer::parse(&bytes) {
                let mut scratch = vec![0; integer.rank()];
                let shape = Params::shape_of(&bytes).unwrap();
                let embedding = vec![-128; usize::from(shape.dim)];
                let _ = integer.novelty(&embedding, &mut scratch);
            }
        }
    }

    #[test]
    fn each_fault_is_named() {
        let shape = Shape::plain(2, 1, 3);
        let good = sample(shape);
        let with = |index: usize, value: f32| {
            let mut values = good.clone();
            values[index] = value;
            values
        };
        let novel = shape.layout().novel;
        for (values, error) in [
            (with(0, 0.0), ParamsError::Range { index: 0 }),
            (with(0, f32::NAN), ParamsError::NotFinite { index: 0 }),
            (with(1, 0.5), ParamsError::Range { index: 1 }),
            (with(2, -1.0), ParamsError::Range { index: 2 }),
            (with(4, f32::INFINITY), ParamsError::NotFinite { index: 4 }),
            (
                with(novel.start + 1, -9.0),
                ParamsError::Table {
                    index: novel.start + 1,
                },
            ),
        ] {
            assert_eq!(Params::checked(shape, &values), Err(error));
        }
        let mut bytes = vec![0u8; shape.encoded_len()];
        Params::checked(shape, &good)
            .unwrap()
            .encode(&mut bytes)
            .unwrap();
        let mut small = vec![0.0; shape.values() - 1];
        assert!(matches!(
            Params::parse(&bytes, &mut small),
            Err(ParamsError::Buffer { .. })
        ));
        bytes[4] = 9;
        assert_eq!(Params::shape_of(&bytes), Err(ParamsError::Version(9)));
        // The same content under a version that it does not need.
        bytes[4] = 2;
        bytes.splice(12..12, [0; 6]);
        assert_eq!(Params::shape_of(&bytes), Err(ParamsError::Version(2)));
        bytes[12] = 8;
        assert_eq!(Params::shape_of(&bytes), Err(ParamsError::Flags(8)));
        bytes[0] = b'X';
        assert_eq!(Params::shape_of(&bytes), Err(ParamsError::Magic));
    }
}
