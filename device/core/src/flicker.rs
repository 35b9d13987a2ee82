//! Whether the model contradicts itself from frame to frame: one thing in view, two answers. Such
//! frames are worth a label whatever their confidence.

use crate::sketch::near;

/// Watches the answers of one stream.
///
/// A frame flickers if its class differs from the last frame's although the embedding hardly
/// turned ([`near`]), or if it returns to the class of the frame before the last (A-B-A) while
/// the embedding is near to that one's. Without signatures only A-B-A counts.
#[derive(Clone, Copy, Debug, Default)]
pub struct Flicker {
    last: Option<Seen>,
    before: Option<Seen>,
}

#[derive(Clone, Copy, Debug)]
struct Seen {
    class: u16,
    signature: Option<u64>,
}

impl Seen {
    /// Whether both have signatures that are near; `unknown` if one has none.
    fn near(self, other: Self, unknown: bool) -> bool {
        match (self.signature, other.signature) {
            (Some(a), Some(b)) => near(a, b),
            _ => unknown,
        }
    }
}

impl Flicker {
    /// Takes the answer on the next frame of the stream; true if it flickers.
    pub fn observe(&mut self, top1: u16, signature: Option<u64>) -> bool {
        let now = Seen {
            class: top1,
            signature,
        };
        let (last, before) = (self.last, self.before);
        self.before = last;
        self.last = Some(now);
        let Some(last) = last.filter(|last| last.class != top1) else {
            return false;
        };
        now.near(last, false)
            || before.is_some_and(|before| before.class == top1 && now.near(before, true))
    }

    /// Forgets the past: the stream was cut (another source, another model, skipped frames).
    pub fn reset(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(frames: &[(u16, Option<u64>)]) -> std::vec::Vec<bool> {
        let mut flicker = Flicker::default();
        frames
            .iter()
            .map(|&(class, signature)| flicker.observe(class, signature))
            .collect()
    }

    #[test]
    fn a_change_without_a_turn_flickers_and_a_new_thing_does_not() {
        let (here, nudged, elsewhere) = (Some(0), Some(0b111), Some(u64::MAX));
        assert_eq!(
            run(&[(1, here), (1, nudged), (2, here), (2, here), (3, elsewhere)]),
            [false, false, true, false, false]
        );
    }

    #[test]
    fn there_and_back_flickers() {
        assert_eq!(
            run(&[(1, None), (2, None), (1, None), (1, None), (2, None)]),
            [false, false, true, false, false]
        );
        // Back to the class but at another thing: two tracks, no contradiction.
        assert_eq!(
            run(&[(1, Some(0)), (2, Some(u64::MAX)), (1, Some(0xFFFF_FFFF))]),
            [false, false, false]
        );
        assert_eq!(
            run(&[(1, Some(0)), (2, Some(u64::MAX)), (1, Some(1))]),
            [false, false, true]
        );
    }

    #[test]
    fn a_cut_forgets() {
        let mut flicker = Flicker::default();
        flicker.observe(1, Some(0));
        flicker.reset();
        assert!(!flicker.observe(2, Some(0)));
    }
}
