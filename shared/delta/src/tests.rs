//! Whatever is encoded comes back, and whatever is decoded ends.

use super::*;
use proptest::prelude::*;

/// An ONNX file of one tensor of f32 values.
fn onnx(name: &str, values: &[f32]) -> Vec<u8> {
    fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
        let mut out = vec![number << 3 | 2];
        let mut len = bytes.len();
        while len >= 0x80 {
            out.push(len as u8 | 0x80);
            len >>= 7;
        }
        out.push(len as u8);
        out.extend_from_slice(bytes);
        out
    }
    let raw: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    let tensor = [vec![2 << 3, 1], field(8, name.as_bytes()), field(9, &raw)].concat();
    field(7, &[field(1, b"a node"), field(5, &tensor)].concat())
}

/// Values as of a trained layer, by index.
fn weight(i: u32) -> f32 {
    let x = i.wrapping_mul(0x9E37_79B9) ^ (i << 7);
    (x % 10_007) as f32 / 10_007.0 - 0.5
}

#[test]
fn small_steps_of_training_are_small_differences() {
    let base: Vec<f32> = (0..20_000).map(weight).collect();
    let tuned: Vec<f32> = base
        .iter()
        .enumerate()
        .map(|(i, w)| w * (1.0 + 1e-6 * weight(i as u32 * 3)))
        .collect();
    let (base, tuned) = (onnx("w", &base), onnx("w", &tuned));
    let (way, delta) = encode(&base, &tuned).unwrap().unwrap();
    assert_eq!(way, Way::Difference);
    assert!(
        delta.len() * 4 < tuned.len(),
        "{} of {}",
        delta.len(),
        tuned.len()
    );
    assert_eq!(apply(way, &base, &delta, tuned.len()).unwrap(), tuned);
    // Another base, or another length, is noticed or gives other bytes, and never more of them.
    assert!(apply(way, &base[1..], &delta, tuned.len()).is_err_and(|e| !e.to_string().is_empty()));
    for len in [0, 1, tuned.len() - 1, tuned.len() + 1] {
        assert!(apply(way, &base, &delta, len).is_err(), "{len}");
    }
}

#[test]
fn equal_parts_cost_next_to_nothing_and_noise_is_left_alone() {
    let part = onnx("w", &(0..5_000).map(weight).collect::<Vec<_>>());
    let (way, delta) = encode(&part, &part).unwrap().unwrap();
    assert!(delta.len() < 100, "{way:?}: {}", delta.len());
    let noise: Vec<u8> = (0..4096u32)
        .map(|i| (i.wrapping_mul(0x9E37_79B9) >> 13) as u8 ^ (i.wrapping_mul(i) >> 3) as u8)
        .collect();
    if let Some((_, delta)) = encode(&[], &noise).unwrap() {
        assert!(delta.len() < noise.len());
    }
    assert!(encode(b"base", b"").unwrap().is_none());
}

#[test]
fn a_layer_that_grew_is_patched() {
    let old: Vec<f32> = (0..5_000).map(weight).collect();
    let new: Vec<f32> = old
        .iter()
        .copied()
        .chain((0..64).map(|i| weight(i + 77_777)))
        .collect();
    let (old, new) = (onnx("w", &old), onnx("w", &new));
    let (way, delta) = encode(&old, &new).unwrap().unwrap();
    assert_eq!(way, Way::Patch);
    assert!(delta.len() < 500, "{}", delta.len());
    assert_eq!(apply(way, &old, &delta, new.len()).unwrap(), new);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn every_way_leads_back(
        base in prop::collection::vec(any::<u8>(), 0..600),
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..20),
        more in prop::collection::vec(any::<u8>(), 0..40),
    ) {
        let mut target = base.clone();
        for (at, byte) in edits {
            if !target.is_empty() {
                let at = at.index(target.len());
                target[at] = byte;
            }
        }
        for target in [target.clone(), [target, more].concat()] {
            for way in Way::ALL {
                let delta = encode_as(way, &base, &target).unwrap();
                prop_assert_eq!(apply(way, &base, &delta, target.len()).unwrap(), target.as_slice());
            }
        }
    }

    #[test]
    fn rubbish_ends_in_an_error_or_in_as_many_bytes(
        base in prop::collection::vec(any::<u8>(), 0..200),
        delta in prop::collection::vec(any::<u8>(), 0..200),
        len in 0usize..5_000,
    ) {
        for way in Way::ALL {
            if let Ok(bytes) = apply(way, &base, &delta, len) {
                prop_assert_eq!(bytes.len(), len);
            }
        }
    }

    /// Damage behind the compression, where Deflate itself sees nothing.
    #[test]
    fn damaged_tables_end_too(
        body in prop::collection::vec(prop_oneof![4 => 0u8..9, 1 => any::<u8>()], 0..60),
        rest in prop::collection::vec(any::<u8>(), 0..30),
        base in prop::collection::vec(any::<u8>(), 0..60),
        len in 0usize..200,
    ) {
        let patch = join(&pack(&body).unwrap(), &pack(&rest).unwrap());
        for (way, delta) in [
            (Way::Difference, join(&pack(&body).unwrap(), &patch)),
            (Way::Patch, patch),
        ] {
            if let Ok(bytes) = apply(way, &base, &delta, len) {
                prop_assert_eq!(bytes.len(), len);
            }
        }
    }

    #[test]
    fn a_flipped_bit_ends_too(at in any::<prop::sample::Index>(), bit in 0u8..8, way in 0usize..3) {
        let values: Vec<f32> = (0..50).map(weight).collect();
        let base = onnx("w", &values);
        let target = onnx("w", &values.iter().map(|v| v * 1.001).collect::<Vec<_>>());
        let way = Way::ALL[way];
        let mut delta = encode_as(way, &base, &target).unwrap();
        let at = at.index(delta.len());
        delta[at] ^= 1 << bit;
        if let Ok(bytes) = apply(way, &base, &delta, target.len()) {
            prop_assert_eq!(bytes.len(), target.len());
        }
    }
}
