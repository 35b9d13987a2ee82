//! What looks alike: a signature of an embedding's direction, and counts of what was sent by
//! (class, cell), in fixed memory. Both damp repeats, so that a flood of similar frames does not
//! eat the budget.

/// Bits of a signature that may differ between two frames of one thing: an angle of about
/// 22° (see [`signature`]). On `sim:roads` 68 % of the frames of one encounter are that close, and
/// 13 % of those of different encounters of one class.
pub const NEAR_BITS: u32 = 8;

/// Finaliser of SplitMix64 (Steele et al. 2014): a bijection that scatters its input.
pub(crate) const fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

/// The signs of 64 fixed random ±1 projections of `embedding`, at unit length, − `centre`
/// (SimHash, Charikar 2002): two vectors at an angle θ differ in about 64·θ/180° bits.
///
/// `centre` is [`crate::params::Params::centre`]; where it is shorter, nothing is subtracted.
/// `None` if the embedding is empty, not finite, zero, or equal to the centre. Comparable only
/// under one model.
pub fn signature(embedding: &[f32], centre: &[f32]) -> Option<u64> {
    let mut sums = [0.0f32; 64];
    let mut size = 0.0f32;
    let largest = embedding.iter().fold(0.0f32, |max, z| max.max(z.abs()));
    let square = |z: &f32| (z / largest) * (z / largest);
    let length = largest * libm::sqrtf(embedding.iter().map(square).sum());
    for (i, &z) in embedding.iter().enumerate() {
        let z = z / length - centre.get(i).copied().unwrap_or(0.0);
        size += z.abs();
        let signs = mix((i as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
        for (bit, sum) in sums.iter_mut().enumerate() {
            // The sign bit of a float is its top bit.
            let flip = ((signs >> bit) as u32 & 1) << 31;
            *sum += f32::from_bits(z.to_bits() ^ flip);
        }
    }
    if !(size > 0.0 && size.is_finite()) {
        return None;
    }
    let bits = sums.iter().enumerate();
    Some(bits.fold(0, |all, (bit, &sum)| all | (u64::from(sum > 0.0) << bit)))
}

/// The coarse cell of a signature: its first six bits, so 64 cells.
pub fn cell(signature: u64) -> u32 {
    (signature & 0x3F) as u32
}

/// Whether two signatures are within [`NEAR_BITS`] of each other.
pub fn near(a: u64, b: u64) -> bool {
    (a ^ b).count_ones() <= NEAR_BITS
}

/// A count-min sketch (Cormode & Muthukrishnan 2005) with conservative update (Estan & Varghese
/// 2002) and halving, so that old counts fade. It may count too much, never too little.
#[derive(Clone, Debug)]
pub struct Sketch<const ROWS: usize, const COLS: usize> {
    counts: [[u16; COLS]; ROWS],
    added: u32,
    half_life: u32,
}

impl<const ROWS: usize, const COLS: usize> Sketch<ROWS, COLS> {
    /// An empty sketch that halves every count after each `half_life` (at least 1) additions.
    pub const fn new(half_life: u32) -> Self {
        const { assert!(ROWS > 0 && COLS > 0, "a sketch has rows and columns") }
        Self {
            counts: [[0; COLS]; ROWS],
            added: 0,
            half_life: if half_life == 0 { 1 } else { half_life },
        }
    }

    /// How often `key` was added, fading.
    pub fn count(&self, key: u64) -> u16 {
        let cells = self.counts.iter().enumerate();
        cells
            .map(|(row, counts)| counts[Self::column(row, key)])
            .min()
            .unwrap_or(0)
    }

    /// Counts `key` once more.
    pub fn add(&mut self, key: u64) {
        let raised = self.count(key).saturating_add(1);
        for (row, counts) in self.counts.iter_mut().enumerate() {
            let count = &mut counts[Self::column(row, key)];
            *count = (*count).max(raised);
        }
        self.added += 1;
        if self.added >= self.half_life {
            self.added = 0;
            for count in self.counts.as_flattened_mut() {
                *count /= 2;
            }
        }
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        *self = Self::new(self.half_life);
    }

    fn column(row: usize, key: u64) -> usize {
        let salt = (row as u64 + 1).wrapping_mul(0xD6E8_FEB8_6659_FD93);
        (mix(key ^ salt) % COLS as u64) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;
    use std::vec::Vec;

    proptest! {
        #[test]
        fn never_counts_too_little(keys in prop::collection::vec(0u64..60, 0..400)) {
            let mut sketch = Sketch::<3, 32>::new(u32::MAX);
            let mut plain = BTreeMap::<u64, u16>::new();
            for key in keys {
                sketch.add(key);
                *plain.entry(key).or_default() += 1;
            }
            for (key, count) in plain {
                prop_assert!(sketch.count(key) >= count);
            }
        }

        /// The angle that the bits tell is the angle.
        #[test]
        fn bits_follow_the_angle(a in prop::collection::vec(-1.0f32..1.0, 48), b in prop::collection::vec(-1.0f32..1.0, 48), mixing in 0.0f32..1.0) {
            let b: Vec<f32> = a.iter().zip(&b).map(|(a, b)| a * mixing + b * (1.0 - mixing)).collect();
            let dot = |x: &[f32], y: &[f32]| x.iter().zip(y).map(|(x, y)| f64::from(x * y)).sum::<f64>();
            let cos = dot(&a, &b) / (dot(&a, &a) * dot(&b, &b)).sqrt();
            let angle = cos.clamp(-1.0, 1.0).acos().to_degrees();
            let (a, b) = (signature(&a, &[]).unwrap(), signature(&b, &[]).unwrap());
            let told = f64::from((a ^ b).count_ones()) * 180.0 / 64.0;
            // Standard deviation at 90°: √(64/4) bits = 11°.
            prop_assert!((told - angle).abs() < 55.0, "{told} {angle}");
        }
    }

    #[test]
    fn counts_are_nearly_right_and_fade() {
        let mut sketch = Sketch::<4, 256>::new(1000);
        for round in 0..9 {
            for key in 0..100 {
                sketch.add(key);
            }
            assert_eq!(sketch.count(7), round + 1);
        }
        for key in 0..100 {
            sketch.add(key);
        }
        assert_eq!(sketch.count(7), 5);
        assert_eq!(sketch.count(100_000), 0);
        sketch.clear();
        assert_eq!(sketch.count(7), 0);
    }

    #[test]
    fn alike_is_near_and_broken_has_no_signature() {
        let a: Vec<f32> = (0..64).map(|i| ((i * 37) % 11) as f32 - 5.0).collect();
        let nudged: Vec<f32> = a
            .iter()
            .enumerate()
            .map(|(i, x)| x + 0.2 * ((i % 3) as f32 - 1.0))
            .collect();
        let opposite: Vec<f32> = a.iter().map(|x| -x).collect();
        let [s, n, o] = [&a, &nudged, &opposite].map(|z| signature(z, &[]).unwrap());
        assert!(near(s, n));
        assert!(!near(s, o));
        assert!(cell(s) < 64);
        let mut unit = [0.0; 64];
        crate::score::normalise(&a, &mut unit);
        let off = signature(&a, &unit.map(|x| x * 0.5)).unwrap();
        assert!(near(off, s), "half of it points the same way");
        assert_eq!(signature(&[], &[]), None);
        assert_eq!(signature(&[f32::NAN], &[]), None);
        assert_eq!(signature(&[0.0; 3], &[]), None);
        let bright: Vec<f32> = a.iter().map(|x| x * 1e30).collect();
        assert!(near(signature(&bright, &[]).unwrap(), s));
    }
}
