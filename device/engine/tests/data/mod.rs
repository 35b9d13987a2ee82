//! Data that was not made here: where it lies, and the `.npz` files in it.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};

use device_engine::import::Picture;

/// A file or folder of the shared data; `None`, saying so, where it is absent.
pub fn find(name: &str) -> Option<PathBuf> {
    let base = std::env::var_os("FLYWHEEL_DATA").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data"),
        PathBuf::from,
    );
    let path = base.join(name);
    if path.exists() {
        return Some(path);
    }
    eprintln!("skipped: no {} (set FLYWHEEL_DATA)", path.display());
    None
}

/// A picture file.
pub fn picture(path: &Path) -> Picture {
    let image = image::open(path).unwrap().into_rgb8();
    Picture {
        width: image.width(),
        height: image.height(),
        channels: 3,
        pixels: image.into_raw(),
    }
}

/// The images (u8, 28 × 28) and labels of the MNIST test set.
pub fn mnist_test(dir: &Path) -> (Vec<u8>, Vec<u8>) {
    let read = |name: &str, head: usize| {
        let bytes = std::fs::read(dir.join(name)).unwrap();
        let mut out = Vec::new();
        flate2::read::GzDecoder::new(&bytes[..])
            .read_to_end(&mut out)
            .unwrap();
        out.split_off(head)
    };
    (
        read("t10k-images-idx3-ubyte.gz", 16),
        read("t10k-labels-idx1-ubyte.gz", 8),
    )
}

/// The arrays of an `.npz` file by name, as f32, flattened.
pub fn npz(path: &Path) -> BTreeMap<String, Vec<f32>> {
    let bytes = std::fs::read(path).unwrap();
    let u16_at = |at: usize| usize::from(u16::from_le_bytes([bytes[at], bytes[at + 1]]));
    let u32_at = |at: usize| {
        u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]) as usize
    };
    let end = bytes.windows(4).rposition(|w| w == b"PK\x05\x06").unwrap();
    let (count, mut at) = (u16_at(end + 10), u32_at(end + 16));
    let mut arrays = BTreeMap::new();
    for _ in 0..count {
        let (name_len, extra, comment) = (u16_at(at + 28), u16_at(at + 30), u16_at(at + 32));
        let name = std::str::from_utf8(&bytes[at + 46..at + 46 + name_len]).unwrap();
        let (packed, local) = (u32_at(at + 20), u32_at(at + 42));
        let start = local + 30 + u16_at(local + 26) + u16_at(local + 28);
        let raw = &bytes[start..start + packed];
        let mut array = Vec::new();
        if u16_at(at + 10) == 0 {
            array.extend_from_slice(raw);
        } else {
            flate2::read::DeflateDecoder::new(raw)
                .read_to_end(&mut array)
                .unwrap();
        }
        arrays.insert(name.trim_end_matches(".npy").to_owned(), npy(&array));
        at += 46 + name_len + extra + comment;
    }
    arrays
}

fn npy(bytes: &[u8]) -> Vec<f32> {
    let head = 10 + usize::from(u16::from_le_bytes([bytes[8], bytes[9]]));
    let description = String::from_utf8_lossy(&bytes[..head]);
    let body = &bytes[head..];
    if description.contains("'<f4'") {
        let words = body.chunks_exact(4);
        words
            .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
            .collect()
    } else {
        assert!(description.contains("'<f2'"), "{description}");
        let words = body.chunks_exact(2);
        words
            .map(|b| half(u16::from_le_bytes([b[0], b[1]])))
            .collect()
    }
}

/// An IEEE 754 binary16 value.
fn half(bits: u16) -> f32 {
    let sign = if bits >> 15 == 1 { -1.0 } else { 1.0 };
    let (exponent, fraction) = (i32::from(bits >> 10 & 31), f32::from(bits & 1023));
    match exponent {
        0 => sign * fraction * 2f32.powi(-24),
        31 => sign * f32::INFINITY,
        _ => sign * (1.0 + fraction / 1024.0) * 2f32.powi(exponent - 15),
    }
}
