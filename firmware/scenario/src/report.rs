//! How results are printed, without the float formatting of `core`, which would take another
//! 12 KiB of flash.

use core::fmt;

/// An `f32` with five decimals, rounded half away from zero.
pub(crate) struct Fixed(pub f32);

impl fmt::Display for Fixed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.0.is_finite() {
            return f.write_str("not finite");
        }
        // 24 bits times 17 bits: exact in an f64 as long as it fits an integer.
        let scaled = (f64::from(self.0).abs() * 100_000.0 + 0.5) as u64;
        let sign = if self.0 < 0.0 && scaled > 0 { "-" } else { "" };
        write!(f, "{sign}{}.{:05}", scaled / 100_000, scaled % 100_000)
    }
}

/// FNV-1a over 32-bit words: two runs that differ in one bit of one value print different ones.
pub(crate) struct Fingerprint(u64);

impl Fingerprint {
    pub(crate) fn new() -> Self {
        Self(0xCBF2_9CE4_8422_2325)
    }

    pub(crate) fn add(&mut self, word: u32) {
        for byte in word.to_le_bytes() {
            self.0 = (self.0 ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01B3);
        }
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use std::string::ToString;

    #[test]
    fn five_decimals() {
        for (value, text) in [
            (0.0, "0.00000"),
            (-0.0, "0.00000"),
            (1.0, "1.00000"),
            (0.25, "0.25000"),
            (-2.5, "-2.50000"),
            (0.000_004, "0.00000"),
            (-0.000_004, "0.00000"),
            (0.000_006, "0.00001"),
            (1234.5, "1234.50000"),
            (f32::NAN, "not finite"),
        ] {
            assert_eq!(Fixed(value).to_string(), text, "{value}");
        }
        // Against decimal parsing, half of the last place and the parser's own rounding apart.
        for i in 0..4000u32 {
            let value = (i as f32 - 2000.0) * 0.371_93;
            let text = Fixed(value).to_string();
            let error = (text.parse::<f64>().unwrap() - f64::from(value)).abs();
            assert!(error < 0.5e-5 + 1e-9, "{text} for {value}");
            assert_eq!(text.split_once('.').map(|(_, part)| part.len()), Some(5));
        }
    }

    #[test]
    fn every_bit_counts() {
        let of = |words: [u32; 2]| {
            let mut all = Fingerprint::new();
            words.into_iter().for_each(|word| all.add(word));
            all.to_string()
        };
        assert_eq!(of([1, 2]), of([1, 2]));
        assert_ne!(of([1, 2]), of([2, 1]));
        assert_ne!(of([0, 0]), of([0, 1 << 31]));
    }
}
