//! Pictures as people and models see them: decoding whatever devices upload, and PNG for screens.

use std::io::Cursor;

use anyhow::{Context, Result, bail};
use flywheel_shared::message::Codec;
use image::{DynamicImage, ExtendedColorType, ImageEncoder, ImageFormat};

/// Largest side of a picture in pixels; larger ones are refused before memory is taken.
const MAX_SIDE: u32 = 8192;

/// A decoded picture: u8, HWC, 1 or 3 channels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Picture {
    /// Columns in pixels.
    pub width: u32,
    /// Rows in pixels.
    pub height: u32,
    /// 1 for grey, 3 for red, green, blue.
    pub channels: u8,
    /// `width × height × channels` bytes.
    pub pixels: Vec<u8>,
}

impl Picture {
    /// Decodes a stored picture.
    ///
    /// # Errors
    /// If the bytes are not what `codec` says, or do not fill `width` × `height`.
    pub fn decode(codec: Codec, width: u32, height: u32, bytes: &[u8]) -> Result<Self> {
        let raw = |channels: u8| {
            let expected = width as usize * height as usize * channels as usize;
            if expected == 0 {
                bail!("the picture has no pixels");
            }
            if bytes.len() != expected {
                bail!(
                    "a raw picture of {width}×{height}×{channels} has {expected} bytes, not {}",
                    bytes.len()
                );
            }
            Ok(Self {
                width,
                height,
                channels,
                pixels: bytes.to_vec(),
            })
        };
        match codec {
            Codec::Gray8 => raw(1),
            Codec::Rgb8 => raw(3),
            Codec::Jpeg => Self::decode_file(bytes, Some(ImageFormat::Jpeg)),
            Codec::Png => Self::decode_file(bytes, Some(ImageFormat::Png)),
        }
    }

    /// Decodes a picture file; grey files stay grey.
    ///
    /// # Errors
    /// If the file is damaged, of an unknown format, empty, or wider or higher than 8,192 pixels.
    pub fn decode_file(bytes: &[u8], format: Option<ImageFormat>) -> Result<Self> {
        let mut reader = image::ImageReader::new(Cursor::new(bytes));
        match format {
            Some(format) => reader.set_format(format),
            None => {
                reader = reader
                    .with_guessed_format()
                    .context("the picture can't be read")?;
            }
        }
        let mut limits = image::Limits::default();
        limits.max_image_width = Some(MAX_SIDE);
        limits.max_image_height = Some(MAX_SIDE);
        reader.limits(limits);
        let decoded = reader
            .decode()
            .context("the picture is damaged or not a PNG, JPEG, BMP or PPM file")?;
        let (width, height) = (decoded.width(), decoded.height());
        let (channels, pixels) = match decoded {
            DynamicImage::ImageLuma8(grey) => (1, grey.into_raw()),
            DynamicImage::ImageLuma16(_) | DynamicImage::ImageLumaA8(_) => {
                (1, decoded.into_luma8().into_raw())
            }
            other => (3, other.into_rgb8().into_raw()),
        };
        Ok(Self {
            width,
            height,
            channels,
            pixels,
        })
    }

    /// The picture as a PNG file.
    ///
    /// # Errors
    /// If the pixels do not fill the picture.
    pub fn to_png(&self) -> Result<Vec<u8>> {
        let colour = if self.channels == 1 {
            ExtendedColorType::L8
        } else {
            ExtendedColorType::Rgb8
        };
        let mut png = Vec::new();
        image::codecs::png::PngEncoder::new(&mut png)
            .write_image(&self.pixels, self.width, self.height, colour)
            .context("the picture can't be encoded as PNG")?;
        Ok(png)
    }

    /// The picture as the engine's frame.
    pub fn frame(&self) -> device_engine::Frame<'_> {
        device_engine::Frame {
            pixels: &self.pixels,
            width: self.width,
            height: self.height,
            channels: self.channels,
        }
    }

    /// The same picture with no side longer than `most` pixels.
    ///
    /// # Errors
    /// If it has no pixels.
    pub fn at_most(self, most: u32) -> Result<Self> {
        let largest = self.width.max(self.height);
        if largest <= most {
            return Ok(self);
        }
        let side = |side: u32| (side * most / largest).max(1);
        self.resized(side(self.width), side(self.height), self.channels)
    }

    /// The same picture at `width` × `height` with `channels`, by the resampling that devices
    /// use, so that what is trained on is what is seen.
    ///
    /// # Errors
    /// If either picture has no pixels.
    pub fn resized(&self, width: u32, height: u32, channels: u8) -> Result<Self> {
        if (self.width, self.height, self.channels) == (width, height, channels) {
            return Ok(self.clone());
        }
        let spec = flywheel_shared::spec::InputSpec::new(
            u16::try_from(width).context("the picture is too wide")?,
            u16::try_from(height).context("the picture is too high")?,
            channels,
        );
        let mut planes = vec![0f32; spec.len()];
        device_engine::preprocess(&self.frame(), &spec, &mut planes)
            .context("the picture can't be resized")?;
        let area = width as usize * height as usize;
        let mut pixels = vec![0u8; spec.len()];
        for (channel, plane) in planes.chunks_exact(area).enumerate() {
            for (at, value) in plane.iter().enumerate() {
                pixels[at * channels as usize + channel] =
                    (value * 255.0).round().clamp(0.0, 255.0) as u8;
            }
        }
        Ok(Self {
            width,
            height,
            channels,
            pixels,
        })
    }

    /// Difference hash of the picture: 8 × 8 signs of the horizontal gradient of its grey 9 × 8
    /// thumbnail. Near-duplicates differ in few bits.
    pub fn dhash(&self) -> u64 {
        let Ok(small) = self.resized(9, 8, 1) else {
            return 0;
        };
        small
            .pixels
            .chunks_exact(9)
            .flat_map(|row| row.windows(2))
            .fold(0, |bits, pair| bits << 1 | u64::from(pair[0] < pair[1]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn png_round_trip_keeps_pixels_and_channels() {
        for channels in [1u8, 3] {
            let picture = Picture {
                width: 5,
                height: 4,
                channels,
                pixels: (0..20 * channels).collect(),
            };
            let png = picture.to_png().unwrap();
            assert_eq!(Picture::decode_file(&png, None).unwrap(), picture);
        }
    }

    #[test]
    fn damaged_pictures_are_refused() {
        assert!(Picture::decode_file(b"", None).is_err());
        assert!(Picture::decode_file(b"\x89PNG\r\n\x1a\nxx", None).is_err());
        let error = Picture::decode(Codec::Rgb8, 4, 4, &[0; 47]).unwrap_err();
        assert!(error.to_string().contains("48 bytes, not 47"), "{error}");
    }

    #[test]
    fn the_hash_is_stable_under_brightness() {
        let ramp = |gain: u32| Picture {
            width: 32,
            height: 32,
            channels: 1,
            pixels: (0..1024u32)
                .map(|i| ((i % 32 * 3 + i / 32) * gain / 4) as u8)
                .collect(),
        };
        let flipped = Picture {
            pixels: ramp(4).pixels.into_iter().rev().collect(),
            ..ramp(4)
        };
        assert!((ramp(4).dhash() ^ ramp(3).dhash()).count_ones() <= 3);
        assert!((ramp(4).dhash() ^ flipped.dhash()).count_ones() > 30);
    }
}
