//! Test pictures for golden inputs where nobody gave any: flat areas, edges and noise, so that
//! every part of a network has something to answer to.

use flywheel_shared::spec::InputSpec;

/// A picture of the input's size and channels, u8, HWC; equal seeds give equal pictures.
pub fn draw(input: &InputSpec, seed: u64) -> Vec<u8> {
    let (width, height) = (usize::from(input.width), usize::from(input.height));
    let channels = usize::from(input.channels);
    let mut random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut noise = move || {
        // Knuth's linear congruential generator.
        random = random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (random >> 58) as usize
    };
    let tile = 4 + 3 * seed as usize;
    let mut pixels = Vec::with_capacity(width * height * channels);
    for y in 0..height {
        for x in 0..width {
            for c in 0..channels {
                let ramp = (x * 128 / width + y * 64 / height + 40 * c) % 192;
                let check = if (x / tile + y / tile + c).is_multiple_of(3) {
                    63
                } else {
                    0
                };
                pixels.push((ramp + check + noise() / 8).min(255) as u8);
            }
        }
    }
    pixels
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_seeds_give_equal_pictures_and_others_differ() {
        let input = InputSpec::new(40, 30, 3);
        assert_eq!(draw(&input, 1), draw(&input, 1));
        assert_ne!(draw(&input, 1), draw(&input, 2));
        assert_eq!(draw(&input, 0).len(), input.len());
    }
}
