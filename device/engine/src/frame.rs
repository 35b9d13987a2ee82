//! A borrowed image, as every source gives it and every consumer takes it.

/// Pixels of one image: u8, row by row, channels interleaved (HWC).
///
/// The fields are not checked against each other here; [`preprocess`](crate::preprocess()) does
/// that before it reads a pixel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frame<'a> {
    /// `height · width · channels` bytes.
    pub pixels: &'a [u8],
    /// Columns.
    pub width: u32,
    /// Rows.
    pub height: u32,
    /// 1 (gray) or 3 (red, green, blue).
    pub channels: u8,
}
