//! Which values of the new part belong to which of the old one.

use crate::onnx;

/// Most runs of a difference.
pub(crate) const MAX_RUNS: usize = 1 << 16;

/// Equally many values of equal width in both parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    /// Bytes of a value: 1, 2, 4 or 8.
    pub(crate) width: usize,
    /// First byte in the old part.
    pub(crate) base: usize,
    /// First byte in the new part.
    pub(crate) target: usize,
    /// Length in bytes, a multiple of the width.
    pub(crate) len: usize,
}

/// The runs of two parts, in the order of the new one, without overlap in it.
pub(crate) fn find(base: &[u8], target: &[u8]) -> Vec<Run> {
    let old = onnx::tensors(base);
    let new = onnx::tensors(target);
    if old.is_empty() || new.is_empty() {
        // No ONNX file. Formats that are mapped into memory keep values aligned from the start of
        // the file, and two records of one network are equally long.
        return Vec::from_iter((base.len() == target.len()).then_some(Run {
            width: 4,
            base: 0,
            target: 0,
            len: target.len() / 4 * 4,
        }));
    }
    let mut runs = Vec::new();
    for tensor in new.into_iter().take(MAX_RUNS) {
        // Named alike, or unnamed in the same place.
        let same = old.iter().find(|other| {
            other.name == tensor.name && other.width == tensor.width && other.len == tensor.len
        });
        if let Some(other) = same {
            runs.push(Run {
                width: tensor.width,
                base: other.start,
                target: tensor.start,
                len: tensor.len,
            });
        }
    }
    runs
}

/// Whether all runs lie in the parts, in order and apart from each other.
pub(crate) fn fit(runs: &[Run], base: usize, target: usize) -> bool {
    let mut end = 0;
    runs.iter().all(|run| {
        let fits = [1, 2, 4, 8].contains(&run.width)
            && run.len.is_multiple_of(run.width)
            && run.target >= end
            && run.len <= target.saturating_sub(run.target)
            && run.len <= base.saturating_sub(run.base);
        end = run.target.saturating_add(run.len);
        fits
    })
}
